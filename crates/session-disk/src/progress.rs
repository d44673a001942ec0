//! How far a drain has come, and when that is written down.
//!
//! What was restored is durable, but logs name it until a checkpoint replaces them: a server that ends before sends the next
//! one back to where the last checkpoint was. So one is made as often as makes the rest cheap to lose, and when a drain stops.

use std::time::{Duration, Instant};

use blockio::in_full;

use crate::{Error, SessionDisk};

/// After so many restored blocks (4 GiB) the rest is made a new log.
const CHECKPOINT_BLOCKS: u64 = 1 << 20;
/// After this time too, if anything was restored: a drain may be slow because it is to be.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// What a drain has restored.
#[derive(Debug)]
pub(crate) struct Progress {
    restored: u64,
    /// Of these, what logs still name.
    since_checkpoint: u64,
    checkpoint: Instant,
}

impl Progress {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { restored: 0, since_checkpoint: 0, checkpoint: Instant::now() }
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
        self.since_checkpoint >= CHECKPOINT_BLOCKS
            || (self.since_checkpoint > 0 && self.checkpoint.elapsed() >= CHECKPOINT_EVERY)
    }

    /// Writes down what was restored.
    ///
    /// # Errors
    /// As [`SessionDisk::checkpoint`].
    pub(crate) fn checkpoint(&mut self, disk: &SessionDisk) -> Result<(), Error> {
        (self.since_checkpoint, self.checkpoint) = (0, Instant::now());
        disk.checkpoint()
    }

    /// Writes down what was restored before the drain was stopped, or failed. If that fails too, it is restored again.
    pub(crate) fn keep(&mut self, disk: &SessionDisk) {
        if self.since_checkpoint > 0
            && let Err(error) = self.checkpoint(disk)
        {
            log::warn!(
                "{}: what was restored is to be restored again: {}",
                disk.paths().disk().display(),
                in_full(&error)
            );
        }
    }
}
