//! A held disk is kept as its session left it, until it is released: by nobody, not by a restart, a
//! kill or a power cut, is any of it restored, and no session begins.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockio::EngineKind;
use blockio::fault::{Fault, FaultPlan, OpClass};
use blockio::tape::{Io, Tape};
use common::{Bench, open, wait_until, write};
use session_disk::{
    CopyCounts, DiskOptions, DiskState, DrainObserver, Drainer, Error, HoldReason, Manifest, ProcessId,
    ProvisionOptions, SessionDisk, left_open, provision, status,
};

const MIB: usize = 1 << 20;

/// A disk that was pristine, and whose session is open and has written 5 blocks.
fn in_session() -> (Bench, Arc<SessionDisk>) {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
    let disk = bench.open();
    begin_and_write(&disk, 8, 0x51);
    (bench, disk)
}

fn begin_and_write(disk: &Arc<SessionDisk>, sector: u64, byte: u8) {
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(disk, &mut queue, sector, &vec![byte; 5 * 4096]);
}

fn hold(disk: &SessionDisk) -> Result<session_disk::Held, Error> {
    disk.hold(HoldReason::ByOperator)
}

fn drain(disk: &SessionDisk) -> Result<u64, Error> {
    disk.drain(&AtomicBool::new(false), &mut |_| ())
}

/// Panics unless the disk is held, as it is in memory and as its files say, with `content` untouched.
#[track_caller]
fn assert_held(bench: &Bench, disk: &Arc<SessionDisk>, content: &[u8]) {
    assert!(matches!(drain(disk), Err(Error::Held { .. })));
    assert!(matches!(disk.begin_session(None), Err(Error::Held { .. })));
    assert!(matches!(disk.turns_away(), Some(Error::Held { .. })));
    assert_eq!(disk.held(), Some(HoldReason::ByOperator));
    assert_eq!(disk.pending_blocks(), 5);
    assert!(bench.disk_content() == content, "the disk has changed");
    let seen = status(&bench.options).unwrap();
    assert_eq!((seen.state, seen.held), (DiskState::Held, Some(HoldReason::ByOperator)));
}

/// Counts what a drain tells.
#[derive(Default)]
struct Watch {
    restored: AtomicU64,
}

impl DrainObserver for Watch {
    fn restored(&self, blocks: u64, _how: CopyCounts, _duration: Duration) {
        self.restored.fetch_add(blocks, Ordering::SeqCst);
    }
}

/// The whole life of a hold: asked for in the session, kept through its end, a stop, a kill and a power
/// cut, and restored exactly after the release (invariant 4).
#[test]
fn held_session_is_kept_through_everything_until_its_release() {
    let (bench, disk) = in_session();
    let held = hold(&disk).unwrap();
    assert_eq!((held.already, held.blocks, held.session), (false, 5, disk.open_session()));
    assert!(held.session.is_some() && hold(&disk).unwrap().already);
    assert_eq!(status(&bench.options).unwrap().state, DiskState::InSession);
    let content = bench.disk_content();
    disk.end_session().unwrap();
    assert_held(&bench, &disk, &content);
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(status(&bench.options).unwrap().state, DiskState::Held);
    for power_cut in [false, true] {
        let disk = bench.open();
        assert_held(&bench, &disk, &content);
        drop(disk);
        if power_cut {
            std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
        }
    }
    let disk = bench.open();
    assert_held(&bench, &disk, &content);
    // The log is kept as well, not only what it says.
    let logs = Manifest::load(disk.paths()).unwrap().logs;
    assert_eq!(logs.iter().map(|entry| Some(entry.sequence)).collect::<Vec<_>>(), [held.session]);
    assert_eq!(disk.release().unwrap().pending_blocks, 5);
    assert!(matches!(disk.release(), Err(Error::Refused(_))));
    bench.assert_restores_exactly(&disk);
    disk.begin_session(None).unwrap();
}

/// A hold in the session of a server that then dies: the next one finds the session ended and held.
#[test]
fn held_session_whose_server_is_killed_is_held_by_the_next() {
    let (bench, disk) = in_session();
    hold(&disk).unwrap();
    let content = bench.disk_content();
    drop(disk);
    assert!(left_open(&bench.options).unwrap().is_some());
    let disk = bench.open();
    assert_held(&bench, &disk, &content);
    disk.release().unwrap();
    bench.assert_restores_exactly(&disk);
}

/// A hold in a session that goes on with the next server: it begins when that one ends the session.
#[test]
fn held_session_that_is_taken_up_goes_on_and_is_kept_at_its_end() {
    let (bench, disk) = in_session();
    disk.end_session().unwrap();
    let options = DiskOptions { resume: true, ..bench.options.clone() };
    begin_and_write(&disk, 800, 0x52);
    hold(&disk).unwrap();
    drop(disk);
    let disk = open(&options);
    assert!(disk.session_is_open() && disk.held().is_some());
    // Of the session before: restored, for the hold has not begun.
    assert_eq!(drain(&disk).unwrap(), 5);
    let content = bench.disk_content();
    disk.end_session().unwrap();
    assert_held(&bench, &disk, &content);
}

/// Notes in which order files are synced and named.
#[derive(Debug, Default)]
struct Syncs(Mutex<Vec<String>>);

impl Tape for Syncs {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        let (Io::Sync { path } | Io::Rename { to: path, .. }) = io else { return Ok(0) };
        let name = path.file_name().unwrap().to_str().unwrap();
        self.0.lock().unwrap().push(if name.ends_with(".wlog") { "log".into() } else { name.into() });
        Ok(0)
    }
}

/// A hold outlasts the host: what the session wrote is on the medium before the log says that all of it is there, and that
/// before the manifest says that it is held. Else what an earlier session wrote could be taken for it after a power cut.
#[test]
fn held_sessions_data_is_durable_before_its_log_and_the_hold() {
    let mut bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
    let tape = Arc::new(Syncs::default());
    bench.options.tape = Some(tape.clone());
    let disk = bench.open();
    let syncs = || std::mem::take(&mut *tape.0.lock().unwrap());
    begin_and_write(&disk, 8, 0x51);
    disk.end_session().unwrap();
    syncs();
    hold(&disk).unwrap();
    assert_eq!(syncs(), ["disk.raw", "log", "manifest.new", "manifest"]);
    disk.release().unwrap();
    begin_and_write(&disk, 800, 0x52);
    hold(&disk).unwrap();
    syncs();
    disk.end_session().unwrap();
    assert_eq!(syncs(), ["disk.raw", "log"]);
    // Without a hold nobody waits for that.
    disk.release().unwrap();
    drain(&disk).unwrap();
    begin_and_write(&disk, 8, 0x53);
    syncs();
    disk.end_session().unwrap();
    assert!(!syncs().contains(&"disk.raw".to_owned()));
}

/// The drain in the background rests while the disk is held, and goes on after the release.
#[test]
fn background_drain_rests_while_the_disk_is_held() {
    let (bench, disk) = in_session();
    let watch = Arc::new(Watch::default());
    let drainer = Drainer::start(Arc::clone(&disk), watch.clone()).unwrap();
    hold(&disk).unwrap();
    let content = bench.disk_content();
    disk.end_session().unwrap();
    for _ in 0..50 {
        drainer.wake();
        std::thread::yield_now();
    }
    assert_held(&bench, &disk, &content);
    assert!(drainer.trouble().is_none());
    disk.release().unwrap();
    drainer.wake();
    wait_until(|| watch.restored.load(Ordering::SeqCst) == 5);
    drop(drainer);
    bench.assert_equal_to_base();
}

/// What earlier sessions left is restored while a session is open that is to be held: at its end only
/// its own blocks differ from the base.
#[test]
fn drain_of_earlier_sessions_goes_on_while_the_session_to_be_held_is_open() {
    let (bench, disk) = in_session();
    disk.end_session().unwrap();
    begin_and_write(&disk, 800, 0x52);
    hold(&disk).unwrap();
    assert_eq!(disk.pending_blocks(), 5);
    let watch = Arc::new(Watch::default());
    let drainer = Drainer::start(Arc::clone(&disk), watch.clone()).unwrap();
    wait_until(|| watch.restored.load(Ordering::SeqCst) == 5);
    let content = bench.disk_content();
    disk.end_session().unwrap();
    drainer.wake();
    assert_held(&bench, &disk, &content);
    assert!(bench.base[8 * 512..][..5 * 4096] == content[8 * 512..][..5 * 4096]);
}

/// Without an open session: the last one can be held until the first block of it may be restored.
#[test]
fn hold_after_the_session_is_possible_until_its_restoring_begins() {
    let (bench, disk) = in_session();
    disk.end_session().unwrap();
    let content = bench.disk_content();
    assert_eq!(hold(&disk).unwrap().blocks, 5);
    assert_held(&bench, &disk, &content);
    disk.release().unwrap();
    disk.stop().unwrap();
    drop(disk);
    let disk = bench.open();
    assert_eq!(hold(&disk).unwrap().session, None);
    assert_held(&bench, &disk, &content);
    disk.release().unwrap();
    drain(&disk).unwrap();
    assert!(matches!(hold(&disk), Err(Error::Refused(why)) if why.contains("nothing is left")));
    bench.assert_equal_to_base();
}

/// Restoring that has begun and failed, stopped or died half-way leaves nothing that is worth to be
/// called what the session left: this is known after every kind of end.
#[test]
fn hold_after_restoring_has_begun_is_refused_by_this_server_and_the_next() {
    for kind in ["stop", "kill", "power cut"] {
        let (bench, disk) = in_session();
        disk.end_session().unwrap();
        disk.stop().unwrap();
        drop(disk);
        // Twice, so that the logs are one already and opening need not replace them.
        bench.open().stop().unwrap();
        let plan = FaultPlan::new();
        plan.on_every(OpClass::Write, Fault::Fail(5));
        let options = DiskOptions { faults: Some(Arc::clone(&plan)), ..bench.options.clone() };
        let disk = open(&options);
        assert!(drain(&disk).is_err());
        let refused = |disk: &SessionDisk| match hold(disk) {
            Err(Error::Refused(why)) => assert!(why.contains("has begun"), "{kind}: {why}"),
            other => panic!("{kind}: {other:?}"),
        };
        refused(&disk);
        if kind == "stop" {
            disk.stop().unwrap();
        }
        drop(disk);
        if kind == "power cut" {
            std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
        }
        let disk = bench.open();
        assert!(disk.pending_blocks() > 0);
        refused(&disk);
        bench.assert_restores_exactly(&disk);
    }
}

/// After a power cut nobody knows what reached the medium: what was not held before is not held then.
#[test]
fn hold_of_a_session_after_a_power_cut_is_refused() {
    let (bench, disk) = in_session();
    drop(disk);
    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
    assert!(left_open(&bench.options).unwrap().is_some());
    let disk = bench.open();
    assert!(matches!(hold(&disk), Err(Error::Refused(_))));
    bench.assert_restores_exactly(&disk);
}

#[test]
fn session_left_open_is_told_from_one_that_ended() {
    let (bench, disk) = in_session();
    let sequence = disk.open_session();
    let left = || left_open(&bench.options).unwrap();
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(left(), sequence, "stopped in a session");
    let disk = bench.open();
    assert_eq!(left(), None, "ended by opening");
    disk.begin_session(None).unwrap();
    drop(disk);
    assert!(left().is_some(), "killed in a session");
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    disk.end_session().unwrap();
    drop(disk);
    assert_eq!(left(), None, "killed after a session");
}

#[test]
fn held_disk_is_not_adopted() {
    let (bench, disk) = in_session();
    hold(&disk).unwrap();
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    let content = bench.disk_content();
    let adopt = || {
        let (base, disk) = (bench.base_path(), bench.options.clone());
        provision(&ProvisionOptions { adopt: true, ..ProvisionOptions::new(base, disk) })
    };
    assert!(matches!(adopt(), Err(Error::Held { .. })));
    assert!(bench.disk_content() == content);
    let disk = bench.open();
    disk.release().unwrap();
    disk.stop().unwrap();
    drop(disk);
    adopt().unwrap();
}

/// A hold that can't be made durable is none.
#[test]
fn hold_that_cannot_be_stored_leaves_the_drain_running() {
    let (bench, disk) = in_session();
    disk.end_session().unwrap();
    // Nothing can be written over a directory.
    let blocker = disk.paths().state_dir().join("manifest.new");
    std::fs::create_dir(&blocker).unwrap();
    assert!(matches!(hold(&disk), Err(Error::State { .. })));
    std::fs::remove_dir(&blocker).unwrap();
    assert_eq!(disk.held(), None);
    bench.assert_restores_exactly(&disk);
}

/// Fails to make names in a state directory durable, as often as it is told.
#[derive(Debug, Default)]
struct NamesFail(AtomicU64);

impl Tape for NamesFail {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        let is_names = matches!(io, Io::SyncDir { path } if path.ends_with("disk.raw.pristine"));
        let less = |left: u64| left.checked_sub(1);
        match is_names && self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            true => Err(std::io::Error::from_raw_os_error(5)),
            false => Ok(0),
        }
    }
}

/// One whose new manifest has its name, and failed to be durable, holds: the next start would believe it, and call what was
/// restored meanwhile the session's.
#[test]
fn hold_whose_name_failed_to_be_durable_is_in_force() {
    let names = Arc::new(NamesFail::default());
    let (mut bench, disk) = in_session();
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    bench.options.tape = Some(names.clone());
    let disk = open(&bench.options);
    let content = bench.disk_content();
    names.0.store(1, Ordering::SeqCst);
    hold(&disk).unwrap_err();
    assert_held(&bench, &disk, &content);
    // Asked for again it is made durable, or not.
    names.0.store(1, Ordering::SeqCst);
    hold(&disk).unwrap_err();
    assert!(hold(&disk).unwrap().already);
    drop(disk);
    let disk = open(&bench.options);
    assert_held(&bench, &disk, &content);
    disk.release().unwrap();
    drain(&disk).unwrap();
    assert!(bench.disk_content() == bench.base);
}

/// Invariants 3 and 6: a session whose log is damaged while no server runs can't go on, but neither is it
/// thrown away while its VM's process lives.
#[test]
fn session_whose_log_is_damaged_is_held_until_its_process_is_gone() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
    let mut vm = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let options = DiskOptions { resume: true, ..bench.options.clone() };
    let disk = open(&options);
    disk.begin_session(ProcessId::of(vm.id())).unwrap();
    let mut queue = disk.queue(8).unwrap();
    write(&disk, &mut queue, 80, &[0x51; 4096]);
    drop((queue, disk));
    let logs = std::fs::read_dir(bench.options.paths().sessions()).unwrap();
    let log = logs.map(|entry| entry.unwrap().path()).max().unwrap();
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[4096 + 17] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let content = bench.disk_content();
    for _restart in 0..2 {
        let disk = open(&options);
        assert!(!disk.session_is_open() && disk.held_for() == ProcessId::of(vm.id()));
        assert!(disk.begin_session(None).is_err() && drain(&disk).is_err());
        assert_eq!((disk.pending_blocks(), bench.disk_content() == content), ((4 * MIB) as u64 / 4096, true));
        let status = session_disk::status(&bench.options).unwrap();
        assert_eq!(status.held.unwrap().name(), "untrusted");
    }
    vm.kill().unwrap();
    vm.wait().unwrap();
    let disk = open(&options);
    assert_eq!(disk.held(), None);
    bench.assert_restores_exactly(&disk);
}
