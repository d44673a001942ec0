//! Blocks that a disk shares with its base, on an xfs of its own; and how the operator has the drain work.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use pristine_tests::images::{self, BLOCK};
use pristine_tests::lab::{Lab, Server};
use pristine_tests::mounts::Mounts;
use pristine_tests::program::{Finished, pristine, run};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use serde_json::Value;

const NONE: &[&str] = &[];
const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
/// Where the base has data; the rest are holes.
const DATA: [(u64, u64); 3] = [(0, 40 * MIB), (48 * MIB, 4096), (64 * MIB, 24 * MIB)];
const DATA_BYTES: u64 = 64 * MIB + 4096;
const CHUNK: u64 = 65536;

/// An xfs with a base and, later, disks.
struct Xfs {
    lab: Lab,
    mounts: Mounts,
    dir: PathBuf,
}

impl Xfs {
    fn new() -> Option<Self> {
        let (lab, mounts) = (Lab::new(), Mounts::new()?);
        let dir = lab.path("xfs");
        mounts.xfs(&dir, &lab.path("xfs.img"), 512 * MIB).then_some(())?;
        let xfs = Self { lab, mounts, dir };
        images::sparse(&xfs.seen("base"), SIZE, 61, &DATA);
        Some(xfs)
    }

    /// Where this test finds a file of it.
    fn seen(&self, name: &str) -> PathBuf {
        self.mounts.outside(&self.dir.join(name))
    }

    fn command<S: AsRef<OsStr>>(&self, command: &str, disk: &str, more: &[S]) -> Command {
        let mut program = pristine([command]);
        program
            .arg("--disk")
            .arg(self.dir.join(disk))
            .arg("--runtime-dir")
            .arg(self.lab.runtime())
            .args(more);
        self.mounts.inside(&program)
    }

    fn run<S: AsRef<OsStr>>(&self, command: &str, disk: &str, more: &[S]) -> Finished {
        run(&mut self.command(command, disk, more))
    }

    fn provision(&self, disk: &str, more: &[&str]) -> Finished {
        let base = self.dir.join("base");
        let mut args = vec!["--base".as_ref(), base.as_os_str()];
        args.extend(more.iter().map(OsStr::new));
        self.run("provision", disk, &args)
    }

    fn serve(&self, disk: &str, more: &[&str]) -> Server {
        let socket = self.lab.socket();
        let mut args = vec!["--socket-path".as_ref(), socket.as_os_str()];
        args.extend(more.iter().map(OsStr::new));
        Server::start(&self.command("serve", disk, &args))
    }

    fn status(&self, disk: &str) -> Value {
        serde_json::from_str(&self.run("status", disk, &["--json"]).ok().stdout).unwrap()
    }

    fn seal(&self) {
        let mut seal = pristine(["base", "seal"]);
        run(&mut self.mounts.inside(seal.arg(self.dir.join("base")))).ok();
    }

    /// Has all that is dirty written to the medium, and given up what xfs keeps ready for five minutes beside blocks that
    /// were shared and written to: it counts as the file's.
    fn sync(&self) {
        run(&mut self.mounts.inside(Command::new("sync").arg("-f").arg(&self.dir))).ok();
        let mut spaceman = Command::new("/usr/sbin/xfs_spaceman");
        run(&mut self.mounts.inside(spaceman.args(["-c", "prealloc -s"]).arg(&self.dir))).ok();
    }

    /// Bytes of the file system that nobody has, when all is written that is to be.
    fn free(&self) -> u64 {
        self.sync();
        self.mounts.free(&self.dir)
    }

    /// Panics unless the disk is the base by its bytes, for `verify`, and in the room that it takes.
    fn assert_pristine(&self, disk: &str) {
        images::assert_equal(&self.seen(disk), &self.seen("base"));
        self.run("verify", disk, NONE).ok();
        assert_eq!(self.status(disk)["state"], "pristine");
        self.sync();
        let (of_disk, map) = self.blocks(disk);
        assert_eq!(of_disk, self.blocks("base").0, "blocks of the disk, of the base; the disk's are {map}");
        assert_eq!(self.blocks("base").0, DATA_BYTES / BLOCK);
    }

    /// How many blocks the data of a file takes up, and a map of them. (What the kernel calls a file's blocks has those of the
    /// map itself too, if it has many parts, as that of a file that was written while others were may have.)
    fn blocks(&self, file: &str) -> (u64, String) {
        let mut bmap = Command::new("/usr/sbin/xfs_io");
        bmap.args(["-r", "-c", "bmap -p"]).arg(self.dir.join(file));
        let map = run(&mut self.mounts.inside(&bmap)).ok().stdout;
        // Such as "0: [0..127]: 96..223", in sectors; or "hole".
        let len = |part: &str| {
            let (first, last) = part.split_once('[')?.1.split_once(']')?.0.split_once("..")?;
            Some(last.parse::<u64>().ok()? - first.parse::<u64>().ok()? + 1)
        };
        let parts = map.lines().filter(|line| line.contains('[') && !line.contains("hole"));
        (parts.map(|part| len(part).expect(part)).sum::<u64>() * 512 / BLOCK, map)
    }

    /// A session that writes 1 MiB at each of these places.
    fn session(&self, places: &[u64]) -> Remote {
        let mut client = Remote::connected(&self.lab.socket(), 1);
        for at in places {
            client.ask(&format!("write {at} {MIB} 5"));
        }
        client
    }
}

/// How many blocks were reflinked, copied and punched, as a status has it.
fn counts(status: &Value) -> [u64; 3] {
    ["reflinked_blocks", "copied_blocks", "punched_blocks"]
        .map(|name| status["copies"][name].as_u64().unwrap())
}

/// Invariants 2 and 4: a disk that shares its base's blocks is the base, in its holes too, takes no room, and after
/// a session gets them back; neither the base nor another disk sees what is written to it.
#[test]
fn disk_on_the_file_system_of_its_base_shares_blocks_and_is_restored_exactly() {
    let Some(xfs) = Xfs::new() else { return };
    let (base, before) = (images::sha256(&xfs.seen("base")), xfs.free());
    let said = xfs.provision("a", NONE).ok().stdout;
    assert!(said.contains("64.00 MiB reflinked, 4.00 KiB copied, 0 B punched"), "{said}");
    xfs.provision("b", NONE).ok();
    let took = before - xfs.free();
    assert!(took < 8 * MIB, "two disks that share 64 MiB took {took} bytes");
    xfs.assert_pristine("a");

    for more in [NONE, &["--direct"]] {
        let server = xfs.serve("a", &[&["--verbose"], more].concat());
        assert_eq!(xfs.status("a")["copies"]["reflink"], "untried");
        // In data, across the border to a hole, in a hole, and at the end.
        let places = [3 * MIB + 8192, 40 * MIB - 65536, 50 * MIB, SIZE - MIB];
        xfs.session(&places).leave();
        wait_until("the disk is pristine", || xfs.status("a")["state"] == "pristine");
        let status = xfs.status("a");
        let [reflinked, copied, punched] = counts(&status);
        assert_eq!(status["copies"]["reflink"], "works");
        assert_eq!(reflinked + copied + punched, 4 * MIB / BLOCK, "{status}");
        assert_eq!(punched, (3 * MIB - 65536) / BLOCK, "{status}");
        assert!(reflinked >= MIB / BLOCK, "{status}");
        let said = server.0.output();
        assert!(said.contains("shares blocks with its base") && said.contains(" reflinked, "), "{said}");
        server.stop();
        xfs.assert_pristine("a");
    }
    xfs.assert_pristine("b");
    assert_eq!(images::sha256(&xfs.seen("base")), base);

    // Whoever wants blocks of his own gets them.
    let said = xfs.provision("c", &["--reflink", "never"]).ok().stdout;
    assert!(said.contains("0 B reflinked, 64.00 MiB copied"), "{said}");
    assert!(before - xfs.free() > 64 * MIB);
    xfs.assert_pristine("c");
}

/// Invariant 5: what a session writes to shared blocks, while the kernel writes them back again and again, comes to lie in blocks of
/// its own. (On Linux 6.1 it does not, which is why blocks are not shared there.)
#[test]
fn session_that_writes_to_shared_blocks_leaves_those_of_the_base_alone() {
    let Some(xfs) = Xfs::new() else { return };
    let before = images::sha256(&xfs.seen("base"));
    xfs.provision("disk", NONE).ok();
    let server = xfs.serve("disk", NONE);
    let mut client = Remote::connected(&xfs.lab.socket(), 2);
    client.ask(&format!("storm 7 0 {}", 8 * MIB));
    let disk = xfs.dir.join("disk");
    let dirty = || xfs.status("disk")["dirty_blocks"].as_u64().unwrap();
    wait_until("most of that is written to", || {
        run(&mut xfs.mounts.inside(Command::new("sync").arg("-d").arg(&disk))).ok();
        dirty() > 6 * MIB / BLOCK
    });
    client.kill();
    wait_until("the disk is pristine", || xfs.status("disk")["state"] == "pristine");
    server.stop();
    let mut on_medium = Command::new("dd");
    on_medium.args(["bs=1M", "iflag=direct", "status=none"]);
    on_medium.arg(format!("if={}", xfs.dir.join("base").display()));
    on_medium.arg(format!("of={}", xfs.lab.path("base").display()));
    run(&mut xfs.mounts.inside(&on_medium)).ok();
    assert_eq!(images::sha256(&xfs.lab.path("base")), before, "the base on the medium");
    // In many small pieces, so that the file system's map of it takes a few blocks.
    images::assert_equal(&xfs.seen("disk"), &xfs.seen("base"));
    xfs.run("verify", "disk", NONE).ok();
}

/// What the operator wants of sharing counts for `rebase --now` too: a disk that has blocks of its own keeps them, or gives
/// them up for those of its new base.
#[test]
fn rebase_shares_blocks_only_where_it_may() {
    let Some(xfs) = Xfs::new() else { return };
    images::sparse(&xfs.seen("other"), SIZE, 62, &DATA);
    xfs.provision("disk", &["--reflink", "never"]).ok();
    let rebase = |base: &str, reflink: &str| {
        let base = xfs.dir.join(base);
        let args =
            ["--base".as_ref(), base.as_os_str(), "--now".as_ref(), "--reflink".as_ref(), reflink.as_ref()];
        xfs.run("rebase", "disk", &args).ok();
        xfs.run("verify", "disk", NONE).ok();
        xfs.free()
    };
    let before = xfs.free();
    assert!(rebase("other", "never") < before + 8 * MIB, "blocks of its own were given up");
    assert!(rebase("base", "auto") > before + 48 * MIB, "no blocks were shared");
    xfs.assert_pristine("disk");
}

/// A guest's sectors are the same whether its disk shares blocks or not, past the page cache too: its partitions are counted in
/// them. What is smaller than a block of the file system is read and written as ever.
#[test]
fn sectors_of_a_direct_disk_stay_as_they_are_when_it_shares_blocks() {
    let Some(xfs) = Xfs::new() else { return };
    xfs.provision("copied", &["--reflink", "never"]).ok();
    xfs.provision("shared", NONE).ok();
    let sector = |disk| {
        let server = xfs.serve(disk, &["--direct"]);
        let mut client = xfs.session(&[70 * MIB]);
        let alignment = client.ask("property request-alignment");
        let at = MIB + 512;
        let base = xfs.seen("base");
        assert_eq!(client.ask(&format!("compare {at} 512 {}", base.display())), "same");
        client.ask(&format!("write {at} 512 9"));
        let written = client.ask(&format!("read {at} 512"));
        assert_eq!(client.ask(&format!("compare {} 512 {}", at + 512, base.display())), "same");
        client.leave();
        wait_until("the disk is pristine", || xfs.status(disk)["state"] == "pristine");
        server.stop();
        xfs.assert_pristine(disk);
        (alignment, written)
    };
    assert_eq!(sector("shared"), sector("copied"));
}

/// A disk whose base lies elsewhere, or on a file system that can't, is copied, and says so.
#[test]
fn disk_that_cannot_share_blocks_is_copied() {
    let Some(xfs) = Xfs::new() else { return };
    let lab = Lab::new();
    images::sparse(&lab.base(), 2 * MIB, 62, &[(0, MIB)]);
    let base = lab.base();
    let args = ["--base".as_ref(), base.as_os_str(), "--verbose".as_ref()];
    let finished = xfs.run("provision", "disk", &args).ok();
    assert!(finished.stdout.contains("0 B reflinked, 1.00 MiB copied"), "{finished:#?}");
    assert!(finished.stderr.contains("does not share blocks with its base"), "{finished:#?}");
    images::assert_equal(&xfs.seen("disk"), &base);
}

/// Line 7 of the issue, and invariants 2 and 4: a bit that was flipped in a sealed base is found before its block is shared, by
/// provision and by the drain; also a bit that rotted on the medium, while the page cache still has the block as it was.
#[test]
fn flipped_bit_of_a_sealed_base_is_found_before_it_is_shared() {
    let Some(xfs) = Xfs::new() else { return };
    xfs.seal();
    xfs.provision("disk", NONE).ok();
    xfs.assert_pristine("disk");
    for (place, at) in [(Place::File, 5 * MIB + 1234), (Place::Medium, 70 * MIB + 99)] {
        let named = format!("at offset {} of the base are not what was sealed", at / CHUNK * CHUNK);
        let server = xfs.serve("disk", NONE);
        let client = xfs.session(&[at / MIB * MIB]);
        // A server that has the base open is told by its times that it has changed.
        server.stop();
        xfs.flip(place, at);
        let finished = xfs.provision("other", NONE);
        assert!(finished.code == Some(1) && finished.stderr.contains(&named), "{finished:#?}");
        assert!(!xfs.seen("other").exists());
        client.kill();
        let finished = xfs.run("restore", "disk", NONE);
        assert!(finished.code == Some(1) && finished.stderr.contains(&named), "{finished:#?}");
        let server = xfs.serve("disk", NONE);
        wait_until("the drain says what fails", || {
            xfs.status("disk")["drain_error"].as_str().is_some_and(|error| error.contains(&named))
        });
        server.stop();
        xfs.flip(place, at);
        let said = xfs.run("restore", "disk", NONE).ok().stdout;
        assert!(!said.contains(" 0 B reflinked"), "{said}");
        xfs.assert_pristine("disk");
    }
}

/// Where a bit is flipped.
#[derive(Clone, Copy)]
enum Place {
    /// In the file, as any program would.
    File,
    /// Beneath the file system.
    Medium,
}

impl Xfs {
    fn flip(&self, place: Place, at: u64) {
        let (file, at) = match place {
            Place::File => (self.seen("base"), at),
            Place::Medium => (self.lab.path("xfs.img"), self.on_medium(at)),
        };
        let file = File::options().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 16], at).unwrap();
        self.sync();
    }

    /// Where in the image of the file system a byte of the base is.
    fn on_medium(&self, at: u64) -> u64 {
        self.sync();
        let listed =
            run(Command::new("/usr/sbin/filefrag").args(["-v", "-b4096"]).arg(self.seen("base"))).ok();
        let block = at / BLOCK;
        // Each line: number, first and last block in the file, first and last block on the medium.
        let physical = listed.stdout.lines().find_map(|line| {
            let numbers: Vec<u64> =
                line.split([':', '.', ' ']).filter_map(|word| word.parse().ok()).collect();
            match numbers[..] {
                [_, first, last, physical, ..] if (first..=last).contains(&block) => {
                    Some(physical + block - first)
                }
                _ => None,
            }
        });
        physical.unwrap_or_else(|| panic!("no extent of block {block}: {listed:#?}")) * BLOCK + at % BLOCK
    }
}

/// What line 6 of the issue asks for, small: a restore that shares blocks against one that copies them. The ratio is told, not
/// judged; `cargo bench --bench restore` has 1 GiB of it.
#[test]
fn restore_by_sharing_moves_no_data() {
    let Some(xfs) = Xfs::new() else { return };
    xfs.provision("disk", NONE).ok();
    let places: Vec<u64> = (0..32).map(|n| n * MIB).collect();
    let mut times = [0.0; 2];
    for (time, more) in times.iter_mut().zip([["--reflink", "auto"], ["--reflink", "never"]]) {
        let server = xfs.serve("disk", NONE);
        let client = xfs.session(&places);
        server.stop();
        client.kill();
        xfs.sync();
        let begin = Instant::now();
        let said = xfs.run("restore", "disk", &more).ok().stdout;
        *time = begin.elapsed().as_secs_f64();
        println!("{said}");
        let moved = if more[1] == "auto" { "reflinked, 0 B copied" } else { " 0 B reflinked" };
        assert!(said.contains(moved), "{said}");
        images::assert_equal(&xfs.seen("disk"), &xfs.seen("base"));
    }
    println!(
        "restored by sharing in {:.3} s, by copying in {:.3} s: {:.1}",
        times[0],
        times[1],
        times[1] / times[0]
    );
}

fn lines_with(help: &Finished, word: &str) -> usize {
    help.stdout.lines().filter(|line| line.contains(word)).count()
}

/// The operator finds what the drain is told, and what it does.
#[test]
fn drain_options_are_explained_checked_and_shown() {
    let help = run(&mut pristine(["serve", "--help"])).ok();
    assert!(["--drain", "--rate", "--reflink"].iter().all(|word| lines_with(&help, word) > 0), "{help:#?}");
    let lab = Lab::new();
    images::sparse(&lab.base(), 8 * MIB, 63, &[(0, 4 * MIB)]);
    lab.provision(&["--lazy"]);
    for wrong in [["--rate", "1K"], ["--rate", "fast"], ["--drain", "never"]] {
        let socket = lab.socket();
        let args = [wrong[0].as_ref(), wrong[1].as_ref(), "--socket-path".as_ref(), socket.as_os_str()];
        assert_eq!(lab.run::<&OsStr>("serve", &args).code, Some(2));
    }
    let server = lab.serve(&["--drain", "idle", "--rate", "4M"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    for at in [0, 3 * MIB, 7 * MIB] {
        assert_eq!(client.ask(&format!("compare {at} {MIB} {}", lab.base().display())), "same");
    }
    let status = lab.status();
    assert_eq!(
        (&status["copies"]["when"], &status["copies"]["rate"]),
        (&"idle".into(), &(4 * MIB).into()),
        "{status}"
    );
    client.leave();
    lab.wait_pristine();
    let shown = lab.run("status", NONE).ok().stdout;
    assert!(shown.contains("idle, 4.00 MiB a second at most") && shown.contains(" copied, "), "{shown}");
    server.stop();
    lab.assert_pristine();
}
