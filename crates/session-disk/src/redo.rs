//! What a killed server was copying into the map of its disk: done to the end before anybody reads the disk.
//!
//! While a server lives, whoever reads what it is writing gets some of it. When it was killed, a sector must be
//! there as it was, or as it was to be, for the session may go on, and what it leaves may be kept. (An in-flight table
//! has the whole request done again; not every frontend has one, and none survives the VM.)
//!
//! Who wrote is known from the live page: of the server that it names, and of no other, the file beside it tells. A
//! server that knew nothing of that file, and served the disk between, has put its own name there. One that had another
//! runtime directory has not; but it has concluded what the session did, so that its log is no longer the manifest's.

use std::fs;
use std::io;
use std::sync::Arc;

use blockio::{File, Redo, in_full};
use blocks::{Extent, Geometry, SECTOR_SIZE};
use uuid::Uuid;

use crate::live::{Before, LivePage};
use crate::manifest::Manifest;
use crate::open::judge;
use crate::process::ProcessId;
use crate::storage::Storage;
use crate::{Error, Paths};

/// Opens the file for a server of the disk. `None`: it is not to be had, and there is none that says anything.
///
/// # Errors
/// If it is there and can't be opened: nobody knows what it says.
pub(crate) fn open(paths: &Paths, disk: Uuid) -> Result<Option<Arc<Redo>>, Error> {
    let path = paths.redo(disk);
    // One that says something has room for it, but a file system that copies on write may not say so.
    let says_nothing = || match fs::symlink_metadata(&path) {
        Ok(found) => {
            found.is_file() && fs::read(&path).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0))
        }
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    match Redo::open(&path) {
        Ok(redo) => Ok(Some(Arc::new(redo))),
        Err(error) if says_nothing() => {
            log::warn!("writes to tmpfs and ext4 are slower: {}", in_full(&error));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Does to the end what the last server of `live`, which must be of this boot and disk, was killed in the middle of, if the
/// session's log is still one of `manifest`. Only in blocks of which `may_differ` says so: those that the session owned, or
/// that are not believed anyway.
///
/// # Errors
/// If the disk can't be written.
pub(crate) fn finish(
    redo: &Redo,
    live: &LivePage,
    manifest: &Manifest,
    geometry: Geometry,
    disk: &File,
    may_differ: impl Fn(Extent) -> Result<bool, Error>,
) -> Result<(), Error> {
    let Some(server) = live.server() else { return Ok(()) };
    if !live.mark().is_some_and(|mark| manifest.logs.iter().any(|log| log.sequence == mark.sequence)) {
        return Ok(());
    }
    for write in redo.unfinished(words(server)) {
        let (sector, len) = (write.offset / SECTOR_SIZE, write.data.len() as u64);
        let range = geometry.sectors_at(sector, len).ok().filter(|range| range.offset() == write.offset);
        let wanted = range.map_or(Ok(false), |range| may_differ(range.touched()))?;
        if wanted {
            // Through the page cache, whatever the disk was opened for: sectors need not be what direct I/O wants.
            disk.reopen_for_writes()?.write_all_at(&write.data, write.offset)?;
            log::info!(
                "{}: {len} bytes at {} were written to their end",
                disk.path().display(),
                write.offset
            );
        } else {
            log::warn!(
                "{}: its last server was killed while it wrote {len} bytes at {}, which is not its session's: they are left as \
                 they are",
                disk.path().display(),
                write.offset
            );
        }
    }
    Ok(())
}

/// [`finish`] for whoever only reads the disk, and has it locked. `live` is of this boot and disk, if there is one.
///
/// # Errors
/// As there, and if the disk's state can't be read.
pub(crate) fn finish_for_reader(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    geometry: Geometry,
    disk: &File,
    live: Option<&LivePage>,
) -> Result<(), Error> {
    let path = paths.redo(manifest.disk);
    let Some(live) = live.filter(|live| !live.is_poisoned() && path.exists()) else { return Ok(()) };
    finish(&Redo::open(&path)?, live, manifest, geometry, disk, |extent| {
        let before = Before::of(Some(live)).session_over();
        Ok(judge(storage, paths, manifest, geometry, disk, before)?.pending.contains_all(extent))
    })
}

/// Says that nothing is left to be done, and that it is this process that writes from now on.
pub(crate) fn begin(redo: &Redo) {
    redo.begin(words(ProcessId::own()));
}

fn words(process: ProcessId) -> [u64; 2] {
    [process.pid.into(), process.start_ticks]
}
