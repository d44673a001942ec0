//! Whether writes to the page cache are made at once.
//!
//! A buffered write to ext4 is a copy of some microseconds, but io_uring can't know that it won't wait, and hands it
//! to a thread at several times the cost. So such writes are made in place for as long as they are quick;
//! when the kernel throttles the file, they go through the ring again, where they hold up nothing else.
//!
//! A write also takes long if its thread has to leave the processor to another one. That says nothing of the file, and
//! happens most where processors are scarce and a kernel's thread for each write the dearest. The kernel counts how often
//! a thread slept and how often it was made to go. To ask costs a tenth of a short write: it is asked only for a while after
//! a write that took long, and not before each. Of the first one it is not known.

use std::time::{Duration, Instant};

use crate::{
    now::Way,
    worth::{Worth, minor_faults},
};

/// A write that took longer than this had to wait: for storage, or for a processor.
const INLINE_WRITE_MAX: Duration = Duration::from_millis(1);
const PAGE_SIZE: u64 = 4096;
/// How long writes are left to the kernel's threads after one that had to wait.
const THREADS_FOR: Duration = Duration::from_millis(100);
/// How long after a write that took long its thread is watched.
const WATCH_FOR: Duration = Duration::from_secs(1);
/// What is known of a watched thread is asked anew before a write if it is older.
const WATCH_EVERY: Duration = Duration::from_micros(100);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    threads_until: Option<Instant>,
    /// When the write that was made last began.
    began: Option<Instant>,
    watch: Option<Watch>,
    /// Whether writes through a map pay.
    worth: Worth,
}

/// What is known of a watched thread.
#[derive(Debug)]
struct Watch {
    until: Instant,
    asked: Instant,
    switches: Switches,
}

/// How often a thread has given up its processor since it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Switches {
    /// To sleep.
    slept: i64,
    /// Because another one was to have it.
    pushed: i64,
}

impl Switches {
    /// Those of the calling thread; `None`: it can't be told.
    fn here() -> Option<Self> {
        let usage = usage_of_thread()?;
        Some(Self { slept: usage.ru_nvcsw, pushed: usage.ru_nivcsw })
    }

    /// Whether all of the time since then that the thread had no processor others had it.
    fn was_only_pushed(self, before: Self) -> bool {
        self.slept == before.slept && self.pushed != before.pushed
    }
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
        self.timed_by(goes_on, Instant::now, Switches::here, write)
    }

    /// The same, by the clock and the counts that it is given.
    #[inline]
    fn timed_by<T>(
        &mut self,
        goes_on: bool,
        now: impl Fn() -> Instant,
        switches: impl Fn() -> Option<Switches>,
        write: impl FnOnce() -> T,
    ) -> T {
        let begin = now();
        let first = self.began.take().filter(|_| goes_on);
        // What has slept in the part before has slept.
        if self.watch.is_some() && first.is_none() {
            self.look(begin, &switches);
        }
        let began = first.unwrap_or(begin);
        self.began = Some(began);
        let outcome = write();
        let end = now();
        if end.duration_since(began) > INLINE_WRITE_MAX {
            self.took_long(end, switches());
        }
        outcome
    }

    /// Asks how often a watched thread has slept, if that was not just done.
    #[cold]
    fn look(&mut self, now: Instant, switches: impl Fn() -> Option<Switches>) {
        let Some(watch) = self.watch.take_if(|watch| now < watch.until) else {
            return self.watch = None;
        };
        self.watch = if now.duration_since(watch.asked) < WATCH_EVERY {
            Some(watch)
        } else {
            switches().map(|switches| Watch { asked: now, switches, ..watch })
        };
    }

    /// A write has taken long, until `now`.
    #[cold]
    fn took_long(&mut self, now: Instant, switches: Option<Switches>) {
        let before = self.watch.take().map(|watch| watch.switches);
        let only_pushed = before.zip(switches).is_some_and(|(before, after)| after.was_only_pushed(before));
        self.watch = switches.map(|switches| Watch { until: now + WATCH_FOR, asked: now, switches });
        if !only_pushed {
            self.threads_until = Some(now + THREADS_FOR);
        }
    }

    /// Makes a write of `len` bytes in place if writes are quick. `write` is told whether a map pays, and tells which
    /// way the write was made, if it was.
    pub(crate) fn try_now(&mut self, len: u64, write: impl FnOnce(bool) -> Option<Way>) -> bool {
        if !self.is_quick() {
            return false;
        }
        let map_pays = self.worth.pays(Instant::now);
        let way = self.timed(false, || write(map_pays));
        if way == Some(Way::Map) {
            self.worth.wrote(len.div_ceil(PAGE_SIZE), Instant::now, minor_faults);
        }
        way.is_some()
    }
}

/// What the kernel has counted for the calling thread since it began; `None`: it can't be told.
pub(crate) fn usage_of_thread() -> Option<libc::rusage> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` has room for the answer.
    let told = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } == 0;
    // SAFETY: filled by the call above, if that succeeded.
    told.then(|| unsafe { usage.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SHORT: Duration = Duration::from_micros(5);
    const LONG: Duration = Duration::from_millis(3);

    /// A thread, its clock, and how often it was asked about.
    struct Thread {
        now: Cell<Instant>,
        switches: Cell<Switches>,
        asked: Cell<u32>,
        pace: Pace,
    }

    impl Thread {
        fn new() -> Self {
            let switches = Switches { slept: 7, pushed: 3 };
            Self {
                now: Cell::new(Instant::now()),
                switches: Cell::new(switches),
                asked: Cell::new(0),
                pace: Pace::default(),
            }
        }

        fn switch(&self, slept: i64, pushed: i64) {
            let Switches { slept: before, pushed: pushed_before } = self.switches.get();
            self.switches.set(Switches { slept: before + slept, pushed: pushed_before + pushed });
        }

        fn pass(&self, time: Duration) {
            self.now.set(self.now.get() + time);
        }

        /// A write that takes so long, in which it has slept and was pushed so often. Whether it sends others away.
        fn write(&mut self, goes_on: bool, time: Duration, slept: i64, pushed: i64) -> bool {
            let mut pace = std::mem::take(&mut self.pace);
            pace.threads_until = None;
            let ask = || {
                self.asked.set(self.asked.get() + 1);
                Some(self.switches.get())
            };
            pace.timed_by(
                goes_on,
                || self.now.get(),
                ask,
                || {
                    self.pass(time);
                    self.switch(slept, pushed);
                },
            );
            self.pace = pace;
            self.pace.threads_until.is_some_and(|until| until == self.now.get() + THREADS_FOR)
        }
    }

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

    /// As long as writes are quick it is not asked why, whatever the thread does between them.
    #[test]
    fn quick_writes_ask_for_nothing() {
        let mut thread = Thread::new();
        for _ in 0..100 {
            thread.switch(1, 1);
            thread.pass(LONG);
            assert!(!thread.write(false, SHORT, 0, 1));
        }
        assert_eq!(thread.asked.get(), 0);
    }

    #[test]
    fn write_that_was_only_pushed_aside_sends_no_others_away() {
        let mut thread = Thread::new();
        assert!(thread.write(false, LONG, 0, 1), "of the first one it is not known");
        // Whatever the thread did between.
        thread.pass(THREADS_FOR);
        thread.switch(50, 50);
        assert!(!thread.write(false, SHORT, 0, 0));
        assert!(!thread.write(false, LONG, 0, 1));
        assert!(!thread.write(false, LONG, 0, 2));
        assert!(thread.write(false, LONG, 1, 0), "it has slept");
        assert!(thread.write(false, LONG, 1, 1), "both");
        assert!(thread.write(false, LONG, 0, 0), "nobody knows why");
        assert!(!thread.write(false, LONG, 0, 1));
    }

    /// It is watched for a while, and not asked about at each of many writes.
    #[test]
    fn watched_thread_is_asked_about_now_and_then_and_not_for_ever() {
        let mut thread = Thread::new();
        thread.write(false, LONG, 1, 0);
        assert_eq!(thread.asked.get(), 1);
        for _ in 0..1000 {
            thread.write(false, SHORT, 0, 0);
        }
        let most = 1000 * SHORT.as_micros() / WATCH_EVERY.as_micros();
        assert!((2..=1 + most).contains(&thread.asked.get().into()), "{}", thread.asked.get());
        thread.pass(WATCH_FOR);
        let before = thread.asked.get();
        assert!(!thread.write(false, SHORT, 0, 0));
        assert_eq!(thread.asked.get(), before);
        assert!(thread.write(false, LONG, 0, 1), "of the first one it is not known");
    }

    /// A part that slept is not forgotten when a later one is looked at.
    #[test]
    fn write_in_parts_of_which_one_slept_had_to_wait() {
        let mut thread = Thread::new();
        thread.write(false, LONG, 1, 0);
        let part = INLINE_WRITE_MAX * 2 / 3;
        thread.pass(LONG);
        assert!(!thread.write(false, part, 1, 0));
        assert!(thread.write(true, part, 0, 1));
        assert!(!thread.write(false, part, 0, 1));
        assert!(!thread.write(true, part, 0, 1));
    }

    #[test]
    fn thread_that_sleeps_is_seen_to() {
        let before = Switches::here().unwrap();
        std::thread::sleep(Duration::from_millis(1));
        let after = Switches::here().unwrap();
        assert!(after.slept > before.slept && !after.was_only_pushed(before));
    }
}
