//! Writes to chosen blocks, once and again: what first touches cost. And reads of all that there is.

use std::path::Path;
use std::time::Instant;

use super::lane::Lane;
use super::requests::{Client, Shape};
use crate::random::{Random, scattered};

const LEN: usize = 4096;

/// Bytes of a region, whose first touch is noted durably.
const REGION: u64 = 64 << 20;
/// Blocks of a region whose first touch and next write are timed.
const SAMPLES_PER_REGION: u64 = 16;

/// A client on one queue with `depth` buffers.
fn connected(socket: &Path, depth: usize) -> Result<Client, String> {
    let mut client =
        Client::connect(socket, Shape { queues: 1, queue_size: 512, slots: depth, slot_len: LEN })?;
    client.fill_buffers();
    Ok(client)
}

/// Writes to `count` scattered blocks, each once, `depth` at a time. Returns how many a second.
pub fn run_first(socket: &Path, depth: usize, count: u64, seed: u64) -> Result<f64, String> {
    Turns::start(socket, depth, count, seed, 1)?.turn()
}

/// Writes to scattered blocks, each once, and then to all of them again in other orders, over and over: a part each time that
/// it is told to, so that two clients can take turns.
pub struct Turns {
    client: Client,
    depth: usize,
    random: Random,
    blocks: Vec<u64>,
    /// Blocks of a turn, and those of this pass that were written to.
    part: usize,
    written: usize,
}

impl Turns {
    /// A session on one queue, that writes to `count` blocks, `depth` at a time, in `parts` turns.
    pub fn start(socket: &Path, depth: usize, count: u64, seed: u64, parts: usize) -> Result<Self, String> {
        let client = connected(socket, depth)?;
        let blocks = scattered(seed, count, client.capacity() / LEN as u64);
        let part = blocks.len().div_ceil(parts.max(1));
        Ok(Self { client, depth, random: Random::new(seed + 1), blocks, part, written: 0 })
    }

    /// Writes to the next part. Returns how many a second.
    pub fn turn(&mut self) -> Result<f64, String> {
        if self.written == self.blocks.len() {
            self.written = 0;
            for last in (1..self.blocks.len()).rev() {
                self.blocks.swap(last, self.random.below(last as u64 + 1) as usize);
            }
        }
        let begin = self.written;
        self.written = self.blocks.len().min(begin + self.part);
        pass(&mut lane_of(&mut self.client, self.depth)?, &self.blocks[begin..self.written])
    }
}

/// How often each block is written to after its first touch.
const STEADY_PASSES: u32 = 3;

/// Writes to `count` scattered blocks, each once, `depth` at a time, and then to all of them again
/// `STEADY_PASSES` times in other orders. Returns how many a second were the first time and then, in
/// one session.
pub fn run_passes(socket: &Path, depth: usize, count: u64, seed: u64) -> Result<[f64; 2], String> {
    let mut turns = Turns::start(socket, depth, count, seed, 1)?;
    let first = turns.turn()?;
    let mut seconds = 0.0;
    for _ in 0..STEADY_PASSES {
        seconds += turns.turn()?.recip();
    }
    Ok([first, f64::from(STEADY_PASSES) / seconds])
}

fn lane_of(client: &mut Client, depth: usize) -> Result<Lane<'_>, String> {
    client.lanes(depth).next().ok_or_else(|| "the client has no queue".into())
}

/// One write to each of `blocks`; returns how many a second.
fn pass(lane: &mut Lane<'_>, blocks: &[u64]) -> Result<f64, String> {
    let mut free: Vec<usize> = (0..lane.slots()).collect();
    let begin = Instant::now();
    for block in blocks {
        while free.is_empty() {
            lane.wait(&mut free)?;
        }
        let slot = free.pop().unwrap_or_default();
        lane.write(slot, block * LEN as u64);
    }
    while lane.in_flight() > 0 {
        free.clear();
        lane.wait(&mut free)?;
    }
    Ok(blocks.len() as f64 / begin.elapsed().as_secs_f64())
}

/// Bytes that a reader of everything asks for at once, and requests at a time.
const READ_LEN: usize = 128 << 10;
const READ_DEPTH: usize = 16;

/// Reads the whole disk in order, so that the host has it in memory as reads through its server leave it there.
pub fn run_warm(socket: &Path) -> Result<(), String> {
    let shape = Shape { queues: 1, queue_size: 512, slots: READ_DEPTH, slot_len: READ_LEN };
    let mut client = Client::connect(socket, shape)?;
    let mut offsets = (0..client.capacity() / READ_LEN as u64).map(|index| index * READ_LEN as u64);
    let mut lane = lane_of(&mut client, READ_DEPTH)?;
    let mut free: Vec<usize> = (0..READ_DEPTH).collect();
    loop {
        while let Some(slot) = free.pop() {
            let Some(offset) = offsets.next() else {
                free.push(slot);
                break;
            };
            lane.read(slot, offset);
        }
        if lane.in_flight() == 0 {
            return Ok(());
        }
        lane.wait(&mut free)?;
    }
}

/// How long single writes take, in microseconds, medians.
#[derive(Clone, Copy, Debug)]
pub struct Touches {
    /// The first one into a region.
    pub region: f64,
    /// The first one into a block of a region that was written to before.
    pub block: f64,
    /// One into a block that was written to before.
    pub steady: f64,
}

/// Times single writes, one at a time, in every region of the disk.
pub fn run_touches(socket: &Path, seed: u64) -> Result<Touches, String> {
    let mut client = connected(socket, 1)?;
    let regions = client.capacity() / REGION;
    let blocks_of_region = REGION / LEN as u64;
    let mut lane = lane_of(&mut client, 1)?;
    let mut times: [Vec<f64>; 3] = Default::default();
    let mut done = Vec::with_capacity(1);
    let mut timed = |block: u64| {
        let begin = Instant::now();
        lane.write(0, block * LEN as u64);
        lane.wait(&mut done)?;
        done.clear();
        Ok::<_, String>(begin.elapsed().as_secs_f64() * 1e6)
    };
    for region in scattered(seed, regions, regions) {
        let mut blocks = scattered(seed + region, SAMPLES_PER_REGION * 2, blocks_of_region).into_iter();
        let mut next = || region * blocks_of_region + blocks.next().unwrap_or(0);
        times[0].push(timed(next())?);
        for _ in 0..SAMPLES_PER_REGION {
            let block = next();
            times[1].push(timed(block)?);
            times[2].push(timed(block)?);
        }
    }
    let [region, block, steady] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    Ok(Touches { region, block, steady })
}

/// What reads of a queue wait for while a write needs something that is not durable yet, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// The longest read beside the session's first write.
    pub session: f64,
    /// The longest read beside the first write into a region, the median of the other regions.
    pub region: f64,
    /// How long these writes take, the median.
    pub write: f64,
}

/// Times reads of one block, one after the other, while single writes are done, the first in each region of the disk.
pub fn run_beside(socket: &Path, seed: u64) -> Result<Beside, String> {
    const READER: usize = 0;
    const WRITER: usize = 1;
    let mut client = connected(socket, 2)?;
    let regions = client.capacity() / REGION;
    let mut lane = lane_of(&mut client, 2)?;
    let mut done = Vec::with_capacity(2);
    let mut longest_read_and_write = |write_at: Option<u64>| {
        let (mut longest, mut write, begin) = (0.0f64, 0.0, Instant::now());
        if let Some(offset) = write_at {
            lane.write(WRITER, offset);
        }
        let micros = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
        loop {
            let begun = Instant::now();
            lane.read(READER, REGION - LEN as u64);
            while !done.contains(&READER) {
                lane.wait(&mut done)?;
                if done.contains(&WRITER) {
                    write = micros(begin);
                }
            }
            longest = longest.max(micros(begun));
            done.clear();
            if lane.in_flight() == 0 {
                return Ok::<_, String>((longest, write));
            }
        }
    };
    // So that nothing is new to the reader.
    longest_read_and_write(None)?;
    let mut random = Random::new(seed);
    let mut first_write = |region: u64| {
        // Not the block that is read.
        let block = random.below(REGION / LEN as u64 - 1);
        longest_read_and_write(Some(region * REGION + block * LEN as u64))
    };
    let (session, _) = first_write(0)?;
    let times = (1..regions).map(first_write).collect::<Result<Vec<_>, _>>()?;
    let (reads, writes) = times.into_iter().unzip::<_, _, Vec<f64>, Vec<f64>>();
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    Ok(Beside { session, region: median(reads), write: median(writes) })
}
