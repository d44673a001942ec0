//! The limit: a plain loop on the file itself, without guest, rings and log.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

use super::histogram::Histogram;
use super::load::{Aim, Load, Next, Score, thread_time};
use crate::bench::machine::cpu_seconds;

/// How the loop does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// `pread` and `pwrite`, one after the other.
    Sync,
    /// io_uring with as many requests under way as the load says, a registered file, one system call for
    /// all that can be submitted.
    IoUring,
}

/// Puts `load` (one queue, no rate) on a file.
pub fn run_limit(file: &Path, direct: bool, way: Loop, load: Load) -> Result<Score, String> {
    let flags = if direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(file)
        .map_err(|error| format!("{}: {error}", file.display()))?;
    let size = file.metadata().map_err(text)?.len();
    let run = Run {
        aim: Aim::new(load.pattern, size, 0, 1, load.depth as u64),
        buffers: Buffers::new(load.depth, load.pattern.request_len()),
        begin: Instant::now(),
        load,
        counted: 0,
        requests: 0,
        times: Histogram::new(),
    };
    let score = match way {
        Loop::Sync => run.sync(&file),
        Loop::IoUring => run.ring(&file),
    };
    score.map_err(text)
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// Memory for requests of one length, aligned for direct I/O.
struct Buffers {
    memory: Vec<u8>,
    first: usize,
    len: usize,
}

impl Buffers {
    fn new(count: usize, len: usize) -> Self {
        let memory = vec![7; count * len + 4096];
        Self { first: memory.as_ptr().align_offset(4096), memory, len }
    }

    fn at(&mut self, slot: usize) -> &mut [u8] {
        let begin = self.first + slot * self.len;
        &mut self.memory[begin..begin + self.len]
    }
}

struct Run {
    aim: Aim,
    buffers: Buffers,
    load: Load,
    begin: Instant,
    counted: u64,
    requests: u64,
    times: Histogram,
}

impl Run {
    fn sync(mut self, file: &File) -> io::Result<Score> {
        let cpu = thread_time();
        let mut since = Instant::now();
        loop {
            match self.aim.next() {
                Next::Read(offset) => file.read_exact_at(self.buffers.at(0), offset)?,
                Next::Write(offset) => file.write_all_at(self.buffers.at(0), offset)?,
                Next::Flush => file.sync_data()?,
            }
            let now = Instant::now();
            if !self.count(since, now) {
                let cpu_us = (thread_time() - cpu).as_secs_f64() * 1e6 / self.requests as f64;
                return Ok(self.score(cpu_us));
            }
            since = now;
        }
    }

    fn ring(mut self, file: &File) -> io::Result<Score> {
        let depth = self.load.depth;
        let mut ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(depth as u32)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let len = self.load.pattern.request_len();
        let begin = Instant::now();
        let mut since = vec![begin; depth];
        let mut free: Vec<usize> = (0..depth).collect();
        let cpu = cpu_seconds(std::process::id());
        let mut going = true;
        loop {
            let now = Instant::now();
            while going && let Some(slot) = free.pop() {
                let memory = self.buffers.at(slot).as_mut_ptr();
                let fd = types::Fixed(0);
                let entry = match self.aim.next() {
                    Next::Read(offset) => opcode::Read::new(fd, memory, len as u32).offset(offset).build(),
                    Next::Write(offset) => opcode::Write::new(fd, memory, len as u32).offset(offset).build(),
                    Next::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
                };
                since[slot] = now;
                // SAFETY: the slot's buffer is neither touched nor freed before the request has completed:
                // the slot is taken until then, and the loop ends when all are free.
                unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.map_err(io::Error::other)?;
            }
            if free.len() == depth {
                let cpu_us = (cpu_seconds(std::process::id()) - cpu) * 1e6 / self.requests as f64;
                return Ok(self.score(cpu_us));
            }
            ring.submit_and_wait(1)?;
            let now = Instant::now();
            for entry in ring.completion() {
                match entry.result() {
                    error @ ..0 => return Err(io::Error::from_raw_os_error(-error)),
                    done if done as usize == len || done == 0 => {}
                    _ => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
                let slot = entry.user_data() as usize;
                going &= self.count(since[slot], now);
                free.push(slot);
            }
        }
    }

    /// Counts a request; returns whether there is time for another.
    fn count(&mut self, since: Instant, now: Instant) -> bool {
        self.requests += 1;
        let from = self.begin + self.load.time / 5;
        if now >= from + self.load.time {
            return false;
        }
        if now >= from {
            self.counted += 1;
            self.times.add((now - since).as_nanos() as u64);
        }
        true
    }

    fn score(&self, client_us: f64) -> Score {
        Score {
            per_second: self.counted as f64 / self.load.time.as_secs_f64(),
            requests: self.requests,
            p50_us: self.times.quantile(0.5),
            p99_us: self.times.quantile(0.99),
            client_us,
        }
    }
}
