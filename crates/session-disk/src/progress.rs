//! How far a drain has come, and when that is written down.
//!
//! What was restored is durable, but logs name it until a checkpoint replaces them: a server that ends before sends the next
//! one back to where the last checkpoint was. So one is made when a drain stops, and meanwhile as often as makes the rest cheap to
//! lose: each leaves a log, so they become rare.

use std::time::{Duration, Instant};

use blockio::in_full;

use crate::{Error, SessionDisk};

/// A checkpoint comes after this time, if by then half of all that was restored is not noted.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(60);

/// What a drain has restored.
#[derive(Debug)]
pub(crate) struct Progress {
    /// When there was a checkpoint last, or the drain began.
    noted: Instant,
    restored: u64,
    /// Of these, what logs still name.
    since_checkpoint: u64,
}

impl Progress {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { noted: Instant::now(), restored: 0, since_checkpoint: 0 }
    }

    /// `blocks` were restored, durably.
    pub(crate) fn add(&mut self, blocks: u64) {
        self.restored += blocks;
        self.since_checkpoint += blocks;
    }

    /// How many blocks were restored.
    pub(crate) fn restored(&self) -> u64 {
        self.restored
    }

    /// Whether so much is not written down that it should be.
    pub(crate) fn is_worth_a_checkpoint(&self) -> bool {
        self.since_checkpoint > 0
            && self.since_checkpoint >= self.restored / 2
            && self.noted.elapsed() >= CHECKPOINT_AFTER
    }

    /// Writes down what was restored, if the disk is not held.
    ///
    /// # Errors
    /// As [`SessionDisk::checkpoint`].
    pub(crate) fn checkpoint(&mut self, disk: &SessionDisk) -> Result<(), Error> {
        self.noted = Instant::now();
        disk.checkpoint_unless_held()?;
        self.since_checkpoint = 0;
        Ok(())
    }

    /// Writes down what was restored, if anything was. If that fails, it is restored again, should nothing else write it down.
    pub(crate) fn keep(&mut self, disk: &SessionDisk) {
        if self.since_checkpoint > 0
            && let Err(error) = self.checkpoint(disk)
        {
            log::warn!(
                "{}: what was restored is not noted yet: {}",
                disk.paths().disk().display(),
                in_full(&error)
            );
        }
    }
}
