//! Making a seal: every chunk is read and hashed, by all processors.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::Mode;

use super::format::{CHUNK_SIZE, GROUP_CHUNKS, HASH_LEN, HEADER_LEN, Hash, Header, MAGIC, hash};
use super::{Root, manifest_path, refused};
use crate::error::BaseError;
use crate::image::{BaseImage, Content};
use crate::protect::protect_as;
use crate::replace::{Kind, Replacement};

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// What a manifest takes the place of: another one.
const KIND: Kind = Kind { magic: MAGIC, name: "manifest of a base" };

/// Hashes all of a base and writes its manifest beside it, as [`seal_to`] does.
///
/// # Errors
/// As [`seal_to`], and if it is no regular file, which has nothing beside it.
pub fn seal(base: &BaseImage, stop: &AtomicBool, progress: &mut dyn FnMut(u64)) -> Result<Root, BaseError> {
    if regular_file(base).is_none() {
        let what = "it is no regular file, so it has no place for a manifest beside it; name one with --base-manifest";
        return Err(refused(base.path(), what));
    }
    seal_to(base, &manifest_path(base.path()), stop, progress)
}

/// The file of a base, if it is a regular one, whose mode says who may read it.
fn regular_file(base: &BaseImage) -> Option<&blockio::File> {
    base.file().map(AsRef::as_ref).filter(|file| file.kind() == blockio::FileKind::Regular)
}

/// Hashes all of a base and writes its manifest to `path`, in the place of one that may be there: the old one holds until the
/// new one is durable. Nothing but a manifest is replaced. Those who may read the base's file may read it; of a device or an
/// export that is not known, and it has the mode that all new files have. `progress` is told how many bytes are done. A base
/// that has a seal is read past it.
///
/// # Errors
/// If something else is at `path` than a manifest; if the base can't be read, or changes meanwhile; if the manifest can't be
/// written, or another process is at it; if `stop` is set ([`BaseError::Stopped`]).
pub fn seal_to(
    base: &BaseImage,
    path: &Path,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Root, BaseError> {
    let before = base.identity()?;
    refuse_own_file(base, path)?;
    let file = regular_file(base);
    let new = Replacement::begin(path, KIND, if file.is_some() { 0o600 } else { 0o666 })?;
    let root = write(base, &new, stop, progress)?;
    if let Some(file) = file {
        protect_as(file, new.file(), Mode::WUSR, new.name())?;
    }
    new.file().sync_all().map_err(|source| BaseError::manifest("write", new.name(), source))?;
    base.check(&before)?;
    new.publish()?;
    Ok(root)
}

/// Fails if `path` is one of the files that the base is made of, whatever they begin with: a guest may have written that.
fn refuse_own_file(base: &BaseImage, path: &Path) -> Result<(), BaseError> {
    let Ok(named) = fs::metadata(path) else { return Ok(()) };
    for own in base.paths()? {
        let of = fs::metadata(&own).map_err(|source| BaseError::manifest("look at", &own, source))?;
        if (of.dev(), of.ino()) == (named.dev(), named.ino()) {
            let what = "it is a file of the base that is to be sealed; name another file";
            let source = io::Error::new(io::ErrorKind::AlreadyExists, what);
            return Err(BaseError::manifest("replace", path, source));
        }
    }
    Ok(())
}

fn write(
    base: &BaseImage,
    new: &Replacement,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Root, BaseError> {
    let (file, path) = (new.file(), new.name());
    let size = base.size();
    let count = Header::chunks(size).div_ceil(GROUP_CHUNKS);
    let mut groups: Vec<Hash> = vec![[0; HASH_LEN]; count as usize];
    let (next, done, gave_up) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let (tell, told) = channel();
        for _ in 0..threads {
            let (tell, next, done, gave_up) = (tell.clone(), &next, &done, &gave_up);
            scope.spawn(move || {
                let mut buf = vec![0; CHUNK_SIZE as usize];
                loop {
                    let group = next.fetch_add(1, Ordering::Relaxed);
                    if group >= count || stop.load(Ordering::Acquire) || gave_up.load(Ordering::Acquire) {
                        return;
                    }
                    let result = hash_group(base, group, &mut buf, done).and_then(|hashes| {
                        let at = HEADER_LEN as u64 + group * GROUP_CHUNKS * HASH_LEN as u64;
                        file.write_all_at(&hashes, at)
                            .map_err(|source| BaseError::manifest("write", path, source))?;
                        Ok((group, hash(&hashes)))
                    });
                    gave_up.fetch_or(result.is_err(), Ordering::AcqRel);
                    if tell.send(result).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        loop {
            match told.recv_timeout(TELL_EVERY) {
                Ok(result) => {
                    let (group, hash) = result?;
                    if let Some(place) = groups.get_mut(group as usize) {
                        *place = hash;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok::<(), BaseError>(()),
            }
            progress(done.load(Ordering::Relaxed));
        }
    })?;
    if stop.load(Ordering::Acquire) {
        return Err(BaseError::Stopped);
    }
    let root = Header::root_of(size, &groups);
    let header = Header { size, format: base.format(), root }.to_bytes();
    file.write_all_at(&header, 0).map_err(|source| BaseError::manifest("write", path, source))?;
    Ok(Root(root))
}

/// The hashes of a group's chunks.
fn hash_group(base: &BaseImage, group: u64, buf: &mut [u8], done: &AtomicU64) -> Result<Vec<u8>, BaseError> {
    let begin = group * GROUP_CHUNKS * CHUNK_SIZE;
    let end = (begin + GROUP_CHUNKS * CHUNK_SIZE).min(base.size());
    let mut hashes = Vec::with_capacity(GROUP_CHUNKS as usize * HASH_LEN);
    let mut of_zeroes = None;
    let mut at = begin;
    while at < end {
        let len = CHUNK_SIZE.min(end - at);
        let chunk = buf.get_mut(..len as usize).unwrap_or_default();
        // Holes are not read, which is most of a sparse image.
        if base.content_at(at, len)? == Content::Hole(len) && len == CHUNK_SIZE {
            hashes.extend(*of_zeroes.get_or_insert_with(|| {
                chunk.fill(0);
                hash(chunk)
            }));
        } else {
            base.read_at(chunk, at)?;
            hashes.extend(hash(chunk));
        }
        at += len;
        done.fetch_add(len, Ordering::Relaxed);
    }
    Ok(hashes)
}
