//! Block numbers, disk geometry, validated ranges and atomic block sets.
//!
//! This crate knows arithmetic and nothing else: no I/O, no sessions, no virtio. Every other crate
//! speaks of positions on a disk in its types, so that the range that is logged and the range that
//! is written can only be one and the same validated [`BlockRange`].
#![forbid(unsafe_code)]

mod extent;
mod geometry;
mod set;
mod tally;

pub use extent::Extent;
pub use geometry::{BlockRange, Geometry, GeometryError, OutOfRange};
pub use set::{BlockSet, MixedRuns, Runs};
pub use tally::{Tallied, cell, density, tally};

/// Size of a block in bytes: the unit of the write log and of restoring.
pub const BLOCK_SIZE: u64 = 4096;

/// Size of a virtio-blk sector in bytes (virtio 1.2, 5.2.2: "sector" is always 512 bytes).
pub const SECTOR_SIZE: u64 = 512;

/// The largest number of blocks that a disk may have: 2^40 blocks are 4 PiB.
///
/// The write log packs a block number into 40 bits.
pub const BLOCKS_MAX: u64 = 1 << 40;
