//! Talking to systemd, where it asks (sd_notify(3)): that the service is ready, and descriptors that it
//! is to keep over a restart (`FileDescriptorStoreMax=`).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

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

/// How many descriptors the service manager keeps over a restart; it says so (systemd 254).
pub(crate) fn descriptors_kept_max() -> usize {
    std::env::var("FDSTORE").ok().and_then(|max| max.parse().ok()).unwrap_or(0)
}

/// Gives a frontend's connection to the service manager, for the next start of the service.
pub(crate) fn keep(handover: HandOver) -> io::Result<()> {
    let socket = connect().ok_or(io::ErrorKind::NotConnected)??;
    let (fds, max) = (handover.into_fds()?, descriptors_kept_max());
    if fds.len() > max {
        let what =
            format!("it keeps at most {max} descriptors, expected FileDescriptorStoreMax={}", fds.len());
        return Err(io::Error::other(what));
    }
    for (index, fd) in fds.iter().enumerate() {
        send_with(&socket, &format!("FDSTORE=1\nFDNAME={KEPT}{index}"), fd)?;
    }
    Ok(())
}

fn send_with(socket: &UnixDatagram, state: &str, fd: &OwnedFd) -> io::Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[IoSlice::new(state.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The connection that the service manager has kept, if it has. It keeps it no longer.
pub(crate) fn kept() -> Option<HandOver> {
    let variable = |name| std::env::var(name).ok();
    if variable("LISTEN_PID")?.parse() != Ok(std::process::id()) {
        return None;
    }
    let count = variable("LISTEN_FDS")?.parse().ok()?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let fds = match inherited_fds(LISTEN_FDS_START, count) {
        Ok(fds) => fds,
        Err(error) => {
            log::warn!("descriptors from the service manager: {error}");
            return None;
        }
    };
    let mut kept: Vec<(usize, OwnedFd)> = names
        .split(':')
        .zip(fds)
        .filter_map(|(name, fd)| Some((name.strip_prefix(KEPT)?.parse().ok()?, fd)))
        .collect();
    if kept.is_empty() {
        return None;
    }
    kept.iter().for_each(|(index, _)| notify(&format!("FDSTOREREMOVE=1\nFDNAME={KEPT}{index}")));
    kept.sort_by_key(|(index, _)| *index);
    let handover = HandOver::from_fds(kept.into_iter().map(|(_, fd)| fd).collect());
    handover
        .map_err(|error| log::warn!("the connection that was kept over the restart can't be used: {error}"))
        .ok()
}
