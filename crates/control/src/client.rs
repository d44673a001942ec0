//! The client's side of the socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::api::{Command, Refusal, Reply, Request, SessionEnded, SessionHeld, SessionReleased, Status};
use crate::reach::Reach;

/// Longest reply that is read, in bytes.
const REPLY_BYTES_MAX: u64 = 64 * 1024;
/// How long to wait for a server to accept the connection, and to take a request.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a server may take to tell how things are.
const STATUS_TIME_MAX: Duration = Duration::from_secs(5);
/// How long it may take to carry a command out: longer than its own limit, so that it can say so.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(60);

/// Why there is no result.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The server did not carry the command out.
    #[error("{0}")]
    Refused(Refusal),
    /// The connection failed.
    #[error("cannot {operation} the server at {path}", path = .path.display())]
    Connection {
        /// What was tried.
        operation: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It has not answered in time. What it was asked to do goes on.
    #[error("the server at {path} has not answered for {seconds} s; what it was asked for goes on", path = .path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// What came back is not a reply.
    #[error("the server at {path} answered with what is not understood: {what}", path = .path.display())]
    BadReply {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Client {
    /// Connects to the server at `path`; `None`: there is none.
    pub fn connect(path: &Path) -> Result<Option<Self>, ClientError> {
        match connect(path) {
            Ok(stream) => Ok(Some(Self { stream: BufReader::new(stream), path: path.to_owned() })),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(source) => {
                Err(ClientError::Connection { operation: "connect to", path: path.to_owned(), source })
            }
        }
    }

    /// How things are.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.call(Command::Status, STATUS_TIME_MAX)
    }

    /// Ends the session that is open; returns when it has ended.
    pub fn session_end(&mut self) -> Result<SessionEnded, ClientError> {
        self.call(Command::SessionEnd, COMMAND_TIME_MAX)
    }

    /// Keeps the disk as the session leaves it.
    pub fn session_hold(&mut self) -> Result<SessionHeld, ClientError> {
        self.call(Command::SessionHold, COMMAND_TIME_MAX)
    }

    /// Lets a held disk be restored and used again.
    pub fn session_release(&mut self) -> Result<SessionReleased, ClientError> {
        self.call(Command::SessionRelease, COMMAND_TIME_MAX)
    }

    fn call<T: DeserializeOwned>(&mut self, command: Command, limit: Duration) -> Result<T, ClientError> {
        let broken = |operation| {
            let path = self.path.clone();
            move |source| ClientError::Connection { operation, path, source }
        };
        let bad = |what: String| ClientError::BadReply { path: self.path.clone(), what };
        let mut line = serde_json::to_vec(&Request::new(command)).map_err(|error| bad(error.to_string()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(broken("ask"))?;
        self.stream.get_ref().set_read_timeout(Some(limit)).map_err(broken("wait for"))?;
        let mut line = Vec::new();
        Read::by_ref(&mut self.stream).take(REPLY_BYTES_MAX).read_until(b'\n', &mut line).map_err(
            |error| match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    ClientError::NoAnswer { path: self.path.clone(), seconds: limit.as_secs() }
                }
                _ => broken("hear from")(error),
            },
        )?;
        if !line.ends_with(b"\n") {
            return Err(bad(format!("{} bytes without a newline", line.len())));
        }
        let reply: Reply = serde_json::from_slice(&line).map_err(|error| bad(error.to_string()))?;
        match (reply.result, reply.error) {
            (_, Some(refusal)) => Err(ClientError::Refused(refusal)),
            (Some(result), None) => serde_json::from_value(result).map_err(|error| bad(error.to_string())),
            (None, None) => Err(bad("neither a result nor an error".into())),
        }
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let reach = Reach::of(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Also the limit of connecting: a server that accepts nobody has a queue that is full for ever.
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIME_MAX))?;
    loop {
        match rustix::net::connect(&socket, &SocketAddrUnix::new(reach.path())?) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(|()| UnixStream::from(socket))?),
        }
    }
}
