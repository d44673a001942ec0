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
//! In every round, at every depth, two equal disks, which are restored, synced and in the page cache, have a session each, one
//! with a log and one without, and then the other way round: two disks differ by several percent, depending on where the host
//! has put their pages. Each session writes once to half of the blocks, scattered, which are first touches, and then over and over
//! to the same blocks in other orders, which is the steady state. Pass by pass, or part by part, the two take turns, so that what the
//! machine does to one it does to the other. Prints medians, and medians of ratios, as Markdown tables. See
//! README.md.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

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
const BLOCKS_AT_DEPTH_1_MAX: u64 = 8192;

/// Parts of a pass at depth 1, each of them a turn: whether a client falls asleep is chance, for some milliseconds.
const PARTS_AT_DEPTH_1: usize = 8;

/// How often each block is written to after its first touch. How a guest is best woken is tried while the first of these are done.
const STEADY_PASSES: usize = 24;

/// Time between two turns. A worker looks for more work for 50 us, which is to be over when the other one begins: to find that somebody
/// else wants its processor it would take for a reason not to look any more.
const PAUSE: Duration = Duration::from_millis(1);

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
    let labs = [Lab::in_dir(dir), Lab::in_dir(dir)];
    let disks = labs.each_ref().map(|lab| {
        images::dense(&lab.base(), options.size, 1);
        Subject::new(lab)
    });
    let all = options.size / images::BLOCK / 2;
    for &depth in depths {
        let (count, parts) =
            if depth == 1 { (all.min(BLOCKS_AT_DEPTH_1_MAX), PARTS_AT_DEPTH_1) } else { (all, 1) };
        // Of each disk, while it is the one that logs.
        let mut pairs: [Vec<Pair>; 2] = Default::default();
        for round in 0..options.rounds {
            for (logs, pairs) in pairs.iter_mut().enumerate() {
                let command = format!("turns {depth} {count} {round} {parts}");
                let [with, without] =
                    [(logs, true), (1 - logs, control)].map(|(disk, log)| disks[disk].session(log, &command));
                pairs.push(alternate(with, without, parts, round + logs));
            }
        }
        let rate = |of: fn(&Pair) -> f64| median(pairs.iter().flatten().map(of)) / 1e3;
        // What a disk's place in memory does for it, it does with the log in one half of the sessions, and without in the other.
        let ratio = |of: fn(&Rates) -> f64| {
            let ratio = |pair: &Pair| of(&pair.with) / of(&pair.without);
            let [one, other] = pairs.each_ref().map(|pairs| median(pairs.iter().map(ratio)));
            (one * other).sqrt()
        };
        println!(
            "| {} | {depth} | {:.1} | {:.1} | {:.3} | {:.1} | {:.1} | {:.3} |",
            kind_of(dir),
            rate(|pair| pair.with.first),
            rate(|pair| pair.without.first),
            ratio(|rates| rates.first),
            rate(|pair| pair.with.steady),
            rate(|pair| pair.without.steady),
            ratio(|rates| rates.steady),
        );
    }
    let single = |log| {
        let [region, block, steady] =
            medians(options.rounds, |round| disks[0].ask(log, &format!("touches {round}")));
        let name = if log { "log" } else { "no log" };
        format!("| {} | {name} | {region:.1} | {block:.1} | {steady:.1} |", kind_of(dir))
    };
    [single(true), single(false)]
}

/// Two sessions side by side, one with a log, that wrote in turn.
struct Pair {
    with: Rates,
    without: Rates,
}

/// Lets two sessions write in turn, a pass in so many parts, and ends them. `odd` says who begins.
fn alternate(with: Session, without: Session, parts: usize, odd: usize) -> Pair {
    let mut sessions = [with, without];
    let mut rates = [(); 2].map(|()| Vec::new());
    for part in 0..(1 + STEADY_PASSES) * parts {
        for turn in 0..2 {
            let whose = (part + odd + turn) % 2;
            std::thread::sleep(PAUSE);
            rates[whose].push(sessions[whose].turn());
        }
    }
    sessions.into_iter().for_each(Session::end);
    // Of all of them together.
    let mean = |rates: &[f64]| rates.len() as f64 / rates.iter().map(|rate| rate.recip()).sum::<f64>();
    let [with, without] = rates.map(|rates| {
        let (first, steady) = rates.split_at(parts);
        Rates { first: mean(first), steady: mean(steady) }
    });
    Pair { with, without }
}

/// A disk that is served with or without a log.
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

    /// A client with a session of its own, and what it answers to its first command.
    fn begin(&self, log: bool, command: &str) -> (Session, String) {
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
        (Session { server, client }, answer)
    }

    fn session(&self, log: bool, command: &str) -> Session {
        self.begin(log, command).0
    }

    /// The answer of a client whose session ends with it.
    fn ask(&self, log: bool, command: &str) -> String {
        let (session, answer) = self.begin(log, command);
        session.end();
        answer
    }
}

/// A session, and the server that it alone is served by.
struct Session {
    server: Process,
    client: Remote,
}

impl Session {
    /// Writes the next part; returns how many a second.
    fn turn(&mut self) -> f64 {
        self.client.ask("turn").parse().unwrap()
    }

    fn end(mut self) {
        self.server.kill();
        self.client.kill();
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
