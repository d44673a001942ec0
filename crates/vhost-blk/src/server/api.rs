//! What a server is told, tells and answers: configuration, observer, stop handle, exits, errors.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::event::EventfdFlags;
use session_disk::{ProcessId, SessionStart, SessionSummary};
use thiserror::Error;

use crate::{boundary::EndReason, config::DeviceConfig, disk::AnyError};

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// How the device looks to the guest.
    pub device: DeviceConfig,
    /// How long a new frontend waits for the session of another that is disconnected but lives.
    pub reconnect_grace: Duration,
    /// Return from [`Server::run`](crate::Server::run) when the first session has ended.
    pub once: bool,
    /// When stopped, leave the frontend of an open session connected: see
    /// [`Server::hand_over`](crate::Server::hand_over).
    pub hand_over: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            device: DeviceConfig::default(),
            reconnect_grace: Duration::from_secs(5),
            once: false,
            hand_over: false,
        }
    }
}

/// Is told what happens. Called on the thread in [`Server::run`](crate::Server::run); must not block for long.
pub trait Observer: Send + Sync {
    /// A session has begun; `peer` owns it, if its process is known.
    fn session_started(&self, start: &SessionStart, peer: Option<ProcessId>);
    /// A session has ended. Nothing of it is in flight.
    fn session_ended(&self, summary: &SessionSummary, reason: EndReason);
    /// A frontend was turned away, or its connection closed, for this reason. Not called for each
    /// one of many in quick succession.
    fn frontend_refused(&self, why: &str);
    /// A disk that was held for a process that is gone may be restored, and take sessions.
    fn released(&self) {}
    /// A frontend is served from now on; `continues`: in the session that is open.
    fn frontend_connected(&self, _peer: Option<ProcessId>, _continues: bool) {}
    /// The frontend that was served is gone; `session_open`: its session waits for it.
    fn frontend_disconnected(&self, _session_open: bool) {}
}

/// Why [`Server::run`](crate::Server::run) came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// [`StopHandle::stop`] was called. A session that was open still is.
    Stopped,
    /// The first session has ended ([`ServerConfig::once`]).
    SessionEnded,
    /// The inherited connection is over.
    SocketClosed,
}

/// Why a server can't go on.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The device can't be as it is asked for.
    #[error("{0}")]
    Config(String),
    /// The session could not be ended; what it wrote stays pending or held.
    #[error("cannot end the session")]
    EndSession(#[source] AnyError),
    /// A connection could not be taken down: I/O of it may still be in flight.
    #[error("cannot take down the frontend's connection")]
    Teardown(#[source] io::Error),
    /// The kernel refuses something that a server needs.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// Asks a running server for something, from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle {
    pub(super) control: Arc<Control>,
}

/// What other threads have asked for.
#[derive(Debug)]
pub(super) struct Control {
    /// Readable when there is something.
    pub(super) event: OwnedFd,
    stop: AtomicBool,
    /// The sequence number of the session that is to end; 0: none.
    end_session: AtomicU64,
}

impl Control {
    pub(super) fn new() -> Result<Arc<Self>, ServerError> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| ServerError::System("create an event", error.into()))?;
        Ok(Arc::new(Self { event, stop: AtomicBool::new(false), end_session: AtomicU64::new(0) }))
    }

    /// Whether to stop, without [taking](Self::take_stop) it.
    pub(super) fn is_to_stop(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whether to stop; says so once per request.
    pub(super) fn take_stop(&self) -> bool {
        self.stop.swap(false, Ordering::Acquire)
    }

    /// Which session to end; says so once per request.
    pub(super) fn take_end_session(&self) -> Option<u64> {
        Some(self.end_session.swap(0, Ordering::Acquire)).filter(|sequence| *sequence != 0)
    }
}

impl StopHandle {
    /// Makes [`Server::run`](crate::Server::run) stop the rings, wait for the I/O in flight and return, without ending
    /// the session.
    pub fn stop(&self) {
        self.control.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Ends session number `sequence`, if that is the one that is open; its frontend is disconnected. The observer is
    /// told when it has ended.
    pub fn end_session(&self, sequence: u64) {
        self.control.end_session.store(sequence, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Fails only if a wake-up is pending already.
        let _ = rustix::io::write(&self.control.event, &1u64.to_ne_bytes());
    }
}
