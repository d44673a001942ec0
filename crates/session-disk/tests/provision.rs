//! What a provision finds when it has locked what it takes, and what it had found before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blockio::tape::{Io, Tape};
use session_disk::{DiskOptions, Error, Manifest, ProvisionOptions, provision, status};

/// Does something once, just before the file or directory of that name is made.
struct Before<F>(&'static str, Mutex<Option<F>>);

impl<F> std::fmt::Debug for Before<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Before")
    }
}

impl<F: FnOnce() + Send> Tape for Before<F> {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        let is_due = matches!(io, Io::Create { path, .. } | Io::CreateDir { path } if path.ends_with(self.0));
        if let Some(then) = is_due.then(|| self.1.lock().unwrap().take()).flatten() {
            then();
        }
        Ok(0)
    }
}

/// Two disks are given one state directory by mistake, at the same time: one of them gets it, and the other one does not take it away.
#[test]
fn state_that_another_provision_has_made_meanwhile_is_not_replaced() {
    for moment in ["one.raw", "sessions"] {
        assert_other_keeps_its_state(moment);
    }
}

fn assert_other_keeps_its_state(moment: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    common::write_sparse(&base, &common::base_content(1 << 20));
    let options = |name: &str| DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        state_dir: Some(dir.path().join("state")),
        ..DiskOptions::new(dir.path().join(name))
    };
    let other = ProvisionOptions::new(&base, options("other.raw"));
    let made = Arc::new(Mutex::new(None));
    let tape = Before(
        moment,
        Mutex::new(Some({
            let made = Arc::clone(&made);
            move || {
                let provisioned = provision(&other).unwrap();
                *made.lock().unwrap() =
                    Some((provisioned.pending_blocks, Manifest::load(&other.disk.paths()).unwrap()));
            }
        })),
    );
    let one = DiskOptions { tape: Some(Arc::new(tape)), ..options("one.raw") };
    let refused =
        provision(&ProvisionOptions { adopt: true, ..ProvisionOptions::new(&base, one.clone()) }).map(drop);
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    assert!(!Path::new(&one.disk).exists());
    let (pending_blocks, manifest) = made.lock().unwrap().take().unwrap();
    assert_eq!(Manifest::load(&one.paths()).unwrap(), manifest);
    assert_eq!(status(&options("other.raw")).unwrap().pending_blocks, pending_blocks);
}

/// The last sync of all, that of the manifest's name, fails.
#[derive(Debug, Default)]
struct LastSyncFails(AtomicBool);

impl Tape for LastSyncFails {
    fn begin(&self, io: Io<'_>) -> std::io::Result<u64> {
        match io {
            Io::Rename { to, .. } if to.ends_with("manifest") => self.0.store(true, Ordering::SeqCst),
            Io::SyncDir { path } if path.ends_with("state") && self.0.load(Ordering::SeqCst) => {
                return Err(std::io::ErrorKind::Other.into());
            }
            _ => {}
        }
        Ok(0)
    }
}

/// A manifest has its name, and nobody knows whether for good: nothing of a new disk is left, and an old one is whole.
#[test]
fn provision_whose_last_sync_fails_leaves_nothing_or_all() {
    for exists in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        common::write_sparse(&base, &common::base_content(1 << 20));
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            state_dir: Some(dir.path().join("state")),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        std::fs::create_dir(dir.path().join("state")).unwrap();
        if exists {
            std::fs::write(&options.disk, vec![9; 1 << 20]).unwrap();
        }
        let failing = DiskOptions { tape: Some(Arc::new(LastSyncFails::default())), ..options.clone() };
        let provisioned = ProvisionOptions { adopt: exists, ..ProvisionOptions::new(&base, failing) };
        assert!(matches!(provision(&provisioned), Err(Error::State { .. })));
        if exists {
            let disk = common::open(&options);
            disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
            assert_eq!(std::fs::read(&options.disk).unwrap(), std::fs::read(&base).unwrap());
        } else {
            assert!(!options.disk.exists());
            assert_eq!(std::fs::read_dir(dir.path().join("state")).unwrap().count(), 0);
            provision(&ProvisionOptions::new(&base, options)).unwrap();
        }
    }
}
