//! File and block device I/O: files with their abilities and locks, asynchronous engines.
//!
//! This crate knows the kernel: io_uring and plain calls, alignment of direct I/O, holes, locks,
//! shared mappings. It does not know what the bytes mean: no virtio, no sessions, no logs. All
//! `unsafe` that file I/O needs lives here.

mod buffer;
mod clock;
mod coherence;
mod deadline;
mod durable;
mod engine;
mod error;
pub mod fault;
mod file;
mod guard;
mod kernel;
mod lock;
mod mapping;
mod now;
mod owner;
mod pace;
pub mod page_cache;
mod probe;
mod ranges;
mod redo;
mod resident;
mod share;
mod sync;
pub mod tape;
mod transfer;
mod uring;
mod window;
mod worth;

pub use buffer::{AlignedBuf, BUF_ALIGNMENT, Buffer, GuestBuf, GuestView, IoVec};
pub use deadline::Deadline;
pub use engine::{Completion, Engine, EngineKind, FileIndex, Op, Quick, Zeroing, new_engine};
pub use error::{Error, ErrorKind, in_full};
pub use file::{Alignment, File, FileKind, Identity, OpenOptions};
pub use lock::ImageAccess;
pub use mapping::{SharedMemory, SharedPage};
pub use owner::give_to_owner_of_directory;
pub use ranges::DataRanges;
pub use redo::{Redo, Unfinished};
pub use resident::ResidentMap;
pub use share::sharing_is_safe;
pub use window::WindowedFile;
