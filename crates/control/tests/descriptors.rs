//! A server whose process has run out of descriptors. Alone in its process: the limit is for all of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use control::{
    ControlServer, ErrorKind, Handler, Refusal, SessionEnded, SessionHeld, SessionReleased, Status,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const PATIENCE: Duration = Duration::from_secs(20);

/// A log whose lines a test waits for.
struct Lines(OnceLock<Mutex<Sender<String>>>);

static LINES: Lines = Lines(OnceLock::new());

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let _ = self.0.get().unwrap().lock().unwrap().send(record.args().to_string());
    }

    fn flush(&self) {}
}

fn log_lines() -> Receiver<String> {
    let (sender, lines) = channel();
    assert!(LINES.0.set(Mutex::new(sender)).is_ok());
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    lines
}

/// A program that can do nothing.
struct Idle;

fn refusal<T>() -> Result<T, Refusal> {
    Err(Refusal::new(ErrorKind::Failed, "nothing can be done"))
}

impl Handler for Idle {
    fn status(&self) -> Result<Status, Refusal> {
        refusal()
    }

    fn session_end(&self) -> Result<SessionEnded, Refusal> {
        refusal()
    }

    fn session_hold(&self) -> Result<SessionHeld, Refusal> {
        refusal()
    }

    fn session_release(&self) -> Result<SessionReleased, Refusal> {
        refusal()
    }
}

#[test]
fn client_that_cannot_be_accepted_is_logged_once_and_served_when_it_can() {
    let lines = log_lines();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c");
    let _server = ControlServer::start(&path, Arc::new(Idle)).unwrap();
    let before = getrlimit(Resource::Nofile);
    let mut client = {
        // The client's is the last descriptor that there may be.
        let next = std::fs::File::open("/dev/null").unwrap();
        let limit = next.as_raw_fd() as u64 + 1;
        drop(next);
        setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..before }).unwrap();
        UnixStream::connect(&path).unwrap()
    };
    let first = lines.recv_timeout(PATIENCE).unwrap();
    assert!(first.starts_with("the control socket cannot accept a client:"), "{first}");
    // It tries ten times meanwhile.
    let second = lines.recv_timeout(Duration::from_secs(1));
    assert_eq!(second, Err(RecvTimeoutError::Timeout));
    setrlimit(Resource::Nofile, before).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"{}\n").unwrap();
    let mut reply = String::new();
    BufReader::new(client).read_line(&mut reply).unwrap();
    assert!(reply.ends_with('\n'), "{reply}");
}
