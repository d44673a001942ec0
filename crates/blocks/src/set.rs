//! A set of blocks as an atomic bitmap, shared by all queues without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Extent;

const WORD_BITS: u64 = u64::BITS as u64;

/// A set of block numbers below a fixed bound: one bit per block, plus a count.
///
/// Additions are visible to whoever sees them ([`Ordering::AcqRel`]): data that was stored before
/// a block was added can be read after the block was found. Blocks past the bound are ignored by
/// changes and never found by queries, so no argument can panic.
#[derive(Debug)]
pub struct BlockSet {
    words: Box<[AtomicU64]>,
    blocks: u64,
    count: AtomicU64,
}

impl BlockSet {
    /// An empty set of blocks below `blocks`.
    pub fn new(blocks: u64) -> Self {
        // `calloc`ed: pages of a set that is hardly used cost no memory.
        let words = vec![0u64; blocks.div_ceil(WORD_BITS) as usize];
        Self { words: words.into_iter().map(AtomicU64::new).collect(), blocks, count: AtomicU64::new(0) }
    }

    /// The bound: block numbers are below it.
    pub fn bound(&self) -> u64 {
        self.blocks
    }

    /// How many blocks are in the set.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Whether `block` is in the set.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.word((block / WORD_BITS) as usize) >> (block % WORD_BITS) & 1 == 1
    }

    /// Whether every block of `extent` is in the set (true for an empty one).
    pub fn contains_all(&self, extent: Extent) -> bool {
        extent.end() <= self.blocks && words_of(extent).all(|(index, mask)| self.word(index) & mask == mask)
            || extent.is_empty()
    }

    /// Whether a block of `extent` is in the set.
    pub fn intersects(&self, extent: Extent) -> bool {
        words_of(self.clip(extent)).any(|(index, mask)| self.word(index) & mask != 0)
    }

    /// Adds the blocks of `extent`; returns how many were not in the set before.
    pub fn insert(&self, extent: Extent) -> u64 {
        let mut added = 0;
        for (index, mask) in words_of(self.clip(extent)) {
            if let Some(word) = self.words.get(index) {
                let before = word.fetch_or(mask, Ordering::AcqRel);
                added += u64::from((mask & !before).count_ones());
            }
        }
        if added > 0 {
            self.count.fetch_add(added, Ordering::AcqRel);
        }
        added
    }

    /// Removes the blocks of `extent`; returns how many were in the set before.
    pub fn remove(&self, extent: Extent) -> u64 {
        let mut removed = 0;
        for (index, mask) in words_of(self.clip(extent)) {
            if let Some(word) = self.words.get(index) {
                let before = word.fetch_and(!mask, Ordering::AcqRel);
                removed += u64::from((mask & before).count_ones());
            }
        }
        if removed > 0 {
            self.count.fetch_sub(removed, Ordering::AcqRel);
        }
        removed
    }

    /// Adds every block of `other`.
    pub fn insert_set(&self, other: &BlockSet) {
        let mut added = 0;
        for (word, more) in self.words.iter().zip(&other.words) {
            let mask = more.load(Ordering::Acquire);
            if mask != 0 {
                added += u64::from((mask & !word.fetch_or(mask, Ordering::AcqRel)).count_ones());
            }
        }
        self.count.fetch_add(added, Ordering::AcqRel);
    }

    /// Removes every block.
    pub fn clear(&self) {
        self.remove(Extent::new(0, self.blocks));
    }

    /// The first run of blocks of the set at or after `from`, cut at `limit` blocks.
    pub fn next_run(&self, from: u64, limit: u64) -> Option<Extent> {
        let first = self.find(from, true, self.blocks)?;
        let end = self.blocks.min(first.saturating_add(limit));
        Some(Extent::between(first, self.find(first, false, end).unwrap_or(end)))
    }

    /// All runs of blocks of the set, in ascending order. A run that changes meanwhile may be
    /// found in its old or its new form.
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, next: 0 }
    }

    /// Cuts `extent` into runs that are wholly in (`true`) or wholly outside (`false`) of the set.
    /// The runs together always are exactly `extent`, whatever changes meanwhile.
    pub fn mixed_runs(&self, extent: Extent) -> MixedRuns<'_> {
        MixedRuns { set: self, rest: extent }
    }

    /// The set's bits as bytes: bit `n % 8` of byte `n / 8` is block `n`. The last byte is padded
    /// with zero bits.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            self.words.iter().flat_map(|w| w.load(Ordering::Acquire).to_le_bytes()).collect();
        bytes.truncate(self.blocks.div_ceil(8) as usize);
        bytes
    }

    /// Adds the blocks whose bits are set in `bytes`, where byte 0 holds the blocks from
    /// `first_block` on (a multiple of 8). Bits past the bound are ignored.
    pub fn insert_bytes(&self, first_block: u64, bytes: &[u8]) {
        let mut run: Option<Extent> = None;
        for (index, byte) in bytes.iter().enumerate() {
            for bit in (0..8u64).filter(|bit| byte >> bit & 1 == 1) {
                let block = Extent::new(first_block.saturating_add(index as u64 * 8 + bit), 1);
                run = match run {
                    Some(open) if open.is_followed_by(block) => {
                        Some(Extent::between(open.first(), block.end()))
                    }
                    Some(open) => {
                        self.insert(open);
                        Some(block)
                    }
                    None => Some(block),
                };
            }
        }
        if let Some(open) = run {
            self.insert(open);
        }
    }

    /// Sets in `bytes`, whose first bit is `first_block`, the bits of the set's blocks. A word at a time,
    /// however the set looks.
    pub fn or_into(&self, first_block: u64, bytes: &mut [u8]) {
        for (block, chunk) in (first_block..).step_by(64).zip(bytes.chunks_mut(8)) {
            let word = self.bits_from(block).to_le_bytes();
            chunk.iter_mut().zip(word).for_each(|(to, from)| *to |= from);
        }
    }

    /// Whether the set has every block whose bit is set in `bytes`, whose first bit is `first_block`.
    pub fn contains_bytes(&self, first_block: u64, bytes: &[u8]) -> bool {
        (first_block..).step_by(64).zip(bytes.chunks(8)).all(|(block, chunk)| {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            u64::from_le_bytes(word) & !self.bits_from(block) == 0
        })
    }

    /// The bits of the 64 blocks from `block` on.
    fn bits_from(&self, block: u64) -> u64 {
        let (index, shift) = ((block / WORD_BITS) as usize, block % WORD_BITS);
        match shift {
            0 => self.word(index),
            _ => self.word(index) >> shift | self.word(index + 1) << (WORD_BITS - shift),
        }
    }

    fn clip(&self, extent: Extent) -> Extent {
        extent.intersection(Extent::new(0, self.blocks))
    }

    fn word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The first block at or after `from`, and below `limit`, that is (or is not) in the set. Looks no further than
    /// `limit`: a set of a large disk is long.
    fn find(&self, from: u64, present: bool, limit: u64) -> Option<u64> {
        let limit = limit.min(self.blocks);
        if from >= limit {
            return None;
        }
        let flip = if present { 0 } else { u64::MAX };
        let mut index = (from / WORD_BITS) as usize;
        let mut bits = (self.word(index) ^ flip) & (u64::MAX << (from % WORD_BITS));
        while bits == 0 {
            index += 1;
            if index as u64 * WORD_BITS >= limit {
                return None;
            }
            bits = self.words.get(index)?.load(Ordering::Acquire) ^ flip;
        }
        let block = index as u64 * WORD_BITS + u64::from(bits.trailing_zeros());
        (block < limit).then_some(block)
    }
}

/// Iterator over the runs of a set; see [`BlockSet::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a BlockSet,
    next: u64,
}

impl Iterator for Runs<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let run = self.set.next_run(self.next, u64::MAX)?;
        self.next = run.end();
        Some(run)
    }
}

/// Iterator over the parts of an extent; see [`BlockSet::mixed_runs`].
#[derive(Debug)]
pub struct MixedRuns<'a> {
    set: &'a BlockSet,
    rest: Extent,
}

impl Iterator for MixedRuns<'_> {
    type Item = (bool, Extent);

    fn next(&mut self) -> Option<(bool, Extent)> {
        if self.rest.is_empty() {
            return None;
        }
        let (first, end) = (self.rest.first(), self.rest.end());
        let present = self.set.contains(first);
        // Past the bound nothing is in the set.
        let limit = if present { end.min(self.set.blocks) } else { end };
        let run_end = self.set.find(first + 1, !present, limit).unwrap_or(limit);
        let (run, rest) = self.rest.split_at(run_end.saturating_sub(first).max(1));
        self.rest = rest;
        Some((present, run))
    }
}

/// The words that `extent` touches, each with the mask of its bits.
fn words_of(extent: Extent) -> impl Iterator<Item = (usize, u64)> {
    let last = if extent.is_empty() { None } else { Some((extent.end() - 1) / WORD_BITS) };
    let first = extent.first() / WORD_BITS;
    last.map(|last| first..=last).into_iter().flatten().map(move |index| {
        let start = extent.first().saturating_sub(index * WORD_BITS);
        let end = (extent.end() - index * WORD_BITS).min(WORD_BITS);
        (index as usize, (u64::MAX >> (WORD_BITS - (end - start))) << start)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn content(set: &BlockSet) -> BTreeSet<u64> {
        set.runs().flat_map(|run| run.first()..run.end()).collect()
    }

    #[test]
    fn set_asked_past_its_bound_finds_nothing() {
        let set = BlockSet::new(10);
        assert_eq!(set.insert(Extent::new(5, u64::MAX)), 5);
        assert!(!set.contains(10));
        assert!(!set.contains_all(Extent::new(9, 2)));
        assert_eq!(set.next_run(10, 1), None);
        assert_eq!(
            set.mixed_runs(Extent::new(8, 4)).collect::<Vec<_>>(),
            [(true, Extent::new(8, 2)), (false, Extent::new(10, 2)),]
        );
    }

    #[test]
    fn count_under_concurrent_inserts_and_removes_stays_exact() {
        let set = BlockSet::new(1000);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let set = &set;
                scope.spawn(move || {
                    for round in 0..200u64 {
                        set.insert(Extent::new((round * 7 + thread * 13) % 990, 10));
                        set.remove(Extent::new((round * 11 + thread * 17) % 990, 5));
                    }
                });
            }
        });
        assert_eq!(set.count(), content(&set).len() as u64);
    }

    proptest! {
        #[test]
        fn set_after_any_operations_equals_a_tree_set(
            bound in 1u64..300,
            ops in prop::collection::vec((any::<bool>(), 0u64..320, 0u64..150), 1..40),
            probe in (0u64..320, 0u64..150),
        ) {
            let (set, mut model) = (BlockSet::new(bound), BTreeSet::new());
            for (add, first, count) in ops {
                let extent = Extent::new(first, count);
                let before = model.len() as u64;
                if add {
                    model.extend((first..extent.end()).filter(|b| *b < bound));
                    prop_assert_eq!(set.insert(extent), model.len() as u64 - before);
                } else {
                    model.retain(|b| *b < first || *b >= extent.end());
                    prop_assert_eq!(set.remove(extent), before - model.len() as u64);
                }
            }
            prop_assert_eq!(&content(&set), &model);
            prop_assert_eq!(set.count(), model.len() as u64);
            let probe = Extent::new(probe.0, probe.1);
            let blocks = probe.first()..probe.end();
            prop_assert_eq!(set.contains_all(probe), blocks.clone().all(|b| model.contains(&b)));
            prop_assert_eq!(set.intersects(probe), blocks.clone().any(|b| model.contains(&b)));
            let mut at = probe.first();
            for (present, run) in set.mixed_runs(probe) {
                prop_assert_eq!(run.first(), at);
                prop_assert!(!run.is_empty());
                prop_assert!((run.first()..run.end()).all(|b| model.contains(&b) == present));
                at = run.end();
            }
            prop_assert_eq!(at, probe.end());
            let copy = BlockSet::new(bound);
            copy.insert_bytes(0, &set.to_bytes());
            prop_assert_eq!(content(&copy), model.clone());
            // From any block on, over bits that are set already.
            let (mut part, other) = (vec![0; probe.count() as usize / 8], (probe.first() % 7) as u8);
            part.fill(other);
            set.or_into(probe.first(), &mut part);
            for (index, byte) in part.iter().enumerate() {
                for bit in 0..8 {
                    let block = probe.first() + index as u64 * 8 + bit;
                    let expected = other >> bit & 1 == 1 || model.contains(&block);
                    prop_assert_eq!(byte >> bit & 1 == 1, expected, "block {}", block);
                }
            }
            let blocks = (probe.first()..).take(part.len() * 8);
            let has_all = blocks.clone().zip(part.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1)))
                .all(|(block, bit)| bit == 0 || model.contains(&block));
            prop_assert_eq!(set.contains_bytes(probe.first(), &part), has_all);
        }
    }
}
