//! Damaged, lost, exchanged and copied state: the program's verdict never leaks, and `restore` makes the
//! disk exact. (That no damaged log hides a block is shown for every bit in `session-disk`.)

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::{pristine, run};
use pristine_tests::random::Random;
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use rustix::fs::{XattrFlags, getxattr, setxattr};

const SIZE: u64 = 8 << 20;
const BLOCKS: u64 = SIZE / 4096;
const NONE: &[&str] = &[];

fn provisioned() -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 61);
    lab.provision(NONE);
    lab
}

/// A server with a session that has written 1000 blocks.
fn in_session(lab: &Lab) -> (Server, Remote) {
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 1000 1");
    (server, client)
}

/// A disk whose server and client were killed in the middle of a session.
fn killed() -> Lab {
    let lab = provisioned();
    let (server, client) = in_session(&lab);
    server.kill();
    client.kill();
    lab
}

/// The log of the open session: the youngest.
fn session_log(lab: &Lab) -> PathBuf {
    lab.logs().pop().unwrap()
}

/// What is pending of a disk that nobody serves, which must not be taken for pristine.
#[track_caller]
fn pending(lab: &Lab) -> u64 {
    let status = lab.status();
    assert_eq!(status["state"], "interrupted", "{status}");
    status["pending_blocks"].as_u64().unwrap()
}

#[track_caller]
fn assert_wholly_pending(lab: &Lab, why: &str) {
    assert_eq!(pending(lab), BLOCKS, "{why}");
    let distrust = lab.status()["distrust"].as_str().unwrap().to_owned();
    assert!(distrust.contains(why), "{distrust}");
}

#[track_caller]
fn assert_restores(lab: &Lab) {
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// The attribute of a disk's file that tells an older state.
const GENERATION: &str = "user.pristine.generation";

/// The contents of files, to be put back into the very same files, and what the disk's file names.
struct Saved {
    files: Vec<(PathBuf, Vec<u8>)>,
    sessions: PathBuf,
    disk: PathBuf,
    generation: Vec<u8>,
}

impl Saved {
    /// Disk, state and runtime directory.
    fn of(lab: &Lab) -> Self {
        let sessions = lab.state().join("sessions");
        let mut paths = vec![lab.disk()];
        for dir in [lab.state(), sessions.clone(), lab.runtime().to_owned()] {
            paths.extend(fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()));
        }
        paths.retain(|path| path.is_file());
        Self {
            files: paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect(),
            sessions,
            disk: lab.disk(),
            generation: generation(lab),
        }
    }

    fn put_back(&self) {
        for entry in fs::read_dir(&self.sessions).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for (path, bytes) in &self.files {
            fs::write(path, bytes).unwrap();
        }
        setxattr(&self.disk, GENERATION, &self.generation, XattrFlags::empty()).unwrap();
    }
}

/// What the disk's file names. The file system of the tests can have attributes.
fn generation(lab: &Lab) -> Vec<u8> {
    let mut value = vec![0; 32];
    let len = getxattr(lab.disk(), GENERATION, value.as_mut_slice()).unwrap();
    value.truncate(len);
    value
}

/// Copies the state directory; [`put_state_back`] is its way back.
fn copy_state(lab: &Lab) -> PathBuf {
    let copy = lab.path("copy-of-the-state");
    run(Command::new("cp").arg("-a").arg(lab.state()).arg(&copy)).ok();
    copy
}

fn put_state_back(lab: &Lab, copy: &Path) {
    fs::remove_dir_all(lab.state()).unwrap();
    run(Command::new("cp").arg("-a").arg(copy).arg(lab.state())).ok();
}

/// Invariants 2, 4 and 6, by the program itself: a log that is cut or has a bit flipped, after a kill and
/// after a power cut.
#[test]
fn disk_with_a_cut_or_flipped_log_is_not_pristine_and_restored_exactly() {
    let lab = killed();
    let (saved, log) = (Saved::of(&lab), session_log(&lab));
    let whole = fs::read(&log).unwrap();
    // 1000 records in frames of up to 32 of them.
    let used = 4096 + 1000 * 8;
    let mut random = Random::new(5);
    for round in 0..24 {
        let mut bytes = whole.clone();
        let what = if round % 3 == 0 {
            let len = random.below(whole.len() as u64) as usize;
            bytes.truncate(len);
            format!("cut to {len} bytes")
        } else {
            let bit = random.below(used * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
            format!("bit {bit} flipped")
        };
        saved.put_back();
        fs::write(&log, bytes).unwrap();
        if round % 2 == 1 {
            fs::remove_dir_all(lab.runtime()).unwrap();
            fs::create_dir(lab.runtime()).unwrap();
        }
        assert_eq!(pending(&lab), BLOCKS, "{what}");
        assert_restores(&lab);
    }
}

/// Invariants 2 and 6: a log that is gone, or is another disk's or an older session's under the name of
/// this one, vouches for nothing.
#[test]
fn disk_whose_log_is_gone_or_another_is_wholly_pending() {
    let (lab, other) = (killed(), killed());
    let (saved, log) = (Saved::of(&lab), session_log(&lab));
    fs::remove_file(&log).unwrap();
    assert_wholly_pending(&lab, "can't be read");
    assert_restores(&lab);

    saved.put_back();
    fs::copy(session_log(&other), &log).unwrap();
    assert_wholly_pending(&lab, "belongs to another disk");
    assert_restores(&lab);

    saved.put_back();
    let older = lab.logs().remove(0);
    fs::copy(older, &log).unwrap();
    assert_wholly_pending(&lab, "belongs to another disk or session");
    assert_restores(&lab);
}

/// Invariants 2 and 6: a state directory that was copied from another disk of the same base and size,
/// which is pristine, says nothing about this one.
#[test]
fn disk_with_the_state_of_another_disk_is_wholly_pending() {
    let (lab, other) = (killed(), provisioned());
    fs::remove_dir_all(lab.state()).unwrap();
    run(Command::new("cp").arg("-a").arg(other.state()).arg(lab.state())).ok();
    assert_wholly_pending(&lab, "another file");
    // Its base is the other disk's.
    lab.run("restore", NONE).ok();
    images::assert_equal(&lab.disk(), &other.base());
    other.assert_pristine();
}

/// Invariants 2 and 6: the disk's own state directory, an older copy of it that lists the log of a killed
/// session, is put back while what the next session wrote elsewhere is not restored. The host has
/// started anew meanwhile, after a stop in order or a power cut, so no live page contradicts the copy.
#[test]
fn disk_with_an_older_copy_of_its_state_is_wholly_pending() {
    // Two regions of the intents.
    const LARGE: u64 = 72 << 20;
    for in_order in [true, false] {
        let lab = Lab::new();
        images::sparse(&lab.base(), LARGE, 62, &[(0, 4 << 20), (66 << 20, 2 << 20)]);
        lab.provision(NONE);
        let serve_and_write = |offset: u64| {
            let server = lab.serve(NONE);
            lab.wait_pristine();
            let mut client = Remote::connected(&lab.socket(), 1);
            client.ask(&format!("write {offset} 1048576 3"));
            (server, client)
        };
        let (server, client) = serve_and_write(0);
        server.kill();
        client.kill();
        let copy = copy_state(&lab);
        let (server, client) = serve_and_write(67 << 20);
        if in_order {
            server.stop()
        } else {
            server.kill()
        }
        client.kill();
        fs::remove_dir_all(lab.runtime()).unwrap();
        fs::create_dir(lab.runtime()).unwrap();
        assert!(images::differing_blocks(&lab.disk(), &lab.base()).contains(&((67 << 20) / 4096)));
        put_state_back(&lab, &copy);
        assert_eq!(pending(&lab), LARGE / 4096);
        let distrust = lab.status()["distrust"].as_str().unwrap().to_owned();
        assert_eq!(distrust, "the state is older than the disk: it was put back from a copy");
        assert_restores(&lab);
        // What follows is believed again.
        let (server, client) = serve_and_write(0);
        server.kill();
        client.kill();
        assert_eq!((pending(&lab), &lab.status()["distrust"]), (256, &serde_json::Value::Null));
        assert_restores(&lab);
    }
}

/// Invariants 2, 6 and 7: a disk that was copied with its state, in the middle of a session too, is
/// another disk, wholly pending; the original is served as if nothing was.
#[test]
fn copy_of_a_disk_in_a_session_with_its_state_is_wholly_pending() {
    let lab = provisioned();
    let (server, mut client) = in_session(&lab);
    let copy = lab.path("copy.img");
    run(Command::new("cp").arg("-a").arg(lab.disk()).arg(&copy)).ok();
    run(Command::new("cp").arg("-a").arg(lab.state()).arg(lab.path("copy.img.pristine"))).ok();
    let command = |name: &str| {
        let mut command = pristine([name]);
        command.arg("--disk").arg(&copy).arg("--runtime-dir").arg(lab.runtime());
        command
    };
    // Copy and original have one page in the runtime directory: not while the original is served.
    run(&mut command("restore")).refused(1, &["in use", "--adopt"]);
    // Nor from another pid namespace, as a container has it, where its server can't be seen to live.
    let inside = |command: &Command| {
        let mut inside = Command::new("unshare");
        inside.args(["--pid", "--fork", "--mount-proc"]).arg(command.get_program()).args(command.get_args());
        inside
    };
    if run(&mut inside(&Command::new("true"))).code == Some(0) {
        run(&mut inside(&command("restore"))).refused(1, &["in use", "--adopt"]);
    } else {
        eprintln!("not tested: no pid namespaces here");
    }
    client.ask("scatter 500 2");
    client.leave();
    lab.wait_pristine();
    server.stop();
    let status = run(command("status").arg("--json")).ok().stdout;
    assert!(status.contains("\"interrupted\"") && status.contains("another file"), "{status}");
    run(&mut command("restore")).ok();
    images::assert_equal(&copy, &lab.base());
    lab.assert_pristine();
}

/// Invariants 2, 6 and 7: the runtime directory is removed under a running server. The session goes on
/// and ends as ever; nobody else can take the disk; what is killed then has had a power cut, as far as
/// the next start knows.
#[test]
fn runtime_directory_that_is_lost_under_a_server_is_a_power_cut_for_the_next() {
    let lab = provisioned();
    let (server, mut client) = in_session(&lab);
    fs::remove_dir_all(lab.runtime()).unwrap();
    client.ask("scatter 1000 2");
    let socket = lab.path("other-socket");
    let other = [OsStr::new("--socket-path"), socket.as_os_str()];
    lab.run("serve", &other).refused(1, &["in use"]);
    lab.run("restore", NONE).refused(1, &["in use"]);
    assert_ne!(lab.state_word(), "pristine");
    client.leave();
    // Nobody can see what the server does but by its files.
    wait_until("all is restored", || images::differing_blocks(&lab.disk(), &lab.base()).is_empty());
    let mut next = Remote::connected(&lab.socket(), 1);
    next.ask("scatter 1000 3");
    server.kill();
    next.kill();
    assert_eq!(pending(&lab), BLOCKS, "the one region of the disk");
    assert_eq!(lab.status()["distrust"], serde_json::Value::Null);
    assert_restores(&lab);

    // In order, a server stops without its page too.
    let (server, client) = in_session(&lab);
    fs::remove_dir_all(lab.runtime()).unwrap();
    client.leave();
    wait_until("all is restored", || images::differing_blocks(&lab.disk(), &lab.base()).is_empty());
    server.stop();
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Invariants 2 and 6: a pristine disk was written from outside, of the same size, its modification time
/// put back: the time of the status change tells.
#[test]
fn disk_that_was_written_from_outside_with_its_time_put_back_is_wholly_pending() {
    let lab = provisioned();
    let time = lab.path("time");
    run(Command::new("touch").arg("-r").arg(lab.disk()).arg(&time)).ok();
    let disk = fs::File::options().write(true).open(lab.disk()).unwrap();
    disk.write_all_at(b"outside", 5 * 4096 + 99).unwrap();
    drop(disk);
    run(Command::new("touch").arg("-r").arg(&time).arg(lab.disk())).ok();
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(modified(&lab.disk()), modified(&time));
    assert_wholly_pending(&lab, "from outside");
    // A session reads the base at once.
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    assert_eq!(client.ask(&format!("compare 0 1048576 {}", lab.base().display())), "same");
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Invariant 6: a disk whose manifest is missing or damaged is refused by every command, with the
/// command that makes it right; which it does.
#[test]
fn disk_without_its_manifest_is_refused_with_the_command_that_makes_it_right() {
    for damage in ["missing", "damaged", "the whole directory"] {
        let lab = killed();
        match damage {
            "missing" => fs::remove_file(lab.state().join("manifest")).unwrap(),
            "damaged" => fs::write(lab.state().join("manifest"), "{}\ncrc32c 00000000\n").unwrap(),
            _ => fs::remove_dir_all(lab.state()).unwrap(),
        }
        let right = format!("`pristine provision --adopt --base BASE --disk {}`", lab.disk().display());
        let words = ["disk.img.pristine/manifest", &right];
        for command in ["restore", "status", "verify"] {
            lab.run(command, NONE).refused(1, &words);
        }
        let socket = lab.socket();
        lab.run("serve", &[OsStr::new("--socket-path"), socket.as_os_str()]).refused(1, &words);
        // Without the word nobody's file is taken.
        let base = lab.base();
        lab.run("provision", &[OsStr::new("--base"), base.as_os_str()]).refused(1, &["--adopt"]);
        lab.provision(&["--adopt", "--lazy"]);
        assert_eq!(pending(&lab), BLOCKS);
        let server = lab.serve(NONE);
        let mut client = Remote::connected(&lab.socket(), 1);
        assert_eq!(client.ask(&format!("compare 0 1048576 {}", lab.base().display())), "same");
        client.leave();
        lab.wait_pristine();
        server.stop();
        lab.assert_pristine();
    }
}

/// The command that a message names has the state directory, if one was named.
#[test]
fn message_about_a_missing_manifest_names_the_state_directory() {
    let lab = provisioned();
    let elsewhere = lab.path("elsewhere").display().to_string();
    let words = format!("--adopt --base BASE --disk {} --state-dir {elsewhere}`", lab.disk().display());
    lab.run("restore", &["--state-dir", &elsewhere]).refused(1, &[&words]);
}

/// A disk that is held because the log of a session was damaged under its VM, which lives. Also the hash of what the disk held
/// before the server that holds it was started.
fn held_by_damage(lab: &Lab) -> (Server, Remote, String) {
    let (server, mut client) = in_session(lab);
    server.kill();
    let log = fs::File::options().read(true).write(true).open(session_log(lab)).unwrap();
    let mut byte = [0];
    log.read_exact_at(&mut byte, 4096 + 17).unwrap();
    log.write_all_at(&[byte[0] ^ 1], 4096 + 17).unwrap();
    let written = images::sha256(&lab.disk());
    let mut server = lab.serve(NONE);
    assert!(client.try_ask("connect 1").is_err());
    server.0.wait_line("a refusal", pristine_tests::PATIENCE, |line| line.contains("can't go on"));
    (server, client, written)
}

/// Invariants 3 and 6: the log is damaged while the server is down and the VM lives. The session can't go
/// on; it is not thrown away either before the VM is gone, and then restored exactly.
#[test]
fn session_whose_log_is_damaged_under_a_living_vm_is_held_until_the_vm_is_gone() {
    let lab = provisioned();
    let (server, client, written) = held_by_damage(&lab);
    let status = lab.status();
    assert_eq!((&status["state"], &status["held"]["reason"]), (&"held".into(), &"untrusted".into()));
    assert!(status["distrust"].is_string() || status["held"]["why"].is_string(), "{status}");
    assert_eq!(images::sha256(&lab.disk()), written);
    server.kill();
    lab.run("restore", NONE).refused(1, &["can't go on", "session release"]);
    let server = lab.serve(NONE);
    client.kill();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Who holds such a disk holds it also when the VM is gone: with the server, and of a disk that nobody serves.
#[test]
fn hold_by_the_operator_outlasts_the_vm_whose_session_could_not_go_on() {
    for served in [true, false] {
        let lab = provisioned();
        let (server, client, written) = held_by_damage(&lab);
        let server = if served {
            Some(server)
        } else {
            server.kill();
            None
        };
        let held = run(&mut lab.session("hold")).ok();
        assert!(!held.stdout.contains("already"), "{held:#?}");
        client.kill();
        if let Some(server) = server {
            server.stop();
        }
        let server = lab.serve(NONE);
        assert_eq!(lab.status()["held"]["reason"], "by-operator");
        assert_eq!(images::sha256(&lab.disk()), written);
        run(&mut lab.session("release")).ok();
        lab.wait_pristine();
        server.stop();
        lab.assert_pristine();
    }
}

/// A hold for a VM that is gone is in nobody's way, though it stands in the manifest.
#[test]
fn hold_that_is_over_can_be_released_and_adopted() {
    for adopt in [true, false] {
        let lab = provisioned();
        let (server, client, _) = held_by_damage(&lab);
        server.kill();
        client.kill();
        if adopt {
            lab.provision(&["--adopt"]);
        } else {
            run(&mut lab.session("release")).ok();
            lab.run("restore", NONE).ok();
        }
        lab.assert_pristine();
    }
}

/// What an operator is told to type names the state directory, and a link finds the state of what it leads to: else the way
/// out that is offered next would give up what is held.
#[test]
fn what_is_held_is_found_by_what_messages_say_and_through_links() {
    let lab = provisioned();
    let elsewhere = lab.path("elsewhere").display().to_string();
    fs::rename(lab.state(), &elsewhere).unwrap();
    let at = ["--state-dir", elsewhere.as_str()];
    let server = lab.serve(&at);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 100 1");
    run(lab.session("hold").args(at)).ok();
    client.leave();
    wait_until("end of the session", || {
        let report = run(lab.pristine("status", &at).arg("--json")).ok();
        report.stdout.contains("\"held\"")
    });
    server.stop();
    let words = format!("session release --disk {} --state-dir {elsewhere} ", lab.disk().display());
    for command in ["restore", "rebase"] {
        let base = lab.base();
        let more: &[&OsStr] = if command == "rebase" { &["--base".as_ref(), base.as_ref()] } else { &[] };
        run(lab.pristine(command, &at).args(more)).refused(1, &[&words]);
    }
    fs::rename(&elsewhere, lab.state()).unwrap();
    let link = lab.path("link");
    std::os::unix::fs::symlink(lab.disk(), &link).unwrap();
    let mut adopt = pristine(["provision", "--adopt", "--base"]);
    adopt.arg(lab.base()).arg("--runtime-dir").arg(lab.runtime()).arg("--disk").arg(&link);
    run(&mut adopt).refused(1, &["held", "session release --disk"]);
}
