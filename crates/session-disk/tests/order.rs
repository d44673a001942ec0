//! The crash order, looked at from outside at the moment in which a kill would hurt: what the log and
//! the intents say while the data is on its way (invariants 1 and 2).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ops::Deref;
use std::sync::Arc;

use blockio::fault::{Fault, FaultPlan, OpClass};
use blockio::{EngineKind, GuestBuf};
use blocks::{BlockSet, Extent};
use common::Bench;
use session_disk::{DiskOptions, DiskQueue, Manifest, Request, SessionDisk};

const SIZE: usize = 1 << 20;

/// Releases what is held, also when a test fails: a queue waits for its I/O when it is dropped.
struct Plan(Arc<FaultPlan>);

impl Deref for Plan {
    type Target = FaultPlan;

    fn deref(&self) -> &FaultPlan {
        &self.0
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        self.clear();
        self.release_all();
    }
}

/// A disk under a fault plan, with an open session.
fn session(lazy: bool) -> (Bench, Arc<SessionDisk>, DiskQueue, Plan) {
    let plan = FaultPlan::new();
    let mut bench = Bench::new(SIZE, None, lazy, EngineKind::IoUring);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let queue = disk.queue(8).unwrap();
    (bench, disk, queue, Plan(plan))
}

/// Pushes a write and goes on until some of it is held.
fn push_write(disk: &SessionDisk, queue: &mut DiskQueue, plan: &Plan, sector: u64, bytes: &[u8]) {
    let buf = GuestBuf::zeroed(bytes.len());
    buf.copy_in(0, bytes);
    let range = disk.geometry().sectors_at(sector, bytes.len() as u64).unwrap();
    queue.push(1, Request::Write { range, buf, durable: false });
    queue.submit();
    let mut done = Vec::new();
    while plan.held() == 0 {
        queue.reap(&mut done);
        assert!(done.is_empty(), "nothing is held");
    }
}

/// What the open session's log says: the youngest that the manifest names.
fn logged(bench: &Bench) -> BlockSet {
    let paths = bench.options.paths();
    let entry = *Manifest::load(&paths).unwrap().logs.last().unwrap();
    write_log::read(&paths.sessions().join(entry.id().file_name())).unwrap().readable_blocks()
}

/// Invariant 1, step 1: the record of a clean block is in the log, which the manifest names, and its
/// intent is durable, before its data is handed to the kernel.
#[test]
fn clean_block_is_logged_before_its_data_is_submitted() {
    let (bench, disk, mut queue, plan) = session(false);
    plan.on_every(OpClass::Write, Fault::HoldBefore);
    push_write(&disk, &mut queue, &plan, 24, &[0x77; 4096]);
    assert_eq!(plan.held(), 1);
    assert!(logged(&bench).contains_all(Extent::new(3, 1)));
    let intents = std::fs::read(bench.options.paths().intents()).unwrap();
    assert_eq!(intents[0] & 1, 1);
    bench.assert_equal_to_base();
    plan.clear();
    plan.release_all();
    queue.quiesce(&mut Vec::new());
    assert_ne!(bench.disk_content(), bench.base);
}

/// Invariant 2, step 2: a pending block's record comes after its data. Were it first, a kill between the
/// two would vouch for what an earlier session left there.
#[test]
fn pending_block_is_logged_after_its_data_is_written() {
    for (sector, len) in [(24, 4096), (25, 512)] {
        let (bench, disk, mut queue, plan) = session(true);
        plan.on_every(OpClass::Write, Fault::HoldAfter);
        push_write(&disk, &mut queue, &plan, sector, &vec![0x77; len]);
        assert!(!logged(&bench).contains_all(Extent::new(3, 1)));
        let pending = disk.pending_blocks();
        plan.clear();
        plan.release_all();
        let mut done = Vec::new();
        queue.quiesce(&mut done);
        assert!(done.iter().all(|done| done.result.is_ok()));
        assert!(logged(&bench).contains_all(Extent::new(3, 1)));
        assert_eq!(disk.pending_blocks(), pending - 1);
    }
}

/// Who ends a connection waits for all that has been begun: a guest can't make that any number of bytes.
#[test]
fn queue_has_room_for_so_many_bytes_at_a_time() {
    let (_bench, disk, mut queue, plan) = session(false);
    plan.on_every(OpClass::Read, Fault::HoldBefore);
    let range = disk.geometry().sectors_at(0, SIZE as u64).unwrap();
    let buf = GuestBuf::zeroed(SIZE);
    let mut pushed = 0;
    let mut push = |queue: &mut DiskQueue| {
        queue.push_later(pushed, Request::Read { range, buf: buf.clone() });
        queue.submit();
        pushed += 1;
        pushed
    };
    while queue.has_room() {
        push(&mut queue);
    }
    assert_eq!(push(&mut queue), 258);
    assert_eq!(plan.held(), 257);
    plan.clear();
    plan.release_all();
    let mut done = Vec::new();
    queue.quiesce(&mut done);
    assert_eq!(done.iter().filter(|done| done.result.is_ok()).count(), 258);
    assert!(queue.has_room());
}
