//! How fast the drain goes: as fast as it can while no guest asks for anything, else out of their way.
//! No I/O and no clock: it is told whether guests have requests under way, and when.

use std::time::Duration;

/// A disk is in use until so long after the last request that was seen.
const QUIET_AFTER: Duration = Duration::from_millis(20);
/// The longest rest, whatever the work before has taken.
const REST_MAX: Duration = Duration::from_millis(5);

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Speed {
    /// Bytes that are being copied at once.
    pub(crate) in_flight_bytes: u64,
    /// Blocks after which a batch is synced.
    pub(crate) batch_blocks: u64,
    /// Whether all that is being copied is finished before more is claimed. Only then can the drain rest, for
    /// while it has claims guests' writes may wait for them.
    pub(crate) by_stints: bool,
}

/// Nobody waits: one sync for 1 GiB. What is in flight stays in a processor's cache between its read and its write.
const FULL: Speed = Speed { in_flight_bytes: 2 << 20, batch_blocks: 262_144, by_stints: false };
/// Guests work: little is ahead of their I/O in the device's queue, and a sync is short.
const GENTLE: Speed = Speed { in_flight_bytes: 512 << 10, batch_blocks: 16_384, by_stints: true };

/// Decides, from what was seen of the guests.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When a request was last seen under way.
    last_seen: Option<Duration>,
}

impl Pace {
    /// How fast to go on at `now`, when guests have requests under way, or not.
    pub(crate) fn speed(&mut self, busy: bool, now: Duration) -> Speed {
        if busy {
            self.last_seen = Some(now);
        }
        if self.is_gentle(now) { GENTLE } else { FULL }
    }

    /// How long to rest at `now`, after work of the length of `worked`: as long as that, while guests work.
    pub(crate) fn rest(&self, worked: Duration, now: Duration) -> Duration {
        if self.is_gentle(now) { worked.min(REST_MAX) } else { Duration::ZERO }
    }

    fn is_gentle(&self, now: Duration) -> bool {
        self.last_seen.is_some_and(|seen| now.saturating_sub(seen) < QUIET_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn disk_that_nobody_uses_is_drained_at_full_speed_without_rest() {
        let mut pace = Pace::default();
        for at in 0..1000 {
            assert_eq!(pace.speed(false, MS * at), FULL);
            assert_eq!(pace.rest(MS * 5, MS * at), Duration::ZERO);
        }
    }

    #[test]
    fn guest_that_was_seen_slows_the_drain_until_it_has_been_quiet_for_a_while() {
        let mut pace = Pace::default();
        assert_eq!(pace.speed(true, MS * 100), GENTLE);
        assert_eq!(pace.speed(false, MS * 100 + QUIET_AFTER - MS), GENTLE);
        assert_eq!(pace.rest(MS * 3, MS * 101), MS * 3);
        assert_eq!(pace.speed(false, MS * 100 + QUIET_AFTER), FULL);
        assert_eq!(pace.rest(MS * 3, MS * 100 + QUIET_AFTER), Duration::ZERO);
    }

    /// The drain always goes on: a slow device must not make it rest for ever.
    #[test]
    fn rest_has_a_bound() {
        let mut pace = Pace::default();
        pace.speed(true, MS);
        assert_eq!(pace.rest(Duration::from_secs(60), MS), REST_MAX);
    }
}
