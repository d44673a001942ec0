//! Generations of a base: files that differ in some blocks and in size, sealed or not.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use base_image::{BaseFormat, BaseImage, Delta, Seal, Trust};
use session_disk::{DiskOptions, Manifest};

use super::image::Image;

/// A base, and what a pristine disk of it holds.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) path: PathBuf,
    pub(crate) image: Image,
}

/// What there is beside the bases to know their differences by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing: disks have to be compared.
    Nothing,
    /// Manifests.
    Manifests,
    /// Manifests, and the delta of each generation to the one before.
    Deltas,
}

/// Makes as many generations as there are sizes, for disks of `disk_size` bytes, in the directory `dir`.
pub(crate) fn make(
    dir: &Path,
    sizes: &[u64],
    disk_size: u64,
    windows: &[Range<u64>],
    known: Known,
) -> Vec<Generation> {
    std::fs::create_dir_all(dir).unwrap();
    // As a manifest names it.
    let dir = std::fs::canonicalize(dir).unwrap();
    let generation = |(number, size): (usize, &u64)| {
        let path = dir.join(format!("base-{number}.raw"));
        let image = Image::of_generation(number as u64, *size, windows);
        image.write_into(&File::create(&path).unwrap());
        if known != Known::Nothing {
            seal(&path);
        }
        Generation { path, image: Image { size: disk_size, ..image } }
    };
    let generations: Vec<Generation> = sizes.iter().enumerate().map(generation).collect();
    if known == Known::Deltas {
        for pair in generations.windows(2) {
            let [parent, child] = [&pair[0], &pair[1]];
            let seals = [parent, child].map(|generation| Seal::of(&generation.path).unwrap().unwrap());
            let differing = differing(&parent.image, &child.image);
            let extents = differing.into_iter().map(|block| blocks::Extent::new(block, 1)).collect();
            let delta = Delta::new(seals[0].generation(), seals[1].generation(), extents);
            delta.write(&Delta::path_of(&child.path)).unwrap();
        }
    }
    generations
}

pub(crate) fn seal(path: &Path) {
    let base = BaseImage::open(path, Some(BaseFormat::Raw), Trust::Directories(&[])).unwrap();
    base_image::seal(&base, &AtomicBool::new(false), &mut |_| ()).unwrap();
}

/// Blocks in which two images differ.
pub(crate) fn differing(one: &Image, other: &Image) -> Vec<u64> {
    let zero = vec![0; 4096];
    let mut blocks: Vec<u64> = one.blocks.keys().chain(other.blocks.keys()).copied().collect();
    blocks.sort_unstable();
    blocks.dedup();
    let of = |image: &Image, block: &u64| image.blocks.get(block).unwrap_or(&zero).clone();
    blocks.retain(|block| of(one, block) != of(other, block));
    blocks
}

/// The one that a disk belongs to: exactly one.
pub(crate) fn of_disk<'a>(generations: &'a [Generation], options: &DiskOptions) -> &'a Generation {
    let base = Manifest::load(&options.paths()).unwrap().base.path;
    generations.iter().find(|generation| generation.path == base.as_path()).unwrap()
}
