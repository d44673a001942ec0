//! Taking a disk over: what it was left as becomes what it is.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use base_image::device_name;
use blockio::{EngineKind, File, in_full};
use write_log::LogWriter;

use super::{HoldReason, Lifecycle, OpenSession, SessionDisk, keep};
use crate::intents::Intents;
use crate::live::{LivePage, Report};
use crate::manifest::{DiskFile, Manifest};
use crate::open::{
    check_disk, disk_witness, file_number, identity_of, judge, lock_state_dir, open_base, open_disk,
    open_for_sync, refuse_disk_of_base, refuse_unrelated, remove_logs_to_come,
};
use crate::process::ProcessId;
use crate::recover::{Basis, Distrust, GoesOn};
use crate::shared::{FlushPolicy, Parts, Shared};
use crate::storage::Storage;
use crate::{Changes, DiskOptions, Error, Paths, redo, witness};

impl SessionDisk {
    /// Takes the disk over: locks it, finds out what is pending, and makes that durable.
    ///
    /// # Errors
    /// If the disk was not provisioned, is in use, its base changed, or its state can't be read. A
    /// state that can be read but not trusted is no error: then all blocks are pending.
    ///
    /// With [`DiskOptions::resume`], a session that is open and whose log is exact goes on: see
    /// [`session_is_open`](Self::session_is_open).
    pub fn open(options: &DiskOptions) -> Result<Arc<Self>, Error> {
        #[cfg(feature = "test-no-intents")]
        log::error!("{}: this build keeps no intents and leaks in a power cut", options.disk.display());
        let (paths, storage) = (options.paths(), Storage::new(options.tape.clone()));
        // A first look, to know the live page's name; it is read again under the lock.
        let disk_id = Manifest::load_from(&storage, &paths)?.disk;
        let number = file_number(&options.disk)?;
        let live = LivePage::inspect(&paths.live_page(disk_id), disk_id, number);
        let disk = open_disk(&options.disk, options.direct, live.as_ref())?;
        drop(live);
        paths.create_state_dirs(&storage, &mut Vec::new())?;
        let state_lock = lock_state_dir(&paths)?;
        let mut manifest = Manifest::load_from(&storage, &paths)?;
        let disk_id = manifest.disk;
        let geometry = check_disk(&disk, &manifest)?;
        refuse_unrelated(&storage, &disk, &manifest, options)?;
        if u64::from(disk.alignment().offset) > 512
            && !geometry.size().is_multiple_of(disk.alignment().offset.into())
        {
            return Err(Error::Refused(format!(
                "{}: direct I/O needs a size that is a multiple of {} bytes; serve it without --direct",
                options.disk.display(),
                disk.alignment().offset
            )));
        }
        let base = open_base(&manifest, options.base_patience)?;
        refuse_disk_of_base(&options.disk, &base)?;
        let (live, before) = LivePage::open(&paths, disk_id, number)?;
        let was_open = before.session_open;
        let before = if options.resume { before } else { before.session_over() };
        let verdict = judge(&storage, &paths, &manifest, geometry, &disk, before)?;
        let named = witness::generation(&storage, &disk)?;
        if named.is_some_and(|named| manifest.generation < named) {
            // What follows an old state is not old.
            manifest.generation = witness::next_generation(manifest.generation, named);
        }
        let kept_before = manifest.kept;
        let (pending, kept) =
            keep::divide(&mut manifest, verdict.pending, verdict.session.is_some(), &verdict.basis, options)?;
        if let Basis::Everything(why) = &verdict.basis {
            let what = if manifest.kept { "are kept as changed" } else { "will be restored" };
            log::warn!("{}: {why}; all of its blocks {what}", options.disk.display());
        }
        if let Basis::Everything(
            Distrust::WrittenFromOutside | Distrust::OlderState | Distrust::AnotherFile,
        ) = &verdict.basis
        {
            // What is made of it looks like any other set. A number that no log has says that what the last session wrote can't be
            // told any more.
            manifest.next_sequence = manifest.next_sequence.saturating_add(1);
        }
        if !paths.intents().exists() {
            Intents::create(&storage, &paths.intents(), geometry, true)?;
        }
        let engine = match options.engine {
            Some(engine) => engine,
            None => best_engine(&disk),
        };
        manifest.file = disk_witness(&disk)?.as_ref().and_then(DiskFile::of);
        manifest.device = device_name(&disk).or(manifest.device);
        let left = manifest.left.take();
        let stopped = manifest.stopped.take();
        let is_untouched = left.is_some() && before.same_boot || was_open;
        let hold_before = manifest.held.clone();
        manifest.held = manifest.held.filter(|reason| !reason.is_over());
        if let (true, true, Basis::Everything(why)) = (options.resume, was_open, &verdict.basis) {
            manifest.held = manifest.held.or_else(|| HoldReason::untrusted(why, live.owner()));
        }
        let held = manifest.held.is_some();
        let redo = redo::open(&paths, disk_id)?;
        let says_more = left.is_some()
            || stopped.is_some()
            || manifest.held != hold_before
            || manifest.kept != kept_before;
        let shared = Arc::new(Shared::new(Parts {
            geometry,
            disk_sync: open_for_sync(&disk)?,
            disk_watch: open_for_sync(&disk)?,
            disk,
            base_identity: identity_of(&base, &manifest)?,
            base,
            engine,
            faults: options.faults.clone(),
            storage: storage.clone(),
            flush: match options.flush {
                FlushPolicy::Auto if options.changes == Changes::Keep => FlushPolicy::Always,
                flush => flush,
            },
            drain_policy: options.drain,
            reflink: options.reflink,
            pending,
            intents: Intents::open(&storage, &paths.intents(), geometry)?,
            live,
            redo,
        }));
        // An open session that goes on is held from its end on.
        let rests = held && verdict.session.is_none();
        shared.claims.set_drain(rests, !(held || is_untouched));
        let session = verdict.session.map(|session| take_up(&shared, &paths, session)).transpose()?;
        let resumed = session.is_some();
        if let Some(redo) = shared.redo.as_ref().filter(|_| before.same_boot) {
            // Before anybody reads or writes the disk, and as long as the live page names who was killed.
            redo::finish(redo, &shared.live, &manifest, geometry, &shared.disk, |extent| {
                Ok(shared.owned.contains_all(extent)
                    || shared.pending.contains_all(extent)
                    || kept.contains_all(extent))
            })?;
        }
        // Where there is more than what is restored in any case.
        let matters = resumed || held || is_untouched || !kept.is_empty();
        let learns =
            before.same_boot && shared.live.is_asking() && matters && shared.live.can_learn(&shared.disk);
        shared.live.ask_alone(learns);
        if learns {
            Report::learn(&shared);
        }
        // What a server before us has synced is not known.
        shared.unsynced.insert_set(&shared.owned);
        shared.unsynced.insert_set(&kept);
        if before.same_boot && shared.live.is_zeroed() {
            shared.zeroed.insert_set(&shared.owned);
            shared.zeroed.insert_set(&kept);
        }
        let lifecycle = Lifecycle { manifest, session, kept, queues: Vec::new(), finisher: None };
        let disk = Self {
            shared,
            paths,
            keep_logs: options.keep_logs,
            resume: options.resume,
            changes: options.changes,
            lifecycle: Mutex::new(lifecycle),
            basis: verdict.basis,
            #[cfg(feature = "bench-without-log")]
            without_log: options.without_log,
            _state_lock: state_lock,
        };
        let live = &disk.shared.live;
        let begin = || disk.shared.redo.as_deref().map_or((), redo::begin);
        if resumed {
            // Nothing is concluded that the next start could not conclude again: the logs stay.
            begin();
            live.go_on();
            live.set_pending(disk.shared.pending.count());
            live.set_dirty(disk.shared.owned.count());
            disk.name_generation_again(named)?;
            disk.shared.open.store(true, Ordering::SeqCst);
            return Ok(Arc::new(disk));
        }
        if held && !verdict.sealed && disk.basis == Basis::ExactLogs {
            // It was killed in the session, which is over now: what is held outlasts the host.
            disk.make_last_session_durable(&disk.lifecycle().manifest)?;
        }
        // Step 10: in memory alone the next kill would forget what was concluded.
        let speaks_alone = disk.lifecycle().manifest.speaks_alone(&disk.basis);
        // The logs of a held disk are kept too, where they can be.
        if !(speaks_alone || held && verdict.sealed) {
            disk.checkpoint()?;
        } else if says_more {
            disk.store_manifest(&mut disk.lifecycle().manifest)?;
        } else {
            disk.name_generation_again(named)?;
        }
        let begins_again = before.session_begins && live.owner().is_none_or(ProcessId::may_be_alive);
        // From here on no log needs the page to be exact; before, a failure must leave it as it was.
        begin();
        if begins_again {
            live.begin_again();
        } else {
            live.take_over(disk_id, number)?;
        }
        live.set_dirty(disk.kept_blocks());
        live.set_pending(disk.shared.pending.count());
        live.set_pristine(disk.lifecycle().manifest.logs.is_empty());
        if begins_again {
            disk.begin_again();
        }
        Ok(Arc::new(disk))
    }
}

impl SessionDisk {
    /// Goes on with the session that was beginning: it has read, and written nothing, so that it can do with another log.
    fn begin_again(&self) {
        let live = &self.shared.live;
        // Those of the attempts before, which may have the same number.
        remove_logs_to_come(&self.shared.storage, &self.paths, &self.lifecycle().manifest);
        if let Err(error) = self.begin(live.owner(), live.token()) {
            log::warn!(
                "{}: a session that was beginning when its server was killed can't go on: {}",
                self.paths.disk().display(),
                in_full(&error)
            );
            live.set_session_open(false);
            live.set_owner(None);
            live.set_token(None);
        }
    }
}

/// Goes on with an open session where its log says that it was. What a server before has appended
/// and not counted is erased.
fn take_up(shared: &Shared, paths: &Paths, session: GoesOn) -> Result<OpenSession, Error> {
    let log = paths.sessions().join(session.entry.id().file_name());
    let file = shared.storage.open_log(&log)?;
    let (writer, owned) = LogWriter::resume_on(file, log, session.mark)?;
    shared.owned.insert_set(&owned);
    shared.set_log(writer);
    let started = UNIX_EPOCH + Duration::from_nanos(session.begun_unix_ns);
    Ok(OpenSession { entry: session.entry, named: true, started, bytes_before: 0 })
}

/// io_uring, but on a file system that can't answer "this would block" (tmpfs, where nothing does)
/// it would hand each operation to a thread: several times the cost of doing it at once.
fn best_engine(disk: &File) -> EngineKind {
    if !disk.supports_nowait() {
        return EngineKind::Sync;
    }
    match blockio::new_engine(EngineKind::IoUring, 1, Vec::new()) {
        Ok(_) => EngineKind::IoUring,
        Err(error) => {
            log::warn!("io_uring is not to be had ({}): I/O is synchronous and slower", in_full(&error));
            EngineKind::Sync
        }
    }
}
