//! A machine of one's own in which the programs under test run: an emulated one (TCG) with its own
//! kernel and its own disks, which are raw files of the host.
//!
//! `kill -9` of it is a power cut for that kernel: what it had in its page cache is gone, and what it
//! had handed to its disks is in the host's files, for the next boot to find. Nothing that a disk
//! has taken is lost or reordered; a flush of the disk does nothing more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::guest::{Guest, accelerator};
use crate::initramfs::{Archive, guest_dir};
use crate::program::{run, scratch_dir, scratch_root};

/// What a machine has and does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Kernel modules to load besides the virtio drivers, with those that they need, such as `xfs` and
    /// `libcrc32c`, in any order. `ci/setup` says which there are.
    pub modules: Vec<String>,
    /// Programs of the host and their names in the machine; shared libraries come along.
    pub programs: Vec<(String, PathBuf)>,
    /// More files: names and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// What it runs once its disks are there, with `sh -e`; it powers off afterwards. `say WORDS` prints a
    /// line for [`Guest::said`]; `read` reads what [`Guest::type_line`] sends.
    pub script: String,
    /// More arguments for QEMU.
    pub qemu_args: Vec<String>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            cpus: 2,
            modules: Vec::new(),
            programs: Vec::new(),
            files: Vec::new(),
            script: String::new(),
            qemu_args: Vec::new(),
        }
    }
}

/// A machine that can be booted, many times.
#[derive(Debug)]
pub struct Machine {
    plan: Plan,
    dir: TempDir,
}

impl Machine {
    /// Builds its initramfs.
    pub fn new(plan: Plan) -> Self {
        let dir = scratch_dir(&scratch_root());
        let mut archive = Archive::prepared().unwrap();
        for module in &plan.modules {
            let path = guest_dir().join(format!("modules/{module}.ko"));
            let bytes = fs::read(&path).unwrap_or_else(|error| {
                panic!("{}: {error}; does ci/setup keep this module?", path.display())
            });
            archive.add(&format!("modules/{module}.ko"), &bytes);
        }
        for (name, path) in &plan.programs {
            add_program(&mut archive, name, path, dir.path());
        }
        for (name, contents) in &plan.files {
            archive.add(name, contents);
        }
        archive.add("job", plan.script.as_bytes());
        archive.write(&dir.path().join("initramfs")).unwrap();
        Self { plan, dir }
    }

    /// Switches it on. `disks`, at least one, are raw files, there as `/dev/vda`, `/dev/vdb`...
    pub fn boot(&self, disks: &[&Path]) -> Guest {
        self.boot_logged(disks, None)
    }

    /// The same; all that the first disk is asked to do is noted in `log` (see [`medium`](crate::medium)).
    pub fn boot_logged(&self, disks: &[&Path], log: Option<&Path>) -> Guest {
        assert!(!disks.is_empty(), "the guest's init waits for /dev/vda");
        let mut qemu = Command::new("qemu-system-x86_64");
        // String instructions are emulated step by step: without these two features Linux uses the kind
        // that moves 8 bytes a step.
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-machine", "pc", "-accel", &accelerator(), "-cpu", "max,-erms,-fsrm"])
            .args(["-m", &self.plan.memory_mib.to_string(), "-smp", &self.plan.cpus.to_string()])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests unknown_nmi_panic",
            ])
            .arg("-kernel")
            .arg(guest_dir().join("vmlinuz"))
            .arg("-initrd")
            .arg(self.dir.path().join("initramfs"));
        for (index, disk) in disks.iter().enumerate() {
            // The host does not go down, so its page cache is as good as a medium: no need to sync it.
            let file = |id: &str, path: &Path| {
                format!("driver=file,node-name={id}{index},filename={},cache.no-flush=on", path.display())
            };
            qemu.args(["-blockdev", &file("d", disk)]);
            let device = match log.filter(|_| index == 0) {
                None => format!("virtio-blk-pci,drive=d{index}"),
                Some(log) => {
                    qemu.args(["-blockdev", &file("l", log)])
                        .args(["-blockdev", "driver=blklogwrites,node-name=w0,file=d0,log=l0"]);
                    // Requests without data are logged in two steps, between which others may come.
                    "virtio-blk-pci,drive=w0,discard=off,write-zeroes=off".to_owned()
                }
            };
            qemu.args(["-device", &device]);
        }
        qemu.args(&self.plan.qemu_args);
        Guest::start("machine", qemu)
    }
}

/// Makes an empty file system, `ext4` or `xfs`, in a new file for a machine's disk.
pub fn make_file_system(kind: &str, file: &Path, size: u64) {
    fs::File::create_new(file).and_then(|new| new.set_len(size)).unwrap();
    run(Command::new(format!("/sbin/mkfs.{kind}")).arg("-q").arg(file)).ok();
}

/// Adds a program, without what only a debugger reads, and the shared libraries it names.
pub(crate) fn add_program(archive: &mut Archive, name: &str, path: &Path, scratch: &Path) {
    let small = scratch.join("stripped");
    run(Command::new("strip").arg("-o").arg(&small).arg(path)).ok();
    archive.add(name, &fs::read(&small).unwrap());
    fs::remove_file(&small).unwrap();
    // Fails for a program that has no libraries.
    let libraries = run(Command::new("ldd").arg(path)).stdout;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.add(library, &fs::read(library).unwrap());
    }
}
