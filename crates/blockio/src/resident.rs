//! Reads of what lies in the host's page cache, without a system call: a copy out of a mapping of the
//! file. On tmpfs and ext4 writes too: a copy into it.
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
//! - **Writes are what `pwrite` writes**, under the same conditions; nor does a kill [cut](crate::Redo) them in the middle of a
//!   sector.
//!   - On tmpfs pages are all that a file is. Writes through a map leave the file's times alone; so the first one after it was
//!     made or [forgotten](ResidentMap::forget) is refused. So are those into 128 KiB that have hardly been written: to have
//!     pages mapped takes longer than one `pwrite`.
//!   - On ext4 the first write of a page through a map, and the first after it was written back, tells the file system,
//!     which notes the time, and may wait as a `pwrite` may: for the journal, or because the host writes
//!     more than its storage takes. What can't be written back is told whoever syncs the file, however it was written. Only what is
//!     written [again and again](hot) is written through the map. There is room for it on the storage: it was
//!     written by `pwrite` before, which says so if there is none.
//!
//! # What it costs
//! Address space as large as the file; page tables of 1/512 of what is touched, and 1/16384 for what
//! is known of it, until [`ResidentMap::forget`]. The pages count as the process's shared resident
//! memory. The map keeps the open file description, and so its locks, alive.
//!
//! Direct files, file systems whose mappings may show something else than reads do, and kernels that
//! don't tell the truth about residency (`mincore` says yes to everything where the caller could not
//! write to the file) have no map.

mod copy;
mod hot;
mod known;
mod pace;
mod race;
#[cfg(test)]
mod tests;
mod words;

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::{self, NonNull},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags},
};

use crate::{
    File, FileKind, IoVec, Redo,
    clock::{Epoch, Moment},
    coherence::{Kept, PAGE_SIZE, kept, pages_are_as_expected},
    guard::{self, Guarded},
};
pub(crate) use copy::{copy as read_copy, end_stores, prefetch, store};
use hot::{Hot, Prepared};
use known::Known;
use pace::Pace;
#[cfg(test)]
pub(crate) use pace::major_faults;
use words::GROUP_PAGES;

/// Pages that the kernel maps at a fault, if they are resident (`fault_around_bytes`, unless it was changed).
const AROUND_PAGES: u64 = 16;
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
    writes: Option<Writes>,
    known: Known,
    /// When the file was last seen to be as large as it was.
    whole: AtomicU32,
}

/// How a map is written.
#[derive(Debug)]
struct Writes {
    redo: Arc<Redo>,
    what: Written,
}

/// What is written through a map.
#[derive(Debug)]
enum Written {
    /// Everything, of a file that is nothing but pages.
    Memory {
        /// Whether the file's times tell of a write, since the map was made or forgotten.
        dated: AtomicBool,
    },
    /// What pays, of a file on a disk.
    Disk(Hot),
}

// SAFETY: the mapping belongs to the process, not to a thread; it is read and written through raw pointers only.
unsafe impl Send for ResidentMap {}
// SAFETY: as above.
unsafe impl Sync for ResidentMap {}

impl ResidentMap {
    /// Maps all of `file`, which must keep its size; with a `redo`, which must be of this file alone, for writes too.
    /// `None` where reads from a map would not be sound or never succeed, see above.
    ///
    /// # Errors
    /// What the kernel says, such as that there is no address space left.
    pub fn new(file: &File, redo: Option<&Arc<Redo>>) -> io::Result<Option<Self>> {
        let bytes = file.size().map_err(|error| io::Error::from(error.io_error().kind()))?;
        let fits = (1..=FILE_BYTES_MAX).contains(&bytes);
        if !pages_are_as_expected() || !fits || file.is_direct() || !guard::install() {
            return Ok(None);
        }
        let kept = match file.kind() {
            FileKind::BlockDevice => Kept::Elsewhere,
            FileKind::Regular => match kept(file)? {
                Some(kept) => kept,
                None => return Ok(None),
            },
        };
        let pages = bytes.div_ceil(PAGE_SIZE);
        let known = Known::new(pages)?;
        let fd = file.as_fd().try_clone_to_owned()?;
        let mapped = ((pages + 1) * PAGE_SIZE) as usize;
        let map = |access| {
            // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
            match unsafe { rustix::mm::mmap(ptr::null_mut(), mapped, access, MapFlags::SHARED, &fd, 0) } {
                Ok(start) => Ok(Some(start)),
                Err(Errno::NODEV | Errno::ACCESS | Errno::PERM | Errno::OPNOTSUPP) => Ok(None),
                Err(errno) => Err(errno),
            }
        };
        let (read, both) = (ProtFlags::READ, ProtFlags::READ | ProtFlags::WRITE);
        let what = match kept {
            Kept::InMemory => Some(Written::Memory { dated: AtomicBool::new(false) }),
            Kept::OnExt4 => Some(Written::Disk(Hot::new(pages)?)),
            Kept::OnXfs | Kept::Elsewhere => None,
        };
        let writes = what.zip(redo).map(|(what, redo)| Writes { redo: Arc::clone(redo), what });
        let for_writes = if writes.is_some() { map(both)? } else { None };
        let (start, access, writes) = match for_writes {
            Some(start) => (start, both, writes),
            // Of a file that is open for reads only, or sealed, that is all that can be had.
            None => match map(read)? {
                Some(start) => (start, read, None),
                None => return Ok(None),
            },
        };
        // SAFETY: mapped above, and until this is dropped.
        let guarded = unsafe { Guarded::new(start, mapped, access) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (kind, whole) = (file.kind(), AtomicU32::new(0));
        let map = Self { fd, kind, start, bytes, mapped, guarded, writes, known, whole };
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
        if !self.has(offset, len_of(parts)) {
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

    /// Copies `parts` to the bytes from `offset` on, if those are known to be resident and the map is for writes of them;
    /// false: do it another way, now, some of it may be written. Always false for what lies beyond the file's end.
    /// On a disk this may wait as `pwrite` may.
    ///
    /// # Safety
    /// `parts` must be valid for reads while this runs, and not lie in this map. Others may change the bytes
    /// meanwhile.
    #[inline]
    pub unsafe fn write(&self, offset: u64, parts: &[IoVec]) -> bool {
        let Some(Writes { redo, what }) = &self.writes else { return false };
        let len = len_of(parts);
        let ready = match what {
            Written::Memory { dated } => is_dated(dated) && self.is_there(offset, len, true),
            Written::Disk(hot) => self.is_hot(hot, offset, len) && self.is_there(offset, len, false),
        };
        if !ready {
            return false;
        }
        let Some(mut slot) = redo.slot() else { return false };
        self.guarded.copy(|| {
            // SAFETY: all of it lies in the map, which is for writes; the parts are valid (contract of this function).
            unsafe { slot.write(offset, self.address(offset).cast_mut(), parts) };
        })
    }

    /// Whether it pays to write so many bytes at `offset` through the map, and their pages are ready for it.
    #[inline]
    fn is_hot(&self, hot: &Hot, offset: u64, len: u64) -> bool {
        len <= self.bytes && offset <= self.bytes - len && {
            let pages = offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE);
            hot.write(pages, Moment::now().spell(), |pages| self.prepare(pages))
        }
    }

    /// Has the file system told that pages, which have a place on the disk, are about to be written, if they are resident.
    #[cold]
    fn prepare(&self, pages: std::ops::Range<u64>) -> Prepared {
        let (offset, len) = (pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
        if !self.is_there(offset, len, false) {
            return Prepared::NotNow;
        }
        let start = self.address(offset).cast_mut().cast::<c_void>();
        // SAFETY: within the map. The pages' content stays as it is; what can't be had is an error here, not a signal.
        match unsafe { rustix::mm::madvise(start, len as usize, Advice::LinuxPopulateWrite) } {
            Ok(()) => Prepared::Ready,
            // Linux before 5.14.
            Err(Errno::INVAL) => Prepared::Never,
            Err(_) => Prepared::NotNow,
        }
    }

    /// Whether so many bytes at `offset` are there and known to be resident.
    #[inline]
    pub(crate) fn has(&self, offset: u64, len: u64) -> bool {
        self.is_there(offset, len, false)
    }

    #[inline]
    fn is_there(&self, offset: u64, len: u64, thrift: bool) -> bool {
        len <= self.bytes && offset <= self.bytes - len && self.is_resident(offset, len, thrift)
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
            let pages = offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE);
            self.known.forget(pages.clone());
            if let Some(hot) = self.hot() {
                hot.forget(pages);
            }
        }
    }

    /// Says that nobody who has written will write again. On a disk the file system is told of a page with those around it;
    /// what somebody else does to those, such as deallocating them, must not be undone by that.
    pub fn forget_writes(&self) {
        if let Some(hot) = self.hot() {
            hot.forget_all();
        }
    }

    fn hot(&self) -> Option<&Hot> {
        match &self.writes {
            Some(Writes { what: Written::Disk(hot), .. }) => Some(hot),
            _ => None,
        }
    }

    /// Gives back the memory that the map takes up; reads go on, and take it up again.
    pub fn forget(&self) {
        self.forget_while(|| true);
    }

    /// [`forget`](Self::forget) for as long as `goes_on` says so, asked about once a millisecond: a GiB takes 40.
    pub fn forget_while(&self, goes_on: impl Fn() -> bool) {
        self.date_next_write();
        self.forget_writes();
        self.known.forget_all();
        for at in (0..self.mapped).step_by(FORGOTTEN_AT_ONCE) {
            if !goes_on() {
                return;
            }
            let len = FORGOTTEN_AT_ONCE.min(self.mapped - at);
            // SAFETY: a part of a shared mapping of ours: what was written through it is in the file's pages, and what is
            // touched again comes from there.
            let _ = unsafe {
                rustix::mm::madvise(self.start.as_ptr().wrapping_add(at).cast(), len, Advice::LinuxDontNeed)
            };
        }
    }

    /// Has the next write refused where those through the map leave the file's times alone, so that they tell of one from
    /// now on.
    pub fn date_next_write(&self) {
        if let Some(Writes { what: Written::Memory { dated }, .. }) = &self.writes {
            dated.store(false, Ordering::Relaxed);
        }
    }

    fn address(&self, offset: u64) -> *const u8 {
        self.start.as_ptr().wrapping_add(offset as usize)
    }

    #[inline]
    fn is_resident(&self, offset: u64, len: u64, thrift: bool) -> bool {
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
        guard::is_fit(epoch)
            && self.is_whole(epoch)
            && self
                .known
                .all_resident(pages, epoch, thrift, |group, wanted| self.look_at_group(group, wanted))
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
    fn look_at_group(&self, group: u64, wanted: u32) -> Option<u32> {
        let first = group * GROUP_PAGES;
        let found = self.look(first..(first + GROUP_PAGES).min(self.bytes.div_ceil(PAGE_SIZE)))?;
        if let Some(Writes { what: Written::Memory { .. }, .. }) = self.writes {
            // No others: what nobody reads or writes may be punched at the moment, and a touch would fill it again. What
            // lies around them is mapped with them; of the rest nothing is said, so that it is asked about.
            self.map_around(first, found & wanted);
            return Some(found & around(wanted));
        }
        Some(found)
    }

    /// Has the kernel map pages of a group, which are resident: at a read it maps those around it too, if they are, at
    /// a write the page alone, which costs more than the write.
    fn map_around(&self, first: u64, pages: u32) {
        self.guarded.copy(|| {
            for window in (0..GROUP_PAGES).step_by(AROUND_PAGES as usize) {
                let page = u64::from((pages >> window).trailing_zeros());
                if page < AROUND_PAGES {
                    let address = self.address((first + window + page) * PAGE_SIZE);
                    // SAFETY: within the map, and guarded. Whatever is there, nobody looks at it.
                    unsafe { address.read_volatile() };
                }
            }
        });
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

/// The pages that are mapped with `pages` of a group.
fn around(pages: u32) -> u32 {
    const WINDOW: u32 = (1 << AROUND_PAGES) - 1;
    (0..GROUP_PAGES)
        .step_by(AROUND_PAGES as usize)
        .map(|first| WINDOW << first)
        .filter(|window| pages & window != 0)
        .sum()
}

/// Whether another write has been left to `pwrite`, which notes the time: whoever asks the file whether it was
/// changed must be told of ours.
#[inline]
fn is_dated(dated: &AtomicBool) -> bool {
    dated.load(Ordering::Relaxed) || dated.swap(true, Ordering::Relaxed)
}

fn len_of(parts: &[IoVec]) -> u64 {
    parts.iter().fold(0, |sum, part| sum.saturating_add(part.len as u64))
}
