//! A word for each group of 32 pages (128 KiB) of a file, so that it is read and replaced as a whole. The words are
//! anonymous memory, which takes up room where it was written only.

use std::{
    io,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Pages of a group.
pub(super) const GROUP_PAGES: u64 = 32;

/// A word for each group of pages; 0 at first.
#[derive(Debug)]
pub(super) struct Words {
    first: NonNull<AtomicU64>,
    groups: usize,
}

// SAFETY: the memory belongs to the process, not to a thread, and holds only atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// For a file of `pages` pages.
    ///
    /// # Errors
    /// If there is no address space.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let groups = usize::try_from(pages.div_ceil(GROUP_PAGES)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        let bytes = groups.max(1) * size_of::<AtomicU64>();
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let address = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }?;
        let first = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { first, groups: groups.max(1) })
    }

    /// The word of a group; `None` beyond the file's end.
    #[inline]
    pub(super) fn of_group(&self, group: u64) -> Option<&AtomicU64> {
        self.all().get(group as usize)
    }

    fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds as many aligned words, lives as long as `self`, and is only ever
        // seen as atomics (every bit pattern is valid).
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.groups) }
    }

    fn bytes(&self) -> usize {
        self.groups * size_of::<AtomicU64>()
    }

    /// Sets the words of all groups that `pages` touch to 0.
    pub(super) fn clear(&self, pages: Range<u64>) {
        let groups = pages.start / GROUP_PAGES..pages.end.div_ceil(GROUP_PAGES);
        let words = self.all().get(groups.start as usize..(groups.end as usize).min(self.groups));
        words.unwrap_or_default().iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Sets all words to 0, and gives their memory back.
    pub(super) fn clear_all(&self) {
        // SAFETY: our own anonymous memory, which reads as zeros afterwards.
        let given =
            unsafe { rustix::mm::madvise(self.first.as_ptr().cast(), self.bytes(), Advice::LinuxDontNeed) };
        if given.is_err() {
            self.clear(0..u64::MAX);
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), self.bytes()) };
    }
}

/// `count` bits from bit `first` on, all within 32.
#[inline]
pub(super) fn bits(first: u64, count: u64) -> u32 {
    ((((1u64 << count.min(GROUP_PAGES)) - 1) << first) & u64::from(u32::MAX)) as u32
}
