//! When to interrupt a guest for answers that were published.
//!
//! A guest that is awake sees them by itself and wants no interrupt. One that sleeps takes a while to wake, and goes on
//! asking for more then. So it is woken when what it has asked for and is left to do lasts about as long as that: earlier, it
//! would find less done and sleep again, later, there would be nothing to do meanwhile. How long waking takes is not the same on any two
//! machines, nor what an interrupt takes us: from 1 us to 25, where idle processors halt. So it is [tried](Wake) how much
//! may be left. At the latest a guest is woken when nothing is left, or after [`DELAY_MAX`]; where requests are long, after [`DELAY_REQUESTS`] of them.
//!
//! That needs groups that are short compared with waking: [`group`](Interrupts::group) says how many requests to take
//! at a time, one if they are long.
//!
//! How long a request takes is measured between groups of them and from an interrupt to the next group, and only when
//! there is more to do: a request that is alone costs no look at a clock.

use std::time::{Duration, Instant};

use crate::{
    wake::{Wake, When},
    worker::GROUP,
};

/// What is left when a guest is woken lasts no longer than this. To wake one that sleeps deeply takes 12 to 40 us and more; where
/// idle processors do not halt, 5 to 8.
const LEFT_AT_ONCE: Duration = Duration::from_micros(56);
const LEFT_SOONER: Duration = Duration::from_micros(14);
const LEFT_LATER: Duration = Duration::from_micros(5);
/// An answer that was published is followed by an interrupt before this time, even if there is more to do, as far as can
/// be foreseen: it is looked at between groups.
const DELAY_MAX: Duration = Duration::from_micros(50);
/// Or, if that is longer, before so many requests have been done: an interrupt may take as long as two long ones.
const DELAY_REQUESTS: u32 = 16;
/// But never longer than this.
const DELAY_REQUESTS_MAX: Duration = Duration::from_micros(250);
/// A group of requests takes no longer than this, if they are not longer themselves.
const GROUP_TIME: Duration = Duration::from_micros(16);
/// What a request takes as long as nothing is known.
const REQUEST_FIRST: Duration = Duration::from_micros(1);
/// No request is thought to take longer.
const REQUEST_MAX: Duration = Duration::from_millis(1);
/// The last group counts for one part of so many of what is thought.
const WEIGHT: u32 = 8;

/// Whether instructions are counted: the program that does it makes all of them fifty times as slow, and what depends on
/// time would not be what it is otherwise.
#[cfg(test)]
pub(crate) static IS_COUNTED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// The interrupts of one queue.
#[derive(Debug)]
pub(crate) struct Interrupts {
    /// How long a request takes, lately.
    request: Duration,
    /// How many of them make a group.
    group: usize,
    /// When the last group was done, or the guest interrupted after it, if there was more to do then.
    grouped: Option<Instant>,
    /// Answers since then.
    answers: u16,
    untold: Option<Untold>,
    wake: Wake,
}

/// Published answers after which nobody has asked whether the guest wants an interrupt.
#[derive(Debug)]
struct Untold {
    /// The used index before the first of them.
    before: u16,
    /// When that was published, if there was more to do then.
    since: Option<Instant>,
}

impl Interrupts {
    pub(crate) fn new() -> Self {
        Self {
            request: REQUEST_FIRST,
            group: GROUP,
            grouped: None,
            answers: 0,
            untold: None,
            wake: Wake::new(),
        }
    }

    /// How many requests to take at a time, while they are done at once.
    pub(crate) fn group(&self) -> usize {
        self.group
    }

    /// A group of answers was published, by which the used index went from `before` to `next`.
    pub(crate) fn published(&mut self, before: u16, next: u16) {
        self.answers = self.answers.wrapping_add(next.wrapping_sub(before));
        self.untold.get_or_insert(Untold { before, since: None });
    }

    /// Whether an interrupt for what was published must not be put off any longer, when the guest has asked for `left`
    /// more that were not begun. To be asked once after each group.
    pub(crate) fn is_due(&mut self, left: u16, now: impl FnOnce() -> Instant) -> bool {
        if self.untold.is_none() {
            return false;
        }
        let answers = std::mem::take(&mut self.answers);
        self.wake.answered(answers);
        if left == 0 {
            self.grouped = None;
            return true;
        }
        let now = now();
        self.time(now);
        if let Some(before) = self.grouped.replace(now) {
            let each = now.saturating_duration_since(before) / u32::from(answers.max(1));
            self.learn((self.request * (WEIGHT - 1) + each.min(REQUEST_MAX)) / WEIGHT);
        }
        let since = self.untold.as_mut().map_or(now, |untold| *untold.since.get_or_insert(now));
        // Nobody asks again before the next group is done.
        let group = self.request * u32::from(left).min(self.group as u32);
        let delay_max = (self.request * DELAY_REQUESTS).clamp(DELAY_MAX, DELAY_REQUESTS_MAX);
        self.request * u32::from(left) <= self.early()
            || now.saturating_duration_since(since) + group >= delay_max
    }

    fn time(&mut self, now: Instant) {
        #[cfg(test)]
        if IS_COUNTED.load(std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        self.wake.goes_on(now);
    }

    /// How long what is left lasts, at most, when the guest is woken.
    fn early(&self) -> Duration {
        let left = match self.wake.when() {
            When::AtOnce => LEFT_AT_ONCE,
            When::Sooner => LEFT_SOONER,
            When::Later => LEFT_LATER,
        };
        // It is looked at after each group, so half a group late on average.
        let early = left + self.request * self.group as u32 / 2;
        // With the last one, however long it takes: then there is something to do meanwhile.
        early.max(self.request)
    }

    /// The worker has slept for so long, with no request on its way.
    pub(crate) fn slept(&mut self, time: Duration) {
        self.wake.slept(time);
    }

    /// A request takes so long, as far as is known.
    fn learn(&mut self, request: Duration) {
        #[cfg(test)]
        if IS_COUNTED.load(std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        self.request = request;
        // Much less than 2^64 ns, both.
        let fit = GROUP_TIME.as_nanos() as u64 / (request.as_nanos() as u64).max(1);
        self.group = usize::try_from(fit).unwrap_or(GROUP).clamp(1, GROUP);
    }

    /// Has requests take so long that no interrupt is worth it yet while 17 or more are left.
    #[cfg(test)]
    pub(crate) fn put_off(&mut self) {
        self.learn(4 * REQUEST_FIRST);
    }

    #[cfg(test)]
    pub(crate) fn has_untold(&self) -> bool {
        self.untold.is_some()
    }

    /// The guest was asked, and interrupted if it wants to be, until `now`, and there is more to do.
    /// Without this nothing would be learnt from requests whose every group is followed by an interrupt.
    pub(crate) fn goes_on(&mut self, now: Instant) {
        self.grouped = Some(now);
    }

    /// The guest is asked now. The used index before the first answer that it was not told of; `None`: there is none.
    pub(crate) fn take(&mut self) -> Option<u16> {
        // What that takes is not a request's time.
        self.grouped = None;
        self.untold.take().map(|untold| untold.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> Instant {
        unreachable!("looked at the clock without need")
    }

    /// A queue whose requests take `each`, as it has learnt, one at a time; when the last of them was done.
    fn with_requests_of(each: Duration) -> (Interrupts, Instant) {
        let (mut interrupts, mut now) = (Interrupts::new(), Instant::now());
        for _ in 0..100 {
            now += each;
            interrupts.published(0, 1);
            interrupts.is_due(u16::MAX, || now);
        }
        interrupts.take();
        (interrupts, now)
    }

    #[test]
    fn answer_with_nothing_left_is_told_at_once_and_without_a_clock() {
        let mut interrupts = Interrupts::new();
        assert!(!interrupts.is_due(0, never));
        interrupts.published(u16::MAX, 0);
        assert!(interrupts.is_due(0, never));
        assert_eq!((interrupts.take(), interrupts.take()), (Some(u16::MAX), None));
        assert!(!interrupts.is_due(0, never));
    }

    /// As it is tried first: 56 us, and half a group.
    #[test]
    fn guest_is_told_when_what_is_left_takes_no_longer_than_waking_it() {
        for (each, last) in [(500, 116), (1000, 60), (4000, 16), (13_000, 4), (37_400, 1), (80_000, 1)] {
            let (mut interrupts, mut now) = with_requests_of(Duration::from_nanos(each));
            let told = (0..last + 3).rev().find(|left| {
                now += Duration::from_nanos(each);
                interrupts.published(7, 8);
                interrupts.is_due(*left, || now)
            });
            assert_eq!(told, Some(last), "requests of {each} ns");
            assert_eq!(interrupts.take(), Some(7));
        }
    }

    /// What is left then, with half a group.
    #[test]
    fn guest_is_told_with_less_left_when_that_is_tried() {
        let (mut interrupts, mut now) = with_requests_of(Duration::from_micros(1));
        let mut least = Vec::new();
        // All three are tried first, in turns.
        for _ in 0..9 * 1024 / 32 {
            let told = (1..32).rev().find(|left| {
                now += Duration::from_micros(1);
                interrupts.published(7, 8);
                interrupts.is_due(*left, || now)
            });
            least.extend(told);
            interrupts.take();
            interrupts.goes_on(now);
            // The rest, after which nothing is left.
            now += Duration::from_micros(1);
            interrupts.published(8, 8 + told.unwrap_or(0));
            assert!(interrupts.is_due(0, never) || told.is_none());
            interrupts.take();
        }
        least.dedup();
        assert_eq!(least, [31, 18, 9, 18, 31, 18, 9]);
    }

    #[test]
    fn groups_are_as_long_as_their_answers() {
        let (mut interrupts, mut now) = with_requests_of(Duration::from_micros(1));
        for _ in 0..100 {
            now += Duration::from_micros(32);
            interrupts.published(0, 4);
            interrupts.published(4, 8);
            interrupts.is_due(u16::MAX, || now);
        }
        assert!(interrupts.request.abs_diff(Duration::from_micros(4)) < Duration::from_nanos(10));
    }

    #[test]
    fn answers_are_not_kept_from_the_guest_for_long() {
        let (mut interrupts, now) = with_requests_of(Duration::from_micros(1));
        let due = (1..).find(|micros| {
            interrupts.published(0, 1);
            interrupts.is_due(u16::MAX, || now + Duration::from_micros(*micros))
        });
        // The next eight are waited for as well.
        assert_eq!(due, Some(1 + 50 - 8));
    }

    /// Each of them would have an interrupt of its own, which takes as long.
    #[test]
    fn answers_that_are_long_in_the_making_are_kept_for_as_many() {
        for (each, answers) in [(13, 16), (15, 16), (52, 5), (300, 1)] {
            let (mut interrupts, now) = with_requests_of(Duration::from_micros(each));
            let due = (1..).find(|answer: &u32| {
                interrupts.published(0, 1);
                interrupts.is_due(u16::MAX, || now + Duration::from_micros(each) * *answer)
            });
            assert_eq!(due, Some(answers), "{each} us");
        }
    }

    #[test]
    fn group_of_requests_is_short_compared_with_waking() {
        for (each, group) in [(100, GROUP), (1900, GROUP), (3000, 5), (7000, 2), (8100, 1), (2_000_000, 1)] {
            let (interrupts, _) = with_requests_of(Duration::from_nanos(each));
            assert_eq!(interrupts.group(), group, "requests of {each} ns");
        }
    }

    /// As they are at first: thought to be short, each group followed by an interrupt.
    #[test]
    fn long_requests_are_known_though_each_group_is_told_of() {
        let (mut interrupts, mut now) = (Interrupts::new(), Instant::now());
        let told = (0..20).take_while(|_| {
            now += Duration::from_micros(8 * 13);
            interrupts.published(0, 8);
            let due = interrupts.is_due(8, || now);
            if due {
                interrupts.take();
                // It takes its time.
                now += Duration::from_micros(25);
                interrupts.goes_on(now);
            }
            due
        });
        assert!(told.count() < 10);
        assert!(interrupts.request < Duration::from_micros(13), "{:?}", interrupts.request);
    }

    #[test]
    fn answers_are_not_kept_from_the_guest_while_a_long_group_is_done() {
        for (each, left, due) in
            [(20, 5, false), (100, 9, false), (130, 2, true), (260, 2, true), (5, 20, false)]
        {
            let (mut interrupts, now) = with_requests_of(Duration::from_micros(each));
            interrupts.published(0, 1);
            interrupts.is_due(u16::MAX, || now);
            interrupts.published(0, 1);
            assert_eq!(
                interrupts.is_due(left, || now + Duration::from_micros(each)),
                due,
                "{each} us, {left} left"
            );
        }
    }

    #[test]
    fn time_without_requests_or_for_an_interrupt_is_not_taken_for_theirs() {
        let (mut interrupts, now) = with_requests_of(Duration::from_micros(1));
        let before = interrupts.request;
        for (left, taken) in [(0, false), (u16::MAX, true)] {
            interrupts.published(0, 1);
            interrupts.is_due(left, || now);
            if taken {
                interrupts.take();
            }
            interrupts.published(1, 2);
            assert!(!interrupts.is_due(u16::MAX, || now + Duration::from_micros(40)));
            interrupts.take();
            assert_eq!(interrupts.request, before);
        }
    }
}
