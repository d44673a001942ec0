//! `rebase`: moves a disk to another generation of its base.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use base_image::BaseLocation;
use blocks::BLOCK_SIZE;
use clap::Args;
use session_disk::{DiskOptions, Error, RebaseOptions, Rebased, SessionDisk, Way};

use crate::args::{DiskArgs, FormatArgs, base_location};
use crate::commands::{amount, bytes_of, drain, seconds, warn_of_intents};
use crate::copies::ReflinkArgs;
use crate::failure::{Failure, was_stopped};
use crate::progress::Progress;
use crate::signals::StopOnSignal;

pub(crate) const EXAMPLES: &str = "\
Examples:
  pristine rebase --disk vm1.raw --base golden-2.raw         the next session is on golden-2
  pristine rebase --disk vm1.raw --base golden-1.raw         and back
  pristine rebase --disk vm1.raw --base golden-2.raw --now && pristine verify --disk vm1.raw
  pristine rebase --disk vm1.raw --base golden-2.raw --discard-kept    vm1's own kept session has become golden-2

The disk must not be served: stop its server, rebase, start it again. What differs between the two bases is restored, with what
the last session left, as after any session: by the next server in the background, by `pristine restore`, or with --now at
once. What differs is known by the bases' deltas (BASE.delta) or manifests (`pristine base seal`); where there are none the
disk is compared with the new base, which takes its time. Nothing is left half-done, whatever happens: a disk belongs to
the one base or to the other.";

#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    /// The new base: another generation, an older one, or any image (or NBD export) that is not larger than the disk
    #[arg(long, value_name = "BASE", value_parser = base_location())]
    pub(crate) base: BaseLocation,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// Restore at once what differs, instead of in the background of the next session
    #[arg(long)]
    pub(crate) now: bool,
    /// Give up the changes that sessions of `serve --reset-on never` have made; needed too, and right, where the new
    /// base was made of them
    #[arg(long)]
    pub(crate) discard_kept: bool,
    #[command(flatten)]
    pub(crate) reflink: ReflinkArgs,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &RebaseArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let options = RebaseOptions {
        base: args.format.of(&args.base),
        disk: DiskOptions { reflink: args.reflink.allowed(), ..args.disk.options() },
        discard_kept: args.discard_kept,
    };
    let disk = options.disk.disk.display();
    let rebased = rebase(&options, &stop)?;
    warn_of_intents(&rebased.basis, false);
    if rebased.from.root.is_some() && rebased.to.root.is_none() {
        log::warn!(
            "{} is not sealed as {} is: it is known by its size and times alone; `pristine base seal` and another rebase to it change that",
            rebased.to.path.display(),
            rebased.from.path.display()
        );
    }
    if !args.json {
        say_rebased(&disk.to_string(), &rebased);
    }
    let started = Instant::now();
    let restored = if args.now { Some(restore(&options.disk, &rebased, &stop)?) } else { None };
    match restored {
        _ if args.json => say!("{}", report(&rebased, restored)),
        Some(blocks) => {
            say!("{disk}: pristine; restored {} in {}", amount(blocks), seconds(started.elapsed()));
        }
        None if rebased.pending_blocks > 0 => {
            say!("{disk}: ready to be served; `pristine restore` or the next `pristine serve` restores");
        }
        None => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Moves the disk to its new base; copies nothing.
fn rebase(options: &RebaseOptions, stop: &AtomicBool) -> Result<Rebased, Failure> {
    let disk = &options.disk.disk;
    let total = bytes_of(disk);
    // Shown only where the disk has to be compared: that alone takes its time.
    let mut progress: Option<Progress> = None;
    let result = session_disk::rebase(options, stop, &mut |done| {
        progress.get_or_insert_with(|| Progress::new("comparing", total)).set(done);
    });
    drop(progress);
    result.map_err(|error| match error {
        error @ (Error::Base(_) | Error::Stopped) if was_stopped(stop, &error) => {
            Failure::new(format!("stopped; {} is on its old base, as before", disk.display()))
        }
        Error::InUse { .. } => Failure::of(&error).with_hint(
            "stop its server, rebase, and start the server again: its first session is on the new base at once",
        ),
        Error::Kept { .. } => Failure::of(&error).with_hint(
            "go on with them with `pristine serve --reset-on never`, or give them up with --discard-kept, which is right \
             where the new base was made of them",
        ),
        error => error.into(),
    })
}

/// Restores all that is pending. Whatever happens, the disk is on its new base.
fn restore(options: &DiskOptions, rebased: &Rebased, stop: &AtomicBool) -> Result<u64, Failure> {
    if rebased.pending_blocks == 0 {
        return Ok(0);
    }
    let result = SessionDisk::open(options).and_then(|disk| drain(&disk, "restoring", stop));
    result.map_err(|error| {
        Failure::of(&error).with_hint(format!(
            "{} is on its new base; `pristine restore` or the next `pristine serve` goes on",
            options.disk.display()
        ))
    })
}

fn say_rebased(disk: &str, rebased: &Rebased) {
    let Rebased { from, to, way, .. } = rebased;
    say!("{disk}: on {} now, and no longer on {}", to.path.display(), from.path.display());
    say!(
        "{disk}: {} differ ({way}), {} were pending: {} of {} to restore",
        amount(rebased.differing_blocks),
        amount(rebased.pending_before),
        amount(rebased.pending_blocks),
        amount(rebased.blocks)
    );
}

fn report(rebased: &Rebased, restored: Option<u64>) -> serde_json::Value {
    let deltas = match rebased.way {
        Way::Deltas(count) => count,
        _ => 0,
    };
    serde_json::json!({
        "from": rebased.from.path,
        "from_root": rebased.from.root,
        "base": rebased.to.path,
        "base_root": rebased.to.root,
        "found_by": rebased.way.name(),
        "deltas": deltas,
        "block_size": BLOCK_SIZE,
        "blocks": rebased.blocks,
        "differing_blocks": rebased.differing_blocks,
        "pending_before": rebased.pending_before,
        "pending_blocks": rebased.pending_blocks,
        "restored_blocks": restored.unwrap_or(0),
    })
}
