//! Whether two descriptors are of one open file: duplicates of each other, wherever they have been sent to in between.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{FileType, OFlags, Stat, fcntl_getfl, fstat};

/// `F_DUPFD_QUERY` of fcntl(2), Linux 6.10.
const DUPFD_QUERY: libc::c_int = 1024 + 3;
/// `KCMP_FILE` of kcmp(2).
const FILE: libc::c_int = 0;

/// Whether `a` and `b` are of one open file. Where the kernel does not tell, two that nobody could tell apart by using them are
/// taken for one, and others are not, though they may be.
pub(crate) fn is_one(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    by_duplicate(a, b).or_else(|| by_comparison(a, b)).unwrap_or_else(|| by_use(a, b))
}

fn by_duplicate(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    // SAFETY: only asks; both descriptors are open as long as they are borrowed.
    match unsafe { libc::fcntl(a.as_raw_fd(), DUPFD_QUERY, b.as_raw_fd()) } {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// By a system call that a kernel may be built without, and a sandbox refuse.
fn by_comparison(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    let us = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: only compares; both descriptors are open as long as they are borrowed.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, us, us, FILE, a.as_raw_fd(), b.as_raw_fd()) };
    match order {
        0 => Some(true),
        1.. => Some(false),
        _ => None,
    }
}

/// Of a file in a file system, memory files included, one that is open in the same mode does for the other: it is mapped, and
/// has no position that matters. Of others the inode says nothing: all event descriptors have the same.
fn by_use(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let file = |fd| {
        let Stat { st_dev, st_ino, st_mode, .. } = fstat(fd).ok()?;
        let mode = fcntl_getfl(fd).ok()? & OFlags::RWMODE;
        (FileType::from_raw_mode(st_mode) == FileType::RegularFile).then_some((st_dev, st_ino, mode))
    };
    file(a).is_some_and(|of_a| file(b) == Some(of_a))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// What each way says of two; a kernel need not know the first ones.
    fn ways(a: impl AsFd, b: impl AsFd) -> [Option<bool>; 3] {
        let (a, b) = (a.as_fd(), b.as_fd());
        [by_duplicate(a, b), by_comparison(a, b), Some(by_use(a, b))]
    }

    #[test]
    fn duplicates_are_one_open_file() {
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let ways = ways(&memory, memory.try_clone().unwrap());
        assert!(ways.iter().all(|way| *way != Some(false)), "{ways:?}");
    }

    #[test]
    fn event_descriptors_are_one_only_as_duplicates() {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (one, other) = (event(), event());
        let ways_of_two = ways(&one, &other);
        assert!(ways_of_two.iter().all(|way| *way != Some(true)), "{ways_of_two:?}");
        assert!(!is_one(one.as_fd(), other.as_fd()));
        let [by_duplicate, by_comparison, by_use] = ways(&one, one.try_clone().unwrap());
        assert!(by_duplicate != Some(false) && by_comparison != Some(false) && by_use == Some(false));
    }

    #[test]
    fn files_that_are_used_differently_are_not_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(file.path()).unwrap();
        let ways_of_modes = ways(file.as_file(), &read_only);
        assert!(ways_of_modes.iter().all(|way| *way != Some(true)), "{ways_of_modes:?}");
        let ways_of_names = ways(&read_only, tempfile::tempfile().unwrap());
        assert!(ways_of_names.iter().all(|way| *way != Some(true)), "{ways_of_names:?}");
    }
}
