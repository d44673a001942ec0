//! The drain: base content back into pending blocks, in disk order, several runs in flight.
//!
//! Crash order, step 7: a run is claimed, copied (or punched, where the base has a hole) and released while its
//! P bits stay; after the batch's sync the bits are cleared of blocks that no guest has claimed
//! meanwhile, if no session ended meanwhile. The base is checked before that: what was copied from a
//! base that changed is not restored. Runs that can't be copied hold up no others.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base_image::{Content, Urgency};
use blockio::{AlignedBuf, Buffer, Completion, Engine, Op};
use blocks::{BlockRange, Extent};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::Error;
use crate::claims::{DrainClaim, Waker};
use crate::shared::{BASE, DISK, Shared};

/// Longest run that is claimed at once, in blocks: 1 MiB.
const RUN_BLOCKS_MAX: u64 = 256;
/// Bytes that are being copied at once.
const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// Runs that are being copied at once.
const IN_FLIGHT_RUNS_MAX: usize = 128;
/// Blocks after which a batch is synced: 256 MiB.
const BATCH_BLOCKS_MAX: u64 = 65536;

/// How long to wait when all that is left is claimed by guests' writes, if no release comes first.
const BLOCKED_WAIT_MAX: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Runs that fail in a batch before it is given up: the storage is gone.
const FAILED_RUNS_MAX: usize = 256;

/// A run that is being copied.
#[derive(Debug)]
struct Run {
    extent: Extent,
    /// Operations that are not finished.
    parts: u32,
    failed: bool,
}

/// A piece of a run that is being copied; its number is the token of its operation.
#[derive(Debug, Clone, Copy)]
struct Piece {
    run: usize,
    offset: u64,
    /// The base's content is in the buffer, the disk's turn is next.
    reading: bool,
}

/// How a batch ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Blocks that are restored: copied, synced, no longer pending.
    pub(crate) restored: u64,
    /// Whether pending blocks were left that others have claimed.
    pub(crate) blocked: bool,
}

/// Copies base content into pending blocks.
#[derive(Debug)]
pub(crate) struct Drain {
    shared: Arc<Shared>,
    engine: Box<dyn Engine>,
    waker: Arc<Waker>,
    runs: Vec<Option<Run>>,
    pieces: Vec<Option<Piece>>,
    free_pieces: Vec<usize>,
    in_flight_bytes: u64,
    in_flight_runs: usize,
    /// The first failure of a batch, and how many runs have failed.
    error: Option<Error>,
    failed_runs: usize,
    copied_blocks: u64,
}

impl Drain {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self, Error> {
        let engine = shared.new_engine(IN_FLIGHT_RUNS_MAX as u32, Urgency::Background)?;
        let waker =
            Waker::new().map_err(|error| Error::state("make a wake-up for", shared.disk.path(), error))?;
        Ok(Self {
            shared,
            engine,
            waker,
            runs: Vec::new(),
            pieces: Vec::new(),
            free_pieces: Vec::new(),
            in_flight_bytes: 0,
            in_flight_runs: 0,
            error: None,
            failed_runs: 0,
            copied_blocks: 0,
        })
    }

    /// Waits until blocks that blocked a batch are released, for a bounded time.
    pub(crate) fn wait_for_a_release(&self) -> Result<(), Error> {
        let mut fds = [PollFd::new(&self.waker, PollFlags::IN)];
        match poll(&mut fds, Some(&BLOCKED_WAIT_MAX)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::state("wait for", shared_path(&self.shared), error.into())),
        }
        self.waker.consume();
        Ok(())
    }

    /// Copies pending blocks from the start of the disk on, syncs, and takes them out of P. Returns when none is left,
    /// the batch is full, or `stop` is set (then nothing is synced or cleared). `copied` is told how
    /// many blocks were copied, again and again.
    ///
    /// # Errors
    /// The first of those that kept runs from being copied; all others are restored nevertheless.
    pub(crate) fn batch(&mut self, stop: &AtomicBool, copied: &mut dyn FnMut(u64)) -> Result<Batch, Error> {
        self.shared.check_base()?;
        if self.shared.is_poisoned() {
            return Err(Error::Poisoned(self.shared.disk.path().to_owned()));
        }
        self.shared.claims.forget_copied();
        (self.error, self.failed_runs) = (None, 0);
        let mut batch = Batch::default();
        let mut cursor = 0;
        let mut started = 0;
        let mut exhausted = false;
        let mut completions = Vec::new();
        loop {
            while !exhausted
                && self.failed_runs < FAILED_RUNS_MAX
                && started < BATCH_BLOCKS_MAX
                && self.in_flight_bytes < IN_FLIGHT_BYTES_MAX
                && self.in_flight_runs < IN_FLIGHT_RUNS_MAX
                && !stop.load(Ordering::Acquire)
            {
                let shared = Arc::clone(&self.shared);
                match shared.claims.claim_pending(&shared.pending, cursor, RUN_BLOCKS_MAX, &self.waker) {
                    DrainClaim::Claimed(extent) => {
                        cursor = extent.end();
                        started += extent.count();
                        self.start(extent);
                    }
                    DrainClaim::Blocked => {
                        batch.blocked = true;
                        exhausted = true;
                    }
                    DrainClaim::Nothing => exhausted = true,
                }
            }
            if self.in_flight_runs == 0 {
                break;
            }
            self.engine.submit();
            if self.engine.in_flight() > 0 {
                self.engine
                    .wait(None)
                    .map_err(|e| Error::state("wait for I/O on", shared_path(&self.shared), e))?;
            }
            self.engine.reap(&mut completions);
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            copied(std::mem::take(&mut self.copied_blocks));
        }
        if stop.load(Ordering::Acquire) {
            return Err(Error::Stopped);
        }
        if started > 0 {
            self.shared.sync_disk()?;
            self.shared.check_base()?;
            let good = || !self.shared.is_poisoned();
            batch.restored = self.shared.claims.settle(&self.shared.pending, good);
            self.shared.live.set_pending(self.shared.pending.count());
        }
        self.error.take().map_or(Ok(batch), Err)
    }

    /// Begins to copy a claimed run.
    fn start(&mut self, extent: Extent) {
        let run = Run { extent, parts: 1, failed: false };
        let index = match self.runs.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.runs.push(None);
                self.runs.len() - 1
            }
        };
        if let Some(place) = self.runs.get_mut(index) {
            *place = Some(run);
        }
        self.in_flight_runs += 1;
        if let Some(bytes) = self.shared.geometry.bytes_of(extent) {
            self.in_flight_bytes += bytes.len();
            if let Err(error) = self.push_pieces(index, bytes) {
                self.fail(index, error);
            }
        }
        self.part_done(index);
    }

    /// Cuts a run into what the base has as data and what it has as holes.
    fn push_pieces(&mut self, run: usize, bytes: BlockRange) -> Result<(), Error> {
        let mut offset = bytes.offset();
        while offset < bytes.end() {
            let len = match self.shared.base.content_at(offset, bytes.end() - offset)? {
                Content::Hole(len) => {
                    self.push_zeroes(run, offset, len)?;
                    len
                }
                Content::Data(len) => {
                    let inside = self.shared.base.bytes_inside(offset, len);
                    if inside == len {
                        let buf = Buffer::Owned(AlignedBuf::new_zeroed(len as usize));
                        self.push(run, true, Op::Read { file: BASE, offset, buf });
                    } else {
                        // The run in which the base ends: its tail is zero.
                        let mut buf = AlignedBuf::new_zeroed(len as usize);
                        self.shared.base.read_at(&mut buf, offset)?;
                        self.push(run, false, write(offset, Buffer::Owned(buf)));
                    }
                    len
                }
            };
            offset += len;
        }
        Ok(())
    }

    /// A hole where the disk can have one, zeroes elsewhere.
    fn push_zeroes(&mut self, run: usize, offset: u64, len: u64) -> Result<(), Error> {
        let disk = &self.shared.disk;
        let op = if disk.supports_punch() {
            Op::Punch { file: DISK, offset, len }
        } else if disk.supports_zero() {
            Op::Zero { file: DISK, offset, len, may_unmap: true }
        } else {
            write(offset, Buffer::Owned(AlignedBuf::new_zeroed(len as usize)))
        };
        self.push(run, false, op);
        Ok(())
    }

    fn push(&mut self, run: usize, reading: bool, op: Op) {
        let piece = Some(Piece { run, offset: op.offset(), reading });
        let index = match self.free_pieces.pop() {
            Some(index) => index,
            None => {
                self.pieces.push(None);
                self.pieces.len() - 1
            }
        };
        if let Some(place) = self.pieces.get_mut(index) {
            *place = piece;
        }
        if let Some(Some(run)) = self.runs.get_mut(run) {
            run.parts += 1;
        }
        self.engine.push(index as u64, op);
    }

    fn complete(&mut self, completion: Completion) {
        let index = completion.token as usize;
        let Some(piece) = self.pieces.get_mut(index).and_then(Option::take) else { return };
        self.free_pieces.push(index);
        match completion.result {
            Err(error) => {
                let file = if piece.reading { self.shared.base.path() } else { shared_path(&self.shared) };
                let operation = if piece.reading { "read" } else { "write" };
                let error = Error::state(operation, file, error);
                self.fail(piece.run, error);
            }
            Ok(()) if piece.reading => match completion.buf {
                Some(buf) => self.push(piece.run, false, write(piece.offset, buf)),
                None => self.fail(piece.run, Error::WrongState("an engine kept the buffer of a read")),
            },
            Ok(()) => {}
        }
        self.part_done(piece.run);
    }

    fn fail(&mut self, run: usize, error: Error) {
        self.error.get_or_insert(error);
        if let Some(Some(run)) = self.runs.get_mut(run) {
            self.failed_runs += usize::from(!run.failed);
            run.failed = true;
        }
    }

    /// The last part of a run releases it; its P bits stay until the batch is synced.
    fn part_done(&mut self, index: usize) {
        let Some(place) = self.runs.get_mut(index) else { return };
        let Some(run) = place else { return };
        run.parts -= 1;
        if run.parts > 0 {
            return;
        }
        self.in_flight_runs -= 1;
        self.in_flight_bytes -= self.shared.geometry.bytes_of(run.extent).map_or(0, BlockRange::len);
        if run.failed {
            self.shared.claims.release(&[run.extent]);
        } else {
            self.shared.claims.release_copied(run.extent);
            self.copied_blocks += run.extent.count();
        }
        *place = None;
    }
}

fn write(offset: u64, buf: Buffer) -> Op {
    Op::Write { file: DISK, offset, buf, dsync: false }
}

fn shared_path(shared: &Shared) -> &Path {
    shared.disk.path()
}

impl Drop for Drain {
    fn drop(&mut self) {
        // What was begun lands before the claims are given up: an engine waits for it when it goes.
        if let Ok(idle) = blockio::new_engine(blockio::EngineKind::Sync, 1, Vec::new()) {
            drop(std::mem::replace(&mut self.engine, idle));
        }
        let held: Vec<Extent> = self.runs.iter().flatten().map(|run| run.extent).collect();
        self.shared.claims.release(&held);
        self.shared.claims.forget_copied();
    }
}
