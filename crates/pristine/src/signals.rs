//! SIGTERM and SIGINT: stop soon, in order. SIGXFSZ: an error like others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::process::Signal;
use signal_hook::consts::{SIGINT, SIGTERM};
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

/// Waits for the signals in a thread of its own, as long as it lives.
pub(crate) struct StopOnSignal {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl StopOnSignal {
    /// Sets `stop` and calls `then` at each of the signals. Nothing waits for a base's server after the first one.
    pub(crate) fn start(stop: Arc<AtomicBool>, then: impl Fn() + Send + 'static) -> Result<Self, Failure> {
        let mut signals = Signals::new([SIGTERM, SIGINT])
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

impl Drop for StopOnSignal {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
