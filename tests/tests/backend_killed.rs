//! The backend dies in the middle of writes, or of a drain.

use std::collections::BTreeSet;

use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;

const SIZE: u64 = 128 << 20;

/// A provisioned disk whose server was killed while four queues wrote.
fn killed_in_mid_write(serve: &[&str]) -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 31);
    lab.provision(&[]);
    let server = lab.serve(&[&["--num-queues", "4"], serve].concat());
    let mut client = Remote::connected(&lab.socket(), 4);
    client.ask("storm 1");
    wait_until("the client has written", || lab.status()["dirty_blocks"].as_u64() > Some(3000));
    server.kill();
    client.kill();
    lab
}

/// Invariants 1 and 4: every block that differs from the base is in a log, and `restore` makes the
/// disk exact.
fn assert_logged_and_restorable(lab: &Lab) {
    let logged = lab.logged_blocks();
    let differing: BTreeSet<u64> = images::differing_blocks(&lab.disk(), &lab.base()).into_iter().collect();
    assert!(differing.len() > 1000, "only {} blocks differ: the test proves nothing", differing.len());
    let missing: Vec<_> = differing.difference(&logged).collect();
    assert!(missing.is_empty(), "{} of {} differing blocks are in no log", missing.len(), differing.len());
    assert_eq!(lab.run("verify", &[""; 0]).code, Some(1));
    assert_ne!(lab.state_word(), "pristine");

    lab.run("restore", &[""; 0]).ok();
    lab.assert_pristine();
}

/// Invariants 1 and 4, buffered.
#[test]
fn backend_killed_in_mid_write_has_logged_every_differing_block() {
    assert_logged_and_restorable(&killed_in_mid_write(&[]));
}

/// Invariants 1, 4 and 7 with O_DIRECT, whose writes can land after the kill: `restore` waits for the
/// lock that they hold.
#[test]
fn backend_with_direct_io_killed_in_mid_write_has_logged_every_differing_block() {
    assert_logged_and_restorable(&killed_in_mid_write(&["--direct"]));
}

/// Invariant 2: without `restore`, the next server's first session reads the base everywhere.
#[test]
fn session_after_a_killed_backend_reads_the_base() {
    let lab = killed_in_mid_write(&[]);
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    for megabyte in 0..SIZE >> 20 {
        let compared = client.ask(&format!("compare {} 1048576 {}", megabyte << 20, lab.base().display()));
        assert_eq!(compared, "same", "megabyte {megabyte}");
    }
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Invariants 2 and 4: a server killed while it drains leaves what is left to the next; killed again
/// and again, the disk still becomes exact, and a session in between reads the base.
#[test]
fn backend_killed_while_draining_goes_on_where_it_was() {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 32);
    lab.provision(&["--lazy"]);
    for round in 0..6 {
        let server = lab.serve(&[]);
        let mut client = Remote::connected(&lab.socket(), 1);
        let at = round * (SIZE / 6) / 4096 * 4096;
        let compared = client.ask(&format!("compare {at} 1048576 {}", lab.base().display()));
        assert_eq!(compared, "same", "round {round}");
        client.ask(&format!("scatter 2000 {round}"));
        client.kill();
        server.kill();
    }
    lab.run("restore", &[""; 0]).ok();
    lab.assert_pristine();
}
