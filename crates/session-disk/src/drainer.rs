//! The drain in the background of a server: a thread that works whenever something is pending.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use blockio::in_full;

use crate::drain::Drain;
use crate::progress::Progress;
use crate::shared::Shared;
use crate::{CopyCounts, Error, SessionDisk};

/// How long the drain waits before it begins: who was waiting for the last session's end begins his own first.
const GRACE: Duration = Duration::from_millis(20);

/// How often to look whether it is known [what was lost](crate::live::Report).
const REPORT_POLL: Duration = Duration::from_millis(100);

/// First and longest pause after a failed attempt.
const BACK_OFF_MIN: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// What guests have taken costs them more to read until it is durable. Where no batch makes it so, it is made so this often.
const UNSYNCED_MAX: Duration = Duration::from_secs(5);

/// Logs of earlier sessions that may be left when restoring fails, before they are made one.
const OLD_LOGS_MAX: usize = 8;

/// Told when a disk has become pristine, or at least everything that was pending is restored.
pub trait DrainObserver: Send + Sync {
    /// `blocks` were restored since the drain had something to do, in `duration`; `how` counts those that were restored and
    /// taken by a guest as well.
    fn restored(&self, blocks: u64, how: CopyCounts, duration: Duration);
}

/// The background drain of a disk; stops when dropped.
#[derive(Debug)]
pub struct Drainer {
    disk: Arc<SessionDisk>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// Why restoring failed, and when it is tried again.
#[derive(Clone, Debug)]
pub struct DrainTrouble {
    /// The error and its sources, in one line.
    pub error: String,
    /// When the next attempt begins.
    pub next_attempt: SystemTime,
}

#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    trouble: Mutex<Option<DrainTrouble>>,
    /// Whether there may be work.
    work: Mutex<bool>,
    changed: Condvar,
}

impl Control {
    /// Waits until there is work, `timeout` is over, or the drain is to stop; whether to go on.
    fn wait(&self, timeout: Option<Duration>) -> bool {
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |work: &mut bool| !*work && !self.stop.load(Ordering::Acquire);
        let mut work = match timeout {
            None => self.changed.wait_while(work, idle).unwrap_or_else(PoisonError::into_inner),
            Some(t) => {
                self.changed.wait_timeout_while(work, t, idle).unwrap_or_else(PoisonError::into_inner).0
            }
        };
        *work = false;
        !self.stop.load(Ordering::Acquire)
    }

    /// Waits for `time`, unless the drain is to stop before.
    fn pause(&self, time: Duration) {
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let go_on = |_: &mut bool| !self.stop.load(Ordering::Acquire);
        drop(self.changed.wait_timeout_while(work, time, go_on).unwrap_or_else(PoisonError::into_inner));
    }

    fn trouble(&self) -> MutexGuard<'_, Option<DrainTrouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drainer {
    /// Starts the thread. It begins at once if something is pending.
    pub fn start(disk: Arc<SessionDisk>, observer: Arc<dyn DrainObserver>) -> Result<Self, Error> {
        let control = Arc::new(Control { work: Mutex::new(true), ..Control::default() });
        let (of_thread, for_thread) = (Arc::clone(&disk), Arc::clone(&control));
        let thread = std::thread::Builder::new()
            .name("drain".into())
            .spawn(move || run(&of_thread, &for_thread, observer.as_ref()))
            .map_err(|error| Error::state("start a drain thread for", disk.paths().disk(), error))?;
        Ok(Self { disk, control, thread: Some(thread) })
    }

    /// What made the last attempt fail, if it failed.
    pub fn trouble(&self) -> Option<DrainTrouble> {
        self.control.trouble().clone()
    }

    /// Says that something may be pending: call it after a session's end, a hold and a release.
    pub fn wake(&self) {
        *self.control.work.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.control.changed.notify_all();
    }

    /// Stops the drain; what it had not restored stays pending. Reads of guests that wait for the base's server fail.
    pub fn stop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // It may be waiting for a server that is away.
            self.disk.shared().base.set_hurry(true);
            if thread.join().is_err() {
                log::error!("the drain thread panicked");
            }
            self.disk.shared().base.set_hurry(false);
        }
    }
}

impl Drop for Drainer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(disk: &SessionDisk, control: &Control, observer: &dyn DrainObserver) {
    // At normal priority: a thread that is starved while it has claims would starve the guests that wait for
    // them. It is the pace that keeps it out of their way.
    let mut back_off: Option<Duration> = None;
    // What it has to sync is not known to be there, and who waits for that in a sync can't be told to stop.
    while !disk.shared().report.is_known() && !control.stop.load(Ordering::Acquire) {
        control.pause(REPORT_POLL);
    }
    while control.wait(back_off) {
        match drain_all(disk, control, observer) {
            Ok(()) => {
                back_off = None;
                *control.trouble() = None;
                disk.shared().live.set_drain_failing(false);
                if !disk.session_is_open() {
                    // What the last session read is no use to an idle disk. The next one is not to wait for that.
                    disk.shared().disk.forget_resident(|| !disk.session_is_open());
                }
            }
            Err(Error::Stopped) => {}
            Err(error) => {
                let pause = back_off.map_or(BACK_OFF_MIN, |last| (last * 2).min(BACK_OFF_MAX));
                let error = in_full(&error);
                log::warn!(
                    "{}: restoring failed, {} blocks stay pending, next attempt in {} s: {}",
                    disk.paths().disk().display(),
                    disk.pending_blocks(),
                    pause.as_secs(),
                    error
                );
                *control.trouble() = Some(DrainTrouble { error, next_attempt: SystemTime::now() + pause });
                disk.shared().live.set_drain_failing(true);
                if let Err(error) = sync_taken(disk.shared()) {
                    log::warn!("{}", in_full(&error));
                }
                // Sessions go on; their logs must not pile up.
                if disk.old_logs() > OLD_LOGS_MAX
                    && let Err(error) = disk.checkpoint_unless_held()
                {
                    log::warn!("{}: {}", disk.paths().disk().display(), in_full(&error));
                }
                back_off = Some(pause);
            }
        }
    }
}

fn drain_all(disk: &SessionDisk, control: &Control, observer: &dyn DrainObserver) -> Result<(), Error> {
    let started = Instant::now();
    let copied_before = disk.copied();
    let shared = disk.shared();
    if shared.claims.drain_rests() {
        return shared.sync_disk();
    }
    if disk.keeps_changes() && shared.pending.is_empty() {
        // Nothing is to be restored; what sessions have written is to outlast the host.
        shared.sync_disk()?;
        // Logs that name nothing are retired: then the disk is pristine.
        let old_logs_max = if disk.kept_blocks() == 0 { 0 } else { OLD_LOGS_MAX };
        return if disk.old_logs() > old_logs_max { disk.checkpoint() } else { Ok(()) };
    }
    let mut done = Progress::new();
    if !shared.pending.is_empty() {
        control.pause(GRACE);
        let drained = drain_batches(disk, control, &mut done).inspect_err(|_| done.keep(disk))?;
        if drained == Drained::Rests {
            // What is kept is to survive a power cut.
            return shared.sync_disk();
        }
    }
    // Guests may have taken what was left. Nothing more can be taken, and then it is read like everything else.
    sync_taken(shared)?;
    if disk.has_old_logs() {
        disk.checkpoint_unless_held()?;
        observer.restored(done.restored(), disk.copied() - copied_before, started.elapsed());
    }
    Ok(())
}

/// Why there is nothing more to restore now.
#[derive(PartialEq, Eq)]
enum Drained {
    /// Nothing is pending.
    All,
    /// The disk is held.
    Rests,
}

fn drain_batches(disk: &SessionDisk, control: &Control, done: &mut Progress) -> Result<Drained, Error> {
    let shared = disk.shared();
    // Made anew each time: between sessions an idle disk keeps no ring and no buffers for it.
    let mut drain = Drain::new(Arc::clone(shared))?;
    let mut synced = Instant::now();
    while !shared.pending.is_empty() {
        if shared.claims.drain_rests() {
            return Ok(Drained::Rests);
        }
        let batch = drain.batch(&control.stop, &|| disk.guests(), &mut |_| ());
        done.add(drain.take_restored());
        let batch = drain.judge(batch, true)?;
        if batch.restored > 0 {
            synced = Instant::now();
        } else if synced.elapsed() > UNSYNCED_MAX {
            sync_taken(shared)?;
            synced = Instant::now();
        }
        // A drain that is to be slow, or to wait, may see many sessions.
        if done.is_worth_a_checkpoint() {
            done.keep(disk);
        } else if disk.old_logs() > OLD_LOGS_MAX {
            done.checkpoint(disk)?;
        }
        if let Some(time) = batch.wait {
            // A session's end may come before.
            control.wait(Some(time));
        } else if batch.blocked && batch.restored == 0 {
            drain.wait_for_a_release()?;
        }
    }
    Ok(Drained::All)
}

/// Makes durable what guests took, if anything may not be, and can be.
fn sync_taken(shared: &Shared) -> Result<(), Error> {
    if shared.unsynced.is_empty() || shared.is_poisoned() { Ok(()) } else { shared.sync_disk() }
}
