//! A frontend that connects again at once when its connection ends. Cloud Hypervisor does, tries again
//! every 100 ms while nobody listens, but gives up its disk for ever when a connection that it got breaks.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::run;
use rustix::process::Signal;

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
