//! What is printed to standard output and standard error, and whether it arrived.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::{Command, ServeArgs};
use crate::failure::Failure;

/// The first failure.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Prints a line of a report. That it can't be is no reason to stop what is being done: [`all`] tells.
pub(crate) fn line(words: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    if let Err(error) = writeln!(out, "{words}").and_then(|()| out.flush()) {
        let _ = LOST.set(error);
    }
}

/// Prints a line for whoever watches a server. A guest is not to wait for somebody who does not read, nor to suffer from one who
/// has gone: then nobody hears of it.
pub(crate) fn news(words: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    if takes_a_line(&out) {
        let _ = writeln!(out, "{words}").and_then(|()| out.flush());
    }
}

/// Fails if `command` was to report what did not arrive. Who closes a pipe wants no more of it.
pub(crate) fn all(command: &Command) -> Result<(), Failure> {
    match LOST.get().filter(|error| error.kind() != io::ErrorKind::BrokenPipe && !is_server(command)) {
        Some(error) => {
            Err(Failure::new(format!("it is done, but what there is to say of it can't be printed: {error}")))
        }
        None => Ok(()),
    }
}

/// Whether guests depend on it.
pub(crate) fn is_server(command: &Command) -> bool {
    matches!(
        command,
        Command::Serve(ServeArgs { print_capabilities: false, .. })
            | Command::Maintain(ServeArgs { print_capabilities: false, .. })
    )
}

/// Standard error, as long as somebody reads it: what would have to wait is dropped.
pub(crate) struct IfRead;

impl Write for IfRead {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stderr().lock();
        if takes_a_line(&out) { out.write(bytes) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a line can be written without waiting: a pipe that can take any takes 4 KiB.
fn takes_a_line(out: &impl AsFd) -> bool {
    let mut ready = [PollFd::new(out, PollFlags::OUT)];
    // What can't be polled does not wait either.
    poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
}
