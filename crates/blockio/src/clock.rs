//! A clock that costs less than a read.
//!
//! Clocks of a finer grain wait until all that the processor has begun is done (`rdtsc` as well): one
//! look at such a clock between two copies made both slower by 60 to 160 ns. This one only loads what
//! the kernel stores at each of its ticks, every 1 to 10 ms.

/// A moment in nanoseconds, to the kernel's last tick.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Moment(pub(super) u64);

/// A time in which what was seen is believed. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Epoch(pub(super) u32);

impl Epoch {
    /// Set in all of them.
    pub(crate) const MARK: u32 = 1 << 31;
}

impl Moment {
    /// 2 to this power of nanoseconds are an epoch: 1.1 s.
    const EPOCH_BITS: u32 = 30;

    #[inline]
    pub(crate) fn now() -> Self {
        // Not rustix's, which finds the vDSO itself and so does not run under valgrind.
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: there is room for the answer.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
        Self((now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64))
    }

    /// The number of the 8.6 s that this moment lies in; those of this and the last one differ, those of moments far apart
    /// may not.
    #[inline]
    pub(crate) fn spell(self) -> u32 {
        (self.0 >> (Self::EPOCH_BITS + 3)) as u32
    }

    #[inline]
    pub(crate) fn epoch(self) -> Epoch {
        Epoch((self.0 >> Self::EPOCH_BITS) as u32 | Epoch::MARK)
    }
}
