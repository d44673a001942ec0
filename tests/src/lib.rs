//! The harness of the tests in `tests/`: processes that end with their test, real QEMU guests, a
//! third-party vhost-user client, images and their hashes.
//!
//! Nothing here waits for a length of time where it could wait for a fact; every wait has a limit
//! and says, when it is reached, what it waited for and what the processes have printed.

pub mod bench;
pub mod client;
pub mod cloud;
pub mod distribution;
pub mod guest;
pub mod images;
pub mod initramfs;
pub mod lab;
pub mod medium;
pub mod mounts;
pub mod nbd;
pub mod outer;
pub mod peer;
pub mod process;
pub mod program;
pub mod random;
pub mod remote;
pub mod service;

use std::time::{Duration, Instant};

/// The limit of a wait for something that takes seconds at worst on an idle machine. Generous: the
/// machine may be small and busy.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Polls `condition` until it holds; panics with `what` after [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How often to do something: the number in the environment variable `name`, or `default`.
pub fn count_from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Where random choices begin: `PRISTINE_SEED`, or a fresh one. Print it where a failure needs it.
pub fn seed_from_env() -> u64 {
    let fresh = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64 % 1_000_000_007);
    let seed = count_from_env("PRISTINE_SEED", fresh);
    println!("PRISTINE_SEED={seed}");
    seed
}

/// Held by a test that needs the machine for itself: it measures, or it moves gigabytes. Other such
/// tests, of other processes as well, wait.
#[derive(Debug)]
pub struct Heavy(#[expect(dead_code, reason = "held for its lock")] std::fs::File);

/// Waits for the other heavy tests.
pub fn heavy() -> Heavy {
    let file = std::fs::File::create(program::scratch_root().join("heavy.lock")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    Heavy(file)
}
