//! Fault injection by schedule: every I/O of a scenario fails once, in turn, before it is made or after
//! it was: reads, writes, zeroing and syncs of disk and base, and each step of making, writing, syncing,
//! renaming and removing manifest, intents and logs (invariants 2, 3, 4 and 6).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockio::EngineKind;
use common::image::{Expected, Image};
use common::schedule::{Schedule, When};
use common::{fast_dir, run};
use session_disk::{
    DiskOptions, DiskQueue, DiskState, Error, FlushPolicy, ProvisionOptions, Request, SessionDisk, provision,
    status,
};

const BASE_SIZE: u64 = (1 << 20) - 2560;
const DISK_SIZE: u64 = (1 << 20) + 512;
const WINDOWS: [Range<u64>; 3] = [0..24, 100..124, 250..257];
const KEEP_LOGS: usize = 2;

/// Longer than this no I/O waits for anything.
const HANG: Duration = Duration::from_secs(60);

/// The disk of a scenario and who serves it. A step that fails is done again, after a restart if need be.
struct Server<'a> {
    options: DiskOptions,
    base: &'a Image,
    disk: Arc<SessionDisk>,
    stamp: u8,
}

/// Does what may fail once.
fn twice<T>(mut attempt: impl FnMut() -> Result<T, Error>) -> T {
    attempt().or_else(|_| attempt()).unwrap()
}

impl<'a> Server<'a> {
    fn start(options: DiskOptions, base: &'a Image) -> Self {
        let disk = twice(|| SessionDisk::open(&options));
        Self { options, base, disk, stamp: 0x80 }
    }

    /// As after a kill, but that I/O in flight has landed.
    fn restart(self) -> Self {
        let Self { options, base, disk, stamp } = self;
        drop(disk);
        Self { stamp, ..Self::start(options, base) }
    }

    /// As after a power cut of which the disk has lost nothing.
    fn restart_without_live_page(self) -> Self {
        std::fs::remove_dir_all(self.options.runtime_dir.as_ref().unwrap()).unwrap();
        self.restart()
    }

    fn stop(mut self) -> Self {
        if self.disk.stop().is_err() {
            // Poisoned, or its log could not be sealed: what is left of it speaks for itself.
            self = self.restart();
            self.disk.stop().unwrap();
        }
        self.restart()
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.stamp = self.stamp.wrapping_add(1) | 0x80;
        vec![self.stamp; len]
    }

    /// Opens a session. A poisoned disk takes none before it is opened again.
    fn begin(self) -> Self {
        let server = match self.disk.begin_session(None).or_else(|_| self.disk.begin_session(None)) {
            Ok(_) => return self,
            Err(Error::Poisoned(_)) => self.restart(),
            Err(error) => panic!("{error}"),
        };
        server.disk.begin_session(None).unwrap();
        server
    }

    /// A session of all kinds of requests on two queues. It is still open when this returns.
    fn session(self) -> (Self, Vec<DiskQueue>) {
        let mut server = self.begin();
        let queues = server.requests();
        (server, queues)
    }

    fn requests(&mut self) -> Vec<DiskQueue> {
        let mut queues: Vec<DiskQueue> = (0..2).map(|_| self.disk.queue(8).unwrap()).collect();
        let mut expected = Expected::of_base(self.base);
        let disk = Arc::clone(&self.disk);
        for (queue, sector, len) in
            [(0, 3, 1024), (1, 64, 40 * 512), (0, 805, 512), (1, 64, 4096), (0, 2046, 1536)]
        {
            let bytes = self.bytes(len);
            expected.write(&disk, &mut queues[queue], sector, &bytes);
        }
        expected.zero(&disk, &mut queues[1], 100, 44 * 512);
        let bytes = self.bytes(4096);
        expected.write(&disk, &mut queues[0], 120, &bytes);
        // Blocks 8 to 17 are the session's, those after them are not.
        expected.discard(&disk, &mut queues[1], 64, 16 * 4096, |block| block < 18);
        let _ = run(&mut queues[0], Request::Flush);
        for window in &WINDOWS {
            expected.read(&disk, &mut queues[0], window.clone());
        }
        queues
    }

    /// A session from its start to its end.
    fn whole_session(self) -> Self {
        let (server, queues) = self.session();
        drop(queues);
        server.disk.end_session().unwrap();
        server
    }

    /// A session that has no end.
    fn cut_session(self) -> Self {
        let (server, queues) = self.session();
        drop(queues);
        server
    }

    /// Drains; a failure leaves blocks pending, and poison is got rid of by a restart.
    fn drain(self) -> Self {
        let stop = AtomicBool::new(false);
        if self.disk.drain(&stop, &mut |_| ()).is_ok() {
            return self;
        }
        if let Ok(_restored) = self.disk.drain(&stop, &mut |_| ()) {
            return self;
        }
        let server = self.restart();
        server.disk.drain(&stop, &mut |_| ()).unwrap();
        server
    }
}

/// Everything that a disk's life has, once. Returns what I/O there was.
fn scenario(dir: &Path, base: &Image, engine: EngineKind, schedule: &Arc<Schedule>) {
    let options = DiskOptions {
        runtime_dir: Some(dir.join("run")),
        engine: Some(engine),
        flush: FlushPolicy::Always,
        keep_logs: KEEP_LOGS,
        tape: Some(schedule.clone()),
        ..DiskOptions::new(dir.join("disk.raw"))
    };
    let mut wanted = ProvisionOptions {
        size: Some(DISK_SIZE),
        ..ProvisionOptions::new(dir.join("base.raw"), options.clone())
    };
    if provision(&wanted).is_err() {
        assert!(!options.disk.exists(), "a provision that failed leaves nothing");
        assert!(!options.paths().state_dir().exists(), "a provision that failed leaves nothing");
        provision(&wanted).unwrap();
    }
    let expected = Image { size: DISK_SIZE, ..base.clone() };
    let mut server = Server::start(options.clone(), &expected).whole_session().drain().whole_session();
    let queues;
    (server, queues) = server.session();
    // May fail: the old logs then stay.
    let _ = server.disk.checkpoint();
    drop(queues);
    server.disk.end_session().unwrap();
    server = server.stop().cut_session().restart().cut_session();
    server = server.restart_without_live_page().cut_session().stop().drain().cut_session();
    drop(server);
    // Taking it over again, with a log left; the host went down, so that the open session is over.
    std::fs::remove_dir_all(options.runtime_dir.as_ref().unwrap()).unwrap();
    wanted.adopt = true;
    if provision(&wanted).is_err() {
        provision(&wanted).unwrap();
    }
    server = Server::start(options.clone(), &expected).whole_session().drain();
    schedule.switch_off();
    server = server.restart().drain();
    assert_eq!(expected.differences(&options.disk), Vec::<u64>::new(), "a drained disk equals its base");
    assert_eq!(status(&options).unwrap().state, DiskState::Pristine);
    server.disk.stop().unwrap();
    drop(server);
    assert_eq!(status(&options).unwrap().state, DiskState::Pristine);
    assert_nothing_is_half_made(&options);
}

/// The state has its files and no others, and no more logs than are to be kept.
fn assert_nothing_is_half_made(options: &DiskOptions) {
    let names = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(options.paths().state_dir()), ["intents", "manifest", "sessions"]);
    let logs = names(&options.paths().sessions());
    assert!(logs.len() <= KEEP_LOGS, "{logs:?}");
    for log in logs {
        write_log::read(&options.paths().sessions().join(log)).unwrap();
    }
}

/// Runs the scenario with a fault in a thread of its own, to notice when it hangs.
fn run_scenario(base: &Arc<Image>, engine: EngineKind, fault: Option<(u64, When)>) -> Vec<String> {
    let schedule = Schedule::new(fault);
    let (done, finished) = channel::<()>();
    let failure: Arc<Mutex<Option<Box<dyn std::any::Any + Send>>>> = Arc::default();
    let thread = std::thread::spawn({
        let (base, schedule, failure) = (Arc::clone(base), Arc::clone(&schedule), Arc::clone(&failure));
        move || {
            let dir = fast_dir();
            base.write_into(&std::fs::File::create(dir.path().join("base.raw")).unwrap());
            let whole = std::panic::AssertUnwindSafe(|| scenario(dir.path(), &base, engine, &schedule));
            if let Err(error) = std::panic::catch_unwind(whole) {
                *failure.lock().unwrap() = Some(error);
            }
            drop(done);
        }
    });
    let hung = finished.recv_timeout(HANG) == Err(RecvTimeoutError::Timeout);
    let list = schedule.list();
    let what = |number: u64| list.get(number as usize).cloned().unwrap_or_default();
    let name =
        fault.map(|(number, when)| format!("I/O {number} ({}) fails, {when:?}, {engine:?}", what(number)));
    let name = name.unwrap_or_else(|| format!("no fault, {engine:?}"));
    if hung {
        eprintln!("HANG: {name}");
        std::process::abort();
    }
    thread.join().unwrap();
    if let Some(error) = failure.lock().unwrap().take() {
        eprintln!("{name}");
        std::panic::resume_unwind(error);
    }
    list
}

fn every_io_fails_once(engine: EngineKind) {
    let base = Arc::new(Image::patterned(BASE_SIZE, &WINDOWS));
    let all = run_scenario(&base, engine, None);
    let mut runs = 0;
    for (number, io) in (0..).zip(&all) {
        // Nothing that makes a name says that it failed when it has made it.
        let makes_a_name = io.starts_with("Create");
        let times = if makes_a_name { &[When::Before][..] } else { &[When::Before, When::After] };
        for when in times {
            run_scenario(&base, engine, Some((number, *when)));
            runs += 1;
        }
    }
    eprintln!("{engine:?}: {} I/Os failed, before or after they were made, in {runs} runs", all.len());
}

/// Invariants 2, 3, 4 and 6.
#[test]
fn any_io_that_fails_leaks_and_loses_nothing() {
    every_io_fails_once(EngineKind::Sync);
}

/// Invariants 2, 3, 4 and 6, with I/O that completes in any order.
#[test]
fn any_io_that_fails_on_io_uring_leaks_and_loses_nothing() {
    every_io_fails_once(EngineKind::IoUring);
}
