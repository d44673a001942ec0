//! The write log: which blocks of a session disk belong to a session, never their data.
//!
//! A log is one preallocated file: a header block and two equal areas. Appends go to one area; when
//! it is full, the whole set is written to the other one as a bitmap, which then takes the appends.
//! Each frame's checksum is seeded with the frame before it, so the checksum of the last frame
//! (a [`Mark`]) vouches for everything up to it. `FORMAT.md` specifies the bytes.
//!
//! The crate knows the format, the writer and what a reader may conclude from a file. It knows
//! neither disks nor virtio: what the blocks of a log mean is for its user to say.
#![forbid(unsafe_code)]

mod area;
mod bitmap;
mod bytes;
mod contents;
mod error;
mod file;
mod frame;
mod header;
mod id;
mod pending;
mod reader;
mod writer;

pub use contents::{AreaContents, LogContents};
pub use error::LogError;
pub use file::{DiskDir, DiskFile, LogDir, LogFile};
pub use frame::Mark;
pub use header::{FORMAT_VERSION, LogHeader, LogKind, area_size, area_size_min};
pub use id::LogId;
pub use reader::{read, read_from, read_header};
pub use writer::LogWriter;
