//! Talking to systemd, where it asks (sd_notify(3)): that the service is ready, and descriptors that it
//! is to keep over a restart (`FileDescriptorStoreMax=`).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_blk::{HandOver, inherited_fds};

/// The first descriptor that a service manager hands to a service.
const LISTEN_FDS_START: i32 = 3;
/// Names of descriptors that are kept begin with this; their number follows.
const KEPT: &str = "pristine-";

fn connect() -> Option<io::Result<UnixDatagram>> {
    let name = std::env::var_os("NOTIFY_SOCKET")?;
    let connect = || {
        let address = match name.as_bytes().split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(socket)
    };
    Some(connect())
}

/// Sends `state`, such as `READY=1`, to the socket that the service manager named, if it did.
pub(crate) fn notify(state: &str) {
    let Some(socket) = connect() else { return };
    if let Err(error) = socket.and_then(|socket| socket.send(state.as_bytes()).map(|_| ())) {
        log::warn!("cannot notify the service manager: {error}");
    }
}

/// How often the manager is asked for more time, and for how much.
const ASK_EVERY: Duration = Duration::from_secs(10);
const MORE_TIME: Duration = Duration::from_secs(600);

/// Has the service manager wait for long work before the service is ready, or has stopped (`TimeoutStartSec=`): as long as
/// the work gets on.
pub(crate) struct Patience {
    next: Instant,
}

impl Patience {
    /// The first request comes when the work has taken a while.
    pub(crate) fn new() -> Self {
        Self { next: Instant::now() + ASK_EVERY }
    }

    /// The work gets on.
    pub(crate) fn ask(&mut self) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + ASK_EVERY;
            notify(&format!("EXTEND_TIMEOUT_USEC={}", MORE_TIME.as_micros()));
        }
    }
}

/// How many descriptors the service manager keeps over a restart; it says so (systemd 254).
pub(crate) fn descriptors_kept_max() -> usize {
    std::env::var("FDSTORE").ok().and_then(|max| max.parse().ok()).unwrap_or(0)
}

/// Gives a frontend's connection to the service manager, for the next start of the service. If that
/// fails, the frontend is disconnected.
pub(crate) fn keep(handover: HandOver) -> io::Result<()> {
    let (fds, max) = (handover.into_fds()?, descriptors_kept_max());
    let send = || -> io::Result<()> {
        if fds.len() > max {
            let wanted = fds.len();
            let what = format!("it keeps {max} descriptors, expected FileDescriptorStoreMax={wanted}");
            return Err(io::Error::other(what));
        }
        let socket = connect().ok_or(io::ErrorKind::NotConnected)??;
        let names = (0..fds.len()).map(|index| format!("FDSTORE=1\nFDNAME={KEPT}{index}"));
        names.zip(&fds).try_for_each(|(state, fd)| send_with(&socket, &state, fd))
    };
    send().inspect_err(|_| {
        // The manager may have copies: closing ours would not tell the frontend.
        if let Some(frontend) = fds.get(1) {
            let _ = rustix::net::shutdown(frontend, rustix::net::Shutdown::Both);
        }
        (0..fds.len()).for_each(forget);
    })
}

/// Tells the manager to keep a descriptor no longer.
fn forget(index: usize) {
    notify(&format!("FDSTOREREMOVE=1\nFDNAME={KEPT}{index}"));
}

fn send_with(socket: &UnixDatagram, state: &str, fd: &OwnedFd) -> io::Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(state.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The connection that the service manager has kept, if it has. It keeps it no longer. To be called
/// before anything is opened.
pub(crate) fn kept() -> Option<HandOver> {
    let variable = |name| std::env::var(name).ok();
    if variable("LISTEN_PID")?.parse() != Ok(std::process::id()) {
        return None;
    }
    let count: usize = variable("LISTEN_FDS")?.parse().ok()?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let names: Vec<&str> = names.split(':').collect();
    if names.len() != count {
        return None;
    }
    // Others, such as a listening socket that --fd names, are not ours to take.
    let index_of = |name: &str| name.strip_prefix(KEPT)?.parse::<usize>().ok();
    let mut places: Vec<(usize, i32)> = (LISTEN_FDS_START..)
        .zip(names)
        .filter_map(|(number, name)| Some((index_of(name)?, number)))
        .collect();
    if places.is_empty() {
        return None;
    }
    places.sort_unstable();
    let numbers: Vec<i32> = places.iter().map(|(_, number)| *number).collect();
    let fds = inherited_fds(&numbers);
    places.iter().for_each(|(index, _)| forget(*index));
    let whole = places.iter().map(|(index, _)| *index).eq(0..places.len());
    let handover = fds.and_then(|fds| {
        if !whole {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "some of it is missing"));
        }
        HandOver::from_fds(fds)
    });
    handover
        .map_err(|error| log::warn!("the connection that was kept over the restart can't be used: {error}"))
        .ok()
}
