//! Which blocks differ between the base that a disk has and another one, found in the cheapest way that is sound.
//!
//! - By *deltas*: files beside the bases or their manifests, each of which says in which blocks two generations differ. A chain of them,
//!   walked in either direction, holds all that differs between its ends.
//! - By *manifests*: the hashes of two sealed bases say which chunks of 64 KiB differ.
//! - By *comparison*, where one of the two is not sealed or its manifest is gone: of blocks that are not pending the disk
//!   itself is a copy of the old base. So it is read and compared with the new one. What became of the old base does not
//!   matter then.
//!
//! All of them may name too many blocks and never too few. So where there are deltas and manifests, what differs
//! is in both. A chunk that differs by its hash and is in no delta gives away a delta that is wrong; what a delta leaves out of
//! one that it names is compared. A delta is only believed as it is where the old manifest is gone.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base_image::{BaseIdentity, BaseImage, BaseLocation, CHUNK_SIZE, Delta, Root, Seal};
use blockio::{File, in_full};
use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};

use super::path::{Link, cheapest};
use crate::Error;
use crate::manifest::BaseEntry;
use crate::open::find_seal;
use crate::verify::{Comparer, Comparison};

/// Blocks that have one hash.
const CHUNK_BLOCKS: u64 = CHUNK_SIZE / BLOCK_SIZE;

/// How it was found out which blocks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The two bases are the same.
    Same,
    /// All blocks are pending as it is.
    AllPending,
    /// By so many deltas, which lead from one generation to the other.
    Deltas(usize),
    /// By the hashes in the two bases' manifests.
    Manifests,
    /// By comparing the disk with the new base.
    Comparison,
}

impl Way {
    /// In one word, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::AllPending => "all-pending",
            Self::Deltas(_) => "deltas",
            Self::Manifests => "manifests",
            Self::Comparison => "comparison",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same => f.write_str("the bases are the same"),
            Self::AllPending => f.write_str("all blocks were pending"),
            Self::Deltas(1) => f.write_str("by one delta"),
            Self::Deltas(count) => write!(f, "by {count} deltas"),
            Self::Manifests => f.write_str("by the bases' manifests"),
            Self::Comparison => f.write_str("by comparing the disk with the base"),
        }
    }
}

/// A disk that is to have another base.
pub(super) struct Question<'a> {
    pub(super) old: &'a BaseEntry,
    pub(super) new: &'a BaseImage,
    pub(super) new_location: &'a BaseLocation,
    /// Where its seal is, if not beside it.
    pub(super) new_seal: Option<&'a Path>,
    pub(super) new_identity: &'a BaseIdentity,
    pub(super) disk: &'a File,
    pub(super) geometry: Geometry,
    /// What the disk need not hold the old base's content of.
    pub(super) pending: &'a BlockSet,
}

impl Question<'_> {
    /// The blocks that may differ, and how they were found. Those that are pending may be among them or not.
    ///
    /// # Errors
    /// If something that is needed can't be read, or `stop` is set.
    pub(super) fn answer(
        &self,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(BlockSet, Way), Error> {
        let blocks = BlockSet::new(self.geometry.blocks());
        if self.pending.contains_all(self.geometry.all()) {
            return Ok((blocks, Way::AllPending));
        }
        if self.is_the_same() {
            return Ok((blocks, Way::Same));
        }
        if let (Some(old), Some(new)) = (self.old.root, self.new.seal()) {
            let by_deltas = self.by_deltas(old, new.root());
            let by_manifests = self.by_manifests(old, new)?;
            match (by_deltas, by_manifests) {
                (Some((deltas, count)), Some(manifests)) => {
                    match in_both(&deltas, manifests.extents(), cut_chunk(&manifests)) {
                        Some(both) => {
                            self.prove(&both, manifests.extents(), stop, progress)?;
                            return Ok((both, Way::Deltas(count)));
                        }
                        None => log::warn!(
                            "the deltas from {} to {} do not name all that differs by their manifests; they are not believed",
                            self.old.path.display(),
                            self.new.path().display()
                        ),
                    }
                    insert_all(&blocks, manifests.extents());
                    return Ok((blocks, Way::Manifests));
                }
                (Some((deltas, count)), None) => return Ok((deltas, Way::Deltas(count))),
                (None, Some(manifests)) => {
                    insert_all(&blocks, manifests.extents());
                    return Ok((blocks, Way::Manifests));
                }
                (None, None) => {}
            }
        }
        Ok((self.by_comparison(stop, progress)?, Way::Comparison))
    }

    fn is_the_same(&self) -> bool {
        let (old, new) = (self.old, self.new_identity);
        match (old.root, self.new.seal()) {
            (Some(root), Some(seal)) => root == seal.root(),
            // A device has nothing that would tell it from another one.
            (None, None) => {
                let has_witnesses = new.file.is_some() && new.backing.iter().all(|file| file.file.is_some());
                has_witnesses
                    && old.path == *self.new_location
                    && old.format == self.new.format()
                    && old.identity == *new
            }
            _ => false,
        }
    }

    fn by_deltas(&self, old: Root, new: Root) -> Option<(BlockSet, usize)> {
        let bases = [&self.old.path, self.new_location].into_iter().filter_map(|base| match base {
            BaseLocation::File(path) => Some(path.as_path()),
            BaseLocation::Nbd(_) => None,
        });
        let seals = [self.old.seal.as_deref(), self.new_seal].into_iter().flatten();
        let deltas = deltas_beside(bases.chain(seals));
        let links = deltas
            .iter()
            .map(|delta| Link { ends: [delta.parent().root, delta.child().root], blocks: delta.blocks() });
        let way = cheapest(&links.collect::<Vec<_>>(), old, new)?;
        let blocks = BlockSet::new(self.geometry.blocks());
        way.iter()
            .filter_map(|number| deltas.get(*number))
            .for_each(|delta| insert_all(&blocks, delta.extents()));
        Some((blocks, way.len()))
    }

    fn by_manifests(&self, old: Root, new: &Seal) -> Result<Option<Delta>, Error> {
        match find_seal(&self.old.path, self.old.seal.as_deref()) {
            // Of the disk's base, and not of what may be there now.
            Ok(Some(seal)) if seal.root() == old => Ok(Some(Delta::between(&seal, new)?)),
            Ok(_) => Ok(None),
            Err(error) => {
                log::warn!("the old base's manifest can't be used: {}", in_full(&error));
                Ok(None)
            }
        }
    }

    /// Adds to `both`, which deltas say differs within the chunks of `manifests`, what they have left out of these: the
    /// disk is read and compared with the new base there, chunks of which the drain will read for the others' sake.
    fn prove(
        &self,
        both: &BlockSet,
        manifests: &[Extent],
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let mut found = Comparison::default();
        let mut comparer = Comparer::new(self.disk, self.new, self.geometry);
        for extent in manifests {
            let left_out =
                both.mixed_runs(extent.intersection(self.geometry.all())).filter(|(is_in, _)| !is_in);
            for (is_pending, run) in left_out.flat_map(|(_, run)| self.pending.mixed_runs(run)) {
                if !is_pending {
                    comparer.compare(run, &mut found, stop, progress)?;
                }
            }
        }
        if !found.differing.is_empty() {
            log::warn!(
                "the deltas from {} to {} leave out some of what differs; it was found by comparing",
                self.old.path.display(),
                self.new.path().display()
            );
        }
        insert_all(both, &found.differing);
        Ok(())
    }

    fn by_comparison(&self, stop: &AtomicBool, progress: &mut dyn FnMut(u64)) -> Result<BlockSet, Error> {
        let mut found = Comparison::default();
        let mut comparer = Comparer::new(self.disk, self.new, self.geometry);
        for (is_pending, run) in self.pending.mixed_runs(self.geometry.all()) {
            if !is_pending {
                comparer.compare(run, &mut found, stop, progress)?;
            }
        }
        let blocks = BlockSet::new(self.geometry.blocks());
        insert_all(&blocks, &found.differing);
        Ok(blocks)
    }
}

fn insert_all(blocks: &BlockSet, extents: &[Extent]) {
    for extent in extents {
        blocks.insert(*extent);
    }
}

/// All deltas that lie beside these files. Those that can't be read are told of, and are none.
fn deltas_beside<'a>(files: impl Iterator<Item = &'a Path>) -> Vec<Delta> {
    let dirs: BTreeSet<&Path> = files.filter_map(Path::parent).collect();
    let mut deltas = Vec::new();
    for entry in dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "delta") {
            match Delta::read(&path) {
                Ok(delta) => deltas.push(delta),
                Err(error) => log::warn!("delta {} is not used: {}", path.display(), in_full(&error)),
            }
        }
    }
    deltas
}

/// The chunk that only the end of the smaller disk cuts short, so that its hashes can't be compared, as its number.
fn cut_chunk(manifests: &Delta) -> Option<u64> {
    let (one, other) = (manifests.parent().size, manifests.child().size);
    let smaller = one.min(other);
    (one != other && !smaller.is_multiple_of(CHUNK_SIZE)).then_some(smaller / CHUNK_SIZE)
}

/// What is in both; `None` if a chunk of `manifests`, but for the `cut` one, has no block of `deltas`: it surely differs,
/// so these do not have all that does.
fn in_both(deltas: &BlockSet, manifests: &[Extent], cut: Option<u64>) -> Option<BlockSet> {
    let both = BlockSet::new(deltas.bound());
    for extent in manifests {
        let chunks = extent.first() / CHUNK_BLOCKS..extent.end().div_ceil(CHUNK_BLOCKS);
        for chunk in chunks.filter(|chunk| Some(*chunk) != cut) {
            if !deltas.intersects(Extent::new(chunk * CHUNK_BLOCKS, CHUNK_BLOCKS)) {
                return None;
            }
        }
        let runs = deltas.mixed_runs(*extent).filter(|(is_in, _)| *is_in);
        runs.for_each(|(_, run)| _ = both.insert(run));
    }
    Some(both)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(extents: &[(u64, u64)]) -> BlockSet {
        let set = BlockSet::new(1024);
        extents.iter().for_each(|(first, count)| _ = set.insert(Extent::new(*first, *count)));
        set
    }

    fn runs(set: &BlockSet) -> Vec<Extent> {
        set.runs().collect()
    }

    #[test]
    fn blocks_in_deltas_and_in_manifests_are_those_that_differ() {
        let deltas = set(&[(3, 2), (40, 1), (50, 6), (1000, 24)]);
        // Chunks 0, 3, 62 and 63; 40 was changed and changed back.
        let manifests = [Extent::new(0, 16), Extent::new(48, 16), Extent::new(992, 32)];
        let both = in_both(&deltas, &manifests, None).unwrap();
        assert_eq!(runs(&both), [Extent::new(3, 2), Extent::new(50, 6), Extent::new(1000, 24)]);
    }

    /// Invariant 6: a delta that hides a block is not believed.
    #[test]
    fn chunk_that_differs_and_is_in_no_delta_gives_the_deltas_away() {
        let manifests = [Extent::new(0, 32)];
        assert!(in_both(&set(&[(3, 2)]), &manifests, None).is_none());
        assert!(in_both(&set(&[(3, 2), (31, 1)]), &manifests, None).is_some());
        // But for the one of which the hashes say nothing.
        assert!(in_both(&set(&[(3, 2)]), &manifests, Some(1)).is_some());
    }
}
