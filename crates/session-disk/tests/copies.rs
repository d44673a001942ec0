//! The ways in which a disk is restored, where they do not depend on the file system: sharing that is refused, and
//! when the drain works at all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockio::EngineKind;
use blockio::fault::{Fault, FaultPlan, OpClass};
use common::{Bench, end, read, wait_until, write, write_sparse};
use rustix::io::Errno;
use session_disk::{
    CopyCounts, DiskOptions, DrainObserver, DrainPolicy, DrainWhen, Drainer, Error, ProvisionOptions,
    SessionDisk, Sharing, provision,
};

const MIB: usize = 1 << 20;
const SIZE: usize = 64 * MIB;

struct Quiet;

impl DrainObserver for Quiet {
    fn restored(&self, _blocks: u64, _how: CopyCounts, _duration: Duration) {}
}

fn drain(disk: &SessionDisk) {
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
}

/// A lazily made disk, half of it data, all of whose attempts to share meet `fault`.
fn refused(errno: Errno) -> (Bench, Arc<FaultPlan>) {
    let plan = FaultPlan::new();
    let dir = tempfile::tempdir().unwrap();
    let base: Vec<u8> =
        (0..SIZE).map(|at| if (at / MIB).is_multiple_of(2) { (at / 4096) as u8 | 1 } else { 0 }).collect();
    write_sparse(&dir.path().join("base.raw"), &base);
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions::new(dir.path().join("base.raw"), options.clone())).unwrap();
    let bench = Bench { dir, base, options: DiskOptions { faults: Some(plan.clone()), ..options } };
    plan.on_every(OpClass::Share, Fault::Fail(errno.raw_os_error()));
    (bench, plan)
}

/// Invariant 4: whatever the kernel says, the disk is restored; and what it will say again is not asked again.
#[test]
fn disk_that_cannot_share_blocks_is_copied_and_asks_once() {
    for errno in [Errno::XDEV, Errno::INVAL, Errno::OPNOTSUPP, Errno::TXTBSY] {
        let (bench, plan) = refused(errno);
        let disk = bench.open();
        assert_eq!(disk.sharing(), Sharing::Untried);
        bench.assert_restores_exactly(&disk);
        assert_eq!((plan.seen(OpClass::Share), disk.sharing()), (1, Sharing::Off));
        let data = (SIZE / 2 / 4096) as u64;
        let counts = CopyCounts { reflinked_blocks: 0, copied_blocks: data, punched_blocks: 0 };
        assert_eq!(disk.copied(), counts);

        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        write(&disk, &mut queue, 0, &vec![7; 2 * MIB]);
        end(&disk, queue);
        bench.assert_restores_exactly(&disk);
        assert_eq!(plan.seen(OpClass::Share), 1);
        let half = (MIB / 4096) as u64;
        assert_eq!(
            disk.copied() - counts,
            CopyCounts { reflinked_blocks: 0, copied_blocks: half, punched_blocks: half }
        );
    }
}

/// The same where it might work another time: some attempts, and no more.
#[test]
fn disk_whose_file_system_is_full_of_metadata_is_copied_after_some_attempts() {
    let (bench, plan) = refused(Errno::NOSPC);
    let disk = bench.open();
    bench.assert_restores_exactly(&disk);
    assert_eq!((plan.seen(OpClass::Share), disk.sharing()), (8, Sharing::Off));
}

#[test]
fn disk_that_is_not_to_share_blocks_never_tries() {
    let (mut bench, plan) = refused(Errno::XDEV);
    bench.options.reflink = false;
    let disk = bench.open();
    bench.assert_restores_exactly(&disk);
    assert_eq!(plan.seen(OpClass::Share), 0);
}

/// With `idle` a guest that goes on and on keeps all to itself; when it pauses, or goes, blocks are restored.
#[test]
fn idle_drain_waits_for_a_guest_that_works_and_not_for_one_that_pauses() {
    let mut bench = Bench::new(2 * MIB, None, true, EngineKind::IoUring);
    bench.options.drain = DrainPolicy { when: DrainWhen::Idle, rate: None };
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    let pending = disk.pending_blocks();
    read(&disk, &mut queue, 0, 4096);
    let drainer = Drainer::start(Arc::clone(&disk), Arc::new(Quiet)).unwrap();
    // A test that is not given the processor is a guest that pauses: then this proves nothing.
    let (begin, mut last, mut pause) = (Instant::now(), Instant::now(), Duration::ZERO);
    while begin.elapsed() < Duration::from_millis(1200) {
        read(&disk, &mut queue, 0, 4096);
        pause = pause.max(last.elapsed());
        last = Instant::now();
        let left = disk.pending_blocks();
        assert!(left == pending || pause > Duration::from_millis(200), "{left} of {pending} are pending");
    }
    wait_until(|| disk.pending_blocks() == 0);
    drop(queue);

    // Another session writes, and goes: nobody is waited for.
    let mut queue = disk.queue(8).unwrap();
    write(&disk, &mut queue, 0, &vec![7; MIB]);
    end(&disk, queue);
    drainer.wake();
    wait_until(|| disk.pending_blocks() == 0);
    drop(drainer);
    bench.assert_equal_to_base();
}

/// However slow the drain is to be, what is pending is read at once, and written; nothing is forgotten through holds.
#[test]
fn drain_with_a_rate_takes_its_time_and_guests_do_not() {
    let mut bench = Bench::new(4 * MIB, None, true, EngineKind::IoUring);
    bench.options.drain = DrainPolicy { when: DrainWhen::Eager, rate: NonZeroU64::new(MIB as u64) };
    let disk = bench.open();
    let (began, data) = (Instant::now(), 2 * MIB);
    let drainer = Drainer::start(Arc::clone(&disk), Arc::new(Quiet)).unwrap();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    let last = (4 * MIB - 128 * 1024) as u64 / 512;
    assert!(read(&disk, &mut queue, last, 65536) == bench.base[4 * MIB - 128 * 1024..][..65536]);
    let left = disk.pending_blocks();
    assert!(left > 0 || began.elapsed() > Duration::from_secs(1), "the rate is not kept");
    end(&disk, queue);
    wait_until(|| disk.pending_blocks() == 0);
    // But for one burst of 256 KiB, it has come at that rate, however slow this machine is.
    let least = Duration::from_secs_f64((data - 256 * 1024) as f64 / MIB as f64);
    assert!(began.elapsed() >= least, "{data} bytes in {:?}", began.elapsed());
    drop(drainer);
    bench.assert_equal_to_base();
    drain(&disk);
}

/// What was restored before a drain was stopped is not restored again: of either drain, without and with a server.
#[test]
fn stopped_drain_goes_on_where_it_was() {
    let slow = DrainPolicy { when: DrainWhen::Eager, rate: NonZeroU64::new(MIB as u64) };
    let mut bench = Bench::new(16 * MIB, None, true, EngineKind::IoUring);
    bench.options.drain = slow;
    let disk = bench.open();
    let all = disk.pending_blocks();
    let stop = AtomicBool::new(false);
    // A batch of such a drain is 512 blocks; the second one is not finished.
    let stopped = disk.drain(&stop, &mut |left| stop.store(left < all - 550, Ordering::Relaxed));
    assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
    let left = disk.pending_blocks();
    assert!(left < all);
    drop(disk);
    let disk = bench.open();
    assert_eq!(disk.pending_blocks(), left);
    let drainer = Drainer::start(Arc::clone(&disk), Arc::new(Quiet)).unwrap();
    wait_until(|| disk.pending_blocks() + 256 < left);
    drop(drainer);
    let left = disk.pending_blocks();
    assert!(left > 0);
    disk.stop().unwrap();
    drop(disk);
    bench.options.drain = DrainPolicy::default();
    let disk = bench.open();
    assert_eq!(disk.pending_blocks(), left);
    bench.assert_restores_exactly(&disk);
}
