//! A tape that numbers every I/O and fails one of them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::tape::{Io, Tape};

/// When an I/O fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// It is not made.
    Before,
    /// It was made.
    After,
}

/// Numbers I/Os from 0 on, and fails at most one.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    fault: Option<(u64, When)>,
    off: AtomicBool,
    seen: Mutex<Vec<String>>,
}

impl Schedule {
    /// Fails `fault`, if there is one.
    pub(crate) fn new(fault: Option<(u64, When)>) -> Arc<Self> {
        Arc::new(Self { fault, ..Self::default() })
    }

    fn seen(&self) -> MutexGuard<'_, Vec<String>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was seen so far: one line for each I/O.
    pub(crate) fn list(&self) -> Vec<String> {
        self.seen().clone()
    }

    /// From now on nothing fails.
    pub(crate) fn switch_off(&self) {
        self.off.store(true, Ordering::SeqCst);
    }

    fn check(&self, number: u64, when: When) -> io::Result<()> {
        if self.fault == Some((number, when)) && !self.off.load(Ordering::SeqCst) {
            return Err(rustix::io::Errno::IO.into());
        }
        Ok(())
    }
}

impl Tape for Schedule {
    fn begin(&self, io: Io<'_>) -> io::Result<u64> {
        let number = {
            let mut seen = self.seen();
            let line = match io {
                Io::Write { path, offset, bytes, durable } => {
                    format!(
                        "write {} bytes at {offset} of {}, durable: {durable}",
                        bytes.len(),
                        path.display()
                    )
                }
                other => format!("{other:?}"),
            };
            seen.push(line);
            seen.len() as u64 - 1
        };
        self.check(number, When::Before).map(|()| number)
    }

    fn end(&self, number: u64, _done: bool) -> io::Result<()> {
        self.check(number, When::After)
    }
}
