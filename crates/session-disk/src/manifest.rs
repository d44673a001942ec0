//! The manifest: what a disk is, what its base is, and which logs still speak for it.
//!
//! A JSON document, then a line with its CRC32C. It is only ever replaced as a whole (write new, fsync,
//! rename, fsync of the directory), so a crash leaves the old one or the new one.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use base_image::{BaseFormat, BaseIdentity, BaseLocation, FileIdentity, Root};
use blockio::File;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use write_log::{LogId, LogKind};

use crate::Error;
use crate::disk::HoldReason;
use crate::open::disk_witness;
use crate::paths::Paths;
use crate::process::boot_id;
use crate::recover::Basis;
use crate::storage::{Staged, Storage};

/// The newest format version that this program reads, and the one that it writes.
pub const MANIFEST_VERSION: u32 = 1;

/// No manifest is larger: a few hundred logs at most.
const MANIFEST_SIZE_MAX: u64 = 1 << 20;

const CHECKSUM_PREFIX: &str = "crc32c ";

/// What is durable about a disk besides its blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format version.
    pub version: u32,
    /// The disk's own identity; every log names it.
    pub disk: Uuid,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Which file the disk is: a copy of it is another disk. `None` for a block device.
    pub file: Option<DiskFile>,
    /// What the kernel knows a block device by, whatever its name is in this boot. `None` for a file, and where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The base and what it looked like when the disk was provisioned from it.
    pub base: BaseEntry,
    /// Sequence number for the next log.
    pub next_sequence: u64,
    /// Logs that are not retired: what they hold may differ from the base.
    pub logs: Vec<LogEntry>,
    /// When there is no log: what the disk looked like when it was last known pristine. `None` for a
    /// block device.
    pub pristine_since: Option<BaseIdentity>,
    /// Grows with each manifest. The disk's file names one too; what is smaller is an old state.
    #[serde(default)]
    pub generation: u64,
    /// Why nothing is restored and no session begins, if that is so, or will be at the session's end.
    #[serde(default)]
    pub held: Option<HoldReason>,
    /// Whether what the logs name are changes that are kept: the disk's content, not to be restored.
    #[serde(default)]
    pub kept: bool,
    /// How a server that stopped in order left the last session, if nothing of it was restored.
    /// `None` while a server runs, so that a kill leaves it `None`. It says nothing once the host has gone down: without a
    /// live page of this boot.
    #[serde(default)]
    pub left: Option<Left>,
    /// What the disk's file was like when whoever had it stopped in order and left logs; `None` while somebody has it, so that
    /// a kill leaves it `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stopped>,
}

/// What tells that a disk was written, or an older copy of it put in its place, while nobody served it. (A disk that is pristine has
/// more of that: [`Manifest::pristine_since`].)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stopped {
    /// The host's boot in which that was.
    pub boot: Uuid,
    /// Time of the last change of the contents, nanoseconds since the epoch.
    pub mtime_ns: i64,
}

/// Types of file systems (statfs(2)) on which a file's times change when it is written and at no other time: ext4, xfs, btrfs, tmpfs. Others
/// may change them when they write back.
const TIMES_ARE_EXACT: [u64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

impl Stopped {
    /// As it is now, of a regular file that has such times.
    ///
    /// # Errors
    /// If the disk can't be looked at.
    pub(crate) fn of(disk: &File) -> Result<Option<Self>, Error> {
        let now = disk_witness(disk)?.and_then(|identity| identity.file);
        let is_exact =
            rustix::fs::fstatfs(disk).is_ok_and(|of| TIMES_ARE_EXACT.contains(&(of.f_type as u64)));
        Ok(match now.filter(|_| is_exact) {
            Some(FileIdentity { mtime_ns, .. }) => {
                wait_for_other_times(mtime_ns);
                Some(Self { boot: boot_id()?, mtime_ns })
            }
            None => None,
        })
    }

    /// Whether a file with the time `mtime_ns` may be as it was, in the boot `boot`. When the host has gone down since, the time may
    /// not have become durable: an older one tells nothing then.
    pub(crate) fn may_be(self, mtime_ns: i64, boot: Uuid) -> bool {
        mtime_ns == self.mtime_ns || (boot != self.boot && mtime_ns < self.mtime_ns)
    }
}

/// Where inodes are small, ext4 keeps whole seconds: returns when a file that is written from now on has another time than
/// `mtime_ns`, which takes a second at most.
pub(crate) fn wait_for_other_times(mtime_ns: i64) {
    const SECOND: Duration = Duration::from_secs(1);
    // The kernel's clock for such times ticks every 10 ms at most.
    const TICK: Duration = Duration::from_millis(10);
    let Ok(mtime) = u64::try_from(mtime_ns) else { return };
    if !mtime.is_multiple_of(SECOND.as_nanos() as u64) {
        return;
    }
    let since = UNIX_EPOCH.elapsed().unwrap_or_default().checked_sub(Duration::from_nanos(mtime));
    if let Some(left) = since.and_then(|since| (SECOND + TICK).checked_sub(since)) {
        std::thread::sleep(left);
    }
}

/// How a session was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// It was open; its log is the manifest's last.
    Open,
    /// It had ended.
    Ended,
}

/// What tells a disk's file from a copy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// Inode number.
    pub inode: u64,
    /// Birth time in nanoseconds since the epoch, where the file system keeps one.
    pub birth_ns: Option<i64>,
}

impl DiskFile {
    /// Of a regular file.
    pub(crate) fn of(identity: &BaseIdentity) -> Option<Self> {
        let file = identity.file.as_ref()?;
        Some(Self { inode: file.inode, birth_ns: file.birth_ns })
    }
}

/// A disk's base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseEntry {
    /// Absolute path, or URI.
    pub path: BaseLocation,
    /// Its format, decided when the disk was provisioned: its contents never change that.
    #[serde(default, skip_serializing_if = "BaseFormat::is_raw")]
    pub format: BaseFormat,
    /// What it looked like.
    pub identity: BaseIdentity,
    /// The root hash of its seal, if it had one: then its contents count, and not what it looks like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Root>,
    /// Absolute path of its seal, if that is not beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<PathBuf>,
}

/// A log that is not retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogEntry {
    /// Sequence number; higher is younger.
    pub sequence: u64,
    /// Part of the log's file name and of its header.
    pub uuid: Uuid,
    /// Whether a session wrote it, or it is a set that is wholly durable.
    pub kind: EntryKind,
}

/// The kinds of logs, as the manifest names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// Blocks that a session owned.
    Session,
    /// Blocks that were pending when the log was made.
    Pending,
}

impl LogEntry {
    /// The log's name.
    pub fn id(&self) -> LogId {
        LogId { seq: self.sequence, uuid: self.uuid }
    }

    /// The log's kind, as its own header names it.
    pub fn kind(&self) -> LogKind {
        match self.kind {
            EntryKind::Session => LogKind::Session,
            EntryKind::Pending => LogKind::Pending,
        }
    }
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Manifest {
    /// Reads the manifest of a disk.
    pub fn load(paths: &Paths) -> Result<Self, Error> {
        Self::load_from(&Storage::default(), paths)
    }

    pub(crate) fn load_from(storage: &Storage, paths: &Paths) -> Result<Self, Error> {
        let path = paths.manifest();
        let missing = || Error::NotProvisioned { disk: paths.disk().to_owned(), manifest: path.clone() };
        let bytes = match storage.read(&path, MANIFEST_SIZE_MAX + 1) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            result => result.map_err(|error| Error::state("read", &path, error))?,
        };
        if bytes.len() as u64 > MANIFEST_SIZE_MAX {
            let what = format!("it has more than {MANIFEST_SIZE_MAX} bytes");
            return Err(Error::DamagedManifest { path, what });
        }
        Self::parse(&path, &bytes)
    }

    /// Reads a manifest out of the bytes of `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let damaged = |what: String| Error::DamagedManifest { path: path.to_owned(), what };
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text".into()))?;
        let (body, checksum) = text
            .trim_end_matches('\n')
            .rsplit_once('\n')
            .ok_or_else(|| damaged("it has no checksum".into()))?;
        let stated = checksum
            .strip_prefix(CHECKSUM_PREFIX)
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .ok_or_else(|| damaged("its last line is not a checksum".into()))?;
        let actual = crc32c::crc32c(body.as_bytes());
        if stated != actual {
            return Err(damaged(format!("its checksum is {actual:08x}, expected {stated:08x}")));
        }
        let version = serde_json::from_str::<VersionOnly>(body).map_err(|e| damaged(e.to_string()))?.version;
        if version != MANIFEST_VERSION {
            return Err(Error::NewerManifest {
                path: path.to_owned(),
                found: version,
                known: MANIFEST_VERSION,
            });
        }
        // All of it is there: a field that is not known may be a hold.
        serde_json::from_str(body)
            .map_err(|error| Error::OtherManifest { path: path.to_owned(), what: error.to_string() })
    }

    /// Whether this is already the shortest durable form of a verdict: no log, or one durable set.
    pub(crate) fn speaks_alone(&self, basis: &Basis) -> bool {
        match (basis, self.logs.as_slice()) {
            (Basis::Pristine, _) => true,
            (Basis::ExactLogs, [only]) => only.kind == EntryKind::Pending,
            _ => false,
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, io::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        let checksum = crc32c::crc32c(&bytes);
        writeln!(bytes, "\n{CHECKSUM_PREFIX}{checksum:08x}")?;
        Ok(bytes)
    }

    /// Makes this the disk's manifest, durably. After an error the old one still holds, or this one does.
    pub(crate) fn store(&self, storage: &Storage, paths: &Paths) -> Result<(), Error> {
        let staged = self.stage(storage, paths)?;
        staged.sync(paths)?;
        staged.place(storage, paths)
    }

    /// The first part of [`store`](Self::store): this has its room, but is neither on the medium nor the disk's manifest.
    pub(crate) fn stage(&self, storage: &Storage, paths: &Paths) -> Result<StagedManifest, Error> {
        let path = paths.manifest();
        let staged = self.to_bytes().and_then(|bytes| storage.stage(&path, &bytes));
        Ok(StagedManifest { file: staged.map_err(|error| Error::state("replace", &path, error))? })
    }
}

/// A manifest that was written and is not the disk's yet.
#[derive(Debug)]
#[must_use]
pub(crate) struct StagedManifest {
    file: Staged,
}

impl StagedManifest {
    /// Makes it durable.
    pub(crate) fn sync(&self, paths: &Paths) -> Result<(), Error> {
        self.file.sync().map_err(|error| Error::state("sync a new", &paths.manifest(), error))
    }

    /// Makes it, which is synced, the disk's, durably. After an error the old one still holds, or this one does.
    pub(crate) fn place(self, storage: &Storage, paths: &Paths) -> Result<(), Error> {
        self.file.place().map_err(|error| Error::state("replace", &paths.manifest(), error))?;
        storage.sync_dir(paths.state_dir())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            disk: Uuid::from_u128(1),
            size: 1 << 20,
            file: Some(DiskFile { inode: 7, birth_ns: None }),
            device: None,
            base: BaseEntry {
                path: Path::new("/images/golden.raw").into(),
                format: BaseFormat::Qcow2,
                identity: BaseIdentity::of_size(1 << 20),
                root: Some("0123456789abcdef".repeat(4).try_into().unwrap()),
                seal: None,
            },
            next_sequence: 3,
            logs: vec![LogEntry { sequence: 2, uuid: Uuid::from_u128(2), kind: EntryKind::Session }],
            pristine_since: None,
            generation: 5,
            held: Some(HoldReason::ByOperator),
            kept: false,
            left: Some(Left::Ended),
            stopped: None,
        }
    }

    #[test]
    fn manifest_stored_and_loaded_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(&dir.path().join("disk"), Some(dir.path()), None);
        assert!(matches!(Manifest::load(&paths), Err(Error::NotProvisioned { .. })));
        manifest().store(&Storage::default(), &paths).unwrap();
        assert_eq!(Manifest::load(&paths).unwrap(), manifest());
    }

    /// Invariant 6: a manifest that can't be trusted is not believed.
    #[test]
    fn manifest_with_any_bit_flipped_is_refused_or_the_same() {
        let bytes = manifest().to_bytes().unwrap();
        for index in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[index / 8] ^= 1 << (index % 8);
            match Manifest::parse(Path::new("m"), &flipped) {
                Ok(read) => assert_eq!(read, manifest(), "bit {index}"),
                Err(error) => assert!(matches!(error, Error::DamagedManifest { .. }), "bit {index}: {error}"),
            }
        }
        for len in 0..bytes.len() - 1 {
            assert!(Manifest::parse(Path::new("m"), &bytes[..len]).is_err(), "cut at {len}");
        }
    }

    /// A manifest that names no format is of a raw base, whatever that begins with.
    #[test]
    fn manifest_without_a_format_is_of_a_raw_base() {
        let mut value = serde_json::to_value(manifest()).unwrap();
        let base = value["base"].as_object_mut().unwrap();
        base.retain(|name, _| name != "format" && name != "root");
        let old: Manifest = serde_json::from_value(value).unwrap();
        assert_eq!((old.base.format, old.base.root), (BaseFormat::Raw, None));
    }

    /// A base with a server is written where paths are; older manifests have no place for its seal.
    #[test]
    fn manifest_of_an_nbd_base_stored_and_loaded_is_the_same() {
        let uri = "nbd+unix:///golden?socket=/run/nbd";
        let mut of_uri = manifest();
        of_uri.base.path = PathBuf::from(uri).try_into().unwrap();
        of_uri.base.seal = Some("/images/golden.manifest".into());
        let read = Manifest::parse(Path::new("m"), &of_uri.to_bytes().unwrap()).unwrap();
        assert_eq!((read.base.path.display().to_string(), &read), (uri.to_owned(), &of_uri));
    }

    /// Manifests from before holds stay readable.
    #[test]
    fn manifest_without_a_hold_is_not_held() {
        let mut value = serde_json::to_value(manifest()).unwrap();
        value.as_object_mut().unwrap().retain(|name, _| name != "held" && name != "left");
        let old: Manifest = serde_json::from_value(value).unwrap();
        assert_eq!(old, Manifest { held: None, left: None, ..manifest() });
    }

    #[test]
    fn manifest_of_a_newer_version_is_refused_by_name() {
        let newer = Manifest { version: 2, ..manifest() }.to_bytes().unwrap();
        assert!(matches!(
            Manifest::parse(Path::new("m"), &newer),
            Err(Error::NewerManifest { found: 2, known: 1, .. })
        ));
    }
}
