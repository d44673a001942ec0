//! When a session begins and when it ends: a pure state machine, without I/O and without a clock.
//!
//! A session begins with the first ring that a frontend starts, and ends when its owner is gone:
//!
//! - Stopping rings (GET_VRING_BASE), resetting or disabling them never ends it: those are
//!   reboots, pauses and snapshots. There is not even an input for them.
//! - End of the connection and end of the owner's process end it. While the process lives, the
//!   session stays open without limit, and the same process may come back to it.
//! - A stranger that connects meanwhile is held, its handshake unanswered. When it has waited the
//!   grace, it is served as a candidate: the session ends with the first ring that it starts, if that is fresh, and a new one
//!   begins. Until then the session is its owner's, who may come back.
//! - If the owner's process can't be watched (it is in another pid namespace, and Linux older than 6.9), the session ends
//!   when the grace has passed after the end of the connection. Nobody can prove to be the owner.
//! - After a restart of the server the session is open still, and its owner is awaited. An owner in
//!   another pid namespace, of which the server before could leave no record, proves itself with the token in its in-flight table. Whoever
//!   does not for a second is served no longer when another one comes.
//! - A frontend that connects while another one is connected is turned away.
//! - A frontend without a session whose rings are not fresh is a guest that was restored, or one
//!   whose session is over: refused, for it would see other contents under its file system. If its first ring was, and
//!   a session has begun for it, that ends with the connection.

use std::time::{Duration, Instant};

use session_disk::ProcessId;

/// Time in which an owner that comes back starts a ring, by which it proves that it is. (It takes milliseconds.)
const PROOF: Duration = Duration::from_secs(1);

/// By what a process is recognised when it connects again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessKey {
    /// By its number and start time, which a later server knows too.
    Id(ProcessId),
    /// By its inode in `pidfs`, for it can't be seen in `/proc`. No other process has the same one until the host boots again.
    Inode(u64),
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The process, if it is known well enough to recognise it.
    pub(crate) process: Option<ProcessKey>,
    /// Whether its end will be noticed.
    pub(crate) watched: bool,
}

/// What to do with a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Serve it. If a session is open, it goes on; a stranger that was held, or is served as a candidate, is turned away.
    Serve,
    /// Leave it unanswered until the state changes.
    Hold,
    /// Close it.
    Refuse(&'static str),
}

/// What the start of a ring means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingStart {
    /// A session begins before the ring may start; report a failure with [`Boundary::begin_failed`].
    Begin,
    /// The open session [ends](EndReason::TakenOver), and then the same.
    Succeed,
    /// The session is open already.
    Continue,
    /// Close the connection.
    Refuse(&'static str),
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The process of the frontend is gone.
    OwnerExited,
    /// The frontend disconnected, and its process can't be watched.
    Disconnected,
    /// Another frontend has waited long enough, and starts a ring.
    TakenOver,
    /// The frontend that it was begun for has turned out to be a guest of another one.
    Mistaken,
    /// The operator wanted it.
    Operator,
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EndReason::OwnerExited => "the VM's process is gone",
            EndReason::Disconnected => "the VM disconnected",
            EndReason::TakenOver => "another VM took over",
            EndReason::Mistaken => "the VM's rings are of another session",
            EndReason::Operator => "ended by the operator",
        })
    }
}

/// What time has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// The session ends.
    End(EndReason),
    /// The stranger that was held is to be [served as a candidate](Boundary::candidate).
    Candidate,
}

/// The session of a connected frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Session {
    /// It has started no ring yet.
    None,
    /// Begun over this connection.
    Begun,
    /// Begun over this connection for a guest that belongs to another one, as its first ring did not show. Nobody may come back to it.
    Mistaken,
    /// Begun over an earlier connection of the same process.
    Continued,
    /// Begun before the server was restarted, by a process that is not known: whether it is this one,
    /// its first ring will show. The session is open since `since` without its owner, and this one is there since `connected`.
    Unproven { since: Instant, connected: Instant },
    /// It is that of another process, which is away: it ends when this frontend starts a ring, if that is fresh.
    Candidate { of: Identity, since: Instant },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No session, nobody connected.
    Idle,
    /// A frontend is connected.
    Served { owner: Identity, session: Session },
    /// The session is open, its frontend is not connected.
    Orphaned { owner: Identity, since: Instant, stranger_since: Option<Instant> },
}

/// The state machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    state: State,
    grace: Duration,
    /// The open session was begun before this server was started.
    restarted: bool,
}

impl Boundary {
    pub(crate) fn new(grace: Duration) -> Self {
        Self { state: State::Idle, grace, restarted: false }
    }

    /// A session is open since before the server was restarted.
    pub(crate) fn with_open_session(owner: Identity, grace: Duration, now: Instant) -> Self {
        Self { state: State::Orphaned { owner, since: now, stranger_since: None }, grace, restarted: true }
    }

    /// A frontend has connected. Also asked again for a held one when a session has ended.
    pub(crate) fn connected(&mut self, peer: Identity, now: Instant) -> Admission {
        match &mut self.state {
            State::Served { session: Session::Candidate { of, .. }, .. }
                if of.process.is_some() && of.process == peer.process =>
            {
                self.state = State::Served { owner: peer, session: Session::Continued };
                Admission::Serve
            }
            State::Served { owner, session: Session::Unproven { connected, .. } }
                if now >= *connected + PROOF =>
            {
                (*owner, *connected) = (peer, now);
                Admission::Serve
            }
            State::Served { .. } => Admission::Refuse("another frontend is connected"),
            State::Idle => {
                self.state = State::Served { owner: peer, session: Session::None };
                Admission::Serve
            }
            State::Orphaned { owner, .. } if owner.process.is_some() && owner.process == peer.process => {
                self.state = State::Served { owner: peer, session: Session::Continued };
                Admission::Serve
            }
            State::Orphaned { owner, since, stranger_since: None }
                if owner.process.is_none() && self.restarted =>
            {
                let session = Session::Unproven { since: *since, connected: now };
                self.state = State::Served { owner: peer, session };
                Admission::Serve
            }
            State::Orphaned { stranger_since: Some(_), .. } => {
                Admission::Refuse("another frontend is waiting for the session to end")
            }
            State::Orphaned { stranger_since, .. } => {
                *stranger_since = Some(now);
                Admission::Hold
            }
        }
    }

    /// The held frontend has hung up.
    pub(crate) fn stranger_left(&mut self) {
        if let State::Orphaned { stranger_since, .. } = &mut self.state {
            *stranger_since = None;
        }
    }

    /// The stranger that was held, and is [due](Due::Candidate), is served.
    pub(crate) fn candidate(&mut self, peer: Identity) {
        if let State::Orphaned { owner: of, since, .. } = self.state {
            self.state = State::Served { owner: peer, session: Session::Candidate { of, since } };
        }
    }

    /// The session ends for a stranger that was held, and is [due](Due::Candidate), whatever that does.
    pub(crate) fn taken_over(&mut self) -> Option<EndReason> {
        if !matches!(self.state, State::Orphaned { .. }) {
            return None;
        }
        self.state = State::Idle;
        Some(EndReason::TakenOver)
    }

    /// The connected frontend is about to start a ring; `fresh`: no ring that was not started over
    /// this connection is to continue where another left off; `proven`: its in-flight table has the
    /// token of the open session.
    pub(crate) fn ring_starts(&mut self, fresh: bool, proven: bool) -> RingStart {
        let State::Served { session, .. } = &mut self.state else {
            return RingStart::Refuse("it is not connected");
        };
        match session {
            Session::Continued => return RingStart::Continue,
            Session::Unproven { .. } if proven => {
                *session = Session::Continued;
                return RingStart::Continue;
            }
            Session::Unproven { .. } => {
                return RingStart::Refuse(
                    "the session of a VM that can't be watched is open: try again when its grace is over",
                );
            }
            Session::Begun if fresh => return RingStart::Continue,
            Session::None if fresh => {
                *session = Session::Begun;
                return RingStart::Begin;
            }
            Session::Candidate { .. } if fresh => {
                *session = Session::Begun;
                self.restarted = false;
                return RingStart::Succeed;
            }
            Session::Begun => *session = Session::Mistaken,
            Session::None | Session::Mistaken | Session::Candidate { .. } => {}
        }
        RingStart::Refuse(
            "its rings are not fresh: it belongs to a session that has ended, or to a restored guest",
        )
    }

    /// The session that [`RingStart::Begin`] or [`RingStart::Succeed`] asked for could not begin.
    pub(crate) fn begin_failed(&mut self) {
        if let State::Served { session, .. } = &mut self.state {
            *session = Session::None;
        }
    }

    /// The connected frontend is gone; `owner_gone`: and so is its process.
    pub(crate) fn disconnected(&mut self, owner_gone: bool, now: Instant) -> Option<EndReason> {
        let State::Served { owner, session } = self.state else { return None };
        if session == Session::None {
            self.state = State::Idle;
            return None;
        }
        if session == Session::Mistaken {
            self.state = State::Idle;
            return Some(EndReason::Mistaken);
        }
        let (owner, since) = match session {
            Session::Unproven { since, .. } => (Identity { process: None, watched: false }, since),
            Session::Candidate { of, since } => (of, since),
            _ => {
                self.restarted = false;
                (owner, now)
            }
        };
        let is_its_own = !matches!(session, Session::Unproven { .. } | Session::Candidate { .. });
        self.state = State::Orphaned { owner, since, stranger_since: None };
        if owner_gone && is_its_own {
            return self.owner_exited();
        }
        match self.tick(now) {
            Some(Due::End(reason)) => Some(reason),
            // Nobody is held yet.
            Some(Due::Candidate) | None => None,
        }
    }

    /// The process of the owner of an open session is gone, which is away. Whoever is connected stays so.
    pub(crate) fn owner_exited(&mut self) -> Option<EndReason> {
        self.state = match self.state {
            State::Orphaned { .. } => State::Idle,
            State::Served { owner, session: Session::Candidate { .. } } => {
                State::Served { owner, session: Session::None }
            }
            State::Served { .. } | State::Idle => return None,
        };
        Some(EndReason::OwnerExited)
    }

    /// Time has passed; call at [`deadline`](Self::deadline).
    pub(crate) fn tick(&mut self, now: Instant) -> Option<Due> {
        let State::Orphaned { owner, .. } = self.state else { return None };
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        if owner.watched {
            return Some(Due::Candidate);
        }
        self.state = State::Idle;
        Some(Due::End(EndReason::Disconnected))
    }

    /// When [`tick`](Self::tick) has something to say, if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let State::Orphaned { owner, since, stranger_since } = self.state else { return None };
        let from = if owner.watched { stranger_since? } else { since };
        Some(from + self.grace)
    }

    /// The operator ends the session, if one is open; a connected frontend is to be disconnected, unless it is a candidate.
    pub(crate) fn operator_end(&mut self) -> Option<EndReason> {
        if !self.session_is_open() {
            return None;
        }
        self.state = match self.state {
            State::Served { owner, session: Session::Candidate { .. } } => {
                State::Served { owner, session: Session::None }
            }
            _ => State::Idle,
        };
        Some(EndReason::Operator)
    }

    /// Whether the open session's owner is this one, and away.
    pub(crate) fn is_owner(&self, peer: Identity) -> bool {
        matches!(self.state, State::Orphaned { owner, .. } if owner == peer)
    }

    /// Whether a frontend is connected that is not the open session's owner, as far as is known.
    pub(crate) fn is_anothers(&self) -> bool {
        use Session::{Candidate, Unproven};
        matches!(self.state, State::Served { session: Unproven { .. } | Candidate { .. }, .. })
    }

    /// Whether the connected frontend would end another one's session.
    pub(crate) fn is_candidate(&self) -> bool {
        matches!(self.state, State::Served { session: Session::Candidate { .. }, .. })
    }

    pub(crate) fn session_is_open(&self) -> bool {
        match self.state {
            State::Served { session, .. } => session != Session::None,
            State::Orphaned { .. } => true,
            State::Idle => false,
        }
    }
}

#[cfg(test)]
mod tests;
