//! Runs of consecutive blocks.

use std::fmt;

/// A run of consecutive blocks. May be empty; its end never wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    first: u64,
    count: u64,
}

impl Extent {
    /// The blocks from `first` on, `count` of them; the end saturates at `u64::MAX`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count: if count > u64::MAX - first { u64::MAX - first } else { count } }
    }

    /// The blocks from `first` up to, not including, `end`; empty if `end` is not after `first`.
    pub const fn between(first: u64, end: u64) -> Self {
        Self { first, count: end.saturating_sub(first) }
    }

    /// The number of the first block.
    pub const fn first(self) -> u64 {
        self.first
    }

    /// How many blocks there are.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// The number of the block after the last one.
    pub const fn end(self) -> u64 {
        self.first + self.count
    }

    /// Whether there is no block in it.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Whether the two runs share a block.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end() && !self.is_empty() && !other.is_empty()
    }

    /// The blocks that are in both runs.
    pub fn intersection(self, other: Self) -> Self {
        Self::between(self.first.max(other.first), self.end().min(other.end()))
    }

    /// Whether `other` begins where this run ends, so that the two are one run.
    pub const fn is_followed_by(self, other: Self) -> bool {
        self.end() == other.first
    }

    /// The first `count` blocks, and the rest.
    pub fn split_at(self, count: u64) -> (Self, Self) {
        let head = count.min(self.count);
        (Self { first: self.first, count: head }, Self { first: self.first + head, count: self.count - head })
    }

    /// Sorts `extents` and joins those that touch or overlap. Empty ones disappear.
    pub fn normalize(extents: &mut Vec<Extent>) {
        extents.retain(|e| !e.is_empty());
        extents.sort_unstable();
        extents.dedup_by(|next, previous| {
            let joins = next.first <= previous.end();
            if joins {
                previous.count = previous.end().max(next.end()) - previous.first;
            }
            joins
        });
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extent_with_a_count_past_the_end_of_numbers_saturates() {
        let extent = Extent::new(u64::MAX - 1, 10);
        assert_eq!(extent.end(), u64::MAX);
    }

    #[test]
    fn normalize_of_unsorted_touching_extents_joins_them() {
        let mut extents = vec![
            Extent::new(8, 2),
            Extent::new(0, 4),
            Extent::new(3, 5),
            Extent::new(20, 0),
            Extent::new(30, 1),
        ];
        Extent::normalize(&mut extents);
        assert_eq!(extents, [Extent::new(0, 10), Extent::new(30, 1)]);
    }

    #[test]
    fn overlap_needs_a_shared_block() {
        assert!(Extent::new(0, 2).overlaps(Extent::new(1, 1)));
        assert!(!Extent::new(0, 2).overlaps(Extent::new(2, 1)));
        assert!(!Extent::new(1, 0).overlaps(Extent::new(0, 4)));
    }
}
