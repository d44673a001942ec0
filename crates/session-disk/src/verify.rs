//! Comparing a disk with its base, byte for byte.

use std::sync::atomic::{AtomicBool, Ordering};

use base_image::{BadChunk, Content};
use blockio::{AlignedBuf, DataRanges, File, OpenOptions};
use blocks::{BLOCK_SIZE, Extent};

use crate::manifest::Manifest;
use crate::open::{check_size, identity_of, open_base};
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

    fn add(&mut self, block: u64) {
        match self.differing.last_mut() {
            Some(last) if last.end() == block => *last = Extent::between(last.first(), block + 1),
            _ => self.differing.push(Extent::new(block, 1)),
        }
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
    let geometry = check_size(&disk, &manifest)?;
    let base = open_base(&manifest)?;
    let identity = identity_of(&base, &manifest)?;
    let mut comparison = Comparison { blocks: geometry.blocks(), ..Comparison::default() };
    let (mut of_disk, mut of_base) =
        (AlignedBuf::new_zeroed(CHUNK as usize), AlignedBuf::new_zeroed(CHUNK as usize));
    let (mut offset, mut ranges) = (0, DataRanges::default());
    while offset < geometry.size() {
        if stop.load(Ordering::Acquire) {
            return Err(Error::Stopped);
        }
        let mut len = CHUNK.min(geometry.size() - offset);
        let hole_of_disk = match ranges.next(&disk, offset)? {
            None => geometry.size() - offset,
            Some(data) => data.start.saturating_sub(offset),
        };
        // Not asked beyond what matters: a sealed base proves its holes chunk by chunk.
        let hole_of_base = match hole_of_disk < BLOCK_SIZE {
            true => 0,
            false => match base.content_at(offset, hole_of_disk)? {
                Content::Hole(hole) => hole,
                Content::Data(_) => 0,
            },
        };
        let hole = hole_of_disk.min(hole_of_base) / BLOCK_SIZE * BLOCK_SIZE;
        if hole > 0 {
            len = hole;
        } else {
            let (Some(a), Some(b)) = (of_disk.get_mut(..len as usize), of_base.get_mut(..len as usize))
            else {
                return Err(Error::WrongState("a chunk is larger than its buffer"));
            };
            disk.read_exact_at(a, offset)?;
            base.read_at(b, offset)?;
            let blocks = a.chunks(BLOCK_SIZE as usize).zip(b.chunks(BLOCK_SIZE as usize));
            for (index, _) in blocks.enumerate().filter(|(_, (a, b))| a != b) {
                comparison.add(offset / BLOCK_SIZE + index as u64);
            }
        }
        offset += len;
        progress(offset);
    }
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
    let base = open_base(&manifest)?;
    if base.seal().is_none() {
        return Err(Error::Refused(format!(
            "base image {path} was not sealed when {disk} was provisioned; seal it with `pristine base seal {path}`, and \
             provision the disk again with --adopt",
            path = manifest.base.path.display(),
            disk = options.disk.display()
        )));
    }
    match base.bad_chunks(stop, progress) {
        Err(base_image::BaseError::Stopped) => Err(Error::Stopped),
        found => Ok(found?),
    }
}
