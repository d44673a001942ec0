//! A frontend with the driver of a guest, in the test's own process.

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, SealFlags};
use uuid::Uuid;
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{FrontendReq, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures},
    },
};
use virtio_bindings::{
    virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT},
    virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE},
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::request::Memory;

/// Elements of each queue.
const SIZE: u16 = 16;
/// Distance between queues in guest memory, and of the rings within one.
const QUEUE_STRIDE: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
/// Guest memory from here on is for data.
pub(crate) const DATA_AT: u64 = 0x10_0000;
const MEMORY_LEN: usize = 0x40_0000;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A descriptor: address, length, whether the device writes it.
pub(crate) type Part = (u64, u32, bool);

struct Queue {
    avail: u16,
    used: u16,
    next_descriptor: u16,
    kick: EventFd,
    call: EventFd,
}

/// A frontend whose driver has `queues` queues.
pub(crate) struct Driver {
    pub(crate) frontend: Frontend,
    /// Its connection, for what it can't say.
    stream: UnixStream,
    pub(crate) memory: Memory,
    memfd: File,
    queues: Vec<Queue>,
    pub(crate) features: u64,
    /// What the server has given for in-flight requests.
    inflight: Option<(VhostUserInflight, File)>,
}

impl Driver {
    /// Connects and starts all queues.
    pub(crate) fn start(path: &Path, queues: usize) -> Self {
        let mut driver = Self::connect(path, queues);
        driver.negotiate(|offered| offered).unwrap();
        driver.start_queues().unwrap();
        driver
    }

    /// Connects only.
    pub(crate) fn connect(path: &Path, queues: usize) -> Self {
        Self::over(UnixStream::connect(path).unwrap(), queues)
    }

    pub(crate) fn over(stream: UnixStream, queues: usize) -> Self {
        let memfd = new_memfd();
        let memory = memory_of(&memfd);
        let queue = |_| Queue {
            avail: 0,
            used: 0,
            next_descriptor: 0,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        Self {
            stream: stream.try_clone().unwrap(),
            frontend: Frontend::from_stream(stream, queues as u64),
            memory,
            memfd,
            queues: (0..queues).map(queue).collect(),
            features: 0,
            inflight: None,
        }
    }

    /// Asks for an in-flight table and sets it, as frontends do before they start rings.
    pub(crate) fn set_up_inflight(&mut self) -> vhost::Result<()> {
        let wanted = VhostUserInflight::new(0, 0, self.queues.len() as u16, SIZE);
        let (inflight, file) = self.frontend.get_inflight_fd(&wanted)?;
        self.frontend.set_inflight_fd(&inflight, file.as_raw_fd())?;
        self.inflight = Some((inflight, file));
        Ok(())
    }

    /// The same guest, if the server dies now: connected to the server at `path`, whose handshake
    /// comes to where rings are started. Memory and table are copies, so that the server that did not
    /// really die can't touch them.
    pub(crate) fn survive(&self, path: &Path) -> Self {
        let mut next = Self::connect(path, self.queues.len());
        let mut bytes = vec![0; MEMORY_LEN];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        next.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        for (new, old) in next.queues.iter_mut().zip(&self.queues) {
            (new.avail, new.used, new.next_descriptor) = (old.avail, old.used, old.next_descriptor);
        }
        next.negotiate(|offered| offered).unwrap();
        let (inflight, file) = self.inflight.as_ref().unwrap();
        let mut table = vec![0; inflight.mmap_size as usize];
        file.read_exact_at(&mut table, 0).unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy = File::from(rustix::fs::memfd_create("inflight", flags).unwrap());
        copy.write_all_at(&table, 0).unwrap();
        rustix::fs::fcntl_add_seals(&copy, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        next.frontend.set_inflight_fd(inflight, copy.as_raw_fd()).unwrap();
        next.inflight = Some((*inflight, copy));
        next
    }

    /// Sets the in-flight table that is set already.
    pub(crate) fn set_inflight_again(&mut self) {
        let (inflight, file) = self.inflight.as_ref().unwrap();
        self.frontend.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
    }

    /// The token in the in-flight table.
    pub(crate) fn token(&self) -> Uuid {
        let (_, file) = self.inflight.as_ref().unwrap();
        let mut words = [0; 16];
        file.read_exact_at(&mut words, 8).unwrap();
        let (high, low) = words.split_at(8);
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        Uuid::from_u64_pair(word(high), word(low))
    }

    /// The next chain does not begin among the first `count` descriptors.
    pub(crate) fn skip_descriptors(&mut self, queue: usize, count: u16) {
        let state = &mut self.queues[queue];
        if state.next_descriptor < count || state.next_descriptor + 3 > SIZE {
            state.next_descriptor = count;
        }
    }

    /// Says that the queue goes on at `base`, whatever the truth.
    pub(crate) fn start_queue_at(&mut self, queue: usize, base: u16) -> vhost::Result<()> {
        let avail = std::mem::replace(&mut self.queues[queue].avail, base);
        let result = self.start_queue(queue);
        self.queues[queue].avail = avail;
        result
    }

    /// Negotiates the features that `choose` takes from those offered.
    pub(crate) fn negotiate(&mut self, choose: impl Fn(u64) -> u64) -> vhost::Result<()> {
        self.frontend.set_owner()?;
        self.features = choose(self.frontend.get_features()?);
        let protocol = self.frontend.get_protocol_features()?;
        self.frontend.set_protocol_features(protocol)?;
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ));
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.frontend.set_features(self.features)?;
        self.map_memory()
    }

    fn map_memory(&self) -> vhost::Result<()> {
        self.map_memory_at(0)
    }

    /// Has the device find the guest's memory at another address than the guest does, or at 0 where it is.
    pub(crate) fn map_memory_at(&self, address: u64) -> vhost::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: address,
            memory_size: MEMORY_LEN as u64,
            userspace_addr: self.userspace(0),
            mmap_offset: 0,
            mmap_handle: self.memfd.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map(|_| ())
    }

    /// Adds or removes a region of one page, the `index`-th beyond the guest's memory.
    pub(crate) fn change_regions(&mut self, index: u64, add: bool) -> vhost::Result<()> {
        let address = MEMORY_LEN as u64 + index * 4096;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: address,
            memory_size: 4096,
            userspace_addr: address,
            mmap_offset: 0,
            mmap_handle: self.memfd.as_raw_fd(),
        };
        match add {
            true => self.frontend.add_mem_region(&region).map(|_| ()),
            false => self.frontend.remove_mem_region(&region),
        }
    }

    /// Gives the device other memory with the same contents; returns the old one.
    pub(crate) fn replace_memory(&mut self) -> Memory {
        self.replace_memory_by(new_memfd())
    }

    /// The same; the new memory is that of a file.
    pub(crate) fn replace_memory_by(&mut self, memfd: File) -> Memory {
        memfd.set_len(MEMORY_LEN as u64).unwrap();
        let memory = memory_of(&memfd);
        let mut bytes = vec![0; MEMORY_LEN];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let old = std::mem::replace(&mut self.memory, memory);
        self.memfd = memfd;
        self.map_memory().unwrap();
        for queue in 0..self.queues.len() {
            self.set_addresses(queue).unwrap();
        }
        old
    }

    fn userspace(&self, address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    fn set_addresses(&self, queue: usize) -> vhost::Result<()> {
        let at = queue as u64 * QUEUE_STRIDE;
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: self.userspace(at),
            used_ring_addr: self.userspace(at + USED),
            avail_ring_addr: self.userspace(at + AVAIL),
            log_addr: None,
        };
        self.frontend.set_vring_addr(queue, &config)
    }

    /// Starts all queues where they are.
    pub(crate) fn start_queues(&mut self) -> vhost::Result<()> {
        for queue in 0..self.queues.len() {
            self.start_queue(queue)?;
        }
        Ok(())
    }

    pub(crate) fn start_queue(&mut self, queue: usize) -> vhost::Result<()> {
        self.frontend.set_vring_num(queue, SIZE)?;
        self.frontend.set_vring_base(queue, self.queues[queue].avail)?;
        self.set_addresses(queue)?;
        self.frontend.set_vring_call(queue, &self.queues[queue].call)?;
        self.frontend.set_vring_kick(queue, &self.queues[queue].kick)?;
        self.frontend.set_vring_enable(queue, true)
    }

    /// A kick descriptor that replaces the queue's; returns the old one.
    pub(crate) fn replace_kick(&mut self, queue: usize) -> EventFd {
        let old = std::mem::replace(&mut self.queues[queue].kick, EventFd::new(0).unwrap());
        self.frontend.set_vring_kick(queue, &self.queues[queue].kick).unwrap();
        old
    }

    /// Whether the server has not read the queue's kick yet.
    pub(crate) fn kick_is_pending(&self, queue: usize) -> bool {
        is_readable(&self.queues[queue].kick, Duration::ZERO)
    }

    /// Has a read of the queue's kick wait for the next one: the server has the same open file.
    pub(crate) fn let_reads_of_the_kick_wait(&self, queue: usize) {
        rustix::fs::fcntl_setfl(fd_of(&self.queues[queue].kick), rustix::fs::OFlags::empty()).unwrap();
    }

    /// Says that the queue has no kick descriptor any more.
    pub(crate) fn take_kick(&mut self, queue: usize) {
        let words = [FrontendReq::SET_VRING_KICK as u32, 1, 8, 0x100 | queue as u32, 0];
        let bytes = words.map(u32::to_ne_bytes).concat();
        std::io::Write::write_all(&mut self.stream, &bytes).unwrap();
    }

    /// Makes a chain of `parts` available, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, parts: &[Part]) {
        let at = queue as u64 * QUEUE_STRIDE;
        let state = &mut self.queues[queue];
        let head = state.next_descriptor;
        for (number, (address, len, device_writes)) in parts.iter().enumerate() {
            let index = (head + number as u16) % SIZE;
            let next = (index + 1) % SIZE;
            let mut flags = if *device_writes { VRING_DESC_F_WRITE } else { 0 };
            if number + 1 < parts.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let slot = at + u64::from(index) * 16;
            self.memory.write_obj(*address, GuestAddress(slot)).unwrap();
            self.memory.write_obj(*len, GuestAddress(slot + 8)).unwrap();
            self.memory.write_obj(flags as u16, GuestAddress(slot + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(slot + 14)).unwrap();
        }
        state.next_descriptor = (head + parts.len() as u16) % SIZE;
        let entry = at + AVAIL + 4 + u64::from(state.avail % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        state.avail = state.avail.wrapping_add(1);
        self.set_avail(queue, state_avail(&self.queues[queue]));
    }

    /// Sets the available index to whatever a guest may set it to.
    pub(crate) fn set_avail(&self, queue: usize, index: u16) {
        let at = GuestAddress(queue as u64 * QUEUE_STRIDE + AVAIL + 2);
        self.memory.store(index.to_le(), at, Ordering::SeqCst).unwrap();
    }

    pub(crate) fn avail(&self, queue: usize) -> u16 {
        self.queues[queue].avail
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// The device's used index.
    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(queue as u64 * QUEUE_STRIDE + USED + 2);
        u16::from_le(self.memory.load(at, Ordering::SeqCst).unwrap())
    }

    /// Wants an interrupt for the next used element (with EVENT_IDX).
    fn want_interrupt(&self, queue: usize) {
        let event = GuestAddress(queue as u64 * QUEUE_STRIDE + AVAIL + 4 + u64::from(SIZE) * 2);
        self.memory.store(self.queues[queue].used.to_le(), event, Ordering::SeqCst).unwrap();
    }

    /// Has the next interrupt wait: the descriptor's counter is full, and no longer refuses what does not fit.
    pub(crate) fn jam_interrupts(&self, queue: usize) {
        let call = &self.queues[queue].call;
        let _ = call.read();
        call.write(u64::MAX - 1).unwrap();
        rustix::fs::fcntl_setfl(fd_of(call), rustix::fs::OFlags::empty()).unwrap();
        self.want_interrupt(queue);
    }

    /// Has the server wait in an interrupt of a queue that was never started, which it gives to each new descriptor: one that is
    /// full, and refuses what does not fit when it is looked at, and does not when it is written. Then hangs up.
    pub(crate) fn jam_first_interrupt(self, queue: usize) {
        let call = self.queues[queue].call.try_clone().unwrap();
        call.write(u64::MAX - 1).unwrap();
        let connection = self.stream.try_clone().unwrap();
        let (set, sets) = std::sync::mpsc::channel();
        let setter = std::thread::spawn(move || {
            while self.frontend.set_vring_call(queue, &self.queues[queue].call).is_ok() {
                let _ = set.send(());
            }
        });
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    for flags in [rustix::fs::OFlags::empty(), rustix::fs::OFlags::NONBLOCK] {
                        rustix::fs::fcntl_setfl(fd_of(&call), flags).unwrap();
                    }
                }
            });
            let start = Instant::now();
            // A setter that a busy machine has held up goes on meanwhile; one that the server keeps waiting does not.
            let waits = || sets.recv_timeout(Duration::from_secs(2)).is_err();
            while !waits() && start.elapsed() < PATIENCE {}
            ended.store(true, Ordering::Relaxed);
            assert!(!setter.is_finished() && waits(), "the server does not wait in an interrupt");
        });
        connection.shutdown(std::net::Shutdown::Both).unwrap();
        setter.join().unwrap();
    }

    /// Waits for the next used element by interrupt, and returns its length.
    pub(crate) fn wait_used(&mut self, queue: usize) -> u32 {
        let used = self.queues[queue].used;
        self.want_interrupt(queue);
        let start = Instant::now();
        while self.used_index(queue) == used {
            assert!(start.elapsed() < PATIENCE, "no answer");
            self.wait_call(queue, Duration::from_millis(100));
        }
        self.queues[queue].used = used.wrapping_add(1);
        let element = queue as u64 * QUEUE_STRIDE + USED + 4 + u64::from(used % SIZE) * 8;
        self.memory.read_obj(GuestAddress(element + 4)).unwrap()
    }

    /// Whether an interrupt comes within `limit`.
    pub(crate) fn wait_call(&self, queue: usize, limit: Duration) -> bool {
        let call = &self.queues[queue].call;
        is_readable(call, limit);
        call.read().is_ok()
    }

    /// Writes a request header at `at`.
    pub(crate) fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    }

    /// One request from start to end; returns status and used length.
    pub(crate) fn request(&mut self, queue: usize, kind: u32, sector: u64, data: Part) -> (u8, u32) {
        let at = DATA_AT + 0x20_0000 + queue as u64 * 0x1000;
        self.header(at, kind, sector);
        self.memory.write_obj(0xffu8, GuestAddress(at + 64)).unwrap();
        let mut parts = vec![(at, 16, false)];
        if data.1 > 0 {
            parts.push(data);
        }
        parts.push((at + 64, 1, true));
        self.offer(queue, &parts);
        self.kick(queue);
        let len = self.wait_used(queue);
        (self.memory.read_obj(GuestAddress(at + 64)).unwrap(), len)
    }

    pub(crate) fn write(&mut self, queue: usize, sector: u64, bytes: &[u8]) -> u8 {
        let at = DATA_AT + queue as u64 * 0x1_0000;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.request(queue, VIRTIO_BLK_T_OUT, sector, (at, bytes.len() as u32, false)).0
    }

    pub(crate) fn read(&mut self, queue: usize, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        let at = DATA_AT + queue as u64 * 0x1_0000;
        self.memory.write_slice(&vec![0xee; len], GuestAddress(at)).unwrap();
        let (status, used) = self.request(queue, VIRTIO_BLK_T_IN, sector, (at, len as u32, true));
        if status != 0 {
            return Err(status);
        }
        assert_eq!(used as usize, len + 1);
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Ok(bytes)
    }

    pub(crate) fn flush(&mut self, queue: usize) -> u8 {
        self.request(queue, VIRTIO_BLK_T_FLUSH, 0, (0, 0, false)).0
    }
}

fn fd_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Whether an event can be read, now or within `limit`.
fn is_readable(event: &EventFd, limit: Duration) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd_of(event), rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(limit).unwrap();
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
}

fn state_avail(queue: &Queue) -> u16 {
    queue.avail
}

fn new_memfd() -> File {
    let memfd = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    memfd.set_len(MEMORY_LEN as u64).unwrap();
    memfd
}

fn memory_of(memfd: &File) -> Memory {
    let backing = FileOffset::new(memfd.try_clone().unwrap(), 0);
    Memory::from_ranges_with_files([(GuestAddress(0), MEMORY_LEN, Some(backing))]).unwrap()
}
