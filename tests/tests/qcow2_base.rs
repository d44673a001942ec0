//! Session disks of qcow2 bases: served, restored, verified, booted from.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use pristine_tests::distribution;
use pristine_tests::guest::{Guest, Options};
use pristine_tests::images::{self, qemu_img};
use pristine_tests::lab::Lab;
use pristine_tests::program::run;
use pristine_tests::remote::Remote;

const NONE: &[&str] = &[];
const SIZE: u64 = 160 << 20;

/// Provisions the disk from the image `base` of the lab's directory.
fn provision(lab: &Lab, base: &str, more: &[&str]) -> pristine_tests::program::Finished {
    let base = lab.path(base);
    let args = [OsStr::new("--base"), base.as_os_str()].into_iter().chain(more.iter().map(OsStr::new));
    lab.run("provision", &args.collect::<Vec<_>>())
}

/// A compressed qcow2 image that a second one lies on, in all as `lab.base()` is.
fn chain(lab: &Lab, size: u64) {
    let dir = lab.path("");
    images::sparse(&lab.path("first.raw"), size, 1, &[(0, 6 << 20), (size / 2, 3 << 20)]);
    qemu_img(&dir, &["convert", "-f", "raw", "-O", "qcow2", "-c", "first.raw", "bottom.qcow2"]);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "bottom.qcow2", "-F", "qcow2", "golden.qcow2"]);
    let mut io = Command::new("qemu-io");
    io.args(["-c", "write -P 77 1000k 3000k", "-c", "write -z 5M 512k", "-c"])
        .arg(format!("write -P 78 {} 64k", size - (64 << 10)))
        .arg(lab.path("golden.qcow2"));
    run(&mut io).ok();
    qemu_img(&dir, &["convert", "-O", "raw", "golden.qcow2", "base.img"]);
}

/// Panics unless `qemu-img` finds the disk equal to the qcow2 base.
fn assert_equal_for_qemu(lab: &Lab, base: &str) {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "qcow2"]).arg(lab.disk()).arg(lab.path(base));
    let said = run(&mut compare).ok().stdout;
    assert!(said.contains("identical"), "{said}");
}

/// Invariants 2, 3 and 4: a guest boots from a disk of which nothing was copied, finds its root file system, spoils
/// it, and the next one finds it fresh; in the end `qemu-img` finds the disk equal to the image.
#[test]
fn guest_boots_from_a_lazily_provisioned_root_file_system_in_a_qcow2_base() {
    let lab = Lab::new();
    let tree = distribution::root_tree();
    images::ext4_of(&lab.path("root.raw"), SIZE, tree.path());
    let dir = lab.path("");
    qemu_img(&dir, &["convert", "-f", "raw", "-O", "qcow2", "-c", "root.raw", "bottom.qcow2"]);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "bottom.qcow2", "-F", "qcow2", "golden.qcow2"]);
    provision(&lab, "golden.qcow2", &["--lazy"]).ok();
    let status = lab.status();
    assert_eq!(
        (&status["base_format"], &status["state"]),
        (&"qcow2".into(), &"interrupted".into()),
        "{status}"
    );
    let expected = distribution::sum(tree.path());

    let server = lab.serve(&[]);
    for _ in 0..2 {
        let mut guest = Guest::boot_from_disk(&lab.socket(), Options::default());
        assert_eq!(guest.said("root"), "/dev/vda / ext4");
        assert_eq!(guest.said("sum").split(' ').next(), Some(&*expected));
        guest.said("fresh");
        guest.finish();
    }
    lab.wait_pristine();
    server.stop();
    lab.run("verify", NONE).ok();
    assert_equal_for_qemu(&lab, "golden.qcow2");
    images::assert_equal(&lab.disk(), &lab.path("root.raw"));
    let (disk, data) = (images::allocated(&lab.disk()), images::allocated(&lab.path("root.raw")));
    // Clusters are 64 KiB: where one has any data, all of it is data.
    assert!(disk < data + (8 << 20), "the disk takes {disk} bytes, its content {data}: holes are missing");
}

/// Invariants 2 and 4: reads, partial and whole writes while everything is pending, kills in between.
#[test]
fn session_on_a_qcow2_chain_survives_kills_and_ends_exact() {
    let lab = Lab::new();
    let size = (48 << 20) + 1536;
    chain(&lab, size);
    provision(&lab, "golden.qcow2", &["--lazy"]).ok();
    let base = lab.base();
    for seed in 1..4 {
        let server = lab.serve(&[]);
        let mut client = Remote::connected(&lab.socket(), 2);
        let at = 2 * (1 << 20) + 512 * seed;
        client.ask(&format!("write {at} 512 9"));
        for (offset, len) in
            [(0, 1 << 20), (at - 512 * seed, 512 * seed), (at + 512, 8192), (size - 1536, 1536)]
        {
            assert_eq!(
                client.ask(&format!("compare {offset} {len} {}", base.display())),
                "same",
                "at {offset}"
            );
        }
        assert_eq!(client.ask(&format!("compare {at} 512 {}", base.display())), "different");
        client.ask(&format!("scatter 300 {seed}"));
        server.kill();
        drop(client);
    }
    lab.run("restore", NONE).ok();
    lab.assert_pristine_bytes();
    assert_equal_for_qemu(&lab, "golden.qcow2");
}

/// Invariant 4, all at once: what is copied at provision time.
#[test]
fn provision_of_a_qcow2_base_copies_it_exactly_and_leaves_its_files_alone() {
    let lab = Lab::new();
    chain(&lab, 32 << 20);
    let files = ["golden.qcow2", "bottom.qcow2"].map(|name| lab.path(name));
    let before = files.each_ref().map(|path| images::sha256(path));
    provision(&lab, "golden.qcow2", &[]).ok();
    lab.assert_pristine_bytes();
    let data = images::allocated(&lab.base());
    assert!(images::allocated(&lab.disk()) < data + (2 << 20), "holes are missing");
    assert_eq!(files.each_ref().map(|path| images::sha256(path)), before);
    let shown = lab.run("status", NONE).ok().stdout;
    assert!(
        shown.contains("golden.qcow2, qcow2") && shown.contains("on     ") && shown.contains("bottom.qcow2"),
        "{shown}"
    );
}

/// Invariant 5: a change of any file of the chain is refused, with what to do.
#[test]
fn disk_whose_backing_file_has_changed_is_refused() {
    let lab = Lab::new();
    chain(&lab, 16 << 20);
    provision(&lab, "golden.qcow2", &["--lazy"]).ok();
    let bottom = fs::File::options().write(true).open(lab.path("bottom.qcow2")).unwrap();
    bottom.set_modified(std::time::SystemTime::now()).unwrap();
    drop(bottom);
    for command in ["restore", "verify"] {
        lab.run(command, NONE).refused(1, &["bottom.qcow2", "was written to", "pristine rebase"]);
    }
    assert!(lab.status()["base_trouble"].as_str().unwrap().contains("bottom.qcow2"));
    // Other files beneath it, even equal ones, are not opened at all.
    fs::copy(lab.path("bottom.qcow2"), lab.path("other.qcow2")).unwrap();
    qemu_img(&lab.path(""), &["rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", "golden.qcow2"]);
    lab.run("restore", NONE).refused(1, &["other.qcow2", "not before"]);
}

/// What decides the format, and what is refused, with what to write instead.
#[test]
fn format_of_a_base_is_named_or_clear_or_refused() {
    let lab = Lab::new();
    chain(&lab, 16 << 20);
    fs::copy(lab.path("golden.qcow2"), lab.path("golden.img")).unwrap();
    let refused = |base: &str, more: &[&str], words: &[&str]| {
        provision(&lab, base, more).refused(1, words);
        assert!(!lab.disk().exists() && !lab.state().exists());
    };
    refused("golden.img", &[], &["--base-format qcow2", "--base-format raw"]);
    refused("base.img", &["--base-format", "qcow2"], &["not a qcow2"]);
    fs::write(lab.path("disk.vmdk"), b"KDMV").unwrap();
    refused("disk.vmdk", &[], &["vmdk", "qemu-img convert"]);
    provision(&lab, "golden.img", &["--base-format", "vdi"]).code.map(|code| assert_eq!(code, 2)).unwrap();
    // Taken as raw it is the image file itself, and stays so: nothing looks at its beginning again.
    provision(&lab, "golden.img", &["--base-format", "raw"]).ok();
    lab.run("verify", NONE).ok();
    assert_eq!(fs::read(lab.disk()).unwrap(), fs::read(lab.path("golden.img")).unwrap());
    assert_eq!(lab.status()["base_format"], "raw");
    provision(&lab, "golden.img", &["--adopt", "--base-format", "qcow2"]).refused(1, &["bytes"]);
}

/// A header can name any file of the host: what lies elsewhere is followed only if the operator says so.
#[test]
fn backing_file_elsewhere_needs_its_directory_named_once() {
    let (lab, elsewhere) = (Lab::new(), Lab::new());
    images::dense(&elsewhere.path("secret.raw"), 4 << 20, 3);
    let secret = fs::canonicalize(elsewhere.path("secret.raw")).unwrap();
    let secret = secret.to_str().unwrap();
    qemu_img(&lab.path(""), &["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", "golden.qcow2"]);
    provision(&lab, "golden.qcow2", &[]).refused(1, &["secret.raw", "--backing-dir"]);
    assert!(!lab.disk().exists());
    let dir = Path::new(secret).parent().unwrap().to_str().unwrap();
    provision(&lab, "golden.qcow2", &["--lazy", "--backing-dir", dir]).ok();
    lab.run("restore", NONE).ok();
    images::assert_equal(&lab.disk(), Path::new(secret));
}

/// Invariant 7 for all files of a base: none of them can be a disk of it.
#[test]
fn disk_that_is_a_backing_file_of_its_base_is_refused() {
    let lab = Lab::new();
    images::dense(&lab.disk(), 4 << 20, 3);
    let hash = images::sha256(&lab.disk());
    qemu_img(&lab.path(""), &["create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw", "golden.qcow2"]);
    provision(&lab, "golden.qcow2", &["--adopt"]).refused(1, &["same file"]);
    assert_eq!(images::sha256(&lab.disk()), hash);
}
