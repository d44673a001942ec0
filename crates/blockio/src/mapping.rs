//! A page of memory that survives the process: a small file, mapped and shared.

use std::{path::Path, ptr::NonNull, sync::atomic::AtomicU64};

use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use crate::Error;

const PAGE_SIZE: usize = 4096;
const WORDS: usize = PAGE_SIZE / size_of::<AtomicU64>();

/// A file of 4096 bytes, mapped as 512 shared words. On tmpfs it survives the process but not the
/// host. What was stored is seen by whoever maps the file next, without any system call.
///
/// The file must not be truncated while it is mapped: touching it would be a `SIGBUS`.
#[derive(Debug)]
pub struct SharedPage {
    words: NonNull<AtomicU64>,
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
        // Room for the page now: storing into a hole of a full file system would be a SIGBUS.
        match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, PAGE_SIZE as u64) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) if made => {
                rustix::io::pwrite(&fd, &[0; PAGE_SIZE], 0).map_err(fail)?;
            }
            Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(fail(errno)),
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGE_SIZE, access, MapFlags::SHARED, &fd, 0) };
        let words = NonNull::new(address.map_err(fail)?.cast()).ok_or_else(|| fail(Errno::NOMEM))?;
        Ok(SharedPage { words })
    }

    /// Word `index` of 512; `None` past the end.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        // SAFETY: the mapping holds `WORDS` aligned words, lives as long as `self`, and is only
        // ever seen as atomics (every bit pattern is valid).
        let words = unsafe { std::slice::from_raw_parts(self.words.as_ptr(), WORDS) };
        words.get(index)
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length; nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), PAGE_SIZE) };
    }
}

// SAFETY: the mapping belongs to the process, not to a thread, and holds only atomics.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

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
}
