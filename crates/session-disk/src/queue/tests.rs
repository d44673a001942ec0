//! What can't be noted down is not done: logs and intents whose writes fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use blockio::GuestBuf;
use write_log::{DiskFile, LogFile, LogWriter};

use super::*;
use crate::{DiskOptions, ProvisionOptions, SessionDisk, provision};

mod bounced;
mod preparing;
mod reading_ahead;

const SIZE: usize = 1 << 20;

/// A log's file that fails while it is told to.
#[derive(Debug)]
struct Faulty {
    file: DiskFile,
    fails: Arc<AtomicBool>,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        match self.fails.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(5)),
            false => Ok(()),
        }
    }
}

impl LogFile for Faulty {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.check()?;
        self.file.write_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.check()?;
        self.file.sync_data()
    }

    fn reserve(&mut self, len: u64) -> io::Result<()> {
        self.file.reserve(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
}

/// A disk with an open session, and its base's content; `lazy`: all of it is pending.
struct Bench {
    dir: tempfile::TempDir,
    options: DiskOptions,
    disk: Arc<SessionDisk>,
    queue: DiskQueue,
    base: Vec<u8>,
    /// Whether the log's writes fail.
    log_fails: Arc<AtomicBool>,
}

impl Bench {
    fn new(lazy: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.raw");
        let base: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
        std::fs::write(&path, &base).unwrap();
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        provision(&ProvisionOptions::new(path, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        if !lazy {
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        }
        disk.begin_session(None).unwrap();
        let log_fails = Arc::new(AtomicBool::new(false));
        {
            disk.shared().finish_beginning();
            let mut log = disk.shared().log();
            let writer = log.take().unwrap();
            let (path, mark) = (writer.path().to_owned(), writer.mark());
            let file = Faulty { file: DiskFile::open(&path, true).unwrap(), fails: Arc::clone(&log_fails) };
            *log = Some(LogWriter::resume_on(Box::new(file), path, mark).unwrap().0);
        }
        let queue = disk.queue(8).unwrap();
        Self { dir, options, disk, queue, base, log_fails }
    }

    fn run(&mut self, request: Request) -> io::Result<()> {
        self.queue.push(1, request);
        let mut done = Vec::new();
        self.queue.quiesce(&mut done);
        done.pop().unwrap().result
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        let buf = GuestBuf::zeroed(bytes.len());
        buf.copy_in(0, bytes);
        let range = self.disk.geometry().sectors_at(sector, bytes.len() as u64).unwrap();
        if self.write_quickly(range, &buf) {
            let mut done = Vec::new();
            self.queue.quiesce(&mut done);
            assert!(done.is_empty() && self.queue.in_flight() == 0);
            return Ok(());
        }
        self.run(Request::Write { range, buf, durable: false })
    }

    /// Writes as a worker does: at once, if need be after the pass's first touches were logged.
    fn write_quickly(&mut self, range: BlockRange, buf: &GuestBuf) -> bool {
        if self.queue.write_now(range, buf.view(), false) {
            return true;
        }
        if !self.queue.announce(range) {
            return false;
        }
        assert!(!self.queue.write_now(range, buf.view(), false), "announced is not logged");
        self.queue.log_announced();
        self.queue.write_now(range, buf.view(), false)
    }

    fn zero(&mut self, sector: u64, len: u64) -> io::Result<()> {
        let range = self.disk.geometry().sectors_at(sector, len).unwrap();
        self.run(Request::WriteZeroes { range, may_unmap: true, durable: false })
    }

    fn read_all(&mut self) -> Vec<u8> {
        let buf = GuestBuf::zeroed(SIZE);
        let range = self.disk.geometry().sectors_at(0, SIZE as u64).unwrap();
        self.run(Request::Read { range, buf: buf.clone() }).unwrap();
        let mut bytes = vec![0; SIZE];
        buf.copy_out(0, &mut bytes);
        bytes
    }

    fn content(path: &Path) -> Vec<u8> {
        std::fs::read(path).unwrap()
    }
}

/// Invariants 1 and 6: while the log can't be written, first touches fail with I/O errors and change
/// nothing, what the session owns is written as ever; once it can be, all goes on, and a kill then
/// finds an exact log.
#[test]
fn write_whose_record_can_not_be_appended_fails_and_changes_nothing() {
    let mut bench = Bench::new(false);
    bench.write(8, &[0x11; 4096]).unwrap();
    let (one, buf) = (bench.disk.geometry().sectors_at(8, 4096).unwrap(), GuestBuf::zeroed(4096));
    buf.copy_in(0, &[0x11; 4096]);
    assert!(bench.write_quickly(one, &buf), "what is logged is written at once");
    bench.log_fails.store(true, Ordering::SeqCst);
    let disk_before = Bench::content(&bench.options.disk);
    for _ in 0..3 {
        bench.write(16, &[0x22; 4096]).unwrap_err();
        bench.write(33, &[0x22; 512]).unwrap_err();
        bench.zero(64, 8192).unwrap_err();
        // One block is the session's, the other is not.
        bench.write(8, &[0x22; 8192]).unwrap_err();
    }
    assert!(Bench::content(&bench.options.disk) == disk_before, "a write was not logged and done");
    assert_eq!(bench.disk.dirty_blocks(), 1);
    bench.write(8, &[0x33; 4096]).unwrap();
    bench.log_fails.store(false, Ordering::SeqCst);
    bench.write(16, &[0x44; 4096]).unwrap();
    let mut expected = bench.base.clone();
    expected[4096..8192].fill(0x33);
    expected[8192..12288].fill(0x44);
    assert!(bench.read_all() == expected);
    killed_is_restored(bench, Some(2));
}

std::thread_local! {
    /// What this thread had logged for the operator to see.
    static LOGGED: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LOGGED.with_borrow_mut(|lines| lines.push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Invariant 8: a guest whose writes fail can't fill the host's log. Why they fail is told to whoever asked, wholly.
#[test]
fn write_that_is_not_logged_tells_why_and_is_not_reported_here() {
    let _ = log::set_logger(&Logger).map(|()| log::set_max_level(log::LevelFilter::Info));
    let errors = |bench: &mut Bench| {
        LOGGED.with_borrow_mut(Vec::clear);
        let failures = [bench.write(16, &[0x22; 4096]), bench.write(33, &[0x22; 512]), bench.zero(64, 8192)];
        assert_eq!(LOGGED.with_borrow(Vec::clone), Vec::<String>::new());
        failures.map(|failure| blockio::in_full(&failure.unwrap_err()))
    };
    for lazy in [false, true] {
        let mut bench = Bench::new(lazy);
        bench.log_fails.store(true, Ordering::SeqCst);
        for text in errors(&mut bench) {
            assert!(text.contains("write log") && text.contains("os error 5"), "{text}");
        }
        bench.log_fails.store(false, Ordering::SeqCst);
        bench.disk.shared().intents.clear().unwrap();
        bench.disk.shared().intents.set_broken(true);
        for text in errors(&mut bench) {
            assert!(text.contains("intents") && text.contains("os error 9"), "{text}");
        }
    }
}

/// Invariants 2 and 6: blocks that are pending, and whose record can't be appended after their data was
/// written, stay pending: they are read from the base, and restored.
#[test]
fn pending_block_whose_record_can_not_be_appended_stays_pending() {
    let mut bench = Bench::new(true);
    let pending = bench.disk.pending_blocks();
    bench.log_fails.store(true, Ordering::SeqCst);
    bench.write(16, &[0x22; 4096]).unwrap_err();
    bench.write(33, &[0x22; 512]).unwrap_err();
    bench.zero(64, 8192).unwrap_err();
    assert_eq!((bench.disk.pending_blocks(), bench.disk.dirty_blocks()), (pending, 0));
    let base = bench.base.clone();
    assert!(bench.read_all() == base);
    bench.log_fails.store(false, Ordering::SeqCst);
    bench.write(33, &[0x55; 512]).unwrap();
    let mut expected = base;
    expected[33 * 512..34 * 512].fill(0x55);
    assert!(bench.read_all() == expected);
    killed_is_restored(bench, None);
}

/// Invariants 1 and 6: the same where it is the intent that can't be made durable.
#[test]
fn write_whose_intent_can_not_be_written_fails_and_changes_nothing() {
    for lazy in [false, true] {
        let mut bench = Bench::new(lazy);
        // A drain or a provision sets none.
        let shared = Arc::clone(bench.disk.shared());
        shared.intents.clear().unwrap();
        shared.intents.set_broken(true);
        let disk_before = Bench::content(&bench.options.disk);
        for _ in 0..2 {
            bench.write(16, &[0x22; 4096]).unwrap_err();
            bench.write(33, &[0x22; 512]).unwrap_err();
            bench.zero(64, 8192).unwrap_err();
        }
        assert!(Bench::content(&bench.options.disk) == disk_before, "a write without an intent was done");
        let base = bench.base.clone();
        assert!(bench.read_all() == base);
        shared.intents.set_broken(false);
        bench.write(16, &[0x44; 4096]).unwrap();
        drop(shared);
        killed_is_restored(bench, (!lazy).then_some(1));
    }
}

/// Invariant 6: a seal that fails leaves a session's log without an end. Were we killed in the next
/// session, the log would not be exact and no mark would speak for it: all is pending then.
#[test]
fn session_whose_seal_failed_is_pending_and_all_is_after_a_kill() {
    let mut bench = Bench::new(false);
    bench.write(16, &[0x22; 4096]).unwrap();
    bench.log_fails.store(true, Ordering::SeqCst);
    let Bench { dir, options, disk, queue, base, .. } = bench;
    drop(queue);
    disk.end_session().unwrap();
    assert_eq!(disk.pending_blocks(), 1);
    disk.begin_session(None).unwrap();
    drop(disk);
    let disk = SessionDisk::open(&options).unwrap();
    assert_eq!(disk.pending_blocks(), disk.geometry().blocks(), "{:?}", disk.basis());
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    assert!(Bench::content(&options.disk) == base);
    drop(dir);
}

/// A kill now: the next one finds `pending` blocks by exact logs, and restores them.
fn killed_is_restored(bench: Bench, pending: Option<u64>) {
    let Bench { dir, options, disk, queue, base, .. } = bench;
    drop((queue, disk));
    let disk = SessionDisk::open(&options).unwrap();
    assert_eq!(*disk.basis(), crate::Basis::ExactLogs);
    if let Some(pending) = pending {
        assert_eq!(disk.pending_blocks(), pending);
    }
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    assert!(Bench::content(&options.disk) == base);
    drop(dir);
}

/// What waits until fewer bytes are begun is begun when the last that was ends by leaving P: nobody would tell of it later.
#[test]
fn request_that_waits_for_room_is_begun_when_blocks_leave_p() {
    let mut bench = Bench::new(true);
    let queue = &mut bench.queue;
    // As if others were about that.
    queue.begun_bytes = BYTES_MAX;
    for block in [8, 16] {
        let range = bench.disk.geometry().sectors_at(block * 8, 4096).unwrap();
        queue.push_later(block, Request::WriteZeroes { range, may_unmap: true, durable: false });
    }
    assert!(!queue.has_room());
    queue.submit();
    let mut done = Vec::new();
    queue.reap(&mut done);
    while done.len() < 2 {
        let mut fds: Vec<_> =
            queue.wait_fds().into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_ne!(poll(&mut fds, Some(&limit)).unwrap(), 0, "nobody tells of what waits");
        queue.reap(&mut done);
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert_eq!(std::mem::take(&mut queue.begun_bytes), BYTES_MAX);
}
