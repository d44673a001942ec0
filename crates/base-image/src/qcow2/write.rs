//! Writing a new qcow2 image that lies on another one: what differs from it, and nothing else.

use std::fs::File;
use std::io;
use std::path::Path;

use imago::qcow2::Qcow2 as Driver;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use crate::format::BaseFormat;

/// Bytes of a cluster, the unit in which an overlay has bytes of its own. Those of [`Overlay::write`] begin at a multiple
/// of it and are whole clusters, except at the end of the disk.
pub const CLUSTER_SIZE: u64 = 64 << 10;

/// As QEMU has it: a header with a longer name is refused by it.
const BACKING_NAME_MAX: usize = 1023;

type Imago = imago::file::File;

/// A qcow2 image (version 3, clusters of 64 KiB) that is being made. What is not written to it is its backing file's. Nothing
/// of that is opened or looked at.
#[derive(Debug)]
pub struct Overlay {
    access: FormatAccess<Imago>,
    size: u64,
}

impl Overlay {
    /// Begins an image of a disk of `size` bytes in the empty `file`, on the image at `backing`: an absolute path, or one that
    /// begins in the new image's directory.
    ///
    /// # Errors
    /// If that can't be written, or qcow2 can't name such a file.
    pub fn create(file: File, size: u64, backing: &Path, format: BaseFormat) -> io::Result<Self> {
        let refuse = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let name = backing
            .to_str()
            .filter(|name| (1..=BACKING_NAME_MAX).contains(&name.len()))
            .ok_or_else(|| {
                refuse(format!(
                    "a qcow2 image can't name {} as its backing file: its path must be UTF-8 of at most {BACKING_NAME_MAX} \
                     bytes",
                    backing.display()
                ))
            })?;
        let builder = Driver::<Imago>::create_builder(Imago::try_from(file)?)
            .size(size)
            .cluster_size(CLUSTER_SIZE as usize)
            .backing(name.to_owned(), format.name().to_owned());
        let driver = builder.create_open(DenyImplicitOpenGate::default(), |image| {
            Ok(Driver::<Imago>::builder(image).backing(None).write(true))
        })?;
        Ok(Self { access: FormatAccess::new(driver), size })
    }

    /// Gives whole clusters, from `offset` on, these bytes.
    ///
    /// # Errors
    /// If they are not whole clusters inside the disk, or can't be written.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.access.write(bytes, offset)
    }

    /// Makes whole clusters, from `offset` on, zeroes, which takes no room.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.access.write_zeroes(offset, len)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let whole = offset.is_multiple_of(CLUSTER_SIZE)
            && end.is_some_and(|end| end == self.size || end.is_multiple_of(CLUSTER_SIZE));
        if whole { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Finishes the image. It is durable when this returns; its name is the caller's business.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn finish(self) -> io::Result<()> {
        self.access.flush()?;
        self.access.sync()
    }
}
