//! Small file systems for one test, in a mount name space of their own: nothing is left of them when
//! the test is over, however it ends. And loop devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::PATIENCE;
use crate::process::Process;
use crate::program::run;

/// A mount name space, kept by a process that does nothing.
#[derive(Debug)]
pub struct Mounts {
    holder: Process,
}

impl Mounts {
    /// `None`, with a message, where nothing may be mounted: then the test proves nothing.
    pub fn new() -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", "echo ready; exec cat"]);
        let mut holder = Process::spawn("a mount name space", &command);
        match holder.try_wait_line(PATIENCE, |line| line == "ready") {
            Ok(_) => Some(Self { holder }),
            Err(why) => {
                eprintln!("not tested, nothing can be mounted here: {why}: {}", holder.output());
                None
            }
        }
    }

    /// Mounts a tmpfs of `size` bytes on the directory `at`, which is made.
    pub fn tmpfs(&self, at: &Path, size: u64) {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        run(&mut self.inside(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at)))
            .ok();
    }

    /// Makes an ext4 of `size` bytes in the file `image` and mounts it on the directory `at`, which is
    /// made. Whether that could be done: it takes a loop device.
    pub fn ext4(&self, at: &Path, image: &Path, size: u64) -> bool {
        std::fs::create_dir_all(at).unwrap();
        // It may lie in what is mounted there.
        crate::images::ext4(&self.outside(image), size, &[]);
        let mut mount = Command::new("mount");
        let finished = run(&mut self.inside(mount.args(["-o", "loop"]).arg(image).arg(at)));
        if finished.code != Some(0) {
            eprintln!("not tested, no ext4 can be mounted here: {}", finished.stderr);
        }
        finished.code == Some(0)
    }

    /// Has the kernel find an error in the ext4 that is mounted at `at`, which then does what its option `errors` says.
    pub fn fail_ext4(&self, at: &Path) {
        let device = rustix::fs::stat(self.outside(at)).unwrap().st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let name = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).unwrap();
        let trigger = Path::new("/sys/fs/ext4").join(name.file_name().unwrap()).join("trigger_fs_error");
        std::fs::write(trigger, "a test").unwrap();
    }

    /// Makes an xfs whose files can share blocks, of `size` bytes (300 MiB at least) in the file `image`, and mounts it as
    /// [`ext4`](Self::ext4) does.
    pub fn xfs(&self, at: &Path, image: &Path, size: u64) -> bool {
        std::fs::create_dir_all(at).unwrap();
        std::fs::File::create_new(image).and_then(|file| file.set_len(size)).unwrap();
        run(Command::new("/sbin/mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(image)).ok();
        let mut mount = Command::new("mount");
        let finished = run(&mut self.inside(mount.args(["-t", "xfs", "-o", "loop"]).arg(image).arg(at)));
        if finished.code != Some(0) {
            eprintln!("not tested, no xfs can be mounted here: {}", finished.stderr);
        }
        finished.code == Some(0)
    }

    /// `command`, run where the file systems are mounted.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.pid())).arg("--");
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }

    /// The path under which this process finds what is mounted at `path`.
    pub fn outside(&self, path: &Path) -> PathBuf {
        let mut there = PathBuf::from(format!("/proc/{}/root", self.holder.pid()));
        there.push(path.strip_prefix("/").unwrap());
        there
    }

    /// Bytes that are free on the file system at `path`.
    pub fn free(&self, path: &Path) -> u64 {
        let stat = rustix::fs::statvfs(self.outside(path)).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Takes room on the file system at `dir` until only `leave` bytes are free, or a little less.
    pub fn fill(&self, dir: &Path, leave: u64) {
        let filler = std::fs::File::options().append(true).create(true).open(self.filler(dir)).unwrap();
        for piece in [1 << 20, 64 << 10, 4096] {
            let data = vec![0xf1; piece];
            while self.free(dir) >= leave + piece as u64 {
                std::io::Write::write_all(&mut &filler, &data).unwrap();
            }
        }
        filler.sync_all().unwrap();
    }

    /// Gives back what [`fill`](Self::fill) took.
    pub fn make_room(&self, dir: &Path) {
        std::fs::remove_file(self.filler(dir)).unwrap();
    }

    fn filler(&self, dir: &Path) -> PathBuf {
        self.outside(dir).join("filler")
    }
}

/// A loop device, detached with its owner.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// `None`, with a message, where loop devices can't be had.
    pub fn of(file: &Path) -> Option<Self> {
        let finished = run(Command::new("losetup").args(["--find", "--show"]).arg(file));
        if finished.code != Some(0) {
            eprintln!("not tested, there is no loop device to be had: {}", finished.stderr);
            return None;
        }
        Some(Self(finished.stdout.trim().into()))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the kernel forget what it has read.
    pub fn forget(&self) {
        run(Command::new("blockdev").arg("--flushbufs").arg(&self.0)).ok();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}
