//! A file that takes the place of another one when it is whole.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::BaseError;

/// What such files are told from others by: one takes the place of its like only, whatever path is named.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// How each of them begins.
    pub(crate) magic: &'static [u8],
    /// What one is called.
    pub(crate) name: &'static str,
}

/// A file that is being written as `PATH.new`. It is locked, so that nobody else writes to it or takes it for one that was
/// left, and made by us: no link that somebody has put there is followed. It has its beginning before anything else, by which
/// it is known if it is left. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct Replacement {
    path: PathBuf,
    new: PathBuf,
    kind: Kind,
    file: File,
    published: bool,
}

impl Replacement {
    /// Begins the file that is to be at `path`, with the mode `mode` as far as the umask lets it have that. One that a killed
    /// process has left half-made goes.
    ///
    /// # Errors
    /// If it can't be made, or another process is at it; if there is something at one of its two names that is neither empty
    /// nor of that kind.
    pub(crate) fn begin(path: &Path, kind: Kind, mode: u32) -> Result<Self, BaseError> {
        check_replaceable(path, kind).map_err(|source| BaseError::manifest("replace", path, source))?;
        let mut new = OsString::from(path);
        new.push(".new");
        let new = PathBuf::from(new);
        let file =
            create_anew(&new, kind, mode).map_err(|source| BaseError::manifest("make", &new, source))?;
        let begun = Self { path: path.to_owned(), new, kind, file, published: false };
        let marked = begun.file.write_all_at(kind.magic, 0);
        marked.map_err(|source| BaseError::manifest("write", &begun.new, source))?;
        Ok(begun)
    }

    /// What to write it through.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The name that it has meanwhile.
    pub(crate) fn name(&self) -> &Path {
        &self.new
    }

    /// Puts it in the place of what may be there, durably. The caller has synced it. Returns it, for what is left to do to that file
    /// and no other that may get its name.
    ///
    /// # Errors
    /// If it can't be renamed, or something else has come there meanwhile; then nothing is left of it. Or if its directory
    /// can't be synced.
    pub(crate) fn publish(mut self) -> Result<File, BaseError> {
        let failed = |source| BaseError::manifest("replace", &self.path, source);
        if !is_at(&self.file, &self.new).unwrap_or(false) {
            // Somebody else has put his there. That is not ours to remove.
            let error = failed(busy());
            self.published = true;
            return Err(error);
        }
        check_replaceable(&self.path, self.kind).map_err(failed)?;
        let file = self.file.try_clone().map_err(failed)?;
        fs::rename(&self.new, &self.path).map_err(failed)?;
        self.published = true;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| BaseError::manifest("sync directory", dir, source))?;
        Ok(file)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_file(&self.new);
        }
    }
}

/// Makes a file that was not there, and locks it. One that is there and that nobody has locked was left by a process
/// that is gone, if it looks like one.
fn create_anew(path: &Path, kind: Kind, mode: u32) -> io::Result<File> {
    let create = || File::options().write(true).create_new(true).mode(mode).open(path);
    let file = match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_left(path, kind)?;
            create()?
        }
        file => file?,
    };
    // Between its making and its locking another process may have taken it for one that was left.
    let is_ours = lock(&file)? != Lock::Theirs && is_at(&file, path)?;
    if is_ours { Ok(file) } else { Err(busy()) }
}

/// Opens what is at `path`, if that is a regular file; no link is followed, and nothing else is opened.
fn open_regular(path: &Path, kind: Kind, write: bool) -> io::Result<File> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(another(kind, "is no regular file (a link, a device, a directory)"));
    }
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    File::options().read(true).write(write).custom_flags(flags).open(path)
}

/// Fails unless a file is empty or begins as those of its kind do. One that was cut off there is of that kind, too.
fn check_kind(file: &File, kind: Kind) -> io::Result<()> {
    let mut head = Vec::new();
    file.take(kind.magic.len() as u64).read_to_end(&mut head)?;
    if kind.magic.starts_with(&head) { Ok(()) } else { Err(another(kind, "does not begin as one does")) }
}

/// Fails if there is something at `path` that is not a file of that kind: it is somebody's, and is lost if it is replaced.
fn check_replaceable(path: &Path, kind: Kind) -> io::Result<()> {
    match open_regular(path, kind, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        file => check_kind(&file?, kind),
    }
}

fn another(kind: Kind, why: &str) -> io::Error {
    let Kind { name, .. } = kind;
    let what = format!(
        "what is there {why}, so it is no {name}, and is not replaced; name another file, or remove this one first"
    );
    io::Error::new(io::ErrorKind::AlreadyExists, what)
}

fn remove_left(path: &Path, kind: Kind) -> io::Result<()> {
    // For writing: some file systems lock nothing else exclusively.
    let file = open_regular(path, kind, true)?;
    if lock(&file)? != Lock::Ours || !is_at(&file, path)? {
        return Err(busy());
    }
    check_kind(&file, kind)?;
    fs::remove_file(path)
}

/// Who has a file locked.
#[derive(PartialEq, Eq)]
enum Lock {
    Ours,
    Theirs,
    /// There are no locks on that file system, so that nobody can tell.
    Unknown,
}

fn lock(file: &File) -> io::Result<Lock> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock::Ours),
        Err(Errno::WOULDBLOCK) => Ok(Lock::Theirs),
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Lock::Unknown),
        Err(error) => Err(error.into()),
    }
}

/// Whether `path` is a name of this very file.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (open, named) = (file.metadata()?, fs::symlink_metadata(path)?);
    Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
}

fn busy() -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        "another process is making it (if none is, remove what one has left)",
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    const KIND: Kind = Kind { magic: b"A KIND\n", name: "file of a kind" };

    fn begin(path: &Path) -> Result<Replacement, BaseError> {
        Replacement::begin(path, KIND, 0o644)
    }

    fn finish(new: Replacement, text: &str) {
        // From the beginning on, as all do it.
        new.file().write_all(format!("A KIND\n{text}").as_bytes()).unwrap();
        new.publish().unwrap();
    }

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn file_takes_the_place_of_another_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        // What a crash left of one is one.
        for old in ["", "A KI", "A KIND\n", "A KIND\nold"] {
            fs::write(&path, old).unwrap();
            fs::write(dir.path().join("f.new"), old).unwrap();
            let new = begin(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), old.as_bytes());
            finish(new, "new");
            let now = (fs::read(&path).unwrap(), names(dir.path()));
            assert_eq!(now, (b"A KIND\nnew".to_vec(), vec!["f".into()]));
        }
        drop(begin(&path).unwrap());
        assert_eq!(
            (fs::read(&path).unwrap(), names(dir.path())),
            (b"A KIND\nnew".to_vec(), vec!["f".into()])
        );
    }

    #[test]
    fn two_at_once_do_not_write_to_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let first = begin(&path).unwrap();
        let refused = begin(&path).unwrap_err();
        assert!(
            matches!(&refused, BaseError::Manifest { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
        );
        finish(first, "first");
        assert_eq!(fs::read(&path).unwrap(), b"A KIND\nfirst");
    }

    /// What is left before its end was reached is known as ours: its beginning is there first.
    #[test]
    fn file_that_is_left_half_made_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let new = begin(&path).unwrap();
        new.file().write_all_at(b"the end first", 100).unwrap();
        let left = fs::read(new.name()).unwrap();
        drop(new);
        fs::write(dir.path().join("f.new"), left).unwrap();
        finish(begin(&path).unwrap(), "");
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"A KIND\n".to_vec(), vec!["f".into()]));
    }

    /// Whatever else has one of the two names is somebody's: it stays, and nothing is made beside it.
    #[test]
    fn what_is_of_another_kind_is_refused_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, theirs) = (dir.path().join("f"), dir.path().join("theirs"));
        type Put = fn(&Path, &Path) -> io::Result<()>;
        let (link, copy): (Put, Put) =
            (|from, to| symlink(from, to), |from, to| fs::copy(from, to).map(drop));
        for (content, put) in
            [("theirs", copy), ("A KIND of theirs", copy), ("theirs", link), ("A KIND\nby a link", link)]
        {
            fs::write(&theirs, content).unwrap();
            for name in ["f", "f.new"] {
                let taken = dir.path().join(name);
                put(&theirs, &taken).unwrap();
                let error = begin(&path).unwrap_err();
                let BaseError::Manifest { path: named, source, .. } = &error else { panic!("{error:?}") };
                assert_eq!(named, &taken);
                assert!(source.to_string().contains("no file of a kind"), "{source}");
                assert_eq!(names(dir.path()), [OsString::from(name), "theirs".into()]);
                assert_eq!(fs::read(&taken).unwrap(), content.as_bytes());
                fs::remove_file(&taken).unwrap();
            }
            assert_eq!(fs::read(&theirs).unwrap(), content.as_bytes());
        }
        // Also if it came later.
        let new = begin(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        new.publish().unwrap_err();
        assert_eq!(
            (fs::read(&path).unwrap(), names(dir.path())),
            (b"theirs".to_vec(), vec!["f".into(), "theirs".into()])
        );
    }
}
