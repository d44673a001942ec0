//! A guest's memory as the data path looks at it: a short list of regions in the host's address space.
//!
//! The library translates each address anew, with all that its regions can be; a request has half a dozen
//! of them, and that was half of its cost. The list is made anew when the frontend has replaced the memory.

use std::{
    any::Any,
    cell::Cell,
    ptr::NonNull,
    sync::{Arc, Weak},
};

use blockio::IoVec;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::request::Memory;

/// An integer anywhere.
#[repr(C, packed)]
struct Unaligned<T>(T);

/// A region of guest memory that is mapped.
#[derive(Clone, Copy, Debug)]
struct Region {
    /// Guest address of its first byte.
    start: u64,
    /// Bytes.
    len: u64,
    host: NonNull<u8>,
}

/// Where the regions of a memory are mapped. Addresses are only looked up while it is held.
#[derive(Debug, Default)]
pub(crate) struct GuestRegions {
    regions: Vec<Region>,
    /// Of which memory. Keeps its place from being used again, not the memory mapped.
    of: Weak<Memory>,
    held: Option<Arc<dyn Any + Send + Sync>>,
    /// The region that was found last: most likely the next one too.
    last: Cell<usize>,
}

// SAFETY: the pointers are only followed while `held` keeps what they point to mapped, from whatever thread.
unsafe impl Send for GuestRegions {}

impl GuestRegions {
    /// Looks addresses up in `memory` from now on, and keeps it mapped.
    pub(crate) fn hold(&mut self, memory: &Arc<Memory>) {
        if self.of.as_ptr() != Arc::as_ptr(memory) {
            self.regions.clear();
            self.regions.extend(memory.iter().filter_map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some(Region {
                    start: region.start_addr().raw_value(),
                    len: region.len(),
                    host: NonNull::new(host)?,
                })
            }));
            self.of = Arc::downgrade(memory);
            self.last.set(0);
        }
        self.held = Some(memory.clone());
    }

    /// Lets go of the memory: nothing is found any more.
    pub(crate) fn release(&mut self) {
        self.held = None;
    }

    /// What keeps that mapped which is found.
    pub(crate) fn held(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.held.as_ref()
    }

    /// The memory from `address` on, as far as its region goes, at most `len` bytes. `None`: that address is no
    /// memory.
    #[inline]
    pub(crate) fn find(&self, address: GuestAddress, len: usize) -> Option<IoVec> {
        self.held.as_ref()?;
        let address = address.raw_value();
        let within = |region: &Region| {
            let offset = address.wrapping_sub(region.start);
            (offset < region.len).then(|| IoVec {
                base: region.host.as_ptr().wrapping_add(offset as usize),
                len: len.min((region.len - offset) as usize),
            })
        };
        if let Some(found) = self.regions.get(self.last.get()).and_then(within) {
            return Some(found);
        }
        let (index, found) =
            self.regions.iter().enumerate().find_map(|(index, region)| Some((index, within(region)?)))?;
        self.last.set(index);
        Some(found)
    }

    /// The `N` bytes at `address`, if all of them are memory. Each is read once: a guest that changes them meanwhile can't have one thing
    /// checked and another one used.
    #[inline(always)]
    pub(crate) fn read_array<const N: usize>(&self, address: GuestAddress) -> Option<[u8; N]> {
        let piece = self.find(address, N)?;
        if piece.len < N {
            return self.read_array_of_several(address);
        }
        let mut bytes = [0; N];
        let (words, rest) = bytes.as_chunks_mut();
        let mut from = piece.base;
        for word in words {
            // SAFETY: the piece has `N` bytes, of which these come next, and is mapped as long as `held`; any bytes are a word, which need
            // not be aligned.
            *word = unsafe { from.cast::<Unaligned<u64>>().read_volatile() }.0.to_ne_bytes();
            from = from.wrapping_add(size_of::<u64>());
        }
        let (words, rest) = rest.as_chunks_mut();
        for word in words {
            // SAFETY: as above.
            *word = unsafe { from.cast::<Unaligned<u16>>().read_volatile() }.0.to_ne_bytes();
            from = from.wrapping_add(size_of::<u16>());
        }
        for byte in rest {
            // SAFETY: as above.
            *byte = unsafe { from.read_volatile() };
            from = from.wrapping_add(1);
        }
        Some(bytes)
    }

    /// [`read_array`](Self::read_array) where regions meet.
    #[cold]
    fn read_array_of_several<const N: usize>(&self, address: GuestAddress) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes).then_some(bytes)
    }

    /// Copies what is at `address` into `to`; whether all of it is memory.
    pub(crate) fn read(&self, address: GuestAddress, to: &mut [u8]) -> bool {
        self.each(address, to.len(), |done, piece| {
            if let Some(to) = to.get_mut(done..done + piece.len) {
                // SAFETY: the piece is mapped as long as `held`; `to` is as long, and ours.
                unsafe { std::ptr::copy_nonoverlapping(piece.base, to.as_mut_ptr(), piece.len) };
            }
        })
    }

    /// Copies `from` to `address`; whether all of it is memory.
    pub(crate) fn write(&self, address: GuestAddress, from: &[u8]) -> bool {
        self.each(address, from.len(), |done, piece| {
            if let Some(from) = from.get(done..done + piece.len) {
                // SAFETY: the piece is mapped as long as `held`; `from` is as long.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), piece.base, piece.len) };
            }
        })
    }

    /// Every piece of the `len` bytes from `address` on, in order, with how many bytes went before it; whether all
    /// of them are memory.
    pub(crate) fn each(&self, address: GuestAddress, len: usize, mut take: impl FnMut(usize, IoVec)) -> bool {
        let mut done = 0;
        while done < len {
            let Some(piece) =
                address.checked_add(done as u64).and_then(|address| self.find(address, len - done))
            else {
                return false;
            };
            take(done, piece);
            done += piece.len;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    fn memory() -> Arc<Memory> {
        let regions =
            [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x800), (GuestAddress(0x4000), 0x1000)];
        Arc::new(Memory::from_ranges(&regions).unwrap())
    }

    proptest! {
        /// Invariant 8: what is found is exactly what the library finds.
        #[test]
        fn regions_find_what_the_library_finds(
            lookups in prop::collection::vec((0u64..0x6000, 0usize..0x1800), 1..20),
            far in any::<u64>(),
        ) {
            let memory = memory();
            let mut regions = GuestRegions::default();
            regions.hold(&memory);
            for (address, len) in lookups.into_iter().chain([(far, 8), (u64::MAX, 2)]) {
                let address = GuestAddress(address);
                let mut mine = vec![0; len];
                let mut theirs = vec![0; len];
                let data: Vec<u8> = (0..len).map(|n| n as u8 ^ address.0 as u8).collect();
                let whole = GuestMemoryBackend::check_range(memory.as_ref(), address, len) || len == 0;
                prop_assert_eq!(regions.write(address, &data), whole);
                prop_assert_eq!(regions.read(address, &mut mine), whole);
                if whole {
                    memory.read_slice(&mut theirs, address).unwrap();
                    prop_assert!(mine == data && theirs == data);
                }
            }
        }
    }

    #[test]
    fn regions_of_replaced_memory_are_those_of_the_new_one() {
        let mut regions = GuestRegions::default();
        let old = memory();
        regions.hold(&old);
        assert!(regions.write(GuestAddress(0x4000), &[1]));
        regions.release();
        assert!(regions.find(GuestAddress(0x4000), 1).is_none());
        assert_eq!(Arc::strong_count(&old), 1);
        drop(old);
        let new = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        regions.hold(&new);
        assert!(regions.find(GuestAddress(0x4000), 1).is_none());
        assert!(regions.find(GuestAddress(0xfff), 2).is_some_and(|found| found.len == 1));
    }
}
