//! A base whose bytes are the bytes of a raw file or a block device.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::{DataRanges, File, FileKind, ImageAccess, OpenOptions};
use thiserror::Error;

use crate::identity::{BaseIdentity, Change};

/// Why a base can't be used.
#[derive(Debug, Error)]
pub enum BaseError {
    /// The operating system refused.
    #[error("base image")]
    Io(#[from] blockio::Error),
    /// A size that no disk can have.
    #[error("base image {path}: {source}")]
    Size {
        /// The base.
        path: PathBuf,
        /// What is wrong with its size.
        source: blocks::GeometryError,
    },
    /// It is not what it was.
    #[error("base image {path} has changed: {change}")]
    Changed {
        /// The base.
        path: PathBuf,
        /// What gave it away.
        change: Change,
    },
}

/// What a range of the base holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that have to be read; the length in bytes.
    Data(u64),
    /// A hole, or past the end of the base: all zeroes; the length in bytes.
    Hole(u64),
}

/// An open base image. Past its end it reads as zeroes, so that a disk may be larger.
///
/// It is opened read-only and buffered, always: all disks of a host share its page cache.
#[derive(Debug)]
pub struct BaseImage {
    file: Arc<File>,
    size: u64,
    /// Changes with what the base is asked for; what it says holds as long as the base is the same.
    ranges: Mutex<DataRanges>,
}

impl BaseImage {
    /// Opens the base at `path`, and takes QEMU's image lock for a reader that wants no writers.
    pub fn open(path: &Path) -> Result<Self, BaseError> {
        let file = File::open(path, OpenOptions { write: false, direct: false, exclusive: false })?;
        file.lock_image(ImageAccess::ReadOnly)?;
        let size = file.size()?;
        blocks::Geometry::new(size).map_err(|source| BaseError::Size { path: path.to_owned(), source })?;
        Ok(Self { file: Arc::new(file), size, ranges: Mutex::default() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file whose byte `n` is the base's byte `n`, for an engine to read from.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// What would have to stay the same for the contents to be known unchanged.
    pub fn identity(&self) -> Result<BaseIdentity, BaseError> {
        Ok(match self.file.kind() {
            FileKind::Regular => BaseIdentity::of_file(&self.file.identity()?),
            FileKind::BlockDevice => BaseIdentity::of_size(self.file.size()?),
        })
    }

    /// Fails if the base is not the one that `expected` was taken from.
    pub fn check(&self, expected: &BaseIdentity) -> Result<(), BaseError> {
        match expected.change_to(&self.identity()?) {
            None => Ok(()),
            Some(change) => Err(BaseError::Changed { path: self.path().to_owned(), change }),
        }
    }

    /// How many of the `len` bytes at `offset` the base has; the rest lies past its end and is zero.
    pub fn bytes_inside(&self, offset: u64, len: u64) -> u64 {
        self.size.saturating_sub(offset).min(len)
    }

    fn ranges(&self) -> MutexGuard<'_, DataRanges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the base holds at `offset`, for at most `len` bytes (which must not be 0).
    ///
    /// Boundaries inside a block belong to data: where a block has any data, it is data.
    pub fn content_at(&self, offset: u64, len: u64) -> Result<Content, BaseError> {
        let block_start = offset / blocks::BLOCK_SIZE * blocks::BLOCK_SIZE;
        let data = match self.ranges().next(&self.file, block_start.min(self.size))? {
            _ if block_start >= self.size => return Ok(Content::Hole(len)),
            None => return Ok(Content::Hole(len)),
            Some(data) => data,
        };
        let data_start = data.start / blocks::BLOCK_SIZE * blocks::BLOCK_SIZE;
        if data_start > offset {
            return Ok(Content::Hole((data_start - offset).min(len)));
        }
        let data_end = data.end.div_ceil(blocks::BLOCK_SIZE) * blocks::BLOCK_SIZE;
        Ok(Content::Data(data_end.saturating_sub(offset).min(len).max(1)))
    }

    /// Reads `buf.len()` bytes at `offset`; zeroes past the end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BaseError> {
        let inside = self.bytes_inside(offset, buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(inside);
        if !head.is_empty() {
            self.file.read_exact_at(head, offset)?;
        }
        tail.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    fn image(parts: &[(u64, &[u8])], size: u64) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        for (offset, bytes) in parts {
            file.seek(SeekFrom::Start(*offset)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file
    }

    #[test]
    fn content_of_a_sparse_file_is_holes_and_whole_blocks_of_data() {
        let file = image(&[(1 << 20, &[7; 100])], 4 << 20);
        let base = BaseImage::open(file.path()).unwrap();
        assert_eq!(base.content_at(0, 4 << 20).unwrap(), Content::Hole(1 << 20));
        let Content::Data(len) = base.content_at(1 << 20, 4096).unwrap() else { panic!("expected data") };
        assert_eq!(len, 4096);
        assert_eq!(base.content_at(8 << 20, 512).unwrap(), Content::Hole(512));
    }

    #[test]
    fn read_across_the_end_of_a_base_gives_zeroes() {
        let file = image(&[(0, &[9; 1024])], 1024);
        let base = BaseImage::open(file.path()).unwrap();
        let mut buf = [1; 4096];
        base.read_at(&mut buf, 512).unwrap();
        assert!(buf[..512].iter().all(|b| *b == 9) && buf[512..].iter().all(|b| *b == 0));
    }

    /// Invariant 5: a base that changed is noticed.
    #[test]
    fn check_of_a_base_that_was_written_to_fails() {
        let file = image(&[(0, &[9; 1024])], 1024);
        let base = BaseImage::open(file.path()).unwrap();
        let identity = base.identity().unwrap();
        base.check(&identity).unwrap();
        // File systems keep times at the granularity of a clock tick: write until it shows.
        while base.identity().unwrap() == identity {
            std::os::unix::fs::FileExt::write_all_at(file.as_file(), b"x", 0).unwrap();
        }
        assert!(matches!(base.check(&identity), Err(BaseError::Changed { change: Change::Times, .. })));
    }
}
