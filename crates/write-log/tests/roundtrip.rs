//! What was appended is read back, at every mark, through any number of rewrites.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use blocks::{BlockSet, Extent};
use proptest::prelude::*;
use support::{header, path, read_bytes, runs, set_of, small_log};
use write_log::{LogError, LogKind, LogWriter, Mark, area_size_min};

fn extents(blocks: u64, most: usize) -> impl Strategy<Value = Vec<Extent>> {
    let extent =
        (0..blocks, 0u64..40).prop_map(move |(first, count)| Extent::new(first, count.min(blocks - first)));
    prop::collection::vec(extent, 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Invariants 2 and 6: a mark leads to exactly the blocks that were logged, or to nothing.
    #[test]
    fn log_after_any_appends_is_exact_at_every_mark_that_it_still_holds(
        blocks in 1u64..3000,
        seeds in prop::collection::vec(extents(3000, 150), 1..40),
        seal in any::<bool>(),
    ) {
        let (file, mut log) = small_log(blocks);
        let (owned, mut marks) = (BlockSet::new(blocks), vec![(log.mark(), vec![])]);
        for batch in seeds {
            let batch: Vec<Extent> = batch.iter().map(|e| e.intersection(Extent::new(0, blocks))).collect();
            let mark = log.append(&batch, &owned).unwrap();
            batch.iter().for_each(|extent| { owned.insert(*extent); });
            marks.push((mark, runs(&owned)));
            prop_assert_eq!(mark, log.mark());
        }
        if seal {
            marks.push((log.seal(owned.count()).unwrap(), runs(&owned)));
        }
        let contents = read_bytes(file.bytes()).unwrap();
        prop_assert_eq!(&contents.header, log.header());
        for (mark, expected) in &marks {
            let found = contents.blocks_at(*mark);
            // The two newest epochs are there as a whole.
            prop_assert!(found.is_some() || mark.epoch + 1 < log.mark().epoch, "{:?}", mark);
            if let Some(found) = found {
                prop_assert_eq!(&runs(&found), expected);
            }
        }
        prop_assert_eq!(runs(&contents.readable_blocks()), runs(&owned));
        prop_assert_eq!(contents.sealed, seal.then_some(log.mark()));
        prop_assert_eq!(contents.sealed_blocks().map(|set| runs(&set)), seal.then_some(runs(&owned)));
    }

    #[test]
    fn pending_log_of_any_set_is_sealed_and_exact(
        blocks in 1u64..3000, extents in extents(3000, 200), dense in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (set, header) = (set_of(blocks, &extents), header(LogKind::Pending, blocks));
        if dense {
            (0..blocks).step_by(2).for_each(|block| { set.insert(Extent::new(block, 1)); });
        }
        LogWriter::write_pending(dir.path(), &header, &set).unwrap();
        let path = dir.path().join(header.id.file_name());
        let contents = write_log::read(&path).unwrap();
        prop_assert_eq!(&contents.header, &header);
        prop_assert_eq!(runs(&contents.sealed_blocks().unwrap()), runs(&set));
        prop_assert_eq!(runs(&contents.readable_blocks()), runs(&set));
        let all = area_size_min(header.geometry) + 4096;
        prop_assert!(path.metadata().unwrap().len() <= all, "never more than a bitmap");
    }
}

#[test]
fn append_that_fits_is_one_write_and_no_sync() {
    let (file, mut log) = small_log(1000);
    let owned = BlockSet::new(1000);
    log.append(&[Extent::new(0, 5)], &owned).unwrap();
    let before = file.state().writes;
    log.append(&[Extent::new(7, 5), Extent::new(100, 5)], &owned).unwrap();
    assert_eq!(file.state().writes, before + 1);
    assert_eq!(file.state().unsynced.len(), 2);
    log.append(&[Extent::new(7, 0)], &owned).unwrap();
    assert_eq!(file.state().writes, before + 1, "nothing to append");
}

#[test]
fn append_to_a_full_area_moves_to_the_other_one_durably() {
    let (file, mut log) = small_log(2000);
    let owned = BlockSet::new(2000);
    let mut block = 0;
    while log.mark().epoch < 4 {
        log.append(&[Extent::new(block, 1)], &owned).unwrap();
        owned.insert(Extent::new(block, 1));
        block = (block + 2) % 2000;
    }
    assert!(file.state().unsynced.is_empty(), "a rewrite is synced");
    let contents = read_bytes(file.bytes()).unwrap();
    assert_eq!(contents.areas[1].mark(), Some(log.mark()));
    assert_eq!(contents.areas[0].mark().unwrap().epoch, 3);
    assert!(contents.areas.iter().all(|area| !area.is_torn()));
}

#[test]
fn append_of_more_extents_than_an_area_holds_becomes_a_bitmap() {
    let (file, mut log) = small_log(8000);
    let batch: Vec<Extent> = (0..4000).map(|n| Extent::new(n * 2, 1)).collect();
    let mark = log.append(&batch, &BlockSet::new(8000)).unwrap();
    assert_eq!(mark.epoch, 2);
    let found = read_bytes(file.bytes()).unwrap().blocks_at(mark).unwrap();
    assert_eq!(runs(&found), batch);
}

#[test]
fn log_of_a_disk_with_several_bitmap_chunks_is_exact() {
    let blocks = (5u64 << 30) / 4096 + 1;
    let (file, mut log) = small_log(blocks);
    let owned = BlockSet::new(blocks);
    let batch: Vec<Extent> = (0..30_000).map(|n| Extent::new(n * 43, 1 + n % 40)).collect();
    let ends = [Extent::new(524_280, 20), Extent::new(blocks - 1, 1)];
    log.append(&ends, &owned).unwrap();
    ends.iter().for_each(|extent| {
        owned.insert(*extent);
    });
    let mark = log.append(&batch, &owned).unwrap();
    batch.iter().for_each(|extent| {
        owned.insert(*extent);
    });
    assert_eq!(mark.epoch, 2);
    let contents = read_bytes(file.bytes()).unwrap();
    assert_eq!(contents.areas[1].frames(), 3);
    assert_eq!(runs(&contents.blocks_at(mark).unwrap()), runs(&owned));
    // Invariant 6: inside of the bitmap there is no set yet, even if the checksum is right.
    let area = 4096 + area_size_min(log.header().geometry) as usize;
    let crc = u32::from_le_bytes(file.bytes()[area + 12..area + 16].try_into().unwrap());
    let inside = Mark { epoch: 2, committed: 24 + 65536, crc };
    assert!(contents.blocks_at(inside).is_none());
}

/// Invariant 2: a caller whose set lags behind its appends must not make the log forget.
#[test]
fn rewrite_with_a_set_that_lags_behind_keeps_what_was_logged() {
    let (file, mut log) = small_log(2000);
    let (nothing, logged) = (BlockSet::new(2000), BlockSet::new(2000));
    let mut block = 0;
    while log.mark().epoch < 3 {
        log.append(&[Extent::new(block, 1)], &nothing).unwrap();
        logged.insert(Extent::new(block, 1));
        block += 2;
    }
    let found = read_bytes(file.bytes()).unwrap().blocks_at(log.mark()).unwrap();
    assert_eq!(runs(&found), runs(&logged));
}

#[test]
fn append_of_extents_outside_of_the_disk_is_refused_and_changes_nothing() {
    let (file, mut log) = small_log(100);
    let before = file.bytes();
    for bad in [Extent::new(100, 1), Extent::new(99, 2), Extent::new(1 << 40, 1), Extent::new(0, u64::MAX)] {
        let result = log.append(&[Extent::new(0, 1), bad], &BlockSet::new(100));
        assert!(matches!(result, Err(LogError::Refused { .. })), "{bad}");
    }
    assert!(matches!(log.append(&[], &BlockSet::new(101)), Err(LogError::Refused { .. })));
    assert_eq!(file.bytes(), before);
}

#[test]
fn sealed_log_refuses_appends_and_seals() {
    let (file, mut log) = small_log(100);
    let owned = set_of(100, &[Extent::new(3, 4)]);
    log.append(&[Extent::new(3, 4)], &BlockSet::new(100)).unwrap();
    log.seal(4).unwrap();
    let before = file.bytes();
    assert!(log.is_sealed());
    assert!(matches!(log.append(&[Extent::new(0, 1)], &owned), Err(LogError::Refused { .. })));
    assert!(matches!(log.seal(4), Err(LogError::Refused { .. })));
    assert_eq!(file.bytes(), before);
}

/// Invariant 6: a seal that counts otherwise than the log holds vouches for nothing.
#[test]
fn seal_with_a_wrong_count_is_not_trusted() {
    let (file, mut log) = small_log(100);
    log.append(&[Extent::new(3, 4), Extent::new(5, 4)], &BlockSet::new(100)).unwrap();
    let mark = log.seal(8).unwrap();
    let contents = read_bytes(file.bytes()).unwrap();
    assert_eq!(contents.sealed, Some(mark));
    assert!(contents.sealed_blocks().is_none());
    assert!(contents.blocks_at(mark).is_none());
    assert_eq!(contents.readable_blocks().count(), 6);
}

#[test]
fn log_of_the_other_kind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (session, pending) = (header(LogKind::Session, 9), header(LogKind::Pending, 9));
    assert!(matches!(LogWriter::create(dir.path(), &pending), Err(LogError::Refused { .. })));
    let set = BlockSet::new(9);
    assert!(matches!(LogWriter::write_pending(dir.path(), &session, &set), Err(LogError::Refused { .. })));
    let file = Box::new(support::MemFile::default());
    assert!(matches!(LogWriter::create_on(file, path(), &session, 2048), Err(LogError::Refused { .. })));
    let other = BlockSet::new(8);
    assert!(matches!(LogWriter::write_pending(dir.path(), &pending, &other), Err(LogError::Refused { .. })));
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
}

#[test]
fn log_without_appends_is_an_empty_set() {
    let (file, mut log) = small_log(100);
    let contents = read_bytes(file.bytes()).unwrap();
    assert_eq!(contents.start(), log.mark());
    assert!(contents.blocks_at(log.mark()).unwrap().is_empty());
    assert!(contents.sealed_blocks().is_none());
    log.seal(0).unwrap();
    assert!(read_bytes(file.bytes()).unwrap().sealed_blocks().unwrap().is_empty());
}
