//! One qcow2 file of a chain, without the files that it is backed by.
//!
//! The `imago` crate looks clusters up and unpacks compressed ones. What it would take without a word is
//! checked here: to it, tables and data past the end of a file, which was cut off, are zeroes.

mod header;
mod write;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use blockio::File;
use imago::qcow2::Qcow2 as Driver;
use imago::{FormatAccess, ShallowMapping};

use self::header::{HEADER_LEN, Header, backing_format};
pub use self::write::{CLUSTER_SIZE, Overlay};
use crate::chain::Found;

/// Sectors are what the lengths of compressed clusters are counted in.
const SECTOR: u64 = 512;
/// The bits of a table's entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// How many tables imago keeps in memory of an image (0.2.6: the cache of L2 tables that it makes for each).
const TABLES_KEPT: u64 = 128;

/// An open qcow2 file.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    file: Arc<File>,
    file_size: u64,
    header: Header,
    /// Offsets of the tables, as the file says; 0: there is none.
    tables: Vec<u64>,
    access: FormatAccess<imago::file::File>,
    /// The file beneath, as the header names it, and its format.
    pub(crate) backing: Option<(String, Option<String>)>,
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image is damaged or cut off: {what}"))
}

impl Qcow2 {
    /// Takes a file that was opened read-only. Follows no reference to another file.
    ///
    /// # Errors
    /// What is wrong with the file, as a sentence about it.
    pub(crate) fn open(file: Arc<File>) -> Result<Self, String> {
        let say = |error: &dyn std::error::Error| error.to_string();
        let file_size = file.size().map_err(|error| say(&error))?;
        let mut head = [0; HEADER_LEN];
        let inside = file_size.min(HEADER_LEN as u64) as usize;
        if let Some(head) = head.get_mut(..inside) {
            file.read_exact_at(head, 0).map_err(|error| say(error.io_error()))?;
        }
        let header = Header::parse(&head, file_size)?;
        let tables = read_tables(&file, file_size, &header).map_err(|error| say(&error))?;
        let duplicate = file.as_fd().try_clone_to_owned().map_err(|error| say(&error))?;
        let open = || -> io::Result<_> {
            let storage = imago::file::File::try_from(std::fs::File::from(duplicate))?;
            let driver = Driver::<imago::file::File>::open_image(storage, false)?;
            let backing = driver.implicit_backing_file().cloned();
            let format = driver.implicit_backing_format().cloned();
            Ok((FormatAccess::new(driver), backing.map(|name| (name, format))))
        };
        let (access, backing) = open().map_err(|error| format!("it can't be read as qcow2: {error}"))?;
        let backing = match (backing, header.extensions) {
            // The driver reads no extensions of version 2.
            (Some((name, None)), Some((begin, end))) => {
                let mut extensions = vec![0; (end - begin) as usize];
                file.read_exact_at(&mut extensions, begin).map_err(|error| say(error.io_error()))?;
                Some((name, backing_format(&extensions)?))
            }
            (backing, _) => backing,
        };
        Ok(Self { file, file_size, header, tables, access, backing })
    }

    /// Bytes of memory that it may take: the table of tables, as it is and as the driver reads it, and the tables that the driver
    /// keeps.
    pub(crate) fn memory_max(&self) -> u64 {
        let used = self.tables.iter().filter(|table| **table != 0).count() as u64;
        8 * (self.header.l1_entries + self.header.l1_stated) + used.min(TABLES_KEPT) * self.header.cluster()
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.header.size
    }

    /// What is at `offset`, for at most `len` bytes; both inside the disk.
    pub(crate) fn find(&self, offset: u64, len: u64) -> io::Result<(Found, u64)> {
        let (mapping, found) = self.access.get_shallow_mapping(offset, len)?;
        let len = found.min(len);
        if len == 0 {
            return Err(damaged(format_args!("nothing is said of byte {offset} of the disk")));
        }
        match mapping {
            ShallowMapping::Raw { offset: at, .. } => {
                self.check_inside(at, len)?;
                Ok((Found::Bytes(at), len))
            }
            // Without a file beneath, clusters that this file says nothing of are zeroes, but not by its word.
            ShallowMapping::Zero { explicit, .. } => {
                Ok((if explicit { Found::Zero } else { Found::Unallocated }, len))
            }
            ShallowMapping::Special { .. } => Ok((Found::Packed, len)),
            _ => Err(damaged(format_args!("nothing is said of byte {offset} of the disk"))),
        }
    }

    /// Reads data that [`find`](Self::find) found at byte `at` of the file.
    pub(crate) fn read_bytes(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at).map_err(io::Error::other)
    }

    /// Unpacks compressed clusters, which [`find`](Self::find) found at `offset` of the disk.
    pub(crate) fn read_packed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut cluster = offset & !(self.header.cluster() - 1);
        while cluster < end {
            self.check_packed(cluster)?;
            cluster += self.header.cluster();
        }
        self.access.read(buf, offset)
    }

    /// Fails unless the range lies inside the file.
    fn check_inside(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.saturating_add(len);
        if end <= self.file_size {
            return Ok(());
        }
        Err(damaged(format_args!("data up to byte {end}, and the file has {} bytes", self.file_size)))
    }

    /// Fails unless the compressed data of the cluster at `offset` of the disk lies inside the file.
    fn check_packed(&self, offset: u64) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        let per_table = bits - 3;
        let table = self.tables.get((offset >> (bits + per_table)) as usize).copied().unwrap_or(0);
        let index = (offset >> bits) & ((1 << per_table) - 1);
        let mut entry = [0; 8];
        self.file.read_exact_at(&mut entry, table + index * 8).map_err(io::Error::other)?;
        let entry = u64::from_be_bytes(entry);
        let offset_bits = 62 - (bits - 8);
        let begin = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & ((1 << 62) - 1)) >> offset_bits;
        let end = (begin - begin % SECTOR).saturating_add((more_sectors + 1) * SECTOR);
        if end <= self.file_size.next_multiple_of(SECTOR) {
            Ok(())
        } else {
            Err(damaged(format_args!(
                "compressed data up to byte {end}, and the file has {} bytes",
                self.file_size
            )))
        }
    }
}

/// The offsets of the tables; each lies inside the file.
fn read_tables(file: &File, file_size: u64, header: &Header) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; header.l1_entries as usize * 8];
    file.read_exact_at(&mut bytes, header.l1_offset).map_err(io::Error::other)?;
    let tables = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry) & OFFSET_MASK);
    let tables: Vec<u64> = tables.collect();
    let last = file_size.saturating_sub(header.cluster());
    match tables.iter().find(|table| **table > last) {
        None => Ok(tables),
        Some(table) => {
            Err(damaged(format_args!("a table at byte {table}, and the file has {file_size} bytes")))
        }
    }
}
