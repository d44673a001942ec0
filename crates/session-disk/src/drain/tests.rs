//! What the drain asks the kernel for while it copies: to write back, and to share.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use blockio::fault::{Fault, FaultPlan, OpClass};

use super::*;
use crate::{DiskOptions, ProvisionOptions, SessionDisk, provision};

const WINDOW: u64 = WRITE_BACK_BLOCKS * BLOCK_SIZE;
const SIZE: u64 = 5 * WINDOW / 2;

/// A drain of a disk of which all is pending, but that nothing was copied of yet.
struct Bench {
    drain: Drain,
    base: Vec<u8>,
    disk: Arc<SessionDisk>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with(|options| options.reflink = false)
    }

    fn with(change: impl FnOnce(&mut DiskOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.raw");
        let base: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8 | 1).collect();
        std::fs::write(&path, &base).unwrap();
        let mut options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        change(&mut options);
        provision(&ProvisionOptions::new(path, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        let drain = Drain::new(Arc::clone(disk.shared())).unwrap();
        Self { drain, base, disk, _dir: dir }
    }

    fn batch(&mut self, guests: Guests) -> Batch {
        self.drain.batch(&AtomicBool::new(false), &|| guests, &mut |_| ()).unwrap()
    }

    /// Invariant 4, of what lies behind `from`.
    fn assert_restored(&self, from: u64) {
        let mut content = vec![0; (SIZE - from) as usize];
        let file = std::fs::File::open(self.disk.shared().disk.path()).unwrap();
        file.read_exact_at(&mut content, from).unwrap();
        assert!(content == self.base[from as usize..]);
    }
}

/// Panics unless `windows` are those of a copy that began at `from`: one after the other, nothing left out and nothing
/// twice, each long enough to be worth it and none before it was copied.
#[track_caller]
fn assert_windows(windows: &[(u64, u64)], from: u64) {
    let mut next = from;
    for (offset, len) in windows {
        assert_eq!(*offset, next, "{windows:?}");
        assert!((WINDOW..WINDOW + FULL_BYTES).contains(len), "{windows:?}");
        next += len;
    }
    assert!(next <= SIZE && SIZE - next < WINDOW, "up to {next}: {windows:?}");
}

/// More than what is claimed at once.
const FULL_BYTES: u64 = 4 << 20;

/// Whether or not guests work.
#[test]
fn batch_has_what_it_copied_written_back_window_by_window() {
    static BEGUN: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());
    for guests in [Guests::Absent, Guests::Busy] {
        let mut bench = Bench::new();
        bench.drain.write_back =
            WriteBack::alone(|_, window| BEGUN.lock().unwrap().push((window.offset(), window.len())));
        assert_eq!(bench.batch(guests).restored, SIZE / BLOCK_SIZE);
        assert_windows(&std::mem::take(&mut *BEGUN.lock().unwrap()), 0);
        bench.assert_restored(0);
    }
}

/// Runs are short beside guests that work, but not too short to be shared.
#[test]
fn batch_finds_out_whether_blocks_can_be_shared_also_while_guests_work() {
    if !blockio::sharing_is_safe() {
        return;
    }
    for guests in [Guests::Absent, Guests::Busy] {
        let plan = FaultPlan::new();
        plan.on_every(OpClass::Share, Fault::Fail(Errno::XDEV.raw_os_error()));
        let mut bench = Bench::with(|options| options.faults = Some(Arc::clone(&plan)));
        bench.batch(guests);
        assert_eq!(
            (plan.seen(OpClass::Share), bench.disk.sharing()),
            (1, Sharing::Off),
            "the guests are {guests:?}"
        );
        bench.assert_restored(0);
    }
}

/// A batch goes on where the one before it has ended.
#[test]
fn batch_in_the_middle_has_nothing_written_back_that_it_did_not_copy() {
    static BEGUN: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());
    let mut bench = Bench::new();
    bench.drain.write_back =
        WriteBack::alone(|_, window| BEGUN.lock().unwrap().push((window.offset(), window.len())));
    bench.drain.cursor = 700;
    assert_eq!(bench.batch(Guests::Absent).restored, SIZE / BLOCK_SIZE - 700);
    assert_windows(&BEGUN.lock().unwrap(), 700 * BLOCK_SIZE);
    bench.assert_restored(700 * BLOCK_SIZE);
}

/// What the helper had no time for is done by the sync, and not by a batch that comes later.
#[test]
fn batch_leaves_no_window_behind() {
    static GATE: Mutex<()> = Mutex::new(());
    let mut bench = Bench::new();
    bench.drain.write_back = WriteBack::by(|_, _| drop(GATE.lock()));
    let gate = GATE.lock().unwrap();
    bench.batch(Guests::Absent);
    assert!(bench.drain.write_back.is_idle());
    drop(gate);
}
