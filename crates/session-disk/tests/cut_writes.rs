//! What a server was killed in the middle of: its copies into the disk's map are done to the end by whoever takes the
//! disk next, and by nobody else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockio::{EngineKind, GuestBuf};
use common::{Bench, fast_dir, open, read, write};
use session_disk::{
    Changes, DiskOptions, DiskQueue, HoldReason, Portion, ProcessId, PromoteOptions, ProvisionOptions,
    SessionDisk, keep, promote, provision,
};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Blocks that the session owns.
const OWNED: std::ops::Range<u64> = 8..13;
const BYTE: u8 = 0x51;

/// A disk that was pristine, and whose session is open and owns [`OWNED`].
fn in_session() -> (Bench, Arc<SessionDisk>, DiskOptions) {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
    let options = DiskOptions { resume: true, ..bench.options.clone() };
    let disk = open(&options);
    begin_and_write(&disk);
    (bench, disk, options)
}

fn begin_and_write(disk: &Arc<SessionDisk>) {
    disk.begin_session(Some(ProcessId::own())).unwrap();
    let mut queue = disk.queue(16).unwrap();
    write(disk, &mut queue, OWNED.start * 8, &vec![BYTE; (OWNED.end - OWNED.start) as usize * BLOCK]);
}

fn redo(bench: &Bench, disk: &SessionDisk) -> PathBuf {
    bench.options.runtime_dir.as_ref().unwrap().join(format!("{}.redo", disk.id()))
}

/// Has the live page name this process as the last server, as a kill does: a disk that is dropped leaves none.
fn killed(redo: &Path) {
    let own = ProcessId::own();
    set_live_words(&redo.with_extension("live"), 5, [own.pid.into(), own.start_ticks]);
}

/// What a server leaves that is killed when it has armed a slot and not begun to copy: the file as its format has it.
fn leave(path: &Path, slot: u64, server: ProcessId, offset: u64, data: &[u8]) {
    killed(path);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(data, 4096 * (slot + 1)).unwrap();
    let words = |at: u64, words: [u64; 2]| {
        file.write_all_at(&words.map(u64::to_ne_bytes).concat(), at).unwrap();
    };
    words(8, [server.pid.into(), server.start_ticks]);
    words(64 * (slot + 1), [offset, data.len() as u64]);
}

fn block_of(bench: &Bench, block: u64) -> Vec<u8> {
    bench.disk_content()[block as usize * BLOCK..][..BLOCK].to_vec()
}

/// Invariant 3: the session goes on, and each sector is there as a whole.
#[test]
fn cut_write_of_a_session_that_goes_on_is_done_to_its_end() {
    let (bench, disk, options) = in_session();
    let path = redo(&bench, &disk);
    drop(disk);
    leave(&path, 0, ProcessId::own(), 10 * BLOCK as u64 + 512, &[0x77; 1024]);
    leave(&path, 15, ProcessId::own(), 12 * BLOCK as u64, &[0x78; BLOCK]);
    let disk = open(&options);
    assert!(disk.session_is_open());
    let mut queue = disk.queue(16).unwrap();
    let mut expected = vec![BYTE; 5 * BLOCK];
    expected[2 * BLOCK + 512..][..1024].fill(0x77);
    expected[4 * BLOCK..].fill(0x78);
    assert!(read(&disk, &mut queue, OWNED.start * 8, 5 * BLOCK) == expected);
    // Once: what the session writes then is not undone by the next kill.
    write(&disk, &mut queue, 12 * 8, &[0x79; BLOCK]);
    drop((queue, disk));
    killed(&path);
    let disk = open(&options);
    assert!(disk.session_is_open());
    assert!(block_of(&bench, 12) == [0x79; BLOCK] && disk.dirty_blocks() == 5);
    disk.end_session().unwrap();
    bench.assert_restores_exactly(&disk);
}

/// Invariant 2: of another server, which served the disk before the last one, nothing is believed. Nor what is not the
/// session's, whoever left it (invariant 4).
#[test]
fn cut_write_that_is_not_the_last_servers_or_not_in_the_sessions_blocks_is_left_alone() {
    let own = ProcessId::own();
    let other = ProcessId { start_ticks: own.start_ticks + 1, ..own };
    for (server, block) in [(other, OWNED.start), (own, OWNED.end), (own, OWNED.start - 1), (own, 1 << 40)] {
        let (bench, disk, options) = in_session();
        let path = redo(&bench, &disk);
        drop(disk);
        let before = bench.disk_content();
        leave(&path, 3, server, block * BLOCK as u64, &[0x77; BLOCK]);
        let disk = open(&options);
        assert!(disk.session_is_open() && bench.disk_content() == before, "block {block} of {server:?}");
        disk.end_session().unwrap();
        bench.assert_restores_exactly(&disk);
    }
}

/// Nor where the live page is gone or of another boot, for then the host was restarted, or says that write-back has failed.
#[test]
fn cut_write_without_a_live_page_that_counts_is_left_alone() {
    let spoils: [fn(&Path); 3] = [
        |live| std::fs::remove_file(live).unwrap(),
        |live| set_live_words(live, 1, [1, 1]),
        |live| set_live_words(live, 22, [1, 0]),
    ];
    for spoil in spoils {
        let (bench, disk, options) = in_session();
        let path = redo(&bench, &disk);
        drop(disk);
        leave(&path, 0, ProcessId::own(), OWNED.start * BLOCK as u64, &[0x77; BLOCK]);
        spoil(&path.with_extension("live"));
        let before = bench.disk_content();
        let disk = open(&options);
        assert!(!disk.session_is_open() && bench.disk_content() == before);
        bench.assert_restores_exactly(&disk);
    }
}

/// Nor where a server with another runtime directory has taken the disk up since: the live page here still names the one
/// that was killed.
#[test]
fn cut_write_of_a_session_that_another_server_has_concluded_is_left_alone() {
    let bench = Bench::new(4 * MIB, None, false, EngineKind::Sync);
    let options = DiskOptions { resume: true, changes: Changes::Keep, ..bench.options.clone() };
    let disk = open(&options);
    begin_and_write(&disk);
    let path = redo(&bench, &disk);
    drop(disk);
    leave(&path, 0, ProcessId::own(), OWNED.start * BLOCK as u64, &[0x77; BLOCK]);
    let elsewhere = DiskOptions { runtime_dir: Some(bench.dir.path().join("elsewhere")), ..options.clone() };
    let disk = open(&elsewhere);
    assert!(!disk.session_is_open() && block_of(&bench, OWNED.start) == [BYTE; BLOCK]);
    begin_and_write(&disk);
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    let disk = open(&options);
    assert!(!disk.session_is_open() && block_of(&bench, OWNED.start) == [BYTE; BLOCK]);
}

/// A file that can't be had is missed only if it may say something.
#[test]
fn file_that_cannot_be_opened_and_says_nothing_is_done_without() {
    for (content, opens) in [(vec![0; 100], true), (vec![1; 100], false)] {
        let (bench, disk, options) = in_session();
        let path = redo(&bench, &disk);
        drop(disk);
        killed(&path);
        std::fs::write(&path, content).unwrap();
        match SessionDisk::open(&options) {
            Ok(disk) => assert!(opens && disk.session_is_open()),
            Err(error) => assert!(!opens && format!("{error:?}").contains("100 bytes"), "{error:?}"),
        }
    }
}

/// Invariant 2: the session of a VM that is gone is over; what its server was writing is restored with the rest.
#[test]
fn cut_write_of_a_session_that_is_over_is_restored() {
    let (bench, disk, _) = in_session();
    let path = redo(&bench, &disk);
    drop(disk);
    leave(&path, 0, ProcessId::own(), OWNED.start * BLOCK as u64, &[0x77; BLOCK]);
    let disk = bench.open();
    assert_eq!((disk.session_is_open(), disk.pending_blocks()), (false, 5));
    assert!(block_of(&bench, OWNED.start) == [0x77; BLOCK]);
    bench.assert_restores_exactly(&disk);
}

/// Who keeps what a killed session wrote, or makes it a base, keeps whole sectors, though no server has taken the disk up since.
#[test]
fn cut_write_is_done_to_its_end_before_the_session_is_kept_or_promoted() {
    for (server, expected, promoted) in [(1, BYTE, false), (0, 0x77, false), (1, BYTE, true), (0, 0x77, true)]
    {
        let (bench, disk, _) = in_session();
        disk.hold(HoldReason::ByOperator).unwrap();
        let path = redo(&bench, &disk);
        drop(disk);
        // Its VM is gone.
        let live = path.with_extension("live");
        let owner = live_words(&live, 8);
        set_live_words(&live, 8, [u64::from(u32::MAX) - 1, owner[1]]);
        let own = ProcessId::own();
        let server = ProcessId { start_ticks: own.start_ticks + server, ..own };
        leave(&path, 0, server, 9 * BLOCK as u64, &[0x77; 512]);
        let (to, stop) = (bench.dir.path().join("kept"), AtomicBool::new(false));
        let blocks = if promoted {
            let options = PromoteOptions { disk: bench.options.clone(), to, format: None };
            promote(&options, &stop, &mut |_, _, _| ()).unwrap().blocks_taken
        } else {
            keep(&bench.options, Portion::LastSession, &to, &stop, &mut |_, _| ()).unwrap().blocks
        };
        assert_eq!(blocks, 5);
        let block = block_of(&bench, 9);
        assert_eq!((block[0], block[511], block[512]), (expected, expected, BYTE));
    }
}

fn live_words(live: &Path, word: u64) -> [u64; 2] {
    let mut bytes = [0; 16];
    std::fs::File::open(live).unwrap().read_exact_at(&mut bytes, word * 8).unwrap();
    [0, 8].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()))
}

fn set_live_words(live: &Path, word: u64, words: [u64; 2]) {
    let file = std::fs::OpenOptions::new().write(true).open(live).unwrap();
    file.write_all_at(&words.map(u64::to_ne_bytes).concat(), word * 8).unwrap();
}

/// What goes through the map goes by way of a slot, and does not stay there when the session has ended, or its server.
#[test]
fn slots_are_empty_after_a_session() {
    slots_are_empty_after(|disk| assert_eq!(disk.end_session().unwrap().dirty_blocks, 5));
    slots_are_empty_after(|disk| assert_eq!(disk.stop().unwrap(), None));
}

fn slots_are_empty_after(end: fn(&SessionDisk)) {
    let dir = fast_dir();
    let (base, runtime) = (dir.path().join("base.raw"), dir.path().join("run"));
    std::fs::write(&base, vec![7; MIB]).unwrap();
    let options =
        DiskOptions { runtime_dir: Some(runtime.clone()), ..DiskOptions::new(dir.path().join("disk.raw")) };
    provision(&ProvisionOptions::new(base, options.clone())).unwrap();
    let disk = open(&options);
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    begin_and_write(&disk);
    let path = runtime.join(format!("{}.redo", disk.id()));
    let mut queue = disk.queue(16).unwrap();
    let has = |value: u8| std::fs::read(&path).unwrap().windows(512).any(|bytes| bytes == [value; 512]);
    let secret = GuestBuf::zeroed(5 * BLOCK);
    secret.copy_in(0, &vec![0xa7; 5 * BLOCK]);
    // The first one notes the time.
    common::wait_until(|| write_now(&disk, &mut queue, &secret) && has(0xa7));
    drop(queue);
    end(&disk);
    assert!(!has(0xa7));
}

fn write_now(disk: &SessionDisk, queue: &mut DiskQueue, buf: &GuestBuf) -> bool {
    let range = disk.geometry().sectors_at(OWNED.start * 8, buf.len() as u64).unwrap();
    queue.write_now(range, buf.view(), false)
}
