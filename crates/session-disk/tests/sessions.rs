//! Sessions on a real disk: what they read, what the next one reads, and what a restart concludes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::tape::{Io, Tape};
use blockio::{EngineKind, GuestBuf};
use common::{Bench, end, read, run, try_write, write};
use session_disk::{Basis, DiskState, Distrust, Error, FlushPolicy, Request, status, verify};

const MIB: usize = 1 << 20;

/// Invariants 2 and 4: a session reads its own writes, the next one the base, at once and after the drain.
#[test]
fn next_session_reads_the_base_before_and_after_the_drain() {
    for engine in [EngineKind::IoUring, EngineKind::Sync] {
        let bench = Bench::new(4 * MIB, None, false, engine);
        let disk = bench.open();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        write(&disk, &mut queue, 3, &[0xaa; 512]);
        write(&disk, &mut queue, 1000, &[0xbb; 64 * 1024 + 512]);
        assert_eq!(read(&disk, &mut queue, 3, 512), [0xaa; 512]);
        assert_eq!(read(&disk, &mut queue, 0, 512), bench.base[..512]);
        let summary = end(&disk, queue);
        assert_eq!((summary.dirty_blocks, summary.bytes_written), (1 + 17, 512 + 64 * 1024 + 512));

        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        assert_eq!(read(&disk, &mut queue, 0, MIB), bench.base[..MIB]);
        assert_eq!(disk.pending_blocks(), 18);
        // Part of a pending block: the rest of the block is the base's, not the last session's.
        write(&disk, &mut queue, 1001, &[0xcc; 512]);
        let block = read(&disk, &mut queue, 1000, 4096);
        let mut expected = bench.base[1000 * 512..1000 * 512 + 4096].to_vec();
        expected[512..1024].fill(0xcc);
        assert_eq!(block, expected);
        assert_eq!(disk.pending_blocks(), 17);
        end(&disk, queue);
        bench.assert_restores_exactly(&disk);
        assert_eq!(status(&bench.options).unwrap().state, DiskState::Pristine);
        disk.stop().unwrap();
        drop(disk);
        assert!(verify(&bench.options, &AtomicBool::new(false), &mut |_| ()).unwrap().is_equal());
    }
}

/// Invariant 6: without a session nothing is taken.
#[test]
fn requests_without_a_session_fail_and_change_nothing() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    let mut queue = disk.queue(16).unwrap();
    assert!(try_write(&disk, &mut queue, 0, &[1; 4096]).is_err());
    drop(queue);
    disk.begin_session(None).unwrap();
    assert!(matches!(disk.begin_session(None), Err(Error::WrongState(_))));
    disk.end_session().unwrap();
    assert_eq!(disk.pending_blocks(), 0);
    bench.assert_equal_to_base();
}

/// A discard makes nothing dirty that the session does not own, and gives up what it does.
#[test]
fn discard_affects_only_blocks_that_the_session_owns() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(&disk, &mut queue, 8, &[0x55; 8192]);
    let all = disk.geometry().sectors_at(0, 4 * MIB as u64).unwrap();
    run(&mut queue, Request::Discard { range: all }).unwrap();
    assert_eq!(disk.dirty_blocks(), 2);
    assert_eq!(read(&disk, &mut queue, 8, 8192), [0; 8192]);
    assert_eq!(read(&disk, &mut queue, 0, 4096), bench.base[..4096]);
    end(&disk, queue);
    bench.assert_restores_exactly(&disk);
}

/// Write-zeroes of odd sizes over clean, owned and pending blocks reads as zeroes and is restored.
#[test]
fn write_zeroes_over_mixed_blocks_reads_as_zeroes_and_is_restored() {
    for may_unmap in [false, true] {
        let bench = Bench::new(4 * MIB, Some(5 * MIB as u64 + 512), true, EngineKind::IoUring);
        let disk = bench.open();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        write(&disk, &mut queue, 16, &[0x55; 4096]);
        let range = disk.geometry().sectors_at(5, 300 * 512).unwrap();
        run(&mut queue, Request::WriteZeroes { range, may_unmap, durable: false }).unwrap();
        let mut expected = bench.base[..MIB].to_vec();
        expected[5 * 512..305 * 512].fill(0);
        assert_eq!(read(&disk, &mut queue, 0, MIB), expected);
        end(&disk, queue);
        bench.assert_restores_exactly(&disk);
    }
}

/// Syncs of the disk fail while it says so.
#[derive(Debug, Default)]
struct NoSync(AtomicBool);

impl Tape for NoSync {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        match io {
            Io::Sync { path } if path.ends_with("disk.raw") && self.0.load(Ordering::SeqCst) => {
                Err(std::io::Error::from_raw_os_error(5))
            }
            _ => Ok(0),
        }
    }
}

/// Invariant 2: that a pending block reads as zeroes is a note of the file system. If its journal fails it can be forgotten without a word to
/// those who ask about data, and the block has what an earlier session wrote: so whoever reads it syncs before. What was written needs none.
#[test]
fn pending_block_that_was_zeroed_is_not_read_before_that_is_durable() {
    let tape = Arc::new(NoSync::default());
    let mut bench = Bench::new(4 * MIB, None, true, EngineKind::IoUring);
    bench.options.tape = Some(tape.clone());
    bench.options.flush = FlushPolicy::Never;
    let session = || {
        let disk = bench.open();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        let range = disk.geometry().sectors_at(16, 2 * 4096).unwrap();
        run(&mut queue, Request::WriteZeroes { range, may_unmap: true, durable: false }).unwrap();
        // As one that is written and given up before that has reached the medium.
        for sector in [32, 40] {
            write(&disk, &mut queue, sector, &[0x55; 4096]);
        }
        let range = disk.geometry().sectors_at(40, 4096).unwrap();
        run(&mut queue, Request::Discard { range }).unwrap();
        (disk, queue)
    };
    let (disk, mut queue) = session();
    tape.0.store(true, Ordering::SeqCst);
    assert_eq!(read(&disk, &mut queue, 32, 4096), [0x55; 4096]);
    drop((disk, queue));
    for sector in [16, 40] {
        tape.0.store(false, Ordering::SeqCst);
        let (disk, mut queue) = session();
        tape.0.store(true, Ordering::SeqCst);
        let (range, buf) = (disk.geometry().sectors_at(sector, 4096).unwrap(), GuestBuf::zeroed(4096));
        run(&mut queue, Request::Read { range, buf }).unwrap_err();
    }
    tape.0.store(false, Ordering::SeqCst);
    let (disk, mut queue) = session();
    assert_eq!(read(&disk, &mut queue, 16, 4096), [0; 4096]);
    // Once it is known to be durable nobody asks again.
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    tape.0.store(true, Ordering::SeqCst);
    assert_eq!(read(&disk, &mut queue, 16, 4096), [0; 4096]);
}

/// The same when its server is killed: the next one knows that there are such blocks.
#[test]
fn pending_block_that_was_zeroed_is_not_read_by_the_next_server_before_that_is_durable() {
    let tape = Arc::new(NoSync::default());
    let mut bench = Bench::new(4 * MIB, None, true, EngineKind::IoUring);
    bench.options.tape = Some(tape.clone());
    bench.options.resume = true;
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    let range = disk.geometry().sectors_at(16, 4096).unwrap();
    run(&mut queue, Request::WriteZeroes { range, may_unmap: true, durable: false }).unwrap();
    drop(queue);
    drop(disk);
    let disk = bench.open();
    assert!(disk.session_is_open());
    tape.0.store(true, Ordering::SeqCst);
    let (mut queue, buf) = (disk.queue(16).unwrap(), GuestBuf::zeroed(4096));
    run(&mut queue, Request::Read { range, buf }).unwrap_err();
}

/// Invariants 1, 2 and 6: a server that is gone without a word leaves a log that says exactly what to restore.
#[test]
fn disk_dropped_in_mid_session_is_pending_by_its_log() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(&disk, &mut queue, 8, &[0x55; 8192]);
    write(&disk, &mut queue, 800, &[0x66; 512]);
    drop(queue);
    drop(disk);
    let seen = status(&bench.options).unwrap();
    assert_eq!((seen.state, seen.pending_blocks), (DiskState::Interrupted, 3));
    let disk = bench.open();
    assert_eq!(*disk.basis(), Basis::ExactLogs);
    assert_eq!(disk.pending_blocks(), 3);
    bench.assert_restores_exactly(&disk);
}

/// Invariant 3: what is pending may be made a log of its own while a session is open. It is younger than the
/// session's, which goes on nevertheless.
#[test]
fn session_goes_on_after_a_checkpoint_that_left_blocks_pending() {
    let mut bench = Bench::new(4 * MIB, None, true, EngineKind::IoUring);
    bench.options.resume = true;
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(&disk, &mut queue, 8, &[0x55; 8192]);
    disk.checkpoint().unwrap();
    assert!(disk.pending_blocks() > 0);
    drop(queue);
    drop(disk);
    let disk = bench.open();
    assert!(disk.session_is_open());
    let mut queue = disk.queue(16).unwrap();
    assert_eq!(read(&disk, &mut queue, 8, 8192), [0x55; 8192]);
    end(&disk, queue);
    bench.assert_restores_exactly(&disk);
}

/// Invariant 2 after a power cut: the live page is gone, so every region that a session meant to touch is pending.
#[test]
fn disk_without_its_live_page_is_pending_by_its_intents() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(&disk, &mut queue, 8, &[0x55; 8192]);
    drop(queue);
    drop(disk);
    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
    let disk = bench.open();
    assert_eq!(*disk.basis(), Basis::Intents);
    assert_eq!(disk.pending_blocks(), disk.geometry().blocks());
    bench.assert_restores_exactly(&disk);
}

/// Invariant 6: a listed log that is gone, cut or changed hides nothing: all is pending.
#[test]
fn disk_with_a_damaged_log_is_wholly_pending() {
    for damage in ["delete", "truncate", "flip"] {
        let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
        let disk = bench.open();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(16).unwrap();
        write(&disk, &mut queue, 8, &[0x55; 8192]);
        drop(queue);
        drop(disk);
        let sessions = bench.options.paths().sessions();
        let mut logs: Vec<_> = std::fs::read_dir(sessions).unwrap().map(|e| e.unwrap().path()).collect();
        logs.sort();
        let log = logs.pop().unwrap();
        let mut bytes = std::fs::read(&log).unwrap();
        match damage {
            "delete" => std::fs::remove_file(&log).unwrap(),
            "truncate" => std::fs::write(&log, &bytes[..bytes.len() - 1]).unwrap(),
            _ => {
                bytes[4096 + 20] ^= 1;
                std::fs::write(&log, &bytes).unwrap();
            }
        }
        let disk = bench.open();
        assert!(matches!(disk.basis(), Basis::Everything(_)), "{damage}: {:?}", disk.basis());
        assert_eq!(disk.pending_blocks(), disk.geometry().blocks());
        bench.assert_restores_exactly(&disk);
    }
}

/// Invariant 6: a write to the disk while it was pristine and nobody served it is noticed.
#[test]
fn disk_written_from_outside_is_wholly_pending() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
    let before = std::fs::metadata(&bench.options.disk).unwrap().modified().unwrap();
    while std::fs::metadata(&bench.options.disk).unwrap().modified().unwrap() == before {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(&bench.options.disk).unwrap();
        file.write_all_at(&[9; 100], 12345).unwrap();
    }
    let disk = bench.open();
    assert_eq!(*disk.basis(), Basis::Everything(Distrust::WrittenFromOutside));
    bench.assert_restores_exactly(&disk);
}

/// Invariant 7: a second server is turned away, and one that stopped leaves the disk to the next.
#[test]
fn disk_that_is_open_is_refused_to_a_second_server() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    assert!(matches!(session_disk::SessionDisk::open(&bench.options), Err(Error::InUse { .. })));
    assert!(matches!(verify(&bench.options, &AtomicBool::new(false), &mut |_| ()), Err(Error::InUse { .. })));
    disk.stop().unwrap();
    drop(disk);
    bench.open();
}

/// Invariant 5: a base that changed is refused.
#[test]
fn disk_whose_base_changed_is_refused() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let before = std::fs::metadata(bench.base_path()).unwrap().modified().unwrap();
    while std::fs::metadata(bench.base_path()).unwrap().modified().unwrap() == before {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(bench.base_path()).unwrap();
        file.write_all_at(&[9; 1], 0).unwrap();
    }
    let error = session_disk::SessionDisk::open(&bench.options).unwrap_err();
    assert!(matches!(error, Error::Base(base_image::BaseError::Changed { .. })), "{error}");
    assert!(error.hint("--disk d").unwrap().contains("--disk d"));
}

/// A stop in mid-session leaves exact logs, also when the host goes down after it.
#[test]
fn disk_stopped_in_mid_session_is_exact_without_the_live_page() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(&disk, &mut queue, 8, &[0x55; 8192]);
    drop(queue);
    disk.stop().unwrap();
    drop(disk);
    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
    let disk = bench.open();
    assert_eq!((disk.basis(), disk.pending_blocks()), (&Basis::ExactLogs, 2));
    bench.assert_restores_exactly(&disk);
}

/// A buffer that is not as long as its range is an error, not a wrong transfer.
#[test]
fn request_with_a_buffer_of_another_length_fails() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let disk = bench.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(16).unwrap();
    let range = disk.geometry().sectors_at(0, 4096).unwrap();
    let short = || GuestBuf::zeroed(512);
    assert!(run(&mut queue, Request::Read { range, buf: short() }).is_err());
    assert!(run(&mut queue, Request::Write { range, buf: short(), durable: false }).is_err());
    assert_eq!(disk.dirty_blocks(), 0);
}

/// Invariants 6 and 7: a copy of a disk with its state is another disk, and all of it is pending.
#[test]
fn copy_of_a_disk_with_its_state_is_wholly_pending() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let copy = bench.dir.path().join("copy.raw");
    for (from, to) in [(&bench.options.disk, &copy), (&suffixed(&bench.options.disk), &suffixed(&copy))] {
        let status = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
        assert!(status.success());
    }
    let options = session_disk::DiskOptions { disk: copy.clone(), ..bench.options.clone() };
    let disk = common::open(&options);
    assert_eq!(*disk.basis(), Basis::Everything(Distrust::AnotherFile));
    // While the copy is served the original's status is its own.
    assert_eq!(status(&bench.options).unwrap().state, DiskState::Pristine);
    assert_eq!(status(&bench.options).unwrap().server_pid, None);
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    assert_eq!(std::fs::read(&copy).unwrap(), bench.base);
}

/// A state directory that is named may be another disk's by mistake. A file that never was a session disk is not overwritten for
/// that, whatever the state says; one that was is, for nothing of it is anybody's.
#[test]
fn file_that_never_was_a_session_disk_is_not_restored_by_the_state_of_another() {
    let bench = Bench::new(MIB, None, false, EngineKind::IoUring);
    let own =
        session_disk::DiskOptions { state_dir: Some(suffixed(&bench.options.disk)), ..bench.options.clone() };
    let options = |name: &str| session_disk::DiskOptions { disk: bench.dir.path().join(name), ..own.clone() };
    let precious = options("precious.raw");
    std::fs::write(&precious.disk, vec![0x99; MIB]).unwrap();
    let end_a_session = |write: bool| {
        let disk = common::open(&own);
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        if write {
            common::try_write(&disk, &mut queue, 0, &[0x11; 4096]).unwrap();
        }
        common::end(&disk, queue);
    };
    for dirty in [false, true] {
        end_a_session(dirty);
        let rebase = session_disk::RebaseOptions::new(bench.base_path(), precious.clone());
        let errors = [
            common::refusal(|| session_disk::SessionDisk::open(&precious)),
            common::refusal(|| session_disk::rebase(&rebase, &AtomicBool::new(false), &mut |_| ())),
        ];
        for error in errors {
            assert!(matches!(error, Error::UnknownFile { .. }), "{error}");
            assert!(error.to_string().contains("never was a session disk"), "{error}");
        }
        assert!(std::fs::read(&precious.disk).unwrap() == vec![0x99; MIB]);
    }
    // A copy that says that it was one.
    let copy = options("copy.raw");
    let status = std::process::Command::new("cp").arg("-a").args([&own.disk, &copy.disk]).status().unwrap();
    assert!(status.success());
    assert_eq!(*common::open(&copy).basis(), Basis::Everything(Distrust::AnotherFile));
}

fn suffixed(disk: &std::path::Path) -> std::path::PathBuf {
    disk.with_extension("raw.pristine")
}
