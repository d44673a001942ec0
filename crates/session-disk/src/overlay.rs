//! Keeping what a session has written: as a qcow2 image on the base.
//!
//! Nothing of the disk or its state is changed (but what a killed server was writing is written to its end). While it is copied nobody else may change the disk: either no server
//! runs, and it is locked, or the disk is held. That it still was so at the end is looked at before the new
//! image gets its name; a hold's end is durable before anything is restored.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use base_image::{BaseImage, CLUSTER_SIZE, Content, Overlay};
use blockio::{AlignedBuf, DataRanges, File, OpenOptions, in_full};
use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};
use write_log::LogId;

use crate::last_session::{self, LastSession, Traces, Unsure};
use crate::live::{Before, LivePage, heed_sync};
use crate::manifest::{EntryKind, Manifest};
use crate::new_file::NewFile;
use crate::open::{
    DEAD_SERVER_POLL, DEAD_SERVER_WAIT_MAX, UNKNOWN_HOLDER_WAIT_MAX, check_disk, file_number, identity_of,
    judge, open_base,
};
use crate::process::ProcessId;
use crate::recover::{Basis, Distrust};
use crate::storage::Storage;
use crate::{DiskOptions, Error, Paths, redo};

const CLUSTER_BLOCKS: u64 = CLUSTER_SIZE / BLOCK_SIZE;

/// What of a disk is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion {
    /// What the last session wrote; of a disk whose changes are kept: what all sessions changed.
    LastSession,
    /// The same, if the last session is the one with this number.
    Session(u64),
    /// All in which the disk differs from its base, of whichever session.
    WholeDisk,
}

/// An overlay that was made.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The session whose content it is; `None`: it is not that of one session.
    pub session: Option<u64>,
    /// Blocks that the session owned, or that may differ: those that were compared.
    pub blocks: u64,
    /// Those of them that differ from the base. The others are in the overlay as they are in the base.
    pub differing_blocks: u64,
    /// The base on which it lies.
    pub base: PathBuf,
    /// Size of the disk in bytes.
    pub size: u64,
}

/// Makes a qcow2 image at `to`, on the disk's base, of what the disk holds. `progress` is told how many bytes of how many
/// are done.
///
/// # Errors
/// If the disk is in use and not held, if its session is open or is being restored, if there is nothing to keep or what there
/// is can't be told from what earlier sessions have left; if something is at `to` already; if anything can't be read or
/// written; if `stop` is set. Then there is no new image.
pub fn keep(
    options: &DiskOptions,
    portion: Portion,
    to: &Path,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Kept, Error> {
    let disk = Disk::take(options)?;
    let new = NewFile::create(to)?;
    let (session, taken) = disk.select(portion)?;
    let base = open_base(&disk.manifest, options.base_patience)?;
    let identity = identity_of(&base, &disk.manifest)?;
    let cannot_write = |error| Error::state("write", to, error);
    let size = disk.geometry.size();
    let overlay = Overlay::create(new.file()?, size, base.path(), base.format()).map_err(cannot_write)?;
    let blocks = taken.unwrap_or_else(|| {
        let all = BlockSet::new(disk.geometry.blocks());
        all.insert(disk.geometry.all());
        all
    });
    let copy = Copy { disk: &disk.file, base: &base, geometry: disk.geometry, overlay: &overlay, to };
    let differing_blocks = copy.run(&blocks, stop, progress)?;
    if differing_blocks == 0 {
        return Err(nothing(options, "all of it is as in its base"));
    }
    overlay.finish().map_err(cannot_write)?;
    base.check(&identity)?;
    disk.check_untouched()?;
    new.publish()?;
    Ok(Kept { session, blocks: blocks.count(), differing_blocks, base: base.path().to_owned(), size })
}

/// The base of a disk, as it was when the disk was provisioned.
///
/// # Errors
/// If the disk was not provisioned, or its base changed or can't be opened.
pub fn base_of(options: &DiskOptions) -> Result<BaseImage, Error> {
    open_base(&Manifest::load(&options.paths())?, options.base_patience)
}

fn nothing(options: &DiskOptions, why: &str) -> Error {
    Error::Refused(format!("{}: there is nothing to keep: {why}", options.disk.display()))
}

fn unsure(options: &DiskOptions, why: &dyn std::fmt::Display) -> Error {
    let name = options.disk.display();
    Error::Refused(format!(
        "{name}: what its last session wrote can't be told from what earlier ones may have left: {why}; --whole-disk keeps \
         all in which it differs from its base, of whichever session"
    ))
}

/// A disk that nobody changes.
struct Disk<'a> {
    options: &'a DiskOptions,
    file: File,
    geometry: Geometry,
    manifest: Manifest,
    live: Option<LivePage>,
    /// It is locked; otherwise it is held, and a server runs.
    locked: bool,
}

impl<'a> Disk<'a> {
    fn take(options: &'a DiskOptions) -> Result<Self, Error> {
        let paths = options.paths();
        let mut manifest = Manifest::load(&paths)?;
        let file = File::open(&options.disk, OpenOptions::default())?;
        let (name, named) = (options.disk.display(), paths.arguments());
        let number = file_number(&options.disk)?;
        let look = |disk| LivePage::inspect(&paths.live_page(disk), disk, number);
        let locked = lock(&file, || look(manifest.disk).and_then(|live| live.server()))?;
        if !locked && manifest.held.is_none() {
            return Err(Error::Refused(format!(
                "{name} is in use; hold it first: `pristine session hold {named}`, and when its session has ended, \
                 or `pristine session end {named}` has ended it, keep it"
            )));
        }
        if locked {
            // Who had it may have left it otherwise.
            manifest = Manifest::load(&paths)?;
        }
        let live = look(manifest.disk);
        if live
            .as_ref()
            .is_some_and(|live| if locked { live.session_may_go_on() } else { live.session_is_open() })
        {
            return Err(Error::Refused(format!(
                "{name}: its session is open; keep it when the session has ended: `pristine session end {named}` \
                 ends it"
            )));
        }
        let geometry = check_disk(&file, &manifest)?;
        if locked {
            redo::finish_for_reader(&Storage::default(), &paths, &manifest, geometry, &file, live.as_ref())?;
        }
        Ok(Self { options, file, geometry, manifest, live, locked })
    }

    /// The session and the blocks whose content is to be kept; no blocks: all of them.
    fn select(&self, portion: Portion) -> Result<(Option<u64>, Option<BlockSet>), Error> {
        if portion == Portion::WholeDisk {
            return Ok((None, None));
        }
        let (storage, paths) = (Storage::default(), self.options.paths());
        if self.live.as_ref().is_some_and(LivePage::is_poisoned) {
            return Err(unsure(self.options, &"its storage failed, and what was written may be lost"));
        }
        // Where a write-back failed there is what an earlier session wrote.
        heed_sync(&self.file, self.live.as_ref(), File::sync_data)
            .map_err(|error| unsure(self.options, &in_full(&error)))?;
        let live = Before::of(self.live.as_ref());
        let before = live.session_over();
        let verdict = judge(&storage, &paths, &self.manifest, self.geometry, &self.file, before)?;
        if verdict.pending.is_empty() {
            return Err(nothing(self.options, "nothing of it differs from its base, or would be restored"));
        }
        let last = self.manifest.logs.iter().rfind(|entry| entry.kind == EntryKind::Session);
        if self.manifest.kept {
            if verdict.basis == Basis::Everything(Distrust::OlderState) {
                // What later sessions left, which were to be reset, can't be told from it.
                return Err(Error::KeptUnknown { disk: self.options.disk.clone() });
            }
            // All that differs is the disk's content, whoever wrote it: nothing is pending beside it.
            let session = last.map(|entry| entry.sequence);
            self.check_number(portion, session)?;
            let blocks = (verdict.basis == Basis::ExactLogs).then_some(verdict.pending);
            return Ok((None, blocks));
        }
        if let Basis::Everything(why) = &verdict.basis {
            return Err(unsure(self.options, why));
        }
        let left = self.manifest.left.is_some() && live.same_boot;
        let untouched = self.manifest.held.is_some() || left || live.session_open;
        if !untouched {
            return Err(nothing(
                self.options,
                "restoring what its last session left has begun, or may have, or the host was restarted since; hold a disk \
                 before its session ends (`pristine session hold`); --whole-disk keeps what is left",
            ));
        }
        let found = last_session_of(&storage, &paths, &self.manifest, self.geometry, live)?;
        let found = found.map_err(|why| match why {
            Unsure::NoSession => nothing(self.options, &why.to_string()),
            why => unsure(self.options, &why),
        })?;
        self.check_number(portion, Some(found.sequence))?;
        if found.blocks.is_empty() {
            return Err(nothing(self.options, &format!("session {} wrote nothing", found.sequence)));
        }
        Ok((Some(found.sequence), Some(found.blocks)))
    }

    /// Fails if another session is meant than the last one.
    fn check_number(&self, portion: Portion, last: Option<u64>) -> Result<(), Error> {
        let Portion::Session(wanted) = portion else { return Ok(()) };
        if last == Some(wanted) {
            return Ok(());
        }
        let last = last.map_or_else(|| "that of none".into(), |last| format!("that of session {last}"));
        Err(Error::Refused(format!(
            "{}: what it holds is not the content of session {wanted}, but {last}: what a session wrote is there until the next \
             one writes or all is restored",
            self.options.disk.display()
        )))
    }

    /// Fails if the hold on which it relied has ended, or may have.
    fn check_untouched(&self) -> Result<(), Error> {
        if self.locked {
            return Ok(());
        }
        let now = Manifest::load(&self.options.paths())?;
        // Its generation also grows when its server only stops. What was restored, even in part, can't be held again before
        // another session, which has a log.
        if now.held == self.manifest.held && now.logs == self.manifest.logs {
            return Ok(());
        }
        let name = self.options.disk.display();
        Err(Error::Refused(format!(
            "{name} was released, or taken by another server, while it was copied; nothing was kept"
        )))
    }
}

/// Locks a disk. `false`: the process that serves it lives, and has it locked.
pub(crate) fn lock(disk: &File, server: impl Fn() -> Option<ProcessId>) -> Result<bool, Error> {
    let started = Instant::now();
    loop {
        let Err(error) = disk.lock_exclusive() else { return Ok(true) };
        // As a server waits that takes the disk over: what one that was killed has begun may still land.
        let limit = match server() {
            Some(server) if server.is_alive() => return Ok(false),
            Some(_) => DEAD_SERVER_WAIT_MAX,
            None => UNKNOWN_HOLDER_WAIT_MAX,
        };
        if !error.is_in_use() {
            return Err(error.into());
        }
        if started.elapsed() >= limit {
            let by = ": another process has it open, and is not known in this runtime directory".into();
            return Err(Error::InUse { path: disk.path().to_owned(), by });
        }
        std::thread::sleep(DEAD_SERVER_POLL);
    }
}

/// The logs in a directory.
pub(crate) fn logs_of(dir: &Path) -> Result<Vec<LogId>, Error> {
    let entries = std::fs::read_dir(dir).map_err(|error| Error::state("read", dir, error))?;
    Ok(entries.flatten().filter_map(|entry| LogId::parse(entry.file_name().to_str()?)).collect())
}

/// The last session of a disk of which nothing was restored since, by the logs that lie there; or why that can't be said.
pub(crate) fn last_session_of(
    storage: &Storage,
    paths: &Paths,
    manifest: &Manifest,
    geometry: Geometry,
    live: Before,
) -> Result<Result<LastSession, Unsure>, Error> {
    let dir = paths.sessions();
    let there = logs_of(&dir)?;
    let read = |id: LogId| storage.read_log(&dir.join(id.file_name())).map_err(|error| in_full(&error));
    Ok(last_session::find(&Traces { manifest, geometry, live, there: &there, read: &read }))
}

/// The way from a disk into an overlay.
struct Copy<'a> {
    disk: &'a File,
    base: &'a BaseImage,
    geometry: Geometry,
    overlay: &'a Overlay,
    to: &'a Path,
}

impl Copy<'_> {
    /// Copies the clusters in which `blocks` lie; all else in them is the base's. Returns how many of the blocks differ from
    /// it.
    fn run(
        &self,
        blocks: &BlockSet,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, Error> {
        let total = clusters(blocks).count() as u64 * CLUSTER_SIZE;
        let cluster_len = CLUSTER_SIZE as usize;
        let (mut content, mut of_base) =
            (AlignedBuf::new_zeroed(cluster_len), AlignedBuf::new_zeroed(cluster_len));
        let (mut differing, mut ranges, mut hole_end) = (0, DataRanges::default(), 0);
        for (done, cluster) in (1..).zip(clusters(blocks)) {
            if stop.load(Ordering::Acquire) {
                return Err(Error::Stopped);
            }
            let end = (cluster + 1) * CLUSTER_SIZE;
            if hole_end < end {
                hole_end = self.hole_end(cluster * CLUSTER_SIZE, &mut ranges)?;
            }
            if hole_end < end {
                differing += self.copy(cluster, blocks, &mut content, &mut of_base)?;
            }
            progress(done * CLUSTER_SIZE, total);
        }
        Ok(differing)
    }

    /// Where the hole ends that both have at `offset`; `offset`, if there is none of a cluster's length.
    fn hole_end(&self, offset: u64, ranges: &mut DataRanges) -> Result<u64, Error> {
        let of_disk = ranges.next(self.disk, offset)?.map_or(self.geometry.size(), |data| data.start);
        // Not asked beyond what matters: a sealed base proves its holes chunk by chunk.
        if of_disk < offset.saturating_add(CLUSTER_SIZE) {
            return Ok(offset);
        }
        Ok(match self.base.content_at(offset, of_disk - offset)? {
            Content::Hole(len) => offset + len,
            Content::Data(_) => offset,
        })
    }

    fn copy(
        &self,
        cluster: u64,
        blocks: &BlockSet,
        content: &mut [u8],
        of_base: &mut [u8],
    ) -> Result<u64, Error> {
        let offset = cluster * CLUSTER_SIZE;
        let len = CLUSTER_SIZE.min(self.geometry.size().saturating_sub(offset)) as usize;
        let (Some(content), Some(of_base)) = (content.get_mut(..len), of_base.get_mut(..len)) else {
            return Err(Error::WrongState("a cluster is larger than its buffer"));
        };
        self.base.read_at(of_base, offset)?;
        content.copy_from_slice(of_base);
        for (is_kept, run) in blocks.mixed_runs(Extent::new(cluster * CLUSTER_BLOCKS, CLUSTER_BLOCKS)) {
            let Some(bytes) = self.geometry.bytes_of(run).filter(|_| is_kept) else { continue };
            let begin = (bytes.offset() - offset) as usize;
            let Some(part) = content.get_mut(begin..begin + bytes.len() as usize) else {
                return Err(Error::WrongState("a run is outside its cluster"));
            };
            self.disk.read_exact_at(part, bytes.offset())?;
        }
        let differ = |(a, b): &(&[u8], &[u8])| a != b;
        let of_block = BLOCK_SIZE as usize;
        let differing = content.chunks(of_block).zip(of_base.chunks(of_block)).filter(differ).count() as u64;
        let written = if differing == 0 {
            Ok(())
        } else if content.iter().all(|byte| *byte == 0) {
            self.overlay.zero(offset, len as u64)
        } else {
            self.overlay.write(content, offset)
        };
        written.map_err(|error| Error::state("write", self.to, error))?;
        Ok(differing)
    }
}

/// The clusters in which a set has blocks, in ascending order.
fn clusters(blocks: &BlockSet) -> impl Iterator<Item = u64> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        let cluster = blocks.next_run(next, 1)?.first() / CLUSTER_BLOCKS;
        next = (cluster + 1) * CLUSTER_BLOCKS;
        Some(cluster)
    })
}
