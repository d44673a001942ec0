//! Processes, told apart. In a program of its own: between fork and exec a child has the locks of all disks that tests beside it
//! have open.
#![allow(clippy::unwrap_used)]

use session_disk::ProcessId;

#[test]
fn process_that_exited_is_not_alive() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let id = ProcessId::of(child.id()).unwrap();
    assert!(id.is_alive() && ProcessId::own().is_alive());
    assert!(!ProcessId { start_ticks: id.start_ticks + 1, ..id }.is_alive());
    child.kill().unwrap();
    // Not reaped yet: it becomes a zombie, which counts as gone.
    while id.is_alive() {
        std::thread::yield_now();
    }
    child.wait().unwrap();
    assert!(!id.is_alive());
}
