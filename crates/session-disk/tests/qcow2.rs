//! A disk whose base is a qcow2 image, served while nothing of it was copied.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::process::Command;
use std::sync::atomic::AtomicBool;

use blockio::{EngineKind, GuestBuf};
use session_disk::{DiskOptions, Done, ProvisionOptions, Request, provision};

use common::{base_content, end, open, read, run, write, write_sparse};

/// Not a multiple of the block size: the last block is partly the base's.
const SIZE: usize = (2 << 20) + 1536;
const DISK_SIZE: usize = 3 << 20;

/// A compressed image, and the content of a disk of it.
fn lab(kind: EngineKind) -> (tempfile::TempDir, DiskOptions, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut content = base_content(SIZE);
    write_sparse(&dir.path().join("base.raw"), &content);
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "base.qcow2"])
        .current_dir(dir.path())
        .status();
    assert!(status.unwrap().success());
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        engine: Some(kind),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    let wanted = ProvisionOptions {
        size: Some(DISK_SIZE as u64),
        ..ProvisionOptions::new(dir.path().join("base.qcow2"), options.clone())
    };
    assert!(provision(&wanted).unwrap().pending_blocks > 0);
    content.resize(DISK_SIZE, 0);
    (dir, options, content)
}

/// Invariants 2, 3 and 4, with no drain at work: reads of pending blocks, writes of parts of them and of whole ones,
/// across the end of the base as well.
#[test]
fn session_on_pending_blocks_reads_base_and_own_writes_and_restores_exactly() {
    for kind in [EngineKind::Sync, EngineKind::IoUring] {
        let (_dir, options, content) = lab(kind);
        let disk = open(&options);
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(64).unwrap();
        let mut model = content.clone();
        let pending = disk.pending_blocks();
        let writes = [
            (1, 512),
            (8, 4096),
            (15, 20_000 / 512 * 512),
            (4095, 4096),
            (5000, 512),
            (300, 70_000 / 512 * 512),
        ];
        for (n, (sector, len)) in writes.into_iter().enumerate() {
            let bytes = vec![n as u8 + 100; len];
            write(&disk, &mut queue, sector, &bytes);
            model[sector as usize * 512..][..len].copy_from_slice(&bytes);
        }
        assert!(disk.pending_blocks() < pending && disk.pending_blocks() > 0);
        for (sector, len) in [(0, DISK_SIZE), (1, 512), (7, 8192), (4000, 1 << 20), (4090, 8192)] {
            let bytes = read(&disk, &mut queue, sector, len);
            assert!(
                bytes == model[sector as usize * 512..][..len],
                "{kind:?}: {len} bytes at sector {sector}"
            );
        }
        end(&disk, queue);
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        assert_eq!(disk.pending_blocks(), 0);
        assert!(std::fs::read(&options.disk).unwrap() == content, "{kind:?}");
        disk.stop().unwrap();
    }
}

/// Many requests at once are each answered once, and a queue that is dropped waits for its reads.
#[test]
fn hundreds_of_reads_at_once_are_answered_while_the_drain_reads_as_well() {
    let (_dir, options, content) = lab(EngineKind::IoUring);
    let disk = open(&options);
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(64).unwrap();
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap());
        let bufs: Vec<_> = (0..400_u64).map(|n| (n * 4096 % (2 << 20), GuestBuf::zeroed(8192))).collect();
        for (n, (offset, buf)) in bufs.iter().enumerate() {
            let range = disk.geometry().sectors_at(offset / 512, 8192).unwrap();
            queue.push(n as u64, Request::Read { range, buf: buf.clone() });
        }
        let mut done: Vec<Done> = Vec::new();
        queue.quiesce(&mut done);
        assert_eq!(done.len(), 400);
        assert!(done.iter().all(|done| done.result.is_ok()));
        for (offset, buf) in bufs {
            let mut bytes = vec![0; 8192];
            buf.copy_out(0, &mut bytes);
            assert!(bytes == content[offset as usize..][..8192], "at {offset}");
        }
        drain.join().unwrap();
    });
    let unread = GuestBuf::zeroed(1 << 20);
    let range = disk.geometry().sectors_at(0, 1 << 20).unwrap();
    queue.push(1, Request::Read { range, buf: unread });
    queue.submit();
    end(&disk, queue);
    disk.stop().unwrap();
}

/// Invariant 5: what cannot be read is an I/O error for the guest and for the drain, and stays pending.
#[test]
fn image_that_was_damaged_fails_reads_and_restore_and_nothing_else() {
    let (dir, options, content) = lab(EngineKind::IoUring);
    // From the middle of its data on clusters can't be unpacked; qemu-img has put five clusters of tables before it.
    let image = dir.path().join("base.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let tables = 5 << 16;
    let half = tables + (bytes.len() - tables) / 2;
    bytes[half..].fill(0xff);
    std::fs::write(&image, bytes).unwrap();
    let wanted = ProvisionOptions { adopt: true, ..ProvisionOptions::new(&image, options.clone()) };
    let wanted = ProvisionOptions { size: Some(DISK_SIZE as u64), ..wanted };
    provision(&wanted).unwrap();
    let disk = open(&options);
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(64).unwrap();
    let mut failed = 0;
    for offset in (0..2 << 20).step_by(64 << 10) {
        let buf = GuestBuf::zeroed(4096);
        let range = disk.geometry().sectors_at(offset as u64 / 512, 4096).unwrap();
        match run(&mut queue, Request::Read { range, buf: buf.clone() }) {
            Err(_) => failed += 1,
            Ok(()) => {
                let mut bytes = vec![0; 4096];
                buf.copy_out(0, &mut bytes);
                assert!(bytes == content[offset..][..4096], "at {offset}");
            }
        }
    }
    assert!(failed > 0);
    end(&disk, queue);
    assert!(disk.drain(&AtomicBool::new(false), &mut |_| ()).is_err());
    assert!(disk.pending_blocks() > 0);
    disk.stop().unwrap();
}
