//! When a sleeping guest is best woken, as there is more to do: found out by doing it in every way.
//!
//! Woken sooner, a guest with a processor of its own is told before it sleeps deeply, and has something to do meanwhile. One that
//! shares its processor with the worker takes that from it, and does less each time: it is better woken later. And where it takes us
//! long to wake one whose processor has halted, a guest is best told as soon as anything is done: it has just begun to wait then, and
//! goes on at once. So now and then all are done in turns, each for some thousand answers, and what answered faster is done until the next time:
//! at once or later only if it is plain that it is better, for the one takes more interrupts, and the other more time.

use std::time::{Duration, Instant};

/// Answers in which one of all is done, before their time is looked at.
const WINDOW: u32 = 1024;
/// Each is done in so many windows before one is chosen: an odd number.
const ROUNDS: usize = 9;
/// At once or later is chosen if the median of its windows took less by one part of so many. What later makes worse shows late: a guest that is
/// awake goes on to be for a while, however late it is told, and then all look alike.
const GAIN: u32 = 16;
/// For so many windows it is kept to what was chosen: longer if that was at once, for what the others cost while they are tried is more.
const AT_ONCE_SETTLED: u32 = 300;
const SETTLED: u32 = 100;

/// When a guest that wants to be told is woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// As soon as something is done, unless what is left lasts long.
    AtOnce,
    /// When what is left lasts about twice as long as waking it.
    Sooner,
    /// When what is left lasts a little longer than that.
    Later,
}

/// How long each answer took in the windows of one of them.
type Times = [Duration; ROUNDS];

/// What is known about a queue's guest.
#[derive(Debug)]
pub(crate) struct Wake {
    /// What is best, as far as is known.
    best: When,
    /// Windows that are left until all are tried again.
    settled: u32,
    /// Answers in this window, and when it began.
    answers: u32,
    since: Option<Instant>,
    /// What is tried in this window, if nothing is settled, and how many times all were before.
    tried: When,
    round: usize,
    at_once: Times,
    sooner: Times,
    later: Times,
}

impl Wake {
    pub(crate) fn new() -> Self {
        Self {
            best: When::Sooner,
            settled: 0,
            answers: 0,
            since: None,
            tried: When::AtOnce,
            round: 0,
            at_once: Times::default(),
            sooner: Times::default(),
            later: Times::default(),
        }
    }

    /// When the guest is to be woken now.
    pub(crate) fn when(&self) -> When {
        if self.settled > 0 { self.best } else { self.tried }
    }

    /// So many answers were given.
    pub(crate) fn answered(&mut self, answers: u16) {
        self.answers = self.answers.saturating_add(answers.into());
    }

    /// It is `now`, and there is more to do.
    pub(crate) fn goes_on(&mut self, now: Instant) {
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
        let (times, next) = match self.tried {
            When::AtOnce => (&mut self.at_once, When::Sooner),
            When::Sooner => (&mut self.sooner, When::Later),
            When::Later => (&mut self.later, When::AtOnce),
        };
        if let Some(time) = times.get_mut(self.round) {
            *time = each;
        }
        if self.tried == When::Later {
            self.round += 1;
        }
        self.tried = next;
        if self.round == ROUNDS {
            self.round = 0;
            self.best = best(median(self.at_once), median(self.sooner), median(self.later));
            self.settled = settled(self.best);
        }
    }
}

fn median(mut times: Times) -> Duration {
    *times.select_nth_unstable(ROUNDS / 2).1
}

/// What is best if an answer takes so long.
fn best(at_once: Duration, sooner: Duration, later: Duration) -> When {
    let is_less = |one: Duration, other: Duration| one + one / GAIN < other;
    let (best, time) =
        if is_less(at_once, sooner) { (When::AtOnce, at_once) } else { (When::Sooner, sooner) };
    if is_less(later, time) { When::Later } else { best }
}

/// Windows after which all are tried again, when this was best.
fn settled(best: When) -> u32 {
    match best {
        When::AtOnce => AT_ONCE_SETTLED,
        When::Sooner | When::Later => SETTLED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use When::{AtOnce, Later, Sooner};

    /// Windows in which an answer takes so many nanoseconds at once, sooner or later, until one is chosen. How were the
    /// windows done?
    fn trial(wake: &mut Wake, now: &mut Instant, each: [u64; 3]) -> Vec<When> {
        let mut done = Vec::new();
        while wake.settled == 0 {
            done.push(wake.when());
            let each = each[wake.when() as usize];
            for _ in 0..WINDOW / 8 {
                *now += Duration::from_nanos(8 * each);
                wake.answered(8);
                wake.goes_on(*now);
            }
        }
        done
    }

    #[test]
    fn what_answers_faster_is_done_until_all_are_tried_again() {
        let (mut wake, mut now) = (Wake::new(), Instant::now());
        for (each, best) in [
            ([600, 600, 500], Later),
            ([600, 500, 600], Sooner),
            ([300, 500, 600], AtOnce),
            ([300, 500, 400], AtOnce),
            ([400, 500, 300], Later),
            // Not worth the interrupts, or the time.
            ([480, 500, 480], Sooner),
            ([300, 500, 290], AtOnce),
            ([3000, 3000, 2800], Later),
        ] {
            let done = trial(&mut wake, &mut now, each);
            // The first window of all has no beginning.
            assert!((27..=28).contains(&done.len()), "{done:?}");
            for when in [AtOnce, Sooner, Later] {
                assert!(done.iter().filter(|done| **done == when).count().abs_diff(9) <= 1, "{done:?}");
            }
            for _ in 0..settled(best) {
                assert_eq!(wake.when(), best, "{each:?}");
                wake.answered(WINDOW as u16);
                wake.goes_on(now);
            }
            assert_eq!(wake.settled, 0);
        }
    }

    /// A guest that had nothing to ask for now and then, or a processor that others had.
    #[test]
    fn windows_that_took_long_for_other_reasons_decide_nothing() {
        for (fast, each) in [(AtOnce, [400, 500, 500]), (Later, [500, 500, 400])] {
            let (mut wake, mut now) = (Wake::new(), Instant::now());
            let mut windows = 0;
            while wake.settled == 0 {
                let pause = if windows % 13 == 2 { 1_000_000 } else { 0 };
                now += Duration::from_nanos(u64::from(WINDOW) * each[wake.when() as usize] + pause);
                wake.answered(WINDOW as u16);
                wake.goes_on(now);
                windows += 1;
            }
            assert_eq!(wake.when(), fast);
        }
    }

    /// What is answered last of all that was asked for counts too, or running dry would look slower than it is.
    #[test]
    fn answers_after_which_nothing_is_left_belong_to_the_window() {
        let (mut wake, mut now) = (Wake::new(), Instant::now());
        wake.answered(WINDOW as u16);
        wake.goes_on(now);
        wake.answered(WINDOW as u16);
        now += Duration::from_nanos(100) * WINDOW;
        wake.answered(WINDOW as u16);
        wake.goes_on(now);
        assert_eq!((wake.tried, wake.at_once[0]), (Sooner, Duration::from_nanos(50)));
    }
}
