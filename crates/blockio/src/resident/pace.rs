//! When a thread may read from maps: not for a while after such a read has waited for the disk.
//!
//! A major fault is a read of the disk that a thread waits for in the middle of a copy. The kernel
//! counts them for each thread; asking takes as long as a third of a copy, so it is asked when time
//! has passed between two reads in which there could have been one. One fault turns the maps off for
//! the thread, for longer each time one follows soon.

use std::cell::Cell;

use super::{guard, known::Epoch};

/// Two reads of a thread with no more time than this between them had no major fault between them
/// that would matter, nanoseconds. A fault that finds the data in the host's memory takes 2000.
const SUSPICIOUS_NS: u64 = 20_000;
/// How long maps are off after the first major fault, nanoseconds; twice as long after each one that
/// comes before they have been on for [`CALM_PAUSES`] times as long as they were off.
const PAUSE_MIN_NS: u64 = 100_000_000;
/// They are never off for longer, nanoseconds.
const PAUSE_MAX_NS: u64 = 12_800_000_000;
const CALM_PAUSES: u64 = 8;

/// What a thread may do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pace {
    /// Read from maps.
    Go,
    /// Not.
    Pause,
    /// Not, and what was known to be resident no longer is to be believed.
    Stalled,
}

/// A thread's history.
#[derive(Debug, Default)]
pub(super) struct Walker {
    last_ns: u64,
    faults: Option<i64>,
    resume_ns: u64,
    pause_ns: u64,
}

impl Walker {
    pub(super) const fn new() -> Self {
        Self { last_ns: 0, faults: None, resume_ns: 0, pause_ns: 0 }
    }

    /// What may be done at `now_ns`; `faults` counts the thread's major faults, and is asked when
    /// there may have been one.
    #[inline]
    fn step(&mut self, now_ns: u64, faults: impl FnOnce() -> i64) -> Pace {
        let passed = now_ns.saturating_sub(self.last_ns);
        self.last_ns = now_ns;
        if passed > SUSPICIOUS_NS && self.has_stalled(now_ns, faults()) {
            return Pace::Stalled;
        }
        if now_ns < self.resume_ns { Pace::Pause } else { Pace::Go }
    }

    #[cold]
    fn has_stalled(&mut self, now_ns: u64, faults: i64) -> bool {
        let before = self.faults.replace(faults);
        if before.is_none_or(|before| before == faults) {
            return false;
        }
        let calm = now_ns.saturating_sub(self.resume_ns) > self.pause_ns.saturating_mul(CALM_PAUSES);
        self.pause_ns =
            if calm { PAUSE_MIN_NS } else { (self.pause_ns * 2).clamp(PAUSE_MIN_NS, PAUSE_MAX_NS) };
        self.resume_ns = now_ns.saturating_add(self.pause_ns);
        true
    }
}

thread_local! {
    static WALKER: Cell<Walker> = const { Cell::new(Walker::new()) };
    /// The epoch in which this thread was last found fit to take a `SIGBUS`; 0: none.
    static FIT: Cell<u32> = const { Cell::new(0) };
}

/// What the calling thread may do at `now_ns` (monotonic).
#[inline]
pub(super) fn step(now_ns: u64) -> Pace {
    WALKER.with(|walker| {
        let mut own = walker.take();
        let pace = own.step(now_ns, major_faults);
        walker.set(own);
        pace
    })
}

/// Whether the calling thread would survive a `SIGBUS`; looked at once an epoch.
#[inline]
pub(super) fn is_fit(epoch: Epoch) -> bool {
    FIT.with(|fit| {
        fit.get() == epoch.0 || {
            let survives = !guard::is_blocked_here() && guard::is_installed();
            fit.set(if survives { epoch.0 } else { 0 });
            survives
        }
    })
}

/// Major faults of the calling thread since it began.
fn major_faults() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` has room for the answer.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: filled by the call above, which succeeded.
    unsafe { usage.assume_init() }.ru_majflt
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn fault_between_reads_turns_maps_off_for_longer_each_time() {
        let mut walker = Walker::new();
        let mut now = 10 * MS;
        let never = || -> i64 { unreachable!("asked without need") };
        assert_eq!(walker.step(now, || 5), Pace::Go);
        assert_eq!(walker.step(now + SUSPICIOUS_NS, never), Pace::Go);
        now += MS;
        assert_eq!(walker.step(now, || 5), Pace::Go);
        for pause in [100, 200, 400, 800, 1600, 3200, 6400, 12800, 12800] {
            now += MS;
            let fault = walker.faults.unwrap() + 1;
            assert_eq!(walker.step(now, || fault), Pace::Stalled);
            assert_eq!(walker.step(now + 1, never), Pace::Pause);
            assert_eq!(walker.step(now + pause * MS - 1, || fault), Pace::Pause);
            now += pause * MS;
            assert_eq!(walker.step(now, never), Pace::Go);
        }
        now += 12_800 * CALM_PAUSES * MS + 1;
        let fault = walker.faults.unwrap();
        assert_eq!(walker.step(now, || fault), Pace::Go);
        now += MS;
        assert_eq!(walker.step(now, || fault + 1), Pace::Stalled);
        assert_eq!(walker.pause_ns, PAUSE_MIN_NS);
    }

    #[test]
    fn clock_that_steps_back_is_no_reason_to_ask() {
        let mut walker = Walker::new();
        assert_eq!(walker.step(50 * MS, || 0), Pace::Go);
        assert_eq!(walker.step(49 * MS, || unreachable!()), Pace::Go);
    }
}
