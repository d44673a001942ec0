//! `pristine keep`: what a session wrote, as an image for QEMU's tools, and the disk is restored all the same.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::{Finished, run};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use serde_json::Value;

const SIZE: u64 = 96 << 20;
const NONE: &[&str] = &[];

/// `pristine keep --to NAME`.
fn keep(lab: &Lab, name: &str, more: &[&str]) -> (Finished, PathBuf) {
    let to = lab.path(name);
    let mut args = vec![OsStr::new("--to"), to.as_os_str()];
    args.extend(more.iter().map(OsStr::new));
    (lab.run("keep", &args), to)
}

/// A copy of the disk as it is now, holes and all.
fn copy_of_disk(lab: &Lab) -> PathBuf {
    let copy = lab.path("before.raw");
    run(Command::new("cp").arg("--sparse=always").arg(lab.disk()).arg(&copy)).ok();
    copy
}

/// Panics unless `qemu-img` finds nothing wrong with the overlay, and the same content as in `copy`.
#[track_caller]
fn assert_is_a_copy(overlay: &Path, copy: &Path, base: &Path, format: &str) {
    let check = run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(overlay)).ok();
    assert!(check.stdout.contains("No errors were found on the image"), "{check:#?}");
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "qcow2", "-F", "raw"]).arg(overlay).arg(copy);
    let compared = run(&mut compare).ok();
    assert!(compared.stdout.contains("Images are identical"), "{compared:#?}");
    let info = run(Command::new("qemu-img").args(["info", "--output=json"]).arg(overlay)).ok();
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!(info["format"], "qcow2", "{info}");
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1", "{info}");
    assert_eq!(info["full-backing-filename"], base.to_str().unwrap(), "{info}");
    assert_eq!(info["backing-filename-format"], format, "{info}");
}

/// The whole way with a real guest: hold, shut down, keep, release. The image is the disk as it was, byte for byte, and the
/// user's lost work can be read from it; then the disk is exact (invariant 4).
#[test]
fn session_of_a_guest_is_kept_as_an_overlay_and_then_restored() {
    let lab = Lab::new();
    images::ext4(&lab.base(), SIZE, &[("letter", b"as it was\n"), ("other", b"untouched\n")]);
    lab.provision(&[]);
    let server = lab.serve(NONE);
    let script = "
        mount /dev/vda /mnt
        echo 'hours of work' >/mnt/thesis
        echo 'changed' >/mnt/letter
        dd if=/dev/urandom of=/mnt/random bs=1M count=5 2>/dev/null
        dd if=/dev/zero of=/mnt/zeroes bs=1M count=3 2>/dev/null
        umount /mnt
        say ready
        head -n 1 </dev/console >/dev/null
    ";
    let mut guest = Guest::boot(&lab.socket(), Options::default(), script);
    guest.said("ready");
    keep(&lab, "kept.qcow2", &[]).0.refused(1, &["disk.img", "in use", "session hold"]);
    run(&mut lab.session("hold")).ok();
    keep(&lab, "kept.qcow2", &[]).0.refused(1, &["disk.img", "session is open", "session end"]);
    guest.type_line("go on");
    guest.finish();
    wait_until("status says held", || lab.state_word() == "held");

    let copy = copy_of_disk(&lab);
    let (said, kept) = keep(&lab, "kept.qcow2", &[]);
    let said = said.ok().stdout;
    assert!(said.contains("session 2 kept in ") && said.contains("differ from the base"), "{said}");
    assert_is_a_copy(&kept, &copy, &lab.base(), "raw");
    keep(&lab, "kept.qcow2", &[]).0.refused(1, &["kept.qcow2", "exists"]);
    // No more than what was written: five megabytes that are no zeroes, and the file system's own.
    let size = images::allocated(&kept);
    assert!((5 << 20..20 << 20).contains(&size), "the image takes {size} bytes");

    // Kept beside the server that holds the disk; a guest that was turned away changes nothing of it.
    run(&mut lab.session("release")).ok();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    assert_is_a_copy(&kept, &copy, &lab.base(), "raw");
    let raw = lab.path("kept.raw");
    images::qemu_img(kept.parent().unwrap(), &["convert", "-O", "raw", "kept.qcow2", "kept.raw"]);
    assert_eq!(images::ext4_file(&raw, "/thesis"), "hours of work\n");
    assert_eq!(images::ext4_file(&raw, "/letter"), "changed\n");
    assert_eq!(images::ext4_file(&raw, "/other"), "untouched\n");
}

/// Without a server and a hold: as long as nothing was restored. On a qcow2 base, with a disk that is larger.
#[test]
fn interrupted_session_is_kept_on_a_qcow2_base_until_it_is_restored() {
    let lab = Lab::new();
    images::dense(&lab.path("content.raw"), (24 << 20) - 512, 41);
    let dir = lab.path("");
    images::qemu_img(&dir, &["convert", "-f", "raw", "-O", "qcow2", "-c", "content.raw", "base.img"]);
    lab.provision(&["--base-format", "qcow2", "--size", "32M"]);
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 300 7");
    client.ask(&format!("write {} 65536 8", (24 << 20) - 32768));
    client.ask("zero 1048576 262144");
    client.ask("discard 2097152 65536");
    client.ask(&format!("write {} 512 9", (32 << 20) - 512));
    // The server first: while it runs it would restore what the client leaves.
    server.kill();
    keep(&lab, "kept.qcow2", &[]).0.refused(1, &["session is open"]);
    client.kill();
    assert_eq!(lab.state_word(), "interrupted");

    let copy = copy_of_disk(&lab);
    let (said, kept) = keep(&lab, "kept.qcow2", &["--json"]);
    let said: Value = serde_json::from_str(&said.ok().stdout).unwrap();
    assert_eq!((&said["session"], &said["size"]), (&2.into(), &(32 << 20).into()), "{said}");
    let (blocks, differing) = (said["blocks"].as_u64().unwrap(), said["differing_blocks"].as_u64().unwrap());
    // 300, 17, 64 and 1, less those that are the same ones. What was discarded was not the session's, but for some.
    assert!((360..=382).contains(&blocks) && differing <= blocks && differing > 350, "{said}");
    assert_is_a_copy(&kept, &copy, &lab.base(), "qcow2");
    keep(&lab, "again.qcow2", &["--session", "1"]).0.refused(1, &["session 1", "session 2"]);
    keep(&lab, "again.qcow2", &["--session", "2"]).0.ok();
    keep(&lab, "whole.qcow2", &["--whole-disk"]).0.ok();
    assert_is_a_copy(&lab.path("whole.qcow2"), &copy, &lab.base(), "qcow2");

    lab.run("restore", NONE).ok();
    lab.run("verify", NONE).ok();
    keep(&lab, "late.qcow2", &[]).0.refused(1, &["disk.img", "nothing to keep"]);
    assert!(!lab.path("late.qcow2").exists());
    assert_is_a_copy(&kept, &copy, &lab.base(), "qcow2");
}
