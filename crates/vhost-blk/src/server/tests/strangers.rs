//! Frontends that connect while the owner of the open session is away.

use super::*;

/// A server with a session, and its owner, which lives and is not connected.
fn with_owner_away() -> (Running, Child) {
    let server = Running::new(|_| {});
    let child = server.child("leave");
    server.wait_for("left, open: true");
    (server, child)
}

/// A frontend that has waited the grace, and has started no ring.
fn negotiated(server: &Running) -> Driver {
    let mut driver = Driver::connect(&server.path, 1);
    driver.negotiate(|offered| offered).unwrap();
    driver
}

/// Invariant 2, at the boundary.
#[test]
fn stranger_waits_the_grace_and_gets_a_session_of_its_own() {
    let (server, mut child) = with_owner_away();
    let start = Instant::now();
    let mut driver = Driver::start(&server.path, 1);
    assert!(start.elapsed() >= GRACE);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    assert_eq!(server.events.all(), ["start 1", "left, open: true", "end 1 TakenOver", "start 2"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Invariant 3: the session of a VM that is away for a while is not ended for one that gets none.
#[test]
fn stranger_that_starts_nothing_or_may_not_leaves_the_session_open() {
    let (server, mut child) = with_owner_away();
    // Its handshake is served, and no ring is started.
    drop(negotiated(&server));
    server.wait_for_count("left, open: true", 2);
    // It belongs to another session.
    let mut driver = negotiated(&server);
    driver.offer(0, &[(DATA_AT, 16, false)]);
    assert!(driver.start_queues().is_err());
    server.wait_for("refused: its rings are not fresh");
    server.wait_for_count("left, open: true", 3);
    // It would get none.
    server.disk.refuse_sessions();
    let mut driver = negotiated(&server);
    assert!(driver.start_queues().is_err());
    server.wait_for("refused: no session can begin: the log has no room");
    server.wait_for_count("left, open: true", 4);
    assert!(!server.events.all().iter().any(|event| event.starts_with("end") || event == "start 2"));
    child.kill().unwrap();
    child.wait().unwrap();
    server.wait_for("end 1 OwnerExited");
}

#[test]
fn owner_that_comes_back_while_a_stranger_is_served_goes_on() {
    let server = Running::new(|_| {});
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.write(0, 0, &[0x55; 512]), 0);
    drop(driver);
    server.wait_for("left, open: true");
    let mut child = server.child("negotiate");
    wait_until("the stranger is served", || server.path.with_extension("negotiated").exists());
    let mut driver = Driver::start(&server.path, 1);
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0x55; 512]));
    let events = server.events.all();
    let back = "refused: the owner of the session has come back";
    assert_eq!(events, ["start 1", "left, open: true", "left, open: true", back]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn stranger_that_is_served_when_the_operator_ends_the_session_stays() {
    let (server, mut child) = with_owner_away();
    let mut driver = negotiated(&server);
    server.stop.end_session(1);
    server.wait_for("end 1 Operator");
    driver.start_queues().unwrap();
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    assert_eq!(server.events.all(), ["start 1", "left, open: true", "end 1 Operator", "start 2"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// One that is served when the VM ends for which it waited has the disk.
#[test]
fn stranger_that_is_served_when_the_owner_exits_gets_the_next_session() {
    let (server, mut child) = with_owner_away();
    let mut driver = negotiated(&server);
    child.kill().unwrap();
    child.wait().unwrap();
    server.wait_for("end 1 OwnerExited");
    driver.start_queues().unwrap();
    assert_eq!(driver.read(0, 0, 512), Ok(vec![0; 512]));
    let events = server.events.all();
    assert_eq!(events, ["start 1", "left, open: true", "end 1 OwnerExited", "start 2"]);
}

#[test]
fn stranger_that_does_not_wait_leaves_the_session_open() {
    let (server, mut child) = with_owner_away();
    drop(UnixStream::connect(&server.path).unwrap());
    std::thread::sleep(GRACE * 2);
    assert_eq!(server.events.all(), ["start 1", "left, open: true"]);
    child.kill().unwrap();
    child.wait().unwrap();
}
