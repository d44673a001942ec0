//! What this crate's tests serve and drive: a disk in memory, and a frontend with a driver.

mod disk;
mod driver;

pub(crate) use disk::MemoryDisk;
pub(crate) use driver::{DATA_AT, Driver, Part};
