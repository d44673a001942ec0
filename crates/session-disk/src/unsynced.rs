//! What a session took from P and is not durable yet.
//!
//! A block that was pending holds, on the medium, what an earlier session wrote. When a guest overwrites it, its data is in the page
//! cache, and P does not have the block any more. If the kernel fails to write that data back, it forgets it, and says so once to
//! each open file that asks; after that the block reads as what the medium has, the earlier session's data. So until a sync has
//! told that the data is there, whoever reads such a block asks, with the data in hand and before a guest sees any of it. The kernel
//! notes a failure before it lets go of a page, so that what was read before the answer is the session's own if the answer is good.
//!
//! Zeroes that are not written are another matter: that a block reads as zeroes is a note of the file system, which is lost, without a word
//! to those who ask about data, if its journal fails and the note is dropped from memory. The same is true of a block that is given up before its
//! data was written back. So these are in a set of their own, and whoever reads one syncs.
//!
//! Blocks that were never pending have the base's content underneath, and what is written again after a sync has the session's own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use blocks::{BlockSet, Extent};

/// See the module.
#[derive(Debug)]
pub(crate) struct Unsynced {
    /// What was taken since the last sync began.
    taken: BlockSet,
    /// What was taken before it: a sync that is under way, or has failed, vouches for it or does not.
    waiting: BlockSet,
    /// Insertions that have begun, and those of them that have ended. (The sets' own counts are behind their bits while blocks are
    /// added and removed at the same time.)
    begun: AtomicU64,
    ended: AtomicU64,
    /// So many had begun and ended before the last sync that succeeded.
    settled: AtomicU64,
    /// Held by the one who syncs.
    syncing: Mutex<()>,
}

impl Unsynced {
    /// Nothing, of a disk of so many blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        Self {
            taken: BlockSet::new(blocks),
            waiting: BlockSet::new(blocks),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            syncing: Mutex::default(),
        }
    }

    /// A guest's data of `extent` is in the page cache. To be called before it leaves P.
    pub(crate) fn insert(&self, extent: Extent) {
        self.begun.fetch_add(1, Ordering::AcqRel);
        self.taken.insert(extent);
        self.ended.fetch_add(1, Ordering::AcqRel);
    }

    /// As [`insert`](Self::insert), of every block of a set.
    pub(crate) fn insert_set(&self, set: &BlockSet) {
        set.runs().for_each(|run| self.insert(run));
    }

    /// Whether all that was inserted is durable.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.begun.load(Ordering::Acquire) == self.settled.load(Ordering::Acquire)
    }

    /// Whether a block of `extent` may not be durable. To be asked after a look at P.
    #[inline]
    pub(crate) fn intersects(&self, extent: Extent) -> bool {
        // In this order: what is in neither is durable, for it goes from the first to the second before it leaves that.
        !self.is_empty() && (self.taken.intersects(extent) || self.waiting.intersects(extent))
    }

    /// Makes the disk durable by `sync`: if that succeeds, so is what was taken before. One at a time.
    pub(crate) fn synced<T, E>(&self, sync: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        // What has begun when this is read had ended before, if both are the same.
        let ended = self.ended.load(Ordering::Acquire);
        let begun = self.begun.load(Ordering::Acquire);
        if self.is_empty() {
            return sync();
        }
        for run in self.taken.runs() {
            // Taken again between the two, it is in the second set, and its data was there before the sync begins.
            self.waiting.insert(run);
            self.taken.remove(run);
        }
        let result = sync()?;
        // Run by run: a set is not to fill memory that it never needed.
        for run in self.waiting.runs() {
            self.waiting.remove(run);
        }
        if begun == ended {
            self.settled.store(begun, Ordering::Release);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Extent = Extent::new(0, 100);

    #[test]
    fn block_is_unsynced_until_a_sync_that_began_later_has_succeeded() {
        let unsynced = Unsynced::new(100);
        assert!(unsynced.is_empty() && !unsynced.intersects(ALL));
        unsynced.insert(Extent::new(3, 2));
        let ok = || {
            assert!(unsynced.intersects(Extent::new(4, 1)) && !unsynced.is_empty());
            // While it is under way.
            unsynced.insert(Extent::new(4, 1));
            unsynced.insert(Extent::new(9, 1));
            Ok::<_, ()>(())
        };
        assert_eq!(unsynced.synced(ok), Ok(()));
        let left = |block| unsynced.intersects(Extent::new(block, 1));
        assert_eq!([3, 4, 5, 9].map(left), [false, true, false, true]);
        assert_eq!(unsynced.synced(|| Err::<(), _>("lost")), Err("lost"));
        assert_eq!([3, 4, 5, 9].map(left), [false, true, false, true]);
        assert_eq!(unsynced.synced(|| Ok::<_, ()>(())), Ok(()));
        assert!(unsynced.is_empty() && !unsynced.intersects(ALL));
    }

    /// One that has begun and not ended when a sync begins may add its blocks at any time.
    #[test]
    fn insertion_that_a_sync_overtakes_waits_for_the_next_one() {
        let unsynced = Unsynced::new(100);
        unsynced.insert(Extent::new(3, 2));
        unsynced.begun.fetch_add(1, Ordering::AcqRel);
        assert_eq!(unsynced.synced(|| Ok::<_, ()>(())), Ok(()));
        unsynced.taken.insert(Extent::new(7, 1));
        assert!(unsynced.intersects(Extent::new(7, 1)));
        unsynced.ended.fetch_add(1, Ordering::AcqRel);
        assert!(unsynced.intersects(Extent::new(7, 1)) && !unsynced.intersects(Extent::new(3, 2)));
        assert_eq!(unsynced.synced(|| Ok::<_, ()>(())), Ok(()));
        assert!(unsynced.is_empty() && !unsynced.intersects(ALL));
    }
}
