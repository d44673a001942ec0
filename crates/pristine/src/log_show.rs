//! `pristine log show`.

use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use blocks::{BLOCK_SIZE, BlockSet};
use indicatif::BinaryBytes;
use serde::Serialize;
use write_log::{LogContents, LogKind};

use crate::args::{LogArgs, LogCommand};
use crate::failure::Failure;

#[derive(Serialize)]
struct LogReport<'a> {
    path: &'a Path,
    kind: &'static str,
    sequence: u64,
    uuid: uuid::Uuid,
    disk: uuid::Uuid,
    disk_size: u64,
    created_unix_ns: u64,
    sealed: bool,
    block_size: u64,
    blocks: u64,
    extents: Vec<[u64; 2]>,
}

pub(crate) fn run(args: &LogArgs) -> Result<ExitCode, Failure> {
    let LogCommand::Show(args) = &args.command;
    let mut out = BufWriter::new(io::stdout().lock());
    for path in &args.logs {
        let contents = write_log::read(path).map_err(|error| Failure::of(&error))?;
        let result = if args.json {
            show_json(&mut out, path, &contents)
        } else {
            show_table(&mut out, path, &contents)
        };
        match result.and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            result => result.map_err(|error| Failure::new(format!("cannot write the report: {error}")))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn kind(contents: &LogContents) -> &'static str {
    match contents.header.kind {
        LogKind::Session => "session",
        LogKind::Pending => "pending",
    }
}

fn blocks(contents: &LogContents) -> BlockSet {
    contents.sealed_blocks().unwrap_or_else(|| contents.readable_blocks())
}

fn show_json(out: &mut impl Write, path: &Path, contents: &LogContents) -> io::Result<()> {
    let (header, blocks) = (&contents.header, blocks(contents));
    let report = LogReport {
        path,
        kind: kind(contents),
        sequence: header.id.seq,
        uuid: header.id.uuid,
        disk: header.disk,
        disk_size: header.geometry.size(),
        created_unix_ns: header.created_unix_ns,
        sealed: contents.sealed_blocks().is_some(),
        block_size: BLOCK_SIZE,
        blocks: blocks.count(),
        extents: blocks.runs().map(|run| [run.first(), run.count()]).collect(),
    };
    serde_json::to_writer(&mut *out, &report)?;
    writeln!(out)
}

fn show_table(out: &mut impl Write, path: &Path, contents: &LogContents) -> io::Result<()> {
    let (header, blocks) = (&contents.header, blocks(contents));
    let disk_blocks = header.geometry.blocks();
    writeln!(out, "log      {}", path.display())?;
    writeln!(out, "kind     {} {}", kind(contents), header.id.seq)?;
    writeln!(out, "disk     {}, {}", header.disk, BinaryBytes(header.geometry.size()))?;
    let state =
        if contents.sealed_blocks().is_some() { "sealed: complete" } else { "open: not ended in order" };
    writeln!(out, "state    {state}")?;
    writeln!(
        out,
        "blocks   {} of {disk_blocks} ({}, {:.2} %) in {} extents",
        blocks.count(),
        BinaryBytes(blocks.count() * BLOCK_SIZE),
        blocks.count() as f64 * 100.0 / disk_blocks as f64,
        blocks.runs().count()
    )?;
    if blocks.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{:>14} {:>10} {:>18} {:>12}", "first block", "blocks", "byte offset", "size")?;
    for run in blocks.runs() {
        let size = BinaryBytes(run.count() * BLOCK_SIZE).to_string();
        writeln!(out, "{:>14} {:>10} {:>18} {size:>12}", run.first(), run.count(), run.first() * BLOCK_SIZE)?;
    }
    Ok(())
}
