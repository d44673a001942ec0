//! `pristine serve`: one disk, one VM after the other.

use std::fmt;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use control::ControlServer;
use indicatif::BinaryBytes;
use session_disk::{
    CopyCounts, DrainObserver, DrainTrouble, Drainer, Error, ProcessId, SessionDisk, SessionStart,
    SessionSummary,
};
use vhost_blk::{
    Cpus, DeviceConfig, EndReason, Exit, HandOver, Observer, Server, ServerConfig, Socket, SocketPermissions,
    StopHandle,
};

use crate::affinity;
use crate::args::{ResetOn, ServeArgs};
use crate::commands::{amount, seconds, warn_of_intents};
use crate::control_socket::Operator;
use crate::copies::by_way;
use crate::failure::Failure;
use crate::notify;
use crate::progress::Progress;
use crate::signals::{StopOnSignal, raise_limit_of_files};

/// What QEMU's conventions for vhost-user backend programs ask of `--print-capabilities`.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

pub(crate) fn serve(args: &ServeArgs) -> Result<ExitCode, Failure> {
    if args.print_capabilities {
        say!("{CAPABILITIES}");
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = &args.disk else { return Err(Failure::usage("--disk is missing")) };
    // Before any number of a descriptor is used for something else.
    let handover = notify::kept();
    raise_limit_of_files();
    let queue_cpus = affinity::of_queues(args.num_queues, args.cpus.as_ref(), args.queue_affinity.as_ref())?;
    // A path that can't be bound must change nothing, and a disk that can't be opened must turn nobody
    // away: Cloud Hypervisor gives up a disk whose server accepts and then ends.
    let place = Place::find(args)?;
    // From here to the end, for there is always work that is to be left in order.
    let stop = Arc::new(AtomicBool::new(false));
    let server: Arc<OnceLock<StopHandle>> = Arc::default();
    let to_stop = Arc::clone(&server);
    let _signals = StopOnSignal::start(Arc::clone(&stop), move || {
        to_stop.get().into_iter().for_each(StopHandle::stop);
    })?;
    let disk = SessionDisk::open(&args.options(path))?;
    // What is left is noted then.
    let given_up = |_: &Failure| _ = disk.stop();
    if args.reset_on == ResetOn::Never {
        restore_first(&disk, &stop).inspect_err(given_up)?;
    }
    let served = if stop.load(Ordering::Acquire) {
        Served { exit: Exit::Stopped, handover }
    } else {
        serve_vms(args, &disk, place, queue_cpus, (&stop, &server), handover).inspect_err(given_up)?
    };
    let held = disk.turns_away();
    if served.exit == Exit::SessionEnded && held.is_none() {
        // `--once`: pristine, or as its policy has it.
        drain_before(&disk, &stop).inspect_err(given_up)?;
    }
    notify::notify("STOPPING=1");
    conclude(&disk, served, held)
}

/// What came of serving.
struct Served {
    exit: Exit,
    /// The frontend that is still connected.
    handover: Option<HandOver>,
}

/// Serves VMs until the server is to stop; `place` is bound when all else is ready.
fn serve_vms(
    args: &ServeArgs,
    disk: &Arc<SessionDisk>,
    place: Place<'_>,
    queue_cpus: Vec<Option<Cpus>>,
    (stop, to_stop): (&AtomicBool, &OnceLock<StopHandle>),
    handover: Option<HandOver>,
) -> Result<Served, Failure> {
    let name = place.to_string();
    let socket = place.take(args)?;
    warn_of_intents(disk.basis(), disk.keeps_changes());
    let reporter = Arc::new(Reporter::new(Arc::clone(disk)));
    let mut server = Server::new(
        Arc::clone(disk),
        socket,
        config(args, queue_cpus),
        Arc::clone(&reporter) as Arc<dyn Observer>,
    )
    .map_err(|error| Failure::of(&error))?;
    let handle = to_stop.get_or_init(|| server.stop_handle());
    if stop.load(Ordering::Acquire) {
        // The signal came before there was anything to stop.
        handle.stop();
    }
    let operator = Operator::new(Arc::clone(disk), Arc::clone(&reporter), handle.clone());
    let control = ControlServer::start(&disk.paths().control(disk.id()), Arc::new(operator))
        .map_err(|error| Failure::of(&error))?;
    reporter.set_drainer(Some(Drainer::start(Arc::clone(disk), Arc::new(DrainReporter))?));
    let path = disk.paths().disk().display();
    announce!("pristine: listening on {name}, disk {path}, base {}", disk.base_path().display());
    if disk.session_is_open() {
        let of =
            disk.session_owner().map_or_else(String::new, |owner| format!(" of VM process {}", owner.pid));
        announce!("pristine: an open session{of} goes on: {} are its own", amount(disk.dirty_blocks()));
    }
    if let Some(why) = disk.turns_away() {
        announce!("pristine: {why}");
    } else if disk.pending_blocks() > 0 {
        announce!("pristine: restoring {} in the background", amount(disk.pending_blocks()));
    }
    notify::notify("READY=1");
    if let Some(handover) = handover {
        server.take_over(handover);
    }
    let result = server.run();
    let handover = server.hand_over();
    drop(server);
    reporter.close();
    drop(control);
    reporter.set_drainer(None);
    Ok(Served { exit: result.map_err(|error| Failure::of(&error))?, handover })
}

/// Gives the disk up, and says how it is left.
fn conclude(disk: &SessionDisk, served: Served, held: Option<Error>) -> Result<ExitCode, Failure> {
    let (dirty, pending) = (disk.dirty_blocks(), disk.pending_blocks());
    let changed = disk.kept_blocks() + dirty;
    // With --once the disk was to be pristine by now.
    let if_not_pristine =
        if served.exit == Exit::SessionEnded { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if let Some(session) = disk.stop()? {
        if let Some(Err(error)) = served.handover.map(notify::keep) {
            log::warn!("the VM has to connect again, the service manager can't keep its connection: {error}");
        }
        announce!(
            "pristine: stopped; session {session} goes on when the disk is served again while its VM runs"
        );
    } else if let Some(why) = held {
        announce!("pristine: stopped; {why}");
        return Ok(if_not_pristine);
    } else if disk.keeps_changes() && changed > 0 {
        announce!("pristine: stopped; {} changed and kept", amount(disk.kept_blocks()));
    } else if dirty + pending > 0 {
        announce!(
            "pristine: stopped; {} left for the next start or `pristine restore`",
            amount(dirty + pending)
        );
        return Ok(if_not_pristine);
    } else {
        announce!("pristine: stopped; the disk is pristine");
    }
    Ok(ExitCode::SUCCESS)
}

/// Restores what is pending, before changes are kept, unless that is stopped. What is held, or of a session that goes on, waits.
fn restore_first(disk: &SessionDisk, stop: &AtomicBool) -> Result<(), Failure> {
    if disk.pending_blocks() == 0 || disk.session_is_open() || disk.turns_away().is_some() {
        return Ok(());
    }
    drain_before(disk, stop)
}

/// Where frontends are to connect.
enum Place<'a> {
    Path(&'a Path),
    Inherited(RawFd, Socket),
}

impl<'a> Place<'a> {
    /// Changes nothing.
    fn find(args: &'a ServeArgs) -> Result<Self, Failure> {
        if let Some(fd) = args.fd {
            return Ok(Self::Inherited(fd, Socket::inherit(fd).map_err(|error| Failure::of(&error))?));
        }
        let path: &Path =
            args.socket_path.as_deref().ok_or_else(|| Failure::usage("--socket-path is missing"))?;
        Socket::check(path).map_err(|error| Failure::of(&error))?;
        Ok(Self::Path(path))
    }

    /// From now on frontends can connect.
    fn take(self, args: &ServeArgs) -> Result<Socket, Failure> {
        match self {
            Self::Inherited(_, socket) => Ok(socket),
            Self::Path(path) => {
                let permissions = SocketPermissions {
                    mode: Some(args.socket_mode.unwrap_or(0o600)),
                    owner: args.socket_owner,
                    group: args.socket_group,
                };
                Socket::bind(path, permissions).map_err(|error| Failure::of(&error))
            }
        }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Inherited(fd, _) => write!(f, "descriptor {fd}"),
        }
    }
}

fn config(args: &ServeArgs, queue_cpus: Vec<Option<Cpus>>) -> ServerConfig {
    ServerConfig {
        device: DeviceConfig {
            num_queues: args.num_queues,
            queue_size: args.queue_size,
            read_only: args.read_only,
            polling: args.poll_max_us,
            queue_cpus,
        },
        reconnect_grace: Duration::from_secs(args.reconnect_grace.into()),
        once: args.once,
        hand_over: notify::descriptors_kept_max() > 0,
    }
}

/// Restores all before the program goes on, or as much as there is time for until it is to stop.
fn drain_before(disk: &SessionDisk, stop: &AtomicBool) -> Result<(), Failure> {
    let pending = disk.pending_blocks();
    let mut progress = Progress::new("restoring", pending * blocks::BLOCK_SIZE);
    let mut patience = notify::Patience::new();
    let result = disk.drain(stop, &mut |left| {
        progress.set((pending - left.min(pending)) * blocks::BLOCK_SIZE);
        patience.ask();
    });
    match result {
        Err(Error::Stopped) => Ok(()),
        result => Ok(result.map(|_| ())?),
    }
}

/// Prints sessions' starts and ends, sends the drain to work, and lets others wait for a session's end.
pub(crate) struct Reporter {
    disk: Arc<SessionDisk>,
    drainer: Mutex<Option<Drainer>>,
    last: Mutex<Last>,
    changed: Condvar,
}

#[derive(Default)]
struct Last {
    ended: Option<Ended>,
    /// No session will end any more.
    closed: bool,
}

/// A session that has ended.
#[derive(Clone)]
pub(crate) struct Ended {
    pub(crate) summary: SessionSummary,
    pub(crate) reason: EndReason,
    /// Blocks that were pending then.
    pub(crate) pending: u64,
}

/// What came of waiting for a session's end.
pub(crate) enum Waited {
    Ended(Ended),
    /// It is over that an end can be seen: the server stops, or a later session has ended too.
    Missed,
    TimedOut,
}

impl Reporter {
    fn new(disk: Arc<SessionDisk>) -> Self {
        Self { disk, drainer: Mutex::new(None), last: Mutex::default(), changed: Condvar::new() }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drainer(&self) -> MutexGuard<'_, Option<Drainer>> {
        self.drainer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until session `sequence` has ended.
    pub(crate) fn wait_for_end(&self, sequence: u64, limit: Duration) -> Waited {
        let not_yet = |last: &mut Last| {
            !last.closed && last.ended.as_ref().is_none_or(|ended| ended.summary.sequence < sequence)
        };
        let (last, waited) = self
            .changed
            .wait_timeout_while(self.last(), limit, not_yet)
            .unwrap_or_else(PoisonError::into_inner);
        match &last.ended {
            Some(ended) if ended.summary.sequence == sequence => Waited::Ended(ended.clone()),
            _ if waited.timed_out() => Waited::TimedOut,
            _ => Waited::Missed,
        }
    }

    /// Nobody needs to wait any more.
    fn close(&self) {
        self.last().closed = true;
        self.changed.notify_all();
    }

    /// Sends the drain to work, or to rest.
    pub(crate) fn wake_drainer(&self) {
        if let Some(drainer) = self.drainer().as_ref() {
            drainer.wake();
        }
    }

    /// Why restoring fails, if it does.
    pub(crate) fn drain_trouble(&self) -> Option<DrainTrouble> {
        self.drainer().as_ref().and_then(Drainer::trouble)
    }

    /// Replaces the drain; the one before is stopped.
    fn set_drainer(&self, drainer: Option<Drainer>) {
        // Out of the lock: stopping a drain takes time.
        let before = std::mem::replace(&mut *self.drainer(), drainer);
        drop(before);
    }
}

impl Observer for Reporter {
    fn session_started(&self, start: &SessionStart, peer: Option<ProcessId>) {
        let of = peer.map_or_else(String::new, |peer| format!(", VM process {}", peer.pid));
        announce!(
            "pristine: session {} started{of}; {} pending",
            start.sequence,
            amount(start.pending_blocks)
        );
    }

    fn session_ended(&self, summary: &SessionSummary, reason: EndReason) {
        let pending = self.disk.pending_blocks();
        announce!(
            "pristine: session {} ended after {} ({reason}): {} written in {}; {} to restore",
            summary.sequence,
            seconds(summary.duration),
            BinaryBytes(summary.bytes_written),
            amount(summary.dirty_blocks),
            amount(pending),
        );
        if self.disk.keeps_changes() {
            announce!("pristine: {} changed and kept", amount(self.disk.kept_blocks()));
        }
        if let Some(why) = self.disk.turns_away() {
            announce!("pristine: {why}");
        }
        self.last().ended = Some(Ended { summary: summary.clone(), reason, pending });
        self.changed.notify_all();
        self.wake_drainer();
    }

    fn released(&self) {
        announce!("pristine: the disk is held no longer, the process that it was held for is gone");
        self.wake_drainer();
    }

    fn frontend_refused(&self, why: &str) {
        log::warn!("a frontend was turned away: {why}");
    }
}

/// Prints when everything that was pending is restored.
struct DrainReporter;

impl DrainObserver for DrainReporter {
    fn restored(&self, blocks: u64, how: CopyCounts, duration: Duration) {
        announce!("pristine: restored {} in {}: {}", amount(blocks), seconds(duration), by_way(how));
    }
}
