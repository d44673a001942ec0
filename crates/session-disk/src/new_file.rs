//! A new file that has its name when it is whole, and not before.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::Error;

/// A file that is being written. Until [`publish`](Self::publish) nobody sees it, and where the file system has files
/// without names nothing is left of it, however the process ends.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: fs::File,
    path: PathBuf,
    /// The name that it has meanwhile, on file systems where each file has one.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Begins a file, readable by its owner only, that is to be at `path`.
    ///
    /// # Errors
    /// If something is there already, or no file can be made in that directory.
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(directory(path), flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Self { file: file.into(), path: path.to_owned(), temporary: None }),
            // The last one is what file systems and kernels say that do not know the flag.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::ISDIR) => Self::create_named(path),
            Err(error) => Err(Error::state("create", path, error.into())),
        }
    }

    fn create_named(path: &Path) -> Result<Self, Error> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let temporary = PathBuf::from(name);
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.map_err(|error| Error::state("create", &temporary, error))?;
        Ok(Self { file, path: path.to_owned(), temporary: Some(temporary) })
    }

    /// What to write it through.
    pub(crate) fn file(&self) -> Result<fs::File, Error> {
        self.file.try_clone().map_err(|error| Error::state("open", &self.path, error))
    }

    /// Gives the file, which was synced, its name, durably.
    ///
    /// # Errors
    /// If something has that name by now: it stays. Or if it can't be named; then nothing is left of it.
    pub(crate) fn publish(mut self) -> Result<(), Error> {
        let named = match &self.temporary {
            None => {
                let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, unnamed, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)
            }
            Some(temporary) => match rustix::fs::link(temporary, &self.path) {
                Err(Errno::PERM | Errno::OPNOTSUPP) => {
                    rustix::fs::renameat_with(CWD, temporary, CWD, &self.path, RenameFlags::NOREPLACE)
                }
                linked => linked,
            },
        };
        match named {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(exists(&self.path)),
            Err(error) => return Err(Error::state("create", &self.path, error.into())),
        }
        self.remove_temporary();
        let dir = directory(&self.path);
        let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|error| Error::state("sync directory", dir, error))
    }

    fn remove_temporary(&mut self) {
        let Some(temporary) = self.temporary.take() else { return };
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("cannot remove {}: {error}", temporary.display());
            }
            _ => {}
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        self.remove_temporary();
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => Path::new("/"),
    }
}

fn exists(path: &Path) -> Error {
    Error::Refused(format!(
        "{} exists already, and nothing is overwritten; name another file",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    type Create = fn(&Path) -> Result<NewFile, Error>;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn file_has_its_name_when_it_is_published_and_leaves_nothing_else() {
        for create in [NewFile::create as Create, NewFile::create_named] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let new = create(&path).unwrap();
            new.file().unwrap().write_all(b"whole").unwrap();
            assert!(!path.exists());
            new.publish().unwrap();
            assert_eq!(
                (fs::read(&path).unwrap(), names(dir.path())),
                (b"whole".to_vec(), vec!["new".into()])
            );
            drop(create(&dir.path().join("never")).unwrap());
            assert_eq!(names(dir.path()), ["new"]);
        }
    }

    #[test]
    fn file_that_exists_is_never_overwritten() {
        for create in [NewFile::create as Create, NewFile::create_named] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let new = create(&path).unwrap();
            // Somebody is faster.
            fs::write(&path, b"theirs").unwrap();
            assert!(matches!(new.publish(), Err(Error::Refused(why)) if why.contains("exists")));
            assert!(matches!(NewFile::create(&path), Err(Error::Refused(_))));
            assert_eq!(
                (fs::read(&path).unwrap(), names(dir.path())),
                (b"theirs".to_vec(), vec!["new".into()])
            );
        }
    }
}
