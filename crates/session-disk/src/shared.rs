//! What the queues, the drain and the lifecycle of one disk share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use base_image::{BaseIdentity, BaseImage, Urgency};
use blockio::fault::{FaultEngine, FaultPlan};
use blockio::{Engine, EngineKind, File, FileIndex, Redo, in_full};
use blocks::{BlockSet, Extent, Geometry};
use write_log::LogWriter;

use crate::Error;
use crate::beginning::Beginnings;
use crate::claims::Claims;
use crate::counts::Counters;
use crate::intents::Intents;
use crate::live::{LiveMark, LivePage, Report};
use crate::pace::DrainPolicy;
use crate::storage::Storage;
use crate::unsynced::Unsynced;
use crate::ways::Ways;

/// The session disk, in every engine of a disk.
pub(crate) const DISK: FileIndex = FileIndex(0);
/// The base.
pub(crate) const BASE: FileIndex = FileIndex(1);
/// A sealed base as it lies on its medium; in engines for a drain that may share its blocks.
pub(crate) const MEDIUM: FileIndex = FileIndex(2);

/// Why a write fails in a session whose beginning failed.
pub(crate) const NO_LOG: &str = "the session has no write log";

/// What a guest's FLUSH does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FlushPolicy {
    /// Nothing, unless the kernel says without waiting that some of the disk could not be written back: then it fails. The session's data dies
    /// with the host anyway.
    #[default]
    Auto,
    /// `fdatasync` of the session disk.
    Always,
    /// Nothing, whatever the session's policy.
    Never,
}

/// One disk's sets and files. The letters are those of the crash order in the design.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) geometry: Geometry,
    pub(crate) disk: Arc<File>,
    /// The disk again, under an open file description of its own: the kernel reports a failed
    /// write-back once to each, so a guest's flush can't swallow what a drain's sync must see.
    pub(crate) disk_sync: File,
    /// And again, to ask whether a write-back has failed. Locked by whoever asks, until what was said is known to all: it is
    /// said once.
    disk_watch: Mutex<File>,
    pub(crate) base: BaseImage,
    /// What the base must look like.
    pub(crate) base_identity: BaseIdentity,
    engine: EngineKind,
    faults: Option<Arc<FaultPlan>>,
    pub(crate) storage: Storage,
    pub(crate) flush: FlushPolicy,
    /// What the operator wants of drains.
    pub(crate) drain_policy: DrainPolicy,
    /// How the base's data comes to the disk, and how much came how.
    ways: Mutex<Ways>,
    pub(crate) counters: Counters,
    /// P: blocks that may not hold the base's content and are not this session's.
    pub(crate) pending: BlockSet,
    /// L: blocks that are committed in this session's log. Added to only after the append returned.
    pub(crate) owned: BlockSet,
    /// Of what left P because a guest took it, what may not be durable.
    pub(crate) unsynced: Unsynced,
    /// Those of them that were made to read as zeroes, or given up, and so not written.
    pub(crate) zeroed: Unsynced,
    /// C, and what the drain has copied and not settled.
    pub(crate) claims: Claims,
    pub(crate) intents: Intents,
    pub(crate) live: LivePage,
    /// What makes copies into a map of the disk whole; `None`: nothing is copied into it.
    pub(crate) redo: Option<Arc<Redo>>,
    /// The open session's log, once it is durable.
    log: Mutex<Option<LogWriter>>,
    /// What is done before that.
    pub(crate) beginnings: Beginnings,
    /// Whether requests are taken.
    pub(crate) open: AtomicBool,
    /// A sync failed: nothing can be vouched for any more.
    poisoned: AtomicBool,
    /// The base changed while it was in use.
    base_changed: AtomicBool,
    /// Whether it was told that its times have changed.
    base_was_touched: AtomicBool,
    /// Where the drain that failed last had come to: the next one goes on behind what it could not restore.
    pub(crate) drain_cursor: AtomicU64,
    /// What a server that was killed may have been told of failed write-back.
    pub(crate) report: Report,
    /// Bytes that guests wrote through queues that are gone.
    pub(crate) bytes_of_gone_queues: AtomicU64,
}

/// Numbers that one queue counts for itself.
#[derive(Debug, Default)]
pub(crate) struct QueueCounters {
    pub(crate) in_flight: AtomicUsize,
    /// Passes that were begun: whoever looks twice knows whether there was anything between.
    pub(crate) passes: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
}

pub(crate) struct Parts {
    pub(crate) geometry: Geometry,
    pub(crate) disk: Arc<File>,
    pub(crate) disk_sync: File,
    pub(crate) disk_watch: File,
    pub(crate) base: BaseImage,
    pub(crate) base_identity: BaseIdentity,
    pub(crate) engine: EngineKind,
    pub(crate) faults: Option<Arc<FaultPlan>>,
    pub(crate) storage: Storage,
    pub(crate) flush: FlushPolicy,
    pub(crate) drain_policy: DrainPolicy,
    /// Whether blocks may be shared with the base.
    pub(crate) reflink: bool,
    pub(crate) pending: BlockSet,
    pub(crate) intents: Intents,
    pub(crate) live: LivePage,
    pub(crate) redo: Option<Arc<Redo>>,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        let ways = if parts.reflink { ways_of(&parts.disk, &parts.base) } else { Ways::copy_only() };
        Self {
            geometry: parts.geometry,
            disk: parts.disk,
            disk_sync: parts.disk_sync,
            disk_watch: Mutex::new(parts.disk_watch),
            base: parts.base,
            base_identity: parts.base_identity,
            engine: parts.engine,
            faults: parts.faults,
            storage: parts.storage,
            flush: parts.flush,
            drain_policy: parts.drain_policy,
            ways: Mutex::new(ways),
            counters: Counters::default(),
            owned: BlockSet::new(parts.pending.bound()),
            unsynced: Unsynced::new(parts.pending.bound()),
            zeroed: Unsynced::new(parts.pending.bound()),
            claims: Claims::new(parts.pending.bound()),
            pending: parts.pending,
            intents: parts.intents,
            live: parts.live,
            redo: parts.redo,
            log: Mutex::new(None),
            beginnings: Beginnings::default(),
            open: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            base_changed: AtomicBool::new(false),
            base_was_touched: AtomicBool::new(false),
            drain_cursor: AtomicU64::new(0),
            report: Report::default(),
            bytes_of_gone_queues: AtomicU64::new(0),
        }
    }

    /// Whether engines do other things while an operation on the disk has to wait.
    pub(crate) fn is_asynchronous(&self) -> bool {
        self.engine != EngineKind::Sync
    }

    /// An engine for [`DISK`] and [`BASE`] with up to `depth` operations at work. What is read of the base
    /// is urgent, or can wait for those that are.
    pub(crate) fn new_engine(&self, depth: u32, urgency: Urgency) -> Result<Box<dyn Engine>, Error> {
        let engine = self.file_engine(depth, urgency)?;
        self.observed(engine)
    }

    /// An engine for a drain: in the background, and with [`MEDIUM`] where that is needed to share blocks; where it is not
    /// to be had, none are shared.
    pub(crate) fn new_drain_engine(&self, depth: u32) -> Result<Box<dyn Engine>, Error> {
        let mut engine = self.file_engine(depth, Urgency::Background)?;
        if self.base.seal().is_some() && self.ways().may_share() {
            engine = match self.base.medium_engine(engine, MEDIUM, Urgency::Background) {
                Ok(engine) => engine,
                Err(error) => {
                    log::info!("{}: blocks are not shared: {}", self.disk.path().display(), in_full(&error));
                    *self.ways() = Ways::copy_only();
                    self.file_engine(depth, Urgency::Background)?
                }
            };
        }
        self.observed(engine)
    }

    /// How the base's data comes to the disk.
    pub(crate) fn ways(&self) -> MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn file_engine(&self, depth: u32, urgency: Urgency) -> Result<Box<dyn Engine>, Error> {
        let files = [&self.disk].into_iter().chain(self.base.file()).map(Arc::clone).collect();
        let engine = blockio::new_engine(self.engine, depth, files)?;
        self.base
            .engine(engine, BASE, urgency)
            .map_err(|error| Error::state("make readers for", self.base.path(), error))
    }

    /// Under the tape and the plan, if there are such.
    fn observed(&self, engine: Box<dyn Engine>) -> Result<Box<dyn Engine>, Error> {
        let engine = self.storage.engine(engine, &[self.disk.path(), self.base.path()]);
        match &self.faults {
            None => Ok(engine),
            Some(plan) => FaultEngine::new(engine, Arc::clone(plan))
                .map(|engine| Box::new(engine) as Box<dyn Engine>)
                .map_err(|error| Error::state("make a faulty engine for", self.disk.path(), error)),
        }
    }

    /// Forgets what went by way of the file beside the live page. Nobody may be writing.
    pub(crate) fn wipe_redo(&self) {
        if let Some(redo) = &self.redo {
            redo.wipe();
        }
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, Option<LogWriter>> {
        self.log.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The open session's log is this one, which is durable and named.
    pub(crate) fn set_log(&self, writer: LogWriter) {
        *self.log() = Some(writer);
    }

    /// There is no log any more.
    pub(crate) fn take_log(&self) -> Option<LogWriter> {
        self.log().take()
    }

    /// Waits until the open session's log is durable and named.
    pub(crate) fn finish_beginning(&self) {
        self.beginnings.finish(self);
    }

    /// Whether the open session can be written in, when its beginning is finished. To be asked before anything is written
    /// that is not in its log yet.
    pub(crate) fn can_log(&self) -> bool {
        self.finish_beginning();
        self.log().is_some()
    }

    /// Makes `extents` this session's, in the log first: crash order, the middle of steps 1 and 2.
    ///
    /// The record is appended, then the live page says that it counts, and only then are the
    /// blocks in L, so that no queue can take a block for logged that is not.
    pub(crate) fn own(&self, extents: &[Extent]) -> io::Result<()> {
        let mut log = self.log();
        let writer = log.as_mut().ok_or_else(|| io::Error::other(NO_LOG))?;
        let sequence = writer.header().id.seq;
        let mark = writer.append(extents, &self.owned).map_err(io::Error::other)?;
        self.live.set_mark(LiveMark { sequence, mark });
        for extent in extents {
            self.owned.insert(*extent);
        }
        self.live.set_dirty(self.owned.count());
        Ok(())
    }

    pub(crate) fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            self.live.set_poisoned();
            log::error!("{}", self.poisoned_error());
        }
    }

    /// What to say to whoever wants something of a poisoned disk.
    pub(crate) fn poisoned_error(&self) -> Error {
        Error::Poisoned(self.disk.path().to_owned())
    }

    /// Makes the disk's data durable, as `fdatasync` does.
    pub(crate) fn sync_disk(&self) -> Result<(), Error> {
        self.sync(File::sync_data)
    }

    /// Makes the disk's data and its times durable, as `fsync` does.
    pub(crate) fn sync_disk_and_times(&self) -> Result<(), Error> {
        self.sync(File::sync_all)
    }

    /// Step 12: a failed sync poisons and is never tried again, because the kernel forgets it.
    fn sync(&self, sync: impl FnOnce(&File) -> Result<(), blockio::Error>) -> Result<(), Error> {
        self.report.wait();
        let heeded = || {
            // Known before the next one syncs, to whom the kernel would not say it again.
            if self.heeds_poison() {
                return Err(self.poisoned_error());
            }
            let _asking = self.live.asking();
            // The path of `disk_sync` is that of a descriptor.
            let result = self.storage.sync_disk(self.disk.path(), || sync(&self.disk_sync));
            result.inspect_err(|_| self.poison())
        };
        let synced = self.unsynced.synced(|| self.zeroed.synced(heeded));
        if synced.is_ok() && self.zeroed.is_empty() && self.live.is_zeroed() {
            self.live.set_zeroed(false);
            // Meanwhile some may have come.
            if !self.zeroed.is_empty() {
                self.live.set_zeroed(true);
            }
        }
        synced
    }

    /// `extent`, which may have been pending or lie where it was, is to read as zeroes, or does: see [`unsynced`](crate::unsynced).
    pub(crate) fn note_zeroed(&self, extent: Extent) {
        self.zeroed.insert(extent);
        self.unsynced.insert(extent);
        self.live.set_zeroed(true);
    }

    /// Fails, now and for ever, if the kernel has failed to write back some of the disk. What was read from the disk before this
    /// succeeded is what was written to it last: see [`unsynced`](crate::unsynced).
    pub(crate) fn check_written_back(&self) -> io::Result<()> {
        self.report.wait();
        self.watched(File::check_written_back)
    }

    /// The same where it waits for nothing; elsewhere nobody is asked.
    pub(crate) fn ask_written_back(&self) -> io::Result<()> {
        if !self.disk.tells_of_write_back() {
            return Ok(());
        }
        self.watched(|disk| disk.ask_written_back().map(drop))
    }

    /// What `ask` says of the disk, which is heeded. For one at a time, of whom the first is told.
    fn watched(&self, ask: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let watch = self.disk_watch.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.heeds_poison() {
            return Err(io::Error::other(self.poisoned_error()));
        }
        let _asking = self.live.asking();
        ask(&watch).inspect_err(|error| {
            log::error!("{}: the kernel failed to write data back: {error}", self.disk.path().display());
            self.poison();
        })
    }

    /// Whether anybody knows that write-back has failed: also one who took something from the disk, to whom the kernel has told
    /// it and tells nobody else. Then nothing is believed any more.
    pub(crate) fn heeds_poison(&self) -> bool {
        if self.live.was_poisoned_since() {
            self.poison();
        }
        self.is_poisoned()
    }

    /// Whether this server knows that write-back has failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Fails, now and for ever, once the base is not what it was. What is read of a sealed one is proven by its seal, and goes on
    /// where nothing but its times has changed; whether they have. From then on nothing is shared and no hole believed; but what was done
    /// before that is known is not proven.
    pub(crate) fn check_base(&self) -> Result<bool, Error> {
        let refused = || {
            let base = self.base.path().display();
            Error::Refused(format!("base image {base} was changed while it was in use"))
        };
        let change = match self.base.check(&self.base_identity) {
            Ok(()) if self.base_changed.load(Ordering::Acquire) => return Err(refused()),
            Ok(()) => return Ok(false),
            Err(base_image::BaseError::Changed { change, .. })
                if self.base.seal().is_some() && change.leaves_what_is_proven() =>
            {
                change
            }
            Err(error) => {
                if matches!(error, base_image::BaseError::Changed { .. }) {
                    self.base_changed.store(true, Ordering::Release);
                }
                return Err(error.into());
            }
        };
        if self.base_changed.load(Ordering::Acquire) {
            return Err(refused());
        }
        self.ways().stop_sharing();
        self.base.distrust_holes();
        if !self.base_was_touched.swap(true, Ordering::AcqRel) {
            let base = self.base.path().display();
            log::warn!("base image {base}: {change}; what is read of it is still proven by its seal");
        }
        Ok(true)
    }

    /// Whether the base may be read for guests.
    pub(crate) fn base_is_good(&self) -> bool {
        !self.base_changed.load(Ordering::Acquire)
    }
}

/// How the data of `base` may come to `disk`, before anything was tried.
fn ways_of(disk: &File, base: &BaseImage) -> Ways {
    match (disk.allocation_unit(), base.shareable()) {
        (Some(_), Some(_)) if !blockio::sharing_is_safe() => {
            log::info!("{}: shares no blocks with its base: Linux before 6.6", disk.path().display());
            Ways::copy_only()
        }
        (Some(unit), Some((_, end))) => Ways::share(unit, end),
        _ => Ways::copy_only(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskOptions, ProvisionOptions, SessionDisk, provision};

    /// Whoever may be told of a loss says so before, until it is noted.
    #[test]
    fn syncs_and_questions_say_that_they_ask() {
        let dir = tempfile::tempdir().unwrap();
        let (base, disk) = (dir.path().join("base.raw"), dir.path().join("disk.raw"));
        std::fs::write(&base, [1; 8192]).unwrap();
        let options = DiskOptions { runtime_dir: Some(dir.path().join("run")), ..DiskOptions::new(disk) };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        let shared = disk.shared();
        let asks = |is_lost: bool| {
            assert!(shared.live.is_asking() && !shared.live.is_poisoned());
            if is_lost { Err(io::Error::from(io::ErrorKind::Other)) } else { Ok(()) }
        };
        shared.sync(|_| asks(false).map_err(|_| unreachable!())).unwrap();
        assert!(!shared.live.is_asking());
        shared.watched(|_| asks(false)).unwrap();
        assert!(!shared.live.is_asking());
        shared.watched(|_| asks(true)).unwrap_err();
        assert!(!shared.live.is_asking() && shared.live.is_poisoned());
    }
}
