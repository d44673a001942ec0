//! SIGTERM, SIGINT and SIGHUP: stop soon, in order. SIGXFSZ: an error like others. And how many files may be open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::failure::Failure;

/// Has a write beyond the limit of a file's size (`ulimit -f`, `LimitFSIZE=`) fail with an error that says which file, where it
/// would kill the program: half-made files would be left, and a guest's write could end its server.
pub(crate) fn survive_size_limits() {
    let exceeded = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(Signal::XFSZ.as_raw(), exceeded) {
        log::debug!("a write beyond the limit of a file's size kills the program: {error}");
    }
}

/// Lets a server have as many open files as it ever may: a VM's memory may come in hundreds of them, and some services begin with 1024.
pub(crate) fn raise_limit_of_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        log::debug!("the limit of open files stays at {current:?}: {error}");
    }
}

/// Waits for the signals in a thread of its own, as long as it lives.
pub(crate) struct StopOnSignal {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl StopOnSignal {
    /// Sets `stop` and calls `then` at each of the signals. Nothing waits for a base's server after the first one.
    pub(crate) fn start(stop: Arc<AtomicBool>, then: impl Fn() + Send + 'static) -> Result<Self, Failure> {
        // Not under nohup(1).
        let hangup = Some(SIGHUP).filter(|signal| !is_ignored(*signal));
        let mut signals = Signals::new([SIGTERM, SIGINT].into_iter().chain(hangup))
            .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
        let handle = signals.handle();
        let thread = std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for _ in signals.forever() {
                    stop.store(true, Ordering::Release);
                    then();
                    base_image::stop_waiting_for_servers();
                }
            })
            .map_err(|error| Failure::new(format!("cannot start a thread: {error}")))?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

/// Whether whoever started the program wants it to ignore the signal.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    // Signals count from 1 (proc_pid_status(5)).
    mask >> (signal - 1) & 1 == 1
}

impl Drop for StopOnSignal {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
