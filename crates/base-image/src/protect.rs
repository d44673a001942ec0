//! Who may read what is written beside a base, and tells of what the base holds.

use std::os::fd::AsFd;
use std::path::Path;

use blockio::{File, FileKind};
use rustix::fs::{Gid, Mode, Uid, fchmod, fchown, fstat};
use rustix::io::Errno;

use crate::error::BaseError;

/// Gives a file to those who may read `base`, and nobody else, as far as that can be: its owner, its group and its mode. The owner
/// may do what `owner` says besides reading it.
///
/// # Errors
/// If that can't be done to the file, whose name is `path`.
pub(crate) fn protect_as(base: &File, file: impl AsFd, owner: Mode, path: &Path) -> Result<(), BaseError> {
    let failed = |errno: Errno| BaseError::manifest("protect", path, errno.into());
    let of = fstat(base).map_err(failed)?;
    let own = fstat(&file).map_err(failed)?;
    // A device's owner is the system's, not whose data it is.
    let user = (base.kind() == FileKind::Regular).then_some(of.st_uid);
    let group = Gid::from_raw(of.st_gid);
    if user.is_some_and(|user| user != own.st_uid) || of.st_gid != own.st_gid {
        // Only root can give files away; others can to a group that they are in.
        let _ =
            fchown(&file, user.map(Uid::from_raw), Some(group)).or_else(|_| fchown(&file, None, Some(group)));
    }
    let is_its_group = fstat(&file).map_err(failed)?.st_gid == of.st_gid;
    let mode = Mode::from_raw_mode(readers(of.st_mode, is_its_group)) | Mode::RUSR | owner;
    fchmod(&file, mode).map_err(failed)
}

/// Those who may read a base with this mode. For a group that is not the base's they are what all others are.
fn readers(mode: u32, is_its_group: bool) -> u32 {
    let group = if is_its_group { mode & 0o040 } else { (mode & 0o004) << 3 };
    mode & 0o404 | group
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_no_more_than_those_of_the_base() {
        for (mode, same_group, another) in [
            (0o100_600, 0o400, 0o400),
            (0o100_640, 0o440, 0o400),
            (0o100_666, 0o444, 0o444),
            (0o100_604, 0o404, 0o444),
            (0o107_777, 0o444, 0o444),
        ] {
            assert_eq!((readers(mode, true), readers(mode, false)), (same_group, another), "{mode:o}");
        }
    }
}
