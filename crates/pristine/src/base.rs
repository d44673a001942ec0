//! `base seal`, `base info` and `base verify`; `base list` is in `base_list`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use base_image::layout::Layout;
use base_image::{BadChunk, BaseError, BaseImage, BaseLocation, CHUNK_SIZE, Seal, Trust, manifest_path};
use indicatif::BinaryBytes;

use crate::args::{BaseArgs, BaseCommand, BaseImageArgs, FormatArgs};
use crate::base_list;
use crate::commands::{seconds, text, texts};
use crate::failure::{Failure, was_stopped};
use crate::progress::Progress;
use crate::signals::StopOnSignal;

/// How long a base's server is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
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

fn resolved(base: &BaseLocation) -> Result<BaseLocation, Failure> {
    base.resolved()
        .map_err(|error| Failure::new(format!("cannot open base image {}: {error}", base.display())))
}

/// Opens a base as it is named; `seal`: what it was sealed as counts.
fn open(args: &FormatArgs, base: &BaseLocation, seal: Option<&Seal>) -> Result<BaseImage, Failure> {
    let format = args.base_format;
    let opened = match base {
        BaseLocation::File(path) => {
            let trust = Trust::Directories(&args.backing_dir);
            BaseImage::open(path, format.or(seal.map(Seal::format)), trust)
        }
        BaseLocation::Nbd(uri) => BaseImage::connect(uri, format, None, PATIENCE),
    };
    opened.map_err(|error| failure(&error))
}

/// Where a base's seal is, or is to be.
fn seal_path(args: &FormatArgs, base: &BaseLocation) -> Result<PathBuf, Failure> {
    match (&args.base_manifest, base) {
        (Some(path), _) => Ok(path.clone()),
        (None, BaseLocation::File(path)) => Ok(manifest_path(path)),
        (None, BaseLocation::Nbd(uri)) => Err(Failure::usage(format!(
            "{uri} has no directory for its manifest; name a file of this host with --base-manifest"
        ))),
    }
}

/// What lies where on a base.
pub(crate) fn layout(base: &BaseLocation, args: &FormatArgs) -> Result<Layout, Failure> {
    let location = resolved(base)?;
    let seal = match seal_path(args, &location) {
        Ok(path) => Seal::at(&path).map_err(|error| failure(&error))?,
        // It counts for the format only, and an export has none.
        Err(_) => None,
    };
    open(args, &location, seal.as_ref())?.layout().map_err(|error| failure(&error))
}

/// The same of what may have been stopped.
fn failure_unless(stop: &AtomicBool, error: &BaseError) -> Failure {
    failure(if was_stopped(stop, error) { &BaseError::Stopped } else { error })
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
    let location = resolved(&args.base)?;
    let named = args.format.base_manifest.is_some();
    let path = seal_path(&args.format, &location)?;
    let base = open(&args.format, &location, None)?;
    let mut progress = Progress::new("sealing", base.size());
    let mut tell = |done| progress.set(done);
    let root = match named {
        true => base_image::seal_to(&base, &path, &stop, &mut tell),
        false => base_image::seal(&base, &stop, &mut tell),
    };
    let root = root.map_err(|error| failure_unless(&stop, &error))?;
    progress.finish();
    if args.json {
        say!("{}", report(&base, Some(&root.to_string()))?);
    } else {
        let (size, took) = (BinaryBytes(base.size()), seconds(started.elapsed()));
        say!("{}: {size}, {}, sealed in {took}", location.display(), base.format());
        say!("root     {root}");
    }
    Ok(ExitCode::SUCCESS)
}

fn report(base: &BaseImage, root: Option<&str>) -> Result<serde_json::Value, Failure> {
    let files = base.paths().map_err(|error| failure(&error))?;
    Ok(serde_json::json!({
        "base": text(base.path()),
        "format": base.format(),
        "size": base.size(),
        "files": texts(&files),
        "chunk_size": CHUNK_SIZE,
        "root": root,
    }))
}

fn info(args: &BaseImageArgs) -> Result<ExitCode, Failure> {
    let location = resolved(&args.base)?;
    // A base of a server that no seal is named of has none.
    let seal = match seal_path(&args.format, &location) {
        Ok(path) => Seal::at(&path).map_err(|error| failure(&error))?,
        Err(_) => None,
    };
    let base = open(&args.format, &location, seal.as_ref())?;
    let root = seal.as_ref().map(|seal| seal.root().to_string());
    if args.json {
        say!("{}", report(&base, root.as_deref())?);
        return Ok(ExitCode::SUCCESS);
    }
    say!("base     {}, {}, {}", location.display(), base.format(), BinaryBytes(base.size()));
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
    let location = resolved(&args.base)?;
    let manifest = seal_path(&args.format, &location)?;
    let seal = Seal::at(&manifest).map_err(|error| failure(&error))?.ok_or_else(|| {
        let base = location.display();
        Failure::new(format!("base image {base} is not sealed: {} does not exist", manifest.display()))
            .with_hint(format!("seal it with `pristine base seal {base}`"))
    })?;
    let base = open(&args.format, &location, Some(&seal))?.sealed(seal).map_err(|error| failure(&error))?;
    let mut progress = Progress::new("verifying", base.size());
    let bad = base.bad_chunks(&stop, &mut |done| progress.set(done));
    let bad = bad.map_err(|error| failure_unless(&stop, &error))?;
    progress.finish();
    if bad.is_empty() && !args.json {
        say!("{}: every byte is as it was sealed", location.display());
        return Ok(ExitCode::SUCCESS);
    }
    report_bad(location.as_path(), &bad, args.json)
}

/// Says which chunks of a base are not as they were sealed.
pub(crate) fn report_bad(base: &Path, bad: &[BadChunk], json: bool) -> Result<ExitCode, Failure> {
    if json {
        let chunks: Vec<[u64; 2]> = bad.iter().map(|chunk| [chunk.offset, chunk.len]).collect();
        say!(
            "{}",
            serde_json::json!({ "base": text(base), "as_sealed": bad.is_empty(), "bad_chunks": chunks })
        );
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
