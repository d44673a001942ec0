//! Real power cuts: the program runs in a machine of its own, on ext4 and on xfs; the machine is killed
//! at random moments of a disk's life, and after the next boot `restore` makes the disk exact.
//!
//! `PRISTINE_POWER_CUTS` (2) on each file system, `PRISTINE_POWER_SEED` (1). One boot looks at what the
//! last cut left, restores it, and begins what the next cut ends. Every other cut takes the cache of the
//! machine's disk as well. A seed repeats the steps and the delays, not what the machine made of them.
//!
//! `PRISTINE_NO_INTENTS_BIN`: a `pristine` that was built with `--features test-no-intents`. With it the
//! same cuts must leak, or this test could not fail (`ci/power-proof`).

mod life;
mod moments;

use std::path::Path;

use pristine_tests::program::pristine_binary;

use life::Life;
use moments::Moment;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Invariants 2, 4 and 6: what a power cut at any moment leaves is found, never read, and restored.
fn assert_restorable_after_power_cuts(file_system: &str) {
    let (cuts, seed) = (from_env("PRISTINE_POWER_CUTS", 2), from_env("PRISTINE_POWER_SEED", 1));
    println!(
        "again: PRISTINE_POWER_SEED={seed} PRISTINE_POWER_CUTS={cuts} cargo test -p pristine-tests --test power_cut \
         {file_system}"
    );
    let mut life = Life::new(file_system, pristine_binary(), seed, moments::shuffled(seed));
    let result = life.run(cuts);
    println!("{file_system}, seed {seed}: {:#?}", life.counts);
    result.unwrap_or_else(|leak| panic!("{leak}"));
    assert!(
        cuts < 2 || life.counts.with_session_data.0 > 0,
        "no cut left data of a session: this proves nothing"
    );
}

#[test]
fn disk_on_ext4_after_power_cuts_is_restored_exactly() {
    assert_restorable_after_power_cuts("ext4");
}

#[test]
fn disk_on_xfs_after_power_cuts_is_restored_exactly() {
    assert_restorable_after_power_cuts("xfs");
}

/// The proof that the tests above can fail: without intents they do.
#[test]
fn disk_without_intents_after_power_cuts_leaks() {
    let Some(program) = std::env::var_os("PRISTINE_NO_INTENTS_BIN") else {
        println!("skipped: PRISTINE_NO_INTENTS_BIN is not set; see ci/power-proof");
        return;
    };
    let (cuts, seed) = (from_env("PRISTINE_POWER_CUTS", 10), from_env("PRISTINE_POWER_SEED", 1));
    for file_system in ["ext4", "xfs"] {
        let mut life = Life::new(file_system, Path::new(&program), seed, vec![Moment::FirstTouches]);
        let leak = life.run(cuts).expect_err("no intents, and yet nothing leaked: the test can't see a leak");
        println!(
            "{file_system}, seed {seed}: leaked at cut {} of {cuts}, as it should: {leak}",
            life.counts.cuts
        );
    }
}
