//! What of the disk is brought into the page cache for guests that read one block after the other.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use blockio::{EngineKind, OpenOptions, page_cache};
use rustix::fs::{Advice, fadvise, fstatfs};

use super::*;

const BLOCKS: u64 = 1024;
const PATIENCE: Duration = Duration::from_secs(60);
/// Where writes into large folios are dear (`statfs(2)`).
const EXT4: u64 = 0xef53;

/// A disk, its session and a queue; no page of the disk is in the page cache.
struct Cold {
    disk: Arc<SessionDisk>,
    queue: DiskQueue,
    _dir: tempfile::TempDir,
}

impl Cold {
    /// `None`, and why: it can't be seen here what is read ahead. The first `clean` blocks are not pending.
    fn new(engine: EngineKind, clean: u64) -> Option<Self> {
        let near = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(near.parent().unwrap()).unwrap();
        let base = dir.path().join("base.raw");
        let content: Vec<u8> = (0..BLOCKS * 4096).map(|at| (at / 512) as u8 | 1).collect();
        std::fs::write(&base, content).unwrap();
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            engine: Some(engine),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        if clean == BLOCKS {
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        }
        disk.begin_session(None).unwrap();
        if clean < BLOCKS {
            let mut queue = disk.queue(8).unwrap();
            let (range, mut done) = (disk.geometry().sectors_at(0, clean * 4096).unwrap(), Vec::new());
            let buf = GuestBuf::zeroed(clean as usize * 4096);
            queue.push(1, Request::Write { range, buf, durable: false });
            queue.quiesce(&mut done);
            assert!(done.pop().unwrap().result.is_ok());
        }
        let file = &disk.shared().disk;
        if fstatfs(file.as_fd()).unwrap().f_type as u64 != EXT4 {
            eprintln!("not tried: this is not ext4");
            return None;
        }
        if page_cache::look(file, 0, 4096).unwrap().is_none() {
            eprintln!("not tried: the kernel has no cachestat");
            return None;
        }
        // By another open file description: advice is remembered by this one.
        let other = blockio::File::open(file.path(), OpenOptions::default()).unwrap();
        let begin = Instant::now();
        other.sync_all().unwrap();
        while page_cache::look(&other, 0, BLOCKS * 4096).unwrap().unwrap().pages > 0 {
            assert!(begin.elapsed() < PATIENCE, "the pages stay in memory");
            fadvise(&other, 0, None, Advice::DontNeed).unwrap();
        }
        let queue = disk.queue(8).unwrap();
        Some(Self { disk, queue, _dir: dir })
    }

    fn range(&self, block: u64) -> BlockRange {
        self.disk.geometry().sectors_at(block * 8, 4096).unwrap()
    }

    /// Reads a block as a guest does that has to wait.
    fn miss(&mut self, block: u64) {
        let (range, mut done) = (self.range(block), Vec::new());
        self.queue.push_later(1, Request::Read { range, buf: GuestBuf::zeroed(4096) });
        self.queue.quiesce(&mut done);
        assert!(done.pop().unwrap().result.is_ok());
    }

    /// Reads a block, with or without waiting.
    fn read(&mut self, block: u64) {
        let (range, mut done) = (self.range(block), Vec::new());
        self.queue.push(1, Request::Read { range, buf: GuestBuf::zeroed(4096) });
        self.queue.quiesce(&mut done);
        assert!(done.pop().unwrap().result.is_ok());
    }

    /// Reads a block as a guest does that need not wait.
    fn hit(&mut self, block: u64) {
        let (range, buf, begin) = (self.range(block), GuestBuf::zeroed(4096), Instant::now());
        while !self.queue.read_now(range, buf.view()) {
            assert!(begin.elapsed() < PATIENCE, "block {block} is not read at once");
            std::thread::yield_now();
        }
        self.queue.reap(&mut Vec::new());
    }

    /// The blocks that are in the page cache now that all has been read ahead that was to be.
    fn cached(&mut self) -> Vec<u64> {
        // Waits for it.
        self.queue.reader = None;
        let file = &self.disk.shared().disk;
        let is_cached = |block: &u64| page_cache::look(file, block * 4096, 4096).unwrap().unwrap().pages > 0;
        (0..BLOCKS).filter(is_cached).collect()
    }

    #[track_caller]
    fn assert_cached(&mut self, blocks: impl IntoIterator<Item = u64>) {
        assert_eq!(self.cached(), blocks.into_iter().collect::<Vec<_>>());
    }
}

/// What follows is read, as it was decided, and nothing else is.
#[test]
fn reads_that_follow_one_another_have_the_next_blocks_in_the_page_cache() {
    let Some(mut cold) = Cold::new(EngineKind::IoUring, BLOCKS) else { return };
    cold.miss(40);
    cold.miss(8);
    cold.assert_cached([8, 40]);
    cold.miss(9);
    cold.assert_cached((8..14).chain([40]));
    // More than half of what was asked for is still before the guest, and then no more.
    cold.hit(10);
    cold.assert_cached((8..14).chain([40]));
    cold.hit(11);
    cold.assert_cached((8..22).chain([40]));
    (12..17).for_each(|block| cold.miss(block));
    cold.assert_cached((8..22).chain([40]));
    cold.miss(17);
    cold.assert_cached((8..38).chain([40]));
}

#[test]
fn blocks_up_to_the_end_of_the_disk_are_read_ahead() {
    let Some(mut cold) = Cold::new(EngineKind::IoUring, BLOCKS) else { return };
    cold.miss(BLOCKS - 4);
    cold.miss(BLOCKS - 3);
    cold.assert_cached(BLOCKS - 4..BLOCKS);
}

/// Pending blocks are read from the base: the disk's are of no use to anybody.
#[test]
fn pending_blocks_are_not_read_ahead() {
    let Some(mut cold) = Cold::new(EngineKind::IoUring, 16) else { return };
    cold.miss(0);
    cold.miss(1);
    cold.assert_cached(0..6);
    // Of blocks 14 to 29, which are next, some are pending.
    (2..14).for_each(|block| cold.read(block));
    cold.assert_cached(0..14);
}

/// Where each read waits for itself nobody sees which do: the kernel is left to it.
#[test]
fn engine_that_waits_leaves_reading_ahead_to_the_kernel() {
    let Some(mut cold) = Cold::new(EngineKind::Sync, BLOCKS) else { return };
    (0..4).for_each(|block| cold.read(block));
    let cached = cold.cached().len();
    assert!(cached > 4, "only what was read is cached");
}

/// In memory there is nothing to read.
#[test]
fn disk_in_memory_is_not_read_ahead() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("not tried: there is no tmpfs") };
    let base = dir.path().join("base.raw");
    std::fs::write(&base, [1; 65536]).unwrap();
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions::new(base, options.clone())).unwrap();
    let disk = SessionDisk::open(&options).unwrap();
    assert!(disk.queue(8).unwrap().ahead.is_none());
}
