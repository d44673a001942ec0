//! The limit: a plain loop on the file itself, without guest, rings and log.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::histogram::Histogram;
use super::load::{Aim, Load, Next, Score, thread_time};
use crate::bench::machine::cpu_seconds;
use crate::images::BLOCK;
use crate::random::scattered;

/// How the loop does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// `pread` and `pwrite`, one after the other.
    Sync,
    /// io_uring with as many requests under way as the load says, a registered file, one system call for
    /// all that can be submitted.
    IoUring,
    /// Copies out of a map of the file and into it, the next one prefetched: nothing but the memory.
    Map,
}

impl Loop {
    /// All of them.
    const ALL: [Self; 3] = [Self::Sync, Self::IoUring, Self::Map];

    /// The loop's name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::IoUring => "io_uring",
            Self::Map => "map",
        }
    }

    /// The loop with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }
}

/// A loop on a file.
#[derive(Clone, Copy, Debug)]
pub struct Limit<'a> {
    /// The file.
    pub file: &'a Path,
    /// Whether it is opened for direct I/O.
    pub direct: bool,
    /// How it is read and written.
    pub way: Loop,
}

impl Limit<'_> {
    /// Puts `load` (one queue, no rate) on it.
    pub fn load(&self, load: Load) -> Result<Score, String> {
        let begin = Instant::now();
        let from = begin + load.time / 5;
        let span = Some(from..from + load.time);
        let work = |size| Work::Load(Aim::new(load.pattern, size, 0, 1, load.depth as u64));
        self.run(load.pattern.request_len(), load.depth, span, work)
    }

    /// Writes to `count` scattered blocks, each once, `depth` at a time where the loop has several under way.
    pub fn first(&self, depth: usize, count: u64, seed: u64) -> Result<Score, String> {
        let work = |size| Work::Once(scattered(seed, count, size / BLOCK).into_iter());
        self.run(BLOCK as usize, depth, None, work)
    }

    /// Does work of requests of `len` bytes; what counts is what is done in `span`, or else all of it.
    fn run(
        &self,
        len: usize,
        depth: usize,
        span: Option<Range<Instant>>,
        work: impl FnOnce(u64) -> Work,
    ) -> Result<Score, String> {
        let flags = if self.direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(self.file)
            .map_err(|error| format!("{}: {error}", self.file.display()))?;
        let size = file.metadata().map_err(text)?.len();
        let (work, buffers, begin) = (work(size), Buffers::new(depth, len), Instant::now());
        let times = Histogram::new();
        let run = Run { work, buffers, depth, begin, last: begin, span, counted: 0, requests: 0, times };
        let score = match self.way {
            Loop::Sync => run.sync(&file),
            Loop::IoUring => run.ring(&file),
            Loop::Map => run.map(&file, size),
        };
        score.map_err(text)
    }
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

/// A shared map of a file that nobody makes shorter.
struct Map {
    base: *mut u8,
    len: usize,
}

impl Map {
    fn new(file: &File, size: u64) -> io::Result<Self> {
        let len = usize::try_from(size).map_err(io::Error::other)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: the kernel chooses a place where nothing is.
        let base = unsafe { mmap(std::ptr::null_mut(), len, access, flags, file, 0) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// The address of `len` bytes at `offset`.
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let offset = offset as usize;
        assert!(offset + len <= self.len, "{len} bytes at {offset} of {}", self.len);
        self.base.wrapping_add(offset)
    }

    /// Has the beginning of what lies there brought near.
    fn prefetch(&self, offset: u64) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..8 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint without effect on what the program sees, for any address.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(self.base.wrapping_add(offset as usize + line * 64).cast())
            };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }

    fn read(&self, offset: u64, to: &mut [u8]) {
        // SAFETY: so many bytes are mapped there; the buffer is another allocation.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset, to.len()), to.as_mut_ptr(), to.len()) };
    }

    fn write(&self, offset: u64, from: &[u8]) {
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(offset, from.len()), from.len()) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// What is asked of the file.
enum Work {
    /// A load, as long as there is time.
    Load(Aim),
    /// A write to each of these blocks.
    Once(std::vec::IntoIter<u64>),
}

impl Work {
    fn next(&mut self) -> Option<Next> {
        match self {
            Self::Load(aim) => Some(aim.next()),
            Self::Once(blocks) => blocks.next().map(|block| Next::Write(block * BLOCK)),
        }
    }
}

struct Run {
    work: Work,
    buffers: Buffers,
    /// Requests under way at a time.
    depth: usize,
    begin: Instant,
    /// When the last request was done.
    last: Instant,
    span: Option<Range<Instant>>,
    counted: u64,
    requests: u64,
    times: Histogram,
}

impl Run {
    fn sync(mut self, file: &File) -> io::Result<Score> {
        let cpu = thread_time();
        let mut since = self.begin;
        while let Some(next) = self.work.next() {
            match next {
                Next::Read(offset) => file.read_exact_at(self.buffers.at(0), offset)?,
                Next::Write(offset) => file.write_all_at(self.buffers.at(0), offset)?,
                Next::Flush => file.sync_data()?,
            }
            let now = Instant::now();
            if !self.count(since, now) {
                break;
            }
            since = now;
        }
        Ok(self.score(thread_time() - cpu))
    }

    /// The clock is looked at after as many requests as are under way at a time.
    fn map(mut self, file: &File, size: u64) -> io::Result<Score> {
        let map = Map::new(file, size)?;
        let cpu = thread_time();
        let (mut since, mut next) = (Instant::now(), self.work.next());
        let mut going = true;
        while going && next.is_some() {
            let mut done = 0;
            while done < self.depth
                && let Some(now) = next
            {
                next = self.work.next();
                if let Some(Next::Read(offset) | Next::Write(offset)) = next {
                    map.prefetch(offset);
                }
                match now {
                    Next::Read(offset) => map.read(offset, self.buffers.at(done)),
                    Next::Write(offset) => map.write(offset, self.buffers.at(done)),
                    Next::Flush => file.sync_data()?,
                }
                done += 1;
            }
            let now = Instant::now();
            let each = (now - since) / done as u32;
            for _ in 0..done {
                going &= self.count(now - each, now);
            }
            since = now;
        }
        Ok(self.score(thread_time() - cpu))
    }

    fn ring(mut self, file: &File) -> io::Result<Score> {
        let depth = self.depth;
        let mut ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(depth as u32)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let mut since = vec![self.begin; depth];
        let mut free: Vec<usize> = (0..depth).collect();
        let cpu = cpu_seconds(std::process::id());
        let mut going = true;
        loop {
            let now = Instant::now();
            while going && let Some(slot) = free.pop() {
                let Some(next) = self.work.next() else {
                    free.push(slot);
                    going = false;
                    break;
                };
                let buffer = self.buffers.at(slot);
                let (memory, len) = (buffer.as_mut_ptr(), buffer.len() as u32);
                let fd = types::Fixed(0);
                let entry = match next {
                    Next::Read(offset) => opcode::Read::new(fd, memory, len).offset(offset).build(),
                    Next::Write(offset) => opcode::Write::new(fd, memory, len).offset(offset).build(),
                    Next::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
                };
                since[slot] = now;
                // SAFETY: the slot's buffer is neither touched nor freed before the request has completed:
                // the slot is taken until then, and the loop ends when all are free.
                unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.map_err(io::Error::other)?;
            }
            if free.len() == depth {
                let cpu = cpu_seconds(std::process::id()) - cpu;
                return Ok(self.score(Duration::from_secs_f64(cpu.max(0.0))));
            }
            ring.submit_and_wait(1)?;
            let now = Instant::now();
            for entry in ring.completion() {
                let slot = entry.user_data() as usize;
                match entry.result() {
                    error @ ..0 => return Err(io::Error::from_raw_os_error(-error)),
                    done if done as usize == self.buffers.len || done == 0 => {}
                    _ => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
                going &= self.count(since[slot], now);
                free.push(slot);
            }
        }
    }

    /// Counts a request; returns whether there is time for another.
    fn count(&mut self, since: Instant, now: Instant) -> bool {
        self.requests += 1;
        self.last = now;
        let (early, late) = match &self.span {
            Some(span) => (now < span.start, now >= span.end),
            None => (false, false),
        };
        if !early && !late {
            self.counted += 1;
            self.times.add((now - since).as_nanos() as u64);
        }
        !late
    }

    /// What there is to say, if all requests took so much processor time.
    fn score(&self, cpu: Duration) -> Score {
        let counted = self.span.as_ref().map_or(self.last - self.begin, |span| span.end - span.start);
        Score {
            per_second: self.counted as f64 / counted.as_secs_f64(),
            requests: self.requests,
            p50_us: self.times.quantile(0.5),
            p99_us: self.times.quantile(0.99),
            client_us: cpu.as_secs_f64() * 1e6 / self.requests as f64,
        }
    }
}
