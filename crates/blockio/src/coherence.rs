//! Which files can be mapped such that the mapping is the file: what reads show, and what writes change.

use std::{io, os::fd::AsFd};

/// Bytes of a page, where files are mapped at all.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// Where the pages of a file that can be mapped are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Nowhere else: tmpfs.
    InMemory,
    OnExt4,
    OnXfs,
    Elsewhere,
}

/// Where a regular file's pages are kept, if mappings of it show what reads of it show, and `mincore` what they need.
pub(crate) fn kept(file: impl AsFd) -> io::Result<Option<Kept>> {
    const TMPFS: u64 = 0x0102_1994;
    const EXT4: u64 = 0xef53; // ext2 and ext3 too
    const XFS: u64 = 0x5846_5342;
    const OTHERS: [u64; 2] = [
        0x9123_683e, // btrfs
        0xf2f5_2010, // f2fs
    ];
    let kind = rustix::fs::fstatfs(file)?.f_type as u64;
    Ok(match kind {
        TMPFS => Some(Kept::InMemory),
        EXT4 => Some(Kept::OnExt4),
        XFS => Some(Kept::OnXfs),
        _ => OTHERS.contains(&kind).then_some(Kept::Elsewhere),
    })
}

/// Whether there is address space for files, and pages have the size that is counted with.
pub(crate) fn pages_are_as_expected() -> bool {
    // SAFETY: only asks.
    let size = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
    cfg!(target_pointer_width = "64") && size == Ok(PAGE_SIZE)
}
