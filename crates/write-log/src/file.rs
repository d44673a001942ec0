//! The file below a log and the directory that it is in: traits, so that tests can put failing and
//! crashing ones there.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, IFlags, Mode, OFlags},
    io::Errno,
};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a log needs of its file. Offsets and lengths are in bytes.
pub trait LogFile: fmt::Debug + Send {
    /// Writes `bytes` at `offset`; returns how many were written, which may be fewer.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Reads at `offset` into `bytes`; returns how many were read, 0 only at the end of the file.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns once all that was written survives a power cut, and the length with it.
    fn sync_data(&mut self) -> io::Result<()>;

    /// Makes an empty file `len` bytes long, reading as zeros, such that no later write inside can
    /// run out of space.
    fn reserve(&mut self, len: u64) -> io::Result<()>;

    /// Length of the file.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// What making a log needs of its directory.
pub trait LogDir: fmt::Debug {
    /// Where it is.
    fn path(&self) -> &Path;

    /// Creates the file `path` in it; fails if it exists.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn LogFile>>;

    /// Removes the file `path` in it.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Returns once the names in it survive a power cut.
    fn sync(&self) -> io::Result<()>;

    /// Returns once all that was written to `file`, which is in it, survives a power cut, and the names too.
    fn sync_with(&self, file: &mut dyn LogFile) -> io::Result<()> {
        file.sync_data()?;
        self.sync()
    }
}

/// A directory of the host.
#[derive(Clone, Debug)]
pub struct DiskDir {
    path: PathBuf,
}

impl DiskDir {
    /// The directory at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

impl LogDir for DiskDir {
    fn path(&self) -> &Path {
        &self.path
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        Ok(Box::new(DiskFile::create_new(path)?))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

/// A regular file of the host.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
}

impl DiskFile {
    /// Creates `path`, readable and writable by its owner alone. Fails if it exists.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
        Ok(Self { file })
    }

    /// Opens `path` for reading, or for writing too; `InvalidInput` unless it is a regular file.
    pub fn open(path: &Path, write: bool) -> io::Result<Self> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // Non-blocking: opening a FIFO must not hang before its kind can be seen.
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self { file })
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl LogFile for DiskFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(&self.file, bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(&self.file, bytes, offset)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        // A file system that writes elsewhere than before (btrfs) would need new room for every
        // write into reserved room but the first. The others don't know the flag, and need not.
        if let Ok(flags) = rustix::fs::ioctl_getflags(&self.file) {
            let _ = rustix::fs::ioctl_setflags(&self.file, flags | IFlags::NOCOW);
        }
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return zero(self, 0, len),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// Writes all of `bytes`; one write unless the file takes fewer at once.
pub(crate) fn write_all(file: &mut dyn LogFile, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads until `bytes` is full; `UnexpectedEof` if the file ends before.
pub(crate) fn read_exact(file: &dyn LogFile, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = bytes.get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes `len` zeros.
pub(crate) fn zero(file: &mut dyn LogFile, mut offset: u64, len: u64) -> io::Result<()> {
    let end = offset.saturating_add(len);
    while offset < end {
        let count = (end - offset).min(ZEROS.len() as u64);
        write_all(file, ZEROS.get(..count as usize).unwrap_or(&ZEROS), offset)?;
        offset += count;
    }
    Ok(())
}
