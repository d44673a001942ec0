//! Writes to a disk with several threads, and verifies: `guest-storm DEVICE THREADS SEED`.
//!
//! Each thread has a stripe of the disk, and writes (O_DIRECT) and reads runs of sectors in it, one at a
//! time. A sector that it writes holds a mark, the seed, its own number and a version; a sector that it
//! has not written must hold what it held at first, and no mark. Any error or wrong sector ends the
//! program with exit code 1. A line on standard input ends it well, after a look at every sector.
//!
//! ```text
//! GUEST storm OPERATIONS WORST-MS      again and again: the slowest operation since the last line, in ms
//! GUEST storm-ok OPERATIONS
//! GUEST storm-wrong WHAT
//! ```

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pristine_tests::random::{Random, fill};

const SECTOR: usize = 512;
const RUN_SECTORS_MAX: u64 = 128;
const MARK: u64 = u64::from_le_bytes(*b"GUESTORM");
const REPORT: Duration = Duration::from_millis(200);

static STOP: AtomicBool = AtomicBool::new(false);
static OPERATIONS: AtomicU64 = AtomicU64::new(0);
/// The slowest finished operation since the last report, in microseconds.
static WORST_US: AtomicU64 = AtomicU64::new(0);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, device, threads, seed] = &args[..] else { panic!("guest-storm DEVICE THREADS SEED") };
    let (threads, seed): (u64, u64) = (threads.parse().unwrap(), seed.parse().unwrap());
    let open = || {
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        File::options().read(true).write(true).custom_flags(flags).open(device).unwrap()
    };
    let sectors = {
        use std::io::{Seek, SeekFrom};
        open().seek(SeekFrom::End(0)).unwrap() / SECTOR as u64
    };
    let stripe = sectors / threads;
    let wrong = Mutex::new(None::<String>);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::stdin().read_line(&mut String::new());
            STOP.store(true, Ordering::SeqCst);
        });
        let mut writers = Vec::new();
        for thread in 0..threads {
            let wrong = &wrong;
            let mut writer = Writer::new(open(), seed, thread, thread * stripe, stripe);
            writers.push(scope.spawn(move || {
                if let Err(error) = writer.run() {
                    wrong.lock().unwrap().get_or_insert(error);
                    STOP.store(true, Ordering::SeqCst);
                }
            }));
        }
        while writers.iter().any(|writer| !writer.is_finished()) {
            std::thread::sleep(REPORT);
            let worst = WORST_US.swap(0, Ordering::Relaxed);
            println!("GUEST storm {} {}", OPERATIONS.load(Ordering::Relaxed), worst / 1000);
            if let Some(what) = wrong.lock().unwrap().as_ref() {
                println!("GUEST storm-wrong {what}");
                std::process::exit(1);
            }
        }
        println!("GUEST storm-ok {}", OPERATIONS.load(Ordering::Relaxed));
        std::process::exit(0);
    });
}

/// One thread's stripe and what must be in it.
struct Writer {
    disk: File,
    random: Random,
    seed: u64,
    first: u64,
    /// Per sector, the version that was written last; 0: none.
    versions: Vec<u64>,
    /// Per sector, a hash of what was in it before.
    before: Vec<u64>,
    version: u64,
    room: Vec<u8>,
    aligned: usize,
}

impl Writer {
    fn new(disk: File, seed: u64, thread: u64, first: u64, sectors: u64) -> Self {
        let room = vec![0; RUN_SECTORS_MAX as usize * SECTOR + 4096];
        Self {
            disk,
            random: Random::new(seed ^ (thread << 40)),
            seed,
            first,
            versions: vec![0; sectors as usize],
            before: vec![0; sectors as usize],
            version: 0,
            aligned: room.as_ptr().align_offset(4096),
            room,
        }
    }

    fn buf(&mut self, sectors: u64) -> &mut [u8] {
        &mut self.room[self.aligned..][..sectors as usize * SECTOR]
    }

    fn run(&mut self) -> Result<(), String> {
        let sectors = self.versions.len() as u64;
        while !STOP.load(Ordering::Relaxed) {
            let unit = if self.random.below(2) == 0 { 8 } else { 1 };
            let count = (1 + self.random.below(RUN_SECTORS_MAX / unit)) * unit;
            let count = if self.random.below(4) > 0 { count.min(16) } else { count };
            let at = self.random.below((sectors - count) / unit + 1) * unit;
            let begin = Instant::now();
            if self.random.below(10) < 6 {
                self.write(at, count)?
            } else {
                self.check(at, count)?
            }
            WORST_US.fetch_max(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
            OPERATIONS.fetch_add(1, Ordering::Relaxed);
        }
        let mut at = 0;
        while at < sectors {
            let count = RUN_SECTORS_MAX.min(sectors - at);
            self.check(at, count)?;
            at += count;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, count: u64) -> Result<(), String> {
        self.version += 1;
        let (seed, first, version) = (self.seed, self.first, self.version);
        for (number, sector) in (at..).zip(self.buf(count).chunks_mut(SECTOR)) {
            make(sector, seed, first + number, version);
        }
        let offset = (first + at) * SECTOR as u64;
        let data = &self.room[self.aligned..][..count as usize * SECTOR];
        self.disk.write_all_at(data, offset).map_err(|error| format!("write at {offset}: {error}"))?;
        self.versions[at as usize..][..count as usize].fill(version);
        Ok(())
    }

    fn check(&mut self, at: u64, count: u64) -> Result<(), String> {
        let offset = (self.first + at) * SECTOR as u64;
        let range = self.aligned..self.aligned + count as usize * SECTOR;
        self.disk
            .read_exact_at(&mut self.room[range.clone()], offset)
            .map_err(|error| format!("read at {offset}: {error}"))?;
        let mut expected = [0; SECTOR];
        for (number, sector) in (at..).zip(self.room[range].chunks(SECTOR)) {
            let index = number as usize;
            let name =
                |what: &str| Err(format!("sector {} {what}: {:02x?}", self.first + number, &sector[..32]));
            if self.versions[index] != 0 {
                make(&mut expected, self.seed, self.first + number, self.versions[index]);
                if sector != expected {
                    return name(&format!("lost version {}", self.versions[index]));
                }
                continue;
            }
            if sector.starts_with(&MARK.to_le_bytes()) {
                return name("has a session's mark and was never written");
            }
            let mut hasher = DefaultHasher::new();
            hasher.write(sector);
            let hash = hasher.finish() | 1;
            if self.before[index] != 0 && self.before[index] != hash {
                return name("was never written and has changed");
            }
            self.before[index] = hash;
        }
        Ok(())
    }
}

/// The contents of a sector.
fn make(sector: &mut [u8], seed: u64, number: u64, version: u64) {
    fill(seed ^ version.wrapping_mul(0x9e37_79b9), number * SECTOR as u64, sector);
    for (place, word) in sector.chunks_mut(8).zip([MARK, seed, number, version]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}
