//! Logs as files of the host.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{
    env, fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

use blocks::{BlockSet, Extent};
use support::{header, runs, set_of};
use write_log::{LogError, LogKind, LogWriter, area_size, read, read_header};

const BLOCKS: u64 = 100_000;

#[test]
fn log_that_is_created_has_all_its_room_and_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(LogKind::Session, BLOCKS);
    let mut log = LogWriter::create(dir.path(), &header).unwrap();
    let path = dir.path().join(header.id.file_name());
    assert_eq!((log.path(), log.header()), (path.as_path(), &header));
    let meta = path.metadata().unwrap();
    assert_eq!(meta.len(), 4096 + 2 * area_size(header.geometry));
    assert!(meta.blocks() * 512 >= meta.len(), "no hole");
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);

    let mark = log.append(&[Extent::new(7, 3)], &BlockSet::new(BLOCKS)).unwrap();
    log.sync().unwrap();
    let contents = read(&path).unwrap();
    assert_eq!(read_header(&path).unwrap(), header);
    assert_eq!(runs(&contents.blocks_at(mark).unwrap()), [Extent::new(7, 3)]);
    assert_eq!(path.metadata().unwrap().len(), meta.len());
}

#[test]
fn log_whose_file_exists_is_refused_and_the_file_kept() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(LogKind::Session, BLOCKS);
    let path = dir.path().join(header.id.file_name());
    fs::write(&path, "precious").unwrap();
    let error = LogWriter::create(dir.path(), &header).unwrap_err();
    assert!(matches!(error, LogError::Io { operation: "create", .. }), "{error}");
    assert_eq!(error.path(), path);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn log_that_went_on_after_a_crash_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(LogKind::Session, BLOCKS);
    let mut log = LogWriter::create(dir.path(), &header).unwrap();
    let path = log.path().to_owned();
    let owned = BlockSet::new(BLOCKS);
    let mark = log.append(&[Extent::new(1, 1)], &owned).unwrap();
    log.append(&[Extent::new(50, 1)], &owned).unwrap();
    drop(log);

    let (mut log, owned) = LogWriter::resume(&path, mark).unwrap();
    assert_eq!(runs(&owned), [Extent::new(1, 1)]);
    let after = log.append(&[Extent::new(9, 1)], &owned).unwrap();
    assert!(matches!(LogWriter::resume(&path, mark).map(|_| ()), Ok(())), "an older mark still leads there");
    assert!(matches!(LogWriter::resume(&path, after), Err(LogError::Refused { .. })), "and erased this one");
}

#[test]
fn log_that_is_sealed_or_pending_is_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = LogWriter::create(dir.path(), &header(LogKind::Session, BLOCKS)).unwrap();
    let sealed = log.seal(0).unwrap();
    assert!(matches!(LogWriter::resume(log.path(), sealed), Err(LogError::Refused { .. })));
    let mut pending = header(LogKind::Pending, BLOCKS);
    pending.id.seq += 1;
    LogWriter::write_pending(dir.path(), &pending, &BlockSet::new(BLOCKS)).unwrap();
    let path = dir.path().join(pending.id.file_name());
    let start = read(&path).unwrap().start();
    assert!(matches!(LogWriter::resume(&path, start), Err(LogError::Refused { .. })));
}

#[test]
fn pending_log_takes_the_smaller_form() {
    let dir = tempfile::tempdir().unwrap();
    let mut header = header(LogKind::Pending, BLOCKS);
    let mut size = |set: &BlockSet| {
        header.id.seq += 1;
        LogWriter::write_pending(dir.path(), &header, set).unwrap();
        let path = dir.path().join(header.id.file_name());
        assert_eq!(runs(&read(&path).unwrap().sealed_blocks().unwrap()), runs(set));
        path.metadata().unwrap().len()
    };
    assert_eq!(size(&BlockSet::new(BLOCKS)), 8192);
    assert_eq!(size(&set_of(BLOCKS, &[Extent::new(0, BLOCKS)])), 8192);
    let sparse: Vec<Extent> = (0..1000).map(|n| Extent::new(n * 100, 1)).collect();
    assert_eq!(size(&set_of(BLOCKS, &sparse)), 4096 + 8192);
    let dense: Vec<Extent> = (0..BLOCKS / 2).map(|n| Extent::new(n * 2, 1)).collect();
    assert_eq!(size(&set_of(BLOCKS, &dense)), 4096 + 16384);
}

#[test]
fn file_that_is_no_log_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    assert!(matches!(read(&file), Err(LogError::Io { operation: "open", .. })));
    for content in [&b""[..], b"P", b"PRISWLO", &[0; 4096], &[0xff; 20_000]] {
        fs::write(&file, content).unwrap();
        let error = read(&file).unwrap_err();
        assert!(matches!(error, LogError::NotALog { .. }), "{error}");
        assert!(error.to_string().contains(file.to_str().unwrap()));
    }
    assert!(matches!(read(dir.path()), Err(LogError::NotALog { .. })));
    assert!(matches!(read(Path::new("/dev/null")), Err(LogError::NotALog { .. })));
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(matches!(read(&fifo), Err(LogError::NotALog { .. })), "and does not hang");
}

/// Invariant 6: a full file system refuses the session, it does not fail its writes. The test runs
/// itself again in a mount namespace of its own, with a tiny file system.
#[test]
fn log_on_a_full_file_system_is_refused_and_leaves_nothing() {
    const TINY: &str = "WRITE_LOG_TINY_FILE_SYSTEM";
    if let Some(tiny) = env::var_os(TINY) {
        let (tiny, large, small) =
            (Path::new(&tiny), header(LogKind::Session, 1 << 20), header(LogKind::Session, 100));
        let error = LogWriter::create(tiny, &large).unwrap_err();
        let expected = 4096 + 2 * area_size(large.geometry);
        assert!(matches!(error, LogError::NoSpace { needed, .. } if needed == expected), "{error}");
        let pending = header(LogKind::Pending, 1 << 24);
        let dense = BlockSet::new(1 << 24);
        dense.insert_bytes(0, &vec![0x55; 1 << 21]);
        let error = LogWriter::write_pending(tiny, &pending, &dense).unwrap_err();
        assert!(matches!(error, LogError::NoSpace { .. }), "{error}");
        assert_eq!(tiny.read_dir().unwrap().count(), 0);
        LogWriter::create(tiny, &small).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=200k tmpfs \"$WRITE_LOG_TINY_FILE_SYSTEM\"";
    let unshare = |options: &[&str], script: &str| {
        let mut command = Command::new("unshare");
        command.args(options).args(["--mount", "sh", "-c", script, "sh"]).env(TINY, dir.path());
        command
    };
    let works = |options: &&&[&str]| unshare(options, script).output().is_ok_and(|out| out.status.success());
    let ways: [&[&str]; 2] = [&[], &["--map-root-user"]];
    let Some(options) = ways.iter().find(works) else {
        eprintln!("skipped: no way to mount a file system of one's own here");
        return;
    };
    let name = "log_on_a_full_file_system_is_refused_and_leaves_nothing";
    let run = format!("{script} && exec \"$@\"");
    let output = unshare(options, &run)
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
