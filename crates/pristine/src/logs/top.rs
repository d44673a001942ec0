//! `pristine log top`: what most sessions write to.

use std::cmp::Reverse;
use std::io::{self, Write};

use base_image::layout::Layout;
use blocks::{BLOCK_SIZE, Extent, Tallied, tally};
use indicatif::BinaryBytes;

use super::picture::Part;
use super::{LogTopArgs, blocks, picture, print, read};
use crate::commands::amount;
use crate::failure::Failure;

const SHOWN: usize = 20;
/// Names of partitions that are told of one run.
const NAMES_MAX: usize = 3;

pub(super) fn run(args: &LogTopArgs) -> Result<(), Failure> {
    let mut sets = Vec::new();
    let mut size = 0;
    for path in args.source.logs(true)? {
        // As runs: a set of each log would be a bit per block, however few there are.
        let contents = read(&path)?;
        size = contents.header.geometry.size().max(size);
        sets.push(blocks(&contents).runs().collect::<Vec<_>>());
    }
    let layout = args.source.layout()?;
    let mut found = tally(&sets);
    found.sort_by_key(|run| (Reverse(run.sets), Reverse(run.extent.count()), run.extent.first()));
    let shown = args.count.unwrap_or(if args.json { usize::MAX } else { SHOWN });
    let report = Report { logs: sets.len(), size, parts: parts(&layout, size), found, shown };
    print(|out| if args.json { report.json(out) } else { report.table(out) })?;
    Ok(())
}

/// The parts of the disk that have names.
fn parts(layout: &Layout, size: u64) -> Vec<Part> {
    picture::parts(layout, size).into_iter().filter(|part| part.is_area).collect()
}

struct Report {
    logs: usize,
    size: u64,
    parts: Vec<Part>,
    found: Vec<Tallied>,
    shown: usize,
}

impl Report {
    /// Where a run lies.
    fn names(&self, extent: Extent) -> Vec<&str> {
        let inside = self.parts.iter().filter(|part| part.extent.overlaps(extent));
        inside.map(|part| part.name.as_str()).take(NAMES_MAX).collect()
    }

    fn json(&self, out: &mut dyn Write) -> io::Result<()> {
        let extents: Vec<_> = self
            .found
            .iter()
            .take(self.shown)
            .map(|run| {
                serde_json::json!({
                    "first": run.extent.first(),
                    "count": run.extent.count(),
                    "logs": run.sets,
                    "partitions": self.names(run.extent),
                })
            })
            .collect();
        let report = serde_json::json!({ "block_size": BLOCK_SIZE, "logs": self.logs, "extents": extents });
        serde_json::to_writer(&mut *out, &report)?;
        writeln!(out)
    }

    fn table(&self, out: &mut dyn Write) -> io::Result<()> {
        let sum = |least: usize| {
            self.found.iter().filter(|run| run.sets >= least).map(|run| run.extent.count()).sum::<u64>()
        };
        writeln!(out, "logs     {}, of disks of up to {}", self.logs, BinaryBytes(self.size))?;
        writeln!(out, "in any   {}", amount(sum(1)))?;
        writeln!(out, "in all   {}", amount(sum(self.logs.max(1))))?;
        if self.found.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n{:>8} {:>12} {:>14} {:>18}  where", "logs", "size", "first block", "byte offset")?;
        for run in self.found.iter().take(self.shown) {
            let size = BinaryBytes(run.extent.count() * BLOCK_SIZE).to_string();
            let (first, names) = (run.extent.first(), self.names(run.extent).join(", "));
            let line = format!("{:>8} {size:>12} {first:>14} {:>18}  {names}", run.sets, first * BLOCK_SIZE);
            writeln!(out, "{}", line.trim_end())?;
        }
        let more = self.found.len().saturating_sub(self.shown);
        if more > 0 {
            writeln!(out, "and {more} more extents; --count shows more of them, --json all")?;
        }
        Ok(())
    }
}
