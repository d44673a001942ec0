//! What a restore costs follows what the session wrote, not the size of the disk.

use std::process::Command;
use std::time::{Duration, Instant};

use pristine_tests::heavy;
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::program::run;
use pristine_tests::remote::Remote;

const SIZE: u64 = 4 << 30;

/// Invariant 4: one percent of a 4 GiB disk, scattered, is restored, and with it the disk is exact.
/// Prints how long that took and how long a copy of the whole disk takes, both until durable.
#[test]
fn restore_of_one_percent_restores_as_much_and_is_exact() {
    let _heavy = heavy();
    let lab = Lab::new();
    images::dense(&lab.base(), SIZE, 61);
    lab.provision(&[]);
    let dirty = SIZE / images::BLOCK / 100;
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask(&format!("scatter {dirty} 61"));
    server.stop();
    client.kill();
    let status = lab.status();
    let owed = status["dirty_blocks"].as_u64().unwrap() + status["pending_blocks"].as_u64().unwrap();
    assert_eq!(owed, dirty, "{status}");

    let begin = Instant::now();
    lab.run("restore", &[""; 0]).ok();
    let restore = begin.elapsed();
    lab.assert_pristine();

    let begin = Instant::now();
    let mut copy = Command::new("dd");
    copy.args(["bs=1M", "conv=fsync", "status=none"]);
    copy.arg(format!("if={}", lab.base().display())).arg(format!("of={}", lab.path("copy").display()));
    run(&mut copy).ok();
    let copy = begin.elapsed();
    println!(
        "{dirty} of {} blocks dirty: restored in {restore:?}; the whole disk copied in {copy:?}: {:.1} times as long",
        SIZE / images::BLOCK,
        copy.as_secs_f64() / restore.as_secs_f64()
    );
}

/// Memory does not follow the size of the disk beyond the bitmaps: a session and a drain on 64 GiB
/// take little more than on 64 MiB.
#[test]
fn memory_of_a_server_follows_the_bitmaps_only() {
    let small = peak_memory(64 << 20);
    let large = peak_memory(64 << 30);
    println!("peak memory: {} KiB for 64 MiB, {} KiB for 64 GiB", small >> 10, large >> 10);
    // 64 GiB are 16 Mi blocks: 2 MiB for each bitmap.
    assert!(large - small.min(large) < 48 << 20, "{large} bytes, {small} for the small disk");
    assert!(small < 64 << 20, "{small} bytes");
}

/// The most memory that a server of a sparse disk of `size` bytes had while it served and drained.
fn peak_memory(size: u64) -> u64 {
    let lab = Lab::new();
    images::sparse(&lab.base(), size, 62, &[(0, 16 << 20), (size - (16 << 20), 16 << 20)]);
    lab.provision(&[]);
    let server = lab.serve(&[]);
    let mut client = Remote::connected(&lab.socket(), 1);
    client.ask("scatter 8000 1");
    client.leave();
    lab.wait_pristine();
    let peak = server.0.memory("VmHWM");
    server.stop();
    peak
}

/// A server that is told to stop while much is pending ends at once; the next goes on.
#[test]
fn stop_of_a_server_with_much_pending_is_quick() {
    let _heavy = heavy();
    let lab = Lab::new();
    images::dense(&lab.base(), 1 << 30, 63);
    lab.provision(&["--lazy"]);
    let server = lab.serve(&[]);
    let begin = Instant::now();
    server.stop();
    let elapsed = begin.elapsed();
    println!("stopped after {elapsed:?} with {} blocks pending", lab.status()["pending_blocks"]);
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    let server = lab.serve(&[]);
    lab.wait_pristine();
    server.stop();
    lab.assert_pristine();
}
