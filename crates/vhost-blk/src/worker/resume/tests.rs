use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::inflight::{InflightTable, Shape};
use crate::worker::cost::{AVAIL, DATA, QUEUE_SIZE, Scene, USED, uncounted};

/// Bytes of each of these requests, 45 MiB: one is as much as a batch should have.
const PIECES: u16 = 3;
/// Descriptors of such a request.
const LONG: u16 = PIECES + 2;

/// A ring that starts, of which a server before has taken all that is available, by their heads, and answered none.
fn with_requests_in_flight(offer: impl FnOnce(&mut Scene) -> Vec<u16>) -> Scene {
    let mut scene = Scene::new();
    let heads = offer(&mut scene);
    assert_eq!(heads.len(), usize::from(scene.avail));
    let table = Arc::new(InflightTable::create(Shape { queues: 1, queue_size: QUEUE_SIZE }).unwrap());
    let mut queue = table.queue(0).unwrap();
    heads.into_iter().for_each(|head| queue.popped(head));
    scene.backend.set_inflight(table);
    // As Cloud Hypervisor has it, which does not look at the used ring.
    scene.vring.set_queue_next_avail(scene.avail);
    scene.vring.set_queue_ready(true);
    scene
}

fn used(scene: &Scene) -> u16 {
    scene.memory.read_obj(GuestAddress(USED + 2)).unwrap()
}

#[track_caller]
fn serve_until(scene: &Scene, is_done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain");
        uncounted(&scene.backend, &scene.vring);
    }
}

fn long(scene: &mut Scene) -> Vec<u16> {
    let heads: Vec<u16> = (0..8).map(|n| n * LONG).collect();
    heads.iter().for_each(|head| scene.offer_long_at(*head, VIRTIO_BLK_T_IN, 0, PIECES));
    heads
}

/// Frontends replace memory while rings run: the ring may not be there when it is first looked at. What was in flight is not forgotten
/// for that.
#[test]
fn requests_in_flight_are_done_again_when_the_ring_is_in_memory() {
    for used_at in [USED, USED_AWAY] {
        assert_done_again_when_in_memory(used_at);
    }
}

/// Where the used ring may lie, in memory that stays.
const USED_AWAY: u64 = DATA + 0x80_0000;

fn assert_done_again_when_in_memory(used_at: u64) {
    let mut scene = with_requests_in_flight(|scene| {
        scene.offer(VIRTIO_BLK_T_OUT, 0..5);
        (0..5).map(|n| 3 * n).collect()
    });
    scene.vring.set_queue_info(0, AVAIL, used_at).unwrap();
    let used = |scene: &Scene| scene.memory.read_obj::<u16>(GuestAddress(used_at + 2)).unwrap();
    let whole = scene.memory.clone();
    let (without, _) = whole.remove_region(GuestAddress(0), DATA).unwrap();
    scene.backend.shared_memory().lock().unwrap().replace(without);
    scene.backend.serve_queue(0, &scene.vring);
    assert_eq!(used(&scene), 0, "answered, whatever was asked for");
    scene.backend.shared_memory().lock().unwrap().replace(whole);
    serve_until(&scene, || used(&scene) == 5);
    assert_eq!(scene.status(), 0);
    // And it goes on with what comes.
    scene.offer(VIRTIO_BLK_T_IN, 0..32);
    serve_until(&scene, || used(&scene) == 37);
}

/// What a frontend can have the server hold or do at a time does not grow with what it says was in flight.
#[test]
fn requests_in_flight_are_done_again_batch_by_batch() {
    let scene = with_requests_in_flight(long);
    let left = |scene: &Scene| scene.backend.worker(0).unwrap().again.len();
    scene.backend.worker(0).unwrap().pass(&scene.backend.device, &scene.vring);
    assert_eq!(left(&scene), 6);
    assert_eq!(scene.vring.lock().get_queue().next_avail(), 8);
    serve_until(&scene, || used(&scene) == 8);
    assert_eq!(left(&scene), 0);
}

/// The position of a ring that is stopped says that all before it is answered: what was still to be done again, too.
#[test]
fn ring_that_is_stopped_has_done_again_what_was_in_flight() {
    let scene = with_requests_in_flight(long);
    let mut worker = scene.backend.worker(0).unwrap();
    worker.pass(&scene.backend.device, &scene.vring);
    assert!(used(&scene) < 8);
    worker.drain(&scene.backend.device, Some(&scene.vring));
    assert_eq!(used(&scene), 8);
}
