//! Log lines that a guest or a frontend can cause: a few at first, then one per second.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How many lines are written before the limit holds.
const BURST: u32 = 8;
/// Time between lines after the burst.
const INTERVAL: Duration = Duration::from_secs(1);

/// A bound on the rate of log lines of one cause.
#[derive(Debug)]
pub(crate) struct RateLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    credit: u32,
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    pub(crate) const fn new() -> Self {
        Self { state: Mutex::new(State { credit: BURST, last: None, suppressed: 0 }) }
    }

    /// Writes a warning, or counts it as suppressed; `message` is only made in the first case.
    pub(crate) fn warn(&self, message: impl FnOnce() -> String) {
        match self.admit(Instant::now()) {
            Some(0) => log::warn!("{}", message()),
            Some(suppressed) => log::warn!("{} ({suppressed} similar messages not shown)", message()),
            None => {}
        }
    }

    /// `Some(lines suppressed since the last one)` if a line may be written.
    pub(crate) fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) >= INTERVAL) {
            state.credit = state.credit.max(1);
        }
        if state.credit == 0 {
            state.suppressed += 1;
            return None;
        }
        state.credit -= 1;
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_limit_under_a_flood_admits_a_burst_then_one_per_second() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        assert_eq!(limit.admit(start + INTERVAL), Some(1000 - u64::from(BURST)));
        assert_eq!(limit.admit(start + INTERVAL), None);
    }
}
