//! A guest's disk: what a session owns, what is pending, and how it becomes pristine again.
//!
//! Everything that is not serving I/O is one operation on one set, the *pending set*: blocks that may
//! not hold the base's content and must not be read from the session disk. A session's end adds what
//! the session dirtied, a provision adds what the base has, a log that can't be trusted adds everything,
//! and the drain takes blocks out after it has put the base's content back. Reads of pending
//! blocks come from the base, so the next session never waits.
//!
//! - [`provision`] makes a disk, [`SessionDisk::open`] takes one over, [`verify`] and [`status`] look at one.
//! - [`rebase`] moves one to another base.
//! - [`SessionDisk::begin_session`] and [`SessionDisk::end_session`] bound what a guest owns.
//! - [`SessionDisk::hold`] keeps what a session left as it is, [`SessionDisk::release`] lets it go.
//! - [`keep`] makes an image of what a session wrote, to be looked at.
//! - With [`Changes::Keep`] what sessions change is kept, until it is given up; [`promote`] makes a base's next
//!   generation of it.
//! - [`DiskQueue`] serves one virtqueue; [`Drainer`] restores in the background.
//!
//! The crash order is written above the code that keeps it: `queue` (steps 1 to 6), `drain` (7),
//! `disk` (8 to 10), `rebase` (11). This crate knows nothing of virtio and sockets.
#![forbid(unsafe_code)]

mod beginning;
mod changes;
mod claims;
mod counts;
mod disk;
mod drain;
mod drainer;
mod error;
mod helper;
mod intents;
mod last_session;
mod live;
mod manifest;
mod named_base;
mod new_file;
mod open;
mod options;
mod overlay;
mod pace;
mod paths;
mod process;
mod progress;
mod promote;
mod provision;
mod queue;
mod rebase;
mod recover;
mod redo;
mod request;
mod shared;
mod status;
mod storage;
mod unsynced;
mod verify;
mod ways;
mod witness;

pub use counts::CopyCounts;
pub use disk::{Changes, Held, HoldReason, Released, SessionDisk, left_open, set_hold_of_open_session};
pub use drainer::{DrainObserver, DrainTrouble, Drainer};
pub use error::Error;
pub use intents::REGION_SIZE;
pub use manifest::{BaseEntry, DiskFile, EntryKind, Left, LogEntry, MANIFEST_VERSION, Manifest, Stopped};
pub use named_base::NamedBase;
pub use options::{DiskOptions, SessionStart, SessionSummary};
pub use overlay::{Kept, Portion, base_of, keep};
pub use pace::{DrainPolicy, DrainWhen};
pub use paths::Paths;
pub use process::ProcessId;
pub use promote::{PromoteOptions, PromoteStep, Promoted, promote};
pub use provision::{ProvisionOptions, Provisioned, provision};
pub use queue::DiskQueue;
pub use rebase::{RebaseOptions, Rebased, Way, rebase};
pub use recover::{Basis, Distrust};
pub use request::{Done, Request};
pub use shared::FlushPolicy;
pub use status::{CopyReport, DiskState, Status, server_of, status};
pub use verify::{Comparison, verify, verify_base};
pub use ways::Sharing;
