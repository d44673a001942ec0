//! The drain: base content back into pending blocks, in disk order, several runs in flight.
//!
//! Crash order, step 7: a run is claimed, copied (or punched, where the base has a hole) and released while its
//! P bits stay; after the batch's sync the bits are cleared of blocks that no guest has claimed
//! meanwhile, if no session ended meanwhile. The base is checked before that: what was copied from a
//! base that changed is not restored. Runs that can't be copied hold up no others.
//!
//! What is durable at the end counts, and writing back takes longest. So the kernel is asked to begin with it
//! while copying goes on, and a batch is as large as the [pace](crate::pace) allows.
//!
//! Where the file system can, blocks are shared instead of copied ([`ways`](crate::ways), [`pieces`]). To the crash order that is
//! a write: the run is claimed, the kernel has replaced its extents when the call returns, and the batch's sync makes that
//! durable. It is a change of metadata alone. `fdatasync` has to make it durable too, for without it what is read later
//! would be wrong; such a batch gets an `fsync` all the same, which costs nothing more then.

mod pieces;
mod write_back;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockio::{AlignedBuf, Buffer, Engine, in_full};
use blocks::{BLOCK_SIZE, Extent};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use self::pieces::{Piece, Run};
use self::write_back::WriteBack;
use crate::Error;
use crate::claims::{DrainClaim, Room, Waker};
use crate::pace::{Guests, Pace, Pause, Speed};
use crate::shared::Shared;
use crate::ways::Sharing;

/// Longest run that is claimed at once, in blocks: 256 KiB.
const RUN_BLOCKS_MAX: u64 = 64;
/// The same while blocks may be shared: 2 MiB.
const SHARED_RUN_BLOCKS_MAX: u64 = 512;
/// Runs that are being copied at once.
const IN_FLIGHT_RUNS_MAX: usize = 64;
/// Blocks that are copied before the kernel is asked to write them back: 8 MiB.
const WRITE_BACK_BLOCKS: u64 = 2048;
/// How long at once it sleeps where it has to look whether it is to stop.
const SLEEP_MAX: Duration = Duration::from_millis(20);
/// How long a batch lasts at most, but for what is in flight then: what is not synced yet is copied again by the next drain if
/// this one is stopped, and a slow server's gigabyte takes long.
const BATCH_TIME_MAX: Duration = Duration::from_secs(10);
/// Bytes of memory that are kept for the next runs.
const SPARE_BYTES_MAX: usize = 2 << 20;

/// How long to wait when all that is left is claimed by guests' writes, if no release comes first.
const BLOCKED_WAIT_MAX: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Runs that fail in a batch before it is given up: the storage is gone.
const FAILED_RUNS_MAX: usize = 256;

/// How a batch ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Blocks that are restored: copied, synced, no longer pending.
    pub(crate) restored: u64,
    /// Whether all pending blocks that are left are claimed by others.
    pub(crate) blocked: bool,
    /// How long nothing is to be restored, for guests are at work.
    pub(crate) wait: Option<Duration>,
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
    write_back: WriteBack,
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
    /// The first one that is [still to be said](Self::judge).
    first_error: Option<Error>,
    failed_runs: usize,
    copied_blocks: u64,
    /// Blocks that were restored, and of which nobody has taken note yet.
    restored: u64,
    /// Whether blocks were shared since the last sync.
    has_shared: bool,
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
        let engine = shared.new_drain_engine(IN_FLIGHT_RUNS_MAX as u32)?;
        let waker =
            Waker::new().map_err(|error| Error::state("make a wake-up for", shared.disk.path(), error))?;
        // A base that is no file is a server, to which many requests have to be under way.
        let waits = shared.disk.is_direct() || shared.base.file().is_none();
        let pace = Pace::new(shared.drain_policy, waits);
        shared.ways().ask_again();
        let shared_cursor = shared.drain_cursor.swap(0, Ordering::Relaxed);
        Ok(Self {
            shared,
            engine,
            waker,
            runs: Vec::new(),
            free_runs: Vec::new(),
            pieces: Vec::new(),
            free_pieces: Vec::new(),
            spare: Spare::default(),
            write_back: WriteBack::default(),
            copied_runs: Vec::new(),
            cursor: shared_cursor,
            pace,
            began: Instant::now(),
            in_flight_bytes: 0,
            in_flight_runs: 0,
            error: None,
            first_error: None,
            failed_runs: 0,
            copied_blocks: 0,
            restored: 0,
            has_shared: false,
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
    /// there are no more up to the end of the disk, the batch is full or has lasted long, guests are to be left alone, or `stop` is set (then
    /// nothing is synced or cleared). `guests` says what they do. `copied` is told how many blocks were copied, again and
    /// again.
    ///
    /// # Errors
    /// The first of those that kept runs from being copied; all others are restored nevertheless.
    pub(crate) fn batch(
        &mut self,
        stop: &AtomicBool,
        guests: &dyn Fn() -> Guests,
        copied: &mut dyn FnMut(u64),
    ) -> Result<Batch, Error> {
        (self.error, self.failed_runs) = (None, 0);
        let was_touched = self.shared.check_base()?;
        if self.shared.is_poisoned() {
            return Err(self.shared.poisoned_error());
        }
        self.shared.claims.forget_copied();
        // Nobody waits for a server any more who is to stop.
        self.probe().map_err(|error| if stop.load(Ordering::Acquire) { Error::Stopped } else { error })?;
        let mut batch = Batch::default();
        let (first, mut cursor) = (self.cursor, self.cursor);
        let (mut started, mut exhausted) = (0, false);
        let (mut written_back, mut to_write_back) = (first, 0);
        let (mut claimed, mut completions) = (Vec::new(), Vec::new());
        let batch_began = self.began.elapsed();
        let mut stint_began = batch_began;
        loop {
            let now = self.began.elapsed();
            let (speed, pause) = self.pace.turn(guests(), now);
            let is_late = now.saturating_sub(batch_began) > BATCH_TIME_MAX && started > 0;
            let may_claim = !is_late && pause.is_none() && (!speed.by_stints || self.in_flight_runs == 0);
            while may_claim
                && !exhausted
                && self.failed_runs < FAILED_RUNS_MAX
                && !self.is_base_away()
                && let Some(room) = self.room(speed, started)
                && !stop.load(Ordering::Acquire)
            {
                let shared = Arc::clone(&self.shared);
                let end =
                    shared.claims.claim_pending(&shared.pending, cursor, room, &self.waker, &mut claimed);
                let mut left = claimed.drain(..);
                for run in left.by_ref() {
                    cursor = run.end();
                    started += run.count();
                    to_write_back += run.count();
                    self.start(run);
                    if self.is_base_away() {
                        break;
                    }
                }
                // They would wait for the same server, one after the other.
                let left: Vec<_> = left.collect();
                shared.claims.release(&left);
                exhausted = !matches!(end, DrainClaim::Claimed(_));
                batch.blocked = end == DrainClaim::Blocked && first == 0;
            }
            if self.in_flight_runs == 0 {
                let is_full = is_late || started >= speed.batch_blocks;
                let is_over = exhausted || is_full || stop.load(Ordering::Acquire);
                match pause {
                    Some(Pause::Rate(time)) if !is_over => {
                        std::thread::sleep(time.min(SLEEP_MAX));
                        continue;
                    }
                    Some(Pause::Guests(time)) => batch.wait = Some(time),
                    _ => {}
                }
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
                self.start_write_back(Extent::between(written_back, cursor), speed);
                (written_back, to_write_back) = (cursor, 0);
            }
            if !speed.by_stints {
                self.write_back.turn(&self.shared.disk);
            }
            if self.in_flight_runs == 0 {
                stint_began = self.rest_since(stint_began);
            }
        }
        self.write_back.forget();
        self.cursor = if exhausted { 0 } else { cursor };
        if stop.load(Ordering::Acquire) {
            return Err(Error::Stopped);
        }
        if started > 0 {
            let began = self.began.elapsed();
            if std::mem::take(&mut self.has_shared) {
                self.shared.sync_disk_and_times()?;
            } else {
                self.shared.sync_disk()?;
            }
            if was_touched || !self.shared.check_base()? {
                let good = || !self.shared.is_poisoned();
                batch.restored = self.shared.claims.settle(&self.shared.pending, good);
            } else {
                // It was not known that nothing may be shared, nor a hole believed: once more.
                self.cursor = first;
            }
            self.restored += batch.restored;
            self.shared.live.set_pending(self.shared.pending.count());
            self.rest_since(began);
        }
        self.error.take().map_or(Ok(batch), Err)
    }

    /// What becomes of an attempt after the outcome of a batch: that runs could not be copied is said when the end of the disk is
    /// reached, for what lies behind them is copied first. `gives_up`: or as soon as they are many; the next drain goes on behind
    /// them.
    pub(crate) fn judge(&mut self, batch: Result<Batch, Error>, gives_up: bool) -> Result<Batch, Error> {
        let error = match batch {
            Ok(batch) if !self.is_at_the_beginning() => return Ok(batch),
            Ok(batch) => return self.first_error.take().map_or(Ok(batch), Err),
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => error,
        };
        let are_many = self.failed_runs >= FAILED_RUNS_MAX;
        if self.may_go_on() && !(gives_up && are_many) {
            if self.first_error.is_none() {
                let disk = self.shared.disk.path().display();
                log::warn!("{disk}: some blocks can't be restored, the rest is first: {}", in_full(&error));
                self.first_error = Some(error);
            }
            return Ok(Batch::default());
        }
        self.shared.drain_cursor.store(self.cursor, Ordering::Relaxed);
        Err(self.first_error.take().unwrap_or(error))
    }

    /// Whether the last batch has come to the end of the disk, and the next one begins anew.
    fn is_at_the_beginning(&self) -> bool {
        self.cursor == 0
    }

    /// Whether a batch that failed left something behind what it could not copy, and the next one may do better with that.
    fn may_go_on(&self) -> bool {
        self.failed_runs > 0
            && self.in_flight_runs == 0
            && !self.is_at_the_beginning()
            && !self.shared.is_poisoned()
            && self.shared.base.trouble().is_none()
    }

    /// Reads the next block that is pending if the base's server is away as far as is known: nothing is claimed before it is back,
    /// so that who wants to write there need not wait for that.
    fn probe(&self) -> Result<(), Error> {
        let shared = &self.shared;
        let next = || shared.pending.next_run(self.cursor, 1).or_else(|| shared.pending.next_run(0, 1));
        if shared.base.trouble().is_some()
            && let Some(offset) = next().map(|next| next.first() * BLOCK_SIZE)
        {
            let inside = shared.base.bytes_inside(offset, BLOCK_SIZE);
            shared.base.read_at(&mut AlignedBuf::new_zeroed(inside as usize), offset)?;
        }
        Ok(())
    }

    /// Whether runs could not be copied because the base's server is away: nor can any others.
    fn is_base_away(&self) -> bool {
        self.failed_runs > 0 && self.shared.base.trouble().is_some()
    }

    /// How many blocks batches have restored since this was asked last, those that failed included.
    pub(crate) fn take_restored(&mut self) -> u64 {
        std::mem::take(&mut self.restored)
    }

    /// What may be claimed besides what is being copied, in a batch that has `started` so many blocks.
    fn room(&self, speed: Speed, started: u64) -> Option<Room> {
        let sharing = self.shared.ways().sharing();
        let at_once =
            if sharing == Sharing::Works { speed.in_flight_shared_bytes } else { speed.in_flight_bytes };
        let bytes = at_once.checked_sub(self.in_flight_bytes).filter(|left| *left > 0)?;
        let runs = IN_FLIGHT_RUNS_MAX.checked_sub(self.in_flight_runs).filter(|left| *left > 0)?;
        let blocks = speed.batch_blocks.checked_sub(started).filter(|left| *left > 0)?;
        let allowed = Some(self.pace.allowance() / BLOCK_SIZE).filter(|left| *left > 0)?;
        let run_blocks = match sharing {
            Sharing::Off => RUN_BLOCKS_MAX.min(at_once / BLOCK_SIZE),
            // Only a long run can be shared, and so tell whether any can.
            Sharing::Untried | Sharing::Works => {
                SHARED_RUN_BLOCKS_MAX.min(speed.in_flight_shared_bytes / BLOCK_SIZE)
            }
        };
        let run_blocks = run_blocks.min(allowed);
        Some(Room { runs, blocks: blocks.min(bytes.div_ceil(BLOCK_SIZE)).min(allowed), run_blocks })
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

    /// Asks the kernel to begin to write back what lies in `blocks`. A hint: the sync vouches. While guests work this
    /// waits: how long it takes is how long the device is busy with it, and so how long to rest.
    fn start_write_back(&mut self, blocks: Extent, speed: Speed) {
        let Some(bytes) = self.shared.geometry.bytes_of(blocks) else { return };
        if speed.by_stints {
            self.write_back.begin(&self.shared.disk, bytes);
        } else {
            self.write_back.push(bytes);
        }
    }
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

#[cfg(test)]
mod tests;
