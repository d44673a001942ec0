//! A base image: what it holds, where, and whether it is still the same.

mod medium;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockio::{Engine, File, FileIndex, FileKind};
use rustix::io::Errno;

use crate::chain::{Chain, Trust, as_backing, open_file};
use crate::engine::BaseEngine;
use crate::error::BaseError;
use crate::format::{BaseFormat, HEAD_LEN, decide};
use crate::identity::{BackingIdentity, BaseIdentity};
use crate::layout::{self, Layout};
use crate::location::BaseLocation;
use crate::nbd::{Nbd, NbdUri};
use crate::pool::{Pool, Source, Urgency};
use crate::seal::{CHUNK_SIZE, Seal, Verified};
use crate::store::Store;

/// How many stored bytes are looked for at once.
const LOOK_MAX: u64 = 4 << 20;

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
/// Its files are opened read-only and buffered, always: all disks of a host share its page cache.
#[derive(Debug)]
pub struct BaseImage {
    location: BaseLocation,
    /// The first of its files, if it consists of files.
    file: Option<Arc<File>>,
    format: BaseFormat,
    size: u64,
    store: Arc<Store>,
    /// What compares it with its seal, if it has one.
    verified: Option<Arc<Verified>>,
    /// Threads that read it, where an engine alone can't.
    pool: Option<Arc<Pool>>,
}

impl Source for Store {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        Store::read_at(self, buf, offset)
    }
}

impl BaseImage {
    /// Opens the base at `path`, an absolute path without links, and takes QEMU's image locks for a reader that wants no
    /// writers on it and all that it is backed by.
    ///
    /// Where `format` is not named, it is what the file's name says and its contents bear out, or raw.
    ///
    /// # Errors
    /// If it can't be opened, read, understood or trusted, or if its format is not clear.
    pub fn open(path: &Path, format: Option<BaseFormat>, trust: Trust<'_>) -> Result<Self, BaseError> {
        let file = open_file(path)?;
        let location = BaseLocation::from(path);
        let format = match format {
            Some(format) => format,
            None => find_format(&file)?,
        };
        let (size, store) = match format {
            BaseFormat::Raw => (file.size()?, Store::Raw(Arc::clone(&file), Mutex::default())),
            BaseFormat::Qcow2 => {
                let chain = Chain::open(Arc::clone(&file), format, trust)?;
                (chain.size(), Store::Chain(chain))
            }
        };
        blocks::Geometry::new(size).map_err(|source| BaseError::Size { path: path.to_owned(), source })?;
        let store = Arc::new(store);
        let pool = match format {
            BaseFormat::Raw => None,
            BaseFormat::Qcow2 => Some(Arc::new(Pool::new(Arc::clone(&store) as Arc<dyn Source>))),
        };
        Ok(Self { location, file: Some(file), format, size, store, verified: None, pool })
    }

    /// Opens an export of an NBD server, which is read for its bytes as they are. Reads wait for a server that is away for
    /// `patience` at most. Where the export's `size` is known, the server may be away already.
    ///
    /// # Errors
    /// If another format is asked for; if the server can't be reached, or has no such export, or one of another size.
    pub fn connect(
        uri: &NbdUri,
        format: Option<BaseFormat>,
        size: Option<u64>,
        patience: Duration,
    ) -> Result<Self, BaseError> {
        let location = BaseLocation::Nbd(uri.clone());
        let path = || location.as_path().to_owned();
        let format = format.unwrap_or_default();
        if !format.is_raw() {
            let what = format!(
                "an NBD export is read as it is; let the server take the image apart, as `qemu-nbd --format {format}` \
                 does, and name no format"
            );
            return Err(BaseError::Refused { path: path(), what });
        }
        let nbd = Nbd::open(uri.clone(), size, patience)
            .map_err(|source| BaseError::Remote { uri: uri.to_string(), source })?;
        let size = nbd.size();
        blocks::Geometry::new(size).map_err(|source| BaseError::Size { path: path(), source })?;
        let store = Arc::new(Store::Nbd(Box::new(nbd)));
        let pool = Some(Arc::new(Pool::new(Arc::clone(&store) as Arc<dyn Source>)));
        Ok(Self { location, file: None, format, size, store, verified: None, pool })
    }

    /// The same base, of which from now on nothing is read that is not what was sealed.
    ///
    /// # Errors
    /// If the seal is of a disk of another size.
    pub fn sealed(self, seal: Seal) -> Result<Self, BaseError> {
        if seal.size() != self.size {
            let what = format!(
                "it has {} bytes, and when it was sealed it had {}; if it is right as it is, seal it again with \
                 `pristine base seal`",
                self.size,
                seal.size()
            );
            return Err(BaseError::Refused { path: self.path().to_owned(), what });
        }
        let verified = Arc::new(Verified::new(Arc::clone(&self.store), Arc::new(seal)));
        let pool = Pool::new(Arc::clone(&verified) as Arc<dyn Source>);
        Ok(Self { verified: Some(verified), pool: Some(Arc::new(pool)), ..self })
    }

    /// The seal that all that is read is compared with.
    pub fn seal(&self) -> Option<&Seal> {
        self.verified.as_ref().map(|verified| verified.seal().as_ref())
    }

    /// Where it is.
    pub fn location(&self) -> &BaseLocation {
        &self.location
    }

    /// The path of its file, or its URI in the place of one: for messages.
    pub fn path(&self) -> &Path {
        self.location.as_path()
    }

    /// Why nothing can be read of it at the moment, if that is known.
    pub fn trouble(&self) -> Option<String> {
        match &*self.store {
            Store::Nbd(nbd) => nbd.trouble(),
            Store::Raw(..) | Store::Chain(_) => None,
        }
    }

    /// How its bytes lie in its file.
    pub fn format(&self) -> BaseFormat {
        self.format
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// As long as that is set, reads that would have to wait for a server fail instead, also those that wait already.
    pub fn set_hurry(&self, hurry: bool) {
        if let Store::Nbd(nbd) = &*self.store {
            nbd.set_hurry(hurry);
        }
    }

    /// The base's file, for an engine; only [`engine`](Self::engine) knows whether byte `n` of it is the base's. `None`
    /// if it does not consist of files.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// The paths of the files of this host that it is made of, its own first.
    ///
    /// # Errors
    /// If one of them can't be looked at.
    pub fn paths(&self) -> Result<Vec<PathBuf>, BaseError> {
        let backing = self.identity()?.backing.into_iter().map(|file| file.path);
        Ok(self.file.iter().map(|file| file.path().to_owned()).chain(backing).collect())
    }

    /// The files that an image on this one is backed by: its own first, then those beneath. None, if it does not consist of files.
    ///
    /// # Errors
    /// If one of them can't be looked at.
    pub(crate) fn as_backing(&self) -> Result<Vec<BackingIdentity>, BaseError> {
        let Some(file) = &self.file else { return Ok(Vec::new()) };
        // A device keeps the link by which it is known; what is followed is what that leads to.
        let path = std::fs::canonicalize(file.path())
            .map_err(|source| BaseError::manifest("look at", file.path(), source))?;
        let own = as_backing(file, self.format, &path)?;
        Ok(std::iter::once(own).chain(self.identity()?.backing).collect())
    }

    /// An engine that reads the base as its file `base`, from `inner`, which has [`file`](Self::file) in that
    /// place, if there is one. Of a raw file without a seal it is `inner` itself.
    ///
    /// # Errors
    /// If the kernel has no descriptors to spare.
    pub fn engine(
        &self,
        inner: Box<dyn Engine>,
        base: FileIndex,
        urgency: Urgency,
    ) -> std::io::Result<Box<dyn Engine>> {
        match &self.pool {
            None => Ok(inner),
            Some(pool) => Ok(Box::new(BaseEngine::new(inner, base, Arc::clone(pool), urgency)?)),
        }
    }

    /// Makes the base's files durable, which somebody may have written just now: after a power cut their times would vouch for
    /// what is not there. Of a block device and an export nothing vouches but a seal.
    ///
    /// # Errors
    /// If a file can't be synced.
    pub fn sync(&self) -> Result<(), BaseError> {
        for path in self.paths()? {
            let file = std::fs::File::open(&path);
            let file = file.map_err(|source| BaseError::manifest("open", &path, source))?;
            match rustix::fs::fsync(&file) {
                // Of file systems that nobody writes to, or that can't sync, as their drivers say it.
                Ok(()) | Err(Errno::INVAL | Errno::ROFS | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(BaseError::manifest("sync", &path, error.into())),
            }
        }
        Ok(())
    }

    /// What would have to stay the same for the contents to be known unchanged.
    ///
    /// # Errors
    /// If a file can't be looked at.
    pub fn identity(&self) -> Result<BaseIdentity, BaseError> {
        let Some(file) = &self.file else { return Ok(BaseIdentity::of_size(self.size)) };
        let of_file = match file.kind() {
            FileKind::Regular => BaseIdentity::of_file(&file.identity()?),
            FileKind::BlockDevice => BaseIdentity::of_device(file, file.size()?),
        };
        match &*self.store {
            Store::Raw(..) | Store::Nbd(_) => Ok(of_file),
            Store::Chain(chain) => {
                Ok(BaseIdentity { size: chain.size(), backing: chain.backing()?, ..of_file })
            }
        }
    }

    /// Fails if the base is not the one that `expected` was taken from.
    ///
    /// # Errors
    /// If it changed, or can't be looked at.
    pub fn check(&self, expected: &BaseIdentity) -> Result<(), BaseError> {
        match expected.change_to(&self.identity()?) {
            None => Ok(()),
            Some(change) => Err(BaseError::Changed { path: self.path().to_owned(), change }),
        }
    }

    /// Has each hole of a sealed base proven anew from now on: it may be none of those that were proven.
    pub fn distrust_holes(&self) {
        if let Some(verified) = &self.verified {
            verified.forget_good();
        }
    }

    /// How many of the `len` bytes at `offset` the base has; the rest lies past its end and is zero.
    pub fn bytes_inside(&self, offset: u64, len: u64) -> u64 {
        self.size.saturating_sub(offset).min(len)
    }

    /// What the base holds at `offset`, for at most `len` bytes (which must not be 0).
    ///
    /// Boundaries inside a block belong to data: where a block has any data, it is data.
    ///
    /// # Errors
    /// If that can't be found out, or if there is a hole that was none when the base was sealed.
    pub fn content_at(&self, offset: u64, len: u64) -> Result<Content, BaseError> {
        let content = self.stored_at(offset, len)?;
        if let (Content::Hole(hole), Some(verified)) = (content, &self.verified) {
            verified.check_hole(offset, hole).map_err(|source| self.read_error(offset, source))?;
        }
        Ok(content)
    }

    fn stored_at(&self, offset: u64, len: u64) -> Result<Content, BaseError> {
        let block_start = offset / blocks::BLOCK_SIZE * blocks::BLOCK_SIZE;
        if block_start >= self.size {
            return Ok(Content::Hole(len));
        }
        let end = offset.saturating_add(len).next_multiple_of(blocks::BLOCK_SIZE);
        let (hole, data) = self
            .store
            .content(block_start, end - block_start, LOOK_MAX)
            .map_err(|source| self.read_error(block_start, source))?;
        if data == 0 {
            return Ok(Content::Hole(len));
        }
        let data_start = (block_start + hole) / blocks::BLOCK_SIZE * blocks::BLOCK_SIZE;
        if data_start > offset {
            return Ok(Content::Hole((data_start - offset).min(len)));
        }
        let data_end = (block_start + hole + data).next_multiple_of(blocks::BLOCK_SIZE);
        Ok(Content::Data(data_end.saturating_sub(offset).min(len).max(1)))
    }

    /// Reads `buf.len()` bytes at `offset`; zeroes past the end.
    ///
    /// # Errors
    /// If that can't be read, or is not what was sealed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BaseError> {
        let inside = self.bytes_inside(offset, buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(inside);
        tail.fill(0);
        if head.is_empty() {
            return Ok(());
        }
        let read = match &self.verified {
            None => self.store.read_at(head, offset),
            Some(verified) => Source::read_at(&**verified, head, offset),
        };
        read.map_err(|source| self.read_error(offset, source))
    }

    /// What lies where on the disk that it makes.
    ///
    /// # Errors
    /// If that can't be read, or is not what was sealed.
    pub fn layout(&self) -> Result<Layout, BaseError> {
        layout::look(self.size, &|buf, offset| self.read_at(buf, offset))
    }

    /// Compares every chunk with the seal; returns those that can't be read or are not what was sealed. `progress` is told how many
    /// bytes are done. A base without a seal has no bad chunks.
    ///
    /// # Errors
    /// [`BaseError::Stopped`] if `stop` is set.
    pub fn bad_chunks(
        &self,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<BadChunk>, BaseError> {
        let Some(verified) = &self.verified else { return Ok(Vec::new()) };
        let mut bad = Vec::new();
        for (chunk, offset) in (0..self.size.div_ceil(CHUNK_SIZE)).zip((0..).step_by(CHUNK_SIZE as usize)) {
            if stop.load(Ordering::Acquire) {
                return Err(BaseError::Stopped);
            }
            let len = CHUNK_SIZE.min(self.size - offset);
            if let Err(error) = verified.check_chunk(chunk) {
                bad.push(BadChunk { offset, len, why: error.to_string() });
            }
            progress(offset + len);
        }
        Ok(bad)
    }

    fn read_error(&self, offset: u64, source: std::io::Error) -> BaseError {
        BaseError::Read { path: self.path().to_owned(), offset, source }
    }
}

/// A part of a base that is not what was sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What is wrong.
    pub why: String,
}

/// The format of a file for which none was named.
fn find_format(file: &File) -> Result<BaseFormat, BaseError> {
    let mut head = [0; HEAD_LEN];
    let inside = file.size()?.min(HEAD_LEN as u64) as usize;
    let head = head.get_mut(..inside).unwrap_or_default();
    file.read_exact_at(head, 0)?;
    decide(file.path(), head).map_err(|what| BaseError::Refused { path: file.path().to_owned(), what })
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;
    use crate::identity::Change;

    fn image(parts: &[(u64, &[u8])], size: u64) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        for (offset, bytes) in parts {
            file.seek(SeekFrom::Start(*offset)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file
    }

    fn raw(path: &Path) -> Result<BaseImage, BaseError> {
        BaseImage::open(path, None, Trust::Directories(&[]))
    }

    #[test]
    fn content_of_a_sparse_file_is_holes_and_whole_blocks_of_data() {
        let file = image(&[(1 << 20, &[7; 100])], 4 << 20);
        let base = raw(file.path()).unwrap();
        assert_eq!(base.content_at(0, 4 << 20).unwrap(), Content::Hole(1 << 20));
        let Content::Data(len) = base.content_at(1 << 20, 4096).unwrap() else { panic!("expected data") };
        assert_eq!(len, 4096);
        assert_eq!(base.content_at(8 << 20, 512).unwrap(), Content::Hole(512));
    }

    #[test]
    fn read_across_the_end_of_a_base_gives_zeroes() {
        let file = image(&[(0, &[9; 1024])], 1024);
        let base = raw(file.path()).unwrap();
        let mut buf = [1; 4096];
        base.read_at(&mut buf, 512).unwrap();
        assert!(buf[..512].iter().all(|b| *b == 9) && buf[512..].iter().all(|b| *b == 0));
    }

    /// Invariant 5: a base that changed is noticed.
    #[test]
    fn check_of_a_base_that_was_written_to_fails() {
        let file = image(&[(0, &[9; 1024])], 1024);
        let base = raw(file.path()).unwrap();
        let identity = base.identity().unwrap();
        base.check(&identity).unwrap();
        // File systems keep times at the granularity of a clock tick: write until it shows.
        while base.identity().unwrap() == identity {
            std::os::unix::fs::FileExt::write_all_at(file.as_file(), b"x", 0).unwrap();
        }
        assert!(matches!(base.check(&identity), Err(BaseError::Changed { change: Change::Times, .. })));
    }
}
