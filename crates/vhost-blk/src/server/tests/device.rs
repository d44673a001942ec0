//! The device behind a running server: requests, rings, memory.

use rustix::fs::{FallocateFlags, MemfdFlags};

use super::*;
use crate::connection::TEARDOWN_MAX;
use crate::regions::REGIONS_MAX;

#[test]
fn server_of_a_frontend_reads_what_was_written_through_any_queue() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 2);
    for (round, queue) in [0, 1, 0, 1].into_iter().enumerate() {
        let data = vec![round as u8 + 1; 8192 + 512 * round];
        assert_eq!(driver.write(queue, 7 + 100 * round as u64, &data), 0);
        assert_eq!(driver.read(1 - queue, 7 + 100 * round as u64, data.len()), Ok(data));
    }
    assert_eq!(driver.flush(0), 0);
    assert_eq!((server.disk.flushes(), server.disk.durable_writes()), (1, 0));
    assert_eq!(server.disk.owner(), Some(ProcessId::own()));
    assert_eq!(server.events.all(), ["start 1"]);
}

#[test]
fn server_without_event_index_and_without_polling_answers_too() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered & !(1 << VIRTIO_RING_F_EVENT_IDX)).unwrap();
    driver.start_queues().unwrap();
    for round in 0..50 {
        assert_eq!(driver.write(0, round, &[round as u8; 512]), 0);
        assert_eq!(driver.read(0, round, 512), Ok(vec![round as u8; 512]));
    }
}

#[test]
fn get_id_answers_the_disks_serial() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.request(0, VIRTIO_BLK_T_GET_ID, 0, (DATA_AT, 20, true)), (0, 21));
    let mut serial = [0; 20];
    driver.memory.read_slice(&mut serial, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(serial, MemoryDisk::SERIAL);
}

#[test]
fn discard_and_write_zeroes_of_several_segments_are_done_before_the_answer() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    for (kind, flags) in [(VIRTIO_BLK_T_DISCARD, 0u32), (VIRTIO_BLK_T_WRITE_ZEROES, 1)] {
        assert_eq!(driver.write(0, 0, &[0x77; 16384]), 0);
        let at = DATA_AT + 0x8_0000;
        for (segment, sector) in [8u64, 16, 24].into_iter().enumerate() {
            let slot = at + segment as u64 * 16;
            driver.memory.write_obj(sector, GuestAddress(slot)).unwrap();
            driver.memory.write_obj(4u32, GuestAddress(slot + 8)).unwrap();
            driver.memory.write_obj(flags, GuestAddress(slot + 12)).unwrap();
        }
        assert_eq!(driver.request(0, kind, 0, (at, 48, false)), (0, 1));
        let bytes = server.disk.bytes();
        for sector in 0..32 {
            let zero = sector >= 8 && sector % 8 < 4;
            assert_eq!(bytes[sector * 512] == 0, zero, "sector {sector}");
        }
    }
}

/// Invariant 6, as far as it is seen here: an I/O error of the disk is one of the guest.
#[test]
fn disk_error_becomes_the_guests_io_error() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.end_io(Outcome::Failed);
    assert_eq!(driver.write(0, 0, &[1; 512]), 1);
    server.disk.end_io(Outcome::Done);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

/// Invariant 8.
#[test]
fn guest_mistakes_are_answered_and_the_queue_goes_on() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    let sectors = (DISK_LEN / 512) as u64;
    assert_eq!(driver.read(0, sectors, 512), Err(1));
    assert_eq!(driver.read(0, u64::MAX, 512), Err(1));
    assert_eq!(driver.read(0, (1 << 55) + 1, 512), Err(1));
    assert_eq!(driver.read(0, sectors - 1, 1024), Err(1));
    assert_eq!(driver.read(0, 0, 100), Err(1));
    assert_eq!(driver.request(0, VIRTIO_BLK_T_IN, 0, (u64::MAX - 100, 512, true)), (1, 1));
    assert_eq!(driver.request(0, VIRTIO_BLK_T_OUT, 0, (0x4000_0000, 512, false)), (1, 1));
    assert_eq!(driver.request(0, 0x1234, 0, (0, 0, false)), (2, 1));
    // No place for a status.
    driver.header(DATA_AT, VIRTIO_BLK_T_OUT, 0);
    driver.offer(0, &[(DATA_AT, 16 + 512, false)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), 0);
    // An available index that jumps, there and back.
    driver.set_avail(0, driver.avail(0).wrapping_add(1000));
    driver.kick(0);
    driver.set_avail(0, driver.avail(0));
    assert_eq!(driver.write(0, 3, &[9; 512]), 0);
    assert_eq!(driver.read(0, 3, 512), Ok(vec![9; 512]));
    assert_eq!(server.disk.bytes()[..1536], [0; 1536]);
}

#[test]
fn guest_that_offers_a_chain_again_and_again_can_not_make_it_grow() {
    let server = Running::new(|config| config.device.queue_size = 16);
    let mut driver = Driver::start(&server.path, 1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    for _ in 0..2 {
        // Descriptors are reused while they are in flight, which a driver must not do.
        for _ in 0..16 {
            driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
        }
        driver.kick(0);
        wait_until("requests in flight", || server.disk.in_flight() == 16);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.disk.in_flight(), 16);
    server.disk.hold(false);
    for _ in 0..32 {
        assert_eq!(driver.wait_used(0), 513);
    }
    assert_eq!(driver.used_index(0), driver.avail(0));
    assert_eq!(server.disk.in_flight(), 0);
}

/// What the disk has no room for stays in the ring, and is taken when it has.
#[test]
fn requests_are_taken_as_the_disk_has_room_for_them() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.take_at_most(1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    for _ in 0..3 {
        driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
        driver.kick(0);
        wait_until("a request in flight", || server.disk.in_flight() == 1);
        // The worker has seen the kick and sleeps.
        wait_until("the worker sleeps", || {
            let before = server.disk.looks();
            std::thread::sleep(Duration::from_millis(20));
            before == server.disk.looks()
        });
        assert_eq!(server.disk.in_flight(), 1);
    }
    server.disk.hold(false);
    for _ in 0..3 {
        assert_eq!(driver.wait_used(0), 513);
    }
}

#[test]
fn read_only_device_refuses_writes_and_serves_reads() {
    let server = Running::new(|config| config.device.read_only = true);
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    assert_eq!(driver.flush(0), 0);
}

#[test]
fn guest_that_switches_its_cache_off_gets_durable_writes() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_ne!(driver.features >> VIRTIO_BLK_F_CONFIG_WCE & 1, 0);
    driver.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    assert_eq!(server.disk.durable_writes(), 1);
    let config = driver.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1;
    assert_eq!((config.len(), config[32]), (60, 0));
    let shifted = driver.frontend.get_config(0x100, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1;
    assert_eq!(config, shifted);
    driver.frontend.reset_device().unwrap();
    driver.frontend.set_features(driver.features).unwrap();
    driver.start_queues().unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    assert_eq!(server.disk.durable_writes(), 2);
}

/// Its frontend does not say it again when it connects the next time (QEMU), and the guest sends no flushes. Whoever has a session of
/// its own chooses for itself.
#[test]
fn guest_that_switched_its_cache_off_gets_durable_writes_after_a_reconnection() {
    let server = Running::new(|_| {});
    let switch_off = |driver: &mut Driver| {
        driver.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        let shown = driver.frontend.get_config(32, 1, VhostUserConfigFlags::WRITABLE, &[0]).unwrap().1;
        assert_eq!(shown, [0]);
    };
    let mut early = Driver::connect(&server.path, 1);
    early.negotiate(|bits| bits).unwrap();
    switch_off(&mut early);
    drop(early);
    server.wait_for("left, open: false");
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    assert_eq!(server.disk.durable_writes(), 0);
    switch_off(&mut driver);
    drop(driver);
    server.wait_for("left, open: true");
    let mut driver = Driver::start(&server.path, 1);
    let shown = driver.frontend.get_config(32, 1, VhostUserConfigFlags::WRITABLE, &[0]).unwrap().1;
    assert_eq!((driver.write(0, 0, &[1; 512]), shown), (0, vec![0]));
    assert_eq!(server.disk.durable_writes(), 1);
}

/// GET_VRING_BASE returns when everything in flight is answered; it ends no session.
#[test]
fn stopping_a_ring_waits_for_its_io_and_publishes_it() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 2);
    server.disk.hold(true);
    for number in 0..3u64 {
        driver.header(DATA_AT + number * 4096, VIRTIO_BLK_T_IN, number);
        let at = DATA_AT + number * 4096;
        driver.offer(0, &[(at, 16, false), (at + 512, 512, true), (at + 2048, 1, true)]);
    }
    driver.kick(0);
    wait_until("requests in flight", || server.disk.in_flight() == 3);
    let base = std::thread::scope(|scope| {
        let frontend = driver.frontend.clone();
        let stopping = scope.spawn(move || frontend.get_vring_base(0).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stopping.is_finished() && driver.used_index(0) == 0);
        server.disk.hold(false);
        stopping.join().unwrap()
    });
    assert_eq!((base, driver.used_index(0), server.disk.in_flight()), (3, 3, 0));
    // The other queue is not concerned, and the ring can start again where it was.
    assert_eq!(driver.write(1, 0, &[5; 512]), 0);
    for _ in 0..3 {
        assert_eq!(driver.wait_used(0), 513);
    }
    driver.start_queue(0).unwrap();
    assert_eq!(driver.read(0, 0, 512), Ok(vec![5; 512]));
    assert_eq!(server.events.all(), ["start 1"]);
}

#[test]
fn stopping_a_ring_that_is_polled_does_not_wait_for_the_polling() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::from_secs(60)));
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    let start = Instant::now();
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 1);
    driver.start_queue(0).unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.frontend.reset_device().unwrap();
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn disabled_ring_takes_nothing_until_it_is_enabled_again() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.frontend.set_vring_enable(0, false).unwrap();
    driver.wait_call(0, Duration::ZERO); // of the write, if it came after its answer
    let used = driver.used_index(0);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
    driver.kick(0);
    assert!(!driver.wait_call(0, Duration::from_millis(100)));
    assert_eq!((driver.used_index(0), server.disk.in_flight()), (used, 0));
    driver.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(driver.wait_used(0), 513);
    assert_eq!(server.events.all(), ["start 1"]);
}

#[test]
fn reset_of_the_device_waits_for_its_io_and_ends_no_session() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
    driver.kick(0);
    wait_until("a request in flight", || server.disk.in_flight() == 1);
    std::thread::scope(|scope| {
        let mut frontend = driver.frontend.clone();
        let resetting = scope.spawn(move || frontend.reset_device().unwrap());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!resetting.is_finished());
        server.disk.hold(false);
        resetting.join().unwrap();
    });
    assert_eq!(server.disk.in_flight(), 0);
    assert_eq!(server.events.all(), ["start 1"]);
}

#[test]
fn memory_replaced_under_io_in_flight_receives_it_where_it_was_asked_for() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[0x42; 512]), 0);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    driver.memory.write_slice(&[0xee; 513], GuestAddress(DATA_AT + 4096)).unwrap();
    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
    driver.kick(0);
    wait_until("a request in flight", || server.disk.in_flight() == 1);
    let old = driver.replace_memory();
    server.disk.hold(false);
    assert_eq!(driver.wait_used(0), 513);
    let mut data = [0; 513];
    old.read_slice(&mut data, GuestAddress(DATA_AT + 4096)).unwrap();
    assert_eq!((data[0], data[511], data[512]), (0x42, 0x42, 0));
    driver.memory.read_slice(&mut data, GuestAddress(DATA_AT + 4096)).unwrap();
    assert_eq!(data, [0xee; 513]);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0x42; 512]));
}

#[test]
fn kick_that_replaces_a_running_rings_is_listened_to() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.replace_kick(0);
    assert_eq!(driver.write(0, 0, &[2; 512]), 0);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![2; 512]));
}

/// Invariant 3, while one connection lasts; nobody kicks when the memory is there again.
#[test]
fn requests_of_a_ring_whose_memory_was_away_are_answered_when_it_is_there_again() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::start(&server.path, 1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    let parts = [(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)];
    driver.offer(0, &parts);
    driver.kick(0);
    wait_until("a request in flight", || server.disk.in_flight() == 1);
    driver.map_memory_at(1 << 40).unwrap();
    server.disk.hold(false);
    wait_until("it is done", || server.disk.in_flight() == 0);
    driver.offer(0, &parts);
    assert!(!is_busy(&server, &driver));
    assert_eq!(driver.used_index(0), 0);
    driver.map_memory_at(0).unwrap();
    (0..2).for_each(|_| assert_eq!(driver.wait_used(0), 513));
    assert!(!is_busy(&server, &driver));
}

/// Whether workers look and look again.
fn is_busy(server: &Running, driver: &Driver) -> bool {
    driver.wait_call(0, Duration::ZERO);
    let looks = server.disk.looks();
    driver.wait_call(0, Duration::from_millis(100));
    server.disk.looks() - looks > 100
}

/// Invariant 8: the frontend has it still, and may kick with it.
#[test]
fn kick_that_was_replaced_is_not_listened_to() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    let old = driver.replace_kick(0);
    old.write(1).unwrap();
    assert_eq!(driver.write(0, 0, &[2; 512]), 0);
    assert!(!is_busy(&server, &driver));
}

/// Invariant 8: nothing comes by the old one any more, and who waited for it would have the ring's lock for good.
#[test]
fn kick_that_is_made_to_wait_and_is_replaced_holds_nobody_up() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    wait_until("the kick was taken", || !driver.kick_is_pending(0));
    driver.let_reads_of_the_kick_wait(0);
    let (done, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        driver.replace_kick(0);
        done.send(driver.write(0, 0, &[2; 512])).unwrap();
    });
    assert_eq!(answered.recv_timeout(PATIENCE), Ok(0), "the ring's lock is taken for good");
    server.wait_for("left, open: true");
}

/// Invariant 8: the library's own thread waits, for a frontend that is gone.
#[test]
fn frontend_that_keeps_the_interrupt_of_a_ring_waiting_that_never_starts_is_got_rid_of() {
    let server = Running::new(|_| {});
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered).unwrap();
    driver.jam_first_interrupt(0);
    server.wait_for("left, open: false");
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

/// Invariant 8, and the ring goes on when it is given one again.
#[test]
fn kick_that_was_taken_away_is_not_listened_to_before_and_after_the_ring_is_stopped() {
    let server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::ZERO));
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.take_kick(0);
    let old = driver.replace_kick(0);
    assert_eq!(driver.write(0, 0, &[2; 512]), 0);
    old.write(1).unwrap();
    assert!(!is_busy(&server, &driver));
    driver.take_kick(0);
    driver.kick(0);
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 2);
    assert!(!is_busy(&server, &driver));
    // Not with what is pending: a start looks at the ring in any case.
    driver.start_queue(0).unwrap();
    assert_eq!(driver.read(0, 0, 512), Ok(vec![2; 512]));
}

/// Invariant 8: each is a mapping, and all are gone through for each access.
#[test]
fn frontend_that_adds_more_memory_regions_than_it_may_is_refused() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    let max = driver.frontend.get_max_mem_slots().unwrap();
    assert_eq!(max, u64::from(REGIONS_MAX));
    // One is the guest's memory.
    (1..max).for_each(|index| driver.change_regions(index, true).unwrap());
    driver.change_regions(1, false).unwrap();
    driver.change_regions(max, true).unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    assert!(driver.change_regions(1, true).is_err());
    server.wait_for("refused: memory region at 0x401000: there are 509 already");
}

/// Huge pages of the guest's memory are huge in the server's mapping too. Looked at only where the host
/// has some: `echo 8 > /proc/sys/vm/nr_hugepages`.
#[test]
fn server_of_a_guest_with_huge_pages_maps_them_as_they_are() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let memfd = std::fs::File::from(rustix::fs::memfd_create("guest-in-huge-pages", flags).unwrap());
    if let Err(error) = rustix::fs::fallocate(&memfd, FallocateFlags::empty(), 0, 4 << 20) {
        eprintln!("not looked at, the host gives no huge pages: {error}");
        return;
    }
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    driver.replace_memory_by(memfd);
    assert_eq!(driver.write(0, 3, &[7; 4096]), 0);
    assert_eq!(driver.read(0, 3, 4096), Ok(vec![7; 4096]));
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut mappings: Vec<&str> = smaps.split("VmFlags").collect();
    mappings.retain(|mapping| mapping.contains("/memfd:guest-in-huge-pages"));
    // The driver's and the server's.
    assert_eq!(mappings.len(), 2, "{smaps}");
    for mapping in mappings {
        assert!(mapping.lines().any(|line| line.starts_with("KernelPageSize:") && line.contains(" 2048 kB")));
    }
}

/// A server with a frontend that is gone, whose write the disk has not done yet.
fn with_stuck_write() -> Running {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_OUT, 0);
    driver.offer(0, &[(DATA_AT, 16 + 512, false), (DATA_AT + 4096, 1, true)]);
    driver.kick(0);
    wait_until("a request in flight", || server.disk.in_flight() == 1);
    server
}

/// Storage that does not answer for long ends no server: the VM that comes next is served when it does.
#[test]
fn frontend_that_leaves_while_storage_is_stuck_is_waited_for() {
    let server = with_stuck_write();
    std::thread::sleep(TEARDOWN_MAX + Duration::from_millis(500));
    assert_eq!(server.disk.in_flight(), 1);
    server.disk.hold(false);
    server.wait_for("left, open: true");
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

#[test]
fn server_that_is_to_stop_while_storage_is_stuck_says_why_it_ends_in_disorder() {
    let mut server = with_stuck_write();
    server.stop.stop();
    let error = server.thread.take().unwrap().join().unwrap().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(matches!(error, ServerError::Teardown(_)) && source.contains("does not answer"), "{source}");
    server.disk.hold(false);
}
