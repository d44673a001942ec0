//! What a read becomes: step 6 of the crash order (see the module above), and reading ahead.

use std::io;
use std::sync::Arc;

use blockio::{AlignedBuf, Buffer, File, GuestBuf, Op};
use blocks::{BLOCK_SIZE, BlockRange, Extent};

use super::ahead::Window;
use super::write::Bounce;
use super::{BOUNCED_BYTES_MAX, DiskQueue, failed};
use crate::helper::Helper;
use crate::shared::{BASE, DISK};

/// What may not be durable is read so much at a time.
const BOUNCE_BLOCKS_MAX: u64 = (256 << 10) / BLOCK_SIZE;

/// Windows that wait to be read ahead: more than there are sequences would be late.
const WINDOWS_MAX: usize = 4;

impl DiskQueue {
    /// Begins a read (step 6).
    pub(super) fn read(&mut self, slot: usize, range: BlockRange, buf: GuestBuf) {
        if buf.len() as u64 != range.len() {
            return self.fail(slot, failed(io::ErrorKind::InvalidInput));
        }
        let touched = range.touched();
        if self.is_clean(touched) {
            self.read_disk(slot, range, buf);
            let window = self.ahead.as_mut().and_then(|ahead| ahead.missed(range.offset(), range.len()));
            return self.read_ahead(window);
        }
        // P only shrinks: what is not pending now stays readable from the disk, what is pending now
        // has the base's content for whoever asks now, even if somebody takes it meanwhile.
        let shared = Arc::clone(&self.shared);
        for (pending, run) in shared.pending.mixed_runs(touched) {
            let Some(part) = range.within(run) else { continue };
            let Some(buf) = buf.slice((part.offset() - range.offset()) as usize, part.len() as usize) else {
                return self.fail(slot, failed(io::ErrorKind::InvalidInput));
            };
            if pending {
                self.read_base(slot, part, buf);
            } else {
                self.read_disk(slot, part, buf);
            }
        }
    }

    /// Reads what is not pending; where there is no room for it all, its rest [later](Self::go_on_with_reads).
    fn read_disk(&mut self, slot: usize, range: BlockRange, buf: GuestBuf) {
        if !self.shared.unsynced.intersects(range.touched()) {
            let op = Op::Read { file: DISK, offset: range.offset(), buf: Buffer::Guest(buf) };
            return self.push_part(slot, op);
        }
        let touched = range.touched();
        for first in (touched.first()..touched.end()).step_by(BOUNCE_BLOCKS_MAX as usize) {
            let is_last = self.bounced_bytes > BOUNCED_BYTES_MAX;
            let count = if is_last { touched.end() - first } else { BOUNCE_BLOCKS_MAX };
            let Some(range_part) = range.within(Extent::new(first, count)) else { continue };
            let (from, len) = (range_part.offset() - range.offset(), range_part.len() as usize);
            let Some(buf) = buf.slice(from as usize, len) else {
                return self.fail(slot, failed(io::ErrorKind::InvalidInput));
            };
            if let Some(state) = self.slots.get_mut(slot) {
                state.parts += 1;
            }
            if is_last {
                return self.cut.push_back((slot, range_part, buf));
            }
            let bounce = AlignedBuf::new_zeroed(len);
            self.push_bounced(
                Bounce::Read { slot, range: range_part, buf },
                DISK,
                range_part.offset(),
                bounce,
            );
        }
    }

    /// Goes on with reads that were cut, as far as there is room for what they are read into.
    pub(super) fn go_on_with_reads(&mut self) {
        while self.bounced_bytes <= BOUNCED_BYTES_MAX
            && let Some((slot, range, buf)) = self.cut.pop_front()
        {
            self.read_disk(slot, range, buf);
            self.part_done(slot, Ok(()));
        }
    }

    /// Has the kernel begin to read what guests will ask for next. A hint: it vouches for nothing, and has no effect on pending
    /// blocks, for these are read from the base. Nor does it matter if it is lost.
    pub(super) fn read_ahead(&mut self, window: Option<Window>) {
        let Some(Window { offset, len }) = window else { return };
        // It may end behind the disk, this does not.
        let range =
            self.shared.geometry.bytes_of(Extent::between(offset / BLOCK_SIZE, (offset + len) / BLOCK_SIZE));
        let Some(range) = range.filter(|range| self.is_clean(range.touched())) else { return };
        if self.reader.is_none() {
            let read = |disk: &File, range: BlockRange| disk.read_ahead(range.offset(), range.len());
            self.reader = Helper::for_hints("read-ahead", &self.shared.disk, WINDOWS_MAX, read);
        }
        if let Some(reader) = &self.reader {
            let _ = reader.offer(range);
        }
    }

    fn read_base(&mut self, slot: usize, range: BlockRange, buf: GuestBuf) {
        if !self.shared.base_is_good() {
            return self.fail(slot, failed(io::ErrorKind::StaleNetworkFileHandle));
        }
        let inside = self.shared.base.bytes_inside(range.offset(), range.len()) as usize;
        buf.fill_zero(inside, buf.len() - inside);
        match buf.slice(0, inside) {
            Some(buf) if !buf.is_empty() => {
                self.push_part(
                    slot,
                    Op::Read { file: BASE, offset: range.offset(), buf: Buffer::Guest(buf) },
                );
            }
            _ => {}
        }
    }
}
