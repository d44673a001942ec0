//! What makes a base the same base as before.

use std::fmt;
use std::path::PathBuf;

use blockio::{File, Identity};
use serde::{Deserialize, Serialize};

use crate::device;
use crate::format::BaseFormat;

/// What is remembered of a base, to notice a change of its contents without reading it.
///
/// For a regular file a write changes the modification time, and setting that back changes the
/// status change time. A block device and an NBD export have no such witness: only the size is compared, and which device it is
/// where the kernel knows that, so whoever changes them must say so by provisioning anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseIdentity {
    /// Size of the disk in bytes.
    pub size: u64,
    /// The witnesses of a regular file; `None` for a block device or an export.
    pub file: Option<FileIdentity>,
    /// What the kernel knows a block device by, whatever its name is in this boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The files that it is backed by, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingIdentity>,
}

/// What is remembered of a file that a base is backed by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingIdentity {
    /// Absolute path.
    pub path: PathBuf,
    /// Its format, as the file above it says.
    pub format: BaseFormat,
    /// Size of the file (not of the disk that it makes) in bytes.
    pub size: u64,
    /// The witnesses of a regular file; `None` for a block device.
    pub file: Option<FileIdentity>,
    /// As [`BaseIdentity::device`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
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

impl FileIdentity {
    /// Of a regular file.
    pub(crate) fn of(identity: &Identity) -> Self {
        let narrow = |ns: i128| i64::try_from(ns).unwrap_or(i64::MAX);
        Self {
            inode: identity.inode,
            birth_ns: identity.birth_ns.map(narrow),
            mtime_ns: narrow(identity.mtime_ns),
            ctime_ns: narrow(identity.ctime_ns),
        }
    }
}

/// The first difference between two identities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another size in bytes: before, now.
    Size(u64, u64),
    /// A file became a device or the other way round.
    Kind,
    /// Another file under the same name.
    Replaced,
    /// Another device under the same name: before, now.
    Device(String, String),
    /// The contents or the attributes were changed.
    Times,
    /// It is not backed by the same files any more.
    Chain,
    /// A file that it is backed by is not what it was.
    Backing(PathBuf, Box<Change>),
}

impl Change {
    /// Whether a base that is sealed may still be read: size and files are the same, and each byte is proven when it is read.
    pub fn leaves_what_is_proven(&self) -> bool {
        match self {
            Self::Times => true,
            Self::Backing(_, change) => change.leaves_what_is_proven(),
            Self::Size(..) | Self::Kind | Self::Replaced | Self::Device(..) | Self::Chain => false,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Size(before, now) => write!(f, "its size was {before} bytes and is {now}"),
            Change::Kind => write!(f, "it was a file and is a device, or the other way round"),
            Change::Replaced => write!(f, "it is another file under the same name"),
            Change::Device(before, now) => write!(f, "it was the device \"{before}\" and is \"{now}\""),
            Change::Times => write!(f, "it was written to, or its attributes were changed"),
            Change::Chain => write!(f, "it is backed by other files than before"),
            Change::Backing(path, change) => write!(f, "of the file {} beneath it, {change}", path.display()),
        }
    }
}

impl BaseIdentity {
    /// Of a regular file.
    pub fn of_file(identity: &Identity) -> Self {
        Self {
            size: identity.size,
            file: Some(FileIdentity::of(identity)),
            device: None,
            backing: Vec::new(),
        }
    }

    /// Of anything that only has a size.
    pub const fn of_size(size: u64) -> Self {
        Self { size, file: None, device: None, backing: Vec::new() }
    }

    /// Of a block device of `size` bytes.
    pub(crate) fn of_device(file: &File, size: u64) -> Self {
        Self { device: device::name_of(file), ..Self::of_size(size) }
    }

    /// The first difference to `now`, if there is one.
    pub fn change_to(&self, now: &BaseIdentity) -> Option<Change> {
        if let Some(change) = change(self.size, self.file.as_ref(), now.size, now.file.as_ref()) {
            return Some(change);
        }
        if let Some(change) = change_of_device(self.device.as_ref(), now.device.as_ref()) {
            return Some(change);
        }
        if self.backing.len() != now.backing.len() {
            return Some(Change::Chain);
        }
        self.backing.iter().zip(&now.backing).find_map(|(before, now)| {
            // A device that is the same one may have another name by now.
            let is_device = before.device.is_some() && before.device == now.device;
            if before.path != now.path && !is_device || before.format != now.format {
                return Some(Change::Chain);
            }
            let change = change(before.size, before.file.as_ref(), now.size, now.file.as_ref())
                .or_else(|| change_of_device(before.device.as_ref(), now.device.as_ref()))?;
            Some(Change::Backing(now.path.clone(), Box::new(change)))
        })
    }
}

fn change_of_device(before: Option<&String>, now: Option<&String>) -> Option<Change> {
    let unknown = || "one of which the kernel knows nothing".to_owned();
    // What was not known before tells nothing.
    let before = before.filter(|before| Some(*before) != now)?;
    Some(Change::Device(before.clone(), now.cloned().unwrap_or_else(unknown)))
}

fn change(
    size: u64,
    file: Option<&FileIdentity>,
    size_now: u64,
    file_now: Option<&FileIdentity>,
) -> Option<Change> {
    if size != size_now {
        return Some(Change::Size(size, size_now));
    }
    match (file, file_now) {
        (None, None) => None,
        (Some(a), Some(b)) if a.inode != b.inode || a.birth_ns != b.birth_ns => Some(Change::Replaced),
        (Some(a), Some(b)) if a != b => Some(Change::Times),
        (Some(_), Some(_)) => None,
        _ => Some(Change::Kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: Option<&str>) -> BaseIdentity {
        BaseIdentity { device: name.map(str::to_owned), ..BaseIdentity::of_size(4096) }
    }

    fn on(path: &str, name: Option<&str>) -> BaseIdentity {
        let device = name.map(str::to_owned);
        let backing =
            BackingIdentity { path: path.into(), format: BaseFormat::Raw, size: 4096, file: None, device };
        BaseIdentity { backing: vec![backing], ..BaseIdentity::of_size(4096) }
    }

    /// A device of which nothing is known is not the one that was known; what was not known before is any.
    #[test]
    fn device_that_was_known_is_the_same_only_if_it_is_known_as_that() {
        let (golden, other, unknown) = (device(Some("dm/uuid 1")), device(Some("dm/uuid 2")), device(None));
        assert_eq!(golden.change_to(&golden), None);
        assert_eq!(unknown.change_to(&golden), None);
        assert_eq!(unknown.change_to(&unknown), None);
        let changed = golden.change_to(&other).unwrap();
        assert_eq!(changed.to_string(), "it was the device \"dm/uuid 1\" and is \"dm/uuid 2\"");
        assert!(matches!(golden.change_to(&unknown), Some(Change::Device(..))));
        // The same beneath an image; then the device may have another name, if it is known by something better.
        assert_eq!(on("/dev/dm-3", Some("dm/uuid 1")).change_to(&on("/dev/dm-4", Some("dm/uuid 1"))), None);
        assert_eq!(on("/dev/sda", None).change_to(&on("/dev/sdb", None)), Some(Change::Chain));
        let changed = on("/dev/dm-3", Some("dm/uuid 1")).change_to(&on("/dev/dm-3", Some("dm/uuid 2")));
        assert!(matches!(changed, Some(Change::Backing(_, change)) if matches!(*change, Change::Device(..))));
    }
}
