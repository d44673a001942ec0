//! `pristine log show`: what a log holds, as a table or as JSON.

use std::io::{self, Write};
use std::path::Path;

use blocks::BLOCK_SIZE;
use indicatif::BinaryBytes;
use serde::Serialize;
use write_log::{LogContents, LogKind};

use super::{LogShowArgs, blocks, print, read};
use crate::commands::text;
use crate::failure::Failure;

#[derive(Serialize)]
struct LogReport {
    path: String,
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

pub(super) fn run(args: &LogShowArgs) -> Result<(), Failure> {
    for path in args.source.logs(false)? {
        let contents = read(&path)?;
        let goes_on = print(|out| match args.json {
            true => show_json(out, &path, &contents),
            false => show_table(out, &path, &contents),
        })?;
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// What kind of log it is.
pub(super) fn kind(contents: &LogContents) -> &'static str {
    match contents.header.kind {
        LogKind::Session => "session",
        LogKind::Pending => "pending",
    }
}

fn show_json(out: &mut dyn Write, path: &Path, contents: &LogContents) -> io::Result<()> {
    let (header, blocks) = (&contents.header, blocks(contents));
    let report = LogReport {
        path: text(path),
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

fn show_table(out: &mut dyn Write, path: &Path, contents: &LogContents) -> io::Result<()> {
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
