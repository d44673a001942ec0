//! The VMM dies in the middle of writes.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;

/// Invariants 2 and 4: after `kill -9` of QEMU in mid-write the disk is made equal to the base.
#[test]
fn qemu_killed_in_mid_write_leaves_a_pristine_disk() {
    let lab = Lab::new();
    images::dense(&lab.base(), 64 << 20, 21);
    lab.provision(&[]);
    let server = lab.serve(&[]);
    let script = "
        say begin
        while true; do dd if=/dev/urandom of=/dev/vda bs=64k conv=notrunc 2>/dev/null || true; done
    ";
    let mut guest = Guest::boot(&lab.socket(), Options::default(), script);
    guest.said("begin");
    wait_until("the guest has written", || lab.status()["dirty_blocks"].as_u64() > Some(1000));
    guest.kill();

    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// Invariants 2 and 4: the same with many requests in flight on four queues, several times on one
/// server; each new session begins with the base's content.
#[test]
fn client_killed_in_a_storm_of_writes_leaves_a_pristine_disk() {
    let lab = Lab::new();
    images::dense(&lab.base(), 64 << 20, 22);
    lab.provision(&[]);
    let server = lab.serve(&["--num-queues", "4"]);
    let base = lab.base();
    for round in 0..5 {
        let mut client = Remote::connected(&lab.socket(), 4);
        for megabyte in 0..64 {
            let compared = client.ask(&format!("compare {} 1048576 {}", megabyte << 20, base.display()));
            assert_eq!(compared, "same", "round {round}, megabyte {megabyte}");
        }
        client.ask(&format!("storm {round}"));
        wait_until("the client has written", || lab.status()["dirty_blocks"].as_u64() > Some(2000));
        client.kill();
    }
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}
