//! Interrupts that are put off, and memory that is added while the ring is looked at.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::request::Memory;

use super::cost::{AVAIL, DATA, QUEUE_SIZE, Scene, USED, uncounted};

fn event() -> File {
    File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap())
}

/// A guest that sleeps is told of what was answered before the ring's kick was replaced, which looks like
/// a start of the ring, even if all that follows is beyond the event that it waits for.
#[test]
fn answer_before_the_kick_is_replaced_is_told_of_afterwards() {
    let mut scene = Scene::new();
    // Until requests are known to be done at once, and taken in groups.
    for _ in 0..3 {
        scene.offer(VIRTIO_BLK_T_OUT, 0..32);
        scene.serve(uncounted);
    }
    scene.vring.set_kick(Some(event()));
    scene.vring.set_queue_ready(true);
    let call = event();
    scene.vring.set_call(Some(call.try_clone().unwrap()));
    let told = || rustix::io::read(&call, &mut [0u8; 8]).is_ok();
    told();
    let used = |scene: &Scene| scene.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    // The guest sleeps until the next answer.
    let event_at = GuestAddress(AVAIL + 4 + u64::from(QUEUE_SIZE) * 2);
    scene.memory.write_obj(used(&scene), event_at).unwrap();
    scene.offer(VIRTIO_BLK_T_OUT, 0..32);
    {
        let mut worker = scene.backend.worker(0).unwrap();
        worker.interrupts.put_off();
        worker.pass(&scene.backend.device, &scene.vring);
        assert!(worker.interrupts.has_untold());
    }
    scene.vring.set_kick(Some(event()));
    scene.vring.set_queue_ready(true);
    scene.backend.serve_queue(0, &scene.vring);
    assert_eq!(used(&scene), scene.avail);
    assert!(told(), "the guest sleeps for ever");
}

/// An append may take longer than a write: first touches of several groups share one.
#[test]
fn first_touches_of_several_groups_are_logged_with_one_append() {
    let mut scene = Scene::new();
    let used = |scene: &Scene| scene.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    // Every other block: no two make one run.
    let first_touches = |round: u64| (0..32).map(move |n| round * 64 + n * 2);
    for round in 0..3 {
        scene.offer(VIRTIO_BLK_T_OUT, first_touches(round));
        scene.serve(uncounted);
    }
    let (answered, appended) = (used(&scene), scene.appends());
    scene.offer(VIRTIO_BLK_T_OUT, first_touches(3));
    let taken = {
        let mut worker = scene.backend.worker(0).unwrap();
        let group = worker.interrupts.group();
        worker.pass(&scene.backend.device, &scene.vring);
        (group * 4).min(32)
    };
    assert!(taken > 1);
    assert_eq!(usize::from(used(&scene).wrapping_sub(answered)), taken);
    assert_eq!(scene.appends() - appended, 1);
}

/// Frontends add memory while rings run (`blkio` has its data in memory that it adds after the start): a
/// request that became available after its memory was added finds it, whenever the worker looks.
#[test]
fn request_in_memory_that_was_just_added_is_done() {
    let mut scene = Scene::new();
    let whole = scene.memory.clone();
    let (without, _) = whole.remove_region(GuestAddress(DATA), Scene::DATA_LEN as u64).unwrap();
    let of_device = scene.backend.shared_memory();
    let (stop, vring) = (AtomicBool::new(false), scene.vring.clone());
    let backend = std::sync::Arc::clone(&scene.backend);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                backend.serve_queue(0, &vring);
            }
        });
        for _ in 0..20_000 {
            of_device.lock().unwrap().replace(without.clone());
            std::thread::yield_now();
            of_device.lock().unwrap().replace(whole.clone());
            scene.offer(VIRTIO_BLK_T_OUT, 0..1);
            while scene.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != scene.avail {
                std::thread::yield_now();
            }
            if scene.status() != 0 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(scene.status(), 0, "the worker has looked for the data in older memory");
}

/// UEFI firmware heeds no limits, and reads what it boots with one request: 45 MiB are not refused. It begins within a block, and some of
/// it was never written.
#[test]
fn request_beyond_all_limits_is_done_in_parts() {
    const SECTOR: u64 = 3;
    let mut scene = Scene::new();
    let data: Vec<u8> = (0..Scene::DATA_LEN as u64 / 8).flat_map(|n| (n * 0x9e37).to_le_bytes()).collect();
    scene.memory.write_slice(&data, GuestAddress(DATA)).unwrap();
    let done = |scene: &mut Scene, kind, pieces: u16| {
        scene.offer_long(kind, SECTOR, pieces);
        while scene.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != scene.avail {
            uncounted(&scene.backend, &scene.vring);
        }
        let len = scene.memory.read_obj::<u32>(GuestAddress(USED + 8 * u64::from(scene.avail))).unwrap();
        (scene.status(), len)
    };
    assert_eq!(done(&mut scene, VIRTIO_BLK_T_OUT, 3), (0, 1));
    let mut bytes = vec![0; data.len()];
    for piece in 0..3 {
        let offset = SECTOR * 512 + piece * data.len() as u64;
        scene.disk().read_exact_at(&mut bytes, offset).unwrap();
        assert!(bytes == data, "piece {piece} of what was written");
    }
    scene.memory.write_slice(&vec![0xee; data.len()], GuestAddress(DATA)).unwrap();
    assert_eq!(done(&mut scene, VIRTIO_BLK_T_IN, 3), (0, 3 * data.len() as u32 + 1));
    scene.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert!(bytes == data, "what was read is not what was written");
}

/// A ring whose used ring lies in the region at [`DATA`], which is not there, and that has answered three requests.
fn with_answers_that_wait() -> Scene {
    let mut scene = Scene::new();
    scene.vring.set_queue_info(0, AVAIL, USED_AWAY).unwrap();
    let (without, _) = scene.memory.remove_region(GuestAddress(DATA), Scene::DATA_LEN as u64).unwrap();
    scene.backend.shared_memory().lock().unwrap().replace(without);
    scene.offer(VIRTIO_BLK_T_IN, 0..3);
    scene.backend.serve_queue(0, &scene.vring);
    scene
}

const USED_AWAY: u64 = DATA + 0x80_0000;

fn used_away(scene: &Scene) -> u16 {
    scene.memory.read_obj(GuestAddress(USED_AWAY + 2)).unwrap()
}

fn waiting(scene: &Scene) -> usize {
    scene.backend.worker(0).unwrap().answers.len()
}

/// Frontends take memory away and add it again while rings run. Invariant 8: no more is taken meanwhile.
#[test]
fn answers_that_cannot_be_published_are_when_the_memory_is_there_again() {
    let mut scene = with_answers_that_wait();
    assert_eq!(waiting(&scene), 3);
    scene.offer(VIRTIO_BLK_T_IN, 0..32);
    scene.backend.serve_queue(0, &scene.vring);
    assert_eq!((waiting(&scene), used_away(&scene)), (3, 0));
    scene.backend.shared_memory().lock().unwrap().replace(scene.memory.clone());
    scene.backend.serve_queue(0, &scene.vring);
    assert_eq!((waiting(&scene), used_away(&scene)), (0, scene.avail));
    let head = |index: u64| scene.memory.read_obj::<u32>(GuestAddress(USED_AWAY + 4 + 8 * index)).unwrap();
    assert_eq!([0, 1, 2, 3].map(head), [0, 3, 6, 0]);
}

/// A ring that starts again has nothing to do with them.
#[test]
fn answers_that_cannot_be_published_are_dropped_when_the_ring_is_stopped() {
    let scene = with_answers_that_wait();
    scene.backend.stop_vring(0).unwrap();
    assert_eq!(waiting(&scene), 0);
}

/// A guest that sleeps must wake, when nobody can tell what it has asked for.
#[test]
fn guest_that_cannot_be_asked_is_interrupted() {
    let mut scene = Scene::new();
    // Until requests are known to be done at once, and taken in groups.
    for _ in 0..3 {
        scene.offer(VIRTIO_BLK_T_OUT, 0..32);
        scene.serve(uncounted);
    }
    let call = event();
    scene.vring.set_call(Some(call.try_clone().unwrap()));
    let told = || rustix::io::read(&call, &mut [0u8; 8]).is_ok();
    assert!(told());
    scene.offer(VIRTIO_BLK_T_OUT, 0..32);
    let mut worker = scene.backend.worker(0).unwrap();
    worker.interrupts.put_off();
    worker.pass(&scene.backend.device, &scene.vring);
    assert!(worker.interrupts.has_untold() && !told());
    scene.backend.shared_memory().lock().unwrap().replace(Memory::new());
    worker.tell(&scene.backend.device, &scene.vring);
    assert!(told());
}

/// What a guest can have the server hold or do at a time does not grow with the length of its requests.
#[test]
fn batch_ends_with_so_many_bytes() {
    let mut scene = Scene::new();
    for _ in 0..8 {
        scene.offer_long(VIRTIO_BLK_T_IN, 0, 3);
    }
    scene.backend.worker(0).unwrap().pass(&scene.backend.device, &scene.vring);
    // 45 MiB each.
    assert_eq!(scene.vring.lock().get_queue().next_avail(), 2);
    while scene.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != scene.avail {
        uncounted(&scene.backend, &scene.vring);
    }
    assert_eq!(scene.status(), 0);
}
