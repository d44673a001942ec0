//! Threads that read what an I/O engine can't: bases whose bytes have to be looked up or unpacked.
//!
//! Threads are started when there is work and end when there has been none for a while, so that a disk
//! which is pristine costs none. What guests wait for goes before what the drain asks for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use blockio::{AlignedBuf, Buffer, Completion, GuestBuf};
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Threads of one base at most.
const THREADS_MAX: usize = 4;
/// How long a thread waits for more work before it ends.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// Bytes that are read at once for a buffer that is not ours.
const SCRATCH_LEN: usize = 256 << 10;

/// What can be read at any offset, by any thread.
pub(crate) trait Source: Send + Sync {
    /// Fills all of `buf` from `offset` on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A guest waits.
    Guest,
    /// It can wait until no guest does.
    Background,
}

/// A read that was asked for.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) token: u64,
    pub(crate) offset: u64,
    pub(crate) buf: Buffer,
}

/// Where the answers to one asker go.
#[derive(Debug)]
pub(crate) struct Answers {
    state: Mutex<AnswerState>,
    idle: Condvar,
    /// An event counter that is readable when there are answers.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct AnswerState {
    done: Vec<Completion>,
    working: usize,
}

impl Answers {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { state: Mutex::default(), idle: Condvar::new(), bell }))
    }

    fn state(&self) -> MutexGuard<'_, AnswerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when there are answers, until [`silence`](Self::silence).
    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    pub(crate) fn ring(&self) {
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Moves the answers to `done`.
    pub(crate) fn take(&self, done: &mut Vec<Completion>) {
        done.append(&mut self.state().done);
    }

    fn begin(&self) {
        self.state().working += 1;
    }

    fn answer(&self, completion: Completion) {
        let mut state = self.state();
        state.done.push(completion);
        state.working -= 1;
        drop(state);
        self.idle.notify_all();
        self.ring();
    }
}

#[derive(Default)]
struct Queues {
    guest: VecDeque<(Job, Arc<Answers>)>,
    background: VecDeque<(Job, Arc<Answers>)>,
    threads: usize,
    idle: usize,
    /// Threads that read for the background.
    background_working: usize,
    closed: bool,
}

struct Shared {
    source: Arc<dyn Source>,
    queues: Mutex<Queues>,
    work: Condvar,
    /// The processors of who opened the base. Readers are started by whoever asks, which may be a thread
    /// that is confined to one.
    processors: Option<CpuSet>,
}

/// The readers of one base. Dropping it ends them.
pub(crate) struct Pool(Arc<Shared>);

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.0.queues().threads).finish()
    }
}

impl Pool {
    pub(crate) fn new(source: Arc<dyn Source>) -> Self {
        let processors = sched_getaffinity(None).ok();
        Self(Arc::new(Shared { source, queues: Mutex::default(), work: Condvar::new(), processors }))
    }

    /// Takes reads, which `answers` will be told of. Never waits.
    pub(crate) fn ask(&self, jobs: impl Iterator<Item = Job>, urgency: Urgency, answers: &Arc<Answers>) {
        let mut queues = self.0.queues();
        for job in jobs {
            let job = (job, Arc::clone(answers));
            match urgency {
                Urgency::Guest => queues.guest.push_back(job),
                Urgency::Background => queues.background.push_back(job),
            }
            if queues.idle > 0 {
                self.0.work.notify_one();
            }
            if queues.idle < queues.waiting() && queues.threads < THREADS_MAX {
                self.start_thread(&mut queues);
            }
        }
    }

    fn start_thread(&self, queues: &mut Queues) {
        let shared = Arc::clone(&self.0);
        let thread = thread::Builder::new().name("base-reader".into()).spawn(move || shared.work());
        match thread {
            Ok(_) => queues.threads += 1,
            // Another one will do it.
            Err(_) if queues.threads > 0 => {}
            Err(error) => {
                for (job, answers) in queues.guest.drain(..).chain(std::mem::take(&mut queues.background)) {
                    let result =
                        Err(io::Error::new(error.kind(), format!("no thread to read with: {error}")));
                    answers.begin();
                    answers.answer(Completion { token: job.token, result, buf: Some(job.buf) });
                }
            }
        }
    }

    /// Forgets what was asked for and not begun, and waits for what was.
    pub(crate) fn forget(&self, answers: &Arc<Answers>) {
        let mut queues = self.0.queues();
        queues.guest.retain(|(_, of)| !Arc::ptr_eq(of, answers));
        queues.background.retain(|(_, of)| !Arc::ptr_eq(of, answers));
        drop(queues);
        let state = answers.state();
        drop(answers.idle.wait_while(state, |state| state.working > 0));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.queues().closed = true;
        self.0.work.notify_all();
    }
}

impl Queues {
    fn waiting(&self) -> usize {
        self.guest.len() + self.background.len()
    }

    /// The next read. One thread is always left for guests.
    fn next(&mut self) -> Option<(Job, Arc<Answers>, Urgency)> {
        if let Some((job, answers)) = self.guest.pop_front() {
            return Some((job, answers, Urgency::Guest));
        }
        if self.background_working + 1 >= THREADS_MAX {
            return None;
        }
        let (job, answers) = self.background.pop_front()?;
        self.background_working += 1;
        Some((job, answers, Urgency::Background))
    }
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn work(&self) {
        if let Some(processors) = &self.processors {
            // If that fails it reads all the same.
            let _ = sched_setaffinity(None, processors);
        }
        let mut scratch = AlignedBuf::new_zeroed(0);
        let mut queues = self.queues();
        loop {
            if let Some((job, answers, urgency)) = queues.next() {
                // Before the lock is let go, so that whoever forgets the job's asker waits for it.
                answers.begin();
                drop(queues);
                answers.answer(self.perform(job, &mut scratch));
                queues = self.queues();
                queues.background_working -= usize::from(urgency == Urgency::Background);
                continue;
            }
            if queues.closed {
                break;
            }
            queues.idle += 1;
            let (again, wait) =
                self.work.wait_timeout(queues, IDLE_MAX).unwrap_or_else(PoisonError::into_inner);
            queues = again;
            queues.idle -= 1;
            if wait.timed_out() && queues.waiting() == 0 {
                break;
            }
        }
        queues.threads -= 1;
    }

    /// Reads. A defect of what reads is an error of the read: nobody waits for ever.
    fn perform(&self, job: Job, scratch: &mut AlignedBuf) -> Completion {
        let Job { token, offset, mut buf } = job;
        let read = catch_unwind(AssertUnwindSafe(|| match &mut buf {
            Buffer::Owned(buf) => self.source.read_at(buf, offset),
            Buffer::Guest(buf) => self.read_for_guest(buf, offset, scratch),
        }));
        let result = read.unwrap_or_else(|_| Err(io::Error::other("the reader of the base failed")));
        Completion { token, result, buf: Some(buf) }
    }

    /// Guest memory is no memory of ours that could be lent as a slice.
    fn read_for_guest(&self, buf: &GuestBuf, offset: u64, scratch: &mut AlignedBuf) -> io::Result<()> {
        if scratch.is_empty() {
            *scratch = AlignedBuf::new_zeroed(SCRATCH_LEN);
        }
        let mut done = 0;
        while done < buf.len() {
            let len = SCRATCH_LEN.min(buf.len() - done);
            let part = scratch.get_mut(..len).unwrap_or_default();
            self.source.read_at(part, offset + done as u64)?;
            buf.copy_in(done, part);
            done += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Instant;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Gives each byte the number of its block; block 7 fails, block 8 panics, block 9 waits.
    struct Marked {
        gate: Mutex<mpsc::Receiver<()>>,
        reads: AtomicUsize,
    }

    impl Source for Marked {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            match offset / 4096 {
                7 => return Err(io::ErrorKind::InvalidData.into()),
                8 => panic!("as a damaged image may make a library do"),
                9 => self.gate.lock().unwrap().recv().unwrap(),
                _ => {}
            }
            buf.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = (at / 4096) as u8);
            Ok(())
        }
    }

    fn pool() -> (Pool, Arc<Marked>, mpsc::Sender<()>) {
        let (open, gate) = mpsc::channel();
        let marked = Arc::new(Marked { gate: Mutex::new(gate), reads: AtomicUsize::new(0) });
        (Pool::new(marked.clone()), marked, open)
    }

    fn job(block: u64) -> Job {
        Job { token: block, offset: block * 4096, buf: Buffer::Owned(AlignedBuf::new_zeroed(4096)) }
    }

    fn wait(answers: &Arc<Answers>, count: usize) -> Vec<Completion> {
        let (mut done, begin) = (Vec::new(), Instant::now());
        while done.len() < count {
            assert!(begin.elapsed() < Duration::from_secs(30), "{} of {count} answers", done.len());
            let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            poll(&mut [PollFd::new(answers.bell(), PollFlags::IN)], Some(&second)).unwrap();
            answers.silence();
            answers.take(&mut done);
        }
        done
    }

    #[test]
    fn reads_of_every_kind_are_each_answered_once() {
        let (pool, _, _open) = pool();
        let answers = Answers::new().unwrap();
        pool.ask((0..9).chain(20..200).map(job), Urgency::Guest, &answers);
        let guest = GuestBuf::zeroed(3 * 4096);
        let of_guest = Job { token: 1000, offset: 30 * 4096, buf: Buffer::Guest(guest.clone()) };
        pool.ask([of_guest].into_iter(), Urgency::Background, &answers);
        let mut done = wait(&answers, 190);
        done.sort_by_key(|completion| completion.token);
        assert_eq!(done.len(), 190);
        for completion in done.iter().filter(|completion| completion.token != 1000) {
            let Some(Buffer::Owned(buf)) = &completion.buf else { panic!("a buffer is missing") };
            match completion.token {
                7 | 8 => assert!(completion.result.is_err()),
                block => assert!(completion.result.is_ok() && buf.iter().all(|b| *b == block as u8)),
            }
        }
        let mut bytes = vec![0; 3 * 4096];
        guest.copy_out(0, &mut bytes);
        assert!([30, 31, 32].iter().zip(bytes.chunks(4096)).all(|(n, block)| block.iter().all(|b| b == n)));
    }

    /// A guest never waits behind what the drain asks for.
    #[test]
    fn read_of_a_guest_goes_before_any_number_of_the_drains() {
        let (pool, _, open) = pool();
        let (drain, guest) = (Answers::new().unwrap(), Answers::new().unwrap());
        pool.ask((0..50).map(|_| job(9)), Urgency::Background, &drain);
        // Every thread has found what it may do.
        let settled = |queues: &Queues| {
            queues.threads == THREADS_MAX && queues.idle + queues.background_working == THREADS_MAX
        };
        while !settled(&pool.0.queues()) {
            thread::yield_now();
        }
        pool.ask([job(3)].into_iter(), Urgency::Guest, &guest);
        assert_eq!(wait(&guest, 1).len(), 1);
        (0..50).for_each(|_| open.send(()).unwrap());
        assert_eq!(wait(&drain, 50).len(), 50);
    }

    #[test]
    fn asker_that_is_forgotten_gets_no_read_afterwards() {
        let (pool, marked, open) = pool();
        let (gone, other) = (Answers::new().unwrap(), Answers::new().unwrap());
        pool.ask((0..50).map(|_| job(9)), Urgency::Background, &gone);
        while marked.reads.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        thread::scope(|scope| {
            let forgetting = scope.spawn(|| pool.forget(&gone));
            while pool.0.queues().waiting() > 0 {
                thread::yield_now();
            }
            // Only then do those that were begun go on.
            (0..THREADS_MAX).for_each(|_| open.send(()).unwrap());
            forgetting.join().unwrap();
        });
        let reads = marked.reads.load(Ordering::SeqCst);
        pool.ask([job(3)].into_iter(), Urgency::Background, &other);
        assert_eq!(wait(&other, 1).len(), 1);
        assert_eq!(marked.reads.load(Ordering::SeqCst), reads + 1);
    }
}
