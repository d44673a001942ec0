//! The in-flight table: which requests were taken from the rings and not answered, in memory that
//! the frontend keeps when this process dies (vhost-user, "Inflight I/O tracking").
//!
//! The order of a request, step by step; a kill may come between any two:
//!
//! 1. *Pop*: one store of the request's sequence number under its head. Not 0 means in flight.
//! 2. *Complete*: status and data, used elements, used index; then the heads' numbers become 0;
//!    then the table's used index is that of the ring.
//! 3. *Resume*: the used elements between the table's used index and the ring's were published:
//!    their heads' numbers become 0. If that are more than the queue has room for, the ring is a
//!    new one, and nothing is in flight. What is in flight then is executed again, by
//!    sequence number, before anything is popped; the next request to pop is that at used index
//!    plus requests in flight, whatever the frontend says. The guest is interrupted once, in
//!    case that a used index was published and the interrupt was not.
//!
//! Executing again what was not published is safe: the guest still waits for it. Executing again
//! what was published is corruption: the guest may have used the buffer for something else.
//!
//! The words (the layout is the backend's own business, by the specification):
//!
//! | word | holds |
//! | --- | --- |
//! | 0 | magic and layout version |
//! | 1, 2 | token, high and low half: which session's requests these are |
//! | 3 | number of queues, shifted by 16, plus heads per queue |
//! | 4 | 1 once a ring was started with it |
//! | 8 + *q* * stride | queue *q*: the used index up to which all numbers are cleared |
//! | and the *heads* words after it | sequence numbers of requests in flight, by head; or 0 |

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use blockio::SharedMemory;
use uuid::Uuid;

use crate::{QUEUE_SIZE_MAX, QUEUES_MAX, slots::Used};

/// "prstnif" and the layout's version.
const MAGIC: u64 = 0x7072_7374_6e69_6601;
const WORD_TOKEN: usize = 1;
const WORD_SHAPE: usize = 3;
const WORD_STARTED: usize = 4;
const HEADER_WORDS: usize = 8;

/// Size of a table: what a frontend asks for in GET_INFLIGHT_FD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Number of queues.
    pub(crate) queues: u16,
    /// Largest size of each of them.
    pub(crate) queue_size: u16,
}

impl Shape {
    /// A word for the queue's used index, and one per head.
    fn stride(self) -> usize {
        1 + usize::from(self.queue_size)
    }

    fn bytes(self) -> u64 {
        (HEADER_WORDS + usize::from(self.queues) * self.stride()) as u64 * 8
    }

    fn word(self) -> u64 {
        u64::from(self.queues) << 16 | u64::from(self.queue_size)
    }

    fn is_possible(self) -> bool {
        (1..=QUEUES_MAX).contains(&self.queues) && (1..=QUEUE_SIZE_MAX).contains(&self.queue_size)
    }
}

/// The table of one device.
#[derive(Debug)]
pub(crate) struct InflightTable {
    memory: SharedMemory,
    shape: Shape,
    token: Uuid,
}

impl InflightTable {
    /// An empty table with a token of its own.
    pub(crate) fn create(shape: Shape) -> io::Result<Self> {
        if !shape.is_possible() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let memory = SharedMemory::create("pristine-inflight", shape.bytes())?;
        let token = Uuid::new_v4();
        let (high, low) = token.as_u64_pair();
        for (index, value) in
            [(WORD_TOKEN, high), (WORD_TOKEN + 1, low), (WORD_SHAPE, shape.word()), (0, MAGIC)]
        {
            store(memory.word(index), value);
        }
        Ok(Self { memory, shape, token })
    }

    /// The table that a frontend sends in SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// If it is none of ours, or of another shape.
    pub(crate) fn adopt(fd: OwnedFd, shape: Shape) -> io::Result<Self> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        if !shape.is_possible() {
            return Err(invalid("it is of an impossible number or size of queues"));
        }
        let memory = SharedMemory::adopt(fd, shape.bytes())?;
        let word = |index| memory.word(index).map_or(0, |word| word.load(Ordering::Acquire));
        if word(0) != MAGIC {
            return Err(invalid("it was not made by this program"));
        }
        if word(WORD_SHAPE) != shape.word() {
            return Err(invalid("it is of another number or size of queues"));
        }
        let token = Uuid::from_u64_pair(word(WORD_TOKEN), word(WORD_TOKEN + 1));
        Ok(Self { memory, shape, token })
    }

    /// Length in bytes, for the frontend to map.
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    #[cfg(test)]
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Notes that a ring was started with it: from now on it belongs to a session.
    pub(crate) fn set_started(&self) {
        store(self.memory.word(WORD_STARTED), 1);
    }

    /// Whether a ring was ever started with it.
    pub(crate) fn was_started(&self) -> bool {
        self.memory.word(WORD_STARTED).is_some_and(|word| word.load(Ordering::Acquire) != 0)
    }

    /// Which session's requests these are.
    pub(crate) fn token(&self) -> Uuid {
        self.token
    }

    /// The part for queue `index`, if there is one.
    pub(crate) fn queue(self: &Arc<Self>, index: usize) -> Option<InflightQueue> {
        (index < usize::from(self.shape.queues)).then(|| InflightQueue {
            first: HEADER_WORDS + index * self.shape.stride(),
            heads: self.shape.queue_size,
            table: self.clone(),
            sequence: 0,
        })
    }
}

impl AsFd for InflightTable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

fn store(word: Option<&AtomicU64>, value: u64) {
    if let Some(word) = word {
        word.store(value, Ordering::Release);
    }
}

/// One queue's part. Written by the queue's worker alone, and by whoever else has the memory.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    table: Arc<InflightTable>,
    first: usize,
    heads: u16,
    /// The last sequence number that was given.
    sequence: u64,
}

impl InflightQueue {
    /// How many heads there is room for.
    pub(crate) fn heads(&self) -> u16 {
        self.heads
    }

    fn used(&self) -> Option<&AtomicU64> {
        self.table.memory.word(self.first)
    }

    fn head(&self, head: u16) -> Option<&AtomicU64> {
        if head >= self.heads {
            return None;
        }
        self.table.memory.word(self.first + 1 + usize::from(head))
    }

    /// Step 1: the request with this head is in flight.
    pub(crate) fn popped(&mut self, head: u16) {
        self.sequence += 1;
        store(self.head(head), self.sequence);
    }

    /// The end of step 2: `answers` are published, and the ring's used index is `used`.
    pub(crate) fn published(&self, answers: &[Used], used: u16) {
        for answer in answers {
            store(self.head(answer.head), 0);
        }
        store(self.used(), used.into());
    }

    /// Step 3: the heads to execute again, in order, for a ring whose used index is `used`.
    /// `published` tells the head in the used element at an index, if it can be read.
    pub(crate) fn resume(
        &mut self,
        size: u16,
        used: u16,
        published: impl Fn(u16) -> Option<u32>,
    ) -> Vec<u16> {
        let before = self.used().map_or(0, |word| word.load(Ordering::Acquire)) as u16;
        let gap = used.wrapping_sub(before);
        if gap > size {
            (0..self.heads).for_each(|head| store(self.head(head), 0));
        } else {
            (0..gap)
                .filter_map(|index| published(before.wrapping_add(index)))
                .filter_map(|head| u16::try_from(head).ok())
                .for_each(|head| store(self.head(head), 0));
        }
        store(self.used(), used.into());
        let number = |head| self.head(head).map_or(0, |word| word.load(Ordering::Acquire));
        let mut flying: Vec<(u64, u16)> =
            (0..self.heads.min(size)).map(|head| (number(head), head)).filter(|(n, _)| *n != 0).collect();
        flying.sort_unstable();
        // Numbers in another process's memory may be anything.
        self.sequence = flying.last().map_or(0, |(number, _)| *number).min(u64::MAX / 2);
        flying.into_iter().map(|(_, head)| head).collect()
    }
}

#[cfg(test)]
mod tests;
