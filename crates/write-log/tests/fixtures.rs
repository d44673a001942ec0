//! Logs of every released format version are read for ever, and written the same.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{fs, path::PathBuf};

use blocks::Extent;
use support::{fixtures, header, runs};
use write_log::{LogContents, LogError, LogKind, Mark, read};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn contents(name: &str) -> LogContents {
    read(&path(name)).unwrap()
}

fn threes(count: u64) -> Vec<Extent> {
    (0..count).map(|n| Extent::new(n * 4, 3)).collect()
}

#[test]
fn fixtures_made_again_are_the_same_bytes() {
    for fixture in fixtures::all() {
        let committed = fs::read(path(fixture.name)).unwrap();
        assert!(fixture.bytes == committed, "{}", fixture.name);
    }
}

/// The numbers stand here, not only in the code that writes them.
#[test]
fn fixture_of_a_session_is_exact_at_its_mark() {
    let log = contents("v1-session.wlog");
    assert_eq!(log.header, header(LogKind::Session, 1000));
    let mark = Mark { epoch: 1, committed: 7 * 24, crc: 0x54c6_cb02 };
    assert_eq!(runs(&log.blocks_at(mark).unwrap()), threes(7));
    assert_eq!(log.logged_extents().collect::<Vec<_>>(), threes(7));
    assert_eq!((log.sealed, log.areas[0].is_torn()), (None, false));
}

#[test]
fn fixture_of_a_sealed_session_is_exact_without_a_mark() {
    let log = contents("v1-session-sealed.wlog");
    assert_eq!(log.sealed.unwrap().committed, 8 * 24);
    assert_eq!(runs(&log.sealed_blocks().unwrap()), threes(7));
}

#[test]
fn fixture_of_a_rewritten_session_has_a_bitmap_in_each_epoch_but_the_first() {
    let log = contents("v1-session-rewritten.wlog");
    assert_eq!(log.sealed.unwrap().epoch, 2);
    assert_eq!(runs(&log.sealed_blocks().unwrap()), threes(250));
    assert_eq!(log.areas[0].frames(), 169);
}

/// Invariant 6.
#[test]
fn fixtures_that_are_torn_or_damaged_are_trusted_as_far_as_they_go() {
    let mark = fixtures::all()[0].mark.unwrap();
    let torn = contents("v1-session-torn.wlog");
    assert!(torn.areas[0].is_torn());
    assert_eq!(runs(&torn.blocks_at(mark).unwrap()), threes(7));
    let damaged = contents("v1-session-damaged.wlog");
    assert!(damaged.blocks_at(mark).is_none());
    assert_eq!(runs(&damaged.readable_blocks()), threes(1));
}

#[test]
fn fixtures_of_pending_sets_are_exact() {
    let log = contents("v1-pending-extents.wlog");
    assert_eq!(log.header.kind, LogKind::Pending);
    let expected = [Extent::new(0, 2), Extent::new(500, 100), Extent::new(999, 1)];
    assert_eq!(runs(&log.sealed_blocks().unwrap()), expected);
    let log = contents("v1-pending-bitmap.wlog");
    let expected: Vec<Extent> = (0..500).map(|n| Extent::new(n * 2, 1)).collect();
    assert_eq!(runs(&log.sealed_blocks().unwrap()), expected);
}

#[test]
fn fixture_of_a_newer_version_is_refused_by_its_number() {
    let error = read(&path("v2-unknown.wlog")).unwrap_err();
    assert!(matches!(error, LogError::NewerVersion { found: 2, .. }), "{error}");
}
