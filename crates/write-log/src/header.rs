//! The header block of a log and how large its areas are.

use blocks::{BLOCK_SIZE, Geometry};
use uuid::Uuid;

use crate::{
    LogId,
    bitmap::CHUNK_BYTES,
    bytes::{array_at, u32_at, u64_at},
    frame,
};

/// The format version that is written, and the newest one that is read.
pub const FORMAT_VERSION: u32 = 1;

/// Size of the header block in bytes; areas are multiples of it.
pub(crate) const HEADER_BYTES: u64 = 4096;

const MAGIC: [u8; 8] = *b"PRISWLOG";
const CRC_OFFSET: usize = HEADER_BYTES as usize - 4;
const FIELDS_END: usize = 88;
/// Room for extents that an area has at least, beside a bitmap of the disk, in bytes.
const EXTENTS_ROOM_MIN: u64 = 64 << 10;

/// What a log is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogKind {
    /// Grows while a session writes; has two areas.
    Session,
    /// A set that is written at once and sealed (a provision, a recovery); has one area, sized to need.
    Pending,
}

/// What the first block of a log says. It never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// What the log is for.
    pub kind: LogKind,
    /// Which log of its disk it is.
    pub id: LogId,
    /// The disk whose blocks are logged.
    pub disk: Uuid,
    /// That disk's size.
    pub geometry: Geometry,
    /// When the log was made: nanoseconds since 1970-01-01 UTC. For people; nothing depends on it.
    pub created_unix_ns: u64,
}

/// Where the areas of a log are. Its end always fits 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    areas: u32,
    area_size: u64,
}

impl Layout {
    /// `None` unless the area's size is a positive multiple of 4096 whose file has a length.
    pub(crate) fn new(kind: LogKind, area_size: u64) -> Option<Self> {
        let areas = match kind {
            LogKind::Session => 2,
            LogKind::Pending => 1,
        };
        let aligned = area_size > 0 && area_size.is_multiple_of(HEADER_BYTES);
        let end = area_size.checked_mul(u64::from(areas))?.checked_add(HEADER_BYTES)?;
        (aligned && end <= i64::MAX as u64).then_some(Self { areas, area_size })
    }

    pub(crate) fn areas(self) -> u32 {
        self.areas
    }

    pub(crate) fn area_size(self) -> u64 {
        self.area_size
    }

    /// Where area `index` begins in the file.
    pub(crate) fn area_offset(self, index: u32) -> u64 {
        HEADER_BYTES + u64::from(index) * self.area_size
    }

    /// Length of the file.
    pub(crate) fn file_len(self) -> u64 {
        self.area_offset(self.areas)
    }

    /// The area that holds `epoch` (1 or more).
    pub(crate) fn area_of(self, epoch: u32) -> u32 {
        epoch.wrapping_sub(1) % self.areas
    }
}

/// Why a header block is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderFault {
    NotALog(&'static str),
    Newer(u32),
    Damaged { offset: u64, what: &'static str },
}

/// Bytes of a bitmap of the whole disk.
pub(crate) fn bitmap_bytes(geometry: Geometry) -> u64 {
    geometry.blocks().div_ceil(8)
}

/// Bytes of the frames that hold a bitmap of the whole disk.
pub(crate) fn bitmap_frames_bytes(geometry: Geometry) -> u64 {
    let bytes = bitmap_bytes(geometry);
    let chunks = bytes.div_ceil(CHUNK_BYTES);
    chunks * (frame::HEAD_BYTES as u64 + 8) + bytes.next_multiple_of(frame::ALIGN as u64)
}

/// The size in bytes of each of the two areas that [`LogWriter::create`](crate::LogWriter::create)
/// reserves: a bitmap of the disk and as much again for extents, but at least 64 KiB.
pub fn area_size(geometry: Geometry) -> u64 {
    let extents = bitmap_bytes(geometry).max(EXTENTS_ROOM_MIN);
    (bitmap_frames_bytes(geometry) + extents + frame::SEAL_BYTES).next_multiple_of(HEADER_BYTES)
}

/// The smallest area with which a log of such a disk can work, in bytes: a bitmap and a seal.
pub fn area_size_min(geometry: Geometry) -> u64 {
    (bitmap_frames_bytes(geometry) + frame::SEAL_BYTES).next_multiple_of(HEADER_BYTES)
}

/// The header block.
pub(crate) fn encode(header: &LogHeader, layout: Layout) -> Vec<u8> {
    let kind: u8 = match header.kind {
        LogKind::Session => 1,
        LogKind::Pending => 2,
    };
    let mut block = Vec::with_capacity(HEADER_BYTES as usize);
    block.extend_from_slice(&MAGIC);
    block.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    block.extend_from_slice(&[kind, 0, 0, 0]);
    block.extend_from_slice(&header.id.seq.to_le_bytes());
    block.extend_from_slice(header.id.uuid.as_bytes());
    block.extend_from_slice(header.disk.as_bytes());
    block.extend_from_slice(&header.geometry.size().to_le_bytes());
    block.extend_from_slice(&(BLOCK_SIZE as u32).to_le_bytes());
    block.extend_from_slice(&layout.areas.to_le_bytes());
    block.extend_from_slice(&layout.area_size.to_le_bytes());
    block.extend_from_slice(&header.created_unix_ns.to_le_bytes());
    debug_assert_eq!(block.len(), FIELDS_END);
    block.resize(CRC_OFFSET, 0);
    let crc = crc32c::crc32c(&block);
    block.extend_from_slice(&crc.to_le_bytes());
    block
}

/// The checksum that an encoded header block ends with: it stands for the log in all frames.
pub(crate) fn crc_of(block: &[u8]) -> u32 {
    u32_at(block, CRC_OFFSET).unwrap_or(0)
}

/// What a header block says. A block of any length and content is answered.
pub(crate) fn decode(block: &[u8]) -> Result<(LogHeader, Layout), HeaderFault> {
    let damaged = |offset: usize, what| HeaderFault::Damaged { offset: offset as u64, what };
    if block.get(..MAGIC.len()) != Some(&MAGIC) {
        return Err(HeaderFault::NotALog("expected it to begin with \"PRISWLOG\""));
    }
    let (Some(fields), Some(crc)) = (block.get(..CRC_OFFSET), u32_at(block, CRC_OFFSET)) else {
        return Err(damaged(block.len(), "expected a header of 4096 bytes"));
    };
    if crc32c::crc32c(fields) != crc {
        return Err(damaged(CRC_OFFSET, "expected the CRC32C of the header"));
    }
    let short = || damaged(0, "expected all header fields");
    let u32_at = |offset| u32_at(fields, offset).ok_or_else(short);
    let u64_at = |offset| u64_at(fields, offset).ok_or_else(short);
    let uuid_at = |offset| array_at(fields, offset).map(Uuid::from_bytes).ok_or_else(short);
    match u32_at(8)? {
        0 => return Err(damaged(8, "expected format version 1")),
        version if version > FORMAT_VERSION => return Err(HeaderFault::Newer(version)),
        _ => {}
    }
    let kind = match u32_at(12)? {
        1 => LogKind::Session,
        2 => LogKind::Pending,
        _ => return Err(damaged(12, "expected kind 1 (session) or 2 (pending)")),
    };
    let geometry = Geometry::new(u64_at(56)?).map_err(|_| damaged(56, "expected the size of a disk"))?;
    if u64::from(u32_at(64)?) != BLOCK_SIZE {
        return Err(damaged(64, "expected blocks of 4096 bytes"));
    }
    let layout = Layout::new(kind, u64_at(72)?).ok_or_else(|| damaged(72, "expected the size of an area"))?;
    if kind == LogKind::Session && layout.area_size < area_size_min(geometry) {
        return Err(damaged(72, "expected areas that hold a bitmap of the disk"));
    }
    if u32_at(68)? != layout.areas {
        return Err(damaged(68, "expected two areas of a session log, one of a pending log"));
    }
    if fields.get(FIELDS_END..).is_none_or(|rest| rest.iter().any(|byte| *byte != 0)) {
        return Err(damaged(FIELDS_END, "expected zeros after the header fields"));
    }
    let id = LogId { seq: u64_at(16)?, uuid: uuid_at(24)? };
    Ok((LogHeader { kind, id, disk: uuid_at(40)?, geometry, created_unix_ns: u64_at(80)? }, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: LogKind) -> LogHeader {
        LogHeader {
            kind,
            id: LogId { seq: 9, uuid: Uuid::from_u128(1 << 100) },
            disk: Uuid::from_u128(77),
            geometry: Geometry::new((5 << 30) + 512).unwrap(),
            created_unix_ns: 1_700_000_000_000_000_000,
        }
    }

    #[test]
    fn header_of_each_kind_decodes_to_itself() {
        for kind in [LogKind::Session, LogKind::Pending] {
            let header = header(kind);
            let layout = Layout::new(kind, area_size(header.geometry)).unwrap();
            let block = encode(&header, layout);
            assert_eq!(block.len() as u64, HEADER_BYTES);
            assert_eq!(decode(&block), Ok((header, layout)));
        }
    }

    #[test]
    fn header_with_any_bit_flipped_or_any_byte_missing_is_refused() {
        let header = header(LogKind::Session);
        let layout = Layout::new(LogKind::Session, area_size(header.geometry)).unwrap();
        let block = encode(&header, layout);
        for bit in 0..block.len() * 8 {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..block.len() {
            assert!(decode(&block[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn header_with_wrong_fields_and_a_right_checksum_is_refused() {
        let header = header(LogKind::Session);
        let layout = Layout::new(LogKind::Session, area_size(header.geometry)).unwrap();
        let block = encode(&header, layout);
        let wrong: [(usize, u64); 10] = [
            (8, 0),
            (12, 3),
            (12, 2),
            (56, 0),
            (56, 513),
            (64, 512),
            (72, 0),
            (72, 4096),
            (72, !4095),
            (88, 1),
        ];
        for (offset, value) in wrong {
            let mut bad = block.clone();
            let width = if [56, 72].contains(&offset) { 8 } else { 4 };
            bad[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
            let crc = crc32c::crc32c(&bad[..CRC_OFFSET]).to_le_bytes();
            bad[CRC_OFFSET..].copy_from_slice(&crc);
            assert!(matches!(decode(&bad), Err(HeaderFault::Damaged { .. })), "{value} at {offset}");
        }
        let mut newer = block.clone();
        newer[8] = 2;
        let crc = crc32c::crc32c(&newer[..CRC_OFFSET]).to_le_bytes();
        newer[CRC_OFFSET..].copy_from_slice(&crc);
        assert_eq!(decode(&newer), Err(HeaderFault::Newer(2)));
    }

    #[test]
    fn area_of_the_largest_disk_has_room_for_two_bitmaps() {
        let largest = Geometry::new(blocks::BLOCKS_MAX * BLOCK_SIZE).unwrap();
        assert!(area_size(largest) > 2 * bitmap_bytes(largest));
        assert!(Layout::new(LogKind::Session, area_size(largest)).is_some());
        assert_eq!(area_size_min(Geometry::new(512).unwrap()), 4096);
    }
}
