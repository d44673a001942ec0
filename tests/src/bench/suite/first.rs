//! First writes to a fresh disk: a session disk that was restored, an overlay that was just made.

use super::{Plan, progress};
use crate::bench::backend::{Backend, Bench};
use crate::bench::machine::Place;
use crate::bench::median;
use crate::bench::points::Point;
use crate::bench::report::{Better, Role, Section, short};
use crate::client::{Loop, Pattern};
use crate::images;
use crate::lab::Lab;

const CLUSTER: u64 = 64 << 10;
/// Requests at a time.
const DEPTH: usize = 32;
const BACKENDS: [(Backend, Role); 4] = [
    (Backend::Pristine, Role::Ours),
    (Backend::FreshOverlay, Role::Peer),
    (Backend::Daemon("threads"), Role::Other),
    (Backend::Daemon("io_uring"), Role::Other),
];

pub(super) fn compare(plan: &Plan) -> Vec<Section> {
    let section = |what: &str, unit, better| {
        let mut section = Section::new(what, unit, better);
        for (backend, role) in BACKENDS {
            section = section.column(backend.to_string(), role);
        }
        section
    };
    let mut first = section("First writes to a fresh disk", "kIOPS", Better::Higher).column("limit", Role::Limit).note(
        "Writes of 4 KiB in random order, 32 at a time: to every block of the disk, or to one block of every 64 KiB \
         (the overlay's cluster). The overlay is new, its base is in memory where it is not direct; the raw disk \
         pays nothing for its first writes, and keeps them. Limit: a loop of such writes to a file that was made by \
         writes of 8 KiB, of `pwrite` or into a map (io_uring where it is direct), whichever does more.",
    );
    let mut again = section("Later writes to the same blocks", "kIOPS", Better::Higher);
    let mut cost = section("Processor time for a write, first and later ones", "microseconds", Better::Lower);
    for medium in plan.media() {
        for (size, unit, what) in [
            (plan.first_sizes[0], images::BLOCK, "every block"),
            (plan.first_sizes[1], CLUSTER, "one of 64 KiB"),
        ] {
            let count = size / unit;
            let bench = Bench::new(Lab::in_dirs(&medium.dir, &plan.tmpfs), size, medium.direct);
            let mut samples = [const { Vec::new() }; BACKENDS.len()];
            let mut limits = Vec::new();
            for round in 0..plan.rounds {
                let ways: &[Loop] = if medium.direct { &[Loop::IoUring] } else { &[Loop::Sync, Loop::Map] };
                let rates = ways.iter().map(|way| bench.limit_first(*way, DEPTH, count, round as u64));
                limits.push(rates.map(|sample| sample.score.per_second / 1e3).fold(0.0, f64::max));
                for turn in 0..BACKENDS.len() {
                    let index = (turn + round) % BACKENDS.len();
                    let command = format!("passes {DEPTH} {count} {round}");
                    let point = Point::one_queue(Pattern::RandomWrite, DEPTH);
                    let (answer, cpu) = bench.with_running(BACKENDS[index].0, point, |running| {
                        running.asked(&command, Place::Client)
                    });
                    let (first, later) = answer.split_once(' ').unwrap();
                    let [first, later] = [first, later].map(|rate| rate.parse::<f64>().unwrap() / 1e3);
                    samples[index].push([first, later, cpu * 1e6 / (count * 4) as f64]);
                }
            }
            let row = |of: usize| -> Vec<_> {
                samples.iter().map(|samples| Some(median(samples.iter().map(|sample| sample[of])))).collect()
            };
            let mut rates = row(0);
            rates.push(Some(median(limits)));
            let label = format!("{}, {what}", medium.name);
            let said: Vec<_> = rates.iter().flatten().copied().map(short).collect();
            progress(&format!("first writes, {label}: {} kIOPS", said.join(" / ")));
            first.row(&label, rates);
            again.row(&label, row(1));
            cost.row(&label, row(2));
        }
    }
    vec![first, again, cost]
}
