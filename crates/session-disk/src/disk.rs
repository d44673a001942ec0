//! A session disk and its life: taken over (`start`), in a session (`session`), checkpoint, drain, stop;
//! held (`hold`), or with its changes kept (`keep`).

mod hold;
mod keep;
mod session;
mod start;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockio::in_full;
use blocks::{BlockSet, Geometry};
use uuid::Uuid;
use write_log::{LogError, LogHeader, LogId, LogWriter};

use crate::beginning::Outcome;
use crate::counts::CopyCounts;
use crate::drain::Drain;
use crate::manifest::{EntryKind, Left, LogEntry, Manifest, Stopped};
use crate::open::{disk_witness, prune_logs, remove_unnamed_logs, with_room};
use crate::pace::{DrainPolicy, Guests};
use crate::process::ProcessId;
use crate::progress::Progress;
use crate::recover::Basis;
use crate::shared::{QueueCounters, Shared};
use crate::ways::Sharing;
use crate::{DiskQueue, Error, Paths, witness};

pub use hold::{Held, HoldReason, Released, left_open, set_hold_of_open_session};
pub use keep::Changes;

/// How long a drain that waits for guests takes at most to see that it is to stop.
const STOP_LATENCY_MAX: Duration = Duration::from_millis(20);

/// A session that is open.
#[derive(Debug)]
struct OpenSession {
    entry: LogEntry,
    /// Whether the manifest names its log. If not, it has written nothing, and can't once its beginning is finished.
    named: bool,
    started: SystemTime,
    /// Bytes that queues had written before.
    bytes_before: u64,
}

/// What changes only at a session's start and end, and at checkpoints.
#[derive(Debug)]
struct Lifecycle {
    manifest: Manifest,
    session: Option<OpenSession>,
    /// Blocks that sessions before the open one changed, if changes are kept.
    kept: BlockSet,
    queues: Vec<Weak<QueueCounters>>,
    /// The thread that finishes the open session's beginning.
    finisher: Option<JoinHandle<()>>,
}

/// One guest's disk: base, session disk, log and pending set. Shared by all queues.
#[derive(Debug)]
pub struct SessionDisk {
    shared: Arc<Shared>,
    paths: Paths,
    keep_logs: usize,
    resume: bool,
    changes: Changes,
    lifecycle: Mutex<Lifecycle>,
    basis: Basis,
    #[cfg(feature = "bench-without-log")]
    without_log: bool,
    /// Held for as long as the disk is.
    _state_lock: fs::File,
}

impl SessionDisk {
    /// When the open session's beginning is finished.
    fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        let beginnings = &self.shared.beginnings;
        let mut lifecycle = loop {
            // Before it is locked: who wants it as it is need not wait for the medium.
            self.shared.finish_beginning();
            let lifecycle = self.lifecycle_as_it_is();
            if !beginnings.is_begun() {
                break lifecycle;
            }
        };
        match beginnings.take_outcome() {
            Some(Outcome::Named(manifest)) => {
                lifecycle.manifest = *manifest;
                lifecycle.session.iter_mut().for_each(|session| session.named = true);
            }
            Some(Outcome::Failed) => {
                // Its number is not given to another one.
                if let Some(session) = &lifecycle.session {
                    lifecycle.manifest.next_sequence = session.entry.sequence.saturating_add(1);
                }
                self.shared.live.set_pristine(lifecycle.manifest.logs.is_empty());
            }
            None => {}
        }
        lifecycle.join_finisher();
        lifecycle
    }

    /// Also while a session begins: then the manifest is the one from before.
    fn lifecycle_as_it_is(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The disk's own identity.
    pub fn id(&self) -> Uuid {
        self.lifecycle_as_it_is().manifest.disk
    }

    /// Size of the disk.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// Where the disk and its state live.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Where the base lives.
    pub fn base_path(&self) -> &Path {
        self.shared.base.path()
    }

    /// What the pending set at opening rested on.
    pub fn basis(&self) -> &Basis {
        &self.basis
    }

    /// The answer to VIRTIO_BLK_T_GET_ID: the same for the life of the disk; ASCII, 20 bytes.
    pub fn serial(&self) -> [u8; 20] {
        let mut serial = [0; 20];
        let mut text = [0; 32];
        self.id().simple().encode_lower(&mut text);
        serial.iter_mut().zip(text).for_each(|(to, from)| *to = from);
        serial
    }

    /// The unit of requests, in bytes (virtio 1.2, 5.2.4 `blk_size`): what direct I/O needs, else 512. Through the page cache
    /// any storage does that, also what has larger sectors itself; and guests read a partition table in this unit, so that it is
    /// to be the base's and not to change with what the disk lies on.
    pub fn logical_block_size(&self) -> u32 {
        self.shared.disk.alignment().offset.max(512)
    }

    /// Whether the disk's storage can give up the contents of a range.
    pub fn supports_discard(&self) -> bool {
        self.shared.disk.supports_punch()
    }

    /// Whether the disk's storage can zero a range without being sent zeroes.
    pub fn supports_write_zeroes(&self) -> bool {
        self.shared.disk.supports_zero()
    }

    /// Blocks that are still to be restored.
    pub fn pending_blocks(&self) -> u64 {
        self.shared.pending.count()
    }

    /// Blocks that the open session owns.
    pub fn dirty_blocks(&self) -> u64 {
        self.shared.owned.count()
    }

    /// Whether a session is open.
    pub fn session_is_open(&self) -> bool {
        self.lifecycle_as_it_is().session.is_some()
    }

    /// The process that owns the open session, if its identity is known.
    pub fn session_owner(&self) -> Option<ProcessId> {
        self.shared.live.owner()
    }

    /// Makes the data path of a virtqueue, with an engine of its own for `depth` operations at once.
    pub fn queue(self: &Arc<Self>, depth: u32) -> Result<DiskQueue, Error> {
        let counters = Arc::new(QueueCounters::default());
        let queue = DiskQueue::new(Arc::clone(&self.shared), Arc::clone(&counters), depth)?;
        self.register(&counters);
        Ok(queue)
    }

    /// What guests do; in doubt they are busy.
    pub(crate) fn guests(&self) -> Guests {
        let Ok(lifecycle) = self.lifecycle.try_lock() else { return Guests::Busy };
        if lifecycle.session.is_none() {
            return Guests::Absent;
        }
        let passes = |queue: Arc<QueueCounters>| queue.passes.load(Ordering::Relaxed);
        match lifecycle.in_flight() {
            0 => Guests::Quiet(lifecycle.live_queues().map(passes).fold(0, u64::wrapping_add)),
            _ => Guests::Busy,
        }
    }

    /// How many blocks were restored since the disk was opened, by the way they came.
    pub fn copied(&self) -> CopyCounts {
        self.shared.counters.get()
    }

    /// Whether the disk shares blocks with its base.
    pub fn sharing(&self) -> Sharing {
        self.shared.ways().sharing()
    }

    /// What the operator wants of drains.
    pub fn drain_policy(&self) -> DrainPolicy {
        self.shared.drain_policy
    }

    fn bytes_written(&self, lifecycle: &Lifecycle) -> u64 {
        let of_live_queues: u64 =
            lifecycle.live_queues().map(|queue| queue.bytes_written.load(Ordering::Relaxed)).sum();
        self.shared.bytes_of_gone_queues.load(Ordering::Relaxed) + of_live_queues
    }

    fn register(&self, counters: &Arc<QueueCounters>) {
        let mut lifecycle = self.lifecycle_as_it_is();
        lifecycle.queues.retain(|queue| queue.strong_count() > 0);
        lifecycle.queues.push(Arc::downgrade(counters));
    }

    /// Replaces all logs but the open session's by what is pending or kept now: steps 9 and 10.
    ///
    /// When nothing is pending they are retired. What a guest took meanwhile is in the open session's log, and the
    /// intents cover that log in a power cut.
    pub fn checkpoint(&self) -> Result<(), Error> {
        self.checkpoint_in(self.lifecycle())
    }

    /// [`checkpoint`](Self::checkpoint) for a drain, of which the disk may have been held meanwhile: then the last session's log
    /// stays, by which it can be told from what earlier ones have left.
    pub(crate) fn checkpoint_unless_held(&self) -> Result<(), Error> {
        let lifecycle = self.lifecycle();
        if lifecycle.manifest.held.is_some() && lifecycle.session.is_none() {
            return Ok(());
        }
        self.checkpoint_in(lifecycle)
    }

    fn checkpoint_in(&self, mut lifecycle: MutexGuard<'_, Lifecycle>) -> Result<(), Error> {
        if self.shared.is_poisoned() {
            return Err(self.shared.poisoned_error());
        }
        let session = lifecycle.named_session();
        let snapshot = BlockSet::new(self.shared.geometry.blocks());
        self.shared.claims.freeze(|| snapshot.insert_set(&self.shared.pending));
        snapshot.insert_set(&lifecycle.kept);
        let mut manifest = lifecycle.manifest.clone();
        manifest.logs.clear();
        if !snapshot.is_empty() {
            let entry = next_entry(&mut manifest, EntryKind::Pending);
            let header = self.log_header(&manifest, entry);
            let logs = self.shared.storage.logs(&self.paths.sessions());
            self.with_room(&lifecycle, || LogWriter::write_pending_in(&*logs, &header, &snapshot))?;
        }
        manifest.logs.extend(session);
        manifest.pristine_since = None;
        if manifest.logs.is_empty() {
            manifest.kept = false;
            self.shared.sync_disk_and_times()?;
            manifest.pristine_since = disk_witness(&self.shared.disk)?;
        }
        self.replace_manifest(&mut manifest)?;
        self.shared.live.set_pristine(manifest.logs.is_empty());
        lifecycle.manifest = manifest;
        let untouched = lifecycle.manifest.held.is_some() || !self.shared.claims.drain_began();
        prune_logs(&self.shared.storage, &self.paths, &lifecycle.manifest, self.keep_logs, untouched);
        Ok(())
    }

    /// Whether logs are left that a checkpoint would retire now that nothing is pending.
    pub(crate) fn has_old_logs(&self) -> bool {
        self.old_logs() > 0
    }

    /// How many logs of earlier sessions are not retired.
    pub(crate) fn old_logs(&self) -> usize {
        let lifecycle = self.lifecycle();
        let logs = lifecycle.manifest.logs.len();
        logs.saturating_sub(lifecycle.named_session().into_iter().count())
    }

    /// Copies base content into all pending blocks, in this thread, and makes it durable. `progress` is
    /// told how many blocks are left.
    ///
    /// # Errors
    /// If base or disk can't be read or written, `stop` is set, or the disk is being drained already; what
    /// was not restored stays pending, and what was restored does not become pending again with the next start, unless that can't be
    /// noted.
    pub fn drain(&self, stop: &AtomicBool, progress: &mut dyn FnMut(u64)) -> Result<u64, Error> {
        let mut done = Progress::new();
        self.refuse_if_held()?;
        self.drain_batches(stop, progress, &mut done).inspect_err(|_| done.keep(self))?;
        self.checkpoint_unless_held()?;
        self.forget_intents(&self.lifecycle())?;
        Ok(done.restored())
    }

    fn drain_batches(
        &self,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
        done: &mut Progress,
    ) -> Result<(), Error> {
        let mut drain = Drain::new(Arc::clone(&self.shared))?;
        while !self.shared.pending.is_empty() {
            self.refuse_if_held()?;
            let mut left = self.shared.pending.count();
            let batch = drain.batch(stop, &|| self.guests(), &mut |copied| {
                left = left.saturating_sub(copied);
                progress(left);
            });
            done.add(drain.take_restored());
            let batch = drain.judge(batch, false)?;
            if done.is_worth_a_checkpoint() {
                done.keep(self);
            }
            if let Some(time) = batch.wait {
                // A session is open. Whoever wants to stop is not to wait for its guest.
                std::thread::sleep(time.min(STOP_LATENCY_MAX));
            }
            if batch.blocked && batch.restored == 0 {
                drain.wait_for_a_release()?;
            }
        }
        Ok(())
    }

    /// Stops: the queues are quiesced, nothing more is taken. With [`DiskOptions::resume`](crate::DiskOptions::resume) an open
    /// session whose owner may come back stays open for the next server, as after a kill; returns its
    /// number. Otherwise it has ended: its log is sealed and durable, so that the next start knows
    /// exactly what it owned, whatever happens to the host meanwhile.
    pub fn stop(&self) -> Result<Option<u64>, Error> {
        let mut lifecycle = self.lifecycle();
        self.shared.open.store(false, Ordering::SeqCst);
        if lifecycle.in_flight() > 0 {
            return Err(Error::WrongState("a queue has requests in flight"));
        }
        self.shared.wipe_redo();
        let log = self.shared.take_log();
        if let Some(session) = &lifecycle.session
            && self.resume
            && self.session_owner().is_none_or(ProcessId::may_be_alive)
            // What the kernel knows to be lost is told to us, and not to the next server; or we don't know it ourselves yet.
            && (!self.shared.report.is_known() || self.shared.check_written_back().is_ok())
        {
            // The live page vouches for the log as long as the host runs.
            self.shared.live.set_server(None);
            return Ok(Some(session.entry.sequence));
        }
        // What is held outlasts the host. Its data first: a sealed log says that it is there.
        let durable = match lifecycle.manifest.held {
            Some(_) if log.is_some() => self.shared.sync_disk(),
            _ => Ok(()),
        };
        match (log, durable) {
            (Some(mut writer), Ok(())) => {
                writer.seal(self.shared.owned.count())?;
                writer.sync()?;
            }
            (Some(writer), Err(error)) => {
                log::warn!("write log {}: {}", writer.path().display(), in_full(&error));
            }
            (None, _) => {}
        }
        let was_open = lifecycle.named_session().is_some();
        if !was_open {
            // A session's end has left that to us.
            self.sync_logs(&lifecycle.manifest)?;
        }
        lifecycle.session = None;
        let left = if was_open {
            Some(Left::Open)
        } else {
            (!self.shared.pending.is_empty() && !self.shared.claims.drain_began()).then_some(Left::Ended)
        };
        if lifecycle.manifest.kept {
            self.shared.sync_disk()?;
        }
        if !lifecycle.manifest.logs.is_empty() {
            lifecycle.manifest.stopped = Stopped::of(&self.shared.disk)?;
        }
        if left.is_some() {
            lifecycle.manifest.left = left;
            self.store_manifest(&mut lifecycle.manifest)?;
        } else if !lifecycle.manifest.logs.is_empty()
            // For its number, a copy of the state from before the last session's end is older than this; and for the disk's time.
            && let Err(error) = self.store_manifest(&mut lifecycle.manifest)
        {
            log::warn!("{}", in_full(&error));
        }
        self.shared.live.set_session_open(false);
        self.forget_intents(&lifecycle)?;
        self.shared.live.set_server(None);
        if left.is_some() {
            // What the session wrote was not synced: the page says that the host has not gone down since.
            return Ok(None);
        }
        // All that it said is in sealed logs now, and the other one is empty. Somebody may have removed them already.
        let disk = lifecycle.manifest.disk;
        for path in [self.paths.live_page(disk), self.paths.redo(disk)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::state("remove", &path, error));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Makes the logs durable that speak for the disk and are no longer written.
    fn sync_logs(&self, manifest: &Manifest) -> Result<(), Error> {
        manifest.logs.iter().try_for_each(|entry| self.sync_log(entry.id()))
    }

    fn sync_log(&self, id: LogId) -> Result<(), Error> {
        let path = self.paths.sessions().join(id.file_name());
        // One that is missing or damaged speaks for everything as it is.
        let Ok(mut log) = self.shared.storage.open_log(&path) else { return Ok(()) };
        log.sync_data().map_err(|error| Error::state("sync", &path, error))
    }

    /// Clears the intents if the disk is pristine and synced, which is what no log means. While a
    /// server runs they stay, so that the next session's writes find them set.
    fn forget_intents(&self, lifecycle: &Lifecycle) -> Result<(), Error> {
        if lifecycle.manifest.logs.is_empty() { self.shared.intents.clear() } else { Ok(()) }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Makes a log. What is only kept for audit gives way to it, the oldest first.
    fn with_room<T>(
        &self,
        lifecycle: &Lifecycle,
        make: impl FnMut() -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        with_room(&self.shared.storage, &self.paths, &lifecycle.manifest, make)
    }

    /// Makes `manifest` the disk's, with a generation of its own. Then, and only then, the disk's file
    /// names it; see [`witness`].
    fn store_manifest(&self, manifest: &mut Manifest) -> Result<(), Error> {
        manifest.generation = witness::next_generation(manifest.generation, None);
        manifest.store(&self.shared.storage, &self.paths)?;
        self.name_generation(manifest);
        Ok(())
    }

    /// Makes the disk's file name the generation of `manifest`, which is durable. If it has no logs, it
    /// has the disk's times instead, and these must not change.
    fn name_generation(&self, manifest: &Manifest) {
        if !manifest.logs.is_empty() {
            witness::set_generation(&self.shared.storage, &self.shared.disk, manifest.generation);
        }
    }

    /// Makes the disk's file name the manifest as it was found, if a crash has left it behind: `named`.
    /// Whoever was killed may not have come to make that manifest durable.
    fn name_generation_again(&self, named: Option<u64>) -> Result<(), Error> {
        let lifecycle = self.lifecycle();
        if named != Some(lifecycle.manifest.generation) {
            self.shared.storage.sync_dir(self.paths.state_dir())?;
            self.name_generation(&lifecycle.manifest);
        }
        Ok(())
    }

    /// Makes `manifest` the disk's. If that fails, the logs that it would have added are removed.
    fn replace_manifest(&self, manifest: &mut Manifest) -> Result<(), Error> {
        self.store_manifest(manifest)
            .inspect_err(|_| remove_unnamed_logs(&self.shared.storage, &self.paths, manifest))
    }

    fn log_header(&self, manifest: &Manifest, entry: LogEntry) -> LogHeader {
        LogHeader {
            kind: entry.kind(),
            id: LogId { seq: entry.sequence, uuid: entry.uuid },
            disk: manifest.disk,
            geometry: self.shared.geometry,
            created_unix_ns: unix_ns(),
        }
    }
}

impl Lifecycle {
    /// The open session, if the manifest names its log.
    fn named_session(&self) -> Option<LogEntry> {
        self.session.as_ref().filter(|session| session.named).map(|session| session.entry)
    }

    /// Waits for the thread that finishes a beginning: nothing of the disk is done by us when its lock may be gone.
    fn join_finisher(&mut self) {
        if self.finisher.take().is_some_and(|finisher| finisher.join().is_err()) {
            log::error!("the thread of a session's beginning panicked");
        }
    }

    fn live_queues(&self) -> impl Iterator<Item = Arc<QueueCounters>> {
        self.queues.iter().filter_map(Weak::upgrade)
    }

    fn in_flight(&self) -> usize {
        self.live_queues().map(|queue| queue.in_flight.load(Ordering::SeqCst)).sum()
    }
}

impl Drop for SessionDisk {
    fn drop(&mut self) {
        self.lifecycle_as_it_is().join_finisher();
        // Queues may be left, and are not to go on with it when the disk may be another server's.
        self.shared.beginnings.give_up();
        // What is still under way keeps the disk in use for a while: the next server waits longer for one that is gone than for one
        // that stopped.
        if self.lifecycle_as_it_is().in_flight() == 0 {
            self.shared.live.set_server(None);
        }
    }
}

/// Adds a log to a manifest.
pub(crate) fn next_entry(manifest: &mut Manifest, kind: EntryKind) -> LogEntry {
    let entry = LogEntry { sequence: manifest.next_sequence, uuid: Uuid::new_v4(), kind };
    manifest.next_sequence = manifest.next_sequence.saturating_add(1);
    manifest.logs.push(entry);
    entry
}

/// Nanoseconds since the epoch.
pub(crate) fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
