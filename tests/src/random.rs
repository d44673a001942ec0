//! Repeatable random numbers, and contents that can be computed again from a seed and an offset.

/// A small generator (SplitMix64). Equal seeds give equal sequences.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence that depends on `seed` only.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }
}

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `to` with the contents that `seed` has at byte `offset` (a multiple of 8) of a disk.
pub fn fill(seed: u64, offset: u64, to: &mut [u8]) {
    let key = mix(seed.wrapping_add(1)) | 1;
    for (index, chunk) in (offset / 8..).zip(to.chunks_mut(8)) {
        let word = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key;
        let bytes = word.wrapping_mul(key).to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// The contents that `seed` has at `offset`.
pub fn contents(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    fill(seed, offset, &mut data);
    data
}

/// `count` different blocks of a disk of `blocks` blocks, spread over all of it, in random order.
pub fn scattered(seed: u64, count: u64, blocks: u64) -> Vec<u64> {
    assert!(0 < count && count <= blocks);
    let mut random = Random::new(seed);
    let room = blocks / count;
    let mut chosen: Vec<u64> = (0..count).map(|i| i * room + random.below(room)).collect();
    for last in (1..chosen.len()).rev() {
        chosen.swap(last, random.below(last as u64 + 1) as usize);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_of_a_part_equal_the_part_of_the_contents() {
        assert_eq!(contents(7, 512, 512), contents(7, 0, 4096)[512..1024]);
        assert_ne!(contents(7, 0, 4096), contents(8, 0, 4096));
    }

    #[test]
    fn scattered_blocks_are_different_and_on_the_disk() {
        let mut blocks = scattered(1, 100, 1050);
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 100);
        assert!(blocks.iter().all(|&b| b < 1050));
    }
}
