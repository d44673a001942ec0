//! `serve --reset-on never`: what sessions change is kept, until it is given up.

use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;

const SIZE: u64 = 32 << 20;
const NONE: &[&str] = &[];
const KEEP: &[&str] = &["--reset-on", "never"];

/// The hash of what a client reads from the first 64 KiB.
fn read(client: &mut Remote) -> String {
    client.ask("read 0 65536")
}

/// What a session writes is there for the next one, of this server and of the one after a kill; nobody
/// gives it up by mistake; once it is given up the disk is exact again (invariant 4).
#[test]
fn kept_changes_are_there_for_the_next_session_until_they_are_given_up() {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 91);
    // Lazy: what is pending is restored before the first session begins.
    lab.provision(&["--lazy"]);
    let server = lab.serve(KEEP);
    assert_eq!(lab.state_word(), "pristine");
    // A session that changes nothing leaves nothing to keep.
    let mut client = Remote::connected(&lab.socket(), 1);
    read(&mut client);
    client.leave();
    lab.wait_pristine();

    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 4096 8192 5");
    client.ask("flush");
    let written = read(&mut client);
    client.leave();
    wait_until("status says kept", || lab.state_word() == "kept");
    let status = lab.status();
    assert_eq!((&status["dirty_blocks"], &status["pending_blocks"]), (&2.into(), &0.into()), "{status}");

    let mut client = Remote::connected(&lab.socket(), 1);
    assert_eq!(read(&mut client), written);
    client.ask("write 32768 4096 6");
    let written = read(&mut client);
    server.kill();
    client.kill();
    let words = ["disk.img", "kept", "--reset-on never", "restore --discard-kept"];
    let socket = lab.socket();
    lab.run("serve", &["--socket-path".as_ref(), socket.as_os_str()]).refused(1, &words);
    lab.run("restore", NONE).refused(1, &words);

    let server = lab.serve(KEEP);
    let mut client = Remote::connected(&lab.socket(), 1);
    assert_eq!(read(&mut client), written);
    client.leave();
    wait_until("status says kept", || lab.state_word() == "kept");
    server.stop();
    assert_eq!(lab.state_word(), "kept");
    assert_eq!(lab.run("verify", NONE).code, Some(1));
    lab.run("restore", &["--discard-kept"]).ok();
    lab.assert_pristine();
    let server = lab.serve(NONE);
    server.stop();
}
