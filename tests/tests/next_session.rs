//! The next session does not wait for what the last one did.

use std::time::{Duration, Instant};

use pristine_tests::heavy;
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::random::scattered;
use pristine_tests::remote::Remote;

const SIZE: u64 = 4 << 30;
const DIRTY: u64 = (1 << 30) / images::BLOCK;
const SEED: u64 = 51;

/// Invariant 2, and the promise of the pending set: with 1 GiB dirty in scattered blocks of 4 KiB, the
/// first read after the client's end is answered in less than 100 ms, with the base's content, while
/// the drain runs. The time counts from the death of the first client to the answer to the second,
/// connection and handshake included.
#[test]
fn first_read_after_a_dirty_session_is_answered_at_once() {
    let _heavy = heavy();
    let lab = Lab::new();
    let quarter = SIZE / 16;
    let ranges: Vec<_> = (0..16).map(|i| (i * quarter, quarter / 8)).collect();
    images::sparse(&lab.base(), SIZE, SEED, &ranges);
    lab.provision(&[]);
    let server = lab.serve(&[]);

    let mut first = Remote::connected(&lab.socket(), 1);
    first.ask(&format!("scatter {DIRTY} {SEED}"));
    let dirty = lab.status()["dirty_blocks"].as_u64().unwrap();
    assert_eq!(dirty, DIRTY);

    let written = scattered(SEED, DIRTY, SIZE / images::BLOCK);
    let mut second = Remote::start(&lab.socket());
    let compare = |block: u64| format!("compare {} 4096 {}", block * 4096, lab.base().display());
    first.kill();
    let end = Instant::now();
    second.ask("connect");
    let compared = second.ask(&compare(written[0]));
    let elapsed = end.elapsed();
    let status = lab.status();
    assert_eq!(compared, "same");
    let pending = status["pending_blocks"].as_u64().unwrap();
    println!(
        "first read {elapsed:?} after the end of a session with {dirty} dirty blocks; {pending} still pending"
    );
    assert!(pending > 0, "the drain was over, so the test proves nothing: {status}");
    assert!(elapsed < Duration::from_millis(100), "the first read took {elapsed:?}");

    for &block in written.iter().step_by(101) {
        assert_eq!(second.ask(&compare(block)), "same", "block {block}");
    }
    second.leave();
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}
