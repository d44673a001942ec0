//! Failing I/O at chosen moments: what failed stays pending, and the rest goes on (invariants 2, 3, 4 and 6).
//! `schedule.rs` has every I/O of a scenario fail once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockio::EngineKind;
use blockio::fault::{Fault, FaultPlan, OpClass};
use blockio::tape::{Io, Tape};
use common::{Bench, end, try_write};
use rustix::io::Errno;
use session_disk::{DiskOptions, Error};

const SIZE: usize = 1 << 20;

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

/// Invariant 2: two drains at once would take each other's copies for synced. The second one is refused,
/// and the first goes on.
#[test]
fn drain_while_another_one_runs_is_refused() {
    let plan = FaultPlan::new();
    let mut bench = Bench::new(SIZE, None, true, EngineKind::IoUring);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    let disk = bench.open();
    plan.on(OpClass::Write, 0, Fault::HoldAfter);
    let drain = || disk.drain(&AtomicBool::new(false), &mut |_| ());
    std::thread::scope(|scope| {
        let first = scope.spawn(drain);
        while plan.held() == 0 {
            std::thread::yield_now();
        }
        let second = drain();
        plan.release_all();
        first.join().unwrap().unwrap();
        assert!(matches!(second, Err(Error::WrongState(_))), "{second:?}");
    });
    assert_eq!(disk.pending_blocks(), 0);
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
        adopt: true,
        ..session_disk::ProvisionOptions::new(bench.base_path(), bench.options.clone())
    };
    session_disk::provision(&adopt).unwrap_err();
    std::fs::remove_dir(state.join("manifest.new")).unwrap();
    let disk = bench.open();
    assert_eq!(*disk.basis(), session_disk::Basis::Intents);
    assert_eq!(disk.pending_blocks(), disk.geometry().blocks());
    bench.assert_restores_exactly(&disk);
}

/// Somebody else makes the state directory at the same moment; the provision then fails.
#[derive(Debug)]
struct Rival {
    state: PathBuf,
}

impl Tape for Rival {
    fn begin(&self, io: Io<'_>) -> io::Result<u64> {
        match io {
            Io::CreateDir { path } if path == self.state => {
                std::fs::create_dir(path)?;
                std::fs::write(path.join("another's"), "")?;
                Ok(0)
            }
            Io::Rename { .. } => Err(io::Error::other("the medium is gone")),
            _ => Ok(0),
        }
    }
}

/// A provision that fails takes away what it made, and nothing else.
#[test]
fn provision_that_fails_leaves_a_state_directory_that_another_made() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, [7; 4096]).unwrap();
    let mut options = DiskOptions::new(dir.path().join("disk.raw"));
    options.runtime_dir = Some(dir.path().join("run"));
    let state = options.paths().state_dir().to_owned();
    options.tape = Some(Arc::new(Rival { state: state.clone() }));
    let disk = options.disk.clone();
    session_disk::provision(&session_disk::ProvisionOptions::new(base, options)).unwrap_err();
    assert!(state.join("another's").exists() && !state.join("sessions").exists() && !disk.exists());
}

/// Invariant 4: a device that says it makes holes may refuse them when asked, for good (the kernel has found out that it
/// can't) or those that are no whole sectors. The disk is restored, with zeroes; what is refused for good is not asked again.
#[test]
fn drain_of_a_disk_that_refuses_holes_writes_zeroes() {
    for (errno, lasts) in [(Errno::OPNOTSUPP, true), (Errno::INVAL, false)] {
        let plan = FaultPlan::new();
        let mut bench = Bench::new(SIZE, None, false, EngineKind::IoUring);
        bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
        let disk = bench.open();
        let pages = bench.base.chunks(4096).enumerate();
        let holes: Vec<u64> =
            pages.filter(|(_, p)| p.iter().all(|b| *b == 0)).map(|(n, _)| n as u64).collect();
        // Apart, so that each is a run of its own.
        let holes: Vec<u64> = holes.into_iter().step_by(3).take(4).collect();
        plan.on_every(OpClass::Punch, Fault::Fail(errno.raw_os_error()));
        let before = disk.copied();
        for round in 1..3 {
            disk.begin_session(None).unwrap();
            let mut queue = disk.queue(8).unwrap();
            for block in &holes {
                try_write(&disk, &mut queue, block * 8, &[0x11; 4096]).unwrap();
            }
            end(&disk, queue);
            bench.assert_restores_exactly(&disk);
            let zeroed = (disk.copied() - before).copied_blocks;
            assert_eq!(zeroed, round * holes.len() as u64);
        }
        // Those of the first runs were under way together.
        let asked = plan.seen(OpClass::Punch);
        assert!(if lasts { asked <= holes.len() as u64 } else { asked == 2 * holes.len() as u64 }, "{asked}");
    }
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

/// What can't be copied holds up nothing that lies behind it, however much it is.
#[test]
fn blocks_behind_many_that_fail_are_restored() {
    const BAD: u64 = 600;
    const BLOCKS: u64 = 1000;
    let plan = FaultPlan::new();
    let mut bench = Bench::new(2 * BLOCKS as usize * 4096, None, false, EngineKind::IoUring);
    bench.options = DiskOptions { faults: Some(plan.clone()), ..bench.options };
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    for block in 0..BLOCKS {
        try_write(&disk, &mut queue, 2 * block * 8, &[0x11; 4096]).unwrap();
    }
    end(&disk, queue);
    let fails = |class| matches!(class, OpClass::Read | OpClass::Punch | OpClass::Zero);
    plan.rule(move |op| (fails(op.class) && op.offset < 2 * BAD * 4096).then_some(Fault::Fail(eio())));
    let drain = || disk.drain(&AtomicBool::new(false), &mut |_| ());
    drain().unwrap_err();
    assert_eq!(disk.pending_blocks(), BAD);
    plan.clear();
    drain().unwrap();
    bench.assert_restores_exactly(&disk);
}

/// Invariant 5: what was copied of a sealed base before anybody knew that it was touched is copied again, whoever was the first
/// to know.
#[test]
fn batch_that_began_before_its_base_was_touched_is_copied_again() {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const BLOCK: u64 = 2;
    let dir = tempfile::tempdir().unwrap();
    let (base, plan) = (dir.path().join("base.raw"), FaultPlan::new());
    std::fs::write(&base, vec![7; SIZE]).unwrap();
    let opened = base_image::BaseImage::open(&base, None, base_image::Trust::Directories(&[])).unwrap();
    base_image::seal(&opened, &AtomicBool::new(false), &mut |_| ()).unwrap();
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        faults: Some(plan.clone()),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    let made = session_disk::ProvisionOptions::new(base.clone(), options.clone());
    session_disk::provision(&made).unwrap();
    let disk = session_disk::SessionDisk::open(&options).unwrap();
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    try_write(&disk, &mut queue, BLOCK * 8, &[0x11; 4096]).unwrap();
    end(&disk, queue);

    let writes = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&writes);
    plan.rule(move |op| {
        let is_it = op.class == OpClass::Write && op.offset == BLOCK * 4096;
        (is_it && seen.fetch_add(1, Ordering::Relaxed) == 0).then_some(Fault::HoldAfter)
    });
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| disk.drain(&AtomicBool::new(false), &mut |_| ()));
        while plan.held() == 0 {
            assert!(!drain.is_finished(), "{:?}", drain.join());
            std::thread::yield_now();
        }
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o640)).unwrap();
        // The next VM is the first to know.
        disk.begin_session(None).unwrap();
        plan.release_all();
        drain.join().unwrap().unwrap();
    });
    assert_eq!((writes.load(Ordering::Relaxed), disk.pending_blocks()), (2, 0));
}
