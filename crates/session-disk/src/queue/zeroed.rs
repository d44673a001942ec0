//! Reads of blocks that were made to read as zeroes over what was pending: the guest gets what was read once a sync that began
//! afterwards has succeeded. Of data the kernel tells whether it was written back; that a block reads as zeroes is the file system's own
//! note, of which only a sync tells (see [`unsynced`](crate::unsynced)).
//!
//! A sync can take seconds, and other requests of the queue are not to wait for it: it is an operation like others, one at a time, for all
//! reads that wait when it begins. Nobody else is told that it has succeeded: a later read has one of its own, until the disk
//! is [synced](crate::shared::Shared::sync_disk), which a drain does soon.

use std::io;

use blockio::{AlignedBuf, GuestBuf, Op};

use super::{DiskQueue, SYNC};
use crate::shared::DISK;

/// What was read for the request `slot`, to be given to the guest in `buf`.
#[derive(Debug)]
struct Read {
    slot: usize,
    buf: GuestBuf,
    bounce: AlignedBuf,
}

/// Those that wait.
#[derive(Debug, Default)]
pub(super) struct ZeroedReads {
    /// For the next sync.
    next: Vec<Read>,
    /// For the one that is under way. Empty: none is.
    syncing: Vec<Read>,
}

impl DiskQueue {
    /// Gives `bounce`, which was read for `slot`, to the guest when the disk is synced.
    pub(super) fn give_when_synced(&mut self, slot: usize, buf: GuestBuf, bounce: AlignedBuf) {
        self.bounced_bytes += bounce.len();
        self.zeroed_reads.next.push(Read { slot, buf, bounce });
        self.sync_zeroed();
    }

    /// The sync is over.
    pub(super) fn give_zeroed(&mut self, result: &io::Result<()>) {
        if result.is_err() {
            // As after any sync: the kernel forgets it.
            self.shared.poison();
        }
        self.shared.live.end_asking();
        for Read { slot, buf, bounce } in std::mem::take(&mut self.zeroed_reads.syncing) {
            self.bounced_bytes -= bounce.len();
            let read = match result {
                Ok(()) => Ok(bounce),
                Err(error) => Err(io::Error::new(error.kind(), format!("not synced: {error}"))),
            };
            self.give(slot, &buf, read);
        }
        self.sync_zeroed();
    }

    fn sync_zeroed(&mut self) {
        let reads = &mut self.zeroed_reads;
        if reads.syncing.is_empty() && !reads.next.is_empty() {
            std::mem::swap(&mut reads.syncing, &mut reads.next);
            self.shared.live.begin_asking();
            self.push_op(SYNC, Op::SyncData { file: DISK });
        }
    }
}
