//! The drain: base content back into pending blocks, in disk order, several runs in flight.
//!
//! Crash order, step 7: a run is claimed, copied (or punched, where the base has a hole) and released while its
//! P bits stay; after the batch's sync the bits are cleared of blocks that no guest has claimed
//! meanwhile, if no session ended meanwhile. The base is checked before that: what was copied from a
//! base that changed is not restored. Runs that can't be copied hold up no others.
//!
//! What is durable at the end counts, and writing back takes longest. So the kernel is asked to begin with it
//! while copying goes on, and a batch is as large as the [pace](crate::pace) allows.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base_image::{Content, Urgency};
use blockio::{AlignedBuf, Buffer, Completion, Engine, Op};
use blocks::{BLOCK_SIZE, BlockRange, Extent};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::Error;
use crate::claims::{DrainClaim, Room, Waker};
use crate::pace::{Pace, Speed};
use crate::shared::{BASE, DISK, Shared};

/// Longest run that is claimed at once, in blocks: 256 KiB.
const RUN_BLOCKS_MAX: u64 = 64;
/// Runs that are being copied at once.
const IN_FLIGHT_RUNS_MAX: usize = 64;
/// Blocks that are copied before the kernel is asked to write them back: 8 MiB.
const WRITE_BACK_BLOCKS: u64 = 2048;
/// Bytes of memory that are kept for the next runs.
const SPARE_BYTES_MAX: usize = 2 << 20;

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
    /// Whether all pending blocks that are left are claimed by others.
    pub(crate) blocked: bool,
}

/// Memory of runs that are done, by its length, for those to come.
#[derive(Debug, Default)]
struct Spare {
    of_len: BTreeMap<usize, Vec<AlignedBuf>>,
    bytes: usize,
}

impl Spare {
    /// `len` bytes with whatever content.
    fn take(&mut self, len: usize) -> AlignedBuf {
        match self.of_len.get_mut(&len).and_then(Vec::pop) {
            Some(buf) => {
                self.bytes -= len;
                buf
            }
            None => AlignedBuf::new_zeroed(len),
        }
    }

    fn put(&mut self, buf: Option<Buffer>) {
        if let Some(Buffer::Owned(buf)) = buf
            && self.bytes + buf.len() <= SPARE_BYTES_MAX
        {
            self.bytes += buf.len();
            self.of_len.entry(buf.len()).or_default().push(buf);
        }
    }
}

/// Copies base content into pending blocks. There is only one of a disk.
#[derive(Debug)]
pub(crate) struct Drain {
    shared: Arc<Shared>,
    engine: Box<dyn Engine>,
    waker: Arc<Waker>,
    runs: Vec<Option<Run>>,
    free_runs: Vec<usize>,
    pieces: Vec<Option<Piece>>,
    free_pieces: Vec<usize>,
    spare: Spare,
    /// Runs that are copied and still claimed.
    copied_runs: Vec<Extent>,
    /// Where the next batch begins to look for pending blocks.
    cursor: u64,
    pace: Pace,
    /// What the pace's clock counts from.
    began: Instant,
    in_flight_bytes: u64,
    in_flight_runs: usize,
    /// The first failure of a batch, and how many runs have failed.
    error: Option<Error>,
    failed_runs: usize,
    copied_blocks: u64,
}

impl Drain {
    /// # Errors
    /// If the disk has a drain already, or there is no engine for one.
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self, Error> {
        if !shared.claims.begin_drain() {
            return Err(Error::WrongState("the disk is being drained already"));
        }
        let claims = Arc::clone(&shared);
        Self::with_claims(shared).inspect_err(|_| claims.claims.end_drain())
    }

    fn with_claims(shared: Arc<Shared>) -> Result<Self, Error> {
        let engine = shared.new_engine(IN_FLIGHT_RUNS_MAX as u32, Urgency::Background)?;
        let waker =
            Waker::new().map_err(|error| Error::state("make a wake-up for", shared.disk.path(), error))?;
        Ok(Self {
            shared,
            engine,
            waker,
            runs: Vec::new(),
            free_runs: Vec::new(),
            pieces: Vec::new(),
            free_pieces: Vec::new(),
            spare: Spare::default(),
            copied_runs: Vec::new(),
            cursor: 0,
            pace: Pace::default(),
            began: Instant::now(),
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

    /// Copies pending blocks, from where the last batch has come to, syncs, and takes them out of P. Returns when
    /// there are no more up to the end of the disk, the batch is full, or `stop` is set (then nothing is synced
    /// or cleared). `busy` says whether guests have requests under way. `copied` is told how many
    /// blocks were copied, again and again.
    ///
    /// # Errors
    /// The first of those that kept runs from being copied; all others are restored nevertheless.
    pub(crate) fn batch(
        &mut self,
        stop: &AtomicBool,
        busy: &dyn Fn() -> bool,
        copied: &mut dyn FnMut(u64),
    ) -> Result<Batch, Error> {
        self.shared.check_base()?;
        if self.shared.is_poisoned() {
            return Err(Error::Poisoned(self.shared.disk.path().to_owned()));
        }
        self.shared.claims.forget_copied();
        (self.error, self.failed_runs) = (None, 0);
        let mut batch = Batch::default();
        let (first, mut cursor) = (self.cursor, self.cursor);
        let (mut started, mut exhausted) = (0, false);
        let (mut written_back, mut to_write_back) = (first, 0);
        let (mut claimed, mut completions) = (Vec::new(), Vec::new());
        let mut stint_began = self.began.elapsed();
        loop {
            let speed = self.pace.speed(busy(), self.began.elapsed());
            let may_claim = !speed.by_stints || self.in_flight_runs == 0;
            while may_claim
                && !exhausted
                && self.failed_runs < FAILED_RUNS_MAX
                && let Some(room) = self.room(speed, started)
                && !stop.load(Ordering::Acquire)
            {
                let shared = Arc::clone(&self.shared);
                let end =
                    shared.claims.claim_pending(&shared.pending, cursor, room, &self.waker, &mut claimed);
                for run in claimed.drain(..) {
                    cursor = run.end();
                    started += run.count();
                    to_write_back += run.count();
                    self.start(run);
                }
                exhausted = !matches!(end, DrainClaim::Claimed(_));
                batch.blocked = end == DrainClaim::Blocked && first == 0;
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
            self.release_copied();
            copied(std::mem::take(&mut self.copied_blocks));
            if to_write_back >= WRITE_BACK_BLOCKS {
                // What is in flight still is written back later.
                self.start_write_back(Extent::between(written_back, cursor));
                (written_back, to_write_back) = (cursor, 0);
            }
            if self.in_flight_runs == 0 {
                stint_began = self.rest_since(stint_began);
            }
        }
        self.cursor = if exhausted { 0 } else { cursor };
        if stop.load(Ordering::Acquire) {
            return Err(Error::Stopped);
        }
        if started > 0 {
            let began = self.began.elapsed();
            self.shared.sync_disk()?;
            self.shared.check_base()?;
            let good = || !self.shared.is_poisoned();
            batch.restored = self.shared.claims.settle(&self.shared.pending, good);
            self.shared.live.set_pending(self.shared.pending.count());
            self.rest_since(began);
        }
        self.error.take().map_or(Ok(batch), Err)
    }

    /// What may be claimed besides what is being copied, in a batch that has `started` so many blocks.
    fn room(&self, speed: Speed, started: u64) -> Option<Room> {
        let bytes = speed.in_flight_bytes.checked_sub(self.in_flight_bytes).filter(|left| *left > 0)?;
        let runs = IN_FLIGHT_RUNS_MAX.checked_sub(self.in_flight_runs).filter(|left| *left > 0)?;
        let blocks = speed.batch_blocks.checked_sub(started).filter(|left| *left > 0)?;
        let run_blocks = RUN_BLOCKS_MAX.min(speed.in_flight_bytes / BLOCK_SIZE);
        Some(Room { runs, blocks: blocks.min(bytes.div_ceil(BLOCK_SIZE)), run_blocks })
    }

    /// Rests after what was begun at `began`, if guests work. Nothing may be claimed. Returns when that was over.
    fn rest_since(&self, began: Duration) -> Duration {
        let now = self.began.elapsed();
        let rest = self.pace.rest(now.saturating_sub(began), now);
        if rest.is_zero() {
            return now;
        }
        std::thread::sleep(rest);
        self.began.elapsed()
    }

    /// Gives back what was copied.
    fn release_copied(&mut self) {
        self.shared.claims.release_copied(&self.copied_runs);
        self.copied_runs.clear();
    }

    /// Asks the kernel to begin to write back what lies in `blocks`. A hint: the sync vouches.
    fn start_write_back(&self, blocks: Extent) {
        if let Some(bytes) = self.shared.geometry.bytes_of(blocks) {
            self.shared.disk.start_write_back(bytes.offset(), bytes.len());
        }
    }

    /// Begins to copy a claimed run.
    fn start(&mut self, extent: Extent) {
        let run = Run { extent, parts: 1, failed: false };
        let index = match self.free_runs.pop() {
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
                        let buf = Buffer::Owned(self.spare.take(len as usize));
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
            Ok(()) => self.spare.put(completion.buf),
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

    /// The last part of a run lets it be released; its P bits stay until the batch is synced.
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
            self.copied_runs.push(run.extent);
            self.copied_blocks += run.extent.count();
        }
        *place = None;
        self.free_runs.push(index);
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
        let held = self.runs.iter().flatten().map(|run| run.extent);
        let held: Vec<Extent> = held.chain(self.copied_runs.iter().copied()).collect();
        self.shared.claims.release(&held);
        self.shared.claims.forget_copied();
        self.shared.claims.end_drain();
    }
}
