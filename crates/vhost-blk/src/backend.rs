//! The device as the vhost-user library sees it: one per connection of a frontend.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventNotifier},
};

use crate::{
    config::{self, DeviceConfig},
    disk::{AnyError, Disk, DiskTraits},
    hugepages,
    inflight::InflightTable,
    limit::RateLimit,
    request::Memory,
    vring::{SharedMemory, Vring},
    worker::Worker,
};

/// How long a drain waits before it looks again whether all is done: a queue's own thread may have taken the
/// completion that would have told it.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// What all workers of a connection share. Nothing in it is locked on the data path.
pub(crate) struct Device {
    pub(crate) config: DeviceConfig,
    pub(crate) disk: DiskTraits,
    memory: SharedMemory,
    acked_features: AtomicU64,
    /// The guest's cache switch (`writeback` in the configuration space).
    writeback: AtomicBool,
    stopping: AtomicBool,
    warnings: RateLimit,
    /// The frontend's in-flight table; looked at when a ring starts.
    inflight: Mutex<Option<Arc<InflightTable>>>,
}

impl Device {
    /// The in-flight table that the frontend has set last.
    pub(crate) fn inflight(&self) -> Option<Arc<InflightTable>> {
        self.inflight.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The guest's memory as it is mapped now.
    pub(crate) fn memory(&self) -> Arc<Memory> {
        self.memory.memory().into_inner()
    }

    /// Whether workers must let go of their rings.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Whether writes must be durable before they are acknowledged.
    pub(crate) fn is_write_through(&self) -> bool {
        config::is_write_through(self.acked_features.load(Ordering::Relaxed), self.writeback())
    }

    /// What the guest has chosen with its cache switch, or what it is shown.
    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Shows the guest's cache switch as it is before anybody has touched it.
    pub(crate) fn reset_writeback(&self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    /// Logs something that a guest or frontend has done wrong, now and then.
    pub(crate) fn warn(&self, message: impl FnOnce() -> String) {
        self.warnings.warn(message);
    }
}

/// The device and its workers, one per queue.
pub(crate) struct Backend {
    pub(crate) device: Device,
    /// Made when its ring starts for the first time: most frontends use fewer queues than they may.
    workers: Vec<OnceLock<Mutex<Worker>>>,
    /// Per worker, the event that ends its thread. The library keeps the number registered without
    /// owning the descriptor; we do, for longer than the library's threads live.
    exits: Vec<OwnedFd>,
    /// Told of each change of the guest's memory.
    memory_event: OwnedFd,
    /// Each worker's ring, once it was started, and the worker's thread has its name and its place.
    rings: Vec<OnceLock<Vring>>,
}

impl Backend {
    /// A device on `disk` for one connection, whose guest has no memory and whose queues are not open yet.
    pub(crate) fn new(disk: &dyn Disk, config: DeviceConfig) -> Result<Self, AnyError> {
        let mut exits = Vec::new();
        for _ in 0..config.num_queues {
            exits.push(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        }
        let workers = exits.iter().map(|_| OnceLock::new()).collect();
        let rings = exits.iter().map(|_| OnceLock::new()).collect();
        let device = Device {
            config,
            disk: disk.traits(),
            memory: SharedMemory::new(Memory::new()),
            acked_features: AtomicU64::new(0),
            // The frontend of an open session says it no second time.
            writeback: AtomicBool::new(!disk.is_write_through()),
            stopping: AtomicBool::new(false),
            warnings: RateLimit::new(),
            inflight: Mutex::new(None),
        };
        let memory_event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { device, workers, exits, memory_event, rings })
    }

    /// Written to whenever the guest's memory has changed; nobody takes what it counts.
    pub(crate) fn memory_event(&self) -> BorrowedFd<'_> {
        self.memory_event.as_fd()
    }

    /// The memory that the library is to fill.
    pub(crate) fn shared_memory(&self) -> SharedMemory {
        self.device.memory.clone()
    }

    /// Rings that are started from now on note their requests in this table.
    pub(crate) fn set_inflight(&self, table: Arc<InflightTable>) {
        *self.device.inflight.lock().unwrap_or_else(PoisonError::into_inner) = Some(table);
    }

    /// Makes what queue `index` needs to be served, if it is not open. Returns the descriptors
    /// that are to wake its worker when I/O is complete, if it was not; they stay open as long as `self`.
    pub(crate) fn open_queue(&self, disk: &dyn Disk, index: usize) -> Result<Option<Vec<RawFd>>, AnyError> {
        let place = self.workers.get(index).ok_or("there is no such queue")?;
        if place.get().is_some() {
            return Ok(None);
        }
        let config = &self.device.config;
        let io = disk.queue(u32::from(config.queue_size))?;
        let worker = Worker::new(index, io, config.queue_size, config.polling);
        let fds = worker.io().wait_fds().iter().map(AsRawFd::as_raw_fd).collect();
        // Nobody else opens queues.
        let _ = place.set(Mutex::new(worker));
        Ok(Some(fds))
    }

    /// The workers of open queues.
    fn workers(&self) -> impl Iterator<Item = MutexGuard<'_, Worker>> {
        self.workers.iter().filter_map(OnceLock::get).map(lock)
    }

    /// The same, each with its ring, if it was ever started.
    fn workers_with_rings(&self) -> impl Iterator<Item = (MutexGuard<'_, Worker>, Option<&Vring>)> {
        self.workers
            .iter()
            .zip(&self.rings)
            .filter_map(|(worker, ring)| Some((lock(worker.get()?), ring.get())))
    }

    /// Descriptors that become readable when I/O is complete.
    fn wait_fds(&self) -> Vec<RawFd> {
        let fds = |worker: MutexGuard<'_, Worker>| -> Vec<RawFd> {
            worker.io().wait_fds().iter().map(AsRawFd::as_raw_fd).collect()
        };
        self.workers().flat_map(fds).collect()
    }

    /// Makes workers let go of their rings, for good.
    pub(crate) fn stop(&self) {
        self.device.stopping.store(true, Ordering::Relaxed);
    }

    /// Waits for all I/O in flight of all queues, and publishes the answers. All at once: a write of one
    /// queue may wait for blocks that a finished write of another holds until it is answered.
    pub(crate) fn drain(&self) {
        self.drain_until(&mut || false);
    }

    /// The same, as long as nothing says that the wait `is_over`; whether all of it is finished.
    pub(crate) fn drain_until(&self, is_over: &mut dyn FnMut() -> bool) -> bool {
        let fds = self.wait_fds();
        loop {
            self.workers_with_rings().for_each(|(mut worker, ring)| worker.finish(&self.device, ring));
            if self.is_quiet() {
                break;
            }
            if is_over() {
                return false;
            }
            let borrow = |fd: &RawFd| {
                // SAFETY: the descriptors are the workers', and live as long as `self`.
                PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(*fd) }, PollFlags::IN)
            };
            let mut fds: Vec<PollFd<'_>> = fds.iter().map(borrow).collect();
            if let Err(error) = rustix::event::poll(&mut fds, Some(&LOOK_AGAIN))
                && error != rustix::io::Errno::INTR
            {
                log::error!("waiting for I/O of a connection that ends: {error}");
            }
        }
        self.workers_with_rings().for_each(|(mut worker, ring)| worker.drain(&self.device, ring));
        self.is_quiet()
    }

    /// Whether no I/O of any queue is in flight.
    pub(crate) fn is_quiet(&self) -> bool {
        self.workers().all(|worker| worker.is_quiet())
    }

    /// Serves queue `index` on the caller's thread until it is idle.
    #[cfg(test)]
    pub(crate) fn serve_queue(&self, index: usize, vring: &Vring) {
        let vring = self.rings[index].get_or_init(|| vring.clone());
        self.worker(index).unwrap().run(&self.device, vring);
    }

    /// Gives the calling thread, which is queue `index`'s, its name and its processors.
    fn place(&self, index: usize) {
        if let Ok(name) = CString::new(format!("pristine-q{index}")) {
            // For `ps` and `top` alone.
            let _ = rustix::thread::set_name(&name);
        }
        if let Some(Some(cpus)) = self.device.config.queue_cpus.get(index)
            && let Err(error) = cpus.confine()
        {
            log::warn!("queue {index} runs on any processor, it can't be confined to {cpus}: {error}");
        }
    }

    pub(crate) fn worker(&self, index: usize) -> Option<MutexGuard<'_, Worker>> {
        self.workers.get(index).and_then(OnceLock::get).map(lock)
    }
}

/// A worker is never left in a state that a panic could have spoilt: there is none on its path.
fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.workers.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.config.queue_size)
    }

    fn features(&self) -> u64 {
        config::features(&self.device.config, &self.device.disk)
    }

    fn acked_features(&self, features: u64) {
        self.device.acked_features.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    /// RESET_DEVICE: all rings are disabled already. When this returns, nothing touches the
    /// guest's memory any more. It is not the end of a session. Nor does it change `writeback`: frontends go on to show the guest what
    /// it had chosen before, and it would wait for no flush.
    fn reset_device(&self) {
        self.drain();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::read(&self.device.config, &self.device.disk, self.device.writeback(), offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        if let Some(writeback) = config::written_writeback(offset, buf) {
            self.device.writeback.store(writeback, Ordering::Relaxed);
        }
        // Never an error: that would close the connection for a guest's mistake.
        Ok(())
    }

    fn update_memory(&self, memory: SharedMemory) -> io::Result<()> {
        hugepages::advise(&memory.memory());
        // It is the one that workers look at in each pass; requests on their way keep the old one. A worker may sleep because
        // what it needs was not there.
        let _ = rustix::io::write(&self.memory_event, &1u64.to_ne_bytes());
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.workers.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let exit = self.exits.get(thread_index)?;
        let notifier = exit.try_clone().ok()?;
        // SAFETY: the library takes the number out of the consumer at once and never closes it
        // (0.24, `VringEpollHandler::new`); the descriptor is open as long as `self` lives.
        let consumer = unsafe { EventConsumer::from_raw_fd(exit.as_raw_fd()) };
        // SAFETY: the notifier owns the duplicate, which nobody else does.
        let notifier = unsafe { EventNotifier::from_raw_fd(notifier.into_raw_fd()) };
        Some((consumer, notifier))
    }

    /// GET_VRING_BASE: the ring is stopped already. When this returns, every request that was
    /// taken from it is answered, so that its position says all. It is not the end of a session.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let index = queue_index as usize;
        if let Some(mut worker) = self.worker(index) {
            worker.drain(&self.device, self.rings.get(index).and_then(OnceLock::get));
        }
        log::debug!("queue {index}: its ring has stopped");
        Ok(())
    }

    /// A kick, a completion, or a ring was started: all the same, the worker looks at everything.
    /// Never an error: that would end the worker's thread.
    fn handle_event(
        &self,
        _device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        let (Some(ring), Some(vring)) = (self.rings.get(thread_id), vrings.first()) else { return Ok(()) };
        let vring = ring.get_or_init(|| {
            self.place(thread_id);
            vring.clone()
        });
        if let Some(mut worker) = self.worker(thread_id) {
            worker.run(&self.device, vring);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use blockio::{EngineKind, GuestBuf};
    use session_disk::{DiskOptions, ProvisionOptions, Request, SessionDisk, provision};

    use super::*;
    use crate::poll::Polling;

    /// The queues' threads are gone; queue 0 has a write parked for a claim that queue 1 holds.
    #[test]
    fn drain_of_two_queues_that_wrote_one_pending_block_ends() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            engine: Some(EngineKind::Sync),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        disk.begin_session(None).unwrap();
        let config = DeviceConfig {
            num_queues: 2,
            queue_size: 64,
            read_only: false,
            polling: Polling::Fixed(Duration::ZERO),
            ..DeviceConfig::default()
        };
        let backend = Arc::new(Backend::new(&disk, config).unwrap());
        for queue in [1, 0] {
            backend.open_queue(&disk, queue).unwrap();
            let mut worker = backend.worker(queue).unwrap();
            // Two sectors of one block, one from each queue, as a kernel with two CPUs writes them.
            let range = disk.geometry().sectors_at(queue as u64, 512).unwrap();
            worker.io_mut().push(0, Request::Write { range, buf: GuestBuf::zeroed(512), durable: false });
            worker.io_mut().submit();
        }
        backend.stop();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            backend.drain();
            let _ = done.send(());
        });
        assert!(
            ended.recv_timeout(Duration::from_secs(10)).is_ok(),
            "the drain of a closed connection hangs"
        );
    }

    fn disk_in(dir: &tempfile::TempDir, base: &std::path::Path, options: DiskOptions) -> Arc<SessionDisk> {
        let options = DiskOptions { runtime_dir: Some(dir.path().join("run")), ..options };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        disk
    }

    /// RESET_DEVICE with I/O in flight: the queue's own thread waits for the same completions, and may be the
    /// one to take them.
    #[test]
    fn drain_beside_the_queues_thread_ends() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![7; 4 << 20]).unwrap();
        let options = DiskOptions {
            engine: Some(EngineKind::IoUring),
            direct: true,
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        let disk = disk_in(&dir, &base, options);
        disk.begin_session(None).unwrap();
        let config = DeviceConfig {
            num_queues: 1,
            queue_size: 64,
            polling: Polling::Fixed(Duration::ZERO),
            ..DeviceConfig::default()
        };
        let backend = Arc::new(Backend::new(&disk, config).unwrap());
        backend.open_queue(&disk, 0).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        // What the library's thread does: waits for completions, and lets the worker look.
        let thread = std::thread::spawn({
            let (backend, ended) = (backend.clone(), ended.clone());
            move || {
                let fds = backend.wait_fds();
                while !ended.load(Ordering::Relaxed) {
                    let borrow = |fd: &RawFd| {
                        // SAFETY: the descriptors are the worker's, and live as long as `backend`.
                        PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(*fd) }, PollFlags::IN)
                    };
                    let mut polled: Vec<PollFd<'_>> = fds.iter().map(borrow).collect();
                    let soon = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    rustix::event::poll(&mut polled, Some(&soon)).unwrap();
                    backend.worker(0).unwrap().finish(&backend.device, backend.rings[0].get());
                }
            }
        });
        let (done, rounds) = mpsc::channel();
        std::thread::spawn(move || {
            for round in 0..1000u32 {
                let range = disk.geometry().sectors_at(0, 4096).unwrap();
                let mut worker = backend.worker(0).unwrap();
                worker.io_mut().push(0, Request::Read { range, buf: GuestBuf::zeroed(4096) });
                worker.io_mut().submit();
                drop(worker);
                backend.drain();
                done.send(round).unwrap();
            }
        });
        let hangs = (0..1000).find(|_| rounds.recv_timeout(Duration::from_secs(20)).is_err());
        ended.store(true, Ordering::Relaxed);
        assert_eq!(hangs, None, "the drain hangs in this round");
        thread.join().unwrap();
    }

    /// Invariant 4: a hole that was restored stays one when the next session reads it, also on tmpfs, where
    /// reading a hole through a mapping makes a page.
    #[test]
    fn restored_hole_that_is_read_stays_a_hole() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.raw"));
        std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
        let disk = disk_in(&dir, &base, DiskOptions::new(&path));
        let mut queue = disk.queue(64).unwrap();
        let mut each_block = |write: bool| {
            let mut done = Vec::new();
            for block in 0..16u64 {
                let range = disk.geometry().sectors_at(block * 8, 4096).unwrap();
                let buf = GuestBuf::zeroed(4096);
                let request = match write {
                    true => Request::Write { range, buf, durable: false },
                    false => Request::Read { range, buf },
                };
                queue.push(block, request);
            }
            queue.quiesce(&mut done);
            assert!(done.len() == 16 && done.iter().all(|done| done.result.is_ok()));
        };
        disk.begin_session(None).unwrap();
        each_block(true);
        each_block(false);
        disk.end_session().unwrap();
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        disk.begin_session(None).unwrap();
        each_block(false);
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0);
    }
}
