//! A tape that stops the next sync of the disk until somebody lets it go on.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use blockio::tape::{Io, Tape};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Syncs pass.
    Open,
    /// The next sync is to be stopped.
    Armed,
    /// A sync is stopped.
    Stopped,
}

/// Passes everything on to another tape, if there is one.
#[derive(Debug)]
pub(crate) struct Gate {
    disk: PathBuf,
    inner: Option<Arc<dyn Tape>>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn new(disk: PathBuf, inner: Option<Arc<dyn Tape>>) -> Arc<Self> {
        Arc::new(Self { disk, inner, state: Mutex::new(State::Open), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next sync of the disk is stopped.
    pub(crate) fn arm(&self) {
        *self.state() = State::Armed;
    }

    /// Whether a sync is stopped.
    pub(crate) fn has_stopped(&self) -> bool {
        *self.state() == State::Stopped
    }

    /// Syncs go on.
    pub(crate) fn open(&self) {
        *self.state() = State::Open;
        self.changed.notify_all();
    }
}

impl Tape for Gate {
    fn begin(&self, io: Io<'_>) -> io::Result<u64> {
        let number = self.inner.as_ref().map_or(Ok(0), |tape| tape.begin(io))?;
        if matches!(io, Io::Sync { path } if path == self.disk) {
            let mut state = self.state();
            if *state == State::Armed {
                *state = State::Stopped;
                let stopped = |state: &mut State| *state == State::Stopped;
                drop(self.changed.wait_while(state, stopped).unwrap_or_else(PoisonError::into_inner));
            }
        }
        Ok(number)
    }

    fn end(&self, number: u64, done: bool) -> io::Result<()> {
        self.inner.as_ref().map_or(Ok(()), |tape| tape.end(number, done))
    }
}
