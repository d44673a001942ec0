//! A virtqueue's state between the control plane and its worker.
//!
//! The library's [`VringMutex`], with four weaknesses mended: a worker that locks it over and
//! over can't starve control messages; reading a kick never blocks and never fails (an error would
//! end the worker's thread); a kick that replaces one of a running ring is listened to, and the one
//! that was replaced no longer.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::OFlags,
    io::{Errno, ReadWriteFlags},
};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::{connection::set_nonblocking, request::Memory};

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
    /// The call descriptor, if it is one that a write never waits for; -1: it is not.
    call_never_waits: AtomicI32,
    /// The call descriptor, if it had room when it was last looked at; -1: it had none. Nobody fills it but us, one by one.
    call_has_room: AtomicI32,
    /// The call descriptor once more, for who can't have the ring's lock: any by which an interrupt may be on its way, the last
    /// one last.
    calls: Mutex<Vec<File>>,
    /// Has the worker's thread no longer listen to a kick.
    ignore_kick: OnceLock<Box<dyn Fn(RawFd) + Send + Sync>>,
}

thread_local! {
    /// Rings that are made on this thread, if somebody wants to know.
    static MADE: RefCell<Option<Vec<Vring>>> = const { RefCell::new(None) };
}

/// Has the library make rings, and returns them too, in the order of their numbers: it shows none to us before there is
/// something to do on it.
pub(crate) fn made_by<T>(make: impl FnOnce() -> T) -> (T, Vec<Vring>) {
    MADE.set(Some(Vec::new()));
    let result = make();
    (result, MADE.take().unwrap_or_default())
}

impl Flags {
    fn calls(&self) -> MutexGuard<'_, Vec<File>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    /// Interrupts the guest. Not if the descriptor's counter is full: then an interrupt is pending, and writing could
    /// wait for as long as the frontend likes.
    ///
    /// Whether it is full is looked at after each interrupt, for the next one: a guest that has just begun to wait is still
    /// awake, and an interrupt that comes half a microsecond sooner often finds it so. (A frontend that fills the counter on
    /// purpose, between a look and the write, or makes the descriptor one that waits, stops its own queue, until
    /// [`make_room`](Self::make_room).)
    pub(crate) fn signal(&self, state: &VringState<SharedMemory>) -> io::Result<()> {
        let Some(call) = state.get_call() else { return Ok(()) };
        // SAFETY: the descriptor is open as long as `call`, which `state` owns, is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
        let is_this = |known: &AtomicI32| known.load(Ordering::Relaxed) == fd.as_raw_fd();
        let never_waits = is_this(&self.flags.call_never_waits);
        if !(never_waits || is_this(&self.flags.call_has_room) || has_room(fd)?) {
            return Ok(());
        }
        match call.notify() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            // Or it is full, and an interrupt is pending.
            _ => {}
        }
        if !never_waits {
            let known = if has_room(fd)? { fd.as_raw_fd() } else { -1 };
            self.flags.call_has_room.store(known, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Has an interrupt that waits go on, when the frontend has no use for it any more: takes what the descriptor has counted,
    /// if it is full. Needs no lock of the ring, which who waits holds.
    pub(crate) fn make_room(&self) {
        for call in self.flags.calls().iter() {
            if has_room(call.as_fd()).is_ok_and(|has_room| !has_room) {
                let _ = take_count(call.as_fd());
            }
        }
    }

    /// `ignore` has the worker's thread no longer listen to a descriptor, which may be none that it listens to.
    pub(crate) fn ignore_kicks_by(&self, ignore: impl Fn(RawFd) + Send + Sync + 'static) {
        // Nobody else says so.
        let _ = self.flags.ignore_kick.set(Box::new(ignore));
    }

    /// The control plane's access.
    fn control<T>(&self, change: impl FnOnce(&VringMutex<SharedMemory>) -> T) -> T {
        self.flags.waiting.fetch_add(1, Ordering::Relaxed);
        let result = change(&self.state);
        self.flags.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }
}

/// Takes what an event descriptor has counted. Never waits, should somebody else have been there first: what the descriptor's
/// flags say of that is the frontend's to change at any time.
fn take_count(fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let mut count = [0; 8];
    rustix::io::preadv2(fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT).map(|_| ())
}

/// Whether a write to an event descriptor would not wait.
fn has_room(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut poll = [PollFd::new(&fd, PollFlags::OUT)];
    rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(poll.iter().all(|poll| poll.revents().contains(PollFlags::OUT)))
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = Guard<'a>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = Guard<'a>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let ring = Self { state: VringMutex::new(mem, max_queue_size)?, flags: Arc::default() };
        MADE.with_borrow_mut(|made| made.iter_mut().for_each(|made| made.push(ring.clone())));
        Ok(ring)
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
        self.signal(&self.get_ref())
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
            // Only ever written by the frontend, so it does not notice.
            let _ = set_nonblocking(file);
        }
        {
            let mut state = self.get_ref();
            // Closed, it would still be listened to, as long as the frontend has it open: its kicks would wake the
            // worker's thread to no end, for nobody could take them.
            if let (Some(old), Some(ignore)) = (state.get_kick(), self.flags.ignore_kick.get()) {
                ignore(old.as_raw_fd());
            }
            // The library registers the kick of a ring only when it starts. A kick that is
            // pending on the old one is not lost: a start looks at the ring in any case.
            if file.is_some() && state.get_queue().ready() {
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
        // None is set that `make_room` does not know: nobody could end an interrupt that waits.
        let (file, again) = match file.map(|file| file.try_clone().map(|again| (file, again))).transpose() {
            Ok(pair) => pair.unzip(),
            Err(error) => {
                log::error!("a queue interrupts its guest no more: cannot duplicate its descriptor: {error}");
                (None, None)
            }
        };
        let flags = file.as_ref().map(rustix::fs::fcntl_getfl);
        let never_waits = matches!(flags, Some(Ok(flags)) if flags.contains(OFlags::NONBLOCK));
        let count = usize::from(again.is_some());
        // The worker may wait in an interrupt by the old one, which is in our way, or, as soon as it is set, by the new one.
        self.flags.calls().extend(again);
        self.control(|state| state.set_call(file));
        let state = self.get_ref();
        {
            let mut calls = self.flags.calls();
            let old = calls.len().saturating_sub(count);
            calls.drain(..old);
        }
        // As long as that is not said, nothing is known of the new one, whose number is another.
        let call = state.get_call().as_ref().map_or(-1, |call| call.as_raw_fd());
        self.flags.call_never_waits.store(if never_waits { call } else { -1 }, Ordering::Relaxed);
        self.flags.call_has_room.store(-1, Ordering::Relaxed);
        // Answers may have been published that the guest was not told of: by a server that was
        // killed in between, or through a descriptor that nobody listened to any more. One interrupt
        // too many does no harm.
        if let Err(error) = self.signal(&state) {
            log::debug!("cannot interrupt the guest: {error}");
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.control(|state| state.set_err(file));
    }
}

/// Takes a pending kick, if there is one. It only says that it is worth looking at the ring.
///
/// Never waits: who waited would have the ring's lock, and so would hold up the library's thread and the end of the
/// connection, for as long as the frontend likes.
fn drain(state: &VringState<SharedMemory>) {
    let Some(kick) = state.get_kick() else { return };
    // SAFETY: the descriptor is open as long as `kick`, which `state` owns, is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
    if take_count(fd) == Err(Errno::OPNOTSUPP) {
        // Linux before 5.8. Not taken, it would wake the worker's thread to no end; so the frontend would have to take away both
        // the flag and the kick between these two calls.
        let _ = set_nonblocking(fd);
        let _ = kick.consume();
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::OwnedFd, sync::mpsc::channel, time::Duration};

    use rustix::event::{EventfdFlags, eventfd};
    use vm_memory::GuestAddress;

    use super::*;

    /// One less than the most that an event descriptor counts.
    const NEARLY_FULL: u64 = u64::MAX - 2;

    /// A ring that interrupts by `call`, and another descriptor of the same.
    fn ring_with(flags: EventfdFlags, counted: u64) -> (Vring, OwnedFd) {
        let call = eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap();
        if counted > 0 {
            rustix::io::write(&call, &counted.to_ne_bytes()).unwrap();
        }
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let vring = Vring::new(SharedMemory::new(memory), 8).unwrap();
        vring.set_call(Some(File::from(call.try_clone().unwrap())));
        (vring, call)
    }

    fn counted(call: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(call, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    /// Invariant 8: a frontend that never takes its interrupts does not hold up the worker.
    #[test]
    fn interrupt_of_a_full_descriptor_does_not_wait_and_the_next_one_comes() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (vring, call) = ring_with(flags, NEARLY_FULL);
            let (told, done) = channel();
            let of_thread = vring.clone();
            std::thread::spawn(move || {
                // The first one was that of a new descriptor.
                let outcomes = [0; 3].map(|_| of_thread.signal(&of_thread.lock()).is_ok());
                told.send(outcomes).unwrap();
            });
            let outcomes = done.recv_timeout(Duration::from_secs(60)).expect("an interrupt waits");
            assert_eq!(outcomes, [true; 3]);
            assert_eq!(counted(&call), NEARLY_FULL + 1);
            vring.signal(&vring.lock()).unwrap();
            assert_eq!(counted(&call), 1);
        }
    }

    /// A frontend that fills its descriptor right after it was looked at.
    #[test]
    fn interrupt_that_waits_goes_on_when_room_is_made() {
        let (vring, call) = ring_with(EventfdFlags::empty(), 0);
        // A descriptor with room is left alone.
        vring.make_room();
        assert_eq!(counted(&call), 1);
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (told, done) = channel();
        let of_thread = vring.clone();
        std::thread::spawn(move || told.send(of_thread.signal(&of_thread.lock()).is_ok()));
        let begin = std::time::Instant::now();
        let outcome = loop {
            match done.recv_timeout(Duration::from_millis(10)) {
                Ok(outcome) => break outcome,
                Err(_) => vring.make_room(),
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "the interrupt waits");
        };
        assert!(outcome);
        assert_eq!(counted(&call), 1);
    }

    /// A new descriptor comes only when the interrupt by the old one has ended.
    #[test]
    fn interrupt_that_waits_goes_on_while_another_descriptor_comes() {
        let (vring, call) = ring_with(EventfdFlags::empty(), 0);
        rustix::io::write(&call, &(u64::MAX - 2).to_ne_bytes()).unwrap();
        let (told, done) = channel();
        let (of_worker, told_by_worker) = (vring.clone(), told.clone());
        let worker = std::thread::spawn(move || {
            let state = of_worker.lock();
            told_by_worker.send("it has the lock").unwrap();
            of_worker.signal(&state).unwrap();
        });
        assert_eq!(done.recv(), Ok("it has the lock"));
        let next = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (of_library, file) = (vring.clone(), File::from(next.try_clone().unwrap()));
        std::thread::spawn(move || {
            of_library.set_call(Some(file));
            told.send("it is set").unwrap();
        });
        let begin = std::time::Instant::now();
        while done.recv_timeout(Duration::from_millis(10)).is_err() {
            vring.make_room();
            assert!(begin.elapsed() < Duration::from_secs(60), "the interrupt waits");
        }
        worker.join().unwrap();
        assert_eq!(counted(&next), 1);
    }

    /// Invariant 8: whoever waited for a kick would have the ring's lock.
    #[test]
    fn kick_is_read_and_replaced_without_waiting_whatever_the_frontend_makes_of_it() {
        let (vring, _call) = ring_with(EventfdFlags::empty(), 0);
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        vring.set_kick(Some(File::from(kick.try_clone().unwrap())));
        vring.set_queue_ready(true);
        rustix::fs::fcntl_setfl(&kick, OFlags::empty()).unwrap();
        let (told, done) = channel();
        std::thread::spawn(move || {
            vring.read_kick().unwrap();
            vring.set_kick(Some(File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap())));
            told.send(vring.lock().get_queue().ready()).unwrap();
        });
        let ready = done.recv_timeout(Duration::from_secs(20)).expect("a kick is waited for");
        assert!(!ready, "the library would not listen to it");
    }

    #[test]
    fn each_interrupt_is_counted() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (vring, call) = ring_with(flags, 0);
            for expected in [4, 3, 3] {
                (0..3).for_each(|_| vring.signal(&vring.lock()).unwrap());
                assert_eq!(counted(&call), expected);
            }
        }
    }
}
