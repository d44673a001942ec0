//! A session's beginning and end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::SystemTime;

use blockio::in_full;
use uuid::Uuid;
use write_log::LogWriter;

use super::{Lifecycle, OpenSession, SessionDisk, next_entry};
use crate::beginning::Beginning;
use crate::manifest::EntryKind;
use crate::open::remove_unnamed_logs;
use crate::process::ProcessId;
use crate::witness;
use crate::{Error, SessionStart, SessionSummary};

impl SessionDisk {
    /// Opens a session: from now on requests are taken. Its log's room is reserved; that this is durable, and that
    /// the manifest names the log, is waited for by who writes first, and reads are served meanwhile. Should the
    /// storage of the state fail then, writes fail until the session ends.
    ///
    /// # Errors
    /// If one is open already, or the log can't be made; then nothing has changed.
    pub fn begin_session(&self, owner: Option<ProcessId>) -> Result<SessionStart, Error> {
        self.begin(owner, None)
    }

    /// Whether a session could begin if none was open, as far as can be known before it is tried.
    ///
    /// # Errors
    /// Why none can: what it was written to may be lost, it is held, or its base has changed.
    pub fn may_begin(&self) -> Result<(), Error> {
        self.check_fit(&self.lifecycle())
    }

    fn check_fit(&self, lifecycle: &Lifecycle) -> Result<(), Error> {
        if self.shared.heeds_poison() {
            return Err(self.shared.poisoned_error());
        }
        if let Some(reason) = &lifecycle.manifest.held {
            return Err(Error::Held {
                disk: self.paths.disk().to_owned(),
                named: self.paths.arguments(),
                reason: reason.clone(),
            });
        }
        self.shared.check_base().map(drop)
    }

    /// [`begin_session`](Self::begin_session) of a session that has noted its token already, or not.
    pub(super) fn begin(&self, owner: Option<ProcessId>, token: Option<Uuid>) -> Result<SessionStart, Error> {
        let mut lifecycle = self.lifecycle();
        if lifecycle.session.is_some() {
            return Err(Error::WrongState("a session is open already"));
        }
        self.check_fit(&lifecycle)?;
        let mut manifest = lifecycle.manifest.clone();
        self.keep_in(&mut manifest)?;
        let entry = next_entry(&mut manifest, EntryKind::Session);
        let header = self.log_header(&manifest, entry);
        manifest.pristine_since = None;
        manifest.generation = witness::next_generation(manifest.generation, None);
        let storage = &self.shared.storage;
        let logs = storage.logs(&self.paths.sessions());
        let writer = self.with_room(&lifecycle, || LogWriter::create_unsynced_in(&*logs, &header))?;
        let staged = manifest
            .stage(storage, &self.paths)
            .inspect_err(|_| remove_unnamed_logs(storage, &self.paths, &manifest))?;
        self.shared.live.set_pristine(false);
        let bytes_before = self.bytes_written(&lifecycle);
        lifecycle.session =
            Some(OpenSession { entry, named: false, started: SystemTime::now(), bytes_before });
        self.shared.live.set_owner(owner);
        self.shared.live.set_token(token);
        self.shared.live.set_dirty(0);
        self.shared.live.set_session_begins();
        self.shared.beginnings.begin(Beginning { paths: self.paths.clone(), writer, manifest, staged });
        if !storage.has_tape() {
            let shared = Arc::clone(&self.shared);
            let finish = move || shared.beginnings.finish(&shared);
            // Where no thread is to be had, who writes first does it.
            lifecycle.finisher = thread::Builder::new().name("begin".into()).spawn(finish).ok();
        }
        #[cfg(feature = "bench-without-log")]
        if self.without_log {
            self.shared.owned.insert(self.shared.geometry.all());
        }
        // Whether or not the map was forgotten since the last session: what compares the disk's times must see this one.
        self.shared.disk.date_next_write();
        self.shared.open.store(true, Ordering::SeqCst);
        Ok(SessionStart { sequence: entry.sequence, pending_blocks: self.shared.pending.count() })
    }

    /// Notes a new owner of the open session: the same process under a new connection.
    pub fn set_owner(&self, owner: Option<ProcessId>) {
        self.shared.live.set_owner(owner);
    }

    /// Notes by which in-flight table the open session's frontend can be known again.
    pub fn set_token(&self, token: Option<Uuid>) {
        self.shared.live.set_token(token);
    }

    /// The token that was noted last in the open session.
    pub fn token(&self) -> Option<Uuid> {
        self.shared.live.token()
    }

    /// Notes whether the guest has chosen the write-through mode (virtio 1.2, 5.2.4, `writeback`): frontends say that once, so that who
    /// serves the session after this connection, or after this process, has to know. Forgotten at the end of the session.
    pub fn set_write_through(&self, chosen: bool) {
        self.shared.live.set_write_through(chosen);
    }

    /// What was noted last by [`set_write_through`](Self::set_write_through).
    pub fn is_write_through(&self) -> bool {
        self.shared.live.is_write_through()
    }

    /// Ends the session: step 8. Everything that it owns is pending from now on, or kept. No data is synced.
    ///
    /// # Errors
    /// If none is open, or a queue has requests that are not reaped.
    pub fn end_session(&self) -> Result<SessionSummary, Error> {
        let mut lifecycle = self.lifecycle();
        let Some(session) = &lifecycle.session else {
            return Err(Error::WrongState("no session is open"));
        };
        // Closed first, counted then: a queue counts first and looks then.
        self.shared.open.store(false, Ordering::SeqCst);
        if lifecycle.in_flight() > 0 {
            self.shared.open.store(true, Ordering::SeqCst);
            return Err(Error::WrongState("a queue has requests in flight"));
        }
        let held = lifecycle.manifest.held.is_some();
        let dirty_blocks = self.shared.owned.count();
        let summary = SessionSummary {
            sequence: session.entry.sequence,
            dirty_blocks,
            bytes_written: self.bytes_written(&lifecycle).saturating_sub(session.bytes_before),
            duration: session.started.elapsed().unwrap_or_default(),
        };
        if let Some(mut writer) = self.shared.take_log() {
            // Sealed, it is exact without the live page's mark, which will be the next log's. If that
            // fails and we are killed before the next checkpoint, it counts as damaged: all is pending. It need not
            // be durable: in a power cut the intents say as much as for a session that was open. But who
            // keeps what a session did wants to know it exactly.
            let exact = held || lifecycle.manifest.kept;
            // What is held outlasts the host. Its data first: a sealed log says that it is there.
            let durable = if held { self.shared.sync_disk() } else { Ok(()) };
            let sealed = durable.and_then(|()| {
                Ok(if exact { writer.seal(dirty_blocks)? } else { writer.seal_unsynced(dirty_blocks)? })
            });
            if let Err(error) = sealed {
                log::warn!("write log {}: {}", writer.path().display(), in_full(&error));
            }
        }
        // Nobody writes, and what was written is drained from here on.
        self.shared.disk.forget_writes();
        self.shared.wipe_redo();
        // Before the drain may begin with what it leaves: should we be killed in between, nobody takes that for untouched.
        self.shared.live.set_session_open(false);
        // Whatever it has taken, named or not.
        self.shared.claims.end_session(held, session.named, || {
            let set = if lifecycle.manifest.kept { &lifecycle.kept } else { &self.shared.pending };
            set.insert_set(&self.shared.owned);
            self.shared.owned.clear();
        });
        lifecycle.session = None;
        self.shared.live.set_owner(None);
        self.shared.live.set_token(None);
        self.shared.live.set_write_through(false);
        self.shared.live.set_dirty(lifecycle.kept.count());
        self.shared.live.set_pending(self.shared.pending.count());
        Ok(summary)
    }
}
