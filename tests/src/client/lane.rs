//! The way of a benchmark through one queue: a buffer for each slot, requests of one length, and nothing
//! allocated, hashed or copied for a request.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkioq, Completion, ReqFlags};

use super::requests::{LIMIT, text};

/// Completions taken at a time.
const ROOM: usize = 128;

/// One queue of a [`Client`](super::Client), for one thread.
pub(super) struct Lane<'a> {
    ring: &'a mut Blkioq,
    buffers: *mut u8,
    len: usize,
    slots: usize,
    in_flight: usize,
    room: [MaybeUninit<Completion>; ROOM],
}

// SAFETY: the pointer is to memory that lives as long as the client, which is borrowed, and no other
// lane has these slots.
unsafe impl Send for Lane<'_> {}

impl<'a> Lane<'a> {
    /// A lane with `slots` buffers of `len` bytes, which begin at `buffers` and belong to it alone.
    pub(super) fn new(ring: &'a mut Blkioq, buffers: *mut u8, len: usize, slots: usize) -> Self {
        Self { ring, buffers, len, slots, in_flight: 0, room: [const { MaybeUninit::uninit() }; ROOM] }
    }

    fn buffer(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.slots);
        // SAFETY: the slot is one of the lane's, as was just checked.
        unsafe { self.buffers.add(slot * self.len) }
    }

    /// Buffers, and so the most requests at a time.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// Requests that have not completed.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts a read at byte `offset` on the queue.
    pub(super) fn read(&mut self, slot: usize, offset: u64) {
        let buffer = self.buffer(slot);
        self.ring.read(offset, buffer, self.len, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Puts a write at byte `offset` on the queue.
    pub(super) fn write(&mut self, slot: usize, offset: u64) {
        let buffer = self.buffer(slot);
        self.ring.write(offset, buffer, self.len, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Puts a flush on the queue.
    pub(super) fn flush(&mut self, slot: usize) {
        self.ring.flush(slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Tells the backend about new requests and appends the slots of completed ones to `done`; does not
    /// wait. A request that failed is an error.
    pub(super) fn poll(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        self.take(0, Duration::ZERO, done)
    }

    /// As [`poll`](Self::poll), but waits for a first completion, for which the backend has to signal.
    pub(super) fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        self.poll(done)?;
        if done.is_empty() && self.in_flight > 0 {
            let begin = Instant::now();
            while done.is_empty() {
                self.take(1, Duration::from_secs(30), done)?;
                if begin.elapsed() > LIMIT {
                    return Err("the backend has stopped answering".into());
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, least: usize, wait: Duration, done: &mut Vec<usize>) -> Result<(), String> {
        let mut left = wait;
        let timeout = (least > 0).then_some(&mut left);
        let count = match self.ring.do_io(&mut self.room, least, timeout, None) {
            Ok(count) => count,
            // A wait that is over; an event that another wait has consumed; a signal.
            Err(error) if [62, 11, 4].contains(&error.errno().raw_os_error()) => 0,
            Err(error) => return Err(text(error)),
        };
        self.in_flight -= count;
        for completion in &self.room[..count] {
            // SAFETY: `do_io` has written as many completions as it says.
            let completion = unsafe { completion.assume_init_ref() };
            if completion.ret != 0 {
                return Err(format!("a request failed: error {}", -completion.ret));
            }
            done.push(completion.user_data);
        }
        Ok(())
    }
}
