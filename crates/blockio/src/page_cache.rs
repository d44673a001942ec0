//! How much of a file is in the page cache, for tests: it is all that can be seen of a hint's effect.

use std::{io, os::fd::AsRawFd};

use rustix::io::Errno;

use crate::{Error, File};

/// `cachestat` (Linux 6.5), which has one number on all architectures that this is built for.
const CACHESTAT: libc::c_long = 451;

/// Pages of a range that are in the page cache. What is being read in or written back counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cached {
    /// All of them.
    pub pages: u64,
    /// Those that nobody has begun to write back.
    pub dirty_pages: u64,
    /// Those that are being written back.
    pub written_pages: u64,
}

/// What `cachestat` is asked, in bytes.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// What it says, in pages.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// What of `len` bytes from `offset` on is in the page cache; of pages that are partly in the range, all. Reads nothing.
/// `None`: the kernel can't tell.
///
/// # Errors
/// What the kernel says.
pub fn look(file: &File, offset: u64, len: u64) -> Result<Option<Cached>, Error> {
    if len == 0 {
        // The kernel would take it for all that follows.
        return Ok(Some(Cached::default()));
    }
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    let fd = libc::c_long::from(file.fd.as_raw_fd());
    // SAFETY: both are laid out as the call has them, the second is ours to be filled, and neither is kept.
    let outcome = unsafe { libc::syscall(CACHESTAT, fd, &raw const range, &raw mut stat, 0) };
    if outcome == 0 {
        let Stat { cache, dirty, writeback, .. } = stat;
        return Ok(Some(Cached { pages: cache, dirty_pages: dirty, written_pages: writeback }));
    }
    let error = io::Error::last_os_error();
    match Errno::from_io_error(&error) {
        Some(Errno::NOSYS | Errno::OPNOTSUPP) => Ok(None),
        _ => Err(Error::new("look into the page cache for", file.path(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OpenOptions;

    #[test]
    fn pages_are_counted_that_were_written_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(&dir.path().join("file"), 1 << 20, OpenOptions::default()).unwrap();
        let Some(none) = look(&file, 0, 1 << 20).unwrap() else {
            return eprintln!("not tried: the kernel has no cachestat");
        };
        assert_eq!(none, Cached::default());
        file.write_all_at(&[1; 3 * 4096], 8 * 4096).unwrap();
        let pages = |offset, len| look(&file, offset, len).unwrap().unwrap().pages;
        assert_eq!((pages(0, 1 << 20), pages(9 * 4096, 4096), pages(0, 8 * 4096)), (3, 1, 0));
        assert_eq!((pages(9 * 4096, 1), pages(9 * 4096, 0)), (1, 0));
    }
}
