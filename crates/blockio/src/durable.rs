//! Making what was written to a file durable, and asking what has become of it.

use std::{io, os::fd::AsRawFd};

use rustix::io::Errno;

use crate::{
    Error, File, FileKind,
    coherence::{BTRFS, kept},
    kernel,
};

impl File {
    /// `fdatasync`.
    ///
    /// # Errors
    /// What the kernel says. Trying again proves nothing: the data may be lost already.
    pub fn sync_data(&self) -> Result<(), Error> {
        rustix::fs::fdatasync(&self.fd).map_err(|errno| self.error("sync", errno))
    }

    /// Asks the kernel to begin to write back what is dirty in a range, so that a later sync has less to
    /// wait for. Vouches for nothing, and swallows no error that a sync has to report.
    pub fn start_write_back(&self, offset: u64, len: u64) {
        if self.is_direct() || len == 0 {
            return;
        }
        let (offset, len) = (offset as libc::off64_t, len as libc::off64_t);
        // SAFETY: an open descriptor and numbers; no memory is involved.
        let _ =
            unsafe { libc::sync_file_range(self.fd.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    }

    /// Asks whether the kernel has failed to write back something of the file. That waits for nothing where the file system is known
    /// to keep the file's pages and errors itself; elsewhere (overlays, FUSE) only a sync can tell, and so it is one.
    ///
    /// A failure is said once, to each open file description: it is not said here what a sync of this one has reported, nor by a
    /// sync of this one what was said here. Pages whose write-back has failed may be gone, but not before it is said.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn check_written_back(&self) -> io::Result<()> {
        if !self.ask_written_back()? {
            rustix::fs::fdatasync(&self.fd)?;
        }
        Ok(())
    }

    /// Whether [`check_written_back`](Self::check_written_back) waits for nothing, as far as can be foreseen.
    pub fn tells_of_write_back(&self) -> bool {
        // Kernels of 32 bits say nothing of what lies so far behind the end.
        *self.tells.get_or_init(|| {
            cfg!(target_pointer_width = "64")
                && match self.kind() {
                    FileKind::BlockDevice => true,
                    FileKind::Regular => kept(&self.fd).is_ok_and(|kept| kept.is_some()),
                }
        })
    }

    /// [`check_written_back`](Self::check_written_back) where that waits for nothing; false: elsewhere, and nobody was asked.
    ///
    /// # Errors
    /// As there.
    pub fn ask_written_back(&self) -> io::Result<bool> {
        // There are no pages so far behind the end that anybody would wait for; what is asked for is said of the whole file.
        const BEHIND_THE_END: libc::off64_t = 1 << 62;
        if !self.tells_of_write_back() {
            return Ok(false);
        }
        let (fd, flags) = (self.fd.as_raw_fd(), libc::SYNC_FILE_RANGE_WAIT_BEFORE);
        // SAFETY: an open descriptor and numbers; no memory is involved.
        if unsafe { libc::sync_file_range(fd, BEHIND_THE_END, 1, flags) } == 0 {
            return Ok(true);
        }
        match Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO) {
            // Not asked.
            Errno::NOSYS | Errno::PERM | Errno::INVAL | Errno::SPIPE => Ok(false),
            errno => Err(errno.into()),
        }
    }

    /// `fsync`.
    ///
    /// # Errors
    /// As [`sync_data`](File::sync_data).
    pub fn sync_all(&self) -> Result<(), Error> {
        rustix::fs::fsync(&self.fd).map_err(|errno| self.error("sync", errno))
    }

    /// Whether [`sync_file_system`](Self::sync_file_system) says what was not written back of this file: not of a block device, nor
    /// of a file of an overlay, of FUSE or of a file system that is not known, nor on kernels before Linux 5.8.
    pub fn file_system_tells(&self) -> bool {
        const KERNEL_MIN: (u32, u32) = (5, 8);
        self.kind() == FileKind::Regular && self.tells_of_write_back() && kernel::is_at_least(KERNEL_MIN)
    }

    /// `syncfs`: makes all of the file system durable that the file is on. Says also, [where it does](Self::file_system_tells), what
    /// failed to be written back since the file was opened, of whatever file and whoever was told of that by a sync of that file;
    /// and what failed before, if no `syncfs` has said so yet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn sync_file_system(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.fd).map_err(|errno| self.error("sync the file system of", errno))
    }

    /// What to say of a file of a file system that has lost something, nobody knows what.
    pub fn may_be_lost(&self) -> Error {
        self.error("trust what was written to", io::Error::other("its file system has lost something"))
    }

    /// The number of the device by which the file's file system is known; `None`: one file system has several (btrfs, one for each of
    /// its subvolumes).
    ///
    /// # Errors
    /// If it can't be looked at.
    pub fn device_of_file_system(&self) -> Result<Option<u64>, Error> {
        let failed = |errno| self.error("look at", errno);
        let of = rustix::fs::fstatfs(&self.fd).map_err(failed)?;
        let device = rustix::fs::fstat(&self.fd).map_err(failed)?.st_dev;
        Ok(Some(device).filter(|_| of.f_type as u64 != BTRFS))
    }
}
