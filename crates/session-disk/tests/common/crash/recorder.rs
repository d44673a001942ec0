//! A tape that records every change with its bytes, and beside it what is not I/O but survives a kill:
//! the live page, when the disk was changed last, and the generation that its file names.
//!
//! A manifest names its disk by inode number and times, which are others in each world. So manifests are
//! recorded in a form that all worlds share: the inode is [`DISK_INODE`] if it is the disk's, and in
//! the place of times there is a *version*, a number that is given to each new state of the times. The time of the last change of the
//! contents alone has one as well.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base_image::BaseIdentity;
use blockio::tape::{Io, Tape};
use blockio::{File, OpenOptions};
use session_disk::{DiskFile, Manifest};

/// Stands for the inode number of the disk of whatever world.
pub(crate) const DISK_INODE: u64 = 1;

/// Where the live page holds the disk's inode number: word 15.
pub(crate) const LIVE_INODE: std::ops::Range<usize> = 120..128;

/// The number of reads, which are not recorded.
const UNRECORDED: u64 = u64::MAX;

static VERSIONS: AtomicU64 = AtomicU64::new(1);

/// A number for a state of a disk's times that no other state has.
pub(crate) fn new_version() -> u64 {
    VERSIONS.fetch_add(1, Ordering::Relaxed)
}

/// A change; see [`Io`].
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write { offset: u64, bytes: Vec<u8>, durable: bool },
    Zero { offset: u64, len: u64 },
    Sync,
    Create { len: u64 },
    Reserve { len: u64 },
    CreateDir,
    Rename { to: PathBuf },
    Remove,
    SyncDir,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A change begins; its number is the event's place. The path is relative to the world's directory.
    Begin(PathBuf, Change),
    /// The change of this number has ended.
    End(usize),
}

/// An event, and what else a kill right after it leaves.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    pub(crate) event: Event,
    pub(crate) live: Option<Arc<Vec<u8>>>,
    pub(crate) version: u64,
    /// The version of the contents' time alone.
    pub(crate) written: u64,
    pub(crate) generation: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct State {
    moments: Vec<Moment>,
    disk: Option<File>,
    versions: HashMap<(i64, i64), u64>,
    written: HashMap<i64, u64>,
    live: Option<Arc<Vec<u8>>>,
    /// I/O that failed: none should, so what it left is not modelled.
    failed: Vec<usize>,
}

/// Records what happens in one world.
#[derive(Debug)]
pub(crate) struct Recorder {
    root: PathBuf,
    state: Mutex<State>,
}

pub(crate) const DISK: &str = "disk.raw";
pub(crate) const RUNTIME: &str = "run";

/// The attribute of the disk's file that names a manifest's generation.
pub(crate) const GENERATION: &std::ffi::CStr = c"user.pristine.generation";

/// What the disk's file names.
pub(crate) fn generation(disk: &File) -> Option<Vec<u8>> {
    disk.attribute(GENERATION).unwrap()
}

/// What a manifest holds of the disk's identity, here and now.
pub(crate) fn identity(disk: &File) -> BaseIdentity {
    BaseIdentity::of_file(&disk.identity().unwrap())
}

pub(crate) fn manifest_bytes(manifest: &Manifest) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(manifest).unwrap();
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(format!("\ncrc32c {checksum:08x}\n").as_bytes());
    bytes
}

pub(crate) fn parse_manifest(bytes: &[u8]) -> Option<Manifest> {
    let body = std::str::from_utf8(bytes).ok()?.trim_end_matches('\n').rsplit_once('\n')?.0;
    let manifest: Manifest = serde_json::from_str(body).ok()?;
    (manifest_bytes(&manifest) == bytes).then_some(manifest)
}

pub(crate) fn is_manifest(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem == "manifest")
}

impl Recorder {
    /// Records what happens in `root`. If the disk is there, its times are `version`, and that of its contents `written`.
    pub(crate) fn new(root: &Path, version: u64, written: u64) -> Arc<Self> {
        let recorder = Self { root: root.to_owned(), state: Mutex::default() };
        {
            let mut state = recorder.state();
            recorder.look(&mut state);
            if let Some(disk) = &state.disk {
                let now = times(&identity(disk));
                state.versions.insert(now, version);
                state.written.insert(now.0, written);
            }
        }
        Arc::new(recorder)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much was recorded so far.
    pub(crate) fn position(&self) -> usize {
        self.state().moments.len()
    }

    /// Everything that was recorded so far.
    pub(crate) fn moments(&self) -> Vec<Moment> {
        let state = self.state();
        let failed: Vec<_> = state.failed.iter().map(|number| &state.moments[*number].event).collect();
        assert!(failed.is_empty(), "{failed:?}");
        state.moments.clone()
    }

    /// Opens the disk once it is there, and takes a copy of the live page.
    fn look(&self, state: &mut State) -> (u64, u64) {
        if state.disk.is_none() {
            state.disk = File::open(&self.root.join(DISK), OpenOptions::default()).ok();
        }
        let live = live_page(&self.root);
        if state.live.as_deref() != live.as_ref() {
            state.live = live.map(Arc::new);
        }
        let Some(disk) = &state.disk else { return (0, 0) };
        let now = times(&identity(disk));
        let version = *state.versions.entry(now).or_insert_with(new_version);
        (version, *state.written.entry(now.0).or_insert_with(new_version))
    }

    fn push(&self, event: Event) -> u64 {
        let mut state = self.state();
        let (version, written) = self.look(&mut state);
        let live = state.live.clone();
        let generation = state.disk.as_ref().and_then(generation);
        state.moments.push(Moment { event, live, version, written, generation });
        state.moments.len() as u64 - 1
    }

    /// The bytes of a manifest in the form that all worlds share.
    fn shared_form(&self, bytes: &[u8]) -> Vec<u8> {
        let mut state = self.state();
        self.look(&mut state);
        let (Some(mut manifest), Some(disk)) = (parse_manifest(bytes), &state.disk) else {
            return bytes.to_vec();
        };
        let now = identity(disk);
        let file = now.file.clone().unwrap();
        if manifest.file == Some(DiskFile { inode: file.inode, birth_ns: file.birth_ns }) {
            manifest.file = Some(DiskFile { inode: DISK_INODE, birth_ns: None });
        }
        if let Some(then) = &mut manifest.pristine_since {
            let version = state.versions.get(&times(then)).copied().unwrap_or(0);
            let file = then.file.as_mut().unwrap();
            (file.inode, file.birth_ns) = (DISK_INODE, None);
            (file.mtime_ns, file.ctime_ns) = (version as i64, 0);
        }
        if let Some(stopped) = &mut manifest.stopped {
            stopped.mtime_ns = state.written.get(&stopped.mtime_ns).map_or(0, |written| *written as i64);
        }
        manifest_bytes(&manifest)
    }
}

fn times(identity: &BaseIdentity) -> (i64, i64) {
    identity.file.as_ref().map_or((0, 0), |file| (file.mtime_ns, file.ctime_ns))
}

/// The bytes of the live page in `root`.
pub(crate) fn live_page(root: &Path) -> Option<Vec<u8>> {
    let mut entries = std::fs::read_dir(root.join(RUNTIME)).ok()?.flatten().map(|entry| entry.path());
    let live = entries.find(|path| path.extension().is_some_and(|extension| extension == "live"))?;
    std::fs::read(live).ok().filter(|bytes| bytes.len() == 4096)
}

impl Tape for Recorder {
    fn begin(&self, io: Io<'_>) -> io::Result<u64> {
        let (path, change) = match io {
            // An attribute is not among the changes: it is looked at, as the times are.
            Io::Read { .. } | Io::SetAttribute { .. } => return Ok(UNRECORDED),
            Io::Write { path, offset, bytes, durable } => {
                let bytes = if is_manifest(path) { self.shared_form(bytes) } else { bytes.to_vec() };
                (path, Change::Write { offset, bytes, durable })
            }
            Io::Zero { path, offset, len } => (path, Change::Zero { offset, len }),
            Io::Sync { path } => (path, Change::Sync),
            Io::Create { path, len } => (path, Change::Create { len }),
            Io::Reserve { path, len } => (path, Change::Reserve { len }),
            Io::CreateDir { path } => (path, Change::CreateDir),
            Io::Rename { from, to } => {
                (from, Change::Rename { to: to.strip_prefix(&self.root).unwrap().to_owned() })
            }
            Io::Remove { path } => (path, Change::Remove),
            Io::SyncDir { path } => (path, Change::SyncDir),
        };
        let Ok(path) = path.strip_prefix(&self.root) else { return Ok(UNRECORDED) };
        Ok(self.push(Event::Begin(path.to_owned(), change)))
    }

    fn end(&self, number: u64, done: bool) -> io::Result<()> {
        match number {
            UNRECORDED => {}
            number if done => {
                self.push(Event::End(number as usize));
            }
            number => self.state().failed.push(number as usize),
        }
        Ok(())
    }
}
