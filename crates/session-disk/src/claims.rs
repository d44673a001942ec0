//! Claims: who may change pending blocks right now.
//!
//! Crash order, step 7: a drain and the guests' writes each claim the pending blocks that they are about to
//! change, all or nothing; who gets none parks and is woken by the next release. Whether a block is still pending
//! is looked at again after claiming.
//!
//! What the drain has copied is remembered until it is synced and settled. A guest that claims such a
//! block takes it out of that memory, whether its write then succeeds or not, and a session's end
//! forgets all of it: so a block is only ever settled if nobody can have written to it since it was
//! copied. (The design's generation number is implied by that.)

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
#[derive(Debug)]
pub(crate) struct Claims {
    inner: Mutex<Inner>,
    /// Blocks that the drain has copied and nobody has claimed since. Changed under the lock only.
    copied: BlockSet,
}

#[derive(Debug, Default)]
struct Inner {
    /// Runs that the drain has copied and not settled; `copied` says what still counts of them.
    copied_runs: Vec<Extent>,
    /// First block to end of each claimed run; they never overlap.
    held: BTreeMap<u64, u64>,
    waiting: Vec<Arc<Waker>>,
    /// Whether the drain rests: the disk is held, and its session has ended.
    drain_rests: bool,
    /// Whether the drain has claimed anything since the last session's end.
    drain_began: bool,
    /// Whether somebody drains.
    draining: bool,
}

impl Inner {
    /// The claimed run that overlaps `extent` and begins first.
    fn first_overlap(&self, extent: Extent) -> Option<Extent> {
        let before = self.held.range(..=extent.first()).next_back().map(|(f, e)| Extent::between(*f, *e));
        before.filter(|run| run.overlaps(extent)).or_else(|| {
            self.held.range(extent.first()..extent.end()).next().map(|(f, e)| Extent::between(*f, *e))
        })
    }

    /// Claims the first run of unclaimed pending blocks at or after `from`, at most `limit` blocks.
    fn claim_next(&mut self, pending: &BlockSet, from: u64, limit: u64, waker: &Arc<Waker>) -> DrainClaim {
        let (mut next, mut blocked) = (from, false);
        while let Some(run) = pending.next_run(next, limit) {
            let free = match self.first_overlap(run) {
                None => run,
                Some(held) if held.first() > run.first() => Extent::between(run.first(), held.first()),
                Some(held) => {
                    blocked = true;
                    next = held.end();
                    continue;
                }
            };
            self.held.insert(free.first(), free.end());
            self.drain_began = true;
            return DrainClaim::Claimed(free);
        }
        if blocked {
            self.wait(waker);
            return DrainClaim::Blocked;
        }
        DrainClaim::Nothing
    }

    fn wait(&mut self, waker: &Arc<Waker>) {
        if !self.waiting.iter().any(|known| Arc::ptr_eq(known, waker)) {
            self.waiting.push(Arc::clone(waker));
        }
    }
}

/// How much a drain may claim.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Runs in all; one at least is claimed.
    pub(crate) runs: usize,
    /// Blocks in all, after which no more runs are claimed.
    pub(crate) blocks: u64,
    /// Blocks of the longest run.
    pub(crate) run_blocks: u64,
}

/// What a drain got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainClaim {
    /// These blocks are pending and its own until they are released.
    Claimed(Extent),
    /// Pending blocks are left, all claimed by others; the waker will be woken.
    Blocked,
    /// No block at or after the cursor is pending, or the drain is to rest.
    Nothing,
}

impl Claims {
    /// No claims on a disk of `blocks` blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        Self { inner: Mutex::default(), copied: BlockSet::new(blocks) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Claims all of `extents` (which do not overlap each other) for a guest's write, or none: then
    /// `waker` is woken by the next release.
    pub(crate) fn try_claim(&self, extents: &[Extent], waker: &Arc<Waker>) -> bool {
        let mut inner = self.lock();
        if extents.iter().any(|extent| inner.first_overlap(*extent).is_some()) {
            inner.wait(waker);
            return false;
        }
        inner.held.extend(extents.iter().map(|extent| (extent.first(), extent.end())));
        for extent in extents {
            self.copied.remove(*extent);
        }
        true
    }

    /// Makes sure that no release wakes `waker` any more.
    pub(crate) fn stop_waiting(&self, waker: &Arc<Waker>) {
        self.lock().waiting.retain(|known| !Arc::ptr_eq(known, waker));
    }

    /// Claims runs of unclaimed pending blocks at or after `from`, in order, under one lock, until there is no
    /// `room` for more, and appends them to `claimed`. Returns the last one, or why there are no more.
    pub(crate) fn claim_pending(
        &self,
        pending: &BlockSet,
        from: u64,
        room: Room,
        waker: &Arc<Waker>,
        claimed: &mut Vec<Extent>,
    ) -> DrainClaim {
        let mut inner = self.lock();
        if inner.drain_rests {
            return DrainClaim::Nothing;
        }
        let (mut next, mut runs, mut blocks) = (from, 0, 0);
        loop {
            let claim = inner.claim_next(pending, next, room.run_blocks, waker);
            let DrainClaim::Claimed(run) = claim else { return claim };
            claimed.push(run);
            (next, runs, blocks) = (run.end(), runs + 1, blocks + run.count());
            if runs >= room.runs || blocks >= room.blocks {
                return claim;
            }
        }
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

    /// Gives back runs that the drain has copied; they can be settled once they are synced.
    pub(crate) fn release_copied(&self, runs: &[Extent]) {
        if runs.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for run in runs {
            self.copied.insert(*run);
            inner.held.remove(&run.first());
        }
        inner.copied_runs.extend_from_slice(runs);
        inner.waiting.drain(..).for_each(|waker| waker.wake());
    }

    /// Says that somebody drains, unless somebody does already; whether it was so. Two drains would
    /// settle each other's copies, before they are synced.
    pub(crate) fn begin_drain(&self) -> bool {
        !std::mem::replace(&mut self.lock().draining, true)
    }

    /// Says that who began to drain does so no more.
    pub(crate) fn end_drain(&self) {
        self.lock().draining = false;
    }

    /// Takes out of `pending` what was copied, is synced, and was not claimed by a guest since. Returns
    /// how many blocks that were. `still_good` is asked under the lock; if it says no, nothing is taken.
    pub(crate) fn settle(&self, pending: &BlockSet, still_good: impl FnOnce() -> bool) -> u64 {
        let mut inner = self.lock();
        if !still_good() {
            self.forget(&mut inner);
            return 0;
        }
        let mut cleared = 0;
        for run in std::mem::take(&mut inner.copied_runs) {
            for (counts, part) in self.copied.mixed_runs(run) {
                if counts {
                    cleared += pending.remove(part);
                }
            }
            self.copied.remove(run);
        }
        cleared
    }

    /// Forgets what was copied and not settled.
    pub(crate) fn forget_copied(&self) {
        self.forget(&mut self.lock());
    }

    fn forget(&self, inner: &mut Inner) {
        for run in std::mem::take(&mut inner.copied_runs) {
            self.copied.remove(run);
        }
    }

    /// Ends a session: what was copied is forgotten, and `change` runs while no claim is given and
    /// nothing is settled. `held`: the drain rests from now on. Not `logged`: it has written nothing, and the last session
    /// is still the one before.
    pub(crate) fn end_session(&self, held: bool, logged: bool, change: impl FnOnce()) {
        let mut inner = self.lock();
        self.forget(&mut inner);
        inner.drain_rests = held;
        inner.drain_began &= !logged;
        change();
    }

    /// Says at opening whether the drain rests, and whether it may have begun on the last session's blocks.
    pub(crate) fn set_drain(&self, rests: bool, began: bool) {
        let mut inner = self.lock();
        inner.drain_rests = rests;
        inner.drain_began = began;
    }

    /// Lets the drain rest, unless it has begun since the last session's end; whether it rests.
    pub(crate) fn rest_if_not_begun(&self) -> bool {
        let mut inner = self.lock();
        inner.drain_rests |= !inner.drain_began;
        inner.drain_rests
    }

    /// Lets the drain go on.
    pub(crate) fn end_rest(&self) {
        self.lock().drain_rests = false;
    }

    /// Whether the drain rests.
    pub(crate) fn drain_rests(&self) -> bool {
        self.lock().drain_rests
    }

    /// Whether the drain has claimed anything since the last session's end.
    pub(crate) fn drain_began(&self) -> bool {
        self.lock().drain_began
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

    /// Claims one run for the drain.
    fn claim_one(claims: &Claims, set: &BlockSet, from: u64, limit: u64, waker: &Arc<Waker>) -> DrainClaim {
        claims.claim_pending(
            set,
            from,
            Room { runs: 1, blocks: 1, run_blocks: limit },
            waker,
            &mut Vec::new(),
        )
    }

    fn pending(extents: &[Extent]) -> BlockSet {
        let set = BlockSet::new(1000);
        extents.iter().for_each(|extent| {
            set.insert(*extent);
        });
        set
    }

    #[test]
    fn claim_of_blocks_that_are_partly_claimed_gets_nothing_and_is_woken_by_the_release() {
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
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
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        assert!(claims.try_claim(&[Extent::new(10, 2), Extent::new(15, 2)], &waker));
        let mut got = Vec::new();
        while let DrainClaim::Claimed(extent) = claim_one(&claims, &set, 0, 8, &waker) {
            got.push(extent);
        }
        assert_eq!(got, [Extent::new(12, 3), Extent::new(17, 8), Extent::new(25, 5)]);
        assert_eq!(claim_one(&claims, &set, 0, 8, &waker), DrainClaim::Blocked);
        assert_eq!(claim_one(&claims, &set, 30, 8, &waker), DrainClaim::Nothing);
    }

    #[test]
    fn drain_claims_many_runs_at_once_as_far_as_there_is_room() {
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20), Extent::new(50, 1), Extent::new(60, 1)]);
        assert!(claims.try_claim(&[Extent::new(12, 2)], &waker));
        let claim = |from, runs, blocks| {
            let mut got = Vec::new();
            let end =
                claims.claim_pending(&set, from, Room { runs, blocks, run_blocks: 8 }, &waker, &mut got);
            (end, got)
        };
        let first = vec![Extent::new(10, 2), Extent::new(14, 8)];
        assert_eq!(claim(0, 9, 5), (DrainClaim::Claimed(Extent::new(14, 8)), first));
        let second = vec![Extent::new(22, 8), Extent::new(50, 1)];
        assert_eq!(claim(22, 2, 100), (DrainClaim::Claimed(Extent::new(50, 1)), second));
        assert_eq!(claim(51, 9, 100), (DrainClaim::Nothing, vec![Extent::new(60, 1)]));
        assert_eq!(claim(0, 9, 100), (DrainClaim::Blocked, vec![]));
    }

    /// Invariant 2: two drains would take each other's copies for synced.
    #[test]
    fn drain_begins_only_once_until_it_ends() {
        let claims = Claims::new(1000);
        assert!(claims.begin_drain());
        assert!(!claims.begin_drain());
        claims.end_drain();
        assert!(claims.begin_drain());
    }

    /// Invariant 2: what a guest claimed since it was copied is not taken for restored, whether it
    /// holds the claim still or its write has failed and it gave it back.
    #[test]
    fn settle_leaves_what_a_guest_has_claimed_since_the_copy() {
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        let DrainClaim::Claimed(run) = claim_one(&claims, &set, 0, 100, &waker) else { panic!() };
        claims.release_copied(&[run]);
        assert!(claims.try_claim(&[Extent::new(15, 2), Extent::new(20, 1)], &waker));
        claims.release(&[Extent::new(20, 1)]);
        assert_eq!(claims.settle(&set, || true), 17);
        assert_eq!(set.runs().collect::<Vec<_>>(), [Extent::new(15, 2), Extent::new(20, 1)]);
        claims.release(&[Extent::new(15, 2)]);
        assert_eq!(claims.settle(&set, || true), 0);
    }

    /// A held disk is kept as its session left it: from the end on the drain gets no block.
    #[test]
    fn drain_of_a_held_disk_gets_nothing_from_the_session_end_to_the_release() {
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        let claim = || claim_one(&claims, &set, 0, 5, &waker);
        claims.end_session(true, true, || ());
        assert_eq!((claim(), claims.drain_began()), (DrainClaim::Nothing, false));
        claims.end_rest();
        assert_eq!((claim(), claims.drain_began()), (DrainClaim::Claimed(Extent::new(10, 5)), true));
        assert!(!claims.rest_if_not_begun());
        assert_eq!(claim(), DrainClaim::Claimed(Extent::new(15, 5)));
        claims.end_session(false, true, || ());
        assert!(claims.rest_if_not_begun());
        assert_eq!(claim(), DrainClaim::Nothing);
    }

    /// Invariant 2: what was copied before a session's end or in vain is not taken for restored.
    #[test]
    fn settle_after_a_session_end_or_a_failed_sync_leaves_everything() {
        let (claims, waker) = (Claims::new(1000), Waker::new().unwrap());
        let set = pending(&[Extent::new(10, 20)]);
        let copy = || {
            let DrainClaim::Claimed(run) = claim_one(&claims, &set, 0, 100, &waker) else { panic!() };
            claims.release_copied(&[run]);
        };
        copy();
        claims.end_session(false, true, || ());
        assert_eq!(claims.settle(&set, || true), 0);
        copy();
        assert_eq!(claims.settle(&set, || false), 0);
        assert_eq!(claims.settle(&set, || true), 0);
        copy();
        claims.forget_copied();
        assert_eq!(claims.settle(&set, || true), 0);
        copy();
        assert_eq!(claims.settle(&set, || true), 20);
    }
}
