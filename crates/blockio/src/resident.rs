//! Reads of what lies in the host's page cache, without a system call: a copy out of a mapping of the
//! file.
//!
//! # What is promised
//! - **It can't kill the process.** A page that can't be had when it is touched (the file was cut from
//!   outside, the device fails, the memory is broken) is a `SIGBUS`, which [`guard`] turns into a
//!   read that answers "not from here", and an end of the map.
//! - **It is what `pread` reads**: the mapping shows the very pages of the page cache that reads and
//!   writes go through. Only file systems of which that is known are mapped. A read that began after a
//!   write was complete sees it, from whatever thread. As with `pread`, what a write that runs at the
//!   same time leaves in its range is not said.
//! - **It does not wait for the disk, with the exception that follows.** Pages are read only where
//!   the kernel said in the same epoch of 1.1 s that they are resident (`mincore`). To ask each time
//!   takes as long as copying 4 KiB, and in all more than `pread` does. A page that the kernel gives up
//!   between is read from the disk by the copy (a major fault), as a plain `pread` would read it.
//!   Without need for memory nobody gives up a page that is mapped: `drop_caches` and `fadvise` pass
//!   it by; and reclaim passes by a page twice before it takes it. With need for memory it happens, and
//!   is noticed at the thread's first read in the next tick of the kernel's clock (1 to 10 ms), or
//!   after 32 reads ([`pace`]): then maps are off for the thread, for 0.1 s at first and up to 12.8 s
//!   as long as it goes on so. That is the bound: 32 pages of the disk, or one more than fit into a
//!   tick, and not again for 0.1 to 12.8 s.
//! - **It waits for a lock of a page, perhaps**, on the first read through the map of a page (of 16,
//!   mostly: that is a minor fault of 1 us) if a write or write-back of that page is being prepared at
//!   that moment. Pages that have been read through the map are read without a lock.
//! - **A page that was cut in its middle** shows zeros behind the cut, not an error, until the size is
//!   looked at: once an epoch. Behind that page reads fail at once.
//!
//! # What it costs
//! Address space as large as the file; page tables of 1/512 of what is touched, and 1/16384 for what
//! is known of it, until [`ResidentMap::forget`]. The pages count as the process's shared resident
//! memory. The map keeps the open file description, and so its locks, alive.
//!
//! Direct files, file systems whose mappings may show something else than reads do, and kernels that
//! don't tell the truth about residency (`mincore` says yes to everything where the caller could not
//! write to the file) have no map.

mod clock;
mod copy;
mod guard;
mod known;
mod pace;
#[cfg(test)]
mod tests;

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags},
};

use crate::{File, FileKind, IoVec};
use clock::{Epoch, Moment};
use guard::Guarded;
use known::{GROUP_PAGES, Known};
use pace::Pace;

const PAGE_SIZE: u64 = 4096;
/// So much of a map is forgotten at once, bytes: if all of it is mapped, that takes 0.6 ms.
const FORGOTTEN_AT_ONCE: usize = 16 << 20;
/// No larger file is mapped, bytes: half of what a process can address.
const FILE_BYTES_MAX: u64 = 1 << 46;

/// A mapping of a file for reads of what is resident. One is enough for all threads.
#[derive(Debug)]
pub struct ResidentMap {
    fd: OwnedFd,
    kind: FileKind,
    start: NonNull<u8>,
    /// The file's size.
    bytes: u64,
    /// What is mapped: the file, and a page beyond its end.
    mapped: usize,
    guarded: Guarded,
    known: Known,
    /// When the file was last seen to be as large as it was.
    whole: AtomicU32,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is only read, through raw pointers.
unsafe impl Send for ResidentMap {}
// SAFETY: as above.
unsafe impl Sync for ResidentMap {}

impl ResidentMap {
    /// Maps all of `file`, which must keep its size. `None` where reads from a map would not be sound
    /// or never succeed, see above.
    ///
    /// # Errors
    /// What the kernel says, such as that there is no address space left.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        let usable = cfg!(target_pointer_width = "64") && page_size() == Some(PAGE_SIZE);
        let bytes = file.size().map_err(|error| io::Error::from(error.io_error().kind()))?;
        let fits = (1..=FILE_BYTES_MAX).contains(&bytes);
        if !usable || !fits || file.is_direct() || !is_coherent(file)? || !guard::install() {
            return Ok(None);
        }
        let pages = bytes.div_ceil(PAGE_SIZE);
        let known = Known::new(pages)?;
        let fd = file.as_fd().try_clone_to_owned()?;
        let mapped = ((pages + 1) * PAGE_SIZE) as usize;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let start = match unsafe {
            rustix::mm::mmap(ptr::null_mut(), mapped, ProtFlags::READ, MapFlags::SHARED, &fd, 0)
        } {
            Ok(start) => start,
            Err(Errno::NODEV | Errno::ACCESS | Errno::PERM | Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // SAFETY: mapped above, and until this is dropped.
        let guarded = unsafe { Guarded::new(start, mapped) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let kind = file.kind();
        let map = Self { fd, kind, start, bytes, mapped, guarded, known, whole: AtomicU32::new(0) };
        // Nothing beyond the end is ever resident: who says it is, says so of everything.
        let truthful = map.look(pages..pages + 1) == Some(0);
        Ok(truthful.then_some(map))
    }

    /// Copies the bytes from `offset` on into `parts` if they are known to be resident; false: do it
    /// another way, nothing is promised about the content of `parts`. Always false for what lies
    /// beyond the file's end.
    ///
    /// # Safety
    /// `parts` must be valid for writes while this runs, and not lie in this map. Others may change
    /// the bytes meanwhile.
    #[inline]
    pub unsafe fn read(&self, offset: u64, parts: &[IoVec]) -> bool {
        let len = parts.iter().fold(0, |sum: u64, part| sum.saturating_add(part.len as u64));
        if !self.has(offset, len) {
            return false;
        }
        self.guarded.copy(|| {
            let mut from = self.address(offset);
            for part in parts {
                // SAFETY: all of it lies in the map; the part is valid (contract of this function).
                unsafe { copy::copy(from, part.base, part.len) };
                from = from.wrapping_add(part.len);
            }
        })
    }

    /// Whether so many bytes at `offset` are there and known to be resident.
    #[inline]
    pub(crate) fn has(&self, offset: u64, len: u64) -> bool {
        len <= self.bytes && offset <= self.bytes - len && self.is_resident(offset, len)
    }

    /// Has the beginning of what lies at `offset` brought near, for a [`read`](Self::read) that comes
    /// in a microsecond or so. Costs next to nothing, and has no effect where it is not resident.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        if offset < self.bytes {
            copy::prefetch(self.address(offset));
        }
    }

    /// Says that a range was deallocated, so that a read of it does not bring it back: on tmpfs a
    /// hole that is read through a map becomes a page.
    pub fn punched(&self, offset: u64, len: u64) {
        if len > 0 {
            let end = offset.saturating_add(len).min(self.bytes);
            self.known.forget(offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE));
        }
    }

    /// Gives back the memory that the map takes up; reads go on, and take it up again.
    pub fn forget(&self) {
        self.forget_while(|| true);
    }

    /// [`forget`](Self::forget) for as long as `goes_on` says so, asked about once a millisecond: a GiB takes 40.
    pub fn forget_while(&self, goes_on: impl Fn() -> bool) {
        self.known.forget_all();
        for at in (0..self.mapped).step_by(FORGOTTEN_AT_ONCE) {
            if !goes_on() {
                return;
            }
            let start = self.start.as_ptr().wrapping_add(at).cast();
            let len = FORGOTTEN_AT_ONCE.min(self.mapped - at);
            // SAFETY: a part of a mapping of ours that is only read: what is read again comes from the file.
            let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontNeed) };
        }
    }

    fn address(&self, offset: u64) -> *const u8 {
        self.start.as_ptr().wrapping_add(offset as usize)
    }

    #[inline]
    fn is_resident(&self, offset: u64, len: u64) -> bool {
        if self.guarded.is_broken() {
            return false;
        }
        let now = Moment::now();
        match pace::step(now) {
            Pace::Go => {}
            Pace::Pause => return false,
            Pace::Stalled => {
                self.known.forget_all();
                return false;
            }
        }
        let epoch = now.epoch();
        let pages = offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE);
        pace::is_fit(epoch)
            && self.is_whole(epoch)
            && self.known.all_resident(pages, epoch, |group| self.look_at_group(group))
    }

    /// Whether the file still has its size, looked at once an epoch; gives the map up if not.
    #[inline]
    fn is_whole(&self, epoch: Epoch) -> bool {
        self.whole.load(Ordering::Relaxed) == epoch.0 || self.look_at_size(epoch)
    }

    #[cold]
    fn look_at_size(&self, epoch: Epoch) -> bool {
        let whole = match self.kind {
            FileKind::Regular => {
                rustix::fs::fstat(&self.fd).is_ok_and(|stat| stat.st_size.max(0) as u64 >= self.bytes)
            }
            // Nobody cuts a device in the middle of a page.
            FileKind::BlockDevice => true,
        };
        if whole {
            self.whole.store(epoch.0, Ordering::Relaxed);
        } else {
            self.guarded.give_up();
        }
        whole
    }

    #[cold]
    fn look_at_group(&self, group: u64) -> Option<u32> {
        let first = group * GROUP_PAGES;
        self.look(first..(first + GROUP_PAGES).min(self.bytes.div_ceil(PAGE_SIZE)))
    }

    /// Which of at most 32 mapped pages are resident.
    fn look(&self, pages: std::ops::Range<u64>) -> Option<u32> {
        let count = pages.end.checked_sub(pages.start).filter(|count| *count <= GROUP_PAGES)?;
        let mut answer = [0u8; GROUP_PAGES as usize];
        let start = self.address(pages.start * PAGE_SIZE).cast_mut().cast::<c_void>();
        // SAFETY: the pages are mapped; there is a byte of room for each.
        let outcome = unsafe { libc::mincore(start, (count * PAGE_SIZE) as usize, answer.as_mut_ptr()) };
        let found = answer.iter().rev().fold(0, |bits, page| bits << 1 | u32::from(page & 1));
        (outcome == 0).then_some(found)
    }
}

impl Drop for ResidentMap {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nobody borrows the map any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

fn page_size() -> Option<u64> {
    // SAFETY: only asks.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
}

/// Whether mappings of the file show what reads of it show, and `mincore` what they need.
fn is_coherent(file: &File) -> io::Result<bool> {
    const COHERENT: [u64; 5] = [
        0xef53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683e, // btrfs
        0xf2f5_2010, // f2fs
        0x0102_1994, // tmpfs
    ];
    Ok(match file.kind() {
        FileKind::BlockDevice => true,
        FileKind::Regular => COHERENT.contains(&(rustix::fs::fstatfs(file)?.f_type as u64)),
    })
}
