//! Whether writes to the page cache are made at once.
//!
//! A buffered write to ext4 is a copy of some microseconds, but io_uring can't know that it won't wait, and hands it
//! to a thread at several times the cost. So such writes are made in place for as long as they are quick;
//! when the kernel throttles the file, they go through the ring again, where they hold up nothing else.
//!
//! A throttled writer is not held up at each write but every now and then, so writes must have been quick
//! for some time before that means anything.

use std::time::{Duration, Instant};

/// A write that took longer than this had to wait: a copy of 128 KiB takes about 20 microseconds.
const INLINE_WRITE_MAX: Duration = Duration::from_micros(200);
/// How long writes are left to the kernel's threads after one that had to wait: at first, and at most. It
/// doubles each time when writes were quick for no longer than that.
const THREADS_MIN: Duration = Duration::from_millis(100);
const THREADS_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Until when writes are left to threads.
    threads_until: Option<Instant>,
    /// For how long they are, or were the last time.
    threads_for: Duration,
}

impl Pace {
    /// Whether a write that would need a thread is made in place.
    pub(crate) fn is_quick(&mut self) -> bool {
        self.threads_until.is_none_or(|until| Instant::now() >= until)
    }

    /// Makes a write in place, and notes how long that took.
    pub(crate) fn timed<T>(&mut self, write: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let outcome = write();
        self.took(began, Instant::now());
        outcome
    }

    /// Makes a write in place if writes are quick; what it returns, or `false`.
    pub(crate) fn try_now(&mut self, write: impl FnOnce() -> bool) -> bool {
        self.is_quick() && self.timed(write)
    }

    /// A write was made in place.
    fn took(&mut self, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) <= INLINE_WRITE_MAX {
            return;
        }
        let again = self
            .threads_until
            .is_some_and(|until| began.saturating_duration_since(until) <= self.threads_for);
        self.threads_for = if again { (self.threads_for * 2).min(THREADS_MAX) } else { THREADS_MIN };
        self.threads_until = Some(ended + self.threads_for);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_millis(5);

    /// For how long writes are left to threads after a slow one that began `after` they were made in place again.
    fn slow(pace: &mut Pace, after: Duration) -> Duration {
        let began = pace.threads_until.unwrap_or_else(Instant::now) + after;
        pace.took(began, began + SLOW);
        pace.threads_until.unwrap() - (began + SLOW)
    }

    #[test]
    fn pace_of_quick_writes_leaves_none_to_threads() {
        let mut pace = Pace::default();
        let now = Instant::now();
        pace.took(now, now + INLINE_WRITE_MAX);
        assert!(pace.is_quick());
        assert!(pace.try_now(|| true));
    }

    #[test]
    fn pace_of_a_throttled_file_leaves_writes_to_threads_for_longer_each_time() {
        let mut pace = Pace::default();
        assert_eq!(slow(&mut pace, Duration::ZERO), THREADS_MIN);
        assert!(!pace.is_quick());
        assert!(!pace.try_now(|| true));
        let mut last = THREADS_MIN;
        while last < THREADS_MAX {
            let next = slow(&mut pace, last / 2);
            assert_eq!(next, (last * 2).min(THREADS_MAX));
            last = next;
        }
        assert_eq!(slow(&mut pace, Duration::from_millis(1)), THREADS_MAX);
    }

    #[test]
    fn pace_of_writes_that_were_quick_for_long_begins_anew() {
        let mut pace = Pace::default();
        for _ in 0..5 {
            slow(&mut pace, Duration::ZERO);
        }
        let long = pace.threads_for + Duration::from_millis(1);
        assert_eq!(slow(&mut pace, long), THREADS_MIN);
    }
}
