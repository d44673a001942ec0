//! The process at the other end of a connection: who it is, and whether it still lives.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use session_disk::ProcessId;

use crate::boundary::{Identity, ProcessKey};

/// Peer credentials with a descriptor of the process itself (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;
/// What `statfs` says of a pidfd on whose inode number one can go (Linux 6.9): each process has one of its own.
const PID_FS_MAGIC: u64 = 0x5049_4446;

/// A peer process.
#[derive(Debug)]
pub(crate) struct Peer {
    process: Option<ProcessKey>,
    life: Life,
}

#[derive(Debug)]
enum Life {
    /// Readable when the process is gone; a zombie counts as gone.
    Watched(OwnedFd),
    /// Was gone before it could be watched.
    Gone,
    /// Can't be told.
    Unknown,
}

impl Peer {
    /// The process that connected `socket`, as far as the kernel tells.
    pub(crate) fn of(socket: impl AsFd) -> Self {
        let socket = socket.as_fd();
        let Some(pid) = peer_pid(socket).and_then(Pid::from_raw) else {
            return Self::of_inode(peer_pidfd(socket).ok());
        };
        let opened = match peer_pidfd(socket) {
            // An older kernel: the number may have been used again, but hardly so soon.
            Err(Errno::NOPROTOOPT) => pidfd_open(pid, PidfdFlags::empty()),
            opened => opened,
        };
        let id = u32::try_from(pid.as_raw_nonzero().get()).ok().and_then(ProcessId::of);
        let inode = || inode(opened.as_ref().ok()?).map(ProcessKey::Inode);
        let process = id.map(ProcessKey::Id).or_else(inode);
        let life = match opened {
            Ok(pidfd) => Life::Watched(pidfd),
            Err(Errno::SRCH | Errno::INVAL) => Life::Gone,
            Err(_) => Life::Unknown,
        };
        Self { process, life }
    }

    /// A process that has no number here. One that would not be recognised is not watched either: its session would be open
    /// for as long as it lives, and it could not come back to it.
    fn of_inode(pidfd: Option<OwnedFd>) -> Self {
        let known = pidfd.and_then(|pidfd| Some((inode(&pidfd)?, pidfd)));
        known.map_or_else(Self::unknown, |(inode, pidfd)| Self {
            process: Some(ProcessKey::Inode(inode)),
            life: Life::Watched(pidfd),
        })
    }

    /// A process that is known from before. One that runs and is not shown to us can't be told from another one of its number: nothing is
    /// known of it.
    pub(crate) fn of_process(process: ProcessId) -> Self {
        let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
        let life = match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            // Opened first, looked at then: the number can't be used again while we have it.
            Some(Ok(pidfd)) if process.is_alive() => Life::Watched(pidfd),
            Some(Ok(_)) if process.may_be_alive() => return Self::unknown(),
            Some(Ok(_) | Err(Errno::SRCH | Errno::INVAL)) => Life::Gone,
            Some(Err(_)) | None => Life::Unknown,
        };
        Self { process: Some(ProcessKey::Id(process)), life }
    }

    /// A peer of which nothing is known.
    pub(crate) fn unknown() -> Self {
        Self { process: None, life: Life::Unknown }
    }

    /// What a session boundary goes by.
    pub(crate) fn identity(&self) -> Identity {
        Identity { process: self.process, watched: !matches!(self.life, Life::Unknown) }
    }

    /// The process, for the session's records.
    pub(crate) fn process(&self) -> Option<ProcessId> {
        match self.process {
            Some(ProcessKey::Id(process)) => Some(process),
            Some(ProcessKey::Inode(_)) | None => None,
        }
    }

    /// Readable when the process is gone.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.life {
            Life::Watched(pidfd) => Some(pidfd.as_fd()),
            Life::Gone | Life::Unknown => None,
        }
    }

    /// Whether the process is known to be gone.
    pub(crate) fn is_gone(&self) -> bool {
        match &self.life {
            Life::Watched(pidfd) => {
                let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                rustix::event::poll(&mut poll, Some(&now)).is_ok_and(|ready| ready > 0)
            }
            Life::Gone => true,
            Life::Unknown => false,
        }
    }
}

/// The peer's process number; `None` if it has none in this pid namespace.
fn peer_pid(socket: BorrowedFd<'_>) -> Option<i32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    // SAFETY: `ucred` is plain old data, of which every bit pattern is valid.
    unsafe { option(socket, libc::SO_PEERCRED, &mut credentials) }.ok()?;
    (credentials.pid > 0).then_some(credentials.pid)
}

/// A descriptor of the peer's process, where the kernel gives one.
fn peer_pidfd(socket: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let mut pidfd: RawFd = -1;
    // SAFETY: a descriptor is a plain number.
    unsafe { option(socket, SO_PEERPIDFD, &mut pidfd) }?;
    if pidfd < 0 {
        return Err(Errno::NOPROTOOPT);
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// The inode that a process has for itself, where the kernel says so.
fn inode(pidfd: &OwnedFd) -> Option<u64> {
    let is_on_pidfs = rustix::fs::fstatfs(pidfd).is_ok_and(|statfs| statfs.f_type as u64 == PID_FS_MAGIC);
    is_on_pidfs.then(|| rustix::fs::fstat(pidfd).ok().map(|stat| stat.st_ino)).flatten()
}

/// Reads a socket option.
///
/// # Safety
/// Every bit pattern must be a valid `T`.
unsafe fn option<T>(socket: BorrowedFd<'_>, name: libc::c_int, value: &mut T) -> rustix::io::Result<()> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            std::ptr::from_mut(value).cast(),
            &mut len,
        )
    };
    match result {
        0 if len as usize == size_of::<T>() => Ok(()),
        0 => Err(Errno::NOPROTOOPT),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::net::UnixStream,
        process::{Child, Command, Stdio},
    };

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap()
    }

    fn watched(child: &Child) -> Peer {
        let pid = Pid::from_raw(child.id() as i32).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        Peer { process: None, life: Life::Watched(pidfd) }
    }

    fn wait_for_end(peer: &Peer) {
        let mut poll = [PollFd::from_borrowed_fd(peer.pidfd().unwrap(), PollFlags::IN)];
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut poll, Some(&limit)), Ok(1));
    }

    #[test]
    fn peer_of_our_own_socket_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one);
        assert_eq!(peer.process(), Some(ProcessId::own()));
        assert!(peer.identity().watched && !peer.is_gone() && peer.pidfd().is_some());
        assert_eq!(peer.identity(), Peer::of(&one).identity());
    }

    #[test]
    fn peer_known_from_before_is_watched_only_if_it_is_the_same_process() {
        let mut child = sleeper();
        let process = ProcessId::of(child.id()).unwrap();
        let peer = Peer::of_process(process);
        assert_eq!(peer.identity(), Identity { process: Some(ProcessKey::Id(process)), watched: true });
        assert!(!peer.is_gone());
        let earlier = ProcessId { start_ticks: process.start_ticks - 1, ..process };
        assert!(Peer::of_process(earlier).is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(peer.is_gone() && Peer::of_process(process).is_gone());
    }

    #[test]
    fn peer_that_is_a_zombie_counts_as_gone() {
        let mut child = sleeper();
        let peer = watched(&child);
        assert!(!peer.is_gone());
        child.kill().unwrap();
        // Not waited for: it stays a zombie until the end of this test.
        wait_for_end(&peer);
        assert!(peer.is_gone());
        child.wait().unwrap();
        assert!(peer.is_gone());
    }

    /// As it is seen from another pid namespace. On Linux before 6.9 nothing is known of it.
    #[test]
    fn peer_without_a_number_is_known_by_its_inode() {
        let mut children = [sleeper(), sleeper()];
        let of = |child: &Child| {
            let pid = Pid::from_raw(child.id() as i32).unwrap();
            Peer::of_inode(Some(pidfd_open(pid, PidfdFlags::empty()).unwrap()))
        };
        let [one, other] = children.each_ref().map(of);
        let known = one.identity();
        children.iter_mut().for_each(|child| child.kill().unwrap());
        if known == Peer::unknown().identity() {
            eprintln!("not tested: pidfds of this kernel have no inodes of their own");
        } else {
            assert!(known.watched && known == of(&children[0]).identity() && known != other.identity());
            wait_for_end(&one);
            assert!(one.is_gone() && one.process().is_none());
        }
        for mut child in children {
            child.wait().unwrap();
        }
    }

    #[test]
    fn peer_of_something_that_is_not_a_socket_is_unknown() {
        let peer = Peer::of(fs::File::open("/dev/null").unwrap());
        assert_eq!(peer.identity(), Identity { process: None, watched: false });
        assert!(!peer.is_gone());
        assert_eq!(peer.process(), None);
    }
}
