//! A generation's delta: the blocks in which an image differs from the one that it was made of.
//!
//! It is a file beside the image, `IMAGE.delta`, and it is the link between generations: a seal says what an image
//! is, its delta says where it comes from. It holds in both directions, for who goes back to the parent has the
//! same blocks to replace.

mod format;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use blockio::{File, OpenOptions};
use blocks::{BLOCK_SIZE, Extent};

use crate::error::BaseError;
use crate::replace::{Kind, Replacement};
use crate::seal::{CHUNK_SIZE, GROUP_CHUNKS, Root, Seal};

/// No delta has more extents, which is 64 MiB of them; where there would be more, the nearest are joined.
pub const DELTA_EXTENTS_MAX: usize = 1 << 22;

/// What a delta takes the place of: another one.
const KIND: Kind = Kind { magic: format::MAGIC, name: "delta of a base" };

/// What an image is, by its seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The root hash.
    pub root: Root,
    /// Size of the disk in bytes, at least a sector.
    pub size: u64,
}

/// In which blocks two generations differ. Outside of them both have the same bytes, where what lies past the end of
/// the smaller one is zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    parent: Generation,
    child: Generation,
    parent_path: Option<PathBuf>,
    /// Ascending; no two touch; all lie inside the larger disk.
    extents: Vec<Extent>,
}

impl Delta {
    /// Of `child`, which was made of `parent` and differs from it in `extents` at most; their order does not matter,
    /// and what lies outside of both disks is left out.
    pub fn new(parent: Generation, child: Generation, mut extents: Vec<Extent>) -> Self {
        let all = Extent::new(0, blocks_of(parent, child));
        extents.iter_mut().for_each(|extent| *extent = extent.intersection(all));
        Extent::normalize(&mut extents);
        join_nearest(&mut extents, DELTA_EXTENTS_MAX);
        Self { parent, child, parent_path: None, extents }
    }

    /// The same, with the place where the parent can be looked for: as it is named from the directory of the delta.
    /// A place whose name is too long to be one is left out.
    #[must_use]
    pub fn with_parent_path(self, path: &Path) -> Self {
        Self { parent_path: format::is_a_path(path).then(|| path.to_owned()), ..self }
    }

    /// By the hashes of two seals: all blocks of every chunk that differs.
    ///
    /// # Errors
    /// If a manifest can't be read, or is changed meanwhile.
    pub fn between(parent: &Seal, child: &Seal) -> Result<Self, BaseError> {
        let chunks = parent.size().max(child.size()).div_ceil(CHUNK_SIZE);
        let mut extents = Vec::new();
        for group in 0..chunks.div_ceil(GROUP_CHUNKS) {
            if parent.has_same_group(child, group) {
                continue;
            }
            for chunk in group * GROUP_CHUNKS..((group + 1) * GROUP_CHUNKS).min(chunks) {
                if parent.chunk_differs(child, chunk)? {
                    let blocks = CHUNK_SIZE / BLOCK_SIZE;
                    extents.push(Extent::new(chunk * blocks, blocks));
                }
            }
        }
        Ok(Self::new(parent.generation(), child.generation(), extents))
    }

    /// Where the delta of the image at `base` is.
    pub fn path_of(base: &Path) -> PathBuf {
        let mut name = base.as_os_str().to_owned();
        name.push(".delta");
        name.into()
    }

    /// The delta of the image at `base`; `None` if it has none.
    ///
    /// # Errors
    /// If it can't be read, or is damaged.
    pub fn of(base: &Path) -> Result<Option<Self>, BaseError> {
        match Self::read(&Self::path_of(base)) {
            Ok(delta) => Ok(Some(delta)),
            Err(BaseError::Io(error)) if error.io_error().kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a delta.
    ///
    /// # Errors
    /// If it can't be read, or is damaged, or of a version that this program does not know.
    pub fn read(path: &Path) -> Result<Self, BaseError> {
        let refused = |what: String| {
            let what = format!("{what}; it can be removed: then manifests are compared instead");
            BaseError::Refused { path: path.to_owned(), what }
        };
        let file = File::open(path, OpenOptions::default())?;
        let size = file.size()?;
        if size > format::SIZE_MAX {
            return Err(refused(format!("it is damaged: it has {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0)?;
        format::parse(&bytes).map_err(refused)
    }

    /// Writes it to `path`, durably, in the place of what may be there: that holds until this one is durable. Only its owner can
    /// read it.
    ///
    /// # Errors
    /// If it can't be written, or there is something else than a delta; then nothing is left of it.
    pub fn write(&self, path: &Path) -> Result<(), BaseError> {
        self.write_open(path).map(drop)
    }

    /// The same; returns the file that was written.
    pub(crate) fn write_open(&self, path: &Path) -> Result<fs::File, BaseError> {
        let new = Replacement::begin(path, KIND, 0o600)?;
        let mut file = new.file();
        let written = file.write_all(&format::to_bytes(self)).and_then(|()| file.sync_all());
        written.map_err(|source| BaseError::manifest("write", path, source))?;
        new.publish()
    }

    /// The older one.
    pub fn parent(&self) -> Generation {
        self.parent
    }

    /// The one that was made of it.
    pub fn child(&self) -> Generation {
        self.child
    }

    /// Where the parent was when the child was made, as it is named from the directory of the delta. No more than a
    /// hint: what is found there must have the parent's root hash.
    pub fn parent_path(&self) -> Option<&Path> {
        self.parent_path.as_deref()
    }

    /// The blocks in which the two may differ: ascending, no two of them touch, none is empty.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// How many blocks they are.
    pub fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| extent.count()).sum()
    }

    /// Whether it tells these two apart, in either direction.
    pub fn is_between(&self, one: Root, other: Root) -> bool {
        let (parent, child) = (self.parent.root, self.child.root);
        (parent, child) == (one, other) || (parent, child) == (other, one)
    }
}

/// Blocks of the larger one.
fn blocks_of(parent: Generation, child: Generation) -> u64 {
    parent.size.max(child.size).div_ceil(BLOCK_SIZE)
}

/// Joins extents that are near to each other until there are `max` at most.
fn join_nearest(extents: &mut Vec<Extent>, max: usize) {
    let mut gap = 1;
    while extents.len() > max.max(1) {
        extents.dedup_by(|next, previous| {
            let joins = next.first() - previous.end() <= gap;
            if joins {
                *previous = Extent::between(previous.first(), next.end());
            }
            joins
        });
        gap *= 2;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn generation(root: u8, size: u64) -> Generation {
        Generation { root: Root::try_from(format!("{root:02x}").repeat(32)).unwrap(), size }
    }

    #[test]
    fn delta_of_unsorted_extents_past_the_end_is_sorted_and_inside() {
        let (parent, child) = (generation(1, 1 << 20), generation(2, (1 << 20) + 512));
        let delta =
            Delta::new(parent, child, vec![Extent::new(200, 90), Extent::new(0, 2), Extent::new(2, 1)]);
        assert_eq!(delta.extents(), [Extent::new(0, 3), Extent::new(200, 57)]);
        assert_eq!(delta.blocks(), 60);
        assert!(delta.is_between(child.root, parent.root) && !delta.is_between(child.root, child.root));
    }

    proptest! {
        /// Joined extents still have every block that they had.
        #[test]
        fn joined_extents_are_few_enough_and_hold_all_blocks(
            firsts in prop::collection::btree_set(0_u64..5000, 1..60), max in 1_usize..20,
        ) {
            let mut extents: Vec<Extent> = firsts.iter().map(|first| Extent::new(first * 2, 1)).collect();
            join_nearest(&mut extents, max);
            prop_assert!(extents.len() <= max);
            prop_assert!(extents.windows(2).all(|two| two[0].end() < two[1].first()));
            for first in firsts {
                prop_assert!(extents.iter().any(|extent| extent.overlaps(Extent::new(first * 2, 1))));
            }
        }
    }

    #[test]
    fn delta_written_and_read_is_the_same_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("golden-2.raw");
        assert_eq!(Delta::of(&image).unwrap(), None);
        let delta = Delta::new(generation(1, 1 << 20), generation(2, 1 << 20), vec![Extent::new(3, 4)])
            .with_parent_path(Path::new("golden-1.raw"));
        for _ in 0..2 {
            delta.write(&Delta::path_of(&image)).unwrap();
            assert_eq!(Delta::of(&image).unwrap().as_ref(), Some(&delta));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::write(Delta::path_of(&image), b"PRISTINE DELTA 1\x01\0\0\0and nonsense").unwrap();
        let error = Delta::of(&image).unwrap_err().to_string();
        assert!(error.contains("golden-2.raw.delta") && error.contains("damaged"), "{error}");
    }
}
