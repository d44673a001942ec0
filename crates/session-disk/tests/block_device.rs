//! Disks on block devices. Without the right to make a loop device the tests say so and pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use blockio::EngineKind;
use common::{Bench, end, read, try_write};
use session_disk::{DiskOptions, Error, ProvisionOptions, Request, provision};

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &std::path::Path, sector: u32) -> Option<Self> {
        let sector = format!("--sector-size={sector}");
        let output = Command::new("losetup").args(["--find", "--show", &sector]).arg(file).output();
        let made = output.ok().filter(|output| output.status.success());
        if made.is_none() {
            println!("skipped: cannot make a loop device here");
        }
        made.map(|output| Self(String::from_utf8(output.stdout).unwrap().trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Invariants 3 and 4: the page cache takes sectors of 512 bytes, whatever the device has. A guest has them zeroed, too, and
/// the disk is restored where it ends in the middle of one of the device's.
#[test]
fn device_of_large_sectors_serves_small_ones_through_the_page_cache() {
    const SIZE: usize = (256 << 10) + 512;
    for engine in [EngineKind::IoUring, EngineKind::Sync] {
        let made = Bench::new(SIZE, None, true, engine);
        let dir = made.dir.path();
        // Ends in a hole.
        let mut base = std::fs::read(made.base_path()).unwrap();
        base[SIZE - 8704..].fill(0);
        common::write_sparse(&dir.join("holes.raw"), &base);
        let backing = dir.join("backing");
        std::fs::write(&backing, vec![0xee; 1 << 20]).unwrap();
        let Some(device) = Loop::attach(&backing, 4096) else { return };
        let options = DiskOptions {
            state_dir: Some(dir.join("state")),
            runtime_dir: Some(dir.join("run")),
            engine: Some(engine),
            ..DiskOptions::new(&device.0)
        };
        let new = ProvisionOptions::new(dir.join("holes.raw"), options.clone());
        assert!(matches!(provision(&new), Err(Error::Refused(why)) if why.contains("is not empty")));
        provision(&ProvisionOptions { adopt: true, ..new }).unwrap();
        let disk = common::open(&options);
        assert_eq!(disk.logical_block_size(), 512);
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        let mut expected = base.clone();
        for (sector, may_unmap) in [(1, false), (33, true), (SIZE as u64 / 512 - 1, true)] {
            try_write(&disk, &mut queue, sector, &[0x11; 512]).unwrap();
            let range = disk.geometry().sectors_at(sector, 512).unwrap();
            queue.push(1, Request::WriteZeroes { range, may_unmap, durable: false });
            let mut done = Vec::new();
            queue.quiesce(&mut done);
            done.pop().unwrap().result.unwrap();
            expected[sector as usize * 512..][..512].fill(0);
        }
        assert!(read(&disk, &mut queue, 0, SIZE) == expected);
        try_write(&disk, &mut queue, SIZE as u64 / 512 - 1, &[0x22; 512]).unwrap();
        end(&disk, queue);
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        assert_eq!(disk.pending_blocks(), 0);
        let mut restored = std::fs::read(&device.0).unwrap();
        restored.truncate(SIZE);
        assert!(restored == base);
        drop(disk);
    }
}

/// Invariants 2 and 5: a name such as /dev/sdb is another device's after a boot. That one is neither read as pristine nor
/// restored, and keeps its contents; the disk is known again by whatever name.
#[test]
fn other_device_under_the_same_name_is_refused_and_left_alone() {
    const SIZE: usize = 256 << 10;
    let made = Bench::new(SIZE, None, true, EngineKind::Sync);
    let dir = made.dir.path();
    let backing = |name: &str, byte: u8| {
        let path = dir.join(name);
        std::fs::write(&path, vec![byte; 1 << 20]).unwrap();
        path
    };
    let (own, other) = (backing("own", 0xaa), backing("other", 0xbb));
    let (Some(own), Some(device)) = (Loop::attach(&own, 512), Loop::attach(&other, 512)) else { return };
    let name = dir.join("sdb");
    let call = |device: &std::path::Path| {
        let _ = std::fs::remove_file(&name);
        std::os::unix::fs::symlink(device, &name).unwrap();
    };
    call(&own.0);
    let options = DiskOptions {
        state_dir: Some(dir.join("state")),
        runtime_dir: Some(dir.join("run")),
        engine: Some(EngineKind::Sync),
        ..DiskOptions::new(&name)
    };
    let new = ProvisionOptions { adopt: true, ..ProvisionOptions::new(made.base_path(), options.clone()) };
    provision(&new).unwrap();
    for drained in [false, true] {
        call(&device.0);
        let tell = |error: Error| match &error {
            Error::AnotherDevice { .. } => {
                let text = error.to_string();
                assert!(text.contains("/own") && text.contains("/other"), "{text}");
                assert!(error.hint("--disk D").unwrap().contains("/dev/disk/by-id"));
            }
            error => panic!("{error}"),
        };
        tell(common::refusal(|| session_disk::SessionDisk::open(&options)));
        tell(session_disk::status(&options).unwrap_err());
        assert!(std::fs::read(&other).unwrap() == vec![0xbb; 1 << 20], "drained: {drained}");
        // A file is none either.
        std::fs::remove_file(&name).unwrap();
        std::fs::write(&name, vec![0xcc; SIZE]).unwrap();
        let error = common::refusal(|| session_disk::SessionDisk::open(&options));
        assert!(error.to_string().ends_with("is a file, and its state is about a device"), "{error}");
        assert!(std::fs::read(&name).unwrap() == vec![0xcc; SIZE]);
        call(&own.0);
        let disk = common::open(&options);
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        assert!(std::fs::read(&own.0).unwrap()[..SIZE] == made.base);
        disk.stop().unwrap();
    }
}
