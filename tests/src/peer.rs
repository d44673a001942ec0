//! `qemu-storage-daemon`: the peer that the harness is checked with and the speed compared with.

use std::path::Path;
use std::process::Command;

use crate::process::Process;
use crate::wait_until;

/// Serves `image` at `socket` with `queues` virtqueues and QEMU's `aio` (threads, io_uring).
///
/// `launcher` comes before the program's name, such as `taskset -c 1`.
pub fn storage_daemon(launcher: &[&str], image: &Path, socket: &Path, queues: u32, aio: &str) -> Process {
    let words: Vec<&str> = launcher.iter().copied().chain(["qemu-storage-daemon"]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.args([
        "--blockdev",
        &format!("driver=file,node-name=f,discard=unmap,aio={aio},filename={}", image.display()),
        "--export",
        &format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
            socket.display()
        ),
    ]);
    let process = Process::spawn("qemu-storage-daemon", &command);
    wait_until("qemu-storage-daemon listens", || socket.exists());
    process
}
