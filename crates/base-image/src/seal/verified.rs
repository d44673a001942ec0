//! A base whose bytes are compared with its seal before anybody gets them.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use blocks::{BlockSet, Extent};

use super::Seal;
use super::format::{CHUNK_SIZE, Header};
use crate::pool::Source;
use crate::store::Store;

/// How many bad chunks are told of in the log.
const TOLD_MAX: u32 = 16;

thread_local! {
    /// A chunk that is read for the sake of a part of it.
    static CHUNK: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The bytes of a base, as far as they are what was sealed.
#[derive(Debug)]
pub(crate) struct Verified {
    store: Arc<Store>,
    seal: Arc<Seal>,
    zeroes: super::Hash,
    /// Chunks that were read and found good, by their numbers. Only asked for what is not read, and while the base is what it
    /// was then.
    good: BlockSet,
    has_changed: AtomicBool,
    /// How many bad chunks were told of.
    told: AtomicU32,
}

impl Verified {
    pub(crate) fn new(store: Arc<Store>, seal: Arc<Seal>) -> Self {
        let good = BlockSet::new(Header::chunks(seal.size()));
        let zeroes = super::hash(&vec![0; CHUNK_SIZE as usize]);
        Self { store, seal, zeroes, good, has_changed: AtomicBool::new(false), told: AtomicU32::new(0) }
    }

    /// What was found good may be something else by now.
    pub(crate) fn forget_good(&self) {
        self.has_changed.store(true, Ordering::Release);
    }

    pub(crate) fn seal(&self) -> &Arc<Seal> {
        &self.seal
    }

    /// A guest only sees an I/O error, and may ask again and again.
    fn tell(&self, error: &io::Error) {
        if self.told.fetch_add(1, Ordering::Relaxed) < TOLD_MAX {
            log::error!("base image {}: {error}", self.store.path().display());
        }
    }

    /// Reads chunk number `chunk` into `buf`, which is as long, and compares it.
    fn read_chunk(&self, chunk: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(buf, chunk * CHUNK_SIZE)?;
        self.seal.check(chunk, buf).inspect_err(|error| self.tell(error))?;
        self.good.insert(Extent::new(chunk, 1));
        Ok(())
    }

    /// The same, for the sake of `buf.len()` bytes from `skip` on.
    fn read_part(&self, chunk: u64, skip: usize, buf: &mut [u8]) -> io::Result<()> {
        CHUNK.with_borrow_mut(|whole| {
            whole.resize(self.seal.len_of(chunk) as usize, 0);
            self.read_chunk(chunk, whole)?;
            let part = whole.get(skip..skip + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(part);
            Ok(())
        })
    }

    /// Compares chunk number `chunk`, whatever is known of it.
    pub(crate) fn check_chunk(&self, chunk: u64) -> io::Result<()> {
        self.read_part(chunk, 0, &mut [])
    }

    /// Fails unless `len` bytes from `offset` on, which the base stores nothing of, were zeroes when it was sealed.
    pub(crate) fn check_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.seal.size());
        if offset >= end {
            // Past the end there is nothing, sealed or not.
            return Ok(());
        }
        for chunk in offset / CHUNK_SIZE..end.div_ceil(CHUNK_SIZE) {
            let (begin, chunk_len) = (chunk * CHUNK_SIZE, self.seal.len_of(chunk));
            let is_whole = begin >= offset && begin + chunk_len <= end;
            if is_whole && chunk_len == CHUNK_SIZE && self.seal.hash_of(chunk)? == self.zeroes {
                continue;
            }
            // What is a hole in a file reads as zeroes, so that it was read as sealed is enough.
            let is_good = self.good.contains(chunk) && !self.has_changed.load(Ordering::Acquire);
            if !is_whole && is_good && self.store.holes_read_as_zeroes() {
                continue;
            }
            let (from, to) = (offset.max(begin), end.min(begin + chunk_len));
            self.check_zeroes(chunk, (from - begin) as usize, (to - from) as usize)?;
        }
        Ok(())
    }

    /// Compares a chunk, and fails unless `len` bytes of it, from `skip` on, are zeroes.
    fn check_zeroes(&self, chunk: u64, skip: usize, len: usize) -> io::Result<()> {
        let mut part = vec![0; len];
        self.read_part(chunk, skip, &mut part)?;
        if part.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let at = chunk * CHUNK_SIZE + skip as u64;
        let what = format!(
            "the {len} bytes at offset {at} of the base are said to be a hole, and were none when sealed"
        );
        let error = io::Error::new(io::ErrorKind::InvalidData, what);
        self.tell(&error);
        Err(error)
    }
}

impl Source for Verified {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (chunk, skip) = (offset / CHUNK_SIZE, offset % CHUNK_SIZE);
            let chunk_len = self.seal.len_of(chunk);
            let len = chunk_len.saturating_sub(skip).min(buf.len() as u64);
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (part, rest) = buf.split_at_mut(len as usize);
            if len == chunk_len {
                self.read_chunk(chunk, part)?;
            } else {
                self.read_part(chunk, skip as usize, part)?;
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }
}
