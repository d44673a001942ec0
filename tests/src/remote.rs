//! The vhost-user client in a process of its own, so that its session can end.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::PATIENCE;
use crate::process::Process;
use crate::program::client_binary;

/// A running `vhost-client`.
#[derive(Debug)]
pub struct Remote(Process);

impl Remote {
    /// Starts a client of the backend at `socket`; it does not connect yet.
    pub fn start(socket: &Path) -> Self {
        Self::start_with(&[], socket)
    }

    /// The same, started by `launcher`, such as `taskset -c 0`.
    pub fn start_with(launcher: &[&str], socket: &Path) -> Self {
        let mut command = match launcher {
            [program, args @ ..] => {
                let mut command = Command::new(program);
                command.args(args).arg(client_binary());
                command
            }
            [] => Command::new(client_binary()),
        };
        Self(Process::spawn("vhost-client", command.arg(socket)))
    }

    /// Starts a client and connects it.
    pub fn connected(socket: &Path, queues: usize) -> Self {
        let mut remote = Self::start(socket);
        remote.ask(&format!("connect {queues}"));
        remote
    }

    /// Gives a command; returns what is answered after `ok`. Panics if it fails.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.try_ask(command).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Gives a command; returns what is answered after `ok` or `error`.
    pub fn try_ask(&mut self, command: &str) -> Result<String, String> {
        self.send(command);
        self.answer()
    }

    /// Gives a command without waiting for the answer.
    pub fn send(&mut self, command: &str) {
        self.0.send(command);
    }

    /// The next answer, if it comes within `limit`.
    pub fn answer_within(&mut self, limit: Duration) -> Option<Result<String, String>> {
        let line = self.0.try_wait_line(limit, is_answer).ok()?;
        Some(parse(&line))
    }

    /// The next answer.
    pub fn answer(&mut self) -> Result<String, String> {
        let line = self.0.try_wait_line(PATIENCE, is_answer)?;
        parse(&line)
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Lets it exit, and waits for it.
    pub fn leave(mut self) {
        self.0.close_stdin();
        assert!(self.0.wait(Duration::from_secs(20)).success());
    }

    /// `kill -9`; returns when it is gone.
    pub fn kill(mut self) {
        self.0.kill();
    }
}

fn is_answer(line: &str) -> bool {
    line.starts_with("ok") || line.starts_with("error")
}

fn parse(line: &str) -> Result<String, String> {
    match line.strip_prefix("ok") {
        Some(rest) => Ok(rest.trim().to_owned()),
        None => Err(line.trim_start_matches("error").trim().to_owned()),
    }
}
