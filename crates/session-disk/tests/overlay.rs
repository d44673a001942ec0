//! What is kept of a session is what it saw: its own blocks, and the base where it wrote nothing, whatever earlier
//! sessions have left on the disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::EngineKind;
use common::{Bench, open, write};
use session_disk::{
    Changes, DiskOptions, Error, HoldReason, Kept, Portion, ProcessId, ProvisionOptions, SessionDisk, keep,
    provision, set_hold_of_open_session,
};

const MIB: usize = 1 << 20;

/// Held by a test that starts processes and then takes a disk over again: a child of another thread has, until it runs a
/// program of its own, the descriptors that the disk is locked by.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest's process. It ends with the test.
struct Vm(Child);

impl Vm {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn id(&self) -> Option<ProcessId> {
        ProcessId::of(self.0.id())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Writes to the disk in a session of its own; returns what that session sees in the end.
fn session(
    bench: &Bench,
    disk: &Arc<SessionDisk>,
    owner: Option<ProcessId>,
    writes: &[(u64, usize, u8)],
) -> Vec<u8> {
    disk.begin_session(owner).unwrap();
    let mut queue = disk.queue(16).unwrap();
    let mut seen = bench.base.clone();
    for (sector, len, byte) in writes {
        write(disk, &mut queue, *sector, &vec![*byte; *len]);
        seen[*sector as usize * 512..][..*len].fill(*byte);
    }
    seen
}

/// What the first session writes, and nobody restores.
const FIRST: &[(u64, usize, u8)] = &[(8, 20 * 4096, 0xa1), (4000, 4096, 0xa2), (2048, 300 << 10, 0xa3)];
/// The second one writes over parts of it, and elsewhere: whole blocks and not, zeroes, the disk's last sector.
const SECOND: &[(u64, usize, u8)] =
    &[(16, 4096, 0xb1), (33, 512, 0xb2), (700, 66 << 10, 0xb3), (3000, 128 << 10, 0), (END, 512, 0xb4)];
const END: u64 = (4 * MIB as u64 + 1024) / 512 - 1;

/// A disk that ends with a part of a block, and is longer than its base.
fn bench() -> Bench {
    Bench::new(4 * MIB - 1536, Some(4 * MIB as u64 + 1024), false, EngineKind::Sync)
}

fn try_keep(bench: &Bench, portion: Portion) -> Result<(Kept, PathBuf), Error> {
    let to = bench.dir.path().join("kept.qcow2");
    let kept = keep(&bench.options, portion, &to, &AtomicBool::new(false), &mut |done, total| {
        assert!(done <= total)
    });
    if kept.is_err() {
        assert!(!to.exists(), "something is left of an image that was not made");
    }
    Ok((kept?, to))
}

fn converted(image: &Path) -> Vec<u8> {
    let check = Command::new("qemu-img").args(["check", "-q"]).arg(image).status();
    assert!(check.unwrap().success());
    let raw = image.with_extension("raw");
    let convert = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(image).arg(&raw).status();
    assert!(convert.unwrap().success());
    fs::read(raw).unwrap()
}

/// Keeps the last session, compares, and removes the image. The disk and its state must not change.
#[track_caller]
fn assert_keeps(bench: &Bench, portion: Portion, seen: &[u8]) -> Kept {
    let state = || {
        let manifest = fs::read(bench.options.paths().manifest()).unwrap();
        let logs = fs::read_dir(bench.options.paths().sessions()).unwrap();
        let mut logs: Vec<_> = logs.map(|log| log.unwrap().path()).collect();
        logs.sort();
        (bench.disk_content(), manifest, logs.iter().map(|log| fs::read(log).unwrap()).collect::<Vec<_>>())
    };
    let before = state();
    let (kept, to) = try_keep(bench, portion).unwrap();
    assert!(state() == before, "keeping has changed something");
    let content = converted(&to);
    assert_eq!(content.len(), seen.len());
    for (block, (kept, seen)) in content.chunks(4096).zip(seen.chunks(4096)).enumerate() {
        assert!(kept == seen, "block {block} is not what the session saw");
    }
    fs::remove_file(to).unwrap();
    kept
}

#[track_caller]
fn assert_refused(bench: &Bench, portion: Portion, words: &str) {
    match try_keep(bench, portion) {
        Err(Error::Refused(why)) => assert!(why.contains(words), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// Invariant 2, for those who look afterwards: of what earlier sessions left, and the last one never saw, nothing is in
/// the image. After a stop, after openings that make one log of all, held and not held, beside the server that holds it.
#[test]
fn kept_session_is_what_it_saw_and_nothing_of_earlier_ones() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    session(&bench, &disk, None, FIRST);
    disk.end_session().unwrap();
    let seen = session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    let number = |kept: &Kept| kept.session.unwrap();
    disk.hold(HoldReason::ByOperator).unwrap();
    let last = number(&assert_keeps(&bench, Portion::LastSession, &seen));
    disk.release().unwrap();
    // Not held, and in use.
    assert_refused(&bench, Portion::LastSession, "pristine session hold");
    disk.stop().unwrap();
    drop(disk);
    for _opening in 0..3 {
        let kept = assert_keeps(&bench, Portion::Session(last), &seen);
        assert_eq!((number(&kept), kept.size), (last, bench.base.len() as u64));
        // Where the base is zero, zeroes do not differ from it: 16 of 32 blocks that were written so.
        assert!(kept.differing_blocks < kept.blocks, "{kept:?}");
        assert_refused(&bench, Portion::Session(last - 1), "not the content of session");
        bench.open().stop().unwrap();
    }
    let disk = bench.open();
    disk.hold(HoldReason::ByOperator).unwrap();
    assert_keeps(&bench, Portion::LastSession, &seen);
    disk.stop().unwrap();
    drop(disk);
    assert_keeps(&bench, Portion::LastSession, &seen);
    let disk = bench.open();
    disk.release().unwrap();
    bench.assert_restores_exactly(&disk);
    disk.stop().unwrap();
    drop(disk);
    assert_refused(&bench, Portion::LastSession, "nothing to keep");
}

/// The same when server and VM were killed in the session, before a server has looked at what they left, and after.
#[test]
fn kept_session_that_was_killed_is_what_it_saw() {
    let _alone = alone();
    for hold in [false, true] {
        let (bench, vm) = (bench(), Vm::start());
        let disk = bench.open();
        session(&bench, &disk, None, FIRST);
        disk.end_session().unwrap();
        let seen = session(&bench, &disk, vm.id(), SECOND);
        drop(disk);
        assert_refused(&bench, Portion::LastSession, "session is open");
        if hold {
            set_hold_of_open_session(&bench.options, Some(HoldReason::ByOperator)).unwrap().unwrap();
        }
        drop(vm);
        assert_keeps(&bench, Portion::LastSession, &seen);
        let disk = bench.open();
        if !hold {
            disk.hold(HoldReason::ByOperator).unwrap();
        }
        assert_keeps(&bench, Portion::LastSession, &seen);
        disk.release().unwrap();
        bench.assert_restores_exactly(&disk);
    }
}

/// After a power cut nobody knows what of a session has reached the disk, and a block that it owned may still hold what an
/// earlier one wrote.
#[test]
fn session_that_a_power_cut_has_ended_is_not_kept_as_one() {
    let _alone = alone();
    for hold in [false, true] {
        let bench = bench();
        let disk = bench.open();
        session(&bench, &disk, None, FIRST);
        disk.end_session().unwrap();
        session(&bench, &disk, None, SECOND);
        if hold {
            disk.hold(HoldReason::ByOperator).unwrap();
        }
        let content = bench.disk_content();
        drop(disk);
        fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
        let words = if hold { "the host went down" } else { "begun" };
        assert_refused(&bench, Portion::LastSession, words);
        assert_keeps(&bench, Portion::WholeDisk, &content);
        bench.open().stop().unwrap();
        assert_refused(&bench, Portion::LastSession, words);
        assert_keeps(&bench, Portion::WholeDisk, &content);
    }
}

/// What can't be trusted is not taken for a session; all in which the disk differs can be kept all the same.
#[test]
fn session_whose_log_is_damaged_or_gone_is_not_kept_as_one() {
    let _alone = alone();
    for damage in ["gone", "damaged", "another disk's", "written from outside"] {
        let bench = bench();
        let disk = bench.open();
        session(&bench, &disk, None, FIRST);
        disk.end_session().unwrap();
        session(&bench, &disk, None, SECOND);
        disk.end_session().unwrap();
        disk.hold(HoldReason::ByOperator).unwrap();
        let entries: Vec<_> = session_disk::Manifest::load(disk.paths()).unwrap().logs;
        let log = disk.paths().sessions().join(entries.last().unwrap().id().file_name());
        disk.stop().unwrap();
        drop(disk);
        match damage {
            "gone" => fs::remove_file(&log).unwrap(),
            "damaged" => {
                let mut bytes = fs::read(&log).unwrap();
                bytes[4096 + 17] ^= 1;
                fs::write(&log, bytes).unwrap();
            }
            "another disk's" => {
                let first =
                    bench.options.paths().sessions().join(entries[entries.len() - 2].id().file_name());
                fs::copy(first, &log).unwrap();
            }
            _ => {
                let copy = bench.dir.path().join("copy");
                fs::copy(&bench.options.disk, &copy).unwrap();
                fs::rename(copy, &bench.options.disk).unwrap();
            }
        }
        assert_refused(&bench, Portion::LastSession, "can't be told");
        assert_keeps(&bench, Portion::WholeDisk, &bench.disk_content());
    }
    // Its log made one with the others, and then lost.
    let bench = bench();
    let disk = bench.open();
    session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    bench.open().stop().unwrap();
    let named = session_disk::Manifest::load(&bench.options.paths()).unwrap().logs[0].id().file_name();
    for log in fs::read_dir(bench.options.paths().sessions()).unwrap().map(|log| log.unwrap().path()) {
        if !log.ends_with(&named) {
            fs::remove_file(log).unwrap();
        }
    }
    assert_refused(&bench, Portion::LastSession, "not there any more");
}

/// Part of what a session wrote is of use to nobody: once restoring may have begun it is not kept as a session.
#[test]
fn session_of_which_some_was_restored_is_not_kept() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    let seen = session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    drop(disk);
    // Killed after the session's end: restoring may have begun.
    assert_refused(&bench, Portion::LastSession, "has begun, or may have");
    let disk = bench.open();
    disk.stop().unwrap();
    drop(disk);
    assert_refused(&bench, Portion::LastSession, "has begun, or may have");
    assert_keeps(&bench, Portion::WholeDisk, &seen);
}

/// Of a disk whose changes are kept all of them are content, those of all sessions.
#[test]
fn kept_changes_of_several_sessions_are_kept_together() {
    let _alone = alone();
    let bench = bench();
    let options = DiskOptions { changes: Changes::Keep, ..bench.options.clone() };
    let disk = open(&options);
    session(&bench, &disk, None, FIRST);
    disk.end_session().unwrap();
    session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    let content = bench.disk_content();
    assert_refused(&bench, Portion::LastSession, "in use");
    disk.hold(HoldReason::ByOperator).unwrap();
    assert_eq!(assert_keeps(&bench, Portion::LastSession, &content).session, None);
    disk.release().unwrap();
    disk.stop().unwrap();
    drop(disk);
    assert_keeps(&bench, Portion::LastSession, &content);
    assert_keeps(&bench, Portion::WholeDisk, &content);
}

/// Nothing is overwritten, and an image that was not finished is not there.
#[test]
fn keep_that_is_stopped_or_finds_a_file_leaves_all_as_it_was() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    disk.hold(HoldReason::ByOperator).unwrap();
    let to = bench.dir.path().join("there.qcow2");
    fs::write(&to, b"theirs").unwrap();
    let run = |portion, stop: &AtomicBool, to: &Path| keep(&bench.options, portion, to, stop, &mut |_, _| ());
    let go_on = AtomicBool::new(false);
    assert!(
        matches!(run(Portion::LastSession, &go_on, &to), Err(Error::Refused(why)) if why.contains("exists"))
    );
    assert_eq!(fs::read(&to).unwrap(), b"theirs");
    let names = || fs::read_dir(bench.dir.path()).unwrap().count();
    let before = names();
    for portion in [Portion::LastSession, Portion::WholeDisk] {
        let to = bench.dir.path().join("new.qcow2");
        assert!(matches!(run(portion, &AtomicBool::new(true), &to), Err(Error::Stopped)));
        let elsewhere = bench.dir.path().join("no-such-directory/new.qcow2");
        assert!(matches!(run(portion, &go_on, &elsewhere), Err(Error::State { .. })));
        assert_eq!(names(), before);
    }
}

/// A hold that ends meanwhile: what is restored must not be taken for what the session wrote.
#[test]
fn keep_during_which_the_disk_is_released_keeps_nothing() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    disk.hold(HoldReason::ByOperator).unwrap();
    let to = bench.dir.path().join("new.qcow2");
    let mut released = false;
    let kept = keep(&bench.options, Portion::LastSession, &to, &AtomicBool::new(false), &mut |_, _| {
        if !std::mem::replace(&mut released, true) {
            disk.release().unwrap();
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        }
    });
    assert!(matches!(kept, Err(Error::Refused(why)) if why.contains("was released")));
    assert!(!to.exists());
}

/// Its server only stops meanwhile: what is held stays so.
#[test]
fn keep_beside_a_server_that_stops_is_finished() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    let seen = session(&bench, &disk, None, SECOND);
    disk.end_session().unwrap();
    disk.hold(HoldReason::ByOperator).unwrap();
    let to = bench.dir.path().join("new.qcow2");
    let mut stopped = false;
    keep(&bench.options, Portion::LastSession, &to, &AtomicBool::new(false), &mut |_, _| {
        if !std::mem::replace(&mut stopped, true) {
            disk.stop().unwrap();
        }
    })
    .unwrap();
    assert!(stopped && converted(&to) == seen);
}

/// Each number is given to one log, also where the manifest that counted them is lost and the disk is taken over anew: what its
/// session wrote is found by the number.
#[test]
fn session_is_kept_of_a_disk_that_was_adopted_after_its_manifest_was_lost() {
    let _alone = alone();
    let bench = bench();
    let disk = bench.open();
    for _ in 0..5 {
        session(&bench, &disk, None, FIRST);
        disk.end_session().unwrap();
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    }
    drop(disk);
    fs::write(bench.options.paths().manifest(), "lost").unwrap();
    let adopt =
        ProvisionOptions { adopt: true, ..ProvisionOptions::new(bench.base_path(), bench.options.clone()) };
    provision(&adopt).unwrap();
    let disk = bench.open();
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    let seen = session(&bench, &disk, None, SECOND);
    drop(disk);
    let disk = bench.open();
    disk.hold(HoldReason::ByOperator).unwrap();
    assert_keeps(&bench, Portion::LastSession, &seen);
}

/// Random numbers from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn writes(&mut self) -> Vec<(u64, usize, u8)> {
        let count = self.below(12);
        let write = |random: &mut Self| {
            let (sector, sectors) = (random.below(END - 200), 1 + random.below(200));
            (sector, sectors as usize * 512, random.below(256) as u8)
        };
        (0..count).map(|_| write(self)).collect()
    }
}

/// A disk's life: what its last session saw, as long as all of it is there.
struct Life {
    bench: Bench,
    disk: Option<Arc<SessionDisk>>,
    seen: Option<Vec<u8>>,
    kept: usize,
}

impl Life {
    fn disk(&mut self) -> Arc<SessionDisk> {
        Arc::clone(self.disk.get_or_insert_with(|| self.bench.open()))
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(12) {
            // Its end, or that of its server and its VM.
            0..=4 => {
                let disk = self.disk();
                if disk.held().is_some() {
                    return;
                }
                let (vm, writes, killed) = (Vm::start(), random.writes(), random.below(3) == 0);
                let seen = session(&self.bench, &disk, vm.id(), &writes);
                self.seen = (!writes.is_empty()).then_some(seen);
                if random.below(3) == 0 {
                    // What earlier sessions left, while this one is open.
                    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
                }
                if random.below(4) == 0 {
                    disk.hold(HoldReason::ByOperator).unwrap();
                }
                if killed {
                    self.disk = None;
                } else {
                    disk.end_session().unwrap();
                }
            }
            5 => {
                let disk = self.disk();
                let _ = disk.release();
                disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
                self.seen = None;
            }
            6 => self.disk().stop().map(|_| self.disk = None).unwrap(),
            7 => self.disk = None,
            8 => {
                self.disk = None;
                let _ = fs::remove_dir_all(self.bench.dir.path().join("run"));
            }
            9 | 10 => drop(self.disk().hold(HoldReason::ByOperator)),
            _ => drop(self.disk().release()),
        }
    }

    /// Keeps the session, if that is possible: then it is what it saw.
    fn look(&mut self, doing: &str) {
        let Ok((kept, to)) = try_keep(&self.bench, Portion::LastSession) else { return };
        let dir = [self.bench.dir.path().to_owned()];
        let trust = base_image::Trust::Directories(&dir);
        let image = base_image::BaseImage::open(&to, Some(base_image::BaseFormat::Qcow2), trust).unwrap();
        let mut content = vec![0; image.size() as usize];
        image.read_at(&mut content, 0).unwrap();
        let seen = self
            .seen
            .as_ref()
            .unwrap_or_else(|| panic!("{doing}: {kept:?}, and nothing is left of a session"));
        assert!(&content == seen, "{doing}: {kept:?} is not what the session saw");
        self.kept += 1;
        fs::remove_file(to).unwrap();
    }
}

/// Invariant 2 for who looks afterwards: whatever became of a disk, what is kept as the last session is just what that saw.
#[test]
fn kept_session_of_any_life_is_what_the_last_session_saw() {
    let _alone = alone();
    let mut kept = 0;
    for seed in 0..10 {
        let (mut random, bench) = (Random(seed), bench());
        let mut life = Life { bench, disk: None, seen: None, kept: 0 };
        for step in 0..14 {
            life.step(&mut random);
            life.look(&format!("seed {seed}, step {step}"));
        }
        kept += life.kept;
    }
    assert!(kept > 20, "only {kept} sessions could be kept");
}
