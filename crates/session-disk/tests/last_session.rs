//! What is taken for the last session's content is that, or nothing: whatever a power cut, or storage that fails, has made of
//! what it wrote. A block that it owned may else hold what an earlier session wrote, and be kept or promoted with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use base_image::{BaseFormat, BaseImage, Trust};
use blockio::EngineKind;
use blockio::tape::{Io, Tape};
use common::{Bench, write};
use session_disk::{Error, FlushPolicy, HoldReason, Portion, Request, SessionDisk, keep};

const MIB: usize = 1 << 20;

/// A host's storage: what of its files has reached the medium for sure.
#[derive(Debug, Default)]
struct Host {
    medium: Mutex<HashMap<PathBuf, Vec<u8>>>,
    disk_fails: AtomicBool,
}

impl Tape for Host {
    fn begin(&self, io: Io<'_>) -> io::Result<u64> {
        let Io::Sync { path } = io else { return Ok(0) };
        let is_disk = path.extension().is_some_and(|extension| extension == "raw");
        if is_disk && self.disk_fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("the medium is gone"));
        }
        if is_disk || path.extension().is_some_and(|extension| extension == "wlog") {
            self.medium.lock().unwrap().insert(path.to_owned(), fs::read(path).unwrap());
        }
        Ok(0)
    }
}

struct Lab {
    bench: Bench,
    host: Arc<Host>,
    /// What the second session saw.
    seen: Vec<u8>,
}

/// Has the file what its medium has. Nobody has written to it.
fn write_back(path: &Path, medium: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(medium, 0).unwrap();
    file.set_len(medium.len() as u64).unwrap();
    file.set_modified(time).unwrap();
}

impl Lab {
    /// A disk with what a first session has left, which has reached the medium, and a second session that has written over it.
    fn in_second_session() -> (Self, Arc<SessionDisk>) {
        let mut bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
        let host = Arc::new(Host::default());
        bench.options.tape = Some(host.clone());
        bench.options.flush = FlushPolicy::Always;
        let disk = bench.open();
        let mut seen = bench.base.clone();
        for byte in [0xa1, 0xb1] {
            disk.begin_session(None).unwrap();
            let mut queue = disk.queue(16).unwrap();
            for block in (0..300).step_by(3) {
                write(&disk, &mut queue, block * 8, &[byte; 4096]);
                seen[block as usize * 4096..][..4096].fill(byte);
            }
            if byte == 0xa1 {
                drop(queue);
                disk.end_session().unwrap();
                let path = bench.options.disk.clone();
                host.medium.lock().unwrap().insert(path, bench.disk_content());
            }
        }
        (Self { bench, host, seen }, disk)
    }

    /// What was not synced is lost: of the disk, and of logs too, unless they were written back by chance.
    fn cut_power(&self, logs_were_written_back: bool) {
        for (path, bytes) in &*self.host.medium.lock().unwrap() {
            if path.exists() && (*path == self.bench.options.disk || !logs_were_written_back) {
                write_back(path, bytes);
            }
        }
        let _ = fs::remove_dir_all(self.bench.dir.path().join("run"));
    }

    /// Whether the last session can be kept: then it is what that saw.
    #[track_caller]
    fn is_kept(&self) -> bool {
        let to = self.bench.dir.path().join("kept.qcow2");
        match keep(&self.bench.options, Portion::LastSession, &to, &AtomicBool::new(false), &mut |_, _| ()) {
            Ok(_) => {}
            Err(Error::Refused(_)) => return false,
            Err(error) => panic!("{error}"),
        }
        let dir = [self.bench.dir.path().to_owned()];
        let image = BaseImage::open(&to, Some(BaseFormat::Qcow2), Trust::Directories(&dir)).unwrap();
        let mut content = vec![0; image.size() as usize];
        image.read_at(&mut content, 0).unwrap();
        fs::remove_file(to).unwrap();
        for (block, (kept, seen)) in content.chunks(4096).zip(self.seen.chunks(4096)).enumerate() {
            assert!(kept == seen, "block {block} has {:#x} and not what the session saw", kept[0]);
        }
        true
    }
}

fn hold(disk: &SessionDisk) -> Result<session_disk::Held, Error> {
    disk.hold(HoldReason::ByOperator)
}

/// Invariant 2: a server that stops in order syncs no data, so what it says of its last session holds until the host goes down.
#[test]
fn session_left_by_a_stop_before_a_power_cut_is_not_kept_or_held() {
    for ended in [true, false] {
        let (lab, disk) = Lab::in_second_session();
        if ended {
            disk.end_session().unwrap();
        }
        disk.stop().unwrap();
        drop(disk);
        assert!(lab.is_kept(), "the host still runs");
        lab.cut_power(true);
        assert!(!lab.is_kept());
        let disk = lab.bench.open();
        assert!(hold(&disk).is_err());
        lab.bench.assert_restores_exactly(&disk);
    }
}

/// Invariant 2: write-back failed before the session's end, and the next server has forgotten it.
#[test]
fn held_session_whose_storage_failed_is_never_kept() {
    for ended in [true, false] {
        let (lab, disk) = Lab::in_second_session();
        hold(&disk).unwrap();
        lab.host.disk_fails.store(true, Ordering::SeqCst);
        if ended {
            // Syncs, which fails.
            disk.end_session().unwrap();
        } else {
            let mut queue = disk.queue(16).unwrap();
            assert!(common::run(&mut queue, Request::Flush).is_err());
        }
        drop(disk);
        lab.host.disk_fails.store(false, Ordering::SeqCst);
        // The pages that could not be written are dropped.
        let medium = lab.host.medium.lock().unwrap()[&lab.bench.options.disk].clone();
        write_back(&lab.bench.options.disk, &medium);
        assert!(!lab.is_kept());
        let disk = lab.bench.open();
        assert!(!lab.is_kept());
        disk.stop().unwrap();
        drop(disk);
        assert!(!lab.is_kept());
        let disk = lab.bench.open();
        assert!(!lab.is_kept());
        disk.release().unwrap();
        lab.bench.assert_restores_exactly(&disk);
    }
}

/// The same where the server stops in order, with the session still open and no VM that might come back to it.
#[test]
fn held_session_that_a_stop_ends_outlasts_the_host_or_is_not_kept() {
    for storage_fails in [false, true] {
        let (lab, disk) = Lab::in_second_session();
        hold(&disk).unwrap();
        lab.host.disk_fails.store(storage_fails, Ordering::SeqCst);
        let _ = disk.stop();
        drop(disk);
        lab.host.disk_fails.store(false, Ordering::SeqCst);
        if storage_fails {
            // The pages that could not be written are dropped; the host goes on.
            let medium = lab.host.medium.lock().unwrap()[&lab.bench.options.disk].clone();
            write_back(&lab.bench.options.disk, &medium);
        } else {
            lab.cut_power(false);
        }
        for _opening in 0..2 {
            assert_eq!(lab.is_kept(), !storage_fails);
            lab.bench.open().stop().unwrap();
        }
        let disk = lab.bench.open();
        disk.release().unwrap();
        lab.bench.assert_restores_exactly(&disk);
    }
}

/// Invariant 2, and what a hold promises: a session whose server and VM were killed, held before or after, is there after a power
/// cut, all of it.
#[test]
fn killed_session_that_is_held_outlasts_the_host() {
    for held_before in [true, false] {
        for logs_were_written_back in [true, false] {
            let (lab, disk) = Lab::in_second_session();
            if held_before {
                hold(&disk).unwrap();
            }
            drop(disk);
            let disk = lab.bench.open();
            if !held_before {
                hold(&disk).unwrap();
            }
            assert!(lab.is_kept());
            drop(disk);
            lab.cut_power(logs_were_written_back);
            assert!(lab.is_kept(), "held before: {held_before}, logs back: {logs_were_written_back}");
            let disk = lab.bench.open();
            assert!(lab.is_kept());
            disk.release().unwrap();
            lab.bench.assert_restores_exactly(&disk);
        }
    }
}
