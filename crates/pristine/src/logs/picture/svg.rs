//! The picture as an SVG document: a column for each piece of the disk, the partitions beneath, and a table of them.

use std::fmt::Write;

use blocks::{cell, density};
use indicatif::BinaryBytes;

use super::{Map, Part, bytes, share, shortened};

const WIDTH: usize = 960;
const LEFT: usize = 46;
const RIGHT: usize = 20;
const PLOT: usize = WIDTH - LEFT - RIGHT;
const COLUMN: usize = 2;
const TOP: usize = 66;
const HEIGHT: usize = 130;
/// The strip of partitions.
const STRIP: usize = 24;
const LINE: usize = 20;
const LINES_MAX: usize = 24;
/// Pixels that a character takes, on the safe side.
const CHARACTER: usize = 7;

/// Of partitions, in turn: told apart by those who see no red or no green as well.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const GREY: &str = "#8a8a8a";

/// Draws the map. The document has a bounded size, whatever was written.
pub(in crate::logs) fn render(map: &Map) -> String {
    let colours = colours(map);
    let lines = map.worth_a_line();
    let table = TOP + HEIGHT + STRIP + 50;
    let more = lines.len().saturating_sub(LINES_MAX);
    let height = table + (lines.len().min(LINES_MAX) + usize::from(more > 0)) * LINE + LINE + 10;
    let (title, summary) = (escaped(&map.title, 110), escaped(&map.summary(), 110));
    let mut svg = String::new();
    // Writing to a string can't fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" font-family="sans-serif" font-size="13" fill="#222">
<title>Where a session wrote: {title}</title>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{LEFT}" y="26" font-size="16" font-weight="bold">{title}</text>
<text x="{LEFT}" y="46">{disk}: {summary}</text>
"##,
        disk = escaped(&map.disk(), 60),
    );
    axes(&mut svg, map);
    columns(&mut svg, map, &colours);
    strip(&mut svg, map, &colours);
    let _ = writeln!(
        svg,
        "{}",
        row(table, GREY, ["partition", "file system", "size", "written", "of it"], false)
    );
    for (index, part) in lines.iter().take(LINES_MAX).enumerate() {
        let colour =
            map.parts.iter().zip(&colours).find(|(other, _)| *other == *part).map_or(GREY, |(_, c)| c);
        let (name, kind) = (escaped(&part.name, 44), escaped(&part.kind, 24));
        let cells = [&*name, &kind, &bytes(part.extent.count()), &bytes(part.written), &share(part)];
        let _ = writeln!(svg, "{}", row(table + (index + 1) * LINE, colour, cells, true));
    }
    if more > 0 {
        let y = table + (LINES_MAX + 1) * LINE;
        let _ = writeln!(svg, r#"<text x="{}" y="{y}">and {more} more</text>"#, LEFT + 18);
    }
    svg.push_str("</svg>\n");
    svg
}

/// The colour of each part.
fn colours(map: &Map) -> Vec<&'static str> {
    let mut next = COLOURS.iter().cycle();
    // A disk of which nothing is known is one part, and not grey.
    let is_alone = map.parts.len() == 1;
    let colour = |part: &Part| if part.is_area || is_alone { next.next().copied() } else { None };
    map.parts.iter().map(colour).map(|colour| colour.unwrap_or(GREY)).collect()
}

fn axes(svg: &mut String, map: &Map) {
    let (bottom, right) = (TOP + HEIGHT, WIDTH - RIGHT);
    for (percent, y) in [(100, TOP), (50, TOP + HEIGHT / 2), (0, bottom)] {
        let _ = writeln!(
            svg,
            r##"<path d="M{LEFT} {y}H{right}" stroke="#ddd"/><text x="{}" y="{}" text-anchor="end" font-size="11">{percent} %</text>"##,
            LEFT - 5,
            y + 4
        );
    }
    for quarter in 0..=4 {
        let x = LEFT + PLOT * quarter / 4;
        let anchor = ["start", "middle", "middle", "middle", "end"].get(quarter).copied().unwrap_or("middle");
        let at = (u128::from(map.size) * quarter as u128 / 4) as u64;
        let _ = writeln!(
            svg,
            r##"<path d="M{x} {bottom}v{}" stroke="#ddd"/><text x="{x}" y="{}" text-anchor="{anchor}" font-size="11">{}</text>"##,
            STRIP + 8,
            bottom + STRIP + 22,
            BinaryBytes(at)
        );
    }
}

/// A path of columns for each colour.
fn columns(svg: &mut String, map: &Map, colours: &[&str]) {
    let cells = PLOT / COLUMN;
    let counts = density(map.runs.iter().copied(), map.blocks(), cells);
    let bottom = TOP + HEIGHT;
    for colour in COLOURS.iter().chain([&GREY]) {
        let mut path = String::new();
        for (index, written) in counts.iter().enumerate().filter(|(_, written)| **written > 0) {
            let cell = cell(index, map.blocks(), cells);
            // A column in which two parts meet is that one's which was written first.
            let run = map.runs.partition_point(|run| run.end() <= cell.first());
            let first = map.runs.get(run).map_or(cell.first(), |run| run.first().max(cell.first()));
            let part = map.parts.partition_point(|part| part.extent.end() <= first);
            if colours.get(part) != Some(colour) {
                continue;
            }
            // What was written at all is seen.
            let height = (*written as f64 / cell.count().max(1) as f64 * HEIGHT as f64).max(1.5);
            let (x, top) = (LEFT + index * COLUMN, bottom as f64 - height);
            let _ = write!(path, "M{x} {bottom}V{top:.1}h{COLUMN}V{bottom}z");
        }
        if !path.is_empty() {
            let _ = writeln!(svg, r#"<path d="{path}" fill="{colour}"/>"#);
        }
    }
}

fn strip(svg: &mut String, map: &Map, colours: &[&str]) {
    let y = TOP + HEIGHT + 4;
    let blocks = u128::from(map.blocks().max(1));
    let x_of = |block: u64| LEFT as f64 + (u128::from(block) * PLOT as u128) as f64 / blocks as f64;
    for (part, colour) in map.parts.iter().zip(colours).filter(|(part, _)| part.is_area) {
        let (x, end) = (x_of(part.extent.first()), x_of(part.extent.end()));
        let width = (end - x).max(1.0);
        let _ = writeln!(
            svg,
            r#"<rect x="{x:.1}" y="{y}" width="{width:.1}" height="{STRIP}" fill="{colour}" fill-opacity=".3" stroke="{colour}"/>"#
        );
        let room = width as usize / CHARACTER;
        if room >= 4 {
            let name = escaped(&part.name, room - 1);
            let _ = writeln!(svg, r#"<text x="{:.1}" y="{}" font-size="12">{name}</text>"#, x + 4.0, y + 16);
        }
    }
}

/// A line of the table.
fn row(y: usize, colour: &str, cells: [&str; 5], swatch: bool) -> String {
    let [name, kind, size, written, share] = cells;
    let mark = match swatch {
        true => format!(r#"<rect x="{LEFT}" y="{}" width="11" height="11" fill="{colour}"/>"#, y - 10),
        false => String::new(),
    };
    let weight = if swatch { "" } else { r##" fill="#777""## };
    format!(
        r#"{mark}<g{weight}><text x="{}" y="{y}">{name}</text><text x="400" y="{y}">{kind}</text><text x="680" y="{y}" text-anchor="end">{size}</text><text x="800" y="{y}" text-anchor="end">{written}</text><text x="900" y="{y}" text-anchor="end">{share}</text></g>"#,
        LEFT + 18
    )
}

/// Text as XML may have it, at most `max` characters of it.
fn escaped(text: &str, max: usize) -> String {
    let clean: String =
        text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')).collect();
    let mut escaped = String::new();
    for c in shortened(&clean, max).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}
