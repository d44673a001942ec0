mod device;
mod resume;
mod strangers;

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
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Polling, SocketPermissions,
    disk::Outcome,
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

    fn released(&self) {
        self.push("released".to_owned());
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
        Self::of(MemoryDisk::new(DISK_LEN), socket, directory, path, change)
    }

    fn of(
        disk: Arc<MemoryDisk>,
        socket: Socket,
        directory: tempfile::TempDir,
        path: PathBuf,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Self {
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

    fn wait_for_count(&self, event: &str, count: usize) {
        wait_until(event, || self.events.all().iter().filter(|seen| *seen == event).count() == count);
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
    let path = PathBuf::from(path);
    let act = std::env::var(CHILD_ACT).unwrap();
    let _driver = if act == "negotiate" {
        let mut driver = Driver::connect(&path, 1);
        driver.negotiate(|offered| offered).unwrap();
        std::fs::write(path.with_extension("negotiated"), "").unwrap();
        Some(driver)
    } else {
        let mut driver = Driver::start(&path, 1);
        assert_eq!(driver.write(0, 0, &[0x11; 512]), 0);
        Some(driver).filter(|_| act != "leave")
    };
    // Until it is killed, or its parent is gone.
    let _ = std::io::stdin().read_line(&mut String::new());
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

/// Invariant 6: a session that can't be served does not begin.
#[test]
fn frontend_is_refused_when_a_queue_cannot_be_made() {
    let server = Running::new(|_| {});
    server.disk.refuse_queues();
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered).unwrap();
    assert!(driver.start_queues().is_err());
    server.wait_for("refused: cannot set up queue 0: no memory");
    server.wait_for("left, open: false");
}

/// A frontend that uses few of many queues costs what those cost; a ring that starts again has its queue.
#[test]
fn frontend_that_starts_few_rings_has_few_queues_made() {
    let server = Running::new(|config| config.device.num_queues = 16);
    let mut driver = Driver::start(&server.path, 2);
    assert_eq!(driver.write(1, 0, &[1; 512]), 0);
    driver.start_queues().unwrap();
    assert_eq!(driver.read(0, 0, 512), Ok(vec![1; 512]));
    assert_eq!(server.disk.queues(), 2);
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

/// Invariant 8: the interrupt never ends by itself.
#[test]
fn stop_under_an_interrupt_that_waits_is_quick() {
    let mut server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    driver.jam_interrupts(0);
    let answered = driver.used_index(0);
    driver.header(DATA_AT, VIRTIO_BLK_T_IN, 0);
    driver.offer(0, &[(DATA_AT, 16, false), (DATA_AT + 4096, 513, true)]);
    driver.kick(0);
    wait_until("an answer", || driver.used_index(0) != answered);
    server.stop.stop();
    let start = Instant::now();
    assert_eq!(server.join(), Exit::Stopped);
    assert!(start.elapsed() < PATIENCE / 4);
}

#[test]
fn stop_of_a_server_whose_queue_is_never_idle_is_quick() {
    let mut server = Running::new(|config| config.device.polling = Polling::Fixed(Duration::from_secs(60)));
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
    server.stop.end_session(1);
    server.wait_for("end 1 Operator");
    assert!(driver.frontend.get_features().is_err());
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
}

/// An operator who was slower than the VM does not end the next one's session.
#[test]
fn operator_ending_an_earlier_session_leaves_the_open_one() {
    let server = Running::new(|_| {});
    drop(Driver::start(&server.path, 1));
    server.stop.end_session(1);
    server.wait_for("end 1");
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[2; 512]), 0);
    server.stop.end_session(1);
    // Answered by the thread that takes requests: it has taken this one after the first answer.
    assert!(driver.frontend.get_features().is_ok() && driver.frontend.get_features().is_ok());
    assert_eq!(driver.read(0, 0, 512).unwrap()[0], 2);
    server.stop.end_session(2);
    server.wait_for("end 2 Operator");
}

/// A held disk takes no new session; the owner of the open one may come back to it.
#[test]
fn frontend_of_a_disk_that_turns_away_is_refused_unless_it_owns_the_session() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[1; 512]), 0);
    server.disk.turn_away(true);
    drop(driver);
    server.wait_for("left, open: true");
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512).unwrap()[0], 1);
    server.stop.end_session(1);
    server.wait_for("end 1 Operator");
    assert!(!server.events.all().iter().any(|event| event.starts_with("refused")));
    let refused = std::os::unix::net::UnixStream::connect(&server.path).unwrap();
    server.wait_for("refused: the disk is held");
    drop(refused);
    server.disk.turn_away(false);
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
}

/// A hold ends with the process that it is for, if need be at another attempt: its manifest is where all was full when it was held.
#[test]
fn hold_for_a_process_that_is_gone_ends_when_it_can() {
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    let disk = MemoryDisk::new(DISK_LEN);
    disk.hold_for(ProcessId::of(child.id()).unwrap(), 1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = Socket::bind(&path, SocketPermissions::default()).unwrap();
    let server = Running::of(disk, socket, directory, path, |_| {});
    child.kill().unwrap();
    child.wait().unwrap();
    server.wait_for("released");
    assert_eq!(server.events.all(), ["released"]);
}

/// Whoever could get no session does not end that of another VM, not even if the disk is held only while it waits.
#[test]
fn stranger_of_a_disk_that_turns_away_leaves_the_session_open() {
    let server = Running::new(|config| config.reconnect_grace = Duration::from_secs(2));
    let mut child = server.child("leave");
    server.wait_for("left, open: true");
    let connect = || {
        let stream = UnixStream::connect(&server.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let is_closed = |mut stream: UnixStream| io::Read::read(&mut stream, &mut [0; 1]).unwrap() == 0;
    server.disk.turn_away(true);
    assert!(is_closed(connect()));
    assert_eq!(server.events.all(), ["start 1", "left, open: true", "refused: the disk is held"]);
    server.disk.turn_away(false);
    let held = connect();
    // The first one waits when the second one is refused for it.
    assert!(is_closed(connect()));
    server.disk.turn_away(true);
    assert!(is_closed(held));
    let refused = ["another frontend is waiting for the session to end", "the disk is held"];
    assert_eq!(server.events.all()[3..], refused.map(|why| format!("refused: {why}")));
    assert!(server.disk.session_is_open());
    child.kill().unwrap();
    child.wait().unwrap();
    server.wait_for("end 1 OwnerExited");
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
