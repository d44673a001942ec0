//! The kernel's report of failed write-back: whoever takes it takes it from all who come later.
//!
//! The kernel tells of a failure once, to each open file description that there is, and to those that are opened before anybody was
//! told. So who is told notes it in the live page; and since he may be killed between the two, he notes before that he asks. Where
//! that was left, the file system is asked, which has a report of its own about all of its files.
//!
//! It tells once, too. Whoever is told leaves a record for all other disks that are on it, as long as the host runs: from then on
//! nobody can know whether what he asks for was among what was lost. (Not seen: other programs that are told, by `syncfs`; and who
//! is killed or stopped while he asks, after another one was killed while he was told.)

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use blockio::{File, in_full};
use rustix::fs::{FlockOperation, OFlags, major, minor};

use super::{LivePage, WORD_ASKING};
use crate::process::ProcessId;
use crate::shared::Shared;
use crate::storage::open_regular;

/// Syncs the disk by `sync` for one who does not serve it. Of a failure the live page, if there is one, tells from then on.
pub(crate) fn heed_sync(
    disk: &File,
    live: Option<&LivePage>,
    sync: impl FnOnce(&File) -> Result<(), blockio::Error>,
) -> Result<(), blockio::Error> {
    let Some(live) = live else { return sync(disk) };
    // A server that lives notes it yet.
    let was_left = live.is_asking() && !live.server().is_some_and(ProcessId::is_alive);
    if was_left && live.can_learn(disk) {
        live.learn(disk)?;
    }
    let _asking = live.asking();
    sync(disk).inspect_err(|error| {
        if error.io_error().kind() != io::ErrorKind::Interrupted {
            live.set_poisoned();
        }
    })
}

/// Who lives while this does takes the kernel's report, and notes it before.
#[derive(Debug)]
pub(crate) struct Asking<'live>(&'live LivePage);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.end_asking();
    }
}

impl LivePage {
    /// What is told by the kernel while this lives, of a failed write-back, is noted before it goes.
    pub(crate) fn asking(&self) -> Asking<'_> {
        self.begin_asking();
        Asking(self)
    }

    /// The same for an operation of an engine.
    pub(crate) fn begin_asking(&self) {
        self.word(WORD_ASKING).fetch_add(1, Ordering::SeqCst);
    }

    /// What the operation was told is noted.
    pub(crate) fn end_asking(&self) {
        // A server that has started meanwhile has set it back.
        let less = |asking: u64| asking.checked_sub(1);
        let _ = self.word(WORD_ASKING).fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// Whether somebody takes the report, or was killed meanwhile.
    pub(crate) fn is_asking(&self) -> bool {
        self.load(WORD_ASKING) != 0
    }

    /// Nobody but this server takes the report from now on. Whether it still has to be [learned](Report::learn) what one who was
    /// killed was told.
    pub(crate) fn ask_alone(&self, learns: bool) {
        self.word(WORD_ASKING).store(learns.into(), Ordering::SeqCst);
    }

    /// Whether what somebody was told who was killed can be learned of the file system of `disk`.
    pub(crate) fn can_learn(&self, disk: &File) -> bool {
        let tells = disk.file_system_tells();
        let what = match tells {
            true => "its file system is asked whether anything was lost",
            false => "if its storage failed then, nobody knows",
        };
        log::warn!("{}: a process was killed while it synced it; {what}", disk.path().display());
        tells
    }

    /// Asks the file system, which writes back all that it has. If anything of it was lost, so may this disk's be: the page says
    /// that write-back has failed.
    fn learn(&self, disk: &File) -> Result<(), blockio::Error> {
        let learned = self.record_of(disk).and_then(|path| ask(disk, &path));
        learned.inspect_err(|_| self.set_poisoned())
    }

    /// Where it is recorded that the file system has told of a loss.
    fn record_of(&self, disk: &File) -> Result<PathBuf, blockio::Error> {
        let name = match disk.device_of_file_system()? {
            Some(device) => format!("lost-{}-{}", major(device), minor(device)),
            None => "lost".to_owned(),
        };
        Ok(self.dir.join(name))
    }
}

/// Asks the file system of `disk`, if there is no `record` yet that it has told of a loss; makes one if it does.
fn ask(disk: &File, record: &Path) -> Result<(), blockio::Error> {
    // One at a time: what one is told is on record before the next one looks.
    let mut record = match open_record(record) {
        Ok((_, true)) => return Err(disk.may_be_lost()),
        Ok((record, false)) => Some(record),
        Err(error) => {
            log::warn!("{}: {error}; other disks are not told if their file system is", record.display());
            None
        }
    };
    disk.sync_file_system().inspect_err(|_| {
        if let Some(Err(error)) = record.as_mut().map(|record| record.write_all(b"1")) {
            log::warn!("other disks are not told that their file system has lost something: {error}");
        }
    })
}

/// Opens and locks the record, and reads whether it says something.
fn open_record(path: &Path) -> io::Result<(fs::File, bool)> {
    let mut options = fs::OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    let mut file = open_regular(&mut options, OFlags::NOFOLLOW, path)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))?;
    let says = Read::by_ref(&mut file).read(&mut [0])? > 0;
    Ok((file, says))
}

/// Whether it is known what somebody was told who was killed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    is_unknown: AtomicBool,
    /// Held by who changes that.
    changing: Mutex<()>,
    known: Condvar,
}

impl Report {
    #[inline]
    pub(crate) fn is_known(&self) -> bool {
        !self.is_unknown.load(Ordering::Acquire)
    }

    /// Waits until it is: then the disk is poisoned, or nothing was lost.
    #[inline]
    pub(crate) fn wait(&self) {
        if !self.is_known() {
            self.wait_long();
        }
    }

    #[cold]
    fn wait_long(&self) {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.known.wait_while(changing, |()| !self.is_known()).unwrap_or_else(PoisonError::into_inner));
    }

    /// Learns it, in a thread of its own: that takes as long as it takes to write back all that the host has for the file system.
    /// The live page [says](LivePage::ask_alone) that this goes on.
    pub(crate) fn learn(shared: &Arc<Shared>) {
        shared.report.is_unknown.store(true, Ordering::Release);
        let of_thread = Arc::clone(shared);
        let spawn = || thread::Builder::new().name("report".into()).spawn(move || learn_now(&of_thread));
        if shared.storage.has_tape() || spawn().is_err() {
            learn_now(shared);
        }
    }
}

fn learn_now(shared: &Shared) {
    if let Err(error) = shared.live.learn(&shared.disk) {
        log::error!("{}", in_full(&error));
        shared.poison();
    }
    shared.live.end_asking();
    let _changing = shared.report.changing.lock().unwrap_or_else(PoisonError::into_inner);
    shared.report.is_unknown.store(false, Ordering::Release);
    shared.report.known.notify_all();
}

#[cfg(test)]
mod tests {
    use blockio::GuestBuf;
    use blockio::fault::{Fault, FaultPlan, OpClass};
    use rustix::io::Errno;
    use uuid::Uuid;

    use super::*;
    use crate::{DiskOptions, FlushPolicy, Paths, ProvisionOptions, Request, SessionDisk, provision};

    impl LivePage {
        /// How many ask.
        fn asked(&self) -> u64 {
            self.load(WORD_ASKING)
        }
    }

    struct Page {
        dir: tempfile::TempDir,
        disk: File,
        _file: tempfile::NamedTempFile,
    }

    impl Page {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            let disk = File::open(file.path(), Default::default()).unwrap();
            Self { dir: tempfile::tempdir().unwrap(), disk, _file: file }
        }

        /// The live page of one of the disks.
        fn live(&self, id: u128) -> LivePage {
            let paths = Paths::new(Path::new("disk"), None, Some(self.dir.path()));
            let (live, _) = LivePage::open(&paths, Uuid::from_u128(id), 7).unwrap();
            live.take_over(Uuid::from_u128(id), 7).unwrap();
            live
        }
    }

    #[test]
    fn what_a_file_system_tells_one_disk_is_on_record_for_the_others() {
        let page = Page::new();
        let (one, other) = (page.live(1), page.live(2));
        one.learn(&page.disk).unwrap();
        let record = one.record_of(&page.disk).unwrap();
        assert_eq!(fs::read(&record).unwrap(), b"");
        // What `ask` writes if that fails.
        open_record(&record).unwrap().0.write_all(b"1").unwrap();
        for live in [one, other] {
            assert!(!live.is_poisoned());
            live.learn(&page.disk).unwrap_err();
            assert!(live.is_poisoned());
        }
        // A record that is none is no reason to believe less.
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        page.live(3).learn(&page.disk).unwrap();
    }

    #[test]
    fn end_of_an_asker_that_nobody_counts_any_more_counts_nothing() {
        let live = Page::new().live(1);
        live.begin_asking();
        live.begin_asking();
        live.ask_alone(false);
        live.end_asking();
        assert_eq!(live.asked(), 0);
        live.ask_alone(true);
        drop(live.asking());
        assert_eq!(live.asked(), 1);
    }

    #[test]
    fn who_does_not_serve_the_disk_asks_in_the_same_way() {
        let page = Page::new();
        let live = page.live(1);
        live.set_server(None);
        heed_sync(&page.disk, Some(&live), |_| {
            assert_eq!(live.asked(), 1);
            Ok(())
        })
        .unwrap();
        assert_eq!((live.asked(), live.is_poisoned()), (0, false));
        // One was killed, and the file system has told of a loss.
        live.begin_asking();
        open_record(&live.record_of(&page.disk).unwrap()).unwrap().0.write_all(b"1").unwrap();
        heed_sync(&page.disk, Some(&live), |_| panic!("it is known already")).unwrap_err();
        assert_eq!((live.asked(), live.is_poisoned()), (1, true));
    }

    /// A disk with a session that has written its first block, which was pending, and no drain.
    struct Session {
        options: DiskOptions,
        plan: Arc<FaultPlan>,
        dir: tempfile::TempDir,
    }

    impl Session {
        fn begin() -> (Self, Arc<SessionDisk>) {
            let dir = tempfile::tempdir().unwrap();
            let (base, disk) = (dir.path().join("base.raw"), dir.path().join("disk.raw"));
            fs::write(&base, [1; 8192]).unwrap();
            let plan = FaultPlan::new();
            let options = DiskOptions {
                runtime_dir: Some(dir.path().join("run")),
                faults: Some(plan.clone()),
                flush: FlushPolicy::Always,
                resume: true,
                ..DiskOptions::new(disk)
            };
            provision(&ProvisionOptions::new(base, options.clone())).unwrap();
            let disk = SessionDisk::open(&options).unwrap();
            disk.begin_session(Some(ProcessId::own())).unwrap();
            let session = Self { options, plan, dir };
            assert!(session.is_done(&disk, |range| {
                Request::Write { range, buf: GuestBuf::zeroed(4096), durable: false }
            }));
            (session, disk)
        }

        /// Whether a request for the first block succeeds.
        fn is_done(&self, disk: &Arc<SessionDisk>, request: impl Fn(blocks::BlockRange) -> Request) -> bool {
            let (mut queue, mut done) = (disk.queue(4).unwrap(), Vec::new());
            queue.push(0, request(disk.geometry().sectors_at(0, 4096).unwrap()));
            queue.quiesce(&mut done);
            done.pop().unwrap().result.is_ok()
        }

        fn reads(&self, disk: &Arc<SessionDisk>) -> bool {
            self.is_done(disk, |range| Request::Read { range, buf: GuestBuf::zeroed(4096) })
        }

        /// Serves it again after one that was killed while it asked; the session goes on.
        fn again(&self, disk: Arc<SessionDisk>) -> Arc<SessionDisk> {
            disk.shared().live.begin_asking();
            drop(disk);
            let disk = SessionDisk::open(&self.options).unwrap();
            assert!(disk.session_is_open());
            disk
        }
    }

    /// From before the kernel is asked until it is noted what it says.
    #[test]
    fn guests_flush_says_that_it_asks_until_what_it_was_told_is_noted() {
        let (session, disk) = Session::begin();
        let (mut queue, mut done) = (disk.queue(4).unwrap(), Vec::new());
        let live = &disk.shared().live;
        for (fault, is_lost) in
            [(Fault::HoldAfter, false), (Fault::FailAfter(Errno::IO.raw_os_error()), true)]
        {
            session.plan.on_every(OpClass::SyncData, fault);
            assert_eq!(live.asked(), 0);
            queue.push(0, Request::Flush);
            queue.submit();
            assert_eq!((live.asked(), live.is_poisoned()), (1, false));
            session.plan.clear();
            session.plan.release_all();
            queue.quiesce(&mut done);
            assert_eq!(done.pop().unwrap().result.is_err(), is_lost);
            assert_eq!((live.asked(), live.is_poisoned()), (0, is_lost));
        }
    }

    #[test]
    fn read_of_zeroes_says_that_it_asks() {
        let (session, disk) = Session::begin();
        let shared = disk.shared();
        shared.note_zeroed(blocks::Extent::new(0, 1));
        session.plan.on_every(OpClass::SyncData, Fault::HoldAfter);
        let (mut queue, mut done) = (disk.queue(4).unwrap(), Vec::new());
        let range = disk.geometry().sectors_at(0, 4096).unwrap();
        queue.push(0, Request::Read { range, buf: GuestBuf::zeroed(4096) });
        queue.submit();
        while session.plan.held() == 0 {
            queue.reap(&mut done);
        }
        assert_eq!(shared.live.asked(), 1);
        session.plan.clear();
        session.plan.release_all();
        queue.quiesce(&mut done);
        assert!(done.pop().unwrap().result.is_ok());
        assert_eq!(shared.live.asked(), 0);
    }

    /// Nothing of what the session wrote is read, synced or flushed before it is known whether it was lost, and nothing after it is.
    #[test]
    fn session_waits_until_it_is_known_what_one_who_was_killed_was_told() {
        for is_lost in [false, true] {
            let (session, disk) = Session::begin();
            assert!(session.reads(&disk));
            let record = disk.shared().live.record_of(&disk.shared().disk).unwrap();
            // While it is locked nobody is told anything.
            let (mut locked, _) = open_record(&record).unwrap();
            let disk = session.again(disk);
            let report = &disk.shared().report;
            assert!(!report.is_known() && disk.shared().live.asked() == 1);
            let outcome = |done: bool| {
                assert!(report.is_known(), "it did not wait");
                done
            };
            thread::scope(|scope| {
                let waiting = [
                    scope.spawn(|| outcome(session.reads(&disk))),
                    scope.spawn(|| outcome(session.is_done(&disk, |_| Request::Flush))),
                    scope.spawn(|| outcome(disk.shared().sync_disk().is_ok())),
                ];
                if is_lost {
                    locked.write_all(b"1").unwrap();
                }
                drop(locked);
                for thread in waiting {
                    assert_eq!(thread.join().unwrap(), !is_lost);
                }
            });
            assert_eq!((disk.shared().live.asked(), disk.shared().live.is_poisoned()), (0, is_lost));
            assert!(session.dir.path().exists());
        }
    }

    /// A server that stops before it knows leaves it to the next one.
    #[test]
    fn session_whose_server_stops_before_it_knows_goes_on_and_is_asked_about_again() {
        let (session, disk) = Session::begin();
        let record = disk.shared().live.record_of(&disk.shared().disk).unwrap();
        let (locked, _) = open_record(&record).unwrap();
        let disk = session.again(disk);
        assert!(disk.stop().unwrap().is_some());
        assert!(disk.shared().live.is_asking());
        drop(locked);
        disk.shared().report.wait();
    }

    /// Where nothing but what is restored anyway was written, nobody asks.
    #[test]
    fn disk_without_a_session_asks_nobody() {
        let (session, disk) = Session::begin();
        disk.end_session().unwrap();
        let record = disk.shared().live.record_of(&disk.shared().disk).unwrap();
        let _locked = open_record(&record).unwrap();
        disk.drain(&Default::default(), &mut |_| ()).unwrap();
        disk.shared().live.begin_asking();
        drop(disk);
        let disk = SessionDisk::open(&session.options).unwrap();
        assert!(disk.shared().report.is_known() && !disk.shared().live.is_asking());
    }
}
