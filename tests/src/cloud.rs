//! Cloud Hypervisor, the real program, with a guest on a disk that `pristine` serves. It needs KVM,
//! so both run in a machine of their own ([`outer`](crate::outer)), whose emulated processor has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::PATIENCE;
use crate::guest::Guest;
use crate::initramfs::{guest_dir, write_with};
use crate::lab::Lab;
use crate::outer::{Machine, Plan, make_file_system};
use crate::program::{manager_binary, pristine_binary};

/// Names the program: `PRISTINE_CLOUD_HYPERVISOR=/path/to/cloud-hypervisor`.
pub const VARIABLE: &str = "PRISTINE_CLOUD_HYPERVISOR";

/// A shell that runs one line after the other and says how each ended.
const SHELL: &str = "
    mount -t ext4 /dev/vda /mnt
    mkdir -p /run; mount -t tmpfs run /run
    truncate -s 64k /run/order
    mkfifo /run/manager; exec 8<>/run/manager
    mkdir -p /tmp
    cd /mnt
    say kvm $(ls /dev/kvm)
    while read -r line && [ \"$line\" != end ]; do
        if output=$(eval \"$line\" 2>&1); then say done $output; else say failed $? $output; fi
    done
    cd /; umount /mnt
";

/// The Cloud Hypervisor to test with, if there is one; says so if there is none.
pub fn program() -> Option<PathBuf> {
    let path = std::env::var_os(VARIABLE).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: {VARIABLE} does not name a program");
    }
    path
}

/// A machine with `pristine` and Cloud Hypervisor, and a disk of its own for the images.
#[derive(Debug)]
pub struct Host {
    machine: Guest,
    /// Guests so far; each has its own log of its console.
    guests: u32,
    _lab: Lab,
}

impl Host {
    /// Boots the machine, makes a base image with a file system (`golden`, 4 MiB, is in it) and
    /// provisions a disk. `script` is what every guest runs, with `sh -e`.
    pub fn boot(vmm: &Path, script: &str) -> Self {
        let lab = Lab::new();
        let images = lab.path("images");
        make_file_system("ext4", &images, 512 << 20);
        let initramfs = lab.path("initramfs");
        write_with(&initramfs, &[("job", script)]).unwrap();
        let machine = Machine::new(Plan {
            memory_mib: 1024,
            modules: ["irqbypass", "kvm", "kvm-amd"].map(String::from).to_vec(),
            programs: vec![
                ("bin/pristine".into(), pristine_binary().to_owned()),
                ("bin/cloud-hypervisor".into(), vmm.to_owned()),
                ("bin/service-manager".into(), manager_binary()),
                ("bin/bash".into(), "/bin/bash".into()),
            ],
            files: vec![
                ("guest/vmlinuz".into(), fs::read(guest_dir().join("vmlinuz")).unwrap()),
                ("guest/initramfs".into(), fs::read(&initramfs).unwrap()),
            ],
            script: SHELL.into(),
            ..Plan::default()
        });
        let mut machine = machine.boot(&[&images]);
        assert_eq!(machine.said("kvm"), "/dev/kvm", "{}", machine.output());
        let mut host = Self { machine, guests: 0, _lab: lab };
        host.run("mkdir golden && head -c 4194304 /dev/urandom >golden/golden && truncate -s 96M base");
        host.run("/sbin/mkfs.ext4 -q -d golden base && rm -r golden");
        host.run("pristine provision --base base --disk disk");
        host
    }

    /// Runs one line in the machine's shell; returns what it printed, in one line. What it starts in the
    /// background must print elsewhere.
    #[track_caller]
    pub fn run(&mut self, line: &str) -> String {
        self.try_run(line).unwrap_or_else(|why| panic!("{line}: {why}; {}", self.logs()))
    }

    /// As [`run`](Self::run); `Err` is its exit code and what it printed.
    #[track_caller]
    pub fn try_run(&mut self, line: &str) -> Result<String, String> {
        self.machine.type_line(line);
        let answer = self.machine.next_said(PATIENCE);
        let answer = answer.unwrap_or_else(|why| panic!("{line}: {why}\n{}", self.machine.output()));
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("done", output) => Ok(output.to_owned()),
            (_, output) => Err(output.to_owned()),
        }
    }

    /// Starts a server, and waits until it listens.
    pub fn serve(&mut self) {
        self.run("[ -e /run/served ] && cat /run/served >>/run/served.before; true");
        self.run("pristine serve --disk disk --socket-path /run/s >/run/served 2>&1 & echo $! >/run/server");
        self.wait("the server listens", "grep -q listening /run/served");
    }

    /// Starts a server as a service: by a manager that keeps its connections over a restart.
    pub fn serve_as_service(&mut self) {
        self.run(
            "service-manager pristine serve --disk disk --socket-path /run/s </run/manager \
             >/run/served 2>&1 & echo $! >/run/server",
        );
        self.wait_managed("is ready", 1);
    }

    /// Has the manager end the service, and start it again.
    pub fn upgrade(&mut self) {
        let before = self.served_count("manager:.*is ready");
        self.run("echo upgrade >&8");
        self.wait_managed("is ready", before + 1);
    }

    /// Has the manager end the service, and itself.
    pub fn end_service(&mut self) {
        self.run("echo end >&8");
        self.wait("the manager ends", "! kill -0 $(cat /run/server) 2>/dev/null");
    }

    fn wait_managed(&mut self, what: &str, count: u32) {
        let counted = format!("$(grep -c 'manager:.*{what}' /run/served)");
        self.wait(&format!("the service {what}"), &format!("[ {counted} -ge {count} ]"));
    }

    /// How often the guest's disk had to connect again.
    #[track_caller]
    pub fn reconnections(&mut self) -> u32 {
        self.run(&format!("grep -c 'attempting reconnection' /run/vmm.{}; true", self.guests))
            .parse()
            .unwrap()
    }

    /// Starts Cloud Hypervisor.
    pub fn start_guest(&mut self) {
        self.guests += 1;
        self.run(&format!(
            "cloud-hypervisor -v --kernel /guest/vmlinuz --initramfs /guest/initramfs \
             --cmdline 'console=ttyS0 quiet panic=-1 cryptomgr.notests' --cpus boot=1 --memory size=256M,shared=on \
             --disk vhost_user=on,socket=/run/s,num_queues=1,queue_size=128 path=/run/order,image_type=raw \
             --console off --serial tty </dev/null >/run/console.{n} 2>/run/vmm.{n} & echo $! >/run/vmm",
            n = self.guests
        ));
    }

    /// Writes a word at the beginning of the guest's second disk, which has nothing to do with `pristine`:
    /// it takes no input at its console.
    pub fn order(&mut self, word: &str) {
        self.run(&format!("echo {word} | dd of=/run/order conv=notrunc 2>/dev/null"));
    }

    /// Waits until the guest that was started last has said a line that begins with `word`; returns
    /// what follows the word.
    #[track_caller]
    pub fn said(&mut self, word: &str) -> String {
        let console = format!("/run/console.{}", self.guests);
        let gone = "! kill -0 $(cat /run/vmm) 2>/dev/null";
        self.wait(word, &format!("{{ grep -q '^GUEST {word}' {console} || {gone}; }}"));
        assert_ne!(self.console_count(word), 0, "Cloud Hypervisor is gone; no \"{word}\"; {}", self.logs());
        self.run(&format!("sed -n 's/\\r//; s/^GUEST {word} *//p' {console} | head -n 1"))
    }

    /// Waits until Cloud Hypervisor has exited.
    #[track_caller]
    pub fn wait_exit(&mut self) {
        self.wait("Cloud Hypervisor exits", "! kill -0 $(cat /run/vmm) 2>/dev/null");
    }

    /// `kill -9`; `which` is `server` or `vmm`. Returns when the process is gone.
    #[track_caller]
    pub fn kill(&mut self, which: &str) {
        self.end(which, "-9");
    }

    /// SIGTERM; as [`kill`](Self::kill).
    #[track_caller]
    pub fn terminate(&mut self, which: &str) {
        self.end(which, "-15");
    }

    #[track_caller]
    fn end(&mut self, which: &str, signal: &str) {
        self.run(&format!("kill {signal} $(cat /run/{which})"));
        self.wait("it is gone", &format!("! kill -0 $(cat /run/{which}) 2>/dev/null"));
    }

    /// Waits until `status` names this state.
    #[track_caller]
    pub fn wait_state(&mut self, state: &str) {
        let pattern = format!("grep -q '\"state\": *\"{state}\"'");
        self.wait(state, &format!("pristine status --disk disk --json | {pattern}"));
    }

    /// Stops the server, which must end well and leave a disk that equals the base.
    #[track_caller]
    pub fn assert_pristine(&mut self) {
        self.wait_state("pristine");
        self.terminate("server");
        self.assert_restored();
    }

    /// Panics unless the last server has ended well and the disk equals the base.
    #[track_caller]
    pub fn assert_restored(&mut self) {
        self.run("grep -q 'stopped; the disk is pristine' /run/served");
        self.run("pristine verify --disk disk");
        self.run("cmp base disk");
    }

    /// What the last server has printed: how many lines contain `words`.
    #[track_caller]
    pub fn served_count(&mut self, words: &str) -> u32 {
        self.run(&format!("grep -c '{words}' /run/served; true")).parse().unwrap()
    }

    /// How many things that the guest that was started last has said begin with `word`.
    #[track_caller]
    pub fn console_count(&mut self, word: &str) -> u32 {
        self.run(&format!("grep -c '^GUEST {word}' /run/console.{}; true", self.guests)).parse().unwrap()
    }

    /// Waits until [`console_count`](Self::console_count) is at least `count`.
    #[track_caller]
    pub fn wait_console_count(&mut self, word: &str, count: u32) {
        let counted = format!("$(grep -c '^GUEST {word}' /run/console.{})", self.guests);
        self.wait(&format!("{count} times {word}"), &format!("[ {counted} -ge {count} ]"));
    }

    /// Has the machine print what the programs have printed, for the message of a failure: a failing
    /// test prints everything that the machine did.
    pub fn logs(&mut self) -> &'static str {
        let line = "for f in /run/served.before /run/served /run/vmm.* /run/console.*; do \
                    echo \"--- $f\" >/dev/console; tail -n 60 $f >/dev/console; done";
        let _ = self.try_run(line);
        "see the machine's output"
    }

    /// Switches the machine off.
    pub fn finish(mut self) {
        self.machine.type_line("end");
        self.machine.finish();
    }

    /// Seconds since the machine booted.
    pub fn uptime(&mut self) -> f64 {
        self.run("cut -d ' ' -f 1 /proc/uptime").parse().unwrap()
    }

    /// Polls `condition`, a shell command, in the machine.
    #[track_caller]
    pub fn wait(&mut self, what: &str, condition: &str) {
        let line = format!("for i in $(seq 500); do {condition} && exit 0; usleep 20000; done; exit 9");
        let begin = Instant::now();
        while self.try_run(&line).is_err() {
            assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}; {}", self.logs());
        }
    }
}
