//! How many blocks came to the disk which way.

use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

use blocks::BLOCK_SIZE;
use serde::Serialize;

/// Blocks that were restored, by the way they came. What a guest or a failure has undone since counts all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopyCounts {
    /// The disk shares them with the base.
    pub reflinked_blocks: u64,
    /// They were written.
    pub copied_blocks: u64,
    /// They were made holes; zeroes where the disk can have no holes.
    pub punched_blocks: u64,
}

impl Sub for CopyCounts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            reflinked_blocks: self.reflinked_blocks.saturating_sub(before.reflinked_blocks),
            copied_blocks: self.copied_blocks.saturating_sub(before.copied_blocks),
            punched_blocks: self.punched_blocks.saturating_sub(before.punched_blocks),
        }
    }
}

/// Counts them. One thread adds, others look.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reflinked: AtomicU64,
    copied: AtomicU64,
    punched: AtomicU64,
}

impl Counters {
    pub(crate) fn reflinked(&self, bytes: u64) {
        add(&self.reflinked, bytes);
    }

    pub(crate) fn copied(&self, bytes: u64) {
        add(&self.copied, bytes);
    }

    pub(crate) fn punched(&self, bytes: u64) {
        add(&self.punched, bytes);
    }

    pub(crate) fn get(&self) -> CopyCounts {
        CopyCounts {
            reflinked_blocks: self.reflinked.load(Ordering::Relaxed),
            copied_blocks: self.copied.load(Ordering::Relaxed),
            punched_blocks: self.punched.load(Ordering::Relaxed),
        }
    }
}

/// A disk's last block may be short.
fn add(counter: &AtomicU64, bytes: u64) {
    counter.fetch_add(bytes.div_ceil(BLOCK_SIZE), Ordering::Relaxed);
}
