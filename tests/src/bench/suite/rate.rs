//! How fast requests are answered that come at a fixed rate.

use super::{Plan, progress};
use crate::bench::backend::{Backend, Bench, Sample};
use crate::bench::median;
use crate::bench::points::Point;
use crate::bench::report::{Better, Role, Section, short};
use crate::client::Pattern;
use crate::lab::Lab;

const BACKENDS: [Backend; 3] = [Backend::Pristine, Backend::Daemon("threads"), Backend::Daemon("io_uring")];
const PATTERNS: [Pattern; 2] = [Pattern::RandomRead, Pattern::Mix];

pub(super) fn compare(plan: &Plan) -> Vec<Section> {
    let section = |what: &str, unit| {
        let mut section = Section::new(format!("{what} at a fixed rate"), unit, Better::Lower);
        for backend in BACKENDS {
            let role = if backend == Backend::Pristine { Role::Ours } else { Role::Peer };
            section = section.column(backend.to_string(), role);
        }
        section.column("kIOPS", Role::Info)
    };
    let mut half = section("Time of half of the requests", "microseconds").note(
        "Requests of 4 KiB on one queue come at a third of the rate that the slowest backend reaches at depth 32, \
         whatever becomes of them; their times count from when they should have come. The client polls.",
    );
    let mut most = section("Time of 99 % of the requests", "microseconds");
    let mut cost = section("Processor time for a request", "microseconds");
    for medium in plan.media().into_iter().filter(|medium| !medium.direct) {
        let bench = Bench::new(Lab::in_dirs(&medium.dir, &plan.tmpfs), plan.size, false);
        for pattern in PATTERNS {
            let point = Point::one_queue(pattern, 32);
            let slowest = BACKENDS.map(|backend| bench.measure(backend, point, plan.time).score.per_second);
            let rate = slowest.into_iter().fold(f64::INFINITY, f64::min) / 3.0;
            let mut samples: [Vec<Sample>; BACKENDS.len()] = Default::default();
            for round in 0..plan.rounds {
                for turn in 0..BACKENDS.len() {
                    let index = (turn + round) % BACKENDS.len();
                    let point = Point { depth: 128, ..point };
                    let sample = bench.with_running(BACKENDS[index], point, |running| {
                        running.load(point, plan.time, Some(rate))
                    });
                    samples[index].push(sample);
                }
            }
            let label = format!("{}, {}", medium.name, pattern.name());
            progress(&format!("{label} at {} kIOPS", short(rate / 1e3)));
            let row = |of: &dyn Fn(&Sample) -> f64| {
                let values = samples.iter().map(|samples| Some(median(samples.iter().map(of))));
                values.chain([Some(rate / 1e3)]).collect()
            };
            half.row(&label, row(&|sample| sample.score.p50_us));
            most.row(&label, row(&|sample| sample.score.p99_us));
            cost.row(&label, row(&|sample| sample.cpu_us));
        }
    }
    vec![half, most, cost]
}
