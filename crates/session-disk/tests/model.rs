//! A model of a disk's life: random sessions, requests, drains, checkpoints, stops, kills and power cuts on a real
//! disk, with every read compared to what the session must read.
//!
//! Three queues work at once on ranges that share blocks but no sectors, so that first touches, fills, claims
//! and the drain meet in the same blocks. Operations are held back and fail, of queues and of the drain. Sessions end
//! and begin, also while the drain is at work; servers stop or are killed with I/O in flight that has landed or
//! not, and the next one goes on with the session or not; the live page gets lost, and what was not synced with it.
//! Whatever happens, a session reads its own writes and else the base (invariants 2 and 3), and a drained
//! disk equals the base (invariant 4).
//!
//! `PRISTINE_TRANSITIONS` says how many steps and requests to make, with fresh seeds; `PRISTINE_SEED` sets the
//! first seed, `PRISTINE_SECONDS` ends it early. A life that fails is shrunk and printed: as a file in `regressions` it is lived again by every run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Instant, SystemTime};

use blockio::EngineKind;
use common::crash::random::Random;
use common::crash::world::{Ending, Remains, World};
use common::generations::{self, Generation};
use common::life::{Counts, Life, Step};
use common::watchdog::Watchdog;
use common::{fast_dir, is_over, number};
use serde::{Deserialize, Serialize};
use session_disk::{DiskOptions, ProvisionOptions, provision};

const DISK_SIZE: u64 = (1 << 20) + 512;
/// The first base ends within a block, four before the disk's last. The others are as large as the disk, and smaller.
const BASE_SIZES: [u64; 3] = [(1 << 20) - 4 * 4096 + 1024, DISK_SIZE, (1 << 20) - 7 * 4096 + 512];
const WINDOWS: [Range<u64>; 3] = [0..14, 120..134, 248..257];
const WINDOW_BLOCKS: u64 = 14 + 14 + 9;

const TRANSITIONS_DEFAULT: u64 = 60_000;
const SEED_DEFAULT: u64 = 1;
/// A life with threads may fail in one run and not in the next.
const TRIES: usize = 4;

/// How a life is lived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manner {
    /// Decides what power cuts leave.
    seed: u64,
    io_uring: bool,
    /// Power cuts take what was not synced, not only the live page.
    taped: bool,
    threads: bool,
    /// The disk is ready before the first session.
    drained: bool,
    /// What is known of the differences between the generations of its base; what it names is in [`Ground`].
    #[serde(default)]
    bases: usize,
}

/// A life that is lived again.
#[derive(Debug, Serialize, Deserialize)]
struct Regression {
    what: String,
    manner: Manner,
    steps: Vec<Step>,
}

struct Ground {
    dir: tempfile::TempDir,
    /// By [`Manner::bases`].
    bases: [Vec<Generation>; 3],
}

impl Ground {
    fn new() -> Self {
        let dir = fast_dir();
        let make = |name: &str, known| {
            generations::make(&dir.path().join(name), &BASE_SIZES, DISK_SIZE, &WINDOWS, known)
        };
        let bases = [
            make("unsealed", generations::Known::Nothing),
            make("sealed", generations::Known::Manifests),
            make("chained", generations::Known::Deltas),
        ];
        Self { dir, bases }
    }

    fn live(&self, manner: Manner, steps: &[Step]) -> Counts {
        let mut random = Random::new(manner.seed);
        let mut counts = Counts::default();
        let mut world = World::new(&Remains::default());
        let bases = &self.bases[manner.bases];
        assert!(bases[0].path.starts_with(self.dir.path()));
        let wanted = ProvisionOptions {
            size: Some(DISK_SIZE),
            ..ProvisionOptions::new(&bases[0].path, options(&world, manner))
        };
        provision(&wanted).unwrap();
        let open = |world: &World| {
            let options = options(world, manner);
            let base = generations::of_disk(bases, &options);
            let mut life = Life::open(options, &base.image, &WINDOWS);
            life.know(bases);
            life
        };
        let mut life = open(&world);
        if manner.drained {
            life.step(&Step::Drain);
        }
        for step in steps {
            let Step::PowerCut { asks, trouble } = step else {
                life.step(step);
                continue;
            };
            if !manner.taped {
                life.step(step);
                continue;
            }
            life.die(asks, *trouble);
            counts.add(life.counts);
            counts.power_cuts += 1;
            let moments = world.recorder.moments();
            let mut remains = Remains::default();
            world.at_cuts(&moments, &[moments.len()], |_, look| {
                remains = look.end(Ending::PowerCut, &mut random)
            });
            drop(life);
            world = World::new(&remains);
            life = open(&world);
        }
        life.assert_restores_exactly();
        life.stop();
        counts.add(life.counts);
        counts
    }

    /// Whether the life fails: with what it says.
    fn failure(&self, manner: Manner, steps: &[Step]) -> Option<String> {
        (0..if manner.threads { TRIES } else { 1 }).find_map(|_| {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.live(manner, steps)));
            outcome.err().map(|_| LAST_WORDS.lock().unwrap().clone())
        })
    }

    /// Leaves out what is not needed to fail.
    fn shrink(&self, manner: Manner, steps: Vec<Step>) -> Vec<Step> {
        let mut steps = steps;
        let mut size = steps.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < steps.len() {
                let mut fewer = steps.clone();
                fewer.drain(at..(at + size).min(steps.len()));
                if self.failure(manner, &fewer).is_some() {
                    steps = fewer;
                } else {
                    at += size;
                }
            }
            size /= 2;
        }
        for at in 0..steps.len() {
            let requests = asks_of(&mut steps[at].clone()).map_or(0, |asks| asks.len());
            for ask in (0..requests).rev() {
                let mut fewer = steps.clone();
                if let Some(asks) = asks_of(&mut fewer[at]) {
                    asks.remove(ask);
                }
                if self.failure(manner, &fewer).is_some() {
                    steps = fewer;
                }
            }
        }
        steps
    }
}

fn options(world: &World, manner: Manner) -> DiskOptions {
    let engine = if manner.io_uring { EngineKind::IoUring } else { EngineKind::Sync };
    let options = world.options(engine);
    if manner.taped { options } else { DiskOptions { tape: None, ..options } }
}

fn asks_of(step: &mut Step) -> Option<&mut Vec<common::life::Ask>> {
    match step {
        Step::Burst { asks, .. }
        | Step::Kill { asks, .. }
        | Step::PowerCut { asks, .. }
        | Step::DrainMeets { asks, .. } => Some(asks),
        _ => None,
    }
}

/// What the last panic said, and whether panics are to be silent.
static LAST_WORDS: Mutex<String> = Mutex::new(String::new());
static SILENT: AtomicBool = AtomicBool::new(false);

fn listen_to_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            *LAST_WORDS.lock().unwrap() = info.to_string();
            if !SILENT.load(Ordering::SeqCst) {
                before(info);
            }
        }));
    });
}

fn random_life(seed: u64) -> (Manner, Vec<Step>) {
    let mut random = Random::new(seed);
    let manner = Manner {
        seed,
        io_uring: random.chance(10),
        taped: random.chance(15),
        threads: random.chance(40),
        drained: random.chance(50),
        bases: random.of(0..3) as usize,
    };
    let steps = (0..random.of(10..150)).map(|_| {
        if random.chance(2) {
            Step::random_power_cut(&mut random, WINDOW_BLOCKS)
        } else {
            Step::random(&mut random, WINDOW_BLOCKS, manner.threads)
        }
    });
    (manner, steps.collect())
}

/// Invariants 2, 3 and 4, whatever happens.
#[test]
fn lives_of_random_steps_read_their_writes_or_the_base() {
    let wanted = number("PRISTINE_TRANSITIONS");
    let fresh = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 >> 10;
    let first = number("PRISTINE_SEED").unwrap_or_else(|| wanted.map_or(SEED_DEFAULT, |_| fresh()));
    let wanted = wanted.unwrap_or(TRANSITIONS_DEFAULT);
    eprintln!("model: replay with PRISTINE_SEED={first} PRISTINE_TRANSITIONS={wanted}");
    listen_to_panics();
    let watchdog = Watchdog::start();
    let (started, ground, mut counts, mut lives) = (Instant::now(), Ground::new(), Counts::default(), 0);
    while counts.transitions < wanted && !is_over(started) {
        let seed = first.wrapping_add(lives);
        lives += 1;
        watchdog.beat(format!("PRISTINE_SEED={seed} PRISTINE_TRANSITIONS=1"));
        let (manner, steps) = random_life(seed);
        match catch_unwind(AssertUnwindSafe(|| ground.live(manner, &steps))) {
            Ok(of_life) => counts.add(of_life),
            Err(_) => {
                let what = LAST_WORDS.lock().unwrap().clone();
                SILENT.store(true, Ordering::SeqCst);
                let steps = ground.shrink(manner, steps);
                SILENT.store(false, Ordering::SeqCst);
                let regression = Regression { what: what.clone(), manner, steps };
                eprintln!("{}", serde_json::to_string(&regression).unwrap());
                panic!("PRISTINE_SEED={seed} PRISTINE_TRANSITIONS=1 (shrunk above): {what}");
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("model: {lives} lives, {counts:?} in {seconds:.1} s");
}

/// What has failed once does not fail again.
#[test]
fn lives_that_failed_once_do_not_fail_again() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/regressions");
    let ground = Ground::new();
    let mut count = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let regression: Regression = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for _ in 0..if regression.manner.threads { TRIES } else { 1 } {
            let outcome =
                catch_unwind(AssertUnwindSafe(|| ground.live(regression.manner, &regression.steps)));
            assert!(outcome.is_ok(), "{}: {}", path.display(), regression.what);
        }
        count += 1;
    }
    assert!(count > 0);
}
