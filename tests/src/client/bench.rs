//! How many requests a second a backend answers.

use std::path::Path;
use std::time::{Duration, Instant};

use super::requests::{Client, Done, Request, Shape};
use crate::random::Random;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads of 4 KiB anywhere.
    RandomRead,
    /// Writes of 4 KiB anywhere.
    RandomWrite,
}

impl Pattern {
    /// The pattern's name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
        }
    }

    /// The pattern with this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::RandomRead, Self::RandomWrite].into_iter().find(|pattern| pattern.name() == name)
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// Requests a second.
    pub per_second: f64,
}

const LEN: usize = 4096;

/// Keeps `depth` requests under way on one queue for `time`, after a fifth of it to warm up.
pub fn run(socket: &Path, pattern: Pattern, depth: usize, time: Duration) -> Result<Score, String> {
    let shape = Shape { queues: 1, queue_size: 512, slots: depth, slot_len: LEN };
    let mut client = Client::connect(socket, shape)?;
    let blocks = client.capacity() / LEN as u64;
    let mut random = Random::new(depth as u64);
    let mut begin = |client: &mut Client, slot: usize| {
        let offset = random.below(blocks) * LEN as u64;
        let parts = vec![LEN];
        client.submit(
            0,
            slot,
            &match pattern {
                Pattern::RandomRead => Request::Read { offset, parts, skip: 0 },
                Pattern::RandomWrite => Request::Write { offset, parts, skip: 0 },
            },
        );
    };
    (0..depth).for_each(|slot| begin(&mut client, slot));
    let warm = Instant::now() + time / 5;
    let mut since = None;
    let mut count = 0_u64;
    let mut done = Vec::with_capacity(depth);
    loop {
        client.poll(0, Duration::from_secs(30), &mut done)?;
        if done.is_empty() {
            return Err("the backend has stopped answering".into());
        }
        let now = Instant::now();
        match since {
            None if now >= warm => since = Some(now),
            None => {}
            Some(_) => count += done.len() as u64,
        }
        let over = since.is_some_and(|since| now - since >= time);
        for done in done.drain(..) {
            if done.result != 0 {
                return Err(format!("a request failed: error {}", -done.result));
            }
            if !over {
                begin(&mut client, done.slot);
            }
        }
        if let (true, Some(since)) = (over, since) {
            let per_second = count as f64 / (now - since).as_secs_f64();
            while client.in_flight(0) > 0 {
                client.poll(0, Duration::from_secs(30), &mut done)?;
            }
            return Ok(Score { per_second });
        }
    }
}

/// Bytes of a region, whose first touch is noted durably.
const REGION: u64 = 64 << 20;
/// Blocks of a region whose first touch and next write are timed.
const SAMPLES_PER_REGION: u64 = 16;

/// How often each block is written to after its first touch.
const STEADY_PASSES: u64 = 3;

/// A client on one queue with `depth` buffers.
fn connected(socket: &Path, depth: usize) -> Result<Client, String> {
    let mut client =
        Client::connect(socket, Shape { queues: 1, queue_size: 512, slots: depth, slot_len: LEN })?;
    for slot in 0..depth {
        crate::random::fill(7, 0, client.memory.bytes_mut(slot, 0, LEN));
    }
    Ok(client)
}

/// Writes to `count` scattered blocks, each once, `depth` at a time, and then to all of them again
/// [`STEADY_PASSES`] times in other orders. Returns how many a second were the first time and then, in
/// one session.
pub fn run_passes(socket: &Path, depth: usize, count: u64, seed: u64) -> Result<[f64; 2], String> {
    let mut client = connected(socket, depth)?;
    let mut blocks = crate::random::scattered(seed, count, client.capacity() / LEN as u64);
    let first = pass(&mut client, depth, &blocks)?;
    let mut random = Random::new(seed + 1);
    let mut seconds = 0.0;
    for _ in 0..STEADY_PASSES {
        for last in (1..blocks.len()).rev() {
            blocks.swap(last, random.below(last as u64 + 1) as usize);
        }
        seconds += count as f64 / pass(&mut client, depth, &blocks)?;
    }
    Ok([first, (STEADY_PASSES * count) as f64 / seconds])
}

/// One write to each of `blocks`; returns how many a second.
fn pass(client: &mut Client, depth: usize, blocks: &[u64]) -> Result<f64, String> {
    let begin = Instant::now();
    let mut rest = blocks.iter();
    let mut free: Vec<usize> = (0..depth).collect();
    let mut done = Vec::with_capacity(depth);
    loop {
        while let (Some(slot), Some(block)) = (free.last(), rest.as_slice().first()) {
            client.submit(
                0,
                *slot,
                &Request::Write { offset: block * LEN as u64, parts: vec![LEN], skip: 0 },
            );
            rest.next();
            free.pop();
        }
        if client.in_flight(0) == 0 {
            return Ok(blocks.len() as f64 / begin.elapsed().as_secs_f64());
        }
        client.poll(0, Duration::from_secs(30), &mut done)?;
        if done.is_empty() {
            return Err("the backend has stopped answering".into());
        }
        for done in done.drain(..) {
            if done.result != 0 {
                return Err(format!("a request failed: error {}", -done.result));
            }
            free.push(done.slot);
        }
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
    let mut times: [Vec<f64>; 3] = Default::default();
    let timed = |client: &mut Client, block: u64| {
        let begin = Instant::now();
        let write = Request::Write { offset: block * LEN as u64, parts: vec![LEN], skip: 0 };
        client.submit(0, 0, &write);
        let mut done = Vec::new();
        while done.is_empty() {
            client.poll(0, Duration::from_secs(30), &mut done)?;
        }
        match done[..] {
            [Done { result: 0, .. }] => Ok(begin.elapsed().as_secs_f64() * 1e6),
            _ => Err("a write failed".to_owned()),
        }
    };
    for region in crate::random::scattered(seed, regions, regions) {
        let mut blocks =
            crate::random::scattered(seed + region, SAMPLES_PER_REGION * 2, blocks_of_region).into_iter();
        let mut next = || region * blocks_of_region + blocks.next().unwrap_or(0);
        times[0].push(timed(&mut client, next())?);
        for _ in 0..SAMPLES_PER_REGION {
            let block = next();
            times[1].push(timed(&mut client, block)?);
            times[2].push(timed(&mut client, block)?);
        }
    }
    let [region, block, steady] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    Ok(Touches { region, block, steady })
}
