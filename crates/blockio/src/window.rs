//! Small writes that follow one another in a file, most of them without a system call: through a window, a mapping of a
//! part of the file, which moves to where they go.

#[cfg(test)]
mod tests;

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
///   the window, and `pwrite` says why.
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
    /// It can't be had, or broke.
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

    /// The file, to do with it what a write is not, such as to give it another length. There is no window until it is written
    /// again.
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
