//! How long a worker looks for more work before it sleeps.
//!
//! A wake-up across cores is the dearest part of a small request, so a worker polls for a while
//! after its last work. The window follows what polling would have caught: it opens when work came
//! soon after falling asleep, and halves each time when it would have been waited for in vain, so
//! that a queue that is idle most of the time soon does not poll at all.

use std::time::{Duration, Instant};

/// A window that is shorter than this is none.
const MIN: Duration = Duration::from_micros(4);

/// The polling window of one queue.
#[derive(Debug)]
pub(crate) struct PollWindow {
    max: Duration,
    window: Duration,
    /// When the last work was done, if the worker has gone to sleep since.
    idle_since: Option<Instant>,
}

impl PollWindow {
    /// Never polls longer than `max`; not at all if that is zero.
    pub(crate) fn new(max: Duration) -> Self {
        Self { max, window: max, idle_since: None }
    }

    /// How long to poll now.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// The worker sleeps from now on; it had nothing to do since `since`.
    pub(crate) fn sleeps(&mut self, since: Instant) {
        self.idle_since = Some(since);
    }

    /// The worker was woken at `now`.
    pub(crate) fn woken(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        let idle = now.saturating_duration_since(since);
        if idle <= self.max {
            self.window = self.max;
        } else {
            self.window /= 2;
            if self.window < MIN {
                self.window = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleep_for(poll: &mut PollWindow, micros: u64) {
        let now = Instant::now();
        poll.sleeps(now);
        poll.woken(now + Duration::from_micros(micros));
    }

    #[test]
    fn poll_window_of_a_busy_queue_opens_at_once() {
        let mut poll = PollWindow::new(Duration::from_micros(50));
        for _ in 0..10 {
            sleep_for(&mut poll, 1_000_000);
        }
        sleep_for(&mut poll, 49);
        assert_eq!(poll.window(), Duration::from_micros(50));
    }

    #[test]
    fn poll_window_of_an_idle_queue_shuts_soon() {
        let mut poll = PollWindow::new(Duration::from_micros(50));
        let mut spent = Duration::ZERO;
        for _ in 0..1000 {
            sleep_for(&mut poll, 1_000_000);
            spent += poll.window();
        }
        assert_eq!(poll.window(), Duration::ZERO);
        assert!(spent < Duration::from_micros(50));
    }

    #[test]
    fn poll_window_switched_off_never_opens() {
        let mut poll = PollWindow::new(Duration::ZERO);
        for micros in [0, 1, 10, 1000] {
            sleep_for(&mut poll, micros);
            assert_eq!(poll.window(), Duration::ZERO);
        }
    }
}
