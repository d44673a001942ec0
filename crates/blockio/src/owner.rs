//! What root makes among another user's files.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, fchown, fstat, open, statat};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Gives a file or directory of root's that lies at `path` to the owner of the directory in which it lies, if that is somebody
/// else, so that who serves a disk as that user can go on after root has done something to it. A file that has another name too, or
/// whose name was changed meanwhile, stays root's; so does what can't be given away.
pub fn give_to_owner_of_directory(made: impl AsFd, path: &Path) {
    if geteuid().is_root()
        && let Err(errno) = give(made, path)
    {
        log::debug!("{} stays as it is: {errno}", path.display());
    }
}

fn give(made: impl AsFd, path: &Path) -> Result<(), Errno> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(Errno::INVAL)?;
    // Once: whoever owns it could put another one in its place between two looks.
    let dir = open(dir, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let (of, named, opened) = (fstat(&dir)?, statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?, fstat(&made)?);
    let is_the_one = (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino);
    let has_one_name = match FileType::from_raw_mode(opened.st_mode) {
        FileType::RegularFile => opened.st_nlink == 1,
        FileType::Directory => true,
        _ => false,
    };
    if of.st_uid == 0 || opened.st_uid != 0 || !is_the_one || !has_one_name {
        return Ok(());
    }
    fchown(&made, Some(Uid::from_raw(of.st_uid)), Some(Gid::from_raw(of.st_gid)))
}
