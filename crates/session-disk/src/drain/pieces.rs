//! The runs that are being copied: each is cut into pieces, what the base has as data and what it has as holes, and each
//! piece goes its [way](crate::ways).
//!
//! A sealed base's blocks are shared only after they were read past the page cache and found to be what was sealed. That
//! nobody changes them between the two is the contract of a base, and seen when the batch is synced, as ever.

use base_image::Content;
use blockio::{AlignedBuf, Buffer, Completion, Op, Zeroing};
use blocks::{BLOCK_SIZE, BlockRange, Extent};

use super::{Drain, RUN_BLOCKS_MAX, shared_path};
use crate::Error;
use crate::shared::{BASE, DISK, MEDIUM};
use crate::ways::{Way, is_hole_refusal};

/// The longest piece that is read at once, in bytes.
const READ_BYTES_MAX: u64 = RUN_BLOCKS_MAX * BLOCK_SIZE;

/// A run that is being copied.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) extent: Extent,
    /// Operations that are not finished.
    parts: u32,
    failed: bool,
}

/// A piece of a run that is being copied; its number is the token of its operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    run: usize,
    offset: u64,
    len: u64,
    doing: Doing,
}

/// What is being done for a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// The base is read, to be written to the disk.
    Reading,
    /// The base is read past the page cache and compared with its seal, to be shared.
    Proving,
    /// The disk gets the base's blocks.
    Sharing,
    /// The disk is written.
    Writing,
    /// The disk gets a hole, or zeroes.
    Punching,
    /// The disk gets zeroes, for it gets no hole.
    Zeroing,
}

impl Drain {
    /// Begins to copy a claimed run.
    pub(super) fn start(&mut self, extent: Extent) {
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
            offset += match self.shared.base.content_at(offset, bytes.end() - offset)? {
                Content::Hole(len) => {
                    self.push_zeroes(run, offset, len);
                    len
                }
                Content::Data(len) => {
                    let inside = self.shared.base.bytes_inside(offset, len);
                    let whole = if inside == len { len } else { inside / BLOCK_SIZE * BLOCK_SIZE };
                    if whole > 0 {
                        self.push_data(run, offset, whole);
                        whole
                    } else {
                        // The block in which the base ends: its tail is zero.
                        let len = len.min(BLOCK_SIZE);
                        let mut buf = AlignedBuf::new_zeroed(len as usize);
                        self.shared.base.read_at(&mut buf, offset)?;
                        self.pace.spend(len);
                        self.push_write(run, offset, Buffer::Owned(buf));
                        len
                    }
                }
            };
        }
        Ok(())
    }

    /// What the base has as data, all of it.
    fn push_data(&mut self, run: usize, offset: u64, len: u64) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (way, len) = self.shared.ways().next(at, end - at);
            if way == Way::Share {
                // The kernel writes it back before it drops it. So it does that for all that was claimed at once.
                self.shared.disk.start_write_back(at, len);
            }
            match way {
                Way::Copy => self.push_copies(run, at, len),
                Way::Share if self.shared.base.seal().is_none() => self.push_share(run, at, len),
                Way::Share => self.push_reads(run, at, len, Doing::Proving),
            }
            at += len;
        }
    }

    fn push_copies(&mut self, run: usize, offset: u64, len: u64) {
        self.pace.spend(len);
        self.push_reads(run, offset, len, Doing::Reading);
    }

    fn push_reads(&mut self, run: usize, offset: u64, len: u64, doing: Doing) {
        let file = if doing == Doing::Proving { MEDIUM } else { BASE };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let len = READ_BYTES_MAX.min(end - at);
            let buf = Buffer::Owned(self.spare.take(len as usize));
            self.push(run, doing, Op::Read { file, offset: at, buf });
            at += len;
        }
    }

    fn push_share(&mut self, run: usize, offset: u64, len: u64) {
        self.pace.spend(BLOCK_SIZE);
        self.push(run, Doing::Sharing, Op::Share { file: DISK, from: BASE, offset, len });
    }

    /// A hole where the disk can have one, zeroes elsewhere.
    fn push_zeroes(&mut self, run: usize, offset: u64, len: u64) {
        let disk = &self.shared.disk;
        let op = if self.shared.ways().refuses_holes() {
            return self.push_zeroing(run, offset, len);
        } else if disk.supports_punch() {
            Op::Punch { file: DISK, offset, len }
        } else if disk.supports_zero() {
            Op::Zero { file: DISK, offset, len, how: Zeroing::Unmap }
        } else {
            self.pace.spend(len);
            return self.push_write(run, offset, Buffer::Owned(AlignedBuf::new_zeroed(len as usize)));
        };
        self.pace.spend(BLOCK_SIZE);
        self.push(run, Doing::Punching, op);
    }

    /// Zeroes, which the kernel or the engine may have to write.
    fn push_zeroing(&mut self, run: usize, offset: u64, len: u64) {
        self.pace.spend(len);
        self.push(run, Doing::Zeroing, Op::Zero { file: DISK, offset, len, how: Zeroing::Keep });
    }

    fn push_write(&mut self, run: usize, offset: u64, buf: Buffer) {
        self.push(run, Doing::Writing, Op::Write { file: DISK, offset, buf });
    }

    fn push(&mut self, run: usize, doing: Doing, op: Op) {
        let piece = Some(Piece { run, offset: op.offset(), len: op.len(), doing });
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

    pub(super) fn complete(&mut self, completion: Completion) {
        let index = completion.token as usize;
        let Some(piece) = self.pieces.get_mut(index).and_then(Option::take) else { return };
        self.free_pieces.push(index);
        let Piece { run, offset, len, doing } = piece;
        match (doing, completion.result) {
            (Doing::Sharing, Err(error)) => {
                self.not_shared(&error);
                self.push_copies(run, offset, len);
            }
            (Doing::Punching, Err(error)) if is_hole_refusal(&error) => {
                self.not_punched(&error);
                self.push_zeroing(run, offset, len);
            }
            (doing, Err(error)) => {
                let (file, operation) = match doing {
                    Doing::Reading => (self.shared.base.path(), "read"),
                    Doing::Proving => {
                        self.shared.ways().ask_again();
                        (self.shared.base.path(), "read")
                    }
                    Doing::Sharing | Doing::Writing | Doing::Punching | Doing::Zeroing => {
                        (shared_path(&self.shared), "write")
                    }
                };
                let error = Error::state(operation, file, error);
                self.fail(run, error);
            }
            (Doing::Reading, Ok(())) => match completion.buf {
                Some(buf) => self.push_write(run, offset, buf),
                None => self.fail(run, Error::WrongState("an engine kept the buffer of a read")),
            },
            (Doing::Proving, Ok(())) => {
                self.spare.put(completion.buf);
                self.push_share(run, offset, len);
            }
            (Doing::Sharing, Ok(())) => {
                self.has_shared = true;
                self.shared.counters.reflinked(len);
                if self.shared.ways().shared() {
                    log::info!("{}: shares blocks with its base (reflink)", self.path());
                }
            }
            (Doing::Writing, Ok(())) => {
                self.shared.counters.copied(len);
                self.spare.put(completion.buf);
            }
            (Doing::Punching, Ok(())) => self.shared.counters.punched(len),
            (Doing::Zeroing, Ok(())) => self.shared.counters.copied(len),
        }
        self.part_done(run);
    }

    /// Blocks could not be shared: they are copied, and perhaps all others.
    fn not_shared(&self, error: &std::io::Error) {
        if self.shared.ways().refused(error) {
            log::info!("{}: does not share blocks with its base, they are copied: {error}", self.path());
        } else {
            log::debug!("{}: blocks were not shared, they are copied: {error}", self.path());
        }
    }

    /// The disk gets no hole: it gets zeroes, and perhaps for all others too.
    fn not_punched(&mut self, error: &std::io::Error) {
        if self.shared.ways().hole_refused(error) {
            log::info!("{}: takes no holes any more, zeroes are written: {error}", self.path());
        } else {
            log::debug!("{}: no hole was made, zeroes are written: {error}", self.path());
        }
    }

    fn path(&self) -> std::path::Display<'_> {
        shared_path(&self.shared).display()
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
