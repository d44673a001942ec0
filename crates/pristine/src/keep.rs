//! `keep`: what a session wrote, as an image to look at.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use indicatif::BinaryBytes;
use session_disk::Portion;

use crate::args::DiskArgs;
use crate::commands::{amount, seconds, text};
use crate::failure::{Failure, was_stopped};
use crate::progress::Progress;
use crate::signals::StopOnSignal;

pub(crate) const EXAMPLES: &str = "\
Examples:
  pristine session hold --disk vm1.raw     # before the session ends, or soon after
  pristine session end --disk vm1.raw      # or the guest shuts down
  pristine keep --disk vm1.raw --to monday.qcow2
  pristine session release --disk vm1.raw  # now the disk is restored
  qemu-img info --backing-chain monday.qcow2
  guestfish --ro -a monday.qcow2 -i
  qemu-img create -f qcow2 -F qcow2 -b monday.qcow2 work.qcow2

The image holds what differs from the base, in pieces of 64 KiB (so that small writes all over the disk take more room in it \
than they wrote), and names the base as its backing file, by its path: it is of use as long as the base stays there, \
unchanged. Open it read-only, or work on another overlay of it.

What can be kept is what the last session wrote, until the first block of it may be restored: while the disk is held \
(`pristine status`), also beside the server that holds it; or, when no server runs, as long as nothing was restored and \
the host was not restarted. What earlier sessions left on the disk is not in the image: the last one never saw it. Of a \
disk of `serve --reset-on never` it is what all sessions have changed.";

#[derive(Debug, Args)]
pub(crate) struct KeepArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// The image to make, qcow2; nothing may be there
    #[arg(long, value_name = "OUT.qcow2")]
    to: PathBuf,
    /// The number of the session that is meant: another one is refused
    #[arg(long, value_name = "NUMBER")]
    session: Option<u64>,
    /// All in which the disk differs from its base, of whichever session: for a disk whose logs can't be trusted, or
    /// that is partly restored
    #[arg(long, conflicts_with = "session")]
    whole_disk: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn keep(args: &KeepArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let started = Instant::now();
    let options = args.disk.options();
    let portion = match args.session {
        _ if args.whole_disk => Portion::WholeDisk,
        Some(number) => Portion::Session(number),
        None => Portion::LastSession,
    };
    let mut bar = None;
    let mut progress = |done, total| bar.get_or_insert_with(|| Progress::new("keeping", total)).set(done);
    let kept = session_disk::keep(&options, portion, &args.to, &stop, &mut progress);
    drop(bar);
    let kept = kept.map_err(|error| match error {
        error if was_stopped(&stop, &error) => Failure::new("stopped; nothing was kept"),
        error => error.into(),
    })?;
    let bytes = std::fs::metadata(&args.to).map_or(0, |metadata| metadata.len());
    if args.json {
        let report = serde_json::json!({
            "to": text(&args.to),
            "session": kept.session,
            "block_size": blocks::BLOCK_SIZE,
            "blocks": kept.blocks,
            "differing_blocks": kept.differing_blocks,
            "size": kept.size,
            "bytes": bytes,
            "base": text(&kept.base),
        });
        say!("{report}");
        return Ok(ExitCode::SUCCESS);
    }
    let what = match kept.session {
        Some(number) => format!("session {number}"),
        None if args.whole_disk => "all that differs from the base".into(),
        None => "what its sessions changed".into(),
    };
    say!(
        "{}: {what} kept in {}, {} in {}",
        options.disk.display(),
        args.to.display(),
        BinaryBytes(bytes),
        seconds(started.elapsed())
    );
    say!("written  {}, of which {} differ from the base", amount(kept.blocks), kept.differing_blocks);
    say!("base     {}: needed unchanged, at this path", kept.base.display());
    Ok(ExitCode::SUCCESS)
}
