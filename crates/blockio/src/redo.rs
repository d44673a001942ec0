//! Copies into a mapped file that a kill can't cut.
//!
//! A system call that writes is not ended by `SIGKILL` in the middle of a page. A copy in user space is, at any
//! instruction, and would leave a part of a sector: no disk does that while it has power. So what is copied into
//! a map is copied to a place first that survives the process, at most a page at a time:
//!
//! 1. the data goes into a *slot*: a page of a small file on a tmpfs, mapped and shared;
//! 2. the slot is *armed*: where the data belongs, then how long it is;
//! 3. the data goes from the slot into the map;
//! 4. the slot is disarmed: the length is 0 again.
//!
//! A process that is killed before 2 is over has changed nothing; after that, whoever takes the file over finds in
//! the slot all that there is to know, and does 3 [again](Redo::unfinished). Doing it twice does no harm, as long as nobody has
//! written to the file between: so the slots name their [owner](Redo::begin), and what another has left is believed of
//! the last one that had the file only.
//!
//! The slot stays in the processor's cache, so it costs a tenth of the copy into the map. It orders nothing and syncs nothing,
//! for after a power cut it is gone; then it is worth as much as the page cache.
//!
//! # The file
//! | bytes | what |
//! | --- | --- |
//! | 0..8 | magic and version |
//! | 8..24 | the owner, two words |
//! | 64 × (n + 1) .. | slot n: where its data belongs, in bytes; how many there are, 0: disarmed (two words) |
//! | 4096 × (n + 1) .. | the data of slot n |
//!
//! Words are the processor's: the file outlives a process, not a host.

use std::{
    cell::Cell,
    os::fd::OwnedFd,
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence},
};

use crate::owner::give_to_owner_of_directory;
use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use crate::{
    Error, IoVec,
    resident::{end_stores, prefetch, read_copy, store},
};

/// "prstnrd" and the layout's version.
const MAGIC: u64 = 0x7072_7374_6e72_6401;
const PAGE: usize = 4096;
/// As many writes at a time as there are queues, or nearly.
const SLOTS: usize = 16;
const FILE_BYTES: usize = PAGE * (1 + SLOTS);
const WORD_OWNER: usize = 1;
/// Words from one slot's to the next: a line of the cache.
const SLOT_WORDS: usize = 8;

/// A small file with slots, in which what is being written stands meanwhile.
#[derive(Debug)]
pub struct Redo {
    fd: OwnedFd,
    start: NonNull<u8>,
    uses: [Use; SLOTS],
}

/// What this process does with a slot. Each has its own line of the cache.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Use {
    taken: AtomicBool,
    /// Whether the file has room for its data.
    has_room: AtomicBool,
}

// SAFETY: the mapping belongs to the process, not to a thread; a slot's data is touched by whoever has taken it only.
unsafe impl Send for Redo {}
// SAFETY: as above.
unsafe impl Sync for Redo {}

/// A write that somebody began and may not have ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfinished {
    /// First byte.
    pub offset: u64,
    /// What belongs there: 1 to 4096 bytes, within one page of the file.
    pub data: Vec<u8>,
}

impl Redo {
    /// Maps the file at `path`. It is made if it does not exist (mode 0600); symbolic links are not followed. It must not be
    /// truncated while it is mapped: touching it would be a `SIGBUS`.
    ///
    /// # Errors
    /// What the kernel says, such as that there is no room; `InvalidData` if the file is of another size.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |errno: Errno| Error::new("map", path, errno);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let stat = rustix::fs::fstat(&fd).map_err(fail)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(Error::wrong_type("map", path));
        }
        give_to_owner_of_directory(&fd, path);
        if stat.st_size == 0 {
            rustix::fs::ftruncate(&fd, FILE_BYTES as u64).map_err(fail)?;
        } else if stat.st_size != FILE_BYTES as i64 {
            let found = format!("it has {} bytes instead of {FILE_BYTES}", stat.st_size);
            return Err(Error::new("map", path, std::io::Error::new(std::io::ErrorKind::InvalidData, found)));
        }
        reserve(&fd, 0).map_err(fail)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), FILE_BYTES, access, MapFlags::SHARED, &fd, 0) };
        let start = NonNull::new(start.map_err(fail)?.cast()).ok_or_else(|| fail(Errno::NOMEM))?;
        Ok(Self { fd, start, uses: Default::default() })
    }

    /// What `owner` may have left unfinished, if it was the last to [begin](Self::begin). Nobody may be writing.
    pub fn unfinished(&self, owner: [u64; 2]) -> Vec<Unfinished> {
        let is_of = |word: usize, expected: u64| self.word(word).load(Ordering::Acquire) == expected;
        if !(is_of(0, MAGIC) && is_of(WORD_OWNER, owner[0]) && is_of(WORD_OWNER + 1, owner[1])) {
            return Vec::new();
        }
        let of_slot = |slot: usize| {
            let [offset, len] = self.words_of(slot).map(|word| word.load(Ordering::Acquire));
            let room = PAGE - (offset % PAGE as u64) as usize;
            let len = usize::try_from(len).ok().filter(|len| (1..=room).contains(len))?;
            let mut data = vec![0; len];
            // Not through the mapping: whoever has spoilt the file may have left no page there.
            let found = rustix::io::pread(&self.fd, &mut data[..], data_offset(slot)).ok()?;
            (found == len).then_some(Unfinished { offset, data })
        };
        (0..SLOTS).filter_map(of_slot).collect()
    }

    /// Disarms all slots, and names who writes from now on: two words that no other process has while this one's
    /// traces can be found. Nobody may be writing.
    pub fn begin(&self, owner: [u64; 2]) {
        self.word(0).store(0, Ordering::Release);
        for slot in 0..SLOTS {
            self.words_of(slot).iter().for_each(|word| word.store(0, Ordering::Release));
        }
        self.word(WORD_OWNER).store(owner[0], Ordering::Release);
        self.word(WORD_OWNER + 1).store(owner[1], Ordering::Release);
        self.word(0).store(MAGIC, Ordering::Release);
        // Whether one has room is not known of those of a process before.
        (0..SLOTS).for_each(|slot| self.wipe_slot(slot, true));
    }

    /// Forgets the data of the slots, but of those in use.
    pub fn wipe(&self) {
        (0..SLOTS).for_each(|slot| self.wipe_slot(slot, false));
    }

    fn wipe_slot(&self, index: usize, always: bool) {
        let Some(slot) = self.take_slot(index) else { return };
        if !(slot.used.has_room.swap(false, Ordering::Relaxed) || always) {
            return;
        }
        let (mode, at) = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, data_offset(index));
        if rustix::fs::fallocate(&self.fd, mode, at, PAGE as u64).is_err() {
            // A file system without holes. If that fails too, what is there is of no use to anybody but root and us.
            let _ = rustix::io::pwrite(&self.fd, &[0; PAGE], at);
        }
    }

    /// A slot that nobody uses and that has room in the file, or none: then another way has to be taken.
    #[inline]
    pub(crate) fn slot(&self) -> Option<Slot<'_>> {
        let preferred = preferred_slot();
        let slot = (0..SLOTS).find_map(|next| self.take_slot(preferred.wrapping_add(next) % SLOTS))?;
        (slot.used.has_room.load(Ordering::Relaxed) || slot.make_room()).then_some(slot)
    }

    #[inline]
    fn take_slot(&self, index: usize) -> Option<Slot<'_>> {
        let used = self.uses.get(index)?;
        // Only if it is ours: dropping one gives it back.
        let was_taken = used.taken.swap(true, Ordering::Acquire);
        (!was_taken).then(|| Slot { redo: self, used, index })
    }

    /// `index` must be within the first page.
    fn word(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < PAGE / size_of::<AtomicU64>());
        let word = self.start.as_ptr().cast::<AtomicU64>().wrapping_add(index);
        // SAFETY: within the mapping, aligned, and only ever seen as an atomic.
        unsafe { &*word }
    }

    /// Where the data of a slot belongs, and how long it is.
    #[inline]
    fn words_of(&self, slot: usize) -> [&AtomicU64; 2] {
        let first = SLOT_WORDS * (slot + 1);
        [self.word(first), self.word(first + 1)]
    }

    #[inline]
    fn data_of(&self, slot: usize) -> *mut u8 {
        self.start.as_ptr().wrapping_add(PAGE * (1 + slot))
    }
}

impl Drop for Redo {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length; nobody borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), FILE_BYTES) };
    }
}

const fn data_offset(slot: usize) -> u64 {
    (PAGE * (1 + slot)) as u64
}

/// Has room made for a page: storing into a hole of a full file system would be a SIGBUS.
fn reserve(fd: &OwnedFd, offset: u64) -> Result<(), Errno> {
    match rustix::fs::fallocate(fd, FallocateFlags::empty(), offset, PAGE as u64) {
        // A file system without it: what is there stays as it is.
        Err(Errno::OPNOTSUPP) => {
            let mut page = [0; PAGE];
            rustix::io::pread(fd, &mut page[..], offset)?;
            rustix::io::pwrite(fd, &page, offset).map(|_| ())
        }
        result => result,
    }
}

/// Another one for each thread, as long as there are no more threads than slots.
#[inline]
fn preferred_slot() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.with(|number| match number.get() {
        Some(number) => number,
        None => {
            let new = THREADS.fetch_add(1, Ordering::Relaxed);
            number.set(Some(new));
            new
        }
    })
}

/// A slot that is taken, until this is dropped.
#[derive(Debug)]
pub(crate) struct Slot<'redo> {
    redo: &'redo Redo,
    used: &'redo Use,
    index: usize,
}

impl Slot<'_> {
    /// Copies `parts`, one after the other, to `to`, which is what lies at `offset` in the file, by way of the slot. Whoever
    /// is told that it was done sees it.
    ///
    /// # Safety
    /// `parts` must be valid for reads and what is at `to` for writes, as long as they are; they must not overlap. Others may
    /// change both meanwhile.
    #[inline]
    pub(crate) unsafe fn write(&mut self, offset: u64, to: *mut u8, parts: &[IoVec]) {
        let (mut done, mut filled) = (0, 0);
        let room = |done: usize| PAGE - (offset as usize).wrapping_add(done) % PAGE;
        for part in parts {
            let mut taken = 0;
            while taken < part.len {
                let from = part.base.cast_const().wrapping_add(taken);
                let len = (part.len - taken).min(room(done) - filled);
                // SAFETY: within the part (contract of this function), and within the slot, which is a page long.
                unsafe { read_copy(from, self.data().wrapping_add(filled), len) };
                (taken, filled) = (taken + len, filled + len);
                if filled == room(done) {
                    if taken < part.len {
                        prefetch(from.wrapping_add(len));
                    }
                    // SAFETY: what was taken of the parts belongs there (contract of this function).
                    unsafe { self.put(offset + done as u64, to.wrapping_add(done), filled) };
                    (done, filled) = (done + filled, 0);
                }
            }
        }
        if filled > 0 {
            // SAFETY: as above.
            unsafe { self.put(offset + done as u64, to.wrapping_add(done), filled) };
        }
        end_stores();
    }

    /// Steps 2 to 4.
    ///
    /// # Safety
    /// `len` bytes at `to` must be valid for writes; there are no more than a page in the slot.
    #[inline]
    unsafe fn put(&self, offset: u64, to: *mut u8, len: usize) {
        self.arm(offset, len);
        // SAFETY: the slot has so many bytes; the rest is the contract of this function.
        unsafe { store(self.data(), to, len) };
        self.disarm();
    }

    #[inline]
    fn arm(&self, offset: u64, len: usize) {
        let [place, count] = self.redo.words_of(self.index);
        place.store(offset, Ordering::Release);
        count.store(len as u64, Ordering::Release);
        // A thread is killed between two of its instructions, and those before it have happened: it is enough that the compiler
        // keeps their order.
        compiler_fence(Ordering::SeqCst);
    }

    #[inline]
    fn disarm(&self) {
        compiler_fence(Ordering::SeqCst);
        let [_, count] = self.redo.words_of(self.index);
        count.store(0, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    #[inline]
    fn data(&self) -> *mut u8 {
        self.redo.data_of(self.index)
    }

    #[cold]
    fn make_room(&self) -> bool {
        let has_room = reserve(&self.redo.fd, data_offset(self.index)).is_ok();
        self.used.has_room.store(has_room, Ordering::Relaxed);
        has_room
    }
}

impl Drop for Slot<'_> {
    #[inline]
    fn drop(&mut self) {
        self.used.taken.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
