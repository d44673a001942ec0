//! The picture of the numbers: bars side by side, as an SVG that fits light and dark pages.

use std::fmt::Write;

use super::report::{Better, Role, Row, Section, short};

const PANEL_WIDTH: f64 = 500.0;
const COLUMNS: usize = 2;
const MARGIN: f64 = 16.0;
/// Where a panel's bars begin, and the room behind the longest one, for its label.
const BARS_AT: f64 = 150.0;
const LABEL_ROOM: f64 = 96.0;
const BAR: f64 = 8.0;
const GROUP_GAP: f64 = 9.0;
const TITLE: f64 = 42.0;
/// Bars of other backends end here, in multiples of the longest of `pristine`, if they are longer.
const MOST_OF_OURS: f64 = 2.5;

/// Text, then bars in the order of the palette, for light pages and for dark ones.
const STYLE: &str = "\
text { font: 11px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.title { font-size: 13px; font-weight: 600 } .strong { font-weight: 600 } .dim { fill: #59636e }
.halo { paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
.page { fill: #ffffff } .line { stroke: #8c959f; stroke-dasharray: 2 2 } .limit { fill: #cf222e }
.c0 { fill: #0969da } .c1 { fill: #e3a04f } .c2 { fill: #bc6a1c } .c3 { fill: #7d4310 }
.c4 { fill: #afb8c1 } .c5 { fill: #818b98 } .c6 { fill: #57606a }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .dim { fill: #9198a1 } .page { fill: #0d1117 } .halo { stroke: #0d1117 } .line { stroke: #6e7681 }
.limit { fill: #ff7b72 } .c0 { fill: #58a6ff } .c1 { fill: #f0b972 } .c2 { fill: #d18440 } .c3 { fill: #a5662d }
.c4 { fill: #6e7681 } .c5 { fill: #8b949e } .c6 { fill: #b1bac4 }
}
";
/// Colours of the palette.
const COLOURS: usize = 7;

/// Bars for all sections that compare `pristine` with a peer. All bars of a line are multiples of the
/// peer that it is compared with.
pub(super) fn svg(sections: &[Section]) -> String {
    let compared = |section: &&Section| section.rows.iter().any(|row| section.ratio(row).is_some());
    let sections: Vec<&Section> = sections.iter().filter(compared).collect();
    let names = names(&sections);
    let mut body = String::new();
    let width = MARGIN + COLUMNS as f64 * (PANEL_WIDTH + MARGIN);
    let top = legend(&mut body, &names, width);
    let mut ends = [top; COLUMNS];
    for section in sections {
        // Into the shorter column.
        let column = (0..COLUMNS).min_by(|a, b| ends[*a].total_cmp(&ends[*b])).unwrap_or(0);
        let x = MARGIN + column as f64 * (PANEL_WIDTH + MARGIN);
        ends[column] += panel(&mut body, section, &names, x, ends[column]) + MARGIN;
    }
    let height = ends.into_iter().fold(top, f64::max) + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\">\n<style>\n{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         {body}</svg>\n"
    )
}

/// Titles of the columns with bars, in the order of the palette.
fn names<'a>(sections: &[&'a Section]) -> Vec<&'a str> {
    let mut names = vec!["pristine"];
    for column in sections.iter().flat_map(|section| &section.columns) {
        if matches!(column.role, Role::Peer | Role::Other) && !names.contains(&column.name.as_str()) {
            names.push(&column.name);
        }
    }
    names
}

fn colour(names: &[&str], name: &str) -> usize {
    // `pristine` is the first, whatever the column is called.
    let index = names.iter().position(|known| *known == name).unwrap_or(0);
    if index < COLOURS { index } else { 1 + (index - 1) % (COLOURS - 1) }
}

/// Returns where it ends.
fn legend(body: &mut String, names: &[&str], width: f64) -> f64 {
    text(body, "title", MARGIN, 28.0, "pristine against its peers: each line in multiples of its best peer");
    let (mut x, mut y) = (MARGIN, 50.0);
    for (index, name) in names.iter().chain(&["limit without a backend"]).enumerate() {
        let room = 30.0 + name.len() as f64 * 6.4;
        if x + room > width - MARGIN {
            (x, y) = (MARGIN, y + 18.0);
        }
        match names.get(index) {
            Some(name) => bar(body, &format!("c{}", colour(names, name)), x, y - 9.0, 12.0, 10.0),
            None => bar(body, "limit", x + 5.0, y - 9.0, 2.5, 10.0),
        }
        text(body, "", x + 18.0, y, name);
        x += room;
    }
    y + 16.0
}

/// Returns its height.
fn panel(body: &mut String, section: &Section, names: &[&str], x: f64, top: f64) -> f64 {
    let bars_of = |row: &Row| -> Vec<(usize, f64)> {
        let measured =
            section.columns.iter().zip(&row.values).filter_map(|(column, value)| match column.role {
                Role::Ours => Some((0, (*value)?)),
                Role::Peer | Role::Other => Some((colour(names, &column.name), (*value)?)),
                Role::Limit | Role::Info => None,
            });
        let one = row.against.and_then(|against| row.values[against]).unwrap_or(f64::NAN);
        measured.map(|(colour, value)| (colour, value / one)).collect()
    };
    let rows: Vec<&Row> = section.rows.iter().filter(|row| section.ratio(row).is_some()).collect();
    let longest = rows.iter().flat_map(|row| bars_of(row)).map(|(_, length)| length).fold(1.0, f64::max);
    // A single bad peer shall not press all others flat.
    let ours = rows.iter().filter_map(|row| section.ratio(row)).fold(1.0, f64::max);
    let longest = longest.min(ours * MOST_OF_OURS);
    let scale = (PANEL_WIDTH - BARS_AT - LABEL_ROOM) / longest;
    let better = match section.better {
        Better::Higher => "longer is better",
        Better::Lower => "shorter is better",
    };
    text(body, "title", x, top + 15.0, &section.title);
    text(body, "dim", x, top + 30.0, &format!("{}; {better}", section.unit));
    let mut y = top + TITLE;
    for row in rows {
        let bars = bars_of(row);
        let height = bars.len() as f64 * BAR;
        text(body, "", x, y + (height / 2.0) + 4.0, &row.label);
        for (index, (colour, length)) in bars.iter().enumerate() {
            let y = y + index as f64 * BAR;
            let class = format!("c{colour}");
            bar(body, &class, x + BARS_AT, y, (length.min(longest) * scale).max(1.0), BAR - 1.0);
            if *length > longest {
                arrow(body, &class, x + BARS_AT + longest * scale + 2.0, y + BAR / 2.0 - 0.5);
            }
        }
        limits(body, section, row, x + BARS_AT, y, height, scale);
        if let (Some(ratio), Some(ours)) = (section.ratio(row), row.values[0]) {
            // The label stands beside the longest of the bars that it could cover.
            let end = bars.iter().take(2).map(|(_, length)| length.min(longest) * scale).fold(0.0, f64::max);
            let label = format!("{}x", short(ratio));
            text(body, "strong halo", x + BARS_AT + end + 6.0, y + 9.0, &label);
            let after = x + BARS_AT + end + 12.0 + label.len() as f64 * 7.0;
            text(body, "dim halo", after, y + 9.0, &short(ours));
        }
        y += height + GROUP_GAP;
    }
    let one = x + BARS_AT + scale;
    let (from, to) = (top + TITLE - 4.0, y - GROUP_GAP + 3.0);
    let _ = writeln!(
        body,
        "<line class=\"line\" x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\"/>"
    );
    y - top
}

/// A mark where the best loop without a backend is; an arrow at the panel's edge if that is farther away.
fn limits(body: &mut String, section: &Section, row: &Row, x: f64, y: f64, height: f64, scale: f64) {
    let one = row.against.and_then(|against| row.values[against]);
    if let (Some((best, _)), Some(one)) = (section.best_limit(row), one) {
        let (at, edge) = (best / one * scale, PANEL_WIDTH - BARS_AT - 6.0);
        if at <= edge {
            bar(body, "limit", x + at - 1.0, y - 1.0, 2.0, height + 1.0);
        } else {
            arrow(body, "limit", x + edge, y + height / 2.0);
        }
    }
}

/// It goes on, to the right of there.
fn arrow(body: &mut String, class: &str, x: f64, y: f64) {
    let _ = writeln!(body, "<path class=\"{class}\" d=\"M{x:.1} {:.1}l6 4l-6 4z\"/>", y - 4.0);
}

fn bar(body: &mut String, class: &str, x: f64, y: f64, width: f64, height: f64) {
    let _ = writeln!(
        body,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
    );
}

fn text(body: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(body, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}
