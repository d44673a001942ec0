//! How a session disk is made, and what is left to do afterwards.

use std::fs;

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::mounts::LoopDevice;
use pristine_tests::nbd::{Kind, NbdServer};
use pristine_tests::process::Process;
use pristine_tests::program::{pristine, run};
use pristine_tests::remote::Remote;
use pristine_tests::{PATIENCE, wait_until};
use rustix::process::Signal;

const NONE: &[&str] = &[];

/// Invariant 4: bytes and holes of a sparse base are those of the disk.
#[test]
fn provision_copies_data_and_keeps_holes() {
    let lab = Lab::new();
    let size = (1 << 30) + 1536;
    images::sparse(&lab.base(), size, 101, &[(4096, 8192), (500 << 20, 3 << 20), (size - 512, 512)]);
    lab.provision(&[]);
    lab.assert_pristine();
    assert!(images::allocated(&lab.disk()) < 8 << 20);
}

/// Lazily provisioned, the disk is not pristine, but `restore` makes it so.
#[test]
fn restore_of_a_lazily_provisioned_disk_makes_it_exact() {
    let lab = Lab::new();
    images::sparse(&lab.base(), 64 << 20, 102, &[(0, 20 << 20), (50 << 20, 1 << 20)]);
    lab.provision(&["--lazy"]);
    let status = lab.status();
    assert_eq!(status["pending_blocks"], 21 * 256, "{status}");
    assert_ne!(status["state"], "pristine");
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Invariant 2: a block that a lazily provisioned disk never got is read from the base, a part of it
/// that is written is merged with the base's.
#[test]
fn session_on_a_lazily_provisioned_disk_reads_the_base() {
    let lab = Lab::new();
    images::dense(&lab.base(), 256 << 20, 103);
    lab.provision(&["--lazy"]);
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    let base = lab.base();
    let at = (200 << 20) + 1024;
    client.ask(&format!("write {at} 512 9"));
    for (offset, len) in [(0, 1 << 20), (at - 1024, 1024), (at + 512, 4096 - 1536), (255 << 20, 1 << 20)] {
        assert_eq!(client.ask(&format!("compare {offset} {len} {}", base.display())), "same", "at {offset}");
    }
    assert_eq!(client.ask(&format!("compare {at} 512 {}", base.display())), "different");
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}

/// The state can lie in a directory of its own.
#[test]
fn state_directory_of_the_option_is_used() {
    let lab = Lab::new();
    images::dense(&lab.base(), 8 << 20, 104);
    let state = lab.path("elsewhere");
    let option = state.to_str().unwrap();
    lab.provision(&["--state-dir", option]);
    assert!(state.join("manifest").exists() && !lab.state().exists());
    let server = lab.serve(&["--state-dir", option]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    client.leave();
    server.stop();
    lab.run("restore", &["--state-dir", option]).ok();
    lab.run("verify", &["--state-dir", option]).ok();
    images::assert_equal(&lab.disk(), &lab.base());
}

/// Old logs stay for audit, as many as are asked for.
#[test]
fn retired_logs_are_kept_as_many_as_asked_for() {
    let lab = Lab::new();
    images::dense(&lab.base(), 8 << 20, 105);
    lab.provision(&[]);
    let server = lab.serve(&["--keep-logs", "3"]);
    for session in 0..6_u64 {
        let mut client = Remote::connected(&lab.socket(), 1);
        client.ask(&format!("write {} 4096 1", session * 8192));
        client.leave();
        lab.wait_pristine();
    }
    server.stop();
    let shown: Vec<_> = lab.logs().iter().map(|log| lab.log_extents(log)).collect();
    for session in 3..6 {
        assert!(shown.contains(&vec![(session * 2, 1)]), "session {session} is not in {shown:?}");
    }
    assert!((3..=4).contains(&shown.len()), "{} logs are there", shown.len());
    // Another command does not know how many are wanted.
    let before = lab.logs();
    lab.run("restore", NONE).ok();
    assert_eq!(lab.logs(), before);
}

/// Invariants 2 and 4 with a block device as the session disk.
#[test]
fn block_device_as_session_disk_is_restored() {
    let lab = Lab::new();
    images::dense(&lab.base(), 16 << 20, 106);
    let backing = lab.path("backing.img");
    images::dense(&backing, 16 << 20, 107);
    let Some(device) = LoopDevice::of(&backing) else { return };
    let state = lab.path("state");
    let command = |words: &[&str]| {
        let mut command = pristine(words);
        command.arg("--disk").arg(device.path()).arg("--state-dir").arg(&state);
        command.arg("--runtime-dir").arg(lab.runtime());
        command
    };
    run(command(&["provision"]).arg("--base").arg(lab.base())).refused(1, &["is not empty", "--adopt"]);
    run(command(&["provision", "--adopt"]).arg("--base").arg(lab.base())).ok();
    run(&mut command(&["verify"])).ok();
    let mut serve = command(&["serve", "--once"]);
    serve.arg("--socket-path").arg(lab.socket());
    let mut server = pristine_tests::lab::Server::start(&serve);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 1000 1");
    client.leave();
    assert!(server.0.wait(pristine_tests::PATIENCE).success());
    run(&mut command(&["verify"])).ok();
    drop(device);
    assert_eq!(fs::read(&backing).unwrap(), fs::read(lab.base()).unwrap());
}

/// Invariants 2 and 5: a device base is what its link leads to, also when devices have other numbers after a reboot; what has its
/// number or its link then is not taken for it.
#[test]
fn device_that_is_a_base_is_known_by_its_link_and_by_what_the_kernel_says_of_it() {
    let lab = Lab::new();
    let other = lab.path("other.img");
    images::dense(&lab.base(), 4 << 20, 117);
    images::dense(&other, 4 << 20, 118);
    let link = lab.path("golden");
    let lead_to = |device: &LoopDevice| {
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(device.path(), &link).unwrap();
    };
    let Some(golden) = LoopDevice::of(&lab.base()) else { return };
    lead_to(&golden);
    let made = lab.run("provision", &["--base", link.to_str().unwrap()]).ok();
    assert!(made.stderr.contains("not noticed without a seal"), "{made:#?}");
    assert_eq!(lab.status()["base"], link.to_str().unwrap());
    // Numbers are given anew.
    drop(golden);
    let (impostor, golden) = (LoopDevice::of(&other).unwrap(), LoopDevice::of(&lab.base()).unwrap());
    lead_to(&golden);
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 300 1");
    client.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    lead_to(&impostor);
    for command in ["verify", "restore"] {
        lab.run(command, NONE).refused(1, &["it was the device", "base.img", "and is", "other.img"]);
    }
}

/// In `/dev` nothing outlasts a reboot: the state of a device is not kept there by accident.
#[test]
fn state_of_a_block_device_is_not_kept_in_memory() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 115);
    let backing = lab.path("backing.img");
    fs::File::create(&backing).unwrap().set_len(1 << 20).unwrap();
    let Some(device) = LoopDevice::of(&backing) else { return };
    let mut provision = pristine(["provision"]);
    provision.arg("--base").arg(lab.base()).arg("--disk").arg(device.path());
    provision.arg("--runtime-dir").arg(lab.runtime());
    let state = format!("{}.pristine", device.path().display());
    run(&mut provision).refused(1, &["in memory", "--state-dir"]);
    assert!(!std::path::Path::new(&state).exists());
    // Empty, it is taken without being asked.
    run(provision.arg("--state-dir").arg(lab.path("state"))).ok();
    drop(device);
    assert_eq!(fs::read(&backing).unwrap(), fs::read(lab.base()).unwrap());
}

/// A name of a device that is not there is not that of a disk which is in memory and gone after a reboot.
#[test]
fn device_that_is_missing_does_not_become_a_file() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 118);
    let missing = format!("/dev/pristine-test-{}", std::process::id());
    let mut provision = pristine(["provision", "--disk", &missing, "--base"]);
    provision
        .arg(lab.base())
        .arg("--runtime-dir")
        .arg(lab.runtime())
        .arg("--state-dir")
        .arg(lab.path("state"));
    let refused = run(&mut provision);
    let was_made = fs::remove_file(&missing).is_ok();
    refused.refused(1, &["there is no device", &missing]);
    assert!(!was_made && !lab.path("state").exists());
}

/// Whose disk is missing may have lost a mount, not the disk: what is known of it is not replaced unasked, and not at all while it says that
/// something is to be kept.
#[test]
fn state_of_a_disk_that_is_gone_is_replaced_when_that_is_asked_for() {
    let lab = Lab::new();
    images::dense(&lab.base(), 4 << 20, 119);
    let provision = |more: &[&str]| run(lab.pristine("provision", more).arg("--base").arg(lab.base()));
    lab.provision(&[]);
    fs::remove_file(lab.disk()).unwrap();
    provision(&[]).refused(1, &["disk.img is not there", "manifest", "mounted", "--adopt"]);
    assert!(!lab.disk().exists());
    provision(&["--adopt"]).ok();
    lab.assert_pristine();
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    run(&mut lab.session("hold")).ok();
    client.leave();
    server.stop();
    assert_eq!(lab.status()["state"], "held");
    fs::remove_file(lab.disk()).unwrap();
    let manifest = fs::read(lab.state().join("manifest")).unwrap();
    provision(&["--adopt"])
        .refused(1, &["disk.img is not there", "to be kept", &format!("remove {}", lab.state().display())]);
    assert!(!lab.disk().exists());
    assert_eq!(fs::read(lab.state().join("manifest")).unwrap(), manifest);
    fs::remove_dir_all(lab.state()).unwrap();
    provision(&[]).ok();
    lab.assert_pristine();
}

/// Nothing is left of a disk that was not filled, but one that was there before stays, and is gone on with.
#[test]
fn provision_that_is_stopped_says_what_is_left() {
    let lab = Lab::new();
    images::dense(&lab.base(), 8 << 20, 116);
    let server = NbdServer::start(Kind::Nbdkit, &lab.base(), 512 << 10);
    let stopped = |more: &[&str], words: &'static str| {
        let mut command = lab.pristine("provision", &["--base", &server.uri()]);
        let mut process = Process::spawn("provision", command.args(more));
        wait_until("state of the disk", || lab.state().join("manifest").exists());
        process.signal(Signal::TERM);
        process.wait_line("what is left", PATIENCE, |line| line.contains(words));
        assert_eq!(process.wait(PATIENCE).code(), Some(1));
    };
    stopped(&[], "what was made is removed");
    assert!(!lab.disk().exists() && !lab.state().exists());
    // Nor in a directory that somebody has made for it.
    fs::create_dir(lab.state()).unwrap();
    stopped(&[], "what was made is removed");
    assert_eq!(fs::read_dir(lab.state()).unwrap().count(), 0, "something is left in the state directory");
    assert_eq!(
        fs::read_dir(lab.runtime()).map_or(0, Iterator::count),
        0,
        "something is left in the runtime directory"
    );
    fs::File::create(lab.disk()).unwrap().set_len(8 << 20).unwrap();
    stopped(&["--adopt"], "pristine restore");
    let mut process = Process::spawn("restore", &lab.pristine("restore", NONE));
    wait_until("restore", || lab.status()["state"] == "restoring");
    process.signal(Signal::TERM);
    process.wait_line("what is left", PATIENCE, |line| {
        line.contains("are still to be restored") && line.contains("goes on")
    });
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    lab.run("restore", NONE).ok();
    assert_eq!(fs::read(lab.disk()).unwrap(), fs::read(lab.base()).unwrap());
}

/// What somebody wants to keep, or has in use, is not taken over.
#[test]
fn adopt_of_kept_changes_and_of_an_open_session_is_refused() {
    let lab = Lab::new();
    images::dense(&lab.base(), 4 << 20, 117);
    lab.provision(&[]);
    let mut adopt = lab.pristine("provision", &["--adopt"]);
    adopt.arg("--base").arg(lab.base());
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    server.kill();
    run(&mut adopt).refused(1, &["a session of process", "is open"]);
    client.leave();
    lab.run("restore", NONE).ok();
    let server = lab.serve(&["--reset-on", "never"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    client.leave();
    server.stop();
    run(&mut adopt).refused(1, &["kept", "--discard-kept"]);
    lab.run("restore", &["--discard-kept"]).ok();
    run(&mut adopt).ok();
    // What the new disk's logs are is not forgotten for the old one's: numbers go on.
    lab.assert_pristine();
}

/// Who is not allowed files of that size is told so, as of any other failure, and nothing half-made is left. A server
/// goes on, and its guest gets an error.
#[test]
fn limit_of_a_files_size_is_an_error_and_no_end() {
    let lab = Lab::new();
    images::dense(&lab.base(), 32 << 20, 104);
    // In sectors.
    let limited = |command: &std::process::Command, sectors: u64| {
        let mut limited = std::process::Command::new("sh");
        limited.args(["-c", &format!("ulimit -f {sectors} && exec \"$0\" \"$@\"")]);
        limited.arg(command.get_program()).args(command.get_args());
        limited
    };
    let mut provision = pristine(["provision", "--base"]);
    provision.arg(lab.base()).arg("--disk").arg(lab.disk()).arg("--runtime-dir").arg(lab.runtime());
    run(&mut limited(&provision, 20_000)).refused(1, &["disk.img", "too large"]);
    assert!(!lab.disk().exists() && !lab.state().exists());
    lab.provision(&[]);
    let socket = lab.socket();
    let serve = lab.pristine("serve", &["--socket-path".as_ref(), socket.as_os_str()]);
    let server = Server::start(&limited(&serve, 20_000));
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    client.try_ask(&format!("write {} 4096 1", 20 << 20)).unwrap_err();
    client.ask("write 4096 4096 1");
    client.leave();
    server.stop();
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}
