//! Everything that can go wrong with a session disk, and what an operator can do about it.

use std::io;
use std::path::{Path, PathBuf};

use base_image::{BaseError, Root};
use thiserror::Error;
use write_log::LogError;

use crate::HoldReason;

/// Why an operation on a session disk failed. `Display` never repeats the source.
#[derive(Debug, Error)]
pub enum Error {
    /// I/O on the session disk or on a device.
    #[error("session disk")]
    Disk(#[from] blockio::Error),
    /// The base image.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A write log.
    #[error("write log")]
    Log(#[from] LogError),
    /// A file of the state or the runtime directory.
    #[error("cannot {operation} {path}")]
    State {
        /// What was tried, a verb.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Somebody else has the disk open.
    #[error("{path} is in use{by}")]
    InUse {
        /// The disk or base.
        path: PathBuf,
        /// By whom, as far as is known.
        by: String,
    },
    /// The disk was never provisioned, or its state directory is elsewhere.
    #[error("{disk} is not a pristine disk: {manifest} does not exist")]
    NotProvisioned {
        /// The disk.
        disk: PathBuf,
        /// Where its manifest was expected.
        manifest: PathBuf,
    },
    /// The manifest can't be trusted.
    #[error("the manifest {path} is damaged: {what}")]
    DamagedManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Written by a newer version of this program.
    #[error("the manifest {path} has format version {found}, this program knows {known}")]
    NewerManifest {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest known version.
        known: u32,
    },
    /// Written by another version of this program, whole, but with something in it that this one does not know.
    #[error("the manifest {path} was written by another version of pristine: {what}")]
    OtherManifest {
        /// The manifest.
        path: PathBuf,
        /// What is not known of it.
        what: String,
    },
    /// The disk does not have the size that it was provisioned with.
    #[error("{path} has {found} bytes, expected {expected}")]
    DiskSize {
        /// The disk.
        path: PathBuf,
        /// Its size now, in bytes.
        found: u64,
        /// Its size when it was provisioned, in bytes.
        expected: u64,
    },
    /// Another device than the state of the disk is about, and nothing says that it may be overwritten.
    #[error("{path} is {found}, and its state is about {expected}")]
    AnotherDevice {
        /// The disk.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Another file than a state directory that was named is about, and nothing says that it may be overwritten.
    #[error(
        "{path} never was a session disk, or is a copy that does not say so, and the state in {state} is about another file",
        path = .path.display(),
        state = .state.display()
    )]
    UnknownFile {
        /// The file.
        path: PathBuf,
        /// The state directory.
        state: PathBuf,
    },
    /// A size that can't be a disk's.
    #[error("{path}: {source}")]
    Geometry {
        /// Disk or base.
        path: PathBuf,
        /// What is wrong.
        source: blocks::GeometryError,
    },
    /// The base's seal is not the one that the disk was provisioned with.
    #[error("base image {base} is not the sealed one that the disk was provisioned from: its seal is {}, expected {expected}",
        .found.map_or("gone".to_owned(), |root| root.to_string()), base = .base.display())]
    OtherSeal {
        /// The base.
        base: PathBuf,
        /// The root hash of the seal that it has now.
        found: Option<Root>,
        /// The one that it had.
        expected: Root,
    },
    /// A request that makes no sense with these arguments; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// What the last session left is kept as it is.
    #[error(
        "{disk} is held ({reason}): nothing is restored and no session begins before \
         `pristine session release {named}`",
        disk = .disk.display()
    )]
    Held {
        /// The disk.
        disk: PathBuf,
        /// The disk, as [`Paths::arguments`](crate::Paths::arguments).
        named: String,
        /// Why.
        reason: HoldReason,
    },
    /// Sessions have left changes that are kept.
    #[error("{disk} has changes of earlier sessions that are kept", disk = .disk.display())]
    Kept {
        /// The disk.
        disk: PathBuf,
    },
    /// Sessions have left changes that are kept, but the state that says so was put back from a copy.
    #[error(
        "{disk} has changes that are kept, but its state is older than the disk (it was put back from a copy): what later \
         sessions have left can't be told from them",
        disk = .disk.display()
    )]
    KeptUnknown {
        /// The disk.
        disk: PathBuf,
    },
    /// An operation in the wrong state: a defect of the caller.
    #[error("{0}")]
    WrongState(&'static str),
    /// The disk's storage failed in a way after which its contents can't be vouched for.
    #[error("{0} failed to reach stable storage; it takes no more I/O until the server is started again")]
    Poisoned(PathBuf),
    /// The operator asked to stop.
    #[error("stopped")]
    Stopped,
}

impl Error {
    pub(crate) fn state(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::State { operation, path: path.to_owned(), source }
    }

    /// What the operator can do about it, as a sentence, where there is something. `disk` is how the disk
    /// was named, as arguments of a command: `--disk DISK`, `--state-dir DIR` if one was given.
    pub fn hint(&self, disk: &str) -> Option<String> {
        match self {
            Self::NotProvisioned { .. } => Some(format!(
                "make the disk with `pristine provision --base BASE {disk}`, name the state directory with \
                 --state-dir, or, if the disk is there and its state is lost, restore all of it with \
                 `pristine provision --adopt --base BASE {disk}`",
            )),
            Self::DamagedManifest { .. } => Some(format!(
                "no block of the disk can be trusted: `pristine provision --adopt --base BASE {disk}` \
                 restores all of it"
            )),
            Self::AnotherDevice { .. } => Some(format!(
                "name the device by what stays, such as /dev/disk/by-id/... (names such as /dev/sdb are given anew at each boot); if it \
                 is to be a session disk, `pristine provision --adopt --base BASE {disk}` replaces all of its contents; if it is the disk that was \
                 moved, with changes to be kept, copy it before that (`qemu-img convert`), and name a new --state-dir"
            )),
            Self::UnknownFile { .. } => Some(format!(
                "see that the two belong together; if the disk was moved, copy it again with its attributes (`cp -a`, `rsync -X`), or put \
                 its state beside it as DISK.pristine and name none; if it is to be a session disk, `pristine provision --adopt --base BASE \
                 {disk}` replaces all of its contents"
            )),
            Self::Kept { .. } => Some(format!(
                "go on with them with `pristine serve --reset-on never {disk}`, or give them up with \
                 `pristine restore --discard-kept {disk}`"
            )),
            Self::KeptUnknown { .. } => Some(format!(
                "put back the state that the disk had last, or restore all of it with `pristine restore --discard-kept {disk}`; \
                 `pristine keep --whole-disk {disk} --to OUT.qcow2` keeps all that it holds before that, of whichever session"
            )),
            Self::NewerManifest { .. } | Self::OtherManifest { .. } => Some("use the version of pristine that wrote it".into()),
            Self::Base(BaseError::Changed { path, .. }) => Some(format!(
                "if it is right as it is now, `pristine rebase --base {} {disk}` moves the disk to it",
                path.display()
            )),
            Self::Base(BaseError::Remote { .. }) => Some(
                "see that its server runs, is reached from here and has the export; those that serve several connections \
                 at once and stay when one ends are right: `qemu-nbd --persistent --shared 0 --read-only`, `nbdkit -r`"
                    .into(),
            ),
            Self::OtherSeal { base, found, .. } => Some(format!(
                "put the image and its manifest back{}, or, if it is right as it is now, `pristine rebase --base {} {disk}` \
                 moves the disk to it (with --base-manifest FILE where its manifest is not beside it)",
                // The same contents have the same root.
                if found.is_none() { ", or seal it again if its contents are what they were" } else { "" },
                base.display()
            )),
            Self::InUse { .. } => Some(
                "stop the other program first; if it is the disk's server, name its --runtime-dir".into(),
            ),
            Self::Log(write_log::LogError::NoSpace { .. }) => Some(
                "make room on the file system of the state directory (that of a new disk can be elsewhere: --state-dir)".into(),
            ),
            _ => None,
        }
    }
}
