//! Interrupts that are put off.

use std::fs::File;

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;
use vm_memory::{Bytes, GuestAddress};

use super::cost::{AVAIL, QUEUE_SIZE, Scene, USED, uncounted};

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
        worker.pass(&scene.backend.device, &scene.vring);
        assert!(worker.untold.is_some());
    }
    scene.vring.set_kick(Some(event()));
    scene.vring.set_queue_ready(true);
    scene.backend.serve_queue(0, &scene.vring);
    assert_eq!(used(&scene), scene.avail);
    assert!(told(), "the guest sleeps for ever");
}
