//! What was seen of a file's pages lately: which were resident.
//!
//! One word for each group of 32 pages (128 KiB), so that it is read and replaced as a whole: in the
//! upper half the epoch in which the kernel was asked, in the lower a bit for each page; or, without the epoch's mark,
//! for how many pages nobody was asked in that epoch.

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::words::{GROUP_PAGES, Words, bits};
use crate::clock::Epoch;

/// To look and to have pages mapped takes as long as writing so many of them another way.
const PAGES_WORTH_A_LOOK: u32 = 4;
/// What is known of a file's pages.
#[derive(Debug)]
pub(super) struct Known {
    words: Words,
    /// How often anything was forgotten.
    forgets: AtomicU32,
}

impl Known {
    /// For a file of `pages` pages, of which nothing is known.
    ///
    /// # Errors
    /// If there is no address space.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self { words: Words::new(pages)?, forgets: AtomicU32::new(0) })
    }

    /// Whether all of `pages` are resident as far as is known in `epoch`; for groups where that is
    /// not so, `look` (given a group's number, and the pages of it that are wanted) says which of its pages are, or at least which of these, and that is
    /// kept. Unless there is `thrift`: then a group that was never looked at is so only when it has been asked about
    /// for [`PAGES_WORTH_A_LOOK`] in this epoch.
    #[inline]
    pub(super) fn all_resident(
        &self,
        pages: Range<u64>,
        epoch: Epoch,
        thrift: bool,
        mut look: impl FnMut(u64, u32) -> Option<u32>,
    ) -> bool {
        let mut page = pages.start;
        while page < pages.end {
            let group = page / GROUP_PAGES;
            let end = pages.end.min((group + 1) * GROUP_PAGES);
            let wanted = bits(page % GROUP_PAGES, end - page);
            let Some(word) = self.words.of_group(group) else { return false };
            let seen = word.load(Ordering::Relaxed);
            let before = if (seen >> 32) as u32 == epoch.0 { seen as u32 } else { 0 };
            if before & wanted != wanted {
                if thrift && !is_worth_a_look(word, seen, epoch, wanted) {
                    return false;
                }
                let forgets = self.forgets.load(Ordering::SeqCst);
                let Some(found) = look(group, wanted) else { return false };
                let now = u64::from(epoch.0) << 32 | u64::from(before | found);
                // What was forgotten since it was read here must not come back.
                let is_kept = word.compare_exchange(seen, now, Ordering::SeqCst, Ordering::Relaxed).is_ok();
                // It may have been punched after the look: then either this is seen, or the store is undone there.
                if is_kept && self.forgets.load(Ordering::SeqCst) != forgets {
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
        self.words.clear(pages);
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn forget_all(&self) {
        self.words.clear_all();
    }
}

/// Whether a group was looked at before, or has been asked about often enough; counts that.
#[cold]
fn is_worth_a_look(word: &AtomicU64, seen: u64, epoch: Epoch, wanted: u32) -> bool {
    let (upper, counting) = ((seen >> 32) as u32, epoch.0 & !Epoch::MARK);
    if upper & Epoch::MARK != 0 {
        return true;
    }
    let before = if upper == counting { seen as u32 } else { 0 };
    let asked = before.saturating_add(wanted.count_ones());
    if asked < PAGES_WORTH_A_LOOK {
        word.store(u64::from(counting) << 32 | u64::from(asked), Ordering::Relaxed);
    }
    asked >= PAGES_WORTH_A_LOOK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked(epoch: u32) -> Epoch {
        Epoch(epoch | Epoch::MARK)
    }

    #[test]
    fn page_is_resident_only_if_seen_so_in_this_epoch() {
        let known = Known::new(100).unwrap();
        let mut looks = Vec::new();
        let mut ask = |pages: Range<u64>, epoch: u32, found: u32| {
            looks.clear();
            let resident = known.all_resident(pages, looked(epoch), false, |group, wanted| {
                assert_ne!(wanted, 0);
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

    #[test]
    fn group_is_looked_at_with_thrift_when_it_is_asked_about_often() {
        let known = Known::new(128).unwrap();
        let looks = |pages: Range<u64>, epoch| {
            let mut looks = 0;
            known.all_resident(pages, looked(epoch), true, |_, _| {
                looks += 1;
                Some(u32::MAX)
            });
            looks
        };
        let ask = |epoch, times| (0..times).map(|_| looks(7..8, epoch)).sum::<i32>();
        // Not often enough in any epoch, then so; after that in each.
        assert_eq!([ask(1, 3), ask(2, 3), ask(3, 9), ask(4, 9), ask(5, 1)], [0, 0, 1, 1, 1]);
        assert_eq!([looks(32..34, 5), looks(40..42, 5), looks(64..68, 5), looks(96..128, 5)], [0, 1, 1, 1]);
        known.forget(0..32);
        assert_eq!([ask(5, 3), ask(5, 1)], [0, 1]);
    }

    /// What was seen before a page was punched is not believed after that.
    #[test]
    fn pages_that_are_forgotten_while_they_are_looked_at_are_looked_at_again() {
        let known = Known::new(64).unwrap();
        for round in 0..3 {
            let mut looks = 0;
            let mut ask = |pages: Range<u64>, forgets: bool| {
                known.all_resident(pages, looked(1), false, |_, _| {
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

    /// What was known before is not known any more either when it is forgotten between the count and the end of a look.
    #[test]
    fn pages_that_are_forgotten_beside_a_look_at_others_are_looked_at_again() {
        let known = Known::new(64).unwrap();
        assert!(known.all_resident(5..6, looked(1), false, |_, _| Some(1 << 5)));
        known.forgets.fetch_add(1, Ordering::SeqCst);
        known.all_resident(0..1, looked(1), false, |_, _| {
            known.words.clear(5..6);
            Some(1)
        });
        let mut looks = 0;
        known.all_resident(5..6, looked(1), false, |_, _| {
            looks += 1;
            Some(1 << 5)
        });
        assert_eq!(looks, 1);
    }

    /// Only of these it is said that they may be touched.
    #[test]
    fn pages_that_are_looked_for_are_those_that_were_asked_about() {
        let known = Known::new(100).unwrap();
        let mut wanted = Vec::new();
        known.all_resident(30..66, looked(1), false, |group, pages| {
            wanted.push((group, pages));
            Some(u32::MAX)
        });
        assert_eq!(wanted, [(0, 0b11 << 30), (1, u32::MAX), (2, 0b11)]);
    }

    #[test]
    fn forgotten_pages_are_looked_at_again() {
        let known = Known::new(128).unwrap();
        let looks = |pages: Range<u64>| {
            let mut looks = 0;
            known.all_resident(pages, looked(1), false, |_, _| {
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
