//! What a queue asks of a disk, and what it gets back.

use std::io;

use blockio::{GuestBuf, Zeroing};
use blocks::BlockRange;

/// A request. Its range was validated when it was made.
#[derive(Debug)]
pub enum Request {
    /// Fills `buf`, which must be as long as `range`.
    Read {
        /// Where on the disk.
        range: BlockRange,
        /// Where to.
        buf: GuestBuf,
    },
    /// Writes `buf`, which must be as long as `range`.
    Write {
        /// Where on the disk.
        range: BlockRange,
        /// What.
        buf: GuestBuf,
        /// Complete only when on stable storage, if the flush policy honours it (the guest has
        /// turned the write cache off; virtio 1.2, 5.2.6.2).
        durable: bool,
    },
    /// Gives up the contents of a range. Only whole blocks that the session owns are affected.
    Discard {
        /// Where on the disk.
        range: BlockRange,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        range: BlockRange,
        /// Whether the range may be deallocated.
        may_unmap: bool,
        /// As for a write.
        durable: bool,
    },
    /// Makes finished writes durable, if the flush policy honours it.
    Flush,
}

impl Request {
    /// Where on the disk, if it is about a part of it.
    pub(crate) fn range(&self) -> Option<BlockRange> {
        match self {
            Self::Read { range, .. }
            | Self::Write { range, .. }
            | Self::Discard { range }
            | Self::WriteZeroes { range, .. } => Some(*range),
            Self::Flush => None,
        }
    }
}

/// A finished request.
#[derive(Debug)]
pub struct Done {
    /// The token that it was pushed with.
    pub token: u64,
    /// An error is answered with VIRTIO_BLK_S_IOERR; nothing else is to be told to the guest.
    pub result: io::Result<()>,
}

impl Done {
    /// Whether it has failed since the program is to end, as may be for that alone: what would wait for a base's server fails
    /// then. The next program can do what this one could not, so whoever asked is better told nothing, if that one
    /// gets to know of it.
    pub fn is_left(&self) -> bool {
        self.result.is_err() && base_image::is_ending()
    }
}

/// What is written: a guest's bytes, or zeroes.
#[derive(Debug)]
pub(crate) enum Data {
    Guest(GuestBuf),
    Zeroes(Zeroing),
}

/// A write or write-zeroes.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) range: BlockRange,
    pub(crate) data: Data,
    pub(crate) durable: bool,
}

impl Data {
    /// The part for `part`, which lies inside `whole`.
    pub(crate) fn part(&self, whole: BlockRange, part: BlockRange) -> Option<Data> {
        match self {
            Data::Zeroes(how) => Some(Data::Zeroes(*how)),
            Data::Guest(buf) => {
                let skip = part.offset().checked_sub(whole.offset())?;
                buf.slice(usize::try_from(skip).ok()?, usize::try_from(part.len()).ok()?).map(Data::Guest)
            }
        }
    }

    /// Puts these bytes over those of `block` from `at` on.
    pub(crate) fn merge_into(&self, block: &mut [u8], at: usize, len: usize) {
        let target = at.checked_add(len).and_then(|end| block.get_mut(at..end)).unwrap_or_default();
        match self {
            Data::Guest(buf) => {
                buf.copy_out(0, target);
            }
            Data::Zeroes(_) => target.fill(0),
        }
    }
}
