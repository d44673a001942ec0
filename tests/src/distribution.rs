//! A small distribution for guests that boot from their disk.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::program::{run, scratch_dir, scratch_root};
use crate::random;

/// What a guest says as `sum` that has found the files of `tree` unspoilt.
pub fn sum(tree: &Path) -> String {
    let sums = "cat \"$1\"/usr/share/data/* \"$1\"/etc/rc | sha256sum | cut -d ' ' -f 1";
    run(Command::new("sh").args(["-c", sums, "sh"]).arg(tree)).ok().stdout.trim().to_owned()
}

/// A small distribution: busybox with its own init, some directories of files, and a start script that looks at them,
/// spoils the disk and powers off. Returns a directory that goes with its owner.
pub fn root_tree() -> tempfile::TempDir {
    let tree = scratch_dir(&scratch_root());
    let path = |name: &str| tree.path().join(name);
    for dir in ["bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "var", "usr/share/data"] {
        fs::create_dir_all(path(dir)).unwrap();
    }
    let busybox = run(Command::new("sh").args(["-c", "command -v busybox"])).ok().stdout;
    fs::copy(busybox.trim(), path("bin/busybox")).unwrap();
    for applet in run(Command::new(busybox.trim()).arg("--list")).ok().stdout.lines() {
        if applet != "busybox" {
            symlink("/bin/busybox", path("bin").join(applet)).unwrap();
        }
    }
    symlink("/bin/busybox", path("sbin/init")).unwrap();
    fs::write(path("etc/inittab"), "::sysinit:/etc/rc\n::shutdown:/bin/umount -a -r\n").unwrap();
    fs::write(path("etc/rc"), START).unwrap();
    fs::set_permissions(path("etc/rc"), fs::Permissions::from_mode(0o755)).unwrap();
    for (n, words) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut bytes = vec![0; 8 << 20];
        random::fill(n, 0, &mut bytes);
        if words {
            // Text compresses.
            bytes.iter_mut().for_each(|byte| *byte = b"etaoin \n"[usize::from(*byte) % 8]);
        }
        fs::write(path(&format!("usr/share/data/{n}")), bytes).unwrap();
    }
    tree
}

const START: &str = "#!/bin/sh
export PATH=/bin
say() { echo \"GUEST $*\" >/dev/console; }
mount -t proc proc /proc
mount -o remount,rw /
say root $(grep ' / ' /proc/mounts | grep -v rootfs | cut -d ' ' -f 1-3)
say sum $(cat /usr/share/data/* /etc/rc | sha256sum)
[ -e /var/visited ] && say visited before || say fresh
touch /var/visited
rm /usr/share/data/2
dd if=/dev/urandom of=/usr/share/data/3 bs=64k count=100 2>/dev/null
dd if=/dev/urandom of=/var/new bs=1M count=12 2>/dev/null
sync
say job-ended 0
poweroff
";
