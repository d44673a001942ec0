//! What a write becomes: steps 1 to 5 of the crash order (see the module above).

use std::io;
use std::sync::Arc;

use blockio::{AlignedBuf, Buffer, FileIndex, FileKind, GuestBuf, Op, Zeroing, in_full};
use blocks::{BlockRange, Extent};

use super::{BOUNCE, DiskQueue, failed};
use crate::request::{Data, Write};
use crate::shared::{BASE, DISK, FlushPolicy, NO_LOG};

/// A bounce buffer on its way.
#[derive(Debug)]
pub(super) enum Bounce {
    /// Part of a pending block is being written.
    Fill(Fill),
    /// A read of `range`, which may not be durable, for the request `slot`, into `buf`.
    Read { slot: usize, range: BlockRange, buf: GuestBuf },
}

/// What becomes of a bounce block that the base was read into.
#[derive(Debug)]
pub(super) struct Fill {
    /// The request.
    slot: usize,
    /// The whole block.
    block: BlockRange,
    /// The part of it that is written.
    part: BlockRange,
    /// With what.
    data: Data,
}

impl DiskQueue {
    /// Begins a write, or parks it until it is prepared.
    pub(super) fn start_write(&mut self, slot: usize, write: Write) {
        if write.durable
            && self.shared.flush == FlushPolicy::Always
            && let Some(state) = self.slots.get_mut(slot)
        {
            state.sync_after = true;
        }
        let touched = write.range.touched();
        if self.shared.owned.contains_all(touched) || self.is_prepared(touched) {
            self.start_prepared(slot, write);
        } else {
            self.park_unprepared(slot, write);
        }
    }

    /// Begins a write, or parks it until the claims that it needs are free.
    pub(super) fn start_prepared(&mut self, slot: usize, write: Write) {
        let touched = write.range.touched();
        let shared = Arc::clone(&self.shared);
        if self.is_clean(touched) {
            return self.write_clean(slot, write.range, write.data);
        }
        // The data of pending blocks is on its way before their record is.
        if !shared.can_log() {
            return self.fail(slot, io::Error::other(NO_LOG));
        }
        let Some(state) = self.slots.get_mut(slot) else { return };
        state.claimed.clear();
        state
            .claimed
            .extend(shared.pending.mixed_runs(touched).filter(|(pending, _)| *pending).map(|(_, run)| run));
        if !shared.claims.try_claim(&state.claimed, &self.waker) {
            state.claimed.clear();
            state.parts += 1;
            state.parked = Some(write);
            self.parked.push_back(slot);
            return;
        }
        // Looked at again: what was drained or taken before we had the claim is not pending any more.
        for (pending, run) in shared.pending.mixed_runs(touched) {
            let Some(part) = write.range.within(run) else { continue };
            let Some(data) = write.data.part(write.range, part) else {
                return self.fail(slot, failed(io::ErrorKind::InvalidInput));
            };
            if pending {
                self.write_pending(slot, run, part, data);
            } else {
                self.write_clean(slot, part, data);
            }
        }
    }

    /// Begins the parked writes again, oldest first; those that still get no claims park again.
    pub(super) fn retry_parked(&mut self) {
        for _ in 0..self.parked.len() {
            let Some(slot) = self.parked.pop_front() else { return };
            let Some(write) = self.slots.get_mut(slot).and_then(|state| state.parked.take()) else {
                continue;
            };
            self.start_prepared(slot, write);
            self.part_done(slot, Ok(()));
        }
        self.wait_no_more();
    }

    /// If nothing is parked any more, takes back a wake-up that nobody would consume: its descriptor
    /// would stay readable, and the worker awake.
    pub(super) fn wait_no_more(&self) {
        if self.parked.is_empty() {
            self.shared.claims.stop_waiting(&self.waker);
            self.waker.consume();
        }
    }

    /// Step 1: blocks that are not pending. Those that the session does not own yet are staged, to be
    /// logged at the end of the pass.
    fn write_clean(&mut self, slot: usize, range: BlockRange, data: Data) {
        let touched = range.touched();
        let data = match data {
            Data::Zeroes(how) => Data::Zeroes(self.zeroes_unsynced(slot, touched).unwrap_or(how)),
            data => data,
        };
        let op = data_op(range, data);
        if self.shared.owned.contains_all(touched) {
            return self.push_part(slot, op);
        }
        let missing = self.shared.owned.mixed_runs(touched).filter(|(owned, _)| !owned).map(|(_, run)| run);
        self.first_touches.extend(missing);
        if let Some(state) = self.slots.get_mut(slot) {
            state.parts += 1;
        }
        self.staged.push((slot, op));
    }

    /// `touched`, of which nothing is pending, is to read as zeroes. If some of it was not durable, what is on the medium may be an
    /// earlier session's, and its own data now never gets there. Then this says how, if there is only one way: a device
    /// that fails to zero it has dropped what the page cache had, so that zeroes are written over that.
    pub(super) fn zeroes_unsynced(&mut self, slot: usize, touched: Extent) -> Option<Zeroing> {
        if !self.shared.unsynced.intersects(touched) {
            return None;
        }
        // From now on: another queue may read it while that is on its way.
        self.shared.note_zeroed(touched);
        if let Some(state) = self.slots.get_mut(slot) {
            state.zeroed.push(touched);
        }
        (self.shared.disk.kind() == FileKind::BlockDevice).then_some(Zeroing::Write)
    }

    /// The rest of step 1, for all staged writes of a pass: intents, record, live page, L; only
    /// then the data. If any of it fails, nothing changes and the writes fail (invariant 6).
    pub(super) fn log_first_touches(&mut self) {
        let mut staged = std::mem::take(&mut self.staged);
        let mut extents = std::mem::take(&mut self.first_touches);
        let logged = self.log_extents(&mut extents);
        extents.clear();
        self.first_touches = extents;
        match logged {
            Ok(()) => {
                for (slot, op) in staged.drain(..) {
                    self.push_op(slot as u64, op);
                }
            }
            Err(error) => {
                // Whoever asked is told all of it, and limits what a guest can have logged.
                let message = format!("not logged: {}", in_full(&error));
                log::debug!("{}: a write fails: {message}", self.shared.disk.path().display());
                for (slot, _) in staged.drain(..) {
                    self.part_done(slot, Err(io::Error::new(error.kind(), message.clone())));
                }
            }
        }
        // The vector goes back for its room; nothing staged anything meanwhile.
        if self.staged.is_empty() {
            self.staged = staged;
        }
    }

    /// The middle of step 1: intents, then record, live page and L.
    pub(super) fn log_extents(&self, extents: &mut Vec<Extent>) -> io::Result<()> {
        if !self.shared.can_log() {
            return Err(io::Error::other(NO_LOG));
        }
        Extent::normalize(extents);
        extents
            .iter()
            .try_for_each(|extent| self.shared.intents.ensure(*extent).map_err(io::Error::other))
            .and_then(|()| self.shared.own(extents))
    }

    /// Steps 2 and 3 up to the data: a claimed run of pending blocks, of which `part` is written.
    fn write_pending(&mut self, slot: usize, run: Extent, part: BlockRange, data: Data) {
        if let Err(error) = self.shared.intents.ensure(run) {
            log::debug!("{}: a write fails: {}", self.shared.disk.path().display(), in_full(&error));
            return self.fail(slot, io::Error::other(error));
        }
        let zeroes = matches!(data, Data::Zeroes(_));
        let whole = self.shared.geometry.covered(part).intersection(run);
        // At most one partly covered block at either side of the wholly covered ones.
        let (head, tail) = if whole.is_empty() {
            (part.touched(), Extent::new(run.end(), 0))
        } else {
            (Extent::between(run.first(), whole.first()), Extent::between(whole.end(), run.end()))
        };
        let edges = [head, tail];
        let single_blocks =
            edges.iter().flat_map(|e| (e.first()..e.end()).map(|block| Extent::new(block, 1)));
        for block in single_blocks {
            self.fill_block(slot, block, part, &data);
        }
        if let Some(inner) = part.within(whole) {
            match data.part(part, inner) {
                Some(data) => self.push_part(slot, data_op(inner, data)),
                None => self.fail(slot, failed(io::ErrorKind::InvalidInput)),
            }
        }
        if let Some(state) = self.slots.get_mut(slot) {
            state.taking.push(run);
            if zeroes {
                state.zeroed.push(run);
            }
        }
    }

    /// Step 3: the base's content of a partly written block goes into a bounce block first.
    fn fill_block(&mut self, slot: usize, block: Extent, part: BlockRange, data: &Data) {
        let Some(bytes) = self.shared.geometry.bytes_of(block) else { return };
        let Some(inner) = part.within(block) else { return };
        let Some(data) = data.part(part, inner) else {
            return self.fail(slot, failed(io::ErrorKind::InvalidInput));
        };
        let fill = Fill { slot, block: bytes, part: inner, data };
        match self.bounce_from_base(bytes) {
            Err(error) => self.fail(slot, error),
            Ok((bounce, read)) => {
                if let Some(state) = self.slots.get_mut(slot) {
                    state.parts += 1;
                }
                if read {
                    self.push_bounced(Bounce::Fill(fill), BASE, bytes.offset(), bounce);
                } else {
                    self.write_filled(fill, bounce);
                }
            }
        }
    }

    /// Has a bounce buffer read.
    pub(super) fn push_bounced(&mut self, what: Bounce, file: FileIndex, offset: u64, bounce: AlignedBuf) {
        let index = self.free_bounces.pop().unwrap_or_else(|| {
            self.bounces.push(None);
            self.bounces.len() - 1
        });
        if let Some(place) = self.bounces.get_mut(index) {
            *place = Some((what, bounce.len()));
        }
        self.bounced_bytes += bounce.len();
        self.push_op(BOUNCE | index as u64, Op::Read { file, offset, buf: Buffer::Owned(bounce) });
    }

    /// A bounce buffer was read: merge and write it, or give it to the guest.
    pub(super) fn bounced(&mut self, index: usize, result: io::Result<()>, bounce: Option<AlignedBuf>) {
        let Some((what, len)) = self.bounces.get_mut(index).and_then(Option::take) else { return };
        self.free_bounces.push(index);
        self.bounced_bytes -= len;
        let read = || bounce.ok_or_else(|| failed(io::ErrorKind::InvalidData));
        match what {
            Bounce::Fill(fill) => match result.and_then(|()| read()) {
                Ok(bounce) => self.write_filled(fill, bounce),
                Err(error) => self.part_done(fill.slot, Err(error)),
            },
            Bounce::Read { slot, range, buf } => match result.and_then(|()| read()) {
                Ok(bounce) if self.shared.zeroed.intersects(range.touched()) => {
                    self.give_when_synced(slot, buf, bounce);
                }
                read => self.give(slot, &buf, read),
            },
        }
    }

    /// Gives a guest what was read of blocks that may not be durable, if the kernel has not failed to write back any.
    pub(super) fn give(&mut self, slot: usize, buf: &GuestBuf, read: io::Result<AlignedBuf>) {
        let checked = read.and_then(|bounce| self.shared.check_written_back().map(|()| bounce));
        let given = checked.map(|bounce| {
            buf.copy_in(0, &bounce);
        });
        self.part_done(slot, given);
    }

    /// Writes the whole block: the base's content with the guest's over it. The part was counted
    /// when the fill began.
    fn write_filled(&mut self, fill: Fill, mut bounce: AlignedBuf) {
        let at = (fill.part.offset() - fill.block.offset()) as usize;
        fill.data.merge_into(&mut bounce, at, fill.part.len() as usize);
        let op = Op::Write { file: DISK, offset: fill.block.offset(), buf: Buffer::Owned(bounce) };
        self.push_op(fill.slot as u64, op);
    }

    /// The rest of steps 2 and 3, for all requests whose data has reached the disk: record, live page, L, then clear P and
    /// release. If the record fails the blocks stay pending, and the requests fail.
    pub(super) fn take_blocks(&mut self) {
        if self.to_take.is_empty() {
            return;
        }
        let slots = std::mem::take(&mut self.to_take);
        let mut taken: Vec<Extent> = Vec::new();
        for slot in &slots {
            if let Some(state) = self.slots.get_mut(*slot) {
                taken.extend_from_slice(&state.taking);
            }
        }
        Extent::normalize(&mut taken);
        // Before anybody takes a block for the session's: who gives it up has to know. Also with direct I/O, for which the
        // kernel may use the page cache when it can't do without.
        taken.iter().for_each(|extent| self.shared.unsynced.insert(*extent));
        let result = self.shared.own(&taken).map_err(|error| (error.kind(), in_full(&error)));
        if result.is_ok() {
            for extent in &taken {
                self.shared.pending.remove(*extent);
            }
            self.shared.live.set_pending(self.shared.pending.count());
        }
        for slot in slots {
            if let Err((kind, message)) = &result {
                self.fail(slot, io::Error::new(*kind, format!("not logged: {message}")));
            }
            self.finish(slot);
        }
    }
}

fn data_op(range: BlockRange, data: Data) -> Op {
    match data {
        Data::Guest(buf) => Op::Write { file: DISK, offset: range.offset(), buf: Buffer::Guest(buf) },
        Data::Zeroes(how) => Op::Zero { file: DISK, offset: range.offset(), len: range.len(), how },
    }
}
