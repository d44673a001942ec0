//! Holding a disk: what a session leaves is kept as it is, for somebody to look at.
//!
//! A hold is a field of the manifest, so it survives servers and hosts. While a session is open it
//! changes nothing but what comes after: the session's end adds to the pending set as ever, but the
//! drain rests (`Claims` gives it no block), and no other session begins.
//!
//! Without an open session a disk can be held as long as nothing of the last one was restored, for a
//! part of a session is of use to nobody. Whether the drain has begun is known to `Claims` while a
//! server runs; to the manifest (`left`) after it stopped; and after a kill the live page says whether
//! the session was open. After a power cut nobody knows, so it has begun: what a server says that stopped in
//! order counts as long as its live page is there, for it has synced nothing of what the session wrote.
//!
//! A session whose VM lives and whose log can't be trusted any more is held too: it can't go on, for
//! nobody knows what it owns, and what it has written may be dear to somebody. That hold ends with the
//! VM's process.

use std::fmt;
use std::sync::MutexGuard;

use serde::{Deserialize, Serialize};

use uuid::Uuid;

use super::{Lifecycle, SessionDisk};
use crate::live::{Before, LivePage};
use crate::manifest::{EntryKind, Left, Manifest};
use crate::open::{file_number, lock_state_dir, open_disk};
use crate::overlay::logs_of;
use crate::process::{ProcessId, boot_id};
use crate::recover::Distrust;
use crate::storage::Storage;
use crate::{DiskOptions, Error};

/// Why a disk is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum HoldReason {
    /// The operator wanted it.
    ByOperator,
    /// A session can't go on although its VM lives.
    Untrusted {
        /// What is wrong with its log or state.
        why: String,
        /// The VM's process.
        owner: ProcessId,
        /// The boot of the host in which that process runs.
        boot: Uuid,
    },
}

impl HoldReason {
    /// The reason's name, as in the manifest and in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ByOperator => "by-operator",
            Self::Untrusted { .. } => "untrusted",
        }
    }

    /// The hold of a session of `owner`, if that process lives.
    pub(super) fn untrusted(why: &Distrust, owner: Option<ProcessId>) -> Option<Self> {
        let owner = owner.filter(|owner| owner.may_be_alive())?;
        Some(Self::Untrusted { why: why.to_string(), owner, boot: boot_id().ok()? })
    }

    /// Whether a hold for this reason goes beyond one for `other`.
    fn outlasts(&self, other: &Self) -> bool {
        matches!((self, other), (Self::ByOperator, Self::Untrusted { .. }))
    }

    /// Whether nobody has anything from this hold any more.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            Self::ByOperator => false,
            Self::Untrusted { owner, boot, .. } => {
                !owner.may_be_alive() || boot_id().is_ok_and(|now| now != *boot)
            }
        }
    }
}

impl fmt::Display for HoldReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByOperator => f.write_str("by the operator"),
            Self::Untrusted { why, owner, .. } => {
                write!(f, "until process {} is gone, whose session can't go on: {why}", owner.pid)
            }
        }
    }
}

/// What is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Whether it was held already, for this reason or one that lasts as long; then that one stays.
    pub already: bool,
    /// The open session at whose end the hold begins; `None`: it has begun.
    pub session: Option<u64>,
    /// Blocks that are kept; of an open session, those that it has so far.
    pub blocks: u64,
}

/// What was let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// The open session, which goes on.
    pub session: Option<u64>,
    /// Blocks that may be restored from now on.
    pub pending_blocks: u64,
}

impl SessionDisk {
    /// Why the disk is held, or will be when the session ends.
    pub fn held(&self) -> Option<HoldReason> {
        self.lifecycle().manifest.held.clone()
    }

    /// Why no session can begin now: an [`Error::Held`], if the disk is held.
    pub fn turns_away(&self) -> Option<Error> {
        let reason = self.held()?;
        Some(Error::Held { disk: self.paths.disk().to_owned(), named: self.paths.arguments(), reason })
    }

    /// The process whose end ends the hold by itself.
    pub fn held_for(&self) -> Option<ProcessId> {
        match self.held()? {
            HoldReason::ByOperator => None,
            HoldReason::Untrusted { owner, .. } => Some(owner),
        }
    }

    /// Sequence number of the session that is open.
    pub fn open_session(&self) -> Option<u64> {
        self.lifecycle_as_it_is().session.as_ref().map(|session| session.entry.sequence)
    }

    /// Keeps what the open session, or the last one, leaves as it is: nothing is restored and no session
    /// begins until [`release`](Self::release). Durable when this returns.
    ///
    /// # Errors
    /// If there is nothing to keep; then nothing was changed. If the state can't be stored: then it may be held, as
    /// [`held`](Self::held) says, and not durably.
    pub fn hold(&self, reason: HoldReason) -> Result<Held, Error> {
        let mut lifecycle = self.lifecycle();
        let session = lifecycle.session.as_ref().map(|session| session.entry.sequence);
        let blocks = match session {
            Some(_) => self.dirty_blocks(),
            None => self.pending_blocks() + lifecycle.kept.count(),
        };
        let before = lifecycle.manifest.held.as_ref();
        if before.is_some_and(|before| !reason.outlasts(before)) {
            // It may have been made by an attempt that failed to make its name durable.
            self.shared.storage.sync_dir(self.paths.state_dir())?;
            return Ok(Held { already: true, session, blocks });
        }
        let is_held = before.is_some();
        if session.is_some() && lifecycle.named_session().is_none() {
            return Err(Error::Refused(format!(
                "{}: there is nothing to hold: the session has no write log, so it writes nothing",
                self.paths.disk().display()
            )));
        }
        // The drain first: what it has once begun can't be kept any more.
        if session.is_none()
            && !is_held
            && !lifecycle.manifest.kept
            && (blocks == 0 || !self.shared.claims.rest_if_not_begun())
        {
            return Err(nothing_to_hold(self.paths.disk(), blocks));
        }
        let mut manifest = lifecycle.manifest.clone();
        manifest.held = Some(reason);
        // What an ended session has written is to be there, and to be known exactly, from now on, whatever becomes of the host.
        let durable = match session {
            // Nobody knows what it has written, but that is to be there too.
            None if is_held => self.shared.sync_disk(),
            None => self.make_last_session_durable(&manifest),
            Some(_) => Ok(()),
        };
        if let Err(error) = durable.and_then(|()| self.store_manifest(&mut manifest)) {
            // What failed may have been only to make it durable that it is held: the next start would believe it, and so nothing
            // is restored meanwhile.
            let found = Manifest::load_from(&self.shared.storage, &self.paths);
            if found.is_ok_and(|found| found.held == lifecycle.manifest.held) {
                if !is_held {
                    self.shared.claims.end_rest();
                }
            } else {
                lifecycle.manifest = manifest;
            }
            return Err(error);
        }
        lifecycle.manifest = manifest;
        Ok(Held { already: false, session, blocks })
    }

    /// Makes durable what the last session has written, then the logs that tell it from what earlier ones have left.
    pub(super) fn make_last_session_durable(&self, manifest: &Manifest) -> Result<(), Error> {
        self.shared.sync_disk()?;
        self.sync_logs(manifest)?;
        if manifest.logs.iter().any(|entry| entry.kind == EntryKind::Session) {
            return Ok(());
        }
        // Its log has been made one with the others, and nobody has synced it, should it have been killed.
        logs_of(&self.paths.sessions())?.into_iter().try_for_each(|id| self.sync_log(id))
    }

    /// Ends a hold: what is pending may be restored, and sessions may begin. Durable when this returns.
    ///
    /// # Errors
    /// If nothing is held.
    pub fn release(&self) -> Result<Released, Error> {
        let lifecycle = self.lifecycle();
        if lifecycle.manifest.held.is_none() {
            return Err(Error::Refused(format!("{}: nothing is held", self.paths.disk().display())));
        }
        self.release_in(lifecycle)
    }

    /// Ends a hold that is for a process which is gone. One by the operator stays: then, and if nothing is held, this is `None`.
    pub fn release_if_over(&self) -> Result<Option<Released>, Error> {
        let lifecycle = self.lifecycle();
        match &lifecycle.manifest.held {
            Some(reason) if reason.is_over() => self.release_in(lifecycle).map(Some),
            _ => Ok(None),
        }
    }

    fn release_in(&self, mut lifecycle: MutexGuard<'_, Lifecycle>) -> Result<Released, Error> {
        let mut manifest = lifecycle.manifest.clone();
        manifest.held = None;
        self.store_manifest(&mut manifest)?;
        lifecycle.manifest = manifest;
        self.shared.claims.end_rest();
        let session = lifecycle.session.as_ref().map(|session| session.entry.sequence);
        Ok(Released { session, pending_blocks: self.pending_blocks() })
    }

    /// Fails if the disk is held and its session has ended.
    pub(super) fn refuse_if_held(&self) -> Result<(), Error> {
        if self.shared.claims.drain_rests() { self.turns_away().map_or(Ok(()), Err) } else { Ok(()) }
    }
}

fn nothing_to_hold(disk: &std::path::Path, pending: u64) -> Error {
    let disk = disk.display();
    Error::Refused(if pending == 0 {
        format!("{disk}: there is nothing to hold: no session is open, and nothing is left of the last one")
    } else {
        format!(
            "{disk}: there is nothing to hold: no session is open, and restoring what the last one left has begun, \
             or the host was restarted since; hold a disk before its session ends"
        )
    })
}

/// Begins (`Some`) or ends a hold of a disk that nobody serves, and whose open session goes on with the next
/// server: it stays open, and the hold begins with its end. `None`: there is no such session, and
/// nothing was changed. Otherwise the session and the blocks that it has so far.
///
/// # Errors
/// If the disk is in use, was not provisioned, or its manifest can't be replaced.
pub fn set_hold_of_open_session(
    options: &DiskOptions,
    hold: Option<HoldReason>,
) -> Result<Option<Held>, Error> {
    let (paths, storage) = (options.paths(), Storage::new(options.tape.clone()));
    let disk = Manifest::load_from(&storage, &paths)?.disk;
    let live = LivePage::inspect(&paths.live_page(disk), disk, file_number(&options.disk)?);
    if let Some(live) = live.as_ref().filter(|live| Before::of(Some(live)).session_begins)
        && live.owner().is_none_or(ProcessId::may_be_alive)
    {
        return Err(Error::Refused(format!(
            "{}: its server was killed just as a session began, whose VM runs; serve the disk again first",
            options.disk.display()
        )));
    }
    let Some(live) = live.filter(|live| {
        Before::of(Some(live)).session_open && live.owner().is_none_or(ProcessId::may_be_alive)
    }) else {
        return Ok(None);
    };
    // No server may take it up meanwhile.
    let _disk = open_disk(&options.disk, false, Some(&live))?;
    let _state = lock_state_dir(&paths)?;
    let mut manifest = Manifest::load_from(&storage, &paths)?;
    let session = manifest.logs.iter().rfind(|entry| entry.kind == EntryKind::Session);
    let Some(session) = session.map(|entry| entry.sequence).filter(|_| live.session_is_named()) else {
        return Ok(None);
    };
    let already = match (&hold, &manifest.held) {
        (Some(wanted), Some(before)) => !wanted.outlasts(before),
        _ => false,
    };
    if !already {
        manifest.held = hold;
        manifest.store(&storage, &paths)?;
    }
    Ok(Some(Held { already, session: Some(session), blocks: live.counts().0 }))
}

/// The session that the last server left open, if nobody has ended it since. No server may be running.
///
/// # Errors
/// If the disk was not provisioned or its state can't be read.
pub fn left_open(options: &DiskOptions) -> Result<Option<u64>, Error> {
    let paths = options.paths();
    let manifest = Manifest::load(&paths)?;
    let live = LivePage::inspect(&paths.live_page(manifest.disk), manifest.disk, file_number(&options.disk)?);
    if live.as_ref().is_some_and(LivePage::session_begins) {
        // The number that it would have with the next server.
        return Ok(Some(manifest.next_sequence));
    }
    let Some(last) = manifest.logs.last().filter(|entry| entry.kind == EntryKind::Session) else {
        return Ok(None);
    };
    let open = match (manifest.left, live) {
        (Some(left), _) => left == Left::Open,
        (None, Some(live)) => live.session_is_named(),
        // A power cut, or a log that can't be read: a session's end seals its log. (Not durably: one that ended
        // just before a power cut may count as open.)
        (None, None) => Storage::default()
            .read_log(&paths.sessions().join(last.id().file_name()))
            .map_or(true, |contents| contents.sealed_blocks().is_none()),
    };
    Ok(open.then_some(last.sequence))
}
