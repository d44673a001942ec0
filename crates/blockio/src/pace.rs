//! Whether writes to the page cache are made at once.
//!
//! A buffered write to ext4 is a copy of some microseconds, but io_uring can't know that it won't wait, and hands it
//! to a thread at several times the cost. So such writes are made in place for as long as they are quick;
//! when the kernel throttles the file, they go through the ring again, where they hold up nothing else.

use std::time::{Duration, Instant};

use crate::{
    now::Way,
    worth::{Worth, minor_faults},
};

/// A write that took longer than this had to wait for storage.
const INLINE_WRITE_MAX: Duration = Duration::from_millis(1);
const PAGE_SIZE: u64 = 4096;
/// How long writes are left to the kernel's threads after one that had to wait.
const THREADS_FOR: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    threads_until: Option<Instant>,
    /// When the write that was made last began.
    began: Option<Instant>,
    /// Whether writes through a map pay.
    worth: Worth,
}

impl Pace {
    /// Whether a write that would need a thread is made in place.
    pub(crate) fn is_quick(&mut self) -> bool {
        match self.threads_until {
            Some(until) if Instant::now() < until => false,
            _ => {
                self.threads_until = None;
                true
            }
        }
    }

    /// Makes a write in place, and notes how long that took, with the parts of it before if it `goes_on`.
    pub(crate) fn timed<T>(&mut self, goes_on: bool, write: impl FnOnce() -> T) -> T {
        let now = Instant::now();
        let began = self.began.take().filter(|_| goes_on).unwrap_or(now);
        self.began = Some(began);
        let outcome = write();
        self.ended(began, Instant::now());
        outcome
    }

    /// Makes a write of `len` bytes in place if writes are quick. `write` is told whether a map pays, and tells which
    /// way the write was made, if it was.
    pub(crate) fn try_now(&mut self, len: u64, write: impl FnOnce(bool) -> Option<Way>) -> bool {
        if !self.is_quick() {
            return false;
        }
        let began = Instant::now();
        self.began = Some(began);
        let way = write(self.worth.pays(began));
        let now = Instant::now();
        if way == Some(Way::Map) {
            self.worth.wrote(len.div_ceil(PAGE_SIZE), now, minor_faults);
        }
        self.ended(began, now);
        way.is_some()
    }

    fn ended(&mut self, began: Instant, now: Instant) {
        if now.duration_since(began) > INLINE_WRITE_MAX {
            self.threads_until = Some(now + THREADS_FOR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A long write is cut into short ones; together they hold up what comes after it.
    #[test]
    fn write_in_parts_counts_as_one() {
        for goes_on in [false, true] {
            let began = Instant::now().checked_sub(2 * INLINE_WRITE_MAX);
            let mut pace = Pace { began, ..Pace::default() };
            pace.timed(goes_on, || ());
            assert_eq!(pace.is_quick(), !goes_on);
        }
    }
}
