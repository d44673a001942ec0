//! `pristine` against `qemu-storage-daemon`, through the same client, side by side.
//!
//! ```text
//! cargo bench -p pristine-tests --bench peer -- [--points POINT,...] [--direct | --cold] [--only BACKEND]
//!     [--size MIB] [--seconds S] [--rounds N] [--dir DIR]...
//! ```
//!
//! A point is a pattern, the requests at a time on each queue, and the queues if not one: `randread-32`,
//! `mix-128`, `seqwrite-16x2`. Patterns: randread, randwrite, mix (70 % reads) with 4 KiB; seqread, seqwrite
//! with 128 KiB; flush without data, which `pristine` answers at once (what client and rings reach).
//!
//! The backends take turns in every round, each on a dense file of its own with the same contents in
//! the same directory; the client has one processor, the backend another (with several queues: both have
//! both). Prints medians as a Markdown table. See README.md beside this file.

use std::path::Path;
use std::time::Duration;

use pristine_tests::bench::backend::{Backend, Bench, Sample};
use pristine_tests::bench::machine::kind_of;
use pristine_tests::bench::median;
use pristine_tests::bench::options::Options;
use pristine_tests::bench::points::Point;
use pristine_tests::client::Pattern;
use pristine_tests::lab::Lab;

fn main() {
    let defaults = Options { size: 2 << 30, seconds: 4.0, rounds: 5, dirs: Vec::new() };
    let mut points =
        vec![Point::one_queue(Pattern::RandomRead, 32), Point::one_queue(Pattern::RandomWrite, 32)];
    let (mut direct, mut cold, mut only) = (false, false, None);
    let options = defaults.parsed(std::env::args().skip(1).collect(), |word, values| {
        match word {
            "--points" => points = values.list(),
            "--direct" => direct = true,
            "--cold" => cold = true,
            "--only" => only = Some(values.value()),
            _ => return false,
        }
        true
    });
    let mut backends = vec![Backend::Pristine, Backend::Daemon("threads"), Backend::Daemon("io_uring")];
    if direct {
        backends.push(Backend::Daemon("native"));
    }
    backends.retain(|backend| only.as_ref().is_none_or(|only| backend.to_string().contains(only.as_str())));
    println!(
        "| directory | point | backend | kIOPS | CPU us per I/O | p50 us | p99 us | client CPU us | pristine is | CPU |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for dir in &options.dirs {
        let bench = Bench::new(Lab::in_dir(dir), options.size, direct);
        if cold {
            bench.forget();
        }
        compare(dir, &bench, &options, &points, &backends);
    }
}

fn compare(dir: &Path, bench: &Bench, options: &Options, points: &[Point], backends: &[Backend]) {
    let time = Duration::from_secs_f64(options.seconds);
    let mut samples = vec![Vec::new(); points.len() * backends.len()];
    for _ in 0..options.rounds {
        for (index, samples) in samples.iter_mut().enumerate() {
            let point = points[index / backends.len()];
            samples.push(bench.measure(backends[index % backends.len()], point, time));
        }
    }
    for (point, rows) in points.iter().zip(samples.chunks(backends.len())) {
        let middle = |samples: &[Sample], of: &dyn Fn(&Sample) -> f64| median(samples.iter().map(of));
        let rate = |samples: &[Sample]| middle(samples, &|sample| sample.score.per_second);
        let cpu = |samples: &[Sample]| middle(samples, &|sample| sample.cpu_us);
        for (backend, samples) in backends.iter().zip(rows) {
            let ratios = match (backends, backend) {
                ([Backend::Pristine, ..], Backend::Daemon(_)) => {
                    format!("{:.2}x | {:.2}x", rate(&rows[0]) / rate(samples), cpu(&rows[0]) / cpu(samples))
                }
                _ => " | ".into(),
            };
            println!(
                "| {}{} | {point} | {backend} | {:.1} | {:.2} | {:.1} | {:.1} | {:.2} | {ratios} |",
                kind_of(dir),
                if bench.direct { ", direct" } else { "" },
                rate(samples) / 1e3,
                cpu(samples),
                middle(samples, &|sample| sample.score.p50_us),
                middle(samples, &|sample| sample.score.p99_us),
                middle(samples, &|sample| sample.score.client_us),
            );
        }
    }
}
