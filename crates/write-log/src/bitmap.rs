//! Sets of blocks as chunks of a bitmap, made from runs in ascending order.

use blocks::{Extent, Geometry};

/// Bytes of bitmap in the chunks that are written; the last one may be shorter.
pub(crate) const CHUNK_BYTES: u64 = 64 << 10;

/// The extents that the chunks of a disk's bitmap stand for, in order; their number of blocks is a
/// multiple of 8 but for the last one.
pub(crate) fn chunks(geometry: Geometry) -> impl Iterator<Item = Extent> {
    let blocks = geometry.blocks();
    (0..blocks)
        .step_by((CHUNK_BYTES * 8) as usize)
        .map(move |first| Extent::between(first, blocks.min(first + CHUNK_BYTES * 8)))
}

/// Runs in ascending order that are handed out chunk by chunk, each looked at once: a bitmap is
/// made in time linear to the disk's size, however the set looks.
#[derive(Debug)]
pub(crate) struct ChunkFiller<I> {
    runs: I,
    current: Option<Extent>,
}

impl<I: Iterator<Item = Extent>> ChunkFiller<I> {
    pub(crate) fn new(mut runs: I) -> Self {
        let current = runs.next();
        Self { runs, current }
    }

    /// Sets the bits of the blocks that lie in `chunk`, whose first block is bit 0 of `bits`.
    /// Chunks must be asked for in ascending order.
    pub(crate) fn fill(&mut self, chunk: Extent, bits: &mut [u8]) {
        while let Some(run) = self.current {
            if run.first() >= chunk.end() {
                return;
            }
            let inside = run.intersection(chunk);
            if !inside.is_empty() {
                set_bits(bits, inside.first() - chunk.first(), inside.end() - chunk.first());
            }
            if run.end() > chunk.end() {
                return;
            }
            self.current = self.runs.next();
        }
    }
}

/// Sets the bits from `start` up to `end`; those past the end of `bits` are left out.
fn set_bits(bits: &mut [u8], start: u64, end: u64) {
    let (head, tail) = (start.next_multiple_of(8).min(end), (end & !7).max(start));
    let mut set_in = |bit: u64, mask: u8| {
        if let Some(byte) = bits.get_mut((bit / 8) as usize) {
            *byte |= mask;
        }
    };
    (start..head).for_each(|bit| set_in(bit, 1 << (bit % 8)));
    (tail.max(head)..end).for_each(|bit| set_in(bit, 1 << (bit % 8)));
    if head < tail
        && let Some(whole) = bits.get_mut((head / 8) as usize..(tail / 8) as usize)
    {
        whole.fill(u8::MAX);
    }
}

/// How many bits of `bits` are set.
pub(crate) fn count_ones(bits: &[u8]) -> u64 {
    bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

/// The runs of set bits of `bits`, where bit 0 is block `first`.
pub(crate) fn runs_of(first: u64, bits: &[u8]) -> impl Iterator<Item = Extent> {
    let end = bits.len() as u64 * 8;
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next_bit(bits, at, true)?;
        at = next_bit(bits, start, false).unwrap_or(end);
        Some(Extent::between(first.saturating_add(start), first.saturating_add(at)))
    })
}

/// The first bit at or after `from` that is `set`.
fn next_bit(bits: &[u8], from: u64, set: bool) -> Option<u64> {
    let flip = if set { 0 } else { u8::MAX };
    let mut index = (from / 8) as usize;
    let mut byte = (bits.get(index)? ^ flip) & u8::MAX << (from % 8);
    while byte == 0 {
        index += 1;
        byte = bits.get(index)? ^ flip;
    }
    Some(index as u64 * 8 + u64::from(byte.trailing_zeros()))
}

#[cfg(test)]
mod tests {
    use blocks::BlockSet;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn chunks_of_a_large_disk_cover_it_without_gaps() {
        let disk = Geometry::new((5 << 30) + 512).unwrap();
        let chunks: Vec<Extent> = chunks(disk).collect();
        assert_eq!(chunks.len(), 3);
        assert!(chunks.windows(2).all(|pair| pair[0].is_followed_by(pair[1])));
        assert_eq!((chunks[0].first(), chunks[2].end()), (0, disk.blocks()));
    }

    proptest! {
        #[test]
        fn filler_of_any_runs_makes_the_bits_of_the_set(
            extents in prop::collection::vec((0u64..400, 0u64..90), 0..12), chunk_bytes in 1u64..9,
        ) {
            let set = BlockSet::new(400);
            for (first, count) in extents {
                set.insert(Extent::new(first, count));
            }
            let (mut filler, mut all, mut runs) = (ChunkFiller::new(set.runs()), Vec::new(), Vec::new());
            for first in (0..400).step_by(chunk_bytes as usize * 8) {
                let chunk = Extent::between(first, 400.min(first + chunk_bytes * 8));
                let mut bits = vec![0; chunk.count().div_ceil(8) as usize];
                filler.fill(chunk, &mut bits);
                runs.extend(runs_of(first, &bits));
                all.extend(bits);
            }
            prop_assert_eq!(&all, &set.to_bytes());
            prop_assert_eq!(count_ones(&all), set.count());
            Extent::normalize(&mut runs);
            prop_assert_eq!(runs, set.runs().collect::<Vec<_>>());
        }
    }
}
