//! The memory that is shared with the backend, cut into slots. All of the package's `unsafe` code
//! is in this directory.

use blkio::{Blkio, MemoryRegion};

/// Slots of equal size in one region.
#[derive(Debug)]
pub(super) struct Memory {
    base: *mut u8,
    slot_len: usize,
    slots: usize,
}

impl Memory {
    /// Allocates and maps a region; the device must have been started.
    pub(super) fn map(blkio: &mut Blkio, slots: usize, slot_len: usize) -> blkio::Result<Self> {
        let len = (slots * slot_len).next_multiple_of(2 << 20);
        let region: MemoryRegion = blkio.alloc_mem_region(len)?;
        blkio.map_mem_region(&region)?;
        Ok(Self { base: region.addr as *mut u8, slot_len, slots })
    }

    /// Bytes of a slot.
    pub(super) fn slot_len(&self) -> usize {
        self.slot_len
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// The address of the first of `count` slots, one behind the other.
    pub(super) fn several(&self, first: usize, count: usize) -> *mut u8 {
        assert!(first + count <= self.slots);
        self.address(first, 0, self.slot_len)
    }

    /// The address of byte `skip` of `slot`, for `len` bytes.
    pub(super) fn address(&self, slot: usize, skip: usize, len: usize) -> *mut u8 {
        assert!(slot < self.slots && skip + len <= self.slot_len);
        // SAFETY: the offset lies inside the region, as was just checked.
        unsafe { self.base.add(slot * self.slot_len + skip) }
    }

    /// `len` bytes of `slot` from `skip` on. No request may be using the slot.
    pub(super) fn bytes(&self, slot: usize, skip: usize, len: usize) -> &[u8] {
        // SAFETY: inside the region (checked by `address`), which lives as long as the `Blkio` that
        // owns it and this value; the backend leaves memory alone that no request refers to.
        unsafe { std::slice::from_raw_parts(self.address(slot, skip, len), len) }
    }

    /// As [`bytes`](Self::bytes), to be written.
    pub(super) fn bytes_mut(&mut self, slot: usize, skip: usize, len: usize) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` excludes other references from this process.
        unsafe { std::slice::from_raw_parts_mut(self.address(slot, skip, len), len) }
    }
}
