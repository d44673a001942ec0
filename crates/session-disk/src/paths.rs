//! Where the state of a disk lives.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use uuid::Uuid;

use crate::Error;
use crate::storage::Storage;

/// Environment variable that systemd sets for a service with `RuntimeDirectory=`: one directory, or several with colons between.
const RUNTIME_DIRECTORY: &str = "RUNTIME_DIRECTORY";

/// The files of one disk.
#[derive(Clone, Debug)]
pub struct Paths {
    disk: PathBuf,
    state: PathBuf,
    runtime: PathBuf,
}

impl Paths {
    /// `state_dir` defaults to `DISK.pristine`, or, if that is not there and `DISK` is a link, to that beside what it leads to; `runtime_dir` to `/run/pristine` for root, else to a
    /// directory under `XDG_RUNTIME_DIR`. The runtime directory should be on a tmpfs.
    pub fn new(disk: &Path, state_dir: Option<&Path>, runtime_dir: Option<&Path>) -> Self {
        let state = state_dir.map_or_else(|| default_state_dir(disk), Path::to_owned);
        let runtime = runtime_dir.map(Path::to_owned).unwrap_or_else(default_runtime_dir);
        Self { disk: disk.to_owned(), state, runtime }
    }

    /// The session disk.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// How the disk is named as arguments of a command: `--disk DISK`, and `--state-dir DIR` and `--runtime-dir DIR` if they are
    /// not at their default places.
    pub fn arguments(&self) -> String {
        let unless = |option: &str, dir: &Path, default: PathBuf| {
            if dir == default { String::new() } else { format!(" {option} {}", dir.display()) }
        };
        format!(
            "--disk {}{}{}",
            self.disk.display(),
            unless("--state-dir", &self.state, default_state_dir(&self.disk)),
            unless("--runtime-dir", &self.runtime, default_runtime_dir())
        )
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// The runtime directory.
    pub fn runtime_dir(&self) -> &Path {
        &self.runtime
    }

    /// The manifest.
    pub fn manifest(&self) -> PathBuf {
        self.state.join("manifest")
    }

    /// The bitmap of regions that may have been written to.
    pub fn intents(&self) -> PathBuf {
        self.state.join("intents")
    }

    /// The directory of write logs.
    pub fn sessions(&self) -> PathBuf {
        self.state.join("sessions")
    }

    /// The page that survives the process but not the host.
    pub fn live_page(&self, disk: Uuid) -> PathBuf {
        self.runtime.join(format!("{disk}.live"))
    }

    /// What a killed server may not have written to its end; like the live page, it survives the process only.
    pub(crate) fn redo(&self, disk: Uuid) -> PathBuf {
        self.runtime.join(format!("{disk}.redo"))
    }

    /// The socket over which a running server takes the operator's commands.
    pub fn control(&self, disk: Uuid) -> PathBuf {
        self.runtime.join(format!("{disk}.control"))
    }

    /// Makes the directories that are missing, for the owner only.
    /// Those that were missing are added to `made`.
    pub(crate) fn create_state_dirs(&self, storage: &Storage, made: &mut Vec<PathBuf>) -> Result<(), Error> {
        for dir in [self.state.clone(), self.sessions()] {
            if create_private(storage, &dir)? {
                if dir != self.state {
                    give_away(&dir);
                }
                made.push(dir);
            }
        }
        Ok(())
    }

    /// Makes the runtime directory if it is missing.
    pub(crate) fn create_runtime_dir(&self) -> Result<(), Error> {
        if create_private(&Storage::default(), &self.runtime)? {
            give_away(&self.runtime);
        }
        Ok(())
    }
}

/// Leaves a directory that was just made to whom the one belongs in which it lies. (Not that of the state, which belongs to whoever
/// provisions.)
fn give_away(dir: &Path) {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if let Ok(opened) = rustix::fs::open(dir, flags, Mode::empty()) {
        blockio::give_to_owner_of_directory(&opened, dir);
    }
}

/// Whether it was missing.
fn create_private(storage: &Storage, dir: &Path) -> Result<bool, Error> {
    if dir.is_dir() {
        return Ok(false);
    }
    match storage.create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(false),
        Err(error) => Err(Error::state("create directory", dir, error)),
        Ok(()) => Ok(true),
    }
}

fn default_state_dir(disk: &Path) -> PathBuf {
    let beside = |disk: &Path| {
        let mut name = OsString::from(disk.as_os_str());
        name.push(".pristine");
        PathBuf::from(name)
    };
    let default = beside(disk);
    if default.exists() || !disk.is_symlink() {
        return default;
    }
    let of_target = disk.canonicalize().map(|target| beside(&target)).ok();
    of_target.filter(|dir| dir.exists()).unwrap_or(default)
}

fn default_runtime_dir() -> PathBuf {
    let of_service = std::env::var_os(RUNTIME_DIRECTORY).unwrap_or_default();
    let first = of_service.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
    if first.starts_with(b"/") {
        return PathBuf::from(OsStr::from_bytes(first));
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !rustix::process::geteuid().is_root() => Path::new(&dir).join("pristine"),
        _ => PathBuf::from("/run/pristine"),
    }
}
