//! Opening files, what they can do, and what they refuse.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::io::ErrorKind as IoErrorKind;

use blockio::{ErrorKind, File, FileKind, OpenOptions};
use common::*;

const WRITE: OpenOptions = OpenOptions { write: true, direct: false, exclusive: false };

#[test]
fn open_of_what_is_not_a_disk_is_refused_at_once() {
    let dir = disk_dir();
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    for path in [&fifo, dir.path(), "/dev/null".as_ref()] {
        for options in [OpenOptions::default(), WRITE] {
            let error = File::open(path, options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WrongType, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()));
        }
    }
    let error = File::open(&dir.path().join("missing"), WRITE).unwrap_err();
    assert_eq!(error.io_error().kind(), IoErrorKind::NotFound);
}

#[test]
fn create_of_a_file_that_exists_leaves_it_alone() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    std::fs::write(&path, b"mine").unwrap();
    assert!(File::create_new(&path, 4096, WRITE).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn create_of_an_impossible_size_leaves_nothing() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    assert!(File::create_new(&path, u64::MAX >> 1, WRITE).is_err());
    assert!(!path.exists());
}

/// Bytes that a file takes up in its file system.
fn allocated(path: &std::path::Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}

#[test]
fn created_file_is_private_sparse_and_zero() {
    use std::os::unix::fs::PermissionsExt;
    let dir = disk_dir();
    let path = dir.path().join("disk");
    let file = File::create_new(&path, 10 << 20, OpenOptions::default()).unwrap();
    assert_eq!((file.size().unwrap(), allocated(&path)), (10 << 20, 0));
    assert_eq!(file.kind(), FileKind::Regular);
    assert_eq!(file.path(), path);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(file.next_data(0).unwrap(), None);
    let mut buf = [1; 100];
    file.read_exact_at(&mut buf, 12345).unwrap();
    assert_eq!(buf, [0; 100]);
    let error = file.read_exact_at(&mut buf, (10 << 20) - 99).unwrap_err();
    assert_eq!(error.io_error().kind(), IoErrorKind::UnexpectedEof);
    assert_eq!(error.offset(), Some((10 << 20) - 99));
}

/// mtime and ctime tell whether somebody else wrote the disk (invariant 2), so opening it must
/// not change them.
#[test]
fn identity_of_a_file_that_was_only_opened_is_unchanged() {
    let dirs = [Some(disk_dir()), memory_dir()];
    for dir in dirs.iter().flatten() {
        let path = dir.path().join("disk");
        create(&path, 1 << 20).write_all_at(&[1; 4096], 0).unwrap();
        let before = open(&path, false, false).identity().unwrap();
        let file = open(&path, true, false);
        assert!(file.supports_punch());
        assert_eq!(file.identity().unwrap(), before);
        drop(file);
        assert_eq!(open(&path, false, false).identity().unwrap(), before);
        let file = open(&path, true, false);
        file.write_all_at(&[2], 0).unwrap();
        let after = file.identity().unwrap();
        assert!(after.ctime_ns > before.ctime_ns && after.mtime_ns > before.mtime_ns);
        assert_eq!((after.inode, after.size, after.birth_ns), (before.inode, before.size, before.birth_ns));
    }
}

/// The base is opened read-only (invariant 5): nothing that writes works.
#[test]
fn file_opened_read_only_cannot_be_written() {
    let dir = disk_dir();
    let path = dir.path().join("base");
    create(&path, 8192).write_all_at(&[1; 8192], 0).unwrap();
    let base = open(&path, false, false);
    assert!(!base.supports_punch() && !base.supports_zero());
    assert!(base.write_all_at(&[0; 512], 0).is_err());
    assert!(base.punch_hole(0, 4096).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), [1; 8192]);
}

#[test]
fn data_between_holes_is_found() {
    let dirs = [Some(disk_dir()), memory_dir()];
    for dir in dirs.iter().flatten() {
        let path = dir.path().join("disk");
        let file = create(&path, 1 << 20);
        file.write_all_at(&[1; 8192], 65536).unwrap();
        file.write_all_at(&[1; 1], (1 << 20) - 1).unwrap();
        let tail = ((1 << 20) - 4096)..1 << 20;
        assert_eq!(file.next_data(0).unwrap(), Some(65536..73728));
        assert_eq!(file.next_data(70000).unwrap(), Some(70000..73728));
        assert_eq!(file.next_data(73728).unwrap(), Some(tail));
        assert_eq!(file.next_data(1 << 20).unwrap(), None);
        assert_eq!(file.next_data(u64::MAX).unwrap(), None);
        file.punch_hole(65536, 4096).unwrap();
        assert_eq!(file.next_data(0).unwrap(), Some(69632..73728));
    }
}

/// Where the base has holes the disk gets holes again (invariant 4).
#[test]
fn punched_range_takes_no_room_and_reads_as_zeros() {
    let dirs = [Some(disk_dir()), memory_dir()];
    for dir in dirs.iter().flatten() {
        let path = dir.path().join("disk");
        let file = create(&path, 1 << 20);
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        file.sync_data().unwrap();
        file.sync_all().unwrap();
        let full = allocated(&path);
        file.punch_hole(4096, 65536).unwrap();
        file.punch_hole(0, 0).unwrap();
        assert!(allocated(&path) <= full - 65536);
        assert_eq!(file.size().unwrap(), 1 << 20);
        let mut model = vec![1; 1 << 20];
        model[4096..4096 + 65536].fill(0);
        assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn direct_file_takes_memory_from_anywhere_but_no_odd_offsets() {
    for dir in [Some(disk_dir()), memory_dir()].iter().flatten() {
        let path = dir.path().join("disk");
        create(&path, 4 << 20);
        // tmpfs knows direct I/O since Linux 6.6.
        if let Ok(file) = File::open(&path, OpenOptions { direct: true, ..WRITE }) {
            check_direct(&file);
        }
    }
}

fn check_direct(file: &File) {
    assert!(file.is_direct());
    let align = file.alignment();
    assert!(align.offset >= 512 && align.memory >= 1);
    let data: Vec<u8> = (0..(3usize << 20) + 1).map(|n| (n * 7 + n / 4096) as u8).collect();
    for shift in [0, 1] {
        file.write_all_at(&data[shift..][..3 << 20], 4096).unwrap();
        let mut back = vec![0; (3 << 20) + 1];
        file.read_exact_at(&mut back[1 - shift..][..3 << 20], 4096).unwrap();
        assert!(back[1 - shift..][..3 << 20] == data[shift..][..3 << 20]);
    }
    let error = file.write_all_at(&data[..4096], 1).unwrap_err();
    assert_eq!(error.io_error().kind(), IoErrorKind::InvalidInput);
    assert!(file.read_exact_at(&mut [0; 100], 0).is_err());
    let buffered = open(file.path(), false, false);
    assert_eq!((buffered.alignment().memory, buffered.alignment().offset), (1, 1));
}

/// A direct write to what is cached costs three times as much.
#[test]
fn open_for_direct_io_takes_the_file_out_of_the_cache() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    let file = create(&path, 4 << 20);
    if !file.supports_nowait() {
        println!("skipped: there is no telling what is cached here");
        return;
    }
    file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
    file.sync_all().unwrap();
    let is_cached = |offset| {
        let mut byte = [0];
        let part = &mut [std::io::IoSliceMut::new(&mut byte)];
        rustix::io::preadv2(&file, part, offset, rustix::io::ReadWriteFlags::NOWAIT).is_ok()
    };
    assert!(is_cached(0) && is_cached(2 << 20));
    let _direct = open(&path, true, true);
    assert!(!is_cached(0) && !is_cached(2 << 20));
}

#[test]
fn opened_file_waits_for_its_io() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    create(&path, 4096);
    let flags = rustix::fs::fcntl_getfl(open(&path, true, false)).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}

#[test]
fn nowait_is_known_without_reading_anything() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    create(&path, 4096);
    // ext4, xfs and btrfs all can; what matters is that asking is harmless, also for direct I/O.
    for direct in [false, true] {
        let file = open(&path, true, direct);
        let before = file.identity().unwrap();
        file.supports_nowait();
        assert_eq!(file.identity().unwrap(), before);
    }
    if let Some(dir) = memory_dir() {
        create(&dir.path().join("disk"), 4096).supports_nowait();
    }
}

/// Two backends cannot have one disk (invariant 7).
#[test]
fn exclusive_lock_taken_twice_is_in_use_until_the_first_is_closed() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    create(&path, 4096);
    let (first, second) = (open(&path, true, false), open(&path, true, false));
    first.lock_exclusive().unwrap();
    first.lock_exclusive().unwrap();
    let error = second.lock_exclusive().unwrap_err();
    assert!(error.is_in_use());
    assert!(error.to_string().starts_with("cannot lock "), "{error}");
    drop(first);
    second.lock_exclusive().unwrap();
}

/// Attributes are kept with the file, also a direct one; a name that it does not have is nothing.
#[test]
fn attribute_set_is_read_back_through_any_description() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file = File::create_new(&path, 4096, OpenOptions::default()).unwrap();
    assert_eq!(file.attribute(c"user.test").unwrap(), None);
    file.set_attribute(c"user.test", b"one").unwrap();
    file.set_attribute(c"user.test", b"").unwrap();
    assert_eq!(file.attribute(c"user.test").unwrap(), Some(Vec::new()));
    file.set_attribute(c"user.test", &[7; 300]).unwrap();
    for direct in [false, true] {
        let file = File::open(&path, OpenOptions { direct, ..OpenOptions::default() }).unwrap();
        assert_eq!(file.attribute(c"user.test").unwrap(), Some(vec![7; 300]));
    }
}

/// Where there can be no attributes (here: the kernel's own files) there are none, and setting one says so.
#[test]
fn file_that_can_have_no_attributes_has_none() {
    let file = File::open("/proc/self/comm".as_ref(), OpenOptions { write: true, ..OpenOptions::default() });
    let file = file.unwrap();
    assert_eq!(file.attribute(c"user.test").unwrap(), None);
    assert_eq!(file.set_attribute(c"user.test", b"one").unwrap_err().kind(), ErrorKind::Unsupported);
}

/// What everybody reads stays in the page cache, whoever looks past it; a disk that is written past it is taken out.
#[test]
fn page_cache_gives_up_a_file_for_direct_writes_only() {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    create(&path, 1 << 20);
    let file = File::open(&path, WRITE).unwrap();
    file.write_all_at(&[7; 4096], 0).unwrap();
    file.sync_all().unwrap();
    let is_cached = || {
        let mut byte = [0];
        let nowait = rustix::io::ReadWriteFlags::NOWAIT;
        rustix::io::preadv2(&file, &mut [std::io::IoSliceMut::new(&mut byte)], 0, nowait) == Ok(1)
    };
    if !is_cached() {
        // A file system that can't tell.
        return;
    }
    let Ok(direct) = file.reopen_direct() else { return };
    assert!(is_cached());
    drop(direct);
    drop(File::open(&path, OpenOptions { direct: true, ..WRITE }).unwrap());
    assert!(!is_cached());
}
