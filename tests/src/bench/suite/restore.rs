//! A restore against a copy of the whole disk, until all is durable.

use std::process::Command;
use std::time::Instant;

use super::{Plan, progress};
use crate::bench::machine::{settle, warm};
use crate::bench::median;
use crate::bench::report::{Better, Role, Section, short};
use crate::images;
use crate::lab::Lab;
use crate::program::run;
use crate::remote::Remote;

pub(super) fn compare(plan: &Plan) -> Vec<Section> {
    let mut section = Section::new("Reset of a disk", "seconds", Better::Lower)
        .column("pristine restore", Role::Ours)
        .column("copy of the disk", Role::Peer)
        .note(format!(
            "A disk of {} MiB, of which a session has changed 4 KiB blocks, scattered; the changes are durable, the \
             base is in memory. Both until durable: `pristine restore`, and `dd bs=1M conv=fsync` over an old copy.",
            plan.restore_size >> 20
        ));
    let lab = Lab::in_dirs(&plan.disk, &plan.tmpfs);
    images::dense(&lab.base(), plan.restore_size, 1);
    lab.provision(&[]);
    let blocks = plan.restore_size / images::BLOCK;
    for (label, dirty) in [
        ("1 % changed".to_owned(), blocks / 100),
        (format!("{} MiB changed", plan.restore_dirty >> 20), plan.restore_dirty / images::BLOCK),
    ] {
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..plan.rounds {
            times[0].push(restore(&lab, dirty, round));
            times[1].push(copy(&lab));
            progress(&format!(
                "{label}: restored in {} s, copied in {} s",
                short(times[0][round]),
                short(times[1][round])
            ));
        }
        section.row(label, times.into_iter().map(|times| Some(median(times))).collect());
    }
    lab.run("verify", &[""; 0]).ok();
    vec![section]
}

/// Seconds of a restore of so many blocks.
fn restore(lab: &Lab, dirty: u64, round: usize) -> f64 {
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask(&format!("scatter {dirty} {round}"));
    server.stop();
    client.kill();
    settle(&lab.disk());
    warm(&lab.base());
    let begin = Instant::now();
    lab.run("restore", &[""; 0]).ok();
    begin.elapsed().as_secs_f64()
}

/// Seconds of a copy of the base over the last copy.
fn copy(lab: &Lab) -> f64 {
    let copied = lab.path("copy");
    if !copied.exists() {
        images::dense(&copied, 1 << 20, 2);
    }
    settle(&copied);
    warm(&lab.base());
    let mut copy = Command::new("dd");
    copy.args(["bs=1M", "conv=fsync,notrunc", "status=none"]);
    copy.arg(format!("if={}", lab.base().display())).arg(format!("of={}", copied.display()));
    let begin = Instant::now();
    run(&mut copy).ok();
    begin.elapsed().as_secs_f64()
}
