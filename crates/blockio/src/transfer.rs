//! What remains of one operation, and what to ask the kernel for next.
//!
//! Both engines drive a [`Work`] the same way: ask for the next [`Call`], perform it, tell the
//! outcome, until the work is finished. Short transfers, interrupted calls, more pieces than the
//! kernel takes, writes that are better cut and memory that direct I/O cannot use are dealt with here.

use std::{io, sync::Arc};

use rustix::{fs::FallocateFlags, io::Errno};

use crate::{
    AlignedBuf, Alignment, Buffer, Completion, File, FileIndex, IoVec, Op, Zeroing,
    probe::{BOUNCE_MAX, PUNCH, ZERO},
};

/// The most pieces that one call takes (the kernel's `UIO_MAXIOV`).
pub(crate) const PIECES_MAX: usize = 1024;

/// The most bytes that one call transfers (the kernel's `MAX_RW_COUNT`; a multiple of a page).
const TRANSFER_MAX: usize = 0x7fff_f000;

/// How many times in a row a call may say "try again" before that is an error.
const STALLS_MAX: u32 = 1000;

/// A call to the kernel. Its memory is valid until the outcome is told to the [`Work`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// Nothing to ask: the work is finished, whatever outcome is told.
    Nothing,
    Transfer {
        write: bool,
        offset: u64,
        memory: Memory,
    },
    SyncData,
    Allocate {
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
    /// io_uring has no such operation: the engine makes the call itself.
    Share {
        from: FileIndex,
        offset: u64,
        len: u64,
    },
}

/// Where a transfer goes to or comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Memory {
    One(IoVec),
    /// At most [`PIECES_MAX`] pieces.
    Many(*const IoVec, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Read,
    Write,
    SyncData,
    Punch,
    Zero(Zeroing),
    Share { from: FileIndex },
}

impl Zeroing {
    /// The way that is tried when this one has failed.
    fn next(self) -> Option<Zeroing> {
        match self {
            Zeroing::Unmap => Some(Zeroing::Keep),
            Zeroing::Keep => Some(Zeroing::Write),
            Zeroing::Write => None,
        }
    }
}

/// One operation at work. Reusable, so that it needs no memory of its own in the steady state.
#[derive(Debug)]
pub(crate) struct Work {
    token: u64,
    file: FileIndex,
    kind: Kind,
    /// Why it failed before it began.
    refused: Option<io::Error>,
    offset: u64,
    len: u64,
    done: u64,
    /// Bytes of the call at work.
    asked: u64,
    align: u64,
    /// The longest write that is made at once, in bytes: see [`File::write_max`].
    write_max: u64,
    stalls: u32,
    buf: Option<Buffer>,
    bounces: bool,
    bounce: Option<AlignedBuf>,
    pieces: Vec<IoVec>,
}

impl Work {
    /// A work without an operation.
    pub(crate) fn idle() -> Work {
        Work {
            token: 0,
            file: FileIndex(0),
            kind: Kind::Nothing,
            refused: None,
            offset: 0,
            len: 0,
            done: 0,
            asked: 0,
            align: 1,
            write_max: u64::MAX,
            stalls: 0,
            buf: None,
            bounces: false,
            bounce: None,
            pieces: Vec::new(),
        }
    }

    /// Begins an operation.
    pub(crate) fn begin(&mut self, token: u64, op: Op, files: &[Arc<File>]) {
        let (file, kind, offset, len) = match op {
            Op::Read { file, offset, buf } => (file, Kind::Read, offset, self.take_buf(buf)),
            Op::Write { file, offset, buf } => (file, Kind::Write, offset, self.take_buf(buf)),
            Op::SyncData { file } => (file, Kind::SyncData, 0, 0),
            Op::Punch { file, offset, len } => (file, Kind::Punch, offset, len),
            Op::Zero { file, offset, len, how } => {
                let way = files.get(usize::from(file.0)).map_or(how, |file| file.zeroing(how));
                (file, Kind::Zero(way), offset, len)
            }
            Op::Share { file, from, offset, len } => (file, Kind::Share { from }, offset, len),
        };
        (self.token, self.file, self.offset, self.len) = (token, file, offset, len);
        (self.done, self.asked, self.stalls, self.align) = (0, 0, 0, 1);
        // Memory that is made for them, and left as it is: zeroes.
        self.bounces = kind == Kind::Zero(Zeroing::Write);
        self.kind = if len == 0 && !matches!(kind, Kind::SyncData) { Kind::Nothing } else { kind };
        if let Err(error) = self.check(files.get(usize::from(file.0))) {
            self.kind = Kind::Nothing;
            self.refused = Some(error);
        }
    }

    /// Keeps the memory of an operation; how long it is.
    fn take_buf(&mut self, buf: Buffer) -> u64 {
        self.buf.insert(buf).len() as u64
    }

    fn check(&mut self, file: Option<&Arc<File>>) -> io::Result<()> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        let Some(file) = file else { return refuse("the engine has no file of this index") };
        if self.offset.checked_add(self.len).is_none_or(|end| end > i64::MAX as u64) {
            return refuse("the range ends past the largest file");
        }
        self.write_max = file.write_max;
        if !file.is_direct() {
            return Ok(());
        }
        let alignment = file.alignment();
        self.align = u64::from(alignment.offset.max(1));
        let Some(buf) = &self.buf else { return Ok(()) };
        if !is_aligned(self.offset | self.len, self.align) {
            return refuse("offset or length are not aligned for direct I/O");
        }
        self.bounces = !memory_is_aligned(buf, alignment);
        Ok(())
    }

    pub(crate) fn file(&self) -> FileIndex {
        self.file
    }

    /// Bytes of memory that the next call will make, to copy by way of it: none if it is there already.
    pub(crate) fn missing_bounce(&self) -> usize {
        if self.bounces && self.bounce.is_none() { self.bounce_len() } else { 0 }
    }

    /// Bytes of memory that was made for that; it goes when the operation is complete.
    pub(crate) fn bounce_held(&self) -> usize {
        self.bounce.as_ref().map_or(0, |bounce| bounce.len())
    }

    fn bounce_len(&self) -> usize {
        (self.len - self.done).min(self.write_max).min(BOUNCE_MAX as u64) as usize
    }

    /// What to ask the kernel for next.
    pub(crate) fn call(&mut self) -> Call {
        let write = match self.kind {
            Kind::Nothing => return Call::Nothing,
            Kind::SyncData => return Call::SyncData,
            Kind::Punch | Kind::Zero(Zeroing::Unmap) => {
                return Call::Allocate { mode: PUNCH, offset: self.offset, len: self.len };
            }
            Kind::Zero(Zeroing::Keep) => {
                return Call::Allocate { mode: ZERO, offset: self.offset, len: self.len };
            }
            Kind::Share { from } => return Call::Share { from, offset: self.offset, len: self.len },
            Kind::Read => false,
            Kind::Write | Kind::Zero(Zeroing::Write) => true,
        };
        let memory = if self.bounces { self.bounce_memory(write) } else { self.own_memory(write) };
        Call::Transfer { write, offset: self.offset + self.done, memory }
    }

    fn own_memory(&mut self, write: bool) -> Memory {
        let at = self.done as usize;
        self.asked = self.len - self.done;
        if write && self.asked > self.write_max {
            // Up to a multiple of it.
            self.asked = self.write_max - (self.offset + self.done) % self.write_max;
        }
        let most = usize::try_from(self.asked).map_or(TRANSFER_MAX, |asked| asked.min(TRANSFER_MAX));
        match &mut self.buf {
            Some(Buffer::Owned(buf)) => {
                let all = IoVec { base: buf.as_mut_ptr(), len: buf.len() };
                Memory::One(all.skip(at).take(most))
            }
            Some(Buffer::Guest(buf)) => match buf.parts() {
                [one] => Memory::One(one.skip(at).take(most)),
                parts if at == 0 && self.asked == self.len && parts.len() <= PIECES_MAX => {
                    Memory::Many(parts.as_ptr(), parts.len() as u32)
                }
                _ => {
                    self.pieces.clear();
                    self.pieces.extend(buf.pieces(at, most).take(PIECES_MAX));
                    Memory::Many(self.pieces.as_ptr(), self.pieces.len() as u32)
                }
            },
            None => Memory::Many(std::ptr::null(), 0),
        }
    }

    fn bounce_memory(&mut self, write: bool) -> Memory {
        let len = self.bounce_len();
        self.asked = len as u64;
        let bounce = self.bounce.get_or_insert_with(|| AlignedBuf::new_zeroed(len));
        if let (true, Some(buf), Some(to)) = (write, &self.buf, bounce.get_mut(..len)) {
            buf.copy_out(self.done as usize, to);
        }
        Memory::One(IoVec { base: bounce.as_mut_ptr(), len })
    }

    /// Takes the outcome of the last call: how many bytes were transferred. Returns the
    /// operation's result, or `None` if there is another call to make.
    pub(crate) fn advance(&mut self, outcome: io::Result<usize>) -> Option<io::Result<()>> {
        let eof = match self.kind {
            Kind::Nothing => return Some(self.refused.take().map_or(Ok(()), Err)),
            Kind::Read => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::WriteZero,
        };
        let count = match outcome {
            Ok(count) => count as u64,
            Err(error) => return self.stall(error),
        };
        match self.kind {
            Kind::SyncData | Kind::Punch | Kind::Share { .. } => return Some(Ok(())),
            Kind::Zero(Zeroing::Unmap | Zeroing::Keep) => return Some(Ok(())),
            _ => {}
        }
        self.stalls = 0;
        let before = self.done;
        let count = count.min(self.asked);
        if let (Kind::Read, Some(bounce), Some(buf)) = (self.kind, &self.bounce, &mut self.buf) {
            buf.copy_in(before as usize, bounce.get(..count as usize).unwrap_or_default());
        }
        self.done += count;
        if self.done == self.len {
            return Some(Ok(()));
        }
        // Direct I/O cannot go on in the middle of a sector: do that one again.
        self.done -= self.done % self.align;
        (self.done <= before).then(|| Err(eof.into()))
    }

    /// A call failed. `ECANCELED`, or `EFAULT` where it waited for a page: the thread that submitted it has ended.
    fn stall(&mut self, error: io::Error) -> Option<io::Result<()>> {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::INTR) => None,
            Some(Errno::AGAIN | Errno::CANCELED | Errno::FAULT) if self.stalls < STALLS_MAX => {
                self.stalls += 1;
                None
            }
            _ => {
                let Kind::Zero(way) = self.kind else { return Some(Err(error)) };
                let Some(next) = way.next() else { return Some(Err(error)) };
                (self.kind, self.stalls) = (Kind::Zero(next), 0);
                self.bounces = next == Zeroing::Write;
                None
            }
        }
    }

    /// Ends the operation; the work is idle again.
    pub(crate) fn complete(&mut self, result: io::Result<()>, files: &[Arc<File>]) -> Completion {
        // What was deallocated is not read through a map any more: that could bring it back. What was replaced is
        // not in the page cache any more.
        if let Kind::Punch | Kind::Zero(_) | Kind::Share { .. } = self.kind
            && let Some(map) = files.get(usize::from(self.file.0)).and_then(|file| file.resident())
        {
            map.punched(self.offset, self.len);
        }
        self.kind = Kind::Nothing;
        if self.bounces {
            self.bounce = None;
        }
        Completion { token: self.token, result, buf: self.buf.take() }
    }
}

/// Whether all numbers that were joined in `bits` are multiples of `align`. Alignments are powers of two (`probe`
/// sees to it); a division would take longer than the rest of what is to be done.
fn is_aligned(bits: u64, align: u64) -> bool {
    bits & (align - 1) == 0
}

fn memory_is_aligned(buf: &Buffer, alignment: Alignment) -> bool {
    let (memory, offset) = (u64::from(alignment.memory.max(1)), u64::from(alignment.offset.max(1)));
    let aligned = |base: *const u8, len: usize| {
        is_aligned(base.addr() as u64, memory) && is_aligned(len as u64, offset)
    };
    match buf {
        Buffer::Owned(buf) => aligned(buf.as_ptr(), buf.len()),
        Buffer::Guest(buf) => buf.parts().iter().all(|part| aligned(part.base, part.len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestBuf, OpenOptions};

    /// The writes that `op` becomes: offset, and lengths of its pieces.
    fn writes(op: Op, files: &[Arc<File>]) -> Vec<(u64, Vec<usize>)> {
        let mut work = Work::idle();
        work.begin(1, op, files);
        let mut writes = Vec::new();
        loop {
            let Call::Transfer { offset, memory, .. } = work.call() else { panic!("no transfer") };
            let lens: Vec<usize> = match memory {
                Memory::One(piece) => vec![piece.len],
                // SAFETY: the work keeps them until it is told the outcome.
                Memory::Many(pieces, count) => unsafe { std::slice::from_raw_parts(pieces, count as usize) }
                    .iter()
                    .map(|p| p.len)
                    .collect(),
            };
            let len = lens.iter().sum();
            writes.push((offset, lens));
            if let Some(result) = work.advance(Ok(len)) {
                result.unwrap();
                return writes;
            }
        }
    }

    fn file_in(dir: &str) -> Option<(tempfile::NamedTempFile, Vec<Arc<File>>)> {
        let temp = tempfile::NamedTempFile::new_in(dir).ok()?;
        let file = File::open(temp.path(), OpenOptions { write: true, ..Default::default() }).unwrap();
        Some((temp, vec![Arc::new(file)]))
    }

    #[test]
    fn long_write_where_folios_are_to_be_small_is_cut_at_multiples() {
        const KIB: usize = 1 << 10;
        let (_temp, mut files) = file_in("/tmp").unwrap();
        Arc::get_mut(&mut files[0]).unwrap().write_max = 16 << 10;
        let file = FileIndex(0);
        let offset = 12 << 10;
        let buf = AlignedBuf::new_zeroed(24 * KIB).into();
        let cut = writes(Op::Write { file, offset, buf }, &files);
        assert_eq!(cut, [(offset, vec![4 * KIB]), (16 << 10, vec![16 * KIB]), (32 << 10, vec![4 * KIB])]);
        // In pieces of memory that end elsewhere.
        let mut memory = AlignedBuf::new_zeroed(20 * KIB);
        let base = memory.as_mut_ptr();
        let parts = [(0, KIB), (KIB, 12 * KIB), (13 * KIB, 7 * KIB)];
        let parts = parts.map(|(at, len)| IoVec { base: base.wrapping_add(at), len });
        // SAFETY: the guard owns the memory.
        let buf = unsafe { GuestBuf::new(parts, Arc::new(memory)) };
        let cut = writes(Op::Write { file, offset: 0, buf: buf.into() }, &files);
        assert_eq!(cut, [(0, vec![KIB, 12 * KIB, 3 * KIB]), (16 << 10, vec![4 * KIB])]);
        let buf = AlignedBuf::new_zeroed(64 * KIB).into();
        let mut work = Work::idle();
        work.begin(1, Op::Read { file, offset, buf }, &files);
        assert!(
            matches!(work.call(), Call::Transfer { memory: Memory::One(all), .. } if all.len == 64 * KIB)
        );
    }

    #[test]
    fn write_that_is_just_as_long_as_can_be_is_not_cut() {
        let (_temp, mut files) = file_in("/tmp").unwrap();
        Arc::get_mut(&mut files[0]).unwrap().write_max = 16 << 10;
        for (offset, len) in [(0, 16 << 10), (4 << 10, 16 << 10), (30 << 10, 512)] {
            let buf = AlignedBuf::new_zeroed(len).into();
            let cut = writes(Op::Write { file: FileIndex(0), offset, buf }, &files);
            assert_eq!(cut, [(offset, vec![len])]);
        }
    }

    /// Whatever is written, from whatever pieces of memory, and however little of it the kernel takes at once: each byte is
    /// asked for once, out of its place, and what is cut is cut at multiples.
    #[test]
    fn parts_of_a_write_are_the_right_bytes_at_the_right_places() {
        const UNIT: usize = 512;
        let (_temp, mut files) = file_in("/tmp").unwrap();
        let max = 4 * UNIT;
        Arc::get_mut(&mut files[0]).unwrap().write_max = max as u64;
        let lens = [&[1][..], &[4], &[5], &[9], &[1, 1, 1], &[3, 2], &[4, 4, 4], &[5, 1, 7], &[2, 11, 1]];
        let cases = lens.iter().flat_map(|lens| (0..6).map(move |first| (*lens, first)));
        for (lens, first, short) in
            cases.flat_map(|(lens, first)| [0, 1, 3].map(|short| (lens, first, short)))
        {
            let (offset, len) = (first * UNIT, lens.iter().sum::<usize>() * UNIT);
            // Each piece of memory lies apart from the one before; `places` are the bytes' addresses.
            let mut memory = AlignedBuf::new_zeroed(2 * len + UNIT);
            let (base, mut at, mut places) = (memory.as_mut_ptr(), 0, Vec::new());
            let parts: Vec<IoVec> = lens
                .iter()
                .map(|units| {
                    let part = IoVec { base: base.wrapping_add(at), len: units * UNIT };
                    at += part.len + UNIT / 2;
                    places.extend((0..part.len).map(|byte| part.base.wrapping_add(byte).addr()));
                    part
                })
                .collect();
            // SAFETY: the guard owns the memory.
            let buf = unsafe { GuestBuf::new(parts, Arc::new(memory)) };
            let mut work = Work::idle();
            let op = Op::Write { file: FileIndex(0), offset: offset as u64, buf: buf.into() };
            work.begin(1, op, &files);
            let mut done = 0;
            loop {
                let Call::Transfer { write: true, offset: at, memory, .. } = work.call() else { panic!() };
                let pieces = match memory {
                    Memory::One(piece) => vec![piece],
                    Memory::Many(pieces, count) => {
                        // SAFETY: the work keeps them until it is told the outcome.
                        unsafe { std::slice::from_raw_parts(pieces, count as usize) }.to_vec()
                    }
                };
                let asked: Vec<usize> = pieces
                    .iter()
                    .flat_map(|p| (0..p.len).map(|byte| p.base.wrapping_add(byte).addr()))
                    .collect();
                assert_eq!(at, (offset + done) as u64);
                let end = if len - done > max { (offset + done) / max * max + max - offset } else { len };
                assert!(asked == places[done..end], "{lens:?} at {first}: {done} of {len}");
                let taken = if short > 0 { asked.len().min(short * 100) } else { asked.len() };
                done += taken;
                if let Some(result) = work.advance(Ok(taken)) {
                    result.unwrap();
                    break;
                }
            }
            assert_eq!(done, len);
        }
    }

    /// Tells a zeroing work the outcome of its calls; those it made, and what has come of it.
    fn zeroed(op: Op, files: &[Arc<File>], refused: &[Errno]) -> (Vec<Call>, io::Result<()>) {
        let (mut work, mut calls) = (Work::idle(), Vec::new());
        work.begin(1, op, files);
        loop {
            let call = work.call();
            let outcome = match (refused.get(calls.len()), call) {
                (Some(errno), _) => Err((*errno).into()),
                (None, Call::Transfer { memory: Memory::One(piece), .. }) => {
                    // SAFETY: the work keeps it until it is told the outcome.
                    let bytes = unsafe { std::slice::from_raw_parts(piece.base, piece.len) };
                    assert!(bytes.iter().all(|byte| *byte == 0));
                    Ok(piece.len)
                }
                _ => Ok(0),
            };
            calls.push(call);
            if let Some(result) = work.advance(outcome) {
                let held = work.bounce_held();
                let writes = matches!(call, Call::Transfer { .. });
                assert!(held <= BOUNCE_MAX && writes == (held > 0), "{held} bytes");
                return (calls, work.complete(result, files).result);
            }
        }
    }

    /// Invariants 2 and 4: a range that a device does not unmap is zeroed in another way, and written if need be.
    #[test]
    fn zeroing_that_is_refused_is_tried_in_every_other_way() {
        let (_temp, mut files) = file_in("/tmp").unwrap();
        Arc::get_mut(&mut files[0]).unwrap().write_max = u64::MAX;
        let (offset, len) = (4096 - 512, 3 * BOUNCE_MAX as u64 + 512);
        let zero = |how| Op::Zero { file: FileIndex(0), offset, len, how };
        let is = |call: &Call, wanted| matches!(call, Call::Allocate { mode, .. } if *mode == wanted);
        for errno in [Errno::OPNOTSUPP, Errno::INVAL, Errno::IO] {
            let (calls, result) = zeroed(zero(Zeroing::Unmap), &files, &[errno]);
            assert!(matches!(&calls[..], [a, b] if is(a, PUNCH) && is(b, ZERO)) && result.is_ok());
            let (calls, result) = zeroed(zero(Zeroing::Unmap), &files, &[errno; 2]);
            assert!(is(&calls[0], PUNCH) && is(&calls[1], ZERO) && result.is_ok());
            let mut next = offset;
            for call in &calls[2..] {
                let Call::Transfer { write: true, offset, memory: Memory::One(piece), .. } = call else {
                    panic!("{call:?}")
                };
                assert_eq!(*offset, next);
                next += piece.len as u64;
            }
            assert_eq!(next, offset + len);
            let (calls, result) = zeroed(zero(Zeroing::Unmap), &files, &[errno, errno, Errno::NOSPC]);
            assert_eq!((calls.len(), result.unwrap_err().kind()), (3, io::ErrorKind::StorageFull));
        }
        let (calls, result) = zeroed(zero(Zeroing::Keep), &files, &[Errno::AGAIN, Errno::INTR]);
        assert!(calls.iter().all(|call| is(call, ZERO)) && calls.len() == 3 && result.is_ok());
        let (calls, result) = zeroed(zero(Zeroing::Write), &files, &[]);
        assert!(
            calls.iter().all(|call| matches!(call, Call::Transfer { write: true, .. })) && result.is_ok()
        );
        // A hole is what is asked for, and nothing else.
        let punch = Op::Punch { file: FileIndex(0), offset, len };
        let (calls, result) = zeroed(punch, &files, &[Errno::OPNOTSUPP]);
        assert_eq!((calls.len(), result.unwrap_err().kind()), (1, io::ErrorKind::Unsupported));
    }

    #[test]
    fn writes_are_cut_where_folios_have_lists() {
        for dir in ["/tmp", "/dev/shm"] {
            let Some((temp, files)) = file_in(dir) else { continue };
            let has_lists = rustix::fs::fstatfs(&temp).unwrap().f_type as u64 == 0xef53;
            assert_eq!(files[0].write_max < 1 << 20, has_lists, "{dir}");
            let direct = OpenOptions { write: true, direct: true, ..Default::default() };
            if let Ok(file) = File::open(temp.path(), direct) {
                assert_eq!(file.write_max, u64::MAX, "{dir}");
            }
        }
    }
}
