//! Moving a disk to another base: to the next generation of its base, or back to the one before.
//!
//! Of a block that is not pending the disk holds what its base has, durably. So if the blocks that [differ](difference)
//! between the two bases are made pending as well, all the others hold what the new base has. No block is copied
//! here: that is the drain's work, as ever, and the next session need not wait for it.
//!
//! Crash order, step 11: what was pending, what the last session has left, and what differs are made one durable log. Then
//! one rename of the manifest makes that the disk's only log, and the new base its base. Up to it the disk is one of the old
//! generation, and from it on one of the new; a log that no manifest names is one of those that were retired.

mod difference;
mod path;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use base_image::{BaseIdentity, BaseImage, BaseLocation};
use blockio::File;
use blocks::{BlockSet, Geometry};
use write_log::{LogHeader, LogWriter};

use self::difference::Question;
use crate::disk::{next_entry, unix_ns};
use crate::live::{Before, LivePage, heed_sync};
use crate::manifest::{BaseEntry, DiskFile, EntryKind, Manifest, Stopped};
use crate::named_base::NamedBase;
use crate::open::{
    check_disk, disk_witness, file_number, judge, lock_state_dir, open_disk, prune_logs, refuse_disk_of_base,
    refuse_same_file, refuse_unrelated, remove_unnamed_logs, with_room,
};
use crate::process::ProcessId;
use crate::recover::Basis;
use crate::storage::Storage;
use crate::{DiskOptions, Error, Paths, witness};

pub use self::difference::Way;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct RebaseOptions {
    /// The new base.
    pub base: NamedBase,
    /// The disk and where its state is.
    pub disk: DiskOptions,
    /// Give up the changes of sessions that are kept, if there are any. Without this a disk that has them is refused.
    pub discard_kept: bool,
}

impl RebaseOptions {
    /// To the file or device `base`, whose format is as its seal or its file name says.
    pub fn new(base: impl Into<PathBuf>, disk: DiskOptions) -> Self {
        Self { base: NamedBase::file(base), disk, discard_kept: false }
    }
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Rebased {
    /// The old base.
    pub from: BaseEntry,
    /// The new one.
    pub to: BaseEntry,
    /// How it was found out what differs.
    pub way: Way,
    /// Blocks in which the bases may differ; of those that were pending not all were asked for.
    pub differing_blocks: u64,
    /// Blocks that were pending before, or that the last session had left.
    pub pending_before: u64,
    /// Blocks that are to be restored now: those and these.
    pub pending_blocks: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// What it rests on that no others were pending before.
    pub basis: Basis,
}

/// A disk that nobody serves, locked, and what is known of it.
struct Subject {
    paths: Paths,
    storage: Storage,
    disk: std::sync::Arc<File>,
    manifest: Manifest,
    geometry: Geometry,
    _state_lock: fs::File,
}

/// Moves the disk to another base. Nothing is copied: the blocks that differ are pending afterwards, and the disk can be
/// served at once. `progress` is told up to which byte of the disk it was compared, if it has to be.
///
/// # Errors
/// If the disk is served, has an open session, is held, has changes that are kept, or is smaller than the new base; if something
/// can't be read or written; or if `stop` is set. The disk then belongs to the old base, unless all that failed is the last
/// sync of the new manifest's name.
pub fn rebase(
    options: &RebaseOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Rebased, Error> {
    let path = &options.disk.disk;
    let subject = take(&options.disk)?;
    let Subject { paths, storage, disk, manifest, geometry, .. } = &subject;
    if let Some(reason) = manifest.held.clone().filter(|reason| !reason.is_over()) {
        return Err(Error::Held { disk: path.clone(), named: paths.arguments(), reason });
    }
    let named = options.base.resolved()?;
    let (base, identity) = open_new_base(&options.disk, &named, *geometry)?;

    let live = LivePage::inspect(&paths.live_page(manifest.disk), manifest.disk, file_number(path)?);
    refuse_open_session(paths, live.as_ref(), "changes its base")?;
    let before = Before::of(live.as_ref()).session_over();
    let verdict = judge(storage, paths, manifest, *geometry, disk, before)?;
    let pending = verdict.pending;
    if manifest.kept && !pending.is_empty() && !options.discard_kept {
        return Err(Error::Kept { disk: path.clone() });
    }
    let pending_before = pending.count();
    let question = Question {
        old: &manifest.base,
        new: &base,
        new_location: &named.location,
        new_seal: named.seal.as_deref(),
        new_identity: &identity,
        disk,
        geometry: *geometry,
        pending: &pending,
    };
    let (differing, way) = question.answer(stop, progress)?;
    if way == Way::Comparison {
        // What was found equal is so for good.
        storage.sync_disk(path, || heed_sync(disk, live.as_ref(), File::sync_all))?;
    }
    base.check(&identity)?;
    pending.insert_set(&differing);

    let to = named.entry(&base, identity);
    let rebased = Rebased {
        from: manifest.base.clone(),
        to: to.clone(),
        way,
        differing_blocks: differing.count(),
        pending_before,
        pending_blocks: pending.count(),
        blocks: geometry.blocks(),
        basis: verdict.basis,
    };
    switch(&subject, to, &pending, options.disk.keep_logs)?;
    Ok(rebased)
}

/// Locks a disk that nobody serves.
fn take(options: &DiskOptions) -> Result<Subject, Error> {
    let (paths, storage) = (options.paths(), Storage::new(options.tape.clone()));
    let path = &options.disk;
    // A first look, to know the live page's name; it is read again under the lock.
    let id = Manifest::load_from(&storage, &paths)?.disk;
    let live = LivePage::inspect(&paths.live_page(id), id, file_number(path)?);
    let disk = open_disk(path, false, live.as_ref())?;
    paths.create_state_dirs(&storage, &mut Vec::new())?;
    let state_lock = lock_state_dir(&paths)?;
    let manifest = Manifest::load_from(&storage, &paths)?;
    let geometry = check_disk(&disk, &manifest)?;
    refuse_unrelated(&storage, &disk, &manifest, options)?;
    Ok(Subject { paths, storage, disk, manifest, geometry, _state_lock: state_lock })
}

fn open_new_base(
    options: &DiskOptions,
    named: &NamedBase,
    geometry: Geometry,
) -> Result<(BaseImage, BaseIdentity), Error> {
    if let BaseLocation::File(path) = &named.location {
        refuse_same_file(&options.disk, path)?;
    }
    let (base, identity) = named.open_settled(options.base_patience)?;
    refuse_disk_of_base(&options.disk, &base)?;
    if base.size() > geometry.size() {
        return Err(Error::Refused(format!(
            "the base {} has {} bytes, more than the {} of the disk {}; a disk is at least as large as its base, so make \
             a new one of it with `pristine provision`",
            named.location.display(),
            base.size(),
            geometry.size(),
            options.disk.display()
        )));
    }
    Ok((base, identity))
}

/// Refuses a disk with a session that may go on: that a server left open whose VM may be alive.
pub(crate) fn refuse_open_session(paths: &Paths, live: Option<&LivePage>, what: &str) -> Result<(), Error> {
    // What one has written whose storage failed may be lost: nothing goes on then.
    let Some(live) = live.filter(|live| !live.is_poisoned() && live.session_may_go_on()) else {
        return Ok(());
    };
    let whose = live.owner().map_or_else(String::new, |ProcessId { pid, .. }| format!(" of process {pid}"));
    Err(Error::Refused(format!(
        "{disk}: a session{whose} is open, and a disk {what} between sessions: shut the VM down, or end the \
         session with `pristine session end {named}`",
        disk = paths.disk().display(),
        named = paths.arguments()
    )))
}

/// Makes `base` the base of the disk, and `pending` what of the disk is not its content: crash order, step 11.
fn switch(subject: &Subject, base: BaseEntry, pending: &BlockSet, keep_logs: usize) -> Result<(), Error> {
    let Subject { paths, storage, disk, manifest: old, geometry, .. } = subject;
    let named = witness::generation(storage, disk)?;
    let mut manifest = Manifest {
        file: disk_witness(disk)?.as_ref().and_then(DiskFile::of),
        base,
        logs: Vec::new(),
        pristine_since: None,
        generation: witness::next_generation(old.generation, named),
        held: None,
        kept: false,
        left: None,
        stopped: None,
        ..old.clone()
    };
    let (live, before) = LivePage::open(paths, old.disk, file_number(disk.path())?)?;
    if pending.is_empty() {
        let told = Some(&live).filter(|_| before.same_boot);
        storage.sync_disk(disk.path(), || heed_sync(disk, told, File::sync_all))?;
        manifest.pristine_since = disk_witness(disk)?;
    } else {
        let entry = next_entry(&mut manifest, EntryKind::Pending);
        let header = LogHeader {
            kind: entry.kind(),
            id: entry.id(),
            disk: old.disk,
            geometry: *geometry,
            created_unix_ns: unix_ns(),
        };
        let logs = storage.logs(&paths.sessions());
        with_room(storage, paths, old, || LogWriter::write_pending_in(&*logs, &header, pending))?;
        manifest.stopped = Stopped::of(disk)?;
    }
    // The last session, should it have been left open, is over: there is nothing to be held of it any more. Its log says
    // what it said before.
    let was_open = live.session_is_named();
    live.set_session_open(false);
    if let Err(error) = manifest.store(storage, paths) {
        // Unless the disk is what it was.
        let is_as_before = || Manifest::load_from(storage, paths).is_ok_and(|found| found == *old);
        if was_open && is_as_before() {
            live.set_session_open(true);
        }
        remove_unnamed_logs(storage, paths, &manifest);
        return Err(error);
    }
    if !manifest.logs.is_empty() {
        witness::set_generation(storage, disk, manifest.generation);
    }
    prune_logs(storage, paths, &manifest, keep_logs, false);
    // No log needs it to be exact any more.
    let page = paths.live_page(manifest.disk);
    match fs::remove_file(&page) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove {}: {error}", page.display());
        }
        _ => {}
    }
    Ok(())
}
