//! Where the processor time of a request goes, function by function, of `pristine` and of `qemu-storage-daemon`.
//!
//! ```text
//! cargo bench -p pristine-tests --bench profile -- [--points POINT,...] [--direct] [--seconds S] [--size MIB] [--dir DIR]...
//! ```
//!
//! Points, and how backend and client are placed, are those of the benchmark `peer`. Each backend is sampled by `perf` on
//! the whole machine (`cpu-clock`, 1999 times a second) while it is under load; shares of its samples are multiplied with
//! the processor time that it takes for a request. Needs `perf`, and the right to see the kernel's symbols.

use std::time::Duration;

use pristine_tests::bench::backend::{Backend, Bench};
use pristine_tests::bench::machine::kind_of;
use pristine_tests::bench::options::{Options, refuse};
use pristine_tests::bench::points::Point;
use pristine_tests::bench::profile::profiled;
use pristine_tests::client::Pattern;
use pristine_tests::lab::Lab;

/// What takes a smaller part of a request is not shown.
const SHARE_MIN: f64 = 0.02;
const BACKENDS: [Backend; 2] = [Backend::Pristine, Backend::Daemon("io_uring")];

fn main() {
    let defaults = Options { size: 512 << 20, seconds: 3.0, rounds: 1, dirs: Vec::new() };
    let (mut direct, mut points) = (false, Vec::new());
    let options = defaults.parsed(std::env::args().skip(1).collect(), |word, values| {
        match word {
            "--points" => points = values.list(),
            "--direct" => direct = true,
            _ => return false,
        }
        true
    });
    if points.is_empty() {
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
        for point in &points {
            println!("### {medium}, {point}\n");
            for backend in BACKENDS {
                show(&bench, backend, *point, Duration::from_secs_f64(options.seconds));
            }
        }
    }
}

/// Measures, and prints a paragraph with a table.
fn show(bench: &Bench, backend: Backend, point: Point, time: Duration) {
    let (sample, profile) = bench.with_running(backend, point, |running| {
        profiled(running.process.pid(), || running.load(point, time, None))
    });
    let Some(profile) = profile else { refuse("perf can't be run: install linux-perf") };
    let us = |share: f64| share * sample.cpu_us;
    println!(
        "{backend}: {:.3} us of processor time for a request, {:.1} thousand a second.",
        sample.cpu_us,
        sample.score.per_second / 1e3
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
