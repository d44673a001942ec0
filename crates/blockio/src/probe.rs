//! What a file can do: alignment of direct I/O, punching holes, zeroing ranges.
//!
//! Nothing here changes the file, not even its times: `fallocate` past the end of a file changes
//! no data, yet sets mtime and ctime, which tell whether somebody wrote the file behind our back.
//! So the file system is tried on an unnamed temporary file beside the file.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxFlags},
    io::{Errno, ReadWriteFlags},
};

use crate::{
    AlignedBuf, Alignment, FileKind,
    coherence::{BTRFS, EXT4, F2FS, TMPFS, XFS, file_system},
};

/// The largest piece that is copied through an aligned buffer at once, in bytes. A multiple of
/// every alignment.
pub(crate) const BOUNCE_MAX: usize = 1 << 20;

pub(crate) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
pub(crate) const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// What can be done with ranges of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    pub(crate) punch: bool,
    pub(crate) zero: bool,
    /// Buffered writes can be asked not to wait (`RWF_NOWAIT`).
    pub(crate) write_nowait: bool,
}

/// The longest write that is handed to the page cache at once, in bytes, where [long ones make short ones
/// dear](write_max).
const WRITE_MAX: u64 = 16 << 10;

/// What direct I/O on `fd` must be aligned to.
///
/// Once a file of xfs shares blocks with another one, Linux since 6.14 names a whole block as what offsets of direct I/O should
/// be multiples of: xfs makes smaller writes through the page cache then. They work as before, and so do smaller
/// reads. A disk's sectors must not grow for that, so there the smallest read that works is what counts.
pub(crate) fn alignment(fd: &OwnedFd, kind: FileKind) -> io::Result<Alignment> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let (memory, mut offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        if memory == 0 || offset == 0 {
            return Err(Errno::OPNOTSUPP.into());
        }
        if kind == FileKind::Regular && file_system(fd).is_ok_and(|number| number == XFS) {
            offset = offset.min(smallest_read(fd)?);
        }
        return checked(Alignment { memory, offset });
    }
    if kind == FileKind::BlockDevice {
        let sector = rustix::fs::ioctl_blksszget(fd)?;
        return checked(Alignment { memory: sector, offset: sector });
    }
    // A kernel before 6.1, or a file system that does not say.
    let align = smallest_read(fd)?;
    checked(Alignment { memory: align, offset: align })
}

/// The smallest direct read that works, in bytes.
fn smallest_read(fd: &OwnedFd) -> io::Result<u32> {
    let mut buf = AlignedBuf::new_zeroed(4096);
    for align in [512u32, 1024, 2048, 4096] {
        let part = buf.get_mut(..align as usize).unwrap_or_default();
        match rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut *part, u64::from(align))) {
            Err(Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Ok(align),
        }
    }
    Err(Errno::OPNOTSUPP.into())
}

/// Alignments are powers of two, and bounce buffers are aligned to a page.
fn checked(alignment: Alignment) -> io::Result<Alignment> {
    let Alignment { memory, offset } = alignment;
    if memory.is_power_of_two() && memory <= 4096 && offset.is_power_of_two() && offset as usize <= BOUNCE_MAX
    {
        return Ok(alignment);
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!("direct I/O would need memory aligned to {memory} and offsets aligned to {offset} bytes"),
    ))
}

/// Whether reading `fd` without waiting is refused on principle. Reads far past the end, so that
/// there is nothing to read.
pub(crate) fn supports_nowait(fd: &OwnedFd) -> bool {
    let mut buf = AlignedBuf::new_zeroed(4096);
    let mut part = [io::IoSliceMut::new(&mut buf)];
    let past_the_end = (i64::MAX as u64 >> 1) & !(BOUNCE_MAX as u64 - 1);
    let outcome = rustix::io::preadv2(fd, &mut part, past_the_end, ReadWriteFlags::NOWAIT);
    outcome != Err(Errno::OPNOTSUPP)
}

/// The longest write that is to be handed to the page cache of `fd` at once, in bytes.
///
/// What is not in the page cache comes there in folios as large as the write (Linux since 6.16 for ext4, since 6.15 for block
/// devices). Both keep a list of a folio's blocks, and whoever writes one of them later walks all of it: 1.2 us for a
/// write of 4 KiB in a folio of 4 KiB, 1.4 in one of 16 KiB, 1.9 in one of 32 KiB, 3.8 in one of 256 KiB and 5 in one of 1 MiB, more
/// when the list is not in the processor's cache. Long writes like large folios: 128 KiB take 22 us in folios of 4 KiB, 12 in those
/// of 16 KiB, 11 in those of 32 KiB, 10 in those of 64 KiB. (EPYC; the bench's README has more.) File systems that keep bits instead
/// of lists (xfs, tmpfs) have no such limit.
pub(crate) fn write_max(fd: &OwnedFd, kind: FileKind) -> u64 {
    let has_lists = match kind {
        FileKind::BlockDevice => true,
        FileKind::Regular => file_system(fd).is_ok_and(|number| number == EXT4),
    };
    if has_lists { WRITE_MAX } else { u64::MAX }
}

/// What can be done with ranges of the file that `fd` has open for writing.
pub(crate) fn abilities(fd: &OwnedFd, path: &Path, kind: FileKind) -> Abilities {
    match kind {
        FileKind::BlockDevice => of_device(fd),
        FileKind::Regular => of_neighbour(fd, path).unwrap_or_else(|_| of_file_system(fd)),
    }
}

/// Tries an unnamed file in the same directory, which must be on the same file system.
fn of_neighbour(fd: &OwnedFd, path: &Path) -> io::Result<Abilities> {
    let path = path.canonicalize()?;
    let directory = path.parent().ok_or(io::ErrorKind::NotFound)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let neighbour = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?;
    if rustix::fs::fstat(&neighbour)?.st_dev != rustix::fs::fstat(fd)?.st_dev {
        return Err(io::ErrorKind::CrossesDevices.into());
    }
    rustix::fs::ftruncate(&neighbour, 8192)?;
    let works = |mode| rustix::io::retry_on_intr(|| rustix::fs::fallocate(&neighbour, mode, 0, 4096)).is_ok();
    // Written once, so that nothing has to be allocated when it is written without waiting.
    let block = [io::IoSlice::new(&[1; 4096])];
    let write = |flags| rustix::io::pwritev2(&neighbour, &block, 4096, flags);
    write(ReadWriteFlags::empty())?;
    let write_nowait = write(ReadWriteFlags::NOWAIT) != Err(Errno::OPNOTSUPP);
    Ok(Abilities { punch: works(PUNCH), zero: works(ZERO), write_nowait })
}

/// What the file system's type promises: for a directory that we may not write to.
fn of_file_system(fd: &OwnedFd) -> Abilities {
    match file_system(fd) {
        Ok(EXT4 | F2FS) => Abilities { punch: true, zero: true, write_nowait: false },
        Ok(XFS | BTRFS) => Abilities { punch: true, zero: true, write_nowait: true },
        Ok(TMPFS) => Abilities { punch: true, zero: false, write_nowait: false },
        _ => Abilities::default(),
    }
}

/// Zeroing always works: the kernel writes zeros where the device cannot. Punching is a
/// write-zeroes command that may unmap, without that fallback.
fn of_device(fd: impl AsFd) -> Abilities {
    let punch = queue_limit(fd, "write_zeroes_max_bytes").is_some_and(|bytes| bytes > 0);
    Abilities { punch, zero: true, write_nowait: true }
}

fn queue_limit(fd: impl AsFd, name: &str) -> Option<u64> {
    let device = rustix::fs::fstat(fd).ok()?.st_rdev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let mut directory = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if directory.join("partition").exists() {
        directory = directory.canonicalize().ok()?.parent()?.to_owned();
    }
    std::fs::read_to_string(directory.join("queue").join(name)).ok()?.trim().parse().ok()
}
