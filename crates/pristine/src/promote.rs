//! `maintain` and `promote`: a session whose changes are kept, and the next generation that is made of them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use base_image::{BaseFormat, CopyWay, Delta, manifest_path};
use clap::Args;
use indicatif::BinaryBytes;
use session_disk::{PromoteOptions, PromoteStep, Promoted};

use crate::args::{DiskArgs, ResetOn, ServeArgs, disk_arguments};
use crate::commands::{amount, seconds, text, texts};
use crate::failure::{Failure, was_stopped};
use crate::progress::Progress;
use crate::serve;
use crate::signals::StopOnSignal;

pub(crate) const MAINTAIN_EXAMPLES: &str = "Example, from one generation of a base to the next:
  pristine provision --base golden-1.raw --disk build.raw
  pristine maintain --disk build.raw --socket-path /run/build.sock --once     (boot a VM, patch it, shut it down)
  pristine promote --disk build.raw --to golden-2.raw
  pristine rebase --disk build.raw --base golden-2.raw --discard-kept     (its changes are the new base's)
  pristine rebase --disk vm1.raw --base golden-2.raw

It is `pristine serve --reset-on never` by another name: what a VM writes stays for the next one, a flush of its makes it \
durable, and nothing is restored until `pristine restore --discard-kept`. With --once the server ends with the first session.";

pub(crate) const PROMOTE_EXAMPLES: &str = "Examples:
  pristine promote --disk build.raw --to golden-2.raw
  pristine promote --disk build.raw --to golden-2.qcow2

The disk is one that `pristine maintain` has served, or that is held after a session (`pristine session hold`), and that \
nobody serves now. It stays as it is, with its changes, on the old base.

A raw image is a copy of the old base, which shares its room where the file system can (xfs, btrfs), with what was changed \
written over it; a qcow2 image lies on the old base and holds only that. Its seal (NEWBASE.manifest) and its delta \
(NEWBASE.delta), by which disks are rebased, are written beside it. All of it is made under other names first: NEWBASE is there \
when it is whole, read-only, or not at all; nothing that exists is replaced.

The old base stays as it is, for the disks that use it. If it was not sealed, it is on the way (BASE.manifest).";

#[derive(Debug, Args)]
pub(crate) struct PromoteArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// The image to make; nothing may be there
    #[arg(long, value_name = "NEWBASE")]
    pub(crate) to: PathBuf,
    /// Its format, raw or qcow2 [default: qcow2 if it is named *.qcow2, else that of the old base]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<BaseFormat>,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn maintain(args: &ServeArgs) -> Result<ExitCode, Failure> {
    if args.reset_on == ResetOn::Exit {
        return Err(Failure::usage(
            "maintain keeps what sessions change; to give it up when they end, use `pristine serve`",
        ));
    }
    serve::serve(args)
}

fn name(step: PromoteStep) -> &'static str {
    match step {
        PromoteStep::Sealing => "sealing the old base",
        PromoteStep::Comparing => "comparing with the old base",
        PromoteStep::Writing => "writing the new base",
    }
}

pub(crate) fn run(args: &PromoteArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let started = Instant::now();
    let options = PromoteOptions { disk: args.disk.options(), to: args.to.clone(), format: args.format };
    let mut shown: Option<(PromoteStep, u64, Progress)> = None;
    let result = session_disk::promote(&options, &stop, &mut |step, done, total| {
        let progress = match &mut shown {
            Some((of, for_total, progress)) if (*of, *for_total) == (step, total) => progress,
            // A bar that is finished before the next begins.
            other => {
                *other = None;
                &mut other.insert((step, total, Progress::new(name(step), total))).2
            }
        };
        progress.set(done);
    });
    drop(shown);
    let made = match result {
        Ok(made) => made,
        Err(error) if was_stopped(&stop, &error) => {
            return Err(Failure::new("stopped before the new base was made; what was made of it is removed"));
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        say!("{}", report(&made));
    } else {
        tell(&made, &seconds(started.elapsed()), &args.disk);
    }
    Ok(ExitCode::SUCCESS)
}

fn report(made: &Promoted) -> serde_json::Value {
    let (way, copied) = match made.way {
        CopyWay::Reflinked => ("reflink", 0),
        CopyWay::Copied(bytes) => ("copy", bytes),
        CopyWay::Overlay => ("overlay", 0),
    };
    serde_json::json!({
        "base": text(&made.path),
        "format": made.format,
        "size": made.generation.size,
        "root": made.generation.root,
        "delta": text(&Delta::path_of(&made.path)),
        "changed_blocks": made.blocks,
        "extents": made.extents,
        "blocks_compared": made.blocks_taken,
        "block_size": blocks::BLOCK_SIZE,
        "parent": text(&made.parent),
        "parent_root": made.parent_root,
        "parent_was_sealed_now": made.parent_was_sealed,
        "way": way,
        "copied_bytes": copied,
        "replaced": texts(&made.replaced),
    })
}

fn tell(made: &Promoted, took: &str, disk: &DiskArgs) {
    for path in &made.replaced {
        say!("replaced {}, which a promotion that was interrupted had left", path.display());
    }
    if made.parent_was_sealed {
        say!("sealed {}: {}", made.parent.display(), manifest_path(&made.parent).display());
    }
    let way = match made.way {
        CopyWay::Reflinked => "sharing the old base's room".to_owned(),
        CopyWay::Copied(bytes) => format!("{} copied", BinaryBytes(bytes)),
        CopyWay::Overlay => format!("on {}", made.parent.display()),
    };
    let size = BinaryBytes(made.generation.size);
    say!("{}: {size}, {}, {way}, made in {took}", made.path.display(), made.format);
    say!("root     {}", made.generation.root);
    say!("parent   {} {}", made.parent_root, made.parent.display());
    let (changed, taken) = (amount(made.blocks), made.blocks_taken);
    let runs = if made.extents == 1 { "one extent".into() } else { format!("{} extents", made.extents) };
    say!("delta    {changed} in {runs}, of {taken} blocks that sessions wrote");
    let (name, new) = (disk_arguments(&disk.disk, &disk.dirs), made.path.display());
    say!("{} is as it was, with its changes on the old base:", disk.disk.display());
    say!(
        "  pristine rebase {name} --base {new} --discard-kept     has it on the new one, to go on from there"
    );
    say!("  pristine restore {name} --discard-kept     has it on the old one, without them");
}
