//! What is not the end of a session although the rings stop, and what is although nobody says so.

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::storm_binary;

const PROGRAM: &str = "bin/guest-storm";

fn lab() -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), 32 << 20, 41);
    lab.provision(&[]);
    lab
}

/// Invariant 3: QEMU stops the rings and the VM for a while, again and again, as for a snapshot.
#[test]
fn guest_that_is_paused_goes_on_in_its_session() {
    let lab = lab();
    let mut server = lab.serve(&["--num-queues", "2"]);
    let script = "guest-storm /dev/vda 4 7";
    let mut guest =
        Guest::boot_with(&lab.socket(), Options::default(), script, &[(PROGRAM, &storm_binary())]);
    guest.said("up");
    let mut done = 0;
    for _ in 0..5 {
        done = guest.storms(done + 20).0;
        guest.monitor("stop");
        assert!(guest.monitor("info status").contains("paused"));
        assert_eq!(lab.state_word(), "in-session");
        guest.monitor("cont");
    }
    guest.storms(done + 20);
    guest.type_line("enough");
    guest.said("storm-ok");
    guest.finish();
    server.0.wait_line("the session's end", pristine_tests::PATIENCE, |line| line.contains("ended after"));
    lab.wait_pristine();
    let output = server.0.output();
    assert_eq!(output.matches(" started").count(), 1, "{output}");
    server.stop();
    lab.assert_pristine();
}

/// With `-no-shutdown` the guest powers off and QEMU stays: its session is open until it exits.
#[test]
fn session_of_a_guest_that_is_off_ends_with_its_qemu() {
    let lab = lab();
    let mut server = lab.serve(&[]);
    let options = Options { stays: true, ..Options::default() };
    let script = "echo written >/dev/vda; sync";
    let mut guest = Guest::boot(&lab.socket(), options, script);
    assert_eq!(guest.said("job-ended"), "0");
    pristine_tests::wait_until("the guest is off", || guest.monitor("info status").contains("shutdown"));
    assert_eq!(lab.state_word(), "in-session");
    assert!(!server.0.output().contains("ended after"));
    guest.kill();
    server.0.wait_line("the session's end", pristine_tests::PATIENCE, |line| line.contains("ended after"));
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}
