//! `provision`, `restore`, `verify` and `status`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blockio::{File, OpenOptions};
use blocks::BLOCK_SIZE;
use indicatif::BinaryBytes;
use session_disk::{Basis, Changes, DiskOptions, DiskState, Error, ProvisionOptions, SessionDisk, Status};

use crate::args::{ProvisionArgs, ReportArgs, RestoreArgs, VerifyArgs};
use crate::base;
use crate::copies::{self, by_way};
use crate::failure::{Failure, was_stopped};
use crate::progress::Progress;
use crate::session;
use crate::signals::StopOnSignal;

/// How many differing runs `verify` prints.
const RUNS_SHOWN_MAX: usize = 20;

/// A time as an operator reads it.
pub(crate) fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// Blocks as an operator reads them.
pub(crate) fn amount(blocks: u64) -> String {
    format!("{blocks} blocks ({})", BinaryBytes(blocks * BLOCK_SIZE))
}

/// Bytes of a file or block device; 0 where that can't be told.
pub(crate) fn bytes_of(path: &Path) -> u64 {
    File::open(path, OpenOptions::default()).and_then(|file| file.size()).unwrap_or(0)
}

/// A path in JSON, which has no other text than UTF-8: what is none is replaced.
pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The same of several.
pub(crate) fn texts(paths: &[PathBuf]) -> Vec<String> {
    paths.iter().map(|path| text(path)).collect()
}

pub(crate) fn provision(args: &ProvisionArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let options = ProvisionOptions {
        base: args.format.of(&args.base),
        disk: DiskOptions { reflink: args.reflink.allowed(), ..args.disk.options() },
        size: args.size,
        adopt: args.adopt,
    };
    let started = Instant::now();
    let made = session_disk::provision(&options).map_err(|error| match error {
        error @ Error::Base(_) if was_stopped(&stop, &error) => Failure::new("stopped; nothing was made"),
        error => error.into(),
    })?;
    let disk = options.disk.disk.display();
    let size = BinaryBytes(made.size);
    if args.lazy {
        say!(
            "{disk}: {size}, ready to be served; {} to be filled in the background",
            amount(made.pending_blocks)
        );
        return Ok(ExitCode::SUCCESS);
    }
    let pending = made.pending_blocks;
    // Held until what was made is removed, if it has to be: nobody may take the disk in between.
    let result =
        SessionDisk::open(&options.disk).map(|opened| (drain(&opened, "provisioning", &stop), opened));
    let (error, removed) = match result {
        Ok((Ok(_), opened)) => {
            let (filled, time) = (amount(pending), seconds(started.elapsed()));
            say!("{disk}: {size}, pristine; filled {filled} in {time}: {}", by_way(opened.copied()));
            return Ok(ExitCode::SUCCESS);
        }
        Ok((Err(error), opened)) => {
            let _ = opened.stop();
            (error, made.undo())
        }
        // Somebody else has it by now.
        Err(error @ Error::InUse { .. }) => (error, false),
        Err(error) => (error, made.undo()),
    };
    Err(match error {
        Error::Stopped if removed => {
            Failure::new("stopped before the disk was provisioned; what was made is removed")
        }
        Error::Stopped => {
            Failure::new(format!("{disk} is provisioned, but was stopped before it was filled"))
                .with_hint("`pristine restore --disk DISK` goes on, or `pristine serve`, in the background")
        }
        error => error.into(),
    })
}

pub(crate) fn restore(args: &RestoreArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let started = Instant::now();
    let mut options = DiskOptions { reflink: args.reflink.allowed(), ..args.disk.options() };
    if args.discard_kept {
        options.changes = Changes::GiveUp;
    }
    let status = session_disk::status(&options)?;
    // A held disk is left alone; that the drain refuses it is not enough, for opening settles logs.
    if let Some(reason) = status.held {
        let named = options.paths().arguments();
        return Err(Error::Held { disk: options.disk, named, reason }.into());
    }
    if let Some(vm) = status.session_owner_pid.filter(|_| status.server_pid.is_none()) {
        let disk = options.disk.display();
        log::warn!(
            "{disk}: its session is ended although its VM, process {vm}, runs: that VM loses its disk"
        );
    }
    let disk = SessionDisk::open(&options)?;
    let restored = drain(&disk, "restoring", &stop).map_err(|error| match error {
        Error::Stopped => {
            let left = amount(disk.pending_blocks());
            Failure::new(format!("stopped; {left} of {} are still to be restored", options.disk.display()))
                .with_hint(
                    "`pristine restore --disk DISK` goes on, or the next `pristine serve`, in the background",
                )
        }
        error => error.into(),
    })?;
    say!(
        "{}: pristine; restored {} in {}: {}",
        options.disk.display(),
        amount(restored),
        seconds(started.elapsed()),
        by_way(disk.copied())
    );
    Ok(ExitCode::SUCCESS)
}

/// Says so, if nobody knows what the last session has changed but where it meant to. `keeps`: that is not restored.
pub(crate) fn warn_of_intents(basis: &Basis, keeps: bool) {
    if *basis == Basis::Intents {
        let why = "the host went down during a session, or could not write its data back";
        let what = if keeps { "count as changed" } else { "are restored" };
        log::warn!("{why}: all regions that it may have touched {what}");
    }
}

/// Restores all, with a progress bar, and gives the disk up.
pub(crate) fn drain(disk: &SessionDisk, what: &'static str, stop: &AtomicBool) -> Result<u64, Error> {
    let pending = disk.pending_blocks();
    warn_of_intents(disk.basis(), disk.keeps_changes());
    let mut progress = Progress::new(what, pending * BLOCK_SIZE);
    let restored = disk.drain(stop, &mut |left| progress.set(pending.saturating_sub(left) * BLOCK_SIZE));
    // Also of a drain that failed: what is left is noted.
    let stopped = disk.stop();
    let restored = restored?;
    stopped?;
    Ok(restored)
}

pub(crate) fn verify(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let (deep, args) = (args.deep, &args.report);
    let options = args.disk.options();
    let total = bytes_of(&options.disk);
    let failure = |error| match error {
        error @ (Error::Base(_) | Error::Stopped) if was_stopped(&stop, &error) => {
            Failure::new("stopped before all was read; nothing was found out")
        }
        error => Failure::from(error),
    };
    if deep {
        let mut progress = Progress::new("verifying the base", total);
        let bad = session_disk::verify_base(&options, &stop, &mut |done| progress.set(done));
        let bad = bad.map_err(failure)?;
        progress.finish();
        if !bad.is_empty() {
            // What is read of them fails, so there is nothing to compare the disk with.
            let base = session_disk::status(&options)?.base;
            return base::report_bad(base.as_path(), &bad, args.json);
        }
    }
    let mut progress = Progress::new("verifying", total);
    let found = session_disk::verify(&options, &stop, &mut |done| progress.set(done));
    let found = found.map_err(failure)?;
    progress.finish();
    let disk = options.disk.display();
    if args.json {
        let extents: Vec<[u64; 2]> = found.differing.iter().map(|run| [run.first(), run.count()]).collect();
        let report = serde_json::json!({
            "equal": found.is_equal(),
            "block_size": BLOCK_SIZE,
            "blocks": found.blocks,
            "differing_blocks": found.differing_blocks(),
            "extents": extents,
        });
        say!("{report}");
    } else if found.is_equal() {
        say!("{disk}: every byte equals the base");
    } else {
        say!("{disk}: {} differ from the base:", amount(found.differing_blocks()));
        for run in found.differing.iter().take(RUNS_SHOWN_MAX) {
            say!("  block {} to {}, byte offset {}", run.first(), run.end() - 1, run.first() * BLOCK_SIZE);
        }
        let more = found.differing.len().saturating_sub(RUNS_SHOWN_MAX);
        if more > 0 {
            say!("  and {more} more extents; --json lists all");
        }
    }
    Ok(if found.is_equal() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn status(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let options = args.disk.options();
    let mut status = session_disk::status(&options)?;
    session::ask_server(&options, &mut status);
    if args.json {
        let json = serde_json::to_string(&status)
            .map_err(|error| Failure::new(format!("cannot render the status: {error}")))?;
        say!("{json}");
    } else {
        print_status(&options, &status);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_status(options: &DiskOptions, status: &Status) {
    let state = match status.state {
        DiskState::Pristine => "pristine: every block is the base's",
        DiskState::InSession => "in session",
        DiskState::Restoring => "restoring",
        DiskState::Interrupted => "interrupted: `pristine restore` or the next `pristine serve` goes on",
        DiskState::Kept => "kept: changed by sessions, until `pristine restore --discard-kept`",
        DiskState::Held => "held: kept as the session left it until `pristine session release`",
    };
    say!("disk     {}, {}", options.disk.display(), BinaryBytes(status.size));
    say!("base     {}, {}", status.base.display(), status.base_format);
    for file in &status.base_backing {
        say!("  on     {}", file.display());
    }
    if let Some(root) = &status.base_root {
        say!("sealed   {root}");
    }
    say!("state    {state}");
    say!("dirty    {}", amount(status.dirty_blocks));
    say!("pending  {}", amount(status.pending_blocks));
    if let Some(pid) = status.server_pid {
        say!("server   process {pid}");
    }
    if let Some(pid) = status.silent_pid {
        let paths = options.paths();
        let dir = paths.runtime_dir().display();
        say!(
            "warning  process {pid} has the disk and says nothing of it in {dir}: it is starting or ending, or its \
             --runtime-dir is another one; what is said here is what is known without it"
        );
    }
    if let Some(report) = &status.copies {
        say!("drain    {}", copies::line(report));
    }
    if let Some(pid) = status.session_owner_pid {
        say!("session  of process {pid}");
    }
    if let Some(reason) = &status.held {
        let begins = if status.state == DiskState::Held { "" } else { ", when the session ends" };
        say!("held     {reason}{begins}");
    }
    if status.drain_failing {
        let when = status.drain_next_attempt_unix_ms.map_or_else(String::new, |at| {
            let left = (UNIX_EPOCH + Duration::from_millis(at)).duration_since(SystemTime::now());
            format!(" in {}", seconds(left.unwrap_or_default()))
        });
        let why = status.drain_error.as_deref().unwrap_or("see the server's log");
        say!("warning  restoring fails and is tried again{when}: {why}");
    }
    if let Some(trouble) = &status.base_trouble {
        say!("warning  {trouble}");
    }
    if let Some(why) = &status.distrust {
        let count_as = if status.state == DiskState::Kept { "changed" } else { "pending" };
        say!("warning  {why}: all blocks count as {count_as}");
    }
}
