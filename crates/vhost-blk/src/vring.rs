//! A virtqueue's state between the control plane and its worker.
//!
//! The library's [`VringMutex`], with three weaknesses mended: a worker that locks it over and
//! over can't starve control messages; reading a kick never blocks and never fails (an error would
//! end the worker's thread); a kick that replaces one of a running ring is listened to.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::OFlags,
};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::request::Memory;

/// A guest's memory, which its frontend may replace at any time.
pub(crate) type SharedMemory = GuestMemoryAtomic<Memory>;

/// How often a worker steps aside for control messages that want the ring, at most.
const STEPS_ASIDE_MAX: u32 = 1000;

/// A virtqueue.
#[derive(Clone)]
pub(crate) struct Vring {
    state: VringMutex<SharedMemory>,
    flags: Arc<Flags>,
}

/// What a worker sees of a ring without locking it.
#[derive(Default)]
struct Flags {
    /// Control messages that wait for the lock.
    waiting: AtomicU32,
    enabled: AtomicBool,
    ready: AtomicBool,
    /// How often the ring was started.
    starts: AtomicU32,
}

type Guard<'a> = MutexGuard<'a, VringState<SharedMemory>>;

impl Vring {
    /// The worker's access: lets control messages that are waiting go first.
    pub(crate) fn lock(&self) -> Guard<'_> {
        for _ in 0..STEPS_ASIDE_MAX {
            if self.flags.waiting.load(Ordering::Relaxed) == 0 {
                break;
            }
            std::thread::yield_now();
        }
        self.state.get_mut()
    }

    /// Whether requests may be taken. A hint for who polls; who takes looks again under the lock.
    pub(crate) fn is_active(&self) -> bool {
        self.flags.enabled.load(Ordering::Relaxed) && self.flags.ready.load(Ordering::Relaxed)
    }

    /// How often the ring was started: whoever takes from it looks where to begin when this changes.
    pub(crate) fn starts(&self) -> u32 {
        self.flags.starts.load(Ordering::Acquire)
    }

    /// The control plane's access.
    fn control<T>(&self, change: impl FnOnce(&VringMutex<SharedMemory>) -> T) -> T {
        self.flags.waiting.fetch_add(1, Ordering::Relaxed);
        let result = change(&self.state);
        self.flags.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }
}

/// Interrupts the guest. Not if the descriptor's counter is full: then an interrupt is pending,
/// and writing could block for as long as the frontend likes.
pub(crate) fn signal(state: &VringState<SharedMemory>) -> io::Result<()> {
    let Some(call) = state.get_call() else { return Ok(()) };
    // SAFETY: the descriptor is open as long as `call`, which `state` owns, is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    let mut poll = [PollFd::new(&fd, PollFlags::OUT)];
    rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    let [poll] = poll;
    if poll.revents().contains(PollFlags::OUT) { call.notify() } else { Ok(()) }
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = Guard<'a>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = Guard<'a>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self { state: VringMutex::new(mem, max_queue_size)?, flags: Arc::default() })
    }

    fn get_ref(&self) -> Guard<'_> {
        self.flags.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self.state.get_ref();
        self.flags.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    fn get_mut(&self) -> Guard<'_> {
        self.get_ref()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.control(|state| state.add_used(desc_index, len))
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        signal(&self.get_ref())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.control(|state| state.enable_notification())
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.control(|state| state.disable_notification())
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.control(|state| state.needs_notification())
    }

    fn set_enabled(&self, enabled: bool) {
        self.flags.enabled.store(enabled, Ordering::Relaxed);
        self.control(|state| state.set_enabled(enabled));
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        self.control(|state| state.set_queue_info(desc_table, avail_ring, used_ring))
    }

    fn queue_next_avail(&self) -> u16 {
        self.control(|state| state.queue_next_avail())
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.control(|state| state.set_queue_next_avail(base));
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.control(|state| state.set_queue_next_used(idx));
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.control(|state| state.queue_used_idx())
    }

    fn set_queue_size(&self, num: u16) {
        self.control(|state| state.set_queue_size(num));
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.control(|state| state.set_queue_event_idx(enabled));
    }

    fn set_queue_ready(&self, ready: bool) {
        self.flags.ready.store(ready, Ordering::Relaxed);
        if ready {
            self.flags.starts.fetch_add(1, Ordering::Release);
        }
        self.control(|state| state.set_queue_ready(ready));
    }

    fn set_kick(&self, file: Option<File>) {
        if let Some(file) = &file {
            // Only ever written by the frontend, so it does not notice; our reads must not block.
            let flags = rustix::fs::fcntl_getfl(file);
            if let Ok(flags) = flags.map(|flags| flags | OFlags::NONBLOCK) {
                let _ = rustix::fs::fcntl_setfl(file, flags);
            }
            // The library registers the kick of a ring only when it starts. A kick that was
            // pending on the old one is not lost: a start looks at the ring in any case.
            let mut state = self.get_ref();
            if state.get_queue().ready() && state.get_kick().is_some() {
                drain(&state);
                state.get_queue_mut().set_ready(false);
            }
        }
        self.control(|state| state.set_kick(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.state.get_ref();
        drain(&state);
        Ok(state.is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.control(|state| state.set_call(file));
        // Answers may have been published that the guest was not told of: by a server that was
        // killed in between, or through a descriptor that nobody listened to any more. One interrupt
        // too many does no harm.
        if let Err(error) = signal(&self.get_ref()) {
            log::debug!("cannot interrupt the guest: {error}");
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.control(|state| state.set_err(file));
    }
}

/// Takes a pending kick, if there is one. It only says that it is worth looking at the ring.
fn drain(state: &VringState<SharedMemory>) {
    if let Some(kick) = state.get_kick() {
        let _ = kick.consume();
    }
}
