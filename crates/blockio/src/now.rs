//! Reads and writes of the page cache that are made at once, with one system call or none and no bookkeeping.
//!
//! What comes out short or fails is not looked into here: the caller does it again the long way, which
//! knows how to go on and what to say. Doing a read or write twice does no harm.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};

use crate::{File, FileIndex, GuestView, Quick, pace::Pace, transfer::PIECES_MAX};

/// What is longer is not done at once, in bytes: others wait meanwhile.
const LEN_MAX: usize = 32 << 20;

/// How an engine makes calls that cannot be told not to wait.
pub(crate) enum Waits<'a> {
    /// It waits for everything anyway.
    Always,
    /// It does so for buffered writes only, as long as they are quick.
    Paced(&'a mut Pace),
}

/// How a write was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Map,
    Call,
}

/// Makes `quick` on one of `files` if it need not wait; whether it was done wholly.
pub(crate) fn perform_now(files: &[Arc<File>], waits: Waits<'_>, quick: Quick<'_>) -> bool {
    let (index, buf) = match quick {
        Quick::Read { file, buf, .. } | Quick::Write { file, buf, .. } => (file, buf),
    };
    let Some(file) = files.get(usize::from(index.0)) else { return false };
    if file.is_direct() || buf.parts().len() > PIECES_MAX || buf.len() > LEN_MAX {
        return false;
    }
    match (quick, waits) {
        // The pieces are memory of a guest or on the heap, never of the map.
        (Quick::Read { offset, .. }, _)
            // SAFETY: they are valid for writes (contract of `GuestView`).
            if file.resident().is_some_and(|map| unsafe { map.read(offset, buf.parts()) }) =>
        {
            true
        }
        (Quick::Read { offset, .. }, Waits::Always) => read(file, offset, buf),
        // The ring does those of the page cache at once, many with one call.
        (Quick::Read { .. }, Waits::Paced(_)) => false,
        (Quick::Write { offset, .. }, Waits::Always) => write_now(file, offset, buf, true).is_some(),
        (Quick::Write { offset, .. }, Waits::Paced(pace)) => {
            file.writes_need_a_thread()
                && pace.try_now(buf.len() as u64, |map_pays| write_now(file, offset, buf, map_pays))
        }
    }
}

/// Writes through the map, if that pays, or else by a system call, if the write is not better cut.
fn write_now(file: &File, offset: u64, buf: GuestView<'_>, map_pays: bool) -> Option<Way> {
    let map = file.resident();
    // SAFETY: the pieces are valid for reads (contract of `GuestView`), and never of the map.
    if map_pays && map.is_some_and(|map| unsafe { map.write(offset, buf.parts()) }) {
        return Some(Way::Map);
    }
    // A long one would make a folio of its length, where that is not wanted and none is there yet.
    let len = buf.len() as u64;
    let is_whole = len <= file.write_max || map.is_some_and(|map| map.has(offset, len));
    (is_whole && write(file, offset, buf)).then_some(Way::Call)
}

/// Has what lies at `offset` brought near the processor, if it is mapped.
pub(crate) fn expect_read(files: &[Arc<File>], index: FileIndex, offset: u64) {
    if let Some(map) = files.get(usize::from(index.0)).and_then(|file| file.resident()) {
        map.prefetch(offset);
    }
}

fn read(file: &File, offset: u64, buf: GuestView<'_>) -> bool {
    let (fd, offset) = (file.as_fd().as_raw_fd(), offset as libc::off_t);
    let count = match buf.parts() {
        // SAFETY: the piece is valid for writes (contract of `GuestView`).
        [piece] => unsafe { libc::pread(fd, piece.base.cast(), piece.len, offset) },
        // SAFETY: the pieces are laid out as `iovec`, and valid for writes.
        pieces => unsafe { libc::preadv(fd, pieces.as_ptr().cast(), pieces.len() as i32, offset) },
    };
    usize::try_from(count) == Ok(buf.len())
}

fn write(file: &File, offset: u64, buf: GuestView<'_>) -> bool {
    let (fd, offset) = (file.as_fd().as_raw_fd(), offset as libc::off_t);
    let count = match buf.parts() {
        // Most are of one piece; the kernel then has no list to fetch.
        // SAFETY: as in `read`; the piece is valid for reads too.
        [piece] => unsafe { libc::pwrite(fd, piece.base.cast(), piece.len, offset) },
        // SAFETY: as in `read`; the pieces are valid for reads too.
        pieces => unsafe { libc::pwritev(fd, pieces.as_ptr().cast(), pieces.len() as i32, offset) },
    };
    usize::try_from(count) == Ok(buf.len())
}
