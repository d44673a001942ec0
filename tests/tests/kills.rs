//! The server and its client are killed again and again, with a third-party client that knows every
//! sector that it may read. The counts are small here; `ci/hunt` asks for more.

use std::path::Path;
use std::time::Duration;

use pristine_tests::lab::{Lab, memory_root};
use pristine_tests::program::scratch_root;
use pristine_tests::random::Random;
use pristine_tests::remote::Remote;
use pristine_tests::{count_from_env, images, seed_from_env};

const SIZE: u64 = 16 << 20;

/// A disk with blocks in all states: half of the base is holes, and nothing was copied yet.
fn lab() -> Lab {
    lab_in(&scratch_root())
}

fn lab_in(parent: &Path) -> Lab {
    let lab = Lab::in_dir(parent);
    images::sparse(&lab.base(), SIZE, 5, &[(0, 5 << 20), (8 << 20, 3 << 20), (SIZE - 8192, 8192)]);
    lab.provision(&["--lazy"]);
    lab
}

fn pause(random: &mut Random) {
    // A moment anywhere in the life of the requests, sessions and drains before; not a wait for anything.
    std::thread::sleep(Duration::from_micros(random.below(60_000)));
}

/// Invariant 3: the server is killed under a client that then connects again from the same process: its
/// session goes on, nothing acknowledged is lost, and nothing is read that it has not written: of a write that was
/// under way each sector is there, or not, as a whole. On a disk and in memory, where other ways may be taken.
#[test]
fn client_that_comes_back_to_a_killed_server_has_lost_nothing() {
    let (kills, seed) = (count_from_env("PRISTINE_KILLS", 40), seed_from_env());
    let mut random = Random::new(seed);
    let places = [Some(scratch_root()), memory_root()].into_iter().flatten();
    let cases: Vec<_> =
        places.flat_map(|place| ["io-uring", "sync"].map(|engine| (place.clone(), engine))).collect();
    for (place, engine) in &cases {
        let lab = lab_in(place);
        let args = ["--num-queues", "2", "--engine", *engine];
        let mut server = lab.serve(&args);
        let mut client = Remote::start(&lab.socket());
        client.ask(&format!("load {}", lab.base().display()));
        client.ask(&format!("endure {} 2 16", random.bits() >> 1));
        let mut last = String::new();
        for _ in 0..kills.div_ceil(cases.len() as u64) {
            pause(&mut random);
            server.kill();
            server = lab.serve(&args);
            last = client.ask("reopen");
        }
        println!("{engine}, {} kills: {last}", kills.div_ceil(cases.len() as u64));
        let end = client.ask("enough");
        println!("{engine}, at the end: {end}");
        client.leave();
        lab.wait_pristine();
        server.stop();
        lab.assert_pristine();
    }
}

/// Invariants 2 and 3: while the owner of a session lives, another process waits the grace, and then has a
/// session of its own; the owner comes too late.
#[test]
fn another_process_after_a_kill_of_the_server_has_a_new_session() {
    let lab = lab();
    let server = lab.serve(&[]);
    let mut owner = Remote::connected(&lab.socket(), 1);
    owner.ask("scatter 300 9");
    server.kill();
    let mut server = lab.serve(&["--reconnect-grace", "1"]);
    let mut other = Remote::connected(&lab.socket(), 1);
    assert_eq!(other.ask(&format!("compare 0 {} {}", 1 << 20, lab.base().display())), "same");
    assert!(owner.try_ask("connect 1").is_err());
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(other.ask(&format!("compare {at} {} {}", 1 << 20, lab.base().display())), "same");
    }
    server
        .0
        .wait_line("the takeover", pristine_tests::PATIENCE, |line| line.contains("another VM took over"));
    other.leave();
    owner.kill();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Invariant 2: server and client are killed together, and the next session begins at once, with the drain
/// in flight: no byte of an earlier session is read.
#[test]
fn session_after_a_kill_of_server_and_client_reads_the_base_only() {
    let (kills, seed) = (count_from_env("PRISTINE_PAIR_KILLS", 15), seed_from_env());
    let mut random = Random::new(seed);
    let lab = lab();
    let args = ["--num-queues", "2"];
    let mut pending = 0;
    for _ in 0..kills {
        let server = lab.serve(&args);
        let mut client = Remote::start(&lab.socket());
        client.ask(&format!("load {}", lab.base().display()));
        // What it reads must be the base's or its own.
        client.ask(&format!("endure {} 2 16", random.bits() >> 1));
        pause(&mut random);
        if random.below(2) == 0 {
            client.kill();
            server.kill();
        } else {
            server.kill();
            client.kill();
        }
        let server = lab.serve(&args);
        let mut next = Remote::connected(&lab.socket(), 2);
        pending += u64::from(lab.status()["pending_blocks"] != 0);
        for at in (0..SIZE).step_by(4 << 20) {
            let read = next.ask(&format!("compare {at} {} {}", 1 << 20, lab.base().display()));
            assert_eq!(read, "same", "at {at}, PRISTINE_SEED={seed}");
        }
        if random.below(2) == 0 {
            // It writes too, and dies with the server in the middle of the drain.
            next.ask(&format!("storm {}", random.below(1 << 30)));
            pause(&mut random);
        }
        next.kill();
        server.kill();
    }
    println!(
        "{kills} kills of server and client; blocks were still pending in {pending} of the next sessions"
    );
    lab.run("restore", &[""; 0]).ok();
    lab.assert_pristine();
}

/// `restore` makes a disk pristine whatever the VM of a dead server is up to, and says so; that VM is not
/// served in another session.
#[test]
fn restore_under_a_living_vm_ends_its_session_and_says_so() {
    let lab = lab();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 300 9");
    server.kill();
    let restored = lab.run("restore", &[""; 0]).ok();
    assert!(restored.stderr.contains("that VM loses its disk"), "{restored:#?}");
    lab.assert_pristine();
    client.kill();
}
