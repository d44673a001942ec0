//! What sessions have changed and is still there: of a disk whose changes are kept, or that is held. Looks only.

use std::fs;
use std::sync::atomic::AtomicBool;

use base_image::{BaseIdentity, BaseImage};
use blockio::{File, ImageAccess, OpenOptions};
use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};

use crate::live::{Before, LivePage, heed_sync};
use crate::manifest::Manifest;
use crate::open::{check_disk, file_number, identity_of, judge, lock_state_dir, open_base};
use crate::overlay::{last_session_of, lock};
use crate::recover::{Basis, Distrust, Verdict};
use crate::storage::Storage;
use crate::verify::{Comparer, Comparison};
use crate::{DiskOptions, Error, Paths, redo};

/// A disk that nobody serves, with changes of sessions.
#[derive(Debug)]
pub(crate) struct ChangedDisk {
    pub(crate) file: File,
    pub(crate) geometry: Geometry,
    /// As it was when the disk was provisioned; compared with its seal if it had one then.
    pub(crate) base: BaseImage,
    /// What it was known by then.
    pub(crate) base_identity: BaseIdentity,
    /// Blocks that the sessions took.
    taken: BlockSet,
    /// Nobody else may take the disk up meanwhile.
    _state_lock: fs::File,
}

/// Blocks that are not as in the base.
#[derive(Clone, Debug)]
pub(crate) struct Differences {
    /// Ascending; no two touch.
    pub(crate) extents: Vec<Extent>,
    /// Whether one of them has a byte past the end of the base that is not zero.
    pub(crate) past_base: bool,
}

impl ChangedDisk {
    /// Takes a disk to look at its changes. It stays as it is, but for what a killed server was writing, which is written to its
    /// end.
    ///
    /// # Errors
    /// If it is in use, has a session that goes on, has no changes that are kept or held, or what a session has changed can't be
    /// told from what was still to be restored before it.
    pub(crate) fn open(options: &DiskOptions) -> Result<Self, Error> {
        let (paths, storage) = (options.paths(), Storage::new(options.tape.clone()));
        // Before the disk, for it says best what is wrong with one that is none. It is read again under the lock.
        let id = Manifest::load_from(&storage, &paths)?.disk;
        let read = OpenOptions { write: false, direct: false, exclusive: false };
        let file = File::open(&options.disk, read)?;
        let in_use = |by: &str| Error::InUse { path: options.disk.clone(), by: format!(": it is {by}") };
        let number = file_number(&options.disk)?;
        let look = |disk| LivePage::inspect(&paths.live_page(disk), disk, number);
        if !lock(&file, || look(id).and_then(|live| live.server()))? {
            return Err(in_use("being served or restored"));
        }
        file.lock_image(ImageAccess::ReadOnly).map_err(|error| match error.is_in_use() {
            true => in_use("written by another program (QEMU, qemu-img)"),
            false => error.into(),
        })?;
        let state_lock = lock_state_dir(&paths)?;
        let manifest = Manifest::load_from(&storage, &paths)?;
        let geometry = check_disk(&file, &manifest)?;
        let live = look(manifest.disk);
        refuse_open_session(options, live.as_ref())?;
        let base = open_base(&manifest, options.base_patience)?;
        let base_identity = identity_of(&base, &manifest)?;
        redo::finish_for_reader(&storage, &paths, &manifest, geometry, &file, live.as_ref())?;
        // Where a write-back failed there is what an earlier session wrote.
        heed_sync(&file, live.as_ref(), File::sync_data)?;
        let live = Before::of(live.as_ref());
        let verdict = judge(&storage, &paths, &manifest, geometry, &file, live.session_over())?;
        let taken = taken(options, &paths, &storage, &manifest, geometry, live, verdict)?;
        Ok(Self { file, geometry, base, base_identity, taken, _state_lock: state_lock })
    }

    /// How many bytes [`differences`](Self::differences) compares.
    pub(crate) fn bytes_taken(&self) -> u64 {
        self.taken.count() * BLOCK_SIZE
    }

    /// Compares what the sessions took with the base. `progress` is told how many bytes are done.
    ///
    /// # Errors
    /// If disk or base can't be read, or `stop` is set.
    pub(crate) fn differences(
        &self,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Differences, Error> {
        let mut found = Comparison::default();
        let mut comparer = Comparer::new(&self.file, &self.base, self.geometry);
        let mut done = 0;
        for run in self.taken.runs() {
            let (before, begin) = (done, run.first() * BLOCK_SIZE);
            comparer.compare(run, &mut found, stop, &mut |at| progress(before + at.saturating_sub(begin)))?;
            done += run.count() * BLOCK_SIZE;
        }
        let extents = found.differing;
        Ok(Differences { past_base: self.is_past_base(&extents)?, extents })
    }

    /// Whether one of the blocks that differ has a byte past the end of the base that is not zero, as there the base has
    /// nothing else.
    fn is_past_base(&self, differing: &[Extent]) -> Result<bool, Error> {
        let end = self.base.size();
        let (last, inside) = (end / BLOCK_SIZE, (end % BLOCK_SIZE) as usize);
        let first_past = end.div_ceil(BLOCK_SIZE);
        if differing.last().is_some_and(|extent| extent.end() > first_past) {
            return Ok(true);
        }
        // The block in which the base ends may differ before that end only.
        let cut = Extent::new(last, 1);
        let Some(range) = self.geometry.bytes_of(cut).filter(|_| inside > 0) else { return Ok(false) };
        if !differing.iter().any(|extent| extent.overlaps(cut)) {
            return Ok(false);
        }
        let mut block = vec![0; range.len() as usize];
        self.file.read_exact_at(&mut block, range.offset())?;
        Ok(block.iter().skip(inside).any(|byte| *byte != 0))
    }
}

/// Fails if a session is open and may go on, or if it has lost something.
fn refuse_open_session(options: &DiskOptions, live: Option<&LivePage>) -> Result<(), Error> {
    let Some(live) = live else { return Ok(()) };
    let (disk, named) = (options.disk.display(), options.paths().arguments());
    if live.is_poisoned() {
        return Err(Error::Refused(format!(
            "{disk}: its storage failed in the last session, and what that has written may be lost; give it up with \
             `pristine restore {named}`"
        )));
    }
    if live.session_may_go_on() {
        return Err(Error::Refused(format!(
            "{disk}: its session is open and goes on when the disk is served again; shut its VM down, or end the session \
             with `pristine session end {named}`"
        )));
    }
    Ok(())
}

/// The blocks that kept sessions, or the held one, took.
fn taken(
    options: &DiskOptions,
    paths: &Paths,
    storage: &Storage,
    manifest: &Manifest,
    geometry: Geometry,
    live: Before,
    verdict: Verdict,
) -> Result<BlockSet, Error> {
    let (disk, named) = (options.disk.display(), paths.arguments());
    match &verdict.basis {
        Basis::Everything(Distrust::OlderState) if manifest.kept => {
            return Err(Error::KeptUnknown { disk: options.disk.clone() });
        }
        Basis::Everything(why) if manifest.kept => {
            return Err(Error::Refused(format!(
                "{disk}: {why}; if its contents are right all the same, say so by serving it once with `pristine maintain \
                 {named}`"
            )));
        }
        Basis::Everything(why) => {
            return Err(Error::Refused(format!(
                "{disk}: {why}, so what its last session has written can't be told; `pristine keep --whole-disk {named}` keeps all of \
                 it as it is"
            )));
        }
        _ => {}
    }
    if manifest.kept && !verdict.pending.is_empty() {
        // All of it is the disk's content: with nothing pending the sessions began.
        return Ok(verdict.pending);
    }
    if manifest.held.as_ref().is_none_or(|reason| reason.is_over()) {
        return Err(Error::Refused(format!(
            "{disk}: it has no changes that are kept; `pristine maintain {named}` serves it for a session whose changes are \
             kept, and `pristine session hold {named}` keeps those of a session that runs"
        )));
    }
    // What was pending before it is not the session's.
    let unknown = |why: &dyn std::fmt::Display| {
        Error::Refused(format!(
            "{disk}: what its last session has changed can't be told from what was still to be restored before it: {why}"
        ))
    };
    let found = last_session_of(storage, paths, manifest, geometry, live)?;
    Ok(found.map_err(|why| unknown(&why))?.blocks)
}
