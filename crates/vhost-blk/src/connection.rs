//! One connection of a frontend: the vhost-user daemon that serves it, the relay before it, and
//! how both are brought up and taken down without leaving anything behind.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, AsRawFd},
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
    vring::{self, Vring},
    wire::Message,
};

/// How long I/O may take to let go of a connection before that is said, and how long a server that is to stop waits for it.
pub(crate) const TEARDOWN_MAX: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 20 });
/// How long until it is looked whether a frontend keeps threads waiting by attacking its own interrupt descriptor; and then again.
const TEARDOWN_LOOK: Duration = Duration::from_millis(100);

type Daemon = VhostUserDaemon<Arc<Backend>>;

/// A frontend that is being served.
pub(crate) struct Connection {
    pub(crate) relay: Relay,
    pub(crate) queues: Queues,
    /// All of them, whether they were ever started or not.
    rings: Vec<Vring>,
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
        let Some(fds) = self.backend.open_queue(disk, index)? else { return Ok(()) };
        let Some(thread) = self.threads.get(index) else { return Ok(()) };
        // Numbers up to the count of queues are the library's.
        let first = self.threads.len() as u64 + 1;
        // Each change wakes all threads, once.
        let memory = self.backend.memory_event().as_raw_fd();
        thread.register_listener(memory, EventSet::IN | EventSet::EDGE_TRIGGERED, first)?;
        for (number, fd) in (first + 1..).zip(fds) {
            thread.register_listener(fd, EventSet::IN, number)?;
        }
        Ok(())
    }
}

impl Connection {
    /// Serves `frontend` with a device on `disk`.
    pub(crate) fn open(disk: &dyn Disk, config: DeviceConfig, arrival: Arrival) -> Result<Self, AnyError> {
        let ring_size_max = config.queue_size;
        let backend = Arc::new(Backend::new(disk, config)?);
        let (daemon, rings) =
            vring::made_by(|| Daemon::new("vhost-user".to_owned(), backend.clone(), backend.shared_memory()));
        let mut daemon = daemon.map_err(|error| error.to_string())?;
        let queues = Queues { backend, threads: daemon.get_epoll_handlers() };
        for (ring, thread) in rings.iter().zip(&queues.threads) {
            let thread = Arc::downgrade(thread);
            ring.ignore_kicks_by(move |kick| {
                if let Some(thread) = thread.upgrade() {
                    // It may not be listened to. The number only has to be none of the library's.
                    let _ = thread.unregister_listener(kick, EventSet::IN, u64::MAX);
                }
            });
        }
        let library = connect_privately(&mut daemon)?;
        let mut relay = Relay::new(arrival.frontend, library, ring_size_max);
        relay.replay(arrival.setup);
        Ok(Self { relay, queues, rings, daemon })
    }

    /// Takes the connection down. When this returns without an error, its threads are gone, and no
    /// I/O of it is in flight. Returns what the library had against the frontend, if anything; and the
    /// frontend for another server, if the relay was to [`remember`](Relay::remember) what it set up.
    ///
    /// Storage that does not answer is waited for as long as the server is not to `stop`: another one could do no more.
    pub(crate) fn close(self, stop: &dyn Fn() -> bool) -> io::Result<(Option<String>, Option<HandOver>)> {
        let Self { relay, queues: Queues { backend, threads }, rings, mut daemon } = self;
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
        let mut patience = Patience::new(stop);
        let complaint = loop {
            match ended.recv_timeout(TEARDOWN_LOOK) {
                Ok(complaint) => break complaint,
                Err(RecvTimeoutError::Timeout) if patience.is_over() => return Err(patience.lost()),
                // The library's thread, or a queue's, may wait in an interrupt of a frontend that is gone.
                Err(RecvTimeoutError::Timeout) => rings.iter().for_each(Vring::make_room),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the threads of a connection have ended in disorder"));
                }
            }
        };
        if !backend.drain_until(&mut || patience.is_over()) {
            // Dropped, its queues would wait for their I/O.
            std::mem::forget(backend);
            return Err(patience.lost());
        }
        Ok((complaint, handover))
    }
}

/// Waiting for the I/O of a frontend that is gone.
struct Patience<'a> {
    /// Whether the server is to stop.
    stop: &'a dyn Fn() -> bool,
    begin: Instant,
    /// How long it has lasted when it is said next.
    said_after: Duration,
    stopping_since: Option<Instant>,
}

impl<'a> Patience<'a> {
    fn new(stop: &'a dyn Fn() -> bool) -> Self {
        Self { stop, begin: Instant::now(), said_after: TEARDOWN_MAX, stopping_since: None }
    }

    /// Whether to wait no longer. Says now and then that it is waited.
    fn is_over(&mut self) -> bool {
        let (now, waited) = (Instant::now(), self.begin.elapsed());
        if waited >= self.said_after {
            self.said_after *= 2;
            log::warn!(
                "a VM is gone, and its I/O is not finished after {} s: the storage of the disk, of its state or of its base \
                 does not answer, or the VM's memory; nobody else is served before",
                waited.as_secs()
            );
        }
        if (self.stop)() {
            self.stopping_since.get_or_insert(now);
        }
        self.stopping_since.is_some_and(|since| now.saturating_duration_since(since) >= TEARDOWN_MAX)
    }

    fn lost(&self) -> io::Error {
        let what = format!(
            "its I/O is not finished, {} s after the server was to stop: the storage of the disk, of its state or of its base \
             does not answer",
            TEARDOWN_MAX.as_secs()
        );
        io::Error::new(io::ErrorKind::TimedOut, what)
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
pub(crate) fn set_nonblocking(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
}
