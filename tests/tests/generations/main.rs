//! Generations: a session whose changes are kept, `promote`, and what comes of it, whatever happens meanwhile.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::guest::{Guest, Options};
use pristine_tests::images::{self, qemu_img};
use pristine_tests::lab::{Lab, Server};
use pristine_tests::mounts::{LoopDevice, Mounts};
use pristine_tests::program::{Finished, pristine, run};
use pristine_tests::remote::Remote;
use serde_json::Value;

mod steps;

const NONE: &[&str] = &[];
const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 4096;
/// What files there are of a generation.
const PARTS: [&str; 3] = ["", ".manifest", ".delta"];

fn base(what: &str, image: &Path) -> Finished {
    run(pristine(["base", what]).arg(image))
}

fn json(finished: Finished) -> Value {
    serde_json::from_str(&finished.ok().stdout).unwrap()
}

fn promote(lab: &Lab, to: &Path, more: &[&str]) -> Finished {
    run(lab.pristine("promote", more).arg("--to").arg(to))
}

/// Serves the disk for one session whose changes are kept, in which `commands` are given.
fn maintain(lab: &Lab, commands: &[&str]) {
    let mut command = lab.pristine("maintain", &["--once", "--socket-path"]);
    maintain_with(lab, command.arg(lab.socket()), commands);
}

fn maintain_with(lab: &Lab, serve: &Command, commands: &[&str]) {
    let mut server = Server::start(serve);
    let mut client = Remote::connected(&lab.socket(), 1);
    commands.iter().for_each(|command| {
        client.ask(command);
    });
    client.leave();
    let status = server.0.wait(pristine_tests::PATIENCE);
    assert!(status.success(), "{status}\n{}", server.0.output());
}

/// A disk whose base is 1 MiB of data, 3 MiB of a hole, and data up to the end, with changes that are kept: in data, in the
/// hole, across a chunk's end; data that became zeroes; and blocks that were written and are as in the base.
fn maintained(seal: bool) -> Lab {
    let lab = Lab::new();
    images::sparse(&lab.base(), SIZE, 61, &[(0, 1 << 20), (4 << 20, 4 << 20)]);
    if seal {
        base("seal", &lab.base()).ok();
    }
    lab.provision(NONE);
    maintain(&lab, CHANGES);
    lab
}

const CHANGES: &[&str] = &[
    "write 8192 512 1",
    "write 126976 12288 2",
    "write 2097152 4096 3",
    "zero 4194304 131072",
    "zero 3145728 65536",
    "write 8384512 4096 4",
];
/// Blocks that these make differ from the base.
const CHANGED: u64 = 1 + 3 + 1 + 32 + 1;

/// The extents of a delta, as its documentation says that they lie in the file.
fn extents(delta: &Path) -> Vec<(u64, u64)> {
    let bytes = fs::read(delta).unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let path = u32::from_le_bytes(bytes[104..108].try_into().unwrap()) as usize;
    let places = (0..word(112) as usize).map(|extent| 120 + path + extent * 16);
    places.map(|at| (word(at), word(at + 8))).collect()
}

fn blocks(extents: &[(u64, u64)]) -> Vec<u64> {
    extents.iter().flat_map(|(first, count)| *first..first + count).collect()
}

fn part(image: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", image.display()))
}

/// What is there in the lab besides its disk and its first base.
fn others(lab: &Lab) -> Vec<String> {
    let names = fs::read_dir(lab.path("")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with("base.img") && !name.starts_with("disk.img"));
    names.sort();
    names
}

/// The raw image `new` is the disk, its seal proves it, and its delta is exact.
#[track_caller]
fn assert_whole(lab: &Lab, new: &Path) {
    images::assert_equal(&lab.disk(), new);
    base("verify", new).ok();
    assert_eq!(blocks(&extents(&part(new, ".delta"))), images::differing_blocks(&lab.base(), new));
    assert_eq!(fs::metadata(new).unwrap().permissions().mode() & 0o222, 0);
}

/// Issue lines 3 and 4: the next generation is the disk byte for byte, its delta is exact, its seal is what sealing it
/// would make; the old base and the disk are what they were.
#[test]
fn promoted_base_equals_the_disk_and_its_delta_is_exact() {
    let lab = maintained(true);
    let (new, before) = (lab.path("golden-2.img"), images::sha256(&lab.base()));
    let status = lab.status();
    assert_eq!(status["state"], "kept", "{status}");
    let made = json(promote(&lab, &new, &["--json"]));
    assert_whole(&lab, &new);
    // The zeroes in the hole are no change.
    assert_eq!(made["changed_blocks"], CHANGED, "{made}");
    assert_eq!(made["blocks_compared"], CHANGED + 16, "{made}");
    assert_eq!(others(&lab), ["golden-2.img", "golden-2.img.delta", "golden-2.img.manifest"]);
    // What was a hole is one, and what became zeroes too.
    assert!(images::allocated(&new) <= images::allocated(&lab.base()));
    assert_eq!(images::sha256(&lab.base()), before);
    assert_eq!(lab.status(), status);

    let copy = lab.path("copy.img");
    fs::copy(&new, &copy).unwrap();
    assert_eq!(json(run(pristine(["base", "seal", "--json"]).arg(&copy)))["root"], made["root"]);

    let other = Lab::new();
    other.run("provision", &["--base".as_ref(), new.as_os_str()]).ok();
    images::assert_equal(&other.disk(), &lab.disk());
    other.run("verify", &["--deep"]).ok();
    // It is told what to do next, and it works.
    lab.run("restore", &["--discard-kept"]).ok();
    lab.assert_pristine();
}

/// A qcow2 generation holds only what was changed, reads as the disk in QEMU and here, and has the same root hash as a raw one;
/// the next generation can be made of it, in either format.
#[test]
fn promoted_overlay_reads_as_the_disk_and_carries_the_next_generation() {
    let lab = maintained(true);
    let (raw, new) = (lab.path("golden-2.img"), lab.path("golden-2.qcow2"));
    let made = json(promote(&lab, &raw, &["--json"]));
    let overlay = json(promote(&lab, &new, &["--json"]));
    assert_eq!((&overlay["root"], &overlay["format"]), (&made["root"], &"qcow2".into()));
    assert_eq!(extents(&part(&new, ".delta")), extents(&part(&raw, ".delta")));
    base("verify", &new).ok();
    let (dir, name) = (lab.path(""), new.to_str().unwrap());
    qemu_img(&dir, &["check", "-q", "-f", "qcow2", name]);
    qemu_img(&dir, &["compare", "-q", "-f", "qcow2", "-F", "raw", name, "disk.img"]);
    // Five chunks with data, and what describes them.
    assert!(images::allocated(&new) <= 12 * 65536, "{}", images::allocated(&new));

    let next = Lab::in_dir(&dir);
    next.run("provision", &["--base".as_ref(), new.as_os_str(), "--lazy".as_ref()]).ok();
    maintain(&next, &["write 1048576 4096 9", "zero 2097152 4096"]);
    for name in ["golden-3.qcow2", "golden-3.img"] {
        let (third, format) = (lab.path(name), if name.ends_with("img") { "raw" } else { "qcow2" });
        let made = json(promote(&next, &third, &["--json", "--format", format]));
        assert_eq!((&made["changed_blocks"], &made["parent_root"]), (&2.into(), &overlay["root"]), "{made}");
        base("verify", &third).ok();
        qemu_img(&dir, &["compare", "-q", "-f", format, "-F", "raw", name, next.disk().to_str().unwrap()]);
        assert_eq!(extents(&part(&third, ".delta")), [(256, 1), (512, 1)]);
    }
    let list = json(run(pristine(["base", "list", "--json", "--dir"]).arg(&dir)));
    let depths: Vec<(String, u64)> = list["generations"].as_array().unwrap().iter().map(depth).collect();
    let expected = [
        ("base.img", 0),
        ("golden-2.img", 1),
        ("golden-3.img", 2),
        ("golden-3.qcow2", 2),
        ("golden-2.qcow2", 1),
    ];
    assert_eq!(depths, expected.map(|(name, depth)| (name.to_owned(), depth)));
    let table = run(pristine(["base", "list", "--dir"]).arg(&dir)).ok().stdout;
    assert!(table.contains("└ golden-2.img") && table.contains("  └ golden-3.img"), "{table}");
    assert!(!table.contains("warning"), "{table}");
}

fn depth(listed: &Value) -> (String, u64) {
    let path = Path::new(listed["base"].as_str().unwrap());
    (path.file_name().unwrap().to_str().unwrap().to_owned(), listed["depth"].as_u64().unwrap())
}

/// A base that was not sealed is sealed on the way, and that is said.
#[test]
fn promote_from_a_base_without_a_seal_seals_it() {
    let lab = maintained(false);
    let new = lab.path("golden-2.img");
    let said = promote(&lab, &new, NONE).ok().stdout;
    assert!(
        said.contains("sealed") && said.contains("base.img.manifest") && said.contains("rebase"),
        "{said}"
    );
    base("verify", &lab.base()).ok();
    assert_whole(&lab, &new);
}

/// A disk that is larger than its base: the next one is as large as the disk if something was written past the end, else as the base
/// was. Neither is a multiple of a chunk or of a block.
#[test]
fn promoted_base_grows_only_with_what_was_written_past_the_old_end() {
    for (write, grows) in [("write 4096 4096 1", false), ("write 9437184 512 1", true)] {
        let lab = Lab::new();
        images::dense(&lab.base(), SIZE + 1536, 62);
        base("seal", &lab.base()).ok();
        let size = (12 << 20) + 512;
        lab.provision(&["--size", &size.to_string()]);
        maintain(&lab, &[write]);
        for name in ["golden-2.img", "golden-2.qcow2"] {
            let new = lab.path(name);
            promote(&lab, &new, &[if name.ends_with("img") { "--format=raw" } else { "--format=qcow2" }])
                .ok();
            base("verify", &new).ok();
            let info = json(run(pristine(["base", "info", "--json"]).arg(&new)));
            assert_eq!(info["size"], if grows { size } else { SIZE + 1536 });
            assert_eq!(blocks(&extents(&part(&new, ".delta"))).len(), 1);
        }
        let other = Lab::new();
        let args = ["--base", lab.path("golden-2.qcow2").to_str().unwrap(), "--size", &size.to_string()]
            .map(str::to_owned);
        other.run("provision", &args).ok();
        images::assert_equal(&other.disk(), &lab.disk());
    }
}

/// What a held session has written is promoted, and what was still to be filled before it comes from the base.
#[test]
fn held_session_on_a_disk_that_is_not_filled_is_promoted_with_its_own_writes_only() {
    let lab = Lab::new();
    images::dense(&lab.base(), 64 << 20, 63);
    base("seal", &lab.base()).ok();
    lab.provision(&["--lazy"]);
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 16777216 8192 5");
    run(&mut lab.session("hold")).ok();
    let new = lab.path("golden-2.img");
    promote(&lab, &new, NONE).refused(1, &["disk.img", "in use"]);
    client.leave();
    pristine_tests::wait_until("status says held", || lab.state_word() == "held");
    server.stop();
    promote(&lab, &new, NONE).ok();
    base("verify", &new).ok();
    assert_eq!(images::differing_blocks(&lab.base(), &new), [4096, 4097]);
    assert_eq!(extents(&part(&new, ".delta")), [(4096, 2)]);
    assert_eq!(lab.state_word(), "held");
    run(&mut lab.session("release")).ok();
    lab.run("restore", NONE).ok();
    lab.assert_pristine_bytes();
}

/// Invariant 7: a session that may go on is not promoted; when its VM is gone it has ended, however its server did.
#[test]
fn kept_session_of_a_killed_server_is_promoted_when_its_vm_is_gone() {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 66);
    base("seal", &lab.base()).ok();
    lab.provision(NONE);
    let server = lab.pristine("maintain", &["--socket-path".as_ref(), lab.socket().as_os_str()]);
    let server = Server::start(&server);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 1048576 8192 5");
    server.kill();
    let new = lab.path("golden-2.img");
    promote(&lab, &new, NONE).refused(1, &["session is open", "pristine session end"]);
    client.kill();
    promote(&lab, &new, NONE).ok();
    assert_whole(&lab, &new);
    assert_eq!(extents(&part(&new, ".delta")), [(256, 2)]);
}

/// A base on a device is known by a link (`/dev/VOLUMEGROUP/...`), which leads out of its directory. The overlay on it names the link,
/// which holds after a reboot, and whoever provisions from it says that the device is right.
#[test]
fn overlay_on_a_device_that_is_named_by_a_link_is_made() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 67);
    let Some(device) = LoopDevice::of(&lab.base()) else { return };
    let (link, new, disk) = (lab.path("group/golden"), lab.path("golden-2.qcow2"), lab.path("second.img"));
    fs::create_dir(lab.path("group")).unwrap();
    symlink(device.path(), &link).unwrap();
    let seal = lab.path("golden.manifest");
    run(pristine(["base", "seal"]).arg(&link).arg("--base-manifest").arg(&seal)).ok();
    run(lab.pristine("provision", NONE).arg("--base").arg(&link).arg("--base-manifest").arg(&seal)).ok();
    maintain(&lab, &["write 12288 8192 5"]);
    promote(&lab, &new, NONE).ok();
    let named = json(run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&new)));
    assert_eq!(named["backing-filename"], "group/golden");
    let provision = |more: &[&str]| {
        let mut command = pristine(["provision"]);
        command.arg("--base").arg(&new).arg("--disk").arg(&disk).arg("--runtime-dir").arg(lab.runtime());
        run(command.args(more))
    };
    provision(NONE).refused(1, &["--backing-dir /dev"]);
    provision(&["--backing-dir", "/dev"]).ok();
    assert!(fs::read(&disk).unwrap() == fs::read(lab.disk()).unwrap());
}

/// Invariant 6: a disk whose state can't be trusted becomes no golden image before somebody has said that it is right.
#[test]
fn disk_that_is_another_file_than_its_state_is_about_is_promoted_only_after_it_was_served() {
    let lab = maintained(true);
    let (new, copy) = (lab.path("golden-2.img"), lab.path("copy.img"));
    fs::copy(lab.disk(), &copy).unwrap();
    fs::rename(&copy, lab.disk()).unwrap();
    promote(&lab, &new, NONE).refused(1, &["another file", "pristine maintain"]);
    assert_eq!(others(&lab), [""; 0]);
    maintain(&lab, NONE);
    promote(&lab, &new, NONE).ok();
    assert_whole(&lab, &new);
}

/// Nothing that exists is replaced, and nothing is promoted of which it is not clear what it is; then nothing is left behind.
#[test]
fn promote_that_is_refused_changes_nothing() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 64);
    base("seal", &lab.base()).ok();
    let new = lab.path("golden-2.img");
    fs::write(lab.disk(), [0; 4096]).unwrap();
    promote(&lab, &new, NONE).refused(1, &["is not a pristine disk"]);
    fs::remove_file(lab.disk()).unwrap();
    lab.provision(NONE);
    promote(&lab, &new, NONE).refused(1, &["no changes that are kept", "pristine maintain"]);
    maintain(&lab, &["write 4096 4096 1"]);
    promote(&lab, &lab.base(), NONE).refused(1, &["base.img", "exists"]);
    promote(&lab, &lab.path("golden.qcow2"), &["--format", "raw"]).refused(1, &["qcow2"]);
    promote(&lab, &lab.path("missing/golden"), NONE).refused(1, &["missing"]);
    assert_eq!(others(&lab), [""; 0]);
    // A manifest of an image that is elsewhere for a while is not taken for a left-over.
    fs::write(part(&new, ".manifest"), "precious").unwrap();
    promote(&lab, &new, NONE).refused(1, &["golden-2.img.manifest", "put that back"]);
    assert_eq!(others(&lab), ["golden-2.img.manifest"]);
    fs::remove_file(part(&new, ".manifest")).unwrap();

    let server = lab.pristine("maintain", &["--socket-path".as_ref(), lab.socket().as_os_str()]);
    let server = Server::start(&server);
    promote(&lab, &new, NONE).refused(1, &["in use"]);
    server.stop();
    let socket = lab.socket();
    let exit = ["--reset-on".as_ref(), "exit".as_ref(), "--socket-path".as_ref(), socket.as_os_str()];
    lab.run("maintain", &exit).refused(2, &["pristine serve"]);
    promote(&lab, &new, NONE).ok();
    let hash = images::sha256(&new);
    promote(&lab, &new, NONE).refused(1, &["golden-2.img", "exists"]);
    assert_eq!(images::sha256(&new), hash);

    // Written back to what it was, by somebody who knows it.
    let mut bytes = vec![0; 4096];
    fs::File::open(lab.base()).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
    fs::File::options().write(true).open(lab.disk()).unwrap().write_all_at(&bytes, 4096).unwrap();
    // Who, is not known.
    let newer = lab.path("golden-3.img");
    promote(&lab, &newer, NONE).refused(1, &["changed from outside", "pristine maintain"]);
    let server = lab.pristine("maintain", &["--socket-path".as_ref(), lab.socket().as_os_str()]);
    Server::start(&server).stop();
    promote(&lab, &newer, NONE).refused(1, &["nothing to promote", "--discard-kept"]);
    assert_eq!(others(&lab).len(), PARTS.len());
}

fn flip(image: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 16], at).unwrap();
}

/// Invariant of seals: what has rotted in the old base never becomes good by being promoted.
#[test]
fn rot_in_the_old_base_stops_promote_and_is_never_sealed() {
    let lab = maintained(true);
    let new = lab.path("golden-2.img");
    // In a chunk that was changed in part, and in one that was not.
    for at in [9 * BLOCK + 5, (6 << 20) + 5] {
        flip(&lab.base(), at);
        let finished = promote(&lab, &new, NONE);
        let named = format!("offset {}", at / 65536 * 65536);
        if finished.code == Some(0) {
            // Shared with the old base, unread: then whoever reads it finds it.
            let found = base("verify", &new);
            assert!(found.code == Some(1) && found.stdout.contains(&named), "{found:#?}");
            PARTS.iter().for_each(|suffix| fs::remove_file(part(&new, suffix)).unwrap());
        } else {
            assert!(finished.code == Some(1) && finished.stderr.contains(&named), "{finished:#?}");
        }
        assert_eq!(others(&lab), [""; 0]);
        flip(&lab.base(), at);
    }
    promote(&lab, &new, NONE).ok();
    assert_whole(&lab, &new);
}

/// On a file system whose files can share blocks the next generation takes room for what was changed only.
#[test]
fn promoted_base_on_xfs_shares_the_room_of_the_old_one() {
    let (lab, Some(mounts)) = (Lab::new(), Mounts::new()) else { return };
    let dir = lab.path("xfs");
    if !mounts.xfs(&dir, &lab.path("xfs.img"), 512 << 20) {
        return;
    }
    let (base, new) = (dir.join("base.img"), dir.join("golden-2.img"));
    images::dense(&mounts.outside(&base), 64 << 20, 65);
    let inside = |command: &mut Command| run(&mut mounts.inside(command));
    inside(pristine(["base", "seal"]).arg(&base)).ok();
    inside(lab.pristine("provision", &["--base"]).arg(&base)).ok();
    let mut serve = lab.pristine("maintain", &["--once", "--socket-path"]);
    maintain_with(&lab, &mounts.inside(serve.arg(lab.socket())), &["write 1048576 1048576 1"]);
    let free = || {
        inside(Command::new("sync").arg("-f").arg(&dir)).ok();
        mounts.free(&dir)
    };
    let before = free();
    let made = json(inside(lab.pristine("promote", &["--json", "--to"]).arg(&new)));
    assert_eq!((&made["way"], &made["changed_blocks"]), (&"reflink".into(), &256.into()), "{made}");
    let took = before - free();
    assert!(took < 4 << 20, "{took} bytes for 1 MiB of changes");
    images::assert_equal(&mounts.outside(&new), &lab.disk());
    inside(pristine(["base", "verify"]).arg(&new)).ok();
    println!("64 MiB, 1 MiB changed: the next generation takes {took} bytes");
}

/// Issue line 3: a guest adds a file in a maintenance session; a guest on a disk of the next generation has it.
#[test]
fn file_that_a_guest_adds_is_in_the_next_generation() {
    let lab = Lab::new();
    images::ext4(&lab.base(), 64 << 20, &[("first", b"old\n")]);
    lab.provision(NONE);
    let mut server = lab.pristine("maintain", &["--once", "--socket-path"]);
    let mut server = Server::start(server.arg(lab.socket()));
    let script = "
        mount -t ext4 /dev/vda /mnt
        echo patched >/mnt/second
        dd if=/dev/urandom of=/mnt/big bs=1M count=4 2>/dev/null
        rm /mnt/big
        umount /mnt
        sync
    ";
    Guest::boot(&lab.socket(), Options::default(), script).finish();
    let status = server.0.wait(pristine_tests::PATIENCE);
    assert!(status.success(), "{status}\n{}", server.0.output());
    let new = lab.path("golden-2.img");
    promote(&lab, &new, NONE).ok();
    assert_whole(&lab, &new);

    let other = Lab::new();
    other.run("provision", &["--base".as_ref(), new.as_os_str(), "--lazy".as_ref()]).ok();
    let server = other.serve(NONE);
    let script = "
        mount -t ext4 -o ro /dev/vda /mnt
        say files $(cat /mnt/first /mnt/second)
        umount /mnt
    ";
    let mut guest = Guest::boot(&other.socket(), Options::default(), script);
    assert_eq!(guest.said("files"), "old patched");
    guest.finish();
    other.wait_pristine();
    server.stop();
    other.run("verify", NONE).ok();
}
