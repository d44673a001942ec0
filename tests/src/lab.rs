//! One test's base image, session disk and server.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::PATIENCE;
use crate::images;
use crate::process::Process;
use crate::program::{Finished, pristine, run, scratch_dir, scratch_root};
use crate::wait_until;

/// A directory on tmpfs, if there is one.
pub fn memory_root() -> Option<PathBuf> {
    let shm = std::env::var_os("PRISTINE_SHM").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    shm.is_dir().then_some(shm)
}

/// A directory of its own for one test, with short paths for its sockets. Goes with its owner.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
    short: TempDir,
    runtime: TempDir,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// A lab whose images lie on the disk of the target directory.
    pub fn new() -> Self {
        Self::in_dir(&scratch_root())
    }

    /// A lab whose images lie in `parent`.
    pub fn in_dir(parent: &Path) -> Self {
        // Who has named a directory there cleans up what a signal leaves.
        let runtime = memory_root().unwrap_or_else(std::env::temp_dir);
        Self::in_dirs(parent, &runtime)
    }

    /// A lab whose images lie in `parent`, and what servers keep in memory in `runtime`.
    pub fn in_dirs(parent: &Path, runtime: &Path) -> Self {
        let short = tempfile::Builder::new().prefix("pt").tempdir().unwrap();
        Self { dir: scratch_dir(parent), short, runtime: scratch_dir(runtime) }
    }

    /// A path in the lab's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The base image.
    pub fn base(&self) -> PathBuf {
        self.path("base.img")
    }

    /// The session disk.
    pub fn disk(&self) -> PathBuf {
        self.path("disk.img")
    }

    /// The session disk's state directory.
    pub fn state(&self) -> PathBuf {
        self.path("disk.img.pristine")
    }

    /// The socket, in a directory with a short path.
    pub fn socket(&self) -> PathBuf {
        self.short.path().join("s")
    }

    /// The directory for state that survives the process but not the host.
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// `pristine COMMAND --disk DISK --runtime-dir ...` with `more` arguments.
    pub fn pristine<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> Command {
        let mut program = pristine([command]);
        program.arg("--disk").arg(self.disk()).arg("--runtime-dir").arg(self.runtime()).args(more);
        program
    }

    /// Runs [`pristine`](Self::pristine) to its end.
    pub fn run<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> Finished {
        run(&mut self.pristine(command, more))
    }

    /// `pristine session WHAT` of this disk.
    pub fn session(&self, what: &str) -> Command {
        let mut program = pristine(["session", what]);
        program.arg("--disk").arg(self.disk()).arg("--runtime-dir").arg(self.runtime());
        program
    }

    /// The server's control socket, which is named by the disk's ID.
    pub fn control_socket(&self) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.runtime()).unwrap();
        let mut sockets = entries.map(|entry| entry.unwrap().path());
        sockets.find(|path| path.extension() == Some(OsStr::new("control")))
    }

    /// Provisions the disk from the base.
    pub fn provision(&self, more: &[&str]) {
        let base = self.base();
        let mut args = vec![OsStr::new("--base"), base.as_os_str()];
        args.extend(more.iter().map(OsStr::new));
        self.run("provision", &args).ok();
    }

    /// Starts a server and waits until it listens.
    pub fn serve(&self, more: &[&str]) -> Server {
        let mut command = self.pristine("serve", more);
        command.arg("--socket-path").arg(self.socket());
        Server::start(&command)
    }

    /// What `status --json` says.
    pub fn status(&self) -> Value {
        let finished = self.run("status", &["--json"]).ok();
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:#?}"))
    }

    /// The state that `status --json` names.
    pub fn state_word(&self) -> String {
        self.status()["state"].as_str().unwrap().to_owned()
    }

    /// Waits until `status` says that the disk is pristine.
    pub fn wait_pristine(&self) {
        wait_until("the disk is pristine", || self.state_word() == "pristine");
    }

    /// Panics unless the disk equals the base in every way that is promised: by its bytes, for
    /// `verify`, for `status`, and in its holes. No server may be running.
    #[track_caller]
    pub fn assert_pristine(&self) {
        self.assert_pristine_bytes();
        let (disk, base) = (images::allocated(&self.disk()), images::allocated(&self.base()));
        // The map of a fragmented file takes a few blocks itself.
        let slack = base / 50 + 64 * 1024;
        assert!(disk <= base + slack, "the disk takes {disk} bytes, the base {base}: holes are missing");
    }

    /// The same, except for its holes: [`base`](Self::base) need not be what the disk was provisioned from, only equal
    /// to it.
    #[track_caller]
    pub fn assert_pristine_bytes(&self) {
        images::assert_equal(&self.disk(), &self.base());
        assert_eq!(images::sha256(&self.disk()), images::sha256(&self.base()));
        self.run("verify", &[""; 0]).ok();
        let status = self.status();
        assert_eq!(status["state"], "pristine", "{status}");
        assert_eq!((&status["dirty_blocks"], &status["pending_blocks"]), (&0.into(), &0.into()), "{status}");
    }

    /// The files of the state directory's logs, oldest first.
    pub fn logs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.state().join("sessions")).unwrap();
        let mut logs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        logs.retain(|path| path.extension() == Some(OsStr::new("wlog")));
        logs.sort();
        logs
    }

    /// The extents (first block, count) that `log show --json` lists for `log`.
    pub fn log_extents(&self, log: &Path) -> Vec<(u64, u64)> {
        let finished = run(pristine(["log", "show"]).arg(log).arg("--json")).ok();
        let shown: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(shown["block_size"], images::BLOCK);
        serde_json::from_value(shown["extents"].clone()).unwrap()
    }

    /// The blocks that are in any of the logs.
    pub fn logged_blocks(&self) -> BTreeSet<u64> {
        let extents = self.logs().into_iter().flat_map(|log| self.log_extents(&log));
        extents.flat_map(|(first, count)| first..first + count).collect()
    }
}

/// A running `pristine serve`.
#[derive(Debug)]
pub struct Server(pub Process);

impl Server {
    /// Starts `command` and waits until it accepts connections.
    pub fn start(command: &Command) -> Self {
        let mut process = Process::spawn("pristine serve", command);
        process.wait_line("\"listening\"", PATIENCE, |line| line.contains("listening"));
        Self(process)
    }

    /// Asks it to stop (SIGTERM), which must be quick and without an error.
    pub fn stop(mut self) {
        self.0.signal(Signal::TERM);
        let status = self.0.wait(Duration::from_secs(20));
        assert!(status.success(), "serve: {status}\n{}", self.0.output());
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.0.kill();
    }
}
