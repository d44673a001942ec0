//! A session's beginning: from its first answered read until its write log is durable and the manifest names it.
//!
//! Reads need no log. So a session takes requests as soon as its log and the new manifest have their room, and the medium
//! is waited for meanwhile, by a thread of its own; whoever is to write first, and whoever wants the manifest, waits for that
//! thread, or does what it has not begun. The order, in which nothing may be swapped:
//!
//! 1. log and manifest have their room, under names that nobody believes: what a full file system refuses is the session;
//! 2. the live page says that a session begins ([`LivePage::set_session_begins`](crate::live::LivePage::set_session_begins));
//!    reads are served;
//! 3. log, its name and the new manifest are durable;
//! 4. the live page has the log's mark: were we killed here, the earlier logs are sealed and speak for themselves;
//! 5. the manifest has its name, durably, and the disk's file names its generation;
//! 6. the log can be appended to, and the live page says that a session is open. Only now anything is written to the disk.
//!
//! Killed before 5 the session has written nothing, and its log is nobody's: if its VM lives, the next server begins it
//! anew, with another log. A power cut ends it in any case.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockio::in_full;
use write_log::LogWriter;

use crate::live::LiveMark;
use crate::manifest::{Manifest, StagedManifest};
use crate::open::remove_unnamed_logs;
use crate::shared::Shared;
use crate::{Error, Paths, witness};

/// What is left to be done.
#[derive(Debug)]
pub(crate) struct Beginning {
    pub(crate) paths: Paths,
    /// The session's log.
    pub(crate) writer: LogWriter,
    /// Names that log.
    pub(crate) manifest: Manifest,
    /// The same, as a file.
    pub(crate) staged: StagedManifest,
}

/// How far the last session's beginning has come.
#[derive(Debug, Default)]
enum State {
    /// There is nothing to do, and nobody is to be told.
    #[default]
    Over,
    /// Nobody has begun to do it.
    Begun(Box<Beginning>),
    /// It is done, and this is the disk's manifest.
    Done(Box<Manifest>),
    /// It failed: the session has no log, and the manifest is the one from before.
    Failed,
}

/// What a beginning has come to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The manifest names the session's log.
    Named(Box<Manifest>),
    /// The session has no log.
    Failed,
}

/// The beginning of a disk's open session.
#[derive(Debug, Default)]
pub(crate) struct Beginnings {
    state: Mutex<State>,
    /// Whether there may be something to wait for.
    is_begun: AtomicBool,
}

impl Beginnings {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session has begun.
    pub(crate) fn begin(&self, beginning: Beginning) {
        *self.state() = State::Begun(Box::new(beginning));
        self.is_begun.store(true, Ordering::Release);
    }

    /// Whether there may be something to wait for.
    pub(crate) fn is_begun(&self) -> bool {
        self.is_begun.load(Ordering::Acquire)
    }

    /// Leaves undone what nobody has begun to do: the session is given up, as by a kill.
    pub(crate) fn give_up(&self) {
        let mut state = self.state();
        if matches!(*state, State::Begun(_)) {
            *state = State::Failed;
        }
        self.is_begun.store(false, Ordering::Release);
    }

    /// Waits until nothing is left to be done; does it, if nobody else has begun. Whether it failed is seen by the log, which
    /// is not there then.
    pub(crate) fn finish(&self, shared: &Shared) {
        if !self.is_begun() {
            return;
        }
        let mut state = self.state();
        // Should it panic, it has failed.
        *state = match std::mem::replace(&mut *state, State::Failed) {
            State::Begun(beginning) => {
                beginning.finish(shared).map_or(State::Failed, |manifest| State::Done(Box::new(manifest)))
            }
            other => other,
        };
        self.is_begun.store(false, Ordering::Release);
    }

    /// What has come of the open session's beginning, once.
    pub(crate) fn take_outcome(&self) -> Option<Outcome> {
        let mut state = self.state();
        match std::mem::take(&mut *state) {
            State::Done(manifest) => Some(Outcome::Named(manifest)),
            State::Failed => Some(Outcome::Failed),
            other => {
                *state = other;
                None
            }
        }
    }
}

impl Beginning {
    fn finish(mut self, shared: &Shared) -> Option<Manifest> {
        let result = self.make_durable(shared);
        let Self { paths, writer, manifest, staged } = self;
        let result = result.and_then(|()| {
            let (sequence, mark) = (writer.header().id.seq, writer.mark());
            shared.live.set_mark(LiveMark { sequence, mark });
            staged.place(&shared.storage, &paths)
        });
        if let Err(error) = result {
            remove_unnamed_logs(&shared.storage, &paths, &manifest);
            log::error!(
                "{}: the session's write log is not durable, so its writes fail until it ends: {}",
                paths.disk().display(),
                in_full(&error)
            );
            return None;
        }
        witness::set_generation(&shared.storage, &shared.disk, manifest.generation);
        shared.set_log(writer);
        shared.live.set_session_open(true);
        Some(manifest)
    }

    fn make_durable(&mut self, shared: &Shared) -> Result<(), Error> {
        let Self { paths, writer, staged, .. } = self;
        let logs = shared.storage.logs(&paths.sessions());
        // Each waits for the medium.
        let (log, manifest) = shared.storage.both(|| writer.sync_in(&*logs), || staged.sync(paths));
        log?;
        manifest
    }
}
