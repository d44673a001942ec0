//! When to interrupt a guest for answers that were published.
//!
//! A guest that is awake sees them by itself and wants no interrupt. One that sleeps takes a while to wake, and goes on
//! asking for more then. So it is woken when what it has asked for and is left to do lasts about as long as that: earlier,
//! it would find less done and sleep again, later, there would be nothing to do meanwhile. At the latest it is woken
//! when nothing is left, or after [`DELAY_MAX`].
//!
//! How long a request takes is measured between groups of them, and only when there is more to do: a request that is
//! alone costs no look at a clock.

use std::time::{Duration, Instant};

use crate::worker::GROUP;

/// What it takes until a guest that sleeps has asked for more: 12 to 16 us from one virtual core to another, less on real
/// ones, and the interrupt before takes 5 to 8 us of ours.
const WAKING: Duration = Duration::from_micros(20);
/// An answer that was published is followed by an interrupt before this time, even if there is more to do, as far as can
/// be foreseen: it is looked at between groups.
const DELAY_MAX: Duration = Duration::from_micros(50);
/// What a request takes as long as nothing is known.
const REQUEST_FIRST: Duration = Duration::from_micros(1);
/// No request is thought to take longer.
const REQUEST_MAX: Duration = Duration::from_millis(1);
/// The last group counts for one part of so many of what is thought.
const WEIGHT: u32 = 8;

/// The interrupts of one queue.
#[derive(Debug)]
pub(crate) struct Interrupts {
    /// How long a request takes, lately.
    request: Duration,
    /// When the last group was done, if there was more to do then.
    grouped: Option<Instant>,
    /// Answers since then.
    answers: u16,
    untold: Option<Untold>,
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
        Self { request: REQUEST_FIRST, grouped: None, answers: 0, untold: None }
    }

    /// A group of answers was published, by which the used index went from `before` to `next`.
    pub(crate) fn published(&mut self, before: u16, next: u16) {
        self.answers = self.answers.wrapping_add(next.wrapping_sub(before));
        self.untold.get_or_insert(Untold { before, since: None });
    }

    /// Whether an interrupt for what was published must not be put off any longer, when the guest has asked for `left`
    /// more that were not begun. To be asked once after each group.
    pub(crate) fn is_due(&mut self, left: u16, now: impl FnOnce() -> Instant) -> bool {
        let Some(untold) = &mut self.untold else { return false };
        let answers = std::mem::take(&mut self.answers);
        if left == 0 {
            self.grouped = None;
            return true;
        }
        let now = now();
        if let Some(before) = self.grouped.replace(now) {
            let each = now.saturating_duration_since(before) / u32::from(answers.max(1));
            self.request = (self.request * (WEIGHT - 1) + each.min(REQUEST_MAX)) / WEIGHT;
        }
        let since = *untold.since.get_or_insert(now);
        // Nobody asks again before the next group is done.
        let group = self.request * u32::from(left).min(GROUP as u32);
        // One request alone is not worth an interrupt before it.
        self.request * (u32::from(left) + 1) <= WAKING
            || now.saturating_duration_since(since) + group >= DELAY_MAX
    }

    /// Has requests take so long that no interrupt is worth it yet while ten or more are left.
    #[cfg(test)]
    pub(crate) fn put_off(&mut self) {
        self.request = 2 * REQUEST_FIRST;
    }

    #[cfg(test)]
    pub(crate) fn has_untold(&self) -> bool {
        self.untold.is_some()
    }

    /// The guest is asked now. The used index before the first answer that it was not told of; `None`: there is none.
    pub(crate) fn take(&mut self) -> Option<u16> {
        // An interrupt takes longer than a request.
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

    #[test]
    fn guest_is_told_when_what_is_left_takes_as_long_as_waking_it() {
        for (each, last) in [(500, 39), (1000, 19), (4000, 4), (10_000, 1), (10_100, 0)] {
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

    #[test]
    fn answers_are_not_kept_from_the_guest_while_a_long_group_is_done() {
        for (each, left, due) in [(13, 8, true), (13, 3, false), (30, 2, true), (5, 20, false), (7, 20, true)]
        {
            let (mut interrupts, now) = with_requests_of(Duration::from_micros(each));
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
