//! Worlds: directories that are as a kill or a power cut left them.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockio::{EngineKind, File, OpenOptions};
use session_disk::{DiskFile, DiskOptions};

use super::fs::{Content, Fs};
use super::random::Random;
use super::recorder::{
    DISK, DISK_INODE, Event, GENERATION, LIVE_INODE, Moment, RUNTIME, Recorder, identity, is_manifest,
    live_page, manifest_bytes, new_version, parse_manifest,
};
use crate::common::fast_dir;

/// How a world ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Kill,
    PowerCut,
}

/// What is left of a world.
#[derive(Clone, Debug, Default)]
pub(crate) struct Remains {
    pub(crate) fs: Fs,
    /// The live page, in the form that all worlds share.
    live: Option<Vec<u8>>,
    /// The state of the disk's times.
    version: u64,
    /// The state of the time of its contents.
    written: u64,
    /// What it was given at the last power cut: what is less is of an earlier boot.
    cut: u64,
    /// The times that a power cut can't take back.
    durable_version: u64,
    /// States of the times that may as well be the disk's.
    plausible: Vec<u64>,
    /// What the disk's file names.
    generation: Option<Vec<u8>>,
}

/// A directory with a disk, its state and its live page, all of whose I/O is recorded.
#[derive(Debug)]
pub(crate) struct World {
    dir: tempfile::TempDir,
    before: Fs,
    /// The live page and the times as they were at the beginning.
    live: Option<Arc<Vec<u8>>>,
    version: u64,
    written: u64,
    cut: u64,
    durable_version: u64,
    generation: Option<Vec<u8>>,
    pub(crate) recorder: Arc<Recorder>,
}

impl World {
    /// Builds a world out of what another one left.
    pub(crate) fn new(remains: &Remains) -> Self {
        let dir = fast_dir();
        let root = dir.path();
        let mut manifests = Vec::new();
        for (path, content) in remains.fs.entries() {
            let at = root.join(path);
            match content {
                None => std::fs::DirBuilder::new().mode(0o700).create(&at).unwrap(),
                Some(content) if is_manifest(path) => manifests.push((at, content.bytes())),
                Some(content) => write_file(&at, content),
            }
        }
        let for_writing = OpenOptions { write: true, ..OpenOptions::default() };
        if let (Some(generation), Ok(disk)) = (&remains.generation, File::open(&root.join(DISK), for_writing))
        {
            disk.set_attribute(GENERATION, generation).unwrap();
        }
        let disk = File::open(&root.join(DISK), OpenOptions::default()).ok();
        let (mut version, mut durable_version) = (remains.version, remains.durable_version);
        for (path, bytes) in manifests {
            let bytes = local_form(&bytes, disk.as_ref(), remains, &mut version);
            std::fs::File::create(path).unwrap().write_all(&bytes).unwrap();
        }
        if let (Some(live), Some(_)) = (&remains.live, &disk) {
            let mut live = live.clone();
            if live[LIVE_INODE] == DISK_INODE.to_le_bytes() {
                let inode = std::fs::metadata(root.join(DISK)).unwrap().ino();
                live[LIVE_INODE].copy_from_slice(&inode.to_le_bytes());
            }
            std::fs::DirBuilder::new().mode(0o700).create(root.join(RUNTIME)).unwrap();
            std::fs::write(root.join(RUNTIME).join(live_name(&live)), live).unwrap();
        }
        if remains.live.is_none() {
            durable_version = version;
        }
        Self {
            before: remains.fs.clone(),
            live: live_page(root).map(Arc::new),
            version,
            written: remains.written,
            cut: remains.cut,
            durable_version,
            generation: remains.generation.clone(),
            recorder: Recorder::new(root, version, remains.written),
            dir,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.root().join(DISK)
    }

    /// Options under which all I/O is recorded.
    pub(crate) fn options(&self, engine: EngineKind) -> DiskOptions {
        DiskOptions {
            runtime_dir: Some(self.root().join(RUNTIME)),
            engine: Some(engine),
            keep_logs: 1,
            tape: Some(self.recorder.clone()),
            ..DiskOptions::new(self.disk())
        }
    }

    /// Calls `cut` with each of the places of `cuts` (ascending) and a look at the world there.
    pub(crate) fn at_cuts(&self, moments: &[Moment], cuts: &[usize], mut cut: impl FnMut(usize, &Cut)) {
        let inode = std::fs::metadata(self.disk()).map(|disk| disk.ino()).unwrap_or(0);
        let mut look = Cut {
            fs: self.before.clone(),
            live: self.live.clone(),
            version: self.version,
            written: self.written,
            cut: self.cut,
            durable_version: self.durable_version,
            generation: self.generation.clone(),
            durable_generation: self.generation.clone(),
            synced: HashMap::new(),
            inode,
        };
        let mut cuts = cuts.iter().peekable();
        for place in 0..=moments.len() {
            if cuts.next_if_eq(&&place).is_some() {
                cut(place, &look);
            }
            if let Some(moment) = moments.get(place) {
                look.step(place, moment);
            }
        }
    }
}

/// A world at one moment.
pub(crate) struct Cut {
    fs: Fs,
    live: Option<Arc<Vec<u8>>>,
    version: u64,
    written: u64,
    cut: u64,
    /// The times that the last sync of the disk has made durable.
    durable_version: u64,
    /// What the disk's file names, and what no power cut can take back of it.
    generation: Option<Vec<u8>>,
    durable_generation: Option<Vec<u8>>,
    /// By syncs of the disk that have begun.
    synced: HashMap<usize, (u64, Option<Vec<u8>>)>,
    inode: u64,
}

impl Cut {
    fn step(&mut self, place: usize, moment: &Moment) {
        self.fs.step(place, &moment.event);
        match &moment.event {
            Event::Begin(path, super::recorder::Change::Sync) if path == Path::new(DISK) => {
                self.synced.insert(place, (moment.version, moment.generation.clone()));
            }
            Event::End(begin) => {
                if let Some(synced) = self.synced.remove(begin) {
                    (self.durable_version, self.durable_generation) = synced;
                }
            }
            Event::Begin(..) => {}
        }
        (self.live, self.version, self.written) = (moment.live.clone(), moment.version, moment.written);
        self.generation = moment.generation.clone();
    }

    /// What is left of the world if it ends here.
    pub(crate) fn end(&self, ending: Ending, random: &mut Random) -> Remains {
        let cut = new_version();
        match ending {
            Ending::PowerCut => Remains {
                fs: self.fs.power_cut(random),
                live: None,
                version: new_version(),
                written: cut,
                cut,
                durable_version: 0,
                // Versions are given in their order. What the cut took back may be the times too.
                plausible: (self.durable_version..=self.version).collect(),
                generation: if random.chance(50) {
                    self.generation.clone()
                } else {
                    self.durable_generation.clone()
                },
            },
            Ending::Kill => {
                let mut live = self.live.as_deref().cloned();
                if let Some(live) = &mut live
                    && live[LIVE_INODE] == self.inode.to_le_bytes()
                {
                    live[LIVE_INODE].copy_from_slice(&DISK_INODE.to_le_bytes());
                }
                Remains {
                    fs: self.fs.killed(random),
                    live,
                    version: self.version,
                    written: self.written,
                    cut: self.cut,
                    durable_version: self.durable_version,
                    plausible: vec![self.version],
                    generation: self.generation.clone(),
                }
            }
        }
    }
}

/// The name of a live page is the disk's ID, which it holds.
fn live_name(live: &[u8]) -> String {
    let word = |index: usize| u64::from_le_bytes(live[index * 8..index * 8 + 8].try_into().unwrap());
    format!("{}.live", uuid::Uuid::from_u64_pair(word(3), word(4)))
}

fn write_file(path: &Path, content: &Content) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(content.len).unwrap();
    for (sector, bytes) in &content.sectors {
        let at = sector * 512;
        let len = content.len.saturating_sub(at).min(512) as usize;
        file.write_all_at(&bytes[..len], at).unwrap();
    }
}

/// A manifest that is about the disk of this world, if it was about the disk of the one before. `version`
/// becomes that of the times that it names, if these are the disk's.
fn local_form(bytes: &[u8], disk: Option<&File>, remains: &Remains, version: &mut u64) -> Vec<u8> {
    let (Some(mut manifest), Some(disk)) = (parse_manifest(bytes), disk) else { return bytes.to_vec() };
    let now = identity(disk);
    let file = now.file.clone().unwrap();
    if manifest.file == Some(DiskFile { inode: DISK_INODE, birth_ns: None }) {
        manifest.file = Some(DiskFile { inode: file.inode, birth_ns: file.birth_ns });
    }
    if let Some(then) = &manifest.pristine_since {
        let named = then.file.as_ref().map_or(0, |file| file.mtime_ns as u64);
        if remains.plausible.contains(&named) {
            *version = named;
            manifest.pristine_since = Some(now);
        }
    }
    if let Some(stopped) = &mut manifest.stopped {
        let then = stopped.mtime_ns as u64;
        if then < remains.cut {
            // That the time is older now than it was tells nothing.
            (stopped.boot, stopped.mtime_ns) = (uuid::Uuid::nil(), file.mtime_ns + 1);
        } else {
            stopped.mtime_ns = file.mtime_ns - i64::from(then != remains.written);
        }
    }
    manifest_bytes(&manifest)
}
