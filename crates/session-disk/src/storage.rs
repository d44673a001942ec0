//! All I/O on a disk's state: plain system calls, each of which passes a tape if there is one. (Without a tape a log's frames
//! need no call each.)
//!
//! Nothing else in this crate reads, makes, changes, syncs, renames or removes a file of the state or
//! syncs the disk, so that a test can stop the world at any of them. (Not among them: the live page
//! and the file of [writes to be done again](crate::redo), which are memory and not meant to survive the host; which logs there
//! are, by their names; and the clean-up of a provision that failed.)

use std::ffi::CStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{panic, thread};

use blockio::tape::{Io, Tape, TapeEngine, pass};
use blockio::{Engine, File, OpenOptions, WindowedFile, give_to_owner_of_directory};
use rustix::fs::OFlags;
use write_log::{DiskDir, DiskFile, LogContents, LogDir, LogError, LogFile};

use crate::Error;

/// Makes the I/O of one disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Storage {
    tape: Option<Arc<dyn Tape>>,
}

impl Storage {
    /// I/O that passes `tape`.
    pub(crate) fn new(tape: Option<Arc<dyn Tape>>) -> Self {
        Self { tape }
    }

    /// Whether I/O passes a tape: then all of it is done in the thread that wants it.
    pub(crate) fn has_tape(&self) -> bool {
        self.tape.is_some()
    }

    fn pass<T>(&self, io: Io<'_>, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        pass(self.tape.as_deref(), io, make)
    }

    /// Reads the first `max` bytes of a file of the state, or all that it has.
    ///
    /// # Errors
    /// `InvalidInput` also if it is not a regular file: who may write to the directory can put one there that never ends, or
    /// that nobody ever opens at its other end.
    pub(crate) fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>> {
        self.pass(Io::Read { path, offset: 0, len: 0 }, || {
            let file = open_regular(fs::OpenOptions::new().read(true), OFlags::empty(), path)?;
            let mut bytes = Vec::new();
            file.take(max).read_to_end(&mut bytes)?;
            Ok(bytes)
        })
    }

    /// Reads a log.
    pub(crate) fn read_log(&self, path: &Path) -> Result<LogContents, LogError> {
        match &self.tape {
            None => write_log::read(path),
            Some(_) => write_log::read_from(self.log_file(path, false)?.as_ref(), path),
        }
    }

    /// Opens a log to go on writing it.
    pub(crate) fn open_log(&self, path: &Path) -> Result<Box<dyn LogFile>, LogError> {
        self.log_file(path, true)
    }

    fn log_file(&self, path: &Path, write: bool) -> Result<Box<dyn LogFile>, LogError> {
        let file = DiskFile::open(path, write);
        let file = file.map_err(|source| LogError::Io { operation: "open", path: path.into(), source })?;
        Ok(match &self.tape {
            None if write => Box::new(WindowedLog(WindowedFile::new(file))),
            None => Box::new(file),
            Some(_) => Box::new(TapedLog { file, path: path.to_owned(), storage: self.clone() }),
        })
    }

    /// Makes a directory for its owner only.
    pub(crate) fn create_dir(&self, path: &Path) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        self.pass(Io::CreateDir { path }, || fs::DirBuilder::new().mode(0o700).create(path))
    }

    /// Makes a disk's file; see [`File::create_new`].
    pub(crate) fn create_disk(&self, path: &Path, size: u64, options: OpenOptions) -> Result<File, Error> {
        let mut failure = None;
        let made = self.pass(Io::Create { path, len: size }, || {
            File::create_new(path, size, options).map_err(|error| {
                failure = Some(error);
                io::ErrorKind::Other.into()
            })
        });
        made.map_err(|error| failure.map_or_else(|| Error::state("create", path, error), Error::from))
    }

    /// Puts a file of `bytes` at `path`, in the place of what may be there: written under another
    /// name, synced, renamed. After an error that is not of the rename's the old one still holds. The caller syncs the
    /// directory.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let staged = self.stage(path, bytes)?;
        staged.sync()?;
        staged.place()
    }

    /// The first part of [`replace`](Self::replace): the file is written under its other name, and nothing is synced.
    pub(crate) fn stage(&self, path: &Path, bytes: &[u8]) -> io::Result<Staged> {
        let new = path.with_extension("new");
        let file = self.pass(Io::Create { path: &new, len: 0 }, || {
            let mut options = fs::OpenOptions::new();
            open_regular(options.write(true).create(true).truncate(true).mode(0o600), OFlags::NOFOLLOW, &new)
        });
        // From here on it is removed unless it is placed, also if it could not be made: it may have been there.
        let guard = Unplaced { storage: self.clone(), new, placed: false };
        let mut file = file?;
        give_to_owner_of_directory(&file, &guard.new);
        let io = Io::Write { path: &guard.new, offset: 0, bytes, durable: false };
        self.pass(io, || file.write_all(bytes))?;
        Ok(Staged { guard, file, path: path.to_owned() })
    }

    /// Does `here` in this thread and `beside` in another one meanwhile: for what waits for the medium, which takes two
    /// syncs at a time as fast as one. Under a tape, or if no thread is to be had, `beside` is done afterwards.
    pub(crate) fn both<A, B: Send>(&self, here: impl FnOnce() -> A, beside: impl Fn() -> B + Sync) -> (A, B) {
        if self.has_tape() {
            let done = here();
            return (done, beside());
        }
        both(here, beside)
    }

    /// Writes to a file that was opened with `O_DSYNC`.
    pub(crate) fn write_durably(
        &self,
        file: &fs::File,
        path: &Path,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        let io = Io::Write { path, offset, bytes, durable: true };
        self.pass(io, || file.write_all_at(bytes, offset))
    }

    /// Removes a file.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        self.pass(Io::Remove { path }, || fs::remove_file(path))
    }

    /// Makes the entries of a directory durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<(), Error> {
        self.pass(Io::SyncDir { path }, || fs::File::open(path)?.sync_all())
            .map_err(|error| Error::state("sync directory", path, error))
    }

    /// Syncs the disk at `path` with `sync`.
    pub(crate) fn sync_disk(
        &self,
        path: &Path,
        sync: impl FnOnce() -> Result<(), blockio::Error>,
    ) -> Result<(), Error> {
        self.pass(Io::Sync { path }, || sync().map_err(to_io))
            .map_err(|error| Error::state("sync", path, error))
    }

    /// Reads an extended attribute of the disk.
    pub(crate) fn attribute(&self, disk: &File, name: &CStr) -> Result<Option<Vec<u8>>, Error> {
        let path = disk.path();
        self.pass(Io::Read { path, offset: 0, len: 0 }, || disk.attribute(name).map_err(to_io))
            .map_err(|error| Error::state("read an attribute of", path, error))
    }

    /// Sets an extended attribute of the disk. Its value is not synced.
    pub(crate) fn set_attribute(&self, disk: &File, name: &CStr, value: &[u8]) -> io::Result<()> {
        let path = disk.path();
        self.pass(Io::SetAttribute { path }, || disk.set_attribute(name, value).map_err(to_io))
    }

    /// The directory at `path` as a place for logs.
    pub(crate) fn logs(&self, path: &Path) -> Box<dyn LogDir> {
        let dir = DiskDir::new(path);
        match &self.tape {
            None => Box::new(QuickDir { dir }),
            Some(_) => Box::new(TapedDir { dir, storage: self.clone() }),
        }
    }

    /// An engine for the files at `paths`, under the tape.
    pub(crate) fn engine(&self, engine: Box<dyn Engine>, paths: &[&Path]) -> Box<dyn Engine> {
        match &self.tape {
            None => engine,
            Some(tape) => {
                let paths = paths.iter().map(|path| path.to_path_buf()).collect();
                Box::new(TapeEngine::new(engine, Arc::clone(tape), paths))
            }
        }
    }
}

/// A file that is written under another name than it will have. Removed if it is dropped before it has that.
#[derive(Debug)]
#[must_use]
pub(crate) struct Staged {
    guard: Unplaced,
    file: fs::File,
    path: PathBuf,
}

/// Removes a file that has not got its name.
#[derive(Debug)]
struct Unplaced {
    storage: Storage,
    new: PathBuf,
    placed: bool,
}

impl Staged {
    /// Makes what was written durable, but not under which name.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.guard.storage.pass(Io::Sync { path: &self.guard.new }, || self.file.sync_all())
    }

    /// Gives the file, which is synced, its name, in the place of what has that name. The caller syncs the directory.
    pub(crate) fn place(mut self) -> io::Result<()> {
        let old = fs::File::open(&self.path);
        let Unplaced { storage, new, placed } = &mut self.guard;
        storage.pass(Io::Rename { from: new, to: &self.path }, || fs::rename(&new, &self.path))?;
        *placed = true;
        if let Ok(old) = old {
            close_elsewhere(old);
        }
        Ok(())
    }
}

impl Drop for Unplaced {
    fn drop(&mut self) {
        if !self.placed {
            let _ = self.storage.remove(&self.new);
        }
    }
}

fn both<A, B: Send>(here: impl FnOnce() -> A, beside: impl Fn() -> B + Sync) -> (A, B) {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("sync".to_owned()).spawn_scoped(scope, &beside);
        let done = here();
        let beside = match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)),
            Err(_) => beside(),
        };
        (done, beside)
    })
}

/// Closes a file that may have no name any more. On a file system that is mounted with `discard`, who closes the last
/// descriptor of such a file waits until the medium has discarded its blocks, for as long as a sync or longer.
fn close_elsewhere(file: fs::File) {
    // Where no thread is to be had it is closed here: with what would have been run by it.
    let _ = thread::Builder::new().name("close".to_owned()).spawn(move || drop(file));
}

fn to_io(error: blockio::Error) -> io::Error {
    io::Error::new(error.io_error().kind(), error)
}

/// A directory for logs that is synced while a log in it is.
#[derive(Debug)]
struct QuickDir {
    dir: DiskDir,
}

impl LogDir for QuickDir {
    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        let file = DiskFile::create_new(path)?;
        give_to_owner_of_directory(&file, path);
        Ok(Box::new(WindowedLog(WindowedFile::new(file))))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.dir.remove(path)
    }

    fn sync(&self) -> io::Result<()> {
        self.dir.sync()
    }

    fn sync_with(&self, file: &mut dyn LogFile) -> io::Result<()> {
        let (data, names) = both(|| file.sync_data(), || self.dir.sync());
        data.and(names)
    }
}

/// A log's file most of whose frames are written without a system call: they are a few bytes behind the last ones. What a
/// kill leaves of one that it cuts is no frame: a log is one after a power cut too, which may cut anything.
#[derive(Debug)]
struct WindowedLog(WindowedFile<DiskFile>);

impl LogFile for WindowedLog {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.get().read_at(bytes, offset)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.0.get_mut().sync_data()
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        self.0.get_mut().reserve(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.get().len()
    }
}

/// A directory for logs, all of whose I/O passes a tape.
#[derive(Debug)]
struct TapedDir {
    dir: DiskDir,
    storage: Storage,
}

impl LogDir for TapedDir {
    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        let file = self.storage.pass(Io::Create { path, len: 0 }, || DiskFile::create_new(path))?;
        Ok(Box::new(TapedLog { file, path: path.to_owned(), storage: self.storage.clone() }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.storage.remove(path)
    }

    fn sync(&self) -> io::Result<()> {
        self.storage.pass(Io::SyncDir { path: self.dir.path() }, || self.dir.sync())
    }
}

/// A log's file, all of whose I/O passes a tape.
#[derive(Debug)]
struct TapedLog {
    file: DiskFile,
    path: PathBuf,
    storage: Storage,
}

impl LogFile for TapedLog {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let io = Io::Write { path: &self.path, offset, bytes, durable: false };
        self.storage.pass(io, || self.file.write_at(bytes, offset))
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let io = Io::Read { path: &self.path, offset, len: bytes.len() as u64 };
        self.storage.pass(io, || self.file.read_at(bytes, offset))
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.storage.pass(Io::Sync { path: &self.path }, || self.file.sync_data())
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        self.storage.pass(Io::Reserve { path: &self.path, len }, || self.file.reserve(len))
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
}

/// Opens a regular file, and doesn't wait for anybody if it is something else.
pub(crate) fn open_regular(
    options: &mut fs::OpenOptions,
    flags: OFlags,
    path: &Path,
) -> io::Result<fs::File> {
    let file = options.custom_flags((flags | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::{Duration, Instant};

    use blocks::{BlockSet, Extent, Geometry};
    use rustix::fs::{FileType, Mode};
    use uuid::Uuid;
    use write_log::{LogHeader, LogId, LogKind, LogWriter};

    use super::*;

    /// What waits for the medium goes on beside each other.
    #[test]
    fn both_are_done_at_the_same_time() {
        let meets = |sender: &Sender<()>, receiver: &Receiver<()>| {
            sender.send(()).unwrap();
            receiver.recv_timeout(Duration::from_secs(60)).is_ok()
        };
        let ((to_beside, from_here), (to_here, from_beside)) = (channel(), channel());
        let beside = std::sync::Mutex::new((to_here, from_here));
        let met = Storage::default().both(
            || meets(&to_beside, &from_beside),
            || {
                let (to_here, from_here) = &*beside.lock().unwrap();
                meets(to_here, from_here)
            },
        );
        assert_eq!(met, (true, true));
    }

    /// Writes that this thread has asked the kernel for, where it counts them.
    fn write_calls() -> Option<u64> {
        let counts = fs::read_to_string("/proc/thread-self/io").ok()?;
        counts.lines().find_map(|line| line.strip_prefix("syscw: ")?.parse().ok())
    }

    /// What is appended is in the log at once, with few system calls, and whoever goes on with the log has it.
    #[test]
    fn log_written_through_a_window_is_what_its_readers_find() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let storage = Storage::default();
        let header = LogHeader {
            kind: LogKind::Session,
            id: LogId { seq: 1, uuid: Uuid::new_v4() },
            disk: Uuid::new_v4(),
            geometry: Geometry::new(1 << 30).unwrap(),
            created_unix_ns: 0,
        };
        let mut log = LogWriter::create_in(&*storage.logs(dir.path()), &header).unwrap();
        let path = log.path().to_owned();
        let owned = BlockSet::new(header.geometry.blocks());
        for turn in 0..3 {
            let before = write_calls();
            let began = Instant::now();
            for block in (turn..3000).step_by(3) {
                let mark = log.append(&[Extent::new(block, 1)], &owned).unwrap();
                owned.insert(Extent::new(block, 1));
                if block % 97 == 0 {
                    let found = storage.read_log(&path).unwrap().blocks_at(mark).unwrap();
                    assert_eq!(found.to_bytes(), owned.to_bytes());
                }
            }
            if let (Some(before), Some(after)) = (before, write_calls()) {
                // One for each page, and one a second.
                let limit = 1000 * 24 / 4096 + 2 + began.elapsed().as_secs();
                assert!(after - before <= limit, "{} calls for 1000 appends", after - before);
            }
            let mark = log.mark();
            drop(log);
            let file = storage.open_log(&path).unwrap();
            let (again, found) = LogWriter::resume_on(file, path.clone(), mark).unwrap();
            assert_eq!(found.to_bytes(), owned.to_bytes());
            log = again;
        }
    }

    /// Who owns a disk's directory can put into it what he likes, and root looks there.
    #[test]
    fn what_is_no_regular_file_is_refused_and_nobody_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (path, storage) = (dir.path().join("manifest"), Storage::default());
        let made = rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0);
        made.unwrap();
        assert_eq!(storage.read(&path, 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let new = path.with_extension("new");
        fs::rename(&path, &new).unwrap();
        let reader = rustix::fs::open(&new, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        assert_eq!(storage.replace(&path, b"x").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        drop(reader);
        storage.replace(&path, b"x").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert_eq!(storage.read(&path, 10).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn staged_file_that_is_not_placed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest");
        let storage = Storage::default();
        storage.replace(&path, b"old").unwrap();
        drop(storage.stage(&path, b"new").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let staged = storage.stage(&path, b"new").unwrap();
        staged.sync().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        staged.place().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
