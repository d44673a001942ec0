//! The server's side of the socket.
//!
//! A thread accepts clients, and each client has a thread of its own, so that none waits for another.
//! There are at most [`CLIENTS_MAX`]; one more takes the place of the one that has been without a
//! command for longest. Lines are bounded in length and time, replies in time.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::Serialize;
use serde_json::Value;
use unix_socket::{PlacedListener, SocketError, SocketPermissions};

use crate::api::{
    Command, ErrorKind, Refusal, Reply, Request, SessionEnded, SessionHeld, SessionReleased, Status,
};
use crate::line::{Line, LineReader, REQUEST_BYTES_MAX};
use crate::reach::Reach;

/// Clients that are connected at once.
pub const CLIENTS_MAX: usize = 8;

/// How long a client may take to take a reply.
const REPLY_TIME_MAX: Duration = Duration::from_secs(1);
/// How long accepting rests when the process has run out of descriptors.
const ACCEPT_REST: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long until it is said again why no client can be accepted.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What the commands do. Called on the threads of clients, several at once; each call must come to an
/// end by itself.
pub trait Handler: Send + Sync {
    /// `status`
    fn status(&self) -> Result<Status, Refusal>;
    /// `session end`
    fn session_end(&self) -> Result<SessionEnded, Refusal>;
    /// `session hold`
    fn session_hold(&self) -> Result<SessionHeld, Refusal>;
    /// `session release`
    fn session_release(&self) -> Result<SessionReleased, Refusal>;
}

/// Serves a control socket as long as it lives. Dropped, it waits for commands that are being carried
/// out, and removes the socket.
#[derive(Debug)]
pub struct ControlServer {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    handler: Arc<dyn Handler>,
    stop: AtomicBool,
    /// Readable when there is something for the acceptor besides clients.
    wake: OwnedFd,
    clients: Mutex<Vec<Client>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("clients", &self.clients).finish_non_exhaustive()
    }
}

/// A client's connection and thread.
#[derive(Debug)]
struct Client {
    stream: Arc<UnixStream>,
    thread: Option<JoinHandle<()>>,
    activity: Activity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// No command since then.
    Idle(Instant),
    /// A command of it is being carried out.
    Busy,
    /// It is being disconnected: nothing more is begun for it.
    Gone,
}

impl ControlServer {
    /// Makes the socket at `path`, for the user of this process alone, and serves it.
    ///
    /// # Errors
    /// If a living server has that socket, or it can't be made.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> Result<Self, SocketError> {
        let fail = |operation| move |source| SocketError::Io { operation, path: path.to_owned(), source };
        let reach = Reach::of(path).map_err(fail("find the directory of"))?;
        let permissions = SocketPermissions { mode: Some(0o600), ..SocketPermissions::default() };
        let listener = PlacedListener::bind(reach.path(), permissions)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| fail("make a wake-up for")(error.into()))?;
        let shared =
            Arc::new(Shared { handler, stop: AtomicBool::new(false), wake, clients: Mutex::default() });
        let for_thread = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                accept(&for_thread, &listener);
                // In this order: the socket is removed by the way that leads to it.
                drop(listener);
                drop(reach);
            })
            .map_err(fail("start a thread for"))?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // Fails only if a wake-up is pending already.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        join(self.acceptor.take());
        let mut clients = std::mem::take(&mut *self.shared.clients());
        // All at once: who waits must not wait for another's command.
        for client in &clients {
            let _ = client.stream.shutdown(Shutdown::Read);
        }
        clients.iter_mut().for_each(|client| join(client.thread.take()));
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if thread.is_some_and(|thread| thread.join().is_err()) {
        log::error!("a thread of the control socket panicked");
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a client is doing; `false`: it is gone, and is to do nothing more.
    fn set_activity(&self, stream: &Arc<UnixStream>, activity: Activity) -> bool {
        let mut clients = self.clients();
        let client = clients.iter_mut().find(|client| Arc::ptr_eq(&client.stream, stream));
        match client {
            Some(client) if client.activity != Activity::Gone => {
                client.activity = activity;
                true
            }
            // When the server stops, what has begun is answered, and nothing else begins.
            _ => false,
        }
    }

    fn carry_out(&self, command: Command) -> Result<Value, Refusal> {
        match command {
            Command::Status => value(self.handler.status()),
            Command::SessionEnd => value(self.handler.session_end()),
            Command::SessionHold => value(self.handler.session_hold()),
            Command::SessionRelease => value(self.handler.session_release()),
        }
    }
}

fn value(result: Result<impl Serialize, Refusal>) -> Result<Value, Refusal> {
    serde_json::to_value(result?).map_err(|error| Refusal::new(ErrorKind::Failed, error.to_string()))
}

/// Accepts clients until the server stops.
fn accept(shared: &Arc<Shared>, listener: &PlacedListener) {
    let listener = listener.listener();
    let mut said = None;
    while !shared.stop.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => admit(shared, stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds =
                    [PollFd::new(&shared.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
                let _ = poll(&mut fds, None);
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                let (code, now) = (error.raw_os_error(), Instant::now());
                if said.is_none_or(|(before, until)| before != code || now >= until) {
                    said = Some((code, now + SAY_AGAIN));
                    log::warn!("the control socket cannot accept a client: {error}");
                }
                let _ = poll(&mut [PollFd::new(&shared.wake, PollFlags::IN)], Some(&ACCEPT_REST));
            }
        }
    }
}

/// Gives a client a thread; where there are too many, another one has to go.
fn admit(shared: &Arc<Shared>, stream: UnixStream) {
    let prepare = stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(REPLY_TIME_MAX)));
    if let Err(error) = prepare {
        log::warn!("the control socket cannot serve a client: {error}");
        return;
    }
    let leaving = {
        let mut clients = shared.clients();
        let (finished, running) = std::mem::take(&mut *clients)
            .into_iter()
            .partition(|client: &Client| client.thread.as_ref().is_none_or(JoinHandle::is_finished));
        *clients = running;
        let mut leaving: Vec<Client> = finished;
        if clients.len() >= CLIENTS_MAX {
            let idle = |client: &Client| match client.activity {
                Activity::Idle(since) => Some(since),
                Activity::Busy | Activity::Gone => None,
            };
            let longest =
                (0..).zip(clients.iter()).filter_map(|(index, client)| Some((idle(client)?, index))).min();
            let Some((_, index)) = longest else {
                drop(clients);
                let message = format!("{CLIENTS_MAX} clients are waiting for commands; try again later");
                send(&stream, Err(Refusal::new(ErrorKind::Busy, message)));
                return;
            };
            let mut client = clients.swap_remove(index);
            client.activity = Activity::Gone;
            leaving.push(client);
        }
        leaving
    };
    for mut client in leaving {
        // It waits for its client or is at its end, so this is quick.
        let _ = client.stream.shutdown(Shutdown::Both);
        join(client.thread.take());
    }
    let stream = Arc::new(stream);
    let (for_thread, of_thread) = (Arc::clone(shared), Arc::clone(&stream));
    // Under the lock: the thread finds itself in the list.
    let mut clients = shared.clients();
    match std::thread::Builder::new()
        .name("control-client".into())
        .spawn(move || serve(&for_thread, &of_thread))
    {
        Ok(thread) => {
            let activity = Activity::Idle(Instant::now());
            clients.push(Client { stream, thread: Some(thread), activity });
        }
        Err(error) => log::warn!("the control socket cannot serve a client: {error}"),
    }
}

/// Answers one client until it hangs up or has to go.
fn serve(shared: &Shared, stream: &Arc<UnixStream>) {
    let mut lines = LineReader::default();
    loop {
        let (outcome, last) = match lines.next(stream) {
            Line::End => break,
            Line::TooLong => {
                let message = format!("a request has at most {REQUEST_BYTES_MAX} bytes");
                (Err(Refusal::new(ErrorKind::TooLong, message)), true)
            }
            Line::CutOff => {
                let message = "the request does not end with a newline";
                (Err(Refusal::new(ErrorKind::BadRequest, message)), true)
            }
            Line::Complete(line) => match Request::parse(&line) {
                Err(refusal) => (Err(refusal), false),
                Ok(request) => {
                    if !shared.set_activity(stream, Activity::Busy) {
                        break;
                    }
                    let outcome = shared.carry_out(request.command);
                    shared.set_activity(stream, Activity::Idle(Instant::now()));
                    (outcome, false)
                }
            },
        };
        if !send(stream, outcome) || last {
            break;
        }
    }
    // The list has the stream too, for as long as it takes until the next client comes.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Sends a reply; whether the client took it in time.
fn send(mut stream: &UnixStream, outcome: Result<Value, Refusal>) -> bool {
    let Ok(mut line) = serde_json::to_vec(&Reply::of(outcome)) else { return false };
    line.push(b'\n');
    stream.write_all(&line).is_ok()
}
