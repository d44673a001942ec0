//! The requests that a queue has taken and not answered.

use std::io;

use blocks::Extent;

use crate::request::Write;

/// A request on its way.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// The caller's token.
    pub(super) token: u64,
    /// Bytes that it is about.
    pub(super) bytes: u64,
    /// Operations that are not finished; the request is finished when none is left.
    pub(super) parts: u32,
    /// The first failure.
    pub(super) error: Option<io::Error>,
    /// Pending blocks that are claimed for this request.
    pub(super) claimed: Vec<Extent>,
    /// Of these, the ones that become the session's when all parts are done.
    pub(super) taking: Vec<Extent>,
    /// What is made to read as zeroes, or given up, where the medium may have what an earlier session wrote.
    pub(super) zeroed: Vec<Extent>,
    /// A write that waits for claims.
    pub(super) parked: Option<Write>,
    /// Whether a sync follows the last part.
    pub(super) sync_after: bool,
    /// Whether a failure means that the disk can't be vouched for.
    pub(super) is_sync: bool,
}

/// Numbered slots that are used again without allocating.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

impl Slots {
    /// Takes a slot for the request `token`. It starts with one part: the caller's own, so that it can't finish
    /// while its operations are still being made.
    pub(super) fn take(&mut self, token: u64) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        if let Some(slot) = self.slots.get_mut(index) {
            slot.token = token;
            slot.bytes = 0;
            slot.parts = 1;
            slot.error = None;
            slot.sync_after = false;
            slot.is_sync = false;
        }
        index
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots.get_mut(index)
    }

    /// Gives a slot back.
    pub(super) fn put_back(&mut self, index: usize) {
        self.free.push(index);
    }

    /// How many slots are taken.
    pub(super) fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
