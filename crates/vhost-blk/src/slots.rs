//! The requests of one queue that are on their way: a fixed table, so that a guest can't make it grow.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::{
    disk::Outcome,
    request::{Memory, Status},
};

/// A request that was taken from the ring and is not yet answered.
#[derive(Debug)]
pub(crate) struct Slot {
    /// First descriptor of the chain: how the ring names the request.
    pub(crate) head: u16,
    /// Disk requests that it became and that are not finished.
    pub(crate) parts: u32,
    /// Bytes of the guest's buffer, without the status, that are written if it succeeds.
    pub(crate) written: u32,
    pub(crate) status_at: GuestAddress,
    /// Keeps the memory mapped that the request's I/O goes to, whatever the frontend maps next.
    pub(crate) memory: Arc<Memory>,
}

/// An element of the used ring: head, and bytes written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) len: u32,
}

#[derive(Debug)]
struct Entry {
    slot: Option<Slot>,
    /// The worst one of the parts that are finished.
    outcome: Outcome,
    /// Told apart from earlier requests in the same place.
    generation: u32,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Slots {
    entries: Vec<Entry>,
    free: Vec<u16>,
}

impl Slots {
    /// Room for `capacity` requests.
    pub(crate) fn new(capacity: u16) -> Self {
        let entry = |_| Entry { slot: None, outcome: Outcome::Done, generation: 0 };
        Self { entries: (0..capacity).map(entry).collect(), free: (0..capacity).rev().collect() }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// How many more requests there is room for.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }

    /// Keeps a request; returns the token of its first part (see [`part_token`]). `None`: full.
    pub(crate) fn insert(&mut self, slot: Slot) -> Option<u64> {
        let index = self.free.pop()?;
        let entry = self.entries.get_mut(usize::from(index))?;
        entry.slot = Some(slot);
        entry.outcome = Outcome::Done;
        entry.generation = entry.generation.wrapping_add(1) & GENERATION_MASK;
        Some(u64::from(entry.generation) << GENERATION_SHIFT | u64::from(index))
    }

    /// Notes that one part is finished. With the last one, the status is written to the guest and
    /// the element for the used ring is returned; of a request that was left nothing is.
    pub(crate) fn finish(&mut self, token: u64, outcome: Outcome) -> Option<Used> {
        let index = token as u16;
        let entry = self.entries.get_mut(usize::from(index))?;
        if (token >> GENERATION_SHIFT) as u32 & GENERATION_MASK != entry.generation {
            return None;
        }
        entry.outcome = entry.outcome.max(outcome);
        let slot = entry.slot.as_mut()?;
        slot.parts = slot.parts.saturating_sub(1);
        if slot.parts > 0 {
            return None;
        }
        let outcome = entry.outcome;
        let slot = entry.slot.take()?;
        self.free.push(index);
        let (status, written) = match outcome {
            Outcome::Done => (Status::Ok, slot.written),
            Outcome::Failed => (Status::IoError, 0),
            Outcome::Left => return None,
        };
        Some(answer(&slot.memory, slot.head, Some(slot.status_at), status, written))
    }
}

const GENERATION_SHIFT: u32 = 16;
const GENERATION_MASK: u32 = (1 << 24) - 1;
const PART_SHIFT: u32 = 48;

/// The token of the request's `part`-th disk request.
pub(crate) const fn part_token(token: u64, part: u16) -> u64 {
    token | (part as u64) << PART_SHIFT
}

/// Writes the status byte; returns the element for the used ring, whose length counts the data
/// `written` and the status.
pub(crate) fn answer(
    memory: &Memory,
    head: u16,
    status_at: Option<GuestAddress>,
    status: Status,
    written: u32,
) -> Used {
    let has_status = status_at.is_some_and(|at| memory.write_obj(status.byte(), at).is_ok());
    Used { head, len: if has_status { written.saturating_add(1) } else { 0 } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap())
    }

    fn slot(memory: &Arc<Memory>, parts: u32) -> Slot {
        Slot { head: 7, parts, written: 512, status_at: GuestAddress(9), memory: memory.clone() }
    }

    #[test]
    fn slot_of_several_parts_is_answered_once_with_the_worst_outcome() {
        let memory = memory();
        let mut slots = Slots::new(2);
        let token = slots.insert(slot(&memory, 3)).unwrap();
        assert_eq!(slots.finish(part_token(token, 1), Outcome::Done), None);
        assert_eq!(slots.finish(part_token(token, 0), Outcome::Failed), None);
        assert_eq!(slots.finish(part_token(token, 2), Outcome::Done), Some(Used { head: 7, len: 1 }));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(9)).unwrap(), Status::IoError.byte());
        assert!(slots.is_empty());
    }

    /// Its memory is let go, and its place, and the guest is told nothing, whatever became of its other parts.
    #[test]
    fn slot_of_which_a_part_was_left_is_not_answered() {
        let memory = memory();
        memory.write_obj(0xee_u8, GuestAddress(9)).unwrap();
        let mut slots = Slots::new(1);
        let token = slots.insert(slot(&memory, 3)).unwrap();
        for (part, outcome) in [Outcome::Left, Outcome::Failed, Outcome::Done].into_iter().enumerate() {
            assert_eq!(slots.finish(part_token(token, part as u16), outcome), None);
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress(9)).unwrap(), 0xee);
        assert!(slots.is_empty() && Arc::strong_count(&memory) == 1);
        let token = slots.insert(slot(&memory, 1)).unwrap();
        assert_eq!(slots.finish(token, Outcome::Done), Some(Used { head: 7, len: 513 }));
    }

    #[test]
    fn slots_with_a_stale_token_stay_as_they_are() {
        let memory = memory();
        let mut slots = Slots::new(1);
        let old = slots.insert(slot(&memory, 1)).unwrap();
        assert_eq!(slots.finish(old, Outcome::Done), Some(Used { head: 7, len: 513 }));
        assert_eq!(slots.finish(old, Outcome::Done), None);
        let new = slots.insert(slot(&memory, 1)).unwrap();
        assert_eq!(slots.finish(old, Outcome::Done), None);
        assert!(slots.is_full() && slots.insert(slot(&memory, 1)).is_none());
        assert!(slots.finish(new, Outcome::Done).is_some());
        assert_eq!(slots.finish(u64::MAX, Outcome::Done), None);
    }

    #[test]
    fn slot_keeps_its_memory_mapped_until_it_is_answered() {
        let memory = memory();
        let mut slots = Slots::new(1);
        let token = slots.insert(slot(&memory, 1)).unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        slots.finish(token, Outcome::Done);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
