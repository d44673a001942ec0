//! The operator's control: sessions are ended, held and released from outside, with a server and without.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::{pristine, run};
use pristine_tests::remote::Remote;
use pristine_tests::{PATIENCE, wait_until};
use serde_json::{Value, json};

const SIZE: u64 = 32 << 20;
const NONE: &[&str] = &[];

fn provisioned(seed: u64) -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, seed);
    lab.provision(&[]);
    lab
}

/// A client that has written 200 blocks, and is connected still.
fn writer(lab: &Lab) -> Remote {
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 200 7");
    client
}

/// What `session WHAT` prints; it must succeed.
fn session(lab: &Lab, what: &str) -> String {
    run(&mut lab.session(what)).ok().stdout
}

fn dirty(lab: &Lab) -> u64 {
    lab.status()["dirty_blocks"].as_u64().unwrap()
}

fn wait_for_line(server: &mut Server, words: &'static str) {
    server.0.wait_line(words, PATIENCE, |line| line.contains(words));
}

/// Panics unless the client reads the base everywhere.
fn assert_reads_the_base(lab: &Lab, client: &mut Remote) {
    for megabyte in 0..SIZE >> 20 {
        let compared = client.ask(&format!("compare {} 1048576 {}", megabyte << 20, lab.base().display()));
        assert_eq!(compared, "same", "megabyte {megabyte}");
    }
}

/// Panics unless a client that connects now is turned away, and the server says why.
fn assert_turned_away(lab: &Lab, server: &mut Server) {
    let mut client = Remote::start(&lab.socket());
    assert!(client.try_ask("connect").is_err());
    server.0.wait_line("why it was turned away", PATIENCE, |line| {
        line.contains("turned away") && line.contains("is held") && line.contains("session release")
    });
}

/// Invariants 2 and 3: `session end` in the middle of writes ends the session: when it is answered
/// nothing of it is in flight, the next client reads the base, and the disk becomes exact.
#[test]
fn session_end_while_a_client_writes_ends_the_session() {
    let lab = provisioned(61);
    let mut server = lab.serve(&["--num-queues", "2"]);
    let mut client = Remote::connected(&lab.socket(), 2);
    client.ask("storm 1");
    wait_until("the client has written", || dirty(&lab) > 1000);
    let said = session(&lab, "end");
    assert!(
        said.contains("session 2 ended")
            && said.contains("ended by the operator")
            && said.contains("to restore"),
        "{said}"
    );
    let status = lab.status();
    assert!(status["state"] != "in-session" && status["dirty_blocks"] == 0, "{status}");
    wait_for_line(&mut server, "(ended by the operator)");

    let mut next = Remote::connected(&lab.socket(), 1);
    assert_reads_the_base(&lab, &mut next);
    client.kill();
    next.leave();
    lab.wait_pristine();
    run(&mut lab.session("end")).refused(1, &["disk.img", "no session is open"]);
    server.stop();
    lab.assert_pristine();
}

/// A held disk is kept as the session left it: not a byte is restored, nobody gets a session, neither
/// from this server nor from the next, until it is released; then it becomes exact. Invariant 4.
#[test]
fn held_disk_is_kept_through_kill_and_restart_until_it_is_released() {
    let lab = provisioned(62);
    let mut server = lab.serve(NONE);
    let client = writer(&lab);
    let said = session(&lab, "hold");
    assert!(said.contains("held from the end of session"), "{said}");
    let status = lab.status();
    assert_eq!(
        (&status["state"], &status["held"]),
        (&json!("in-session"), &json!({"reason": "by-operator"}))
    );
    assert!(session(&lab, "hold").contains("already held"));
    let written = images::sha256(&lab.disk());
    assert_ne!(written, images::sha256(&lab.base()));

    client.leave();
    wait_for_line(&mut server, "is held (by the operator)");
    wait_until("status says held", || lab.state_word() == "held");
    assert_turned_away(&lab, &mut server);
    let status = lab.status();
    assert_eq!(
        (&status["pending_blocks"], &status["drain_failing"]),
        (&json!(200), &json!(false)),
        "{status}"
    );
    assert_eq!(images::sha256(&lab.disk()), written);

    server.kill();
    assert_eq!(lab.state_word(), "held");
    lab.run("restore", NONE).refused(1, &["disk.img", "is held", "pristine session release"]);
    let base = lab.base();
    let adopt = [std::ffi::OsStr::new("--adopt"), "--base".as_ref(), base.as_os_str()];
    lab.run("provision", &adopt).refused(1, &["disk.img", "is held", "pristine session release"]);

    let mut server = lab.serve(NONE);
    wait_for_line(&mut server, "is held (by the operator)");
    assert_turned_away(&lab, &mut server);
    assert_eq!((lab.state_word(), images::sha256(&lab.disk())), ("held".into(), written));
    assert!(lab.logs().iter().any(|log| lab.log_extents(log).iter().map(|run| run.1).sum::<u64>() == 200));

    let said = session(&lab, "release");
    assert!(said.contains("released; 200 blocks"), "{said}");
    lab.wait_pristine();
    run(&mut lab.session("release")).refused(1, &["disk.img", "nothing is held"]);
    let mut next = Remote::connected(&lab.socket(), 1);
    assert_reads_the_base(&lab, &mut next);
    next.leave();
    wait_until("the session has ended", || lab.state_word() == "pristine");
    server.stop();
    lab.assert_pristine();
}

/// A hold in the session of a server that is killed under a living VM: the session goes on with the next
/// server, and the hold begins when the VM is gone.
#[test]
fn held_session_whose_server_is_killed_goes_on_and_is_kept_at_its_end() {
    let lab = provisioned(72);
    let server = lab.serve(NONE);
    let mut client = writer(&lab);
    session(&lab, "hold");
    server.kill();
    let mut server = lab.serve(NONE);
    client.ask("connect");
    client.ask("scatter 100 8");
    let status = lab.status();
    assert_eq!((&status["state"], &status["held"]["reason"]), (&json!("in-session"), &json!("by-operator")));
    let written = images::sha256(&lab.disk());
    client.leave();
    wait_for_line(&mut server, "is held (by the operator)");
    assert_turned_away(&lab, &mut server);
    assert_eq!((lab.state_word(), images::sha256(&lab.disk())), ("held".into(), written));
    session(&lab, "release");
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// A session that was to go on with the next server, its VM being alive, is ended by the operator
/// instead: the VM does not get it back.
#[test]
fn session_left_open_by_a_stop_under_a_living_vm_is_ended_offline() {
    let lab = provisioned(73);
    let server = lab.serve(NONE);
    let client = writer(&lab);
    server.stop();
    assert!(session(&lab, "end").contains("200 blocks"));
    let server = lab.serve(NONE);
    lab.wait_pristine();
    server.stop();
    client.kill();
    lab.assert_pristine();
}

/// `session end` of a held session ends it and leaves it held; `serve --once` then does not claim to
/// have restored it.
#[test]
fn held_session_that_is_ended_stays_held() {
    let lab = provisioned(63);
    let mut server = lab.serve(&["--once"]);
    let client = writer(&lab);
    session(&lab, "hold");
    let said = session(&lab, "end");
    assert!(said.contains("held by the operator: 200 blocks"), "{said}");
    assert_eq!(server.0.wait(PATIENCE).code(), Some(1), "{}", server.0.output());
    assert_eq!(lab.state_word(), "held");
    client.kill();
    assert!(session(&lab, "release").contains("pristine restore"));
    assert_eq!(lab.state_word(), "interrupted");
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Where there is nothing to keep a hold is refused, and nothing is changed.
#[test]
fn hold_of_a_pristine_disk_is_refused() {
    let lab = provisioned(64);
    let manifest = fs::read(lab.state().join("manifest")).unwrap();
    run(&mut lab.session("hold")).refused(1, &["disk.img", "nothing to hold"]);
    run(&mut lab.session("release")).refused(1, &["disk.img", "nothing is held"]);
    run(&mut lab.session("end")).refused(1, &["disk.img", "no session is open"]);
    assert_eq!(fs::read(lab.state().join("manifest")).unwrap(), manifest);
    let server = lab.serve(NONE);
    run(&mut lab.session("hold")).refused(1, &["disk.img", "nothing to hold"]);
    let client = writer(&lab);
    client.leave();
    lab.wait_pristine();
    run(&mut lab.session("hold")).refused(1, &["disk.img", "nothing to hold"]);
    server.stop();
    lab.assert_pristine();
}

/// What a dead server left is ended, held and released without one.
#[test]
fn session_left_open_by_a_dead_server_is_controlled_offline() {
    let lab = provisioned(65);
    let server = lab.serve(NONE);
    let client = writer(&lab);
    let written = images::sha256(&lab.disk());
    server.kill();
    client.kill();
    let said = session(&lab, "end");
    assert!(said.contains("a server that is gone had left open") && said.contains("200 blocks"), "{said}");
    assert!(said.contains("pristine restore"), "{said}");
    assert_eq!((lab.state_word(), images::sha256(&lab.disk())), ("interrupted".into(), written.clone()));
    run(&mut lab.session("end")).refused(1, &["disk.img", "no session is open"]);
    // Nothing of it was restored yet.
    assert!(session(&lab, "hold").contains("200 blocks"));
    assert_eq!(lab.state_word(), "held");
    lab.run("restore", NONE).refused(1, &["is held"]);
    assert!(session(&lab, "release").contains("200 blocks"));
    assert!(session(&lab, "hold").contains("200 blocks"));
    session(&lab, "release");
    lab.run("restore", NONE).ok();
    run(&mut lab.session("hold")).refused(1, &["nothing to hold"]);
    lab.assert_pristine();
}

/// Invariant 3: a session that goes on with the next server, for its VM lives, is held and released offline
/// without being ended.
#[test]
fn session_left_open_under_a_living_vm_is_held_and_released_offline_and_goes_on() {
    let lab = provisioned(66);
    let server = lab.serve(NONE);
    let mut client = writer(&lab);
    server.kill();
    assert!(session(&lab, "hold").contains("from the end of session"));
    assert!(session(&lab, "hold").contains("already held"));
    assert!(session(&lab, "release").contains("restored when it ends"));
    session(&lab, "hold");
    let mut server = lab.serve(NONE);
    client.ask("connect");
    client.ask("scatter 100 8");
    assert_eq!(server.0.output().matches(" started").count(), 0, "{}", server.0.output());
    let written = images::sha256(&lab.disk());
    client.leave();
    wait_for_line(&mut server, "is held (by the operator)");
    server.stop();
    assert_eq!((lab.state_word(), images::sha256(&lab.disk())), ("held".into(), written));
    session(&lab, "release");
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Changes the base's times, and nothing else.
fn touch(lab: &Lab) {
    let file = fs::File::options().append(true).open(lab.base()).unwrap();
    file.set_modified(SystemTime::now()).unwrap();
}

/// A drain that fails says why, and when it tries again; the live page can't.
#[test]
fn status_of_a_failing_drain_says_why_and_when() {
    let lab = provisioned(67);
    let server = lab.serve(NONE);
    let client = writer(&lab);
    assert_eq!(lab.status()["drain_error"], Value::Null);
    touch(&lab);
    client.leave();
    wait_until("status says why", || lab.status()["drain_error"].is_string());
    let status = lab.status();
    assert!(status["drain_error"].as_str().unwrap().contains("base.img"), "{status}");
    let next = status["drain_next_attempt_unix_ms"].as_u64().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(next.abs_diff(now) < 120_000, "{next}, now {now}");
    let text = lab.run("status", NONE).ok().stdout;
    assert!(text.contains("tried again in ") && text.contains("base.img"), "{text}");
    // Without an answer the live page is what there is.
    fs::remove_file(lab.control_socket().unwrap()).unwrap();
    let status = lab.status();
    assert_eq!((&status["drain_failing"], &status["drain_error"]), (&json!(true), &Value::Null));
    server.stop();
}

fn ask(stream: &UnixStream, line: &str) -> Value {
    let mut writer = stream;
    writer.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// The socket is its user's alone, is strict, and goes with the server; a killed server's is replaced.
#[test]
fn control_socket_is_private_strict_and_removed() {
    let lab = provisioned(68);
    let server = lab.serve(NONE);
    let path = lab.control_socket().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let kind = |answer: Value| answer["error"]["kind"].as_str().unwrap_or("none").to_owned();
    assert_eq!(kind(ask(&stream, r#"{"version":1,"command":"status","why":1}"#)), "bad-request");
    assert_eq!(kind(ask(&stream, r#"{"version":1,"command":"session"}"#)), "unknown-command");
    assert_eq!(kind(ask(&stream, r#"{"version":9,"command":"status"}"#)), "unknown-version");
    assert_eq!(kind(ask(&stream, r#"{"version":1,"command":"session end"}"#)), "refused");
    let client = writer(&lab);
    let status = ask(&stream, r#"{"version":1,"command":"status"}"#);
    assert_eq!(
        (&status["version"], &status["result"]["dirty_blocks"], &status["result"]["held"]),
        (&json!(1), &json!(200), &Value::Null),
        "{status}"
    );
    assert!(status["result"]["session"]["owner_pid"].is_u64(), "{status}");

    server.kill();
    client.kill();
    let stale = fs::metadata(&path).unwrap();
    let server = lab.serve(NONE);
    let made = fs::metadata(&path).unwrap();
    assert!((stale.ino(), stale.ctime_nsec()) != (made.ino(), made.ctime_nsec()));
    lab.wait_pristine();
    server.stop();
    assert!(!path.exists() && lab.control_socket().is_none());
}

/// A silent client, and one that hangs in the middle of a line, keep nobody from ending a session.
#[test]
fn session_end_beside_silent_clients_is_carried_out() {
    let lab = provisioned(69);
    let server = lab.serve(NONE);
    let client = writer(&lab);
    let silent: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut stream = UnixStream::connect(lab.control_socket().unwrap()).unwrap();
            stream.write_all(b"{\"version\":1,").unwrap();
            stream
        })
        .collect();
    assert!(session(&lab, "end").contains("ended by the operator"));
    drop(silent);
    client.kill();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// A copy of a disk has its ID too; what is meant for the copy must not reach the original's server.
#[test]
fn session_end_of_a_copy_leaves_the_original_alone() {
    let lab = provisioned(70);
    let server = lab.serve(NONE);
    let mut client = writer(&lab);
    let copy = lab.path("copy.img");
    fs::copy(lab.disk(), &copy).unwrap();
    run(std::process::Command::new("cp").arg("-r").arg(lab.state()).arg(lab.path("copy.img.pristine"))).ok();
    let mut end = pristine(["session", "end", "--disk"]);
    let finished = run(end.arg(&copy).arg("--runtime-dir").arg(lab.runtime()));
    assert_eq!(finished.code, Some(1), "{finished:?}");
    client.ask("write 0 4096 1");
    assert_eq!(lab.state_word(), "in-session");
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

#[test]
fn session_command_of_wrong_usage_exits_with_2() {
    let lab = provisioned(71);
    for args in [&["session"][..], &["session", "end"], &["session", "explode", "--disk", "x"]] {
        let finished = run(&mut pristine(args));
        assert_eq!(finished.code, Some(2), "{finished:?}");
    }
    let finished = run(lab.session("hold").arg("--forever"));
    assert_eq!(finished.code, Some(2), "{finished:?}");
    let mut missing = pristine(["session", "end", "--disk"]);
    run(missing.arg(lab.path("missing.img"))).refused(1, &["missing.img", "not a pristine disk"]);
}
