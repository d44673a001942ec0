//! Restoring a disk: how fast it is, what a guest notices of it, and how soon the next session begins.
//!
//! ```text
//! cargo bench -p pristine-tests --bench restore --features bench-restore -- \
//!     [--part rate|first|guest|ways|share]... [--size MIB] [--dirty MIB] [--runs BLOCKS,...] [--rounds N] [--dir DIR]...
//! ```
//!
//! - `rate`: the drain of a session's changes, from durable changes to a durable pristine state, against
//!   tight loops that copy the same extents of the same files and sync once (io_uring at depth 32, and
//!   `pread` with `pwrite`: the faster counts). They take turns on one disk.
//! - `first`: from the death of one client to the answer to the next one's first read, connection and
//!   handshake included.
//! - `guest`: latency of a guest that reads 4 KiB at depth 1 while the last session's changes are drained,
//!   and of the same guest afterwards.
//!
//! - `ways`: tight loops alone, also with `copy_file_range`, for runs of several lengths. Not unless it is named.
//! - `share`: the drain where disk and base can share blocks (`--dir` on xfs or btrfs), with and without, and what the next
//!   session's writes cost then. Not unless it is named.
//!
//! Prints medians as Markdown tables. See README.md.

#[path = "restore/share.rs"]
mod share;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockio::GuestBuf;
use pristine_tests::bench::machine::{cpu_seconds, kind_of};
use pristine_tests::bench::median;
use pristine_tests::bench::options::Options;
use pristine_tests::client::{Client, Request, Shape, Way, copy};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::process::Process;
use pristine_tests::program::run;
use pristine_tests::random::{Random, scattered};
use pristine_tests::remote::Remote;
use session_disk::{DiskOptions, ProvisionOptions, SessionDisk};

const BLOCK: u64 = images::BLOCK;
const DEPTH: usize = 32;
/// Longest latencies that are looked at after the drain is over.
const READS_AFTER: usize = 20_000;

struct Sizes {
    /// `--size MIB`.
    size: u64,
    /// `--dirty MIB`.
    dirty: u64,
    rounds: usize,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [client, socket, block] = &words[..]
        && client == "client"
    {
        return first_read(socket.as_ref(), block.parse().unwrap());
    }
    let defaults = Options { size: 4 << 30, seconds: 0.0, rounds: 3, dirs: Vec::new() };
    let (mut parts, mut dirty, mut runs) = (Vec::new(), 1 << 30, vec![1, 16, 64, 256]);
    let options = defaults.parsed(words, |word, values| {
        match word {
            "--part" => parts.push(values.value()),
            "--dirty" => dirty = values.parsed::<u64>() << 20,
            "--runs" => runs = values.list(),
            _ => return false,
        }
        true
    });
    let sizes = Sizes { size: options.size, dirty, rounds: options.rounds };
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    if wanted("rate") {
        println!(
            "| directory | dirty | drain, s | io_uring loop, s | plain loop, s | drain's rate / the faster's | \
             CPU s: drain | io_uring loop | plain loop |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        options.dirs.iter().for_each(|dir| rates(dir, &sizes));
        println!();
    }
    if wanted("first") {
        println!("| directory | dirty, MiB | end to first read, ms: median | least | most |");
        println!("| --- | --- | --- | --- | --- |");
        options.dirs.iter().for_each(|dir| first_reads(dir, &sizes));
        println!();
    }
    if wanted("guest") {
        println!(
            "| directory | drain, s | reads in it | us: median | p99 | p99.9 | most | after it: median | p99 | p99.9 \
             | p99 / p99 |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        options.dirs.iter().for_each(|dir| guests(dir, &sizes));
    }
    let named = |part: &str| parts.iter().any(|named| named == part);
    if named("ways") {
        share::ways(&options.dirs, &sizes, &runs);
    }
    if named("share") {
        share::shares(&options.dirs, &sizes, &runs);
    }
}

/// Seconds that something took, and seconds of processor time of this process.
#[derive(Clone, Copy)]
struct Cost {
    elapsed: f64,
    cpu: f64,
}

fn cost_of(work: impl FnOnce()) -> Cost {
    let (cpu, begin) = (cpu_seconds(std::process::id()), Instant::now());
    work();
    Cost { elapsed: begin.elapsed().as_secs_f64(), cpu: cpu_seconds(std::process::id()) - cpu }
}

fn rates(dir: &Path, sizes: &Sizes) {
    let lab = Lab::in_dir(dir);
    images::dense(&lab.base(), sizes.size, 1);
    let disk_options =
        DiskOptions { runtime_dir: Some(lab.runtime().to_owned()), ..DiskOptions::new(lab.disk()) };
    let wanted = ProvisionOptions::new(lab.base(), disk_options.clone());
    session_disk::provision(&wanted).unwrap();
    let disk = SessionDisk::open(&disk_options).unwrap();
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    let base = File::open(lab.base()).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(lab.disk()).unwrap();
    std::io::copy(&mut &base, &mut std::io::sink()).unwrap();
    std::io::copy(&mut &file, &mut std::io::sink()).unwrap();
    for (name, run) in [("4 KiB, scattered", 1), ("64 KiB runs", 16)] {
        let mut costs: [Vec<Cost>; 3] = Default::default();
        for round in 0..sizes.rounds {
            let parts = parts(sizes, run, round as u64);
            for turn in 0..3 {
                let who = (turn + round) % 3;
                match who {
                    0 => session(&disk, &parts),
                    _ => scribble(&file, &parts),
                }
                file.sync_all().unwrap();
                let mut sorted = parts.clone();
                sorted.sort_unstable();
                costs[who].push(cost_of(|| match who {
                    0 => {
                        let restored = disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
                        assert_eq!(restored, parts.len() as u64 * run);
                    }
                    1 => copy(&base, &file, &sorted, Way::IoUring(DEPTH as u32)).unwrap(),
                    _ => copy(&base, &file, &sorted, Way::Plain).unwrap(),
                }));
            }
        }
        let ratios = (0..sizes.rounds).map(|round| {
            let [drain, ring, plain] = [0, 1, 2].map(|who| costs[who][round].elapsed);
            ring.min(plain) / drain
        });
        let ratio = median(ratios);
        let column = |who: usize, of: fn(&Cost) -> f64| median(costs[who].iter().map(of));
        let [drain, ring, plain] = [0, 1, 2].map(|who| column(who, |cost| cost.elapsed));
        let cpu = [0, 1, 2].map(|who| format!("{:.2}", column(who, |cost| cost.cpu))).join(" | ");
        println!(
            "| {} | {} MiB, {name} | {drain:.3} | {ring:.3} | {plain:.3} | {ratio:.2} | {cpu} |",
            kind_of(dir),
            sizes.dirty >> 20,
        );
    }
    drop(disk);
    images::assert_equal(&lab.disk(), &lab.base());
}

/// The parts of the disk that are changed, in random order.
fn parts(sizes: &Sizes, run: u64, seed: u64) -> Vec<(u64, u64)> {
    let len = run * BLOCK;
    let chosen = scattered(seed + 1, sizes.dirty / len, sizes.size / len);
    chosen.into_iter().map(|at| (at * len, len)).collect()
}

/// Changes parts of a disk in a session of its own.
fn session(disk: &Arc<SessionDisk>, parts: &[(u64, u64)]) {
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(DEPTH as u32).unwrap();
    let mut done = Vec::new();
    for parts in parts.chunks(DEPTH) {
        for &(offset, len) in parts {
            let buf = GuestBuf::zeroed(len as usize);
            let range = disk.geometry().sectors_at(offset / 512, len).unwrap();
            queue.push(offset, session_disk::Request::Write { range, buf, durable: false });
        }
        queue.quiesce(&mut done);
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    drop(queue);
    disk.end_session().unwrap();
}

/// Changes parts of a file.
fn scribble(file: &File, parts: &[(u64, u64)]) {
    let zeroes = vec![0; 1 << 20];
    for &(offset, len) in parts {
        file.write_all_at(&zeroes[..len as usize], offset).unwrap();
    }
}

/// A server whose disk is restored, and in the page cache.
fn serve(lab: &Lab, sizes: &Sizes) -> pristine_tests::lab::Server {
    images::dense(&lab.base(), sizes.size, 1);
    lab.provision(&[]);
    for file in [lab.base(), lab.disk()] {
        std::io::copy(&mut File::open(file).unwrap(), &mut std::io::sink()).unwrap();
    }
    lab.serve(&[])
}

fn first_reads(dir: &Path, sizes: &Sizes) {
    let lab = Lab::in_dir(dir);
    let server = serve(&lab, sizes);
    for dirty in [0, 64 << 20, sizes.dirty] {
        let mut times = Vec::new();
        for round in 0..sizes.rounds as u64 {
            let mut first = Remote::connected(&lab.socket(), 1);
            let seed = dirty + round;
            let mut block = 1;
            if dirty > 0 {
                first.ask(&format!("scatter {} {seed}", dirty / BLOCK));
                block = scattered(seed, dirty / BLOCK, sizes.size / BLOCK)[0];
            } else {
                first.ask("read 0 4096");
            }
            let mut next = Command::new(std::env::current_exe().unwrap());
            next.arg("client").arg(lab.socket()).arg(block.to_string());
            let mut next = Process::spawn("the next client", &next);
            next.wait_line("\"ready\"", pristine_tests::PATIENCE, |line| line == "ready");
            first.kill();
            let end = Instant::now();
            next.send("go");
            next.wait_line("\"read\"", pristine_tests::PATIENCE, |line| line == "read");
            times.push(end.elapsed().as_secs_f64() * 1e3);
            next.kill();
            lab.wait_pristine();
        }
        times.sort_by(f64::total_cmp);
        println!(
            "| {} | {} | {:.2} | {:.2} | {:.2} |",
            kind_of(dir),
            dirty >> 20,
            times[times.len() / 2],
            times[0],
            times[times.len() - 1]
        );
    }
    server.stop();
}

/// The next client: connects when it is told to, and reads a block.
fn first_read(socket: &Path, block: u64) {
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let mut client = Client::connect(socket, Shape::default()).unwrap();
    client.perform(0, &read_of(block)).unwrap();
    println!("read");
    std::thread::sleep(Duration::from_secs(600));
}

fn read_of(block: u64) -> Request {
    Request::Read { offset: block * BLOCK, parts: vec![BLOCK as usize], skip: 0 }
}

fn guests(dir: &Path, sizes: &Sizes) {
    let lab = Lab::in_dir(dir);
    let mut server = serve(&lab, sizes);
    let mut rows: Vec<[f64; 10]> = Vec::new();
    for round in 0..sizes.rounds as u64 {
        let mut first = Remote::connected(&lab.socket(), 1);
        first.ask(&format!("scatter {} {round}", sizes.dirty / BLOCK));
        run(Command::new("sync").arg("-f").arg(lab.disk())).ok();
        first.kill();
        let mut client = Client::connect(&lab.socket(), Shape::default()).unwrap();
        let mut random = Random::new(round);
        let mut read = |client: &mut Client| {
            let begin = Instant::now();
            client.perform(0, &read_of(random.below(sizes.size / BLOCK))).unwrap();
            begin.elapsed().as_secs_f64() * 1e6
        };
        let restored = AtomicBool::new(false);
        let (begin, mut took) = (Instant::now(), 0.0);
        let (mut during, mut after) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let server = &mut server.0;
            let watch = scope.spawn(|| {
                let is_restored = |line: &str| line.contains(": restored ");
                server.wait_line("\"restored\"", pristine_tests::PATIENCE, is_restored);
                restored.store(true, Ordering::Release);
                begin.elapsed().as_secs_f64()
            });
            while !restored.load(Ordering::Acquire) {
                during.push(read(&mut client));
            }
            took = watch.join().unwrap();
        });
        std::thread::sleep(Duration::from_millis(300));
        run(Command::new("sync").arg("-f").arg(lab.disk())).ok();
        after.extend((0..READS_AFTER).map(|_| read(&mut client)));
        drop(client);
        let count = during.len() as f64;
        let [a, b] = [&mut during, &mut after].map(|times| {
            times.sort_by(f64::total_cmp);
            let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
            [at(0.5), at(0.99), at(0.999), at(1.0)]
        });
        rows.push([took, count, a[0], a[1], a[2], a[3], b[0], b[1], b[2], a[1] / b[1]]);
        // This process stays: the server is told that its session is over.
        run(&mut lab.session("end")).ok();
        lab.wait_pristine();
        server.0.wait_line("\"restored\"", pristine_tests::PATIENCE, |line| line.contains(": restored "));
    }
    let column = |index: usize| median(rows.iter().map(|row| row[index]));
    let cells: Vec<String> = (0..10)
        .map(|index| match index {
            0 | 9 => format!("{:.2}", column(index)),
            _ => format!("{:.0}", column(index)),
        })
        .collect();
    println!("| {} | {} |", kind_of(dir), cells.join(" | "));
    server.stop();
}
