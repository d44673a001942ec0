//! What a server has said of holes, so that it is not asked for every block.

use super::connection::Status;

/// A part of the export, and what lies in it. Nothing is known of the rest.
#[derive(Debug, Default)]
pub(super) struct Holes {
    begin: u64,
    /// Where each run ends, and whether it reads as zeroes; in ascending order, no two alike side by side.
    runs: Vec<(u64, bool)>,
}

impl Holes {
    /// What `statuses` say of an export of `size` bytes from `begin` on.
    pub(super) fn new(begin: u64, size: u64, statuses: &[Status]) -> Self {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut end = begin;
        for status in statuses {
            // The last one may say more than what was asked for.
            end = end.saturating_add(status.len).min(size);
            match runs.last_mut() {
                Some((last, is_zero)) if *is_zero == status.is_zero => *last = end,
                _ => runs.push((end, status.is_zero)),
            }
        }
        Self { begin, runs }
    }

    /// How many bytes from `offset` on are zeroes, and how many after them are not known to be; both together `len` at
    /// most. `None` if nothing is known of `offset`.
    pub(super) fn content(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        if offset < self.begin {
            return None;
        }
        let first = self.runs.partition_point(|(end, _)| *end <= offset);
        let mut runs = self.runs.get(first..)?.iter();
        let (end, is_zero) = runs.next()?;
        let first_len = (end - offset).min(len);
        if !is_zero {
            return Some((0, first_len));
        }
        let data = runs.next().map_or(0, |(data_end, _)| data_end - end);
        Some((first_len, data.min(len - first_len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: bool = true;

    fn holes(statuses: &[(u64, bool)]) -> Holes {
        let statuses: Vec<_> = statuses.iter().map(|&(len, is_zero)| Status { len, is_zero }).collect();
        Holes::new(100, 1000, &statuses)
    }

    #[test]
    fn content_is_told_as_far_as_the_server_was_asked() {
        let holes = holes(&[(50, ZERO), (30, false), (20, false), (100, ZERO)]);
        assert_eq!(holes.content(99, 10), None);
        assert_eq!(holes.content(100, 1000), Some((50, 50)));
        assert_eq!(holes.content(140, 30), Some((10, 20)));
        assert_eq!(holes.content(149, 1), Some((1, 0)));
        assert_eq!(holes.content(150, 1000), Some((0, 50)));
        assert_eq!(holes.content(299, 1000), Some((1, 0)));
        assert_eq!(holes.content(300, 1), None);
        assert_eq!(Holes::default().content(0, 1), None);
    }

    #[test]
    fn run_past_the_end_of_the_export_ends_with_it() {
        let holes = holes(&[(u64::MAX, ZERO), (5, false)]);
        assert_eq!(holes.content(999, 100), Some((1, 0)));
    }
}
