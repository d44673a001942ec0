//! Descriptor chains of a split virtqueue (virtio 1.2, 2.7.5 to 2.7.8), and the heads that the available ring has.
//!
//! The library's iterators do the same, and translate each address anew with all that a memory can be: that was a
//! third of what a cached read cost. A test compares the two, descriptor by descriptor.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::{guest::GuestRegions, request::Memory};

/// Size of a descriptor (2.7.5).
const DESCRIPTOR_LEN: u64 = 16;
/// `flags` and `idx` before the available ring's elements (2.7.6).
const AVAIL_HEADER_LEN: u64 = 4;

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// One descriptor, as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn from_bytes(bytes: [u8; DESCRIPTOR_LEN as usize]) -> Self {
        let all = u128::from_le_bytes(bytes);
        let part = |first: u32| (all >> first) as u64;
        Self {
            addr: GuestAddress(part(0)),
            len: part(64) as u32,
            flags: part(96) as u16,
            next: part(112) as u16,
        }
    }

    #[inline]
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether another one follows.
    pub(crate) fn has_next(&self) -> bool {
        self.has(NEXT)
    }

    /// Whether it is the device that writes the buffer.
    pub(crate) fn is_write_only(&self) -> bool {
        self.has(WRITE)
    }
}

/// Where chains are: a queue's descriptor table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    addr: u64,
    /// Descriptors in it.
    size: u16,
}

impl Table {
    /// Of `queue`.
    pub(crate) fn of(queue: &Queue) -> Self {
        Self { addr: queue.desc_table(), size: queue.size() }
    }

    /// Whether all of it is in `memory`.
    pub(crate) fn is_in(&self, memory: &Memory) -> bool {
        let len = usize::from(self.size) * DESCRIPTOR_LEN as usize;
        GuestMemoryBackend::check_range(memory, GuestAddress(self.addr), len)
    }

    /// The descriptor at `index`, if one may be there.
    #[inline(always)]
    fn descriptor(&self, memory: &GuestRegions, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = self.addr.checked_add(u64::from(index) * DESCRIPTOR_LEN)?;
        memory.read_array(GuestAddress(at)).map(Descriptor::from_bytes)
    }

    /// The chain that begins at descriptor `head`, if it is one of three, in this table or as a whole in an indirect one, of which only
    /// the second may be either the device's to read or to write: the first is to be read, the third to be written. `None`: it is another one.
    /// [`chain`](Self::chain) tells all of them, and takes longer.
    #[inline(always)]
    pub(crate) fn chain_of_three(&self, memory: &GuestRegions, head: u16) -> Option<[Descriptor; 3]> {
        let mut first = self.descriptor(memory, head)?;
        let mut table = *self;
        if first.flags == INDIRECT && u64::from(first.len) == 3 * DESCRIPTOR_LEN {
            table = Self { addr: first.addr.0, size: 3 };
            first = table.descriptor(memory, 0)?;
        }
        if first.flags != NEXT {
            return None;
        }
        let second = table.descriptor(memory, first.next)?;
        if second.flags & !WRITE != NEXT {
            return None;
        }
        let third = table.descriptor(memory, second.next)?;
        (third.flags == WRITE).then_some([first, second, third])
    }

    /// The chain that begins at descriptor `head`.
    pub(crate) fn chain<'a>(&self, memory: &'a GuestRegions, head: u16) -> Chain<'a> {
        Chain { memory, table: *self, next: head, left: self.size, bytes: 0, indirect: false }
    }
}

/// The descriptors of a chain, each as it is read. What the guest must not do ends it: a descriptor outside of its
/// table or of memory, more of them than the table has, a second indirect table or one that is not made of whole
/// descriptors, more than 4 GiB of buffers. Then the last descriptor that was found says that another one follows.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    memory: &'a GuestRegions,
    table: Table,
    next: u16,
    /// How many may still follow.
    left: u16,
    /// Bytes of all buffers so far.
    bytes: u32,
    indirect: bool,
}

impl Chain<'_> {
    /// The descriptor at `next`, if one may be there.
    #[inline]
    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 { None } else { self.table.descriptor(self.memory, self.next) }
    }

    /// Goes on in the table that `descriptor` names (2.7.5.3).
    #[cold]
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let len = u64::from(descriptor.len);
        if self.indirect || !len.is_multiple_of(DESCRIPTOR_LEN) {
            return None;
        }
        let size = u16::try_from(len / DESCRIPTOR_LEN).ok()?;
        self.table = Table { addr: descriptor.addr.0, size };
        (self.next, self.left, self.indirect) = (0, size, true);
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.has(INDIRECT) {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            if descriptor.has(INDIRECT) {
                return None;
            }
        }
        self.bytes = self.bytes.checked_add(descriptor.len)?;
        if descriptor.has_next() {
            self.next = descriptor.next;
            self.left -= 1;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}

/// The head at `index` of the available ring of `queue`. `None`: it is not in memory.
#[inline]
pub(crate) fn avail_head(queue: &Queue, memory: &GuestRegions, index: u16) -> Option<u16> {
    let place = u64::from(index.checked_rem(queue.size())?) * size_of::<u16>() as u64;
    let at = queue.avail_ring().checked_add(AVAIL_HEADER_LEN + place)?;
    memory.read_array(GuestAddress(at)).map(u16::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, mock::MockSplitQueue};
    use vm_memory::Bytes;

    use super::*;

    const SIZE: u16 = 16;
    const REGION: u64 = 0x8000;
    /// Tables that chains may be led to: in memory, across two regions, at the end, outside, where addresses end.
    const TABLES: [u64; 6] = [0x4000, 0x4008, REGION - 24, 2 * REGION - 40, 2 * REGION, u64::MAX - 20];

    /// A descriptor as a guest might write it, most often one of use.
    fn descriptors() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        let addr =
            prop_oneof![3 => 0u64..2 * REGION, 3 => prop::sample::select(&TABLES[..]), 1 => any::<u64>()];
        let len =
            prop_oneof![4 => 0u32..5000, 3 => (0u32..20).prop_map(|count| count * 16), 1 => any::<u32>()];
        let flags = prop_oneof![6 => Just(1u16), 2 => Just(3), 2 => Just(4), 1 => Just(5), 1 => Just(0), 1 => any::<u16>()];
        let next = prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()];
        (addr, len, flags, next)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Invariant 8: what is walked is exactly what the library walks, whatever the guest wrote.
        #[test]
        fn chain_of_any_descriptors_is_what_the_library_finds(
            table in prop::collection::vec(descriptors(), SIZE as usize),
            others in prop::collection::vec(descriptors(), 2 * TABLES.len()),
            heads in prop::collection::vec(prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()], 1..SIZE as usize),
        ) {
            let regions = [(GuestAddress(0), REGION as usize), (GuestAddress(REGION), REGION as usize)];
            let memory = Arc::new(Memory::from_ranges(&regions).unwrap());
            let ring = MockSplitQueue::new(memory.as_ref(), SIZE);
            let write = |at: u64, (addr, len, flags, next): (u64, u32, u16, u16)| {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                bytes[14..].copy_from_slice(&next.to_le_bytes());
                // As far as there is memory.
                for (at, byte) in (at..=u64::MAX).zip(bytes) {
                    let _ = memory.write_obj(byte, GuestAddress(at));
                }
            };
            for (table, pair) in TABLES.iter().zip(others.chunks(2)) {
                write(*table, pair[0]);
                write(table.saturating_add(16), pair[1]);
            }
            let mut queue: Queue = ring.create_queue().unwrap();
            for (index, descriptor) in table.into_iter().enumerate() {
                write(queue.desc_table() + index as u64 * 16, descriptor);
            }
            for (index, head) in heads.iter().enumerate() {
                ring.avail().ring().ref_at(index).unwrap().store(*head);
            }
            ring.avail().idx().store(heads.len() as u16);

            let mut mine = GuestRegions::default();
            mine.hold(&memory);
            let table = Table::of(&queue);
            let first = queue.next_avail();
            let found: Vec<u16> = (0..heads.len() as u16)
                .map(|n| avail_head(&queue, &mine, first.wrapping_add(n)).unwrap())
                .collect();
            prop_assert_eq!(&found, &heads);
            for chain in queue.iter(memory.as_ref()).unwrap() {
                let head = chain.head_index();
                let theirs: Vec<_> = chain
                    .map(|d| (d.addr(), d.len(), d.has_next(), d.is_write_only()))
                    .collect();
                let ours: Vec<_> = table
                    .chain(&mine, head)
                    .map(|d| (d.addr, d.len, d.has_next(), d.is_write_only()))
                    .collect();
                prop_assert_eq!(ours, theirs);
            }
        }
    }

    #[test]
    fn heads_of_a_ring_outside_of_memory_are_none() {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let mut regions = GuestRegions::default();
        regions.hold(&memory);
        let mut queue = Queue::new(8).unwrap();
        for (ring, index, found) in [(0x1000 - 6, 0, true), (0x1000 - 6, 1, false), (u64::MAX - 1, 0, false)]
        {
            queue.try_set_avail_ring_address(GuestAddress(ring)).unwrap();
            assert_eq!(avail_head(&queue, &regions, index).is_some(), found, "{ring:#x} {index}");
        }
    }
}
