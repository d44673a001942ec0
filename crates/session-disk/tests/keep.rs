//! Changes that are kept: what sessions write is there for the next one, durable where the guest said
//! so, and is never taken for something to restore, until it is given up as a whole.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockio::EngineKind;
use blockio::fault::{FaultPlan, OpClass};
use common::{Bench, end, read, run, write};
use session_disk::{Changes, DiskOptions, DiskState, Error, Manifest, Request, SessionDisk, status};

const MIB: usize = 1 << 20;

fn options(bench: &Bench, changes: Changes) -> DiskOptions {
    DiskOptions { changes, ..bench.options.clone() }
}

fn open(bench: &Bench, changes: Changes) -> Arc<SessionDisk> {
    SessionDisk::open(&options(bench, changes)).unwrap()
}

/// A session that writes `byte` into 5 blocks from `sector` on, and is still open when this returns.
fn begin_and_write(disk: &Arc<SessionDisk>, sector: u64, byte: u8) {
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(disk, &mut queue, sector, &vec![byte; 5 * 4096]);
}

/// Panics unless a session reads `byte` in 5 blocks from `sector` on.
#[track_caller]
fn assert_reads(disk: &Arc<SessionDisk>, sector: u64, byte: u8) {
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    assert_eq!(read(disk, &mut queue, sector, 5 * 4096), vec![byte; 5 * 4096]);
    end(disk, queue);
}

fn drain(disk: &SessionDisk) -> Result<u64, Error> {
    disk.drain(&AtomicBool::new(false), &mut |_| ())
}

/// What a power cut takes: all that was in memory.
fn cut_power(bench: &Bench) {
    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
}

/// Panics unless the changes can be given up, after which the disk is the base's (invariant 4).
#[track_caller]
fn assert_can_be_given_up(bench: &Bench) {
    assert!(matches!(SessionDisk::open(&bench.options), Err(Error::Kept { .. })));
    let disk = open(bench, Changes::GiveUp);
    assert!(disk.pending_blocks() > 0);
    bench.assert_restores_exactly(&disk);
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(status(&bench.options).unwrap().state, DiskState::Pristine);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    disk.end_session().unwrap();
    disk.stop().unwrap();
}

fn pristine() -> Bench {
    Bench::new(4 * MIB, None, false, EngineKind::Sync)
}

#[test]
fn kept_changes_of_every_session_are_there_for_the_next_until_given_up() {
    let bench = pristine();
    let disk = open(&bench, Changes::Keep);
    for round in 0..12 {
        begin_and_write(&disk, 8 + round * 80, 0x60 + round as u8);
        disk.end_session().unwrap();
        assert_eq!((disk.pending_blocks(), disk.kept_blocks()), (0, 5 * (round + 1)));
        if round == 5 {
            disk.checkpoint().unwrap();
        }
    }
    assert_eq!(drain(&disk).unwrap(), 0, "nothing is to be restored");
    let seen = status(&bench.options).unwrap();
    assert_eq!((seen.state, seen.dirty_blocks, seen.pending_blocks), (DiskState::Kept, 60, 0));
    disk.stop().unwrap();
    drop(disk);
    let seen = status(&bench.options).unwrap();
    assert_eq!((seen.state, seen.dirty_blocks, seen.pending_blocks), (DiskState::Kept, 60, 0));
    let disk = open(&bench, Changes::Keep);
    for round in 0..12 {
        assert_reads(&disk, 8 + round * 80, 0x60 + round as u8);
    }
    drop(disk);
    assert_can_be_given_up(&bench);
}

/// A guest's flush reaches the disk where its data is to outlast the host, and nowhere else.
#[test]
fn flush_is_a_sync_only_where_changes_are_kept() {
    for (changes, syncs) in [(Changes::Reset, 0), (Changes::Keep, 1)] {
        let bench = pristine();
        let plan = FaultPlan::new();
        let options = DiskOptions { faults: Some(Arc::clone(&plan)), ..options(&bench, changes) };
        let disk = SessionDisk::open(&options).unwrap();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        write(&disk, &mut queue, 8, &[1; 4096]);
        run(&mut queue, Request::Flush).unwrap();
        assert_eq!(plan.seen(OpClass::SyncData), syncs, "{changes:?}");
        end(&disk, queue);
    }
}

/// Pending blocks belong to the base, kept ones to the guest: the two never meet.
#[test]
fn session_of_kept_changes_begins_only_when_nothing_is_pending() {
    let bench = Bench::new(4 * MIB, None, true, EngineKind::Sync);
    let disk = open(&bench, Changes::Keep);
    assert!(matches!(disk.begin_session(None), Err(Error::Refused(why)) if why.contains("being restored")));
    assert!(!Manifest::load(disk.paths()).unwrap().kept);
    drain(&disk).unwrap();
    begin_and_write(&disk, 8, 0x61);
    disk.end_session().unwrap();
    drop(disk);
    assert_can_be_given_up(&bench);
}

/// After a kill and after a power cut, in a session: what reached the disk is kept, and all that may have
/// is restored when it is given up.
#[test]
fn kept_session_that_is_killed_or_loses_power_is_kept() {
    for power_cut in [false, true] {
        let bench = pristine();
        let disk = open(&bench, Changes::Keep);
        begin_and_write(&disk, 8, 0x62);
        drop(disk);
        if power_cut {
            cut_power(&bench);
        }
        assert_eq!(status(&bench.options).unwrap().state, DiskState::Kept);
        let disk = open(&bench, Changes::Keep);
        assert_eq!(disk.pending_blocks(), 0);
        assert!(if power_cut { disk.kept_blocks() >= 5 } else { disk.kept_blocks() == 5 });
        assert_reads(&disk, 8, 0x62);
        drop(disk);
        assert_can_be_given_up(&bench);
    }
}

/// Invariant 6, turned round: where the log can't be trusted all is the guest's, and all is restored
/// when it is given up.
#[test]
fn kept_session_whose_log_is_damaged_is_kept_as_a_whole() {
    let bench = pristine();
    let disk = open(&bench, Changes::Keep);
    begin_and_write(&disk, 8, 0x63);
    let sessions = disk.paths().sessions();
    drop(disk);
    for entry in std::fs::read_dir(sessions).unwrap() {
        std::fs::write(entry.unwrap().path(), b"damaged").unwrap();
    }
    let disk = open(&bench, Changes::Keep);
    assert_eq!((disk.pending_blocks(), disk.kept_blocks()), (0, 1024));
    assert_reads(&disk, 8, 0x63);
    drop(disk);
    assert_can_be_given_up(&bench);
}

/// Giving up is durable before the first block is restored: half-restored changes are never kept.
#[test]
fn changes_once_given_up_are_not_kept_again() {
    let bench = pristine();
    let disk = open(&bench, Changes::Keep);
    begin_and_write(&disk, 8, 0x64);
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    // Twice, so that the logs are one already and opening need not replace them.
    open(&bench, Changes::AsBefore).stop().unwrap();
    drop(open(&bench, Changes::GiveUp));
    let disk = open(&bench, Changes::Keep);
    assert_eq!((disk.pending_blocks(), disk.kept_blocks()), (5, 0));
    assert!(matches!(disk.begin_session(None), Err(Error::Refused(_))));
    bench.assert_restores_exactly(&disk);
}

/// The policy is that of the session, not of the server that takes it up.
#[test]
fn session_that_goes_on_ends_by_the_policy_that_it_began_with() {
    let bench = pristine();
    let resume = |changes| DiskOptions { resume: true, ..options(&bench, changes) };
    let disk = SessionDisk::open(&resume(Changes::Keep)).unwrap();
    begin_and_write(&disk, 8, 0x65);
    drop(disk);
    assert!(matches!(SessionDisk::open(&resume(Changes::Reset)), Err(Error::Kept { .. })));
    let disk = SessionDisk::open(&resume(Changes::Keep)).unwrap();
    assert!(disk.session_is_open());
    disk.end_session().unwrap();
    assert_eq!((disk.pending_blocks(), disk.kept_blocks()), (0, 5));
    drop(disk);
    assert_can_be_given_up(&bench);

    let disk = SessionDisk::open(&resume(Changes::Reset)).unwrap();
    begin_and_write(&disk, 8, 0x66);
    drop(disk);
    let disk = SessionDisk::open(&resume(Changes::Keep)).unwrap();
    disk.end_session().unwrap();
    assert_eq!((disk.pending_blocks(), disk.kept_blocks()), (5, 0));
    bench.assert_restores_exactly(&disk);
}

/// Sessions that change nothing leave a pristine disk, which needs no giving up.
#[test]
fn kept_session_that_changed_nothing_leaves_the_disk_pristine() {
    let bench = pristine();
    let disk = open(&bench, Changes::Keep);
    disk.begin_session(None).unwrap();
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    let disk = bench.open();
    assert!(Manifest::load(disk.paths()).unwrap().logs.is_empty());
    disk.stop().unwrap();
    assert_eq!(status(&bench.options).unwrap().state, DiskState::Pristine);
}
