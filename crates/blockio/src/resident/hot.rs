//! Which parts of a file on a disk are written again and again, so that it pays to write them through the map.
//!
//! There the first write of a page through a map, and the first one after it was written back, is a fault of a
//! microsecond, in which the file system is told that its folio is dirty, all of it. Later ones are copies. A system call
//! takes as long as the fault, each time, and tells of the written blocks only. So windows of [`WINDOW_PAGES`] pages, as
//! large as the folios that our own writes make, are written through the map from the second time on that they are written wholly in
//! a [spell](Moment::spell): all of them is dirty then anyway, and no more comes to be written back than without a map.
//! (Folios that others made may be larger; that costs writes of what is there already.)
//!
//! A word for each group: from the top, 28 bits of the spell that it speaks of; 4 bits for the windows that were made ready; 32
//! bits for the pages that were written.

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use super::words::{GROUP_PAGES, Words, bits};

/// Pages of a window.
pub(super) const WINDOW_PAGES: u64 = 8;
const WINDOWS: u64 = GROUP_PAGES / WINDOW_PAGES;
const SPELL_MASK: u32 = (1 << (32 - WINDOWS)) - 1;

/// The windows of a file.
#[derive(Debug)]
pub(super) struct Hot {
    words: Words,
    /// Whether windows can't be made ready here.
    never: AtomicBool,
}

/// What was done to a group's pages in a spell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Seen {
    spell: u32,
    ready: u32,
    written: u32,
}

impl Seen {
    /// What `word` says of `spell`.
    fn of(word: u64, spell: u32) -> Self {
        let spell = spell & SPELL_MASK;
        let upper = (word >> 32) as u32;
        if upper & SPELL_MASK == spell {
            Self { spell, ready: upper >> (32 - WINDOWS), written: word as u32 }
        } else {
            Self { spell, ready: 0, written: 0 }
        }
    }

    fn word(self) -> u64 {
        u64::from(self.ready << (32 - WINDOWS) | self.spell) << 32 | u64::from(self.written)
    }

    /// Of `windows`, those of which all pages were written.
    fn whole(self, windows: u32) -> u32 {
        (0..WINDOWS)
            .filter(|window| {
                let pages = bits(window * WINDOW_PAGES, WINDOW_PAGES);
                windows & 1 << window != 0 && self.written & pages == pages
            })
            .fold(0, |whole, window| whole | 1 << window)
    }
}

impl Hot {
    /// For a file of `pages` pages.
    ///
    /// # Errors
    /// If there is no address space.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self { words: Words::new(pages)?, never: AtomicBool::new(false) })
    }

    /// Notes that `pages` are written in `spell`, and says whether it pays to write them through the map: whether all
    /// windows that they touch were written wholly before. Those that are not ready yet are given to `prepare`, a run of
    /// pages at a time, which says whether they are ready then, or that none ever will be.
    #[inline]
    pub(super) fn write(
        &self,
        pages: Range<u64>,
        spell: u32,
        mut prepare: impl FnMut(Range<u64>) -> Prepared,
    ) -> bool {
        let mut hot = true;
        let mut page = pages.start;
        while page < pages.end {
            let group = page / GROUP_PAGES;
            let end = pages.end.min((group + 1) * GROUP_PAGES);
            let within = page % GROUP_PAGES..end - group * GROUP_PAGES;
            page = end;
            let windows = bits(
                within.start / WINDOW_PAGES,
                within.end.div_ceil(WINDOW_PAGES) - within.start / WINDOW_PAGES,
            );
            let Some(word) = self.words.of_group(group) else { return false };
            let mut seen = Seen::of(word.load(Ordering::Relaxed), spell);
            if seen.ready & windows == windows {
                continue;
            }
            if self.never.load(Ordering::Relaxed) {
                return false;
            }
            // Only if all of it goes through the map: else nothing is gained.
            if hot && seen.whole(windows) == windows {
                let first = group * GROUP_PAGES + within.start / WINDOW_PAGES * WINDOW_PAGES;
                let end = group * GROUP_PAGES + within.end.div_ceil(WINDOW_PAGES) * WINDOW_PAGES;
                match prepare(first..end) {
                    Prepared::Ready => seen.ready |= windows,
                    Prepared::NotNow => hot = false,
                    Prepared::Never => {
                        self.never.store(true, Ordering::Relaxed);
                        return false;
                    }
                }
            } else {
                hot = false;
            }
            seen.written |= bits(within.start, within.end - within.start);
            word.store(seen.word(), Ordering::Relaxed);
        }
        hot
    }

    /// Forgets what was written to `pages`.
    pub(super) fn forget(&self, pages: Range<u64>) {
        self.words.clear(pages);
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn forget_all(&self) {
        self.words.clear_all();
    }
}

/// What became of pages that were to be written through the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Prepared {
    Ready,
    NotNow,
    /// Nor ever.
    Never,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 3 * GROUP_PAGES + 5;

    fn never(_: Range<u64>) -> Prepared {
        unreachable!("made ready without need")
    }

    #[test]
    fn window_is_hot_from_the_second_time_on_that_it_is_written_wholly() {
        let hot = Hot::new(PAGES).unwrap();
        // One page after the other, the last one missing; then all of them.
        (8..15).for_each(|page| assert!(!hot.write(page..page + 1, 1, never)));
        assert!(!hot.write(8..9, 1, never));
        assert!(!hot.write(15..16, 1, never));
        let mut prepared = Vec::new();
        let mut prepare = |pages| {
            prepared.push(pages);
            Prepared::Ready
        };
        assert!(hot.write(9..10, 1, &mut prepare));
        // Its neighbours are not.
        assert!(!hot.write(7..9, 1, &mut prepare));
        assert!(!hot.write(15..17, 1, &mut prepare));
        assert!(matches!(prepared[..], [Range { start: 8, end: 16 }]));
        (8..16).for_each(|page| assert!(hot.write(page..page + 1, 1, never)));
    }

    #[test]
    fn long_write_is_hot_the_second_time_and_made_ready_by_groups() {
        let hot = Hot::new(PAGES).unwrap();
        let mut prepared = Vec::new();
        let mut write = |pages: Range<u64>| {
            hot.write(pages, 7, |pages| {
                prepared.push(pages);
                Prepared::Ready
            })
        };
        assert_eq!([0, 1, 2].map(|_| write(16..72)), [false, true, true]);
        assert_eq!(prepared, [16..32, 32..64, 64..72]);
    }

    #[test]
    fn what_was_written_in_another_spell_or_forgotten_does_not_count() {
        let ready = |_| Prepared::Ready;
        for forget in [|hot: &Hot| hot.forget(3..4), |hot: &Hot| hot.forget_all(), |_: &Hot| ()] {
            let hot = Hot::new(PAGES).unwrap();
            for spell in [5, 6, 6 | 1 << 27, 5] {
                assert_eq!([0, 1].map(|_| hot.write(0..8, spell, ready)), [false, true], "{spell}");
                assert!(hot.write(0..8, spell, never));
            }
            forget(&hot);
            assert!(!hot.write(0..8, 6, never));
        }
    }

    #[test]
    fn windows_that_cannot_be_made_ready_are_not_hot() {
        let hot = Hot::new(PAGES).unwrap();
        assert!(!hot.write(0..8, 1, never));
        assert!(!hot.write(0..8, 1, |_| Prepared::NotNow));
        assert!(hot.write(0..8, 1, |_| Prepared::Ready));
        assert!(!hot.write(64..72, 1, never));
        assert!(!hot.write(64..72, 1, |_| Prepared::Never));
        assert!(!hot.write(64..72, 1, never));
        // What is ready stays so.
        assert!(hot.write(0..8, 1, never));
    }

    proptest! {
        /// Whatever is written through the map lies in windows that were written wholly before in the same spell,
        /// and were made ready since.
        #[test]
        fn hot_is_what_was_written_before(
            writes in prop::collection::vec((0..PAGES, 1..70u64, 0..3u32, 0..4u8), 1..200),
        ) {
            let hot = Hot::new(PAGES).unwrap();
            let mut written = vec![None; PAGES as usize + 64];
            let mut ready = written.clone();
            for (first, count, spell, luck) in writes {
                // No spell comes back.
                let spell = spell + 3 * u32::from(luck == 0);
                let pages = first..(first + count).min(PAGES);
                let window = |page: u64| {
                    let start = (page / WINDOW_PAGES * WINDOW_PAGES) as usize;
                    start..start + WINDOW_PAGES as usize
                };
                let whole = |page: u64, seen: &[Option<u32>]| seen[window(page)].iter().all(|at| *at == Some(spell));
                let was_hot = hot.write(pages.clone(), spell, |run| {
                    for page in run.clone() {
                        assert!(whole(page, &written), "made ready: {page}");
                        if luck > 1 {
                            ready[page as usize] = Some(spell);
                        }
                    }
                    if luck > 1 { Prepared::Ready } else { Prepared::NotNow }
                });
                prop_assert!(!was_hot || pages.clone().all(|page| whole(page, &ready)));
                pages.for_each(|page| written[page as usize] = Some(spell));
            }
        }
    }
}
