//! Logs that are cut at any byte or have any bit flipped, as the program judges them.
//!
//! `PRISTINE_DAMAGE_FULL=1` looks at every one of the damages (some minutes); else it is all that
//! concern what the header says and the boundaries of areas, and every 61st of the rest.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use blockio::GuestBuf;
use blocks::{BLOCK_SIZE, BlockSet, Extent};
use write_log::LogFile;

use super::*;
use crate::live::LivePage;
use crate::recover::Basis;
use crate::status::DiskState;
use crate::{DiskOptions, ProvisionOptions, Request, SessionDisk, provision, verify};

const SIZE: u64 = 256 << 20;
/// What the issue asks for: every bit of so many bytes.
const HEAD_BYTES: usize = 64 << 10;
/// Bytes of a log's header block, and of what it says; zeroes and a checksum follow.
const HEADER: usize = 4096;
const HEADER_FIELDS: usize = 88;

/// A log in memory.
#[derive(Debug)]
struct MemLog(Vec<u8>);

impl LogFile for MemLog {
    fn write_at(&mut self, _: &[u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let from = self.0.get(offset as usize..).unwrap_or_default();
        let count = bytes.len().min(from.len());
        bytes[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn reserve(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// A disk with sessions behind it, and one of the logs that speak for it.
struct Scene {
    _dir: tempfile::TempDir,
    options: DiskOptions,
    /// What sessions wrote.
    owned: BlockSet,
    /// The log that is damaged.
    log: PathBuf,
    bytes: Vec<u8>,
    manifest: Manifest,
    disk: File,
    before: Before,
}

/// A disk whose base has some data, pristine.
fn pristine_disk() -> (tempfile::TempDir, DiskOptions) {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let file = fs::File::create(&base).unwrap();
    file.set_len(SIZE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xba; 1 << 20], 1 << 20).unwrap();
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions::new(base, options.clone())).unwrap();
    let disk = SessionDisk::open(&options).unwrap();
    disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    disk.stop().unwrap();
    (dir, options)
}

/// Writes `count` blocks, none beside another, in passes (and so frames) of many sizes, all in every
/// other region.
fn scatter(disk: &Arc<SessionDisk>, first: u64, count: u64, owned: &BlockSet) {
    let mut queue = disk.queue(64).unwrap();
    let (mut done, mut staged) = (Vec::new(), 0);
    for number in 0..count {
        let block = (first + number * 2) % 16384 + (first + number * 2) / 16384 * 32768;
        owned.insert(Extent::new(block, 1));
        let buf = GuestBuf::zeroed(4096);
        buf.copy_in(0, &[block as u8 | 1; 4096]);
        let range = disk.geometry().sectors_at(block * 8, 4096).unwrap();
        queue.push(number, Request::Write { range, buf, durable: false });
        staged += 1;
        if staged > number * 7 % 40 {
            queue.quiesce(&mut done);
            staged = 0;
        }
    }
    queue.quiesce(&mut done);
    assert!(done.drain(..).all(|done| done.result.is_ok()));
}

/// A session that writes `count` blocks and is open still; and what it owns.
fn open_session(options: &DiskOptions, count: u64) -> (Arc<SessionDisk>, BlockSet) {
    let disk = SessionDisk::open(options).unwrap();
    let owned = BlockSet::new(disk.geometry().blocks());
    disk.begin_session(None).unwrap();
    scatter(&disk, 0, count, &owned);
    (disk, owned)
}

impl Scene {
    /// Of the disk as it lies there; the log is the `index`th of its manifest.
    fn of(dir: tempfile::TempDir, options: DiskOptions, owned: BlockSet, index: usize) -> Self {
        let paths = options.paths();
        let manifest = Manifest::load(&paths).unwrap();
        let log = paths.sessions().join(manifest.logs[index].id().file_name());
        let number = file_number(&options.disk).unwrap();
        let live = LivePage::inspect(&paths.live_page(manifest.disk), manifest.disk, number);
        let before = Before::of(live.as_ref()).session_over();
        let differing = verify(&options, &AtomicBool::new(false), &mut |_| ()).unwrap().differing;
        assert!(!differing.is_empty());
        assert!(
            differing.iter().all(|extent| owned.contains_all(*extent)),
            "the test knows what was written"
        );
        let options_of_file = OpenOptions { write: false, direct: false, exclusive: false };
        Self {
            bytes: fs::read(&log).unwrap(),
            disk: File::open(&options.disk, options_of_file).unwrap(),
            _dir: dir,
            options,
            owned,
            log,
            manifest,
            before,
        }
    }

    /// The verdict that the program comes to when the log is `log`.
    fn judge(&self, log: &MemLog) -> Verdict {
        let read = |path: &Path| {
            if path == self.log { write_log::read_from(log, path) } else { write_log::read(path) }
        };
        let geometry = check_disk(&self.disk, &self.manifest).unwrap();
        let (storage, paths) = (Storage::default(), self.options.paths());
        judge_logs(&storage, &paths, &self.manifest, geometry, &self.disk, self.before, &read).unwrap()
    }

    /// Invariants 2 and 6.
    fn check(&self, log: &MemLog, what: impl Fn() -> String) -> Basis {
        let verdict = self.judge(log);
        let idle = verdict.session.is_none();
        assert!(!idle || DiskState::of(&verdict) != DiskState::Pristine, "{}", what());
        assert_ne!(verdict.basis, Basis::Pristine, "{}", what());
        if let Some(session) = &verdict.session {
            // It goes on with what its log says: no block less, and none more, whose content nobody
            // vouches for.
            let goes_on = write_log::read_from(log, &self.log).unwrap().blocks_at(session.mark).unwrap();
            assert_eq!(goes_on.count(), self.owned.count(), "{}", what());
            verdict.pending.insert_set(&goes_on);
        }
        let pending = verdict.pending.count();
        if pending < verdict.pending.bound() {
            verdict.pending.insert_set(&self.owned);
            assert_eq!(verdict.pending.count(), pending, "{}: a written block is not pending", what());
        }
        verdict.basis
    }

    /// Cuts and flips all that there is, as far as the environment asks for; `undamaged` is what the
    /// verdict rests on without damage.
    fn check_all(&self, undamaged: &Basis) {
        let mut log = MemLog(self.bytes.clone());
        assert_eq!(self.check(&log, || "undamaged".into()), *undamaged);
        let second_area = HEADER + (self.bytes.len() - HEADER) / 2;
        let mut edges = self.used();
        let end = edges.iter().copied().max().unwrap();
        edges.extend([0, HEADER, second_area, self.bytes.len()]);
        let stride = stride();
        let wanted = |at: usize, number: usize| {
            number.is_multiple_of(stride) || edges.iter().any(|edge| at.abs_diff(*edge) < 64)
        };

        let (mut cuts, mut torn, mut flips) = (0, 0, 0);
        for len in (0..self.bytes.len()).filter(|len| wanted(*len, *len)) {
            let cut = MemLog(self.bytes[..len].to_vec());
            let basis = self.check(&cut, || format!("cut to {len} bytes"));
            assert!(matches!(basis, Basis::Everything(_)), "cut to {len} bytes: {basis:?}");
            cuts += 1;
        }
        // As a power cut leaves it: the length is there, the bytes are not.
        for from in (0..end).filter(|at| wanted(*at, *at)) {
            let mut tail = MemLog(self.bytes.clone());
            tail.0[from..].fill(0);
            self.check(&tail, || format!("zeroes from byte {from} on"));
            torn += 1;
        }
        let head = 0..HEAD_BYTES.min(self.bytes.len());
        let second = second_area.max(head.end)..self.bytes.len().min(second_area + 512);
        let bits = head.chain(second).flat_map(|byte| byte * 8..byte * 8 + 8);
        for bit in bits.filter(|bit| bit / 8 < HEADER_FIELDS || wanted(bit / 8, *bit)) {
            log.0[bit / 8] ^= 1 << (bit % 8);
            self.check(&log, || format!("bit {bit} flipped"));
            log.0[bit / 8] ^= 1 << (bit % 8);
            flips += 1;
        }
        println!("{cuts} cuts, {torn} torn tails, {flips} flipped bits of {}", self.log.display());
    }

    /// Where the parts of the log that hold something end.
    fn used(&self) -> Vec<usize> {
        let contents = write_log::read(&self.log).unwrap();
        let area = (self.bytes.len() - HEADER) / if contents.areas[1].mark().is_some() { 2 } else { 1 };
        let ends = contents.areas.iter().enumerate();
        ends.filter_map(|(index, it)| Some(HEADER + index * area + it.mark()?.committed as usize)).collect()
    }
}

/// Every so manieth damage is looked at.
fn stride() -> usize {
    if std::env::var_os("PRISTINE_DAMAGE_FULL").is_some_and(|value| value != "0") { 1 } else { 61 }
}

/// Enough for the log's first 64 KiB to be frames, and not so much that the log is rewritten.
const BLOCKS_OF_A_FULL_AREA: u64 = 7000;

/// Invariants 2 and 6: the log of a server that was killed, the live page there.
#[test]
fn log_of_a_killed_server_with_any_damage_never_hides_a_block() {
    let (dir, options) = pristine_disk();
    let (disk, owned) = open_session(&options, BLOCKS_OF_A_FULL_AREA);
    drop(disk);
    let scene = Scene::of(dir, options, owned, 0);
    assert!(scene.used()[0] > HEAD_BYTES, "{:?}", scene.used());
    scene.check_all(&Basis::ExactLogs);
}

/// Invariants 2, 3 and 6: the same log for a server that would let the session go on: it does if the log
/// is exact, and then with just its blocks.
#[test]
fn log_of_a_session_that_may_go_on_with_any_damage_never_hides_a_block() {
    let (dir, options) = pristine_disk();
    let (disk, owned) = open_session(&options, BLOCKS_OF_A_FULL_AREA);
    drop(disk);
    let mut scene = Scene::of(dir, options, owned, 0);
    scene.before.session_open = true;
    let log = MemLog(scene.bytes.clone());
    assert!(scene.judge(&log).session.is_some());
    scene.check_all(&Basis::ExactLogs);
}

/// Invariants 2 and 6: the same log after a power cut, the live page gone.
#[test]
fn log_after_a_power_cut_with_any_damage_never_hides_a_block() {
    let (dir, options) = pristine_disk();
    let (disk, owned) = open_session(&options, BLOCKS_OF_A_FULL_AREA);
    drop(disk);
    fs::remove_dir_all(dir.path().join("run")).unwrap();
    let scene = Scene::of(dir, options, owned, 0);
    scene.check_all(&Basis::Intents);
}

/// Invariants 2 and 6: the log of a killed server that has been written anew into its second area.
#[test]
fn log_that_was_rewritten_with_any_damage_never_hides_a_block() {
    let (dir, options) = pristine_disk();
    let (disk, owned) = open_session(&options, BLOCKS_OF_A_FULL_AREA + 2000);
    drop(disk);
    let scene = Scene::of(dir, options, owned, 0);
    assert_eq!(scene.used().len(), 2);
    scene.check_all(&Basis::ExactLogs);
}

/// Invariants 2 and 6: the sealed log of a session that has ended, while the next one is open: after
/// a kill and after a power cut.
#[test]
fn log_of_an_ended_session_with_any_damage_never_hides_a_block() {
    for (power_cut, undamaged) in [(false, Basis::ExactLogs), (true, Basis::Intents)] {
        let (dir, options) = pristine_disk();
        let (disk, owned) = open_session(&options, BLOCKS_OF_A_FULL_AREA);
        disk.end_session().unwrap();
        disk.begin_session(None).unwrap();
        scatter(&disk, 20_001, 50, &owned);
        drop(disk);
        if power_cut {
            fs::remove_dir_all(dir.path().join("run")).unwrap();
        }
        Scene::of(dir, options, owned, 0).check_all(&undamaged);
    }
}

/// Invariants 2 and 6: a set that was made durable, as runs and as a bitmap.
#[test]
fn log_of_a_pending_set_with_any_damage_never_hides_a_block() {
    for count in [700, BLOCKS_OF_A_FULL_AREA] {
        let (dir, options) = pristine_disk();
        let (disk, owned) = open_session(&options, count);
        drop(disk);
        drop(SessionDisk::open(&options).unwrap());
        let scene = Scene::of(dir, options, owned, 0);
        assert_eq!(scene.manifest.logs[0].kind, crate::EntryKind::Pending);
        let bitmap = (SIZE / BLOCK_SIZE / 8) as usize;
        assert_eq!(scene.bytes.len() > HEADER + bitmap, count > 700, "runs, then a bitmap");
        scene.check_all(&Basis::ExactLogs);
    }
}

/// Invariants 2 and 6: any bit of the live page that is flipped makes it say something that no log leads
/// to, or another boot's, or nothing that matters: no block is hidden.
#[test]
fn live_page_with_any_bit_flipped_hides_no_block() {
    // All that the page holds; the rest of it is never read.
    const USED_BYTES: usize = 32 * 8;
    let (dir, options) = pristine_disk();
    let (disk, owned) = open_session(&options, 500);
    drop(disk);
    let mut scene = Scene::of(dir, options, owned, 0);
    let (id, log) = (scene.manifest.disk, MemLog(scene.bytes.clone()));
    let path = scene.options.paths().live_page(id);
    let number = file_number(&scene.options.disk).unwrap();
    let page = fs::read(&path).unwrap();
    assert!(page[USED_BYTES..].iter().all(|byte| *byte == 0));
    let (mut exact, mut untrusted) = (0, 0);
    for bit in 0..USED_BYTES * 8 {
        let mut flipped = page.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, flipped).unwrap();
        let before = Before::of(LivePage::inspect(&path, id, number).as_ref());
        for before in [before, before.session_over()] {
            scene.before = before;
            match scene.check(&log, || format!("bit {bit} of the live page flipped")) {
                Basis::ExactLogs => exact += 1,
                _ => untrusted += 1,
            }
        }
    }
    assert!(exact > 0 && untrusted > 0, "{exact} {untrusted}");
}

/// Invariants 2 and 6: two logs are open after a crash, for the end of the first one could not be
/// written. The mark speaks for one of them alone, so all is pending; after a power cut both are read,
/// and the intents cover them.
#[test]
fn two_open_logs_hide_no_block() {
    for power_cut in [false, true] {
        let (dir, options) = pristine_disk();
        let (disk, owned) = open_session(&options, 500);
        drop(disk);
        let paths = options.paths();
        let mut manifest = Manifest::load(&paths).unwrap();
        let entry = crate::disk::next_entry(&mut manifest, crate::EntryKind::Session);
        let header = write_log::LogHeader {
            kind: entry.kind(),
            id: entry.id(),
            disk: manifest.disk,
            geometry: Geometry::new(SIZE).unwrap(),
            created_unix_ns: 0,
        };
        let mut second = write_log::LogWriter::create(&paths.sessions(), &header).unwrap();
        let none = BlockSet::new(header.geometry.blocks());
        let mark = second.append(&[Extent::new(9, 2)], &none).unwrap();
        owned.insert(Extent::new(9, 2));
        manifest.store(&Storage::default(), &paths).unwrap();
        let number = file_number(&options.disk).unwrap();
        let live = LivePage::inspect(&paths.live_page(manifest.disk), manifest.disk, number).unwrap();
        live.set_mark(crate::live::LiveMark { sequence: entry.sequence, mark });
        drop(live);
        if power_cut {
            fs::remove_dir_all(dir.path().join("run")).unwrap();
        }
        let scene = Scene::of(dir, options, owned, 0);
        assert_eq!(scene.manifest.logs.len(), 2);
        let basis = scene.check(&MemLog(scene.bytes.clone()), || "two open logs".into());
        match power_cut {
            true => assert_eq!(basis, Basis::Intents),
            false => assert!(matches!(basis, Basis::Everything(_)), "{basis:?}"),
        }
    }
}

/// Who takes something from the disk between sessions is told of a failed write-back, and nobody else is; flushes and sessions
/// heed what that has noted.
#[test]
fn what_others_were_told_of_failed_write_back_is_heeded() {
    let (_dir, options) = pristine_disk();
    let (disk, _) = open_session(&options, 10);
    let manifest = Manifest::load(&options.paths()).unwrap();
    let page = options.paths().live_page(manifest.disk);
    let live = LivePage::inspect(&page, manifest.disk, file_number(&options.disk).unwrap()).unwrap();
    // An error of the kind that a sync has: of no file, for nothing else makes one here.
    let failed = File::open(std::path::Path::new("/proc/nothing"), Default::default()).map(drop);
    let flush = || {
        let (mut queue, mut done) = (disk.queue(4).unwrap(), Vec::new());
        queue.push(0, Request::Flush);
        queue.quiesce(&mut done);
        done.pop().unwrap().result
    };
    let file = File::open(&options.disk, Default::default()).unwrap();
    crate::live::heed_sync(&file, Some(&live), |_| Ok(())).unwrap();
    flush().unwrap();
    crate::live::heed_sync(&file, Some(&live), |_| failed).unwrap_err();
    assert_eq!(flush().is_err(), file.tells_of_write_back());
    disk.end_session().unwrap();
    assert!(matches!(disk.begin_session(None), Err(Error::Poisoned(_))));
}

/// The guest says it once, and sends no flushes from then on.
#[test]
fn write_through_is_remembered_by_the_next_server_until_the_session_ends() {
    let (_dir, mut options) = pristine_disk();
    options.resume = true;
    let (disk, _) = open_session(&options, 3);
    disk.set_write_through(true);
    drop(disk);
    let disk = SessionDisk::open(&options).unwrap();
    assert!(disk.open_session().is_some() && disk.is_write_through());
    disk.end_session().unwrap();
    assert!(!disk.is_write_through());
}

/// The session has written nothing, so that nothing is pending, and what has failed is over: the disk is served again.
#[test]
fn disk_with_nothing_pending_is_opened_after_failed_write_back() {
    let (_dir, options) = pristine_disk();
    let (disk, _) = open_session(&options, 0);
    disk.shared().finish_beginning();
    disk.shared().poison();
    assert!(matches!(disk.checkpoint(), Err(Error::Poisoned(_))));
    drop(disk);
    let disk = SessionDisk::open(&options).unwrap();
    assert_eq!(disk.pending_blocks(), 0);
    disk.begin_session(None).unwrap();
    disk.shared().live.set_poisoned();
    assert!(matches!(disk.shared().sync_disk(), Err(Error::Poisoned(_))));
}
