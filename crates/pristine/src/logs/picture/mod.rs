//! Where on a disk sessions wrote, and how much, as a picture. What is drawn, and nothing about how it is read.

pub(super) mod svg;
pub(super) mod text;

use base_image::layout::Layout;
use blocks::{BLOCK_SIZE, Extent};
use indicatif::BinaryBytes;

use crate::commands::amount;

/// A partition, or what lies between two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// For people.
    pub(super) name: String,
    /// Its file system or purpose.
    pub(super) kind: String,
    /// Whether it is a partition or a file system; else nothing is known of it.
    pub(super) is_area: bool,
    /// Its blocks, at least one. A block in which one part ends and another begins is the first one's.
    pub(super) extent: Extent,
    /// How many of them were written.
    pub(super) written: u64,
}

/// All parts of a disk of `size` bytes, in ascending order; each block is in one.
pub(super) fn parts(layout: &Layout, size: u64) -> Vec<Part> {
    let blocks = size.div_ceil(BLOCK_SIZE);
    let mut parts = Vec::new();
    let mut at = 0;
    let mut push = |name: String, kind: &str, is_area, end: u64| {
        let extent = Extent::between(at, end.min(blocks));
        if !extent.is_empty() {
            parts.push(Part { name, kind: kind.to_owned(), is_area, extent, written: 0 });
            at = extent.end();
        }
    };
    let between = if layout.table.is_some() { "between partitions" } else { "the disk" };
    for area in &layout.areas {
        push(between.into(), "", false, area.offset.div_ceil(BLOCK_SIZE));
        let end = area.offset.saturating_add(area.len).div_ceil(BLOCK_SIZE);
        push(area.title(), area.kind().unwrap_or_default(), true, end);
    }
    push(between.into(), "", false, blocks);
    parts
}

/// What a picture shows.
#[derive(Clone, Debug)]
pub(super) struct Map {
    title: String,
    /// Size of the disk in bytes.
    size: u64,
    /// What was written: in ascending order, not overlapping.
    runs: Vec<Extent>,
    table: Option<&'static str>,
    parts: Vec<Part>,
}

impl Map {
    /// Of a disk of `size` bytes of which `runs` were written.
    pub(super) fn new(title: String, size: u64, runs: Vec<Extent>, layout: &Layout) -> Self {
        let mut parts = parts(layout, size);
        for part in &mut parts {
            // Those that end before it begins are many: parts and runs are both sorted.
            let first = runs.partition_point(|run| run.end() <= part.extent.first());
            let inside = runs.iter().skip(first).take_while(|run| run.first() < part.extent.end());
            part.written = inside.map(|run| run.intersection(part.extent).count()).sum();
        }
        Self { title, size, runs, table: layout.table, parts }
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }

    fn written(&self) -> u64 {
        self.runs.iter().map(|run| run.count()).sum()
    }

    /// How much was written, in words.
    pub(super) fn summary(&self) -> String {
        let percent = self.written() as f64 * 100.0 / self.blocks().max(1) as f64;
        format!("{}, {percent:.2} % of the disk, in {} extents", amount(self.written()), self.runs.len())
    }

    /// The disk, in words.
    fn disk(&self) -> String {
        let areas = self.parts.iter().filter(|part| part.is_area).count();
        let table = self.table.map_or_else(String::new, |table| format!(", {table}, {areas} partitions"));
        format!("{}{table}", BinaryBytes(self.size))
    }

    /// What is worth a line: partitions, and what was written or is much between them.
    fn worth_a_line(&self) -> Vec<&Part> {
        let is_worth =
            |part: &&Part| part.is_area || part.written > 0 || part.extent.count() >= self.blocks() / 64;
        self.parts.iter().filter(is_worth).collect()
    }
}

/// A part's share that was written, for people.
fn share(part: &Part) -> String {
    format!("{:.2} %", part.written as f64 * 100.0 / part.extent.count().max(1) as f64)
}

/// Bytes of blocks, for people.
fn bytes(blocks: u64) -> String {
    BinaryBytes(blocks.saturating_mul(BLOCK_SIZE)).to_string()
}

/// The beginning of a text, if it has more than `max` characters.
fn shortened(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars().take(max.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests;
