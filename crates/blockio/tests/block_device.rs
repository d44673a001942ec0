//! Block devices, on a loop device. Without the right to make one the tests say so and pass.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::{
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blockio::{AlignedBuf, EngineKind, File, FileIndex, FileKind, Op, OpenOptions, Zeroing, new_engine};
use common::*;

/// Held by every test here: a child of another test would hold our descriptors, and with them
/// our locks and claims, between its fork and its exec.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loop device on a file, detached when dropped.
struct Loop {
    device: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    /// Of 1 MiB.
    fn attach() -> Option<Loop> {
        Self::with(1 << 20, 512)
    }

    fn with(size: usize, sector: u32) -> Option<Loop> {
        let dir = disk_dir();
        let path = dir.path().join("backing");
        create(&path, size as u64).write_all_at(&vec![1; size], 0).unwrap();
        let sector = format!("--sector-size={sector}");
        let output = Command::new("losetup").args(["--find", "--show", &sector]).arg(&path).output();
        match output {
            Ok(output) if output.status.success() => {
                let device = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Loop { device, _dir: dir })
            }
            _ => {
                println!("skipped: cannot make a loop device here");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

const EXCLUSIVE: OpenOptions = OpenOptions { write: true, direct: false, exclusive: true };

#[test]
fn device_is_read_written_punched_and_zeroed() {
    let _alone = alone();
    let Some(device) = Loop::attach() else { return };
    for (kind, direct) in
        [(EngineKind::IoUring, false), (EngineKind::Sync, false), (EngineKind::IoUring, true)]
    {
        let file = Arc::new(open(&device.device, true, direct));
        assert_eq!((file.kind(), file.size().unwrap()), (FileKind::BlockDevice, 1 << 20));
        assert_eq!(file.identity().unwrap().size, 1 << 20);
        assert_eq!(file.next_data(4096).unwrap(), Some(4096..1 << 20));
        assert!(file.supports_zero());
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let (index, mut model) = (FileIndex(0), vec![1; 1 << 20]);
        let mut engine = new_engine(kind, 8, vec![file.clone()]).unwrap();
        engine.push(0, Op::Write { file: index, offset: 0, buf: owned(&[5; 4096]) });
        engine.push(1, Op::Zero { file: index, offset: 65536, len: 4096, how: Zeroing::Keep });
        engine.push(2, Op::SyncData { file: index });
        if file.supports_punch() {
            engine.push(3, Op::Punch { file: index, offset: 131_072, len: 65536 });
            model[131_072..131_072 + 65536].fill(0);
        }
        assert!(run(&mut *engine).iter().all(|done| done.result.is_ok()));
        model[..4096].fill(5);
        model[65536..65536 + 4096].fill(0);
        engine.push(0, Op::Read { file: index, offset: 0, buf: AlignedBuf::new_zeroed(1 << 20).into() });
        let done = run(&mut *engine).remove(0);
        assert!(bytes(&done.buf.unwrap()) == model);
        engine.push(0, Op::Read { file: index, offset: 1 << 20, buf: owned(&[0; 512]) });
        assert!(run(&mut *engine)[0].result.is_err());
    }
}

/// A device unmaps and zeroes whole sectors only. A disk may end in the middle of one, and guests have smaller ones: there
/// zeroes are written.
#[test]
fn range_that_is_no_whole_sectors_of_its_device_is_zeroed() {
    const SIZE: usize = 1 << 20;
    let _alone = alone();
    let Some(device) = Loop::with(SIZE, 4096) else { return };
    for kind in [EngineKind::IoUring, EngineKind::Sync] {
        let file = Arc::new(open(&device.device, true, false));
        file.write_all_at(&vec![1; SIZE], 0).unwrap();
        let mut engine = new_engine(kind, 8, vec![file.clone()]).unwrap();
        let ranges = [512..1024, 8192 - 512..(64 << 10) + 512, SIZE - 8192..SIZE - 512];
        let mut model = vec![1; SIZE];
        for (token, range) in (0..).zip(ranges) {
            let (offset, len) = (range.start as u64, range.len() as u64);
            engine.push(
                2 * token,
                Op::Zero {
                    file: FileIndex(0),
                    offset,
                    len,
                    how: if token > 0 { Zeroing::Unmap } else { Zeroing::Keep },
                },
            );
            engine.push(2 * token + 1, Op::SyncData { file: FileIndex(0) });
            model[range].fill(0);
        }
        let done = run(&mut *engine);
        assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
        let mut content = vec![7; SIZE];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content == model);
    }
}

/// A device that is claimed is not opened twice (invariant 7).
#[test]
fn device_opened_exclusively_twice_is_in_use() {
    let _alone = alone();
    let Some(device) = Loop::attach() else { return };
    let first = File::open(&device.device, EXCLUSIVE).unwrap();
    assert!(File::open(&device.device, EXCLUSIVE).unwrap_err().is_in_use());
    drop(first);
    File::open(&device.device, EXCLUSIVE).unwrap();
}
