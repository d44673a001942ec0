//! Memory that survives the process: a small file, mapped and shared, or memory that another
//! process holds too.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use rustix::{
    fs::{FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags, SealFlags},
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use crate::owner::give_to_owner_of_directory;
use crate::{
    Error,
    coherence::{TMPFS, file_system},
};

const PAGE_SIZE: usize = 4096;
const WORD_BYTES: usize = size_of::<AtomicU64>();
/// No shared memory is longer, in bytes.
const SHARED_BYTES_MAX: u64 = 64 << 20;

/// A mapping of a file, seen as shared words.
#[derive(Debug)]
struct Words {
    first: NonNull<AtomicU64>,
    count: usize,
}

impl Words {
    /// Maps the first `bytes` of `file`, a multiple of the page size that the file has room for.
    fn map(file: impl AsFd, bytes: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        let first = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { first, count: bytes / WORD_BYTES })
    }

    fn get(&self, index: usize) -> Option<&AtomicU64> {
        // SAFETY: the mapping holds `count` aligned words, lives as long as `self`, and is only
        // ever seen as atomics (every bit pattern is valid).
        let words = unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) };
        words.get(index)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), self.count * WORD_BYTES) };
    }
}

// SAFETY: the mapping belongs to the process, not to a thread, and holds only atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

/// A file of 4096 bytes, mapped as 512 shared words. On tmpfs it survives the process but not the
/// host. What was stored is seen by whoever maps the file next, without any system call.
///
/// The file must not be truncated while it is mapped: touching it would be a `SIGBUS`.
#[derive(Debug)]
pub struct SharedPage {
    words: Words,
    fd: OwnedFd,
}

impl SharedPage {
    /// Maps the file at `path`. With `create` it is made if it does not exist (mode 0600, all
    /// zeros), or if it is empty; symbolic links are not followed.
    ///
    /// # Errors
    /// What the kernel says; `InvalidData` if the file is of another size.
    pub fn open(path: &Path, create: bool) -> Result<SharedPage, Error> {
        let fail = |errno: Errno| Error::new("map", path, errno);
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        if create {
            flags |= OFlags::CREATE;
        }
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let stat = rustix::fs::fstat(&fd).map_err(fail)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(Error::wrong_type("map", path));
        }
        let made = create && stat.st_size == 0;
        if !made && stat.st_size != PAGE_SIZE as i64 {
            let found = format!("it has {} bytes instead of {PAGE_SIZE}", stat.st_size);
            return Err(Error::new("map", path, std::io::Error::new(std::io::ErrorKind::InvalidData, found)));
        }
        if create {
            give_to_owner_of_directory(&fd, path);
        }
        // Room for the page now: storing into a hole of a full file system would be a SIGBUS.
        match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, PAGE_SIZE as u64) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) if made => {
                rustix::io::pwrite(&fd, &[0; PAGE_SIZE], 0).map_err(fail)?;
            }
            Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(fail(errno)),
        }
        Ok(SharedPage { words: Words::map(&fd, PAGE_SIZE).map_err(fail)?, fd })
    }

    /// Maps the file at `path`, which is made if need be, as [`open`](Self::open) does, and takes its exclusive lock (`flock`), which
    /// goes with the page. `None`: another one that was opened so has it, in whatever process, also of another pid namespace.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_exclusive(path: &Path) -> Result<Option<SharedPage>, Error> {
        let fail = |errno: Errno| Error::new("lock", path, errno);
        loop {
            let page = Self::open(path, true)?;
            let lock = || rustix::fs::flock(&page.fd, FlockOperation::NonBlockingLockExclusive);
            match rustix::io::retry_on_intr(lock) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(fail(errno)),
            }
            // Whoever had it may have removed it before it gave the lock back.
            let locked = rustix::fs::fstat(&page.fd).map_err(fail)?;
            match rustix::fs::lstat(path) {
                Ok(named) if (named.st_dev, named.st_ino) == (locked.st_dev, locked.st_ino) => {
                    return Ok(Some(page));
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(fail(errno)),
            }
        }
    }

    /// Word `index` of 512; `None` past the end.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.words.get(index)
    }
}

/// Memory without a name that is shared with another process by its descriptor, and survives this
/// one as long as the other keeps it. Its length is sealed: nobody can make touching it a `SIGBUS`.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    words: Words,
}

impl SharedMemory {
    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

    /// At least `bytes` of zeros, named `name` in `/proc/PID/maps`.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` if it is nothing or more than 64 MiB.
    pub fn create(name: &str, bytes: u64) -> io::Result<Self> {
        let bytes = Self::whole_pages(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        rustix::fs::fcntl_add_seals(&fd, Self::SEALS | SealFlags::SEAL)?;
        Self::adopt(fd, bytes)
    }

    fn whole_pages(bytes: u64) -> Option<u64> {
        let bytes = bytes.checked_next_multiple_of(PAGE_SIZE as u64)?;
        (1..=SHARED_BYTES_MAX).contains(&bytes).then_some(bytes)
    }

    /// Memory of `bytes` bytes that another process sends back, or that another process made alike.
    ///
    /// # Errors
    /// What the kernel says; `InvalidData` if its length is not sealed, or is not `bytes` in whole
    /// pages, or if it is not ordinary memory.
    pub fn adopt(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        // What can't be sealed, such as a file on a disk, can't be asked for its seals.
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        if !seals.contains(Self::SEALS) {
            return Err(invalid("the length of the memory is not sealed"));
        }
        // Huge pages may not be there when they are touched, whatever was reserved: a SIGBUS.
        if file_system(&fd)? != TMPFS {
            return Err(invalid("it is not ordinary memory"));
        }
        let found = rustix::fs::fstat(&fd)?.st_size;
        let bytes = Self::whole_pages(bytes).filter(|bytes| i64::try_from(*bytes) == Ok(found));
        let bytes = bytes.ok_or_else(|| invalid("the memory has another length"))?;
        // Room now: storing into memory that is not to be had would be a SIGBUS.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes)?;
        let words = Words::map(&fd, bytes as usize)?;
        Ok(Self { fd, words })
    }

    /// Word `index`; `None` past the end.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.words.get(index)
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.words.count * WORD_BYTES) as u64
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn page_mapped_again_has_what_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live");
        assert!(SharedPage::open(&path, false).is_err());
        let page = SharedPage::open(&path, true).unwrap();
        assert!((0..512).all(|index| page.word(index).unwrap().load(Ordering::Relaxed) == 0));
        page.word(511).unwrap().store(u64::MAX - 1, Ordering::Release);
        assert!(page.word(512).is_none() && page.word(usize::MAX).is_none());
        let other = SharedPage::open(&path, true).unwrap();
        assert_eq!(other.word(511).unwrap().load(Ordering::Acquire), u64::MAX - 1);
        drop((page, other));
        let other = SharedPage::open(&path, false).unwrap();
        assert_eq!(other.word(511).unwrap().load(Ordering::Acquire), u64::MAX - 1);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
    }

    #[test]
    fn page_is_exclusively_for_one_until_that_is_gone_or_its_file_has_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live");
        let page = SharedPage::open_exclusive(&path).unwrap().unwrap();
        assert!(SharedPage::open_exclusive(&path).unwrap().is_none());
        // Whoever only looks needs no lock.
        assert!(SharedPage::open(&path, false).is_ok());
        page.word(0).unwrap().store(7, Ordering::Release);
        drop(page);
        let page = SharedPage::open_exclusive(&path).unwrap().unwrap();
        assert_eq!(page.word(0).unwrap().load(Ordering::Acquire), 7);
        // Removed by its owner: the next one's is another.
        std::fs::remove_file(&path).unwrap();
        let next = SharedPage::open_exclusive(&path).unwrap().unwrap();
        assert_eq!(next.word(0).unwrap().load(Ordering::Acquire), 0);
        drop(page);
        assert!(SharedPage::open_exclusive(&path).unwrap().is_none());
    }

    #[test]
    fn page_in_a_file_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live");
        for size in [1, 4095, 4097, 8192] {
            std::fs::write(&path, vec![1; size]).unwrap();
            for create in [false, true] {
                let error = SharedPage::open(&path, create).unwrap_err();
                assert_eq!(error.io_error().kind(), std::io::ErrorKind::InvalidData);
            }
            assert_eq!(std::fs::read(&path).unwrap(), vec![1; size]);
        }
        std::fs::write(&path, []).unwrap();
        assert!(SharedPage::open(&path, false).is_err());
        assert!(SharedPage::open(&path, true).is_ok());
        assert!(SharedPage::open(dir.path(), false).is_err());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SharedPage::open(&link, true).is_err());
    }

    #[test]
    fn memory_adopted_by_its_descriptor_is_the_same_and_cannot_be_cut() {
        let made = SharedMemory::create("test", 5000).unwrap();
        assert_eq!(made.bytes(), 8192);
        made.word(1023).unwrap().store(77, Ordering::Release);
        assert!(made.word(1024).is_none());
        let fd = made.as_fd().try_clone_to_owned().unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        drop(made);
        assert!(SharedMemory::adopt(fd.try_clone().unwrap(), 4096).is_err());
        let adopted = SharedMemory::adopt(fd, 5000).unwrap();
        assert_eq!((adopted.bytes(), adopted.word(1023).unwrap().load(Ordering::Acquire)), (8192, 77));
    }

    /// Invariant 8: memory whose owner could truncate it is not touched.
    #[test]
    fn memory_that_could_be_cut_is_refused() {
        let unsealed = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 4096).unwrap();
        assert!(SharedMemory::adopt(unsealed, 4096).is_err());
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(SharedMemory::adopt(file.into(), 4096).is_err());
        for bytes in [0, 1000] {
            let odd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
            rustix::fs::ftruncate(&odd, bytes).unwrap();
            rustix::fs::fcntl_add_seals(&odd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
            assert!(SharedMemory::adopt(odd, bytes).is_err());
        }
        assert!(SharedMemory::create("test", 0).is_err() && SharedMemory::create("test", 1 << 40).is_err());
    }
}
