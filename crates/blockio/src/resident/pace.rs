//! When a thread may read from maps: not for a while after such a read has waited for the disk.
//!
//! A major fault is a read of the disk that a thread waits for in the middle of a copy. The kernel
//! counts them for each thread. To ask takes as long as a third of a copy, so it is asked at a
//! thread's first read in a tick of the clock, and after so many reads. A fault turns the maps off for
//! the thread, for longer each time one follows soon.

use std::cell::Cell;

use crate::{clock::Moment, pace::usage_of_thread};

/// After so many reads it is asked whether one has waited.
const READS: u32 = 32;
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
#[derive(Debug)]
struct Walker {
    /// When it was asked last, and how many reads are left until it is asked again.
    asked: Cell<Moment>,
    left: Cell<u32>,
    /// Major faults by then.
    faults: Cell<Option<i64>>,
    /// Until when maps are off; 0: they are on.
    resume: Cell<Moment>,
    /// When they were turned on last, and for how long they had been off, nanoseconds.
    resumed: Cell<Moment>,
    pause_ns: Cell<u64>,
}

impl Walker {
    const fn new() -> Self {
        Self {
            asked: Cell::new(Moment(0)),
            left: Cell::new(0),
            faults: Cell::new(None),
            resume: Cell::new(Moment(0)),
            resumed: Cell::new(Moment(0)),
            pause_ns: Cell::new(0),
        }
    }

    /// What may be done now; `faults` tells the thread's major faults since it began.
    #[inline]
    fn step(&self, now: Moment, faults: impl FnOnce() -> i64) -> Pace {
        let left = self.left.get();
        if left > 0 && now == self.asked.get() {
            self.left.set(left - 1);
            return Pace::Go;
        }
        self.look(now, faults())
    }

    #[cold]
    fn look(&self, now: Moment, faults: i64) -> Pace {
        self.asked.set(now);
        self.left.set(0);
        if self.faults.replace(Some(faults)).is_some_and(|before| before != faults) {
            self.pause(now);
            return Pace::Stalled;
        }
        if now < self.resume.get() {
            return Pace::Pause;
        }
        if self.resume.replace(Moment(0)) != Moment(0) {
            self.resumed.set(now);
        }
        self.left.set(READS - 1);
        Pace::Go
    }

    fn pause(&self, now: Moment) {
        let before = self.pause_ns.get();
        let on = now.0.saturating_sub(self.resumed.get().0);
        let calm = on > before.saturating_mul(CALM_PAUSES);
        let pause = if calm { PAUSE_MIN_NS } else { (before * 2).clamp(PAUSE_MIN_NS, PAUSE_MAX_NS) };
        self.pause_ns.set(pause);
        self.resume.set(Moment(now.0.saturating_add(pause)));
    }
}

thread_local! {
    static WALKER: Walker = const { Walker::new() };
}

/// What the calling thread may do now.
#[inline]
pub(super) fn step(now: Moment) -> Pace {
    WALKER.with(|walker| walker.step(now, major_faults))
}

/// Major faults of the calling thread since it began.
pub(crate) fn major_faults() -> i64 {
    usage_of_thread().map_or(0, |usage| usage.ru_majflt)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn never() -> i64 {
        unreachable!("asked without need")
    }

    #[test]
    fn faults_are_asked_for_once_a_tick_and_after_so_many_reads() {
        let walker = Walker::new();
        for tick in 1..3 {
            for _ in 0..3 {
                assert_eq!(walker.step(Moment(tick * MS), || 5), Pace::Go);
                (1..READS).for_each(|_| assert_eq!(walker.step(Moment(tick * MS), never), Pace::Go));
            }
            assert_eq!(walker.step(Moment(tick * MS), || 5), Pace::Go);
        }
        assert_eq!(walker.step(Moment(MS), || 6), Pace::Stalled);
    }

    #[test]
    fn fault_between_reads_turns_maps_off_for_longer_each_time() {
        let walker = Walker::new();
        let (mut now, mut faults) = (10 * MS, 5);
        assert_eq!(walker.step(Moment(now), || faults), Pace::Go);
        for pause in [100, 200, 400, 800, 1600, 3200, 6400, 12800, 12800] {
            (now, faults) = (now + MS, faults + 1);
            assert_eq!(walker.step(Moment(now), || faults), Pace::Stalled);
            for (passed, expected) in
                [(0, Pace::Pause), (pause * MS - 1, Pace::Pause), (pause * MS, Pace::Go)]
            {
                assert_eq!(walker.step(Moment(now + passed), || faults), expected);
            }
            now += pause * MS;
            assert_eq!(walker.step(Moment(now), never), Pace::Go);
        }
        now += 12_800 * CALM_PAUSES * MS + 1;
        assert_eq!(walker.step(Moment(now), || faults), Pace::Go);
        assert_eq!(walker.step(Moment(now + MS), || faults + 1), Pace::Stalled);
        assert_eq!(walker.pause_ns.get(), PAUSE_MIN_NS);
    }

    #[test]
    fn fault_while_maps_are_off_keeps_them_off_for_longer() {
        let walker = Walker::new();
        assert_eq!(walker.step(Moment(MS), || 0), Pace::Go);
        assert_eq!(walker.step(Moment(2 * MS), || 1), Pace::Stalled);
        assert_eq!(walker.step(Moment(3 * MS), || 2), Pace::Stalled);
        assert_eq!(walker.step(Moment(202 * MS), || 2), Pace::Pause);
        assert_eq!(walker.step(Moment(203 * MS), || 2), Pace::Go);
    }
}
