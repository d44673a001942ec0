//! Making the next generation of a base: the base, and the blocks in which it is to differ.
//!
//! Crash order. The image is there when, and only when, all of the generation is:
//! 1. the image is made as `TO.promoting`, under a lock; what a crash has left there is replaced;
//! 2. it is made read-only and synced;
//! 3. its seal and its delta are written beside it, `TO.promoting.manifest` and `TO.promoting.delta`, and synced;
//! 4. what the seal says of the changed chunks is compared with what the image holds;
//! 5. delta and manifest get their names, and the directory is synced;
//! 6. the image gets its name, and the directory is synced.
//!
//! Nothing that exists is replaced. Whatever fails before 6 removes all that was made; after a kill `TO.promoting` says
//! that the rest is not to be believed.

mod image;
mod list;
mod place;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::File;
use blocks::{BLOCK_SIZE, Extent};

use self::image::NewImage;
use self::place::Place;
use crate::chain::Trust;
use crate::delta::{Delta, Generation};
use crate::error::BaseError;
use crate::format::BaseFormat;
use crate::image::BaseImage;
use crate::seal::{CHUNK_SIZE, NextSeal, Seal, manifest_path};

pub use self::image::CopyWay;
pub use self::list::{Listed, Listing, Node, Parent, list};
pub(crate) use self::place::half_made_name;

/// What is to be made.
pub struct NewGeneration<'a> {
    /// The base that it is made of. It must be [sealed](BaseImage::sealed).
    pub parent: &'a BaseImage,
    /// Where the new image is to be.
    pub to: &'a Path,
    /// Its format; qcow2 lies on the parent and holds only the chunks that are changed.
    pub format: BaseFormat,
    /// Size of its disk in bytes, not smaller than the parent's.
    pub size: u64,
    /// The blocks in which it differs: ascending, none touch.
    pub extents: &'a [Extent],
    /// Reads them: fills the buffer from this byte of the disk on.
    pub read: &'a dyn Fn(&mut [u8], u64) -> io::Result<()>,
}

/// What was made.
#[derive(Debug)]
pub struct MadeGeneration {
    /// Where the image is.
    pub path: PathBuf,
    /// What it is.
    pub generation: Generation,
    /// How it came by what it has in common with its parent.
    pub way: CopyWay,
    /// What a promotion that was interrupted had left, and was replaced.
    pub replaced: Vec<PathBuf>,
}

fn refused(path: &Path, what: impl Into<String>) -> BaseError {
    BaseError::Refused { path: path.to_owned(), what: what.into() }
}

/// The file of a base of which a next generation can be made.
///
/// # Errors
/// If it is read over the network.
pub fn parent_file(parent: &BaseImage) -> Result<&File, BaseError> {
    let what = "it is read over the network; a next generation is made where its image lies";
    parent.file().map(AsRef::as_ref).ok_or_else(|| refused(parent.path(), what))
}

impl NewGeneration<'_> {
    /// Makes it: the image, its seal and its delta; or nothing. `progress` is told how many bytes are done, and of how
    /// many.
    ///
    /// # Errors
    /// If there is something at `to`, the parent is not as it was sealed where it is read, something can't be read or
    /// written, or `stop` is set ([`BaseError::Stopped`]).
    pub fn make(
        &self,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<MadeGeneration, BaseError> {
        let Some(seal) = self.parent.seal() else {
            return Err(refused(self.parent.path(), "it is not sealed; seal it with `pristine base seal`"));
        };
        let parent_file = parent_file(self.parent)?;
        if self.size < self.parent.size() {
            return Err(refused(self.parent.path(), format!("it does not fit into {} bytes", self.size)));
        }
        let before = self.parent.identity()?;
        let place = Place::take(self.to)?;
        let (mut image, way) = NewImage::create(&place, self, stop, progress)?;
        let mut next = NextSeal::new(seal, self.size);
        let chunks = self.chunks(&next);
        let total = chunks.len() as u64 * CHUNK_SIZE;
        let mut buf = Vec::with_capacity(CHUNK_SIZE as usize);
        for (done, chunk) in chunks.iter().enumerate() {
            go_on(stop)?;
            buf.resize(next.len_of(*chunk) as usize, 0);
            let parts = self.merge(*chunk, &mut buf)?;
            image.write_chunk(chunk * CHUNK_SIZE, &buf, &parts)?;
            next.set_chunk(*chunk, &buf);
            progress(done as u64 * CHUNK_SIZE, total);
        }
        image.finish()?;
        place.protect(parent_file)?;
        let (root, manifest) = next.write(&manifest_path(place.temporary()), self.format)?;
        self.prove(&place, &next, stop)?;
        self.parent.check(&before)?;
        let generation = Generation { root, size: self.size };
        let delta = Delta::new(seal.generation(), generation, self.extents.to_vec())
            .with_parent_path(&place.name_from_here(self.parent.path()))
            .write_open(&Delta::path_of(place.temporary()))?;
        place.protect_beside(parent_file, &delta, &manifest)?;
        go_on(stop)?;
        let (path, replaced) = place.publish()?;
        Ok(MadeGeneration { path, generation, way, replaced })
    }

    /// The chunks of which the parent's hash can't be taken over, in ascending order.
    fn chunks(&self, next: &NextSeal<'_>) -> Vec<u64> {
        let mut chunks: Vec<u64> = Vec::new();
        for extent in self.extents {
            let first = extent.first() * BLOCK_SIZE / CHUNK_SIZE;
            let first = chunks.last().map_or(first, |last| first.max(last + 1));
            chunks.extend(first..(extent.end() * BLOCK_SIZE).div_ceil(CHUNK_SIZE));
        }
        if let Some(seam) = next.chunk_at_seam()
            && let Err(at) = chunks.binary_search(&seam)
        {
            chunks.insert(at, seam);
        }
        chunks
    }

    /// Fills `buf` with what chunk number `chunk` is to hold; returns which bytes of it are changed.
    fn merge(&self, chunk: u64, buf: &mut [u8]) -> Result<Vec<std::ops::Range<usize>>, BaseError> {
        let (begin, blocks) = (chunk * CHUNK_SIZE, CHUNK_SIZE / BLOCK_SIZE);
        self.parent.read_at(buf, begin)?;
        let all = Extent::new(chunk * blocks, blocks);
        let first = self.extents.partition_point(|extent| extent.end() <= all.first());
        let mut parts = Vec::new();
        for extent in self.extents.iter().skip(first).take_while(|extent| extent.overlaps(all)) {
            let extent = extent.intersection(all);
            let part = (extent.first() * BLOCK_SIZE - begin) as usize
                ..((extent.end() * BLOCK_SIZE - begin) as usize).min(buf.len());
            if let Some(bytes) = buf.get_mut(part.clone()) {
                let read = (self.read)(bytes, extent.first() * BLOCK_SIZE);
                read.map_err(|source| BaseError::manifest("read the changes for", self.to, source))?;
                parts.push(part);
            }
        }
        Ok(parts)
    }

    /// Reads the chunks that were changed as whoever provisions from the image will.
    fn prove(&self, place: &Place, next: &NextSeal<'_>, stop: &AtomicBool) -> Result<(), BaseError> {
        let image = place.temporary();
        // It lies on its parent and on nothing else, wherever that is.
        let beneath = self.parent.as_backing()?;
        let missing = || refused(&manifest_path(image), "it is gone");
        let seal = Seal::of(image)?.ok_or_else(missing)?;
        let image = BaseImage::open(image, Some(self.format), Trust::Recorded(&beneath))?.sealed(seal)?;
        let mut buf = Vec::with_capacity(CHUNK_SIZE as usize);
        for chunk in next.chunks() {
            go_on(stop)?;
            buf.resize(next.len_of(chunk) as usize, 0);
            image.read_at(&mut buf, chunk * CHUNK_SIZE)?;
        }
        Ok(())
    }
}

fn go_on(stop: &AtomicBool) -> Result<(), BaseError> {
    if stop.load(Ordering::Acquire) { Err(BaseError::Stopped) } else { Ok(()) }
}
