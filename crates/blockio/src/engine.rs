//! What an I/O engine is: operations go in, completions come out.

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc, time::Duration};

use crate::{Buffer, Error, File, GuestView, sync::SyncEngine, uring::UringEngine};

/// Index into the files that an engine was made with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileIndex(pub u8);

/// A way to zero a range. Where one fails the next is taken: a device says only when it is asked that it can't unmap or wants whole
/// sectors. What the page cache had of the range is gone by then, and until it is zeroed what the medium has is read. Whoever must
/// not have that read, writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It is deallocated.
    Unmap,
    /// It stays allocated.
    Keep,
    /// Zeroes are written.
    Write,
}

/// One operation. Offsets and lengths are in bytes.
///
/// On a direct file, `offset` and length of reads and writes must be multiples of
/// [`Alignment::offset`](crate::Alignment); memory may lie anywhere.
#[derive(Debug)]
pub enum Op {
    /// Fills all of `buf` from `offset` on.
    Read {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// Where to; its length is the operation's.
        buf: Buffer,
    },
    /// Writes all of `buf` from `offset` on.
    Write {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// What; its length is the operation's.
        buf: Buffer,
    },
    /// `fdatasync`: what was complete before this was pushed is on stable storage afterwards.
    SyncData {
        /// The file.
        file: FileIndex,
    },
    /// Deallocates a range, which reads as zeros afterwards; the file keeps its size. A device may turn out to be unable to, or
    /// unable at the end of a range: then the same holds as for a [`Zero`](Op::Zero) that fails, which can follow.
    Punch {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes a range inside the file read as zeros; if need be they are written. Where this fails, any part of what the page
    /// cache had of a device may be gone: what is read then may be older than what was written.
    Zero {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Which way is tried first.
        how: Zeroing,
    },
    /// Has a range share the blocks of the same range of another file: see [`File::share_from`]. Done inside of
    /// [`submit`](Engine::submit), which may wait for it.
    Share {
        /// The file that is changed.
        file: FileIndex,
        /// The other one.
        from: FileIndex,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Op {
    /// The file that the operation is on.
    pub fn file(&self) -> FileIndex {
        match self {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::SyncData { file }
            | Op::Punch { file, .. }
            | Op::Zero { file, .. }
            | Op::Share { file, .. } => *file,
        }
    }

    /// First byte (0 for a sync).
    pub fn offset(&self) -> u64 {
        match self {
            Op::Read { offset, .. }
            | Op::Write { offset, .. }
            | Op::Punch { offset, .. }
            | Op::Zero { offset, .. }
            | Op::Share { offset, .. } => *offset,
            Op::SyncData { .. } => 0,
        }
    }

    /// Bytes (0 for a sync).
    pub fn len(&self) -> u64 {
        match self {
            Op::Read { buf, .. } | Op::Write { buf, .. } => buf.len() as u64,
            Op::Punch { len, .. } | Op::Zero { len, .. } | Op::Share { len, .. } => *len,
            Op::SyncData { .. } => 0,
        }
    }

    /// Whether the operation is on no bytes at all (true for a sync).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn into_buf(self) -> Option<Buffer> {
        match self {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            _ => None,
        }
    }
}

/// A read or write that need not wait, of a guest's memory. Offsets are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Quick<'a> {
    /// Fills all of `buf` from `offset` on.
    Read {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// Where to.
        buf: GuestView<'a>,
    },
    /// Writes all of `buf` from `offset` on.
    Write {
        /// The file.
        file: FileIndex,
        /// First byte.
        offset: u64,
        /// What.
        buf: GuestView<'a>,
    },
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion {
    /// The token that the operation was pushed with.
    pub token: u64,
    /// `Ok` only if every byte was transferred.
    pub result: io::Result<()>,
    /// The buffer of a read or write.
    pub buf: Option<Buffer>,
}

/// Performs operations on a fixed list of files, in no particular order.
///
/// - A completion is `Ok` only if every byte was transferred. A read that hits the end of the file
///   fails with `UnexpectedEof`.
/// - Nothing that was pushed is started before [`submit`](Engine::submit), whatever else is called.
/// - Dropping an engine waits for the I/O that the kernel has begun; what had not begun never happens.
pub trait Engine: Send + fmt::Debug {
    /// Makes a read or write at once if that is sure to be quick: data in the page cache. `false`: it was not
    /// made, or not wholly, or failed; nothing is promised of its bytes, and [`push`](Engine::push) is to do it.
    fn perform_now(&mut self, _quick: Quick<'_>) -> bool {
        false
    }

    /// Says that a [quick](Engine::perform_now) read at `offset` comes soon. Costs next to nothing.
    fn expect_read(&self, _file: FileIndex, _offset: u64) {}

    /// Takes an operation; never refuses. It completes with `token`.
    fn push(&mut self, token: u64, op: Op);

    /// Starts everything that was pushed. What cannot be started completes with an error.
    ///
    /// Call [`reap`](Engine::reap) once between this and waiting on
    /// [`completion_fd`](Engine::completion_fd): the descriptor does not tell of an operation that
    /// never reached the kernel because the ring itself is broken.
    fn submit(&mut self);

    /// Appends what is complete to `done`, or some of it: then the descriptor stays readable. Never blocks.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Waits until `reap` has something to append, nothing that was submitted is in flight, or
    /// `timeout` is over.
    ///
    /// # Errors
    /// If the wait itself fails; what is in flight stays so.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Operations that were pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Readable when there may be something to reap; never to be read from. `None`: everything
    /// completes inside `submit`.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// Which engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// io_uring: asynchronous.
    IoUring,
    /// Plain system calls inside `submit`: the fallback, and the oracle of tests.
    Sync,
}

/// Makes an engine for `files`, of which [`FileIndex`] names one. Up to `depth` operations are at
/// work at once (the kernel may allow fewer); more are queued.
///
/// # Errors
/// If there are more than 256 files, or the kernel cannot or must not provide an io_uring.
pub fn new_engine(kind: EngineKind, depth: u32, files: Vec<Arc<File>>) -> Result<Box<dyn Engine>, Error> {
    let path = files.first().map(|file| file.path().to_owned()).unwrap_or_default();
    let fail = |error| Error::new("set up an I/O engine for", &path, error);
    if files.len() > usize::from(u8::MAX) + 1 {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "more than 256 files")));
    }
    match kind {
        EngineKind::IoUring => Ok(Box::new(UringEngine::new(depth, files).map_err(fail)?)),
        EngineKind::Sync => Ok(Box::new(SyncEngine::new(files))),
    }
}
