//! Files that were cut, overwritten or forged: never a panic, never a wrong set.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use blocks::{BlockSet, Extent};
use proptest::prelude::*;
use support::{MemFile, read_bytes, runs, small_log};
use write_log::{LogError, LogWriter, Mark};

const BLOCKS: u64 = 300;

/// A small log with two rewrites, its marks and what it held there.
fn log(seal: bool) -> (Vec<u8>, Vec<(Mark, Vec<Extent>)>) {
    let (file, mut log) = small_log(BLOCKS);
    let (owned, mut marks) = (BlockSet::new(BLOCKS), vec![(log.mark(), vec![])]);
    let (mut block, mut appends) = (0, 0);
    // Batches of 100 extents fill an area; then single ones.
    while log.mark().epoch < 3 || appends < 4 {
        let count = if log.mark().epoch < 3 { 100 } else { 1 };
        appends += u64::from(log.mark().epoch >= 3);
        let batch: Vec<Extent> = (0..count).map(|n| Extent::new((block + n * 7) % 290, 1 + n % 3)).collect();
        block += 11;
        let mark = log.append(&batch, &owned).unwrap();
        batch.iter().for_each(|extent| {
            owned.insert(*extent);
        });
        marks.push((mark, runs(&owned)));
    }
    if seal {
        marks.push((log.seal(owned.count()).unwrap(), runs(&owned)));
    }
    (file.bytes(), marks)
}

/// Every conclusion from `bytes` is right or was not drawn.
fn check(bytes: Vec<u8>, marks: &[(Mark, Vec<Extent>)], what: &str) {
    let Ok(contents) = read_bytes(bytes) else { return };
    for (mark, expected) in marks {
        if let Some(found) = contents.blocks_at(*mark) {
            assert_eq!(&runs(&found), expected, "{what}, {mark:?}");
        }
    }
    if let Some(found) = contents.sealed_blocks() {
        assert_eq!(&runs(&found), &marks.last().unwrap().1, "{what}, sealed");
    }
    let _ = contents.readable_blocks();
}

/// Invariant 6.
#[test]
fn log_cut_at_any_byte_is_refused() {
    let (bytes, marks) = log(true);
    for len in 0..bytes.len() {
        let short = bytes[..len].to_vec();
        assert!(matches!(
            read_bytes(short).unwrap_err(),
            LogError::Damaged { .. } | LogError::NotALog { .. }
        ));
    }
    check(bytes.clone(), &marks, "whole");
    let longer = [bytes, vec![0]].concat();
    assert!(matches!(read_bytes(longer), Err(LogError::Damaged { .. })));
}

/// Invariant 6: also when the file keeps its length, as after a power cut.
#[test]
fn log_that_is_zero_from_any_byte_on_is_exact_or_untrusted() {
    for seal in [false, true] {
        let (bytes, marks) = log(seal);
        for from in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[from..].fill(0);
            check(bad, &marks, &format!("zeros from {from}"));
        }
    }
}

/// Invariant 6. (The header's own test flips its bits.)
#[test]
fn log_with_any_bit_flipped_is_exact_or_untrusted() {
    let (bytes, marks) = log(true);
    for bit in 4096 * 8..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // A part of the marks for each bit, the last one always.
        let some: Vec<_> = marks.iter().rev().step_by(1 + bit % 7).rev().cloned().collect();
        check(bad, &some, &format!("bit {bit}"));
    }
}

/// Invariant 6: a bit that flips in what a mark covers is noticed at that mark, always.
#[test]
fn log_with_a_bit_flipped_before_the_mark_is_untrusted_at_it() {
    let (bytes, marks) = log(false);
    let (mark, _) = marks.last().unwrap();
    assert_eq!(mark.epoch, 3);
    for bit in (4096 * 8)..(4096 + mark.committed as usize) * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(read_bytes(bad).unwrap().blocks_at(*mark).is_none(), "bit {bit}");
    }
}

/// Invariant 6: a mark of another log, or one that was never returned, is untrusted.
#[test]
fn mark_that_the_log_does_not_lead_to_is_untrusted() {
    let (bytes, marks) = log(true);
    let contents = read_bytes(bytes).unwrap();
    assert!(contents.blocks_at(contents.start()).is_none(), "its area was written over");
    for (mark, _) in &marks {
        for bad in [
            Mark { crc: mark.crc ^ 1, ..*mark },
            Mark { committed: mark.committed + 8, ..*mark },
            Mark { committed: mark.committed.wrapping_sub(8), ..*mark },
            Mark { epoch: mark.epoch + 2, ..*mark },
            Mark { epoch: 0, ..*mark },
            Mark { epoch: u32::MAX, ..*mark },
        ] {
            assert!(contents.blocks_at(bad).is_none(), "{bad:?}");
        }
    }
}

/// Invariant 2: the frames of an older log that lay in the same place are not read as this one's.
#[test]
fn frames_of_another_log_are_not_read() {
    let (bytes, _) = log(false);
    let (file, _log) = small_log(BLOCKS);
    let mut header = support::header(write_log::LogKind::Session, BLOCKS);
    header.id.seq += 1;
    let other = support::MemFile::default();
    let size = write_log::area_size_min(header.geometry);
    let _log =
        write_log::LogWriter::create_on(Box::new(other.clone()), support::path(), &header, size).unwrap();
    let mut mixed = other.bytes();
    mixed[4096..].copy_from_slice(&bytes[4096..]);
    let contents = read_bytes(mixed).unwrap();
    assert!(contents.readable_blocks().is_empty());
    assert!(contents.areas.iter().all(|area| area.frames() == 0 && area.is_torn()));
    let same = [&file.bytes()[..4096], &bytes[4096..]].concat();
    assert!(!read_bytes(same).unwrap().readable_blocks().is_empty());
}

proptest! {
    /// Invariant 6.
    #[test]
    fn log_with_any_part_overwritten_is_exact_or_untrusted(
        at in 4096usize..12_200, garbage in prop::collection::vec(any::<u8>(), 1..200),
        seal in any::<bool>(), copy_from in prop::option::of(4096usize..12_000),
    ) {
        let (mut bytes, marks) = log(seal);
        let end = bytes.len().min(at + garbage.len());
        let source = copy_from.map(|from| bytes[from..from + (end - at)].to_vec()).unwrap_or(garbage);
        bytes[at..end].copy_from_slice(&source[..end - at]);
        check(bytes, &marks, "overwritten");
    }

    #[test]
    fn file_of_any_bytes_is_answered(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert!(read_bytes(bytes).is_err());
    }

    /// Invariants 1 and 6: a kill cuts an append, a rewrite or a seal, of which any bytes are there and the others are not.
    /// What was recorded before is exact, and who goes on from there has an exact log again.
    #[test]
    fn what_a_kill_cut_anywhere_is_in_nobodys_way(
        batches in prop::collection::vec(batch(), 0..30), last in prop::option::of(batch()),
        more in prop::collection::vec(batch(), 1..4), share in 0..=100u32, seed in any::<u64>(),
    ) {
        let (file, mut log) = small_log(BLOCKS);
        let owned = BlockSet::new(BLOCKS);
        let append = |log: &mut LogWriter, batch: &[Extent]| {
            log.append(batch, &owned).unwrap();
            batch.iter().for_each(|extent| { owned.insert(*extent); });
        };
        batches.iter().for_each(|batch| append(&mut log, batch));
        let (mark, expected, before) = (log.mark(), runs(&owned), file.bytes());
        match &last {
            Some(batch) => { log.append(batch, &owned).unwrap(); }
            None => { log.seal(owned.count()).unwrap(); }
        }
        let after = file.bytes();
        let (mut bytes, mut random) = (after.clone(), seed | 1);
        for (now, before) in bytes.iter_mut().zip(before) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if (random >> 33) % 100 >= u64::from(share) {
                *now = before;
            }
        }
        let cut = bytes != after;
        let left = MemFile::of(bytes);
        let contents = write_log::read_from(&left, &support::path()).unwrap();
        prop_assert_eq!(runs(&contents.blocks_at(mark).unwrap()), &expected[..]);
        if cut {
            prop_assert!(contents.sealed.is_none());
            let ends = contents.areas.iter().filter_map(|area| area.mark());
            prop_assert!(ends.filter(|end| end.epoch == mark.epoch).all(|end| end == mark), "a cut frame is read");
        }
        // A whole seal says that the session has ended: nobody goes on.
        if contents.sealed.is_none() {
            let (mut log, found) = LogWriter::resume_on(Box::new(left.clone()), support::path(), mark).unwrap();
            prop_assert_eq!(runs(&found), expected);
            more.iter().for_each(|batch| append(&mut log, batch));
            let contents = write_log::read_from(&left, &support::path()).unwrap();
            prop_assert_eq!(runs(&contents.blocks_at(log.mark()).unwrap()), runs(&owned));
            prop_assert!(contents.sealed.is_none());
            log.seal(owned.count()).unwrap();
            let contents = write_log::read_from(&left, &support::path()).unwrap();
            prop_assert_eq!(runs(&contents.sealed_blocks().unwrap()), runs(&owned));
        }
    }
}

/// What is appended at once.
fn batch() -> impl Strategy<Value = Vec<Extent>> {
    prop::collection::vec(
        (0..BLOCKS - 4, 1..4u64).prop_map(|(first, count)| Extent::new(first, count)),
        1..100,
    )
}
