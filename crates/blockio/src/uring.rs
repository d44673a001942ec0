//! The io_uring engine.
//!
//! Every operation has a [`Work`] of its own that never moves and owns the buffer until the
//! kernel is done with it. At most as many calls are in the kernel as the completion ring has room
//! for, so it cannot overflow. Only what was submitted by the caller goes into the submission ring.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;

use crate::{
    Completion, Deadline, Engine, File, FileIndex, Op, Quick,
    now::{Waits, expect_read, perform_now},
    pace::Pace,
    sync::perform,
    transfer::{Call, Memory, Work},
};

/// How often a submission is tried again, a millisecond apart, while the kernel has no memory for
/// it and nothing is in flight that would free some.
const SUBMIT_TRIES_MAX: u32 = 1000;

/// How many calls of direct I/O are handed to the kernel, and how many completions to the caller, at once.
///
/// What is handed over together is done together: the device would wait while all of it is prepared, and then
/// whoever waits for answers while all of them are looked at. In small parts the three work at the same time.
const DIRECT_BATCH: usize = 4;

/// All that is copied by way of aligned memory at a time holds no more than this, or is alone: a guest's requests may all have
/// memory that direct I/O can't take.
const BOUNCED_MAX: usize = 8 << 20;

/// An engine on an io_uring of its own.
pub(crate) struct UringEngine {
    ring: IoUring,
    files: Vec<Arc<File>>,
    /// Whether the files are registered with the ring, by their index.
    registered: bool,
    /// Boxed: the kernel is given addresses inside.
    #[expect(clippy::vec_box)]
    works: Vec<Box<Work>>,
    idle: Vec<u32>,
    /// Works whose next call is still to be made; the first `released` of them may be made now.
    queue: VecDeque<u32>,
    released: usize,
    /// Works in the submission ring that the kernel has not taken yet, in order.
    ringed: Vec<u32>,
    /// Works in either ring or in the kernel.
    at_work: usize,
    at_work_max: usize,
    /// Bytes that works hold to copy by way of them.
    bounced: usize,
    /// The most calls that are handed to the kernel at once, and completions that are handed out at once.
    batch: usize,
    /// Whether what this thread waits for in the kernel has to wait until nothing is at work. To share blocks the kernel
    /// waits for direct writes of the file, and some of ours may end only when this thread comes back from it.
    waits_alone: bool,
    ready: Vec<Completion>,
    /// Why nothing can be submitted any more.
    broken: Option<Errno>,
    pace: Pace,
}

impl UringEngine {
    /// Sets up a ring for up to `depth` operations at once on `files`.
    pub(crate) fn new(depth: u32, files: Vec<Arc<File>>) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring = IoUring::builder().setup_clamp().setup_submit_all().build(depth).or_else(|error| {
            match error.raw_os_error() {
                // Before Linux 5.18.
                Some(libc::EINVAL) => IoUring::builder().setup_clamp().build(depth),
                _ => Err(error),
            }
        })?;
        let is_direct = files.iter().any(|file| file.is_direct());
        let batch = if is_direct { DIRECT_BATCH } else { usize::MAX };
        let descriptors: Vec<i32> = files.iter().map(|file| file.fd.as_raw_fd()).collect();
        let registered = !files.is_empty() && ring.submitter().register_files(&descriptors).is_ok();
        let at_work_max = ring.params().sq_entries().min(ring.params().cq_entries()) as usize;
        Ok(Self {
            ring,
            files,
            registered,
            works: Vec::new(),
            idle: Vec::new(),
            queue: VecDeque::new(),
            released: 0,
            ringed: Vec::new(),
            at_work: 0,
            at_work_max,
            bounced: 0,
            batch,
            waits_alone: is_direct,
            ready: Vec::new(),
            broken: None,
            pace: Pace::default(),
        })
    }

    /// Makes the next calls of all released works, as far as the ring has room. Afterwards
    /// nothing is left to start, or the kernel has calls at work that will complete.
    fn start(&mut self) {
        while self.broken.is_none() && self.fill() {
            self.enter();
            if !self.ringed.is_empty() {
                break;
            }
        }
        if self.broken.is_some() {
            self.fail_unstarted();
        }
    }

    /// Puts a batch of next calls into the submission ring. Returns whether there is anything in it.
    fn fill(&mut self) -> bool {
        let Self { ring, files, works, queue, ringed, pace, ready, idle, bounced, .. } = self;
        let mut entries = ring.submission();
        // Whose write was made in place last, and in part.
        let mut begun = None;
        while self.released > 0 && self.at_work < self.at_work_max && ringed.len() < self.batch {
            let Some(slot) = queue.pop_front() else { break };
            self.released -= 1;
            let Some(work) = works.get_mut(slot as usize) else { continue };
            let index = work.file().0;
            // Whoever holds some goes on, and is in front of all who don't: what is at work gives some back.
            let missing = work.missing_bounce();
            if missing > 0 && *bounced > 0 && *bounced + missing > BOUNCED_MAX {
                queue.push_front(slot);
                self.released += 1;
                break;
            }
            *bounced += missing;
            let call = work.call();
            let shares = matches!(call, Call::Share { .. });
            if shares && self.waits_alone && self.at_work > 0 {
                queue.push_front(slot);
                self.released += 1;
                break;
            }
            let in_place = shares
                || matches!(call, Call::Transfer { write: true, .. })
                    && files.get(usize::from(index)).is_some_and(|file| file.writes_need_a_thread())
                    && pace.is_quick();
            if in_place {
                let outcome = if shares {
                    perform(files, work.file(), call)
                } else {
                    pace.timed(begun == Some(slot), || perform(files, work.file(), call))
                };
                match work.advance(outcome) {
                    Some(result) => {
                        *bounced -= work.bounce_held();
                        ready.push(work.complete(result, files));
                        idle.push(slot);
                    }
                    None => {
                        begun = Some(slot);
                        queue.push_front(slot);
                        self.released += 1;
                    }
                }
                continue;
            }
            let descriptor = match files.get(usize::from(index)) {
                Some(_) if self.registered => i32::from(index),
                Some(file) => file.fd.as_raw_fd(),
                None => -1,
            };
            let entry = entry_of(call, types::Fd(descriptor), self.registered);
            let entry = entry.user_data(u64::from(slot));
            // SAFETY: the work lives in a box and owns the memory that the entry names; it is
            // neither reused nor freed before the call's completion was seen, or the ring was
            // given up before the kernel took the entry.
            if unsafe { entries.push(&entry) }.is_err() {
                // Never: there are as many entries as `at_work_max`.
                queue.push_front(slot);
                self.released += 1;
                break;
            }
            ringed.push(slot);
            self.at_work += 1;
        }
        drop(entries);
        !self.ringed.is_empty()
    }

    /// Hands the submission ring to the kernel.
    fn enter(&mut self) {
        let mut tries = 0;
        loop {
            let outcome = self.ring.submit();
            let left = self.ring.submission().len();
            let taken = self.ringed.len().saturating_sub(left);
            self.ringed.drain(..taken);
            if self.ringed.is_empty() {
                return;
            }
            match outcome.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)) {
                Err(Errno::INTR) => continue,
                Ok(_) if taken > 0 => continue,
                // Completions will free memory; reaping them tries again.
                Ok(_) | Err(Errno::AGAIN | Errno::BUSY | Errno::NOMEM)
                    if self.at_work > self.ringed.len() =>
                {
                    return;
                }
                Ok(_) | Err(Errno::AGAIN | Errno::BUSY | Errno::NOMEM) if tries < SUBMIT_TRIES_MAX => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(_) => return self.give_up(Errno::AGAIN),
                Err(errno) => return self.give_up(errno),
            }
        }
    }

    /// The ring takes nothing any more. What the kernel has taken still completes.
    fn give_up(&mut self, errno: Errno) {
        log::error!("io_uring takes no more operations: {errno}");
        self.broken = Some(errno);
        self.fail_unstarted();
    }

    /// Completes with an error what the kernel has not taken, now and never.
    fn fail_unstarted(&mut self) {
        let error = || self.broken.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from);
        self.at_work -= self.ringed.len();
        let unstarted = self.ringed.drain(..).chain(self.queue.drain(..self.released));
        for slot in unstarted {
            if let Some(work) = self.works.get_mut(slot as usize) {
                self.bounced -= work.bounce_held();
                self.ready.push(work.complete(Err(error()), &self.files));
                self.idle.push(slot);
            }
        }
        self.released = 0;
    }

    /// Moves a batch of completions out of the ring to `done`. Works with another call to make are queued.
    fn collect(&mut self, done: &mut Vec<Completion>) {
        let Self { files, ring, works, idle, queue, released, at_work, ready, bounced, .. } = self;
        let room = self.batch.saturating_sub(ready.len());
        for entry in ring.completion().take(room) {
            let slot = entry.user_data() as u32;
            let Some(work) = works.get_mut(slot as usize) else { continue };
            *at_work -= 1;
            let outcome = entry.result();
            let outcome = usize::try_from(outcome).map_err(|_| io::Error::from_raw_os_error(-outcome));
            match work.advance(outcome) {
                Some(result) => {
                    *bounced -= work.bounce_held();
                    done.push(work.complete(result, files));
                    idle.push(slot);
                }
                None => {
                    // Behind those who hold some memory, if it needs some: zeroes are to be written now.
                    let place = if work.missing_bounce() > 0 { *released } else { 0 };
                    queue.insert(place.min(queue.len()), slot);
                    *released += 1;
                }
            }
        }
    }

    /// Takes a batch of completions out of the ring, to be reaped.
    fn collect_ready(&mut self) {
        let mut ready = std::mem::take(&mut self.ready);
        if ready.len() < self.batch {
            self.collect(&mut ready);
        }
        self.ready = ready;
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Engine for UringEngine {
    fn expect_read(&self, file: FileIndex, offset: u64) {
        expect_read(&self.files, file, offset);
    }

    fn perform_now(&mut self, quick: Quick<'_>) -> bool {
        perform_now(&self.files, Waits::Paced(&mut self.pace), quick)
    }

    fn push(&mut self, token: u64, op: Op) {
        let slot = self.idle.pop().unwrap_or_else(|| {
            self.works.push(Box::new(Work::idle()));
            (self.works.len() - 1) as u32
        });
        if let Some(work) = self.works.get_mut(slot as usize) {
            work.begin(token, op, &self.files);
            self.queue.push_back(slot);
        }
    }

    fn submit(&mut self) {
        self.released = self.queue.len();
        self.start();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.collect(done);
        if self.released > 0 || !self.ringed.is_empty() {
            self.start();
        }
        done.append(&mut self.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let deadline = Deadline::after(timeout);
        loop {
            self.collect_ready();
            self.start();
            if !self.ready.is_empty() || self.at_work == 0 || deadline.is_over() {
                return Ok(());
            }
            deadline.poll(self.fd())?;
        }
    }

    fn in_flight(&self) -> usize {
        self.works.len() - self.idle.len() + self.ready.len()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd())
    }
}

impl Drop for UringEngine {
    /// The kernel reads and writes the works' memory until their calls complete, whatever happens
    /// to the ring: so this waits for them, without limit.
    fn drop(&mut self) {
        // What the kernel has not taken it never will: nobody enters the ring with it any more.
        self.at_work -= self.ringed.len();
        self.ringed.clear();
        loop {
            // Nobody will ask for these; they would be in the way of the next ones.
            self.ready.clear();
            self.collect_ready();
            if self.at_work == 0 {
                break;
            }
            if let Err(error) = Deadline::after(Some(Duration::from_secs(1))).poll(self.fd()) {
                log::error!("cannot wait for I/O in flight, looking for its completion: {error}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // The ring itself is torn down in the background. The files, and the locks that they
        // hold, should go now.
        if self.registered {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("files", &self.files)
            .field("in_flight", &self.in_flight())
            .field("at_work", &self.at_work)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

fn entry_of(call: Call, fd: types::Fd, registered: bool) -> squeue::Entry {
    let entry = match call {
        // What is shared was shared by now.
        Call::Nothing | Call::Share { .. } => return opcode::Nop::new().build(),
        Call::SyncData => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Call::Allocate { mode, offset, len } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode.bits() as i32).build()
        }
        Call::Transfer { write, offset, memory } => match (write, memory) {
            (false, Memory::One(piece)) => {
                opcode::Read::new(fd, piece.base, piece.len as u32).offset(offset).build()
            }
            (true, Memory::One(piece)) => {
                opcode::Write::new(fd, piece.base, piece.len as u32).offset(offset).build()
            }
            (false, Memory::Many(pieces, count)) => {
                opcode::Readv::new(fd, pieces.cast(), count).offset(offset).build()
            }
            (true, Memory::Many(pieces, count)) => {
                opcode::Writev::new(fd, pieces.cast(), count).offset(offset).build()
            }
        },
    };
    if registered { entry.flags(squeue::Flags::FIXED_FILE) } else { entry }
}

#[cfg(test)]
mod tests;
