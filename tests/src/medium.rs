//! What a disk that loses its power makes of the writes in its cache.
//!
//! QEMU notes all that a machine's disk is asked to do in a log (its driver `blklogwrites`; the format
//! is that of the kernel's dm-log-writes: a sector for the superblock, then for each request a sector
//! that describes it and its data). From the log and the medium as it was before, a medium is made on
//! which everything is that was flushed, and of the rest whatever chance has kept.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::SeekFrom;

use crate::program::run;
use crate::random::Random;

const SECTOR: u64 = 512;
/// What a disk writes as a whole or not at all.
const UNIT: usize = 4096;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;

/// What became of the writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    /// Requests to write that a flush came after.
    pub flushed: u64,
    /// Units that no flush came after, and that are on the medium all the same.
    pub kept: u64,
    /// Units that are lost.
    pub lost: u64,
}

/// A copy that leaves holes out.
pub fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("--sparse=always").arg(from).arg(to)).ok();
}

/// Makes a new file for the log.
pub fn new_log(path: &Path) {
    let _ = fs::remove_file(path);
    File::create_new(path).and_then(|file| file.set_len(8 << 30)).unwrap();
}

struct Request {
    flags: u64,
    offset: u64,
    /// Where its data is in the log, and how long it is.
    data: u64,
    len: u64,
}

/// Turns `medium`, which is as it was when the log began, into one that has lost its power. The log is
/// of a machine that was frozen and then killed.
pub fn lose_power(medium: &Path, log: &Path, random: &mut Random) -> io::Result<Lost> {
    let log = File::open(log)?;
    let requests = read(&log)?;
    let medium = File::options().write(true).open(medium)?;
    let flushed = requests.iter().rposition(|request| request.flags & FLUSH != 0).map_or(0, |last| last + 1);
    // From nearly all to nothing of the cache is kept.
    let kept_of_8 = random.below(8);
    let mut lost = Lost::default();
    let mut data = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        data.resize(request.len as usize, 0);
        log.read_exact_at(&mut data, request.data)?;
        lost.flushed += u64::from(index < flushed && request.len > 0);
        for (unit, offset) in data.chunks(UNIT).zip((request.offset..).step_by(UNIT)) {
            if index >= flushed {
                if random.below(8) >= kept_of_8 {
                    lost.lost += 1;
                    continue;
                }
                lost.kept += 1;
            }
            medium.write_all_at(unit, offset)?;
        }
    }
    Ok(lost)
}

/// The requests of a log, in their order. One that QEMU had not begun to log when it was stopped has left
/// its room empty: it was not answered either.
fn read(log: &File) -> io::Result<Vec<Request>> {
    let word = |sector: &[u8], index: usize| {
        u64::from_le_bytes(sector[index * 8..index * 8 + 8].try_into().unwrap())
    };
    let mut sector = [0; SECTOR as usize];
    log.read_exact_at(&mut sector, 0)?;
    // QEMU writes its head at the first flush.
    assert!([0, MAGIC].contains(&word(&sector, 0)), "not a log of writes");
    let mut requests = Vec::new();
    let mut at = SECTOR;
    while let Ok(data) = rustix::fs::seek(log, SeekFrom::Data(at)) {
        at = at.max(data / SECTOR * SECTOR);
        log.read_exact_at(&mut sector, at)?;
        at += SECTOR;
        if sector.iter().all(|&byte| byte == 0) {
            continue;
        }
        let [offset, len, flags] = [word(&sector, 0) * SECTOR, word(&sector, 1) * SECTOR, word(&sector, 2)];
        let rest = &sector[32..];
        assert!(flags <= FLUSH && rest.iter().all(|&byte| byte == 0), "no request at {at}: {sector:?}");
        requests.push(Request { flags, offset, data: at, len });
        at += len;
    }
    Ok(requests)
}
