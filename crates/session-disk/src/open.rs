//! Taking a disk over: locks, identity, and what the state on disk says.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base_image::{BaseIdentity, BaseImage, BaseLocation, Seal, Trust, device_name};
use blockio::{File, FileKind, ImageAccess, OpenOptions, in_full};
use blocks::Geometry;
use write_log::{LogContents, LogError, LogId, LogKind};

use crate::Error;
use crate::intents::Intents;
use crate::live::{Before, LivePage};
use crate::manifest::{BaseEntry, DiskFile, LogEntry, Manifest};
use crate::paths::Paths;
use crate::process::boot_id;
use crate::recover::{Evidence, FoundLog, Verdict, conclude};
use crate::storage::Storage;
use crate::{DiskOptions, witness};

/// How long to wait for the I/O of a server that died: its lock is held until the last of it has landed.
pub(crate) const DEAD_SERVER_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long to wait for a holder of whom nothing is known: it may be about to go.
pub(crate) const UNKNOWN_HOLDER_WAIT_MAX: Duration = Duration::from_secs(1);
pub(crate) const DEAD_SERVER_POLL: Duration = Duration::from_millis(5);

/// Opens the disk for writing and takes all locks. Nothing is changed.
///
/// Invariant 7: the lock is on the open file description that does all writes, so it is held until
/// the last write of a killed server has landed, and two servers can't have it.
pub(crate) fn open_disk(path: &Path, direct: bool, live: Option<&LivePage>) -> Result<Arc<File>, Error> {
    let options = OpenOptions { write: true, direct, exclusive: true };
    let in_use = |by: String| Error::InUse { path: path.to_owned(), by };
    let started = Instant::now();
    loop {
        let attempt = File::open(path, options).and_then(|file| {
            file.lock_exclusive()?;
            file.lock_image(ImageAccess::ReadWrite)?;
            Ok(file)
        });
        match (attempt, live.and_then(LivePage::server)) {
            (Ok(file), _) => return Ok(Arc::new(file)),
            (Err(error), _) if !error.is_in_use() => return Err(error.into()),
            (Err(_), Some(server)) if server.is_alive() => {
                return Err(in_use(format!(": it is served by process {}", server.pid)));
            }
            // The server died; the kernel still finishes or cancels its I/O.
            (Err(_), Some(_)) if started.elapsed() < DEAD_SERVER_WAIT_MAX => {
                std::thread::sleep(DEAD_SERVER_POLL);
            }
            // A server that stopped in order, or a tool: its descriptors may outlive it for a moment.
            (Err(_), None) if started.elapsed() < UNKNOWN_HOLDER_WAIT_MAX => {
                std::thread::sleep(DEAD_SERVER_POLL);
            }
            (Err(_), _) => return Err(in_use(" by another program (QEMU, qemu-img or pristine)".into())),
        }
    }
}

/// Fails if the disk is the base, or a file that the base is made of.
pub(crate) fn refuse_disk_of_base(disk: &Path, base: &BaseImage) -> Result<(), Error> {
    base.paths()?.iter().try_for_each(|path| refuse_same_file(disk, path))
}

pub(crate) fn refuse_same_file(disk: &Path, base: &Path) -> Result<(), Error> {
    let id = |path: &Path| -> Result<(u64, u64, u64), Error> {
        let metadata = fs::metadata(path).map_err(|error| Error::state("open", path, error))?;
        Ok(if metadata.rdev() != 0 { (0, 0, metadata.rdev()) } else { (metadata.dev(), metadata.ino(), 0) })
    };
    if id(disk)? == id(base)? {
        return Err(Error::Refused(format!(
            "disk {} and base {} are the same file; a disk needs a file of its own",
            disk.display(),
            base.display()
        )));
    }
    Ok(())
}

/// The size of a disk, which must be what the manifest says, and not be another device under the same name.
pub(crate) fn check_disk(disk: &File, manifest: &Manifest) -> Result<Geometry, Error> {
    check_device(disk, manifest)?;
    let geometry = Geometry::new(manifest.size)
        .map_err(|source| Error::Geometry { path: disk.path().to_owned(), source })?;
    let found = disk.size()?;
    let fits = match disk.kind() {
        FileKind::Regular => found == manifest.size,
        FileKind::BlockDevice => found >= manifest.size,
    };
    if fits {
        Ok(geometry)
    } else {
        Err(Error::DiskSize { path: disk.path().to_owned(), found, expected: manifest.size })
    }
}

/// Fails if the disk is another device than the manifest is about. What is on a device is nobody's to overwrite only because it
/// has the name now that the disk had before the host was started.
fn check_device(disk: &File, manifest: &Manifest) -> Result<(), Error> {
    let another = |found: String, expected: &str| {
        let (path, expected) = (disk.path().to_owned(), expected.to_owned());
        Err(Error::AnotherDevice { path, found, expected })
    };
    match (disk.kind(), &manifest.file, &manifest.device) {
        (FileKind::BlockDevice, Some(_), _) => another("a device".into(), "a file"),
        (FileKind::Regular, None, _) => another("a file".into(), "a device"),
        (FileKind::BlockDevice, None, Some(expected)) => match device_name(disk) {
            Some(found) if found == *expected => Ok(()),
            Some(found) => another(format!("the device \"{found}\""), &format!("\"{expected}\"")),
            None => another(
                "a device of which the kernel knows nothing but numbers".into(),
                &format!("the device \"{expected}\""),
            ),
        },
        _ => Ok(()),
    }
}

/// Fails if a state directory that was named is about another file, and nothing says that the disk ever was a session disk. A
/// copy of one, or one from a backup, has its attribute, or the state beside it: there all of it is pending.
pub(crate) fn refuse_unrelated(
    storage: &Storage,
    disk: &File,
    manifest: &Manifest,
    options: &DiskOptions,
) -> Result<(), Error> {
    let (Some(state), Some(now)) = (&options.state_dir, disk_witness(disk)?) else { return Ok(()) };
    if manifest.file == DiskFile::of(&now) || witness::generation(storage, disk)?.is_some() {
        return Ok(());
    }
    Err(Error::UnknownFile { path: disk.path().to_owned(), state: state.clone() })
}

/// Opens the base of a manifest; fails if it changed. A sealed one may look different, as a copy does: nothing is
/// read of it that does not have its hash. A server that is away is no error: what is read of it waits, for `patience` at
/// most.
pub(crate) fn open_base(manifest: &Manifest, patience: Duration) -> Result<BaseImage, Error> {
    let BaseEntry { path: location, format, identity, root, .. } = &manifest.base;
    // Nothing is guessed and no file opened that it did not consist of when the disk was provisioned.
    let base = match location {
        BaseLocation::File(path) => BaseImage::open(path, Some(*format), Trust::Recorded(&identity.backing)),
        BaseLocation::Nbd(uri) => BaseImage::connect(uri, Some(*format), Some(identity.size), patience),
    };
    let base = base.map_err(|error| match error {
        // It may be one of the files that the base is backed by.
        base_image::BaseError::Io(error) if error.is_in_use() => {
            Error::InUse { path: error.path().to_owned(), by: " by a program that may write to it".into() }
        }
        error => error.into(),
    })?;
    let Some(root) = root else {
        base.check(identity)?;
        return Ok(base);
    };
    let found = find_seal(location, manifest.base.seal.as_deref())?;
    match found {
        Some(seal) if seal.root() == *root => Ok(base.sealed(seal)?),
        found => Err(Error::OtherSeal {
            base: location.as_path().to_owned(),
            found: found.as_ref().map(Seal::root),
            expected: *root,
        }),
    }
}

/// The seal of the base at `location`: the one at `named`, or beside it.
pub(crate) fn find_seal(location: &BaseLocation, named: Option<&Path>) -> Result<Option<Seal>, Error> {
    Ok(match (named, location) {
        (Some(path), _) => Seal::at(path)?,
        (None, BaseLocation::File(path)) => Seal::of(path)?,
        (None, BaseLocation::Nbd(_)) => None,
    })
}

/// What the base of a manifest, which was just opened, must look like as long as it is open.
pub(crate) fn identity_of(base: &BaseImage, manifest: &Manifest) -> Result<BaseIdentity, Error> {
    match base.seal() {
        Some(_) => Ok(base.identity()?),
        None => Ok(manifest.base.identity.clone()),
    }
}

/// What a disk looks like, to notice writes from outside; `None` for a block device.
pub(crate) fn disk_witness(disk: &File) -> Result<Option<BaseIdentity>, Error> {
    Ok(match disk.kind() {
        FileKind::Regular => Some(BaseIdentity::of_file(&disk.identity()?)),
        FileKind::BlockDevice => None,
    })
}

/// The disk's inode number, or its device number: which disk a live page is about.
pub(crate) fn file_number(disk: &Path) -> Result<u64, Error> {
    let metadata = fs::metadata(disk).map_err(|error| Error::state("open", disk, error))?;
    Ok(if metadata.rdev() != 0 { metadata.rdev() } else { metadata.ino() })
}

/// Locks a state directory for one server: two disks must not share one. The lock is on the directory of
/// the logs, for who makes a socket beside the manifest locks the state directory for a moment.
pub(crate) fn lock_state_dir(paths: &Paths) -> Result<fs::File, Error> {
    let (dir, logs) = (paths.state_dir(), paths.sessions());
    let file = fs::File::open(&logs).map_err(|error| Error::state("open", &logs, error))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(Error::InUse { path: dir.to_owned(), by: " by a server of another disk".into() })
        }
        Err(error) => Err(Error::state("lock", dir, error.into())),
    }
}

/// Opens a disk again, under an open file description of its own, to sync it.
pub(crate) fn open_for_sync(disk: &File) -> Result<File, Error> {
    let path = format!("/proc/self/fd/{}", disk.as_fd().as_raw_fd());
    Ok(File::open(Path::new(&path), OpenOptions { write: false, direct: false, exclusive: false })?)
}

/// Reads all that speaks for the disk, and concludes. Changes nothing.
pub(crate) fn judge(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    geometry: Geometry,
    disk: &File,
    live: Before,
) -> Result<Verdict, Error> {
    judge_logs(storage, paths, manifest, geometry, disk, live, &|path| storage.read_log(path))
}

/// [`judge`] of the logs that `read` finds.
fn judge_logs(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    geometry: Geometry,
    disk: &File,
    live: Before,
    read: &dyn Fn(&Path) -> Result<LogContents, LogError>,
) -> Result<Verdict, Error> {
    let found = |entry: &LogEntry| -> FoundLog {
        read(&paths.sessions().join(entry.id().file_name())).map_err(|error| in_full(&error))
    };
    let logs = manifest.logs.iter().map(|entry| (*entry, found(entry))).collect();
    let disk_now = disk_witness(disk)?;
    let evidence = Evidence {
        disk_now: disk_now.as_ref(),
        boot: boot_id()?,
        generation: witness::generation(storage, disk)?,
        logs,
        live: live.mark,
        same_boot: live.same_boot,
        session_open: live.session_open,
        intents: Intents::read_blocks(storage, &paths.intents(), geometry)?,
    };
    Ok(conclude(manifest, geometry, evidence))
}

/// Logs that are there and not in the manifest, the youngest first.
fn retired_logs(paths: &Paths, manifest: &Manifest) -> Vec<LogId> {
    let Ok(entries) = fs::read_dir(paths.sessions()) else { return Vec::new() };
    let mut retired: Vec<LogId> = entries
        .flatten()
        .filter_map(|entry| LogId::parse(entry.file_name().to_str()?))
        .filter(|id| !manifest.logs.iter().any(|entry| entry.id() == *id))
        .collect();
    retired.sort_by_key(|id| std::cmp::Reverse(id.seq));
    retired
}

/// Removes a log that speaks for nothing (any more).
pub(crate) fn remove_log(storage: &Storage, paths: &Paths, id: LogId) {
    let path = paths.sessions().join(id.file_name());
    match storage.remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove retired log {}: {error}", path.display());
        }
        _ => {}
    }
}

/// Removes retired logs but the youngest `keep`, and anything half-made. `untouched`: what the last session has left may still be
/// held, so that its log stays in any case, with what tells that it is the last one's.
pub(crate) fn prune_logs(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    keep: usize,
    untouched: bool,
) {
    let retired = retired_logs(paths, manifest);
    if retired.len() <= keep {
        return;
    }
    let is_session = |id: &LogId| {
        let header = write_log::read_header(&paths.sessions().join(id.file_name()));
        header.is_ok_and(|header| header.kind == LogKind::Session)
    };
    let needed = match !untouched || manifest.logs.iter().any(|entry| entry.kind() == LogKind::Session) {
        true => 0,
        false => retired.iter().position(is_session).map_or(0, |last| last + 1),
    };
    retired.into_iter().skip(keep.max(needed)).for_each(|id| remove_log(storage, paths, id));
}

/// Removes logs whose numbers are still to be given: their sessions have not come to anything.
pub(crate) fn remove_logs_to_come(storage: &Storage, paths: &Paths, manifest: &Manifest) {
    let to_come = retired_logs(paths, manifest).into_iter().filter(|id| id.seq >= manifest.next_sequence);
    to_come.for_each(|id| remove_log(storage, paths, id));
}

/// Removes the oldest retired log, to make room; whether there was one and it is gone.
fn drop_oldest_retired(storage: &Storage, paths: &Paths, manifest: &Manifest) -> bool {
    let Some(id) = retired_logs(paths, manifest).pop() else { return false };
    let path = paths.sessions().join(id.file_name());
    log::warn!("no room for a write log: the retired log {} is removed before its time", path.display());
    remove_log(storage, paths, id);
    !path.exists()
}

/// Makes a log with `make`. What is only kept for audit gives way to it, the oldest first. `manifest` is the disk's.
pub(crate) fn with_room<T>(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    mut make: impl FnMut() -> Result<T, LogError>,
) -> Result<T, LogError> {
    loop {
        match make() {
            Err(LogError::NoSpace { .. }) if drop_oldest_retired(storage, paths, manifest) => {}
            result => return result,
        }
    }
}

/// After an attempt to make `manifest` the disk's that failed: removes the logs that it would have added. Where there
/// is no room, what failed attempts leave must not take up the last of it.
pub(crate) fn remove_unnamed_logs(storage: &Storage, paths: &Paths, manifest: &Manifest) {
    // Should it have failed after the rename, the new manifest holds and names its logs.
    if let Ok(holds) = Manifest::load(paths) {
        let unnamed = manifest.logs.iter().filter(|entry| !holds.logs.contains(entry));
        unnamed.for_each(|entry| remove_log(storage, paths, entry.id()));
    }
}

#[cfg(test)]
mod tests;
