//! The session disk's file system is full; the base's storage goes away, and comes back.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use pristine_tests::PATIENCE;
use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::mounts::{LoopDevice, Mounts};
use pristine_tests::program::{Finished, run};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use serde_json::Value;

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
/// An answer of the guest's disk takes no longer, whatever fails.
const BOUND: Duration = Duration::from_secs(30);
const NONE: &[&str] = &[];

/// A session disk on a small file system of its own; its state is elsewhere.
struct Small {
    lab: Lab,
    mounts: Mounts,
    dir: PathBuf,
    disk: PathBuf,
}

impl Small {
    /// On a tmpfs or an ext4; the disk, pristine, has `data` bytes and a hole.
    fn new(ext4: bool, data: u64) -> Option<Self> {
        let (lab, mounts) = (Lab::new(), Mounts::new()?);
        let dir = lab.path("small");
        if ext4 {
            mounts.ext4(&dir, &lab.path("ext4.img"), 96 * MIB).then_some(())?;
        } else {
            mounts.tmpfs(&dir, 96 * MIB);
        }
        images::sparse(&lab.base(), SIZE, 43, &[(0, data)]);
        let small = Self { disk: dir.join("disk.img"), lab, mounts, dir };
        small.run("provision", &[OsStr::new("--base"), small.lab.base().as_os_str()]).ok();
        Some(small)
    }

    fn command<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> std::process::Command {
        let mut program = pristine_tests::program::pristine([command]);
        program.arg("--disk").arg(&self.disk).arg("--runtime-dir").arg(self.lab.runtime());
        program.arg("--state-dir").arg(self.lab.state()).args(more);
        self.mounts.inside(&program)
    }

    fn run<S: AsRef<OsStr>>(&self, command: &str, more: &[S]) -> Finished {
        run(&mut self.command(command, more))
    }

    fn serve(&self) -> Server {
        let socket = self.lab.socket();
        Server::start(&self.command("serve", &[OsStr::new("--socket-path"), socket.as_os_str()]))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.run("status", &["--json"]).ok().stdout).unwrap()
    }

    fn wait_pristine(&self) {
        wait_until("the disk is pristine", || self.status()["state"] == "pristine");
    }

    /// Blocks that differ from the base.
    fn differing(&self) -> BTreeSet<u64> {
        let blocks = images::differing_blocks(&self.mounts.outside(&self.disk), &self.lab.base());
        blocks.into_iter().collect()
    }

    fn assert_pristine(&self) {
        assert_eq!(self.differing(), BTreeSet::new());
        self.run("verify", NONE).ok();
        assert_eq!(self.status()["state"], "pristine");
    }
}

/// Written and failed writes of an `attempt`, which must be answered in time.
fn attempt(client: &mut Remote, count: u64, seed: u64) -> (u64, u64) {
    let answer = ask(client, &format!("attempt {count} {seed}")).unwrap();
    let (written, failed) = answer.split_once(' ').unwrap();
    (written.parse().unwrap(), failed.parse().unwrap())
}

fn ask(client: &mut Remote, command: &str) -> Result<String, String> {
    client.send(command);
    client.answer_within(BOUND).expect("the guest hangs")
}

/// Invariants 1, 3 and 6: a sparse disk whose file system is full fails the writes that need room, with
/// I/O errors; what was written before can be read and written again; once there is room all go on.
fn sparse_disk_on_a_full_file_system(ext4: bool) {
    let Some(small) = Small::new(ext4, MIB) else { return };
    let server = small.serve();
    let mut client = Remote::connected(&small.lab.socket(), 1);
    small.mounts.fill(&small.dir, 4 * MIB);
    let (written, failed) = attempt(&mut client, 4000, 1);
    assert!(written > 100 && failed > 100, "{written} writes succeeded, {failed} failed");
    // Of the same blocks those that have their room are written again.
    let (again, _) = attempt(&mut client, 4000, 1);
    assert!(again >= written, "{again} of {written} blocks could be written again");
    for at in [0, SIZE / 2, SIZE - MIB] {
        ask(&mut client, &format!("read {at} {MIB}")).unwrap();
    }
    let unlogged: Vec<_> = small.differing().difference(&small.lab.logged_blocks()).copied().collect();
    assert!(unlogged.is_empty(), "{} blocks were changed and not logged", unlogged.len());
    small.mounts.make_room(&small.dir);
    assert_eq!(attempt(&mut client, 4000, 2), (4000, 0));
    client.leave();
    small.wait_pristine();
    server.stop();
    small.assert_pristine();
}

#[test]
fn sparse_disk_on_a_full_tmpfs_fails_writes_and_goes_on_with_room() {
    sparse_disk_on_a_full_file_system(false);
}

#[test]
fn sparse_disk_on_a_full_ext4_fails_writes_and_goes_on_with_room() {
    sparse_disk_on_a_full_file_system(true);
}

/// Invariants 2, 4 and 6: a session gave up blocks of the disk, and their room is taken when they are to
/// be restored: they stay pending, and are the base's for the next session; the drain says that it
/// fails, tries again, and finishes once there is room.
fn drain_into_a_full_file_system(ext4: bool) {
    let data = 16 * MIB;
    let Some(small) = Small::new(ext4, data) else { return };
    let mut server = small.serve();
    let mut client = Remote::connected(&small.lab.socket(), 1);
    for at in (0..data).step_by(MIB as usize) {
        client.ask(&format!("write {at} {MIB} 3"));
    }
    client.ask(&format!("discard 0 {data}"));
    // An ext4 keeps some room back that its user may not have.
    wait_until("the room is free", || small.mounts.free(&small.dir) > data);
    small.mounts.fill(&small.dir, 0);
    client.leave();
    let line = server.0.wait_line("a failed drain", PATIENCE, |line| line.contains("restoring failed"));
    assert!(line.contains("next attempt in 1 s") && line.contains("disk.img"), "{line}");
    wait_until("the failure shows", || small.status()["drain_failing"] == true);
    let status = small.status();
    assert_eq!(status["state"], "restoring");
    assert!(status["pending_blocks"].as_u64() > Some(100), "{status}");
    let text = small.run("status", NONE).ok().stdout;
    assert!(text.contains("restoring fails"), "{text}");

    let mut next = Remote::connected(&small.lab.socket(), 1);
    attempt(&mut next, 200, 4);
    let whole = format!("compare {MIB} 4096 {}", small.lab.base().display());
    ask(&mut next, &whole).unwrap();
    next.leave();
    server.0.wait_line("a longer pause", PATIENCE, |line| line.contains("next attempt in 2 s"));
    small.mounts.make_room(&small.dir);
    small.wait_pristine();
    server.stop();
    small.assert_pristine();
}

#[test]
fn drain_into_a_full_tmpfs_goes_on_with_room() {
    drain_into_a_full_file_system(false);
}

#[test]
fn drain_into_a_full_ext4_goes_on_with_room() {
    drain_into_a_full_file_system(true);
}

/// Invariants 2 and 6: the base's storage goes away under a server. Reads of pending blocks fail in
/// bounded time, those of the session's own blocks do not; the disk stays pending; the drain says that
/// it fails and tries again. The storage comes back: all goes on.
#[test]
fn base_whose_storage_goes_away_and_comes_back_is_waited_for() {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 44);
    let Some(device) = LoopDevice::of(&lab.base()) else { return };
    lab.run("provision", &[OsStr::new("--lazy"), OsStr::new("--base"), device.path().as_os_str()]).ok();
    let kept = lab.path("kept");
    fs::copy(lab.base(), &kept).unwrap();
    fs::File::options().write(true).open(lab.base()).unwrap().set_len(0).unwrap();
    device.forget();

    let mut server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    let error = ask(&mut client, &format!("read 0 {MIB}")).unwrap_err();
    assert!(error.contains("error 5"), "{error}");
    // Whole blocks need nothing of the base, parts do.
    assert_eq!(attempt(&mut client, 500, 5), (500, 0));
    assert!(ask(&mut client, &format!("write {} 512 6", SIZE / 2 + 4096 * 3)).is_err());
    server.0.wait_line("a failed drain", PATIENCE, |line| line.contains("restoring failed"));
    wait_until("the failure shows", || lab.status()["drain_failing"] == true);
    assert!(lab.status()["pending_blocks"].as_u64() > Some(10_000), "{}", lab.status());

    let back = fs::read(&kept).unwrap();
    fs::File::options()
        .write(true)
        .open(lab.base())
        .and_then(|mut file| std::io::Write::write_all(&mut file, &back))
        .unwrap();
    device.forget();
    wait_until("the base is read again", || {
        let part = SIZE / 2 + 4096 * 3;
        ask(&mut client, &format!("compare {part} 512 {}", kept.display())).as_deref() == Ok("same")
    });
    client.leave();
    lab.wait_pristine();
    server.stop();
    images::assert_equal(&lab.disk(), &kept);
    lab.run("verify", NONE).ok();
}

/// Invariants 2 and 5: a base that is cut short under a server is not the base any more, also when its
/// bytes are put back: nothing is restored from it, no session begins, the messages say what to do, and
/// what they say makes the disk exact.
#[test]
fn base_that_changed_under_a_server_is_refused_until_the_disk_is_moved_to_it() {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 45);
    lab.provision(NONE);
    let mut server = lab.serve(NONE);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 2000 7");
    let kept = fs::read(lab.base()).unwrap();
    fs::File::options().write(true).open(lab.base()).unwrap().set_len(SIZE / 2).unwrap();
    client.leave();
    server.0.wait_line("a failed drain", PATIENCE, |line| {
        line.contains("restoring failed") && line.contains("base.img")
    });
    assert_eq!(lab.status()["pending_blocks"], 2000);
    assert!(lab.status()["base_trouble"].as_str().unwrap().contains("has changed"), "{}", lab.status());
    let mut next = Remote::start(&lab.socket());
    ask(&mut next, "connect 1").unwrap_err();
    server.0.wait_line("the refusal", PATIENCE, |line| {
        line.contains("turned away") && line.contains("base.img") && line.contains("has changed")
    });
    fs::write(lab.base(), &kept).unwrap();
    server.stop();
    assert_eq!(lab.status()["state"], "interrupted");
    lab.run("restore", NONE).refused(1, &["base.img", "pristine rebase --base"]);
    let base = lab.base();
    lab.run("rebase", &["--now".as_ref(), "--base".as_ref(), base.as_os_str()]).ok();
    lab.assert_pristine();
}

/// Invariants 2 and 12: the disk's storage begins to fail writes, of which nothing but a sync would tell. What a session wrote
/// over blocks that were pending, and so held the last session's data, is lost. Returns the disk, its server, a client in that
/// session, and the offset and length that it wrote, whole blocks or a part of one; and a file that has at those what the last
/// session wrote. `None`: that can't be had here. The kernel has told nobody of it who asks about the disk's file, or, `told`, somebody.
fn lost(whole: bool, told: bool) -> Option<(Small, Server, Remote, u64, u64, PathBuf)> {
    let (lab, mounts) = (Lab::new(), Mounts::new()?);
    let (outer, inner) = (lab.path("outer"), lab.path("inner"));
    if !mounts.ext4(&outer, &lab.path("outer.img"), 128 * MIB)
        || !mounts.ext4(&inner, &outer.join("inner.img"), 96 * MIB)
    {
        return None;
    }
    let mut remount = std::process::Command::new("mount");
    run(&mut mounts.inside(remount.args(["-o", "remount,errors=remount-ro"]).arg(&outer))).ok();
    images::dense(&lab.base(), SIZE, 47);
    let small = Small { disk: inner.join("disk.img"), lab, mounts, dir: inner };
    small.run("provision", &[OsStr::new("--base"), small.lab.base().as_os_str()]).ok();
    small.run("restore", NONE).ok();
    let socket = small.lab.socket();
    // Sixteen blocks a second: what is pending at the end of the disk stays so.
    let serve: Vec<&OsStr> =
        [OsStr::new("--rate"), OsStr::new("64K"), OsStr::new("--socket-path"), socket.as_os_str()].into();
    let server = Server::start(&small.command("serve", &serve));
    let at = SIZE - MIB;
    let mut first = Remote::connected(&socket, 1);
    (0..8).for_each(|n| drop(first.ask(&format!("write {} {MIB} 48", n * MIB))));
    first.ask(&format!("write {at} {MIB} 48"));
    let sync = |small: &Small, what: &str| {
        let mut sync = std::process::Command::new("sync");
        run(&mut small.mounts.inside(sync.arg(what).arg(&small.disk)))
    };
    sync(&small, "-f").ok();
    first.leave();
    wait_until("the session is over", || small.status()["pending_blocks"].as_u64().unwrap() > 2000);
    let mut second = Remote::connected(&socket, 1);
    let (from, len) = if whole { (at, 64 << 10) } else { (at + 512, 1024) };
    second.ask(&format!("write {from} {len} 49"));
    small.mounts.fail_ext4(&outer);
    let _ = sync(&small, if told { "-d" } else { "-f" });
    // Nobody needs it any more, and it is written back, as far as the kernel knows.
    let disk = fs::File::open(small.mounts.outside(&small.disk)).unwrap();
    rustix::fs::fadvise(&disk, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let last = small.lab.path("last.img");
    images::sparse(&last, SIZE, 48, &[(at, MIB)]);
    let held = |file: &fs::File| {
        let mut held = vec![0; len as usize];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut held, from).unwrap();
        held
    };
    let is_lost = held(&disk) == held(&fs::File::open(&last).unwrap());
    assert!(is_lost, "the medium does not hold the last session's data: nothing is shown");
    Some((small, server, second, from, len, last))
}

fn session_does_not_see_the_last_ones_data_when_its_own_is_lost(whole: bool) {
    let Some((_small, server, mut second, from, len, last)) = lost(whole, false) else { return };
    let answer = ask(&mut second, &format!("compare {from} {len} {}", last.display()));
    assert_ne!(answer.as_deref(), Ok("same"), "a session reads what the last one wrote");
    assert!(answer.is_err(), "what was read is neither that nor the session's own: {answer:?}");
    // From now on nothing is believed.
    assert!(ask(&mut second, &format!("read {from} 4096")).is_err());
    second.kill();
    server.kill();
}

#[test]
fn session_whose_blocks_are_lost_does_not_read_the_last_ones() {
    session_does_not_see_the_last_ones_data_when_its_own_is_lost(true);
}

#[test]
fn session_whose_parts_of_blocks_are_lost_does_not_read_the_last_ones() {
    session_does_not_see_the_last_ones_data_when_its_own_is_lost(false);
}

/// A flush, which waits for nothing, tells of it as soon as anybody can.
#[test]
fn flush_of_a_session_whose_blocks_are_lost_fails() {
    let Some((small, server, mut second, from, ..)) = lost(true, false) else { return };
    assert!(ask(&mut second, "flush").is_err());
    assert!(ask(&mut second, &format!("read {from} 4096")).is_err());
    assert!(small.status()["pending_blocks"].as_u64().unwrap() > 0);
    second.kill();
    server.kill();
}

/// Nor is it kept as what the session wrote.
#[test]
fn session_whose_blocks_are_lost_is_not_kept() {
    let Some((small, server, second, ..)) = lost(true, false) else { return };
    // Nobody has noticed.
    server.kill();
    second.kill();
    let kept = small.lab.path("kept.qcow2");
    small.run("keep", &[OsStr::new("--to"), kept.as_os_str()]).refused(1, &["can't be told", "sync"]);
    // The kernel has told of it, and does so once.
    small
        .run("keep", &[OsStr::new("--to"), kept.as_os_str()])
        .refused(1, &["can't be told", "storage failed"]);
    assert!(!kept.exists());
}

/// A server that was killed in the very sync that was told of it: the kernel tells nobody else. What it leaves in the live page is
/// what such a server leaves.
fn told_to_who_was_killed() -> Option<(Small, Remote, u64, u64, PathBuf)> {
    let (small, server, second, from, len, last) = lost(true, true)?;
    server.kill();
    let mut page = fs::read_dir(small.lab.runtime()).unwrap().map(|entry| entry.unwrap().path());
    let page = page.find(|path| path.extension() == Some(OsStr::new("live"))).unwrap();
    let page = fs::File::options().write(true).open(page).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&page, &1u64.to_ne_bytes(), 29 * 8).unwrap();
    Some((small, second, from, len, last))
}

#[test]
fn session_whose_blocks_were_lost_as_its_server_was_killed_does_not_read_the_last_ones() {
    let Some((small, mut second, from, len, last)) = told_to_who_was_killed() else { return };
    let socket = small.lab.socket();
    let server = Server::start(&small.command("serve", &[OsStr::new("--socket-path"), socket.as_os_str()]));
    // The VM is the one that it was.
    if ask(&mut second, "connect 1").is_ok() {
        let answer = ask(&mut second, &format!("compare {from} {len} {}", last.display()));
        assert_ne!(answer.as_deref(), Ok("same"), "a session reads what the last one wrote");
    }
    second.kill();
    server.kill();
}

#[test]
fn session_whose_blocks_were_lost_as_its_server_was_killed_is_not_kept() {
    let Some((small, second, ..)) = told_to_who_was_killed() else { return };
    second.kill();
    let kept = small.lab.path("kept.qcow2");
    for what in ["sync the file system", "storage failed"] {
        let finished = small.run("keep", &[OsStr::new("--to"), kept.as_os_str()]);
        let said = &finished.stderr;
        assert!(finished.code == Some(1) && said.contains("can't be told") && said.contains(what), "{said}");
    }
    assert!(!kept.exists());
}
