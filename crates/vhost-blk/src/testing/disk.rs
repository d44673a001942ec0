//! A disk in memory whose I/O can be held back.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use blockio::GuestView;
use blocks::{BlockRange, Geometry};
use rustix::event::{EventfdFlags, eventfd};
use session_disk::{ProcessId, Request, SessionStart, SessionSummary};
use uuid::Uuid;

use crate::disk::{AnyError, Disk, DiskIo, DiskTraits, Finished, Outcome};

/// See the module. Shared by the server and the test.
#[derive(Default)]
pub(crate) struct MemoryDisk {
    state: Mutex<State>,
    changed: Condvar,
    in_flight: AtomicUsize,
    left: AtomicUsize,
    flushes: AtomicU64,
    durable_writes: AtomicU64,
    looks: AtomicU64,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    session: Option<u64>,
    owner: Option<ProcessId>,
    token: Option<Uuid>,
    write_through: bool,
    /// So many requests are taken at a time; 0: any number.
    room: usize,
    sessions: u64,
    refuse_sessions: bool,
    refuse_queues: bool,
    turns_away: bool,
    /// The process that it is held for, and how often the end of that fails.
    held_for: Option<ProcessId>,
    releases_fail: usize,
    held: bool,
    /// Writes that begin here are held back, others are not.
    held_at: Option<u64>,
    outcome: Outcome,
    wakers: Vec<Arc<OwnedFd>>,
}

impl MemoryDisk {
    pub(crate) const SERIAL: [u8; 20] = *b"memory-disk-0\0\0\0\0\0\0\0";

    pub(crate) fn new(size: usize) -> Arc<Self> {
        let disk = Self::default();
        disk.state().bytes = vec![0; size];
        Arc::new(disk)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// A disk with a session that a server before has left open.
    pub(crate) fn in_session(size: usize, token: Uuid) -> Arc<Self> {
        let disk = Self::new(size);
        let mut state = disk.state();
        (state.session, state.sessions, state.token) = (Some(1), 1, Some(token));
        drop(state);
        disk
    }

    pub(crate) fn refuse_sessions(&self) {
        self.state().refuse_sessions = true;
    }

    pub(crate) fn refuse_queues(&self) {
        self.state().refuse_queues = true;
    }

    /// How many queues were made.
    pub(crate) fn queues(&self) -> usize {
        self.state().wakers.len()
    }

    /// Whether frontends are turned away.
    pub(crate) fn turn_away(&self, away: bool) {
        self.state().turns_away = away;
    }

    /// It is held for `process`; the first `fails` attempts to end that fail.
    pub(crate) fn hold_for(&self, process: ProcessId, fails: usize) {
        let mut state = self.state();
        (state.held_for, state.releases_fail) = (Some(process), fails);
    }

    /// How I/O ends from now on, whatever became of it.
    pub(crate) fn end_io(&self, outcome: Outcome) {
        self.state().outcome = outcome;
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// How much I/O was left undone.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    pub(crate) fn durable_writes(&self) -> u64 {
        self.durable_writes.load(Ordering::SeqCst)
    }

    /// Takes no more requests at a time than these.
    pub(crate) fn take_at_most(&self, room: usize) {
        self.state().room = room;
    }

    /// How often workers have looked at what is in flight.
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::SeqCst)
    }

    /// Holds writes back that begin at `offset`, until all I/O is let go.
    pub(crate) fn hold_at(&self, offset: u64) {
        self.state().held_at = Some(offset);
    }

    /// Holds all I/O back from now on, or lets it go.
    pub(crate) fn hold(&self, hold: bool) {
        let mut state = self.state();
        state.held = hold;
        state.held_at = None;
        if !hold {
            for waker in &state.wakers {
                rustix::io::write(waker, &1u64.to_ne_bytes()).unwrap();
            }
        }
        self.changed.notify_all();
    }
}

impl Disk for Arc<MemoryDisk> {
    fn traits(&self) -> DiskTraits {
        DiskTraits {
            geometry: Geometry::new(self.state().bytes.len() as u64).unwrap(),
            serial: MemoryDisk::SERIAL,
            logical_block_size: 512,
            discard: true,
            write_zeroes: true,
        }
    }

    fn queue(&self, _depth: u32) -> Result<Box<dyn DiskIo>, AnyError> {
        let waker = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let mut state = self.state();
        if state.refuse_queues {
            return Err("no memory".into());
        }
        state.wakers.push(waker.clone());
        Ok(Box::new(MemoryIo { disk: self.clone(), waker, queued: Vec::new(), submitted: Vec::new() }))
    }

    fn begin_session(&self, owner: Option<ProcessId>) -> Result<SessionStart, AnyError> {
        let mut state = self.state();
        if state.refuse_sessions {
            return Err("the log has no room".into());
        }
        assert!(state.session.is_none(), "a session is open");
        state.sessions += 1;
        state.session = Some(state.sessions);
        state.owner = owner;
        Ok(SessionStart { sequence: state.sessions, pending_blocks: 0 })
    }

    fn may_begin(&self) -> Result<(), AnyError> {
        let state = self.state();
        match (state.refuse_sessions, state.turns_away) {
            (true, _) => Err("the log has no room".into()),
            (_, true) => Err("the disk is held".into()),
            _ => Ok(()),
        }
    }

    fn end_session(&self) -> Result<SessionSummary, AnyError> {
        let mut state = self.state();
        let sequence = state.session.take().ok_or("no session is open")?;
        assert_eq!(self.in_flight(), 0, "I/O in flight at the session's end");
        state.write_through = false;
        state.bytes.fill(0);
        let duration = Duration::from_secs(1);
        Ok(SessionSummary { sequence, dirty_blocks: 0, bytes_written: 0, duration })
    }

    fn set_owner(&self, owner: Option<ProcessId>) {
        self.state().owner = owner;
    }

    fn open_session(&self) -> Option<u64> {
        self.state().session
    }

    fn turns_away(&self) -> Option<String> {
        self.state().turns_away.then(|| "the disk is held".into())
    }

    fn held_for(&self) -> Option<ProcessId> {
        self.state().held_for
    }

    fn release_if_over(&self) -> Result<bool, AnyError> {
        let mut state = self.state();
        if let Some(left) = state.releases_fail.checked_sub(1) {
            state.releases_fail = left;
            return Err("no room".into());
        }
        Ok(state.held_for.take().is_some())
    }

    fn owner(&self) -> Option<ProcessId> {
        self.state().owner
    }

    fn token(&self) -> Option<Uuid> {
        self.state().token
    }

    fn set_token(&self, token: Option<Uuid>) {
        self.state().token = token;
    }

    fn is_write_through(&self) -> bool {
        self.state().write_through
    }

    fn set_write_through(&self, chosen: bool) {
        self.state().write_through = chosen;
    }
}

struct MemoryIo {
    disk: Arc<MemoryDisk>,
    waker: Arc<OwnedFd>,
    queued: Vec<(u64, Request)>,
    submitted: Vec<(u64, Request)>,
}

impl MemoryIo {
    fn perform(&self, bytes: &mut [u8], request: Request) -> bool {
        let span = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match request {
            Request::Read { range, buf } => {
                assert_eq!(buf.len() as u64, range.len());
                buf.copy_in(0, &bytes[span(range.offset(), range.len())]) == buf.len()
            }
            Request::Write { range, buf, durable } => {
                self.disk.durable_writes.fetch_add(u64::from(durable), Ordering::SeqCst);
                buf.copy_out(0, &mut bytes[span(range.offset(), range.len())]) == buf.len()
            }
            Request::Discard { range } | Request::WriteZeroes { range, .. } => {
                bytes[span(range.offset(), range.len())].fill(0);
                true
            }
            Request::Flush => {
                self.disk.flushes.fetch_add(1, Ordering::SeqCst);
                true
            }
        }
    }
}

impl DiskIo for MemoryIo {
    fn read_now(&mut self, _: BlockRange, _: GuestView<'_>) -> bool {
        false
    }

    fn write_now(&mut self, _: BlockRange, _: GuestView<'_>, _: bool) -> bool {
        false
    }

    fn announce(&mut self, _: BlockRange) -> bool {
        false
    }

    fn log_announced(&mut self) {}

    fn push(&mut self, token: u64, request: Request) {
        self.disk.in_flight.fetch_add(1, Ordering::SeqCst);
        self.queued.push((token, request));
    }

    fn has_room(&self) -> bool {
        let room = self.disk.state().room;
        room == 0 || self.queued.len() + self.submitted.len() < room
    }

    fn submit(&mut self) {
        self.submitted.append(&mut self.queued);
    }

    fn reap(&mut self, done: &mut Vec<Finished>) {
        let _ = rustix::io::read(self.waker.as_ref(), &mut [0u8; 8]);
        let mut state = self.disk.state();
        if state.held {
            return;
        }
        let held_at = state.held_at;
        let (failure, bytes) = (state.outcome, &mut state.bytes);
        for (token, request) in std::mem::take(&mut self.submitted) {
            if matches!(&request, Request::Write { range, .. } if Some(range.offset()) == held_at) {
                self.submitted.push((token, request));
                continue;
            }
            let outcome = if self.perform(bytes, request) { failure } else { Outcome::Failed };
            done.push(Finished { token, outcome });
            if outcome == Outcome::Left {
                self.disk.left.fetch_add(1, Ordering::SeqCst);
            }
            self.disk.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn in_flight(&self) -> usize {
        self.disk.looks.fetch_add(1, Ordering::SeqCst);
        self.queued.len() + self.submitted.len()
    }

    fn quiesce(&mut self, done: &mut Vec<Finished>) {
        self.submit();
        {
            let state = self.disk.state();
            let _state =
                self.disk.changed.wait_while(state, |state| state.held || state.held_at.is_some()).unwrap();
        }
        self.reap(done);
    }

    fn wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![(*self.waker).as_fd()]
    }
}

impl Drop for MemoryIo {
    fn drop(&mut self) {
        assert_eq!(self.in_flight(), 0, "a queue was dropped with I/O in flight");
        self.disk.state().wakers.retain(|waker| !Arc::ptr_eq(waker, &self.waker));
    }
}
