//! The partition table of a master boot record, with the logical partitions in an extended one.

use super::{Area, Disk, le16, le32};
use crate::error::BaseError;

const SECTOR: u64 = 512;
const ENTRIES: [usize; 4] = [446, 462, 478, 494];
/// Logical partitions that are looked for: each is a read, and says where the next one is.
const LOGICAL_MAX: u32 = 64;
/// The table that stands for a GPT.
const PROTECTIVE: u8 = 0xee;

/// An entry that is in use.
struct Entry {
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn area(&self, number: u32, from: u64) -> Area {
        Area {
            offset: (from + self.first) * SECTOR,
            len: self.sectors * SECTOR,
            number: Some(number),
            name: None,
            purpose: Some(purpose(self.kind)),
            filesystem: None,
        }
    }
}

fn purpose(kind: u8) -> String {
    let name = match kind {
        0x01 | 0x04 | 0x06 | 0x0e => "FAT16",
        0x07 => "NTFS or exFAT",
        0x0b | 0x0c => "FAT32",
        0x27 => "Windows recovery",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xef => "EFI system",
        0xfd => "Linux RAID",
        _ => return format!("type {kind:#04x}"),
    };
    name.to_owned()
}

/// The partitions; `None`: there is no table that makes sense.
pub(super) fn read(disk: &Disk<'_>) -> Result<Option<Vec<Area>>, BaseError> {
    let Some(entries) = table(disk, 0)? else { return Ok(None) };
    let mut areas = Vec::new();
    let (mut extended, mut protective) = (None, false);
    for (number, entry) in (1..).zip(&entries) {
        match entry {
            Some(entry) if entry.is_extended() => extended = extended.or(Some(entry.first)),
            Some(entry) if entry.kind == PROTECTIVE => protective = true,
            Some(entry) => areas.push(entry.area(number, 0)),
            None => {}
        }
    }
    if let Some(begin) = extended {
        logical(disk, begin, &mut areas)?;
    }
    // What a GPT that can't be trusted leaves says nothing.
    Ok((!areas.is_empty() && !protective).then_some(areas))
}

/// The partitions in the extended one that begins at sector `begin`: a chain of tables.
fn logical(disk: &Disk<'_>, begin: u64, areas: &mut Vec<Area>) -> Result<(), BaseError> {
    let mut at = begin;
    for number in 5..5 + LOGICAL_MAX {
        let Some([partition, next, ..]) = table(disk, at)? else { return Ok(()) };
        areas.extend(partition.map(|entry| entry.area(number, at)));
        match next {
            // Only ever onwards, or the chain could be a ring.
            Some(next) if next.is_extended() && begin + next.first > at => at = begin + next.first,
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// The entries of the table in sector `at`; `None`: it is none.
fn table(disk: &Disk<'_>, at: u64) -> Result<Option<[Option<Entry>; 4]>, BaseError> {
    let sector = disk.bytes(at * SECTOR, SECTOR as usize)?;
    if le16(&sector, 510) != 0xaa55 {
        return Ok(None);
    }
    let is_flag = |at: usize| matches!(sector.get(at), Some(0 | 0x80));
    if !ENTRIES.into_iter().all(is_flag) {
        return Ok(None);
    }
    Ok(Some(ENTRIES.map(|at| {
        let kind = sector.get(at + 4).copied().unwrap_or(0);
        let (first, sectors) = (u64::from(le32(&sector, at + 8)), u64::from(le32(&sector, at + 12)));
        (kind != 0 && first > 0 && sectors > 0).then_some(Entry { kind, first, sectors })
    })))
}
