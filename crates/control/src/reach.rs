//! Sockets whose path is too long for a socket address.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use unix_socket::PATH_MAX;

/// A path that fits into a socket address and leads to the same socket as long as this lives.
#[derive(Debug)]
pub(crate) struct Reach {
    path: PathBuf,
    _directory: Option<OwnedFd>,
}

impl Reach {
    /// A way to `path`: itself, or through a descriptor of its directory.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(Self { path: path.to_owned(), _directory: None });
        };
        if path.as_os_str().len() <= PATH_MAX {
            return Ok(Self { path: path.to_owned(), _directory: None });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _directory: Some(directory) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}
