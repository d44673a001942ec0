//! A steady load on a backend, and how many requests a second it answers, and how fast.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::histogram::Histogram;
use super::lane::Lane;
use super::requests::{Client, Shape};
use crate::random::Random;

/// What is asked of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads of 4 KiB anywhere.
    RandomRead,
    /// Writes of 4 KiB anywhere.
    RandomWrite,
    /// Seven reads and three writes out of ten, of 4 KiB anywhere.
    Mix,
    /// Reads of 128 KiB, one after the other.
    SequentialRead,
    /// Writes of 128 KiB, one after the other.
    SequentialWrite,
    /// Flushes: no data at all.
    Flush,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::RandomRead,
        Self::RandomWrite,
        Self::Mix,
        Self::SequentialRead,
        Self::SequentialWrite,
        Self::Flush,
    ];

    /// The pattern's name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
            Self::Mix => "mix",
            Self::SequentialRead => "seqread",
            Self::SequentialWrite => "seqwrite",
            Self::Flush => "flush",
        }
    }

    /// The pattern with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.name() == name)
    }

    /// Bytes of a request.
    pub const fn request_len(self) -> usize {
        match self {
            Self::SequentialRead | Self::SequentialWrite => 128 << 10,
            _ => 4096,
        }
    }

    /// Whether it changes the disk.
    pub const fn writes(self) -> bool {
        matches!(self, Self::RandomWrite | Self::Mix | Self::SequentialWrite)
    }
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// What is asked.
    pub pattern: Pattern,
    /// Requests under way on each queue; with a `rate`, at most.
    pub depth: usize,
    /// Queues, each with a thread of its own.
    pub queues: usize,
    /// For how long, after a fifth of it to warm up.
    pub time: Duration,
    /// Requests a second, all queues together, at which they come whatever becomes of them; without it the
    /// next one comes when one is answered. With it the client polls, and a request's time counts from
    /// when it should have come.
    pub rate: Option<f64>,
}

/// What was measured. As text: the fields in order, with a space between.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Requests answered a second.
    pub per_second: f64,
    /// All requests that the backend has answered, warm-up included.
    pub requests: u64,
    /// Microseconds in which half of the requests were answered.
    pub p50_us: f64,
    /// Microseconds in which 99 % of the requests were answered.
    pub p99_us: f64,
    /// Microseconds of processor time that the client took for each.
    pub client_us: f64,
}

impl Display for Score {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { per_second, requests, p50_us, p99_us, client_us } = self;
        write!(f, "{per_second:.1} {requests} {p50_us:.2} {p99_us:.2} {client_us:.4}")
    }
}

impl FromStr for Score {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("\"{text}\" is no score");
        let numbers: Option<Vec<f64>> = text.split(' ').map(|word| word.parse().ok()).collect();
        match numbers.ok_or_else(bad)?[..] {
            [per_second, requests, p50_us, p99_us, client_us] => {
                Ok(Self { per_second, requests: requests as u64, p50_us, p99_us, client_us })
            }
            _ => Err(bad()),
        }
    }
}

/// Puts `load` on the backend at `socket`.
pub fn run_load(socket: &Path, load: Load) -> Result<Score, String> {
    let Load { pattern, depth, queues, .. } = load;
    let shape = Shape { queues, queue_size: 512, slots: depth * queues, slot_len: pattern.request_len() };
    let mut client = Client::connect(socket, shape)?;
    let capacity = client.capacity();
    if capacity / (queues as u64) < pattern.request_len() as u64 {
        return Err("the disk is too small".into());
    }
    client.fill_buffers();
    let begin = Instant::now();
    let tallies: Vec<Result<Tally, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(client.lanes(depth))
            .map(|(index, lane)| {
                let aim = Aim::new(pattern, capacity, index, queues as u64, depth as u64 + index);
                scope.spawn(move || Driver::new(lane, aim, load, begin).run())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all = Tally::new();
    for tally in tallies {
        let tally = tally?;
        all.counted += tally.counted;
        all.requests += tally.requests;
        all.cpu += tally.cpu;
        all.times.merge(&tally.times);
    }
    Ok(Score {
        per_second: all.counted as f64 / load.time.as_secs_f64(),
        requests: all.requests,
        p50_us: all.times.quantile(0.5),
        p99_us: all.times.quantile(0.99),
        client_us: all.cpu.as_secs_f64() * 1e6 / all.requests as f64,
    })
}

/// A request and its byte offset.
#[derive(Clone, Copy)]
pub(super) enum Next {
    Read(u64),
    Write(u64),
    Flush,
}

/// Where the next request goes.
pub(super) struct Aim {
    pattern: Pattern,
    /// Requests that fit on the disk.
    requests: u64,
    random: Random,
    /// The next byte of a sequence, and the part of the disk in which it goes around.
    at: u64,
    part: std::ops::Range<u64>,
}

impl Aim {
    /// For the queue `index` of so many, on a disk of `size` bytes.
    pub(super) fn new(pattern: Pattern, size: u64, index: u64, queues: u64, seed: u64) -> Self {
        let part = size / queues;
        Self {
            pattern,
            requests: size / pattern.request_len() as u64,
            random: Random::new(seed),
            at: index * part,
            part: index * part..(index + 1) * part,
        }
    }

    pub(super) fn next(&mut self) -> Next {
        match self.pattern {
            Pattern::RandomRead => Next::Read(self.anywhere()),
            Pattern::RandomWrite => Next::Write(self.anywhere()),
            Pattern::Mix if self.random.below(10) < 7 => Next::Read(self.anywhere()),
            Pattern::Mix => Next::Write(self.anywhere()),
            Pattern::SequentialRead => Next::Read(self.behind_it()),
            Pattern::SequentialWrite => Next::Write(self.behind_it()),
            Pattern::Flush => Next::Flush,
        }
    }

    fn anywhere(&mut self) -> u64 {
        self.random.below(self.requests) * self.pattern.request_len() as u64
    }

    fn behind_it(&mut self) -> u64 {
        let len = self.pattern.request_len() as u64;
        if self.at + len > self.part.end {
            self.at = self.part.start;
        }
        let at = self.at;
        self.at += len;
        at
    }
}

/// What one queue has done.
struct Tally {
    counted: u64,
    requests: u64,
    cpu: Duration,
    times: Histogram,
}

impl Tally {
    fn new() -> Self {
        Self { counted: 0, requests: 0, cpu: Duration::ZERO, times: Histogram::new() }
    }
}

/// Keeps one queue busy.
struct Driver<'a> {
    lane: Lane<'a>,
    aim: Aim,
    /// Since when each slot's request is under way.
    since: Vec<Instant>,
    done: Vec<usize>,
    tally: Tally,
    /// From when on, and until when, answers count.
    from: Instant,
    until: Instant,
    /// Time between two requests, if they come at a rate.
    gap: Option<Duration>,
}

impl<'a> Driver<'a> {
    fn new(lane: Lane<'a>, aim: Aim, load: Load, begin: Instant) -> Self {
        let from = begin + load.time / 5;
        Self {
            since: vec![begin; lane.slots()],
            done: Vec::with_capacity(lane.slots()),
            lane,
            aim,
            tally: Tally::new(),
            from,
            until: from + load.time,
            gap: load.rate.map(|rate| Duration::from_secs_f64(load.queues as f64 / rate)),
        }
    }

    fn run(mut self) -> Result<Tally, String> {
        let cpu = thread_time();
        match self.gap {
            None => self.one_for_one()?,
            Some(gap) => self.at_a_rate(gap)?,
        }
        while self.lane.in_flight() > 0 {
            self.lane.wait(&mut self.done)?;
            self.tally.requests += self.done.len() as u64;
            self.done.clear();
        }
        self.tally.cpu = thread_time() - cpu;
        Ok(self.tally)
    }

    fn begin(&mut self, slot: usize, since: Instant) {
        self.since[slot] = since;
        match self.aim.next() {
            Next::Read(offset) => self.lane.read(slot, offset),
            Next::Write(offset) => self.lane.write(slot, offset),
            Next::Flush => self.lane.flush(slot),
        }
    }

    /// The next request comes when one is answered.
    fn one_for_one(&mut self) -> Result<(), String> {
        let begin = Instant::now();
        (0..self.lane.slots()).for_each(|slot| self.begin(slot, begin));
        loop {
            self.lane.wait(&mut self.done)?;
            let now = Instant::now();
            self.count(now);
            if now >= self.until {
                self.done.clear();
                return Ok(());
            }
            while let Some(slot) = self.done.pop() {
                self.begin(slot, now);
            }
        }
    }

    /// Requests come when they are due, and wait here if all slots are taken.
    fn at_a_rate(&mut self, gap: Duration) -> Result<(), String> {
        let mut free: Vec<usize> = (0..self.lane.slots()).collect();
        let mut due = Instant::now();
        loop {
            let now = Instant::now();
            if now >= self.until {
                return Ok(());
            }
            while now >= due
                && let Some(slot) = free.pop()
            {
                self.begin(slot, due);
                due += gap;
            }
            self.lane.poll(&mut self.done)?;
            if !self.done.is_empty() {
                self.count(Instant::now());
                free.append(&mut self.done);
            }
        }
    }

    /// Counts the requests that are `done`.
    fn count(&mut self, now: Instant) {
        self.tally.requests += self.done.len() as u64;
        if now < self.from || now >= self.until {
            return;
        }
        self.tally.counted += self.done.len() as u64;
        for &slot in &self.done {
            self.tally.times.add((now - self.since[slot]).as_nanos() as u64);
        }
    }
}

/// Processor time of this thread.
pub(super) fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
