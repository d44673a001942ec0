//! An open session of a life: what its guest has been told, and so must read.

use std::collections::HashSet;
use std::ops::Range;

use blockio::GuestBuf;
use blocks::BLOCK_SIZE;
use rustix::event::{PollFd, PollFlags, poll};
use session_disk::{DiskQueue, Done};

use super::image::Expected;
use super::steps::Kind;

/// An open session: what its guest must read, and which blocks it is sure to own.
pub(super) struct Session<'a> {
    pub(super) expected: Expected<'a>,
    pub(super) owned: HashSet<u64>,
    pub(super) queues: Vec<DiskQueue>,
}

/// What the guest of an open session knows.
#[derive(Clone)]
pub(crate) struct Known<'a> {
    pub(super) expected: Expected<'a>,
    pub(super) owned: HashSet<u64>,
}

impl<'a> Known<'a> {
    pub(super) fn note(&mut self, first: u64, bytes: &[u8], done: bool) {
        self.expected.note(first, bytes, done);
        if done {
            self.owned.extend(first / 8..(first + bytes.len() as u64 / 512).div_ceil(8));
        }
    }
}

impl<'a> Session<'a> {
    pub(super) fn known(self) -> Known<'a> {
        Known { expected: self.expected, owned: self.owned }
    }

    pub(super) fn answered(
        &mut self,
        kind: Kind,
        sectors: Range<u64>,
        bytes: &[u8],
        buf: &GuestBuf,
        good: bool,
    ) {
        let touched = sectors.start / 8..sectors.end.div_ceil(8);
        match kind {
            Kind::Flush => {}
            Kind::Read if good => {
                let mut read = vec![0; bytes.len()];
                buf.copy_out(0, &mut read);
                self.expected.check(sectors.start, &read);
            }
            Kind::Read => {}
            Kind::Write => {
                self.expected.note(sectors.start, bytes, good);
                self.owned.extend(touched.filter(|_| good));
            }
            Kind::Zeroes { .. } => {
                self.expected.note(sectors.start, &vec![0; bytes.len()], good);
                self.owned.extend(touched.filter(|_| good));
            }
            Kind::Discard => self.discarded(sectors, good),
        }
    }

    /// Whole blocks that the session owns are zero. Of others, that are on their way to be owned or that a failed write
    /// may have made its own, they may be.
    fn discarded(&mut self, sectors: Range<u64>, good: bool) {
        let size = self.expected.size();
        let end = if sectors.end * 512 == size { sectors.end.div_ceil(8) } else { sectors.end / 8 };
        for block in sectors.start.div_ceil(8)..end {
            let len = (size - block * BLOCK_SIZE).min(BLOCK_SIZE) as usize;
            let certain = good && self.owned.contains(&block);
            if certain || self.expected.may_be_written(block) {
                self.expected.note(block * 8, &vec![0; len], certain);
            }
        }
    }
}

pub(super) fn reap_all(queues: &mut [DiskQueue], done: &mut Vec<Done>) {
    loop {
        queues.iter_mut().for_each(|queue| queue.reap(done));
        if queues.iter().all(|queue| queue.in_flight() == 0) {
            return;
        }
        let mut fds: Vec<PollFd<'_>> = queues
            .iter()
            .flat_map(|queue| queue.wait_fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        poll(&mut fds, None).unwrap();
    }
}
