//! Random writes and reads that go on over the deaths of the backend: the client connects again from
//! the same process, and every sector must hold what was acknowledged last, or what was under way
//! when the backend died. Nothing else: not what it held before, not what another session has written.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::requests::{Client, Done, Request, Shape};
use crate::random::{Random, fill};

const SECTOR: u64 = 512;
const LEN_MAX: u64 = 64 << 10;
const READ_LEN: u64 = 256 << 10;
const MARK: u64 = u64::from_le_bytes(*b"ENDURING");

/// A disk's sectors as they may be.
struct Sector {
    /// The version that was acknowledged last, or seen since; 0: the base's content.
    certain: u32,
    /// Versions that were under way when the backend died.
    possible: Vec<u32>,
}

#[derive(Debug)]
struct Running {
    sectors: Range<u64>,
    /// `None`: it reads.
    version: Option<u32>,
}

/// What was done up to now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Endured {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Reads, every sector compared.
    pub reads: u64,
    /// Writes that were under way when the backend died.
    pub interrupted: u64,
    /// Sectors of these that were found written afterwards.
    pub landed: u64,
}

/// A client whose backend may die.
pub struct Endure {
    socket: PathBuf,
    shape: Shape,
    seed: u64,
    base: Vec<u8>,
    sectors: Vec<Sector>,
    random: Random,
    version: u32,
    client: Option<Client>,
    running: Vec<Option<Running>>,
    done: Vec<Done>,
    endured: Endured,
}

impl Endure {
    /// Connects; the disk's contents are `base`.
    pub fn start(
        socket: &Path,
        base: Vec<u8>,
        seed: u64,
        queues: usize,
        depth: usize,
    ) -> Result<Self, String> {
        let slots = queues * depth;
        let sectors = (0..base.len() as u64 / SECTOR).map(|_| Sector { certain: 0, possible: Vec::new() });
        let mut endure = Self {
            socket: socket.to_owned(),
            shape: Shape { queues, queue_size: 256, slots, slot_len: READ_LEN as usize },
            seed,
            sectors: sectors.collect(),
            base,
            random: Random::new(seed),
            version: 0,
            client: None,
            running: (0..slots).map(|_| None).collect(),
            done: Vec::new(),
            endured: Endured::default(),
        };
        endure.client = Some(Client::connect(&endure.socket, endure.shape)?);
        Ok(endure)
    }

    /// Submits what there is room for, and takes what is complete. Returns soon, also from a dead backend.
    pub fn work(&mut self) -> Result<(), String> {
        let Some(mut client) = self.client.take() else { return Err("not connected".into()) };
        for slot in 0..self.running.len() {
            if self.running[slot].is_none() {
                self.submit(&mut client, slot);
            }
        }
        self.collect(&mut client)?;
        self.client = Some(client);
        Ok(())
    }

    /// The backend has died, and another one is there: everything is looked at.
    pub fn reopen(&mut self) -> Result<Endured, String> {
        self.client = None;
        for slot in 0..self.running.len() {
            let Some(Running { sectors, version: Some(version) }) = self.running[slot].take() else {
                continue;
            };
            self.endured.interrupted += 1;
            for sector in sectors {
                self.sectors[sector as usize].possible.push(version);
            }
        }
        self.client = Some(Client::connect(&self.socket, self.shape)?);
        self.look_at_everything()?;
        Ok(self.endured)
    }

    /// Waits for what is under way, and looks at everything.
    pub fn finish(mut self) -> Result<Endured, String> {
        while self.running.iter().any(Option::is_some) {
            let Some(mut client) = self.client.take() else { return Err("not connected".into()) };
            self.collect(&mut client)?;
            self.client = Some(client);
        }
        self.look_at_everything()?;
        Ok(self.endured)
    }

    fn submit(&mut self, client: &mut Client, slot: usize) {
        let count = if self.random.below(3) == 0 { 8 } else { 1 + self.random.below(LEN_MAX / SECTOR) };
        let first = self.random.below(self.sectors.len() as u64 - count + 1);
        let first = if count == 8 { first / 8 * 8 } else { first };
        let sectors = first..first + count;
        let overlaps =
            |other: &Running| other.sectors.start < sectors.end && sectors.start < other.sectors.end;
        if self.running.iter().flatten().any(overlaps) {
            return;
        }
        let (offset, len) = (first * SECTOR, (count * SECTOR) as usize);
        let writes = self.random.below(10) < 7;
        let request = if writes {
            self.version += 1;
            let data = client.memory.bytes_mut(slot, 0, len);
            for (number, bytes) in sectors.clone().zip(data.chunks_mut(SECTOR as usize)) {
                make(bytes, self.seed, number, self.version);
            }
            Request::Write { offset, parts: vec![len], skip: 0 }
        } else {
            Request::Read { offset, parts: vec![len], skip: 0 }
        };
        client.submit(slot % self.shape.queues, slot, &request);
        self.running[slot] = Some(Running { sectors, version: writes.then_some(self.version) });
    }

    fn collect(&mut self, client: &mut Client) -> Result<(), String> {
        let mut done = std::mem::take(&mut self.done);
        for queue in 0..self.shape.queues {
            client.poll(queue, Duration::from_micros(200), &mut done)?;
        }
        for Done { slot, result } in done.drain(..) {
            let running = self.running[slot].take().ok_or("a request completed twice")?;
            if result != 0 {
                return Err(format!("{running:?} failed: error {}", -result));
            }
            match running.version {
                Some(version) => {
                    self.endured.writes += 1;
                    for sector in running.sectors {
                        self.sectors[sector as usize] = Sector { certain: version, possible: Vec::new() };
                    }
                }
                None => {
                    self.endured.reads += 1;
                    let len = (running.sectors.end - running.sectors.start) * SECTOR;
                    let bytes = client.memory.bytes(slot, 0, len as usize);
                    self.check(running.sectors.start, bytes)?;
                }
            }
        }
        self.done = done;
        Ok(())
    }

    fn look_at_everything(&mut self) -> Result<(), String> {
        let mut at = 0;
        while at < self.base.len() as u64 {
            let len = READ_LEN.min(self.base.len() as u64 - at);
            let bytes = self.client.as_mut().ok_or("not connected")?.read(0, at, len as usize)?;
            self.check(at / SECTOR, &bytes)?;
            at += len;
        }
        Ok(())
    }

    /// Compares sectors from `first` on with what they may be; what they are is certain from then on.
    fn check(&mut self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let mut expected = [0; SECTOR as usize];
        for (number, found) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let sector = &mut self.sectors[number as usize];
            let is = |version: u32, expected: &mut [u8]| {
                if version == 0 {
                    expected.copy_from_slice(&self.base[(number * SECTOR) as usize..][..SECTOR as usize]);
                } else {
                    make(expected, self.seed, number, version);
                }
                found == expected
            };
            if is(sector.certain, &mut expected) {
                sector.possible.clear();
                continue;
            }
            match sector.possible.iter().copied().find(|version| is(*version, &mut expected)) {
                Some(version) => {
                    self.endured.landed += 1;
                    *sector = Sector { certain: version, possible: Vec::new() };
                }
                None => {
                    return Err(format!(
                        "sector {number} (block {}) holds {:02x?}..., expected version {} or {:?}",
                        number / 8,
                        &found[..32],
                        sector.certain,
                        sector.possible
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A sector's contents: a mark, the session's seed, the number, the version, and what follows from them.
fn make(sector: &mut [u8], seed: u64, number: u64, version: u32) {
    let version = u64::from(version);
    fill(seed ^ version.wrapping_mul(0x9e37_79b9), number * SECTOR, sector);
    for (place, word) in sector.chunks_mut(8).zip([MARK, seed, number, version]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}
