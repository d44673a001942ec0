//! What a kill or a power cut leaves behind: a tape that records, a file system in memory that knows
//! what was synced, and worlds that are built from it again.

pub(crate) mod fs;
pub(crate) mod random;
pub(crate) mod recorder;
pub(crate) mod world;
