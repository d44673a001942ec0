//! Where the processor time of a request goes, function by function, of `pristine` and of `qemu-storage-daemon`.
//!
//! ```text
//! cargo bench -p pristine-tests --bench profile -- [--points POINT,... | --first] [--direct] [--seconds S] [--size MIB] [--dir DIR]...
//! ```
//!
//! `--first` looks at the first write to each block of a fresh disk, in random order, 32 at a time, against a fresh qcow2 overlay.
//! Points, and how backend and client are placed, are those of the benchmark `peer`. Each backend is sampled by `perf` on
//! the whole machine (`cpu-clock`, 1999 times a second) while it is under load; shares of its samples are multiplied with
//! the processor time that it takes for a request. Needs `perf`, and the right to see the kernel's symbols.

use std::time::Duration;

use pristine_tests::bench::backend::{Backend, Bench, Running};
use pristine_tests::bench::machine::{Place, kind_of};
use pristine_tests::bench::options::{Options, refuse};
use pristine_tests::bench::points::Point;
use pristine_tests::bench::profile::profiled;
use pristine_tests::client::Pattern;
use pristine_tests::images;
use pristine_tests::lab::Lab;

/// What takes a smaller part of a request is not shown.
const SHARE_MIN: f64 = 0.02;
const BACKENDS: [Backend; 2] = [Backend::Pristine, Backend::Daemon("io_uring")];
const OF_FIRST_WRITES: [Backend; 2] = [Backend::Pristine, Backend::FreshOverlay];
const DEPTH: usize = 32;

fn main() {
    let defaults = Options { size: 512 << 20, seconds: 3.0, rounds: 1, dirs: Vec::new() };
    let (mut direct, mut first, mut points) = (false, false, Vec::new());
    let options = defaults.parsed(std::env::args().skip(1).collect(), |word, values| {
        match word {
            "--points" => points = values.list(),
            "--direct" => direct = true,
            "--first" => first = true,
            _ => return false,
        }
        true
    });
    if points.is_empty() && !first {
        let point = Point::one_queue;
        points = vec![
            point(Pattern::RandomRead, 1),
            point(Pattern::RandomRead, 32),
            point(Pattern::RandomWrite, 32),
            point(Pattern::SequentialRead, 16),
            point(Pattern::SequentialWrite, 16),
        ];
    }
    for dir in &options.dirs {
        let bench = Bench::new(Lab::in_dir(dir), options.size, direct);
        let medium = format!("{}{}", kind_of(dir), if direct { ", direct" } else { "" });
        if first {
            println!("### {medium}, first writes\n");
            let count = options.size / images::BLOCK;
            for backend in OF_FIRST_WRITES {
                show(&bench, backend, Point::one_queue(Pattern::RandomWrite, DEPTH), |running| {
                    let (rate, cpu) = running.asked(&format!("first {DEPTH} {count} 1"), Place::Client);
                    (rate.parse().unwrap(), cpu * 1e6 / count as f64)
                });
            }
        }
        for point in &points {
            println!("### {medium}, {point}\n");
            for backend in BACKENDS {
                show(&bench, backend, *point, |running| {
                    let sample = running.load(*point, Duration::from_secs_f64(options.seconds), None);
                    (sample.score.per_second, sample.cpu_us)
                });
            }
        }
    }
}

/// Has `backend` measured as one for `point`, and prints a paragraph with a table. `load` returns how many requests a second
/// were answered and the microseconds of processor time that each took.
fn show(bench: &Bench, backend: Backend, point: Point, mut load: impl FnMut(&Running<'_>) -> (f64, f64)) {
    let ((per_second, cpu_us), profile) =
        bench.with_running(backend, point, |running| profiled(running.process.pid(), || load(running)));
    let Some(profile) = profile else { refuse("perf can't be run: install linux-perf") };
    let us = |share: f64| share * cpu_us;
    println!(
        "{backend}: {cpu_us:.3} us of processor time for a request, {:.1} thousand a second.",
        per_second / 1e3
    );
    let calls: Vec<String> = profile
        .calls
        .iter()
        .filter(|(_, share)| *share >= SHARE_MIN)
        .map(|(name, share)| format!("{name} {:.3}", us(*share)))
        .collect();
    if !calls.is_empty() {
        println!("In system calls, us: {}.", calls.join(", "));
    }
    println!("\n| us | share | function | of |\n| --- | --- | --- | --- |");
    let shown = |share: f64| share >= SHARE_MIN;
    for (object, name, share) in profile.functions.iter().filter(|(_, _, share)| shown(*share)) {
        println!("| {:.3} | {:.0} % | `{name}` | {object} |", us(*share), share * 100.0);
    }
    let rest: f64 = profile.functions.iter().map(|(_, _, share)| share).filter(|share| !shown(**share)).sum();
    println!("| {:.3} | {:.0} % | all others | |\n", us(rest), rest * 100.0);
}
