//! Whether writing through a map pays, by how often pages had to be made ready for it lately.
//!
//! A page of a file on a disk is written through the map at no cost but the copy as long as it stays dirty. The first time, and
//! each time after it was written back, that is a fault, which costs a third of the write by a system call that it saves
//! and more. Where pages are written back nearly as often as they are written, because more is written than the host
//! keeps, that is a loss. So faults are counted, all that the thread has: if they were many for what was written through the
//! map in a [`PERIOD`], it is not written for a while; each time for twice as long, unless it went well for long between.

use std::time::{Duration, Instant};

use crate::pace::usage_of_thread;

/// So long the map is given to prove itself, at least.
const PERIOD: Duration = Duration::from_secs(4);
/// Writes through the map in a period that tell something.
const WRITES_MIN: u32 = 64;
/// So many pages at least are to be written for each fault.
const PAGES_FOR_FAULT: u64 = 3;
/// How long the map is not written at first, and at last.
const PAUSE_MIN: Duration = Duration::from_secs(8);
const PAUSE_MAX: Duration = Duration::from_secs(128);
/// It went well for long: so many times as long as it was not written before.
const WELL: u32 = 2;

/// What is known of a thread's writes through maps.
#[derive(Debug, Default)]
pub(crate) struct Worth {
    period: Option<Period>,
    /// Whether maps are not written.
    rests: bool,
    /// Until when they are not, or were not last, and for how long that is.
    until: Option<Instant>,
    pause: Duration,
}

#[derive(Debug)]
struct Period {
    since: Instant,
    /// The thread's faults before.
    faults: i64,
    writes: u32,
    pages: u64,
}

impl Worth {
    /// Whether what is written now is written through a map if that is possible.
    #[inline]
    pub(crate) fn pays(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.rests && self.until.is_none_or(|until| now() >= until) {
            self.rests = false;
        }
        !self.rests
    }

    /// So many pages were written through a map. `faults` tells the thread's faults since it began.
    #[inline]
    pub(crate) fn wrote(&mut self, pages: u64, now: impl FnOnce() -> Instant, faults: impl FnOnce() -> i64) {
        let Some(period) = &mut self.period else {
            self.period = Some(Period { since: now(), faults: faults(), writes: 0, pages: 0 });
            return;
        };
        period.writes = period.writes.wrapping_add(1);
        period.pages = period.pages.saturating_add(pages);
        // No need to look at the clock more often.
        if period.writes.is_multiple_of(WRITES_MIN) {
            self.judge(now(), faults);
        }
    }

    #[cold]
    fn judge(&mut self, now: Instant, faults: impl FnOnce() -> i64) {
        let Some(period) =
            self.period.take_if(|period| now.saturating_duration_since(period.since) >= PERIOD)
        else {
            return;
        };
        let faults = u64::try_from(faults().saturating_sub(period.faults)).unwrap_or(0);
        if faults.saturating_mul(PAGES_FOR_FAULT) <= period.pages {
            return;
        }
        let well = self
            .until
            .is_none_or(|until| now.saturating_duration_since(until) > (self.pause * WELL).max(2 * PERIOD));
        self.pause = if well { PAUSE_MIN } else { (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) };
        (self.rests, self.until) = (true, Some(now + self.pause));
    }
}

/// Faults of the calling thread since it began, without those that waited for a disk.
pub(crate) fn minor_faults() -> i64 {
    usage_of_thread().map_or(0, |usage| usage.ru_minflt)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A thread that writes a page through the map each millisecond that it pays.
    struct Thread {
        worth: Worth,
        now: Instant,
        faults: i64,
    }

    impl Thread {
        fn new() -> Self {
            Self { worth: Worth::default(), now: Instant::now(), faults: 1000 }
        }

        /// For so long, with a fault at every so manieth write; how many were made.
        fn write(&mut self, time: Duration, every: u64) -> u64 {
            let (end, mut made) = (self.now + time, 0);
            while self.now < end {
                self.now += MS;
                if self.worth.pays(|| self.now) {
                    made += 1;
                    self.faults += i64::from(made % every == 0);
                    let faults = self.faults;
                    self.worth.wrote(1, || self.now, || faults);
                }
            }
            made
        }

        fn pays(&mut self) -> bool {
            self.worth.pays(|| self.now)
        }
    }

    #[test]
    fn map_whose_pages_are_written_back_all_the_time_rests_for_longer_each_time() {
        let mut thread = Thread::new();
        for pause in [8, 16, 32, 64, 128, 128] {
            thread.write(PERIOD / 2, 2);
            assert!(thread.pays(), "{pause}");
            let made = (0..PERIOD.as_millis()).find(|_| !thread.pays() || thread.write(MS, 1) == 0);
            assert!(made.is_some(), "{pause}");
            assert_eq!(thread.write(Duration::from_secs(pause) - MS, 1), 0);
            assert!(!thread.pays(), "{pause}");
            thread.now += MS;
            assert!(thread.pays(), "{pause}");
        }
        // After it went well for long.
        thread.write(WELL * PAUSE_MAX + 2 * PERIOD, 100);
        assert!(thread.pays());
        thread.write(2 * PERIOD, 1);
        assert!(!thread.pays());
        thread.now += PAUSE_MIN;
        assert!(thread.pays());
    }

    #[test]
    fn map_whose_pages_stay_dirty_for_some_writes_goes_on() {
        let mut thread = Thread::new();
        for _ in 0..10 {
            thread.write(PERIOD / 4, 1);
            thread.write(PERIOD * 3 / 4 + 2 * MS, 1000);
            assert!(thread.pays());
        }
    }

    #[test]
    fn few_writes_tell_nothing_and_faults_are_asked_for_twice_in_a_period() {
        let (mut worth, mut now) = (Worth::default(), Instant::now());
        worth.wrote(1, || now, || 0);
        for _ in 1..WRITES_MIN {
            now += PERIOD;
            worth.wrote(1, || now, || unreachable!("asked without need"));
        }
        assert!(worth.pays(|| now));
        worth.wrote(1, || now, || 1_000_000);
        assert!(!worth.pays(|| now));
    }

    #[test]
    fn thread_has_a_fault_for_each_page_that_it_writes_first() {
        let before = minor_faults();
        let mut memory = vec![0u8; 64 << 20];
        memory.chunks_mut(4096).for_each(|page| page[0] = std::hint::black_box(1));
        assert!(std::hint::black_box(&memory).len() > 1 && minor_faults() > before);
    }
}
