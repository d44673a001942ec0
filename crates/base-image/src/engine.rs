//! An I/O engine one of whose files is a base that has to be read by other means.
//!
//! Operations on its other files go to the engine inside, unseen. So whoever uses an engine need not
//! know what kind of base there is, and a raw base, which has no such engine around its own, costs
//! nothing for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use blockio::{Buffer, Completion, Deadline, Engine, FileIndex, Op, Quick};
use rustix::event::epoll;

use crate::pool::{Answers, Job, Pool, Urgency};

/// An engine that reads a base through its readers.
#[derive(Debug)]
pub(crate) struct BaseEngine {
    inner: Box<dyn Engine>,
    base: FileIndex,
    pool: Arc<Pool>,
    urgency: Urgency,
    answers: Arc<Answers>,
    /// An epoll of the answers' bell and of the inner engine.
    gate: OwnedFd,
    pushed: Vec<Job>,
    /// Operations that the inner engine was given since the last submission.
    pushed_inside: usize,
    /// Reads that the readers have and that were not reaped from them.
    outside: usize,
    ready: Vec<Completion>,
}

impl BaseEngine {
    /// Around `inner`, whose file `base` is never asked of it.
    pub(crate) fn new(
        inner: Box<dyn Engine>,
        base: FileIndex,
        pool: Arc<Pool>,
        urgency: Urgency,
    ) -> io::Result<Self> {
        let answers = Answers::new()?;
        let gate = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&gate, answers.bell(), epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        if let Some(fd) = inner.completion_fd() {
            epoll::add(&gate, fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
        }
        let (pushed, ready) = (Vec::new(), Vec::new());
        Ok(Self { inner, base, pool, urgency, answers, gate, pushed, pushed_inside: 0, outside: 0, ready })
    }

    /// Takes all that is complete.
    fn pump(&mut self) {
        // Before the answers are looked at, so that none comes unheard.
        self.answers.silence();
        let before = self.ready.len();
        self.answers.take(&mut self.ready);
        self.outside -= self.ready.len() - before;
        self.inner.reap(&mut self.ready);
    }

    /// Whether nothing that was submitted is on its way.
    fn is_idle(&self) -> bool {
        self.outside == 0 && self.inner.in_flight() == self.pushed_inside
    }
}

impl Engine for BaseEngine {
    fn push(&mut self, token: u64, op: Op) {
        match op {
            Op::Read { file, offset, buf } if file == self.base => {
                self.pushed.push(Job { token, offset, buf });
            }
            op if op.file() == self.base => {
                let result = Err(io::Error::new(io::ErrorKind::PermissionDenied, "a base is only read"));
                let buf: Option<Buffer> = if let Op::Write { buf, .. } = op { Some(buf) } else { None };
                self.ready.push(Completion { token, result, buf });
            }
            op => {
                self.pushed_inside += 1;
                self.inner.push(token, op);
            }
        }
    }

    fn perform_now(&mut self, quick: Quick<'_>) -> bool {
        let (Quick::Read { file, .. } | Quick::Write { file, .. }) = quick;
        file != self.base && self.inner.perform_now(quick)
    }

    fn submit(&mut self) {
        self.outside += self.pushed.len();
        self.pool.ask(self.pushed.drain(..), self.urgency, &self.answers);
        self.pushed_inside = 0;
        self.inner.submit();
        if !self.ready.is_empty() {
            self.answers.ring();
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.pump();
        done.append(&mut self.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let deadline = Deadline::after(timeout);
        loop {
            self.pump();
            if !self.ready.is_empty() || self.is_idle() || deadline.is_over() {
                if !self.ready.is_empty() {
                    // Still to be reaped, so the descriptor must be readable again.
                    self.answers.ring();
                }
                return Ok(());
            }
            deadline.poll(&self.gate)?;
        }
    }

    fn in_flight(&self) -> usize {
        self.pushed.len() + self.outside + self.ready.len() + self.inner.in_flight()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.gate.as_fd())
    }
}

impl Drop for BaseEngine {
    fn drop(&mut self) {
        self.pool.forget(&self.answers);
    }
}
