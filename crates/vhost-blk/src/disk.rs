//! What the device asks of a disk, as traits: the session disk behind them in the program, a disk
//! in memory in this crate's tests.

use std::{error::Error, os::fd::BorrowedFd, sync::Arc};

use blockio::{GuestView, in_full};
use blocks::{BlockRange, Geometry};
use session_disk::{DiskQueue, Done, ProcessId, Request, SessionDisk, SessionStart, SessionSummary};
use uuid::Uuid;

use crate::limit::RateLimit;

/// An error whose kind does not matter here: it is shown, or becomes an I/O error of the guest.
pub(crate) type AnyError = Box<dyn Error + Send + Sync>;

/// What does not change about a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskTraits {
    pub(crate) geometry: Geometry,
    /// Answer to GET_ID: ASCII, padded with NUL.
    pub(crate) serial: [u8; 20],
    /// Smallest I/O without read-modify-write, in bytes.
    pub(crate) logical_block_size: u32,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
}

/// A disk that can be served.
pub(crate) trait Disk: Send + Sync {
    fn traits(&self) -> DiskTraits;
    fn queue(&self, depth: u32) -> Result<Box<dyn DiskIo>, AnyError>;
    fn begin_session(&self, owner: Option<ProcessId>) -> Result<SessionStart, AnyError>;
    /// Fails if no session could begin after the one that is open, as far as can be known.
    fn may_begin(&self) -> Result<(), AnyError>;
    fn end_session(&self) -> Result<SessionSummary, AnyError>;
    fn set_owner(&self, owner: Option<ProcessId>);
    /// Who owns the open session, as far as is known.
    fn owner(&self) -> Option<ProcessId>;
    /// The token of the in-flight table of the open session's frontend.
    fn token(&self) -> Option<Uuid>;
    fn set_token(&self, token: Option<Uuid>);
    /// Whether the guest that is served, or whose session is open, has chosen the write-through mode.
    fn is_write_through(&self) -> bool;
    fn set_write_through(&self, chosen: bool);
    /// Sequence number of the session that is open.
    fn open_session(&self) -> Option<u64>;
    fn session_is_open(&self) -> bool {
        self.open_session().is_some()
    }
    /// Why no session can begin, if that is known before a frontend tries.
    fn turns_away(&self) -> Option<String>;
    /// The process at whose end that is over by itself, by [`release`](Self::release).
    fn held_for(&self) -> Option<ProcessId>;
    fn release_if_over(&self) -> Result<bool, AnyError>;
}

/// A finished request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    pub(crate) token: u64,
    pub(crate) outcome: Outcome,
}

/// How a request ended, or a part of it; of several the last one of these counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// Every byte was transferred.
    #[default]
    Done,
    Failed,
    /// It failed because the program is to end: the next one can do it.
    Left,
}

/// The data path of one virtqueue.
pub(crate) trait DiskIo: Send {
    /// Reads at once, if that need not wait. `false`: it is to be pushed.
    fn read_now(&mut self, range: BlockRange, buf: GuestView<'_>) -> bool;
    /// Says that a read is going to be asked for.
    fn expect_read(&self, _range: BlockRange) {}
    /// Writes at once, if that need not wait. `false`: it is to be pushed.
    fn write_now(&mut self, range: BlockRange, buf: GuestView<'_>, durable: bool) -> bool;
    /// Whether a write was refused only because it is not logged: it can be tried again after
    /// `log_announced`.
    fn announce(&mut self, range: BlockRange) -> bool;
    /// Logs everything that was announced.
    fn log_announced(&mut self);
    /// Takes a request that cannot be done at once; nothing is submitted before `submit`.
    fn push(&mut self, token: u64, request: Request);
    /// Whether it has less to do than it should have at a time. If not, it will be told when something is done.
    fn has_room(&self) -> bool;
    fn submit(&mut self);
    /// Appends finished requests; never blocks.
    fn reap(&mut self, done: &mut Vec<Finished>);
    /// Requests pushed and not yet reaped.
    fn in_flight(&self) -> usize;
    /// Blocks until every request is finished, and appends them.
    fn quiesce(&mut self, done: &mut Vec<Finished>);
    /// Readable when `reap` has something to do.
    fn wait_fds(&self) -> Vec<BorrowedFd<'_>>;
}

impl Disk for Arc<SessionDisk> {
    fn traits(&self) -> DiskTraits {
        // A guest keeps what it was offered when its session began, and its frontend asks for that again, though the storage may
        // have lost it since, as a device does that fails to unmap. Then zeroes are written.
        let goes_on = self.session_is_open();
        DiskTraits {
            geometry: self.geometry(),
            serial: self.serial(),
            logical_block_size: self.logical_block_size(),
            discard: goes_on || self.supports_discard(),
            write_zeroes: goes_on || self.supports_write_zeroes(),
        }
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn DiskIo>, AnyError> {
        let queue = SessionDisk::queue(self, depth)?;
        Ok(Box::new(SessionIo { queue, done: Vec::with_capacity(depth as usize), errors: RateLimit::new() }))
    }

    fn begin_session(&self, owner: Option<ProcessId>) -> Result<SessionStart, AnyError> {
        Ok(SessionDisk::begin_session(self, owner)?)
    }

    fn may_begin(&self) -> Result<(), AnyError> {
        Ok(SessionDisk::may_begin(self)?)
    }

    fn end_session(&self) -> Result<SessionSummary, AnyError> {
        Ok(SessionDisk::end_session(self)?)
    }

    fn set_owner(&self, owner: Option<ProcessId>) {
        SessionDisk::set_owner(self, owner);
    }

    fn open_session(&self) -> Option<u64> {
        SessionDisk::open_session(self)
    }

    fn turns_away(&self) -> Option<String> {
        SessionDisk::turns_away(self).map(|error| error.to_string())
    }

    fn held_for(&self) -> Option<ProcessId> {
        SessionDisk::held_for(self)
    }

    fn release_if_over(&self) -> Result<bool, AnyError> {
        Ok(SessionDisk::release_if_over(self)?.is_some())
    }

    fn owner(&self) -> Option<ProcessId> {
        SessionDisk::session_owner(self)
    }

    fn token(&self) -> Option<Uuid> {
        SessionDisk::token(self)
    }

    fn set_token(&self, token: Option<Uuid>) {
        SessionDisk::set_token(self, token);
    }

    fn is_write_through(&self) -> bool {
        SessionDisk::is_write_through(self)
    }

    fn set_write_through(&self, chosen: bool) {
        SessionDisk::set_write_through(self, chosen);
    }
}

/// A session disk's queue, with its errors logged (a guest only learns that there was one).
struct SessionIo {
    queue: DiskQueue,
    done: Vec<Done>,
    errors: RateLimit,
}

impl SessionIo {
    fn report(&mut self, finished: &mut Vec<Finished>) {
        for done in self.done.drain(..) {
            let outcome = match &done.result {
                Ok(()) => Outcome::Done,
                Err(error) if done.is_left() => {
                    self.errors
                        .warn(|| format!("a guest's request is not done any more: {}", in_full(error)));
                    Outcome::Left
                }
                Err(error) => {
                    self.errors.warn(|| format!("the guest gets an I/O error: {}", in_full(error)));
                    Outcome::Failed
                }
            };
            finished.push(Finished { token: done.token, outcome });
        }
    }
}

impl DiskIo for SessionIo {
    fn read_now(&mut self, range: BlockRange, buf: GuestView<'_>) -> bool {
        self.queue.read_now(range, buf)
    }

    fn expect_read(&self, range: BlockRange) {
        self.queue.expect_read(range);
    }

    fn write_now(&mut self, range: BlockRange, buf: GuestView<'_>, durable: bool) -> bool {
        self.queue.write_now(range, buf, durable)
    }

    fn announce(&mut self, range: BlockRange) -> bool {
        self.queue.announce(range)
    }

    fn log_announced(&mut self) {
        self.queue.log_announced();
    }

    fn push(&mut self, token: u64, request: Request) {
        self.queue.push_later(token, request);
    }

    fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    fn submit(&mut self) {
        self.queue.submit();
    }

    fn reap(&mut self, done: &mut Vec<Finished>) {
        self.queue.reap(&mut self.done);
        self.report(done);
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    fn quiesce(&mut self, done: &mut Vec<Finished>) {
        self.queue.quiesce(&mut self.done);
        self.report(done);
    }

    fn wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.queue.wait_fds()
    }
}
