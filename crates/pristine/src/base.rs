//! `base seal`, `base info` and `base verify`; `base list` is in `base_list`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use base_image::{BadChunk, BaseError, BaseImage, CHUNK_SIZE, Seal, Trust, manifest_path};
use indicatif::BinaryBytes;

use crate::args::{BaseArgs, BaseCommand, BaseImageArgs};
use crate::base_list;
use crate::commands::seconds;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::signals::StopOnSignal;

/// How many bad chunks are printed.
const CHUNKS_SHOWN_MAX: usize = 20;

pub(crate) fn run(args: &BaseArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        BaseCommand::Seal(args) => seal(args),
        BaseCommand::Info(args) => info(args),
        BaseCommand::Verify(args) => verify(args),
        BaseCommand::List(args) => base_list::run(args),
    }
}

fn real_path(base: &Path) -> Result<PathBuf, Failure> {
    std::fs::canonicalize(base)
        .map_err(|error| Failure::new(format!("cannot open base image {}: {error}", base.display())))
}

/// Opens a base as it is named; `seal`: what it was sealed as counts.
fn open(args: &BaseImageArgs, path: &Path, seal: Option<&Seal>) -> Result<BaseImage, Failure> {
    let format = args.format.base_format.or(seal.map(Seal::format));
    let trust = Trust::Directories(&args.format.backing_dir);
    BaseImage::open(path, format, trust).map_err(|error| failure(&error))
}

fn failure(error: &BaseError) -> Failure {
    match error {
        BaseError::Stopped => Failure::new("stopped; nothing was changed"),
        error => Failure::of(error),
    }
}

fn seal(args: &BaseImageArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let started = Instant::now();
    let path = real_path(&args.base)?;
    let base = open(args, &path, None)?;
    let mut progress = Progress::new("sealing", base.size());
    let root =
        base_image::seal(&base, &stop, &mut |done| progress.set(done)).map_err(|error| failure(&error))?;
    progress.finish();
    if args.json {
        say!("{}", report(&base, Some(&root.to_string()))?);
    } else {
        let (size, took) = (BinaryBytes(base.size()), seconds(started.elapsed()));
        say!("{}: {size}, {}, sealed in {took}", path.display(), base.format());
        say!("root     {root}");
    }
    Ok(ExitCode::SUCCESS)
}

fn report(base: &BaseImage, root: Option<&str>) -> Result<serde_json::Value, Failure> {
    let files = base.paths().map_err(|error| failure(&error))?;
    Ok(serde_json::json!({
        "base": base.path(),
        "format": base.format(),
        "size": base.size(),
        "files": files,
        "chunk_size": CHUNK_SIZE,
        "root": root,
    }))
}

fn info(args: &BaseImageArgs) -> Result<ExitCode, Failure> {
    let path = real_path(&args.base)?;
    let seal = Seal::of(&path).map_err(|error| failure(&error))?;
    let base = open(args, &path, seal.as_ref())?;
    let root = seal.as_ref().map(|seal| seal.root().to_string());
    if args.json {
        say!("{}", report(&base, root.as_deref())?);
        return Ok(ExitCode::SUCCESS);
    }
    say!("base     {}, {}, {}", path.display(), base.format(), BinaryBytes(base.size()));
    for file in base.paths().map_err(|error| failure(&error))?.iter().skip(1) {
        say!("  on     {}", file.display());
    }
    match root {
        Some(root) => say!("sealed   {root}"),
        None => say!("sealed   no: `pristine base seal` does"),
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(args: &BaseImageArgs) -> Result<ExitCode, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let _signals = StopOnSignal::start(Arc::clone(&stop), || ())?;
    let path = real_path(&args.base)?;
    let seal = Seal::of(&path).map_err(|error| failure(&error))?.ok_or_else(|| {
        let manifest = manifest_path(&path);
        Failure::new(format!(
            "base image {} is not sealed: {} does not exist",
            path.display(),
            manifest.display()
        ))
        .with_hint(format!("seal it with `pristine base seal {}`", path.display()))
    })?;
    let base = open(args, &path, Some(&seal))?.sealed(seal).map_err(|error| failure(&error))?;
    let mut progress = Progress::new("verifying", base.size());
    let bad = base.bad_chunks(&stop, &mut |done| progress.set(done)).map_err(|error| failure(&error))?;
    progress.finish();
    if bad.is_empty() && !args.json {
        say!("{}: every byte is as it was sealed", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    report_bad(&path, &bad, args.json)
}

/// Says which chunks of a base are not as they were sealed.
pub(crate) fn report_bad(base: &Path, bad: &[BadChunk], json: bool) -> Result<ExitCode, Failure> {
    if json {
        let chunks: Vec<[u64; 2]> = bad.iter().map(|chunk| [chunk.offset, chunk.len]).collect();
        say!("{}", serde_json::json!({ "base": base, "as_sealed": bad.is_empty(), "bad_chunks": chunks }));
    } else {
        say!("{}: {} chunks are not as they were sealed:", base.display(), bad.len());
        for chunk in bad.iter().take(CHUNKS_SHOWN_MAX) {
            say!("  byte offset {}, {} bytes: {}", chunk.offset, chunk.len, chunk.why);
        }
        let more = bad.len().saturating_sub(CHUNKS_SHOWN_MAX);
        if more > 0 {
            say!("  and {more} more; --json lists all");
        }
    }
    Ok(if bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
