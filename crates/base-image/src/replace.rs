//! A file that takes the place of another one when it is whole.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::BaseError;

/// A file that is being written as `PATH.new`. It is locked, so that nobody else writes to it or takes it for one that was
/// left, and made by us: no link that somebody has put there is followed. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct Replacement {
    path: PathBuf,
    new: PathBuf,
    file: File,
    published: bool,
}

impl Replacement {
    /// Begins the file that is to be at `path`. One that a killed process has left half-made goes.
    ///
    /// # Errors
    /// If it can't be made, or another process is at it.
    pub(crate) fn begin(path: &Path) -> Result<Self, BaseError> {
        let mut new = OsString::from(path);
        new.push(".new");
        let new = PathBuf::from(new);
        let file = create_anew(&new).map_err(|source| BaseError::manifest("make", &new, source))?;
        Ok(Self { path: path.to_owned(), new, file, published: false })
    }

    /// What to write it through.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The name that it has meanwhile.
    pub(crate) fn name(&self) -> &Path {
        &self.new
    }

    /// Puts it in the place of what may be there, durably. The caller has synced it.
    ///
    /// # Errors
    /// If it can't be renamed; then nothing is left of it. Or if its directory can't be synced.
    pub(crate) fn publish(mut self) -> Result<(), BaseError> {
        if !is_at(&self.file, &self.new).unwrap_or(false) {
            // Somebody else has put his there. That is not ours to remove.
            self.published = true;
            return Err(BaseError::manifest("replace", &self.path, busy()));
        }
        fs::rename(&self.new, &self.path)
            .map_err(|source| BaseError::manifest("replace", &self.path, source))?;
        self.published = true;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| BaseError::manifest("sync directory", dir, source))
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
/// that is gone.
fn create_anew(path: &Path) -> io::Result<File> {
    let create = || File::options().write(true).create_new(true).open(path);
    let file = match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_left(path)?;
            create()?
        }
        file => file?,
    };
    // Between its making and its locking another process may have taken it for one that was left.
    let is_ours = lock(&file)? != Lock::Theirs && is_at(&file, path)?;
    if is_ours { Ok(file) } else { Err(busy()) }
}

fn remove_left(path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    if !found.is_file() {
        // A link, for example: it goes, and what it leads to stays.
        return fs::remove_file(path);
    }
    // For writing: some file systems lock nothing else exclusively.
    let file = File::options().write(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path)?;
    let is_left = lock(&file)? == Lock::Ours && is_at(&file, path)?;
    if is_left { fs::remove_file(path) } else { Err(busy()) }
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

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
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

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn file_takes_the_place_of_another_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();
        let new = Replacement::begin(&path).unwrap();
        new.file().write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        new.publish().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"new".to_vec(), vec!["f".into()]));
        drop(Replacement::begin(&path).unwrap());
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"new".to_vec(), vec!["f".into()]));
    }

    #[test]
    fn two_at_once_do_not_write_to_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let first = Replacement::begin(&path).unwrap();
        let refused = Replacement::begin(&path).unwrap_err();
        assert!(
            matches!(&refused, BaseError::Manifest { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
        );
        first.file().write_all(b"first").unwrap();
        first.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn what_was_left_goes_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new, theirs) = (dir.path().join("f"), dir.path().join("f.new"), dir.path().join("theirs"));
        fs::write(&theirs, "theirs").unwrap();
        for link in [symlink::<&Path, &Path>, fs::hard_link::<&Path, &Path>] {
            link(&theirs, &new).unwrap();
            let begun = Replacement::begin(&path).unwrap();
            begun.file().write_all(b"ours").unwrap();
            begun.publish().unwrap();
            assert_eq!(
                (fs::read(&path).unwrap(), fs::read(&theirs).unwrap()),
                (b"ours".to_vec(), b"theirs".to_vec())
            );
        }
    }
}
