//! A small disk with a base, and a client that checks what it reads against a model in memory.
#![allow(dead_code, reason = "each test uses its part")]

pub(crate) mod crash;
pub(crate) mod gate;
pub(crate) mod generations;
pub(crate) mod image;
pub(crate) mod life;
pub(crate) mod schedule;
mod session;
pub(crate) mod steps;
pub(crate) mod watchdog;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use blockio::{EngineKind, GuestBuf};
use session_disk::{
    DiskOptions, DiskQueue, Done, Error, ProvisionOptions, Request, SessionDisk, SessionSummary, provision,
};

/// A directory with a base and a disk.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) base: Vec<u8>,
    pub(crate) options: DiskOptions,
}

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Opens a disk that nobody has open. A program that another test starts has all that this process had open until it is
/// executed, and so for a moment the locks of disks that are closed here.
#[track_caller]
pub(crate) fn open(options: &DiskOptions) -> Arc<SessionDisk> {
    let mut disk = None;
    wait_until(|| match SessionDisk::open(options) {
        Err(Error::InUse { .. }) => false,
        opened => {
            disk = Some(opened.unwrap());
            true
        }
    });
    disk.unwrap()
}

/// Why something is refused with a disk that nobody has open; see [`open`].
#[track_caller]
pub(crate) fn refusal<T>(mut attempt: impl FnMut() -> Result<T, Error>) -> Error {
    let mut refusal = None;
    wait_until(|| match attempt() {
        Err(Error::InUse { .. }) => false,
        attempted => {
            refusal = attempted.err();
            true
        }
    });
    refusal.unwrap()
}

/// Copies a directory with all that is in it; `to` must not be there.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// A number out of the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Whether a hunt that began at `started` has used up its time.
pub(crate) fn is_over(started: std::time::Instant) -> bool {
    number("PRISTINE_SECONDS").is_some_and(|seconds| started.elapsed().as_secs() >= seconds)
}

/// A directory in memory, where there is such a file system: these tests do many thousand syncs.
pub(crate) fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A base of `size` bytes with data in every other 64 KiB, each block marked with its number.
pub(crate) fn base_content(size: usize) -> Vec<u8> {
    let mut base = vec![0; size];
    for (block, bytes) in base.chunks_mut(4096).enumerate() {
        if (block / 16) % 2 == 0 {
            bytes.iter_mut().enumerate().for_each(|(n, byte)| *byte = (block * 7 + n / 512 + 1) as u8 | 1);
        }
    }
    base
}

impl Bench {
    /// A provisioned disk; `lazy`: nothing was copied yet.
    pub(crate) fn new(base_size: usize, disk_size: Option<u64>, lazy: bool, engine: EngineKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = base_content(base_size);
        let base_path = dir.path().join("base.raw");
        write_sparse(&base_path, &base);
        let mut content = base;
        content.resize(disk_size.unwrap_or(base_size as u64) as usize, 0);
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            engine: Some(engine),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        let made = provision(&ProvisionOptions {
            size: disk_size,
            ..ProvisionOptions::new(base_path, options.clone())
        })
        .unwrap();
        assert!(made.pending_blocks > 0);
        let bench = Self { dir, base: content, options };
        if !lazy {
            let disk = bench.open();
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
            disk.stop().unwrap();
        }
        bench
    }

    pub(crate) fn open(&self) -> Arc<SessionDisk> {
        open(&self.options)
    }

    pub(crate) fn disk_content(&self) -> Vec<u8> {
        std::fs::read(&self.options.disk).unwrap()
    }

    pub(crate) fn base_path(&self) -> PathBuf {
        self.dir.path().join("base.raw")
    }

    /// Restores what is pending and asserts invariant 4: the disk equals the base, byte for byte.
    pub(crate) fn assert_restores_exactly(&self, disk: &SessionDisk) {
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        assert_eq!(disk.pending_blocks(), 0);
        self.assert_equal_to_base();
    }

    pub(crate) fn assert_equal_to_base(&self) {
        let content = self.disk_content();
        assert_eq!(content.len(), self.base.len());
        for (block, (disk, base)) in content.chunks(4096).zip(self.base.chunks(4096)).enumerate() {
            assert!(disk == base, "block {block} differs from the base");
        }
    }
}

/// Writes `content` with holes where whole blocks are zero.
pub(crate) fn write_sparse(path: &Path, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (block, bytes) in content.chunks(4096).enumerate().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0))
    {
        file.write_all_at(bytes, block as u64 * 4096).unwrap();
    }
}

/// Runs one request to its end.
pub(crate) fn run(queue: &mut DiskQueue, request: Request) -> std::io::Result<()> {
    queue.push(1, request);
    let mut done: Vec<Done> = Vec::new();
    queue.quiesce(&mut done);
    assert_eq!(done.len(), 1);
    done.pop().unwrap().result
}

pub(crate) fn read(disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, len: usize) -> Vec<u8> {
    let buf = GuestBuf::zeroed(len);
    buf.copy_in(0, &vec![0xee; len]);
    let range = disk.geometry().sectors_at(sector, len as u64).unwrap();
    run(queue, Request::Read { range, buf: buf.clone() }).unwrap();
    let mut bytes = vec![0; len];
    buf.copy_out(0, &mut bytes);
    bytes
}

pub(crate) fn write(disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, bytes: &[u8]) {
    try_write(disk, queue, sector, bytes).unwrap();
}

pub(crate) fn try_write(
    disk: &SessionDisk,
    queue: &mut DiskQueue,
    sector: u64,
    bytes: &[u8],
) -> std::io::Result<()> {
    let buf = GuestBuf::zeroed(bytes.len());
    buf.copy_in(0, bytes);
    let range = disk.geometry().sectors_at(sector, bytes.len() as u64).unwrap();
    run(queue, Request::Write { range, buf, durable: false })
}

/// Ends the session after dropping its queue.
pub(crate) fn end(disk: &SessionDisk, queue: DiskQueue) -> SessionSummary {
    drop(queue);
    disk.end_session().unwrap()
}
