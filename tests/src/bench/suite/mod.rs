//! The whole comparison, of which `ci/bench` runs all or parts.

mod aims;
mod first;
mod idle;
mod io;
mod plan;
mod rate;
mod restore;

use std::path::{Path, PathBuf};

use crate::bench::facts::facts;
use crate::bench::plot;
use crate::bench::report::Section;
pub use plan::{Plan, Wanted};

/// Where disks lie and how they are opened.
#[derive(Clone, Debug)]
pub struct Medium {
    /// Its name on the command line and in the tables.
    pub name: &'static str,
    /// The directory of the disks.
    pub dir: PathBuf,
    /// Whether all goes past the host's page cache.
    pub direct: bool,
}

/// Measures what the plan wants, and says on standard error how it goes.
pub fn run(plan: &Plan) -> Vec<Section> {
    plan.check_room();
    let mut sections = Vec::new();
    for medium in plan.media() {
        let points = plan.wanted.points(medium.name);
        if !points.is_empty() {
            sections.extend(io::compare(plan, &medium, &points));
        }
    }
    for (group, measure) in [
        ("rate", rate::compare as fn(&Plan) -> Vec<Section>),
        ("first", first::compare),
        ("restore", restore::compare),
        ("idle", idle::compare),
    ] {
        if plan.wanted.group(group) {
            sections.extend(measure(plan));
        }
    }
    sections
}

/// Stores `table.md` and `plot.svg` in `dir`; returns the table.
pub fn store(sections: &[Section], plan: &Plan, dir: &Path) -> String {
    let mut table = format!("{}\n", facts(&plan.to_string()));
    table.push_str(&aims::markdown(sections));
    let tables: Vec<String> = sections.iter().map(Section::markdown).collect();
    table.push_str(&tables.join("\n"));
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("table.md"), &table).unwrap();
    std::fs::write(dir.join("plot.svg"), plot::svg(sections)).unwrap();
    table
}

/// Says how it goes.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
