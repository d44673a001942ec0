//! The server dies or is restarted under a living VM, and the VM's session goes on.

use std::time::Duration;

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::storm_binary;
use pristine_tests::random::Random;
use pristine_tests::{count_from_env, heavy, seed_from_env};

const SCRIPT: &str = "guest-storm /dev/vda 16 $(cat /seed)";

/// A guest whose threads write and verify, on a disk that is served with `more` arguments.
fn storming_guest(lab: &Lab, seed: u64) -> Guest {
    let options = Options { reconnects: true, ..Options::default() };
    let script = SCRIPT.replace("$(cat /seed)", &seed.to_string());
    let mut guest =
        Guest::boot_with(&lab.socket(), options, &script, &[("bin/guest-storm", &storm_binary())]);
    guest.said("storm");
    guest
}

fn lab() -> Lab {
    let lab = Lab::new();
    images::sparse(&lab.base(), 96 << 20, 11, &[(0, 40 << 20), (64 << 20, 8 << 20)]);
    lab.provision(&["--lazy"]);
    lab
}

/// Invariant 3: the server is killed again and again under a guest whose threads write and verify, with
/// the drain of a lazy provision beneath: no I/O error, nothing acknowledged is lost. Afterwards
/// invariants 2 and 4.
#[test]
fn guest_whose_server_is_killed_again_and_again_sees_no_error_and_loses_nothing() {
    let _alone = heavy();
    let (kills, seed) = (count_from_env("PRISTINE_KILLS", 20), seed_from_env());
    let (lab, mut random) = (lab(), Random::new(seed));
    // Past the page cache: requests take long enough for kills to come in between.
    let args = ["--num-queues", "2", "--direct", "--engine", "io-uring", "-v"];
    let mut server = lab.serve(&args);
    let mut guest = storming_guest(&lab, seed);
    let mut done = 0;
    let mut again = 0;
    for _ in 0..kills {
        // A little after some operations: anywhere in the life of a request.
        (done, _) = guest.storms(done + random.below(100));
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        server.kill();
        server = lab.serve(&args);
        done = guest.storms(done).0;
        let output = server.0.output();
        again += output.matches("requests in flight are done again").count();
        assert!(output.contains("goes on"), "the session was not taken up:\n{output}");
    }
    guest.type_line("enough");
    let total = guest.said("storm-ok");
    guest.finish();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    println!(
        "{kills} kills under {total} operations (seed {seed}); in-flight requests done again after {again}"
    );
}

/// Invariant 3: SIGTERM and a new start, as an upgrade of the package does it.
#[test]
fn guest_whose_server_is_restarted_in_order_goes_on() {
    let _alone = heavy();
    let (restarts, seed) = (count_from_env("PRISTINE_RESTARTS", 3), seed_from_env());
    let lab = lab();
    let mut server = lab.serve(&["--num-queues", "2", "-vv"]);
    let mut guest = storming_guest(&lab, seed);
    let (mut done, mut stalls) = (0, Vec::new());
    for _ in 0..restarts {
        done = guest.storms(done + 200).0;
        server.stop();
        assert_eq!(lab.state_word(), "interrupted");
        server = lab.serve(&["--num-queues", "2", "-vv"]);
        let (now, worst) = guest.storms(done + 50);
        (done, stalls) = (now, [stalls, vec![worst]].concat());
    }
    guest.type_line("enough");
    guest.said("storm-ok");
    guest.finish();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    println!("the slowest operation over each of {restarts} restarts: {stalls:?} ms");
}
