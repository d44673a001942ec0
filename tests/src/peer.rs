//! `qemu-storage-daemon`: the peer that the harness is checked with and the speed compared with.

use std::path::Path;
use std::process::Command;

use crate::process::Process;
use crate::wait_until;

/// An image, and how QEMU shall open it.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// If it is a qcow2 overlay: of which raw image.
    pub overlay_of: Option<&'a Path>,
    /// QEMU's `aio`: `threads`, `native`, `io_uring`.
    pub aio: &'a str,
    /// Whether it goes past the host's page cache.
    pub direct: bool,
}

impl<'a> Image<'a> {
    /// A raw image that is opened as QEMU does by default.
    pub fn raw(path: &'a Path) -> Self {
        Self { path, overlay_of: None, aio: "threads", direct: false }
    }

    /// QEMU's `--blockdev` options for it, as the node `f`.
    fn blockdev(&self) -> Vec<String> {
        let direct = if self.direct { "on" } else { "off" };
        let file = |node, path: &Path, more| {
            let path = path.display();
            let aio = self.aio;
            format!("driver=file,node-name={node},aio={aio},cache.direct={direct},{more},filename={path}")
        };
        match self.overlay_of {
            None => vec![file("f", self.path, "discard=unmap")],
            Some(base) => vec![
                file("b", base, "read-only=on"),
                file("p", self.path, "discard=unmap"),
                format!("driver=qcow2,node-name=f,file=p,backing=b,cache.direct={direct}"),
            ],
        }
    }
}

/// Serves `image` at `socket` with `queues` virtqueues.
///
/// `launcher` comes before the program's name, such as `taskset -c 1`.
pub fn storage_daemon(launcher: &[&str], image: &Image<'_>, socket: &Path, queues: u32) -> Process {
    let words: Vec<&str> = launcher.iter().copied().chain(["qemu-storage-daemon"]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    for blockdev in image.blockdev() {
        command.args(["--blockdev", &blockdev]);
    }
    command.args([
        "--export",
        &format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
            socket.display()
        ),
    ]);
    let mut process = Process::spawn("qemu-storage-daemon", &command);
    wait_until("qemu-storage-daemon listens", || {
        assert!(!process.ended(), "qemu-storage-daemon has ended: {}", process.output());
        socket.exists()
    });
    process
}
