//! An open regular file or block device, and positional I/O on it.

use std::{
    ffi::CStr,
    io,
    num::NonZeroU64,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use rustix::{
    fs::{Advice, AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, XattrFlags},
    io::Errno,
};

use crate::{AlignedBuf, Error, Redo, ResidentMap, Zeroing, probe, share};

/// No extended attribute is longer: `XATTR_SIZE_MAX`.
const ATTRIBUTE_SIZE_MAX: usize = 65536;

/// What kind of file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// How to open a file. The default is: read-only, through the page cache, shared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenOptions {
    /// Open for reading and writing instead of only for reading.
    pub write: bool,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Claim a block device (`O_EXCL`): refused while it is mounted or claimed. Ignored for files.
    pub exclusive: bool,
}

/// What direct I/O must be aligned to, in bytes; both 1 for a buffered file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Alignment {
    /// Addresses of memory.
    pub memory: u32,
    /// Offsets and lengths.
    pub offset: u32,
}

/// What tells whether a file is still the same and unchanged.
///
/// For a block device the size is the device's; the times are those of its device node and say
/// nothing about its content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Creation, nanoseconds since 1970, where the file system records it.
    pub birth_ns: Option<i128>,
    /// Last change of the content, nanoseconds since 1970.
    pub mtime_ns: i128,
    /// Last change of the content or the inode, nanoseconds since 1970; cannot be set at will.
    pub ctime_ns: i128,
}

/// An open regular file or block device. All I/O is positional: the file offset means nothing.
///
/// The descriptor is closed on `exec`. Locks live as long as the open file description, which
/// can outlive this value: an engine (or the kernel, for an I/O in flight) may still hold it.
#[derive(Debug)]
pub struct File {
    pub(crate) fd: OwnedFd,
    path: PathBuf,
    kind: FileKind,
    alignment: Alignment,
    direct: bool,
    abilities: probe::Abilities,
    /// The longest write that engines hand to the page cache at once, in bytes; they cut longer ones at its multiples.
    pub(crate) write_max: u64,
    resident: OnceLock<Option<ResidentMap>>,
    /// Whether its file system is asked of failed write-back.
    pub(crate) tells: OnceLock<bool>,
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl File {
    /// Opens an existing regular file or block device. For direct I/O, the page cache gives up what it has of it and was
    /// written back: 0.2 s for each GiB at most.
    ///
    /// # Errors
    /// What `open` says; [`ErrorKind::WrongType`](crate::ErrorKind) for anything else than a
    /// regular file or block device; in use if `exclusive` and the device is claimed.
    pub fn open(path: &Path, options: OpenOptions) -> Result<File, Error> {
        let fail = |errno: Errno| Error::new("open", path, errno);
        let found =
            kind_of(&rustix::fs::stat(path).map_err(fail)?).ok_or_else(|| Error::wrong_type("open", path))?;
        let mut flags = flags(options);
        // Should a FIFO take the file's place meanwhile, it must not hang us.
        flags |= OFlags::NONBLOCK;
        if options.exclusive && found == FileKind::BlockDevice {
            flags |= OFlags::EXCL;
        }
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(fail)?;
        let kind =
            kind_of(&rustix::fs::fstat(&fd).map_err(fail)?).ok_or_else(|| Error::wrong_type("open", path))?;
        // io_uring answers EAGAIN where it would have to wait for a non-blocking file.
        let set = rustix::fs::fcntl_getfl(&fd).map_err(fail)?;
        rustix::fs::fcntl_setfl(&fd, set.difference(OFlags::NONBLOCK)).map_err(fail)?;
        Self::finish(fd, path, kind, options)
    }

    /// Creates a regular file of `size` bytes, all of it a hole, with mode 0600. It is always
    /// open for writing.
    ///
    /// # Errors
    /// If the file exists or cannot be created with that size; then nothing is left of it.
    pub fn create_new(path: &Path, size: u64, options: OpenOptions) -> Result<File, Error> {
        let options = OpenOptions { write: true, ..options };
        let fail = |errno: Errno| Error::new("create", path, errno);
        let flags = flags(options) | OFlags::CREATE | OFlags::EXCL;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        rustix::fs::ftruncate(&fd, size)
            .map_err(fail)
            .and_then(|()| Self::finish(fd, path, FileKind::Regular, options))
            .inspect_err(|_| {
                let _ = rustix::fs::unlink(path);
            })
    }

    fn finish(fd: OwnedFd, path: &Path, kind: FileKind, options: OpenOptions) -> Result<File, Error> {
        let alignment = if options.direct {
            probe::alignment(&fd, kind).map_err(|error| Error::new("open for direct I/O", path, error))?
        } else {
            Alignment { memory: 1, offset: 1 }
        };
        let abilities =
            if options.write { probe::abilities(&fd, path, kind) } else { probe::Abilities::default() };
        let write_max = if options.write && !options.direct { probe::write_max(&fd, kind) } else { u64::MAX };
        if options.direct && options.write {
            // The kernel would hand each direct write to a cached page to a thread of its own, which takes the page away first.
            let _ = rustix::fs::fadvise(&fd, 0, None, Advice::DontNeed);
        }
        Ok(File {
            fd,
            path: path.to_owned(),
            kind,
            alignment,
            direct: options.direct,
            abilities,
            write_max,
            resident: OnceLock::new(),
            tells: OnceLock::new(),
        })
    }

    /// A descriptor of any kind in the guise of a regular file, so that tests can have I/O that
    /// does not complete before they want it to.
    #[cfg(test)]
    pub(crate) fn disguised(fd: OwnedFd) -> File {
        File {
            fd,
            path: "pipe".into(),
            kind: FileKind::Regular,
            alignment: Alignment { memory: 1, offset: 1 },
            direct: false,
            abilities: probe::Abilities::default(),
            write_max: u64::MAX,
            resident: OnceLock::new(),
            tells: OnceLock::new(),
        }
    }

    pub(crate) fn error(&self, operation: &'static str, source: impl Into<io::Error>) -> Error {
        Error::new(operation, &self.path, source)
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of file it is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Whether I/O bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// What direct I/O must be aligned to; 1 and 1 if the file is not [direct](File::is_direct).
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Whether [`punch_hole`](File::punch_hole) works, found out without touching the file.
    /// Always false for a file that is open read-only.
    pub fn supports_punch(&self) -> bool {
        self.abilities.punch
    }

    /// Whether the file system or the device zeroes a range that must stay allocated, found out without touching the file; where not,
    /// an [engine](crate::Op::Zero) writes zeroes. Always false for a file that is open read-only.
    pub fn supports_zero(&self) -> bool {
        self.abilities.zero
    }

    /// Whether the file can be asked for what needs no waiting (`RWF_NOWAIT`). Where it cannot
    /// (tmpfs), io_uring hands every read and write to a worker thread, and
    /// [`EngineKind::Sync`](crate::EngineKind) is faster. Asks the kernel; reads nothing.
    pub fn supports_nowait(&self) -> bool {
        probe::supports_nowait(&self.fd)
    }

    /// Whether io_uring would hand each write to a worker thread, because the file system (ext4) can't
    /// be asked for buffered writes that do not wait.
    pub(crate) fn writes_need_a_thread(&self) -> bool {
        self.kind == FileKind::Regular && !self.direct && !self.abilities.write_nowait
    }

    /// Has reads of what is in the page cache served from a mapping from now on, where that is sound (see
    /// [`ResidentMap`]), and with a `redo` writes too, where they pay; elsewhere this does nothing.
    pub fn map_resident(&self, redo: Option<&Arc<Redo>>) {
        self.resident.get_or_init(|| {
            ResidentMap::new(self, redo).unwrap_or_else(|error| {
                log::debug!("{} is not mapped: {error}", self.path.display());
                None
            })
        });
    }

    /// Gives back the memory that [`map_resident`](Self::map_resident) has come to use, for as long as `goes_on` says so.
    pub fn forget_resident(&self, goes_on: impl Fn() -> bool) {
        if let Some(map) = self.resident() {
            map.forget_while(goes_on);
        }
    }

    /// Makes sure that the file's times tell of a write that follows, though none of those through a map changes them.
    pub fn date_next_write(&self) {
        if let Some(map) = self.resident() {
            map.date_next_write();
        }
    }

    /// See [`ResidentMap::forget_writes`].
    pub fn forget_writes(&self) {
        if let Some(map) = self.resident() {
            map.forget_writes();
        }
    }

    pub(crate) fn resident(&self) -> Option<&ResidentMap> {
        self.resident.get()?.as_ref()
    }

    /// Has the kernel read nothing that it is not asked for, where what it reads ahead would make later writes dear (see
    /// `probe::write_max`); whether that is so. Then [`read_ahead`](Self::read_ahead) is to be called before what comes next is read.
    pub fn keep_folios_small(&self) -> bool {
        self.write_max < u64::MAX && rustix::fs::fadvise(&self.fd, 0, None, Advice::Random).is_ok()
    }

    /// Asks the kernel to begin to read a range into the page cache. Does not wait for it, and vouches for nothing.
    pub fn read_ahead(&self, offset: u64, len: u64) {
        if let Some(len) = NonZeroU64::new(len) {
            let _ = rustix::fs::fadvise(&self.fd, offset, Some(len), Advice::WillNeed);
        }
    }

    /// The current size in bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn size(&self) -> Result<u64, Error> {
        match self.kind {
            FileKind::Regular => rustix::fs::fstat(&self.fd).map(|stat| stat.st_size.max(0) as u64),
            FileKind::BlockDevice => rustix::fs::seek(&self.fd, SeekFrom::End(0)),
        }
        .map_err(|errno| self.error("find the size of", errno))
    }

    /// What tells whether the file is still the same and unchanged.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn identity(&self) -> Result<Identity, Error> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(&self.fd, c"", AtFlags::EMPTY_PATH, wanted)
            .map_err(|errno| self.error("identify", errno))?;
        let time = |time: rustix::fs::StatxTimestamp| {
            i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
        };
        let has_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok(Identity {
            inode: stat.stx_ino,
            size: self.size()?,
            birth_ns: has_birth.then(|| time(stat.stx_btime)),
            mtime_ns: time(stat.stx_mtime),
            ctime_ns: time(stat.stx_ctime),
        })
    }

    /// The value of the extended attribute `name`; `None` if the file has none of that name, or can't
    /// have any.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attribute(&self, name: &CStr) -> Result<Option<Vec<u8>>, Error> {
        let mut value = vec![0; ATTRIBUTE_SIZE_MAX];
        match rustix::fs::fgetxattr(&self.fd, name, value.as_mut_slice()) {
            Ok(len) => {
                value.truncate(len);
                Ok(Some(value))
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(None),
            Err(errno) => Err(self.error("read an attribute of", errno)),
        }
    }

    /// Gives the extended attribute `name` a value; nothing is synced. Changes the file's `ctime`.
    ///
    /// # Errors
    /// What the kernel says; unsupported if the file can't have any.
    pub fn set_attribute(&self, name: &CStr, value: &[u8]) -> Result<(), Error> {
        rustix::fs::fsetxattr(&self.fd, name, value, XattrFlags::empty())
            .map_err(|errno| self.error("set an attribute of", errno))
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// What the kernel says; `UnexpectedEof` if the file ends before; `InvalidInput` if the file
    /// is direct and offset or length are not aligned (`buf` itself may lie anywhere).
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        let fail = |error| self.error("read", error).at(offset);
        self.check_aligned(buf.len(), offset).map_err(fail)?;
        if self.memory_is_aligned(buf.as_ptr()) {
            return self.read_all(buf, offset).map_err(fail);
        }
        let mut bounce = AlignedBuf::new_zeroed(buf.len().min(probe::BOUNCE_MAX));
        let mut at = offset;
        for part in buf.chunks_mut(probe::BOUNCE_MAX) {
            if let Some(bounce) = bounce.get_mut(..part.len()) {
                self.read_all(bounce, at).map_err(fail)?;
                part.copy_from_slice(bounce);
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes all of `buf` from `offset` on.
    ///
    /// # Errors
    /// As [`read_exact_at`](File::read_exact_at). After an error any part may have been written.
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> Result<(), Error> {
        let fail = |error| self.error("write", error).at(offset);
        self.check_aligned(buf.len(), offset).map_err(fail)?;
        if self.memory_is_aligned(buf.as_ptr()) {
            return self.write_all(buf, offset).map_err(fail);
        }
        let mut bounce = AlignedBuf::new_zeroed(buf.len().min(probe::BOUNCE_MAX));
        let mut at = offset;
        for part in buf.chunks(probe::BOUNCE_MAX) {
            if let Some(bounce) = bounce.get_mut(..part.len()) {
                bounce.copy_from_slice(part);
                self.write_all(bounce, at).map_err(fail)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn check_aligned(&self, len: usize, offset: u64) -> io::Result<()> {
        let align = u64::from(self.alignment.offset);
        if offset.is_multiple_of(align) && (len as u64).is_multiple_of(align) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("offset and length of direct I/O must be multiples of {align}"),
        ))
    }

    fn memory_is_aligned(&self, memory: *const u8) -> bool {
        memory.addr().is_multiple_of(self.alignment.memory as usize)
    }

    fn read_all(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(&self.fd, &mut *buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = buf.get_mut(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn write_all(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match rustix::io::pwrite(&self.fd, buf, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    buf = buf.get(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Deallocates a range, which reads as zeros afterwards; the file keeps its size. Parts of
    /// file system blocks at the ends are written as zeros.
    ///
    /// # Errors
    /// What the kernel says; unsupported if the file system or device cannot.
    pub fn punch_hole(&self, offset: u64, len: u64) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, probe::PUNCH, offset, len))
            .map_err(|errno| self.error("punch a hole into", errno).at(offset))
    }

    /// Has this file share a range with the same range of `from`: its blocks are those of `from` from then on, until
    /// either is written to there. [`sync_all`](File::sync_all) makes it durable. Offset and length are to be multiples
    /// of the [unit](File::allocation_unit), and the range is to lie inside of both files.
    ///
    /// # Errors
    /// What the kernel says, as where the two are not on one file system that can do this. Then any part of the
    /// range may be shared, and the rest is as it was.
    pub fn share_from(&self, from: &File, offset: u64, len: u64) -> Result<(), Error> {
        rustix::io::retry_on_intr(|| share::share(&from.fd, &self.fd, offset, len))
            .map_err(|errno| self.error("share blocks with", errno).at(offset))
    }

    /// What the file system gives out at once, in bytes: its block size; `None` for a device or if that can't be told.
    pub fn allocation_unit(&self) -> Option<u64> {
        let stat = rustix::fs::fstatvfs(&self.fd).ok().filter(|_| self.kind == FileKind::Regular)?;
        Some(stat.f_bsize).filter(|bytes| bytes.is_power_of_two())
    }

    /// The same file, read-only and past the page cache: what is on the medium.
    ///
    /// # Errors
    /// What `open` says; unsupported where there is no direct I/O.
    pub fn reopen_direct(&self) -> Result<File, Error> {
        let options = OpenOptions { direct: true, ..OpenOptions::default() };
        let fail = |errno: Errno| self.error("open for direct I/O", errno);
        let fd = rustix::fs::open(self.own_path(), flags(options), Mode::empty()).map_err(fail)?;
        Self::finish(fd, &self.path, self.kind, options)
    }

    /// The same file, for writing through the page cache.
    ///
    /// # Errors
    /// What `open` says.
    pub fn reopen_for_writes(&self) -> Result<File, Error> {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let fail = |errno: Errno| self.error("open for writing", errno);
        let fd = rustix::fs::open(self.own_path(), flags(options), Mode::empty()).map_err(fail)?;
        Self::finish(fd, &self.path, self.kind, options)
    }

    /// Its path may be another file's by now; this one is its descriptor's.
    fn own_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// The way to zero ranges that is tried first where `how` is asked for.
    pub(crate) fn zeroing(&self, how: Zeroing) -> Zeroing {
        let unmaps = self.abilities.punch || !self.abilities.zero;
        if how == Zeroing::Unmap && !unmaps { Zeroing::Keep } else { how }
    }

    /// The first range of data at or after `from`, cut at the file's size; `None` if there is
    /// only a hole up to the end. What cannot tell (devices) is all data.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, Error> {
        let size = self.size()?;
        if from >= size {
            return Ok(None);
        }
        if self.kind == FileKind::BlockDevice {
            return Ok(Some(from..size));
        }
        let fail = |errno| self.error("find data in", errno).at(from);
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(from)) {
            Ok(start) => start.max(from),
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..size)),
            Err(errno) => return Err(fail(errno)),
        };
        let end = match rustix::fs::seek(&self.fd, SeekFrom::Hole(start)) {
            Ok(end) => end.min(size),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => size,
            Err(errno) => return Err(fail(errno)),
        };
        // Empty if the file shrank or was punched meanwhile: then there is data to look for later on.
        Ok((start < size).then(|| start..end.max(start + 1)))
    }
}

fn flags(options: OpenOptions) -> OFlags {
    let mut flags = OFlags::CLOEXEC | if options.write { OFlags::RDWR } else { OFlags::RDONLY };
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    flags
}

fn kind_of(stat: &rustix::fs::Stat) -> Option<FileKind> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(FileKind::Regular),
        FileType::BlockDevice => Some(FileKind::BlockDevice),
        _ => None,
    }
}
