//! Comparing a disk with its base, byte for byte.

use std::sync::atomic::{AtomicBool, Ordering};

use base_image::{BadChunk, BaseImage, Content};
use blockio::{AlignedBuf, DataRanges, File, OpenOptions};
use blocks::{BLOCK_SIZE, Extent, Geometry};

use crate::manifest::Manifest;
use crate::open::{check_disk, identity_of, open_base};
use crate::{DiskOptions, Error};

/// Bytes that are compared at once.
const CHUNK: u64 = 1 << 20;

/// What a comparison found.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Runs of blocks that differ, in ascending order.
    pub differing: Vec<Extent>,
    /// Blocks of the disk.
    pub blocks: u64,
}

impl Comparison {
    /// Whether every byte is equal.
    pub fn is_equal(&self) -> bool {
        self.differing.is_empty()
    }

    /// How many blocks differ.
    pub fn differing_blocks(&self) -> u64 {
        self.differing.iter().map(|extent| extent.count()).sum()
    }

    /// `block` differs, which comes after all those before.
    fn add(&mut self, block: u64) {
        match self.differing.last_mut() {
            Some(last) if last.end() == block => *last = Extent::between(last.first(), block + 1),
            _ => self.differing.push(Extent::new(block, 1)),
        }
    }
}

/// Compares parts of a disk with a base, in ascending order.
pub(crate) struct Comparer<'a> {
    disk: &'a File,
    base: &'a BaseImage,
    geometry: Geometry,
    of_disk: AlignedBuf,
    of_base: AlignedBuf,
    ranges: DataRanges,
}

impl<'a> Comparer<'a> {
    /// Compares `disk`, of this `geometry`, with `base`.
    pub(crate) fn new(disk: &'a File, base: &'a BaseImage, geometry: Geometry) -> Self {
        let buf = || AlignedBuf::new_zeroed(CHUNK as usize);
        Self { disk, base, geometry, of_disk: buf(), of_base: buf(), ranges: DataRanges::default() }
    }

    /// Adds those of `blocks` to `found` that differ. `progress` is told up to which byte of the disk all is done.
    ///
    /// # Errors
    /// If a read fails, or `stop` is set.
    pub(crate) fn compare(
        &mut self,
        blocks: Extent,
        found: &mut Comparison,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let Some(range) = self.geometry.bytes_of(blocks) else { return Ok(()) };
        let mut offset = range.offset();
        while offset < range.end() {
            if stop.load(Ordering::Acquire) {
                return Err(Error::Stopped);
            }
            let left = range.end() - offset;
            let mut len = CHUNK.min(left);
            let hole_of_disk = match self.ranges.next(self.disk, offset)? {
                None => left,
                Some(data) => data.start.saturating_sub(offset).min(left),
            };
            // Not asked beyond what matters: a sealed base proves its holes chunk by chunk.
            let hole_of_base = match hole_of_disk < BLOCK_SIZE {
                true => 0,
                false => match self.base.content_at(offset, hole_of_disk)? {
                    Content::Hole(hole) => hole,
                    Content::Data(_) => 0,
                },
            };
            let hole = hole_of_disk.min(hole_of_base) / BLOCK_SIZE * BLOCK_SIZE;
            if hole > 0 {
                len = hole;
            } else {
                let (Some(a), Some(b)) =
                    (self.of_disk.get_mut(..len as usize), self.of_base.get_mut(..len as usize))
                else {
                    return Err(Error::WrongState("a chunk is larger than its buffer"));
                };
                self.disk.read_exact_at(a, offset)?;
                self.base.read_at(b, offset)?;
                let blocks = a.chunks(BLOCK_SIZE as usize).zip(b.chunks(BLOCK_SIZE as usize));
                for (index, _) in blocks.enumerate().filter(|(_, (a, b))| a != b) {
                    found.add(offset / BLOCK_SIZE + index as u64);
                }
            }
            offset += len;
            progress(offset);
        }
        Ok(())
    }
}

/// Compares all of a disk with its base. Nobody may serve it meanwhile. `progress` is told how many
/// bytes are done.
///
/// # Errors
/// If the disk is in use or was not provisioned, the base changed, or a read fails.
pub fn verify(
    options: &DiskOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Comparison, Error> {
    let paths = options.paths();
    let manifest = Manifest::load(&paths)?;
    let disk = File::open(&options.disk, OpenOptions { write: false, direct: false, exclusive: false })?;
    disk.lock_exclusive().map_err(|error| {
        if error.is_in_use() {
            Error::InUse { path: options.disk.clone(), by: ": it is being served or restored".into() }
        } else {
            error.into()
        }
    })?;
    let geometry = check_disk(&disk, &manifest)?;
    let base = open_base(&manifest, options.base_patience)?;
    let identity = identity_of(&base, &manifest)?;
    let mut comparison = Comparison { blocks: geometry.blocks(), ..Comparison::default() };
    Comparer::new(&disk, &base, geometry).compare(geometry.all(), &mut comparison, stop, progress)?;
    base.check(&identity)?;
    Ok(comparison)
}

/// Compares all of the base of a disk with its seal; returns what is not as it was sealed. `progress` is told how many
/// bytes are done.
///
/// # Errors
/// If the disk was not provisioned, or its base was not sealed then, changed otherwise, or can't be opened.
pub fn verify_base(
    options: &DiskOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<BadChunk>, Error> {
    let manifest = Manifest::load(&options.paths())?;
    let base = open_base(&manifest, options.base_patience)?;
    if base.seal().is_none() {
        return Err(Error::Refused(format!(
            "base image {path} was not sealed when {disk} was provisioned; seal it with `pristine base seal {path}`, and \
             move the disk to it with `pristine rebase --base {path} {named}`",
            path = manifest.base.path.display(),
            disk = options.disk.display(),
            named = options.paths().arguments()
        )));
    }
    match base.bad_chunks(stop, progress) {
        Err(base_image::BaseError::Stopped) => Err(Error::Stopped),
        found => Ok(found?),
    }
}
