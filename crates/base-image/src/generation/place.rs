//! Where a generation is made, and how it comes to its name: see the crash order in the module above.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockio::{File, OpenOptions};
use rustix::fs::{CWD, Mode, RenameFlags};
use rustix::io::Errno;

use super::refused;
use crate::delta::Delta;
use crate::error::BaseError;
use crate::protect::protect_as;
use crate::replace::is_at;
use crate::seal::manifest_path;

const SUFFIX: &str = ".promoting";
/// How often a name may change hands while it is taken.
const ATTEMPTS_MAX: u32 = 16;

/// The image that a half-made one with the name `name` was to become; `None`: it is none.
pub(crate) fn half_made_name(name: &OsStr) -> Option<&str> {
    name.to_str()?.strip_suffix(SUFFIX)
}

/// A name that is taken, by a lock on the file that will have it. What is made here is removed with it unless it is
/// [published](Self::publish).
pub(super) struct Place {
    to: PathBuf,
    temporary: PathBuf,
    file: File,
    /// What was there of an attempt before.
    replaced: Vec<PathBuf>,
    /// Names beside the image's own that this attempt has given away.
    named: Vec<PathBuf>,
    published: bool,
}

fn exists(path: &Path) -> Result<bool, BaseError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(BaseError::manifest("look at", path, error)),
    }
}

/// Where the file at `to` really is to be.
fn resolve(to: &Path) -> Result<PathBuf, BaseError> {
    let name = to.file_name().ok_or_else(|| refused(to, "it does not end in the name of a file"))?;
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(fs::canonicalize(dir).map_err(|error| BaseError::manifest("open directory", dir, error))?.join(name))
}

impl Place {
    /// Takes the name `to`, which nothing may have.
    ///
    /// # Errors
    /// If something has it, or a manifest or a delta that is not left of an attempt before, or another attempt is under
    /// way.
    pub(super) fn take(to: &Path) -> Result<Self, BaseError> {
        let to = resolve(to)?;
        let temporary = with_suffix(&to, SUFFIX);
        for _ in 0..ATTEMPTS_MAX {
            if exists(&to)? {
                return Err(taken(&to));
            }
            let open = OpenOptions { write: true, ..OpenOptions::default() };
            let (file, fresh) = match File::create_new(&temporary, 0, open) {
                Ok(file) => (file, true),
                Err(error) if error.io_error().kind() == io::ErrorKind::AlreadyExists => {
                    match File::open(&temporary, open) {
                        Ok(file) => (file, false),
                        Err(error) if error.io_error().kind() == io::ErrorKind::NotFound => continue,
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            };
            if let Err(error) = file.lock_exclusive() {
                return Err(match error.is_in_use() {
                    true => refused(&to, "another `pristine promote` is making it"),
                    false => error.into(),
                });
            }
            // Whoever had the lock before may have given the file its name, or removed it.
            let inode = file.identity()?.inode;
            if fs::symlink_metadata(&temporary).is_ok_and(|now| now.ino() == inode && now.is_file()) {
                let place =
                    Self { to, temporary, file, replaced: Vec::new(), named: Vec::new(), published: false };
                return place.clear(fresh);
            }
        }
        Err(refused(&to, "its name changes hands all the time"))
    }

    /// Removes what an attempt before has left; whatever else is there is not touched.
    fn clear(mut self, fresh: bool) -> Result<Self, BaseError> {
        if exists(&self.to)? {
            let to = self.to.clone();
            // Not this attempt's, if it was there.
            self.published = !fresh;
            return Err(taken(&to));
        }
        let beside = [Delta::path_of(&self.to), manifest_path(&self.to)];
        if fresh {
            for path in &beside {
                if exists(path)? {
                    let of = self.to.display();
                    let what = format!("it is there, and {of} is not: put that back, or remove this first");
                    return Err(refused(path, what));
                }
            }
            return Ok(self);
        }
        let of = rustix::fs::fstat(&self.file);
        let links =
            of.map_err(|errno| BaseError::manifest("look at", &self.temporary, errno.into()))?.st_nlink;
        if links != 1 {
            self.published = true;
            let what = "it has another name too (a hard link), and would be emptied under both: remove it";
            return Err(refused(&self.temporary, what));
        }
        self.replaced.push(self.temporary.clone());
        for path in beside.into_iter().chain(self.temporary_names()) {
            match fs::remove_file(&path) {
                Ok(()) => self.replaced.push(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    self.published = true;
                    return Err(BaseError::manifest("remove", &path, error));
                }
            }
        }
        let emptied = rustix::fs::ftruncate(&self.file, 0);
        emptied.map_err(|errno| BaseError::manifest("empty", &self.temporary, errno.into()))?;
        Ok(self)
    }

    /// What is written beside the image before it has its name.
    fn temporary_names(&self) -> [PathBuf; 3] {
        let delta = Delta::path_of(&self.temporary);
        [with_suffix(&delta, ".new"), delta, manifest_path(&self.temporary)]
    }

    /// The image, where it is made.
    pub(super) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// The same, open; empty at first.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn dir(&self) -> &Path {
        self.to.parent().unwrap_or(Path::new("/"))
    }

    /// How `path`, which is absolute, is named from the image's directory.
    pub(super) fn name_from_here(&self, path: &Path) -> PathBuf {
        path.strip_prefix(self.dir()).unwrap_or(path).to_owned()
    }

    /// Makes the image read-only, for those who may read `parent`, and durable but for its name.
    pub(super) fn protect(&self, parent: &File) -> Result<(), BaseError> {
        protect_as(parent, &self.file, Mode::empty(), &self.temporary)?;
        Ok(self.file.sync_all()?)
    }

    /// The same of what was written beside the image, whose hashes tell of it: of these two files, and no other.
    ///
    /// # Errors
    /// If one of them does not have its name any more, or can't be changed.
    pub(super) fn protect_beside(
        &self,
        parent: &File,
        delta: &fs::File,
        manifest: &fs::File,
    ) -> Result<(), BaseError> {
        for (file, path) in
            [(delta, Delta::path_of(&self.temporary)), (manifest, manifest_path(&self.temporary))]
        {
            // Whoever may write in the directory could have put something else in its place since it was written. Whose
            // it is says nothing: some file systems (NFS, FUSE) know other owners than we are.
            if !is_at(file, &path).map_err(|error| BaseError::manifest("look at", &path, error))? {
                return Err(refused(&path, "it was replaced while the new base was made"));
            }
            protect_as(parent, file, Mode::empty(), &path)?;
            file.sync_all().map_err(|error| BaseError::manifest("protect", &path, error))?;
        }
        Ok(())
    }

    /// Gives all that was made its name, the image last. From then on it is there, for good.
    ///
    /// # Errors
    /// If a name is taken, or a directory can't be synced.
    pub(super) fn publish(mut self) -> Result<(PathBuf, Vec<PathBuf>), BaseError> {
        let (temporary, to) = (self.temporary.clone(), self.to.clone());
        for (from, name) in [
            (Delta::path_of(&temporary), Delta::path_of(&to)),
            (manifest_path(&temporary), manifest_path(&to)),
        ] {
            rename_to_free(&from, &name)?;
            self.named.push(name);
        }
        self.sync_dir()?;
        rename_to_free(&temporary, &to)?;
        self.published = true;
        self.sync_dir()?;
        Ok((to, std::mem::take(&mut self.replaced)))
    }

    fn sync_dir(&self) -> Result<(), BaseError> {
        let sync = || fs::File::open(self.dir())?.sync_all();
        sync().map_err(|error| BaseError::manifest("sync directory", self.dir(), error))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        // The image last: as long as it is there, the rest is known to be nothing.
        let names = self.named.drain(..).collect::<Vec<_>>();
        for path in names.into_iter().chain(self.temporary_names()).chain([self.temporary.clone()]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("cannot remove the half-made {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}

fn taken(to: &Path) -> BaseError {
    refused(to, "it exists; a generation never replaces a file, choose another name")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    name.into()
}

/// Renames a file to a name that nothing has.
fn rename_to_free(from: &Path, to: &Path) -> Result<(), BaseError> {
    let renamed = match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Where the file system can't promise it (NFS), a second link can.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to).and_then(|()| fs::remove_file(from)),
        result => result.map_err(io::Error::from),
    };
    renamed.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => taken(to),
        _ => BaseError::manifest("give its name to", to, error),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    /// A place, what was written beside its image, and a base that only its owner's group may read.
    fn place(dir: &Path) -> (Place, [fs::File; 2], File) {
        let base = dir.join("base.raw");
        fs::write(&base, "a base").unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o640)).unwrap();
        let place = Place::take(&dir.join("new.raw")).unwrap();
        let beside = [Delta::path_of(place.temporary()), manifest_path(place.temporary())];
        let written = beside.map(|path| fs::File::create_new(path).unwrap());
        (place, written, File::open(&base, OpenOptions::default()).unwrap())
    }

    fn owner_and_mode(file: &fs::Metadata) -> (u32, u32) {
        (file.uid(), file.mode() & 0o7777)
    }

    /// Where another file has the name of one that was written, that is not given away, nor is it opened to those who may read the
    /// base: whether it is a link's target or has only that name, and whoever owns it.
    #[test]
    fn file_that_took_the_place_of_a_written_one_is_not_changed() {
        type Put = fn(&Path, &Path) -> io::Result<()>;
        let puts: [Put; 3] = [
            |from, to| symlink(from, to),
            |from, to| fs::hard_link(from, to),
            |from, to| fs::rename(from, to),
        ];
        for (put, which) in puts.into_iter().flat_map(|put| [(put, 0), (put, 1)]) {
            let dir = tempfile::tempdir().unwrap();
            let (place, [delta, manifest], base) = place(dir.path());
            let theirs = dir.path().join("theirs");
            fs::write(&theirs, "theirs").unwrap();
            fs::set_permissions(&theirs, fs::Permissions::from_mode(0o604)).unwrap();
            let open = fs::File::open(&theirs).unwrap();
            let before = owner_and_mode(&open.metadata().unwrap());
            let name = [Delta::path_of(place.temporary()), manifest_path(place.temporary())][which].clone();
            fs::remove_file(&name).unwrap();
            put(&theirs, &name).unwrap();
            let error = place.protect_beside(&base, &delta, &manifest).unwrap_err().to_string();
            assert!(error.contains("was replaced") && error.contains(name.to_str().unwrap()), "{error}");
            assert_eq!(owner_and_mode(&open.metadata().unwrap()), before);
        }
    }

    /// On a file system that maps owners what is written does not belong to who wrote it.
    #[test]
    fn file_that_was_written_is_protected_whoever_owns_it() {
        let dir = tempfile::tempdir().unwrap();
        let (place, [delta, manifest], base) = place(dir.path());
        if chown(manifest_path(place.temporary()), Some(54321), None).is_err() {
            println!("skipped: files can't be given away here");
        }
        place.protect_beside(&base, &delta, &manifest).unwrap();
        let owner = fs::metadata(dir.path().join("base.raw")).unwrap().uid();
        for file in [delta, manifest] {
            assert_eq!(owner_and_mode(&file.metadata().unwrap()), (owner, 0o440));
        }
    }
}
