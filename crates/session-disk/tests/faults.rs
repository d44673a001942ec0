//! Every I/O of a scenario fails once, in turn: nothing leaks, nothing acknowledged is lost, and once
//! the storage works again the disk is restored exactly (invariants 2, 3, 4 and 6).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::AtomicBool;

use blockio::EngineKind;
use blockio::fault::{Fault, FaultPlan, OpClass};
use common::{Bench, end, run, try_write};
use session_disk::{DiskOptions, DiskQueue, Request, SessionDisk};

const SIZE: usize = 1 << 20;

/// What each sector may hold: the base's content at first; a write that failed may or may not have
/// changed it.
struct Model {
    allowed: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn of_base(base: &[u8]) -> Self {
        Self { allowed: base.chunks(512).map(|sector| vec![sector.to_vec()]).collect() }
    }

    fn write(&mut self, disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, bytes: &[u8]) {
        let result = try_write(disk, queue, sector, bytes);
        self.note(sector, bytes, result.is_ok());
    }

    fn zero(&mut self, disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, len: usize) {
        let range = disk.geometry().sectors_at(sector, len as u64).unwrap();
        let result = run(queue, Request::WriteZeroes { range, may_unmap: true, durable: false });
        self.note(sector, &vec![0; len], result.is_ok());
    }

    fn note(&mut self, sector: u64, bytes: &[u8], done: bool) {
        for (allowed, bytes) in self.allowed[sector as usize..].iter_mut().zip(bytes.chunks(512)) {
            if done {
                allowed.clear();
            }
            allowed.push(bytes.to_vec());
        }
    }

    /// Reads all, in pieces; a read may fail, but not return what was never there.
    fn check(&self, disk: &SessionDisk, queue: &mut DiskQueue) {
        const PIECE: u64 = 24;
        for first in (0..SIZE as u64 / 512).step_by(PIECE as usize) {
            let count = PIECE.min(SIZE as u64 / 512 - first);
            let range = disk.geometry().sectors_at(first, count * 512).unwrap();
            let buf = blockio::GuestBuf::zeroed(count as usize * 512);
            if run(queue, Request::Read { range, buf: buf.clone() }).is_err() {
                continue;
            }
            let mut bytes = vec![0; count as usize * 512];
            buf.copy_out(0, &mut bytes);
            for (index, sector) in bytes.chunks(512).enumerate() {
                let allowed = &self.allowed[first as usize + index];
                assert!(
                    allowed.iter().any(|a| a == sector),
                    "sector {} was never that",
                    first as usize + index
                );
            }
        }
    }
}

fn session(bench: &Bench, disk: &SessionDisk, queue: DiskQueue, stamp: u8) {
    let (mut model, mut queue) = (Model::of_base(&bench.base), queue);
    model.write(disk, &mut queue, 3, &[stamp; 1024]);
    model.write(disk, &mut queue, 64, &[stamp + 1; 40 * 512]);
    model.zero(disk, &mut queue, 300, 50 * 512);
    model.write(disk, &mut queue, 305, &[stamp + 2; 4096]);
    model.write(disk, &mut queue, 1001, &[stamp + 3; 512]);
    model.check(disk, &mut queue);
    end(disk, queue);
}

/// Two sessions with drains before, between and after; returns how many operations of the class there were.
fn scenario(engine: EngineKind, class: OpClass, nth: Option<u64>, fault: Fault) -> u64 {
    let plan = FaultPlan::new();
    let mut bench = Bench::new(SIZE, None, true, engine);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    if let Some(nth) = nth {
        plan.on(class, nth, fault);
    }
    let disk = bench.open();
    let go_on = AtomicBool::new(false);
    for stamp in [10, 20, 30] {
        disk.begin_session(None).unwrap();
        let queue = disk.queue(8).unwrap();
        session(&bench, &disk, queue, stamp);
        if stamp == 20 {
            // May fail: then it all stays pending.
            let _ = disk.drain(&go_on, &mut |_| ());
        }
    }
    let seen = plan.seen(class);
    plan.clear();
    bench.assert_restores_exactly(&disk);
    seen
}

fn every_operation_fails_once(class: OpClass) {
    // Done, but reported as failed: the blocks hold new content and must not be taken for the base's.
    for (engine, fault) in
        [(EngineKind::IoUring, Fault::Fail(eio())), (EngineKind::Sync, Fault::FailAfter(eio()))]
    {
        let operations = scenario(engine, class, None, fault);
        assert!(operations > 0, "{class:?}");
        for nth in 0..operations {
            scenario(engine, class, Some(nth), fault);
        }
    }
}

fn eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

/// Invariant 2: a guest writes to a block that the drain has copied and not synced yet, and the write
/// fails with its data on the disk: the block is the session's in no log, so it must stay pending.
#[test]
fn block_whose_write_fails_between_copy_and_sync_of_the_drain_stays_pending() {
    const BLOCK: u64 = 2;
    const LAST: u64 = 8;
    let plan = FaultPlan::new();
    let mut bench = Bench::new(SIZE, None, false, EngineKind::IoUring);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    for block in [BLOCK, LAST] {
        try_write(&disk, &mut queue, block * 8, &[0x11; 4096]).unwrap();
    }
    end(&disk, queue);

    let mut writes = 0;
    plan.rule(move |op| match op.class {
        // The drain's batch stays open.
        OpClass::Write if op.offset == LAST * 4096 => Some(Fault::HoldAfter),
        // The drain's write, then the guest's.
        OpClass::Write if op.offset == BLOCK * 4096 => {
            writes += 1;
            (writes == 2).then_some(Fault::FailAfter(eio()))
        }
        _ => None,
    });
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| disk.drain(&AtomicBool::new(false), &mut |_| ()));
        while plan.held() == 0 {
            std::thread::yield_now();
        }
        // Parks until the drain has released the block; the batch is still open then.
        assert!(try_write(&disk, &mut queue, BLOCK * 8, &[0x22; 4096]).is_err());
        plan.clear();
        plan.release_all();
        drain.join().unwrap().unwrap();
    });
    end(&disk, queue);
    bench.assert_restores_exactly(&disk);
}

/// Invariants 2 and 6: taking a disk over again fails half-way; what the old state knew still holds.
#[test]
fn adopt_that_fails_leaves_the_old_verdict() {
    let bench = Bench::new(SIZE, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    try_write(&disk, &mut queue, 16, &[0x11; 4096]).unwrap();
    drop(queue);
    drop(disk);
    // A power cut: the log may have lost its records, the live page is gone.
    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
    let state = bench.options.paths().state_dir().to_owned();
    std::fs::create_dir(state.join("manifest.new")).unwrap();
    let adopt = session_disk::ProvisionOptions {
        base: bench.base_path(),
        disk: bench.options.clone(),
        size: None,
        adopt: true,
    };
    session_disk::provision(&adopt).unwrap_err();
    std::fs::remove_dir(state.join("manifest.new")).unwrap();
    let disk = bench.open();
    assert_eq!(*disk.basis(), session_disk::Basis::Intents);
    assert_eq!(disk.pending_blocks(), disk.geometry().blocks());
    bench.assert_restores_exactly(&disk);
}

/// One run that can't be copied holds up no other, and is restored once it can be.
#[test]
fn drain_goes_on_past_a_block_that_can_not_be_read() {
    let plan = FaultPlan::new();
    let mut bench = Bench::new(SIZE, None, true, EngineKind::IoUring);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    let disk = bench.open();
    let pending = disk.pending_blocks();
    plan.on(OpClass::Read, 0, Fault::Fail(eio()));
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap_err();
    assert!(disk.pending_blocks() > 0 && disk.pending_blocks() < pending);
    bench.assert_restores_exactly(&disk);
}

#[test]
fn any_read_that_fails_leaks_and_loses_nothing() {
    every_operation_fails_once(OpClass::Read);
}

#[test]
fn any_write_that_fails_leaks_and_loses_nothing() {
    every_operation_fails_once(OpClass::Write);
}

#[test]
fn any_zeroing_that_fails_leaks_and_loses_nothing() {
    every_operation_fails_once(OpClass::Zero);
}

#[test]
fn any_punch_that_fails_leaks_and_loses_nothing() {
    every_operation_fails_once(OpClass::Punch);
}
