//! The state directory's file system is full: at a session's start, in the middle of one, at its end. Or it fails.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pristine_tests::PATIENCE;
use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::mounts::Mounts;
use pristine_tests::program::{Finished, run};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use serde_json::Value;

const SIZE: u64 = 64 << 20;
/// Room of the state directory's file system.
const ROOM: u64 = 1 << 20;
/// An answer of the guest's disk takes no longer, however full the host is.
const BOUND: Duration = Duration::from_secs(30);
const NONE: &[&str] = &[];

/// A pristine disk whose state directory has a file system of its own.
struct Full {
    lab: Lab,
    mounts: Mounts,
    state: PathBuf,
    keep_logs: &'static str,
}

impl Full {
    /// On a tmpfs of 1 MiB.
    fn new(keep_logs: &'static str) -> Option<Self> {
        Self::on(keep_logs, |_, mounts, state| {
            mounts.tmpfs(state, ROOM);
            true
        })
    }

    /// On what `mount` mounts on the directory that it is given, if it can.
    fn on(keep_logs: &'static str, mount: impl FnOnce(&Lab, &Mounts, &Path) -> bool) -> Option<Self> {
        let (lab, mounts) = (Lab::new(), Mounts::new()?);
        let state = lab.path("state");
        mount(&lab, &mounts, &state).then_some(())?;
        images::dense(&lab.base(), SIZE, 41);
        let full = Self { lab, mounts, state, keep_logs };
        full.run("provision", &[OsStr::new("--base"), full.lab.base().as_os_str()]).ok();
        Some(full)
    }

    fn command<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> std::process::Command {
        let mut command = self.lab.pristine(command, more);
        command.arg("--state-dir").arg(&self.state).args(["--keep-logs", self.keep_logs]);
        command
    }

    fn run<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> Finished {
        run(&mut self.mounts.inside(&self.command(command, more)))
    }

    fn serve(&self) -> Server {
        let mut command = self.command("serve", &["--num-queues", "2"]);
        command.arg("--socket-path").arg(self.lab.socket());
        Server::start(&self.mounts.inside(&command))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.run("status", &["--json"]).ok().stdout).unwrap()
    }

    fn wait_pristine(&self) {
        wait_until("the disk is pristine", || self.status()["state"] == "pristine");
    }

    /// Names and lengths of all files of the state directory.
    fn files(&self) -> BTreeSet<(String, u64)> {
        let dirs = [self.state.clone(), self.state.join("sessions")].map(|dir| self.mounts.outside(&dir));
        let entries = dirs.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()).map(Result::unwrap);
        entries
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
            .collect()
    }

    /// Invariant 1: every block that differs from the base is in a log.
    fn assert_logged(&self) {
        let differing = images::differing_blocks(&self.lab.disk(), &self.lab.base());
        let mut logged = BTreeSet::new();
        for (name, _) in self.files().iter().filter(|(name, _)| name.ends_with(".wlog")) {
            let log = self.mounts.outside(&self.state).join("sessions").join(name);
            logged.extend(self.lab.log_extents(&log).iter().flat_map(|(first, count)| *first..first + count));
        }
        let missing: Vec<_> = differing.iter().filter(|block| !logged.contains(block)).collect();
        assert!(missing.is_empty(), "{} of {} are in no log", missing.len(), differing.len());
    }

    fn assert_pristine(&self) {
        images::assert_equal(&self.lab.disk(), &self.lab.base());
        self.run("verify", NONE).ok();
        assert_eq!(self.status()["state"], "pristine");
    }
}

/// Written and failed writes of an `attempt`, which must be answered in time.
fn attempt(client: &mut Remote, count: u64, seed: u64) -> (u64, u64) {
    client.send(&format!("attempt {count} {seed}"));
    let answer = client.answer_within(BOUND).expect("the guest hangs").unwrap();
    let (written, failed) = answer.split_once(' ').unwrap();
    (written.parse().unwrap(), failed.parse().unwrap())
}

/// Invariant 6: whatever room there is for a log and the manifest, a session that does not get all of
/// it is refused, says what it needs and where, changes nothing and leaves nothing behind; the server
/// goes on, and with room enough a session begins.
#[test]
fn session_whose_log_has_no_room_is_refused_and_the_server_goes_on() {
    let Some(full) = Full::new("0") else { return };
    let mut server = full.serve();
    let before = full.files();
    let mut refused = |leave: u64| {
        full.mounts.fill(&full.state, leave);
        let mut client = Remote::start(&full.lab.socket());
        client.send("connect 2");
        client.answer_within(BOUND).expect("the guest hangs").expect_err("a session without a log");
        let line = server.0.wait_line("the refusal", PATIENCE, |line| line.contains("turned away"));
        assert!(line.contains(&full.state.display().to_string()), "{line}");
        images::assert_equal(&full.lab.disk(), &full.lab.base());
        assert_eq!(full.status()["state"], "pristine", "{leave} bytes");
        full.mounts.make_room(&full.state);
        assert_eq!(full.files(), before, "with {leave} bytes");
        line
    };
    let line = refused(0);
    let needed = line.split(" bytes must be free").next().unwrap().rsplit(' ').next().unwrap();
    let needed: u64 = needed.parse().unwrap_or_else(|_| panic!("how much? {line}"));
    for leave in [4096, needed / 2, needed - 4096] {
        assert!(refused(leave).contains(&format!("{needed} bytes must be free")));
    }
    // Room for the log, not for the manifest that names it.
    assert!(refused(needed).contains("manifest"));
    let mut client = Remote::connected(&full.lab.socket(), 2);
    client.ask("scatter 1000 1");
    client.leave();
    full.wait_pristine();
    server.stop();
    full.assert_pristine();
}

/// Logs that are kept for audit do not keep sessions from beginning: there is room for six.
#[test]
fn session_takes_the_room_of_retired_logs() {
    let Some(full) = Full::new("8") else { return };
    let server = full.serve();
    for seed in 0..9 {
        let mut client = Remote::connected(&full.lab.socket(), 2);
        assert_eq!(attempt(&mut client, 20, seed), (20, 0));
        client.leave();
        full.wait_pristine();
    }
    server.stop();
    full.assert_pristine();
}

/// Invariants 1 and 6: the file system fills up under a session. Its log's room is its own, so it goes
/// on, also when the log is written anew; what can't be done without room is done once there is some.
#[test]
fn session_goes_on_when_the_state_directory_fills_up() {
    let Some(full) = Full::new("0") else { return };
    let server = full.serve();
    let mut client = Remote::connected(&full.lab.socket(), 2);
    assert_eq!(attempt(&mut client, 100, 1), (100, 0));
    full.mounts.fill(&full.state, 0);
    assert_eq!(full.mounts.free(&full.state), 0);
    // Nearly every block: more than an area of the log holds as runs.
    assert_eq!(attempt(&mut client, 14_000, 2), (14_000, 0));
    full.assert_logged();
    client.kill();
    // All is restored, but that can't be noted down.
    wait_until("the drain fails", || full.status()["drain_failing"] == true);
    assert_eq!(full.status()["state"], "restoring");
    full.mounts.make_room(&full.state);
    full.wait_pristine();
    server.stop();
    full.assert_pristine();
}

/// Invariants 1 and 6: server and guest are killed while there is no room. `restore` can't begin, says
/// what it needs, and changes nothing. The next server can: it ends the session in the room that its
/// log has, and takes none; it is killed again. With room, `restore` is exact.
#[test]
fn restore_without_room_is_refused_and_exact_once_there_is_some() {
    let Some(full) = Full::new("0") else { return };
    let server = full.serve();
    let mut client = Remote::connected(&full.lab.socket(), 2);
    assert_eq!(attempt(&mut client, 3000, 1), (3000, 0));
    full.mounts.fill(&full.state, 0);
    assert_eq!(attempt(&mut client, 3000, 2), (3000, 0));
    server.kill();
    client.kill();
    full.assert_logged();
    let before = (full.files(), full.status());
    let words = [full.state.to_str().unwrap(), "bytes must be free", "make room"];
    full.run("restore", NONE).refused(1, &words);
    assert_eq!((full.files(), full.status()), before);

    let server = full.serve();
    wait_until("the drain fails", || full.status()["drain_failing"] == true);
    let mut next = Remote::start(&full.lab.socket());
    next.send("connect 2");
    next.answer_within(BOUND).expect("the guest hangs").expect_err("a session without a log");
    server.kill();
    assert_eq!(full.status()["state"], "interrupted");
    full.mounts.make_room(&full.state);
    full.run("restore", NONE).ok();
    full.assert_pristine();
}

/// Invariant 6: without room for the page that survives the process nothing is served or restored, and
/// nothing is changed.
#[test]
fn runtime_directory_without_room_is_refused() {
    let Some(full) = Full::new("0") else { return };
    let before = full.files();
    let runtime = full.state.join("run");
    full.mounts.fill(&full.state, 0);
    let disk = full.lab.disk();
    let command = |name: &str| {
        let mut command = pristine_tests::program::pristine([name]);
        command.arg("--disk").arg(&disk).arg("--state-dir").arg(&full.state);
        command.arg("--runtime-dir").arg(&runtime);
        command
    };
    let words = ["No space left", "state/run"];
    run(&mut full.mounts.inside(&command("restore"))).refused(1, &words);
    let mut serve = command("serve");
    serve.arg("--socket-path").arg(full.lab.socket());
    run(&mut full.mounts.inside(&serve)).refused(1, &words);
    full.mounts.make_room(&full.state);
    let manifest = |files: &BTreeSet<(String, u64)>| files.iter().filter(|(n, _)| n != "run").count();
    assert_eq!(manifest(&full.files()), manifest(&before));
    run(&mut full.mounts.inside(&command("restore"))).ok();
    full.assert_pristine();
}

/// Invariants 1 and 6: the file system of the state stops taking writes in the middle of a session. Frames of the log are
/// stored in pages that are there, which goes on working; yet soon blocks that the session has not written before can't
/// be written any more, and nothing is changed that is not in the log.
#[test]
fn session_whose_log_can_no_longer_be_written_is_refused_new_blocks() {
    let mount = |lab: &Lab, mounts: &Mounts, state: &Path| {
        let mounted = mounts.ext4(state, &lab.path("ext4.img"), 32 << 20);
        if mounted {
            let mut command = Command::new("mount");
            run(&mut mounts.inside(command.args(["-o", "remount,errors=remount-ro"]).arg(state))).ok();
        }
        mounted
    };
    let Some(full) = Full::on("0", mount) else { return };
    let server = full.serve();
    let mut client = Remote::connected(&full.lab.socket(), 1);
    assert_eq!(attempt(&mut client, 100, 1), (100, 0));
    full.mounts.fail_ext4(&full.state);
    // One in a tenth of a second, fewer than fit into the page in which the log ends.
    let refused = (2..60).find(|seed| {
        std::thread::sleep(Duration::from_millis(100));
        attempt(&mut client, 1, *seed) == (0, 1)
    });
    assert!(refused.is_some(), "new blocks are still taken");
    full.assert_logged();
    server.kill();
    client.kill();
}

/// File systems in memory have the same inode numbers: who serves a disk whose state is in one does not serve that of another.
#[test]
fn server_of_a_disk_is_not_taken_for_that_of_another_in_memory() {
    let (Some(one), Some(two)) = (Full::new("0"), Full::new("0")) else { return };
    let inode = |full: &Full| {
        let sessions = full.mounts.outside(&full.state.join("sessions"));
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(sessions).unwrap())
    };
    assert_eq!(inode(&one), inode(&two));
    let server = one.serve();
    assert_eq!(two.status()["silent_pid"], serde_json::Value::Null);
    server.stop();
}
