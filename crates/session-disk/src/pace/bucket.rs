//! A token bucket of bytes: fills at a rate, is spent, and never holds more than a short burst.

use std::num::NonZeroU64;
use std::time::Duration;

const NS_PER_S: i128 = 1_000_000_000;
/// The smallest burst, bytes: less at once is dear.
const BURST_BYTES_MIN: u64 = 256 << 10;
/// What a batch copies takes so long at most, seconds; but it is never less than the smallest burst.
const BATCH_S: u64 = 2;

/// It is empty at first.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Bytes a second.
    rate: u64,
    /// What it holds at most, bytes: what comes in 0.1 s, and some at least.
    burst: u64,
    /// What it holds, in bytes times nanoseconds, so that no time is lost in rounding. Less than nothing: more was spent
    /// than there was.
    level: i128,
    /// When it was filled up.
    filled: Duration,
}

impl Bucket {
    pub(super) fn new(rate: NonZeroU64) -> Self {
        let rate = rate.get();
        Self { rate, burst: (rate / 10).max(BURST_BYTES_MIN), level: 0, filled: Duration::ZERO }
    }

    /// Adds what has come up to `now`.
    pub(super) fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled).as_nanos();
        // A rate has 64 bits and a century of nanoseconds 62.
        let come = i128::try_from(passed).unwrap_or(i128::MAX).saturating_mul(i128::from(self.rate));
        self.level = self.level.saturating_add(come).min(i128::from(self.burst) * NS_PER_S);
        self.filled = now.max(self.filled);
    }

    /// Bytes that there are.
    pub(super) fn available(&self) -> u64 {
        u64::try_from(self.level / NS_PER_S).unwrap_or(0)
    }

    pub(super) fn spend(&mut self, bytes: u64) {
        self.level -= i128::from(bytes) * NS_PER_S;
    }

    /// How long until there is enough to make it worth to go on, if there is not.
    pub(super) fn worth_it_in(&self) -> Option<Duration> {
        let missing = i128::from(BURST_BYTES_MIN / 2) * NS_PER_S - self.level;
        let ns = u64::try_from(missing / i128::from(self.rate) + 1).unwrap_or(u64::MAX);
        (missing > 0).then(|| Duration::from_nanos(ns))
    }

    /// How much a batch copies at most.
    pub(super) fn batch_bytes(&self) -> u64 {
        self.rate.saturating_mul(BATCH_S).max(BURST_BYTES_MIN)
    }
}
