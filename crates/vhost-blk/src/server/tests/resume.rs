//! A server that dies or is restarted under a living VM.

use super::*;
use crate::testing::Part;

/// A server of a disk whose session was left open by a server before.
fn successor(token: uuid::Uuid) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = Socket::bind(&path, SocketPermissions::default()).unwrap();
    Running::of(MemoryDisk::in_session(DISK_LEN, token), socket, directory, path, |_| {})
}

/// Invariant 3: the owner of a session, of which nothing is known but its token, comes to a server to which another frontend is
/// connected that starts nothing.
#[test]
fn owner_is_served_although_another_one_was_there_before() {
    let server = Running::new(|_| {});
    let mut driver = start_with_inflight(&server);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = Socket::bind(&path, SocketPermissions::default()).unwrap();
    let disk = MemoryDisk::in_session(DISK_LEN, driver.token());
    let next = Running::of(disk, socket, directory, path, |config| config.reconnect_grace = PATIENCE);
    let mut idle = Driver::connect(&next.path, 2);
    idle.negotiate(|offered| offered).unwrap();
    // As the owner does, until it is served.
    wait_until("an answer", || Driver::connect(&next.path, 2).negotiate(|offered| offered).is_ok());
    next.wait_for_count("left, open: true", 2);
    let mut driver = driver.survive(&next.path);
    driver.start_queue_at(0, 1).unwrap();
    assert_eq!(driver.write(0, 8, &[2; 512]), 0);
    assert!(!next.events.all().iter().any(|event| event.starts_with("end")));
}

/// Makes a write of `byte` to `sector` available, and waits for nothing.
fn offer_write(driver: &mut Driver, number: u64, sector: u64, byte: u8) {
    let (data, header) = (DATA_AT + number * 0x1000, DATA_AT + 0x20_0000 + number * 0x100);
    driver.memory.write_slice(&[byte; 512], GuestAddress(data)).unwrap();
    driver.header(header, VIRTIO_BLK_T_OUT, sector);
    let parts: [Part; 3] = [(header, 16, false), (data, 512, false), (header + 64, 1, true)];
    driver.offer(0, &parts);
}

fn start_with_inflight(server: &Running) -> Driver {
    let mut driver = Driver::connect(&server.path, 2);
    driver.negotiate(|offered| offered).unwrap();
    driver.set_up_inflight().unwrap();
    driver.start_queues().unwrap();
    driver
}

/// Invariant 3: what was taken and not answered is done again, in its order and before anything else,
/// whatever the frontend says of the ring: QEMU names the used index, Cloud Hypervisor the available one.
#[test]
fn requests_that_a_dead_server_had_taken_are_done_again_in_order() {
    // More than the ring has room for are answered before.
    for base in [20, 23] {
        let server = Running::new(|_| {});
        let mut driver = start_with_inflight(&server);
        (0..20).for_each(|_| assert_eq!(driver.write(0, 0, &[1; 512]), 0));
        server.disk.hold(true);
        offer_write(&mut driver, 1, 8, 2);
        offer_write(&mut driver, 2, 8, 3);
        driver.kick(0);
        wait_until("both writes are in flight", || server.disk.in_flight() == 2);
        let next = successor(driver.token());
        let mut driver = driver.survive(&next.path);
        // Not seen by the server that died.
        offer_write(&mut driver, 3, 16, 4);
        driver.start_queue_at(0, base).unwrap();
        (0..3).for_each(|_| assert_eq!(driver.wait_used(0), 1));
        assert_eq!(next.disk.bytes()[8 * 512..9 * 512], [3; 512]);
        // The one that was answered is not done again.
        assert_eq!(next.disk.bytes()[..512], [0; 512]);
        assert_eq!(driver.read(0, 16, 512), Ok(vec![4; 512]));
        assert_eq!(next.events.all(), Vec::<String>::new());
        server.disk.hold(false);
    }
}

/// Invariant 3: what a server that stops could not do any more is not failed, but done by the next one.
#[test]
fn requests_that_a_server_has_left_are_done_by_the_next() {
    let server = Running::new(|_| {});
    let mut driver = start_with_inflight(&server);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    server.disk.end_io(Outcome::Left);
    server.disk.hold_at(8 * 512);
    offer_write(&mut driver, 1, 8, 2);
    offer_write(&mut driver, 2, 24, 3);
    driver.kick(0);
    wait_until("the second one was left", || server.disk.left() == 1);
    server.disk.end_io(Outcome::Done);
    driver.skip_descriptors(0, 3);
    // One that is done after them is answered, and only that.
    assert_eq!(driver.write(0, 16, &[4; 512]), 0);
    assert_eq!(driver.used_index(0), 2);
    let next = successor(driver.token());
    let mut driver = driver.survive(&next.path);
    driver.start_queue_at(0, 2).unwrap();
    (0..2).for_each(|_| assert_eq!(driver.wait_used(0), 1));
    let bytes = next.disk.bytes();
    assert_eq!([8, 24, 16].map(|sector| bytes[sector * 512]), [2, 3, 0]);
    server.disk.hold(false);
}

/// Without a table nobody would ever do them: they fail.
#[test]
fn requests_that_a_server_has_left_fail_where_the_next_would_not_know_of_them() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.end_io(Outcome::Left);
    assert_eq!(u32::from(driver.write(0, 8, &[1; 512])), VIRTIO_BLK_S_IOERR);
    server.disk.end_io(Outcome::Done);
    assert_eq!(driver.write(0, 8, &[1; 512]), 0);
}

/// Invariant 3: a ring that was stopped and started over one connection goes on where it was.
#[test]
fn ring_with_an_inflight_table_goes_on_after_a_stop() {
    let server = Running::new(|_| {});
    let mut driver = start_with_inflight(&server);
    for round in 1..40 {
        assert_eq!(driver.write(0, round, &[round as u8; 512]), 0);
        if round % 10 == 0 {
            let base = driver.frontend.get_vring_base(0).unwrap();
            assert_eq!(base, u32::from(driver.avail(0)));
            driver.start_queue_at(0, base as u16).unwrap();
        }
    }
    assert_eq!(server.events.all(), ["start 1"]);
}

/// Invariant 3: one slow request among many that are taken later and answered before it.
#[test]
fn request_that_was_overtaken_by_more_than_a_ringful_is_done_again_alone() {
    let server = Running::new(|_| {});
    let mut driver = start_with_inflight(&server);
    server.disk.hold_at(8 * 512);
    offer_write(&mut driver, 1, 8, 2);
    driver.kick(0);
    wait_until("the write is in flight", || server.disk.in_flight() == 1);
    // Descriptors of the one in flight stay its own: these go round in the others.
    for round in 0..40u8 {
        driver.skip_descriptors(0, 3);
        assert_eq!(driver.write(0, 100, &[round; 512]), 0);
    }
    let next = successor(driver.token());
    let mut driver = driver.survive(&next.path);
    driver.start_queue_at(0, 40).unwrap();
    assert_eq!(driver.wait_used(0), 1);
    let bytes = next.disk.bytes();
    assert_eq!((bytes[8 * 512], bytes[100 * 512]), (2, 0));
    assert_eq!(driver.read(0, 8, 512), Ok(vec![2; 512]));
    server.disk.hold(false);
}

/// Invariant 3: answers that the guest was not told of, because the server died in between, are told.
#[test]
fn guest_of_a_server_that_died_is_interrupted_once_in_any_case() {
    let server = Running::new(|_| {});
    let mut driver = start_with_inflight(&server);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    let next = successor(driver.token());
    let mut driver = driver.survive(&next.path);
    driver.start_queue_at(0, 1).unwrap();
    assert!(driver.wait_call(0, PATIENCE));
}

/// Invariant 3: an upgrade. The frontend stays connected, and gets the answers that it asks for with
/// REPLY_ACK: without them Cloud Hypervisor would wait for ever. And none that it did not ask for.
#[test]
fn frontend_that_was_handed_over_gets_its_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut config = ServerConfig { hand_over: true, ..ServerConfig::default() };
    config.device.num_queues = 2;
    let server = |disk: Arc<MemoryDisk>| {
        let socket = Socket::bind(&path, SocketPermissions::default()).unwrap();
        Server::with_disk(Arc::new(disk), socket, config.clone(), Arc::new(Events::default())).unwrap()
    };
    let mut first = server(MemoryDisk::new(DISK_LEN));
    let stop = first.stop_handle();
    let first = std::thread::spawn(move || first.run().map(|_| first.hand_over()));
    let mut driver = Driver::connect(&path, 2);
    driver.negotiate(|offered| offered).unwrap();
    // Another region of the same file.
    driver.change_regions(1, true).unwrap();
    driver.set_up_inflight().unwrap();
    driver.start_queues().unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    stop.stop();
    let handover = first.join().unwrap().unwrap().expect("the frontend was not left connected");
    let mut next = server(MemoryDisk::in_session(DISK_LEN, driver.token()));
    next.take_over(HandOver::from_fds(handover.into_fds().unwrap()).unwrap());
    let stop = next.stop_handle();
    let next = std::thread::spawn(move || next.run());
    let (done, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        driver.frontend.set_vring_enable(1, false).unwrap();
        driver.frontend.set_vring_enable(1, true).unwrap();
        assert_eq!(driver.frontend.get_features().unwrap(), driver.features);
        assert_eq!(driver.write(1, 0, &[2; 512]), 0);
        assert_eq!(driver.read(0, 0, 512), Ok(vec![2; 512]));
        done.send(()).unwrap();
    });
    answered.recv_timeout(PATIENCE).expect("the frontend was not answered");
    stop.stop();
    assert!(matches!(next.join().unwrap(), Ok(Exit::Stopped)));
}

/// Invariant 2: a guest whose session has ended is not served in another one.
#[test]
fn frontend_with_the_table_of_a_session_that_is_over_is_refused() {
    let server = Running::new(|_| {});
    let driver = start_with_inflight(&server);
    let mut late = {
        let other = Running::new(|_| {});
        let late = driver.survive(&other.path);
        assert_eq!(late.used_index(0), 0);
        (other, late)
    };
    // Its rings look fresh, as they do once in 65,536 requests.
    let _ = late.1.start_queue_at(0, 0);
    late.0.wait_for("refused: its rings are not fresh");
    assert!(!late.0.disk.bytes().iter().any(|byte| *byte != 0));
}

/// Invariant 8: what is no table of ours closes the connection, with a reason.
#[test]
fn frontend_with_an_impossible_inflight_table_is_refused() {
    let server = Running::new(|_| {});
    let mut driver = Driver::connect(&server.path, 2);
    driver.negotiate(|offered| offered).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let claim = vhost::vhost_user::message::VhostUserInflight::new(1 << 20, 0, 2, 16);
    let _ = driver.frontend.set_inflight_fd(&claim, std::os::fd::AsRawFd::as_raw_fd(&file));
    server.wait_for("refused: its in-flight buffer");
    let mut driver = Driver::connect(&server.path, 2);
    driver.negotiate(|offered| offered).unwrap();
    let claim = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 400, 16);
    assert!(driver.frontend.get_inflight_fd(&claim).is_err());
}

/// A VM in another pid namespace that came too early gets a session of its own when the grace of the
/// unknown owner is over, with the table that it was given the first time.
#[test]
fn frontend_that_was_refused_before_its_first_ring_is_welcome_later() {
    let server = successor(uuid::Uuid::new_v4());
    let mut driver = Driver::connect(&server.path, 2);
    driver.negotiate(|offered| offered).unwrap();
    driver.set_up_inflight().unwrap();
    let _ = driver.start_queues();
    server.wait_for("refused: the session of a VM that can't be watched is open");
    server.wait_for("end 1");
    let mut driver = driver.survive(&server.path);
    driver.start_queues().unwrap();
    server.wait_for("start 2");
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

/// The same for one whose session could not begin, for want of room.
#[test]
fn frontend_whose_session_could_not_begin_is_welcome_later() {
    let full = Running::new(|_| {});
    full.disk.refuse_sessions();
    let mut driver = Driver::connect(&full.path, 2);
    driver.negotiate(|offered| offered).unwrap();
    driver.set_up_inflight().unwrap();
    let _ = driver.start_queues();
    full.wait_for("refused: no session can begin");
    let server = Running::new(|_| {});
    let mut driver = driver.survive(&server.path);
    driver.start_queues().unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    // A pause of the VM: the rings are stopped, and started with the same table.
    let base = driver.frontend.get_vring_base(0).unwrap();
    driver.set_inflight_again();
    driver.start_queue_at(0, base as u16).unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    assert_eq!(server.events.all(), ["start 1"]);
}
