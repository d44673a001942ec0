//! A qcow2 image and the files that it is backed by, as one disk.
//!
//! Which file backs another is the word of whoever made the image, and could be any file of this host.
//! So a backing file is opened only if it lies in the directory of the base, or in one that the operator has
//! named, or if it is the very one that a disk was provisioned from; its format must be stated, for it is
//! never guessed from contents; and what is not a plain path (`json:`, `nbd:`) is refused.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{DataRanges, File, FileKind, ImageAccess, OpenOptions};

use crate::device;
use crate::error::BaseError;
use crate::format::BaseFormat;
use crate::identity::{BackingIdentity, FileIdentity};
use crate::qcow2::Qcow2;

/// Files of a chain; each is an open descriptor and a look-up for every byte.
const LAYERS_MAX: usize = 64;

/// Bytes of memory that the tables of all files of a chain may take. 64 files with clusters of 64 KiB take half of it, however large
/// the disk is.
const TABLES_MAX: u64 = 1 << 30;

/// Which backing files may be opened.
#[derive(Clone, Copy, Debug)]
pub enum Trust<'a> {
    /// Those in the directory of the base or in one of these, or below.
    Directories(&'a [PathBuf]),
    /// Only these, in this order: what a base was found to consist of before.
    Recorded(&'a [BackingIdentity]),
}

/// What a file of a chain has at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing: the file beneath counts.
    Unallocated,
    /// Zeroes.
    Zero,
    /// Data, at this byte of the file.
    Bytes(u64),
    /// Compressed data.
    Packed,
}

/// One file of a chain.
enum Layer {
    Raw { file: Arc<File>, size: u64, ranges: Mutex<DataRanges> },
    Qcow2(Box<Qcow2>),
}

/// Some files that make a disk, the base itself first.
pub(crate) struct Chain {
    layers: Vec<Layer>,
    size: u64,
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.layers.iter().map(|layer| layer.file().path())).finish()
    }
}

/// Opens a file to read it, as all bases are.
pub(crate) fn open_file(path: &Path) -> Result<Arc<File>, BaseError> {
    let file = File::open(path, OpenOptions { write: false, direct: false, exclusive: false })?;
    file.lock_image(ImageAccess::ReadOnly)?;
    Ok(Arc::new(file))
}

/// What an image that lies on this file, which is at `path` without links, remembers of it.
pub(crate) fn as_backing(file: &File, format: BaseFormat, path: &Path) -> Result<BackingIdentity, BaseError> {
    let (of_file, device) = match file.kind() {
        FileKind::Regular => (Some(FileIdentity::of(&file.identity()?)), None),
        FileKind::BlockDevice => (None, device::name_of(file)),
    };
    Ok(BackingIdentity { path: path.to_owned(), format, size: file.size()?, file: of_file, device })
}

impl Layer {
    fn open(file: Arc<File>, format: BaseFormat) -> Result<Self, BaseError> {
        let path = file.path().to_owned();
        match format {
            BaseFormat::Raw => Ok(Self::Raw { size: file.size()?, file, ranges: Mutex::default() }),
            BaseFormat::Qcow2 => match Qcow2::open(file) {
                Ok(qcow2) => Ok(Self::Qcow2(Box::new(qcow2))),
                Err(what) => Err(BaseError::Refused { path, what }),
            },
        }
    }

    fn file(&self) -> &Arc<File> {
        match self {
            Self::Raw { file, .. } => file,
            Self::Qcow2(qcow2) => qcow2.file(),
        }
    }

    fn format(&self) -> BaseFormat {
        match self {
            Self::Raw { .. } => BaseFormat::Raw,
            Self::Qcow2(_) => BaseFormat::Qcow2,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    fn memory_max(&self) -> u64 {
        match self {
            Self::Raw { .. } => 0,
            Self::Qcow2(qcow2) => qcow2.memory_max(),
        }
    }

    fn find(&self, offset: u64, len: u64) -> io::Result<(Found, u64)> {
        match self {
            Self::Raw { .. } => Ok((Found::Bytes(offset), len)),
            Self::Qcow2(qcow2) => qcow2.find(offset, len),
        }
    }

    /// How many bytes from `at` on are a hole of the file, and how many after them are data, both together `len` at
    /// most. The clusters of a qcow2 file are taken for data.
    fn stored_at(&self, at: u64, len: u64) -> io::Result<(u64, u64)> {
        let Self::Raw { file, ranges, .. } = self else { return Ok((0, len)) };
        let data = ranges.lock().unwrap_or_else(PoisonError::into_inner).next(file, at);
        let Some(data) = data.map_err(io::Error::other)? else { return Ok((len, 0)) };
        let hole = data.start.saturating_sub(at).min(len);
        Ok((hole, (data.end - data.start).min(len - hole)))
    }
}

impl Chain {
    /// Opens the image `top`, whose format is `format`, and all that it is backed by.
    pub(crate) fn open(top: Arc<File>, format: BaseFormat, trust: Trust<'_>) -> Result<Self, BaseError> {
        let first = Layer::open(top, format)?;
        let size = first.size();
        let mut chain = Self { layers: vec![first], size };
        while let Some((path, format)) = chain.next_file(trust)? {
            let file = open_file(&path)?;
            // Whoever may write in its directory could have put a link there since that was looked at.
            let opened = fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
            if opened.is_ok_and(|opened| opened != path) {
                let what = format!("its backing file {} was replaced while it was opened", path.display());
                return Err(chain.refused_last(what));
            }
            chain.refuse_again(&file)?;
            chain.layers.push(Layer::open(file, format)?);
            let tables = chain.layers.iter().map(Layer::memory_max).sum::<u64>();
            if tables > TABLES_MAX {
                return Err(chain.refused_last(format!(
                    "the tables of the {} files from {} on may take {} MiB of memory, more than {}; make one image of them with \
                     `qemu-img convert -O qcow2`",
                    chain.layers.len(),
                    chain.layers.first().map(|layer| layer.file().path().display().to_string()).unwrap_or_default(),
                    tables >> 20,
                    TABLES_MAX >> 20
                )));
            }
        }
        let expected = if let Trust::Recorded(files) = trust { files.len() } else { chain.layers.len() - 1 };
        if chain.layers.len() - 1 != expected {
            return Err(
                chain.refused_last(format!("it is backed by fewer files than the {expected} that it was"))
            );
        }
        Ok(chain)
    }

    fn refused_last(&self, what: impl Into<String>) -> BaseError {
        let path = self.layers.last().map(|layer| layer.file().path().to_owned()).unwrap_or_default();
        BaseError::Refused { path, what: what.into() }
    }

    /// Which file the last one is backed by, if it may be opened.
    fn next_file(&self, trust: Trust<'_>) -> Result<Option<(PathBuf, BaseFormat)>, BaseError> {
        let Some(Layer::Qcow2(last)) = self.layers.last() else { return Ok(None) };
        let Some((name, format)) = &last.backing else { return Ok(None) };
        let refused = |what: String| self.refused_last(what);
        if self.layers.len() >= LAYERS_MAX {
            return Err(refused(format!("the chain of its backing files is longer than {LAYERS_MAX}")));
        }
        if name.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(refused(format!("its backing file is {name}, and only plain files are followed")));
        }
        let Some(format) = format else {
            return Err(refused(format!(
                "its header names the backing file {name} and not the format of that; write it there with `qemu-img \
                 rebase -u -b {name} -F raw {image}`, or -F qcow2 if it is one",
                image = last.file().path().display()
            )));
        };
        let format = format.parse::<BaseFormat>().map_err(|_| {
            refused(format!(
                "its backing file {name} has the format {format}; raw and qcow2 can be read, make one of them with \
                 `qemu-img convert`"
            ))
        })?;
        let dir = last.file().path().parent().unwrap_or(Path::new("/"));
        let named = dir.join(name);
        let path = fs::canonicalize(&named).map_err(|source| BaseError::Backing {
            path: named,
            of: last.file().path().to_owned(),
            source,
        })?;
        match trust {
            Trust::Recorded(files) => match files.get(self.layers.len() - 1) {
                Some(file) if file.path == path && file.format == format => {}
                // Devices have other names after a reboot. Whether it is the same one, its identity says.
                Some(file)
                    if file.device.is_some()
                        && file.format == format
                        && device::is_at(&path).unwrap_or(false) => {}
                _ => {
                    return Err(refused(format!(
                        "it is backed by {} ({format}) now, which it was not before",
                        path.display()
                    )));
                }
            },
            Trust::Directories(more) => self.check_directory(&path, more)?,
        }
        Ok(Some((path, format)))
    }

    fn check_directory(&self, path: &Path, more: &[PathBuf]) -> Result<(), BaseError> {
        let of_base = self.layers.first().and_then(|layer| layer.file().path().parent());
        let more = more.iter().map(|dir| fs::canonicalize(dir).unwrap_or_else(|_| dir.clone()));
        if of_base.map(Path::to_owned).into_iter().chain(more).any(|dir| path.starts_with(dir)) {
            return Ok(());
        }
        Err(self.refused_last(format!(
            "its backing file {} lies outside of the base's directory; a header can name any file of this host, so if it is \
             right, say --backing-dir {}",
            path.display(),
            path.parent().unwrap_or(Path::new("/")).display()
        )))
    }

    fn refuse_again(&self, file: &File) -> Result<(), BaseError> {
        let id = |file: &File| {
            let stat = rustix::fs::fstat(file).map_err(|errno| BaseError::Read {
                path: file.path().to_owned(),
                offset: 0,
                source: errno.into(),
            })?;
            Ok::<_, BaseError>((stat.st_dev, stat.st_ino, stat.st_rdev))
        };
        let new = id(file)?;
        for layer in &self.layers {
            if id(layer.file())? == new {
                return Err(
                    self.refused_last(format!("it is backed by {}, in a circle", file.path().display()))
                );
            }
        }
        Ok(())
    }

    /// Where the first file is.
    pub(crate) fn path(&self) -> &Path {
        self.layers.first().map_or(Path::new(""), |layer| layer.file().path())
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The files beneath the first one, and what they look like.
    pub(crate) fn backing(&self) -> Result<Vec<BackingIdentity>, BaseError> {
        let identify = |layer: &Layer| as_backing(layer.file(), layer.format(), layer.file().path());
        self.layers.iter().skip(1).map(identify).collect()
    }

    /// The layer that has the byte at `offset`, and what it has there, for at most `len` bytes.
    fn find(&self, offset: u64, len: u64) -> io::Result<(Option<&Layer>, Found, u64)> {
        let mut len = len.min(self.size.saturating_sub(offset));
        for layer in &self.layers {
            let inside = layer.size().saturating_sub(offset).min(len);
            if inside == 0 {
                // A file that is smaller than what lies on it: zeroes behind its end.
                return Ok((None, Found::Zero, len));
            }
            let (found, found_len) = layer.find(offset, inside)?;
            if found != Found::Unallocated {
                return Ok((Some(layer), found, found_len));
            }
            len = found_len;
        }
        Ok((None, Found::Zero, len))
    }

    /// Fills `buf` from `offset` on; all of it lies inside the disk.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (layer, found, len) = self.find(offset, buf.len() as u64)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (part, rest) = buf.split_at_mut(len as usize);
            match (layer, found) {
                (Some(Layer::Raw { file, .. }), Found::Bytes(at)) => {
                    file.read_exact_at(part, at).map_err(io::Error::other)?;
                }
                (Some(Layer::Qcow2(qcow2)), Found::Bytes(at)) => qcow2.read_bytes(part, at)?,
                (Some(Layer::Qcow2(qcow2)), Found::Packed) => qcow2.read_packed(part, offset)?,
                _ => part.fill(0),
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// How many bytes from `offset` on are zeroes that are not stored, and how many after them are stored; both
    /// together `len` at most, and no more is looked for when `look_max` stored bytes are found.
    pub(crate) fn content(&self, offset: u64, len: u64, look_max: u64) -> io::Result<(u64, u64)> {
        let end = offset.saturating_add(len).min(self.size);
        let (mut hole, mut data) = (0, 0);
        while offset + hole + data < end && data < look_max {
            let at = offset + hole + data;
            let (layer, found, len) = self.find(at, end - at)?;
            let (more_hole, more_data) = match (layer, found) {
                (_, Found::Zero | Found::Unallocated) => (len, 0),
                (Some(layer), Found::Bytes(at)) => layer.stored_at(at, len)?,
                _ => (0, len),
            };
            if more_hole + more_data == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if more_hole > 0 && data > 0 {
                break;
            }
            hole += more_hole;
            data += more_data;
        }
        Ok((hole, data))
    }
}
