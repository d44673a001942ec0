//! Whether a sleeping guest is better woken sooner or later: found out by doing both.
//!
//! Woken sooner, a guest with a processor of its own is told before it sleeps deeply, and has something to do meanwhile. One that
//! shares its processor with the worker takes that from it, and does less each time: it is better woken later. So now and then
//! both are done in turns, each for some thousand answers, and what answered faster is done until the next time: later only if it is
//! plain that it is better.

use std::time::{Duration, Instant};

/// Answers in which one of both is done, before their time is looked at.
const WINDOW: u32 = 1024;
/// Each of both is done in so many windows before one is chosen.
const PAIRS: u8 = 9;
/// Later is chosen if it wins so many of them. What it makes worse shows late: a guest that is awake goes on to be for a while,
/// however late it is told, and then both look alike.
const LATER_WINS: u8 = 7;
/// For so many windows it is kept to what was chosen: not so long to later, for that costs more if it was an accident.
const SOONER_SETTLED: u32 = 300;
const LATER_SETTLED: u32 = 100;

/// What is known about a queue's guest.
#[derive(Debug)]
pub(crate) struct Sooner {
    /// What is better, as far as is known.
    best: bool,
    /// Windows that are left until both are tried again.
    settled: u32,
    /// Answers in this window, and when it began.
    answers: u32,
    since: Option<Instant>,
    /// How long each answer took when the guest was woken sooner, while later is still to be tried.
    first: Option<Duration>,
    /// Pairs that were timed, and how many of them later has won.
    pairs: u8,
    later_won: u8,
}

impl Sooner {
    pub(crate) fn new() -> Self {
        Self { best: true, settled: 0, answers: 0, since: None, first: None, pairs: 0, later_won: 0 }
    }

    /// Whether the guest is to be woken sooner now.
    pub(crate) fn is_now(&self) -> bool {
        if self.settled > 0 { self.best } else { self.first.is_none() }
    }

    /// So many answers were given until `now`, while there was more to do.
    pub(crate) fn answered(&mut self, answers: u16, now: Instant) {
        self.answers += u32::from(answers);
        if self.answers < WINDOW {
            return;
        }
        let answers = std::mem::take(&mut self.answers);
        let since = self.since.replace(now);
        if self.settled > 0 {
            self.settled -= 1;
        } else if let Some(since) = since {
            self.note(now.saturating_duration_since(since) / answers);
        }
    }

    /// Each answer took so long in a window.
    fn note(&mut self, each: Duration) {
        let Some(first) = self.first.take() else {
            self.first = Some(each);
            return;
        };
        self.later_won += u8::from(each < first);
        self.pairs += 1;
        if self.pairs == PAIRS {
            self.best = self.later_won < LATER_WINS;
            (self.pairs, self.later_won) = (0, 0);
            self.settled = settled(self.best);
        }
    }
}

/// Windows after which both are tried again, when sooner was better, or not.
fn settled(sooner: bool) -> u32 {
    if sooner { SOONER_SETTLED } else { LATER_SETTLED }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows in which an answer takes `sooner` or `later` nanoseconds, until one is chosen. Which windows were done sooner?
    fn trial(choice: &mut Sooner, now: &mut Instant, sooner: u64, later: u64) -> Vec<bool> {
        let mut done = Vec::new();
        while choice.settled == 0 {
            let is_sooner = choice.is_now();
            done.push(is_sooner);
            for _ in 0..WINDOW / 8 {
                *now += Duration::from_nanos(8 * if is_sooner { sooner } else { later });
                choice.answered(8, *now);
            }
        }
        done
    }

    #[test]
    fn what_answers_faster_is_done_until_both_are_tried_again() {
        let (mut choice, mut now) = (Sooner::new(), Instant::now());
        for (sooner, later) in [(600, 500), (500, 600), (3000, 2900)] {
            let done = trial(&mut choice, &mut now, sooner, later);
            // The first window of all has no beginning.
            assert!((18..=19).contains(&done.len()), "{done:?}");
            assert!(done.iter().filter(|sooner| **sooner).count().abs_diff(9) <= 1, "{done:?}");
            for _ in 0..settled(sooner < later) {
                assert_eq!(choice.is_now(), sooner < later);
                choice.answered(WINDOW as u16, now);
            }
            assert_eq!(choice.settled, 0);
        }
    }

    /// Both look alike as long as what was done before has its effect.
    #[test]
    fn later_has_to_win_most_pairs() {
        for (won, sooner) in [(LATER_WINS - 1, true), (LATER_WINS, false)] {
            let mut choice = Sooner::new();
            for pair in 0..PAIRS {
                choice.note(Duration::from_nanos(500));
                choice.note(Duration::from_nanos(if pair < won { 490 } else { 510 }));
            }
            assert_eq!((choice.settled, choice.is_now()), (settled(sooner), sooner), "{won}");
        }
    }

    /// A guest that had nothing to ask for now and then, or a processor that others had.
    #[test]
    fn windows_that_took_long_for_other_reasons_decide_nothing() {
        let (mut choice, mut now) = (Sooner::new(), Instant::now());
        let mut windows = 0;
        while choice.settled == 0 {
            let pause = if windows % 9 == 2 { 1_000_000 } else { 0 };
            now += Duration::from_nanos(u64::from(WINDOW) * if choice.is_now() { 500 } else { 400 } + pause);
            choice.answered(WINDOW as u16, now);
            windows += 1;
        }
        assert!(!choice.is_now());
    }
}
