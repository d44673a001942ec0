//! A connected client: requests on its queues, and their completions.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, ReqFlags, iovec};

use super::lane::Lane;
use super::memory::Memory;
use crate::random;

/// A request that has not been answered after this time will never be.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// How a client is built.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Virtqueues to use.
    pub queues: usize,
    /// Size of each ring; `blkio` takes three descriptors for a request, or more.
    pub queue_size: i32,
    /// Buffers, shared by the queues.
    pub slots: usize,
    /// Length of each buffer in bytes.
    pub slot_len: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { queues: 1, queue_size: 256, slots: 64, slot_len: 1 << 20 }
    }
}

/// What to do with a slot's bytes or a part of the disk. Offsets and lengths in bytes.
#[derive(Clone, Debug)]
pub enum Request {
    /// Reads into the slot, whose byte `skip` is the first.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Lengths of the memory segments, whose sum is the length of the request.
        parts: Vec<usize>,
        /// First byte used of the slot.
        skip: usize,
    },
    /// Writes from the slot.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Lengths of the memory segments, whose sum is the length of the request.
        parts: Vec<usize>,
        /// First byte used of the slot.
        skip: usize,
    },
    /// Discards.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Writes zeroes.
    Zero {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether the device may deallocate.
        may_unmap: bool,
    },
    /// Flushes.
    Flush,
}

/// A completion.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// The slot that the request was made with.
    pub slot: usize,
    /// 0, or a negative error number.
    pub result: i32,
}

/// A started device.
pub struct Client {
    queues: Vec<Blkioq>,
    in_flight: Vec<usize>,
    /// Each slot's segments: `blkio` keeps a pointer while a request is queued.
    segments: Vec<Vec<iovec>>,
    pub(super) memory: Memory,
    blkio: Blkio,
}

impl Client {
    /// Connects to the backend at `socket` and starts the device. Waits for the backend's answers
    /// without a limit.
    pub fn connect(socket: &Path, shape: Shape) -> Result<Self, String> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(text)?;
        blkio.set_str("path", &socket.display().to_string()).map_err(text)?;
        blkio.connect().map_err(text)?;
        blkio.set_i32("num-queues", shape.queues as i32).map_err(text)?;
        blkio.set_i32("queue-size", shape.queue_size).map_err(text)?;
        let queues = blkio.start().map_err(text)?.queues;
        let memory = Memory::map(&mut blkio, shape.slots, shape.slot_len).map_err(text)?;
        let in_flight = vec![0; queues.len()];
        Ok(Self { queues, in_flight, segments: vec![Vec::new(); shape.slots], memory, blkio })
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").unwrap_or(0)
    }

    /// A number that the device offers, such as `max-discard-len`.
    pub fn property(&self, name: &str) -> u64 {
        self.blkio.get_u64(name).or_else(|_| self.blkio.get_i32(name).map(|n| n.max(0) as u64)).unwrap_or(0)
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Requests on `queue` that have not completed.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.in_flight[queue]
    }

    /// Fills all buffers with something that is not zero.
    pub(super) fn fill_buffers(&mut self) {
        for slot in 0..self.memory.slots() {
            random::fill(7, 0, self.memory.bytes_mut(slot, 0, self.memory.slot_len()));
        }
    }

    /// The queues, each with `slots` buffers of its own, for threads of their own.
    pub(super) fn lanes(&mut self, slots: usize) -> impl Iterator<Item = Lane<'_>> {
        let memory = &self.memory;
        let first = (0..).step_by(slots);
        self.queues
            .iter_mut()
            .zip(first)
            .map(move |(ring, first)| Lane::new(ring, memory.several(first, slots), memory.slot_len(), slots))
    }

    /// Puts a request on a queue. It is the slot's only one until it completes.
    pub fn submit(&mut self, queue: usize, slot: usize, request: &Request) {
        let ring = &mut self.queues[queue];
        let none = ReqFlags::empty();
        match *request {
            Request::Read { offset, ref parts, skip } | Request::Write { offset, ref parts, skip } => {
                let mut at = skip;
                let segments = &mut self.segments[slot];
                segments.clear();
                for &len in parts {
                    let iov_base = self.memory.address(slot, at, len).cast();
                    segments.push(iovec { iov_base, iov_len: len });
                    at += len;
                }
                let (first, count) = (segments.as_ptr(), segments.len() as u32);
                match request {
                    Request::Read { .. } => ring.readv(offset, first, count, slot, none),
                    _ => ring.writev(offset, first, count, slot, none),
                }
            }
            Request::Discard { offset, len } => ring.discard(offset, len, slot, none),
            Request::Zero { offset, len, may_unmap } => {
                let flags = if may_unmap { none } else { ReqFlags::NO_UNMAP };
                ring.write_zeroes(offset, len, slot, flags);
            }
            Request::Flush => ring.flush(slot, none),
        }
        self.in_flight[queue] += 1;
    }

    /// Tells the backend about new requests, and appends what `queue` has completed to `done`. Waits
    /// up to `wait` for a first completion. An empty result is no error.
    pub fn poll(&mut self, queue: usize, wait: Duration, done: &mut Vec<Done>) -> Result<(), String> {
        let least = usize::from(!wait.is_zero() && self.in_flight[queue] > 0);
        let mut room = [const { MaybeUninit::<Completion>::uninit() }; 64];
        let mut left = wait;
        let timeout = (least > 0).then_some(&mut left);
        let count = match self.queues[queue].do_io(&mut room, least, timeout, None) {
            Ok(count) => count,
            // A wait that is over; an event that another wait has consumed; a signal.
            Err(error) if [62, 11, 4].contains(&error.errno().raw_os_error()) => 0,
            Err(error) => return Err(text(error)),
        };
        for completion in &room[..count] {
            // SAFETY: `do_io` has written as many completions as it says.
            let completion = unsafe { completion.assume_init_ref() };
            self.in_flight[queue] -= 1;
            done.push(Done { slot: completion.user_data, result: completion.ret });
        }
        Ok(())
    }

    /// Waits until one of the queues completes something.
    pub fn wait_any(&mut self, done: &mut Vec<Done>) -> Result<(), String> {
        let begin = Instant::now();
        let mut patience = Duration::ZERO;
        while done.is_empty() {
            for queue in 0..self.queues() {
                let wait = if done.is_empty() { patience } else { Duration::ZERO };
                self.poll(queue, wait, done)?;
            }
            if begin.elapsed() > LIMIT {
                return Err(format!(
                    "the backend has not answered {:?} requests for {LIMIT:?}",
                    self.in_flight
                ));
            }
            patience = Duration::from_micros(500);
        }
        Ok(())
    }

    /// Puts a write of the contents that `seed` has at `offset` on a queue.
    pub fn submit_contents(&mut self, queue: usize, slot: usize, seed: u64, offset: u64, len: usize) {
        random::fill(seed, offset, self.memory.bytes_mut(slot, 0, len));
        self.submit(queue, slot, &Request::Write { offset, parts: vec![len], skip: 0 });
    }

    /// Does one request on an idle client, in slot 0, and waits for it.
    pub fn perform(&mut self, queue: usize, request: &Request) -> Result<(), String> {
        let mut done = Vec::new();
        self.submit(queue, 0, request);
        self.wait_any(&mut done)?;
        match done[..] {
            [Done { result: 0, .. }] => Ok(()),
            [Done { result, .. }] => Err(format!("{request:?} failed: error {}", -result)),
            _ => Err(format!("{request:?} completed more than once")),
        }
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&mut self, queue: usize, offset: u64, len: usize) -> Result<Vec<u8>, String> {
        self.perform(queue, &Request::Read { offset, parts: vec![len], skip: 0 })?;
        Ok(self.memory.bytes(0, 0, len).to_vec())
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, queue: usize, offset: u64, data: &[u8]) -> Result<(), String> {
        self.memory.bytes_mut(0, 0, data.len()).copy_from_slice(data);
        self.perform(queue, &Request::Write { offset, parts: vec![data.len()], skip: 0 })
    }
}

pub(super) fn text(error: blkio::Error) -> String {
    error.to_string()
}
