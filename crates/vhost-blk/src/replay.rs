//! Descriptor chains by their heads, for requests that are executed again.
//!
//! The available ring may have forgotten them: a slot of it is the guest's again once the request
//! was taken. The library makes chains of an available ring only, so it gets one that lists just
//! these heads, in memory of our own beyond the guest's.

use std::{sync::Arc, sync::atomic::Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::{disk::AnyError, request::Memory};

const PAGE: u64 = 4096;

/// The chains of `queue` that begin with `heads`, in this order; at most as many as its size.
pub(crate) fn chains(
    queue: &Queue,
    memory: &Memory,
    heads: &[u16],
) -> Result<Vec<DescriptorChain<Arc<Memory>>>, AnyError> {
    let beyond = memory.last_addr().0.checked_next_multiple_of(PAGE).and_then(|end| end.checked_add(PAGE));
    let ring = GuestAddress(beyond.ok_or("the guest's memory ends where addresses do")?);
    let len = (4 + 2 * u64::from(queue.size())).next_multiple_of(PAGE) as usize;
    let region = GuestRegionMmap::from_range(ring, len, None)?;
    let memory = Arc::new(memory.insert_region(Arc::new(region))?);
    for (at, head) in (ring.0 + 4..).step_by(2).zip(heads.iter().take(queue.size().into())) {
        memory.write_obj(head.to_le(), GuestAddress(at))?;
    }
    let count = heads.len().min(queue.size().into()) as u16;
    memory.store(count.to_le(), GuestAddress(ring.0 + 2), Ordering::Release)?;
    let mut listed = Queue::new(queue.max_size())?;
    listed.try_set_size(queue.size())?;
    listed.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
    listed.try_set_avail_ring_address(ring)?;
    listed.set_ready(true);
    Ok(listed.iter(memory)?.collect())
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };

    use super::*;

    #[test]
    fn chains_of_heads_have_their_descriptors_whatever_the_available_ring_says() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 8);
        let descriptor =
            |addr, flags: u32, next| RawDescriptor::from(Descriptor::new(addr, 16, flags as u16, next));
        ring.desc_table().store(5, descriptor(0x5000, VRING_DESC_F_NEXT, 1)).unwrap();
        ring.desc_table().store(1, descriptor(0x1000, 0, 0)).unwrap();
        ring.desc_table().store(2, descriptor(0x2000, 0, 0)).unwrap();
        let queue: Queue = ring.create_queue().unwrap();
        let addresses: Vec<Vec<u64>> = chains(&queue, &memory, &[5, 2])
            .unwrap()
            .into_iter()
            .map(|chain| chain.map(|descriptor| descriptor.addr().0).collect())
            .collect();
        assert_eq!(addresses, [vec![0x5000, 0x1000], vec![0x2000]]);
        let mut queue = queue;
        assert_eq!(queue.iter(&memory).unwrap().count(), 0);
    }

    #[test]
    fn chains_of_memory_up_to_the_last_address_are_an_error() {
        let memory = Memory::from_ranges(&[(GuestAddress(u64::MAX - 0x1fff), 0x1000)]).unwrap();
        let mut queue = Queue::new(8).unwrap();
        queue.set_ready(true);
        assert!(chains(&queue, &memory, &[0]).is_err());
    }
}
