//! A real Linux guest in QEMU, with one vhost-user disk, that runs a shell script and powers off.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::PATIENCE;
use crate::initramfs::{self, Archive};
use crate::outer::add_program;
use crate::process::{Process, threads_of_children};
use crate::program::{scratch_dir, scratch_root};

/// A booted guest. What its script prints on lines that begin with `GUEST ` can be waited for.
#[derive(Debug)]
pub struct Guest {
    qemu: Process,
    _dir: Option<TempDir>,
    /// Its monitor's socket is in there.
    monitor: TempDir,
    queues: u32,
}

/// The first process of a guest that boots from its disk.
const SWITCH_ROOT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /bin
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
for pass in 1 2 3 4 5 6; do
    for module in /modules/*.ko; do
        [ -e $module ] && insmod $module 2>/dev/null && rm $module
    done
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 200 ]; do
    tries=$((tries + 1))
    usleep 50000
done
mount -t ext4 -o ro /dev/vda /mnt
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
";

/// What runs the processors of an emulated machine: TCG, with one thread for all of them. With more, QEMU before 8.1 may
/// translate code that another processor is just patching, as Linux does while it boots, and rarely a guest hangs there, before
/// its first word. `PRISTINE_TEST_ACCEL=tcg` has a thread for each, as `ci/hunt` wants them; `kvm` is another one.
pub(crate) fn accelerator() -> String {
    std::env::var("PRISTINE_TEST_ACCEL").unwrap_or_else(|_| "tcg,thread=single".into())
}

/// How a guest is to be built.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Virtqueues of the disk.
    pub queues: u32,
    /// Whether a reboot boots it again; otherwise QEMU exits.
    pub reboots: bool,
    /// Whether QEMU connects again, after a second, when the server goes away.
    pub reconnects: bool,
    /// Whether QEMU stays when the guest powers off, as with `-no-shutdown`.
    pub stays: bool,
    /// Whether the upper half of its memory lies above 4 GiB, as that of large guests does: two regions of one file.
    pub split: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 2, reboots: false, reconnects: false, stays: false, split: false }
    }
}

impl Guest {
    /// Boots a guest whose `/dev/vda` is served at `socket`. It runs `script` with `sh -e` and then
    /// powers off; `say WORDS` in the script prints a line for [`said`](Self::said).
    pub fn boot(socket: &Path, options: Options, script: &str) -> Self {
        Self::boot_with(socket, options, script, &[])
    }

    /// The same, with programs of the host (name in the guest, path).
    pub fn boot_with(socket: &Path, options: Options, script: &str, programs: &[(&str, &Path)]) -> Self {
        let dir = scratch_dir(&scratch_root());
        let mut archive = Archive::prepared().unwrap();
        archive.add("job", script.as_bytes());
        for (name, path) in programs {
            add_program(&mut archive, name, path, dir.path());
        }
        Self::boot_archive(socket, options, archive, dir)
    }

    /// Boots a guest whose root file system is the ext4 one on `/dev/vda`, as a distribution's initramfs does. Its
    /// own `/sbin/init` decides what it does.
    pub fn boot_from_disk(socket: &Path, options: Options) -> Self {
        let mut archive = Archive::prepared().unwrap();
        archive.add("init", SWITCH_ROOT.as_bytes());
        Self::boot_archive(socket, options, archive, scratch_dir(&scratch_root()))
    }

    fn boot_archive(socket: &Path, options: Options, archive: Archive, dir: TempDir) -> Self {
        let initrd = dir.path().join("initramfs");
        archive.write(&initrd).unwrap();
        let reconnect = if options.reconnects { ",reconnect=1" } else { "" };
        let machine = if options.split { "pc,max-ram-below-4g=128M" } else { "pc" };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-m", "256"])
            // Linux uses no more queues than it has processors.
            .args(["-smp", &options.queues.max(2).to_string()])
            .args(["-machine", machine, "-accel", &accelerator(), "-cpu", "max"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-numa", "node,memdev=mem"])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests unknown_nmi_panic",
            ])
            .arg("-kernel")
            .arg(initramfs::guest_dir().join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd)
            .args(["-chardev", &format!("socket,id=c0,path={}{reconnect}", socket.display())])
            .args(["-device", &format!("vhost-user-blk-pci,chardev=c0,num-queues={}", options.queues)]);
        if !options.reboots {
            qemu.arg("-no-reboot");
        }
        if options.stays {
            qemu.arg("-no-shutdown");
        }
        let mut guest = Self::start("guest", qemu);
        (guest._dir, guest.queues) = (Some(dir), options.queues);
        guest
    }

    /// Starts QEMU, with a monitor that can be asked. `name` is for messages.
    pub(crate) fn start(name: &str, mut qemu: Command) -> Self {
        let monitor = tempfile::Builder::new().prefix("pm").tempdir().unwrap();
        qemu.arg("-monitor").arg(format!("unix:{}/m,server=on,wait=off", monitor.path().display()));
        Self { qemu: Process::spawn(name, &qemu), _dir: None, monitor, queues: 0 }
    }

    /// The next thing that the guest says, whatever it is, if it says something within `limit`; `Err`
    /// says why there is none.
    pub fn next_said(&mut self, limit: Duration) -> Result<String, String> {
        let line = self.qemu.try_wait_line(limit, |line| line.starts_with("GUEST "))?;
        Ok(line["GUEST ".len()..].trim().to_owned())
    }

    /// Waits until a `guest-storm` has done more operations than `than`; returns how many, and the
    /// slowest one in milliseconds since it was asked last.
    pub fn storms(&mut self, than: u64) -> (u64, u64) {
        let (begin, mut worst) = (Instant::now(), 0);
        loop {
            let line = self.next_said(PATIENCE).unwrap_or_else(|why| panic!("{why}\n{}", self.output()));
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["storm", operations, ms] => {
                    worst = worst.max(ms.parse().unwrap());
                    let operations = operations.parse().unwrap();
                    if operations > than {
                        return (operations, worst);
                    }
                }
                _ => panic!("the guest says: {line}"),
            }
            assert!(begin.elapsed() < PATIENCE, "the guest's I/O does not go on\n{}", self.output());
        }
    }

    /// Everything printed so far.
    pub fn output(&self) -> String {
        self.qemu.output()
    }

    /// Waits for a line `GUEST WORD ...` and returns what follows the word.
    pub fn said(&mut self, word: &str) -> String {
        let wanted = format!("GUEST {word}");
        let is_it = |line: &str| {
            line == wanted || line.strip_prefix(&wanted).is_some_and(|rest| rest.starts_with(' '))
        };
        let line = self.qemu.wait_line(&format!("\"{wanted}\""), PATIENCE, is_it);
        line[wanted.len()..].trim().to_owned()
    }

    /// Gives QEMU's monitor a command, such as `stop`, and returns what it answers.
    pub fn monitor(&self, command: &str) -> String {
        self.try_monitor(command, PATIENCE).unwrap()
    }

    fn try_monitor(&self, command: &str, limit: Duration) -> std::io::Result<String> {
        let mut monitor = UnixStream::connect(self.monitor.path().join("m"))?;
        monitor.set_read_timeout(Some(limit))?;
        // A prompt before, and one after.
        read_to_prompt(&mut monitor)?;
        writeln!(monitor, "{command}")?;
        read_to_prompt(&mut monitor)
    }

    /// Says what the guest and its disk are doing, for whoever wants to know why nothing is said: processors, the device,
    /// its rings, and where the kernel is. Each answer as it comes: the next question may not be answered.
    fn diagnose(&self) -> std::io::Result<()> {
        let ask = |command: &str| {
            eprintln!("> {command}");
            let answer = self.try_monitor(command, Duration::from_secs(5))?;
            // The monitor repeats what is typed, with all that its line editor does.
            let answer =
                answer.split_once('\n').map_or("", |(_, rest)| rest).trim_end_matches("(qemu) ").to_owned();
            // Neither the registers of the floating point unit and of segments, nor lists of features.
            let tells =
                |line: &&str| !line.is_empty() && (!line.contains('=') || line.starts_with(['R', 'C']));
            let before = |line: &&str| line.trim() != "Guest features:";
            answer.lines().take_while(before).filter(tells).for_each(|line| eprintln!("{line}"));
            std::io::Result::Ok(answer)
        };
        ask("info status")?;
        ask("info registers -a")?;
        let devices = ask("info virtio")?;
        for path in devices.lines().filter_map(|line| line.split_whitespace().next()) {
            ask(&format!("info virtio-status {path}"))?;
            for queue in 0..self.queues {
                // Not `virtio-queue-status`, which stops the ring to ask for its base.
                let state = ask(&format!("info virtio-vhost-queue-status {path} {queue}"))?;
                let number = |name: &str| {
                    let value = state.lines().find_map(|line| line.trim().strip_prefix(name))?.trim();
                    let hex = value.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
                    hex.unwrap_or_else(|| value.parse()).ok()
                };
                let place = (number("num:"), number("avail_phys:"), number("used_phys:"));
                let (Some(entries), Some(avail), Some(used)) = place else { continue };
                // Flags, idx and the event index of each (virtio 1.3, 2.7.6 and 2.7.8).
                for at in [avail, avail + 4 + 2 * entries, used, used + 4 + 8 * entries] {
                    ask(&format!("xp /2hx {at:#x}"))?;
                }
            }
        }
        // The kernel then says on its console where it is, and panics (unknown_nmi_panic).
        ask("nmi")?;
        self.qemu.wait_end_of_output(Duration::from_secs(10));
        Ok(())
    }

    /// Types a line at the guest's console.
    pub fn type_line(&mut self, line: &str) {
        self.qemu.send(line);
    }

    /// Waits until the script has ended well and QEMU has exited.
    pub fn finish(mut self) {
        assert_eq!(self.said("job-ended"), "0", "the guest's script failed");
        self.wait_exit();
    }

    /// Waits until QEMU has exited, which must be without an error.
    pub fn wait_exit(&mut self) {
        let status = self.qemu.wait(Duration::from_secs(60));
        assert!(status.success(), "QEMU: {status}\n{}", self.qemu.output());
    }

    /// Gives a step to a script that answers each with `say "done $?"`; returns what it said meanwhile. Panics
    /// if the step fails.
    #[track_caller]
    pub fn step(&mut self, step: &str) -> Vec<String> {
        self.type_line(step);
        let mut said = Vec::new();
        loop {
            match self.next_said(PATIENCE) {
                Ok(words) if words == "done 0" => return said,
                Ok(words) if words.starts_with("done ") => panic!("{step}: {words}\n{}", self.output()),
                Ok(words) => said.push(words),
                Err(why) => panic!("{step}: {why}\n{}", self.output()),
            }
        }
    }

    /// Stops QEMU between two of its system calls: no write of its files is done by halves.
    pub fn freeze(&self) {
        self.qemu.freeze();
    }

    /// `kill -9` of QEMU; returns what the guest has said that nobody has waited for.
    pub fn cut(mut self) -> Vec<String> {
        self.qemu.kill();
        std::iter::from_fn(|| self.next_said(PATIENCE).ok()).collect()
    }

    /// `kill -9` of QEMU.
    pub fn kill(mut self) {
        self.qemu.kill();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.qemu.ended() {
            eprintln!("--- guest, server and others:\n{}---", threads_of_children());
            eprintln!("--- guest, asked what it is doing:");
            if let Err(error) = self.diagnose() {
                eprintln!("its monitor does not answer: {error}");
            }
            eprintln!("---");
        }
    }
}

fn read_to_prompt(monitor: &mut UnixStream) -> std::io::Result<String> {
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while !answer.ends_with(b"(qemu) ") && monitor.read(&mut byte)? == 1 {
        answer.extend(byte);
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
