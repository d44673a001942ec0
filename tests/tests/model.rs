//! The disk behaves as a disk does, whatever is going on beneath it.

use pristine_tests::heavy;
use std::time::Duration;

use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::remote::Remote;

/// How a run's server and client are set up.
struct Case {
    size: u64,
    queues: u32,
    depth: u32,
    operations: u64,
    /// Sessions in which the model runs, each with its part of the operations.
    sessions: u64,
    serve: &'static [&'static str],
}

/// Runs the model in several sessions, with a drain beneath each. In the first the whole disk is
/// pending because it was provisioned lazily, in the others because a client before it wrote into every
/// block.
fn agrees(case: &Case) {
    let lab = Lab::new();
    // A third of the base is holes, at odd places.
    let ranges: Vec<_> = (0..case.size / (3 << 20)).map(|i| (i * (3 << 20) + 512, 2 << 20)).collect();
    images::sparse(&lab.base(), case.size, 41, &ranges);
    let base = images::sha256(&lab.base());
    lab.provision(&["--lazy"]);

    let mut first = loaded_client(&lab);
    let queues = ["--num-queues", &case.queues.to_string(), "--queue-size", "1024"];
    let server = lab.serve(&[&queues, case.serve].concat());
    let mut draining = model_agrees(&lab, &mut first, 1, case);
    first.leave();

    for session in 2..=case.sessions {
        let mut next = loaded_client(&lab);
        let mut spoiler = Remote::connected(&lab.socket(), case.queues as usize);
        spoiler.ask(&format!("scatter {} {session}", case.size / images::BLOCK));
        spoiler.kill();
        draining += model_agrees(&lab, &mut next, session, case);
        next.leave();
    }

    assert!(draining > 0, "no drain ran, the test proves nothing");

    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
    assert_eq!(images::sha256(&lab.base()), base);
}

/// A client that already has its model of the base, so that it loses no time when it connects.
fn loaded_client(lab: &Lab) -> Remote {
    let mut client = Remote::start(&lab.socket());
    client.ask(&format!("load {}", lab.base().display()));
    client
}

/// Runs the model in one session; returns how often a look at the status saw a drain beneath it.
fn model_agrees(lab: &Lab, client: &mut Remote, session: u64, case: &Case) -> u64 {
    let Case { queues, depth, operations, sessions, serve, .. } = case;
    let name = format!("{queues} queues, depth {depth}, {serve:?}, session {session}");
    client.send(&format!("model {session} {} {queues} {depth}", operations / sessions));
    let (mut looks, mut draining) = (0, 0);
    let summary = loop {
        if let Some(answer) = client.answer_within(Duration::from_millis(20)) {
            break answer.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let status = lab.status();
        if status["state"] == "in-session" {
            looks += 1;
            draining += u64::from(status["pending_blocks"].as_u64() > Some(0));
        }
    };
    println!("{name}: a drain ran at {draining} of {looks} looks; {summary}");
    for kind in ["reads", "writes", "discards", "zeroes", "flushes"] {
        assert!(!summary.contains(&format!("{kind}: 0")), "no {kind} were done: {summary}");
    }
    draining
}

/// Invariants 2 and 3 with one request at a time.
#[test]
fn model_with_one_queue_and_depth_1_agrees_during_a_drain() {
    agrees(&Case { size: 256 << 20, queues: 1, depth: 1, operations: 5_000, sessions: 5, serve: &[] });
}

/// Invariants 2 and 3 with one queue full of requests. The disk's last block is short.
#[test]
fn model_with_one_queue_and_depth_32_agrees_during_a_drain() {
    agrees(&Case {
        size: (256 << 20) + 1536,
        queues: 1,
        depth: 32,
        operations: 20_000,
        sessions: 5,
        serve: &[],
    });
}

/// Invariants 2 and 3 with four queues that each have one request.
#[test]
fn model_with_four_queues_and_depth_1_agrees_during_a_drain() {
    agrees(&Case { size: 256 << 20, queues: 4, depth: 1, operations: 10_000, sessions: 5, serve: &[] });
}

/// Invariants 2 and 3, 100,000 operations on four full queues.
#[test]
fn model_with_four_queues_and_depth_32_agrees_during_a_drain() {
    let _heavy = heavy();
    agrees(&Case { size: 1 << 30, queues: 4, depth: 32, operations: 100_000, sessions: 5, serve: &[] });
}

/// The same with O_DIRECT, where buffers and offsets have to be aligned. A drain is beneath a part of
/// each session only, so there are more of them.
#[test]
fn model_with_direct_io_agrees_during_a_drain() {
    let _heavy = heavy();
    agrees(&Case {
        size: 1 << 30,
        queues: 4,
        depth: 32,
        operations: 240_000,
        sessions: 12,
        serve: &["--direct"],
    });
}
