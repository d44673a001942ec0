//! The image of a new generation: a copy of its parent, or an overlay on it, to which what is changed is written.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use blockio::File;

use super::place::Place;
use super::{NewGeneration, go_on};
use crate::error::BaseError;
use crate::format::BaseFormat;
use crate::image::{BaseImage, Content};
use crate::qcow2::{CLUSTER_SIZE, Overlay};
use crate::seal::CHUNK_SIZE;

/// So a chunk is a cluster, and none is ever written in part.
const _: () = assert!(CHUNK_SIZE == CLUSTER_SIZE);

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// Bytes of which it is asked at once where they are.
const LOOK: u64 = 64 << 20;

/// How a new image came by what it has in common with its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyWay {
    /// It shares the parent's room on the file system (`FICLONE`).
    Reflinked,
    /// This many bytes were copied.
    Copied(u64),
    /// It lies on the parent, which has to stay where it is.
    Overlay,
}

/// An image that is being made.
pub(super) enum NewImage<'a> {
    Raw(&'a File),
    Qcow2 { overlay: Overlay, path: &'a Path },
}

impl<'a> NewImage<'a> {
    /// Makes it equal to its parent.
    pub(super) fn create(
        place: &'a Place,
        new: &NewGeneration<'_>,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Self, CopyWay), BaseError> {
        match new.format {
            BaseFormat::Raw => {
                let way = copy(place.file(), new.parent, new.size, stop, progress)?;
                Ok((Self::Raw(place.file()), way))
            }
            BaseFormat::Qcow2 => {
                let overlay = overlay(place, new)?;
                Ok((Self::Qcow2 { overlay, path: place.temporary() }, CopyWay::Overlay))
            }
        }
    }

    /// Writes a chunk, of which `parts` are changed, to byte `offset` of the disk. An overlay gets all of it.
    pub(super) fn write_chunk(
        &mut self,
        offset: u64,
        chunk: &[u8],
        parts: &[Range<usize>],
    ) -> Result<(), BaseError> {
        let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        match self {
            Self::Raw(file) => {
                for part in parts {
                    let (bytes, at) =
                        (chunk.get(part.clone()).unwrap_or_default(), offset + part.start as u64);
                    if is_zero(bytes) && file.supports_punch() {
                        file.punch_hole(at, bytes.len() as u64)?;
                    } else {
                        file.write_all_at(bytes, at)?;
                    }
                }
                Ok(())
            }
            Self::Qcow2 { overlay, path } => {
                let written = match is_zero(chunk) {
                    true => overlay.zero(offset, chunk.len() as u64),
                    false => overlay.write(chunk, offset),
                };
                written.map_err(|error| BaseError::manifest("write", path, error))
            }
        }
    }

    /// Hands all of it to the file.
    pub(super) fn finish(self) -> Result<(), BaseError> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2 { overlay, path } => {
                overlay.finish().map_err(|error| BaseError::manifest("write", path, error))
            }
        }
    }
}

/// Makes the empty `file` a raw image that is equal to `parent` and has `size` bytes.
fn copy(
    file: &File,
    parent: &BaseImage,
    size: u64,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CopyWay, BaseError> {
    let cut = |size| {
        rustix::fs::ftruncate(file, size)
            .map_err(|errno| BaseError::manifest("resize", file.path(), errno.into()))
    };
    if parent.format().is_raw()
        && parent.file().is_some_and(|parent| rustix::fs::ioctl_ficlone(file, &**parent).is_ok())
    {
        cut(size)?;
        return Ok(CopyWay::Reflinked);
    }
    cut(size)?;
    let (mut at, mut copied) = (0, 0);
    let mut buf = vec![0; PIECE as usize];
    while at < parent.size() {
        go_on(stop)?;
        match parent.content_at(at, LOOK.min(parent.size() - at))? {
            Content::Hole(len) => at += len,
            Content::Data(len) => {
                let piece = buf.get_mut(..len.min(PIECE) as usize).unwrap_or_default();
                parent.read_at(piece, at)?;
                file.write_all_at(piece, at)?;
                at += piece.len() as u64;
                copied += piece.len() as u64;
            }
        }
        progress(at, parent.size());
    }
    Ok(CopyWay::Copied(copied))
}

/// Makes the empty file of `place` a qcow2 image on the parent that holds nothing yet.
fn overlay(place: &Place, new: &NewGeneration<'_>) -> Result<Overlay, BaseError> {
    let name = place.name_from_here(new.parent.path());
    // A colon would make a protocol of what is before it.
    let has_colon = name.as_os_str().as_encoded_bytes().contains(&b':');
    let name = if has_colon && name.is_relative() { Path::new(".").join(name) } else { name };
    let make = || -> io::Result<Overlay> {
        let duplicate = place.file().as_fd().try_clone_to_owned()?;
        Overlay::create(duplicate.into(), new.size, &name, new.parent.format())
    };
    make().map_err(|error| BaseError::manifest("make", place.temporary(), error))
}
