//! The seal of an image that differs from a sealed one in some chunks only: these are hashed, what is known of the
//! others is taken over.
//!
//! So the new manifest says what the image should hold, not what a copy of it has come to hold: should the parent have
//! rotted where nothing was changed, and the copy with it, that is found by whoever reads it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::format::{CHUNK_SIZE, GROUP_CHUNKS, HASH_LEN, HEADER_LEN, Hash, Header, hash};
use super::{Root, Seal};
use crate::error::BaseError;
use crate::format::BaseFormat;

/// A seal that is being made.
#[derive(Debug)]
pub(crate) struct NextSeal<'a> {
    parent: &'a Seal,
    size: u64,
    changed: BTreeMap<u64, Hash>,
}

impl<'a> NextSeal<'a> {
    /// Of a disk of `size` bytes, which is all as `parent` says, as far as that goes, and zeroes after it.
    pub(crate) fn new(parent: &'a Seal, size: u64) -> Self {
        Self { parent, size, changed: BTreeMap::new() }
    }

    /// How many bytes chunk number `chunk` has.
    pub(crate) fn len_of(&self, chunk: u64) -> u64 {
        self.size.saturating_sub(chunk * CHUNK_SIZE).min(CHUNK_SIZE)
    }

    /// The chunk of which nothing can be taken over although nothing in it was changed: the parent's end cuts it short,
    /// and not its own.
    pub(crate) fn chunk_at_seam(&self) -> Option<u64> {
        let chunk = self.parent.size() / CHUNK_SIZE;
        let cut = self.parent.len_of(chunk);
        (cut > 0 && cut != self.len_of(chunk)).then_some(chunk)
    }

    /// These are the bytes of chunk number `chunk`.
    pub(crate) fn set_chunk(&mut self, chunk: u64, bytes: &[u8]) {
        self.changed.insert(chunk, hash(bytes));
    }

    /// The chunks whose bytes were given, in ascending order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        self.changed.keys().copied()
    }

    fn hash_of(&self, chunk: u64, zeroes: &Hash) -> io::Result<Hash> {
        if let Some(hash) = self.changed.get(&chunk) {
            return Ok(*hash);
        }
        match (self.parent.len_of(chunk), self.len_of(chunk)) {
            (0, CHUNK_SIZE) => Ok(*zeroes),
            (0, len) => Ok(hash(&vec![0; len as usize])),
            (old, new) if old == new => self.parent.hash_of(chunk),
            _ => Err(io::Error::other(format!("nothing is known of chunk {chunk}"))),
        }
    }

    /// Writes the manifest of an image of that disk to `path`, durably but for its name. Only its owner can read it. Returns the
    /// file that was written, too.
    ///
    /// # Errors
    /// If the parent's manifest can't be read, or the new one can't be written.
    pub(crate) fn write(&self, path: &Path, format: BaseFormat) -> Result<(Root, fs::File), BaseError> {
        let failed =
            |operation: &'static str| move |source: io::Error| BaseError::manifest(operation, path, source);
        // One that was left goes, and no link that somebody has put there is followed.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove")(error)),
            _ => {}
        }
        let file = fs::File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(failed("make"))?;
        let chunks = Header::chunks(self.size);
        let zeroes = hash(&vec![0; CHUNK_SIZE as usize]);
        let mut groups = Vec::new();
        let mut at = HEADER_LEN as u64;
        for first in (0..chunks).step_by(GROUP_CHUNKS as usize) {
            let mut hashes = Vec::with_capacity(GROUP_CHUNKS as usize * HASH_LEN);
            for chunk in first..(first + GROUP_CHUNKS).min(chunks) {
                hashes.extend(self.hash_of(chunk, &zeroes).map_err(failed("take hashes over for"))?);
            }
            groups.push(hash(&hashes));
            file.write_all_at(&hashes, at).map_err(failed("write"))?;
            at += hashes.len() as u64;
        }
        let root = Header::root_of(self.size, &groups);
        let header = Header { size: self.size, format, root }.to_bytes();
        file.write_all_at(&header, 0).and_then(|()| file.sync_all()).map_err(failed("write"))?;
        Ok((Root(root), file))
    }
}
