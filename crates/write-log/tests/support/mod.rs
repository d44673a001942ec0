//! What the tests share: a file in memory that fails, is short or loses power as told.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

pub mod fixtures;

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use blocks::{BlockSet, Extent, Geometry};
use uuid::Uuid;
use write_log::{LogContents, LogError, LogFile, LogHeader, LogId, LogKind, LogWriter};

/// What a write does, in the order of the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Takes no more than this many bytes, at least one.
    Short(usize),
    /// Writes this many bytes, as far as there are so many, and fails.
    FailAfter(usize),
}

#[derive(Clone, Debug, Default)]
pub struct State {
    /// What a reader sees.
    pub bytes: Vec<u8>,
    /// What a power cut leaves at least.
    pub durable: Vec<u8>,
    /// What it may leave of the rest: (offset, bytes), oldest first.
    pub unsynced: Vec<(usize, Vec<u8>)>,
    pub faults: VecDeque<Fault>,
    pub sync_fails: bool,
    pub reserve_error: Option<io::ErrorKind>,
    pub writes: usize,
}

/// A file in memory; clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemFile(Arc<Mutex<State>>);

impl MemFile {
    pub fn of(bytes: Vec<u8>) -> Self {
        let file = Self::default();
        file.state().bytes = bytes;
        file
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// What is there after a power cut that keeps those 512-byte sectors of the unsynced writes
    /// for which `keep` says so.
    pub fn after_power_cut(&self, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let state = self.state();
        let mut bytes = state.durable.clone();
        for (offset, data) in &state.unsynced {
            let mut at = 0;
            while at < data.len() {
                let end = data.len().min(at + 512 - (offset + at) % 512);
                if keep() {
                    bytes[offset + at..offset + end].copy_from_slice(&data[at..end]);
                }
                at = end;
            }
        }
        bytes
    }
}

impl LogFile for MemFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        state.writes += 1;
        let fault = state.faults.pop_front().unwrap_or(Fault::None);
        let count = match fault {
            Fault::None => bytes.len(),
            Fault::Short(count) => bytes.len().min(count.max(1)),
            Fault::FailAfter(count) => bytes.len().min(count),
        };
        let at = offset as usize;
        assert!(at + count <= state.bytes.len(), "a write past the reserved room");
        state.bytes[at..at + count].copy_from_slice(&bytes[..count]);
        state.unsynced.push((at, bytes[..count].to_vec()));
        if matches!(fault, Fault::FailAfter(_)) { Err(io::Error::other("injected")) } else { Ok(count) }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.state();
        let rest = state.bytes.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let mut state = self.state();
        if std::mem::take(&mut state.sync_fails) {
            return Err(io::Error::other("injected"));
        }
        state.durable = state.bytes.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        let mut state = self.state();
        if let Some(kind) = state.reserve_error {
            return Err(kind.into());
        }
        state.bytes = vec![0; len as usize];
        state.durable = state.bytes.clone();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }
}

pub fn path() -> PathBuf {
    PathBuf::from("test.wlog")
}

pub fn header(kind: LogKind, blocks: u64) -> LogHeader {
    LogHeader {
        kind,
        id: LogId { seq: 42, uuid: Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef) },
        disk: Uuid::from_u128(0xfedc_ba98_7654_4321_8fed_cba9_8765_4321),
        geometry: Geometry::new(blocks * 4096).unwrap(),
        created_unix_ns: 1_700_000_000_123_456_789,
    }
}

/// A log in memory with the smallest areas.
pub fn small_log(blocks: u64) -> (MemFile, LogWriter) {
    let header = header(LogKind::Session, blocks);
    let file = MemFile::default();
    let size = write_log::area_size_min(header.geometry);
    let log = LogWriter::create_on(Box::new(file.clone()), path(), &header, size).unwrap();
    (file, log)
}

pub fn read_bytes(bytes: Vec<u8>) -> Result<LogContents, LogError> {
    write_log::read_from(&MemFile::of(bytes), &path())
}

pub fn runs(set: &BlockSet) -> Vec<Extent> {
    set.runs().collect()
}

pub fn set_of(blocks: u64, extents: &[Extent]) -> BlockSet {
    let set = BlockSet::new(blocks);
    extents.iter().for_each(|extent| {
        set.insert(*extent);
    });
    set
}
