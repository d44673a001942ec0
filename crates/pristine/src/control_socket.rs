//! What a running server does for its operator: the control socket's commands.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use blocks::BLOCK_SIZE;
use control::{
    DrainStatus, ErrorKind, Handler, Hold, Refusal, Session, SessionEnded, SessionHeld, SessionReleased,
    Status,
};
use session_disk::{Error, HoldReason, SessionDisk};
use vhost_blk::StopHandle;

use crate::commands::amount;
use crate::copies;
use crate::failure::Failure;
use crate::serve::{Reporter, Waited};

/// How long a session's end may take: longer than a connection may take to be taken down.
const END_TIME_MAX: Duration = Duration::from_secs(40);

/// Carries out what the operator asks a server for.
pub(crate) struct Operator {
    disk: Arc<SessionDisk>,
    reporter: Arc<Reporter>,
    server: StopHandle,
}

impl Operator {
    pub(crate) fn new(disk: Arc<SessionDisk>, reporter: Arc<Reporter>, server: StopHandle) -> Self {
        Self { disk, reporter, server }
    }

    fn name(&self) -> std::path::Display<'_> {
        self.disk.paths().disk().display()
    }

    fn held(&self) -> Option<Hold> {
        let reason = self.disk.held()?;
        Some(Hold { reason: reason.name().to_owned(), message: reason.to_string() })
    }
}

impl Handler for Operator {
    fn status(&self) -> Result<Status, Refusal> {
        let trouble = self.reporter.drain_trouble();
        Ok(Status {
            server_pid: std::process::id(),
            session: self.disk.open_session().map(|sequence| Session {
                sequence,
                owner_pid: self.disk.session_owner().map(|owner| owner.pid),
            }),
            dirty_blocks: self.disk.dirty_blocks(),
            pending_blocks: self.disk.pending_blocks(),
            block_size: BLOCK_SIZE,
            held: self.held(),
            drain: DrainStatus {
                next_attempt_unix_ms: trouble.as_ref().and_then(|trouble| {
                    let since = trouble.next_attempt.duration_since(UNIX_EPOCH).ok()?;
                    u64::try_from(since.as_millis()).ok()
                }),
                error: trouble.map(|trouble| trouble.error),
                copies: Some(copies::told(&self.disk)),
            },
        })
    }

    fn session_end(&self) -> Result<SessionEnded, Refusal> {
        let Some(sequence) = self.disk.open_session() else {
            let message = format!("{}: no session is open", self.name());
            return Err(Refusal::new(ErrorKind::Refused, message));
        };
        self.server.end_session(sequence);
        match self.reporter.wait_for_end(sequence, END_TIME_MAX) {
            Waited::Ended(ended) => Ok(SessionEnded {
                sequence,
                reason: ended.reason.to_string(),
                duration_ms: u64::try_from(ended.summary.duration.as_millis()).unwrap_or(u64::MAX),
                bytes_written: ended.summary.bytes_written,
                dirty_blocks: ended.summary.dirty_blocks,
                pending_blocks: ended.pending,
                held: self.held(),
            }),
            Waited::Missed => Err(Refusal::new(
                ErrorKind::Failed,
                format!("{}: the server stops; look at the disk with `pristine status`", self.name()),
            )),
            Waited::TimedOut => Err(Refusal::new(
                ErrorKind::TimedOut,
                format!(
                    "{}: session {sequence} has not ended after {} s; its end goes on",
                    self.name(),
                    END_TIME_MAX.as_secs()
                ),
            )),
        }
    }

    fn session_hold(&self) -> Result<SessionHeld, Refusal> {
        let held = self.disk.hold(HoldReason::ByOperator).map_err(refusal)?;
        match held.session {
            _ if held.already => {}
            Some(sequence) => {
                announce!("pristine: the operator holds the disk from the end of session {sequence} on")
            }
            None => announce!("pristine: the operator holds the disk; {} are kept", amount(held.blocks)),
        }
        self.reporter.wake_drainer();
        Ok(SessionHeld { already: held.already, session: held.session, blocks: held.blocks })
    }

    fn session_release(&self) -> Result<SessionReleased, Refusal> {
        let released = self.disk.release().map_err(refusal)?;
        announce!(
            "pristine: the operator has released the disk; {} to restore",
            amount(released.pending_blocks)
        );
        self.reporter.wake_drainer();
        Ok(SessionReleased { session: released.session, pending_blocks: released.pending_blocks })
    }
}

fn refusal(error: Error) -> Refusal {
    let kind = match error {
        Error::Refused(_) | Error::Held { .. } => ErrorKind::Refused,
        _ => ErrorKind::Failed,
    };
    Refusal::new(kind, Failure::from(error).line())
}
