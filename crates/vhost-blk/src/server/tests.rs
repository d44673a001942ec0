use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use session_disk::{SessionStart, SessionSummary};
use vhost::{
    VhostBackend,
    vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags},
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    socket::SocketPermissions,
    testing::{DATA_AT, Driver, MemoryDisk},
};

const DISK_LEN: usize = 4 << 20;
const GRACE: Duration = Duration::from_millis(300);
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The test that plays a VMM in a process of its own is told the socket this way, and what to do.
const CHILD_SOCKET: &str = "VHOST_TEST_SOCKET";
const CHILD_ACT: &str = "VHOST_TEST_ACT";

#[derive(Default)]
struct Events(Mutex<Vec<String>>);

impl Events {
    fn push(&self, event: String) {
        self.0.lock().unwrap().push(event);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Observer for Events {
    fn session_started(&self, start: &SessionStart, _peer: Option<ProcessId>) {
        self.push(format!("start {}", start.sequence));
    }

    fn session_ended(&self, summary: &SessionSummary, reason: EndReason) {
        self.push(format!("end {} {reason:?}", summary.sequence));
    }

    fn frontend_refused(&self, why: &str) {
        self.push(format!("refused: {why}"));
    }

    fn frontend_disconnected(&self, session_open: bool) {
        self.push(format!("left, open: {session_open}"));
    }
}

/// A server that runs in a thread.
struct Running {
    disk: Arc<MemoryDisk>,
    events: Arc<Events>,
    stop: StopHandle,
    thread: Option<JoinHandle<Result<Exit, ServerError>>>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Running {
    fn new(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::bind(&path, SocketPermissions::default()).unwrap();
        Self::on(socket, directory, path, change)
    }

    fn on(
        socket: Socket,
        directory: tempfile::TempDir,
        path: PathBuf,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Self {
        let disk = MemoryDisk::new(DISK_LEN);
        let events = Arc::new(Events::default());
        let mut config = ServerConfig { reconnect_grace: GRACE, ..ServerConfig::default() };
        config.device.num_queues = 2;
        change(&mut config);
        let mut server = Server::with_disk(Arc::new(disk.clone()), socket, config, events.clone()).unwrap();
        let stop = server.stop_handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { disk, events, stop, thread, path, _directory: directory }
    }

    fn wait_for(&self, event: &str) {
        wait_until(event, || self.events.all().iter().any(|seen| seen.starts_with(event)));
    }

    fn join(&mut self) -> Exit {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    /// This test binary as another process that connects and does `act`.
    fn child(&self, act: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server::tests::child_of_another_test", "--nocapture"])
            .env(CHILD_SOCKET, &self.path)
            .env(CHILD_ACT, act)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.disk.hold(false);
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Not a test of its own: what [`Running::child`] runs.
#[test]
fn child_of_another_test() {
    let Some(path) = std::env::var_os(CHILD_SOCKET) else { return };
    let mut driver = Driver::start(&PathBuf::from(path), 1);
    assert_eq!(driver.write(0, 0, &[0x11; 512]), 0);
    if std::env::var(CHILD_ACT).unwrap() == "leave" {
        drop(driver);
    }
    // Until it is killed, or its parent is gone.
    let _ = std::io::stdin().read_line(&mut String::new());
}

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
    let server = Running::new(|config| config.device.poll_max_us = 0);
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
    server.disk.fail_io(true);
    assert_eq!(driver.write(0, 0, &[1; 512]), 1);
    server.disk.fail_io(false);
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
    let server = Running::new(|config| config.device.poll_max_us = 60_000_000);
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
    let server = Running::new(|config| config.device.poll_max_us = 0);
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.replace_kick(0);
    assert_eq!(driver.write(0, 0, &[2; 512]), 0);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![2; 512]));
}

/// Invariant 3, at the boundary: the same process finds what it wrote.
#[test]
fn process_that_reconnects_continues_its_session() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[0x55; 512]), 0);
    drop(driver);
    server.wait_for("left, open: true");
    std::thread::sleep(GRACE * 2);
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0x55; 512]));
    assert_eq!(server.events.all(), ["start 1", "left, open: true"]);
}

/// As Cloud Hypervisor does at a guest's reboot: no pause, and never turned away.
#[test]
fn process_that_reconnects_at_once_is_not_taken_for_a_second_frontend() {
    let server = Running::new(|_| {});
    for round in 0..30 {
        let mut driver = Driver::start(&server.path, 1);
        assert_eq!(driver.write(0, round, &[round as u8; 512]), 0);
    }
    let events = server.events.all();
    assert!(!events.iter().any(|event| event.starts_with("refused")), "{events:?}");
    assert_eq!(events.iter().filter(|event| event.starts_with("start")).count(), 1);
}

#[test]
fn killed_frontend_ends_its_session_and_the_next_gets_a_new_one() {
    let server = Running::new(|_| {});
    let mut child = server.child("stay");
    wait_until("the child's write", || server.disk.bytes()[0] == 0x11);
    child.kill().unwrap();
    // Not waited for: a zombie counts as gone.
    server.wait_for("end 1 OwnerExited");
    child.wait().unwrap();
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    assert!(server.events.all().contains(&"start 2".to_owned()));
}

#[test]
fn session_of_a_disconnected_process_ends_when_it_exits() {
    let server = Running::new(|_| {});
    let mut child = server.child("leave");
    server.wait_for("left, open: true");
    std::thread::sleep(GRACE * 2);
    assert!(!server.events.all().iter().any(|event| event.starts_with("end")));
    drop(child.stdin.take());
    child.wait().unwrap();
    server.wait_for("end 1 OwnerExited");
}

/// Invariant 2, at the boundary.
#[test]
fn stranger_waits_the_grace_and_gets_a_session_of_its_own() {
    let server = Running::new(|_| {});
    let mut child = server.child("leave");
    server.wait_for("left, open: true");
    let start = Instant::now();
    let mut driver = Driver::start(&server.path, 1);
    assert!(start.elapsed() >= GRACE);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    assert_eq!(server.events.all(), ["start 1", "left, open: true", "end 1 TakenOver", "start 2"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn stranger_that_does_not_wait_leaves_the_session_open() {
    let server = Running::new(|_| {});
    let mut child = server.child("leave");
    server.wait_for("left, open: true");
    drop(UnixStream::connect(&server.path).unwrap());
    std::thread::sleep(GRACE * 2);
    assert_eq!(server.events.all(), ["start 1", "left, open: true"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn second_frontend_is_turned_away_while_one_is_connected() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    let mut second = UnixStream::connect(&server.path).unwrap();
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(io::Read::read(&mut second, &mut [0; 1]).unwrap(), 0);
    server.wait_for("refused: another frontend is connected");
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

#[test]
fn frontend_is_refused_when_no_session_can_begin() {
    let server = Running::new(|_| {});
    server.disk.refuse_sessions();
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered).unwrap();
    assert!(driver.start_queues().is_err());
    server.wait_for("refused: no session can begin: the log has no room");
    server.wait_for("left, open: false");
}

#[test]
fn frontend_whose_rings_are_not_fresh_gets_no_new_session() {
    let server = Running::new(|_| {});
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered).unwrap();
    driver.offer(0, &[(DATA_AT, 16, false)]);
    assert!(driver.start_queues().is_err());
    server.wait_for("refused: its rings are not fresh");
    assert!(!server.disk.session_is_open());
}

#[test]
fn frontend_that_talks_nonsense_is_dropped_and_the_next_one_served() {
    let server = Running::new(|_| {});
    for nonsense in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4], &[7; 3]] {
        let mut stream = UnixStream::connect(&server.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        io::Write::write_all(&mut stream, nonsense).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // An end, or a reset because we had more to say.
        while io::Read::read(&mut stream, &mut [0; 64]).is_ok_and(|n| n > 0) {}
    }
    wait_until("all of them gone", || {
        server.events.all().iter().filter(|e| e.starts_with("left")).count() == 3
    });
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
}

#[test]
fn stop_under_io_in_flight_reaps_it_and_leaves_the_session_open() {
    let mut server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    server.disk.hold(true);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
    driver.kick(0);
    wait_until("a request in flight", || server.disk.in_flight() == 1);
    server.stop.stop();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!server.thread.as_ref().unwrap().is_finished());
    server.disk.hold(false);
    assert_eq!(server.join(), Exit::Stopped);
    // What was done is published: the guest can go on with the next server.
    assert_eq!((server.disk.in_flight(), driver.used_index(0)), (0, 1));
    assert!(server.disk.session_is_open());
    assert!(!server.events.all().iter().any(|event| event.starts_with("end")));
}

#[test]
fn stop_of_a_server_whose_queue_is_never_idle_is_quick() {
    let mut server = Running::new(|config| config.device.poll_max_us = 60_000_000);
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    let (busy, stopped) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
            let start = Instant::now();
            while !stopped.load(Ordering::Relaxed) && start.elapsed() < PATIENCE {
                if driver.avail(0).wrapping_sub(driver.used_index(0)) < 8 {
                    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
                    driver.kick(0);
                }
                busy.store(driver.used_index(0) > 1000, Ordering::Relaxed);
            }
        });
        wait_until("a busy queue", || busy.load(Ordering::Relaxed));
        server.stop.stop();
        let start = Instant::now();
        assert_eq!(server.join(), Exit::Stopped);
        stopped.store(true, Ordering::Relaxed);
        assert!(start.elapsed() < PATIENCE / 4);
    });
}

#[test]
fn once_returns_after_the_first_session() {
    let mut server = Running::new(|config| config.once = true);
    // A connection without a session does not count.
    drop(Driver::connect(&server.path, 1));
    server.wait_for("left, open: false");
    let mut child = server.child("stay");
    wait_until("the child's write", || server.disk.bytes()[0] == 0x11);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(server.join(), Exit::SessionEnded);
}

#[test]
fn inherited_connection_ends_its_session_when_it_is_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("unused");
    let socket = Socket::from_fd(theirs.into()).unwrap();
    let mut server = Running::on(socket, directory, path, |_| {});
    let mut driver = Driver::over(ours, 1);
    driver.negotiate(|offered| offered).unwrap();
    driver.start_queues().unwrap();
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    drop(driver);
    assert_eq!(server.join(), Exit::SocketClosed);
    assert_eq!(server.events.all(), ["start 1", "left, open: false", "end 1 Disconnected"]);
}

#[test]
fn operator_ends_a_session_and_its_connection() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    server.stop.end_session();
    server.wait_for("end 1 Operator");
    assert!(driver.frontend.get_features().is_err());
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
}

#[test]
fn connections_leave_no_descriptors_behind() {
    let server = Running::new(|_| {});
    // Counted in this process, so in one that runs nothing else.
    if std::env::var_os("VHOST_TEST_ALONE").is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server::tests::connections_leave_no_descriptors_behind"])
            .env("VHOST_TEST_ALONE", "1")
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut lefts = 0;
    let mut connect = || {
        let mut driver = Driver::start(&server.path, 2);
        assert_eq!(driver.write(0, 0, &[1; 512]), 0);
        drop(driver);
        lefts += 1;
        wait_until("it left", || {
            server.events.all().iter().filter(|e| e.starts_with("left")).count() == lefts
        });
    };
    connect();
    let before = descriptors();
    for _ in 0..20 {
        connect();
    }
    assert_eq!(descriptors(), before);
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 8, "{threads} threads");
}
