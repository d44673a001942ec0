//! What a write needs that is not durable yet is waited for by that write alone.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::*;
use crate::REGION_SIZE;

/// Whoever would wait for what does not come goes on after this; the test has failed then.
const PATIENCE: Duration = Duration::from_secs(30);
const REGIONS: u64 = 4;

/// A disk of some regions, an open session that has written nothing, and its queue.
struct Regions {
    disk: Arc<SessionDisk>,
    queue: DiskQueue,
    done: Vec<Done>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

/// Keeps something locked, on a thread of its own.
struct Gate {
    open: Sender<()>,
    thread: JoinHandle<()>,
}

impl Gate {
    /// `hold` is to call what it is given while it holds the lock.
    fn shut(hold: impl FnOnce(&dyn Fn()) + Send + 'static) -> Self {
        let ((open, opened), (told, shut)) = (channel::<()>(), channel());
        let thread = std::thread::spawn(move || {
            hold(&|| {
                told.send(()).unwrap();
                let _ = opened.recv_timeout(PATIENCE);
            });
        });
        shut.recv().unwrap();
        Self { open, thread }
    }

    fn open(self) {
        self.open.send(()).expect("what was not to wait has waited");
        self.thread.join().unwrap();
    }
}

impl Regions {
    /// `lazy`: the blocks of its base are pending, the first 64 KiB of each region.
    fn new(lazy: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        let file = std::fs::File::create(&base).unwrap();
        file.set_len(REGIONS * REGION_SIZE).unwrap();
        for region in 0..REGIONS {
            let bytes = [region as u8 + 1; 64 << 10];
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, region * REGION_SIZE).unwrap();
        }
        let path = dir.path().join("disk.raw");
        let options = DiskOptions { runtime_dir: Some(dir.path().join("run")), ..DiskOptions::new(&path) };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        if !lazy {
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        }
        let queue = disk.queue(8).unwrap();
        Self { disk, queue, done: Vec::new(), path, _dir: dir }
    }

    fn begin(lazy: bool) -> Self {
        let regions = Self::new(lazy);
        regions.disk.begin_session(None).unwrap();
        regions
    }

    fn range(&self, region: u64, block: u64) -> BlockRange {
        self.disk.geometry().sectors_at((region * REGION_SIZE + block * 4096) / 512, 4096).unwrap()
    }

    /// As a worker does with a request that can't be done at once.
    fn push_write(&mut self, token: u64, region: u64, block: u64) {
        let (range, buf) = (self.range(region, block), GuestBuf::zeroed(4096));
        buf.copy_in(0, &[0xee; 4096]);
        assert!(!self.queue.write_now(range, buf.view(), false) && !self.queue.announce(range), "prepared");
        self.queue.push_later(token, Request::Write { range, buf, durable: false });
    }

    /// Reads what the base has there.
    fn push_read(&mut self, token: u64, region: u64, block: u64) -> GuestBuf {
        let (range, buf) = (self.range(region, block), GuestBuf::zeroed(4096));
        self.queue.push(token, Request::Read { range, buf: buf.clone() });
        buf
    }

    /// Reaps until these and no others are answered, in any order; whether all went well.
    fn wait(&mut self, tokens: &[u64]) -> bool {
        self.queue.submit();
        self.queue.reap(&mut self.done);
        while self.done.len() < tokens.len() {
            let fds = self.queue.wait_fds();
            let mut fds: Vec<_> =
                fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let limit = rustix::time::Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_ne!(poll(&mut fds, Some(&limit)).unwrap(), 0, "nobody tells of what waits");
            self.queue.reap(&mut self.done);
        }
        let mut answered: Vec<_> = self.done.iter().map(|done| done.token).collect();
        answered.sort_unstable();
        assert_eq!(answered, tokens);
        std::mem::take(&mut self.done).iter().all(|done| done.result.is_ok())
    }

    /// Nobody can note a region while it is shut.
    fn shut_intents(&self) -> Gate {
        let shared = Arc::clone(self.disk.shared());
        Gate::shut(move |wait| shared.intents.hold(wait))
    }

    /// No session can have a log while it is shut.
    fn shut_log(&self) -> Gate {
        let shared = Arc::clone(self.disk.shared());
        Gate::shut(move |wait| {
            let _log = shared.log();
            wait();
        })
    }

    /// What the disk's file has there.
    fn on_disk(&self, region: u64, block: u64) -> u8 {
        let mut byte = [0];
        let file = std::fs::File::open(&self.path).unwrap();
        let at = region * REGION_SIZE + block * 4096;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).unwrap();
        byte[0]
    }
}

fn first_byte(buf: &GuestBuf) -> u8 {
    let mut byte = [0];
    buf.copy_out(0, &mut byte);
    byte[0]
}

/// Invariant 1, and that nothing else waits for it: while a region is being noted, reads and writes of other regions go on, and
/// the write into it is not done.
#[test]
fn write_into_a_region_waits_until_that_is_noted_and_nothing_else_does() {
    for lazy in [false, true] {
        let mut regions = Regions::begin(lazy);
        regions.push_write(0, 0, 0);
        assert!(regions.wait(&[0]));
        let gate = regions.shut_intents();
        regions.push_write(1, 1, 0);
        let read = regions.push_read(2, 1, 0);
        let range = regions.range(0, 1);
        regions.queue.push(3, Request::Write { range, buf: GuestBuf::zeroed(4096), durable: false });
        assert!(regions.wait(&[2, 3]));
        assert_eq!(first_byte(&read), 2);
        // These come meanwhile.
        regions.push_write(4, 2, 0);
        regions.push_write(5, 3, 0);
        regions.push_read(6, 2, 0);
        assert!(regions.wait(&[6]));
        assert_eq!(regions.queue.in_flight(), 3);
        let written = [1, 2, 3].map(|region| regions.on_disk(region, 0));
        assert_eq!(written, if lazy { [0, 0, 0] } else { [2, 3, 4] });
        gate.open();
        assert!(regions.wait(&[1, 4, 5]));
        assert_eq!([0, 1, 2, 3].map(|region| regions.on_disk(region, 0)), [0xee; 4]);
        assert_eq!(regions.disk.dirty_blocks(), 5);
        // Nobody is woken for nothing.
        let mut fds: Vec<_> = regions.queue.wait_fds().into_iter().collect();
        let mut fds: Vec<_> = fds.drain(..).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        assert_eq!(poll(&mut fds, Some(&rustix::time::Timespec::default())).unwrap(), 0);
    }
}

/// The same with a session's first writes, which need a log that is named, also in a region that is noted already.
#[test]
fn first_write_of_a_session_waits_for_its_log_and_reads_do_not() {
    let mut regions = Regions::begin(false);
    regions.push_write(0, 1, 0);
    assert!(regions.wait(&[0]));
    regions.disk.end_session().unwrap();
    // The finisher of the beginning waits for it, too.
    let gate = regions.shut_log();
    regions.disk.begin_session(None).unwrap();
    // One that is pending, and one that is not.
    regions.push_write(1, 1, 0);
    regions.push_write(2, 1, 1);
    let reads = [regions.push_read(3, 1, 0), regions.push_read(4, 1, 1)];
    assert!(regions.wait(&[3, 4]));
    assert_eq!(reads.each_ref().map(first_byte), [2; 2]);
    assert_eq!((regions.on_disk(1, 1), regions.queue.in_flight()), (2, 2));
    gate.open();
    assert!(regions.wait(&[1, 2]));
    assert_eq!((regions.on_disk(1, 1), regions.disk.dirty_blocks()), (0xee, 2));
}

/// Who gives up what waits hears of it once, and its place is free for another request, which is answered once.
#[test]
fn write_that_is_cancelled_while_its_region_is_noted_is_answered_once() {
    let mut regions = Regions::begin(false);
    let gate = regions.shut_intents();
    regions.push_write(1, 1, 0);
    regions.queue.submit();
    regions.push_write(2, 2, 0);
    regions.queue.cancel_parked();
    assert!(!regions.wait(&[1, 2]));
    regions.push_write(3, 3, 0);
    regions.push_write(4, 1, 1);
    regions.push_read(5, 1, 0);
    assert!(regions.wait(&[5]));
    gate.open();
    assert!(regions.wait(&[3, 4]));
    assert_eq!([1, 2, 3].map(|region| regions.on_disk(region, 0)), [2, 3, 0xee]);
    assert_eq!(regions.queue.in_flight(), 0);
}

/// Invariant 6: if a region can't be noted the writes that wait for it fail, and later ones ask again.
#[test]
fn writes_that_wait_for_a_region_fail_if_it_can_not_be_noted() {
    let mut regions = Regions::begin(false);
    regions.disk.shared().intents.set_broken(true);
    regions.push_write(1, 1, 0);
    regions.push_write(2, 2, 0);
    assert!(!regions.wait(&[1, 2]));
    assert_eq!([1, 2].map(|region| regions.on_disk(region, 0)), [2, 3]);
    regions.disk.shared().intents.set_broken(false);
    regions.push_write(3, 1, 0);
    assert!(regions.wait(&[3]));
    assert_eq!((regions.on_disk(1, 0), regions.disk.dirty_blocks()), (0xee, 1));
}

/// Who is prepared waits for claims like any other: two queues write parts of one pending block, and both parts are there.
#[test]
fn write_that_is_prepared_waits_for_the_claims_of_another_queue() {
    let mut regions = Regions::begin(true);
    let mut other = regions.disk.queue(8).unwrap();
    let gate = regions.shut_intents();
    let sector = |at: u64| regions.disk.geometry().sectors_at(REGION_SIZE / 512 + at, 512).unwrap();
    let (first, last) = (sector(0), sector(7));
    let written = |byte| {
        let buf = GuestBuf::zeroed(512);
        buf.copy_in(0, &[byte; 512]);
        buf
    };
    regions.queue.push(1, Request::Write { range: first, buf: written(0xa1), durable: false });
    other.push(2, Request::Write { range: last, buf: written(0xa2), durable: false });
    regions.queue.submit();
    other.submit();
    gate.open();
    // The other one's claim is given back only when it is reaped.
    let (begin, mut done) = (std::time::Instant::now(), Vec::new());
    while done.len() < 2 {
        assert!(begin.elapsed() < PATIENCE, "{} of 2 are done", done.len());
        regions.queue.reap(&mut done);
        other.reap(&mut done);
        std::thread::yield_now();
    }
    assert!(done.iter().all(|done: &Done| done.result.is_ok()));
    let (mut block, at) = ([0; 4096], REGION_SIZE);
    let file = std::fs::File::open(&regions.path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, at).unwrap();
    assert_eq!((block[0], block[511], block[512], block[7 * 512], block[4095]), (0xa1, 0xa1, 2, 0xa2, 0xa2));
}

/// What is done by a thread that has ended in disorder is done by the next one, and nobody waits for ever.
#[test]
fn round_that_ends_in_disorder_fails_and_the_next_one_is_done() {
    let mut regions = Regions::begin(false);
    for round in 0..50 {
        regions.queue.preparation.panics_next();
        regions.push_write(1, 1, round);
        assert!(!regions.wait(&[1]), "it has told of success");
        // At once, while that thread may not have ended.
        regions.push_write(2, 2, round);
        assert!(regions.wait(&[2]));
        regions.disk.shared().intents.clear().unwrap();
    }
}

/// A server that gives up what is under way is not one that has stopped: its successor waits for the end of that.
#[test]
fn disk_dropped_with_requests_under_way_still_names_its_server() {
    for under_way in [false, true] {
        let mut regions = Regions::begin(false);
        let gate = regions.shut_intents();
        if under_way {
            regions.push_write(1, 1, 0);
        }
        let Regions { disk, queue, .. } = regions;
        let shared = Arc::clone(disk.shared());
        drop(disk);
        assert_eq!(shared.live.server().is_some(), under_way);
        gate.open();
        drop(queue);
    }
}
