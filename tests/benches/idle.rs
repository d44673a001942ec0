//! What disks cost that are served and not used: processor time, wake-ups and memory.
//!
//! ```text
//! cargo bench -p pristine-tests --bench idle -- [--disks N] [--size MIB] [--seconds S] [--dir DIR]
//! ```
//!
//! One server per disk. First nobody is connected to them; then a client is connected to each, has
//! read and written a little, and does nothing more; then all clients have gone and what they wrote is
//! restored. Prints a Markdown table. See README.md beside this file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pristine_tests::images;
use pristine_tests::lab::Server;
use pristine_tests::program::{pristine, run, scratch_dir, scratch_root};
use pristine_tests::remote::Remote;
use pristine_tests::wait_until;
use tempfile::TempDir;

struct Options {
    disks: usize,
    size: u64,
    seconds: u64,
    dir: PathBuf,
}

fn main() {
    let options = options();
    let lab = Lab::new(&options.dir);
    images::sparse(&lab.path("base"), options.size, 1, &[(0, 4 << 20)]);
    let group = Group::new();
    let mut servers = Vec::new();
    for disk in 0..options.disks {
        let mut provision = lab.pristine("provision", disk);
        run(provision.arg("--base").arg(lab.path("base"))).ok();
        let mut serve = lab.pristine("serve", disk);
        serve.arg("--socket-path").arg(lab.socket(disk));
        servers.push(Server::start(&within(group.as_ref(), &serve)));
    }
    println!(
        "| state | processor, % of one core | wake-ups a second | threads | memory: process, KiB | kernel, KiB |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    report("served", &servers, group.as_ref(), options.seconds);
    let mut clients: Vec<Remote> =
        (0..options.disks).map(|disk| Remote::connected(&lab.socket(disk), 1)).collect();
    for client in &mut clients {
        client.ask("scatter 500 7");
        client.ask("read 0 1048576");
    }
    report("connected", &servers, group.as_ref(), options.seconds);
    clients.into_iter().for_each(Remote::leave);
    for disk in 0..options.disks {
        wait_until("the disk is pristine", || {
            run(&mut lab.pristine("status", disk)).ok().stdout.contains("pristine")
        });
    }
    report("restored", &servers, group.as_ref(), options.seconds);
    servers.into_iter().for_each(Server::stop);
}

fn options() -> Options {
    let mut options = Options { disks: 100, size: 1 << 30, seconds: 10, dir: scratch_root() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--disks" => options.disks = value().parse().unwrap(),
            "--size" => options.size = value().parse::<u64>().unwrap() << 20,
            "--seconds" => options.seconds = value().parse().unwrap(),
            "--dir" => options.dir = value().into(),
            "--bench" => {} // cargo's own
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// Directories for all disks.
struct Lab {
    images: TempDir,
    sockets: TempDir,
    runtime: TempDir,
}

impl Lab {
    fn new(dir: &Path) -> Self {
        let sockets = tempfile::Builder::new().prefix("pt").tempdir().unwrap();
        Self { images: scratch_dir(dir), sockets, runtime: scratch_dir(Path::new("/dev/shm")) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    fn socket(&self, disk: usize) -> PathBuf {
        self.sockets.path().join(disk.to_string())
    }

    fn pristine(&self, command: &str, disk: usize) -> Command {
        let mut program = pristine([command]);
        program.arg("--disk").arg(self.path(&format!("disk{disk}")));
        program.arg("--runtime-dir").arg(self.runtime.path());
        program
    }
}

/// What the servers have used until now.
#[derive(Default)]
struct Usage {
    nanoseconds: u64,
    wake_ups: u64,
    threads: u64,
    /// Resident, pages that others have too in proportion; bytes.
    memory: u64,
}

fn usage(servers: &[Server]) -> Usage {
    let mut usage = Usage::default();
    for server in servers {
        let process = PathBuf::from(format!("/proc/{}", server.0.pid()));
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        for task in std::fs::read_dir(process.join("task")).unwrap() {
            let task = task.unwrap().path();
            let ran = read(task.join("schedstat")).split(' ').next().unwrap().parse::<u64>().unwrap();
            usage.nanoseconds += ran;
            usage.wake_ups += field(&read(task.join("status")), "voluntary_ctxt_switches:");
            usage.threads += 1;
        }
        usage.memory += field(&read(process.join("smaps_rollup")), "Pss:") * 1024;
    }
    usage
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn report(state: &str, servers: &[Server], group: Option<&Group>, seconds: u64) {
    let before = usage(servers);
    std::thread::sleep(Duration::from_secs(seconds));
    let after = usage(servers);
    let each = servers.len() as u64;
    println!(
        "| {state} | {:.3} | {:.1} | {} | {} | {} |",
        (after.nanoseconds - before.nanoseconds) as f64 / (seconds as f64 * 1e7),
        (after.wake_ups - before.wake_ups) as f64 / seconds as f64,
        after.threads / each,
        after.memory / each / 1024,
        group.map_or("?".to_owned(), |group| (group.kernel_bytes() / each / 1024).to_string()),
    );
}

/// A control group of the servers, which counts what the kernel has allocated for them: stacks, page
/// tables, rings (which are in the processes' memory too).
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let name = format!("pristine-idle-{}", std::process::id());
        let roots = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"];
        let groups = roots.iter().map(|root| Self(Path::new(root).join(&name)));
        groups.filter(|group| std::fs::create_dir(&group.0).is_ok()).find(|group| group.kernel().is_some())
    }

    fn kernel(&self) -> Option<u64> {
        if let Ok(text) = std::fs::read_to_string(self.0.join("memory.kmem.usage_in_bytes")) {
            return text.trim().parse().ok();
        }
        let stat = std::fs::read_to_string(self.0.join("memory.stat")).ok()?;
        stat.contains("kernel ").then(|| field(&stat, "kernel "))
    }

    fn kernel_bytes(&self) -> u64 {
        self.kernel().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// `command` in the group.
fn within(group: Option<&Group>, command: &Command) -> Command {
    let Some(group) = group else {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        return same;
    };
    let mut launched = Command::new("sh");
    launched.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(group.0.join("cgroup.procs"));
    launched.arg(command.get_program()).args(command.get_args());
    launched
}
