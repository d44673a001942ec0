//! The used ring: publishing a batch of answers with one index update, and deciding about one
//! interrupt for several batches (virtio 1.2, 2.7.8 and 2.7.10).

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::{request::Memory, slots::Used};

/// Size of the flags and index fields before the elements of either ring.
const RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAIL_ELEMENT: u64 = 2;

/// Publishes `answers`, whose status and data are in guest memory already.
pub(crate) fn publish(queue: &mut Queue, memory: &Memory, answers: &[Used]) -> Result<(), GuestMemoryError> {
    let size = queue.size().max(1);
    let mut next = queue.next_used();
    // Translated once for all of them, unless the ring lies across two regions.
    let elements = usize::from(size) * USED_ELEMENT as usize;
    let ring = memory.get_slice(address(queue.used_ring(), RING_HEADER)?, elements).ok();
    for used in answers {
        let element = (u64::from(used.len) << 32 | u64::from(used.head)).to_le();
        let offset = u64::from(next % size) * USED_ELEMENT;
        match &ring {
            Some(ring) => ring.write_obj(element, offset as usize)?,
            None => memory.write_obj(element, address(queue.used_ring(), RING_HEADER + offset)?)?,
        }
        next = next.wrapping_add(1);
    }
    // Release: whoever sees the index sees elements, status bytes and data.
    memory.store(next.to_le(), address(queue.used_ring(), 2)?, Ordering::Release)?;
    queue.set_next_used(next);
    Ok(())
}

/// Whether the guest wants an interrupt for what was published since the used index was `before`.
pub(crate) fn wants_interrupt(queue: &Queue, memory: &Memory, before: u16) -> Result<bool, GuestMemoryError> {
    let size = queue.size().max(1);
    // The index must be visible before the guest's wish is read, or both sides could miss the other.
    fence(Ordering::SeqCst);
    if queue.event_idx_enabled() {
        let at = address(queue.avail_ring(), RING_HEADER + u64::from(size) * AVAIL_ELEMENT)?;
        let event = u16::from_le(memory.load(at, Ordering::Relaxed)?);
        Ok(crossed(event, before, queue.next_used()))
    } else {
        let flags = u16::from_le(memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

/// Asks the guest for no more kicks until they are enabled again, if the ring has an event index (else taking
/// requests does so).
pub(crate) fn want_no_kick(queue: &Queue, memory: &Memory) -> Result<(), GuestMemoryError> {
    if !queue.event_idx_enabled() {
        return Ok(());
    }
    // An index that the guest has passed. It gets there again after 65,536 requests: one kick too many.
    let event = queue.next_avail().wrapping_sub(1);
    let offset = RING_HEADER + u64::from(queue.size()) * USED_ELEMENT;
    memory.store(event.to_le(), address(queue.used_ring(), offset)?, Ordering::Relaxed)
}

/// The index up to which the guest has made buffers available.
pub(crate) fn avail_index(memory: &Memory, avail_ring: u64) -> Result<u16, GuestMemoryError> {
    memory.load(address(avail_ring, 2)?, Ordering::Acquire).map(u16::from_le)
}

/// The index up to which the ring's answers are published.
pub(crate) fn used_index(memory: &Memory, used_ring: u64) -> Result<u16, GuestMemoryError> {
    memory.load(address(used_ring, 2)?, Ordering::Acquire).map(u16::from_le)
}

/// The head in the used element at `index`.
pub(crate) fn used_head(memory: &Memory, queue: &Queue, index: u16) -> Result<u32, GuestMemoryError> {
    let place = u64::from(index % queue.size().max(1));
    let at = address(queue.used_ring(), RING_HEADER + place * USED_ELEMENT)?;
    memory.read_obj::<u32>(at).map(u32::from_le)
}

/// Whether the used index passed `event` when it went from `before` to `after`.
fn crossed(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

fn address(ring: u64, offset: u64) -> Result<GuestAddress, GuestMemoryError> {
    ring.checked_add(offset).map(GuestAddress).ok_or(GuestMemoryError::GuestAddressOverflow)
}

/// What polling looks at without the ring's lock.
pub(crate) struct Watch {
    pub(crate) memory: Arc<Memory>,
    pub(crate) avail_ring: u64,
    pub(crate) next_avail: u16,
}

impl Watch {
    /// Requests that the guest has made available and that were not taken; none if that can't be read.
    pub(crate) fn left(&self) -> u16 {
        let available = avail_index(&self.memory, self.avail_ring);
        available.map_or(0, |index| index.wrapping_sub(self.next_avail))
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::{QueueT, mock::MockSplitQueue};

    use super::*;

    const SIZE: u16 = 8;

    /// Publishes, and tells whether the guest wants an interrupt for it.
    fn publish_and_ask(
        queue: &mut Queue,
        memory: &Memory,
        answers: &[Used],
    ) -> Result<bool, GuestMemoryError> {
        let before = queue.next_used();
        publish(queue, memory, answers)?;
        wants_interrupt(queue, memory, before)
    }

    fn used(head: u16) -> Used {
        Used { head, len: 1 }
    }

    #[test]
    fn publish_of_a_batch_over_the_rings_end_writes_each_element_in_its_place() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, SIZE);
        let mut queue: Queue = ring.create_queue().unwrap();
        queue.set_next_used(u16::MAX - 1);
        assert!(publish_and_ask(&mut queue, &memory, &[used(1), used(2), used(3)]).unwrap());
        let head = |at: usize| ring.used().ring().ref_at(at).unwrap().load().id();
        assert_eq!((head(6), head(7), head(0)), (1, 2, 3));
        assert_eq!((u16::from_le(ring.used().idx().load()), queue.next_used()), (1, 1));
    }

    #[test]
    fn publish_to_a_guest_that_wants_no_interrupt_asks_for_none() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, SIZE);
        let mut queue: Queue = ring.create_queue().unwrap();
        memory.write_obj(1u16, ring.avail_addr()).unwrap();
        assert!(!publish_and_ask(&mut queue, &memory, &[used(0)]).unwrap());
    }

    #[test]
    fn publish_with_event_index_interrupts_only_when_the_event_is_passed() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(0x1000)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
        queue.set_event_idx(true);
        let event_at = 0x1000 + 4 + u64::from(SIZE) * 2;
        memory.write_obj(2u16, GuestAddress(event_at)).unwrap();
        assert!(!publish_and_ask(&mut queue, &memory, &[used(0), used(1)]).unwrap());
        assert!(publish_and_ask(&mut queue, &memory, &[used(2), used(3)]).unwrap());
        assert!(!publish_and_ask(&mut queue, &memory, &[used(4)]).unwrap());
    }

    #[test]
    fn ring_that_wants_no_kick_gets_none_until_kicks_are_enabled() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(0x1000)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
        queue.set_event_idx(true);
        let event = || memory.read_obj::<u16>(GuestAddress(0x2000 + 4 + u64::from(SIZE) * 8)).unwrap();
        for next in [0, 5, u16::MAX] {
            queue.set_next_avail(next);
            queue.enable_notification(&memory).unwrap();
            // As a guest asks itself when it has made one request, or a few.
            assert!(crossed(event(), next, next.wrapping_add(1)));
            want_no_kick(&queue, &memory).unwrap();
            assert!((1..=SIZE).all(|count| !crossed(event(), next, next.wrapping_add(count))));
        }
    }

    #[test]
    fn event_is_crossed_exactly_when_an_element_has_its_index() {
        for before in [0, 7, u16::MAX - 3] {
            for count in 0..8u16 {
                for distance in 0..=u16::MAX {
                    let event = before.wrapping_add(distance);
                    let got = crossed(event, before, before.wrapping_add(count));
                    assert_eq!(got, distance < count, "{event} {before} {count}");
                }
            }
        }
    }

    #[test]
    fn publish_to_a_ring_across_two_regions_writes_into_both() {
        let regions = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = Memory::from_ranges(&regions).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_used_ring_address(GuestAddress(0x1000 - 16)).unwrap();
        assert!(publish_and_ask(&mut queue, &memory, &[used(1), used(2), used(3)]).unwrap());
        let heads = [0u64, 8, 16].map(|at| memory.read_obj::<u32>(GuestAddress(0x1000 - 12 + at)).unwrap());
        assert_eq!(heads, [1, 2, 3]);
    }

    #[test]
    fn publish_to_a_ring_outside_of_memory_is_an_error() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_used_ring_address(GuestAddress(0x1000 - 8)).unwrap();
        assert!(publish_and_ask(&mut queue, &memory, &[used(0), used(1)]).is_err());
        queue.try_set_used_ring_address(GuestAddress(!3)).unwrap();
        assert!(publish_and_ask(&mut queue, &memory, &[used(0)]).is_err());
    }
}
