//! The picture in a terminal: rows of characters, each as full as its piece of the disk was written.

use std::fmt::Write;

use blocks::{BLOCK_SIZE, Extent, cell, density};
use indicatif::BinaryBytes;

use super::{Map, Part, bytes, share, shortened};

/// Rows of the whole disk, if it were one part.
const ROWS: u64 = 16;
const WIDTHS: std::ops::RangeInclusive<usize> = 40..=240;
/// What a row begins with: the offset of its first byte.
const OFFSET_WIDTH: usize = 12;
const NAME_WIDTH: usize = 28;
/// An eighth full, and so on.
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Draws the map, no line longer than `width` characters (of 40 to 240).
pub(in crate::logs) fn render(map: &Map, width: usize) -> String {
    let width = width.clamp(*WIDTHS.start(), *WIDTHS.end());
    let row = width - OFFSET_WIDTH - 2;
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = writeln!(text, "{}", shortened(&format!("map      {}", map.title), width));
    let _ = writeln!(text, "{}", shortened(&format!("disk     {}", map.disk()), width));
    let _ = writeln!(text, "{}", shortened(&format!("written  {}", map.summary()), width));
    for part in map.worth_a_line() {
        let _ = writeln!(text, "\n{}", shortened(heading(part).trim_end(), width));
        draw(&mut text, map, part, row);
    }
    text
}

fn heading(part: &Part) -> String {
    let name = shortened(&part.name, NAME_WIDTH);
    let kind = shortened(&part.kind, 18);
    let (size, written) = (bytes(part.extent.count()), bytes(part.written));
    format!(
        "{name}  {kind}{}{size}, written {written}, {}",
        if kind.is_empty() { "" } else { "  " },
        share(part)
    )
}

/// Rows of `width` characters, as many as the part's share of the disk asks for.
fn draw(text: &mut String, map: &Map, part: &Part, width: usize) {
    let count = part.extent.count();
    let rows =
        (u128::from(count) * u128::from(ROWS)).div_ceil(u128::from(map.blocks().max(1))).max(1) as usize;
    // A character is a block at least.
    let cells = (rows * width).min(usize::try_from(count).unwrap_or(usize::MAX));
    let inside = map.runs.iter().map(|run| run.intersection(part.extent)).filter(|run| !run.is_empty());
    let inside = inside.map(|run| Extent::new(run.first() - part.extent.first(), run.count()));
    let counts = density(inside, count, cells);
    for (row, counts) in counts.chunks(width).enumerate() {
        let line: String = (row * width..)
            .zip(counts)
            .map(|(index, written)| level(*written, cell(index, count, cells).count()))
            .collect();
        let first = part.extent.first() + cell(row * width, count, cells).first();
        let offset = BinaryBytes(first.saturating_mul(BLOCK_SIZE)).to_string();
        let _ = writeln!(text, "{offset:>OFFSET_WIDTH$} ▏{}", line.trim_end());
    }
}

/// How full a character is; what was written at all is seen.
fn level(written: u64, of: u64) -> char {
    match (u128::from(written) * LEVELS.len() as u128).div_ceil(u128::from(of.max(1))) {
        0 => ' ',
        eighths => LEVELS.get(eighths as usize - 1).copied().unwrap_or('█'),
    }
}
