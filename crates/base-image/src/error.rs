//! Why a base can't be used.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::identity::Change;

/// Why a base can't be used.
#[derive(Debug, Error)]
pub enum BaseError {
    /// The operating system refused.
    #[error("base image")]
    Io(#[from] blockio::Error),
    /// A size that no disk can have.
    #[error("base image {path}: {source}")]
    Size {
        /// The base.
        path: PathBuf,
        /// What is wrong with its size.
        source: blocks::GeometryError,
    },
    /// It is not what it was.
    #[error("base image {path} has changed: {change}")]
    Changed {
        /// The base.
        path: PathBuf,
        /// What gave it away.
        change: Change,
    },
    /// A format that is not clear or can't be read, a damaged image, or a reference that is not followed.
    #[error("base image {path}: {what}")]
    Refused {
        /// The base, or a file that it is backed by.
        path: PathBuf,
        /// What is wrong with it and what helps, as a sentence about the file.
        what: String,
    },
    /// An NBD server that can't be reached, or does not have the export.
    #[error("cannot read base image {uri}")]
    Remote {
        /// The export.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// A file that a base is backed by can't be found.
    #[error("cannot find {path}, the backing file of base image {of}")]
    Backing {
        /// The file.
        path: PathBuf,
        /// The one that names it.
        of: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A manifest, a delta or an image that can't be made.
    #[error("cannot {operation} {path}")]
    Manifest {
        /// What was tried, a verb.
        operation: &'static str,
        /// The file or its directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The operator asked to stop.
    #[error("stopped")]
    Stopped,
    /// Contents that can't be read.
    #[error("cannot read base image {path} at byte {offset} of the disk")]
    Read {
        /// The base.
        path: PathBuf,
        /// Where in the disk, in bytes.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl BaseError {
    /// What a manifest, a delta or an image could not be made for: a verb, the file or its directory, and what the operating
    /// system said.
    pub(crate) fn manifest(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Manifest { operation, path: path.to_owned(), source }
    }
}
