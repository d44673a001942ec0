//! Rates, and what a request costs, at every point of one medium.

use super::{Medium, Plan, progress};
use crate::bench::backend::{Backend, Bench, Sample};
use crate::bench::median;
use crate::bench::points::Point;
use crate::bench::report::{Better, Role, Section, short};
use crate::client::Loop;
use crate::lab::Lab;

pub(super) fn compare(plan: &Plan, medium: &Medium, points: &[Point]) -> Vec<Section> {
    let bench = Bench::new(Lab::in_dirs(&medium.dir, &plan.tmpfs), plan.size, medium.direct);
    let backends = backends(medium);
    let mut samples = vec![vec![Vec::new(); backends.len()]; points.len()];
    for round in 0..plan.rounds {
        for (point, samples) in points.iter().zip(&mut samples) {
            let mut said = String::new();
            // Who is the first changes from round to round.
            for turn in 0..backends.len() {
                let index = (turn + round) % backends.len();
                let (backend, _) = backends[index];
                if measured(backend, *point) {
                    let sample = bench.measure(backend, *point, plan.time);
                    said += &format!("; {backend}: {}", short(sample.score.per_second / 1e3));
                    samples[index].push(sample);
                }
            }
            progress(&format!("{}, round {}, {point}{said}", medium.name, round + 1));
        }
    }
    sections(medium, &backends, points, &samples)
}

fn backends(medium: &Medium) -> Vec<(Backend, Role)> {
    let mut backends = vec![
        (Backend::Pristine, Role::Ours),
        (Backend::Daemon("threads"), Role::Peer),
        (Backend::Daemon("io_uring"), Role::Peer),
    ];
    if medium.direct {
        backends.push((Backend::Daemon("native"), Role::Peer));
    }
    backends.extend([
        (Backend::FreshOverlay, Role::Other),
        (Backend::FullOverlay, Role::Other),
        (Backend::Limit(Loop::Sync), Role::Limit),
        (Backend::Limit(Loop::IoUring), Role::Limit),
    ]);
    if !medium.direct {
        backends.push((Backend::Limit(Loop::Map), Role::Limit));
    }
    backends
}

/// Overlays at one depth only, loops on one queue.
fn measured(backend: Backend, point: Point) -> bool {
    match backend {
        Backend::Pristine | Backend::Daemon(_) => true,
        Backend::FreshOverlay | Backend::FullOverlay => point.depth == 32 && point.queues == 1,
        Backend::Limit(Loop::Sync) => point.queues == 1 && [1, 16].contains(&point.depth),
        Backend::Limit(_) => point.queues == 1,
    }
}

fn sections(
    medium: &Medium,
    backends: &[(Backend, Role)],
    points: &[Point],
    samples: &[Vec<Vec<Sample>>],
) -> Vec<Section> {
    let section = |what: &str, unit, better, note: &str| {
        let mut section = Section::new(format!("{what}, {}", medium.name), unit, better).note(note);
        for (backend, role) in backends {
            section = section.column(backend.to_string(), *role);
        }
        section
    };
    let mut rates = section(
        "Requests a second",
        "kIOPS",
        Better::Higher,
        "Seven of ten requests of a mix are reads. A sequential request has 128 KiB, the others 4 KiB. `x2`: two \
         queues, on both processors like their clients.",
    );
    let mut costs = section(
        "Processor time for a request",
        "microseconds",
        Better::Lower,
        "Of the process, all its threads and the kernel's for its io_uring. Compared with the peer whose rate is the \
         best. `client`: what the client takes for a request to `pristine`, on its own processor.",
    )
    .column("client", Role::Info);
    let mut waits = section("Until half of the requests are answered", "microseconds", Better::Lower, "")
        .column("pristine, 99 %", Role::Info);
    for (point, samples) in points.iter().zip(samples) {
        let all = |of: &dyn Fn(&Sample) -> f64| -> Vec<Option<f64>> {
            let middle = |samples: &Vec<Sample>| Some(median(samples.iter().map(of)));
            samples.iter().map(|samples| if samples.is_empty() { None } else { middle(samples) }).collect()
        };
        rates.row(point.to_string(), all(&|sample| sample.score.per_second / 1e3));
        let against = rates.rows.last().and_then(|row| row.against);
        let mut values = all(&|sample| sample.cpu_us);
        values.push(all(&|sample| sample.score.client_us)[0]);
        costs.row_against(point.to_string(), values, against);
        if point.depth == 1 {
            let mut values = all(&|sample| sample.score.p50_us);
            values.push(all(&|sample| sample.score.p99_us)[0]);
            waits.row_against(point.to_string(), values, against);
        }
    }
    let mut sections = vec![rates, costs, waits];
    sections.retain(|section| !section.rows.is_empty());
    sections
}
