//! The socket that frontends connect to: made by us at a path, or inherited.

use std::{
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;
use unix_socket::{PlacedListener, SocketPermissions, first_to_close};

use crate::connection::set_nonblocking;

/// Why a socket can't be used.
#[derive(Debug, Error)]
pub enum SocketError {
    /// There is none at the path.
    #[error(transparent)]
    Place(#[from] unix_socket::SocketError),
    /// The inherited descriptor is of no use.
    #[error("the inherited file descriptor is not a Unix stream socket that listens or is connected")]
    BadDescriptor,
}

/// A socket that frontends reach a server through. Removed from the file system on drop, unless
/// it was inherited or somebody else has put something in its place.
#[derive(Debug)]
pub struct Socket {
    pub(crate) kind: SocketKind,
}

#[derive(Debug)]
pub(crate) enum SocketKind {
    /// Takes one frontend after another.
    Placed(PlacedListener),
    /// The same, but it was inherited.
    Inherited(UnixListener),
    /// Is a frontend's connection already, and the only one. Taken out when it is served.
    Connected(Option<UnixStream>),
    /// Takes nobody any more.
    Closed,
}

impl Socket {
    /// Makes a listening socket at `path`; see [`PlacedListener::bind`].
    pub fn bind(path: &Path, permissions: SocketPermissions) -> Result<Self, SocketError> {
        Ok(Self { kind: SocketKind::Placed(PlacedListener::bind(path, permissions)?) })
    }

    /// Whether there can be a socket at `path`; see [`PlacedListener::check`].
    pub fn check(path: &Path) -> Result<(), SocketError> {
        Ok(PlacedListener::check(path)?)
    }

    /// The socket that takes one frontend after another, if it is one.
    pub(crate) fn listener(&self) -> Option<&UnixListener> {
        match &self.kind {
            SocketKind::Placed(placed) => Some(placed.listener()),
            SocketKind::Inherited(listener) => Some(listener),
            SocketKind::Connected(_) | SocketKind::Closed => None,
        }
    }

    /// Takes nobody any more. To be called before a connection is closed whose frontend is to find
    /// another server: it must not get a place in a queue that goes away.
    pub(crate) fn close(&mut self) {
        self.kind = SocketKind::Closed;
    }

    /// Uses descriptor number `fd`, which this process inherited for nothing else (QEMU's convention
    /// `--fd`). See [`from_fd`](Self::from_fd).
    pub fn inherit(fd: std::os::fd::RawFd) -> Result<Self, SocketError> {
        // Standard streams are never it.
        if fd <= 2 {
            return Err(SocketError::BadDescriptor);
        }
        // SAFETY: only asks whether the number is open.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(SocketError::BadDescriptor);
        }
        // SAFETY: the descriptor is open, and whoever started us handed it over to be ours alone.
        Self::from_fd(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
    }

    /// Uses a socket that was inherited: one that listens, or the connection of a frontend.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SocketError> {
        let is_stream = rustix::net::sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && rustix::net::sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
        if !is_stream {
            return Err(SocketError::BadDescriptor);
        }
        let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(|_| SocketError::BadDescriptor)?;
        if !listens && rustix::net::getpeername(&fd).is_err() {
            return Err(SocketError::BadDescriptor);
        }
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        set_nonblocking(&fd).map_err(|_| SocketError::BadDescriptor)?;
        let kind = if listens {
            SocketKind::Inherited(UnixListener::from(first_to_close(fd)))
        } else {
            SocketKind::Connected(Some(UnixStream::from(fd)))
        };
        Ok(Self { kind })
    }

    /// Whether there is only ever one connection.
    pub(crate) fn is_single(&self) -> bool {
        matches!(self.kind, SocketKind::Connected(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptor_is_told_by_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        assert!(!Socket::from_fd(listener.into()).unwrap().is_single());
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(Socket::from_fd(one.into()).unwrap().is_single());
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Socket::from_fd(file.into()), Err(SocketError::BadDescriptor)));
        let neither = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert!(matches!(Socket::from_fd(neither), Err(SocketError::BadDescriptor)));
    }
}
