//! `pristine rebase`: disks are moved to another generation of their base, and back.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::PATIENCE;
use pristine_tests::guest::{Guest, Options};
use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::program::{Finished, pristine, run};
use pristine_tests::random;
use pristine_tests::remote::Remote;
use serde_json::Value;

const NONE: &[&str] = &[];
const SIZE: u64 = 64 << 20;
const SMALL: u64 = (4 << 20) + 512;
/// What the next generation has changed: a file here, a few blocks there, and one that has gone.
const CHANGES: [(u64, u64); 4] =
    [(3 << 20, 300_000), (20 << 20, 4096), ((20 << 20) + 65_536, 8192), (40 << 20, 512)];
const GONE: (u64, u64) = (8 << 20, 1 << 20);

/// A base with holes, and its next generation.
fn bases(lab: &Lab) -> (PathBuf, PathBuf) {
    let (one, two) = (lab.path("golden-1.raw"), lab.path("golden-2.raw"));
    images::sparse(&one, SIZE, 61, &[(0, 30 << 20), (50 << 20, 4 << 20)]);
    fs::copy(&one, &two).unwrap();
    let file = fs::File::options().write(true).open(&two).unwrap();
    for (offset, len) in CHANGES {
        let mut bytes = vec![0; len as usize];
        random::fill(62, offset, &mut bytes);
        file.write_all_at(&bytes, offset).unwrap();
    }
    file.write_all_at(&vec![0; GONE.1 as usize], GONE.0).unwrap();
    (one, two)
}

/// Two small bases that differ in every way.
fn small_bases(lab: &Lab) -> (PathBuf, PathBuf) {
    let (one, two) = (lab.path("golden-1.raw"), lab.path("golden-2.raw"));
    images::sparse(&one, SMALL, 63, &[(0, 1 << 20), (3 << 20, 4096)]);
    images::sparse(&two, SMALL - 512, 64, &[(65_536, 8192), (2 << 20, 512 << 10)]);
    (one, two)
}

fn seal(base: &Path) {
    run(pristine(["base", "seal"]).arg(base)).ok();
}

fn rebase(lab: &Lab, base: &Path, more: &[&str]) -> Finished {
    let args: Vec<&OsStr> =
        ["--base".as_ref(), base.as_os_str()].into_iter().chain(more.iter().map(OsStr::new)).collect();
    lab.run("rebase", &args)
}

fn report(lab: &Lab, base: &Path, more: &[&str]) -> Value {
    let said = rebase(lab, base, &[more, &["--json"]].concat()).ok().stdout;
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// A session that writes 200 blocks somewhere; what it has left is not restored when this returns.
fn session(lab: &Lab, seed: u64) {
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask(&format!("scatter 200 {seed}"));
    server.stop();
    drop(client);
}

/// Fails unless a disk is exactly what `base` is, and says so.
#[track_caller]
fn assert_is(lab: &Lab, base: &Path) {
    images::assert_equal(&lab.disk(), base);
    lab.run("verify", NONE).ok();
    let status = lab.status();
    assert_eq!(
        (&status["state"], &status["base"]),
        (&"pristine".into(), &base.to_str().unwrap().into()),
        "{status}"
    );
}

/// Three disks go to the next generation, and back: one at once, one by `restore`, one lazily with a session that reads
/// the new base before any of it was copied. After each `verify` exits 0. What is moved is what differs and what their sessions
/// have left: it is counted.
#[test]
fn disks_are_moved_to_the_next_generation_and_back() {
    let first = Lab::new();
    let (one, two) = bases(&first);
    [&one, &two].into_iter().for_each(|base| seal(base));
    // By manifests alone: whole chunks of 64 KiB.
    let mut chunks: Vec<u64> = images::differing_blocks(&one, &two).iter().map(|block| block / 16).collect();
    chunks.dedup();
    let differing = chunks.len() as u64 * 16;
    let labs = [first, Lab::new(), Lab::new()];
    for (number, lab) in labs.iter().enumerate() {
        lab.run("provision", &["--base", one.to_str().unwrap()]).ok();
        session(lab, number as u64);
        let dirty = lab.status()["pending_blocks"].as_u64().unwrap();
        assert_eq!(dirty, 200);
        let said = match number {
            0 => report(lab, &two, &["--now"]),
            _ => report(lab, &two, NONE),
        };
        assert_eq!(
            (&said["found_by"], &said["differing_blocks"]),
            (&"manifests".into(), &differing.into()),
            "{said}"
        );
        assert_eq!(said["pending_before"], dirty);
        let moved = said["pending_blocks"].as_u64().unwrap();
        assert!(moved <= differing + dirty && moved > differing, "{said}");
        println!(
            "disk {number}: {moved} blocks moved, {differing} of the delta, {dirty} dirty, of {}: {:.1} %",
            said["blocks"],
            100.0 * moved as f64 / said["blocks"].as_f64().unwrap()
        );
        match number {
            0 => assert_eq!(said["restored_blocks"], moved),
            1 => {
                assert_eq!(lab.status()["pending_blocks"], moved);
                lab.run("restore", NONE).ok();
            }
            _ => {
                let server = lab.serve(NONE);
                let mut client = Remote::connected(&lab.socket(), 1);
                for at in (0..SIZE).step_by(1 << 20) {
                    let same = client.ask(&format!("compare {at} {} {}", 1 << 20, two.display()));
                    assert_eq!(same, "same", "at {at}");
                }
                client.ask("write 3145728 12288 7");
                client.leave();
                lab.wait_pristine();
                server.stop();
            }
        }
        assert_is(lab, &two);
        let back = report(lab, &one, &["--now"]);
        assert_eq!(
            (&back["differing_blocks"], &back["pending_before"]),
            (&differing.into(), &0.into()),
            "{back}"
        );
        assert_is(lab, &one);
    }
}

/// Whoever moves a disk off a sealed base is told what that costs, and is not when it is the other way round.
#[test]
fn move_to_a_base_that_is_not_sealed_is_warned_of() {
    let lab = Lab::new();
    let (one, two) = small_bases(&lab);
    seal(&one);
    lab.run("provision", &["--base", one.to_str().unwrap()]).ok();
    let said = rebase(&lab, &two, NONE).ok().stderr;
    assert!(said.contains("golden-2.raw is not sealed as") && said.contains("pristine base seal"), "{said}");
    let said = rebase(&lab, &one, NONE).ok().stderr;
    assert!(!said.contains("sealed"), "{said}");
}

/// Issue line 3, whole: a guest adds a file in a maintenance session, which becomes the next generation. Three other disks
/// go there, by its delta, and back; a guest on one of them finds the file before anything was copied. Just the delta and
/// what the disks' sessions have left is moved. The disk that it was made on goes there too.
#[test]
fn file_of_a_maintenance_session_reaches_other_disks_and_is_taken_back() {
    let lab = Lab::new();
    images::ext4(&lab.base(), SIZE, &[("first", b"old\n")]);
    seal(&lab.base());
    lab.provision(NONE);
    let mut maintain = lab.pristine("maintain", &["--once", "--socket-path"]);
    let mut server = Server::start(maintain.arg(lab.socket()));
    let script = "mount -t ext4 /dev/vda /mnt; echo patched >/mnt/second; umount /mnt; sync";
    Guest::boot(&lab.socket(), Options::default(), script).finish();
    assert!(server.0.wait(PATIENCE).success(), "{}", server.0.output());
    let (one, two) = (lab.base(), lab.path("golden-2.img"));
    run(lab.pristine("promote", NONE).arg("--to").arg(&two)).ok();
    let differing: BTreeSet<u64> = images::differing_blocks(&one, &two).into_iter().collect();

    for number in 0..3 {
        let other = Lab::new();
        other.run("provision", &["--base".as_ref(), one.as_os_str()]).ok();
        session(&other, number);
        let left = other.log_extents(other.logs().last().unwrap());
        let left: BTreeSet<u64> = left.into_iter().flat_map(|(first, count)| first..first + count).collect();
        let moved = left.union(&differing).count();
        let said = report(&other, &two, NONE);
        assert_eq!((&said["found_by"], &said["deltas"]), (&"deltas".into(), &1.into()), "{said}");
        assert_eq!(
            (&said["differing_blocks"], &said["pending_before"], &said["pending_blocks"]),
            (&differing.len().into(), &left.len().into(), &moved.into())
        );
        println!(
            "disk {number}: {moved} blocks moved, {} of the delta and {} dirty, of {}: {:.2} %",
            differing.len(),
            left.len(),
            said["blocks"],
            100.0 * moved as f64 / said["blocks"].as_f64().unwrap()
        );
        if number == 0 {
            let server = other.serve(NONE);
            let script =
                "mount -t ext4 -o ro /dev/vda /mnt; say files $(cat /mnt/first /mnt/second); umount /mnt";
            let mut guest = Guest::boot(&other.socket(), Options::default(), script);
            assert_eq!(guest.said("files"), "old patched");
            guest.finish();
            other.wait_pristine();
            server.stop();
        } else {
            other.run("restore", NONE).ok();
        }
        assert_is(&other, &two);
        let back = report(&other, &one, &["--now"]);
        assert_eq!(
            (&back["found_by"], &back["restored_blocks"]),
            (&"deltas".into(), &differing.len().into()),
            "{back}"
        );
        assert_is(&other, &one);
    }
    rebase(&lab, &two, NONE).refused(1, &["--discard-kept"]);
    rebase(&lab, &two, &["--discard-kept", "--now"]).ok();
    assert_is(&lab, &two);
}

/// What can't be moved is refused, and says what to do.
#[test]
fn disk_that_is_served_or_has_a_session_is_refused_with_what_to_do() {
    let lab = Lab::new();
    let (one, two) = bases(&lab);
    lab.run("provision", &["--base", one.to_str().unwrap(), "--lazy"]).ok();
    let server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 200 5");
    rebase(&lab, &two, NONE).refused(1, &["served by process", "stop its server, rebase, and start"]);
    server.kill();
    rebase(&lab, &two, NONE).refused(1, &["a session of process", "pristine session end --disk"]);
    // It has lost nothing by that.
    let server = lab.serve(NONE);
    client.ask("connect 1");
    server.stop();
    client.leave();
    let said = rebase(&lab, &two, NONE).ok().stdout;
    assert!(said.contains("by comparing the disk") && said.contains("golden-2.raw now"), "{said}");
    lab.run("restore", NONE).ok();
    assert_is(&lab, &two);

    let large = lab.path("large.raw");
    images::sparse(&large, SIZE + 512, 1, NONE_OF_IT);
    rebase(&lab, &large, NONE).refused(1, &["large.raw", "at least as large", "pristine provision"]);
    rebase(&lab, &lab.path("missing"), NONE).refused(1, &["missing"]);
    let nobody = Lab::new();
    rebase(&nobody, &two, NONE).refused(1, &["disk.img"]);
    assert_is(&lab, &two);
}

const NONE_OF_IT: &[(u64, u64)] = &[];

/// Changes that sessions were to keep are given up only when that is said.
#[test]
fn disk_with_kept_changes_is_refused_until_they_are_given_up() {
    let lab = Lab::new();
    let (one, two) = bases(&lab);
    lab.run("provision", &["--base", one.to_str().unwrap()]).ok();
    let server = lab.serve(&["--reset-on", "never"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 1048576 8192 5");
    client.leave();
    server.stop();
    assert_eq!(lab.state_word(), "kept");
    rebase(&lab, &two, NONE).refused(1, &["are kept", "--discard-kept"]);
    assert_eq!(lab.state_word(), "kept");
    rebase(&lab, &two, &["--discard-kept", "--now"]).ok();
    assert_is(&lab, &two);
}

/// Calls that change files, or make changes durable. A process that is killed as it enters one has made all before it; what
/// a file's creation leaves is seen at the call after it.
const CALLS: [&str; 10] = [
    "mkdir",
    "ftruncate",
    "fallocate",
    "pwrite64",
    "write",
    "fsync",
    "fdatasync",
    "fsetxattr",
    "rename",
    "unlink",
];

/// Runs `command` and kills it as it makes its `number`th `call`; whether it came to that.
fn killed(command: &Command, call: &str, number: u32) -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    strace.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
    let finished = run(strace.arg(command.get_program()).args(command.get_args()));
    assert!(finished.code == Some(0) || finished.code.is_none(), "{finished:#?}");
    finished.code.is_none()
}

/// Kills `make` at each of its calls, in turn, each time after `before`; `after` is told whether it came to its end.
fn kill_everywhere(
    before: &dyn Fn(u32),
    make: &dyn Fn() -> Command,
    after: &mut dyn FnMut(&str, bool),
) -> u32 {
    let mut kills = 0;
    for call in CALLS {
        for number in 1.. {
            before(kills);
            let was_killed = killed(&make(), call, number);
            after(&format!("{call} {number}"), !was_killed);
            if !was_killed {
                break;
            }
            kills += 1;
        }
    }
    kills
}

/// Fails unless a disk holds what `base` does, and zeroes after its end.
#[track_caller]
fn assert_holds(lab: &Lab, base: &Path) {
    let (disk, mut base) = (fs::read(lab.disk()).unwrap(), fs::read(base).unwrap());
    base.resize(disk.len(), 0);
    assert!(disk == base, "{:?}", disk.iter().zip(&base).position(|(a, b)| a != b));
}

/// Invariants 2, 4 and 6: a rebase is killed at every step. The disk is one of the old generation or of the new one, whole.
#[test]
fn disk_whose_rebase_is_killed_at_any_step_is_of_one_generation() {
    let lab = Lab::new();
    let (one, two) = small_bases(&lab);
    [&one, &two].into_iter().for_each(|base| seal(base));
    lab.run("provision", &["--base", one.to_str().unwrap()]).ok();
    session(&lab, 9);
    let before = |kills: u32| {
        rebase(&lab, &one, NONE).ok();
        // With something that is pending already, and without.
        if kills % 2 == 1 {
            lab.run("restore", NONE).ok();
        }
    };
    let make = || lab.pristine("rebase", &["--base".as_ref(), two.as_os_str()]);
    let mut ended_on = [0, 0];
    let kills = kill_everywhere(&before, &make, &mut |what, is_done| {
        let base = PathBuf::from(lab.status()["base"].as_str().unwrap());
        assert!(!is_done || base == two, "{what}");
        assert!(base == one || base == two, "{what}");
        ended_on[usize::from(base == two)] += 1;
        lab.run("restore", NONE).ok();
        assert_holds(&lab, &base);
    });
    lab.run("verify", NONE).ok();
    println!(
        "{kills} kills of rebase: {} ended on the old generation, {} on the new",
        ended_on[0], ended_on[1]
    );
    assert!(ended_on[0] > 0 && ended_on[1] > CALLS.len(), "{ended_on:?}");
}

/// The same of a provision: there is no disk, or a whole one. And of one that takes over a disk of another base: it stays
/// what it was, or is a disk of the new base.
#[test]
fn disk_whose_provision_is_killed_at_any_step_is_whole_or_is_none() {
    let lab = Lab::new();
    let (one, two) = small_bases(&lab);
    let provision = |base: &Path, more: &[&str]| {
        let args: Vec<&OsStr> =
            ["--base".as_ref(), base.as_os_str()].into_iter().chain(more.iter().map(OsStr::new)).collect();
        lab.pristine("provision", &args)
    };
    let clear = |_: u32| {
        let _ = fs::remove_file(lab.disk());
        let _ = fs::remove_dir_all(lab.state());
    };
    let (mut none, mut whole) = (0, 0);
    let kills = kill_everywhere(&clear, &|| provision(&one, &["--lazy"]), &mut |what, is_done| {
        if lab.run("status", NONE).code == Some(0) {
            whole += 1;
        } else {
            none += 1;
            assert!(!is_done, "{what}");
            let serve = lab.run("serve", &["--socket-path".as_ref(), lab.socket().as_os_str()]);
            assert_eq!(serve.code, Some(1), "{what}");
            // What is left can be taken over if its file is whole.
            if fs::metadata(lab.disk()).is_ok_and(|disk| disk.len() == SMALL) {
                run(&mut provision(&one, &["--lazy", "--adopt"])).ok();
            } else {
                clear(0);
                run(&mut provision(&one, &["--lazy"])).ok();
            }
        }
        lab.run("restore", NONE).ok();
        assert_holds(&lab, &one);
    });
    println!("{kills} kills of provision: {none} left no disk, {whole} a whole one");
    assert!(none > 0 && whole > CALLS.len());

    let mut ended_on = [0, 0];
    let before = |_: u32| {
        run(&mut provision(&one, &["--adopt", "--lazy"])).ok();
    };
    let kills =
        kill_everywhere(&before, &|| provision(&two, &["--adopt", "--lazy"]), &mut |what, is_done| {
            let base = PathBuf::from(lab.status()["base"].as_str().unwrap());
            assert!(base == one || base == two, "{what}");
            assert!(!is_done || base == two, "{what}");
            ended_on[usize::from(base == two)] += 1;
            lab.run("restore", NONE).ok();
            assert_holds(&lab, &base);
        });
    println!(
        "{kills} kills of provision --adopt: {} ended on the old base, {} on the new",
        ended_on[0], ended_on[1]
    );
    assert!(ended_on[0] > 0 && ended_on[1] > CALLS.len(), "{ended_on:?}");
}
