//! How fast the drain goes: as fast as it can while no guest asks for anything, else out of their way; and never
//! faster than the operator allows. No I/O and no clock: it is told what guests do, and when.

mod bucket;

use std::num::NonZeroU64;
use std::time::Duration;

use blocks::BLOCK_SIZE;

use self::bucket::Bucket;

/// A disk is in use until so long after the last request that was seen.
const QUIET_AFTER: Duration = Duration::from_millis(20);
/// The longest rest, whatever the work before has taken.
const REST_MAX: Duration = Duration::from_millis(5);
/// A guest is idle when it has asked for nothing for so long.
pub(crate) const IDLE_AFTER: Duration = Duration::from_millis(500);

/// What an operator wants of the drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainPolicy {
    /// When it works.
    pub when: DrainWhen,
    /// Bytes a second that it may copy at most; a range that is shared or punched counts as one block. `None`: no
    /// limit.
    pub rate: Option<NonZeroU64>,
}

/// When the drain works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DrainWhen {
    /// Always; slowly while guests work.
    #[default]
    Eager,
    /// While no session is open, and in a session when its guest has asked for nothing for half a second. As long as a guest never
    /// pauses, nothing is restored.
    Idle,
}

impl DrainWhen {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Idle => "idle",
        }
    }
}

/// What guests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guests {
    /// No session is open.
    Absent,
    /// No request is under way; queues have begun so many passes, since some beginning.
    Quiet(u64),
    /// Requests are under way, or it can't be told.
    Busy,
}

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Speed {
    /// Bytes that are being copied at once.
    pub(crate) in_flight_bytes: u64,
    /// The same where blocks are shared, once that is known to work: before that, what is dirty there has to be written back, and
    /// that of many runs at once. No run is longer where they may be shared.
    pub(crate) in_flight_shared_bytes: u64,
    /// Blocks after which a batch is synced.
    pub(crate) batch_blocks: u64,
    /// Whether all that is being copied is finished before more is claimed. Only then can the drain rest, for
    /// while it has claims guests' writes may wait for them.
    pub(crate) by_stints: bool,
}

/// Why nothing is claimed, and when it may be again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Until there is something to spend again.
    Rate(Duration),
    /// Until guests may be idle.
    Guests(Duration),
}

/// Nobody waits: one sync for 1 GiB. What is in flight stays in a processor's cache between its read and its write.
const FULL: Speed = Speed {
    in_flight_bytes: 2 << 20,
    in_flight_shared_bytes: 16 << 20,
    batch_blocks: 262_144,
    by_stints: false,
};
/// A guest has paused, and may be back any time: a sync is short.
const WHILE_IDLE: Speed = Speed { batch_blocks: 16_384, ..FULL };
/// Guests work, and copying takes a processor: whoever wants that one waits for the end of what is copied at once. 64 KiB take
/// as long as a few requests. A sync is short.
const GENTLE: Speed = Speed {
    in_flight_bytes: 64 << 10,
    in_flight_shared_bytes: 512 << 10,
    batch_blocks: 16_384,
    by_stints: true,
};
/// Guests work, and copying waits for a device or a server: little is ahead of their I/O in its queue.
const GENTLE_WAITING: Speed = Speed { in_flight_bytes: 512 << 10, ..GENTLE };

/// Decides, from what was seen of the guests.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    when: DrainWhen,
    waits: bool,
    bucket: Option<Bucket>,
    /// When a request was last seen under way.
    last_seen: Option<Duration>,
    /// When guests were last known to have begun something, and the passes that were counted then.
    last_active: Option<(Duration, Option<u64>)>,
}

impl Pace {
    /// As the operator wants it; `waits`: what copying takes most of is no processor. It is made anew for each drain, and has
    /// nothing to spend at first: so what drains of many sessions copy keeps to the rate as well.
    pub(crate) fn new(policy: DrainPolicy, waits: bool) -> Self {
        Self { when: policy.when, waits, bucket: policy.rate.map(Bucket::new), ..Self::default() }
    }

    /// How fast to go on at `now`, and why not yet, if so.
    pub(crate) fn turn(&mut self, guests: Guests, now: Duration) -> (Speed, Option<Pause>) {
        if guests == Guests::Busy {
            self.last_seen = Some(now);
        }
        let idle_in = self.idle_in(guests, now);
        let speed = match (self.when, guests) {
            (DrainWhen::Idle, Guests::Absent) => FULL,
            (DrainWhen::Idle, _) => WHILE_IDLE,
            (DrainWhen::Eager, _) if self.is_gentle(now) && self.waits => GENTLE_WAITING,
            (DrainWhen::Eager, _) if self.is_gentle(now) => GENTLE,
            (DrainWhen::Eager, _) => FULL,
        };
        let Some(bucket) = &mut self.bucket else { return (speed, idle_in.map(Pause::Guests)) };
        bucket.fill(now);
        let batch_blocks = speed.batch_blocks.min(bucket.batch_bytes() / BLOCK_SIZE);
        let rate_in = bucket.worth_it_in();
        let pause = idle_in.map(Pause::Guests).or(rate_in.map(Pause::Rate));
        (Speed { batch_blocks, ..speed }, pause)
    }

    /// Bytes that may be claimed now.
    pub(crate) fn allowance(&self) -> u64 {
        self.bucket.as_ref().map_or(u64::MAX, Bucket::available)
    }

    /// Takes note that so many bytes are copied, or as much work is done as copying them.
    pub(crate) fn spend(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bucket {
            bucket.spend(bytes);
        }
    }

    /// How long to rest at `now`, after work of the length of `worked`: as long as that, while guests work.
    pub(crate) fn rest(&self, worked: Duration, now: Duration) -> Duration {
        if self.when == DrainWhen::Eager && self.is_gentle(now) {
            worked.min(REST_MAX)
        } else {
            Duration::ZERO
        }
    }

    fn is_gentle(&self, now: Duration) -> bool {
        self.last_seen.is_some_and(|seen| now.saturating_sub(seen) < QUIET_AFTER)
    }

    /// How long until guests may be idle, if the drain is to wait for that. Whoever is seen for the first time may have just
    /// asked for something.
    fn idle_in(&mut self, guests: Guests, now: Duration) -> Option<Duration> {
        let passes = match guests {
            _ if self.when == DrainWhen::Eager => return None,
            Guests::Absent => {
                self.last_active = None;
                return None;
            }
            Guests::Quiet(passes) => Some(passes),
            Guests::Busy => None,
        };
        let since = match self.last_active {
            Some((since, Some(before))) if passes == Some(before) => since,
            // It was busy, and is not any more: from now on it counts.
            _ => {
                self.last_active = Some((now, passes));
                now
            }
        };
        IDLE_AFTER.checked_sub(now.saturating_sub(since)).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const QUIET: Guests = Guests::Quiet(7);

    fn pace(when: DrainWhen, rate: u64) -> Pace {
        Pace::new(DrainPolicy { when, rate: NonZeroU64::new(rate) }, false)
    }

    #[test]
    fn disk_that_nobody_uses_is_drained_at_full_speed_without_rest() {
        let mut pace = Pace::default();
        for at in 0..1000 {
            let guests = if at % 2 == 0 { QUIET } else { Guests::Absent };
            assert_eq!(pace.turn(guests, MS * at), (FULL, None));
            assert_eq!(pace.rest(MS * 5, MS * at), Duration::ZERO);
        }
        assert_eq!(pace.allowance(), u64::MAX);
    }

    #[test]
    fn guest_that_was_seen_slows_the_drain_until_it_has_been_quiet_for_a_while() {
        let mut pace = Pace::default();
        assert_eq!(pace.turn(Guests::Busy, MS * 100), (GENTLE, None));
        assert_eq!(pace.turn(QUIET, MS * 100 + QUIET_AFTER - MS), (GENTLE, None));
        assert_eq!(pace.rest(MS * 3, MS * 101), MS * 3);
        assert_eq!(pace.turn(QUIET, MS * 100 + QUIET_AFTER), (FULL, None));
        assert_eq!(pace.rest(MS * 3, MS * 100 + QUIET_AFTER), Duration::ZERO);
    }

    /// What a guest waits for is the processor, or something else.
    #[test]
    fn more_is_copied_at_once_where_copying_takes_no_processor() {
        for (waits, speed) in [(false, GENTLE), (true, GENTLE_WAITING)] {
            let mut pace = Pace::new(DrainPolicy::default(), waits);
            assert_eq!(pace.turn(Guests::Busy, MS), (speed, None));
            assert_eq!(pace.turn(QUIET, MS * 1000), (FULL, None));
        }
        const { assert!(GENTLE.in_flight_bytes < GENTLE_WAITING.in_flight_bytes) };
    }

    /// The drain always goes on: a slow device must not make it rest for ever.
    #[test]
    fn rest_has_a_bound() {
        let mut pace = Pace::default();
        pace.turn(Guests::Busy, MS);
        assert_eq!(pace.rest(Duration::from_secs(60), MS), REST_MAX);
    }

    #[test]
    fn idle_drain_waits_half_a_second_from_the_last_thing_that_a_guest_began() {
        let mut pace = pace(DrainWhen::Idle, 0);
        let pause = |left: u32| Some(Pause::Guests(MS * left));
        assert_eq!(pace.turn(QUIET, MS * 100), (WHILE_IDLE, pause(500)), "seen for the first time");
        assert_eq!(pace.turn(QUIET, MS * 400), (WHILE_IDLE, pause(200)));
        assert_eq!(
            pace.turn(Guests::Quiet(8), MS * 500),
            (WHILE_IDLE, pause(500)),
            "it began something between"
        );
        assert_eq!(pace.turn(Guests::Busy, MS * 700), (WHILE_IDLE, pause(500)));
        assert_eq!(pace.turn(Guests::Busy, MS * 2000), (WHILE_IDLE, pause(500)), "under way for long");
        assert_eq!(
            pace.turn(Guests::Quiet(8), MS * 2100),
            (WHILE_IDLE, pause(500)),
            "since when is not known"
        );
        assert_eq!(pace.turn(Guests::Quiet(8), MS * 2600), (WHILE_IDLE, None));
        assert_eq!(pace.rest(MS * 3, MS * 2600), Duration::ZERO);
        assert_eq!(pace.turn(Guests::Quiet(9), MS * 2601), (WHILE_IDLE, pause(500)));
    }

    /// Whatever sessions do, the disk is restored between them.
    #[test]
    fn idle_drain_never_waits_while_no_session_is_open() {
        let mut pace = pace(DrainWhen::Idle, 0);
        pace.turn(Guests::Busy, MS);
        assert_eq!(pace.turn(Guests::Absent, MS * 2), (FULL, None));
        assert_eq!(pace.turn(QUIET, MS * 3), (WHILE_IDLE, Some(Pause::Guests(IDLE_AFTER))));
    }

    /// Whatever is spent when, no more than the rate allows comes together, but for one burst.
    #[test]
    fn drain_with_a_rate_copies_no_more_than_that() {
        for rate in [64 << 10, 1 << 20, 50 << 20, 3 << 30] {
            let mut pace = pace(DrainWhen::Eager, rate);
            let (mut now, mut spent) = (Duration::ZERO, 0);
            let burst = (rate / 10).max(256 << 10);
            for step in 0..20_000u64 {
                let (speed, pause) = pace.turn(Guests::Absent, now);
                assert!(speed.batch_blocks > 0);
                match pause {
                    None => {
                        let bytes = pace.allowance().min(256 << 10);
                        assert!(bytes >= BLOCK_SIZE);
                        pace.spend(bytes);
                        spent += bytes;
                    }
                    Some(Pause::Rate(left)) => now += left,
                    Some(Pause::Guests(_)) => panic!("there are none"),
                }
                now += Duration::from_micros(step % 7 * 20);
                let allowed = rate as u128 * now.as_nanos() / 1_000_000_000 + u128::from(burst);
                assert!(u128::from(spent) <= allowed, "{spent} bytes at {now:?} of {rate} a second");
            }
            let least = rate as u128 * now.as_nanos() / 1_000_000_000 * 9 / 10;
            assert!(u128::from(spent) + u128::from(burst) >= least, "{spent} bytes in {now:?}: too slow");
        }
    }

    /// A batch is synced after some seconds at the latest, or progress would be lost again and again.
    #[test]
    fn batch_of_a_slow_drain_is_short() {
        let (speed, pause) = pace(DrainWhen::Eager, 1 << 20).turn(Guests::Absent, Duration::ZERO);
        assert_eq!(speed.batch_blocks, 512);
        assert!(matches!(pause, Some(Pause::Rate(_))), "there is nothing to spend at first");
    }

    #[test]
    fn idle_guest_is_waited_for_before_the_rate_is() {
        let mut pace = pace(DrainWhen::Idle, 1 << 20);
        assert_eq!(pace.turn(Guests::Busy, MS).1, Some(Pause::Guests(IDLE_AFTER)));
        assert!(matches!(pace.turn(Guests::Absent, MS).1, Some(Pause::Rate(_))));
        assert_eq!(pace.turn(Guests::Absent, MS * 1000).1, None);
    }
}
