//! What is read into bounce buffers, and given to the guest from there.

use super::*;
use crate::queue::BOUNCED_BYTES_MAX;

const LEN: usize = 32 << 20;

/// What a guest can have the server hold does not grow with the length of a read, and what it gets is right where that is cut.
#[test]
fn read_of_much_that_may_not_be_durable_holds_little_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![7; LEN]).unwrap();
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions::new(base, options.clone())).unwrap();
    let disk = SessionDisk::open(&options).unwrap();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    let mut done = Vec::new();
    // Over blocks that are pending, and with some among them that stay so.
    let written = (LEN / 2, LEN / 2 + 4096);
    let content: Vec<u8> =
        (0..LEN).map(|at| if (written.0..written.1).contains(&at) { 7 } else { (at / 512) as u8 }).collect();
    for (offset, end) in [(0, written.0), (written.1, LEN)] {
        let buf = GuestBuf::zeroed(end - offset);
        buf.copy_in(0, &content[offset..end]);
        let range = disk.geometry().sectors_at(offset as u64 / 512, (end - offset) as u64).unwrap();
        queue.push(1, Request::Write { range, buf, durable: false });
        queue.quiesce(&mut done);
    }
    // Neither begins nor ends with a block.
    let (from, to) = (512, LEN - 1536);
    let buf = GuestBuf::zeroed(to - from);
    let range = disk.geometry().sectors_at(1, (to - from) as u64).unwrap();
    queue.push(2, Request::Read { range, buf: buf.clone() });
    let mut most = 0;
    while queue.in_flight() > 0 {
        queue.submit();
        most = most.max(queue.bounced_bytes);
        queue.reap(&mut done);
        most = most.max(queue.bounced_bytes);
    }
    assert!(most > 0 && most <= BOUNCED_BYTES_MAX + (256 << 10), "{most}");
    assert!(done.iter().all(|done| done.result.is_ok()));
    let mut bytes = vec![0; to - from];
    buf.copy_out(0, &mut bytes);
    assert!(bytes == content[from..to]);
}
