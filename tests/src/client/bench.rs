//! How many requests a second a backend answers.

use std::path::Path;
use std::time::{Duration, Instant};

use super::requests::{Client, Request, Shape};
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
