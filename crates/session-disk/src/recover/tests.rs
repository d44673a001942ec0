use super::*;
use std::time::UNIX_EPOCH;

use crate::manifest::{BaseEntry, EntryKind, MANIFEST_VERSION, Stopped, wait_for_other_times};

const SIZE: u64 = 1 << 20;

/// A manifest of a block device with a log, or pristine.
fn manifest(generation: u64, has_log: bool) -> Manifest {
    let log = LogEntry { sequence: 2, uuid: Uuid::from_u128(2), kind: EntryKind::Session };
    Manifest {
        version: MANIFEST_VERSION,
        disk: Uuid::from_u128(1),
        size: SIZE,
        file: None,
        device: None,
        base: BaseEntry {
            path: std::path::Path::new("/images/golden.raw").into(),
            format: base_image::BaseFormat::Raw,
            seal: None,
            identity: BaseIdentity::of_size(SIZE),
            root: None,
        },
        next_sequence: 3,
        logs: has_log.then_some(log).into_iter().collect(),
        pristine_since: None,
        generation,
        held: None,
        kept: false,
        left: None,
        stopped: None,
    }
}

/// The verdict when the disk's file names `named`, and a log that is listed can't be read.
fn basis(manifest: &Manifest, named: Option<u64>) -> Basis {
    let geometry = Geometry::new(SIZE).unwrap();
    let evidence = Evidence {
        disk_now: None,
        boot: Uuid::nil(),
        generation: named,
        logs: manifest.logs.iter().map(|entry| (*entry, Err("gone".into()))).collect(),
        live: None,
        same_boot: true,
        session_open: false,
        intents: BlockSet::new(geometry.blocks()),
    };
    let verdict = conclude(manifest, geometry, evidence);
    let all = verdict.pending.count() == geometry.blocks();
    assert_eq!(all, matches!(verdict.basis, Basis::Everything(_)));
    verdict.basis
}

/// Invariants 2 and 6: a manifest is believed if it is the one that the disk's file names, or younger, and
/// where no file names any; what is older vouches for nothing, whatever it says.
#[test]
fn manifest_that_is_older_than_the_disk_makes_everything_pending() {
    let older = Basis::Everything(Distrust::OlderState);
    let unreadable = Basis::Everything(Distrust::LogUnreadable(
        LogEntry { sequence: 2, uuid: Uuid::from_u128(2), kind: EntryKind::Session }.id().file_name(),
        "gone".into(),
    ));
    for (has_log, believed) in [(false, Basis::Pristine), (true, unreadable)] {
        for (generation, named, old) in [
            (0, None, false),
            (7, None, false),
            (7, Some(6), false),
            (7, Some(7), false),
            (7, Some(8), true),
            (0, Some(1), true),
            (7, Some(u64::MAX), true),
        ] {
            let wanted = if old { &older } else { &believed };
            assert_eq!(basis(&manifest(generation, has_log), named), *wanted, "{generation} {named:?}");
        }
    }
    assert_eq!(
        Distrust::OlderState.to_string(),
        "the state is older than the disk: it was put back from a copy"
    );
}

/// In the same boot any other time tells of a write, or of another copy; after that only a younger one.
#[test]
fn time_of_the_disk_is_as_it_was_left() {
    let (boot, later) = (Uuid::from_u128(7), Uuid::from_u128(8));
    let stopped = Stopped { boot, mtime_ns: 100 };
    let seen = [99, 100, 101].map(|now| (stopped.may_be(now, boot), stopped.may_be(now, later)));
    assert_eq!(seen, [(false, true), (true, true), (false, false)]);
}

/// Where times are whole seconds, none is noted in which somebody else could still write.
#[test]
fn time_of_whole_seconds_is_noted_when_it_is_over() {
    let second = UNIX_EPOCH.elapsed().unwrap().as_secs();
    wait_for_other_times(second as i64 * 1_000_000_000);
    assert!(UNIX_EPOCH.elapsed().unwrap().as_secs() > second);
}

/// A state that is older is known as such also where the disk was moved to another file meanwhile: what is kept then is not
/// believed.
#[test]
fn state_of_another_file_that_is_also_older_is_older() {
    let mut moved = manifest(7, true);
    moved.file = Some(DiskFile { inode: 5, birth_ns: None });
    assert_eq!(basis(&moved, Some(8)), Basis::Everything(Distrust::AnotherFile));
    moved.kept = true;
    assert_eq!(basis(&moved, Some(7)), Basis::Everything(Distrust::AnotherFile));
    assert_eq!(basis(&moved, Some(8)), Basis::Everything(Distrust::OlderState));
}
