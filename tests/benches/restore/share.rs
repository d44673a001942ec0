//! Ways to copy, and what sharing blocks with the base makes of a restore: parts `ways` and `share`.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pristine_tests::bench::machine::kind_of;
use pristine_tests::bench::median;
use pristine_tests::client::{Way, copy};
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::random::scattered;
use session_disk::{DiskOptions, ProvisionOptions, SessionDisk};

use super::{BLOCK, Cost, DEPTH, Sizes, cost_of, scribble, session};

/// So many bytes of the disk, in runs of this many blocks, in random order.
fn parts(sizes: &Sizes, run: u64, seed: u64) -> Vec<(u64, u64)> {
    let len = run * BLOCK;
    scattered(seed, sizes.dirty / len, sizes.size / len).into_iter().map(|at| (at * len, len)).collect()
}

fn seconds(costs: &[Cost]) -> String {
    let of = |of: fn(&Cost) -> f64| median(costs.iter().map(of));
    format!("{:.3} ({:.2})", of(|cost| cost.elapsed), of(|cost| cost.cpu))
}

/// Tight loops that copy the same parts of the same files, and sync once. The disk is in the page cache; the base is, or not.
pub(super) fn ways(dirs: &[PathBuf], sizes: &Sizes, runs: &[u64]) {
    println!("| directory | runs | the base is | io_uring, s (CPU s) | pread, pwrite | copy_file_range |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for dir in dirs {
        let lab = Lab::in_dir(dir);
        images::dense(&lab.base(), sizes.size, 1);
        std::fs::copy(lab.base(), lab.disk()).unwrap();
        let base = File::open(lab.base()).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(lab.disk()).unwrap();
        for (run, cached) in runs.iter().flat_map(|run| [(*run, true), (*run, false)]) {
            let mut costs: [Vec<Cost>; 3] = Default::default();
            for round in 0..sizes.rounds {
                let mut parts = parts(sizes, run, round as u64 + 1);
                parts.sort_unstable();
                for turn in 0..3 {
                    let who = (turn + round) % 3;
                    scribble(&file, &parts);
                    file.sync_all().unwrap();
                    if !cached {
                        rustix::fs::fadvise(&base, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    }
                    let way = [Way::IoUring(DEPTH as u32), Way::Plain, Way::CopyRange][who];
                    costs[who].push(cost_of(|| copy(&base, &file, &parts, way).unwrap()));
                }
            }
            let cells = costs.each_ref().map(|costs| seconds(costs)).join(" | ");
            let there = if cached { "cached" } else { "not" };
            println!("| {} | {} KiB | {there} | {cells} |", kind_of(dir), (run * BLOCK) >> 10);
        }
        images::assert_equal(&lab.disk(), &lab.base());
    }
    println!();
}

/// The same session's changes, restored by sharing and by copying, in turn; its data is on the medium, or still to be written. And
/// what the next session's first writes to the same blocks cost then, synced.
pub(super) fn shares(dirs: &[PathBuf], sizes: &Sizes, runs: &[u64]) {
    println!(
        "| directory | dirty | before | drain that shares, s (CPU s) | that copies | ratio | then write again, shared | copied |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for dir in dirs {
        shares_in(dir, sizes, runs);
    }
    println!();
}

fn shares_in(dir: &Path, sizes: &Sizes, runs: &[u64]) {
    let lab = Lab::in_dir(dir);
    images::dense(&lab.base(), sizes.size, 1);
    let options = DiskOptions { runtime_dir: Some(lab.runtime().to_owned()), ..DiskOptions::new(lab.disk()) };
    let without = DiskOptions { reflink: false, ..options.clone() };
    session_disk::provision(&ProvisionOptions::new(lab.base(), without.clone())).unwrap();
    let all = |options: &DiskOptions, parts: Option<&[(u64, u64)]>, synced: bool| {
        let disk = SessionDisk::open(options).unwrap();
        let file = OpenOptions::new().write(true).open(lab.disk()).unwrap();
        if let Some(parts) = parts {
            session(&disk, parts);
        }
        if synced {
            file.sync_all().unwrap();
        }
        let cost = cost_of(|| {
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        });
        disk.stop().unwrap();
        cost
    };
    all(&without, None, false);
    let again = |parts: &[(u64, u64)]| {
        let disk = SessionDisk::open(&options).unwrap();
        let file = OpenOptions::new().write(true).open(lab.disk()).unwrap();
        let cost = cost_of(|| {
            session(&disk, parts);
            file.sync_data().unwrap();
        });
        disk.stop().unwrap();
        cost
    };
    for &run in runs {
        for synced in [true, false] {
            let (mut drains, mut writes): ([Vec<Cost>; 2], [Vec<Cost>; 2]) = Default::default();
            for round in 0..sizes.rounds {
                let parts = parts(sizes, run, round as u64 + 1);
                for turn in 0..2 {
                    let who = (turn + round) % 2;
                    let way = [&options, &without][who];
                    drains[who].push(all(way, Some(&parts), synced));
                    writes[who].push(again(&parts));
                    // Back to blocks of its own.
                    all(&without, None, false);
                }
            }
            let ratio = (0..sizes.rounds).map(|round| drains[1][round].elapsed / drains[0][round].elapsed);
            println!(
                "| {} | {} MiB in {} KiB | {} | {} | {} | {:.2} | {} | {} |",
                kind_of(dir),
                sizes.dirty >> 20,
                (run * BLOCK) >> 10,
                if synced { "on the medium" } else { "in memory" },
                seconds(&drains[0]),
                seconds(&drains[1]),
                median(ratio),
                seconds(&writes[0]),
                seconds(&writes[1]),
            );
        }
    }
    images::assert_equal(&lab.disk(), &lab.base());
}
