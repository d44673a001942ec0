//! What state a disk is in, also while a server runs. Looks only, locks nothing, changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base_image::{BaseFormat, BaseLocation, Root};
use blockio::{File, OpenOptions, in_full};
use blocks::BLOCK_SIZE;
use rustix::fs::{major, minor};
use serde::Serialize;

use crate::live::{Before, LivePage};
use crate::manifest::Manifest;
use crate::open::{check_disk, file_number, judge, open_base};
use crate::process::ProcessId;
use crate::recover::{Basis, Verdict};
use crate::storage::Storage;
use crate::{CopyCounts, DiskOptions, Error, HoldReason};

/// How long a base's server is waited for.
const BASE_PATIENCE_MAX: Duration = Duration::from_secs(2);

/// The state of a disk, one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Every byte equals the base; nobody has a session.
    Pristine,
    /// A session is open.
    InSession,
    /// A server runs, no session is open, and blocks are being restored.
    Restoring,
    /// No server runs and blocks are pending: `restore` or the next `serve` goes on.
    Interrupted,
    /// What the last session left is kept as it is, until it is released.
    Held,
    /// Sessions have changed blocks, and the changes are kept; nobody has a session.
    Kept,
}

impl DiskState {
    /// Of a disk that nobody serves.
    pub(crate) fn of(verdict: &Verdict) -> Self {
        if verdict.pending.is_empty() { Self::Pristine } else { Self::Interrupted }
    }
}

/// What is known of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// In one word.
    pub state: DiskState,
    /// Blocks that the open session owns; without one, those whose changes are kept.
    pub dirty_blocks: u64,
    /// Blocks that are not restored yet.
    pub pending_blocks: u64,
    /// Size of a block in bytes.
    pub block_size: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The base: absolute path, or URI.
    pub base: BaseLocation,
    /// The base's format.
    pub base_format: BaseFormat,
    /// The files that the base is backed by, the nearest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub base_backing: Vec<PathBuf>,
    /// The root hash of the base's seal, by which two hosts know that they serve the same; `None`: it is not sealed.
    pub base_root: Option<Root>,
    /// The process that serves the disk.
    pub server_pid: Option<u32>,
    /// A process that has taken the disk over and says nothing of it in the runtime directory: it is starting, or ending, or
    /// has another runtime directory. What is said here is what is known without it.
    pub silent_pid: Option<u32>,
    /// The process that owns the open session, if its identity is known.
    pub session_owner_pid: Option<u32>,
    /// Logs that are not retired.
    pub logs: usize,
    /// Why the disk is held, or will be when the session ends.
    pub held: Option<HoldReason>,
    /// Whether the drain's last attempt failed; it tries again.
    pub drain_failing: bool,
    /// Why it failed. Only the server knows; it is asked over its control socket.
    pub drain_error: Option<String>,
    /// When it tries again, in milliseconds since 1970. As before.
    pub drain_next_attempt_unix_ms: Option<u64>,
    /// How the server restores blocks. As before.
    pub copies: Option<CopyReport>,
    /// What is wrong with the base, if something is: then nothing can be served or restored.
    pub base_trouble: Option<String>,
    /// Why all blocks are pending, if the state could not be trusted.
    pub distrust: Option<String>,
}

/// How blocks are restored.
#[derive(Clone, Debug, Serialize)]
pub struct CopyReport {
    /// When: `eager` or `idle`.
    pub when: String,
    /// Bytes a second that are copied at most, if there is a limit.
    pub rate: Option<u64>,
    /// Whether the disk shares blocks with its base: `untried`, `works` or `off`.
    pub reflink: String,
    /// How many were restored since the server was started.
    #[serde(flatten)]
    pub counts: CopyCounts,
}

/// The process that has taken the disk over, to serve or to restore it.
///
/// # Errors
/// If the disk was not provisioned or its state can't be read.
pub fn server_of(options: &DiskOptions) -> Result<Option<ProcessId>, Error> {
    let paths = options.paths();
    let disk = Manifest::load(&paths)?.disk;
    let live = LivePage::inspect(&paths.live_page(disk), disk, file_number(&options.disk)?);
    Ok(live.and_then(|live| live.server()).filter(|server| server.is_alive()))
}

/// Who has locked a directory (`flock`), as the kernel tells in proc_locks(5). It is not tried, for a lock that is tried may turn
/// away a server that starts.
fn locker(dir: &Path) -> Option<u32> {
    let found = fs::metadata(dir).ok()?;
    let device = format!("{:02x}:{:02x}", major(found.dev()), minor(found.dev()));
    let inode = found.ino().to_string();
    // Without a device of its own a file system may go by several numbers (btrfs), and others have the same inode numbers.
    let has_device = major(found.dev()) != 0;
    let is_dir = |file: &str, pid: u32| {
        let is_same =
            |of: &str| of == device || !has_device && of.starts_with("00:") && has_open(pid, dir, &found);
        file.rsplit_once(':').is_some_and(|(of, number)| number == inode && is_same(of))
    };
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // 1: FLOCK  ADVISORY  WRITE 4711 fd:01:131 0 EOF
        let mut words = line.split_ascii_whitespace().skip(1).filter(|word| *word != "->");
        let is_flock = words.next() == Some("FLOCK");
        let pid = words.nth(2)?.parse().ok()?;
        (is_flock && words.next().is_some_and(|file| is_dir(file, pid))).then_some(pid)
    })
}

/// Whether a process has the directory `dir`, which is `found`, open; as far as that can be seen.
fn has_open(pid: u32, dir: &Path, found: &fs::Metadata) -> bool {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    open.flatten().map(|entry| entry.path()).any(|entry| {
        // Its name first: to look at any other file may take long.
        let is_named = fs::read_link(&entry).is_ok_and(|link| link.file_name() == dir.file_name());
        is_named
            && fs::metadata(&entry).is_ok_and(|open| (open.dev(), open.ino()) == (found.dev(), found.ino()))
    })
}

/// Looks at a disk.
///
/// # Errors
/// If it was not provisioned or its state can't be read.
pub fn status(options: &DiskOptions) -> Result<Status, Error> {
    let paths = options.paths();
    let manifest = Manifest::load(&paths)?;
    let disk = File::open(&options.disk, OpenOptions { write: false, direct: false, exclusive: false })?;
    let geometry = check_disk(&disk, &manifest)?;
    let mut status = Status {
        state: DiskState::Pristine,
        dirty_blocks: 0,
        pending_blocks: 0,
        block_size: BLOCK_SIZE,
        blocks: geometry.blocks(),
        size: geometry.size(),
        base: manifest.base.path.clone(),
        base_format: manifest.base.format,
        base_backing: manifest.base.identity.backing.iter().map(|file| file.path.clone()).collect(),
        base_root: manifest.base.root,
        server_pid: None,
        silent_pid: None,
        session_owner_pid: None,
        logs: manifest.logs.len(),
        held: manifest.held.clone().filter(|reason| !reason.is_over()),
        drain_failing: false,
        drain_error: None,
        drain_next_attempt_unix_ms: None,
        copies: None,
        base_trouble: None,
        distrust: None,
    };
    let live = LivePage::inspect(&paths.live_page(manifest.disk), manifest.disk, file_number(&options.disk)?);
    let is_served = live.as_ref().and_then(|live| live.server()).is_some_and(|server| server.is_alive());
    // A server that takes few connections may have none to spare; whoever serves the disk knows best.
    if !(is_served && matches!(manifest.base.path, BaseLocation::Nbd(_))) {
        status.base_trouble = match open_base(&manifest, options.base_patience.min(BASE_PATIENCE_MAX)) {
            Ok(base) => base.trouble().map(|trouble| {
                format!("base image {}: its server can't be reached: {trouble}", manifest.base.path.display())
            }),
            Err(error) => Some(in_full(&error)),
        };
    }
    if let Some(live) = &live
        && let Some(server) = live.server().filter(|server| server.is_alive())
    {
        (status.dirty_blocks, status.pending_blocks) = live.counts();
        status.server_pid = Some(server.pid);
        status.session_owner_pid = live.owner().map(|owner: ProcessId| owner.pid);
        status.drain_failing = live.drain_is_failing();
        status.state = match (live.session_is_open(), live.is_pristine()) {
            (true, _) => DiskState::InSession,
            (false, _) if status.held.is_some() => DiskState::Held,
            (false, _) if manifest.kept && status.dirty_blocks > 0 => DiskState::Kept,
            (false, true) => DiskState::Pristine,
            (false, false) => DiskState::Restoring,
        };
        return Ok(status);
    }
    status.silent_pid = locker(&paths.sessions());
    let before = Before::of(live.as_ref()).session_over();
    let verdict = judge(&Storage::default(), &paths, &manifest, geometry, &disk, before)?;
    // Its VM runs, and the next server takes the session up again.
    let owner = live.as_ref().filter(|live| live.session_is_open()).and_then(LivePage::owner);
    status.session_owner_pid = owner.filter(|owner| owner.may_be_alive()).map(|owner| owner.pid);
    status.pending_blocks = verdict.pending.count();
    status.state = if status.held.is_some() { DiskState::Held } else { DiskState::of(&verdict) };
    if manifest.kept && status.pending_blocks > 0 {
        (status.dirty_blocks, status.pending_blocks) = (status.pending_blocks, 0);
        if status.held.is_none() {
            status.state = DiskState::Kept;
        }
    }
    if let Basis::Everything(why) = verdict.basis {
        status.distrust = Some(why.to_string());
    }
    Ok(status)
}
