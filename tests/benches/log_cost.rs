//! What the log costs: writes of 4 KiB by a server that logs, and by the same server that does not.
//!
//! ```text
//! cargo bench -p pristine-tests --bench log_cost --features bench-without-log -- \
//!     [--size MIB] [--rounds N] [--depths 1,32,128] [--dir DIR]... [--control]
//! ```
//!
//! With `--control` the server of the columns "no log" logs as well: what the ratios differ from 1.000 then
//! is the noise of the machine and the bias of the measurement, if there is one.
//!
//! In every round, at every depth, both servers have a session on the same disk, which is restored,
//! synced and in the page cache; they take turns in being the first. Each session writes once to half of
//! the blocks, scattered, which are first touches, and then to the same blocks in other orders, which is
//! the steady state. Prints medians, and the medians of the rounds' ratios, as Markdown tables. See
//! README.md.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pristine_tests::PATIENCE;
use pristine_tests::bench::machine::{Place, kind_of, settle};
use pristine_tests::bench::median;
use pristine_tests::bench::options::Options;
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::process::Process;
use pristine_tests::remote::Remote;
use session_disk::{DiskOptions, ProcessId, ProvisionOptions, SessionDisk, SessionStart, SessionSummary};
use vhost_blk::{DeviceConfig, EndReason, Observer, Server, ServerConfig, Socket, SocketPermissions};

/// Blocks of a pass at depth 1, at most: it is slow.
const BLOCKS_AT_DEPTH_1_MAX: u64 = 32768;

/// Rates of one session's first touches and of its other writes, in requests a second.
#[derive(Clone, Copy)]
struct Rates {
    first: f64,
    steady: f64,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, disk, runtime, socket, log] = &words[..]
        && serve == "serve"
    {
        return serve_disk(disk.as_ref(), runtime.as_ref(), socket.as_ref(), log == "log");
    }
    let defaults = Options { size: 1 << 30, seconds: 0.0, rounds: 15, dirs: Vec::new() };
    let mut depths = vec![1, 32, 128];
    let mut control = false;
    let options = defaults.parsed(words, |word, values| {
        match word {
            "--depths" => depths = values.list(),
            "--control" => control = true,
            _ => return false,
        }
        true
    });
    println!(
        "| directory | depth | first touches: log, kIOPS | no log | ratio | steady: log, kIOPS | no log | ratio |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let touches: Vec<String> =
        options.dirs.iter().flat_map(|dir| compare_in(dir, &options, &depths, control)).collect();
    println!();
    println!("| directory | depth 1, us | first touch of a region | of a block | later writes |");
    println!("| --- | --- | --- | --- | --- |");
    touches.iter().for_each(|line| println!("{line}"));
    println!();
    println!(
        "| directory | longest read beside a session's first write, us | beside a region's | that write |"
    );
    println!("| --- | --- | --- | --- |");
    options.dirs.iter().for_each(|dir| println!("{}", beside_in(dir, &options)));
}

/// The row of reads beside first writes.
fn beside_in(dir: &Path, options: &Options) -> String {
    let lab = Lab::in_dir(dir);
    images::dense(&lab.base(), options.size, 1);
    let disk = Subject::new(&lab);
    let columns = medians(options.rounds, |round| disk.ask(true, &format!("beside {round}")));
    let [session, region, write] = columns;
    format!("| {} | {session:.1} | {region:.1} | {write:.1} |", kind_of(dir))
}

/// The medians of the three numbers that each round has for an answer.
fn medians(rounds: usize, answer: impl Fn(usize) -> String) -> [f64; 3] {
    let mut columns: [Vec<f64>; 3] = Default::default();
    for answer in (0..rounds).map(answer) {
        for (column, word) in columns.iter_mut().zip(answer.split(' ')) {
            column.push(word.parse().unwrap());
        }
    }
    columns.map(median)
}

/// Prints a row for each depth; returns the rows of single writes.
fn compare_in(dir: &Path, options: &Options, depths: &[usize], control: bool) -> [String; 2] {
    let lab = Lab::in_dir(dir);
    images::dense(&lab.base(), options.size, 1);
    let disk = Subject::new(&lab);
    let all = options.size / images::BLOCK / 2;
    for &depth in depths {
        let count = if depth == 1 { all.min(BLOCKS_AT_DEPTH_1_MAX) } else { all };
        let mut rounds = Vec::new();
        for round in 0..options.rounds {
            let rates = |log| disk.rates(log || control, &format!("passes {depth} {count} {round}"));
            let first = rates(round % 2 == 0);
            let second = rates(round % 2 != 0);
            rounds.push(if round % 2 == 0 { (first, second) } else { (second, first) });
        }
        let column = |of: &dyn Fn(&(Rates, Rates)) -> f64| median(rounds.iter().map(of));
        println!(
            "| {} | {depth} | {:.1} | {:.1} | {:.3} | {:.1} | {:.1} | {:.3} |",
            kind_of(dir),
            column(&|(with, _)| with.first) / 1e3,
            column(&|(_, without)| without.first) / 1e3,
            column(&|(with, without)| with.first / without.first),
            column(&|(with, _)| with.steady) / 1e3,
            column(&|(_, without)| without.steady) / 1e3,
            column(&|(with, without)| with.steady / without.steady),
        );
    }
    let single = |log| {
        let [region, block, steady] =
            medians(options.rounds, |round| disk.ask(log, &format!("touches {round}")));
        let name = if log { "log" } else { "no log" };
        format!("| {} | {name} | {region:.1} | {block:.1} | {steady:.1} |", kind_of(dir))
    };
    [single(true), single(false)]
}

/// A disk that is served with or without a log. One disk for both: two that are equal differ by several
/// percent, depending on where the host has put their pages.
struct Subject<'a> {
    lab: &'a Lab,
}

impl<'a> Subject<'a> {
    fn new(lab: &'a Lab) -> Self {
        let options =
            DiskOptions { runtime_dir: Some(lab.runtime().to_owned()), ..DiskOptions::new(lab.disk()) };
        let provision = ProvisionOptions::new(lab.base(), options);
        session_disk::provision(&provision).unwrap();
        Self { lab }
    }

    fn rates(&self, log: bool, command: &str) -> Rates {
        let answer = self.ask(log, command);
        let (first, steady) = answer.split_once(' ').unwrap();
        Rates { first: first.parse().unwrap(), steady: steady.parse().unwrap() }
    }

    /// The answer of a client with a session of its own.
    fn ask(&self, log: bool, command: &str) -> String {
        let lab = self.lab;
        let mut serve = Command::new(std::env::current_exe().unwrap());
        serve.arg("serve").arg(lab.disk()).arg(lab.runtime()).arg(lab.socket());
        serve.arg(if log { "log" } else { "no log" });
        let serve = Place::Backend.launched(&serve);
        let mut server = Process::spawn("the server", &serve);
        server.wait_line("\"listening\"", PATIENCE, |line| line == "listening");
        settle(&lab.disk());
        let mut client = Remote::start_with(Place::Client.launcher(), &lab.socket());
        let answer = client.ask(command);
        server.kill();
        client.kill();
        answer
    }
}

/// Restores the disk, reads it into the page cache, and serves it until it is killed.
fn serve_disk(disk: &Path, runtime: &Path, socket: &Path, log: bool) {
    let options =
        DiskOptions { runtime_dir: Some(runtime.to_owned()), without_log: !log, ..DiskOptions::new(disk) };
    let opened = SessionDisk::open(&options).unwrap();
    opened.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    std::io::copy(&mut std::fs::File::open(disk).unwrap(), &mut std::io::sink()).unwrap();
    let socket = Socket::bind(socket, SocketPermissions::default()).unwrap();
    let device = DeviceConfig { num_queues: 1, queue_size: 512, ..DeviceConfig::default() };
    let config = ServerConfig { device, ..ServerConfig::default() };
    let mut server = Server::new(Arc::clone(&opened), socket, config, Arc::new(Silent)).unwrap();
    println!("listening");
    server.run().unwrap();
}

/// Has nothing to say.
struct Silent;

impl Observer for Silent {
    fn session_started(&self, _: &SessionStart, _: Option<ProcessId>) {}
    fn session_ended(&self, _: &SessionSummary, _: EndReason) {}
    fn frontend_refused(&self, why: &str) {
        eprintln!("refused: {why}");
    }
}
