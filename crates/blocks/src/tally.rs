//! How runs of several sets lie: over each other, and over a disk that is cut into cells.

use crate::Extent;

/// A run of blocks, each of which is in the same number of sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tallied {
    /// The run. It is as long as can be: the blocks beside it are in another number of sets.
    pub extent: Extent,
    /// In how many sets its blocks are; at least 1.
    pub sets: usize,
}

/// In how many of the sets each block is, as runs in ascending order.
///
/// The runs of a set are in ascending order and do not overlap, as [`BlockSet::runs`](crate::BlockSet::runs) gives
/// them. Memory goes with the number of runs, never with that of blocks.
pub fn tally(sets: &[Vec<Extent>]) -> Vec<Tallied> {
    // Where a run begins or ends, and by how many sets there are more from there on.
    let mut edges: Vec<(u64, i64)> = sets
        .iter()
        .flatten()
        .filter(|run| !run.is_empty())
        .flat_map(|run| [(run.first(), 1), (run.end(), -1)])
        .collect();
    edges.sort_unstable_by_key(|(at, _)| *at);
    let mut found: Vec<Tallied> = Vec::new();
    let (mut from, mut depth) = (0, 0_i64);
    let mut rest = edges.into_iter().peekable();
    while let Some((at, change)) = rest.next() {
        let mut change = change;
        while let Some((_, more)) = rest.next_if(|(next, _)| *next == at) {
            change += more;
        }
        // One set's run ends where that of another begins: nothing changes.
        if change == 0 {
            continue;
        }
        let extent = Extent::between(from, at);
        if depth > 0 && !extent.is_empty() {
            found.push(Tallied { extent, sets: depth as usize });
        }
        (from, depth) = (at, depth + change);
    }
    found
}

/// How many blocks of the runs lie in each of `cells` equal parts of a disk of `blocks` blocks. A part may have a block more
/// or less than another one, or none where there are more parts than blocks. Blocks past the end are left out.
pub fn density(runs: impl Iterator<Item = Extent>, blocks: u64, cells: usize) -> Vec<u64> {
    let mut counts = vec![0; cells];
    if blocks == 0 || cells == 0 {
        return counts;
    }
    for run in runs {
        let run = run.intersection(Extent::new(0, blocks));
        let mut at = run.first();
        while at < run.end() {
            let index = cell_of(at, blocks, cells);
            let end = cell(index, blocks, cells).end().min(run.end());
            if let Some(count) = counts.get_mut(index) {
                *count += end - at;
            }
            at = end.max(at + 1);
        }
    }
    counts
}

/// The blocks of part number `index` of `cells` of a disk of `blocks` blocks; see [`density`].
pub fn cell(index: usize, blocks: u64, cells: usize) -> Extent {
    let edge = |index: usize| (u128::from(blocks) * index as u128 / cells.max(1) as u128) as u64;
    Extent::between(edge(index.min(cells)), edge((index + 1).min(cells)))
}

/// The part in which a block lies.
fn cell_of(block: u64, blocks: u64, cells: usize) -> usize {
    // The last part that does not begin after it.
    ((u128::from(block) + 1) * cells as u128).div_ceil(u128::from(blocks)).saturating_sub(1) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::BlockSet;

    const BLOCKS: u64 = 200;

    fn sets() -> impl Strategy<Value = Vec<Vec<Extent>>> {
        let run = (0..BLOCKS, 0..40_u64).prop_map(|(first, count)| Extent::new(first, count));
        let set = prop::collection::vec(run, 0..8).prop_map(|runs| {
            let set = BlockSet::new(BLOCKS);
            runs.iter().for_each(|run| {
                set.insert(*run);
            });
            set.runs().collect::<Vec<_>>()
        });
        prop::collection::vec(set, 0..6)
    }

    proptest! {
        /// Block by block there is no other answer; and no run could be longer.
        #[test]
        fn tally_of_any_sets_counts_as_one_would_by_hand(sets in sets()) {
            let found = tally(&sets);
            for block in 0..BLOCKS {
                let holds = |run: &Extent| (run.first()..run.end()).contains(&block);
                let by_hand = sets.iter().filter(|set| set.iter().any(holds)).count();
                let counted: Vec<usize> =
                    found.iter().filter(|run| holds(&run.extent)).map(|run| run.sets).collect();
                let expected = if by_hand == 0 { vec![] } else { vec![by_hand] };
                prop_assert_eq!(counted, expected, "block {}", block);
            }
            for pair in found.windows(2) {
                let (a, b) = (pair[0], pair[1]);
                prop_assert!(a.extent.end() <= b.extent.first());
                prop_assert!(!a.extent.is_followed_by(b.extent) || a.sets != b.sets);
            }
        }

        #[test]
        fn density_of_any_runs_counts_each_block_in_its_cell(
            sets in sets(), blocks in 1..=BLOCKS, cells in 1..300_usize,
        ) {
            let set = BlockSet::new(BLOCKS);
            sets.iter().flatten().for_each(|run| { set.insert(*run); });
            let counts = density(set.runs(), blocks, cells);
            prop_assert_eq!(counts.len(), cells);
            let mut next = 0;
            for (index, count) in counts.iter().enumerate() {
                let cell = cell(index, blocks, cells);
                prop_assert_eq!(cell.first(), next);
                next = cell.end();
                let by_hand = (cell.first()..cell.end()).filter(|block| set.contains(*block)).count();
                prop_assert_eq!(*count, by_hand as u64, "cell {}", cell);
            }
            prop_assert_eq!(next, blocks);
        }
    }

    #[test]
    fn density_of_the_largest_disk_neither_wraps_nor_takes_for_ever() {
        let all = Extent::new(0, crate::BLOCKS_MAX);
        let counts = density([all].into_iter(), crate::BLOCKS_MAX, 1000);
        assert_eq!(counts.iter().sum::<u64>(), crate::BLOCKS_MAX);
        assert_eq!(density([all].into_iter(), 0, 7), [0; 7]);
        assert!(density([all].into_iter(), 7, 0).is_empty());
    }
}
