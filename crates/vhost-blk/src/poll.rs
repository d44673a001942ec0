//! How long a worker looks for more work before it sleeps.
//!
//! A wake-up across cores is the dearest part of a small request, so a worker polls for a while after
//! its last work. That takes a core's time, so it goes on only where it pays:
//!
//! - Polling that ends in vain more often than not stops, as does polling of a worker that shares its
//!   core with whom it waits for: an idle queue sleeps for ever, one with work now and then too.
//! - It starts again when work comes so soon after falling asleep that polling might have caught it;
//!   after each such trial that has failed, not before twice the time.
//! - It stops at once when the core is wanted by others: the thread was away from it for longer than
//!   interrupts take. Polling workers of many busy disks must not take the time of the guests.
//!
//! - It is not for I/O that takes its time: if waits with I/O on its way usually outlast what sleeping costs, the
//!   worker sleeps through them. What ends such I/O finds the core idle, and wakes the worker at once.
//!
//! It does not yield the core while it polls: a guest that computes would then have it for its whole time
//! slice, some milliseconds, while a worker that sleeps gets it back when it is woken.
//!
//! What a worker calls: [`woken`](PollWindow::woken) when its thread begins to run;
//! [`begins`](PollWindow::begins) when there is nothing to do; while that and then
//! [`goes_on`](PollWindow::goes_on) say so, it looks for work, for about a microsecond between two calls;
//! [`found`](PollWindow::found) if there was some, else it sleeps.

use std::time::{Duration, Instant};

/// How long a queue polls for more work before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// For 50 microseconds, but only as long as that pays and nobody else wants the core.
    Auto,
    /// For so long each time, whatever comes of it; never, if it is zero.
    Fixed(Duration),
}

/// Longest time that is polled if the policy is ours: about two wake-ups across cores.
const AUTO: Duration = Duration::from_micros(50);
/// Work that comes so soon after the last might be found by polling: the wake-ups of both sides, which
/// there are without it, are in this time.
const SOON: Duration = Duration::from_micros(150);
/// A thread that was away from its core for so long has shared it.
const AWAY: Duration = Duration::from_micros(60);
/// Longer waits with I/O on its way are slept through. About two times what it costs to sleep and be woken.
const IO_SOON: Duration = Duration::from_micros(20);
/// The most that one of them counts for, so that a single slow one is soon forgotten.
const IO_WAIT_MAX: Duration = Duration::from_micros(160);
/// How many of them make what is usual.
const IO_WAITS: u32 = 8;
/// Nobody sleeps so shortly: there was something to wake the worker before it slept.
const AWAKE: Duration = Duration::from_micros(4);
/// What polling is given on trial, and most that it can earn; each success is one, each failure too.
const CREDIT_TRIAL: u32 = 3;
const CREDIT_MAX: u32 = 16;
/// How long it does not poll after a trial has failed, or the core was shared: doubled each time, unless it
/// went well for [`LONG`] times as long before.
const REST_MIN: Duration = Duration::from_millis(4);
const REST_MAX: Duration = Duration::from_millis(256);
const LONG: u32 = 8;

/// The polling of one queue.
#[derive(Debug)]
pub(crate) struct PollWindow {
    window: Duration,
    auto: Option<Auto>,
    /// When the last work was done, while there is none.
    idle_since: Option<Instant>,
}

/// What the policy knows.
#[derive(Debug)]
struct Auto {
    /// What polling is worth; none: it does not poll.
    credit: u32,
    /// How long it rests, or has rested last.
    rest: Duration,
    rests_until: Option<Instant>,
    /// When the last trial began.
    tried: Option<Instant>,
    /// When the worker has looked last, in this idle time; `None`: it has not.
    looked: Option<Instant>,
    /// How long it usually waits with I/O on its way, for that or for the guest.
    io_wait: Duration,
    /// Whether I/O is on its way in this idle time.
    has_io: bool,
}

impl PollWindow {
    pub(crate) fn new(polling: Polling) -> Self {
        let (window, auto) = match polling {
            Polling::Fixed(window) => (window, None),
            Polling::Auto => (AUTO, Some(Auto::new())),
        };
        Self { window, auto, idle_since: None }
    }

    /// The worker has nothing to do since `now`; `has_io`: but I/O is on its way, and the guest asks for nothing that
    /// is done at once. Whether to poll.
    pub(crate) fn begins(&mut self, now: Instant, has_io: bool) -> bool {
        self.idle_since = Some(now);
        match &mut self.auto {
            None => !self.window.is_zero(),
            Some(auto) => auto.begins(now, has_io),
        }
    }

    /// The worker has looked and found nothing until `now`. Whether to go on.
    pub(crate) fn goes_on(&mut self, now: Instant) -> bool {
        let Some(since) = self.idle_since else { return false };
        if let Some(auto) = &mut self.auto
            && let Some(looked) = auto.looked.replace(now)
            && now.saturating_duration_since(looked) > AWAY
        {
            auto.stop(now);
            return false;
        }
        now.saturating_duration_since(since) < self.window
    }

    /// The worker has found something by polling.
    pub(crate) fn found(&mut self) {
        let since = self.idle_since.take();
        if let Some(auto) = &mut self.auto {
            auto.credit = (auto.credit + 1).min(CREDIT_MAX);
            if let (Some(since), Some(looked)) = (since, auto.looked) {
                auto.waited(looked.saturating_duration_since(since));
            }
        }
    }

    /// The worker was woken at `now`. For how long it had nothing to do.
    pub(crate) fn woken(&mut self, now: Instant) -> Duration {
        let Some(since) = self.idle_since.take() else { return Duration::ZERO };
        let time = now.saturating_duration_since(since);
        if let Some(auto) = &mut self.auto {
            if time > AWAKE {
                auto.waited(time);
            }
            auto.slept(now, time <= SOON);
        }
        time
    }
}

impl Auto {
    fn new() -> Self {
        Self {
            credit: CREDIT_TRIAL,
            rest: Duration::ZERO,
            rests_until: None,
            tried: None,
            looked: None,
            io_wait: Duration::ZERO,
            has_io: false,
        }
    }

    fn begins(&mut self, now: Instant, has_io: bool) -> bool {
        self.has_io = has_io;
        let is_slow = has_io && self.io_wait > IO_SOON;
        self.looked = (self.credit > 0 && !is_slow).then_some(now);
        self.looked.is_some()
    }

    /// This idle time was so long.
    fn waited(&mut self, time: Duration) {
        if self.has_io {
            self.io_wait = (self.io_wait * (IO_WAITS - 1) + time.min(IO_WAIT_MAX)) / IO_WAITS;
        }
    }

    /// The worker had slept until `now`, for a `short` time, and perhaps polled in vain before.
    fn slept(&mut self, now: Instant, short: bool) {
        if self.looked.take().is_some() {
            self.credit = self.credit.saturating_sub(1);
            // Only if there was work and polling did not find it: an idle queue has nothing against polling.
            if self.credit == 0 && short {
                self.stop(now);
            }
        } else if self.credit == 0 && short && self.rests_until.is_none_or(|until| now >= until) {
            self.credit = CREDIT_TRIAL;
            self.tried = Some(now);
        }
    }

    /// Polls no more for a while.
    fn stop(&mut self, now: Instant) {
        let went_well =
            self.tried.is_some_and(|tried| now.saturating_duration_since(tried) > self.rest * LONG);
        self.rest = if went_well { REST_MIN } else { (self.rest * 2).clamp(REST_MIN, REST_MAX) };
        self.rests_until = Some(now + self.rest);
        self.credit = 0;
        self.looked = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker, with a clock of its own.
    struct Worker {
        poll: PollWindow,
        now: Instant,
        /// Time spent polling.
        polled: Duration,
        has_io: bool,
    }

    impl Worker {
        fn new(polling: Polling) -> Self {
            Self {
                poll: PollWindow::new(polling),
                now: Instant::now(),
                polled: Duration::ZERO,
                has_io: false,
            }
        }

        /// The next work comes after `micros`, if the worker polls; a worker that sleeps has it `woken_after`.
        /// Looks at the clock each microsecond. Whether polling has found the work.
        fn idle(&mut self, micros: u64, woken_after: u64) -> bool {
            let begin = self.now;
            let mut goes_on = self.poll.begins(self.now, self.has_io);
            while goes_on {
                if self.now >= begin + Duration::from_micros(micros) {
                    self.poll.found();
                    return true;
                }
                self.now += Duration::from_micros(1);
                self.polled += Duration::from_micros(1);
                goes_on = self.poll.goes_on(self.now);
            }
            self.now = self.now.max(begin + Duration::from_micros(woken_after));
            self.poll.woken(self.now);
            false
        }

        fn idles(&mut self, times: u32, micros: u64, woken_after: u64) -> u32 {
            (0..times).map(|_| u32::from(self.idle(micros, woken_after))).sum()
        }
    }

    #[test]
    fn polling_of_a_busy_queue_finds_all_its_work() {
        let mut worker = Worker::new(Polling::Auto);
        assert_eq!(worker.idles(10_000, 10, 80), 10_000);
    }

    /// Must show 8: idle disks cost nothing.
    #[test]
    fn polling_of_an_idle_queue_stops_for_good() {
        let mut worker = Worker::new(Polling::Auto);
        worker.idles(1000, 10, 80);
        assert_eq!(worker.idles(1_000_000, 5_000, 5_000), 0);
        let most = AUTO * CREDIT_MAX;
        assert!(worker.polled < Duration::from_millis(11) + most, "{:?}", worker.polled);
    }

    #[test]
    fn polling_of_a_queue_that_is_busy_again_starts_with_its_second_request() {
        let mut worker = Worker::new(Polling::Auto);
        worker.idles(100, 5_000, 5_000);
        assert_eq!(worker.idles(100, 10, 80), 99);
    }

    #[test]
    fn polling_that_fails_more_often_than_not_stops() {
        let mut worker = Worker::new(Polling::Auto);
        for _ in 0..1000 {
            worker.idle(10, 80);
            worker.idles(2, 1_000, 1_000);
        }
        worker.polled = Duration::ZERO;
        for _ in 0..1000 {
            worker.idle(10, 80);
            worker.idles(2, 1_000, 1_000);
        }
        // Each request that comes soon is a trial.
        assert!(worker.polled < AUTO * 3 * 1000, "{:?}", worker.polled);
    }

    /// On one core with the guest: it can't make a request while the worker polls, and does so at once
    /// when it sleeps.
    #[test]
    fn polling_that_keeps_the_guest_from_its_core_is_hardly_tried() {
        let mut worker = Worker::new(Polling::Auto);
        let begin = worker.now;
        let found = worker.idles(1_000_000, u64::MAX / 2000, 7);
        assert_eq!(found, 0);
        let share = worker.polled.as_secs_f64() / (worker.now - begin).as_secs_f64();
        assert!(share < 0.005, "{share}");
    }

    /// The guests' time: a worker that is away from its core while it polls shares it with somebody.
    #[test]
    fn polling_on_a_core_that_others_want_pauses_longer_and_longer() {
        let mut worker = Worker::new(Polling::Auto);
        let begin = worker.now;
        while worker.now < begin + Duration::from_secs(10) {
            // Every 10 ms it is away for 3 ms.
            worker.idles(500, 10, 20);
            worker.poll.begins(worker.now, false);
            worker.now += Duration::from_millis(3);
            worker.poll.goes_on(worker.now);
        }
        let share = worker.polled.as_secs_f64() / 10.0;
        assert!(share < 0.1, "{share}");
        // Left alone, it polls again soon.
        worker.now += REST_MAX;
        assert_eq!(worker.idles(100, 10, 80), 99);
    }

    #[test]
    fn polling_that_was_interrupted_rarely_goes_on() {
        let mut worker = Worker::new(Polling::Auto);
        let (begin, mut found) = (worker.now, 0);
        for _ in 0..20 {
            // Once a second.
            found += worker.idles(100_000, 10, 10);
            worker.poll.begins(worker.now, false);
            worker.now += Duration::from_micros(100);
            worker.poll.goes_on(worker.now);
        }
        let share = worker.polled.as_secs_f64() / (worker.now - begin).as_secs_f64();
        assert!(found > 20 * 98_000 && share > 0.98, "{found} {share}");
    }

    #[test]
    fn polling_for_slow_io_is_given_up_after_a_few_times() {
        let mut worker = Worker::new(Polling::Auto);
        worker.has_io = true;
        worker.idles(1000, 100, 105);
        assert!(worker.polled <= AUTO * CREDIT_TRIAL, "{:?}", worker.polled);
    }

    #[test]
    fn polling_for_io_that_has_become_quick_starts_again() {
        let mut worker = Worker::new(Polling::Auto);
        worker.has_io = true;
        worker.idles(1000, 100, 105);
        // The first waits are as long as they were slept through.
        assert!(worker.idles(1000, 8, 13) > 950);
    }

    /// At depth 1 past the page cache: the guest asks again as soon as it is answered.
    #[test]
    fn polling_for_the_guest_goes_on_when_its_io_is_slept_through() {
        let mut worker = Worker::new(Polling::Auto);
        let mut found = 0;
        for _ in 0..1000 {
            worker.has_io = true;
            worker.idle(100, 105);
            worker.has_io = false;
            found += u32::from(worker.idle(15, 40));
        }
        assert_eq!(found, 1000);
        assert!(worker.polled < Duration::from_micros(16) * 1000, "{:?}", worker.polled);
    }

    /// The guest may still kick for what polling has found: its kick is there when the worker is to sleep.
    #[test]
    fn worker_that_is_woken_before_it_sleeps_does_not_take_io_for_quick() {
        let mut worker = Worker::new(Polling::Auto);
        worker.has_io = true;
        worker.idles(10, 100, 105);
        worker.polled = Duration::ZERO;
        for _ in 0..1000 {
            worker.idles(9, 100, 1);
            worker.idle(100, 105);
        }
        assert_eq!(worker.polled, Duration::ZERO);
    }

    #[test]
    fn polling_for_a_fixed_time_does_so_always() {
        let mut worker = Worker::new(Polling::Fixed(Duration::from_micros(30)));
        assert_eq!(worker.idles(100, 5_000, 5_000), 0);
        assert_eq!(worker.polled, Duration::from_micros(30) * 100);
        assert!(worker.idle(29, 80) && !worker.idle(31, 80));
    }

    #[test]
    fn polling_switched_off_never_begins() {
        let mut worker = Worker::new(Polling::Fixed(Duration::ZERO));
        assert_eq!(worker.idles(1000, 0, 1), 0);
        assert_eq!(worker.polled, Duration::ZERO);
    }
}
