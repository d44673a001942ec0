//! `log show` and `log top`: what write logs say.

mod map;
mod picture;
mod show;
mod top;

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use base_image::BaseLocation;
use base_image::layout::Layout;
use blocks::BlockSet;
use clap::{Args, Subcommand};
use session_disk::DiskOptions;
use write_log::{LogContents, LogId, LogKind};

use crate::args::{FormatArgs, base_location};
use crate::base;
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    #[command(subcommand)]
    command: LogCommand,
}

#[derive(Debug, Subcommand)]
enum LogCommand {
    /// Show which blocks write logs hold, as a table, as JSON or as a picture
    #[command(after_help = "Examples:
  pristine log show vm1.raw.pristine/sessions/*.wlog
  pristine log show vm1.raw.pristine/sessions/00000002-*.wlog --json
  pristine log show --disk vm1.raw --map
  pristine log show --disk vm1.raw --map --svg where.svg
  pristine log show 00000002-*.wlog --map --base golden.qcow2

A picture of several logs is of all of their blocks together.")]
    Show(LogShowArgs),
    /// Show the parts of the disk that most sessions write to, so that what writes there can be found in the image
    #[command(after_help = "Examples:
  pristine log top vm*.raw.pristine/sessions/*.wlog --base golden.raw
  pristine log top --disk vm1.raw --count 50
  pristine log top vm*.raw.pristine/sessions/*.wlog --json

Each log is a session; those of many disks of one base can be counted together. Which file lies at an offset is told, for ext4, \
by `debugfs -R 'icheck BLOCK'` and `ncheck`.")]
    Top(LogTopArgs),
}

/// Which logs, and what is known of their disk.
#[derive(Debug, Args)]
struct Source {
    /// Write logs
    #[arg(value_name = "LOG", required_unless_present = "disk")]
    logs: Vec<PathBuf>,
    /// A session disk: its base has the partitions' names, and its logs are taken where none is named (show: that of the last
    /// session; top: those of all sessions that are there)
    #[arg(long, value_name = "DISK")]
    disk: Option<PathBuf>,
    /// Where the disk's manifest and logs are [default: DISK.pristine]
    #[arg(long, value_name = "DIR", requires = "disk")]
    state_dir: Option<PathBuf>,
    /// The base image, for the partitions' names
    #[arg(long, value_name = "BASE", conflicts_with = "disk", value_parser = base_location())]
    base: Option<BaseLocation>,
    #[command(flatten)]
    format: FormatArgs,
}

#[derive(Debug, Args)]
struct LogShowArgs {
    #[command(flatten)]
    source: Source,
    /// One JSON object per log
    #[arg(long)]
    json: bool,
    /// Where on the disk, and how much, as a picture; with the partitions' names if the base is known
    #[arg(long, conflicts_with = "json")]
    map: bool,
    /// Instead of printing the picture, put it into a file, as SVG
    #[arg(long, value_name = "FILE", requires = "map")]
    svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct LogTopArgs {
    #[command(flatten)]
    source: Source,
    /// How many parts to show [default: 20; with --json all]
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &LogArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        LogCommand::Show(args) if args.map => map::run(args)?,
        LogCommand::Show(args) => show::run(args)?,
        LogCommand::Top(args) => top::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Source {
    fn options(&self) -> Option<DiskOptions> {
        let disk = self.disk.as_ref()?;
        Some(DiskOptions { state_dir: self.state_dir.clone(), ..DiskOptions::new(disk) })
    }

    /// The logs that are meant, oldest first if they are the disk's.
    fn logs(&self, all: bool) -> Result<Vec<PathBuf>, Failure> {
        let Some(options) = self.options().filter(|_| self.logs.is_empty()) else {
            return Ok(self.logs.clone());
        };
        // That says best what is wrong with a disk that is none.
        session_disk::Manifest::load(&options.paths())?;
        let dir = options.paths().sessions();
        let entries = std::fs::read_dir(&dir)
            .map_err(|error| Failure::new(format!("cannot read {}: {error}", dir.display())))?;
        let mut ids: Vec<LogId> =
            entries.flatten().filter_map(|entry| LogId::parse(entry.file_name().to_str()?)).collect();
        ids.sort_by_key(|id| id.seq);
        let paths = ids.iter().map(|id| dir.join(id.file_name()));
        let is_session =
            |path: &PathBuf| write_log::read_header(path).is_ok_and(|header| header.kind == LogKind::Session);
        let sessions: Vec<PathBuf> = paths.filter(is_session).collect();
        if sessions.is_empty() {
            return Err(Failure::new(format!("no session has left a log in {}", dir.display())));
        }
        let skipped = if all { 0 } else { sessions.len() - 1 };
        Ok(sessions.into_iter().skip(skipped).collect())
    }

    /// What lies where on the base, if the base is known.
    fn layout(&self) -> Result<Layout, Failure> {
        if let Some(base) = &self.base {
            return base::layout(base, &self.format);
        }
        let Some(options) = self.options() else { return Ok(Layout::default()) };
        let layout = session_disk::base_of(&options).and_then(|base| Ok(base.layout()?));
        Ok(layout.unwrap_or_else(|error| {
            // The logs say what they say without names.
            log::warn!("{}: partitions have no names", Failure::from(error).line());
            Layout::default()
        }))
    }
}

fn read(path: &Path) -> Result<LogContents, Failure> {
    write_log::read(path).map_err(|error| Failure::of(&error))
}

/// The blocks that a log holds: as many as it vouches for, or as can be read.
fn blocks(contents: &LogContents) -> BlockSet {
    contents.sealed_blocks().unwrap_or_else(|| contents.readable_blocks())
}

/// Prints a report; whether somebody wants to see more.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<bool, Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(format!("cannot write the report: {error}"))),
    }
}
