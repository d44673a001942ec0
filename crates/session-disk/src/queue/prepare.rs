//! What has to be durable before a write is: the session's log with its name, and the intents of the write's regions.
//!
//! Each waits for the medium, once in a session and once for a region, and no other request of the queue is to wait with it. So
//! such a write is parked, and a thread of the queue does what is missing: for one round of writes after the other, each with all
//! that have come meanwhile. Where there can be no such thread, the pass does it when everything else of it is on its way, and waits.
//!
//! That a write was prepared is no proof of it: [`log_extents`](DiskQueue::log_extents) and
//! [`write_pending`](DiskQueue::write_pending) make sure themselves, and find nothing to do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TrySendError, channel};

use blockio::in_full;
use blocks::Extent;

use super::DiskQueue;
use crate::claims::Waker;
use crate::helper::Helper;
use crate::request::Write;
use crate::shared::Shared;

/// Writes that wait until what they need is durable.
#[derive(Debug)]
pub(super) struct Preparation {
    next: Round,
    /// The slots of the round under way.
    waiting: Vec<usize>,
    /// Whether a round is under way. It may be that nobody waits for it any more.
    is_under_way: bool,
    /// Woken when it is over.
    waker: Arc<Waker>,
    /// Made for the first round, if rounds may be done beside the queue.
    preparer: Option<Preparer>,
}

/// Writes that are prepared at a time.
#[derive(Debug, Default)]
struct Round {
    slots: Vec<usize>,
    /// The blocks that they touch.
    extents: Vec<Extent>,
}

/// Who prepares beside the queue.
#[derive(Debug)]
struct Preparer {
    helper: Helper<Vec<Extent>>,
    outcomes: Receiver<io::Result<()>>,
}

impl Preparer {
    fn new(
        waker: &Arc<Waker>,
        mut prepare: impl FnMut(&[Extent]) -> io::Result<()> + Send + 'static,
    ) -> Option<Self> {
        let waker = Arc::clone(waker);
        let (told, outcomes) = channel();
        let task = move |extents: Vec<Extent>| {
            // Also if it panics: then nothing is told, which is a failure.
            let _wakes = WakesWhenOver(&waker);
            let _ = told.send(prepare(&extents));
        };
        Helper::new("intents", 1, task).map(|helper| Self { helper, outcomes })
    }
}

struct WakesWhenOver<'a>(&'a Waker);

impl Drop for WakesWhenOver<'_> {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// Waits until the session's log is named, and the regions of `extents` are noted.
fn prepare(shared: &Shared, extents: &[Extent]) -> io::Result<()> {
    shared.finish_beginning();
    shared.intents.ensure_all(extents).map_err(io::Error::other)
}

impl Preparation {
    /// Nothing waits.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            next: Round::default(),
            waiting: Vec::new(),
            is_under_way: false,
            waker: Waker::new()?,
            preparer: None,
        })
    }

    /// Whether a round waits to be begun.
    pub(super) fn is_wanted(&self) -> bool {
        !self.is_under_way && !self.next.slots.is_empty()
    }

    /// Forgets whoever waits; returns their slots.
    pub(super) fn cancel(&mut self) -> Vec<usize> {
        let Round { mut slots, .. } = std::mem::take(&mut self.next);
        slots.append(&mut self.waiting);
        slots
    }

    /// Hands `extents` over to who prepares beside the queue; gives them back if there can be nobody.
    fn offer(&mut self, shared: &Arc<Shared>, extents: Vec<Extent>) -> Result<(), Vec<Extent>> {
        if self.preparer.is_none() && !shared.storage.has_tape() {
            let shared = Arc::clone(shared);
            self.preparer = Preparer::new(&self.waker, move |extents| prepare(&shared, extents));
        }
        let Some(preparer) = &self.preparer else { return Err(extents) };
        match preparer.helper.offer(extents) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(extents) | TrySendError::Disconnected(extents)) => Err(extents),
        }
    }

    /// What has come of the round under way, if that is over.
    fn take_outcome(&mut self) -> Option<io::Result<()>> {
        if !self.is_under_way || !self.waker.consume() {
            return None;
        }
        self.is_under_way = false;
        let outcome = self.preparer.as_ref().and_then(|preparer| preparer.outcomes.try_recv().ok());
        Some(outcome.unwrap_or_else(|| {
            // It may not have ended yet, and would take a round that nobody does. The next one has another thread.
            self.preparer = None;
            Err(io::Error::other("what notes regions has panicked"))
        }))
    }
}

#[cfg(test)]
impl Preparation {
    /// The next round ends in disorder.
    pub(super) fn panics_next(&mut self) {
        self.preparer = Preparer::new(&self.waker, |_| panic!("as the test wants it"));
    }
}

impl AsFd for Preparation {
    /// Readable when a round is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

impl DiskQueue {
    /// Whether a write that touches these blocks need not wait for anything to become durable first.
    pub(super) fn is_prepared(&self, touched: Extent) -> bool {
        !self.shared.beginnings.is_begun() && self.shared.intents.covers(touched)
    }

    /// Parks a write until it is prepared.
    pub(super) fn park_unprepared(&mut self, slot: usize, write: Write) {
        let Some(state) = self.slots.get_mut(slot) else { return };
        self.preparation.next.slots.push(slot);
        self.preparation.next.extents.push(write.range.touched());
        state.parts += 1;
        state.parked = Some(write);
    }

    /// Begins the next round, if one is wanted.
    pub(super) fn begin_preparing(&mut self) {
        if !self.preparation.is_wanted() {
            return;
        }
        let Round { slots, extents } = std::mem::take(&mut self.preparation.next);
        self.preparation.waiting = slots;
        match self.preparation.offer(&self.shared, extents) {
            Ok(()) => self.preparation.is_under_way = true,
            Err(extents) => {
                // This pass waits, and what it has begun does not wait with it.
                self.submit_operations();
                self.go_on_prepared(prepare(&self.shared, &extents));
            }
        }
    }

    /// Goes on with the writes of a round that is over.
    pub(super) fn take_prepared(&mut self) {
        if let Some(outcome) = self.preparation.take_outcome() {
            self.go_on_prepared(outcome);
        }
    }

    fn go_on_prepared(&mut self, outcome: io::Result<()>) {
        let failure = outcome.err().map(|error| (error.kind(), format!("not logged: {}", in_full(&error))));
        if let Some((_, message)) = &failure {
            log::debug!("{}: a write fails: {message}", self.shared.disk.path().display());
        }
        for slot in std::mem::take(&mut self.preparation.waiting) {
            let Some(write) = self.slots.get_mut(slot).and_then(|state| state.parked.take()) else {
                continue;
            };
            let result = match &failure {
                Some((kind, message)) => Err(io::Error::new(*kind, message.clone())),
                None => {
                    self.start_prepared(slot, write);
                    Ok(())
                }
            };
            self.part_done(slot, result);
        }
    }
}
