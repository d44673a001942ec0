//! What the tests of this crate share: directories, files, guest memory, running an engine dry.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use blockio::{AlignedBuf, Buffer, Completion, Engine, File, GuestBuf, IoVec, OpenOptions};
use tempfile::TempDir;

/// A directory where files are like the disks of production: on the build directory's file system.
pub(crate) fn disk_dir() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A directory on tmpfs, if there is one.
pub(crate) fn memory_dir() -> Option<TempDir> {
    tempfile::tempdir_in("/dev/shm").ok()
}

pub(crate) fn open(path: &Path, write: bool, direct: bool) -> File {
    File::open(path, OpenOptions { write, direct, exclusive: false }).unwrap()
}

pub(crate) fn create(path: &Path, size: u64) -> File {
    File::create_new(path, size, OpenOptions::default()).unwrap()
}

pub(crate) fn owned(data: &[u8]) -> Buffer {
    let mut buf = AlignedBuf::new_zeroed(data.len());
    buf.copy_from_slice(data);
    buf.into()
}

/// Memory of a pretended guest: `data` in pieces of `piece` bytes, with `gap` bytes between them
/// that nobody may touch.
pub(crate) struct Guest {
    memory: Arc<Mutex<AlignedBuf>>,
    base: *mut u8,
    len: usize,
    piece: usize,
    gap: usize,
}

const UNTOUCHED: u8 = 0xee;

impl Guest {
    pub(crate) fn new(data: &[u8], shift: usize, piece: usize, gap: usize) -> Guest {
        let pieces = data.len().div_ceil(piece);
        let mut memory = AlignedBuf::new_zeroed(shift + pieces * (piece + gap));
        memory.fill(UNTOUCHED);
        let base = memory[shift..].as_mut_ptr();
        let guest = Guest { memory: Arc::new(Mutex::new(memory)), base, len: data.len(), piece, gap };
        assert_eq!(guest.buf().copy_in(0, data), data.len());
        guest
    }

    pub(crate) fn buf(&self) -> GuestBuf {
        let stride = self.piece + self.gap;
        let parts = (0..self.len.div_ceil(self.piece)).map(|n| IoVec {
            base: self.base.wrapping_add(n * stride),
            len: self.piece.min(self.len - n * self.piece),
        });
        // SAFETY: the parts lie in the memory that the guard owns, which nobody reads as a slice
        // while I/O is in flight.
        unsafe { GuestBuf::new(parts, self.memory.clone()) }
    }

    /// Asserts that not a byte between the pieces was touched.
    pub(crate) fn assert_gaps_untouched(&self) {
        let memory = self.memory.lock().unwrap();
        let start = self.base.addr() - memory.as_ptr().addr();
        assert!(memory[..start].iter().all(|byte| *byte == UNTOUCHED));
        for n in 0..self.len.div_ceil(self.piece) {
            let gap = start + n * (self.piece + self.gap) + self.piece;
            assert!(memory[gap..gap + self.gap].iter().all(|byte| *byte == UNTOUCHED));
        }
    }
}

pub(crate) fn bytes(buf: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buf.len()];
    assert_eq!(buf.copy_out(0, &mut bytes), bytes.len());
    bytes
}

/// Submits and waits until nothing is in flight; completions in the order of their tokens.
pub(crate) fn run(engine: &mut dyn Engine) -> Vec<Completion> {
    engine.submit();
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    done.sort_by_key(|done| done.token);
    done
}
