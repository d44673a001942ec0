//! A frontend that connects again at once when its connection ends. Cloud Hypervisor does, tries again
//! every 100 ms while nobody listens, but gives up its disk for ever when a connection that it got breaks.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use pristine_tests::PATIENCE;
use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::run;
use pristine_tests::remote::Remote;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};

/// Waits for the end of `connection` and connects again. Panics if that connection breaks as well.
fn connect_again(mut connection: UnixStream, socket: &Path) {
    // Both mean that it is over.
    assert!(matches!(connection.read(&mut [0]), Ok(0) | Err(_)));
    let again = UnixStream::connect(socket);
    match again {
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound), "{error}");
        }
        Ok(mut again) => panic!("a server that is going away was connected to: {:?}", again.read(&mut [0])),
    }
}

/// Ends servers with `signal` while a frontend is connected.
fn end_servers(signal: Signal, rounds: u32) {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 7);
    lab.provision(&[]);
    for _ in 0..rounds {
        let server = lab.serve(&[]);
        let connection = UnixStream::connect(lab.socket()).unwrap();
        // Refused, because the first one was taken.
        let mut second = UnixStream::connect(lab.socket()).unwrap();
        assert!(matches!(second.read(&mut [0]), Ok(0) | Err(_)));
        std::thread::scope(|scope| {
            scope.spawn(|| connect_again(connection, &lab.socket()));
            server.0.signal(signal);
        });
        drop(server);
    }
}

/// Invariant 3: `kill -9`. The kernel closes what the server had open one by one.
#[test]
fn frontend_of_a_killed_server_that_connects_again_at_once_finds_nobody() {
    end_servers(Signal::KILL, 40);
}

/// Invariant 3: SIGTERM, such as for an upgrade.
#[test]
fn frontend_of_a_stopped_server_that_connects_again_at_once_finds_nobody() {
    end_servers(Signal::TERM, 10);
}

/// Invariant 3: a server that can't start, because its disk can't be opened, takes nobody. The frontend
/// of the one before can wait for another.
#[test]
fn frontend_of_a_server_that_cannot_start_finds_nobody() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 7);
    lab.provision(&[]);
    lab.serve(&[]).kill();
    assert!(lab.socket().exists());
    images::dense(&lab.base(), 1 << 20, 8);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let attempts = scope.spawn(|| {
            let mut attempts = 0;
            while !over.load(Ordering::Relaxed) {
                attempts += 1;
                if UnixStream::connect(lab.socket()).is_ok() {
                    return Err(attempts);
                }
            }
            Ok(attempts)
        });
        for _ in 0..5 {
            let mut command = lab.pristine("serve", &["--socket-path"]);
            assert_eq!(run(command.arg(lab.socket())).code, Some(1));
        }
        over.store(true, Ordering::Relaxed);
        let attempts = attempts.join().unwrap().expect("somebody was there");
        assert!(attempts > 100, "only {attempts} attempts: the test proves nothing");
    });
}

/// Invariant 3: a VM that the server has no number for, as from one container to another, hangs up and connects again, as
/// Cloud Hypervisor does when its guest reboots. It is the owner still, and at its process's end the session ends at once.
#[test]
fn frontend_in_another_pid_namespace_comes_back_to_its_session() {
    let inside = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    // The file system of pidfds (Linux 6.9).
    let kind = rustix::fs::fstatfs(pidfd_open(getpid(), PidfdFlags::empty()).unwrap()).unwrap().f_type;
    if kind != 0x5049_4446 || run(Command::new("unshare").args(inside).arg("true")).code != Some(0) {
        return eprintln!("not tested: no pid namespaces here, or no inodes of processes");
    }
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 7);
    lab.provision(&[]);
    let serve = lab.pristine("serve", &["--reconnect-grace", "0"]);
    let mut command = Command::new("unshare");
    command.args(inside).arg(serve.get_program()).args(serve.get_args());
    command.arg("--socket-path").arg(lab.socket());
    let mut server = Server::start(&command);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 4096 4096 5");
    let written = client.ask("read 4096 4096");
    for _ in 0..3 {
        client.ask("disconnect");
        client.ask("connect 1");
        assert_eq!(client.ask("read 4096 4096"), written);
    }
    client.ask("disconnect");
    client.kill();
    let ended = server.0.wait_line("the session's end", PATIENCE, |line| line.contains("ended after"));
    assert!(ended.contains("process is gone"), "{ended}");
    server.0.wait_line("the restored disk", PATIENCE, |line| line.contains("pristine"));
    let output = server.0.output();
    assert_eq!(output.matches(" started").count(), 1, "{output}");
    let children = format!("/proc/{0}/task/{0}/children", server.0.pid());
    let inner = std::fs::read_to_string(children).unwrap();
    kill_process(Pid::from_raw(inner.trim().parse().unwrap()).unwrap(), Signal::TERM).unwrap();
    // Ends with it, and as it does.
    assert!(server.0.wait(PATIENCE).success());
    lab.assert_pristine();
}

/// Invariant 3: a VM that the next server is not shown, as with `ProtectProc=`, has not ended for that. Who can't be watched has the grace.
#[test]
fn session_of_a_vm_that_is_not_shown_outlasts_a_restart() {
    let hidden = ["--mount", "sh", "-c", "mount -t tmpfs none /proc/$0 && exec \"$@\""];
    let own = getpid().as_raw_nonzero().to_string();
    if run(Command::new("unshare").args(hidden).args([&own, "true"])).code != Some(0) {
        return eprintln!("not tested: no mount namespaces here");
    }
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 9);
    lab.provision(&[]);
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 4096 4096 5");
    server.kill();
    let serve = lab.pristine("serve", &["--reconnect-grace", "600"]);
    let mut command = Command::new("unshare");
    command.args(hidden).arg(client.pid().to_string()).arg(serve.get_program()).args(serve.get_args());
    command.arg("--socket-path").arg(lab.socket());
    let mut server = Server::start(&command);
    // It is still there to be ended.
    let ended = run(&mut lab.session("end")).ok();
    assert!(ended.stdout.contains("ended"), "{ended:?}");
    let line = server.0.wait_line("the session's end", PATIENCE, |line| line.contains("ended after"));
    assert!(line.contains("ended by the operator"), "{line}");
    client.kill();
    server.stop();
}
