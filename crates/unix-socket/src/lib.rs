//! A listening Unix socket at a path: made where nothing living is in the way, for those who may
//! connect and nobody else, and removed again.
//!
//! This crate knows sockets and directories; it does not know what is said over them.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use thiserror::Error;

/// Longest path of a Unix socket in bytes: `sun_path` with its terminating NUL.
pub const PATH_MAX: usize = 107;
/// Connections that may wait for being accepted.
const BACKLOG: i32 = 16;
/// Least numbers that are tried for a listening socket, which is to have a greater one than connections.
const NUMBERS: [RawFd; 4] = [960, 480, 240, 120];
/// How long to wait for another server that is just making its socket in the same directory.
const DIRECTORY_WAIT_MAX: Duration = Duration::from_secs(2);

/// Who may connect. What is not given stays as the process's umask and identity make it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketPermissions {
    /// Permission bits, as of `chmod`.
    pub mode: Option<u32>,
    /// Numeric user ID of the owner.
    pub owner: Option<u32>,
    /// Numeric group ID.
    pub group: Option<u32>,
}

/// Why there is no socket at a path.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "socket path {path} is {len} bytes long, at most {PATH_MAX} are possible: use a shorter one",
        path = .path.display(), len = .path.as_os_str().len()
    )]
    TooLong {
        /// The path asked for.
        path: PathBuf,
    },
    /// Another server answers there.
    #[error("socket {path} is taken by a living server", path = .path.display())]
    Taken {
        /// The path asked for.
        path: PathBuf,
    },
    /// There is something else, which is left alone.
    #[error("{path} exists and is not a socket: remove it, or use another path", path = .path.display())]
    NotASocket {
        /// The path asked for.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {operation} socket {path}", path = .path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path asked for.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

/// A socket that listens, does not block, and is removed from the file system on drop, unless somebody
/// else has put something in its place.
#[derive(Debug)]
pub struct PlacedListener {
    listener: UnixListener,
    _placed: Placed,
}

/// Where our socket is in the file system, and which file it is.
#[derive(Debug)]
struct Placed {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl PlacedListener {
    /// Makes a listening socket at `path`. One that nobody listens on any more is replaced; a
    /// living server's, and anything that is not a socket, is left as it is. Nobody can connect
    /// before the permissions are set.
    pub fn bind(path: &Path, permissions: SocketPermissions) -> Result<Self, SocketError> {
        if path.as_os_str().as_bytes().len() > PATH_MAX {
            return Err(SocketError::TooLong { path: path.to_owned() });
        }
        let fail = |operation| {
            let path = path.to_owned();
            move |error: Errno| SocketError::Io { operation, path, source: error.into() }
        };
        // Two servers must not both find the same leftover, and the second replace the first's.
        let _guard = lock_directory(path).map_err(fail("lock the directory of"))?;
        remove_leftover(path)?;
        let listener = first_to_close(unix_socket().map_err(fail("create"))?);
        let address = SocketAddrUnix::new(path).map_err(fail("name"))?;
        let mode = permissions.mode.map(|mode| mode & 0o7777);
        if let Some(mode) = mode {
            // What is bound has no more than this, whatever the umask takes away from it.
            rustix::fs::fchmod(&listener, Mode::from_raw_mode(mode)).map_err(fail("change the mode of"))?;
        }
        rustix::net::bind(&listener, &address).map_err(fail("bind"))?;
        // From here on, dropping removes it.
        let placed = Placed::at(path)?;
        permit(path, mode, permissions)?;
        rustix::net::listen(&listener, BACKLOG).map_err(fail("listen on"))?;
        Ok(Self { listener: UnixListener::from(listener), _placed: placed })
    }

    /// Whether [`bind`](Self::bind) would find the path fit for a socket and free, as far as can be told
    /// without doing it.
    pub fn check(path: &Path) -> Result<(), SocketError> {
        if path.as_os_str().as_bytes().len() > PATH_MAX {
            return Err(SocketError::TooLong { path: path.to_owned() });
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory_of(path), flags, Mode::empty());
        directory.map_err(|error| failed("find the directory of", path, error.into()))?;
        look_for_leftover(path).map(|_| ())
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// Gives the socket at `path` what it has not got yet of its `mode`, and of its owner and group. Whoever owns the directory
/// may have put something else there, even a link to another's file, and is not helped to change that.
fn permit(path: &Path, mode: Option<u32>, permissions: SocketPermissions) -> Result<(), SocketError> {
    let fail = |operation| move |error: Errno| failed(operation, path, error.into());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty()).map_err(fail("open"))?;
    let found = rustix::fs::fstat(&socket).map_err(fail("look at"))?.st_mode;
    if FileType::from_raw_mode(found) != FileType::Socket {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    let (owner, group) = (permissions.owner.map(Uid::from_raw), permissions.group.map(Gid::from_raw));
    if owner.is_some() || group.is_some() {
        let flags = AtFlags::EMPTY_PATH;
        rustix::fs::chownat(&socket, "", owner, group, flags).map_err(fail("change the owner of"))?;
    }
    if let Some(mode) = mode.filter(|mode| found & 0o7777 != *mode) {
        // There is no other way to the mode of what is open like this.
        let opened = format!("/proc/self/fd/{}", socket.as_raw_fd());
        fs::set_permissions(opened, fs::Permissions::from_mode(mode))
            .map_err(|source| failed("change the mode of", path, source))?;
    }
    Ok(())
}

impl Placed {
    fn at(path: &Path) -> Result<Self, SocketError> {
        let metadata = fs::symlink_metadata(path).map_err(|source| SocketError::Io {
            operation: "look at",
            path: path.to_owned(),
            source,
        })?;
        // Absolute, because the working directory may change before it is removed.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok(Self { path, device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives a listening socket the number with which it is closed before the connections that it has
/// accepted, should the process be killed: the kernel closes by descending number.
///
/// The other way round, a frontend that notices the end of its connection and connects again at once
/// would get a connection that nobody will ever accept. Cloud Hypervisor then gives up its disk; where it
/// is refused it tries again.
pub fn first_to_close(listener: OwnedFd) -> OwnedFd {
    // All fail only where a process may have very few descriptors.
    let moved = NUMBERS.iter().find_map(|least| rustix::io::fcntl_dupfd_cloexec(&listener, *least).ok());
    moved.unwrap_or(listener)
}

fn unix_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Keeps other servers from making a socket in the same directory for as long as it lives, if that can be had: servers keep it
/// for a millisecond, but whoever may look into the directory may keep it for ever. Without it two servers may take the same
/// leftover only if they come between each other's next two steps.
fn lock_directory(path: &Path) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(directory_of(path), flags, Mode::empty()) {
        // In which one may make files, but not list them.
        Err(Errno::ACCESS) => return Ok(None),
        directory => directory?,
    };
    let start = Instant::now();
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) if start.elapsed() < DIRECTORY_WAIT_MAX => {
                std::thread::sleep(Duration::from_millis(5));
            }
            // The last three are of file systems without locks.
            Err(Errno::AGAIN | Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(None),
            result => return result.map(|()| Some(directory)),
        }
    }
}

/// Makes room at `path`, if what is there is a socket without a server.
fn remove_leftover(path: &Path) -> Result<(), SocketError> {
    if look_for_leftover(path)? {
        fs::remove_file(path).map_err(|error| failed("replace", path, error))?;
    }
    Ok(())
}

/// Whether there is a socket without a server at `path`; anything else is an error, nothing is none.
fn look_for_leftover(path: &Path) -> Result<bool, SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("look at", path, error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let address = SocketAddrUnix::new(path).map_err(|error| failed("name", path, error.into()))?;
    let probe = unix_socket().map_err(|error| failed("create", path, error.into()))?;
    match rustix::net::connect(probe.as_fd(), &address) {
        Err(Errno::CONNREFUSED) => Ok(true),
        // A server whose queue is full, or that speaks in another way, lives too.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(SocketError::Taken { path: path.to_owned() }),
        Err(error) => Err(failed("find out whether a server lives on", path, error.into())),
    }
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> SocketError {
    SocketError::Io { operation, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn bind(path: &Path) -> Result<PlacedListener, SocketError> {
        PlacedListener::bind(path, SocketPermissions::default())
    }

    #[test]
    fn socket_at_a_path_that_is_too_long_is_refused_with_its_length() {
        let path = PathBuf::from("/".to_owned() + &"x".repeat(PATH_MAX));
        let error = bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::TooLong { .. }));
        assert!(error.to_string().contains("108 bytes"));
    }

    #[test]
    fn socket_at_a_path_of_the_greatest_length_works() {
        let directory = tempfile::tempdir().unwrap();
        let room = PATH_MAX - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("x".repeat(room));
        let _socket = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_of_a_living_server_is_refused_and_untouched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _living = bind(&path).unwrap();
        assert!(matches!(PlacedListener::check(&path), Err(SocketError::Taken { .. })));
        assert!(matches!(bind(&path), Err(SocketError::Taken { .. })));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_that_listens_has_a_greater_number_than_connections() {
        let directory = tempfile::tempdir().unwrap();
        let socket = bind(&directory.path().join("s")).unwrap();
        assert!(socket.listener().as_raw_fd() >= NUMBERS[3]);
    }

    #[test]
    fn socket_that_nobody_listens_on_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        PlacedListener::check(&path).unwrap();
        assert!(path.exists());
        let _socket = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_where_something_else_is_leaves_it_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = directory.path().join("l");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(bind(&link), Err(SocketError::NotASocket { .. })));
    }

    #[test]
    fn socket_in_a_missing_directory_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("missing/s");
        for error in [bind(&path).unwrap_err(), PlacedListener::check(&path).unwrap_err()] {
            assert!(matches!(error, SocketError::Io { .. }), "{error}");
        }
    }

    /// Anybody who may look into a directory may lock it.
    #[test]
    fn lock_that_is_never_let_go_keeps_no_server_from_starting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let stranger = fs::File::open(directory.path()).unwrap();
        rustix::fs::flock(&stranger, FlockOperation::NonBlockingLockExclusive).unwrap();
        let _socket = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_dropped_removes_its_file_but_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(bind(&path).unwrap());
        assert!(!path.exists());
        let socket = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn socket_gets_the_permissions_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let group = rustix::process::getgid().as_raw();
        let permissions = SocketPermissions { mode: Some(0o620), owner: None, group: Some(group) };
        let _socket = PlacedListener::bind(&path, permissions).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.gid()), (0o620, group));
    }

    /// As the owner of the directory can put one there between two steps.
    #[test]
    fn link_in_the_place_of_the_socket_gives_no_permissions_to_what_it_leads_to() {
        let directory = tempfile::tempdir().unwrap();
        let (path, secret) = (directory.path().join("s"), directory.path().join("secret"));
        fs::write(&secret, "precious").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o400)).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        let permissions = SocketPermissions { mode: Some(0o666), ..Default::default() };
        let permitted = permit(&path, permissions.mode, permissions);
        assert!(matches!(permitted, Err(SocketError::NotASocket { .. })), "{permitted:?}");
        assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o7777, 0o400);
    }

    #[test]
    fn socket_whose_owner_cannot_be_set_leaves_nothing_behind() {
        if rustix::process::geteuid().is_root() {
            return; // root may give it to anybody
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let permissions = SocketPermissions { owner: Some(0), ..Default::default() };
        assert!(PlacedListener::bind(&path, permissions).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn two_servers_racing_for_a_leftover_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = directory.path().join(format!("s{round}"));
            drop(UnixListener::bind(&path).unwrap());
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| bind(&path))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }
}
