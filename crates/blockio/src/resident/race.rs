//! Which of two ways to do the same thing is the faster one on this processor: found out by doing it both ways.
//!
//! How a long copy is best made differs between processors by a factor of two in either direction, and what they say of
//! themselves does not tell. So now and then a few are made both ways in turns and timed, and the way that won most of
//! them is taken until the next time. A way is never far from being tried again, should the first result have been an
//! accident, and that costs little: one of 100 copies goes the slower way.

use std::{cell::Cell, time::Instant};

/// Each way is tried so often before one is chosen: an odd number.
const PAIRS: u8 = 9;
/// So many are done before both are tried again.
const SETTLED: u32 = 1000;

/// One of two ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    First,
    Second,
}

/// What is known of two ways by the thread that takes them.
#[derive(Debug)]
pub(super) struct Race {
    /// The better one, as far as is known.
    best: Cell<Way>,
    /// How many times it is taken before both are tried again.
    left: Cell<u32>,
    /// What the first way took, while the second is still to be tried.
    first: Cell<Option<u64>>,
    /// Pairs that are timed, and how many of them the second way has won.
    pairs: Cell<u8>,
    won: Cell<u8>,
}

impl Race {
    pub(super) const fn new() -> Self {
        Self {
            best: Cell::new(Way::First),
            left: Cell::new(0),
            first: Cell::new(None),
            pairs: Cell::new(0),
            won: Cell::new(0),
        }
    }

    /// Does `len` of something, in the way that `act` is told.
    #[inline]
    pub(super) fn run(&self, len: usize, act: impl FnOnce(Way)) {
        let left = self.left.get();
        if left > 0 {
            self.left.set(left - 1);
            return act(self.best.get());
        }
        let way = self.on_trial();
        let begin = Instant::now();
        act(way);
        let took = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.note(took.saturating_mul(1 << 20) / (len as u64).max(1));
    }

    fn on_trial(&self) -> Way {
        if self.first.get().is_none() { Way::First } else { Way::Second }
    }

    /// What the way on trial took for each of what it did.
    fn note(&self, cost: u64) {
        let Some(first) = self.first.take() else { return self.first.set(Some(cost)) };
        self.won.set(self.won.get() + u8::from(cost < first));
        self.pairs.set(self.pairs.get() + 1);
        if self.pairs.get() == PAIRS {
            self.best.set(if self.won.get() > PAIRS / 2 { Way::Second } else { Way::First });
            self.pairs.set(0);
            self.won.set(0);
            self.left.set(SETTLED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trial in which the first way takes `first` and the second `second`, but for what `others` say.
    fn trial(race: &Race, first: u64, second: u64, others: &[(u64, u64)]) {
        for pair in 0..usize::from(PAIRS) {
            let (first, second) = others.get(pair).copied().unwrap_or((first, second));
            assert_eq!((race.left.get(), race.on_trial()), (0, Way::First));
            race.note(first);
            assert_eq!(race.on_trial(), Way::Second);
            race.note(second);
        }
        assert_eq!(race.left.get(), SETTLED);
    }

    #[test]
    fn way_that_wins_most_pairs_is_taken_and_both_are_tried_again() {
        let race = Race::new();
        // Somebody else had the processor now and then.
        trial(&race, 10, 5, &[(10, 900), (10, 800), (10, 11), (3, 5)]);
        assert_eq!(race.best.get(), Way::Second);
        for _ in 0..SETTLED {
            race.run(1, |way| assert_eq!(way, Way::Second));
        }
        trial(&race, 5, 10, &[(900, 10), (800, 10), (700, 10), (600, 10)]);
        assert_eq!(race.best.get(), Way::First);
    }

    /// Everything is done, each in one way, and both ways are.
    #[test]
    fn everything_is_done_once() {
        let race = Race::new();
        let done = [Cell::new(0u32), Cell::new(0)];
        let all = 3 * (SETTLED + 2 * u32::from(PAIRS));
        for _ in 0..all {
            race.run(4096, |way| done[way as usize].set(done[way as usize].get() + 1));
        }
        assert_eq!(done[0].get() + done[1].get(), all);
        assert!(done.iter().all(|done| done.get() >= 3 * u32::from(PAIRS)));
    }
}
