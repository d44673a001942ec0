//! How large a disk is, and ranges that are known to lie inside it.

use thiserror::Error;

use crate::{BLOCK_SIZE, BLOCKS_MAX, Extent, SECTOR_SIZE};

/// The size of a disk. Its last block may be short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
}

/// Why a number of bytes can't be the size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// A disk has at least one sector.
    #[error("the size is 0 bytes, expected at least one 512-byte sector")]
    Empty,
    /// A disk is made of whole sectors.
    #[error("the size is {0} bytes, which is not a multiple of 512")]
    NotSectors(u64),
    /// More than [`BLOCKS_MAX`] blocks.
    #[error("the size is {0} bytes, more than the 4 PiB that are supported")]
    TooLarge(u64),
}

/// A range that does not lie inside the disk. Nothing of it may be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{len} bytes at sector {sector} do not lie inside the disk of {disk_size} bytes")]
pub struct OutOfRange {
    /// First sector asked for.
    pub sector: u64,
    /// Length asked for, in bytes.
    pub len: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
}

/// A non-empty range of bytes that lies inside a disk, in whole sectors.
///
/// Only a [`Geometry`] makes one, so neither its end nor a block number derived from it wraps or
/// leaves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    offset: u64,
    len: u64,
}

impl Geometry {
    /// A disk of `size` bytes.
    pub const fn new(size: u64) -> Result<Self, GeometryError> {
        if size == 0 {
            Err(GeometryError::Empty)
        } else if !size.is_multiple_of(SECTOR_SIZE) {
            Err(GeometryError::NotSectors(size))
        } else if size.div_ceil(BLOCK_SIZE) > BLOCKS_MAX {
            Err(GeometryError::TooLarge(size))
        } else {
            Ok(Self { size })
        }
    }

    /// Size in bytes.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Capacity in 512-byte sectors (virtio 1.2, 5.2.4 `capacity`).
    pub const fn sectors(self) -> u64 {
        self.size / SECTOR_SIZE
    }

    /// Number of blocks, a short last one included.
    pub const fn blocks(self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }

    /// All blocks of the disk.
    pub const fn all(self) -> Extent {
        Extent::new(0, self.blocks())
    }

    /// `len` bytes from `sector` on, if they are whole sectors, at least one, inside the disk.
    pub const fn sectors_at(self, sector: u64, len: u64) -> Result<BlockRange, OutOfRange> {
        let wrong = OutOfRange { sector, len, disk_size: self.size };
        if len == 0 || !len.is_multiple_of(SECTOR_SIZE) || sector >= self.sectors() {
            return Err(wrong);
        }
        let offset = sector * SECTOR_SIZE;
        if len > self.size - offset { Err(wrong) } else { Ok(BlockRange { offset, len }) }
    }

    /// The bytes of `extent`, as far as they lie inside the disk; `None` if none do.
    pub fn bytes_of(self, extent: Extent) -> Option<BlockRange> {
        let extent = extent.intersection(self.all());
        if extent.is_empty() {
            return None;
        }
        let offset = extent.first() * BLOCK_SIZE;
        Some(BlockRange { offset, len: (extent.end() * BLOCK_SIZE).min(self.size) - offset })
    }

    /// The blocks that `range` covers completely; the disk's short last block counts as covered
    /// when the range reaches the end of the disk. May be empty.
    pub const fn covered(self, range: BlockRange) -> Extent {
        let first = range.offset.div_ceil(BLOCK_SIZE);
        let end = if range.end() == self.size { self.blocks() } else { range.end() / BLOCK_SIZE };
        Extent::between(first, end)
    }
}

impl BlockRange {
    /// Offset of the first byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes, never 0.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Offset of the byte after the last one.
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Every block of which the range holds at least one byte.
    pub const fn touched(self) -> Extent {
        Extent::between(self.offset / BLOCK_SIZE, self.end().div_ceil(BLOCK_SIZE))
    }

    /// The part of the range that lies in `extent`.
    pub fn within(self, extent: Extent) -> Option<BlockRange> {
        let offset = self.offset.max(extent.first().saturating_mul(BLOCK_SIZE));
        let end = self.end().min(extent.end().saturating_mul(BLOCK_SIZE));
        (offset < end).then(|| BlockRange { offset, len: end - offset })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn geometry_of_bad_sizes_is_refused() {
        assert_eq!(Geometry::new(0), Err(GeometryError::Empty));
        assert_eq!(Geometry::new(513), Err(GeometryError::NotSectors(513)));
        assert_eq!(Geometry::new(!511), Err(GeometryError::TooLarge(!511)));
    }

    #[test]
    fn range_whose_sector_would_wrap_is_refused() {
        let disk = Geometry::new(1 << 20).unwrap();
        assert!(disk.sectors_at(u64::MAX, 512).is_err());
        assert!(disk.sectors_at(1 << 55, 512).is_err());
        assert!(disk.sectors_at(2047, 1024).is_err());
        assert!(disk.sectors_at(0, 0).is_err());
        assert!(disk.sectors_at(0, !511).is_err());
        assert!(disk.sectors_at(2047, 512).is_ok());
    }

    #[test]
    fn covered_of_a_short_last_block_needs_the_disks_end() {
        let disk = Geometry::new(4096 + 512).unwrap();
        assert_eq!(disk.covered(disk.sectors_at(8, 512).unwrap()), Extent::new(1, 1));
        assert_eq!(disk.covered(disk.sectors_at(0, 4096).unwrap()), Extent::new(0, 1));
        assert_eq!(disk.bytes_of(Extent::new(1, 5)).unwrap().len(), 512);
    }

    proptest! {
        #[test]
        fn range_always_lies_inside_and_covered_inside_touched(
            sectors in 1u64..100_000, sector in 0u64..120_000, len in 0u64..2_000_000,
        ) {
            let disk = Geometry::new(sectors * 512).unwrap();
            if let Ok(range) = disk.sectors_at(sector, len) {
                prop_assert!(range.end() <= disk.size());
                let (touched, covered) = (range.touched(), disk.covered(range));
                prop_assert!(touched.end() <= disk.blocks());
                prop_assert!(covered.is_empty() || covered.intersection(touched) == covered);
                prop_assert_eq!(range.within(touched), Some(range));
            } else {
                prop_assert!(len == 0 || len % 512 != 0 || sector * 512 + len > disk.size());
            }
        }
    }
}
