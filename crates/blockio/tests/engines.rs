//! Both engines against each other and against a model in memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::{io::ErrorKind, sync::Arc, time::Duration};

use blockio::{AlignedBuf, Buffer, EngineKind, FileIndex, Op, Zeroing, new_engine};
use common::*;
use proptest::prelude::*;

const SIZE: usize = 1 << 20;
/// Operations of one batch do not overlap, so that their order does not matter.
const REGION: usize = SIZE / 16;
const FILE: FileIndex = FileIndex(0);

#[derive(Clone, Debug)]
enum Action {
    Read,
    Write { seed: u8 },
    Punch,
    Zero { may_unmap: bool },
    Sync,
}

#[derive(Clone, Debug)]
enum Layout {
    Owned,
    Guest { shift: usize, piece: usize, gap: usize },
}

#[derive(Clone, Debug)]
struct Step {
    action: Action,
    start: usize,
    len: usize,
    layout: Layout,
}

fn step() -> impl Strategy<Value = Step> {
    let action = prop_oneof![
        4 => Just(Action::Read),
        4 => any::<u8>().prop_map(|seed| Action::Write { seed }),
        1 => Just(Action::Punch),
        1 => any::<bool>().prop_map(|may_unmap| Action::Zero { may_unmap }),
        1 => Just(Action::Sync),
    ];
    let layout = prop_oneof![
        Just(Layout::Owned),
        (0usize..700, prop_oneof![Just(16usize), 1usize..9000, Just(512), Just(4096)], 0usize..3)
            .prop_map(|(shift, piece, gap)| Layout::Guest { shift, piece, gap }),
    ];
    let len = prop_oneof![0..REGION, Just(REGION), 0..5000usize];
    (action, 0..REGION, len, layout).prop_map(|(action, start, len, layout)| Step {
        action,
        start,
        len,
        layout,
    })
}

fn data(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed) ^ (n >> 8) as u8).collect()
}

/// Performs batches on a file with one engine; checks every result against the model.
fn perform(kind: EngineKind, dir: &std::path::Path, batches: &[Vec<Step>], direct: bool, depth: u32) {
    let path = dir.join(format!("{kind:?}"));
    let mut model = data(SIZE, 1);
    let made = create(&path, SIZE as u64);
    made.write_all_at(&model, 0).unwrap();
    drop(made);
    let file = Arc::new(open(&path, true, direct));
    let punch = file.supports_punch();
    let align = if direct { file.alignment().offset as usize } else { 1 };
    let mut engine = new_engine(kind, depth, vec![file]).unwrap();
    for batch in batches {
        let mut guests = Vec::new();
        for (region, step) in batch.iter().enumerate() {
            let start = (region * REGION + step.start) / align * align;
            let len = step.len.min((region + 1) * REGION - start) / align * align;
            let (offset, range) = (start as u64, start..start + len);
            let mut guest = None;
            let mut buffer = |content: Vec<u8>| -> Buffer {
                match step.layout {
                    Layout::Guest { shift, piece, gap } if len > 0 => {
                        let memory = guest.insert(Guest::new(&content, shift, piece, gap));
                        memory.buf().into()
                    }
                    _ => owned(&content),
                }
            };
            let op = match step.action {
                Action::Read => Op::Read { file: FILE, offset, buf: buffer(vec![0xaa; len]) },
                Action::Write { seed } => {
                    model[range.clone()].copy_from_slice(&data(len, seed));
                    Op::Write { file: FILE, offset, buf: buffer(data(len, seed)) }
                }
                Action::Punch if punch => {
                    model[range.clone()].fill(0);
                    Op::Punch { file: FILE, offset, len: len as u64 }
                }
                Action::Zero { may_unmap } => {
                    model[range.clone()].fill(0);
                    Op::Zero {
                        file: FILE,
                        offset,
                        len: len as u64,
                        how: if may_unmap { Zeroing::Unmap } else { Zeroing::Keep },
                    }
                }
                _ => Op::SyncData { file: FILE },
            };
            engine.push(region as u64, op);
            guests.push((range, guest));
        }
        let done = run(&mut *engine);
        assert_eq!(done.len(), batch.len());
        for (done, (range, guest)) in done.iter().zip(&guests) {
            assert!(done.result.is_ok(), "{:?} at {range:?}: {:?}", kind, done.result);
            if let Some(buf) = &done.buf {
                assert_eq!(bytes(buf), model[range.clone()], "{kind:?} at {range:?}");
            }
            if let Some(guest) = guest {
                guest.assert_gaps_untouched();
            }
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), model);
}

fn batches() -> impl Strategy<Value = Vec<Vec<Step>>> {
    prop::collection::vec(prop::collection::vec(step(), 1..=16), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The asynchronous engine does what the plain calls do, which do what the model says.
    #[test]
    fn engines_after_the_same_operations_agree_with_the_model(
        batches in batches(), direct in any::<bool>(), depth in 1u32..20,
    ) {
        let dir = disk_dir();
        for kind in [EngineKind::IoUring, EngineKind::Sync] {
            perform(kind, dir.path(), &batches, direct, depth);
        }
    }

    #[test]
    fn engines_on_tmpfs_agree_with_the_model(batches in batches(), depth in 1u32..20) {
        if let Some(dir) = memory_dir() {
            for kind in [EngineKind::IoUring, EngineKind::Sync] {
                perform(kind, dir.path(), &batches, false, depth);
            }
        }
    }
}

const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Sync];

#[test]
fn buffer_of_more_pieces_than_a_call_takes_is_transferred_whole() {
    let dir = disk_dir();
    for kind in KINDS {
        for direct in [false, true] {
            let path = dir.path().join(format!("{kind:?}{direct}"));
            create(&path, 4 << 20);
            let file = Arc::new(open(&path, true, direct));
            let mut engine = new_engine(kind, 4, vec![file]).unwrap();
            let content = data(2 << 20, 3);
            // 4096 pieces; direct I/O can take the one as they are, and must copy the other.
            for gap in [512, 7] {
                let from = Guest::new(&content, 0, 512, gap);
                let to = Guest::new(&vec![0; content.len()], 0, 512, gap);
                engine.push(1, Op::Write { file: FILE, offset: 8192, buf: from.buf().into() });
                assert!(run(&mut *engine)[0].result.is_ok());
                engine.push(2, Op::Read { file: FILE, offset: 8192, buf: to.buf().into() });
                assert!(run(&mut *engine)[0].result.is_ok());
                assert_eq!(bytes(&to.buf().into()), content);
                to.assert_gaps_untouched();
            }
        }
    }
}

#[test]
fn read_past_the_end_is_an_unexpected_end() {
    let dir = disk_dir();
    for kind in KINDS {
        for direct in [false, true] {
            let path = dir.path().join(format!("{kind:?}{direct}"));
            create(&path, 8192 + 512);
            let mut engine = new_engine(kind, 4, vec![Arc::new(open(&path, false, direct))]).unwrap();
            for (token, offset) in [4096, 8192, 1 << 30].into_iter().enumerate() {
                let buf = AlignedBuf::new_zeroed(8192).into();
                engine.push(token as u64, Op::Read { file: FILE, offset, buf });
            }
            for done in run(&mut *engine) {
                assert_eq!(done.result.unwrap_err().kind(), ErrorKind::UnexpectedEof, "{kind:?} {direct}");
            }
        }
    }
}

#[test]
fn direct_io_that_is_not_aligned_is_invalid_input() {
    let dir = disk_dir();
    for kind in KINDS {
        let path = dir.path().join(format!("{kind:?}"));
        create(&path, 1 << 20);
        let file = Arc::new(open(&path, true, true));
        let align = u64::from(file.alignment().offset);
        assert!(align > 1);
        let mut engine = new_engine(kind, 4, vec![file]).unwrap();
        for (token, (offset, len)) in [(1, align), (0, align - 1), (align / 2, align)].into_iter().enumerate()
        {
            let buf = AlignedBuf::new_zeroed(len as usize).into();
            engine.push(token as u64, Op::Write { file: FILE, offset, buf });
        }
        for done in run(&mut *engine) {
            assert_eq!(done.result.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }
}

/// A small tmpfs, unmounted when dropped; `None` without the right to mount one.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn mount() -> Option<SmallFileSystem> {
        let dir = disk_dir();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(dir.path())
            .output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            println!("skipped: cannot mount a file system here");
        }
        mounted.then_some(SmallFileSystem(dir))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// A full file system fails the write with its own error (invariant 6).
#[test]
fn write_to_a_full_file_system_is_storage_full() {
    let Some(small) = SmallFileSystem::mount() else { return };
    for kind in KINDS {
        let path = small.0.path().join(format!("{kind:?}"));
        create(&path, 1 << 20);
        let mut engine = new_engine(kind, 4, vec![Arc::new(open(&path, true, false))]).unwrap();
        engine.push(1, Op::Write { file: FILE, offset: 0, buf: owned(&vec![1; 128 << 10]) });
        let done = run(&mut *engine).remove(0);
        assert_eq!(done.result.unwrap_err().kind(), ErrorKind::StorageFull);
        assert!(done.buf.is_some());
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn write_past_the_largest_file_is_an_error() {
    let dir = disk_dir();
    for kind in KINDS {
        let path = dir.path().join(format!("{kind:?}"));
        create(&path, 0);
        let mut engine = new_engine(kind, 4, vec![Arc::new(open(&path, true, false))]).unwrap();
        for (token, offset) in [(1 << 62) - 4096, i64::MAX as u64 - 4095, u64::MAX].into_iter().enumerate() {
            let buf = AlignedBuf::new_zeroed(4096).into();
            engine.push(token as u64, Op::Write { file: FILE, offset, buf });
        }
        assert!(run(&mut *engine).iter().all(|done| done.result.is_err() && done.buf.is_some()));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}

#[test]
fn wait_with_nothing_to_wait_for_returns_at_once() {
    let dir = disk_dir();
    let path = dir.path().join("file");
    create(&path, 4096);
    for kind in KINDS {
        let mut engine = new_engine(kind, 4, vec![Arc::new(open(&path, true, false))]).unwrap();
        engine.wait(None).unwrap();
        engine.push(1, Op::SyncData { file: FILE });
        assert_eq!(engine.in_flight(), 1);
        engine.wait(Some(Duration::from_secs(3600))).unwrap();
        assert_eq!(run(&mut *engine).len(), 1);
        engine.wait(None).unwrap();
        assert_eq!(engine.completion_fd().is_some(), kind == EngineKind::IoUring);
    }
}

/// A dropped engine holds neither its files nor their locks (invariant 7).
#[test]
fn lock_after_engine_and_file_are_dropped_is_free() {
    let dir = disk_dir();
    let path = dir.path().join("file");
    create(&path, 1 << 20);
    for kind in KINDS {
        for _ in 0..20 {
            let file = Arc::new(open(&path, true, true));
            file.lock_exclusive().unwrap();
            let mut engine = new_engine(kind, 64, vec![file]).unwrap();
            for token in 0..64 {
                let buf = AlignedBuf::new_zeroed(4096).into();
                engine.push(token, Op::Write { file: FILE, offset: token * 4096, buf });
            }
            engine.submit();
            drop(engine);
            let free = (0..1000).any(|_| {
                std::thread::yield_now();
                open(&path, true, true).lock_exclusive().is_ok()
            });
            assert!(free, "still locked after {kind:?}");
        }
    }
}

#[test]
fn files_of_an_engine_are_told_apart_by_index() {
    let dir = disk_dir();
    for kind in KINDS {
        let files: Vec<_> = (0..3u8)
            .map(|n| {
                let file = create(&dir.path().join(format!("{kind:?}{n}")), 4096);
                file.write_all_at(&[n; 4096], 0).unwrap();
                Arc::new(file)
            })
            .collect();
        let mut engine = new_engine(kind, 8, files).unwrap();
        for n in 0..3u8 {
            let buf = AlignedBuf::new_zeroed(4096).into();
            engine.push(u64::from(n), Op::Read { file: FileIndex(n), offset: 0, buf });
        }
        for (n, done) in run(&mut *engine).into_iter().enumerate() {
            assert_eq!(bytes(&done.buf.unwrap()), vec![n as u8; 4096]);
        }
    }
}
