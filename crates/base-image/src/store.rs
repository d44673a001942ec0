//! Where a base's bytes are: in a file as they are, to be looked for in a chain of files, or with a server.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{DataRanges, File};

use crate::chain::Chain;
use crate::nbd::Nbd;

/// The bytes of a base. Nothing past its end is asked of it.
#[derive(Debug)]
pub(crate) enum Store {
    /// Byte `n` of the base is byte `n` of the file. What the file system was asked of its data holds as
    /// long as the base is the same.
    Raw(Arc<File>, Mutex<DataRanges>),
    /// A qcow2 image and what it is backed by.
    Chain(Chain),
    /// An export of an NBD server.
    Nbd(Box<Nbd>),
}

impl Store {
    /// Where it is, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Raw(file, _) => file.path(),
            Self::Chain(chain) => chain.path(),
            Self::Nbd(nbd) => Path::new(nbd.uri().as_str()),
        }
    }

    /// Fills `buf` from `offset` on.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file, _) => file.read_exact_at(buf, offset).map_err(io::Error::other),
            Self::Chain(chain) => chain.read_at(buf, offset),
            Self::Nbd(nbd) => nbd.read_at(buf, offset),
        }
    }

    /// Whether what it says of holes and what it reads are the same by nature. A server may say one thing and read another.
    pub(crate) fn holes_read_as_zeroes(&self) -> bool {
        !matches!(self, Self::Nbd(_))
    }

    /// How many bytes from `offset` on are zeroes that are not stored, and how many after them are stored, as
    /// far as was looked; both together `len` at most, one of them at least 1.
    pub(crate) fn content(&self, offset: u64, len: u64, look_max: u64) -> io::Result<(u64, u64)> {
        match self {
            Self::Raw(file, ranges) => {
                let data = ranges.lock().unwrap_or_else(PoisonError::into_inner).next(file, offset);
                let Some(data) = data.map_err(io::Error::other)? else { return Ok((len, 0)) };
                let hole = data.start.saturating_sub(offset).min(len);
                Ok((hole, (data.end - data.start).min(len - hole)))
            }
            Self::Chain(chain) => chain.content(offset, len, look_max),
            Self::Nbd(nbd) => nbd.content(offset, len),
        }
    }
}
