//! What a session took from P and is not durable yet.
//!
//! A block that was pending holds, on the medium, what an earlier session wrote. When a guest overwrites it, its data is in the page
//! cache, and P does not have the block any more. If the kernel fails to write that data back, it forgets it, and says so once to
//! each open file that asks; after that the block reads as what the medium has, the earlier session's data. So until a sync has
//! told that the data is there, whoever reads such a block asks, with the data in hand and before a guest sees any of it. The kernel
//! notes a failure before it lets go of a page, so that what was read before the answer is the session's own if the answer is good.
//!
//! Blocks that were never pending have the base's content underneath, and what is written again after a sync has the session's own.

use std::sync::{Mutex, PoisonError};

use blocks::{BlockSet, Extent};

/// See the module.
#[derive(Debug)]
pub(crate) struct Unsynced {
    /// What was taken since the last sync began.
    taken: BlockSet,
    /// What was taken before it: a sync that is under way, or has failed, vouches for it or does not.
    waiting: BlockSet,
    /// Held by the one who syncs.
    syncing: Mutex<()>,
}

impl Unsynced {
    /// Nothing, of a disk of so many blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        Self { taken: BlockSet::new(blocks), waiting: BlockSet::new(blocks), syncing: Mutex::default() }
    }

    /// A guest's data of `extent` is in the page cache. To be called before it leaves P.
    pub(crate) fn insert(&self, extent: Extent) {
        self.taken.insert(extent);
    }

    /// As [`insert`](Self::insert), of every block of a set.
    pub(crate) fn insert_set(&self, set: &BlockSet) {
        self.taken.insert_set(set);
    }

    pub(crate) fn is_empty(&self) -> bool {
        // In this order: what is in neither is durable, for it goes from the first to the second before it leaves that.
        self.taken.is_empty() && self.waiting.is_empty()
    }

    /// Whether a block of `extent` may not be durable. To be asked after a look at P.
    #[inline]
    pub(crate) fn intersects(&self, extent: Extent) -> bool {
        let of = |set: &BlockSet| !set.is_empty() && set.intersects(extent);
        of(&self.taken) || of(&self.waiting)
    }

    /// Makes the disk durable by `sync`: if that succeeds, so is what was taken before.
    pub(crate) fn synced<T, E>(&self, sync: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.taken.is_empty() {
            for run in self.taken.runs() {
                // Taken again between the two, it is in the second set, and its data was there before the sync begins.
                self.waiting.insert(run);
                self.taken.remove(run);
            }
        }
        let result = sync()?;
        if !self.waiting.is_empty() {
            // Run by run: a set is not to fill memory that it never needed.
            for run in self.waiting.runs() {
                self.waiting.remove(run);
            }
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
}
