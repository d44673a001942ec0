//! What can go wrong with a log, by what a caller has to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Why a log could not be made, extended or read. Every variant names the file.
#[derive(Debug, Error)]
pub enum LogError {
    /// The file system failed.
    #[error("cannot {operation} the write log {}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// The log.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The log's room can't be reserved. Nothing is left behind.
    #[error("no room for the write log {}: {needed} bytes must be free on its file system", path.display())]
    NoSpace {
        /// The log.
        path: PathBuf,
        /// Bytes that the log needs.
        needed: u64,
        /// What the system answered.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is not a write log: {what}", path.display())]
    NotALog {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// The log was made by a newer program. It is not damaged: a newer program can read it.
    #[error(
        "the write log {} has format version {found}, expected at most {}; use a newer release",
        path.display(), crate::FORMAT_VERSION
    )]
    NewerVersion {
        /// The log.
        path: PathBuf,
        /// Its format version.
        found: u32,
    },
    /// The log's bytes contradict themselves, its name or what its writer knows of it.
    #[error("the write log {} is damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The log.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
        /// Where in the file, in bytes.
        offset: u64,
    },
    /// The caller asked for what the log can't record. Nothing was changed.
    #[error("the write log {} refuses: {what}", path.display())]
    Refused {
        /// The log.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
}

impl LogError {
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.to_owned(), source }
    }

    pub(crate) fn refused(path: &Path, what: &'static str) -> Self {
        Self::Refused { path: path.to_owned(), what }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, what: &'static str) -> Self {
        Self::Damaged { path: path.to_owned(), what, offset }
    }

    /// The file that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. }
            | Self::NoSpace { path, .. }
            | Self::NotALog { path, .. }
            | Self::NewerVersion { path, .. }
            | Self::Damaged { path, .. }
            | Self::Refused { path, .. } => path,
        }
    }
}
