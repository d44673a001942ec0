//! What went wrong with which file, at which offset, and during which operation.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

/// A failed operation on a file.
///
/// Its `Display` names the operation and the file and never repeats the source, which says why.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}{}", path.display(), At(*offset))]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    path: PathBuf,
    offset: Option<u64>,
    source: io::Error,
}

/// What a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Somebody else holds the file: a lock or an exclusive open.
    InUse,
    /// Neither a regular file nor a block device.
    WrongType,
    /// The file, its file system or the kernel cannot do this.
    Unsupported,
    /// Anything else: see [`Error::io_error`].
    Io,
}

impl Error {
    pub(crate) fn new(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => ErrorKind::InUse,
            _ => ErrorKind::Io,
        };
        Self { kind, operation, path: path.to_owned(), offset: None, source }
    }

    pub(crate) fn in_use(operation: &'static str, path: &Path, who: &str) -> Self {
        let source = io::Error::new(io::ErrorKind::ResourceBusy, format!("{who} has it open"));
        Self { kind: ErrorKind::InUse, ..Self::new(operation, path, source) }
    }

    pub(crate) fn wrong_type(operation: &'static str, path: &Path) -> Self {
        let source =
            io::Error::new(io::ErrorKind::InvalidInput, "it is neither a regular file nor a block device");
        Self { kind: ErrorKind::WrongType, ..Self::new(operation, path, source) }
    }

    pub(crate) fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// What a caller may want to tell apart.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operation that failed, as the infinitive that `Display` shows.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where in the file, in bytes, if the operation was at one place.
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// Why it failed.
    pub fn io_error(&self) -> &io::Error {
        &self.source
    }

    /// The operating system's error number, if the error came from there.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether somebody else holds the file.
    pub fn is_in_use(&self) -> bool {
        self.kind == ErrorKind::InUse
    }
}

struct At(Option<u64>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |offset| write!(f, " at offset {offset}"))
    }
}

/// An error with all its sources, in one line. One that only adds a word to its source says nothing new, and is said once.
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn error_shown_names_operation_path_and_offset_but_not_its_source() {
        let error = Error::new("read", Path::new("disk.raw"), io::Error::from_raw_os_error(5)).at(4096);
        assert_eq!(error.to_string(), "cannot read disk.raw at offset 4096");
        assert!(error.source().unwrap().to_string().contains("os error 5"));
        assert_eq!(error.raw_os_error(), Some(5));
        assert!(!error.is_in_use());
    }

    #[test]
    fn error_of_a_busy_device_is_in_use() {
        assert!(Error::new("open", Path::new("d"), Errno::BUSY).is_in_use());
    }
}
