//! Random requests, several queues deep, against a model of the disk in memory.
//!
//! Requests that are under way at the same time never share a byte (unless all of them read), so the
//! model is exact; they do share blocks. What a discard leaves is not defined but for this: each
//! sector holds either what it held or zeroes, and stays so.

use std::ops::Range;
use std::path::Path;

use super::requests::{Client, Request, Shape};
use crate::random::{self, Random};

const SECTOR: u64 = 512;
const LEN_MAX: u64 = 256 << 10;
/// Spare bytes in a slot, so that a buffer need not begin on a page.
const SKIP_MAX: u64 = 4096;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Chooses the requests.
    pub seed: u64,
    /// How many requests.
    pub operations: u64,
    /// Virtqueues.
    pub queues: usize,
    /// Requests under way on each queue.
    pub depth: usize,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Reads, every byte compared.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Discards.
    pub discards: u64,
    /// Write-zeroes.
    pub zeroes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Bytes read and compared, the last look at the whole disk included.
    pub compared: u64,
}

/// The disk as it should be.
struct Model {
    data: Vec<u8>,
    /// Sectors that have been discarded and not looked at since.
    discarded: Vec<bool>,
}

#[derive(Debug)]
struct Running {
    request: Request,
    bytes: Range<u64>,
}

/// Runs `plan` on the disk at `socket`, whose contents at the beginning are `base`.
pub fn run(socket: &Path, base: Vec<u8>, plan: Plan) -> Result<Summary, String> {
    let slots = plan.queues * plan.depth;
    // A request takes a descriptor for each segment, and two more.
    let queue_size = (plan.depth * 12).next_power_of_two().clamp(128, 1024) as i32;
    let slot_len = (LEN_MAX + SKIP_MAX) as usize;
    let mut client = Client::connect(socket, Shape { queues: plan.queues, queue_size, slots, slot_len })?;
    if client.capacity() != base.len() as u64 {
        return Err(format!("the disk has {} bytes, the base {}", client.capacity(), base.len()));
    }
    let mut run = Run {
        random: Random::new(plan.seed),
        running: (0..slots).map(|_| None).collect(),
        model: Model { discarded: vec![false; base.len().div_ceil(512)], data: base },
        summary: Summary::default(),
        discards: client.property("max-discard-len") > 0,
        zeroes: client.property("max-write-zeroes-len") > 0,
        plan,
    };
    run.requests(&mut client)?;
    run.last_look(&mut client)?;
    Ok(run.summary)
}

struct Run {
    plan: Plan,
    random: Random,
    running: Vec<Option<Running>>,
    model: Model,
    summary: Summary,
    discards: bool,
    zeroes: bool,
}

impl Run {
    fn requests(&mut self, client: &mut Client) -> Result<(), String> {
        let mut begun = 0;
        let mut done = Vec::new();
        loop {
            for slot in 0..self.running.len() {
                if begun < self.plan.operations && self.running[slot].is_none() {
                    let running = self.choose();
                    self.prepare(client, slot, &running, begun);
                    client.submit(slot % self.plan.queues, slot, &running.request);
                    self.running[slot] = Some(running);
                    begun += 1;
                }
            }
            if self.running.iter().all(Option::is_none) {
                return Ok(());
            }
            client.wait_any(&mut done)?;
            for done in done.drain(..) {
                let running = self.running[done.slot].take().ok_or("a request completed twice")?;
                if done.result != 0 {
                    return Err(format!("{running:?} failed: error {}", -done.result));
                }
                self.finish(client, done.slot, &running)?;
            }
        }
    }

    /// A request that shares no byte with one under way, unless both read.
    fn choose(&mut self) -> Running {
        loop {
            let dice = self.random.below(100);
            let bytes = self.range();
            let (offset, len) = (bytes.start, bytes.end - bytes.start);
            let skip = if dice.is_multiple_of(3) { self.random.below(SKIP_MAX) as usize } else { 0 };
            let request = match dice {
                0..40 => Request::Read { offset, parts: self.parts(len), skip },
                80..87 if self.discards => Request::Discard { offset, len },
                87..94 if self.zeroes => Request::Zero { offset, len, may_unmap: dice.is_multiple_of(2) },
                94..96 => return Running { request: Request::Flush, bytes: 0..0 },
                _ => Request::Write { offset, parts: self.parts(len), skip },
            };
            let reads = matches!(request, Request::Read { .. });
            let in_the_way = |other: &Running| {
                other.bytes.start < bytes.end
                    && bytes.start < other.bytes.end
                    && !(reads && matches!(other.request, Request::Read { .. }))
            };
            if !self.running.iter().flatten().any(in_the_way) {
                return Running { request, bytes };
            }
        }
    }

    /// Small and odd for the most part; half of them in an eighth of the disk, where they meet.
    fn range(&mut self) -> Range<u64> {
        let disk = self.model.data.len() as u64;
        let len = match self.random.below(20) {
            0..9 => SECTOR * (1 + self.random.below(16)),
            9..14 => SECTOR * (1 + self.random.below(128)),
            14..19 => 4096 * (1 + self.random.below(8)),
            _ => SECTOR * (1 + self.random.below(LEN_MAX / SECTOR)),
        };
        let unit = if len % 4096 == 0 && self.random.below(2) == 0 { 4096 } else { SECTOR };
        let area = if self.random.below(2) == 0 { disk / 8 } else { disk };
        let offset = self.random.below((area - len) / unit + 1) * unit;
        offset..offset + len
    }

    /// `len` in up to six segments that begin and end anywhere.
    fn parts(&mut self, len: u64) -> Vec<usize> {
        let mut parts = Vec::new();
        let mut left = len as usize;
        for _ in 0..self.random.below(6) {
            let part = 1 + self.random.below(left as u64) as usize;
            if part < left {
                parts.push(part);
                left -= part;
            }
        }
        parts.push(left);
        parts
    }

    /// Puts a write's data into its slot and the model, and the model's doubts about a discard.
    fn prepare(&mut self, client: &mut Client, slot: usize, running: &Running, number: u64) {
        let Range { start, end } = running.bytes;
        let bytes = start as usize..end as usize;
        let sectors = (start / SECTOR) as usize..(end / SECTOR) as usize;
        match running.request {
            Request::Write { skip, .. } => {
                let data = &mut self.model.data[bytes];
                random::fill(self.plan.seed ^ (number << 20), start, data);
                client.memory.bytes_mut(slot, skip, data.len()).copy_from_slice(data);
                self.model.discarded[sectors].fill(false);
            }
            Request::Zero { .. } => {
                self.model.data[bytes].fill(0);
                self.model.discarded[sectors].fill(false);
            }
            Request::Discard { .. } => self.model.discarded[sectors].fill(true),
            Request::Read { skip, .. } => {
                client.memory.bytes_mut(slot, skip, bytes.len()).fill(0xdb);
            }
            Request::Flush => {}
        }
    }

    fn finish(&mut self, client: &Client, slot: usize, running: &Running) -> Result<(), String> {
        match running.request {
            Request::Read { skip, .. } => {
                let len = (running.bytes.end - running.bytes.start) as usize;
                self.model.check(running.bytes.start, client.memory.bytes(slot, skip, len))?;
                self.summary.reads += 1;
                self.summary.compared += len as u64;
            }
            Request::Write { .. } => self.summary.writes += 1,
            Request::Discard { .. } => self.summary.discards += 1,
            Request::Zero { .. } => self.summary.zeroes += 1,
            Request::Flush => self.summary.flushes += 1,
        }
        Ok(())
    }

    /// Reads and compares the whole disk.
    fn last_look(&mut self, client: &mut Client) -> Result<(), String> {
        let disk = self.model.data.len() as u64;
        let mut at = 0;
        while at < disk {
            let len = LEN_MAX.min(disk - at) as usize;
            let data = client.read(0, at, len)?;
            self.model.check(at, &data)?;
            self.summary.compared += len as u64;
            at += len as u64;
        }
        Ok(())
    }
}

impl Model {
    /// Compares what was read at `offset` with what should be there.
    fn check(&mut self, offset: u64, read: &[u8]) -> Result<(), String> {
        let sector_len = SECTOR as usize;
        let begin = offset as usize;
        if self.data[begin..begin + read.len()] == *read {
            let sectors = begin / sector_len..(begin + read.len()).div_ceil(sector_len);
            self.discarded[sectors].fill(false);
            return Ok(());
        }
        for (index, sector) in read.chunks(sector_len).enumerate() {
            let at = begin + index * sector_len;
            let expected = &mut self.data[at..at + sector.len()];
            let in_doubt = &mut self.discarded[at / sector_len];
            if *in_doubt && sector.iter().all(|&byte| byte == 0) {
                expected.fill(0);
                *in_doubt = false;
            }
            if *expected != *sector {
                let zero = sector.iter().all(|&byte| byte == 0);
                let what = if zero { "zeroes" } else { "other data" };
                return Err(format!(
                    "read at {offset}, {} bytes: the sector at {at} (block {}) holds {what}, {:02x?}..., \
                     expected {:02x?}...{}",
                    read.len(),
                    at / 4096,
                    &sector[..8],
                    &expected[..8],
                    if *in_doubt { " or zeroes" } else { "" },
                ));
            }
            *in_doubt = false;
        }
        Ok(())
    }
}
