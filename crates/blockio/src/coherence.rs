//! Which files can be mapped such that the mapping is the file: what reads show, and what writes change.

use std::{io, os::fd::AsFd};

/// Bytes of a page, where files are mapped at all.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// The file systems' numbers (`statfs(2)`).
pub(crate) const EXT4: u64 = 0xef53; // ext2 and ext3 too
pub(crate) const XFS: u64 = 0x5846_5342;
pub(crate) const BTRFS: u64 = 0x9123_683e;
pub(crate) const F2FS: u64 = 0xf2f5_2010;
pub(crate) const TMPFS: u64 = 0x0102_1994;

/// The number of the file system that a file is on.
pub(crate) fn file_system(file: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstatfs(file)?.f_type as u64)
}

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
    Ok(match file_system(file)? {
        TMPFS => Some(Kept::InMemory),
        EXT4 => Some(Kept::OnExt4),
        XFS => Some(Kept::OnXfs),
        BTRFS | F2FS => Some(Kept::Elsewhere),
        _ => None,
    })
}

/// Whether there is address space for files, and pages have the size that is counted with.
pub(crate) fn pages_are_as_expected() -> bool {
    // SAFETY: only asks.
    let size = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
    cfg!(target_pointer_width = "64") && size == Ok(PAGE_SIZE)
}

/// Directories on the build's file system, and on tmpfs if there is one. Files in some can't be mapped (such as on an overlay):
/// those are left out.
#[cfg(test)]
pub(crate) fn mappable_places() -> Vec<tempfile::TempDir> {
    let built = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let places = [built, "/dev/shm".into()].into_iter().filter_map(|dir| tempfile::tempdir_in(dir).ok());
    places.filter(|dir| kept(std::fs::File::open(dir.path()).unwrap()).unwrap().is_some()).collect()
}
