//! `pristine` against `qemu-storage-daemon`: 4 KiB random reads and writes, 32 at a time on one queue.
//!
//! ```text
//! cargo bench -p pristine-tests --bench peer -- [--size MIB] [--seconds S] [--rounds N] [--dir DIR]...
//! ```
//!
//! The backends take turns in every round, each on a dense file of its own with the same contents in
//! the same directory; the client has one processor, the backend another. Prints medians as a
//! Markdown table. See README.md beside this file.

use std::path::{Path, PathBuf};
use std::process::Command;

use pristine_tests::PATIENCE;
use pristine_tests::client::Pattern;
use pristine_tests::images;
use pristine_tests::lab::{Lab, Server};
use pristine_tests::peer::storage_daemon;
use pristine_tests::process::Process;
use pristine_tests::program::{run, scratch_root};
use pristine_tests::remote::Remote;

const DEPTH: usize = 32;
const PATTERNS: [Pattern; 2] = [Pattern::RandomRead, Pattern::RandomWrite];
const BACKENDS: [&str; 3] = ["pristine", "qemu-storage-daemon, threads", "qemu-storage-daemon, io_uring"];

struct Options {
    size: u64,
    seconds: f64,
    rounds: usize,
    dirs: Vec<PathBuf>,
}

/// One measurement: requests a second, and the backend's processor time for each.
#[derive(Clone, Copy)]
struct Sample {
    per_second: f64,
    cpu_us: f64,
}

fn main() {
    let options = options();
    println!("| directory | pattern | backend | kIOPS | CPU us per I/O | pristine is |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for dir in &options.dirs {
        compare_in(dir, &options);
    }
}

fn options() -> Options {
    let mut options = Options { size: 2 << 30, seconds: 4.0, rounds: 5, dirs: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--size" => options.size = value().parse::<u64>().unwrap() << 20,
            "--seconds" => options.seconds = value().parse().unwrap(),
            "--rounds" => options.rounds = value().parse().unwrap(),
            "--dir" => options.dirs.push(value().into()),
            "--bench" => {} // cargo's own
            other => panic!("unknown option {other}"),
        }
    }
    if options.dirs.is_empty() {
        options.dirs = vec![PathBuf::from("/dev/shm"), scratch_root()];
    }
    options
}

fn compare_in(dir: &Path, options: &Options) {
    let lab = Lab::in_dir(dir);
    images::dense(&lab.base(), options.size, 1);
    lab.provision(&[]);
    let peer_disk = lab.path("peer.img");
    images::dense(&peer_disk, options.size, 1);
    let mut samples = vec![Vec::new(); PATTERNS.len() * BACKENDS.len()];
    for _ in 0..options.rounds {
        for (index, samples) in samples.iter_mut().enumerate() {
            let pattern = PATTERNS[index / BACKENDS.len()];
            samples.push(measure(&lab, &peer_disk, BACKENDS[index % BACKENDS.len()], pattern, options));
        }
    }
    for (pattern, rows) in PATTERNS.iter().zip(samples.chunks(BACKENDS.len())) {
        let ours = median(&rows[0], |sample| sample.per_second);
        for (backend, samples) in BACKENDS.iter().zip(rows) {
            let rate = median(samples, |sample| sample.per_second);
            let cpu = median(samples, |sample| sample.cpu_us);
            let ratio = if rate == ours { "".into() } else { format!("{:.2}x", ours / rate) };
            println!(
                "| {} | {} | {backend} | {:.0} | {cpu:.1} | {ratio} |",
                kind_of(dir),
                pattern.name(),
                rate / 1e3
            );
        }
    }
}

fn measure(lab: &Lab, peer_disk: &Path, backend: &str, pattern: Pattern, options: &Options) -> Sample {
    // What was written before shall not be written back now, and what is read shall be in memory.
    run(Command::new("sync").arg("-f").arg(peer_disk)).ok();
    let disk = if backend == BACKENDS[0] { lab.disk() } else { peer_disk.to_owned() };
    run(Command::new("dd").args(["of=/dev/null", "bs=1M"]).arg(format!("if={}", disk.display()))).ok();
    let command = format!("bench {} {DEPTH} {}", pattern.name(), options.seconds);
    let pinned = std::thread::available_parallelism().unwrap().get() > 1;
    let on_cpu = |cpu| if pinned { vec!["taskset", "-c", cpu] } else { vec!["env"] };
    let launcher = on_cpu("1");
    let score = |process: &Process, socket: &Path| {
        let mut client = Remote::start_with(&on_cpu("0"), socket);
        let before = cpu_seconds(process.pid());
        let per_second: f64 = client.ask(&command).parse().unwrap();
        let cpu = cpu_seconds(process.pid()) - before;
        client.leave();
        // The client warms up for a fifth of the time before it counts.
        Sample { per_second, cpu_us: cpu * 1e6 / (per_second * options.seconds * 1.2) }
    };
    match backend.split_once(", ") {
        None => {
            let mut serve = lab.pristine("serve", &["--queue-size", "512"]);
            serve.arg("--socket-path").arg(lab.socket());
            let server = Server::start(&launched(&launcher, &serve));
            let sample = score(&server.0, &lab.socket());
            // The peers shall not be measured beside a drain.
            lab.wait_pristine();
            server.stop();
            sample
        }
        Some((_, aio)) => {
            let socket = lab.runtime().join("peer");
            let mut daemon = storage_daemon(&launcher, peer_disk, &socket, 1, aio);
            let sample = score(&daemon, &socket);
            daemon.signal(rustix::process::Signal::TERM);
            daemon.wait(PATIENCE);
            let _ = std::fs::remove_file(&socket);
            sample
        }
    }
}

fn launched(launcher: &[&str], command: &Command) -> Command {
    let mut launched = Command::new(launcher[0]);
    launched.args(&launcher[1..]).arg(command.get_program()).args(command.get_args());
    launched
}

/// Processor time of a process, user and system.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
    ticks / rustix::param::clock_ticks_per_second() as f64
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the directory's file system is called.
fn kind_of(dir: &Path) -> String {
    let finished = run(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).ok();
    finished.stdout.trim().to_owned()
}
