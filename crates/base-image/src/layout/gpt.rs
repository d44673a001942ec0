//! The GUID partition table (UEFI 2.10, 5.3).

use super::{Area, Disk, array, clean, le32, le64};
use crate::error::BaseError;

/// Sector sizes that there are.
const SECTORS: [u64; 2] = [512, 4096];
const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_LEN_MIN: u32 = 92;
/// All entries together; the usual table has 16 KiB.
const ENTRIES_BYTES_MAX: u64 = 1 << 20;
const ENTRY_LEN: usize = 128;

/// What partitions are for, by the first three fields of their GUIDs, which tell these apart.
const PURPOSES: [((u32, u16, u16), &str); 14] = [
    ((0xc12a_7328, 0xf81f, 0x11d2), "EFI system"),
    ((0x2168_6148, 0x6449, 0x6e6f), "BIOS boot"),
    ((0x0fc6_3daf, 0x8483, 0x4772), "Linux file system"),
    ((0x4f68_bce3, 0xe8cd, 0x4db1), "Linux root"),
    ((0xb921_b045, 0x1df0, 0x41c3), "Linux root"),
    ((0x933a_c7e1, 0x2eb4, 0x4f13), "Linux home"),
    ((0xbc13_c2ff, 0x59e6, 0x4262), "Linux boot"),
    ((0x4d21_b016, 0xb534, 0x45c2), "Linux var"),
    ((0x0657_fd6d, 0xa4ab, 0x43c4), "Linux swap"),
    ((0xe6d6_d379, 0xf507, 0x44c2), "Linux LVM"),
    ((0xa19d_880f, 0x05fc, 0x4d3b), "Linux RAID"),
    ((0xebd0_a0a2, 0xb9e5, 0x4433), "Microsoft data"),
    ((0xe3c9_e316, 0x0b5c, 0x4db8), "Microsoft reserved"),
    ((0xde94_bba4, 0x06d1, 0x4d40), "Windows recovery"),
];

/// The partitions; `None`: there is no table whose checksums hold.
pub(super) fn read(disk: &Disk<'_>) -> Result<Option<Vec<Area>>, BaseError> {
    for sector in SECTORS {
        // The first is at the beginning of the disk, its copy at the end.
        let copy = (disk.size / sector).saturating_sub(1);
        for at in [1, copy] {
            if let Some(areas) = read_at(disk, sector, at)? {
                return Ok(Some(areas));
            }
        }
    }
    Ok(None)
}

fn read_at(disk: &Disk<'_>, sector: u64, at: u64) -> Result<Option<Vec<Area>>, BaseError> {
    let Some(offset) = at.checked_mul(sector) else { return Ok(None) };
    let mut header = disk.bytes(offset, 512)?;
    let len = le32(&header, 12);
    if !header.starts_with(SIGNATURE) || !(HEADER_LEN_MIN..=512).contains(&len) || le64(&header, 24) != at {
        return Ok(None);
    }
    header.truncate(len as usize);
    let stated = le32(&header, 16);
    if let Some(field) = header.get_mut(16..20) {
        field.fill(0);
    }
    let (count, entry_len) = (u64::from(le32(&header, 80)), u64::from(le32(&header, 84)));
    let bytes = count.saturating_mul(entry_len);
    let good = crc32(&header) == stated
        && entry_len >= ENTRY_LEN as u64
        && entry_len.is_multiple_of(8)
        && (1..=ENTRIES_BYTES_MAX).contains(&bytes);
    let Some(entries_at) = le64(&header, 72).checked_mul(sector).filter(|_| good) else { return Ok(None) };
    let entries = disk.bytes(entries_at, bytes as usize)?;
    if entries.len() as u64 != bytes || crc32(&entries) != le32(&header, 88) {
        return Ok(None);
    }
    let areas = (1..).zip(entries.chunks_exact(entry_len as usize));
    Ok(Some(areas.filter_map(|(number, entry)| area(number, entry, sector)).collect()))
}

fn area(number: u32, entry: &[u8], sector: u64) -> Option<Area> {
    let purpose: [u8; 16] = array(entry, 0)?;
    if purpose == [0; 16] {
        return None;
    }
    let (first, last) = (le64(entry, 32), le64(entry, 40));
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let name = entry.get(56..ENTRY_LEN)?.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let name = char::decode_utf16(name).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER));
    Some(Area {
        offset: first.checked_mul(sector)?,
        len: sectors.checked_mul(sector)?,
        number: Some(number),
        name: clean(name),
        purpose: Some(purpose_of(&purpose)),
        filesystem: None,
    })
}

fn purpose_of(guid: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *guid;
    let fields = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    match PURPOSES.iter().find(|(known, _)| *known == fields) {
        Some((_, name)) => (*name).to_owned(),
        None => {
            let tail: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("type {:08x}-{:04x}-{:04x}-{tail}", fields.0, fields.1, fields.2)
        }
    }
}

/// CRC-32 of IEEE 802.3, a bit at a time: of a few kilobytes, once.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    });
    !crc
}
