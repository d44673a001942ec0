//! Bad input: one clear line, an exit code that is not 0, and nothing changed.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::peer::{Image, storage_daemon};
use pristine_tests::program::{Finished, pristine, run};
use pristine_tests::remote::Remote;
use pristine_tests::{PATIENCE, wait_until};
use rustix::process::Signal;

const SIZE: u64 = 4 << 20;
const NONE: &[&str] = &[];

/// Every file below the lab's directory: size, modification time, contents.
fn snapshot(lab: &Lab) -> BTreeMap<PathBuf, (u64, i64, String)> {
    fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, (u64, i64, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let about = fs::symlink_metadata(&path).unwrap();
            let contents = if about.is_file() { images::sha256(&path) } else { String::new() };
            found.insert(path.clone(), (about.len(), about.mtime_nsec(), contents));
            if about.is_dir() {
                walk(&path, found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&lab.path(""), &mut found);
    found
}

/// Runs `command`, which must fail with `code` and one line with `words`, and change nothing.
#[track_caller]
fn refused(lab: &Lab, command: &mut Command, code: i32, words: &[&str]) {
    let before = snapshot(lab);
    run(command).refused(code, words);
    assert_eq!(snapshot(lab), before, "{command:?} changed something");
}

fn with_base() -> Lab {
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 81);
    lab
}

fn provisioned() -> Lab {
    let lab = with_base();
    lab.provision(&[]);
    lab
}

fn provision(lab: &Lab, base: &Path, more: &[&str]) -> Command {
    let mut args = vec![OsStr::new("--base"), base.as_os_str()];
    args.extend(more.iter().map(OsStr::new));
    lab.pristine("provision", &args)
}

fn serve_at(lab: &Lab, socket: &Path) -> Command {
    let mut command = lab.pristine("serve", NONE);
    command.arg("--socket-path").arg(socket);
    command
}

fn serve(lab: &Lab) -> Command {
    serve_at(lab, &lab.socket())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn provision_from_a_missing_base_is_refused() {
    let lab = Lab::new();
    refused(&lab, &mut provision(&lab, &lab.base(), &[]), 1, &["base.img"]);
}

#[test]
fn provision_from_a_directory_or_a_fifo_is_refused() {
    let lab = with_base();
    fs::create_dir(lab.path("dir")).unwrap();
    refused(&lab, &mut provision(&lab, &lab.path("dir"), &[]), 1, &["dir"]);
    run(Command::new("mkfifo").arg(lab.path("fifo"))).ok();
    refused(&lab, &mut provision(&lab, &lab.path("fifo"), &[]), 1, &["fifo"]);
}

#[test]
fn provision_from_a_base_that_is_empty_or_no_multiple_of_512_is_refused() {
    let lab = Lab::new();
    fs::write(lab.base(), b"").unwrap();
    refused(&lab, &mut provision(&lab, &lab.base(), &[]), 1, &["base.img"]);
    fs::write(lab.base(), [0; 1000]).unwrap();
    refused(&lab, &mut provision(&lab, &lab.base(), &[]), 1, &["base.img", "512"]);
}

#[test]
fn provision_to_a_size_smaller_than_the_base_or_odd_is_refused() {
    let lab = with_base();
    refused(&lab, &mut provision(&lab, &lab.base(), &["--size", "1048576"]), 1, &["base.img"]);
    let finished = run(&mut provision(&lab, &lab.base(), &["--size", "4194404"]));
    assert!(matches!(finished.code, Some(1 | 2)), "{finished:#?}");
    assert!(!lab.disk().exists(), "{finished:#?}");
}

/// Invariant 5: disk and base are never the same file, however they are named.
#[test]
fn provision_onto_the_base_itself_is_refused() {
    let lab = with_base();
    let onto = |disk: &Path| {
        let mut command = pristine(["provision"]);
        command.arg("--base").arg(lab.base()).arg("--disk").arg(disk).arg("--runtime-dir").arg(lab.runtime());
        command
    };
    refused(&lab, &mut onto(&lab.base()), 1, &["base.img"]);
    symlink("base.img", lab.path("link")).unwrap();
    refused(&lab, &mut onto(&lab.path("link")), 1, &["link"]);
    fs::hard_link(lab.base(), lab.path("second-name")).unwrap();
    refused(&lab, &mut onto(&lab.path("second-name")), 1, &["second-name"]);
}

#[test]
fn provision_into_a_missing_directory_is_refused() {
    let lab = with_base();
    let mut command = pristine(["provision"]);
    command.arg("--base").arg(lab.base()).arg("--disk").arg(lab.path("nowhere/disk.img"));
    command.arg("--runtime-dir").arg(lab.runtime());
    refused(&lab, &mut command, 1, &["nowhere"]);
}

#[test]
fn provision_of_a_disk_that_is_provisioned_is_refused() {
    let lab = provisioned();
    refused(&lab, &mut provision(&lab, &lab.base(), &[]), 1, &["disk.img"]);
}

/// A file system without room refuses the whole disk, and keeps no half of it. Needs the right to
/// mount a tmpfs in a name space of its own; without it nothing is tested.
#[test]
fn provision_into_a_full_file_system_is_refused() {
    let lab = with_base();
    let full = lab.path("full");
    fs::create_dir(&full).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=2m tmpfs {full} && echo mounted && cd {full} && \
         {program} provision --base {base} --disk {full}/disk.img --runtime-dir {runtime}; \
         code=$?; ls -A {full}; exit $code",
        full = full.display(),
        program = pristine_tests::program::pristine_binary().display(),
        base = lab.base().display(),
        runtime = lab.runtime().display(),
    );
    let finished = run(Command::new("unshare").args(["--map-root-user", "--mount", "sh", "-c", &script]));
    if !finished.stdout.contains("mounted") {
        eprintln!("not tested, no tmpfs can be mounted here: {}", finished.stderr);
        return;
    }
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert_eq!(finished.stdout.trim(), "mounted", "something is left: {finished:#?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:#?}");
}

#[test]
fn commands_on_a_disk_that_was_never_provisioned_are_refused() {
    let lab = with_base();
    for command in ["restore", "verify", "status"] {
        refused(&lab, &mut lab.pristine(command, NONE), 1, &["disk.img"]);
    }
    refused(&lab, &mut serve(&lab), 1, &["disk.img"]);
    images::dense(&lab.disk(), SIZE, 82);
    for command in ["restore", "verify", "status"] {
        refused(&lab, &mut lab.pristine(command, NONE), 1, &["disk.img"]);
    }
    refused(&lab, &mut serve(&lab), 1, &["disk.img"]);
}

/// Invariant 5: the base is identified; a change since provisioning is noticed.
#[test]
fn serve_and_restore_with_a_changed_base_are_refused() {
    let lab = provisioned();
    fs::File::options().append(true).open(lab.base()).unwrap().set_len(SIZE + 4096).unwrap();
    refused(&lab, &mut serve(&lab), 1, &["base.img"]);
    refused(&lab, &mut lab.pristine("restore", NONE), 1, &["base.img"]);
}

/// Invariant 5: another file in the base's place, equal in size and time, is noticed too.
#[test]
fn serve_and_restore_with_a_replaced_base_are_refused() {
    let lab = provisioned();
    run(Command::new("cp").arg("-p").arg(lab.base()).arg(lab.path("copy"))).ok();
    fs::rename(lab.path("copy"), lab.base()).unwrap();
    refused(&lab, &mut serve(&lab), 1, &["base.img"]);
    refused(&lab, &mut lab.pristine("restore", NONE), 1, &["base.img"]);
    fs::remove_file(lab.base()).unwrap();
    refused(&lab, &mut serve(&lab), 1, &["base.img"]);
}

#[test]
fn serve_of_a_disk_whose_size_has_changed_is_refused() {
    let lab = provisioned();
    fs::File::options().append(true).open(lab.disk()).unwrap().set_len(SIZE - 4096).unwrap();
    refused(&lab, &mut serve(&lab), 1, &["disk.img"]);
}

/// Invariant 7: one owner, be the other a `pristine` ...
#[test]
fn disk_in_use_by_another_pristine_is_refused() {
    let lab = provisioned();
    let server = lab.serve(NONE);
    let other = lab.path("other-socket");
    refused(&lab, &mut serve_at(&lab, &other), 1, &["disk.img", "use"]);
    refused(&lab, &mut lab.pristine("restore", NONE), 1, &["disk.img", "use"]);
    refused(&lab, &mut provision(&lab, &lab.base(), &[]), 1, &["disk.img"]);
    server.stop();
}

/// ... or QEMU.
#[test]
fn disk_in_use_by_qemu_is_refused() {
    let lab = provisioned();
    let socket = lab.runtime().join("peer");
    let _daemon = storage_daemon(&[], &Image::raw(&lab.disk()), &socket, 1);
    refused(&lab, &mut serve(&lab), 1, &["disk.img", "use"]);
    refused(&lab, &mut lab.pristine("restore", NONE), 1, &["disk.img", "use"]);
}

/// Invariant 5: a base that QEMU may be writing is no base.
#[test]
fn base_in_use_for_writing_by_qemu_is_refused() {
    let lab = provisioned();
    let socket = lab.runtime().join("peer");
    let _daemon = storage_daemon(&[], &Image::raw(&lab.base()), &socket, 1);
    refused(&lab, &mut serve(&lab), 1, &["base.img", "use"]);
}

/// Invariant 7, the other way round: QEMU's tools refuse a disk that is being served.
#[test]
fn qemu_refuses_a_disk_that_is_being_served() {
    let lab = provisioned();
    let server = lab.serve(NONE);
    let mut tool = Command::new("qemu-img");
    tool.args(["resize", "-f", "raw"]).arg(lab.disk()).arg("8M");
    let finished = run(&mut tool);
    assert!(finished.code != Some(0) && finished.stderr.contains("lock"), "{finished:#?}");
    server.stop();
}

#[test]
fn socket_path_that_is_too_long_is_refused() {
    let lab = provisioned();
    let long = lab.path(&"x".repeat(120));
    refused(&lab, &mut serve_at(&lab, &long), 1, &["107"]);
}

#[test]
fn socket_path_in_a_missing_directory_is_refused() {
    let lab = provisioned();
    refused(&lab, &mut serve_at(&lab, Path::new("/nonexistent/socket")), 1, &["/nonexistent/socket"]);
}

#[test]
fn socket_path_that_is_another_file_is_refused() {
    let lab = provisioned();
    let file = lab.runtime().join("precious");
    fs::write(&file, b"precious").unwrap();
    refused(&lab, &mut serve_at(&lab, &file), 1, &["precious"]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

/// A living server keeps its socket; one that was killed leaves a file that is replaced.
#[test]
fn socket_of_a_living_server_is_refused_and_of_a_dead_one_replaced() {
    let lab = provisioned();
    let server = lab.serve(NONE);
    let other = provisioned();
    refused(&other, &mut serve_at(&other, &lab.socket()), 1, &[&name(&lab.socket())]);
    server.kill();
    assert!(lab.socket().exists());
    lab.serve(NONE).stop();
}

#[test]
fn log_show_of_other_files_is_refused() {
    let lab = provisioned();
    let show = |path: &Path| {
        let mut command = pristine(["log", "show"]);
        command.arg(path);
        command
    };
    refused(&lab, &mut show(&lab.path("missing")), 1, &["missing"]);
    refused(&lab, &mut show(&lab.base()), 1, &["base.img"]);
    refused(&lab, &mut show(&lab.path("")), 1, &[]);
}

/// Wrong usage has its own exit code; clap's message may take several lines.
#[test]
fn wrong_usage_exits_with_2() {
    let lab = provisioned();
    let before = snapshot(&lab);
    let disk = lab.disk();
    let cases: &[&[&OsStr]] = &[
        &["frobnicate".as_ref()],
        &["serve".as_ref()],
        &["serve".as_ref(), "--disk".as_ref(), disk.as_ref()],
        &["serve".as_ref(), "--disk".as_ref(), disk.as_ref(), "--no-such-option".as_ref()],
        &["provision".as_ref(), "--disk".as_ref(), disk.as_ref()],
        &["provision".as_ref(), "--base".as_ref(), disk.as_ref()],
        &["verify".as_ref()],
        &["log".as_ref(), "show".as_ref()],
    ];
    for args in cases {
        wrong(run(&mut pristine(*args)));
    }
    let numbers: [(&str, &[&str]); 2] =
        [("--num-queues", &["0", "17", "many", "-1"]), ("--queue-size", &["0", "3", "2048", "1025", "x"])];
    for (option, values) in numbers {
        for value in values {
            let value = format!("{option}={value}");
            wrong(run(serve(&lab).arg(value)));
        }
    }
    assert_eq!(snapshot(&lab), before);
}

#[track_caller]
fn wrong(finished: Finished) {
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(!finished.stderr.is_empty() && finished.stdout.is_empty(), "{finished:#?}");
}

/// Invariant 6: a manifest of a newer version, or a damaged one, is not guessed at.
#[test]
fn manifest_that_is_newer_or_damaged_is_refused() {
    let lab = provisioned();
    let manifest = lab.state().join("manifest");
    let good = fs::read(&manifest).unwrap();
    for damaged in [&b""[..], b"\0\0\0\0\0\0\0\0", &good[..good.len() / 2]] {
        fs::write(&manifest, damaged).unwrap();
        refused(&lab, &mut serve(&lab), 1, &["manifest"]);
        refused(&lab, &mut lab.pristine("restore", NONE), 1, &["manifest"]);
    }
    fs::write(&manifest, good).unwrap();
    lab.assert_pristine();
}

/// `verify` lists where the disk differs, and says so by its exit code.
#[test]
fn verify_of_a_disk_that_was_written_from_outside_exits_with_1() {
    let lab = provisioned();
    let disk = fs::File::options().write(true).open(lab.disk()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"outside", 3 * 4096 + 17).unwrap();
    drop(disk);
    let finished = lab.run("verify", NONE);
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    let all = finished.stdout + &finished.stderr;
    assert!(all.contains('3') || all.contains("12288"), "{all}");
    // Written from outside: everything is pending, and restored.
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Each command explains itself, with an example.
#[test]
fn help_of_each_command_has_an_example() {
    let words = ["provision", "serve", "restore", "verify", "status", "keep", "log show", "log top"];
    for command in words {
        let args: Vec<OsString> = command.split(' ').chain(["--help"]).map(Into::into).collect();
        let help = run(&mut pristine(args)).ok().stdout;
        assert!(help.contains(&format!("pristine {command}")), "{command}: {help}");
        assert!(help.to_lowercase().contains("example"), "{command}: {help}");
    }
}

/// Who asked for a report and does not get it is told.
#[test]
fn report_that_can_not_be_printed_is_an_error() {
    let lab = provisioned();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for command in ["status", "verify"] {
        run(lab.pristine(command, &["--json"]).stdout(full())).refused(1, &["can't be printed"]);
    }
    run(pristine(["--print-capabilities"]).stdout(full())).refused(1, &["can't be printed"]);
    // Who has seen enough is not in the way.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    run(lab.pristine("status", NONE).stdout(writer)).ok();
}

/// A server whose output nobody reads serves all the same.
#[test]
fn server_whose_output_is_not_read_serves() {
    let lab = provisioned();
    let serve = serve(&lab);
    let mut command = Command::new("setpriv");
    // A pipe has 64 KiB.
    command.args(["--pdeathsig", "KILL", "--", "sh", "-c", "head -c 65536 /dev/zero; exec \"$@\"", "sh"]);
    command.arg(serve.get_program()).args(serve.get_args()).stdout(std::process::Stdio::piped());
    let mut server = command.spawn().unwrap();
    wait_until("socket", || lab.socket().exists());
    for block in 0..3 {
        let mut client = Remote::connected(&lab.socket(), 1);
        client.ask(&format!("write {} 4096 1", block * 8192));
        client.leave();
        lab.wait_pristine();
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    lab.assert_pristine();
}

/// With `--once` the disk is pristine when the server has ended with 0.
#[test]
fn server_that_is_stopped_before_its_one_session_is_restored_exits_with_1() {
    let lab = provisioned();
    let mut server = lab.serve(&["--once", "--rate", "64K"]);
    let mut client = Remote::connected(&lab.socket(), 1);
    for at in 0..4 {
        client.ask(&format!("write {} {} 1", at << 18, 1 << 18));
    }
    client.leave();
    server.0.wait_line("end of the session", PATIENCE, |line| line.contains("ended after"));
    server.0.signal(Signal::TERM);
    assert_eq!(server.0.wait(PATIENCE).code(), Some(1), "{}", server.0.output());
    assert!(server.0.output().contains("left for the next start"));
    lab.run("restore", NONE).ok();
    lab.assert_pristine();
}

/// Who looks for a server in the wrong place is told that there is one.
#[test]
fn status_of_a_disk_that_is_served_with_another_runtime_directory_says_so() {
    let lab = provisioned();
    let server = lab.serve(&[]);
    let pid = server.0.pid();
    let ask = |json: &[&str]| {
        let mut command = pristine(["status"]);
        command.arg("--disk").arg(lab.disk()).arg("--runtime-dir").arg(lab.path("elsewhere")).args(json);
        run(&mut command).ok().stdout
    };
    assert!(ask(&[]).contains(&format!("process {pid} has the disk")), "{}", ask(&[]));
    assert!(ask(&["--json"]).contains(&format!("\"silent_pid\":{pid}")));
    assert!(lab.status()["silent_pid"].is_null());
    server.stop();
    assert!(ask(&["--json"]).contains("\"silent_pid\":null"));
}

/// Two at once would write one manifest over the other, and a link would lead what is written elsewhere; it is somebody's, and stays.
#[test]
fn seal_that_another_process_makes_is_refused_and_no_link_is_followed() {
    let lab = with_base();
    let new = lab.path(&format!("{}.manifest.new", name(&lab.base())));
    let seal = || run(pristine(["base", "seal"]).arg(lab.base()));
    let other = fs::File::create(&new).unwrap();
    other.lock().unwrap();
    seal().refused(1, &["another process is making it"]);
    drop(other);
    fs::remove_file(&new).unwrap();
    let theirs = lab.path("theirs");
    fs::write(&theirs, "theirs").unwrap();
    symlink(&theirs, &new).unwrap();
    seal().refused(1, &["is no regular file", "remove this one first"]);
    assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
    fs::remove_file(&new).unwrap();
    seal().ok();
    assert!(new.symlink_metadata().is_err());
}

/// A terminal that is closed ends a server in order, unless whoever started it wanted it to go on.
#[test]
fn hangup_ends_a_server_that_does_not_ignore_it() {
    let lab = provisioned();
    let started = |how: &str| {
        let serve = serve(&lab);
        let mut command = Command::new("env");
        command.arg(how).arg(serve.get_program()).args(serve.get_args());
        Server::start(&command)
    };
    let mut server = started("--default-signal=HUP");
    server.0.signal(Signal::HUP);
    assert!(server.0.wait(PATIENCE).success());
    let server = started("--ignore-signal=HUP");
    server.0.signal(Signal::HUP);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("write 0 4096 1");
    client.leave();
    lab.wait_pristine();
    server.stop();
}

/// What root does to another user's disk does not lock that user out: all files of its state stay the user's.
#[test]
fn root_that_handles_a_users_disk_leaves_it_to_the_user() {
    const NOBODY: u32 = 65534;
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 119);
    let give = |path: &Path| std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY));
    if [lab.path(""), lab.runtime().to_owned(), lab.base()].iter().any(|path| give(path).is_err()) {
        eprintln!("not tested, only root can give files away");
        return;
    }
    let as_nobody = |command: &Command| {
        let mut demoted = Command::new("setpriv");
        demoted.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]);
        demoted.arg(command.get_program()).args(command.get_args());
        run(&mut demoted)
    };
    as_nobody(lab.pristine("provision", &["--base"]).arg(lab.base())).ok();
    for round in 0..2 {
        // Killed in a session, held, and restored, all by root.
        let server = lab.serve(NONE);
        let mut client = Remote::connected(&lab.socket(), 1);
        client.ask("scatter 50 1");
        server.kill();
        run(&mut lab.session("hold")).ok();
        client.kill();
        lab.serve(NONE).stop();
        let dirs = [lab.state(), lab.state().join("sessions"), lab.runtime().to_owned()];
        let mut files = 0;
        for file in dirs.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()) {
            let file = file.unwrap();
            assert_eq!(file.metadata().unwrap().uid(), NOBODY, "{}", file.path().display());
            files += 1;
        }
        assert!(files > 4, "{files} files, round {round}");
        as_nobody(&lab.session("release")).ok();
        as_nobody(&lab.pristine("restore", NONE)).ok();
        lab.assert_pristine();
    }
}

/// Names that can't be written down are refused where they would have to be, and are no trouble elsewhere.
#[test]
fn names_that_are_no_utf_8_are_refused_as_bases_and_work_as_disks() {
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 20, 120);
    let name = |name: &[u8]| lab.path("").join(OsStr::from_bytes(name));
    let (base, disk) = (name(b"gol\xff.img"), name(b"vm\xff.img"));
    fs::copy(lab.base(), &base).unwrap();
    let of = |words: &[&str], disk: &Path| {
        let mut command = pristine(words);
        command.arg("--disk").arg(disk).arg("--runtime-dir").arg(lab.runtime());
        command
    };
    run(of(&["provision"], &lab.disk()).arg("--base").arg(&base)).refused(1, &["gol", "UTF-8"]);
    assert!(!lab.disk().exists());
    run(pristine(["base", "seal"]).arg(&base)).refused(1, &["gol", "UTF-8"]);
    run(of(&["provision", "--lazy"], &disk).arg("--base").arg(lab.base())).ok();
    let log = fs::read_dir(name(b"vm\xff.img.pristine/sessions")).unwrap().next().unwrap().unwrap().path();
    let shown = run(pristine(["log", "show", "--json"]).arg(log)).ok().stdout;
    let report: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(report["kind"], "pending");
    run(&mut of(&["restore"], &disk)).ok();
    fs::write(name(b"old\xff.img.manifest"), "").unwrap();
    let list = run(pristine(["base", "list", "--dir"]).arg(lab.path(""))).ok();
    assert!(list.stdout.contains("UTF-8") || list.stderr.contains("UTF-8"), "{list:#?}");
}
