//! A session's beginning: reads are served at once, and nothing is written before the session's log is durable and named
//! (invariants 1, 3 and 6).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blockio::EngineKind;
use blockio::tape::{Io, Tape};
use common::{Bench, end, open, read, try_write, wait_until, write};
use session_disk::{
    DiskOptions, DiskState, HoldReason, Manifest, ProcessId, SessionDisk, left_open,
    set_hold_of_open_session, status,
};
use uuid::Uuid;

const SIZE: usize = 1 << 20;

/// What is done for a beginning, in its order; logs are called `log`.
const DURABLE: [&str; 5] =
    ["sync log", "sync names in sessions", "sync manifest.new", "rename manifest", "sync names in state"];

/// Notes what is done, and lets one thing fail.
#[derive(Debug, Default)]
struct Notes {
    done: Mutex<Vec<String>>,
    fails: Mutex<Option<&'static str>>,
}

impl Notes {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.done.lock().unwrap())
    }

    fn fail(&self, what: Option<&'static str>) {
        *self.fails.lock().unwrap() = what;
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap().to_str().unwrap();
    match name {
        "disk.raw.pristine" => "state".to_owned(),
        _ if name.ends_with(".wlog") => "log".to_owned(),
        _ => name.to_owned(),
    }
}

impl Tape for Notes {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        let what = match io {
            Io::Read { .. } => return Ok(0),
            Io::Write { path, .. } | Io::Zero { path, .. } => format!("write {}", name(path)),
            Io::Sync { path } => format!("sync {}", name(path)),
            Io::Create { path, .. } => format!("create {}", name(path)),
            Io::Reserve { path, .. } => format!("reserve {}", name(path)),
            Io::Rename { to, .. } => format!("rename {}", name(to)),
            Io::SyncDir { path } => format!("sync names in {}", name(path)),
            other => format!("{other:?}"),
        };
        let fails = *self.fails.lock().unwrap() == Some(&what);
        self.done.lock().unwrap().push(what);
        if fails { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(0) }
    }
}

/// A disk whose I/O is noted; then everything is done by who needs it, and by no thread.
fn noted(lazy: bool) -> (Bench, Arc<Notes>) {
    let mut bench = Bench::new(SIZE, None, lazy, EngineKind::Sync);
    let notes = Arc::new(Notes::default());
    bench.options = DiskOptions { tape: Some(notes.clone()), resume: true, ..bench.options };
    (bench, notes)
}

fn logs_named(bench: &Bench) -> usize {
    Manifest::load(&bench.options.paths()).unwrap().logs.len()
}

fn logs_there(bench: &Bench) -> usize {
    std::fs::read_dir(bench.options.paths().sessions()).unwrap().count()
}

/// Invariant 1: a log is durable, and the manifest that names it, before a byte of the disk changes; and no read waits for
/// that. Of a block that is pending too, whose record comes after its data.
#[test]
fn new_session_reads_at_once_and_writes_when_its_log_is_durable() {
    for lazy in [false, true] {
        let (bench, notes) = noted(lazy);
        let disk = bench.open();
        let before = logs_named(&bench);
        notes.take();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        assert_eq!(read(&disk, &mut queue, 0, 8192), bench.base[..8192]);
        assert!(disk.session_is_open() && disk.open_session().is_some());
        let begun = notes.take();
        assert!(begun.iter().all(|what| !DURABLE.contains(&what.as_str())), "{begun:?}");
        assert_eq!(logs_named(&bench), before);

        write(&disk, &mut queue, 8, &[0x77; 4096]);
        let done = notes.take();
        let written = done.iter().position(|what| what == "write disk.raw").unwrap();
        let mut places = DURABLE.map(|what| done.iter().position(|done| done == what).unwrap());
        assert!(places.iter().all(|place| *place < written), "{done:?}");
        // The names change when what they name is there.
        assert!(places[3] > places[..3].iter().copied().max().unwrap() && places[4] > places[3], "{done:?}");
        places.sort_unstable();
        assert_eq!(logs_named(&bench), before + 1);
        assert_eq!(read(&disk, &mut queue, 8, 4096), [0x77; 4096]);
        end(&disk, queue);
        bench.assert_restores_exactly(&disk);
    }
}

/// Whoever writes first does not find it undone: it was done meanwhile, whether anybody writes or not.
#[test]
fn session_that_only_reads_gets_a_log_that_is_named() {
    let bench = Bench::new(SIZE, None, false, EngineKind::Sync);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    wait_until(|| logs_named(&bench) == 1);
    disk.end_session().unwrap();
    bench.assert_restores_exactly(&disk);
}

/// A process that owns a session, and is killed at the latest when this is dropped.
struct Vm(Child);

impl Vm {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn id(&self) -> Option<ProcessId> {
        let id = ProcessId::of(self.0.id());
        assert!(id.is_some());
        id
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Invariant 3: the server is killed while a session begins, and its VM lives: the session goes on, with a log that is
/// there. The VM is gone: so is the session.
#[test]
fn session_killed_while_it_begins_goes_on_as_long_as_its_vm_lives() {
    for (lives, lazy) in [(true, false), (true, true), (false, false)] {
        let (bench, _notes) = noted(lazy);
        let vm = Vm::start();
        let (owner, token) = (vm.id(), Some(Uuid::from_u128(7)));
        let disk = bench.open();
        let logs = logs_there(&bench);
        disk.begin_session(owner).unwrap();
        disk.set_token(token);
        let mut queue = disk.queue(8).unwrap();
        read(&disk, &mut queue, 0, 4096);
        drop((queue, disk));
        let vm = lives.then_some(vm);

        let disk = bench.open();
        assert_eq!(disk.session_is_open(), lives);
        if lives {
            assert_eq!((disk.session_owner(), disk.token(), disk.dirty_blocks()), (owner, token, 0));
            let mut queue = disk.queue(8).unwrap();
            write(&disk, &mut queue, 8, &[0x77; 4096]);
            assert_eq!(logs_there(&bench), logs + 1);
            drop((queue, disk));
            // Killed again, now that it has written: as any other.
            let disk = bench.open();
            assert_eq!((disk.session_owner(), disk.token(), disk.dirty_blocks()), (owner, token, 1));
            let mut queue = disk.queue(8).unwrap();
            assert_eq!(read(&disk, &mut queue, 8, 4096), [0x77; 4096]);
            end(&disk, queue);
            bench.assert_restores_exactly(&disk);
        } else {
            begin_and_end(&disk);
            bench.assert_restores_exactly(&disk);
        }
        drop(vm);
    }
}

/// Invariant 6: what can't be made durable is not written to, be it pending or not. The next session tries again.
#[test]
fn session_whose_log_does_not_become_durable_reads_and_writes_nothing() {
    for (what, lazy) in DURABLE.into_iter().flat_map(|what| [(what, false), (what, true)]) {
        let (bench, notes) = noted(lazy);
        let disk = bench.open();
        let (content, logs) = (bench.disk_content(), logs_there(&bench));
        let (named, pending) = (logs_named(&bench), disk.pending_blocks());
        notes.fail(Some(what));
        disk.begin_session(None).unwrap();
        let failed = disk.open_session().unwrap();
        let mut queue = disk.queue(8).unwrap();
        for sector in [8, 64] {
            assert!(try_write(&disk, &mut queue, sector, &[0x77; 4096]).is_err(), "{what}");
            assert!(try_write(&disk, &mut queue, sector, &[0x77; 512]).is_err(), "{what}");
        }
        assert_eq!(read(&disk, &mut queue, 0, SIZE), bench.base, "{what}");
        assert!(bench.disk_content() == content, "{what}");
        notes.fail(None);
        // Not even now that it could be made.
        assert!(try_write(&disk, &mut queue, 8, &[0x77; 4096]).is_err(), "{what}");
        assert!(disk.hold(HoldReason::ByOperator).is_err());
        // Once the manifest has its name the log stays: after that failure either manifest may hold.
        assert_eq!(logs_there(&bench) - logs, logs_named(&bench) - named, "{what}");
        // Somebody may make all logs one meanwhile.
        disk.checkpoint().unwrap();
        assert_eq!(logs_named(&bench), usize::from(lazy), "{what}");
        assert_eq!(end(&disk, queue).dirty_blocks, 0);
        assert_eq!(disk.pending_blocks(), pending, "{what}");

        disk.begin_session(None).unwrap();
        assert!(disk.open_session().unwrap() > failed);
        let mut queue = disk.queue(8).unwrap();
        write(&disk, &mut queue, 8, &[0x77; 4096]);
        assert_eq!(end(&disk, queue).dirty_blocks, 1);
        bench.assert_restores_exactly(&disk);
        disk.stop().unwrap();
        drop(disk);
        let disk = bench.open();
        assert_eq!((disk.pending_blocks(), disk.session_is_open()), (0, false), "{what}");
    }
}

/// Who waits until the disk is pristine does not wait for ever.
#[test]
fn disk_is_still_pristine_after_a_session_without_a_log() {
    for what in DURABLE {
        let (bench, notes) = noted(false);
        let disk = bench.open();
        notes.fail(Some(what));
        disk.begin_session(None).unwrap();
        disk.end_session().unwrap();
        assert_eq!(status(&bench.options).unwrap().state, DiskState::Pristine, "{what}");
    }
}

/// What was begun to be restored before a session that has no log is not the last session's any more after it.
#[test]
fn session_without_a_log_does_not_make_the_one_before_whole_again() {
    let (bench, notes) = noted(false);
    let disk = bench.open();
    begin_and_end(&disk);
    let stop = AtomicBool::new(false);
    disk.drain(&stop, &mut |_| stop.store(true, Ordering::Release)).unwrap_err();
    notes.fail(Some(DURABLE[0]));
    disk.begin_session(None).unwrap();
    disk.end_session().unwrap();
    notes.fail(None);
    assert!(disk.pending_blocks() > 0);
    assert!(disk.hold(HoldReason::ByOperator).is_err());
}

/// It is nobody's to hold, for it has no log, and who ends it is heard.
#[test]
fn session_killed_while_it_begins_is_ended_and_not_held_by_the_operator() {
    let (bench, _notes) = noted(false);
    begin_and_end(&bench.open());
    let vm = Vm::start();
    let disk = bench.open();
    disk.begin_session(vm.id()).unwrap();
    drop(disk);
    let options = DiskOptions { resume: false, ..bench.options.clone() };
    assert!(set_hold_of_open_session(&options, Some(HoldReason::ByOperator)).is_err());
    assert!(left_open(&options).unwrap().is_some());
    open(&options).stop().unwrap();
    assert_eq!(left_open(&options).unwrap(), None);
    let disk = bench.open();
    assert!(!disk.session_is_open());
    bench.assert_restores_exactly(&disk);
}

/// The same, and the server stops: the session is nobody's, and no log of it is missed.
#[test]
fn server_stopped_in_a_session_without_a_log_leaves_a_pristine_disk() {
    for what in DURABLE {
        let (mut bench, notes) = noted(false);
        bench.options.resume = false;
        let disk = bench.open();
        notes.fail(Some(what));
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        assert!(try_write(&disk, &mut queue, 8, &[0x77; 4096]).is_err(), "{what}");
        notes.fail(None);
        drop(queue);
        disk.stop().unwrap();
        drop(disk);
        let disk = bench.open();
        assert_eq!((disk.pending_blocks(), disk.session_is_open()), (0, false), "{what}");
        bench.assert_restores_exactly(&disk);
    }
}

/// A full file system refuses the session, and leaves nothing of it.
#[test]
fn session_whose_log_has_no_room_does_not_begin() {
    for what in ["create log", "reserve log", "create manifest.new", "write manifest.new"] {
        let (bench, notes) = noted(false);
        let disk = bench.open();
        let before = logs_there(&bench);
        notes.fail(Some(what));
        let refused = disk.begin_session(None).unwrap_err().to_string();
        assert!(refused.contains("log") || refused.contains("manifest"), "{what}: {refused}");
        notes.fail(None);
        assert!(!disk.session_is_open());
        // What was only kept for audit may have given way.
        assert!(logs_there(&bench) <= before && logs_named(&bench) == 0, "{what}");
        assert!(!bench.options.paths().manifest().with_extension("new").exists(), "{what}");
        begin_and_end(&disk);
        bench.assert_restores_exactly(&disk);
    }
}

fn begin_and_end(disk: &Arc<SessionDisk>) {
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    write(disk, &mut queue, 8, &[0x77; 4096]);
    end(disk, queue);
}
