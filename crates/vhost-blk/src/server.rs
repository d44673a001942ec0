//! The server: accepts frontends, serves one at a time, and brings sessions to their end.
//!
//! One thread waits for everything (the socket, the connected frontend, the owner's process,
//! requests from the program) and takes every decision; [`Boundary`] makes them. It never waits
//! for a frontend.

mod api;

use std::{
    io,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use blockio::in_full;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};
use session_disk::{ProcessId, SessionDisk};

use crate::{
    boundary::{Admission, Boundary, Due, EndReason, Identity, RingStart},
    connection::{Arrival, Connection, Queues},
    disk::{AnyError, Disk},
    handover::HandOver,
    inflight::InflightTable,
    limit::RateLimit,
    peer::Peer,
    relay::{Ending, Gate, Start},
    socket::{Socket, SocketKind},
};

use self::api::Control;
pub use self::api::{Exit, Observer, ServerConfig, ServerError, StopHandle};

/// How long accepting rests when the process has run out of descriptors or memory.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Time after which it is tried again to end a hold that could not be ended.
const RELEASE_REST: Duration = Duration::from_secs(1);
/// Most connections that are accepted before other descriptors get their turn.
const ACCEPTS_PER_TURN: u32 = 8;

/// Serves one disk on one socket.
pub struct Server {
    disk: Arc<dyn Disk>,
    socket: Socket,
    config: ServerConfig,
    observer: Arc<dyn Observer>,
    control: Arc<Control>,
    boundary: Boundary,
    served: Option<Served>,
    /// The owner of a session whose frontend is not connected.
    owner: Option<Peer>,
    /// A frontend whose handshake is left unanswered.
    held: Option<(UnixStream, Peer)>,
    /// The process that the disk is held for.
    held_for: Option<Peer>,
    /// When it is tried again to end the hold for a process that is gone.
    release_after: Option<Instant>,
    /// What a server before has left to this one, or this one leaves to the next.
    handover: Option<HandOver>,
    accept_after: Option<Instant>,
    refusals: RateLimit,
    session_has_ended: bool,
    /// Nobody is served any more.
    is_ending: bool,
}

struct Served {
    connection: Connection,
    peer: Peer,
}

impl Server {
    /// A server of `disk` on `socket`. Nobody is served before [`run`](Self::run).
    pub fn new(
        disk: Arc<SessionDisk>,
        socket: Socket,
        config: ServerConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, ServerError> {
        Self::with_disk(Arc::new(disk), socket, config, observer)
    }

    pub(crate) fn with_disk(
        disk: Arc<dyn Disk>,
        socket: Socket,
        config: ServerConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, ServerError> {
        if let Some(problem) = config.device.problem() {
            return Err(ServerError::Config(problem));
        }
        let control = Control::new()?;
        // Nobody can come back to a connection that was inherited.
        let grace = if socket.is_single() { Duration::ZERO } else { config.reconnect_grace };
        let (boundary, owner) = if disk.session_is_open() {
            let owner = disk.owner().map_or_else(Peer::unknown, Peer::of_process);
            (Boundary::with_open_session(owner.identity(), grace, Instant::now()), Some(owner))
        } else {
            (Boundary::new(grace), None)
        };
        let held_for = disk.held_for().map(Peer::of_process);
        Ok(Self {
            disk,
            socket,
            config,
            observer,
            control,
            boundary,
            served: None,
            owner,
            held: None,
            held_for,
            release_after: None,
            handover: None,
            accept_after: None,
            refusals: RateLimit::new(),
            session_has_ended: false,
            is_ending: false,
        })
    }

    /// A handle for other threads.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { control: self.control.clone() }
    }

    /// Goes on, when it runs, with the frontend that another server has left connected. If its session
    /// is not open any more, the frontend is turned away.
    pub fn take_over(&mut self, handover: HandOver) {
        self.handover = Some(handover);
    }

    /// The frontend of the session that was open when the server was stopped, still connected, for
    /// another server ([`ServerConfig::hand_over`]); `None` if it could not be left like that, and has
    /// to connect again. Dropped, it is disconnected.
    pub fn hand_over(&mut self) -> Option<HandOver> {
        self.handover.take()
    }

    /// Serves until there is a reason not to. No I/O of a guest is in flight afterwards, and no
    /// frontend is connected, unless the error says otherwise.
    pub fn run(&mut self) -> Result<Exit, ServerError> {
        let result = self.serve();
        self.is_ending = true;
        // First, so that a frontend that connects again when its connection ends does not do so here.
        self.socket.close();
        self.held = None;
        let closed = match self.served.take() {
            Some(served) => self.take_down(served).map(|(_, handover)| {
                let stopped = matches!(result, Ok(Exit::Stopped)) && self.boundary.session_is_open();
                self.handover = handover.filter(|_| stopped);
            }),
            None => Ok(()),
        };
        let exit = result?;
        closed?;
        Ok(exit)
    }

    fn serve(&mut self) -> Result<Exit, ServerError> {
        (self.session_has_ended, self.is_ending) = (false, false);
        if self.control.take_stop() {
            // A connection that was handed over is handed on as it is.
            return Ok(Exit::Stopped);
        }
        if let SocketKind::Connected(stream) = &mut self.socket.kind
            && let Some(stream) = stream.take()
        {
            let peer = Peer::of(&stream);
            self.admit(stream.into(), peer)?;
        }
        if let Some(handover) = self.handover.take() {
            let peer = Peer::of(&handover.frontend);
            self.admit(handover.into(), peer)?;
        }
        loop {
            if self.control.take_stop() {
                return Ok(Exit::Stopped);
            }
            // By its number: the next one is not what the operator meant.
            if self.control.take_end_session().is_some_and(|it| self.disk.open_session() == Some(it)) {
                self.operator_end()?;
            }
            self.forward()?;
            self.watch_owner()?;
            self.watch_hold();
            self.watch_held();
            self.accept()?;
            self.turn_held_away();
            match self.boundary.tick(Instant::now()) {
                Some(Due::End(reason)) => self.end_session(reason)?,
                Some(Due::Candidate) => self.admit_candidate()?,
                None => {}
            }
            if self.session_has_ended && self.config.once {
                return Ok(Exit::SessionEnded);
            }
            if self.socket.is_single() && self.served.is_none() && !self.boundary.session_is_open() {
                return Ok(Exit::SocketClosed);
            }
            self.wait()?;
        }
    }

    /// Sleeps until there may be something to do.
    fn wait(&self) -> Result<(), ServerError> {
        let mut fds = vec![PollFd::new(&self.control.event, PollFlags::IN)];
        let now = Instant::now();
        if let Some(listener) = self.socket.listener()
            && self.accept_after.is_none_or(|after| now >= after)
        {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        if let Some(served) = &self.served {
            for (fd, events) in served.connection.relay.interest() {
                fds.push(PollFd::from_borrowed_fd(fd, events));
            }
        }
        let held_for = self.held_for.as_ref().filter(|_| self.release_after.is_none());
        for process in self.owner.iter().chain(held_for) {
            fds.extend(process.pidfd().map(|pidfd| PollFd::from_borrowed_fd(pidfd, PollFlags::IN)));
        }
        if let Some((stream, _)) = &self.held {
            fds.push(PollFd::new(stream, PollFlags::RDHUP));
        }
        let deadline =
            [self.boundary.deadline(), self.accept_after, self.release_after].into_iter().flatten().min();
        let timeout = deadline.map(|deadline| {
            // A little late rather than a little early, which would mean to ask again and again.
            let left = deadline.saturating_duration_since(now) + Duration::from_micros(50);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(ServerError::System("wait for events", error.into())),
        }
        let _ = rustix::io::read(&self.control.event, &mut [0u8; 8]);
        Ok(())
    }

    fn accept(&mut self) -> Result<(), ServerError> {
        if self.accept_after.is_some_and(|after| Instant::now() < after) {
            return Ok(());
        }
        self.accept_after = None;
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = self.socket.listener() else { return Ok(()) };
            match listener.accept() {
                Ok((stream, _)) => {
                    // One that has hung up and connected again did so in this order.
                    self.forward()?;
                    let peer = Peer::of(&stream);
                    self.admit(stream.into(), peer)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    self.refuse(&format!("cannot accept it: {error}"));
                    self.accept_after = Some(Instant::now() + ACCEPT_REST);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Serves, holds or refuses a frontend.
    fn admit(&mut self, arrival: Arrival, peer: Peer) -> Result<(), ServerError> {
        let continues = self.boundary.session_is_open();
        if !continues && let Some(why) = self.disk.turns_away() {
            self.refuse(&why);
            return Ok(());
        }
        match self.boundary.connected(self.identity(&peer), Instant::now()) {
            Admission::Refuse(why) => self.refuse(why),
            // What it had set up elsewhere is of no use to a stranger.
            Admission::Hold if arrival.setup.is_empty() => self.held = Some((arrival.frontend, peer)),
            Admission::Hold => self.boundary.stranger_left(),
            Admission::Serve => {
                self.owner = None;
                const BACK: &str = "the owner of the session has come back";
                const UNPROVEN: &str =
                    "it has not shown that the open session is its own, and another frontend connects";
                if self.held.take().is_some() {
                    self.refuse(BACK);
                }
                if let Some(candidate) = self.served.take() {
                    self.take_down(candidate)?;
                    self.observer.frontend_disconnected(true);
                    self.refuse(if self.boundary.is_anothers() { UNPROVEN } else { BACK });
                }
                if !continues {
                    self.disk.set_write_through(false);
                }
                self.connect(arrival, peer, continues)?;
            }
        }
        Ok(())
    }

    /// Serves the stranger that was held, who has waited the grace: from its first ring on the open session is over, if it may
    /// have one of its own.
    fn admit_candidate(&mut self) -> Result<(), ServerError> {
        let Some((stream, peer)) = self.held.take() else {
            self.boundary.stranger_left();
            return Ok(());
        };
        if self.config.once {
            // Nobody else is served.
            return match self.boundary.taken_over() {
                Some(reason) => self.end_session(reason),
                None => Ok(()),
            };
        }
        self.boundary.candidate(self.identity(&peer));
        self.connect(stream.into(), peer, false)?;
        if let Some(candidate) = &self.served {
            // What it is shown is not the other guest's.
            candidate.connection.queues.backend.device.reset_writeback();
        }
        Ok(())
    }

    /// Serves a frontend that the boundary knows of.
    fn connect(&mut self, arrival: Arrival, peer: Peer, continues: bool) -> Result<(), ServerError> {
        match Connection::open(self.disk.as_ref(), self.config.device.clone(), arrival) {
            Ok(mut connection) => {
                if self.config.hand_over {
                    connection.relay.remember();
                }
                self.observer.frontend_connected(peer.process(), continues);
                self.served = Some(Served { connection, peer });
            }
            Err(error) => {
                self.refuse(&format!("cannot set up the device: {}", in_full(error.as_ref())));
                self.lost(peer)?;
            }
        }
        Ok(())
    }

    /// What the boundary goes by. An inherited connection has nobody to come back.
    fn identity(&self, peer: &Peer) -> Identity {
        if self.socket.is_single() { Peer::unknown().identity() } else { peer.identity() }
    }

    /// Lets the relay of the frontend that is served do its work.
    fn forward(&mut self) -> Result<(), ServerError> {
        let Some(mut served) = self.served.take() else { return Ok(()) };
        let owner = served.peer.process();
        let Connection { relay, queues, .. } = &mut served.connection;
        let mut gate = SessionGate {
            boundary: &mut self.boundary,
            disk: self.disk.as_ref(),
            observer: self.observer.as_ref(),
            queues,
            owner,
            succeeded: None,
        };
        let ending = relay.forward(&mut gate);
        if let Some(ended) = gate.succeeded {
            // Its end was told by the gate.
            ended.map_err(ServerError::EndSession)?;
            (self.owner, self.session_has_ended) = (None, true);
        }
        match ending {
            None => {
                self.served = Some(served);
                Ok(())
            }
            Some(ending) => {
                log::debug!("connection over: {ending:?}");
                if let Ending::Refused(why) = &ending {
                    self.refuse(why);
                }
                let (peer, _) = self.take_down(served)?;
                self.lost(peer)
            }
        }
    }

    /// Takes a connection down; afterwards nothing of it is in flight.
    fn take_down(&self, served: Served) -> Result<(Peer, Option<HandOver>), ServerError> {
        let closed = served.connection.close(&|| self.is_ending || self.control.is_to_stop());
        let (complaint, handover) = closed.map_err(ServerError::Teardown)?;
        if let Some(complaint) = complaint {
            self.refuse(&complaint);
        }
        Ok((served.peer, handover))
    }

    /// The frontend that was served is gone, and so is its connection.
    fn lost(&mut self, peer: Peer) -> Result<(), ServerError> {
        let reason = self.boundary.disconnected(peer.is_gone(), Instant::now());
        self.observer.frontend_disconnected(self.boundary.session_is_open());
        if let Some(reason) = reason {
            return self.end_session(reason);
        }
        if self.boundary.is_owner(self.identity(&peer)) {
            self.owner = Some(peer);
        }
        Ok(())
    }

    fn watch_owner(&mut self) -> Result<(), ServerError> {
        // Where nobody can come back the grace has decided already.
        if self.owner.as_ref().is_some_and(Peer::is_gone)
            && let Some(reason) = self.boundary.owner_exited()
        {
            self.end_session(reason)?;
        }
        Ok(())
    }

    /// A disk is held no longer than the process lives for which it is.
    fn watch_hold(&mut self) {
        let is_due = self.release_after.is_none_or(|after| Instant::now() >= after);
        if is_due && self.held_for.as_ref().is_some_and(Peer::is_gone) {
            match self.disk.release_if_over() {
                Ok(is_released) => {
                    (self.held_for, self.release_after) = (None, None);
                    // If not, the operator was faster.
                    if is_released {
                        self.observer.released();
                    }
                }
                Err(error) => {
                    if self.release_after.replace(Instant::now() + RELEASE_REST).is_none() {
                        let why = in_full(error.as_ref());
                        log::warn!(
                            "the disk stays held although its VM is gone, until it can be released: {why}"
                        );
                    }
                }
            }
        }
    }

    /// Lets go of a held frontend that has hung up.
    fn watch_held(&mut self) {
        let Some((stream, _)) = &self.held else { return };
        let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
        if rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0) {
            self.held = None;
            self.boundary.stranger_left();
        }
    }

    /// Lets go of a held frontend for which no session could begin: the open one is not to end for its sake.
    fn turn_held_away(&mut self) {
        if self.held.is_some()
            && let Some(why) = self.disk.turns_away()
        {
            self.boundary.stranger_left();
            self.refuse(&why);
            self.held = None;
        }
    }

    fn operator_end(&mut self) -> Result<(), ServerError> {
        let is_candidate = self.boundary.is_candidate();
        let Some(reason) = self.boundary.operator_end() else { return Ok(()) };
        if let Some(served) = self.served.take_if(|_| !is_candidate) {
            self.take_down(served)?;
            self.observer.frontend_disconnected(false);
        }
        self.end_session(reason)
    }

    /// Ends the session, whose boundary has been passed, and serves who has waited for that.
    fn end_session(&mut self, reason: EndReason) -> Result<(), ServerError> {
        self.owner = None;
        let summary = self.disk.end_session().map_err(ServerError::EndSession)?;
        self.observer.session_ended(&summary, reason);
        self.session_has_ended = true;
        if let Some(candidate) = &self.served {
            // It has the disk as any other one from now on.
            self.disk.set_write_through(!candidate.connection.queues.backend.device.writeback());
        }
        match self.held.take() {
            Some((stream, peer)) if !self.config.once => self.admit(stream.into(), peer),
            _ => Ok(()),
        }
    }

    fn refuse(&self, why: &str) {
        if let Some(suppressed) = self.refusals.admit(Instant::now()) {
            match suppressed {
                0 => self.observer.frontend_refused(why),
                more => self.observer.frontend_refused(&format!("{why} ({more} more not shown)")),
            }
        }
    }
}

/// Begins a session before its first ring starts.
struct SessionGate<'a> {
    boundary: &'a mut Boundary,
    disk: &'a dyn Disk,
    observer: &'a dyn Observer,
    queues: &'a Queues,
    owner: Option<ProcessId>,
    /// What has come of the end of the session that it took over.
    succeeded: Option<Result<(), AnyError>>,
}

impl Gate for SessionGate<'_> {
    fn inflight(&mut self, table: Arc<InflightTable>) {
        self.queues.backend.set_inflight(table);
    }

    fn writeback(&mut self, writeback: bool) {
        // Of a session that may be another's nothing is changed.
        if !self.boundary.is_anothers() {
            self.disk.set_write_through(!writeback);
        }
    }

    fn ring_starts(&mut self, start: Start) -> Result<(), String> {
        log::debug!("queue {}: its ring starts", start.ring);
        // First: a session that can't be served must not begin.
        self.queues
            .open(self.disk, start.ring as usize)
            .map_err(|error| format!("cannot set up queue {}: {}", start.ring, in_full(error.as_ref())))?;
        if self.boundary.is_candidate() {
            // The open one is not to end for its sake if it would be refused.
            self.disk.may_begin().map_err(|error| no_session(error.as_ref()))?;
        }
        let proven = start.token.is_some() && start.token == self.disk.token();
        match self.boundary.ring_starts(start.fresh, proven) {
            RingStart::Continue => {
                self.disk.set_owner(self.owner);
                self.disk.set_token(start.token);
                Ok(())
            }
            RingStart::Refuse(why) => Err(why.to_owned()),
            RingStart::Begin => self.begin(&start),
            RingStart::Succeed => match self.disk.end_session() {
                Ok(summary) => {
                    self.observer.session_ended(&summary, EndReason::TakenOver);
                    self.succeeded = Some(Ok(()));
                    self.disk.set_write_through(!self.queues.backend.device.writeback());
                    self.begin(&start)
                }
                Err(error) => {
                    self.succeeded = Some(Err(error));
                    Err("the session that it would take over can't be ended".into())
                }
            },
        }
    }
}

impl SessionGate<'_> {
    fn begin(&mut self, start: &Start) -> Result<(), String> {
        match self.disk.begin_session(self.owner) {
            Ok(begun) => {
                self.disk.set_token(start.token);
                self.observer.session_started(&begun, self.owner);
                Ok(())
            }
            Err(error) => {
                self.boundary.begin_failed();
                Err(no_session(error.as_ref()))
            }
        }
    }
}

fn no_session(error: &(dyn std::error::Error + 'static)) -> String {
    format!("no session can begin: {}", in_full(error))
}

#[cfg(test)]
mod tests;
