//! Claims: who may change pending blocks right now.
//!
//! Crash order, step 7: a drain and the guests' writes each claim the pending blocks that they are about to
//! change, all or nothing; who gets none parks and is woken by the next release. Whether a block is still pending
//! is looked at again after claiming. The generation counts session ends: what a drain copied before
//! one is not taken for restored after it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use blocks::{BlockSet, Extent};
use rustix::event::{EventfdFlags, eventfd};

/// Wakes a thread that waits for claims, through a descriptor that it polls.
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

impl Waker {
    pub(crate) fn new() -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// Makes the descriptor readable. Can only fail when it already is.
    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the descriptor unreadable; whether it was readable.
    pub(crate) fn consume(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The claimed blocks of a disk.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    generation: u64,
    /// First block to end of each claimed run; they never overlap.
    held: BTreeMap<u64, u64>,
    waiting: Vec<Arc<Waker>>,
}

impl Inner {
    /// The claimed run that overlaps `extent` and begins first.
    fn first_overlap(&self, extent: Extent) -> Option<Extent> {
        let before = self.held.range(..=extent.first()).next_back().map(|(f, e)| Extent::between(*f, *e));
        before.filter(|run| run.overlaps(extent)).or_else(|| {
            self.held.range(extent.first()..extent.end()).next().map(|(f, e)| Extent::between(*f, *e))
        })
    }

    fn wait(&mut self, waker: &Arc<Waker>) {
        if !self.waiting.iter().any(|known| Arc::ptr_eq(known, waker)) {
            self.waiting.push(Arc::clone(waker));
        }
    }
}

/// What a drain got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainClaim {
    /// These blocks are pending and its own until they are released.
    Claimed {
        /// The blocks.
        extent: Extent,
        /// The generation in which they were claimed.
        generation: u64,
    },
    /// Pending blocks are left, all claimed by others; the waker will be woken.
    Blocked,
    /// No block at or after the cursor is pending.
    Nothing,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Claims all of `extents` (which do not overlap each other), or none: then `waker` is woken by
    /// the next release.
    pub(crate) fn try_claim(&self, extents: &[Extent], waker: &Arc<Waker>) -> bool {
        let mut inner = self.lock();
        if extents.iter().any(|extent| inner.first_overlap(*extent).is_some()) {
            inner.wait(waker);
            return false;
        }
        inner.held.extend(extents.iter().map(|extent| (extent.first(), extent.end())));
        true
    }

    /// Claims the first run of unclaimed pending blocks at or after `from`, at most `limit` blocks.
    pub(crate) fn claim_pending(
        &self,
        pending: &BlockSet,
        from: u64,
        limit: u64,
        waker: &Arc<Waker>,
    ) -> DrainClaim {
        let mut inner = self.lock();
        let (mut next, mut blocked) = (from, false);
        while let Some(run) = pending.next_run(next, limit) {
            let free = match inner.first_overlap(run) {
                None => run,
                Some(held) if held.first() > run.first() => Extent::between(run.first(), held.first()),
                Some(held) => {
                    blocked = true;
                    next = held.end();
                    continue;
                }
            };
            inner.held.insert(free.first(), free.end());
            return DrainClaim::Claimed { extent: free, generation: inner.generation };
        }
        if blocked {
            inner.wait(waker);
            return DrainClaim::Blocked;
        }
        DrainClaim::Nothing
    }

    /// Gives claimed runs back, exactly as they were claimed.
    pub(crate) fn release(&self, extents: &[Extent]) {
        if extents.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for extent in extents {
            inner.held.remove(&extent.first());
        }
        inner.waiting.drain(..).for_each(|waker| waker.wake());
    }

    /// Takes `copied` out of `pending`: blocks that were copied in `generation` and are synced. Blocks that a guest has
    /// claimed meanwhile stay (it clears them itself, after its record), and after a session end all stay.
    /// Returns how many blocks were taken out.
    pub(crate) fn settle(&self, pending: &BlockSet, copied: &[Extent], generation: u64) -> u64 {
        let inner = self.lock();
        if inner.generation != generation {
            return 0;
        }
        let mut cleared = 0;
        for extent in copied {
            let mut rest = *extent;
            while !rest.is_empty() {
                let held = inner.first_overlap(rest).unwrap_or(Extent::new(rest.end(), 0));
                cleared += pending.remove(Extent::between(rest.first(), held.first()));
                rest = Extent::between(held.end().max(rest.first()), rest.end());
            }
        }
        cleared
    }

    /// Ends a generation: `change` runs while no claim is given and nothing is settled.
    pub(crate) fn end_generation(&self, change: impl FnOnce()) {
        let mut inner = self.lock();
        inner.generation += 1;
        change();
    }

    /// Runs `look` while no claim is given, released or settled.
    pub(crate) fn freeze<T>(&self, look: impl FnOnce() -> T) -> T {
        let _inner = self.lock();
        look()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(extents: &[Extent]) -> BlockSet {
        let set = BlockSet::new(1000);
        extents.iter().for_each(|extent| {
            set.insert(*extent);
        });
        set
    }

    #[test]
    fn claim_of_blocks_that_are_partly_claimed_gets_nothing_and_is_woken_by_the_release() {
        let (claims, waker) = (Claims::default(), Waker::new().unwrap());
        assert!(claims.try_claim(&[Extent::new(10, 5), Extent::new(20, 5)], &waker));
        assert!(!claims.try_claim(&[Extent::new(0, 2), Extent::new(24, 2)], &waker));
        assert!(claims.try_claim(&[Extent::new(0, 10), Extent::new(15, 5)], &waker));
        assert!(!waker.consume());
        claims.release(&[Extent::new(10, 5), Extent::new(20, 5)]);
        assert!(waker.consume());
        assert!(claims.try_claim(&[Extent::new(24, 2)], &waker));
    }

    #[test]
    fn drain_claims_around_what_guests_claimed() {
        let (claims, waker) = (Claims::default(), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        assert!(claims.try_claim(&[Extent::new(10, 2), Extent::new(15, 2)], &waker));
        let mut got = Vec::new();
        while let DrainClaim::Claimed { extent, .. } = claims.claim_pending(&set, 0, 8, &waker) {
            got.push(extent);
        }
        assert_eq!(got, [Extent::new(12, 3), Extent::new(17, 8), Extent::new(25, 5)]);
        assert_eq!(claims.claim_pending(&set, 0, 8, &waker), DrainClaim::Blocked);
        assert_eq!(claims.claim_pending(&set, 30, 8, &waker), DrainClaim::Nothing);
    }

    /// Invariant 2: what a guest claimed or an ended session dirtied is not taken for restored.
    #[test]
    fn settle_leaves_claimed_blocks_and_everything_of_an_earlier_generation() {
        let (claims, waker) = (Claims::default(), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        assert!(claims.try_claim(&[Extent::new(15, 2)], &waker));
        assert_eq!(claims.settle(&set, &[Extent::new(10, 20)], 0), 18);
        assert_eq!(set.runs().collect::<Vec<_>>(), [Extent::new(15, 2)]);
        claims.release(&[Extent::new(15, 2)]);
        claims.end_generation(|| ());
        assert_eq!(claims.settle(&set, &[Extent::new(10, 20)], 0), 0);
        assert_eq!(claims.settle(&set, &[Extent::new(10, 20)], 1), 2);
    }
}
