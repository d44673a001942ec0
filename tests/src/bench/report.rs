//! Measured numbers, side by side: as Markdown here, as a picture in `plot`.

use std::fmt::Write;

/// What a column is to `pristine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `pristine` itself.
    Ours,
    /// A peer: the best of them counts.
    Peer,
    /// A peer that is shown but does not count.
    Other,
    /// What the machine can do without any of them.
    Limit,
    /// Something to know, in the table only.
    Info,
}

/// Which number is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Rates.
    Higher,
    /// Times and costs.
    Lower,
}

/// A column of a section.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its title.
    pub name: String,
    /// What it is to `pristine`.
    pub role: Role,
}

/// A line of a section.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub label: String,
    /// A number for each column; none if it was not measured.
    pub values: Vec<Option<f64>>,
    /// The column that `pristine` is compared with.
    pub against: Option<usize>,
}

/// Numbers of one kind: a table, and a panel of the picture.
#[derive(Clone, Debug)]
pub struct Section {
    /// What was measured, where.
    pub title: String,
    /// The unit of all columns but the `Info` ones, whose titles say theirs.
    pub unit: &'static str,
    /// Which number is better.
    pub better: Better,
    /// The columns; the first is `pristine`.
    pub columns: Vec<Column>,
    /// The lines.
    pub rows: Vec<Row>,
    /// What to know about them; Markdown.
    pub note: String,
}

impl Section {
    /// A section without lines.
    pub fn new(title: impl Into<String>, unit: &'static str, better: Better) -> Self {
        let (title, note) = (title.into(), String::new());
        Self { title, unit, better, columns: Vec::new(), rows: Vec::new(), note }
    }

    /// Adds a column. To be called before the first line is added.
    pub fn column(mut self, name: impl Into<String>, role: Role) -> Self {
        self.columns.push(Column { name: name.into(), role });
        self
    }

    /// Says what to know.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// Adds a line, which is compared with the best peer.
    pub fn row(&mut self, label: impl Into<String>, values: Vec<Option<f64>>) {
        let against = self.best_peer(&values);
        self.row_against(label, values, against);
    }

    /// Adds a line, which is compared with that column.
    pub fn row_against(
        &mut self,
        label: impl Into<String>,
        values: Vec<Option<f64>>,
        against: Option<usize>,
    ) {
        assert_eq!(values.len(), self.columns.len(), "{}: a number for each column", self.title);
        self.rows.push(Row { label: label.into(), values, against });
    }

    fn best_peer(&self, values: &[Option<f64>]) -> Option<usize> {
        let peers = self.columns.iter().zip(values).enumerate();
        let peers = peers.filter(|(_, (column, _))| column.role == Role::Peer);
        let measured = peers.filter_map(|(index, (_, value))| Some((index, (*value)?)));
        let best = match self.better {
            Better::Higher => measured.max_by(|a, b| a.1.total_cmp(&b.1)),
            Better::Lower => measured.min_by(|a, b| a.1.total_cmp(&b.1)),
        };
        best.map(|(index, _)| index)
    }

    /// How many times the number of the column that it is compared with `pristine` has. None if one of
    /// them was not measured, or that one is 0.
    pub fn ratio(&self, row: &Row) -> Option<f64> {
        Some(row.values[0]? / row.values[row.against?]?).filter(|ratio| ratio.is_finite())
    }

    /// The best number of a line that the machine has without any backend, and its column.
    pub fn best_limit(&self, row: &Row) -> Option<(f64, &Column)> {
        let limits = self.columns.iter().zip(&row.values).filter(|(column, _)| column.role == Role::Limit);
        let limits = limits.filter_map(|(column, value)| Some(((*value)?, column)));
        match self.better {
            Better::Higher => limits.max_by(|a, b| a.0.total_cmp(&b.0)),
            Better::Lower => limits.min_by(|a, b| a.0.total_cmp(&b.0)),
        }
    }

    /// A Markdown table with a title.
    pub fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n", self.title);
        let better = match self.better {
            Better::Higher => "more",
            Better::Lower => "less",
        };
        let _ = write!(text, "In {}, {better} is better.", self.unit);
        if !self.note.is_empty() {
            let _ = write!(text, " {}", self.note);
        }
        let names: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let compared = self.columns.iter().any(|column| column.role == Role::Peer);
        let more = if compared { " pristine is |" } else { "" };
        let _ = writeln!(text, "\n\n| | {} |{more}", names.join(" | "));
        let _ = writeln!(text, "|{}", " --- |".repeat(self.columns.len() + 1 + usize::from(compared)));
        for row in &self.rows {
            let cells: Vec<String> = row.values.iter().map(|value| value.map_or("".into(), short)).collect();
            let _ = write!(text, "| {} | {} |", row.label, cells.join(" | "));
            if compared {
                let ratio = self.ratio(row).map(|ratio| format!(" {}x", short(ratio)));
                let _ = write!(text, "{} |", ratio.unwrap_or_default());
            }
            text.push('\n');
        }
        text
    }
}

/// A number with three digits that matter.
pub fn short(number: f64) -> String {
    let digits = match number.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        0.1.. => 3,
        _ => 4,
    };
    format!("{number:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_to_the_best_peer() {
        let columns = |better| {
            let section = Section::new("t", "s", better).column("pristine", Role::Ours);
            section.column("a", Role::Peer).column("b", Role::Peer).column("c", Role::Other)
        };
        for (better, ratio) in [(Better::Higher, 2.0), (Better::Lower, 4.0)] {
            let mut section = columns(better);
            section.row("x", vec![Some(8.0), Some(2.0), Some(4.0), Some(100.0)]);
            section.row("y", vec![Some(8.0), None, None, None]);
            assert_eq!(section.ratio(&section.rows[0]), Some(ratio));
            assert_eq!(section.ratio(&section.rows[1]), None);
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([412.3, 41.23, 4.123, 0.4123, 0.0].map(short).join(" "), "412 41.2 4.12 0.412 0.0000");
    }
}
