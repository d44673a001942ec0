//! A service manager as `pristine serve` sees it: it is notified, and keeps descriptors over a restart
//! (sd_notify(3), sd_listen_fds(3)).
//!
//! While it keeps any, every process that the test starts inherits them: one test per process.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{FileType, fstat};
use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

/// See the module.
#[derive(Debug)]
pub struct ServiceManager {
    _dir: TempDir,
    path: PathBuf,
    socket: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
    /// What it was told last, without descriptors.
    pub states: Vec<String>,
}

impl ServiceManager {
    /// One that keeps nothing yet.
    pub fn new() -> std::io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ps").tempdir()?;
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { _dir: dir, path, socket, kept: Vec::new(), states: Vec::new() })
    }

    /// Takes what it was sent.
    pub fn listen(&mut self) {
        let mut bytes = [0; 4096];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let Ok(got) = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
            else {
                return;
            };
            let state = String::from_utf8_lossy(&bytes[..got.bytes]).into_owned();
            let name = state.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("").to_owned();
            for message in control.drain() {
                let RecvAncillaryMessage::ScmRights(fds) = message else { continue };
                fds.for_each(|fd| self.keep(&name, fd));
            }
            if state.starts_with("FDSTOREREMOVE=1") {
                self.kept.retain(|(kept, _)| *kept != name);
            } else if !state.starts_with("FDSTORE=1") {
                self.states.push(state);
            }
        }
    }

    /// Listens while something is done: a service may have more to say than is kept for a manager that does not listen.
    pub fn listen_while<T: Send>(&mut self, act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let acting = scope.spawn(act);
            crate::wait_until("what the service manager waits for", || {
                self.listen();
                acting.is_finished()
            });
            acting.join().unwrap()
        })
    }

    /// Keeps a descriptor, but none of an open file twice, whatever its name: as systemd does, which asks the kernel
    /// (`same_fd`). Here it is the same file in memory or on a disk; of other kinds two are taken for two.
    fn keep(&mut self, name: &str, fd: OwnedFd) {
        let file = |fd: &OwnedFd| {
            let stat = fstat(fd).unwrap();
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            is_file.then_some((stat.st_dev, stat.st_ino))
        };
        let this = file(&fd);
        if this.is_none() || self.kept.iter().all(|(_, kept)| file(kept) != this) {
            self.kept.push((name.to_owned(), fd));
        }
    }

    /// How many descriptors it keeps.
    pub fn kept(&mut self) -> usize {
        self.listen();
        self.kept.len()
    }

    /// `command` as this manager starts it, with what it keeps: start it before the second value goes.
    pub fn starts(&mut self, command: &Command) -> (Command, Vec<OwnedFd>) {
        self.listen();
        let (mut places, mut copies) = (String::new(), String::new());
        let mut names = Vec::new();
        // High numbers, so that none is in the place of another.
        let high: Vec<OwnedFd> =
            self.kept.iter().map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, 200).unwrap()).collect();
        for (index, (fd, (name, _))) in high.iter().zip(&self.kept).enumerate() {
            rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
            places += &format!(" {}<&{}", index + 3, fd.as_raw_fd());
            copies += &format!(" {}<&-", fd.as_raw_fd());
            names.push(name.as_str());
        }
        let script = format!(
            "exec{places}; exec{copies}; LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} exec \"$@\"",
            names.len(),
            names.join(":"),
        );
        let mut started = Command::new("bash");
        started.args(["-c", &script, "bash"]).arg(command.get_program()).args(command.get_args());
        started.env("NOTIFY_SOCKET", &self.path).env("FDSTORE", "64");
        (started, high)
    }

    /// Waits until it was told `state`.
    pub fn wait_for(&mut self, state: &str) {
        crate::wait_until(state, || {
            self.listen();
            self.states.iter().any(|told| told.starts_with(state))
        });
        self.states.clear();
    }
}
