//! Read-only golden images.
//!
//! This crate knows where a base's bytes come from, which of them are data and which are holes, and
//! how to tell that somebody changed it. It never opens anything for writing, and it knows nothing
//! of sessions. Raw files and block devices are read today; the type leaves room for formats whose
//! bytes are not at the same offset of a file.
#![forbid(unsafe_code)]

mod identity;
mod raw;

pub use identity::{BaseIdentity, Change};
pub use raw::{BaseError, BaseImage, Content};
