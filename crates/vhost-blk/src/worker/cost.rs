//! What requests cost in instructions, for `ci/instructions`, which runs these tests one by one under
//! `valgrind --tool=callgrind` and counts what is executed inside of [`counted`]: the worker on a real
//! session disk, from the available ring to the used ring. The kernel's part is not counted, nor the
//! clock's.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use session_disk::{DiskOptions, ProvisionOptions, SessionDisk, provision};
use vhost_user_backend::VringT;
use virtio_bindings::{
    virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT},
    virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE},
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    backend::Backend,
    config::DeviceConfig,
    interrupts::IS_COUNTED,
    poll::Polling,
    request::Memory,
    vring::{SharedMemory, Vring},
};

/// Requests at a time.
const DEPTH: u16 = 32;
/// How often so many are made. `ci/instructions` divides by the product.
const ROUNDS: u16 = 64;
pub(super) const QUEUE_SIZE: u16 = 128;
const LEN: u32 = 4096;
/// As many blocks as requests, each of which goes to another.
const BLOCKS: u64 = DEPTH as u64 * ROUNDS as u64;
/// Size of the disk in bytes: what a request costs must not depend on it, and would if anything were looked for
/// in all of a set.
const DISK_SIZE: u64 = 64 << 30;

pub(super) const AVAIL: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x4000;
pub(super) const DATA: u64 = 0x10_0000;

/// A guest's driver and the device's worker, on the same thread.
pub(super) struct Scene {
    pub(super) memory: Memory,
    pub(super) vring: Vring,
    pub(super) backend: Arc<Backend>,
    /// The available index.
    pub(super) avail: u16,
    dir: tempfile::TempDir,
}

impl Scene {
    /// Bytes of the region at [`DATA`].
    pub(super) const DATA_LEN: usize = 15 << 20;

    /// The file that is served.
    pub(super) fn disk(&self) -> std::fs::File {
        std::fs::File::open(self.dir.path().join("disk.raw")).unwrap()
    }

    /// The status of the first request.
    pub(super) fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// How many times something was appended to the session's write log.
    pub(super) fn appends(&self) -> usize {
        let sessions = self.dir.path().join("disk.raw.pristine/sessions");
        let log = std::fs::read_dir(sessions).unwrap().next().unwrap().unwrap();
        // Frames of the log begin with this (crates/write-log/FORMAT.md).
        std::fs::read(log.path()).unwrap().windows(3).filter(|bytes| bytes == b"wlf").count()
    }

    pub(super) fn new() -> Self {
        Self::with(|_| ())
    }

    /// With other options for its disk.
    fn with(change: impl FnOnce(&mut DiskOptions)) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![7; (BLOCKS * u64::from(LEN)) as usize]).unwrap();
        let mut options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            ..DiskOptions::new(dir.path().join("disk.raw"))
        };
        let provisioned =
            ProvisionOptions { size: Some(DISK_SIZE), ..ProvisionOptions::new(base, options.clone()) };
        provision(&provisioned).unwrap();
        change(&mut options);
        let disk = SessionDisk::open(&options).unwrap();
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        disk.begin_session(None).unwrap();
        let config = DeviceConfig {
            num_queues: 1,
            queue_size: QUEUE_SIZE,
            polling: Polling::Fixed(Duration::ZERO),
            ..DeviceConfig::default()
        };
        let backend = Arc::new(Backend::new(&disk, config).unwrap());
        backend.open_queue(&disk, 0).unwrap();
        let data = (GuestAddress(DATA), Self::DATA_LEN);
        let memory = Memory::from_ranges(&[(GuestAddress(0), DATA as usize), data]).unwrap();
        backend.shared_memory().lock().unwrap().replace(memory.clone());
        let vring = Vring::new(SharedMemory::new(memory.clone()), QUEUE_SIZE).unwrap();
        vring.set_queue_size(QUEUE_SIZE);
        vring.set_queue_info(0, AVAIL, USED).unwrap();
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Self { memory, vring, backend, avail: 0, dir }
    }

    /// Makes requests of `kind` available that begin at these blocks.
    pub(super) fn offer(&mut self, kind: u32, blocks: impl Iterator<Item = u64>) {
        let device_writes = if kind == VIRTIO_BLK_T_IN { VRING_DESC_F_WRITE } else { 0 };
        for (slot, block) in (0u16..).zip(blocks) {
            let at = |start: u64, stride: u64| start + u64::from(slot) * stride;
            let header = at(HEADERS, 16);
            self.header(header, kind, block * u64::from(LEN) / 512);
            let parts = [
                (header, 16, VRING_DESC_F_NEXT),
                (at(DATA, LEN.into()), LEN, device_writes | VRING_DESC_F_NEXT),
                (at(STATUS, 1), 1, VRING_DESC_F_WRITE),
            ];
            self.chain(slot * 3, parts.into_iter());
        }
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2)).unwrap();
    }

    /// Makes a request of `kind` available whose data has so many pieces, each of them all of the memory for data.
    pub(super) fn offer_long(&mut self, kind: u32, sector: u64, pieces: u16) {
        self.offer_long_at(0, kind, sector, pieces);
    }

    /// The same, in the descriptors from `head` on.
    pub(super) fn offer_long_at(&mut self, head: u16, kind: u32, sector: u64, pieces: u16) {
        self.header(HEADERS, kind, sector);
        let device_writes = if kind == VIRTIO_BLK_T_IN { VRING_DESC_F_WRITE } else { 0 };
        let piece = (DATA, Self::DATA_LEN as u32, device_writes | VRING_DESC_F_NEXT);
        let parts = std::iter::once((HEADERS, 16, VRING_DESC_F_NEXT))
            .chain(std::iter::repeat_n(piece, pieces.into()))
            .chain([(STATUS, 1, VRING_DESC_F_WRITE)]);
        self.chain(head, parts);
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    }

    /// Makes a chain of these descriptors (address, length, flags), the first of which is `head`, and puts it into the available
    /// ring.
    fn chain(&mut self, head: u16, parts: impl Iterator<Item = (u64, u32, u32)>) {
        for (index, (address, len, flags)) in (head..).zip(parts) {
            let descriptor = GuestAddress(u64::from(index) * 16);
            self.memory.write_obj(address, descriptor).unwrap();
            let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
            self.memory.write_obj(rest, GuestAddress(descriptor.0 + 8)).unwrap();
        }
        let entry = AVAIL + 4 + u64::from(self.avail % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail = self.avail.wrapping_add(1);
    }

    /// Answers everything, and makes sure of it.
    pub(super) fn serve(&mut self, count: impl Fn(&Backend, &Vring)) {
        count(&self.backend, &self.vring);
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != self.avail {
            uncounted(&self.backend, &self.vring);
        }
        let mut status = [0xff; DEPTH as usize];
        self.memory.read_slice(&mut status, GuestAddress(STATUS)).unwrap();
        assert_eq!(status, [0; DEPTH as usize]);
    }

    /// All rounds, each of [`DEPTH`] blocks spread over the disk.
    fn rounds(&mut self, kind: u32, count: impl Fn(&Backend, &Vring)) {
        IS_COUNTED.store(true, Ordering::Relaxed);
        for round in 0..u64::from(ROUNDS) {
            self.offer(kind, (0..u64::from(DEPTH)).map(|n| n * u64::from(ROUNDS) + round));
            self.serve(&count);
        }
    }
}

/// What is counted.
#[inline(never)]
fn counted(backend: &Backend, vring: &Vring) {
    backend.serve_queue(0, vring);
}

pub(super) fn uncounted(backend: &Backend, vring: &Vring) {
    backend.serve_queue(0, vring);
}

#[test]
#[ignore = "for ci/instructions"]
fn cost_of_a_read() {
    let mut scene = Scene::new();
    scene.rounds(VIRTIO_BLK_T_IN, uncounted);
    scene.rounds(VIRTIO_BLK_T_IN, counted);
}

#[test]
#[ignore = "for ci/instructions"]
fn cost_of_a_first_write() {
    let mut scene = Scene::new();
    scene.rounds(VIRTIO_BLK_T_OUT, counted);
}

#[test]
#[ignore = "for ci/instructions"]
fn cost_of_a_later_write() {
    let mut scene = Scene::new();
    scene.rounds(VIRTIO_BLK_T_OUT, uncounted);
    scene.rounds(VIRTIO_BLK_T_OUT, counted);
}

#[cfg(feature = "bench-without-log")]
#[test]
#[ignore = "for ci/instructions"]
fn cost_of_a_later_write_without_log() {
    let mut scene = Scene::with(|options| options.without_log = true);
    scene.rounds(VIRTIO_BLK_T_OUT, uncounted);
    scene.rounds(VIRTIO_BLK_T_OUT, counted);
    assert_eq!(scene.appends(), 0);
}
