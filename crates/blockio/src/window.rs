//! Small writes into a file without a system call: through a window, a mapping of a part of the file, which moves to where
//! they go.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    ptr::{self, NonNull},
};

use rustix::mm::{MapFlags, ProtFlags};

use crate::{
    clock::Moment,
    coherence::{self, PAGE_SIZE},
    guard::{self, Guarded},
};

/// A window is so long, bytes: to move it takes as long as a few writes another way.
const WINDOW_BYTES: u64 = 1 << 20;
/// Longer writes go another way, bytes: what is long is mostly written once, and far from what follows.
const WRITE_BYTES_MAX: usize = 2048;

/// A way to write a few bytes to a regular file that costs what it takes to store them, where one write follows the other.
///
/// # What is promised
/// - **It is what `pwrite` writes.** Readers see it at once, it survives the process, `fdatasync` makes it durable and tells
///   of what could not be written back. The file's times may be left alone on tmpfs.
/// - **A kill may cut it anywhere**: the file holds a first part of the bytes then. (A `pwrite` of as many would be whole.)
/// - **It can't kill the process**, as a [`ResidentMap`](crate::ResidentMap) can't: what can't be had when it is touched ends
///   the window for good, and the write says "not from here".
/// - It may wait as a `pwrite` may: at a page's first write, and at the first after it was written back, the file system is
///   told.
///
/// The file must keep its length. Who cuts it in the middle of a page makes what is written behind the cut in that page be
/// lost without a word.
#[derive(Debug)]
pub struct WriteWindow {
    file: OwnedFd,
    /// So much of the file can be written here: whole pages. None of it after a failure.
    bytes: u64,
    open: Option<Window>,
}

/// A part of a file, mapped.
#[derive(Debug)]
struct Window {
    /// Where in the file it begins, bytes.
    offset: u64,
    start: NonNull<u8>,
    bytes: usize,
    guarded: Guarded,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is written through a raw pointer only.
unsafe impl Send for Window {}

impl WriteWindow {
    /// A window into `file`, which must be open for reads and writes, and as long as it will be. Nothing is mapped before
    /// the first write. `None` where such writes would not be sound: on file systems of which it is not known that a mapping
    /// shows what reads show, and for what is no regular file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        let about = file.metadata()?;
        let sound = about.is_file() && coherence::kept(file)?.is_some();
        if !sound || !coherence::pages_are_as_expected() || !guard::install() {
            return Ok(None);
        }
        let bytes = about.len() - about.len() % PAGE_SIZE;
        Ok(Some(Self { file: file.try_clone()?.into(), bytes, open: None }))
    }

    /// Writes `bytes` at `offset`; false: do it another way, now, some of it may be written. Always false for more than
    /// 2 KiB, for what reaches beyond the file's last whole page, and after a failure.
    #[inline]
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> bool {
        let len = bytes.len() as u64;
        let fits = bytes.len() <= WRITE_BYTES_MAX && len <= self.bytes && offset <= self.bytes - len;
        if !fits || !guard::is_fit(Moment::now().epoch()) {
            return false;
        }
        let done = self.window_at(offset, len).is_some_and(|window| window.write(bytes, offset));
        if !done {
            (self.bytes, self.open) = (0, None);
        }
        done
    }

    /// The window, moved if it does not show `len` bytes at `offset`.
    #[inline]
    fn window_at(&mut self, offset: u64, len: u64) -> Option<&Window> {
        if !self.open.as_ref().is_some_and(|window| window.shows(offset, len)) {
            self.move_to(offset);
        }
        self.open.as_ref()
    }

    #[cold]
    fn move_to(&mut self, offset: u64) {
        // The old one first: two are never needed.
        self.open = None;
        let offset = offset - offset % PAGE_SIZE;
        let bytes = WINDOW_BYTES.min(self.bytes - offset) as usize;
        self.open = Window::map(&self.file, offset, bytes);
    }
}

impl Window {
    fn map(file: &OwnedFd, offset: u64, bytes: usize) -> Option<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, offset) };
        let start = start.ok()?;
        // SAFETY: mapped above, and until this is dropped.
        let guarded = unsafe { Guarded::new(start, bytes, access) };
        NonNull::new(start.cast()).map(|start| Self { offset, start, bytes, guarded })
    }

    fn shows(&self, offset: u64, len: u64) -> bool {
        let bytes = self.bytes as u64;
        offset.checked_sub(self.offset).is_some_and(|at| len <= bytes && at <= bytes - len)
    }

    /// Writes `bytes`; false if the window does not [show](Self::shows) their place, or its pages can't be had.
    #[inline]
    fn write(&self, bytes: &[u8], offset: u64) -> bool {
        self.shows(offset, bytes.len() as u64) && {
            let to = self.start.as_ptr().wrapping_add((offset - self.offset) as usize);
            self.guarded.copy(|| {
                // SAFETY: all of it lies in the map, which is for writes; no reference into it exists, so it is not `bytes`.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            })
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; nobody borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use rustix::fs::FallocateFlags;
    use tempfile::TempDir;

    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    /// Directories on the build's file system and on tmpfs, where those have windows.
    fn places() -> Vec<TempDir> {
        let built = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let places = [built, "/dev/shm".into()].into_iter().filter_map(|dir| tempfile::tempdir_in(dir).ok());
        places.filter(|dir| WriteWindow::new(&reserved(dir, "probe", 1)).unwrap().is_some()).collect()
    }

    /// A new file of so many bytes, all its room reserved.
    fn reserved(dir: &TempDir, name: &str, bytes: u64) -> File {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(dir.path().join(name)).unwrap();
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Places near the ends of pages, of windows and of the file, of 3 MiB.
    fn place() -> impl Strategy<Value = u64> {
        let near =
            prop_oneof![Just(0u64), Just(4096), Just(WINDOW_BYTES), Just(2 * WINDOW_BYTES), Just(3 << 20)];
        (near, 0..6000u64).prop_map(|(near, behind)| (near + 3000).saturating_sub(behind))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What is written here is in the file, whoever looks, and nothing else is; what is refused is not.
        #[test]
        fn windows_writes_equal_pwrites(
            tail in 0..4096u64,
            writes in proptest::collection::vec((place(), 1..2500usize, any::<u8>(), any::<bool>()), 1..40),
        ) {
            for dir in places() {
                let (file, same) = (reserved(&dir, "one", (3 << 20) + tail), reserved(&dir, "two", (3 << 20) + tail));
                let mut window = WriteWindow::new(&file).unwrap().unwrap();
                for &(offset, len, byte, syncs) in &writes {
                    let bytes = vec![byte; len];
                    let end = offset + len as u64;
                    let done = window.write(&bytes, offset);
                    prop_assert_eq!(done, len <= WRITE_BYTES_MAX && end <= 3 << 20, "{} bytes at {}", len, offset);
                    if done {
                        same.write_all_at(&bytes, offset).unwrap();
                    }
                    if syncs {
                        file.sync_data().unwrap();
                    }
                }
                prop_assert!(content(&file) == content(&same));
                drop(window);
                prop_assert!(content(&file) == content(&same), "after the window is gone");
            }
        }
    }

    /// Writes one behind the other need no mapping each.
    #[test]
    fn window_stays_where_it_shows_what_is_written() {
        for dir in places() {
            let file = reserved(&dir, "log", 3 << 20);
            let mut window = WriteWindow::new(&file).unwrap().unwrap();
            assert!(window.open.is_none(), "nothing is mapped before the first write");
            let mut moves = 0;
            let mut shown = None;
            for offset in (100..2 << 20).step_by(24) {
                assert!(window.write(&[7; 24], offset));
                let now = window.open.as_ref().map(|window| window.offset);
                moves += u32::from(now != shown);
                shown = now;
            }
            assert_eq!(moves, 3);
        }
    }

    /// Invariant 8: a file that somebody cuts does not kill who writes it, and is not written here any more.
    #[test]
    fn file_that_was_cut_is_refused_for_good() {
        for dir in places() {
            let file = reserved(&dir, "cut", 64 << 10);
            let mut window = WriteWindow::new(&file).unwrap().unwrap();
            assert!(window.write(&[1; 24], 0) && window.write(&[2; 24], 40_000));
            file.set_len(PAGE as u64).unwrap();
            assert!(!window.write(&[3; 24], 40_000));
            file.set_len(64 << 10).unwrap();
            assert!(!window.write(&[3; 24], 0) && !window.write(&[3; 24], 40_000));
            let content = content(&file);
            assert!(content[..24] == [1; 24] && content[24..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn files_for_reads_only_and_what_is_no_file_are_left_alone() {
        let dir = places().pop().expect("a place with windows");
        drop(reserved(&dir, "read", 8192));
        let file = File::open(dir.path().join("read")).unwrap();
        let mut window = WriteWindow::new(&file).unwrap().unwrap();
        assert!(!window.write(&[1; 24], 0) && !window.write(&[1; 24], 0));
        assert!(content(&file) == [0; 8192]);
        assert!(WriteWindow::new(&File::open("/dev/null").unwrap()).unwrap().is_none());
        assert!(WriteWindow::new(&File::open("/proc/self/status").unwrap()).unwrap().is_none());
    }
}
