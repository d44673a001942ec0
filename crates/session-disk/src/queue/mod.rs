//! The data path of one virtqueue: requests in, operations on disk and base, answers out.
//!
//! Crash order, as far as it is kept here (the numbers are the design's):
//!
//! 1. *Write to a clean block*: [`DiskQueue::write_clean`] stages it, [`DiskQueue::submit`] makes the
//!    intent durable, appends the record (log, live page, L: [`Shared::own`]), then submits the data. Or
//!    it is [announced](DiskQueue::announce), logged in the same way, and written when its blocks are in L.
//! 2. *Whole pending block*: [`DiskQueue::start_write`] claims, looks at P again and makes the intent
//!    durable; the data is submitted; when all of it is written [`DiskQueue::take_blocks`] appends the record, clears
//!    P and releases. A record first would vouch for old content if we were killed between the two.
//! 3. *Part of a pending block*: the same, with a read of the base into a bounce block before.
//! 4. *Write-zeroes* goes the same ways. *Discard* only affects whole blocks that the session owns.
//! 5. *Mixed requests* are split; the answer waits for all parts, and what failed stays pending.
//! 6. *Read*: per run, pending blocks from the base, others from the disk. P only shrinks while a session runs. Blocks that left P
//!    by steps 2 and 3 and [are not known to be durable](crate::unsynced) go by way of a bounce buffer, and the guest gets them if the
//!    kernel has not failed to write back any of the disk; those that were made to read as zeroes, once a sync has succeeded.
//!
//! In steady state (nothing pending, the block owned) a request costs two looks at bitmaps and one
//! operation: no lock, no allocation.

mod ahead;
mod prepare;
mod read;
mod slots;
mod write;
mod zeroed;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use base_image::Urgency;
use blockio::{AlignedBuf, Buffer, Completion, Engine, GuestBuf, GuestView, Op, Quick, Zeroing};
use blocks::{BlockRange, Extent};
use rustix::event::{PollFd, PollFlags, poll};

use self::ahead::Ahead;
use self::prepare::Preparation;
use self::slots::Slots;
use self::write::Bounce;
use self::zeroed::ZeroedReads;
use crate::Error;
use crate::claims::Waker;
use crate::helper::Helper;
use crate::request::{Data, Done, Request, Write};
use crate::shared::{DISK, FlushPolicy, QueueCounters, Shared};

/// Set in the token of an operation that reads into a bounce buffer; the rest is its number.
const BOUNCE: u64 = 1 << 63;
/// The token of the sync that reads of zeroes wait for.
const SYNC: u64 = 1 << 62;

/// When more than so much is being read into bounce buffers, no further request is begun, and no more is read there of those that are.
const BOUNCED_BYTES_MAX: usize = 4 << 20;

/// When more operations are on their way, no further request is begun: one request over blocks that are
/// pending here and there becomes many operations, and memory must not grow with what guests ask.
const OPERATIONS_MAX: usize = 4096;

/// When requests about more bytes have been begun, no further one is: who ends a connection waits for them.
const BYTES_MAX: u64 = 256 << 20;

/// The data path of one virtqueue. Used by one thread at a time. Waits for I/O in [`DiskQueue::quiesce`] only (and where
/// no thread is to be had, with a session's first writes for what has to be durable before them).
///
/// A pass is: any number of requests, each done [at once](Self::read_now) or [pushed](Self::push), one [`submit`](Self::submit), one
/// [`reap`](Self::reap). When a descriptor of [`wait_fds`](Self::wait_fds) becomes readable, `reap`
/// again. Dropping it waits for all I/O.
#[derive(Debug)]
pub struct DiskQueue {
    shared: Arc<Shared>,
    counters: Arc<QueueCounters>,
    engine: Box<dyn Engine>,
    slots: Slots,
    /// What is read into bounce buffers, each of so many bytes.
    bounces: Vec<Option<(Bounce, usize)>>,
    free_bounces: Vec<usize>,
    /// Bytes of all of them.
    bounced_bytes: usize,
    /// Bytes of the requests that have been begun and are not finished.
    begun_bytes: u64,
    /// Blocks to log before what was announced is written.
    announced: Vec<Extent>,
    /// Blocks to log before anything of `staged` is submitted.
    first_touches: Vec<Extent>,
    staged: Vec<(usize, Op)>,
    /// Slots whose writes wait for claims, oldest first.
    parked: VecDeque<usize>,
    waker: Arc<Waker>,
    /// Writes that wait for what has to be durable before.
    preparation: Preparation,
    /// Reads of zeroes that wait for a sync.
    zeroed_reads: ZeroedReads,
    /// Requests that wait until fewer operations are on their way.
    deferred: VecDeque<(usize, Request)>,
    /// Rests of reads for which there was no room.
    cut: VecDeque<(usize, BlockRange, GuestBuf)>,
    /// Slots whose data is on the disk and whose pending blocks wait for their record.
    to_take: Vec<usize>,
    completions: Vec<Completion>,
    ready: Vec<Done>,
    /// Operations pushed to the engine and not submitted.
    unsubmitted: bool,
    bytes_written: u64,
    /// Where reading ahead is up to us.
    ahead: Option<Ahead>,
    /// Who asks the kernel for it: that can take as long as a read of the disk. Made when there is something to ask for.
    reader: Option<Helper<BlockRange>>,
    /// Whether something was taken since the last [`reap`](Self::reap).
    in_pass: bool,
}

fn failed(kind: io::ErrorKind) -> io::Error {
    io::Error::from(kind)
}

impl DiskQueue {
    pub(crate) fn new(shared: Arc<Shared>, counters: Arc<QueueCounters>, depth: u32) -> Result<Self, Error> {
        let engine = shared.new_engine(depth, Urgency::Guest)?;
        shared.disk.map_resident(shared.redo.as_ref());
        // An engine that waits would not show which reads have to: there the kernel goes on to read ahead.
        let ahead = (shared.is_asynchronous() && shared.disk.keep_folios_small()).then(Ahead::default);
        let no_waker = |error| Error::state("make a wake-up for", shared.disk.path(), error);
        let (waker, preparation) = (Waker::new().map_err(no_waker)?, Preparation::new().map_err(no_waker)?);
        Ok(Self {
            shared,
            counters,
            engine,
            slots: Slots::default(),
            bounces: Vec::new(),
            free_bounces: Vec::new(),
            bounced_bytes: 0,
            begun_bytes: 0,
            announced: Vec::new(),
            first_touches: Vec::new(),
            staged: Vec::new(),
            parked: VecDeque::new(),
            waker,
            preparation,
            zeroed_reads: ZeroedReads::default(),
            deferred: VecDeque::new(),
            cut: VecDeque::new(),
            to_take: Vec::new(),
            completions: Vec::new(),
            ready: Vec::new(),
            unsubmitted: false,
            bytes_written: 0,
            ahead,
            reader: None,
            in_pass: false,
        })
    }

    /// Reads `range` at once, if that need not wait: it is in the page cache, and nothing of it is pending.
    /// `false`: nothing is promised about the content of `buf`; [`push`](Self::push) it.
    pub fn read_now(&mut self, range: BlockRange, buf: GuestView<'_>) -> bool {
        let done = buf.len() as u64 == range.len()
            && self.enter()
            && self.is_clean(range.touched())
            && !self.shared.unsynced.intersects(range.touched())
            && self.engine.perform_now(Quick::Read { file: DISK, offset: range.offset(), buf });
        if done
            && let Some(ahead) = &mut self.ahead
            && ahead.follows()
        {
            let window = ahead.hit(range.offset(), range.len());
            self.read_ahead(window);
        }
        done
    }

    /// Says that [`read_now`](Self::read_now) will be asked for `range` soon.
    pub fn expect_read(&self, range: BlockRange) {
        self.engine.expect_read(DISK, range.offset());
    }

    /// Writes `range` at once, if that need not wait: nothing of it is pending, and this session's log has all of
    /// it. `false`: some of it may be written; [`push`](Self::push) it.
    pub fn write_now(&mut self, range: BlockRange, buf: GuestView<'_>, durable: bool) -> bool {
        let touched = range.touched();
        let done = buf.len() as u64 == range.len()
            && !(durable && self.shared.flush == FlushPolicy::Always)
            && self.enter()
            && self.is_clean(touched)
            && self.shared.owned.contains_all(touched)
            && self.engine.perform_now(Quick::Write { file: DISK, offset: range.offset(), buf });
        if done {
            self.bytes_written += range.len();
        }
        done
    }

    /// Says that `range` is going to be written. `true`: [`write_now`](Self::write_now) has refused that only because
    /// the log has not all of it, and can be asked again after [`log_announced`](Self::log_announced).
    pub fn announce(&mut self, range: BlockRange) -> bool {
        let touched = range.touched();
        let is_first = self.enter()
            && self.is_clean(touched)
            && !self.shared.owned.contains_all(touched)
            && self.is_prepared(touched);
        if is_first {
            let missing = self.shared.owned.mixed_runs(touched).filter(|(owned, _)| !owned);
            self.announced.extend(missing.map(|(_, run)| run));
        }
        is_first
    }

    /// Logs what was announced, in one record. If that fails, its writes are still refused: pushed, they fail.
    pub fn log_announced(&mut self) {
        let mut announced = std::mem::take(&mut self.announced);
        if let Err(error) = self.log_extents(&mut announced) {
            log::debug!("{}: not logged: {error}", self.shared.disk.path().display());
        }
        announced.clear();
        self.announced = announced;
    }

    /// Begins a pass, if it has not begun; whether requests are taken.
    fn enter(&mut self) -> bool {
        if !self.in_pass {
            self.in_pass = true;
            // Counted before looking whether a session is open: a session end closes, then counts.
            self.counters.in_flight.store(self.in_flight(), Ordering::SeqCst);
            // Nobody else adds.
            let passes = self.counters.passes.load(Ordering::Relaxed);
            self.counters.passes.store(passes.wrapping_add(1), Ordering::Relaxed);
        }
        self.shared.open.load(Ordering::SeqCst) && !self.shared.is_poisoned()
    }

    /// Whether no block of `touched` is pending. P only shrinks while a session runs.
    fn is_clean(&self, touched: Extent) -> bool {
        self.shared.pending.is_empty() || !self.shared.pending.intersects(touched)
    }

    /// Takes a request; its answer comes out of [`reap`](Self::reap) with `token`. What need not wait is done at
    /// once, everything else not before [`submit`](Self::submit).
    pub fn push(&mut self, token: u64, request: Request) {
        let done = match &request {
            Request::Read { range, buf } => self.read_now(*range, buf.view()),
            Request::Write { range, buf, durable } => self.write_now(*range, buf.view(), *durable),
            _ => false,
        };
        if done {
            self.ready.push(Done { token, result: Ok(()) });
        } else {
            self.push_later(token, request);
        }
    }

    /// Takes a request that [`read_now`](Self::read_now) or [`write_now`](Self::write_now) has left.
    pub fn push_later(&mut self, token: u64, request: Request) {
        let is_open = self.enter();
        let slot = self.slots.take(token);
        if !is_open {
            self.part_done(slot, Err(failed(io::ErrorKind::NotConnected)));
        } else if self.is_full() {
            self.deferred.push_back((slot, request));
        } else {
            self.start(slot, request);
        }
    }

    /// Whether no further request is begun.
    fn is_full(&self) -> bool {
        self.engine.in_flight() > OPERATIONS_MAX
            || self.bounced_bytes > BOUNCED_BYTES_MAX
            || self.begun_bytes > BYTES_MAX
    }

    /// Whether further requests would be begun. If not, those that are pushed wait, and more had better not be.
    pub fn has_room(&self) -> bool {
        self.deferred.is_empty() && !self.is_full()
    }

    /// Makes operations of a request.
    fn start(&mut self, slot: usize, request: Request) {
        if let (Some(state), Some(range)) = (self.slots.get_mut(slot), request.range()) {
            state.bytes = range.len();
            self.begun_bytes += range.len();
        }
        match request {
            Request::Read { range, buf } => self.read(slot, range, buf),
            Request::Write { range, buf, durable } => {
                if buf.len() as u64 == range.len() {
                    self.bytes_written += range.len();
                    self.start_write(slot, Write { range, data: Data::Guest(buf), durable });
                } else {
                    self.fail(slot, failed(io::ErrorKind::InvalidInput));
                }
            }
            Request::WriteZeroes { range, may_unmap, durable } => {
                let how = if may_unmap { Zeroing::Unmap } else { Zeroing::Keep };
                self.start_write(slot, Write { range, data: Data::Zeroes(how), durable });
            }
            Request::Discard { range } => self.discard(slot, range),
            Request::Flush => match self.shared.flush {
                FlushPolicy::Always => self.push_sync(slot),
                FlushPolicy::Auto => {
                    if let Err(error) = self.shared.ask_written_back() {
                        self.fail(slot, error);
                    }
                }
                FlushPolicy::Never => {}
            },
        }
        self.part_done(slot, Ok(()));
    }

    /// Ends a pass: one append to the log for all first touches, then one submission of everything.
    pub fn submit(&mut self) {
        self.begin_preparing();
        if !self.staged.is_empty() {
            self.log_first_touches();
        }
        self.submit_operations();
        self.counters.bytes_written.store(self.bytes_written, Ordering::Relaxed);
    }

    fn submit_operations(&mut self) {
        if self.unsubmitted {
            self.unsubmitted = false;
            self.engine.submit();
        }
    }

    /// Appends the finished requests to `done`, and submits what follows from what was finished. Never
    /// waits for I/O.
    pub fn reap(&mut self, done: &mut Vec<Done>) {
        self.in_pass = false;
        loop {
            self.complete();
            self.go_on_with_reads();
            while !self.is_full()
                && let Some((slot, request)) = self.deferred.pop_front()
            {
                self.start(slot, request);
            }
            self.take_prepared();
            if !self.parked.is_empty() && self.waker.consume() {
                self.retry_parked();
            }
            self.take_blocks();
            // What was finished last may have made room for what waits.
            let can_start = !self.deferred.is_empty() && !self.is_full()
                || !self.cut.is_empty() && self.bounced_bytes <= BOUNCED_BYTES_MAX
                || self.preparation.is_wanted();
            if !self.unsubmitted && self.staged.is_empty() && !can_start {
                break;
            }
            self.submit();
        }
        done.append(&mut self.ready);
        self.counters.in_flight.store(self.in_flight(), Ordering::SeqCst);
    }

    /// Requests that were pushed and whose answers were not yet taken; one more while a pass has not ended.
    pub fn in_flight(&self) -> usize {
        self.slots.in_use() + self.ready.len() + usize::from(self.in_pass)
    }

    /// Fails every write that waits for claims, or may have to when it is prepared. Claims of other queues are only given back
    /// when those are reaped, so when nobody does that any more, waiting would never end.
    pub fn cancel_parked(&mut self) {
        let unprepared = self.preparation.cancel();
        for slot in self.parked.drain(..).chain(unprepared).collect::<Vec<_>>() {
            if let Some(state) = self.slots.get_mut(slot) {
                state.parked = None;
            }
            self.part_done(slot, Err(failed(io::ErrorKind::Interrupted)));
        }
        self.wait_no_more();
    }

    /// Waits until every request is finished and appends all answers to `done`. The other queues
    /// must be served meanwhile, or [`cancel_parked`](Self::cancel_parked) be called before.
    pub fn quiesce(&mut self, done: &mut Vec<Done>) {
        self.submit();
        self.reap(done);
        while self.in_flight() > 0 {
            let mut fds: Vec<PollFd<'_>> =
                self.wait_fds().into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            if let Err(error) = poll(&mut fds, None)
                && error != rustix::io::Errno::INTR
            {
                log::error!("waiting for I/O on {}: {error}", self.shared.disk.path().display());
            }
            self.reap(done);
        }
    }

    /// Readable when [`reap`](Self::reap) has something to do.
    pub fn wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.engine
            .completion_fd()
            .into_iter()
            .chain([self.waker.as_fd(), self.preparation.as_fd()])
            .collect()
    }

    /// Step 4: gives up whole blocks that the session owns. Anything else would make the disk dirty
    /// for nothing. Where the storage refuses they are zeroed: it has dropped what the page cache had of them by then, and
    /// what is on the medium may be an earlier session's (invariant 2).
    fn discard(&mut self, slot: usize, range: BlockRange) {
        let shared = Arc::clone(&self.shared);
        for (owned, run) in shared.owned.mixed_runs(shared.geometry.covered(range)) {
            if !owned {
                continue;
            }
            if let Some(part) = shared.geometry.bytes_of(run) {
                let how = self.zeroes_unsynced(slot, run).unwrap_or(Zeroing::Unmap);
                self.push_part(slot, Op::Zero { file: DISK, offset: part.offset(), len: part.len(), how });
            }
        }
    }

    fn push_sync(&mut self, slot: usize) {
        if let Some(state) = self.slots.get_mut(slot) {
            state.is_sync = true;
        }
        self.shared.live.begin_asking();
        self.push_part(slot, Op::SyncData { file: DISK });
    }

    /// Hands an operation to the engine as a part of the request in `slot`.
    fn push_part(&mut self, slot: usize, op: Op) {
        if let Some(state) = self.slots.get_mut(slot) {
            state.parts += 1;
        }
        self.push_op(slot as u64, op);
    }

    fn push_op(&mut self, token: u64, op: Op) {
        self.unsubmitted = true;
        self.engine.push(token, op);
    }

    /// Notes a failure of the request in `slot`; it is answered when its parts are done.
    fn fail(&mut self, slot: usize, error: io::Error) {
        if let Some(state) = self.slots.get_mut(slot)
            && state.error.is_none()
        {
            state.error = Some(error);
        }
    }

    /// Takes finished operations from the engine.
    fn complete(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.reap(&mut completions);
        for completion in completions.drain(..) {
            if completion.token == SYNC {
                self.give_zeroed(&completion.result);
            } else if completion.token & BOUNCE == 0 {
                self.part_done(completion.token as usize, completion.result);
            } else {
                let bounce = match completion.buf {
                    Some(Buffer::Owned(buf)) => Some(buf),
                    _ => None,
                };
                self.bounced((completion.token & !BOUNCE) as usize, completion.result, bounce);
            }
        }
        self.completions = completions;
    }

    /// One part of the request in `slot` is done; the last one finishes it or sends it on.
    fn part_done(&mut self, slot: usize, result: io::Result<()>) {
        if let Err(error) = result {
            self.fail(slot, error);
        }
        let Some(state) = self.slots.get_mut(slot) else { return };
        state.parts -= 1;
        if state.parts > 0 {
            return;
        }
        // Also of what was pending: before that leaves P. A sync that began before now vouches for none of it.
        state.zeroed.drain(..).for_each(|extent| self.shared.note_zeroed(extent));
        if state.is_sync {
            // It says nothing of what somebody else was told.
            self.shared.report.wait();
            match &state.error {
                Some(_) => self.shared.poison(),
                None if self.shared.is_poisoned() => {
                    state.error = Some(io::Error::other(self.shared.poisoned_error()))
                }
                None => {}
            }
            self.shared.live.end_asking();
            if state.error.is_some() {
                return self.finish(slot);
            }
        }
        if state.error.is_none() && std::mem::take(&mut state.sync_after) {
            return self.push_sync(slot);
        }
        if state.error.is_none() && !state.taking.is_empty() {
            self.to_take.push(slot);
        } else {
            self.finish(slot);
        }
    }

    /// Answers the request in `slot` and gives back what it held.
    fn finish(&mut self, slot: usize) {
        let Some(state) = self.slots.get_mut(slot) else { return };
        self.begun_bytes -= state.bytes;
        self.shared.claims.release(&state.claimed);
        state.claimed.clear();
        state.taking.clear();
        let result = state.error.take().map_or(Ok(()), Err);
        self.ready.push(Done { token: state.token, result });
        self.slots.put_back(slot);
    }

    /// Reads `block` of the base into a bounce block, with a read of its own if the base has all of it.
    fn bounce_from_base(&mut self, block: BlockRange) -> io::Result<(AlignedBuf, bool)> {
        if !self.shared.base_is_good() {
            return Err(failed(io::ErrorKind::StaleNetworkFileHandle));
        }
        let mut bounce = AlignedBuf::new_zeroed(block.len() as usize);
        let inside = self.shared.base.bytes_inside(block.offset(), block.len());
        if inside == block.len() {
            return Ok((bounce, true));
        }
        // The one block in which the base ends.
        self.shared.base.read_at(&mut bounce, block.offset()).map_err(io::Error::other)?;
        Ok((bounce, false))
    }
}

impl Drop for DiskQueue {
    fn drop(&mut self) {
        // Claims of requests on their way must not outlive them.
        let mut unanswered = Vec::new();
        self.cancel_parked();
        self.quiesce(&mut unanswered);
        self.counters.in_flight.store(0, Ordering::SeqCst);
        self.counters.bytes_written.store(0, Ordering::Relaxed);
        self.shared.bytes_of_gone_queues.fetch_add(self.bytes_written, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
