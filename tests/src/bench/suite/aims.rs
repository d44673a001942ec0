//! What is aimed at, what a run has reached of it, and what there is to be had on the machine.

use std::fmt::Write;

use crate::bench::report::{Better, Row, Section, short};

/// Rates on one queue: of which medium, at which point, and how many times the best peer's.
const RATES: [(&str, &str, f64); 19] = [
    ("tmpfs", "randread-1", 3.5),
    ("tmpfs", "randread-32", 2.6),
    ("tmpfs", "randread-128", 2.3),
    ("tmpfs", "randwrite-32", 2.5),
    ("tmpfs", "mix-32", 2.5),
    ("tmpfs", "seqread-16", 1.2),
    ("tmpfs", "seqwrite-16", 1.2),
    ("disk", "randread-1", 4.0),
    ("disk", "randread-32", 1.7),
    ("disk", "randread-128", 2.0),
    ("disk", "seqread-16", 1.2),
    ("disk", "seqwrite-16", 1.2),
    ("direct", "randread-32", 1.0),
    ("direct", "randwrite-32", 1.0),
    ("direct", "mix-32", 1.0),
    // From here on: what the project wants to be known for.
    ("tmpfs", "randread-32", 3.0),
    ("tmpfs", "randread-128", 4.0),
    ("disk", "randread-32", 3.0),
    ("disk", "randread-128", 4.0),
];
/// The same of long reads.
const LONG_READS: f64 = 2.5;
/// Processor time for a request, in times of the peer's: wherever data is in the page cache; of cached reads at these points; past
/// the cache at this depth.
const COST: f64 = 0.55;
const READ_COST: (f64, [&str; 3]) = (0.35, ["randread-32", "randread-128", "seqread-16"]);
const DIRECT_COST: (f64, [&str; 3]) = (0.5, ["randread-32", "randwrite-32", "mix-32"]);
/// Thousands of reads a second that are 1.5 times what Cloud Hypervisor's own backend did, on another machine with two processors.
const CLOUD_HYPERVISOR: [(&str, f64); 2] = [("randread-32", 1.5 * 300.0), ("randread-128", 1.5 * 337.0)];
/// First writes, in times of a fresh overlay's.
const FIRST: [(&str, f64); 2] = [("every block", 4.0), ("one of 64 KiB", 15.0)];
/// Two queues, in times of one.
const TWO_QUEUES: f64 = 1.6;
/// So many idle disks: percent of a processor, and MiB for each.
const IDLE: (&str, f64, f64) = ("100", 1.0, 4.0);

/// A figure that is aimed at.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    what: String,
    unit: &'static str,
    better: Better,
    aim: f64,
    reached: f64,
    /// The same figure of what there is without a backend, and what that is.
    limit: Option<(f64, String)>,
}

impl Aim {
    fn meets(&self, figure: f64) -> bool {
        match self.better {
            Better::Higher => figure >= self.aim,
            Better::Lower => figure <= self.aim,
        }
    }

    fn verdict(&self) -> &'static str {
        match &self.limit {
            _ if self.meets(self.reached) => "reached",
            Some((limit, _)) if !self.meets(*limit) => "**no**; past the limit",
            _ => "**no**",
        }
    }

    fn line(&self) -> String {
        let Self { what, unit, aim, reached, .. } = self;
        let sign = match self.better {
            Better::Higher => "≥",
            Better::Lower => "≤",
        };
        let limit = self.limit.as_ref().map(|(limit, of)| format!("{}{unit} ({of})", short(*limit)));
        let [aim, reached] = [aim, reached].map(|figure| short(*figure));
        format!(
            "| {what} | {sign} {aim}{unit} | {reached}{unit} | {} | {} |",
            limit.unwrap_or_default(),
            self.verdict()
        )
    }
}

/// A table of all aims of which there are figures; empty if there are none.
pub(super) fn markdown(sections: &[Section]) -> String {
    let aims = aims(sections);
    if aims.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "### What is aimed at\n\n{} of {} are reached. `limit`: the same figure of the best loop without a backend on this machine; \
         an aim past it is not to be had here. (At depth 1 there is none: a loop need not wake a client.) Two queues: what \
         two processors could do at the processor time that a request takes of client and backend together.\n\n\
         | | aim | reached | limit | |\n| --- | --- | --- | --- | --- |\n",
        aims.iter().filter(|aim| aim.meets(aim.reached)).count(),
        aims.len(),
    );
    for aim in aims {
        let _ = writeln!(text, "{}", aim.line());
    }
    text.push('\n');
    text
}

fn aims(sections: &[Section]) -> Vec<Aim> {
    let mut aims = Vec::new();
    for (medium, point, aim) in RATES {
        aims.extend(rate(sections, medium, point, aim));
    }
    for medium in ["tmpfs", "disk"] {
        aims.extend(rate(sections, medium, "seqread-16", LONG_READS));
        for (point, aim) in CLOUD_HYPERVISOR {
            aims.extend(value(sections, &rates_of(medium), point, " kIOPS", aim));
        }
        for row in rows(sections, &costs_of(medium)) {
            aims.extend(cost(sections, medium, &row.label, COST));
        }
        let (aim, points) = READ_COST;
        aims.extend(points.iter().filter_map(|point| cost(sections, medium, point, aim)));
        for (one, two) in [("randread-32", "randread-32x2"), ("seqread-16", "seqread-16x2")] {
            aims.extend(two_queues(sections, medium, one, two));
        }
    }
    let (aim, points) = DIRECT_COST;
    aims.extend(points.iter().filter_map(|point| cost(sections, "direct", point, aim)));
    for medium in ["tmpfs", "disk", "direct"] {
        for (what, aim) in FIRST {
            let title = "First writes to a fresh disk";
            aims.extend(ratio(sections, title, &format!("{medium}, {what}"), "first writes: ", aim));
        }
    }
    let (disks, percent, mib) = IDLE;
    aims.extend(value(sections, "Idle disks: processor time", disks, " %", percent));
    aims.extend(value(sections, "Idle disks: memory of each server", disks, " MiB", mib));
    aims
}

fn rates_of(medium: &str) -> String {
    format!("Requests a second, {medium}")
}

fn costs_of(medium: &str) -> String {
    format!("Processor time for a request, {medium}")
}

fn rate(sections: &[Section], medium: &str, point: &str, aim: f64) -> Option<Aim> {
    ratio(sections, &rates_of(medium), point, &format!("{medium}, "), aim)
}

fn cost(sections: &[Section], medium: &str, point: &str, aim: f64) -> Option<Aim> {
    ratio(sections, &costs_of(medium), point, &format!("processor time, {medium}, "), aim)
}

/// That the figure at `label` of the section is so many times that of the column which it is compared with.
fn ratio(sections: &[Section], title: &str, label: &str, before: &str, aim: f64) -> Option<Aim> {
    let (section, row) = find(sections, title, label)?;
    let against = row.values[row.against?]?;
    let limit = section.best_limit(row).filter(|_| !label.ends_with("-1"));
    let limit = limit.map(|(value, column)| (value / against, column.name.clone()));
    let reached = section.ratio(row)?;
    Some(Aim { what: format!("{before}{label}"), unit: "x", better: section.better, aim, reached, limit })
}

/// That the figure at `label` of the section is such.
fn value(sections: &[Section], title: &str, label: &str, unit: &'static str, aim: f64) -> Option<Aim> {
    let (section, row) = find(sections, title, label)?;
    let what = format!("{}: {label}", section.title);
    Some(Aim { what, unit, better: section.better, aim, reached: row.values[0]?, limit: None })
}

/// That two queues do so many times what one does.
fn two_queues(sections: &[Section], medium: &str, one: &str, two: &str) -> Option<Aim> {
    let rate = |point| find(sections, &rates_of(medium), point)?.1.values[0];
    let (one_rate, two_rate) = (rate(one)?, rate(two)?);
    let (costs, row) = find(sections, &costs_of(medium), two)?;
    let client = costs.columns.iter().position(|column| column.name == "client")?;
    let microseconds = row.values[0]? + row.values[client]?;
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    let there_is = processors as f64 * 1e3 / microseconds / one_rate;
    Some(Aim {
        what: format!("{medium}, {two} against {one}"),
        unit: "x",
        better: Better::Higher,
        aim: TWO_QUEUES,
        reached: two_rate / one_rate,
        limit: Some((there_is, format!("{processors} processors"))),
    })
}

fn rows<'a>(sections: &'a [Section], title: &str) -> &'a [Row] {
    sections.iter().find(|section| section.title == title).map_or(&[], |section| &section.rows)
}

fn find<'a>(sections: &'a [Section], title: &str, label: &str) -> Option<(&'a Section, &'a Row)> {
    let section = sections.iter().find(|section| section.title == title)?;
    Some((section, section.rows.iter().find(|row| row.label == label)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Role;

    fn sections() -> [Section; 2] {
        let columns = |title: String, better| {
            let section = Section::new(title, "u", better).column("pristine", Role::Ours);
            section.column("peer", Role::Peer).column("limit, a", Role::Limit).column("limit, b", Role::Limit)
        };
        let mut rates = columns(rates_of("disk"), Better::Higher);
        rates.row("seqread-16", vec![Some(20.0), Some(10.0), Some(24.0), Some(22.0)]);
        rates.row("randread-32", vec![Some(18.0), Some(10.0), None, None]);
        rates.row("seqread-16x2", vec![Some(33.0), Some(10.0), None, None]);
        let mut costs = columns(costs_of("disk"), Better::Lower).column("client", Role::Info);
        costs.row("seqread-16", vec![Some(5.0), Some(10.0), Some(3.0), Some(4.0), Some(1.0)]);
        costs.row("seqread-16x2", vec![Some(15.0), Some(20.0), None, None, Some(5.0)]);
        [rates, costs]
    }

    #[test]
    fn aims_are_judged_by_what_was_measured_and_by_what_there_is() {
        let text = markdown(&sections());
        let processors = std::thread::available_parallelism().unwrap().get();
        let there_is = short(processors as f64 * 1e3 / 20.0 / 20.0);
        for line in [
            "| disk, randread-32 | ≥ 1.70x | 1.80x |  | reached |",
            "| disk, randread-32 | ≥ 3.00x | 1.80x |  | **no** |",
            "| disk, seqread-16 | ≥ 1.20x | 2.00x | 2.40x (limit, a) | reached |",
            "| disk, seqread-16 | ≥ 2.50x | 2.00x | 2.40x (limit, a) | **no**; past the limit |",
            "| processor time, disk, seqread-16 | ≤ 0.550x | 0.500x | 0.300x (limit, a) | reached |",
            "| processor time, disk, seqread-16 | ≤ 0.350x | 0.500x | 0.300x (limit, a) | **no** |",
            &format!(
                "| disk, seqread-16x2 against seqread-16 | ≥ 1.60x | 1.65x | {there_is}x ({processors} processors) | reached |"
            ),
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        // And one that is not measured is in no line.
        assert!(!text.contains("tmpfs") && !text.contains("Idle"), "{text}");
        assert!(text.contains("4 of 9 are reached"), "{text}");
        assert_eq!(markdown(&[]), "");
    }
}
