//! Which file system begins at a place, by its magic number, and its label.

use super::{Disk, clean, le16, le32};
use crate::error::BaseError;

/// Bytes at the beginning in which all but one say what they are.
const HEAD: usize = 4096;
const BTRFS_AT: u64 = 64 << 10;

/// A file system, or what else is put on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// What it is called.
    pub kind: &'static str,
    /// The name that it was given.
    pub label: Option<String>,
}

impl FileSystem {
    /// Whether its first sector looks like a partition table.
    pub(super) fn begins_with_a_boot_sector(&self) -> bool {
        matches!(self.kind, "FAT16" | "FAT32" | "exFAT" | "NTFS")
    }
}

/// A magic number: the name, where it is, what it is, and where the label is (offset and length).
type Magic = (&'static str, usize, &'static [u8], Option<(usize, usize)>);

/// The first that fits counts. An NTFS volume's label is in a file of it, so it has none here.
const MAGICS: [Magic; 10] = [
    ("LUKS", 0, b"LUKS\xba\xbe", None),
    ("xfs", 0, b"XFSB", Some((108, 12))),
    ("squashfs", 0, b"hsqs", None),
    ("NTFS", 3, b"NTFS    ", None),
    ("exFAT", 3, b"EXFAT   ", None),
    ("FAT32", 82, b"FAT32   ", Some((71, 11))),
    ("FAT16", 54, b"FAT1", Some((43, 11))),
    ("LVM", 512, b"LABELONE", None),
    ("swap", HEAD - 10, b"SWAPSPACE2", Some((1052, 16))),
    ("swap", HEAD - 10, b"SWAP-SPACE", None),
];

/// The file system that begins at `offset`, in `len` bytes.
pub(super) fn find(disk: &Disk<'_>, offset: u64, len: u64) -> Result<Option<FileSystem>, BaseError> {
    let head = disk.bytes(offset, len.min(HEAD as u64) as usize)?;
    if let Some(found) = in_head(&head) {
        return Ok(Some(found));
    }
    if len < BTRFS_AT + HEAD as u64 {
        return Ok(None);
    }
    let head = disk.bytes(offset + BTRFS_AT, HEAD)?;
    let is_btrfs = head.get(64..72) == Some(b"_BHRfS_M");
    Ok(is_btrfs.then(|| FileSystem { kind: "btrfs", label: label(&head, 0x12b, 256) }))
}

fn in_head(head: &[u8]) -> Option<FileSystem> {
    if le16(head, 1024 + 56) == 0xef53 {
        // Extents, a journal: what makes it one or the other.
        let kind = match (le32(head, 1024 + 96) & 0x40 != 0, le32(head, 1024 + 92) & 4 != 0) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        };
        return Some(FileSystem { kind, label: label(head, 1024 + 120, 16) });
    }
    let fits = |(_, at, bytes, _): &&Magic| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes));
    let (kind, _, _, place) = MAGICS.iter().find(fits)?;
    let label = place.and_then(|(at, len)| label(head, at, len)).filter(|label| label != "NO NAME");
    Some(FileSystem { kind, label })
}

fn label(head: &[u8], at: usize, len: usize) -> Option<String> {
    clean(String::from_utf8_lossy(head.get(at..at + len)?).chars())
}
