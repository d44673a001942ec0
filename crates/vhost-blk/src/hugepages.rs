//! The guest's huge pages.
//!
//! Memory of a file in `hugetlbfs` (or a memfd with `MFD_HUGETLB`) is mapped in its own pages whatever
//! we do. Shared memory in normal files is another matter: where the host's policy is `advise`
//! (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`), pages that are first touched through our mapping
//! would be small ones, for the guest too. VMMs ask for huge ones, so we do.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::request::Memory;

/// Asks for huge pages in all of `memory`, in vain where there can't be any.
pub(crate) fn advise(memory: &Memory) {
    for region in memory.iter() {
        let Ok(len) = usize::try_from(region.len()) else { continue };
        let address = region.as_ptr().cast();
        // SAFETY: the mapping is `region`'s, and this advice changes nothing of what is read or written.
        let result = unsafe { rustix::mm::madvise(address, len, rustix::mm::Advice::LinuxHugepage) };
        if let Err(error) = result {
            // Such as: it has huge pages of its own, or the kernel has none.
            log::debug!("no huge pages in a region of the guest's memory: {error}");
        }
    }
}
