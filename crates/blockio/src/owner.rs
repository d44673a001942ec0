//! Files that root makes among another user's.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{FileType, fchown, fstat, lstat, stat};
use rustix::process::geteuid;

/// Gives a file of root's that lies at `path` to the owner of its directory, if that is somebody else, so that who serves a disk
/// as that user can go on after root has done something to it. A file that has another name, or whose name was changed meanwhile, stays
/// root's; so does one that can't be given away.
pub fn give_to_owner_of_directory(file: impl AsFd, path: &Path) {
    if !geteuid().is_root() {
        return;
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (Ok(dir), Ok(named), Ok(opened)) = (stat(dir), lstat(path), fstat(&file)) else { return };
    let is_the_one = (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino);
    let is_roots = opened.st_uid == 0 && FileType::from_raw_mode(opened.st_mode).is_file();
    if dir.st_uid == 0 || !is_roots || !is_the_one || opened.st_nlink != 1 {
        return;
    }
    let (user, group) = (rustix::fs::Uid::from_raw(dir.st_uid), rustix::fs::Gid::from_raw(dir.st_gid));
    if let Err(errno) = fchown(&file, Some(user), Some(group)) {
        log::debug!("{} stays root's: {errno}", path.display());
    }
}
