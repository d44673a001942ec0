//! QEMU and this crate respect each other's image locks. Needs QEMU's tools; where one is
//! missing its tests say so and pass.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use blockio::{File, ImageAccess};
use common::*;

/// Held by every test here: a child of another test would hold our descriptors, and with them
/// our locks and claims, between its fork and its exec.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tool(name: &str) -> Option<Command> {
    let found = Command::new(name).arg("--version").output().is_ok();
    if !found {
        println!("skipped: no {name} here");
    }
    found.then(|| Command::new(name))
}

fn assert_refused_by_lock(output: &Output) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(message.contains("lock"), "{message}");
}

/// A `qemu-storage-daemon` that has the image open; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(path: &Path, writable: bool) -> Option<Daemon> {
        let mut command = tool("qemu-storage-daemon")?;
        let read_only = if writable { "off" } else { "on" };
        let node = format!("driver=file,node-name=f,filename={},read-only={read_only}", path.display());
        command.args(["--chardev", "stdio,id=c", "--monitor", "c", "--blockdev", &node]);
        command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}.nbd", path.display())]);
        let export = format!("type=nbd,id=e,node-name=f,writable={}", if writable { "on" } else { "off" });
        command.args(["--export", &export]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // An answer on the monitor: by then everything on the command line was done.
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("return")), "no monitor");
        child.stdin = Some(input);
        Some(Daemon(child))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn image(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("disk.raw");
    create(&path, 1 << 20);
    path
}

fn locked(path: &Path, access: ImageAccess) -> File {
    let file = open(path, access == ImageAccess::ReadWrite, false);
    file.lock_image(access).unwrap();
    file
}

fn read_all(path: &Path) -> Option<Output> {
    let mut command = tool("qemu-img")?;
    command.args(["convert", "-f", "raw", "-O", "raw"]).arg(path).arg(path.with_extension("copy"));
    Some(command.output().unwrap())
}

fn write_pattern(path: &Path) -> Option<Output> {
    let mut command = tool("qemu-io")?;
    Some(command.args(["-f", "raw", "-c", "write 0 4096"]).arg(path).output().unwrap())
}

/// QEMU refuses a disk that is being served (invariant 7).
#[test]
fn image_locked_for_writing_is_refused_by_qemu_until_closed() {
    let _alone = alone();
    let dir = disk_dir();
    let path = image(dir.path());
    let file = locked(&path, ImageAccess::ReadWrite);
    for output in [read_all(&path), write_pattern(&path)].into_iter().flatten() {
        assert_refused_by_lock(&output);
    }
    drop(file);
    for output in [read_all(&path), write_pattern(&path)].into_iter().flatten() {
        assert!(output.status.success());
    }
}

/// QEMU may read a base that is in use, but not write to it (invariant 5).
#[test]
fn image_locked_for_reading_is_readable_but_not_writable_for_qemu() {
    let _alone = alone();
    let dir = disk_dir();
    let path = image(dir.path());
    let _first = locked(&path, ImageAccess::ReadOnly);
    let _second = locked(&path, ImageAccess::ReadOnly);
    if let Some(output) = read_all(&path) {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    if let Some(output) = write_pattern(&path) {
        assert_refused_by_lock(&output);
    }
}

/// A disk that QEMU has open is not served (invariant 7).
#[test]
fn image_that_qemu_writes_to_is_in_use() {
    let _alone = alone();
    let dir = disk_dir();
    let path = image(dir.path());
    let Some(daemon) = Daemon::start(&path, true) else { return };
    let file = open(&path, true, false);
    for access in [ImageAccess::ReadWrite, ImageAccess::ReadOnly] {
        let error = file.lock_image(access).unwrap_err();
        assert!(error.is_in_use(), "{error}: {}", error.io_error());
        assert!(error.io_error().to_string().contains("QEMU"));
    }
    drop(daemon);
    file.lock_image(ImageAccess::ReadWrite).unwrap();
}

#[test]
fn image_that_qemu_reads_may_be_read_but_not_written() {
    let _alone = alone();
    let dir = disk_dir();
    let path = image(dir.path());
    let Some(_daemon) = Daemon::start(&path, false) else { return };
    let file = open(&path, true, false);
    assert!(file.lock_image(ImageAccess::ReadWrite).unwrap_err().is_in_use());
    file.lock_image(ImageAccess::ReadOnly).unwrap();
}

/// Failing to lock leaves nothing locked.
#[test]
fn image_lock_that_was_refused_leaves_no_lock_behind() {
    let _alone = alone();
    let dir = disk_dir();
    let path = image(dir.path());
    let (writer, reader) = (open(&path, true, false), locked(&path, ImageAccess::ReadOnly));
    assert!(writer.lock_image(ImageAccess::ReadWrite).unwrap_err().is_in_use());
    let third = locked(&path, ImageAccess::ReadOnly);
    drop((reader, third));
    writer.lock_image(ImageAccess::ReadWrite).unwrap();
    writer.lock_image(ImageAccess::ReadWrite).unwrap();
    assert!(open(&path, false, false).lock_image(ImageAccess::ReadOnly).unwrap_err().is_in_use());
    writer.lock_image(ImageAccess::ReadOnly).unwrap();
    locked(&path, ImageAccess::ReadOnly);
}
