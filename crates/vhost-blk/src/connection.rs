//! One connection of a frontend: the vhost-user daemon that serves it, the relay before it, and
//! how both are brought up and taken down without leaving anything behind.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon, VringEpollHandler};
use vmm_sys_util::epoll::EventSet;

use crate::{
    backend::Backend,
    config::DeviceConfig,
    disk::{AnyError, Disk},
    handover::HandOver,
    relay::Relay,
    wire::Message,
};

/// How long threads may take to let go of a connection: the state's storage can delay them, while a first write waits for it.
const TEARDOWN_MAX: Duration = Duration::from_secs(20);
/// How long until it is looked whether a frontend keeps them waiting by attacking its own interrupt descriptor; and then again.
const TEARDOWN_LOOK: Duration = Duration::from_millis(100);

type Daemon = VhostUserDaemon<Arc<Backend>>;

/// A frontend that is being served.
pub(crate) struct Connection {
    pub(crate) relay: Relay,
    pub(crate) queues: Queues,
    daemon: Daemon,
}

/// A connection's queues and their threads.
pub(crate) struct Queues {
    pub(crate) backend: Arc<Backend>,
    threads: Vec<Arc<VringEpollHandler<Arc<Backend>>>>,
}

impl Queues {
    /// Makes queue `index` ready to be served, if it is one and is not.
    pub(crate) fn open(&self, disk: &dyn Disk, index: usize) -> Result<(), AnyError> {
        let fds = self.backend.open_queue(disk, index)?;
        let Some(thread) = self.threads.get(index) else { return Ok(()) };
        // Numbers up to the count of queues are the library's.
        for (number, fd) in (self.threads.len() as u64 + 1..).zip(fds) {
            thread.register_listener(fd, EventSet::IN, number)?;
        }
        Ok(())
    }
}

impl Connection {
    /// Serves `frontend` with a device on `disk`.
    pub(crate) fn open(disk: &dyn Disk, config: DeviceConfig, arrival: Arrival) -> Result<Self, AnyError> {
        let backend = Arc::new(Backend::new(disk, config)?);
        let mut daemon = Daemon::new("vhost-user".to_owned(), backend.clone(), backend.shared_memory())
            .map_err(|error| error.to_string())?;
        let queues = Queues { backend, threads: daemon.get_epoll_handlers() };
        let library = connect_privately(&mut daemon)?;
        let mut relay = Relay::new(arrival.frontend, library);
        relay.replay(arrival.setup);
        Ok(Self { relay, queues, daemon })
    }

    /// Takes the connection down. When this returns without an error, its threads are gone, and no
    /// I/O of it is in flight. Returns what the library had against the frontend, if anything; and the
    /// frontend for another server, if the relay was to [`remember`](Relay::remember) what it set up.
    pub(crate) fn close(self) -> io::Result<(Option<String>, Option<HandOver>)> {
        let Self { relay, queues: Queues { backend, threads }, mut daemon } = self;
        drop(threads);
        backend.stop();
        let handover = relay.hand_over();
        let (done, ended) = mpsc::channel();
        thread::Builder::new().name("vhost-teardown".to_owned()).spawn(move || {
            daemon.request_shutdown();
            let result = daemon.wait();
            // Ends the workers' threads and waits for them.
            drop(daemon);
            let _ = done.send(complaint(result));
        })?;
        let begin = Instant::now();
        let complaint = loop {
            match ended.recv_timeout(TEARDOWN_LOOK) {
                Ok(complaint) => break complaint,
                Err(RecvTimeoutError::Timeout) if begin.elapsed() < TEARDOWN_MAX => backend.free(),
                Err(_) => {
                    let what = "the threads of a connection do not end";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                }
            }
        };
        backend.drain();
        if !backend.is_quiet() {
            return Err(io::Error::other("I/O of a closed connection is still in flight"));
        }
        Ok((complaint, handover))
    }
}

/// A frontend that has just connected, or that another server has left connected.
pub(crate) struct Arrival {
    pub(crate) frontend: UnixStream,
    /// What it had set up with the other server.
    pub(crate) setup: VecDeque<Message>,
}

impl From<UnixStream> for Arrival {
    fn from(frontend: UnixStream) -> Self {
        Self { frontend, setup: VecDeque::new() }
    }
}

impl From<HandOver> for Arrival {
    fn from(handover: HandOver) -> Self {
        Self { frontend: handover.frontend, setup: handover.setup }
    }
}

/// What is unusual in a daemon's end. The end of the connection is not.
fn complaint(result: Result<(), DaemonError>) -> Option<String> {
    match result {
        Ok(())
        | Err(DaemonError::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => {
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// Starts the daemon on one end of a connection that nobody else can have the other end of.
///
/// The daemon only takes a listening socket. It gets one without a name in the file system, with
/// room for a single waiting connection, which is ours: if another process had found the name
/// first, ours would not have fitted. The listening socket is gone when this returns.
fn connect_privately(daemon: &mut Daemon) -> Result<UnixStream, AnyError> {
    let flags = SocketFlags::CLOEXEC;
    let socket = || rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let listener = socket()?;
    rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
    let address = rustix::net::getsockname(&listener)?;
    rustix::net::listen(&listener, 0)?;
    let ours = socket()?;
    set_nonblocking(&ours)?;
    rustix::net::connect(&ours, &address)?;
    let mut listener = Listener::from(UnixListener::from(listener));
    daemon.start(&mut listener).map_err(|error| error.to_string())?;
    Ok(UnixStream::from(ours))
}

/// Makes reads and writes of `fd` return instead of waiting.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    rustix::fs::fcntl_setfl(fd.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)
}
