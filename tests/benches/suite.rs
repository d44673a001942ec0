//! The comparison that `ci/bench` runs: see there, and README.md.

use std::path::PathBuf;
use std::time::Duration;

use pristine_tests::bench::options::{Values, refuse};
use pristine_tests::bench::suite::{Plan, Wanted, run, store};

fn main() {
    let mut wanted = Wanted::default();
    let (mut tmpfs, mut disk, mut out) = (None, None, None);
    let (mut quick, mut rounds, mut seconds) = (false, None, None);
    let mut words = Values::new(std::env::args().skip(1).collect());
    while let Some(word) = words.word() {
        match word.as_str() {
            "--tmpfs" => tmpfs = Some(PathBuf::from(words.value())),
            "--disk" => disk = Some(PathBuf::from(words.value())),
            "--out" => out = Some(PathBuf::from(words.value())),
            "--quick" => quick = true,
            "--rounds" => rounds = Some(words.parsed()),
            "--seconds" => seconds = Some(words.parsed()),
            "--bench" => {} // cargo's own
            option if option.starts_with('-') => refuse(&format!("unknown option {option}")),
            point => wanted.add(point).unwrap_or_else(|why| refuse(&why)),
        }
    }
    let (Some(tmpfs), Some(disk), Some(out)) = (tmpfs, disk, out) else {
        refuse("--tmpfs DIR, --disk DIR and --out DIR are needed")
    };
    let mut plan = if quick { Plan::quick(tmpfs, disk) } else { Plan::full(tmpfs, disk) };
    plan.wanted = wanted;
    plan.rounds = rounds.unwrap_or(plan.rounds);
    plan.time = seconds.map_or(plan.time, Duration::from_secs_f64);
    let sections = run(&plan);
    println!("{}", store(&sections, &plan, &out));
}
