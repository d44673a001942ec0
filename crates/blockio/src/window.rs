//! Small writes that follow one another in a file, most of them without a system call: through a window, a mapping of a
//! part of the file, which moves to where they go.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    ptr::{self, NonNull},
};

use rustix::{
    fs::FileType,
    mm::{MapFlags, ProtFlags},
};

use crate::{
    clock::{Epoch, Moment},
    coherence::{self, Kept, PAGE_SIZE},
    guard::{self, Guarded},
};

/// A window is so long, bytes: to move it takes as long as a few calls.
const WINDOW_BYTES: u64 = 1 << 20;
/// Longer writes are calls, bytes: what is long is mostly written once, and far from what follows.
const WRITE_BYTES_MAX: usize = 2048;

/// A regular file in which a few bytes are written behind the last few for what it takes to store them.
///
/// # What is promised
/// - **It is what `pwrite` writes.** Readers see it at once, it survives the process, `fdatasync` makes it durable and tells
///   of what could not be written back. Only the file's times may tell of a page's first write alone.
/// - **A kill may cut it**: any of its bytes may be there or not. (A `pwrite` of as many is whole.)
/// - **It can't kill the process**, as a [`ResidentMap`](crate::ResidentMap) can't: what can't be had when it is touched ends
///   the window for good, and `pwrite` says why.
/// - **It waits where `pwrite` does.** The first write to a page, and the first in each 1.1 s, is a `pwrite`: it brings the
///   page into the page cache, so that touching it is no major fault, after which a thread's reads from maps would be off
///   for a while; and a file system that takes no writes any more, or is frozen, has its say.
///
/// On file systems other than tmpfs, ext4 and xfs all writes are calls.
///
/// Who cuts the file in the middle of a page makes what is written behind the cut in that page be lost without a word.
#[derive(Debug)]
pub struct WindowedFile<F> {
    file: F,
    window: Place,
    last_call: Option<Call>,
}

/// Where a window is.
#[derive(Debug)]
enum Place {
    Nowhere,
    At(Window),
    /// It can't be had.
    Never,
}

/// A `pwrite` that succeeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Call {
    /// Number of the last page that it wrote.
    page: u64,
    epoch: Epoch,
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

impl<F: AsFd> WindowedFile<F> {
    /// Over `file`, which is written by calls alone unless it is open for reads too. Nothing is mapped or looked at yet.
    pub fn new(file: F) -> Self {
        Self { file, window: Place::Nowhere, last_call: None }
    }

    /// The file.
    pub fn get(&self) -> &F {
        &self.file
    }

    /// The file, to do with it what a write is not, such as to give it another length.
    pub fn get_mut(&mut self) -> &mut F {
        (self.window, self.last_call) = (Place::Nowhere, None);
        &mut self.file
    }

    /// Writes `bytes` at `offset`; returns how many were written, which may be fewer.
    ///
    /// # Errors
    /// What `pwrite` says.
    #[inline]
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let epoch = Moment::now().epoch();
        let call = Call { page: offset / PAGE_SIZE, epoch };
        let within = offset % PAGE_SIZE + bytes.len() as u64 <= PAGE_SIZE;
        let follows = within && bytes.len() <= WRITE_BYTES_MAX && self.last_call == Some(call);
        if follows && self.store(bytes, offset, epoch) {
            return Ok(bytes.len());
        }
        let count = rustix::io::pwrite(&self.file, bytes, offset)?;
        if let Some(last) = count.checked_sub(1) {
            self.last_call = Some(Call { page: (offset + last as u64) / PAGE_SIZE, epoch });
        }
        Ok(count)
    }

    /// Writes through the window, which is moved if need be. False if that can't be done; some of it may be written.
    #[inline]
    fn store(&mut self, bytes: &[u8], offset: u64, epoch: Epoch) -> bool {
        if !matches!(&self.window, Place::At(window) if window.shows(offset, bytes.len() as u64)) {
            self.look_for(offset);
        }
        let Place::At(window) = &self.window else { return false };
        if !guard::is_fit(epoch) {
            return false;
        }
        let done = window.write(bytes, offset);
        if !done {
            self.window = Place::Never;
        }
        done
    }

    #[cold]
    fn look_for(&mut self, offset: u64) {
        if !matches!(self.window, Place::Never) {
            // The old one first: two are never needed.
            self.window = Place::Nowhere;
            // Why there is none does not matter: there is another way.
            let window = Window::over(self.file.as_fd(), offset).ok().flatten();
            self.window = window.map_or(Place::Never, Place::At);
        }
    }
}

impl Window {
    /// A window from the page on in which `offset` lies. `None` where writes through it would not be sound, or not be
    /// known to be cheaper.
    fn over(file: BorrowedFd<'_>, offset: u64) -> io::Result<Option<Self>> {
        let stat = rustix::fs::fstat(file)?;
        let len = stat.st_size.max(0) as u64;
        let known = match coherence::kept(file)? {
            Some(Kept::InMemory | Kept::OnExt4 | Kept::OnXfs) => {
                FileType::from_raw_mode(stat.st_mode).is_file()
            }
            Some(Kept::Elsewhere) | None => false,
        };
        let offset = offset - offset % PAGE_SIZE;
        // Whole pages: what is written behind the end in the last one would be lost.
        let bytes = (len - len % PAGE_SIZE).saturating_sub(offset).min(WINDOW_BYTES) as usize;
        if !known || bytes == 0 || !coherence::pages_are_as_expected() || !guard::install() {
            return Ok(None);
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room, unmapped only in `drop`.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, offset) }?;
        // SAFETY: mapped above, and until this is dropped.
        let guarded = unsafe { Guarded::new(start, bytes, access) };
        Ok(NonNull::new(start.cast()).map(|start| Self { offset, start, bytes, guarded }))
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
        // SAFETY: mapped in `over` with this length; nobody borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use proptest::prelude::*;
    use rustix::fs::FallocateFlags;
    use tempfile::TempDir;

    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    /// Directories on the build's file system and on tmpfs, where those have windows.
    fn places() -> Vec<TempDir> {
        let built = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let places = [built, "/dev/shm".into()].into_iter().filter_map(|dir| tempfile::tempdir_in(dir).ok());
        places
            .filter(|dir| Window::over(reserved(dir, "probe", 4096).as_fd(), 0).unwrap().is_some())
            .collect()
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

    /// Where the window begins.
    fn shown<F>(file: &WindowedFile<F>) -> Option<u64> {
        match &file.window {
            Place::At(window) => Some(window.offset),
            _ => None,
        }
    }

    /// Major faults of this thread.
    fn major_faults() -> i64 {
        // SAFETY: a C structure of numbers; all zeros is a valid one.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` has room for the answer.
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
        usage.ru_majflt
    }

    /// Places near the ends of pages, of windows and of the file, of 3 MiB.
    fn place() -> impl Strategy<Value = u64> {
        let near =
            prop_oneof![Just(0u64), Just(4096), Just(WINDOW_BYTES), Just(2 * WINDOW_BYTES), Just(3 << 20)];
        (near, 0..6000u64).prop_map(|(near, behind)| (near + 3000).saturating_sub(behind))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What is written is in the file, whoever looks and whenever, and nothing else is.
        #[test]
        fn writes_equal_pwrites(
            tail in 0..4096u64,
            writes in proptest::collection::vec((place(), 0..2500usize, 1..5u8, any::<u8>(), any::<bool>()), 1..40),
        ) {
            for dir in places() {
                let (file, same) = (reserved(&dir, "one", (3 << 20) + tail), reserved(&dir, "two", (3 << 20) + tail));
                let mut windowed = WindowedFile::new(file);
                for &(mut offset, len, times, byte, syncs) in &writes {
                    for time in 0..times {
                        let bytes = vec![byte ^ time; len];
                        prop_assert_eq!(windowed.write_at(&bytes, offset).unwrap(), len);
                        same.write_all_at(&bytes, offset).unwrap();
                        offset += len as u64;
                    }
                    if syncs {
                        windowed.get().sync_data().unwrap();
                    }
                }
                prop_assert!(content(windowed.get()) == content(&same));
                windowed.get_mut();
                prop_assert!(content(windowed.get()) == content(&same), "after the window is gone");
            }
        }
    }

    /// Writes one behind the other go through few windows, and no page is touched that is not there: that would turn this
    /// thread's reads from maps off.
    #[test]
    fn window_stays_where_it_shows_what_is_written_and_never_waits_for_a_page() {
        for dir in places() {
            // What this thread's first writes touch of the program itself.
            let mut other = WindowedFile::new(reserved(&dir, "other", 8192));
            (0..10).for_each(|n| assert_eq!(other.write_at(&[7; 24], n * 24).unwrap(), 24));
            let mut file = WindowedFile::new(reserved(&dir, "log", 3 << 20));
            let before = major_faults();
            let mut shows = Vec::new();
            for offset in (100..2 << 20).step_by(24) {
                assert_eq!(file.write_at(&[7; 24], offset).unwrap(), 24);
                shows.extend(shown(&file));
            }
            let stores = shows.len();
            shows.dedup();
            assert_eq!(shows, [0, WINDOW_BYTES]);
            assert!(stores > (2 << 20) / 24 - 10, "all but the first have a window: {stores}");
            assert_eq!(major_faults() - before, 0);
        }
    }

    /// A page's first write is a call, and so is the first after 1.1 s, and after one that failed: a file system that takes
    /// no writes any more says so.
    #[test]
    fn stores_follow_a_call_to_the_same_page_that_succeeded_lately() {
        for dir in places() {
            let mut file = WindowedFile::new(reserved(&dir, "log", 64 << 10));
            file.write_at(&[1; 24], 0).unwrap();
            assert!(shown(&file).is_none(), "the first is a call");
            let call = file.last_call.unwrap();
            assert_eq!(call.page, 0);
            file.write_at(&[1; 24], 24).unwrap();
            assert!(shown(&file).is_some() || file.last_call != Some(call));
            // From here on a store would be into this.
            let readable = File::open(dir.path().join("log")).unwrap();
            let mut readable = WindowedFile { file: readable, window: file.window, last_call: None };
            for offset in [48, 4096, 5000] {
                assert!(readable.write_at(&[2; 24], offset).is_err(), "{offset}");
                assert!(readable.last_call.is_none());
            }
            let epoch = Moment::now().epoch();
            readable.last_call = Some(Call { page: 0, epoch: Epoch(epoch.0 - 1) });
            assert!(readable.write_at(&[2; 24], 48).is_err(), "a call of an earlier epoch");
            readable.last_call = Some(Call { page: 0, epoch });
            assert!(readable.write_at(&[2; 24], 4090).is_err(), "it reaches into the next page");
            assert!(content(&readable.file)[48..].iter().all(|byte| *byte == 0));
        }
    }

    /// Invariant 8: a file that somebody cuts does not kill who writes it.
    #[test]
    fn file_that_was_cut_is_written_by_calls() {
        for dir in places() {
            let mut file = WindowedFile::new(reserved(&dir, "cut", 64 << 10));
            let mut cut = false;
            // Again where 1.1 s have begun between the two: then nothing is touched.
            while !cut {
                file.write_at(&[1; 24], 40_000).unwrap();
                file.write_at(&[2; 24], 40_024).unwrap();
                file.file.set_len(PAGE as u64).unwrap();
                assert_eq!(file.write_at(&[3; 24], 40_048).unwrap(), 24);
                cut = matches!(file.window, Place::Never);
            }
            assert_eq!(file.write_at(&[4; 24], 40_072).unwrap(), 24);
            let content = content(&file.file);
            assert!(content[..40_048].iter().all(|byte| *byte == 0), "what was cut away");
            assert!(content[40_048..40_072] == [3; 24] && content[40_072..] == [4; 24]);
        }
    }

    #[test]
    fn files_without_a_window_are_written_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("for writes only");
        let mut file = WindowedFile::new(File::create(&path).unwrap());
        for offset in (0..100).step_by(10) {
            assert_eq!(file.write_at(&[offset as u8; 10], offset).unwrap(), 10);
            assert!(shown(&file).is_none());
        }
        assert!(
            std::fs::read(&path).unwrap().iter().enumerate().all(|(at, byte)| *byte as usize == at / 10 * 10)
        );
        let mut null = WindowedFile::new(File::options().read(true).write(true).open("/dev/null").unwrap());
        assert_eq!((null.write_at(&[1; 10], 0).unwrap(), null.write_at(&[1; 10], 10).unwrap()), (10, 10));
    }
}
