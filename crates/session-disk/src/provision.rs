//! Making a session disk from a base: everything that the base has as data becomes pending.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base_image::{BaseImage, Content, device_name};
use blockio::{File, FileKind, OpenOptions};
use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};
use uuid::Uuid;
use write_log::{LogHeader, LogWriter};

use crate::disk::{next_entry, unix_ns};
use crate::intents::Intents;
use crate::live::LivePage;
use crate::manifest::{DiskFile, EntryKind, MANIFEST_VERSION, Manifest, Stopped};
use crate::named_base::NamedBase;
use crate::open::{disk_witness, file_number, lock_state_dir, open_disk, refuse_disk_of_base};
use crate::overlay::logs_of;
use crate::rebase::refuse_open_session;
use crate::storage::Storage;
use crate::{DiskOptions, Error, Paths, witness};

/// How much of a device's beginning is looked at: partition tables, and what file systems and volumes begin with.
const LOOKED_AT: u64 = 1 << 20;

/// Types of file systems that no reboot leaves anything of (statfs(2)): tmpfs, which devtmpfs says it is too, and ramfs.
const MEMORY_ONLY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// What is to be made.
#[derive(Clone, Debug)]
pub struct ProvisionOptions {
    /// The base.
    pub base: NamedBase,
    /// The disk and where its state goes.
    pub disk: DiskOptions,
    /// Size of the disk in bytes, if it is to be larger than the base; the tail is zeroes.
    pub size: Option<u64>,
    /// Take over an existing file, or a device that is not empty: all of its blocks are restored.
    pub adopt: bool,
}

impl ProvisionOptions {
    /// A new disk from the file or device `base`, of the base's size; the base's format is as its file name says.
    pub fn new(base: impl Into<PathBuf>, disk: DiskOptions) -> Self {
        Self { base: NamedBase::file(base), disk, size: None, adopt: false }
    }
}

/// What was made; files that were not there before can be removed again.
#[derive(Debug)]
pub struct Provisioned {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Blocks that are to be restored.
    pub pending_blocks: u64,
    made: Made,
}

/// What did not exist before, youngest last.
#[derive(Debug, Default)]
struct Made {
    files: Vec<PathBuf>,
    dirs: Vec<PathBuf>,
    /// The disk and the state directory, locked: nobody else takes what is about to be removed.
    locks: (Option<Arc<File>>, Option<fs::File>),
}

impl Made {
    fn undo(&mut self) {
        for dir in self.dirs.drain(..).rev() {
            let _ = fs::remove_dir_all(dir);
        }
        for file in self.files.drain(..).rev() {
            let _ = fs::remove_file(file);
        }
    }
}

impl Provisioned {
    /// Removes what was made: for a provision that could not be finished. `false`: the disk was there before, and stays
    /// provisioned; what is not restored yet is pending.
    pub fn undo(mut self) -> bool {
        let was_made = !self.made.files.is_empty();
        self.made.undo();
        was_made
    }
}

/// Makes the disk and its state, durably; copies nothing. The disk can be served at once. When this fails, nothing
/// that it made is left.
pub fn provision(options: &ProvisionOptions) -> Result<Provisioned, Error> {
    let mut made = Made::default();
    let result = make(options, &mut made);
    match result {
        Ok((size, pending_blocks)) => {
            made.locks = (None, None);
            Ok(Provisioned { size, pending_blocks, made })
        }
        Err(error) => {
            made.undo();
            Err(error)
        }
    }
}

fn make(options: &ProvisionOptions, made: &mut Made) -> Result<(u64, u64), Error> {
    let path = &options.disk.disk;
    let (paths, storage) = (options.disk.paths(), Storage::new(options.disk.tape.clone()));
    let named = options.base.resolved()?;
    let (base, identity) = named.open_settled(options.disk.base_patience)?;
    let exists = match fs::metadata(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::state("open", path, error)),
    };
    if exists {
        refuse_disk_of_base(path, &base)?;
    }
    let state_before = existing_state(options, &paths, exists)?;
    let before = state_before.as_ref().map(|manifest| manifest.disk);
    let (disk, fresh) = if exists {
        let number = file_number(path)?;
        let live = before.as_ref().and_then(|id| LivePage::inspect(&paths.live_page(*id), *id, number));
        refuse_open_session(&paths, live.as_ref(), "is taken over")?;
        (open_existing(options, live.as_ref())?, false)
    } else {
        refuse_file_among_devices(path)?;
        let size = wanted_size(options, &base, None)?;
        Geometry::new(size).map_err(|source| Error::Geometry { path: path.clone(), source })?;
        let open = OpenOptions { write: true, direct: false, exclusive: true };
        let file = storage.create_disk(path, size, open)?;
        let locked = file.lock_exclusive();
        // Whoever was faster has it.
        if !locked.as_ref().is_err_and(blockio::Error::is_in_use) {
            made.files.push(path.clone());
        }
        locked?;
        (Arc::new(file), true)
    };
    made.locks.0 = Some(Arc::clone(&disk));
    let size = wanted_size(options, &base, Some(&disk))?;
    let geometry = Geometry::new(size).map_err(|source| Error::Geometry { path: path.clone(), source })?;
    let pending = BlockSet::new(geometry.blocks());
    if fresh {
        data_blocks(&base, geometry, &pending)?;
        // With a tape nothing is shared.
        let shares = options.disk.reflink && options.disk.tape.is_none() && can_share(&base, &disk, &pending);
        if !shares {
            check_room(path, pending.count() * BLOCK_SIZE)?;
        }
    } else {
        pending.insert(geometry.all());
    }
    refuse_state_in_memory(options, &disk, &paths)?;
    paths.create_state_dirs(&storage, &mut made.dirs)?;
    made.locks.1 =
        Some(lock_as_judged(options, &paths, exists, state_before.as_ref()).inspect_err(|_| {
            // Whoever has it has what is in it.
            made.dirs.clear();
        })?);
    // A state that is replaced, and copies of it, are older than the new one, and so are its logs.
    let (generation, next_sequence) =
        state_before.map_or((0, 1), |manifest| (manifest.generation, manifest.next_sequence));
    // Logs may be there of a state whose manifest is lost, and each number is given once.
    let given = logs_of(&paths.sessions())?.iter().map(|id| id.seq).max().unwrap_or(0);
    let next_sequence = next_sequence.max(given.saturating_add(1));
    // While the old manifest holds, nothing that it rests on is taken away.
    let may_be_older = before.is_some() || paths.manifest().exists();
    if !paths.intents().exists() {
        made.files.push(paths.intents());
    }
    Intents::create(&storage, &paths.intents(), geometry, may_be_older)?;
    let id = Uuid::new_v4();
    // Made by whoever fills it before it is used.
    made.files.extend([paths.live_page(id), paths.redo(id)]);
    let mut manifest = Manifest {
        version: MANIFEST_VERSION,
        disk: id,
        size,
        file: disk_witness(&disk)?.as_ref().and_then(DiskFile::of),
        device: device_name(&disk),
        base: named.entry(&base, identity.clone()),
        next_sequence,
        logs: Vec::new(),
        pristine_since: None,
        generation: witness::next_generation(generation, witness::generation(&storage, &disk)?),
        held: None,
        kept: false,
        left: None,
        stopped: None,
    };
    if pending.is_empty() {
        storage.sync_disk(path, || disk.sync_all())?;
        manifest.pristine_since = disk_witness(&disk)?;
    } else {
        let entry = next_entry(&mut manifest, EntryKind::Pending);
        let header = LogHeader {
            kind: entry.kind(),
            id: entry.id(),
            disk: manifest.disk,
            geometry,
            created_unix_ns: unix_ns(),
        };
        made.files.push(paths.sessions().join(entry.id().file_name()));
        LogWriter::write_pending_in(&*storage.logs(&paths.sessions()), &header, &pending)?;
    }
    if fresh {
        storage.sync_disk(path, || disk.sync_all())?;
    }
    if !manifest.logs.is_empty() {
        manifest.stopped = Stopped::of(&disk)?;
    }
    // Before the manifest is there: whoever finds one may serve the disk, and no power cut may then take
    // the disk or its state away.
    storage.sync_dir(parent(path))?;
    storage.sync_dir(parent(paths.state_dir()))?;
    base.check(&identity)?;
    let stored = manifest.store(&storage, &paths);
    // Also if all that failed is the sync of its name.
    if stored.is_ok() || Manifest::load(&paths).is_ok_and(|named| named.disk == id) {
        // Without the directory, if that was there before.
        made.files.push(paths.manifest());
        if !fresh {
            // A file or device that was there before is taken now, and stays so: what failed goes on later.
            *made = Made::default();
        }
    }
    stored?;
    if !manifest.logs.is_empty() {
        witness::set_generation(&storage, &disk, manifest.generation);
    }
    Ok((size, pending.count()))
}

/// Locks the state directory, in which all is as it was judged to be before.
fn lock_as_judged(
    options: &ProvisionOptions,
    paths: &Paths,
    exists: bool,
    before: Option<&Manifest>,
) -> Result<fs::File, Error> {
    let lock = lock_state_dir(paths)?;
    match existing_state(options, paths, exists)? {
        now if now.as_ref() == before => Ok(lock),
        _ => Err(Error::Refused(format!(
            "{} was made or changed by another command in this moment; see with `pristine status` what it is",
            paths.manifest().display()
        ))),
    }
}

/// The manifest of a state directory that is there already; refused unless it is to be replaced. `exists`: the disk is there, too.
fn existing_state(
    options: &ProvisionOptions,
    paths: &Paths,
    exists: bool,
) -> Result<Option<Manifest>, Error> {
    let disk = options.disk.disk.display();
    match Manifest::load(paths) {
        Err(Error::NotProvisioned { .. }) => Ok(None),
        Err(error @ Error::State { .. }) => Err(error),
        _ if !options.adopt && !exists => Err(Error::Refused(format!(
            "{disk} is not there, but {} of such a disk is: see that nothing is missing that should be mounted there; to make the \
             disk anew use --adopt",
            paths.manifest().display()
        ))),
        Ok(Manifest { held, kept, logs, .. })
            if !exists
                && (held.as_ref().is_some_and(|reason| !reason.is_over()) || (kept && !logs.is_empty())) =>
        {
            Err(Error::Refused(format!(
                "{disk} is not there, and {} says that what was written to it is to be kept: see that nothing is missing that should be \
                 mounted there; if the disk is gone for good remove {}",
                paths.manifest().display(),
                paths.state_dir().display()
            )))
        }
        _ if !options.adopt => Err(Error::Refused(format!(
            "{disk} is provisioned already ({} exists); to restore it use `pristine restore`, to start over use --adopt",
            paths.manifest().display()
        ))),
        Ok(Manifest { held: Some(reason), .. }) if !reason.is_over() => {
            Err(Error::Held { disk: options.disk.disk.clone(), named: paths.arguments(), reason })
        }
        Ok(Manifest { kept: true, logs, .. }) if !logs.is_empty() => {
            Err(Error::Kept { disk: options.disk.disk.clone() })
        }
        Ok(manifest) => Ok(Some(manifest)),
        Err(Error::DamagedManifest { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn open_existing(options: &ProvisionOptions, live: Option<&LivePage>) -> Result<Arc<File>, Error> {
    let path = &options.disk.disk;
    let disk = open_disk(path, false, live)?;
    match disk.kind() {
        _ if options.adopt => Ok(disk),
        FileKind::Regular => Err(Error::Refused(format!(
            "{} exists; choose another name, or take the file over with --adopt (all of its contents are replaced by \
             the base's)",
            path.display()
        ))),
        _ if !is_empty(&disk)? => Err(Error::Refused(format!(
            "{} is not empty; see that it is the device that you mean, and take it over with --adopt (all of its contents \
             are replaced by the base's)",
            path.display()
        ))),
        _ => Ok(disk),
    }
}

/// Whether a device has nothing where partition tables and file systems begin.
fn is_empty(disk: &File) -> Result<bool, Error> {
    let mut beginning = vec![0; disk.size()?.min(LOOKED_AT) as usize];
    disk.read_exact_at(&mut beginning, 0)?;
    Ok(beginning.iter().all(|byte| *byte == 0))
}

/// Refuses to make a file where only devices should be: the name of one that is missing, or misspelt.
fn refuse_file_among_devices(path: &Path) -> Result<(), Error> {
    let device_of = |dir: &Path| fs::metadata(dir).map(|metadata| metadata.dev()).ok();
    let (dir, devices) = (device_of(parent(path)), device_of(Path::new("/dev")));
    if dir != devices || devices.is_none() || devices == device_of(Path::new("/")) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "there is no device {path}, and a file of that name would be in memory; see that the device is there and named right",
        path = path.display()
    )))
}

/// Refuses to keep the state of a device beside it, where nothing outlasts a reboot, unless that is wanted.
fn refuse_state_in_memory(options: &ProvisionOptions, disk: &File, paths: &Paths) -> Result<(), Error> {
    if disk.kind() == FileKind::Regular || options.disk.state_dir.is_some() {
        return Ok(());
    }
    let dir = parent(paths.state_dir());
    let of = rustix::fs::statfs(dir).map_err(|error| Error::state("look at", dir, error.into()))?;
    if !MEMORY_ONLY.contains(&(of.f_type as u64)) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the state of {disk} would be in {dir}, which is in memory: after a reboot nobody would know what is to be restored; name a \
         directory that stays with --state-dir (here, and in all other commands for this disk), such as /var/lib/pristine/{name}",
        disk = paths.disk().display(),
        dir = dir.display(),
        name = Path::new(paths.disk().file_name().unwrap_or_default()).display(),
    )))
}

/// The size of the disk: as asked for, else that of a device or an adopted file, else the base's.
fn wanted_size(options: &ProvisionOptions, base: &BaseImage, disk: Option<&File>) -> Result<u64, Error> {
    let of_disk = disk.map(File::size).transpose()?;
    let size = options.size.or(of_disk).unwrap_or(base.size());
    if size < base.size() {
        return Err(Error::Refused(format!(
            "the base {} has {} bytes, more than the {size} of the disk; a disk is at least as large as its base",
            base.path().display(),
            base.size()
        )));
    }
    match (disk, of_disk) {
        (Some(disk), Some(has)) if has < size || (has != size && disk.kind() == FileKind::Regular) => {
            Err(Error::DiskSize { path: disk.path().to_owned(), found: has, expected: size })
        }
        _ => Ok(size),
    }
}

/// Adds every block of which the base has data.
fn data_blocks(base: &BaseImage, geometry: Geometry, set: &BlockSet) -> Result<(), Error> {
    let mut offset = 0;
    while offset < geometry.size() {
        let left = geometry.size() - offset;
        offset += match base.content_at(offset, left)? {
            Content::Hole(len) => len,
            Content::Data(len) => {
                set.insert(Extent::between(offset / BLOCK_SIZE, (offset + len).div_ceil(BLOCK_SIZE)));
                len
            }
        };
    }
    Ok(())
}

/// Whether a disk that was just made can share blocks with the base: tried with the first that the base has. The disk has
/// it then, and gets it once more like all others.
fn can_share(base: &BaseImage, disk: &File, pending: &BlockSet) -> bool {
    let (Some((file, end)), Some(unit)) = (base.shareable(), disk.allocation_unit()) else { return false };
    let Some(first) = pending.next_run(0, 1) else { return false };
    let offset = first.first() * BLOCK_SIZE / unit * unit;
    blockio::sharing_is_safe() && offset + unit <= end && disk.share_from(file, offset, unit).is_ok()
}

/// Refuses early what would only fail after minutes of copying.
fn check_room(disk: &Path, needed: u64) -> Result<(), Error> {
    let dir = parent(disk);
    let stat = rustix::fs::statvfs(dir).map_err(|error| Error::state("look at", dir, error.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed {
        return Err(Error::Refused(format!(
            "{}: the base has {needed} bytes of data and only {free} bytes are free; make room, or choose another \
             directory for the disk",
            dir.display()
        )));
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}
