//! When a sleeping guest is best woken, as there is more to do: found out by doing it in every way.
//!
//! Woken early, a guest with a processor of its own is told before it sleeps deeply, and has something to do meanwhile. One that
//! shares its processor with the worker takes that from it, and does less each time; so does one that wakes quickly and finds
//! little done: these are better woken late. Where it takes us long to wake one whose processor has halted, a guest is best told as soon as anything
//! is done: it has just begun to wait then, and goes on at once. So now and then all are done in turns, each for some thousand
//! answers, and what answered faster is done until the next time: at once or later only if it is plain that it is better, for the
//! one takes more interrupts, and the other more time.

use std::time::{Duration, Instant};

/// Answers in which one of all is done, before their time is looked at.
const WINDOW: u32 = 1024;
/// Each is done in so many windows before one is chosen: an odd number.
const ROUNDS: usize = 9;
/// At once or later is chosen if, in the median of its windows, an answer and one part of it of so many take less time than one
/// of the others. What later makes worse shows late: a guest that is awake goes on to be for a while, however late it is told, and then all look alike.
const GAIN: u32 = 16;
/// For so many windows it is kept to what was chosen: twice as many each time that it is chosen again.
const SETTLED_MIN: u32 = 100;
const SETTLED_MAX: u32 = 800;
/// A worker that has slept for longer, with no request on its way, did so because there was nothing to do.
const IDLE: Duration = Duration::from_micros(200);

/// When a guest that wants to be told is woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// As soon as something is done, unless what is left lasts long.
    AtOnce,
    /// When what is left lasts as long as it takes to wake one that does not sleep deeply.
    Sooner,
    /// When hardly anything is left.
    Later,
}

/// How long each answer took in the windows of one of them.
type Times = [Duration; ROUNDS];

/// What is known about a queue's guest.
#[derive(Debug)]
pub(crate) struct Wake {
    /// What is best, as far as is known.
    best: When,
    /// Windows that are left until all are tried again, and of how many.
    settled: u32,
    settled_for: u32,
    /// Answers in this window, and when it began.
    answers: u32,
    since: Option<Instant>,
    /// How many windows of this trial are over.
    turn: usize,
    times: [Times; 3],
}

impl Wake {
    pub(crate) fn new() -> Self {
        Self {
            best: When::Sooner,
            settled: 0,
            settled_for: 0,
            answers: 0,
            since: None,
            turn: 0,
            times: Default::default(),
        }
    }

    /// When the guest is to be woken now.
    pub(crate) fn when(&self) -> When {
        if self.settled > 0 {
            return self.best;
        }
        // There and back, so that neither comes after the same one each time.
        match self.turn % 6 {
            0 | 5 => When::AtOnce,
            1 | 4 => When::Sooner,
            _ => When::Later,
        }
    }

    /// So many answers were given.
    pub(crate) fn answered(&mut self, answers: u16) {
        self.answers = self.answers.saturating_add(answers.into());
    }

    /// The worker has slept for so long, with no request on its way: if that was long, it says nothing of how it works.
    pub(crate) fn slept(&mut self, time: Duration) {
        if time > IDLE {
            self.since = self.since.and_then(|since| since.checked_add(time));
        }
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
        let (when, round) = (self.when(), self.turn / self.times.len());
        if let Some(time) = self.times.get_mut(when as usize).and_then(|times| times.get_mut(round)) {
            *time = each;
        }
        self.turn += 1;
        if self.turn == self.times.len() * ROUNDS {
            self.turn = 0;
            let best = best(self.times.map(median));
            let again = best == self.best;
            self.settled_for = if again { self.settled_for * 2 } else { 0 }.clamp(SETTLED_MIN, SETTLED_MAX);
            (self.best, self.settled) = (best, self.settled_for);
        }
    }
}

fn median(mut times: Times) -> Duration {
    *times.select_nth_unstable(ROUNDS / 2).1
}

/// What is best if an answer takes so long.
fn best([at_once, sooner, later]: [Duration; 3]) -> When {
    let is_less = |one: Duration, other: Duration| one + one / GAIN < other;
    let (best, time) =
        if is_less(at_once, sooner) { (When::AtOnce, at_once) } else { (When::Sooner, sooner) };
    if is_less(later, time) { When::Later } else { best }
}

#[cfg(test)]
mod tests {
    use super::*;
    use When::{AtOnce, Later, Sooner};

    /// A guest, of which an answer takes so many nanoseconds when it is woken at once, sooner or later.
    struct Guest {
        wake: Wake,
        now: Instant,
        each: [u64; 3],
    }

    impl Guest {
        fn new(each: [u64; 3]) -> Self {
            Self { wake: Wake::new(), now: Instant::now(), each }
        }

        fn window(&mut self) -> When {
            let when = self.wake.when();
            for _ in 0..WINDOW / 8 {
                self.now += Duration::from_nanos(8 * self.each[when as usize]);
                self.wake.answered(8);
                self.wake.goes_on(self.now);
            }
            when
        }

        /// Windows until something is chosen. How were they done?
        fn trial(&mut self) -> Vec<When> {
            let mut done = Vec::new();
            while self.wake.settled == 0 {
                done.push(self.window());
            }
            done
        }
    }

    #[test]
    fn what_answers_faster_is_done_until_all_are_tried_again() {
        let mut guest = Guest::new([0; 3]);
        for (each, best) in [
            ([600, 600, 500], Later),
            ([600, 500, 600], Sooner),
            ([300, 500, 600], AtOnce),
            ([400, 500, 300], Later),
            ([300, 500, 400], AtOnce),
            // Not worth the interrupts, or the time.
            ([480, 500, 480], Sooner),
            ([300, 500, 290], AtOnce),
            ([3000, 3000, 2800], Later),
        ] {
            guest.each = each;
            let done = guest.trial();
            // The first window of all has no beginning.
            assert!((27..=28).contains(&done.len()), "{done:?}");
            for when in [AtOnce, Sooner, Later] {
                assert!(done.iter().filter(|done| **done == when).count().abs_diff(9) <= 1, "{done:?}");
            }
            for _ in 0..SETTLED_MIN {
                assert_eq!(guest.window(), best, "{each:?}");
            }
            assert_eq!(guest.wake.settled, 0);
        }
    }

    #[test]
    fn what_is_chosen_again_and_again_is_kept_for_longer() {
        let mut guest = Guest::new([300, 500, 600]);
        let mut kept = |each| {
            guest.each = each;
            guest.trial();
            let kept = guest.wake.settled;
            (0..kept).for_each(|_| _ = guest.window());
            kept
        };
        assert_eq!([0; 5].map(|_| kept([300, 500, 600])), [100, 200, 400, 800, 800]);
        assert_eq!([0; 2].map(|_| kept([600, 500, 300])), [100, 200]);
    }

    #[test]
    fn each_comes_after_another_one_in_turns() {
        let done = Guest::new([500; 3]).trial();
        // Without the first window, which counts for nothing.
        assert_eq!(done[1..8], [AtOnce, Sooner, Later, Later, Sooner, AtOnce, AtOnce]);
    }

    /// A processor that others had, four times of the nine of what is best.
    #[test]
    fn windows_that_took_long_for_other_reasons_decide_nothing() {
        for (best, each) in [(AtOnce, [400, 500, 500]), (Later, [500, 500, 400])] {
            let mut guest = Guest::new(each);
            let mut left = 4;
            while guest.wake.settled == 0 {
                let is_disturbed = guest.wake.since.is_some() && guest.wake.when() == best && left > 0;
                left -= u32::from(is_disturbed);
                // Counts for the window that has begun.
                guest.now += Duration::from_millis(is_disturbed.into());
                guest.window();
            }
            assert_eq!(guest.wake.when(), best);
        }
    }

    /// A guest that asks for something now and then only.
    #[test]
    fn time_in_which_there_was_nothing_to_do_does_not_count() {
        let mut guest = Guest::new([400, 500, 500]);
        for window in 0..28 {
            let idle = Duration::from_millis(1 + window % 7);
            guest.now += idle;
            guest.wake.slept(idle);
            guest.window();
        }
        assert_eq!(guest.wake.times.map(median), [400, 500, 500].map(Duration::from_nanos));
        // To fall asleep and be woken again is a part of being told late.
        let before = guest.wake.since;
        guest.wake.slept(IDLE);
        assert_eq!(guest.wake.since, before);
    }
}
