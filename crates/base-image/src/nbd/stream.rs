//! Bytes to and from a server, none of which is waited for past a deadline.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout, socket_error,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustls::{ClientConnection, StreamOwned};

use super::LOOK_EVERY;
use super::hurry::Hurry;
use super::tls;
use super::uri::{Server, Tls};

/// A connection with a deadline, perhaps with TLS.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(Timed),
    Tls(Box<StreamOwned<ClientConnection, Timed>>),
}

/// A socket with a deadline.
#[derive(Debug)]
pub(super) struct Timed {
    socket: Socket,
    deadline: Instant,
    /// Set: nothing is waited for any more.
    hurry: Hurry,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects to `server`, until `deadline` at most. Once `hurry` is set, nothing is waited for any more.
    ///
    /// The connection fails if the other host's kernel does not confirm what was sent to it for `silence_max`: then the way is
    /// lost, which another connection may not be. A server that takes its time is something else.
    pub(super) fn connect(
        server: &Server,
        deadline: Instant,
        silence_max: Duration,
        hurry: &Hurry,
    ) -> io::Result<Self> {
        let socket = match server {
            Server::Tcp(host, port) => {
                let socket = connect_tcp(host, *port, deadline, hurry)?;
                notice_silence(&socket, silence_max)?;
                Socket::Tcp(socket)
            }
            Server::Unix(path) => Socket::Unix(connect_unix(path)?),
        };
        Ok(Self::Plain(Timed { socket, deadline, hurry: hurry.clone() }))
    }

    /// The same connection with TLS from now on, if the server is who it should be.
    pub(super) fn encrypted(self, tls: &Tls) -> io::Result<Self> {
        let Self::Plain(timed) = self else { return Ok(self) };
        let mut stream = StreamOwned::new(tls::session(tls)?, timed);
        // Before anything is said: who it is comes first.
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self::Tls(Box::new(stream)))
    }

    /// From now on nothing is waited for past `deadline`.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        match self {
            Self::Plain(timed) => timed.deadline = deadline,
            Self::Tls(stream) => stream.sock.deadline = deadline,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(timed) => timed.read(buf),
            Self::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(timed) => timed.write(buf),
            Self::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(timed) => timed.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

impl Timed {
    /// Does `io`, which is told how long it may wait, until it did not have to.
    fn wait<T>(&mut self, mut io: impl FnMut(&mut Socket, Duration) -> io::Result<T>) -> io::Result<T> {
        loop {
            // Each time anew: a server that sends a byte now and then is held to the deadline too.
            let left = left(self.deadline, &self.hurry)?;
            match io(&mut self.socket, left) {
                // A socket's own limit shows as an operation that would block.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

/// How long may be waited before one has to look again.
fn left(deadline: Instant, hurry: &Hurry) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() || hurry.is_set() { Err(no_answer()) } else { Ok(left.min(LOOK_EVERY)) }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

fn connect_tcp(host: &str, port: u16, deadline: Instant, hurry: &Hurry) -> io::Result<TcpStream> {
    connect_any(&addresses(host, port, deadline, hurry)?, deadline, hurry)
}

/// Tries one address after the other. One that is silent leaves time for those after it.
fn connect_any(addresses: &[SocketAddr], deadline: Instant, hurry: &Hurry) -> io::Result<TcpStream> {
    let mut error = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for (address, remaining) in addresses.iter().zip((1..=addresses.len() as u32).rev()) {
        let now = Instant::now();
        let its_end = now + deadline.saturating_duration_since(now) / remaining;
        match connect_to(*address, its_end, hurry) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(failed) => error = failed,
        }
        // If nothing is waited for any more, it is for none of the others either.
        left(deadline, hurry)?;
    }
    Err(if error.kind() == io::ErrorKind::TimedOut { no_answer() } else { error })
}

/// The addresses of `host`. To look up a name may take long and can't be ended, so a thread does it that is left to itself
/// if need be; its system's resolver gives up some time.
fn addresses(host: &str, port: u16, deadline: Instant, hurry: &Hurry) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (found, answer) = mpsc::channel();
    let name = host.to_owned();
    thread::Builder::new().name("resolver".into()).spawn(move || {
        let addresses = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
        // Perhaps nobody waits any more.
        let _ = found.send(addresses);
    })?;
    loop {
        match answer.recv_timeout(left(deadline, hurry)?) {
            Ok(addresses) => return addresses,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("its name can't be looked up"));
            }
        }
    }
}

fn connect_to(address: SocketAddr, deadline: Instant, hurry: &Hurry) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            loop {
                let timeout = Timespec::try_from(left(deadline, hurry)?).map_err(io::Error::other)?;
                match poll(&mut fds, Some(&timeout)) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            socket_error(&socket)??;
        }
        Err(errno) => return Err(errno.into()),
    }
    let socket = TcpStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// See [`Stream::connect`]; tcp(7), `TCP_USER_TIMEOUT`, which also ends what keep-alive probes find out.
fn notice_silence(socket: &TcpStream, silence_max: Duration) -> io::Result<()> {
    let ms = u32::try_from(silence_max.as_millis()).unwrap_or(u32::MAX).max(1);
    set_tcp_user_timeout(socket, ms)?;
    // Of a request that was confirmed and whose answer gets lost, nothing else tells. The kernel counts these in seconds, from 1
    // to 32767.
    let probe = (silence_max / 4).clamp(Duration::from_secs(1), Duration::from_secs(60));
    set_tcp_keepidle(socket, probe)?;
    set_tcp_keepintvl(socket, probe)?;
    set_socket_keepalive(socket, true)?;
    Ok(())
}

/// Never waits: a server that takes no more connections has its socket's queue full.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::AGAIN) => {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes no more connections"));
        }
        result => result?,
    }
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(|socket, left| match socket {
            Socket::Tcp(socket) => socket.set_read_timeout(Some(left)).and_then(|()| socket.read(buf)),
            Socket::Unix(socket) => socket.set_read_timeout(Some(left)).and_then(|()| socket.read(buf)),
        })
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait(|socket, left| match socket {
            Socket::Tcp(socket) => socket.set_write_timeout(Some(left)).and_then(|()| socket.write(buf)),
            Socket::Unix(socket) => socket.set_write_timeout(Some(left)).and_then(|()| socket.write(buf)),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::listen;

    use super::*;

    const HOURS: Duration = Duration::from_secs(7200);

    fn tcp(address: SocketAddr) -> Server {
        Server::Tcp(address.ip().to_string(), address.port())
    }

    /// Who wants to stop does not wait for a host that answers nothing, not even that it refuses.
    #[test]
    fn attempt_to_connect_ends_with_the_hurry_and_with_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // The kernel drops what is beyond, in silence.
        listen(&listener, 0).unwrap();
        let server = tcp(listener.local_addr().unwrap());
        let (mut taken, hurry) = (Vec::new(), Hurry::default());
        let error = loop {
            match Stream::connect(&server, Instant::now() + LOOK_EVERY, HOURS, &hurry) {
                Ok(stream) => taken.push(stream),
                Err(error) => break error,
            }
            assert!(taken.len() < 100);
        };
        assert!(error.kind() == io::ErrorKind::TimedOut && error.to_string().contains("does not answer"));
        thread::scope(|scope| {
            let attempt = scope.spawn(|| Stream::connect(&server, Instant::now() + HOURS, HOURS, &hurry));
            hurry.set(true);
            assert_eq!(attempt.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
    }

    /// A name may have an address that leads nowhere, as those of IPv6 often do.
    #[test]
    fn address_that_is_silent_leaves_time_for_the_next_one() {
        let (silent, good) =
            (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        listen(&silent, 0).unwrap();
        let addresses = [&silent, &good].map(|listener| listener.local_addr().unwrap());
        let hurry = Hurry::default();
        let mut taken = Vec::new();
        while let Ok(stream) = connect_to(addresses[0], Instant::now() + LOOK_EVERY, &hurry) {
            taken.push(stream);
        }
        let stream = connect_any(&addresses, Instant::now() + Duration::from_secs(4), &hurry).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), addresses[1]);
    }

    #[test]
    fn host_is_found_by_its_name_and_refuses_at_once_where_nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (deadline, hurry) = (Instant::now() + HOURS, Hurry::default());
        Stream::connect(&Server::Tcp("localhost".into(), port), deadline, HOURS, &hurry).unwrap();
        drop(listener);
        let error =
            Stream::connect(&Server::Tcp("127.0.0.1".into(), port), deadline, HOURS, &hurry).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
