//! The layout of a delta, version 1.
//!
//! All numbers are little endian. A block has 4096 bytes; the last one of a disk may be short.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 to 15 | `PRISTINE DELTA 1` |
//! | 16 to 19 | format version: 1 |
//! | 20 to 23 | bytes in a block: 4096 |
//! | 24 to 31 | size of the parent's disk in bytes |
//! | 32 to 39 | size of the child's disk in bytes |
//! | 40 to 71 | root hash of the parent |
//! | 72 to 103 | root hash of the child |
//! | 104 to 107 | length of the parent's path in bytes, 4095 at most; 0: it is not told |
//! | 108 to 111 | zeroes |
//! | 112 to 119 | number of extents, 4194304 at most |
//! | 120 on | the parent's path, without an end mark |
//! | after it | each extent: its first block, 8 bytes, and its number of blocks, 8 bytes |
//! | the last 4 | CRC32C of all bytes before |
//!
//! Extents are ascending, none is empty, no two touch, and none reaches past the end of the larger disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use blocks::{BLOCK_SIZE, Extent, Geometry};

use super::{DELTA_EXTENTS_MAX, Delta, Generation, blocks_of};
use crate::seal::Root;

/// How a delta begins.
pub(super) const MAGIC: &[u8; 16] = b"PRISTINE DELTA 1";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 120;
const EXTENT_LEN: usize = 16;
const CHECK_LEN: usize = 4;
/// `PATH_MAX` without its end mark.
const PATH_LEN_MAX: usize = 4095;
/// No delta has more bytes.
pub(super) const SIZE_MAX: u64 =
    (HEADER_LEN + PATH_LEN_MAX + DELTA_EXTENTS_MAX * EXTENT_LEN + CHECK_LEN) as u64;

/// Whether a path can be written down.
pub(super) fn is_a_path(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    !bytes.is_empty() && bytes.len() <= PATH_LEN_MAX && !bytes.contains(&0)
}

/// As it is in a file.
pub(super) fn to_bytes(delta: &Delta) -> Vec<u8> {
    let path = delta.parent_path.as_ref().map(|path| path.as_os_str().as_bytes()).unwrap_or_default();
    let extents = delta.extents.len();
    let mut bytes = Vec::with_capacity(HEADER_LEN + path.len() + extents * EXTENT_LEN + CHECK_LEN);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((BLOCK_SIZE as u32).to_le_bytes());
    bytes.extend(delta.parent.size.to_le_bytes());
    bytes.extend(delta.child.size.to_le_bytes());
    bytes.extend(delta.parent.root.as_bytes());
    bytes.extend(delta.child.root.as_bytes());
    bytes.extend((path.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((extents as u64).to_le_bytes());
    bytes.extend(path);
    for extent in &delta.extents {
        bytes.extend(extent.first().to_le_bytes());
        bytes.extend(extent.count().to_le_bytes());
    }
    let check = crc32c::crc32c(&bytes);
    bytes.extend(check.to_le_bytes());
    bytes
}

/// Bytes of which the front is taken away, piece by piece.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.first_chunk().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Reads it again.
///
/// # Errors
/// What is wrong, as a sentence about the delta.
pub(super) fn parse(bytes: &[u8]) -> Result<Delta, String> {
    if !bytes.starts_with(MAGIC) {
        return Err("it is not the delta of a base".into());
    }
    let mut rest = Rest(bytes);
    let damaged = |what: &str| format!("it is damaged: {what}");
    let short = || damaged("it is too short");
    rest.take(MAGIC.len()).ok_or_else(short)?;
    let version = rest.u32().ok_or_else(short)?;
    if version != VERSION {
        return Err(format!("it has format version {version}, this program knows {VERSION}"));
    }
    let (body, check) = bytes.split_last_chunk::<CHECK_LEN>().ok_or_else(short)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*check) {
        return Err(damaged("it does not have the checksum that it should"));
    }
    read(rest, bytes.len()).ok_or_else(short)?
}

/// Reads what follows the version; `None`: it ends too early.
fn read(mut rest: Rest<'_>, len: usize) -> Option<Result<Delta, String>> {
    let block = rest.u32()?;
    if u64::from(block) != BLOCK_SIZE {
        return Some(Err(format!("its blocks have {block} bytes, expected {BLOCK_SIZE}")));
    }
    let (parent_size, child_size) = (rest.u64()?, rest.u64()?);
    let parent = Generation { root: Root::from_bytes(rest.array()?), size: parent_size };
    let child = Generation { root: Root::from_bytes(rest.array()?), size: child_size };
    for size in [parent_size, child_size] {
        if let Err(error) = Geometry::new(size) {
            return Some(Err(error.to_string()));
        }
    }
    let path_len = rest.u32()? as usize;
    rest.take(4)?;
    let extents = rest.u64()?;
    if path_len > PATH_LEN_MAX || extents > DELTA_EXTENTS_MAX as u64 {
        return Some(Err(format!(
            "it has {extents} extents and a path of {path_len} bytes, which is too much"
        )));
    }
    let extents = extents as usize;
    if len != HEADER_LEN + path_len + extents * EXTENT_LEN + CHECK_LEN {
        return Some(Err("it is damaged: its size does not fit its number of extents".into()));
    }
    let path = Path::new(OsStr::from_bytes(rest.take(path_len)?));
    let mut found: Vec<Extent> = Vec::with_capacity(extents);
    let blocks = blocks_of(parent, child);
    for _ in 0..extents {
        let (first, count) = (rest.u64()?, rest.u64()?);
        let follows = found.last().is_none_or(|last| first > last.end());
        if count == 0 || !follows || first.checked_add(count).is_none_or(|end| end > blocks) {
            return Some(Err(format!("it is damaged: extent {} is not in its place", found.len())));
        }
        found.push(Extent::new(first, count));
    }
    let parent_path: Option<PathBuf> = is_a_path(path).then(|| path.to_owned());
    Some(Ok(Delta { parent, child, parent_path, extents: found }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::generation;
    use super::*;

    fn delta() -> Delta {
        let (parent, child) = (generation(0xaa, 1 << 20), generation(0xbb, 2 << 20));
        Delta::new(parent, child, vec![Extent::new(0, 1), Extent::new(7, 3), Extent::new(500, 12)])
            .with_parent_path(Path::new("golden 1.raw"))
    }

    /// With the checksum that it should have.
    fn checked(mut bytes: Vec<u8>) -> Vec<u8> {
        let at = bytes.len() - CHECK_LEN;
        let check = crc32c::crc32c(&bytes[..at]);
        bytes[at..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    #[test]
    fn delta_with_any_bit_flipped_or_cut_anywhere_is_refused() {
        let bytes = to_bytes(&delta());
        assert_eq!(parse(&bytes), Ok(delta()));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "cut at {len}");
            assert!(len < HEADER_LEN || parse(&checked(bytes[..len].to_vec())).is_err(), "cut at {len}");
        }
    }

    /// Deltas that were written stay readable for ever.
    #[test]
    fn bytes_of_version_1_are_these() {
        let bytes = to_bytes(&delta());
        assert_eq!(bytes.len(), HEADER_LEN + 12 + 3 * EXTENT_LEN + CHECK_LEN);
        assert_eq!(&bytes[16..24], [1, 0, 0, 0, 0, 16, 0, 0]);
        assert_eq!(bytes[24..40], [(1_u64 << 20).to_le_bytes(), (2_u64 << 20).to_le_bytes()].concat());
        assert_eq!((&bytes[40..72], &bytes[72..104]), (&[0xaa; 32][..], &[0xbb; 32][..]));
        assert_eq!(bytes[104..120], [12, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[120..132], b"golden 1.raw");
        assert_eq!(bytes[148..164], [7, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn delta_of_another_version_or_with_extents_out_of_place_is_refused_with_the_reason() {
        let bytes = to_bytes(&delta());
        let refused = |at: usize, value: u8, why: &str| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let found = parse(&checked(bytes)).unwrap_err();
            assert!(found.contains(why), "{found}");
        };
        refused(16, 2, "format version 2");
        refused(21, 32, "blocks have 8192");
        refused(24, 1, "not a multiple of 512");
        refused(112, 4, "does not fit");
        refused(119, 1, "too much");
        refused(148, 1, "extent 1 is not in its place");
        refused(156, 0, "extent 1 is not in its place");
        refused(172, 13, "extent 2 is not in its place");
    }

    proptest! {
        #[test]
        fn delta_of_any_extents_reads_as_it_was_written(
            runs in prop::collection::vec((0_u64..4096, 0_u64..64), 0..50), name in "[a-z/]{0,40}",
        ) {
            let extents = runs.into_iter().map(|(first, count)| Extent::new(first, count)).collect();
            let delta = Delta::new(generation(1, 8 << 20), generation(2, 16 << 20), extents)
                .with_parent_path(Path::new(&name));
            prop_assert_eq!(parse(&to_bytes(&delta)), Ok(delta));
        }

        /// Whatever the bytes are: an answer, and no memory beyond what they themselves take.
        #[test]
        fn nonsense_with_a_right_checksum_is_answered(
            tail in prop::collection::vec(any::<u8>(), CHECK_LEN..300), keep in 20_usize..HEADER_LEN,
        ) {
            let mut bytes = to_bytes(&delta())[..keep].to_vec();
            bytes.extend(tail);
            let _ = parse(&checked(bytes));
        }
    }
}
