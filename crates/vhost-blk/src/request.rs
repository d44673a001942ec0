//! From a descriptor chain to a validated request (virtio 1.2, 5.2.6).
//!
//! Everything here is written by a guest and not believed: the chain is walked once, within
//! bounds; ranges come from [`Geometry`](blocks::Geometry) only; addresses are translated to host
//! memory once. No framing is assumed: header, data and status may be cut into descriptors anyhow.

mod usual;

use std::sync::Arc;

use blockio::{GuestView, IoVec};
use blocks::{BLOCK_SIZE, BlockRange, Extent, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use crate::{
    chain::Table,
    config::{BATCH_BYTES_MAX, DATA_MAX, PART_MAX, QUEUE_SIZE_MAX, RANGE_SECTORS_MAX, RANGE_SEGMENTS_MAX},
    disk::DiskTraits,
    guest::GuestRegions,
    slots::Used,
};

/// Memory of a guest, as it was mapped at one moment.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// Size of `struct virtio_blk_req` before its data.
const HEADER_LEN: usize = 16;
/// Size of `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_LEN: usize = 16;
const SEGMENTS_LEN_MAX: usize = SEGMENT_LEN * RANGE_SEGMENTS_MAX as usize;
/// Longest chain that is walked. A driver must not make one longer than the queue (2.7.5.3.1);
/// Linux does with indirect descriptors, by header and status.
const DESCRIPTORS_MAX: usize = QUEUE_SIZE_MAX as usize + 2;
/// A batch takes no more chains when its data has as many pieces: a guest could cut all of it into bytes. And a request has no
/// more: each of its descriptors could lie in as many regions of a byte.
const PARTS_MAX: usize = 4096;

/// A request's outcome, as the status byte says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) const fn byte(self) -> u8 {
        (match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// What a chain asks for.
#[derive(Debug)]
pub(crate) enum Action {
    Read {
        range: BlockRange,
        data: Data,
    },
    Write {
        range: BlockRange,
        data: Data,
    },
    Flush,
    /// Not empty.
    Discard(Vec<BlockRange>),
    /// Not empty; with each range, whether it may be unmapped.
    WriteZeroes(Vec<(BlockRange, bool)>),
    /// Nothing is left to do but to answer; `written` data bytes are in the guest's buffer.
    Answer {
        status: Status,
        written: u32,
    },
}

impl Action {
    const fn failed(status: Status) -> Self {
        Self::Answer { status, written: 0 }
    }
}

/// The data of a request: which pieces of the parser's list. Means nothing once the next batch has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data {
    first: usize,
    end: usize,
    /// Bytes.
    pub(crate) len: u32,
}

/// A chain that was understood, as far as it can be.
#[derive(Debug)]
pub(crate) struct Parsed {
    /// Where the status byte goes: the last byte that the device may write. `None`: there is no
    /// such place, the chain is returned with length 0 and nothing is done.
    pub(crate) status_at: Option<GuestAddress>,
    pub(crate) action: Action,
}

/// A part of guest memory that a descriptor names; not yet known to exist.
#[derive(Clone, Copy, Debug)]
struct Piece {
    addr: GuestAddress,
    len: usize,
}

/// Understands batches of chains. Its room is used again and again.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    /// Host memory of the data of all requests of the batch.
    parts: Vec<IoVec>,
    /// Bytes that all requests of the batch are about.
    bytes: u64,
    /// The memory that `parts` lie in, held while there is a batch.
    memory: GuestRegions,
}

/// The parts of a request header.
struct Header {
    kind: u32,
    sector: u64,
}

impl From<[u8; HEADER_LEN]> for Header {
    #[inline]
    fn from(bytes: [u8; HEADER_LEN]) -> Self {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
        Self { kind: u32::from_le_bytes([k0, k1, k2, k3]), sector: u64::from_le_bytes(sector) }
    }
}

impl Parser {
    /// Begins a batch of chains whose buffers are in `memory`, and forgets the one before.
    pub(crate) fn begin(&mut self, memory: &Arc<Memory>) {
        self.parts.clear();
        self.bytes = 0;
        self.memory.hold(memory);
    }

    /// Whether the batch has as many pieces or bytes as one should have.
    pub(crate) fn is_full(&self) -> bool {
        self.parts.len() >= PARTS_MAX || self.bytes >= BATCH_BYTES_MAX
    }

    /// Forgets the batch, and lets go of its memory.
    pub(crate) fn end(&mut self) {
        self.parts.clear();
        self.memory.release();
    }

    /// The memory that `data`, which must be of this batch, names.
    pub(crate) fn view(&self, data: Data) -> Option<GuestView<'_>> {
        let keep = self.memory.held()?;
        let parts = self.parts.get(data.first..data.end)?;
        // SAFETY: each part was found in the batch's memory (`parts` is emptied when that is replaced),
        // which stays mapped for reads and writes as long as `keep`, the same memory, lives.
        // The lengths of a request sum up to less than 4 GiB.
        Some(unsafe { GuestView::new(parts, keep) })
    }

    /// Writes the status byte of a request of this batch; returns the element for the used ring, whose
    /// length counts the data `written` and the status.
    pub(crate) fn answer(
        &self,
        head: u16,
        status_at: Option<GuestAddress>,
        status: Status,
        written: u32,
    ) -> Used {
        let has_status = status_at.is_some_and(|at| self.memory.write(at, &[status.byte()]));
        Used { head, len: if has_status { written.saturating_add(1) } else { 0 } }
    }

    /// The batch's memory.
    pub(crate) fn memory(&self) -> &GuestRegions {
        &self.memory
    }

    /// Understands the chain of `table` that begins at `head`, as a part of the batch.
    #[inline]
    pub(crate) fn parse(&mut self, table: Table, head: u16, disk: &DiskTraits, read_only: bool) -> Parsed {
        match self.parse_usual(table, head, disk, read_only) {
            Some(parsed) => parsed,
            None => self.parse_any(table, head, disk, read_only),
        }
    }

    fn parse_any(&mut self, table: Table, head: u16, disk: &DiskTraits, read_only: bool) -> Parsed {
        let Some(ordered) = self.walk(table, head) else {
            return Parsed { status_at: None, action: Action::failed(Status::IoError) };
        };
        match self.take_status() {
            Some(at) if ordered => {
                let action = self.understand(disk, read_only);
                Parsed { status_at: Some(at), action: action.unwrap_or_else(Action::failed) }
            }
            status_at => Parsed { status_at, action: Action::failed(Status::IoError) },
        }
    }

    /// Collects the chain's pieces. `None`: its end was not found. `Some(false)`: it has a
    /// readable piece after a writable one (2.7.4.2).
    fn walk(&mut self, table: Table, head: u16) -> Option<bool> {
        self.readable.clear();
        self.writable.clear();
        let (mut ended, mut ordered) = (false, true);
        for descriptor in table.chain(&self.memory, head).take(DESCRIPTORS_MAX) {
            ended = !descriptor.has_next();
            let piece = Piece { addr: descriptor.addr, len: descriptor.len as usize };
            if piece.len == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                self.writable.push(piece);
            } else {
                ordered &= self.writable.is_empty();
                self.readable.push(piece);
            }
        }
        ended.then_some(ordered)
    }

    /// Takes the last writable byte away for the status, if it is memory.
    fn take_status(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        let at = last.addr.checked_add(last.len as u64 - 1)?;
        last.len -= 1;
        if last.len == 0 {
            self.writable.pop();
        }
        self.memory.find(at, 1).map(|_| at)
    }

    fn understand(&mut self, disk: &DiskTraits, read_only: bool) -> Result<Action, Status> {
        let Header { kind, sector } = self.take_header()?;
        let may_write = if read_only { Err(Status::IoError) } else { Ok(()) };
        match kind {
            VIRTIO_BLK_T_IN => {
                let (range, data) = self.data(disk, sector, Direction::In)?;
                Ok(Action::Read { range, data })
            }
            VIRTIO_BLK_T_OUT => {
                may_write?;
                let (range, data) = self.data(disk, sector, Direction::Out)?;
                Ok(Action::Write { range, data })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            VIRTIO_BLK_T_GET_ID => {
                let written = self.fill(&disk.serial)?;
                Ok(Action::Answer { status: Status::Ok, written })
            }
            VIRTIO_BLK_T_DISCARD if disk.discard => {
                may_write?;
                let ranges = self.segments(disk, 0)?;
                Ok(match ranges.is_empty() {
                    true => Action::Answer { status: Status::Ok, written: 0 },
                    false => Action::Discard(ranges.into_iter().map(|(range, _)| range).collect()),
                })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if disk.write_zeroes => {
                may_write?;
                let ranges = self.segments(disk, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?;
                Ok(match ranges.is_empty() {
                    true => Action::Answer { status: Status::Ok, written: 0 },
                    false => Action::WriteZeroes(ranges),
                })
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Reads the header and takes it away from the readable pieces.
    fn take_header(&mut self) -> Result<Header, Status> {
        let bytes: [u8; HEADER_LEN] = match self.readable.first() {
            // As all drivers have it: the header is the first piece, or the beginning of it.
            Some(piece) if piece.len >= HEADER_LEN => {
                self.memory.read_array(piece.addr).ok_or(Status::IoError)?
            }
            _ => {
                let mut bytes = [0; HEADER_LEN];
                self.read(&mut bytes)?;
                bytes
            }
        };
        let mut skip = HEADER_LEN;
        self.readable.retain_mut(|piece| {
            let cut = skip.min(piece.len);
            skip -= cut;
            piece.addr = piece.addr.unchecked_add(cut as u64);
            piece.len -= cut;
            piece.len > 0
        });
        Ok(Header::from(bytes))
    }

    /// The range and the data of a read or write.
    fn data(
        &mut self,
        disk: &DiskTraits,
        sector: u64,
        direction: Direction,
    ) -> Result<(BlockRange, Data), Status> {
        let pieces = match direction {
            Direction::In => &self.writable,
            Direction::Out => &self.readable,
        };
        let len: u64 = pieces.iter().map(|piece| piece.len as u64).sum();
        if len > DATA_MAX {
            return Err(Status::IoError);
        }
        let range = disk.geometry.sectors_at(sector, len).map_err(|_| Status::IoError)?;
        let first = self.parts.len();
        for piece in pieces {
            let is_there = self.memory.each(piece.addr, piece.len, |_, part| self.parts.push(part));
            if !is_there || self.parts.len() - first > PARTS_MAX {
                self.parts.truncate(first);
                return Err(Status::IoError);
            }
        }
        self.bytes += len;
        Ok((range, Data { first, end: self.parts.len(), len: len as u32 }))
    }

    /// Fills `to` from the start of what the device may read.
    fn read(&self, mut to: &mut [u8]) -> Result<(), Status> {
        for piece in &self.readable {
            let (now, rest) = to.split_at_mut(piece.len.min(to.len()));
            if !self.memory.read(piece.addr, now) {
                return Err(Status::IoError);
            }
            to = rest;
            if to.is_empty() {
                break;
            }
        }
        if to.is_empty() { Ok(()) } else { Err(Status::IoError) }
    }

    /// Puts `from` into what the device may write, as far as that goes; returns how many bytes.
    fn fill(&self, mut from: &[u8]) -> Result<u32, Status> {
        let all = from.len();
        for piece in &self.writable {
            let (now, rest) = from.split_at(piece.len.min(from.len()));
            if !self.memory.write(piece.addr, now) {
                return Err(Status::IoError);
            }
            from = rest;
        }
        Ok((all - from.len()) as u32)
    }

    /// The segments of a discard or write-zeroes request, with their unmap flag; those of no
    /// sectors are left out.
    fn segments(&mut self, disk: &DiskTraits, flags_known: u32) -> Result<Vec<(BlockRange, bool)>, Status> {
        let len: usize = self.readable.iter().map(|piece| piece.len).sum();
        if len == 0 || !len.is_multiple_of(SEGMENT_LEN) || len > SEGMENTS_LEN_MAX {
            return Err(Status::IoError);
        }
        let mut bytes = [0; SEGMENTS_LEN_MAX];
        let bytes = bytes.get_mut(..len).ok_or(Status::IoError)?;
        self.read(bytes)?;
        let segments = bytes.as_chunks::<SEGMENT_LEN>().0.iter().map(|segment| {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            (sector, u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags))
        });
        // Unknown flags first: the answer to them is UNSUPP, whatever else is wrong (5.2.6.2).
        if segments.clone().any(|(_, _, flags)| flags & !flags_known != 0) {
            return Err(Status::Unsupported);
        }
        let mut ranges = Vec::with_capacity(segments.len());
        for (sector, count, flags) in segments {
            if count > RANGE_SECTORS_MAX || sector > disk.geometry.sectors() {
                return Err(Status::IoError);
            }
            if count > 0 {
                let range = disk.geometry.sectors_at(sector, u64::from(count) * SECTOR_SIZE);
                self.bytes += u64::from(count) * SECTOR_SIZE;
                ranges.push((range.map_err(|_| Status::IoError)?, flags != 0));
            }
        }
        Ok(ranges)
    }
}

/// Which pieces are meant: those the device writes (`In`) or reads (`Out`).
#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

/// What a read or write of `range` is given to the disk as: parts of [`PART_MAX`] bytes, at most.
pub(crate) fn parts_of(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    const BLOCKS: u64 = PART_MAX / BLOCK_SIZE;
    let touched = range.touched();
    let firsts = (touched.first()..touched.end()).step_by(BLOCKS as usize);
    firsts.filter_map(move |first| range.within(Extent::new(first, BLOCKS)))
}

#[cfg(test)]
mod tests;
