//! What makes a base the same base as before.

use std::fmt;

use blockio::Identity;
use serde::{Deserialize, Serialize};

/// What is remembered of a base, to notice a change of its contents without reading it.
///
/// For a regular file a write changes the modification time, and setting that back changes the
/// status change time. A block device has no such witness: only its size is compared, so whoever
/// writes to a base on a block device must say so by provisioning anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseIdentity {
    /// Size in bytes.
    pub size: u64,
    /// The witnesses of a regular file; `None` for a block device.
    pub file: Option<FileIdentity>,
}

/// A regular file's witnesses, as `statx(2)` reports them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileIdentity {
    /// Inode number.
    pub inode: u64,
    /// Birth time in nanoseconds since the epoch, where the file system keeps one.
    pub birth_ns: Option<i64>,
    /// Time of the last change of the contents, nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Time of the last change of contents or attributes, nanoseconds since the epoch.
    pub ctime_ns: i64,
}

/// The first difference between two identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another size in bytes: before, now.
    Size(u64, u64),
    /// A file became a device or the other way round.
    Kind,
    /// Another file under the same name.
    Replaced,
    /// The contents or the attributes were changed.
    Times,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Size(before, now) => write!(f, "its size was {before} bytes and is {now}"),
            Change::Kind => write!(f, "it was a file and is a device, or the other way round"),
            Change::Replaced => write!(f, "it is another file under the same name"),
            Change::Times => write!(f, "it was written to, or its attributes were changed"),
        }
    }
}

impl BaseIdentity {
    /// Of a regular file.
    pub fn of_file(identity: &Identity) -> Self {
        let narrow = |ns: i128| i64::try_from(ns).unwrap_or(i64::MAX);
        Self {
            size: identity.size,
            file: Some(FileIdentity {
                inode: identity.inode,
                birth_ns: identity.birth_ns.map(narrow),
                mtime_ns: narrow(identity.mtime_ns),
                ctime_ns: narrow(identity.ctime_ns),
            }),
        }
    }

    /// Of a block device, or of anything that only has a size.
    pub const fn of_size(size: u64) -> Self {
        Self { size, file: None }
    }

    /// The first difference to `now`, if there is one.
    pub fn change_to(&self, now: &BaseIdentity) -> Option<Change> {
        if self.size != now.size {
            return Some(Change::Size(self.size, now.size));
        }
        match (&self.file, &now.file) {
            (None, None) => None,
            (Some(a), Some(b)) if a.inode != b.inode || a.birth_ns != b.birth_ns => Some(Change::Replaced),
            (Some(a), Some(b)) if a != b => Some(Change::Times),
            (Some(_), Some(_)) => None,
            _ => Some(Change::Kind),
        }
    }
}
