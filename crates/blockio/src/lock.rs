//! Who else may use a file: our own lock, and QEMU's image locks.
//!
//! QEMU marks a file with shared record locks of the open file description (`F_OFD_SETLK`) on
//! single bytes far below any data: byte 100 + *n* says "I use permission *n*", byte 200 + *n*
//! says "I do not let others use permission *n*". Whoever opens the file sets its own locks first
//! and then looks for a lock of somebody else on the opposite bytes (QEMU `block/file-posix.c`,
//! `raw_apply_lock_bytes` and `raw_check_lock_bytes`). All locks go when the file is closed.

use std::{io, os::fd::AsRawFd};

use rustix::{fs::FlockOperation, io::Errno};

use crate::{Error, File};

/// What we do with a disk image, in QEMU's permissions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageAccess {
    /// We read it, nobody may write to or resize it; others may read it too.
    ReadOnly,
    /// We write to it, nobody else may.
    ReadWrite,
}

const USED: i64 = 100;
const UNSHARED: i64 = 200;

// Numbers of QEMU's permissions (`include/block/block-common.h`).
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

impl ImageAccess {
    fn used(self) -> &'static [i64] {
        match self {
            ImageAccess::ReadOnly => &[CONSISTENT_READ],
            ImageAccess::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [i64] {
        match self {
            ImageAccess::ReadOnly => &[WRITE, RESIZE],
            ImageAccess::ReadWrite => &[WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }

    fn own_bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|bit| USED + bit);
        used.chain(self.unshared().iter().map(|bit| UNSHARED + bit))
    }

    fn conflicting_bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|bit| UNSHARED + bit);
        used.chain(self.unshared().iter().map(|bit| USED + bit))
    }
}

impl File {
    /// Takes the exclusive lock (`flock`) of this open file description, without waiting. It goes
    /// when the last descriptor is closed and the last I/O in flight has landed.
    ///
    /// # Errors
    /// In use if another open file description holds it; else what the kernel says.
    pub fn lock_exclusive(&self) -> Result<(), Error> {
        let lock = || rustix::fs::flock(self, FlockOperation::NonBlockingLockExclusive);
        match rustix::io::retry_on_intr(lock) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(Error::in_use("lock", self.path(), "another process")),
            Err(errno) => Err(Error::new("lock", self.path(), errno)),
        }
    }

    /// Takes QEMU's image locks, so that QEMU and its tools and we respect each other. May be
    /// called again to change the access. Does not conflict with the locks of the same `File`.
    ///
    /// # Errors
    /// In use if another program uses the image in a way that conflicts: then no lock is held.
    /// Else what the kernel says.
    pub fn lock_image(&self, access: ImageAccess) -> Result<(), Error> {
        let outcome = self.try_lock_image(access);
        if !matches!(outcome, Ok(None)) {
            // Failing to unlock leaves others refused: safe.
            let _ = self.record_lock(libc::F_OFD_SETLK, libc::F_UNLCK, USED, RESIZE + 1);
            let _ = self.record_lock(libc::F_OFD_SETLK, libc::F_UNLCK, UNSHARED, RESIZE + 1);
        }
        match outcome {
            Ok(None) => Ok(()),
            Ok(Some(byte)) => {
                let who =
                    if byte < UNSHARED { "a program that uses it" } else { "a program that protects it" };
                let who = format!("{who} (QEMU or one of its tools; image lock at byte {byte})");
                Err(Error::in_use("lock the image", self.path(), &who))
            }
            Err(error) => Err(Error::new("lock the image", self.path(), error)),
        }
    }

    /// Returns a byte that somebody else has locked against us.
    fn try_lock_image(&self, access: ImageAccess) -> io::Result<Option<i64>> {
        for bit in CONSISTENT_READ..=RESIZE {
            for byte in [USED + bit, UNSHARED + bit] {
                let wanted = access.own_bytes().any(|own| own == byte);
                let kind = if wanted { libc::F_RDLCK } else { libc::F_UNLCK };
                self.record_lock(libc::F_OFD_SETLK, kind, byte, 1)?;
            }
        }
        for byte in access.conflicting_bytes() {
            if self.record_lock(libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)? != libc::F_UNLCK {
                return Ok(Some(byte));
            }
        }
        Ok(None)
    }

    /// One `fcntl` on a record lock; returns the kind that the kernel left in the structure.
    fn record_lock(&self, command: i32, kind: i32, start: i64, len: i64) -> io::Result<i32> {
        // SAFETY: all zeros is a valid `flock64`, and `l_pid` must be 0.
        let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = start;
        lock.l_len = len;
        loop {
            // SAFETY: the descriptor is open, and `lock` is a valid `flock64` for the call.
            let result = unsafe { libc::fcntl(self.fd.as_raw_fd(), command, &raw mut lock) };
            let error = match result {
                0 => return Ok(i32::from(lock.l_type)),
                _ => io::Error::last_os_error(),
            };
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
