//! QEMU's conventions for vhost-user backend programs, and what management layers expect of them.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::{pristine, pristine_binary, run};
use pristine_tests::remote::Remote;

const SIZE: u64 = 8 << 20;

fn provisioned() -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 91);
    lab.provision(&[]);
    lab
}

fn sees_the_base(lab: &Lab) {
    let mut client = Remote::connected(&lab.socket(), 1);
    assert_eq!(client.ask(&format!("compare 0 65536 {}", lab.base().display())), "same");
    client.leave();
}

/// With `--print-capabilities` the program prints a JSON object with its type and features.
#[test]
fn print_capabilities_names_the_type_and_the_features() {
    let finished = run(&mut pristine(["--print-capabilities"])).ok();
    let said: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(said["type"], "block");
    let features = said["features"].as_array().unwrap();
    assert!(features.contains(&"blk-file".into()) && features.contains(&"read-only".into()), "{said}");
}

/// `--blk-file` is `--disk`, and the word `serve` may be left out.
#[test]
fn serve_without_its_name_and_with_blk_file_serves() {
    let lab = provisioned();
    let mut command = Command::new(pristine_binary());
    command.arg("--blk-file").arg(lab.disk()).arg("--socket-path").arg(lab.socket());
    let server = Server::start(command.arg("--runtime-dir").arg(lab.runtime()));
    sees_the_base(&lab);
    server.stop();
}

/// `--fd`: the socket was made by whoever starts the program.
#[test]
fn serve_with_a_listening_socket_as_descriptor_serves() {
    let lab = provisioned();
    let listener = UnixListener::bind(lab.socket()).unwrap();
    // The descriptor reaches the program as its number 7, by way of a shell.
    let script = format!(
        "exec {} serve --disk {} --runtime-dir {} --fd 7 7<&{}",
        pristine_binary().display(),
        lab.disk().display(),
        lab.runtime().display(),
        listener.as_raw_fd()
    );
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let server = Server::start(Command::new("sh").args(["-c", &script]));
    drop(listener);
    sees_the_base(&lab);
    server.stop();
}

/// Invariant 7: `--fd` with a socket that systemd has activated. Its number is used for the disk by and by,
/// and nobody may take it for the socket again: the disk stays open and locked.
#[test]
fn serve_with_a_socket_from_systemd_keeps_the_disk_locked() {
    let lab = provisioned();
    let listener = std::os::unix::net::UnixListener::bind(lab.socket()).unwrap();
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vm1.socket exec {} serve --disk {} --runtime-dir {} --fd 3",
        listener.as_raw_fd(),
        pristine_binary().display(),
        lab.disk().display(),
        lab.runtime().display(),
    );
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let server = Server::start(Command::new("bash").args(["-c", &script]));
    drop(listener);
    sees_the_base(&lab);
    let locked = std::fs::File::open(lab.disk()).unwrap();
    let lock = rustix::fs::flock(&locked, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(lock, Err(rustix::io::Errno::WOULDBLOCK));
    server.stop();
    lab.assert_pristine();
}

/// `--read-only`: the guest is told so, and no session is ever dirty.
#[test]
fn serve_read_only_offers_a_read_only_device() {
    let lab = provisioned();
    let server = lab.serve(&["--read-only"]);
    let error = Remote::start(&lab.socket()).try_ask("connect").unwrap_err();
    assert!(error.contains("read-only"), "{error}");
    server.stop();
    lab.assert_pristine();
}

/// `--socket-mode`: others than root can be let in.
#[test]
fn socket_mode_is_that_of_the_option() {
    let lab = provisioned();
    let server = lab.serve(&["--socket-mode", "660"]);
    assert_eq!(std::fs::metadata(lab.socket()).unwrap().permissions().mode() & 0o777, 0o660);
    server.stop();
}

/// What a client is told of the device: its size, discards and write-zeroes, the queues asked for.
#[test]
fn device_tells_its_size_and_limits() {
    let lab = provisioned();
    let server = lab.serve(&["--num-queues", "3"]);
    let mut client = Remote::start(&lab.socket());
    assert_eq!(client.ask("connect 3"), SIZE.to_string());
    assert_eq!(client.ask("property max-queues"), "3");
    for limit in ["max-discard-len", "max-write-zeroes-len", "max-segments"] {
        assert_ne!(client.ask(&format!("property {limit}")), "0", "{limit}");
    }
    client.leave();
    server.stop();
}

/// Invariants 2 and 3: a discard of blocks that the session does not own succeeds without effect, one
/// of owned blocks leaves nothing of an older session to read.
#[test]
fn discard_dirties_nothing_that_the_session_does_not_own() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask(&format!("discard 0 {SIZE}"));
    assert_eq!(lab.status()["dirty_blocks"], 0);
    assert_eq!(client.ask(&format!("compare 0 1048576 {}", lab.base().display())), "same");
    client.ask("write 40960 8192 5");
    client.ask("discard 40960 8192");
    assert_eq!(lab.status()["dirty_blocks"], 2);
    client.ask("zero 81920 8192");
    let zeroes = "9f1dcbc35c350d6027f98be0f5c8b43b42ca52b7604459c0c42be3aa88913d47";
    assert_eq!(client.ask("read 81920 8192"), zeroes);
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Requests outside the disk fail, and the device goes on.
#[test]
fn request_outside_the_disk_fails_and_the_next_one_succeeds() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    for command in [
        format!("read {SIZE} 4096"),
        format!("write {} 8192 1", SIZE - 4096),
        "read 9223372036854771712 4096".into(),
        format!("zero {SIZE} 512"),
    ] {
        client.try_ask(&command).unwrap_err();
    }
    assert_eq!(lab.status()["dirty_blocks"], 0);
    assert_eq!(client.ask(&format!("compare 0 65536 {}", lab.base().display())), "same");
    client.leave();
    server.stop();
    lab.assert_pristine();
}
