//! The synchronous engine: plain system calls inside `submit`.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use crate::{
    Completion, Engine, File, FileIndex, IoVec, Op, Quick,
    now::{Waits, expect_read, perform_now},
    share::share,
    transfer::{Call, Memory, Work},
};

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());

/// Performs everything inside [`Engine::submit`], in the order it was pushed.
#[derive(Debug)]
pub(crate) struct SyncEngine {
    files: Vec<Arc<File>>,
    pushed: Vec<(u64, Op)>,
    ready: Vec<Completion>,
    work: Work,
}

impl SyncEngine {
    pub(crate) fn new(files: Vec<Arc<File>>) -> Self {
        Self { files, pushed: Vec::new(), ready: Vec::new(), work: Work::idle() }
    }
}

impl Engine for SyncEngine {
    fn expect_read(&self, file: FileIndex, offset: u64) {
        expect_read(&self.files, file, offset);
    }

    fn perform_now(&mut self, quick: Quick<'_>) -> bool {
        perform_now(&self.files, Waits::Always, quick)
    }

    fn push(&mut self, token: u64, op: Op) {
        self.pushed.push((token, op));
    }

    fn submit(&mut self) {
        for (token, op) in self.pushed.drain(..) {
            self.work.begin(token, op, &self.files);
            let result = loop {
                let call = self.work.call();
                let outcome = perform(&self.files, self.work.file(), call);
                if let Some(result) = self.work.advance(outcome) {
                    break result;
                }
            };
            self.ready.push(self.work.complete(result, &self.files));
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
    }

    fn wait(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.pushed.len() + self.ready.len()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Makes a call on one of `files`, and waits for its outcome.
pub(crate) fn perform(files: &[Arc<File>], index: FileIndex, call: Call) -> io::Result<usize> {
    let of = |index: FileIndex| files.get(usize::from(index.0));
    let Some(file) = of(index) else { return Ok(0) };
    match call {
        Call::Nothing => Ok(0),
        Call::SyncData => Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
        Call::Allocate { mode, offset, len } => {
            Ok(rustix::fs::fallocate(file, mode, offset, len).map(|()| 0)?)
        }
        Call::Share { from, offset, len } => {
            let from = of(from).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(share(from, file, offset, len).map(|()| 0)?)
        }
        Call::Transfer { write, offset, memory } => {
            let one;
            let (pieces, count) = match memory {
                Memory::One(piece) => {
                    one = piece;
                    (&raw const one, 1)
                }
                Memory::Many(pieces, count) => (pieces, count as i32),
            };
            let (fd, pieces) = (file.as_fd().as_raw_fd(), pieces.cast::<libc::iovec>());
            let offset = offset as libc::off_t;
            let count = if write {
                // SAFETY: the pieces are laid out as `iovec`, and the work that made this call keeps
                // them and the memory they name until it is told the outcome.
                unsafe { libc::pwritev(fd, pieces, count, offset) }
            } else {
                // SAFETY: as above; the memory is valid for writes too.
                unsafe { libc::preadv(fd, pieces, count, offset) }
            };
            usize::try_from(count).map_err(|_| io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestBuf, OpenOptions};

    /// What is cut when it is pushed is not made at once in one piece.
    #[test]
    fn write_that_is_too_long_for_small_folios_is_not_made_at_once() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let mut file = File::open(temp.path(), options).unwrap();
        file.write_max = 16 << 10;
        let mut engine = SyncEngine::new(vec![Arc::new(file)]);
        for (len, is_made) in [(16 << 10, true), ((16 << 10) + 512, false)] {
            let buf = GuestBuf::zeroed(len);
            let done = engine.perform_now(Quick::Write { file: FileIndex(0), offset: 0, buf: buf.view() });
            assert_eq!(done, is_made, "{len}");
            assert_eq!(temp.as_file().metadata().unwrap().len(), 16 << 10);
        }
    }
}
