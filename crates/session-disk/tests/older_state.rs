//! An older copy of a disk's own state directory that is put back: what sessions wrote since is pending
//! nevertheless (invariants 2 and 6), and nothing else is ever taken for an older state.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blockio::tape::{Io, Tape};
use blockio::{EngineKind, File, GuestBuf, OpenOptions};
use common::{Bench, copy_dir, end, write};
use session_disk::{
    Basis, Changes, DiskOptions, DiskQueue, Distrust, Error, HoldReason, Manifest, Portion, ProvisionOptions,
    SessionDisk, provision, status,
};

const MIB: usize = 1 << 20;
/// Sectors of the intents' unit, so that what is written there is in no other one.
const REGION: u64 = session_disk::REGION_SIZE / 512;
const OLDER: Basis = Basis::Everything(Distrust::OlderState);

/// A pristine disk of three regions, the last of them short.
fn bench() -> Bench {
    Bench::new(MIB, Some(129 << 20), false, EngineKind::Sync)
}

/// A session that writes two blocks at `sector`; it stays open.
fn session(disk: &Arc<SessionDisk>, sector: u64) {
    disk.begin_session(None).unwrap();
    scribble(disk, sector);
}

fn scribble(disk: &Arc<SessionDisk>, sector: u64) {
    let mut queue = disk.queue(16).unwrap();
    write(disk, &mut queue, sector, &[0x55; 8192]);
}

fn copy_of_state(bench: &Bench) -> PathBuf {
    let copy = bench.dir.path().join("copy");
    copy_dir(bench.options.paths().state_dir(), &copy);
    copy
}

fn put_back(bench: &Bench, copy: &Path) {
    let paths = bench.options.paths();
    std::fs::remove_dir_all(paths.state_dir()).unwrap();
    copy_dir(copy, paths.state_dir());
}

fn cut_power(bench: &Bench) {
    std::fs::remove_dir_all(bench.options.runtime_dir.as_ref().unwrap()).unwrap();
}

/// What the disk's file names.
fn named(bench: &Bench) -> Option<u64> {
    let disk = File::open(&bench.options.disk, OpenOptions::default()).unwrap();
    let value = disk.attribute(c"user.pristine.generation").unwrap()?;
    Some(String::from_utf8(value).unwrap().parse().unwrap())
}

fn generation(bench: &Bench) -> u64 {
    Manifest::load(&bench.options.paths()).unwrap().generation
}

#[track_caller]
fn assert_older(bench: &Bench) {
    let seen = status(&bench.options).unwrap();
    assert_eq!(seen.pending_blocks, seen.blocks);
    assert!(seen.distrust.unwrap().contains("put back from a copy"));
    let before = named(bench).unwrap();
    let disk = bench.open();
    assert_eq!(*disk.basis(), OLDER);
    // Nor is any other old copy believed from now on.
    assert!(named(bench).unwrap() > before);
    // It is concluded once: a kill in mid-restore does not begin anew.
    drop(disk);
    let disk = bench.open();
    assert_eq!((disk.basis(), disk.pending_blocks()), (&Basis::ExactLogs, seen.blocks));
    bench.assert_restores_exactly(&disk);
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(*bench.open().basis(), Basis::Pristine);
}

/// A killed session's state, which lists its log, is put back after the next session wrote elsewhere.
#[test]
fn state_of_an_earlier_session_hides_nothing_of_a_later_one() {
    for power_cut in [false, true] {
        let bench = bench();
        session(&bench.open(), 8);
        let copy = copy_of_state(&bench);
        let disk = bench.open();
        bench.assert_restores_exactly(&disk);
        session(&disk, REGION + 8);
        if !power_cut {
            disk.stop().unwrap();
        }
        drop(disk);
        if power_cut {
            cut_power(&bench);
        }
        put_back(&bench, &copy);
        assert_older(&bench);
    }
}

/// An older state whose changes were kept does not make content of what later sessions have left: they were to be reset.
/// All can be given up.
#[test]
fn older_state_with_kept_changes_is_not_believed_either() {
    let bench = bench();
    let options = |changes| DiskOptions { changes, ..bench.options.clone() };
    let kept = SessionDisk::open(&options(Changes::Keep)).unwrap();
    session(&kept, 8);
    kept.end_session().unwrap();
    kept.stop().unwrap();
    drop(kept);
    let copy = copy_of_state(&bench);
    let disk = SessionDisk::open(&options(Changes::GiveUp)).unwrap();
    bench.assert_restores_exactly(&disk);
    session(&disk, REGION + 8);
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    put_back(&bench, &copy);
    for changes in [Changes::Keep, Changes::AsBefore] {
        let error = SessionDisk::open(&options(changes)).unwrap_err();
        assert!(matches!(error, Error::KeptUnknown { .. }), "{changes:?}: {error}");
        assert!(error.hint("--disk D").unwrap().contains("--discard-kept --disk D"));
    }
    // Nor are they kept as an image, but for all that the disk holds, if that is asked for.
    let keep = |portion| {
        let to = bench.dir.path().join("kept.qcow2");
        session_disk::keep(&bench.options, portion, &to, &AtomicBool::new(false), &mut |_, _| ())
    };
    for portion in [Portion::LastSession, Portion::Session(1)] {
        let error = keep(portion).unwrap_err();
        assert!(matches!(error, Error::KeptUnknown { .. }), "{portion:?}: {error}");
        assert!(error.hint("--disk D").unwrap().contains("keep --whole-disk --disk D"));
    }
    assert_eq!(keep(Portion::WholeDisk).unwrap().differing_blocks, 2);
    let disk = SessionDisk::open(&options(Changes::GiveUp)).unwrap();
    assert_eq!(*disk.basis(), OLDER);
    bench.assert_restores_exactly(&disk);
}

/// A copy from the middle of a session does not outlast a stop, whether the session was open then or
/// its blocks were being restored.
#[test]
fn state_of_the_middle_of_a_session_hides_nothing_after_a_stop() {
    for ended in [false, true] {
        let bench = bench();
        let disk = bench.open();
        session(&disk, 8);
        let copy = copy_of_state(&bench);
        scribble(&disk, REGION + 8);
        if ended {
            disk.end_session().unwrap();
            // The drain is stopped when it has begun.
            let stop = AtomicBool::new(false);
            disk.drain(&stop, &mut |_| stop.store(true, Ordering::Release)).unwrap_err();
        }
        disk.stop().unwrap();
        drop(disk);
        put_back(&bench, &copy);
        assert_older(&bench);
    }
}

/// A disk that is taken over anew is not accused by what its file named before, and no copy of the state
/// before is believed.
#[test]
fn disk_that_is_adopted_is_believed_and_its_state_before_is_not() {
    let bench = bench();
    for _ in 0..3 {
        let disk = bench.open();
        session(&disk, 8);
        disk.stop().unwrap();
    }
    let copy = copy_of_state(&bench);
    let before = named(&bench).unwrap();
    std::fs::remove_dir_all(bench.options.paths().state_dir()).unwrap();
    let wanted =
        ProvisionOptions { adopt: true, ..ProvisionOptions::new(bench.base_path(), bench.options.clone()) };
    provision(&wanted).unwrap();
    assert!(named(&bench).unwrap() > before);
    assert_eq!(*bench.open().basis(), Basis::ExactLogs);
    put_back(&bench, &copy);
    assert_older(&bench);
}

/// In the steps of a life the disk's file never names more than the manifest, and just as much whenever
/// there are logs.
#[test]
fn disk_file_names_the_manifest_whenever_it_has_logs() {
    let bench = bench();
    let check = |what: &str| {
        let (named, has) = (named(&bench).unwrap(), generation(&bench));
        let logs = !Manifest::load(&bench.options.paths()).unwrap().logs.is_empty();
        assert!(if logs { named == has } else { named < has }, "{what}: {named} {has}");
    };
    check("pristine");
    let disk = bench.open();
    session(&disk, 8);
    check("a session");
    disk.checkpoint().unwrap();
    check("a checkpoint");
    disk.hold(HoldReason::ByOperator).unwrap();
    check("a hold");
    let queue = disk.queue(1).unwrap();
    end(&disk, queue);
    disk.stop().unwrap();
    check("a stop");
    drop(disk);
    let disk = bench.open();
    disk.release().unwrap();
    check("a release");
    bench.assert_restores_exactly(&disk);
    check("a drain");
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(*bench.open().basis(), Basis::Pristine);
}

/// A crash before the disk's file names the manifest leaves it behind: nothing is accused, and the next
/// start makes up for it, whether it makes a manifest of its own, keeps the old one, or goes on with a session.
#[test]
fn disk_file_that_names_an_older_manifest_accuses_nothing() {
    let mut bench = bench();
    session(&bench.open(), 8);
    let fall_behind = || {
        let for_writing = OpenOptions { write: true, ..OpenOptions::default() };
        let disk = File::open(&bench.options.disk, for_writing).unwrap();
        disk.set_attribute(c"user.pristine.generation", b"1").unwrap();
    };
    for _ in 0..2 {
        fall_behind();
        let order = Arc::new(Order::default());
        let disk = SessionDisk::open(&DiskOptions { tape: Some(order.clone()), ..bench.options.clone() });
        let disk = disk.unwrap();
        // A manifest that is found after a kill may not be durable yet.
        let order = order.0.lock().unwrap();
        assert!(matches!(order.as_slice(), [.., "sync the directory", "name"]), "{order:?}");
        assert_eq!((disk.basis(), disk.pending_blocks()), (&Basis::ExactLogs, 2));
        assert_eq!(named(&bench), Some(generation(&bench)));
    }
    session(&bench.open(), REGION + 8);
    fall_behind();
    bench.options.resume = true;
    let disk = bench.open();
    assert!(disk.session_is_open());
    assert_eq!(named(&bench), Some(generation(&bench)));
    disk.end_session().unwrap();
    bench.assert_restores_exactly(&disk);
}

/// What happens of the two whose order matters.
#[derive(Debug, Default)]
struct Order(Mutex<Vec<&'static str>>);

impl Tape for Order {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        match io {
            Io::SyncDir { path } if path.ends_with("disk.raw.pristine") => {
                self.0.lock().unwrap().push("sync the directory");
            }
            Io::SetAttribute { .. } => self.0.lock().unwrap().push("name"),
            _ => {}
        }
        Ok(0)
    }
}

/// A file system whose files can't have attributes, or one that fails to set them.
#[derive(Debug)]
struct NoAttributes(rustix::io::Errno);

impl Tape for NoAttributes {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        if matches!(io, Io::SetAttribute { .. }) { Err(self.0.into()) } else { Ok(0) }
    }
}

/// Without attributes a disk is served as ever; its state put back is believed, as that of a block device.
#[test]
fn disk_whose_file_can_have_no_attributes_has_no_witness() {
    for errno in [rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSPC] {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        common::write_sparse(&base, &common::base_content(MIB));
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            engine: Some(EngineKind::Sync),
            tape: Some(Arc::new(NoAttributes(errno))),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        let wanted = ProvisionOptions::new(base, options.clone());
        provision(&wanted).unwrap();
        let bench = Bench { dir, base: common::base_content(MIB), options };
        bench.assert_restores_exactly(&bench.open());
        for _ in 0..2 {
            let disk = bench.open();
            assert!(matches!(disk.basis(), Basis::Pristine | Basis::ExactLogs));
            session(&disk, 8);
            disk.stop().unwrap();
            assert_eq!(named(&bench), None);
        }
        bench.assert_restores_exactly(&bench.open());
    }
}

/// Writes a block as a queue's worker does: without waiting if that can be, and logged before.
fn write_at_once(disk: &SessionDisk, queue: &mut DiskQueue, sector: u64) {
    let (range, buf) = (disk.geometry().sectors_at(sector, 4096).unwrap(), GuestBuf::zeroed(4096));
    if queue.announce(range) {
        queue.log_announced();
    }
    if !queue.write_now(range, buf.view(), false) {
        write(disk, queue, sector, &[0x55; 4096]);
    }
    queue.reap(&mut Vec::new());
}

/// Invariant 6: a session's writes are seen in the disk's times, by which a manifest that calls the disk pristine is
/// judged, also where they go through a map (tmpfs), which leaves the times alone, and one session follows the other
/// at once.
#[test]
fn first_write_of_a_session_is_seen_in_the_times_of_the_disk() {
    let dir = common::fast_dir();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![7; MIB]).unwrap();
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions::new(base, options.clone())).unwrap();
    let disk = common::open(&options);
    let drain = || disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    let changed = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    drain();
    for session in 0..3 {
        let pristine = changed(&options.disk);
        // Not in the same tick of the kernel's clock.
        let clock = dir.path().join("clock");
        common::wait_until(|| {
            std::fs::write(&clock, b"tick").unwrap();
            changed(&clock) > pristine
        });
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        for _ in 0..2 {
            (0..128).for_each(|block| write_at_once(&disk, &mut queue, block * 8));
            assert!(changed(&options.disk) > pristine, "in session {session}");
        }
        end(&disk, queue);
        drain();
    }
}

/// A disk that waits to be restored, and is written to while nobody serves it, or replaced by an older copy of itself: nothing is known of it
/// then. A stop, a rebase and a provision leave it so that this is found.
#[test]
fn disk_that_is_written_while_nobody_serves_it_is_restored_as_a_whole() {
    let bench = Bench::new(MIB, None, true, EngineKind::Sync);
    let outside = Basis::Everything(Distrust::WrittenFromOutside);
    let touch = || {
        let disk = std::fs::File::options().write(true).open(&bench.options.disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, &[0xaa; 4096], 65536).unwrap();
    };
    // It was provisioned, and nothing of it is filled.
    touch();
    let disk = bench.open();
    assert_eq!(*disk.basis(), outside);
    session(&disk, 0);
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    // As it was: what the logs say counts, also after a reboot.
    cut_power(&bench);
    let disk = bench.open();
    assert_eq!(*disk.basis(), Basis::ExactLogs);
    disk.stop().unwrap();
    drop(disk);
    let older = std::fs::File::options().write(true).open(&bench.options.disk).unwrap();
    older.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(3600)).unwrap();
    let seen = status(&bench.options).unwrap();
    assert!(seen.distrust.unwrap().contains("changed from outside"));
    assert_eq!(seen.pending_blocks, seen.blocks);
    let disk = bench.open();
    assert_eq!(*disk.basis(), outside);
    // Who is killed leaves no time to be compared with.
    session(&disk, 8);
    drop(disk);
    let disk = bench.open();
    assert_eq!(*disk.basis(), Basis::ExactLogs);
    bench.assert_restores_exactly(&disk);
}

/// Nor is it taken for what the last session wrote, however often it is opened before somebody wants to keep that.
#[test]
fn held_disk_that_was_written_from_outside_is_kept_as_a_whole_only() {
    let bench = Bench::new(MIB, None, false, EngineKind::Sync);
    let disk = bench.open();
    session(&disk, 0);
    disk.hold(HoldReason::ByOperator).unwrap();
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    let keep = |portion| {
        let to = bench.dir.path().join("kept.qcow2");
        let kept = session_disk::keep(&bench.options, portion, &to, &AtomicBool::new(false), &mut |_, _| ());
        let _ = std::fs::remove_file(to);
        kept
    };
    assert_eq!(keep(Portion::LastSession).unwrap().blocks, 2);
    let file = std::fs::File::options().write(true).open(&bench.options.disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xaa; 4096], 4096).unwrap();
    drop(file);
    for _opening in 0..2 {
        assert!(matches!(keep(Portion::LastSession), Err(Error::Refused(_))));
        assert!(keep(Portion::WholeDisk).is_ok());
        bench.open().stop().unwrap();
    }
}
