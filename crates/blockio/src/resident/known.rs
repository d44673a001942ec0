//! What was seen of a file's pages lately: which were resident.
//!
//! One word for each group of 32 pages (128 KiB), so that it is read and replaced as a whole: in the
//! upper half the epoch in which the kernel was asked, in the lower a bit for each page. The words
//! are anonymous memory, which takes up room where it was written only.

use std::{
    io,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::clock::Epoch;

/// Pages of a group.
pub(super) const GROUP_PAGES: u64 = 32;

/// A word for each group of pages.
#[derive(Debug)]
pub(super) struct Known {
    first: NonNull<AtomicU64>,
    groups: usize,
    /// How often anything was forgotten.
    forgets: AtomicU32,
}

// SAFETY: the memory belongs to the process, not to a thread, and holds only atomics.
unsafe impl Send for Known {}
// SAFETY: as above.
unsafe impl Sync for Known {}

impl Known {
    /// For a file of `pages` pages, of which nothing is known.
    ///
    /// # Errors
    /// If there is no address space.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let groups = usize::try_from(pages.div_ceil(GROUP_PAGES)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        let bytes = groups.max(1) * size_of::<AtomicU64>();
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let address = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }?;
        let first = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { first, groups: groups.max(1), forgets: AtomicU32::new(0) })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds as many aligned words, lives as long as `self`, and is only ever
        // seen as atomics (every bit pattern is valid).
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.groups) }
    }

    fn bytes(&self) -> usize {
        self.groups * size_of::<AtomicU64>()
    }

    /// Whether all of `pages` are resident as far as is known in `epoch`; for groups where that is
    /// not so, `look` (given a group's number) says which of its pages are, and that is kept.
    #[inline]
    pub(super) fn all_resident(
        &self,
        pages: Range<u64>,
        epoch: Epoch,
        mut look: impl FnMut(u64) -> Option<u32>,
    ) -> bool {
        let mut page = pages.start;
        while page < pages.end {
            let group = page / GROUP_PAGES;
            let end = pages.end.min((group + 1) * GROUP_PAGES);
            let wanted = bits(page % GROUP_PAGES, end - page);
            let Some(word) = self.words().get(group as usize) else { return false };
            let seen = word.load(Ordering::Relaxed);
            if (seen >> 32) as u32 != epoch.0 || seen as u32 & wanted != wanted {
                let forgets = self.forgets.load(Ordering::SeqCst);
                let Some(found) = look(group) else { return false };
                word.store(u64::from(epoch.0) << 32 | u64::from(found), Ordering::SeqCst);
                // It may have been punched after the look: then either this is seen, or the store is undone there.
                if self.forgets.load(Ordering::SeqCst) != forgets {
                    word.store(0, Ordering::SeqCst);
                }
                if found & wanted != wanted {
                    return false;
                }
            }
            page = end;
        }
        true
    }

    /// Forgets what is known of `pages`.
    pub(super) fn forget(&self, pages: Range<u64>) {
        self.forgets.fetch_add(1, Ordering::SeqCst);
        let groups = pages.start / GROUP_PAGES..pages.end.div_ceil(GROUP_PAGES);
        let words = self.words().get(groups.start as usize..(groups.end as usize).min(self.groups));
        words.unwrap_or_default().iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn forget_all(&self) {
        // SAFETY: our own anonymous memory, which reads as zeros afterwards: known to nobody.
        let given =
            unsafe { rustix::mm::madvise(self.first.as_ptr().cast(), self.bytes(), Advice::LinuxDontNeed) };
        if given.is_err() {
            self.forget(0..u64::MAX);
        }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), self.bytes()) };
    }
}

/// `count` bits from bit `first` on, all within 32.
fn bits(first: u64, count: u64) -> u32 {
    ((((1u64 << count.min(GROUP_PAGES)) - 1) << first) & u64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_resident_only_if_seen_so_in_this_epoch() {
        let known = Known::new(100).unwrap();
        let mut looks = Vec::new();
        let mut ask = |pages: Range<u64>, epoch: u32, found: u32| {
            looks.clear();
            let resident = known.all_resident(pages, Epoch(epoch), |group| {
                looks.push(group);
                Some(found)
            });
            (resident, looks.clone())
        };
        assert_eq!(ask(3..4, 0, 0), (false, vec![0]));
        assert_eq!(ask(3..4, 7, 0b1000), (true, vec![0]));
        assert_eq!(ask(3..4, 7, 0), (true, vec![]));
        assert_eq!(ask(3..4, 8, 0), (false, vec![0]));
        assert_eq!(ask(3..4, 8, u32::MAX), (true, vec![0]));
        assert_eq!(ask(0..32, 8, 0), (true, vec![]));
        assert_eq!(ask(31..34, 8, 0b01), (false, vec![1]));
        assert_eq!(ask(31..34, 8, 0b11), (true, vec![1]));
        assert_eq!(ask(0..100, 9, u32::MAX), (true, vec![0, 1, 2, 3]));
        assert_eq!(ask(90..129, 9, u32::MAX), (false, vec![]));
    }

    /// What was seen before a page was punched is not believed after that.
    #[test]
    fn pages_that_are_forgotten_while_they_are_looked_at_are_looked_at_again() {
        let known = Known::new(64).unwrap();
        for round in 0..3 {
            let mut looks = 0;
            let mut ask = |pages: Range<u64>, forgets: bool| {
                known.all_resident(pages, Epoch(1), |_| {
                    looks += 1;
                    if forgets {
                        known.forget(5..6);
                    }
                    Some(u32::MAX)
                })
            };
            assert!(ask(0..1, true));
            assert!(ask(5..6, false));
            assert_eq!(looks, 2, "round {round}");
            known.forget(0..1);
        }
    }

    #[test]
    fn forgotten_pages_are_looked_at_again() {
        let known = Known::new(128).unwrap();
        let looks = |pages: Range<u64>| {
            let mut looks = 0;
            known.all_resident(pages, Epoch(1), |_| {
                looks += 1;
                Some(u32::MAX)
            });
            looks
        };
        assert_eq!((looks(0..128), looks(0..128)), (4, 0));
        known.forget(33..34);
        assert_eq!(looks(0..128), 1);
        known.forget(31..64);
        assert_eq!(looks(0..128), 2);
        known.forget(0..1 << 40);
        assert_eq!(looks(0..128), 4);
        known.forget_all();
        assert_eq!(looks(0..128), 4);
    }
}
