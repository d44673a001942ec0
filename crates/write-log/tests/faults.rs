//! Writes that fail, are short or half done, syncs that fail, and power cuts.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::io;

use blocks::{BlockSet, Extent};
use proptest::prelude::*;
use support::{Fault, MemFile, header, path, read_bytes, runs, small_log};
use write_log::{LogError, LogKind, LogWriter};

const BLOCKS: u64 = 600;

fn one(block: u64) -> [Extent; 1] {
    [Extent::new(block, 1)]
}

/// Invariant 6: nothing counts that failed, and the next append is as good as any.
#[test]
fn append_after_a_failed_one_overwrites_what_it_left() {
    let many: Vec<Extent> = (0..50).map(|n| Extent::new(n * 3, 1)).collect();
    for left in (0..=416).step_by(4) {
        let (file, mut log) = small_log(BLOCKS);
        let owned = BlockSet::new(BLOCKS);
        let before = log.append(&one(1), &owned).unwrap();
        file.state().faults.push_back(Fault::FailAfter(left));
        assert!(matches!(log.append(&many, &owned), Err(LogError::Io { .. })));
        assert_eq!(log.mark(), before);
        assert_eq!(runs(&read_bytes(file.bytes()).unwrap().blocks_at(before).unwrap()), one(1));

        let after = log.append(&one(2), &owned).unwrap();
        let contents = read_bytes(file.bytes()).unwrap();
        assert_eq!(runs(&contents.blocks_at(after).unwrap()), [Extent::new(1, 2)]);
        assert_eq!(contents.areas[0].mark(), Some(after), "nothing is readable behind the mark");
        assert!(!contents.areas[0].is_torn(), "nothing is left behind the mark");
        assert_eq!(runs(&contents.readable_blocks()), [Extent::new(1, 2)]);
    }
}

#[test]
fn append_with_short_writes_is_whole() {
    let (file, mut log) = small_log(BLOCKS);
    file.state().faults.extend([Fault::Short(1), Fault::Short(3), Fault::Short(20)]);
    let mark = log.append(&[Extent::new(5, 2), Extent::new(9, 1)], &BlockSet::new(BLOCKS)).unwrap();
    let found = read_bytes(file.bytes()).unwrap().blocks_at(mark).unwrap();
    assert_eq!(runs(&found), [Extent::new(5, 2), Extent::new(9, 1)]);
}

/// Invariant 2: a seal whose sync failed must not come back after a later append, not even by a
/// power cut that loses that append.
#[test]
fn seal_that_failed_is_gone_from_the_medium_before_the_next_append_counts() {
    let (file, mut log) = small_log(BLOCKS);
    let owned = BlockSet::new(BLOCKS);
    log.append(&one(1), &owned).unwrap();
    file.state().sync_fails = true;
    assert!(log.seal(1).is_err());
    assert!(!log.is_sealed());
    // The medium has it all the same.
    let state_bytes = file.bytes();
    assert!(read_bytes(state_bytes.clone()).unwrap().sealed.is_some());
    file.state().durable = state_bytes;

    file.state().sync_fails = true;
    assert!(log.append(&one(2), &owned).is_err(), "the seal may be there still");
    log.append(&one(2), &owned).unwrap();
    let after = read_bytes(file.after_power_cut(|| false)).unwrap();
    assert!(after.sealed.is_none());
}

/// Invariants 2 and 6: a seal without a sync is exact for who reads the file, takes no append after it, and
/// in a power cut vouches only if all that it counts is there.
#[test]
fn seal_without_a_sync_is_exact_or_vouches_for_nothing() {
    for mut keeps in 0..8u32 {
        let (file, mut log) = small_log(BLOCKS);
        let owned = BlockSet::new(BLOCKS);
        log.append(&one(1), &owned).unwrap();
        log.append(&one(2), &owned).unwrap();
        log.seal_unsynced(2).unwrap();
        assert!(log.is_sealed());
        assert!(log.append(&one(3), &owned).is_err());
        let read = read_bytes(file.bytes()).unwrap();
        assert_eq!(runs(&read.sealed_blocks().unwrap()), [Extent::new(1, 2)]);
        // Whichever of the three writes the medium has.
        let cut = file.after_power_cut(|| {
            let kept = keeps % 2 == 1;
            keeps /= 2;
            kept
        });
        if let Some(blocks) = read_bytes(cut).unwrap().sealed_blocks() {
            assert_eq!(runs(&blocks), [Extent::new(1, 2)]);
        }
    }
}

/// Invariant 2: the same when the next append moves to the other area, even if that area is
/// unreadable later; and a seal in an older epoch never counts.
#[test]
fn seal_that_failed_is_gone_when_the_log_moves_to_the_other_area() {
    let (file, mut log) = small_log(BLOCKS);
    let owned = BlockSet::new(BLOCKS);
    log.append(&one(1), &owned).unwrap();
    owned.insert(one(1)[0]);
    file.state().sync_fails = true;
    assert!(log.seal(1).is_err());
    let with_seal = file.bytes();
    let huge: Vec<Extent> = (0..BLOCKS).map(|n| Extent::new(BLOCKS - 1 - n, 1)).collect();
    assert_eq!(log.append(&huge, &owned).unwrap().epoch, 2);

    let mut unreadable = file.after_power_cut(|| false);
    unreadable[8192..8208].fill(0xff);
    let contents = read_bytes(unreadable).unwrap();
    assert_eq!((contents.sealed, contents.areas[0].frames()), (None, 1));

    let stale = [&with_seal[..8192], &file.bytes()[8192..]].concat();
    let contents = read_bytes(stale).unwrap();
    assert!(contents.areas[0].is_sealed() && contents.areas[1].frames() == 1);
    assert!(contents.sealed.is_none());
}

/// Invariant 6: whatever a failed rewrite left, the old mark holds, and later ones do.
#[test]
fn rewrite_that_fails_anywhere_leaves_the_old_area_valid() {
    for fault in 0..4 {
        let (file, mut log) = small_log(BLOCKS);
        let owned = BlockSet::new(BLOCKS);
        let huge: Vec<Extent> = (0..BLOCKS / 2).map(|n| Extent::new(n * 2, 1)).collect();
        // All but the last 40 bytes of the area.
        let fill: Vec<Extent> = (0..245).map(|n| Extent::new(n * 2 + 1, 1)).collect();
        let mut before = log.append(&fill, &owned).unwrap();
        while before.committed < 4000 {
            before = log.append(&fill[..1], &owned).unwrap();
        }
        fill.iter().for_each(|extent| {
            owned.insert(*extent);
        });
        {
            let mut state = file.state();
            match fault {
                0 => state.faults.push_back(Fault::FailAfter(0)),
                1 => state.faults.push_back(Fault::FailAfter(30)),
                2 => state.faults.push_back(Fault::FailAfter(usize::MAX)),
                _ => state.sync_fails = true,
            }
        }
        assert!(log.append(&huge, &owned).is_err());
        assert_eq!(log.mark(), before);
        assert_eq!(runs(&read_bytes(file.bytes()).unwrap().blocks_at(before).unwrap()), fill);

        // What fits goes to the old area, and the newest readable epoch is the mark's.
        let small = log.append(&one(4), &owned).unwrap();
        assert_eq!(small.epoch, 1);
        owned.insert(one(4)[0]);
        let contents = read_bytes(file.bytes()).unwrap();
        assert_eq!(runs(&contents.blocks_at(small).unwrap()), runs(&owned));
        assert_eq!(contents.areas[1].frames(), 0);

        let moved = log.append(&huge, &owned).unwrap();
        assert_eq!(moved.epoch, 2);
        huge.iter().for_each(|extent| {
            owned.insert(*extent);
        });
        assert_eq!(runs(&read_bytes(file.bytes()).unwrap().blocks_at(moved).unwrap()), runs(&owned));
        log.seal(owned.count()).unwrap();
        assert_eq!(runs(&read_bytes(file.bytes()).unwrap().sealed_blocks().unwrap()), runs(&owned));
    }
}

/// Invariant 6: a log that does not read back as it was written is not carried over.
#[test]
fn rewrite_of_an_area_that_reads_back_wrong_is_refused() {
    let (file, mut log) = small_log(BLOCKS);
    let owned = BlockSet::new(BLOCKS);
    let before = log.append(&one(1), &owned).unwrap();
    file.state().bytes[4096 + 20] ^= 1;
    let huge: Vec<Extent> = (0..BLOCKS).step_by(1).map(|n| Extent::new(BLOCKS - 1 - n, 1)).collect();
    assert!(matches!(log.append(&huge, &owned), Err(LogError::Damaged { .. })));
    assert_eq!(log.mark(), before);
}

#[test]
fn log_without_room_names_the_bytes_it_needs() {
    let header = header(LogKind::Session, BLOCKS);
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        let file = MemFile::default();
        file.state().reserve_error = Some(kind);
        let error = LogWriter::create_on(Box::new(file), path(), &header, 4096).unwrap_err();
        assert!(matches!(error, LogError::NoSpace { needed: 12288, .. }), "{error}");
        assert!(error.to_string().contains("12288 bytes"), "{error}");
    }
}

#[derive(Clone, Debug)]
enum Action {
    Append(Vec<Extent>),
    Seal,
    Sync,
    FailWrite(usize),
    ShortWrite(usize),
    FailSync,
}

fn action() -> impl Strategy<Value = Action> {
    let extent = (0..BLOCKS - 8, 1u64..8).prop_map(|(first, count)| Extent::new(first, count));
    prop_oneof![
        12 => prop::collection::vec(extent, 1..120).prop_map(Action::Append),
        1 => Just(Action::Seal),
        1 => Just(Action::Sync),
        3 => prop_oneof![0usize..1200, Just(usize::MAX)].prop_map(Action::FailWrite),
        1 => (1usize..900).prop_map(Action::ShortWrite),
        2 => Just(Action::FailSync),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Invariants 2 and 6: after any failures, the mark leads to exactly what was appended, a seal
    /// is right or absent, and the same holds after a power cut at any time.
    #[test]
    fn log_under_any_failures_and_power_cuts_is_exact_or_untrusted(
        actions in prop::collection::vec(action(), 1..40), seed in any::<u64>(),
    ) {
        let (file, mut log) = small_log(BLOCKS);
        let (owned, mut random) = (BlockSet::new(BLOCKS), seed | 1);
        for action in actions {
            match action {
                Action::Append(extents) => {
                    let before = log.mark();
                    if log.append(&extents, &owned).is_ok() {
                        extents.iter().for_each(|extent| { owned.insert(*extent); });
                    } else {
                        prop_assert_eq!(log.mark(), before);
                    }
                }
                Action::Seal => { let _ = log.seal(owned.count()); }
                Action::Sync => { let _ = log.sync(); }
                Action::FailWrite(count) => file.state().faults.push_back(Fault::FailAfter(count)),
                Action::ShortWrite(count) => file.state().faults.push_back(Fault::Short(count)),
                Action::FailSync => file.state().sync_fails = true,
            }
            let contents = read_bytes(file.bytes()).unwrap();
            let at_mark = contents.blocks_at(log.mark());
            prop_assert_eq!(at_mark.map(|set| runs(&set)), Some(runs(&owned)));
            for mode in 0..3 {
                let cut = file.after_power_cut(|| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    mode == 1 || mode == 2 && random % 3 == 0
                });
                let contents = read_bytes(cut).unwrap();
                if let Some(found) = contents.blocks_at(log.mark()) {
                    prop_assert_eq!(runs(&found), runs(&owned));
                }
                if let Some(found) = contents.sealed_blocks() {
                    prop_assert_eq!(runs(&found), runs(&owned));
                }
                if log.is_sealed() {
                    prop_assert!(contents.sealed_blocks().is_some(), "a seal is durable");
                }
            }
        }
    }

    /// Invariant 3: a log is resumed at its mark with what it held, whatever follows the mark, and
    /// nothing of that comes back.
    #[test]
    fn log_that_is_resumed_goes_on_from_the_mark(
        before in 0usize..25, lost in 0usize..25, after in 1usize..25, size in 1u64..60, seal_lost in any::<bool>(),
    ) {
        let (file, mut log) = small_log(BLOCKS);
        let owned = BlockSet::new(BLOCKS);
        let batch = |n: usize| -> Vec<Extent> {
            (0..size).map(|i| Extent::new((n as u64 * 31 + i * 5) % 590, 1 + i % 4)).collect()
        };
        let append = |log: &mut LogWriter, owned: &BlockSet, n: usize| {
            let mark = log.append(&batch(n), owned).unwrap();
            batch(n).iter().for_each(|extent| { owned.insert(*extent); });
            mark
        };
        let mut mark = log.mark();
        for n in 0..before {
            mark = append(&mut log, &owned, n);
        }
        let held = runs(&owned);
        let scratch = support::set_of(BLOCKS, &held);
        for n in 0..lost {
            // The mark's area must still be there, as the live page is stored after each append.
            if log.mark().epoch > mark.epoch { break; }
            append(&mut log, &scratch, 500 + n);
        }
        if seal_lost { log.seal(scratch.count()).unwrap(); }
        drop(log);

        let (mut log, set) = LogWriter::resume_on(Box::new(file.clone()), path(), mark).unwrap();
        prop_assert_eq!(runs(&set), held);
        let contents = read_bytes(file.after_power_cut(|| false)).unwrap();
        prop_assert!(contents.sealed.is_none());
        for n in 0..after {
            mark = append(&mut log, &owned, 1000 + n);
        }
        let contents = read_bytes(file.bytes()).unwrap();
        prop_assert_eq!(runs(&contents.blocks_at(mark).unwrap()), runs(&owned));
        prop_assert_eq!(runs(&contents.readable_blocks()), runs(&owned));
        log.seal(owned.count()).unwrap();
        prop_assert_eq!(runs(&read_bytes(file.bytes()).unwrap().sealed_blocks().unwrap()), runs(&owned));
    }
}
