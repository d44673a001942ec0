//! When the power goes, and what leads to it.

use pristine_tests::random::Random;

use Moment::*;

const MIB: u64 = 1 << 20;
/// Bytes of the disk.
pub(crate) const SIZE: u64 = 272 * MIB;
/// What an intent covers; the disk has four of them and a part.
const REGION: u64 = 64 * MIB;

/// When the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Moment {
    FirstTouches,
    SteadyWrites,
    SessionStart,
    SessionEnd,
    Drain,
    NextSession,
    Drained,
    Stop,
    StopOfPristine,
    BackendKilled,
    Restore,
    Restored,
    ProvisionLazy,
    SessionOnLazyDisk,
    ProvisionFull,
    /// Not a moment of its own: while the cut before is being repaired.
    Recovery,
}

const MOMENTS: [Moment; 16] = [
    FirstTouches,
    SteadyWrites,
    Recovery,
    NextSession,
    ProvisionLazy,
    SessionStart,
    SessionEnd,
    Drain,
    Drained,
    Stop,
    StopOfPristine,
    BackendKilled,
    Restore,
    Restored,
    SessionOnLazyDisk,
    ProvisionFull,
];

/// What is done before the power goes.
pub(crate) struct Steps {
    /// To their ends.
    pub(crate) before: Vec<String>,
    /// Under way when it happens.
    pub(crate) under_way: Vec<String>,
    /// At most so long after they began.
    pub(crate) delay_ms_max: u64,
    /// Whether a disk is made.
    pub(crate) provisions: bool,
}

/// All moments; but for the first three, in an order that depends on the seed.
pub(crate) fn shuffled(seed: u64) -> Vec<Moment> {
    let mut moments = MOMENTS.to_vec();
    let mut random = Random::new(seed);
    for last in (4..moments.len()).rev() {
        moments.swap(last, 3 + random.below(last as u64 - 2) as usize);
    }
    moments
}

/// What leads to a moment. `next_disk` is the number of a disk that may be made; `loses_cache`: the cut takes
/// the cache of the machine's disk.
pub(crate) fn steps(moment: Moment, next_disk: u64, loses_cache: bool, random: &mut Random) -> Steps {
    let regions = SIZE.div_ceil(REGION);
    let first = random.below(regions);
    let second = (first + 1 + random.below(regions - 1)) % regions;
    let mut storm = |region: u64| {
        let len = REGION.min(SIZE - region * REGION);
        format!("storm {} {} {len}", random.below(1 << 32), region * REGION)
    };
    let (one, other) = (storm(first), storm(second));
    // What touches blocks for the first time is to find its data on the medium, and its log not.
    let pressures = match (loses_cache, moment) {
        (true, _) => &["kernel", "kernel data"][..],
        (false, FirstTouches) => &["data"],
        (false, _) => &["data", "all", "kernel", "none"],
    };
    let pressure = format!("pressure {}", pressures[random.below(pressures.len() as u64) as usize]);
    let serve = ["serve", "serve --direct", "serve --engine sync"][random.below(3) as usize];
    let provision = format!("provision {}", next_disk);
    let lazy = format!("{provision} --lazy");
    let dirty = format!("dirty {}", [100, 1000, 3000][random.below(3) as usize]);
    let (before, under_way, delay_ms_max): (&[&str], &[&str], u64) = match moment {
        FirstTouches => (&[serve, &one, &dirty, "end"], &[&other], 1500),
        // For certain with data of a session on the medium.
        SteadyWrites => (&[serve, &one, &dirty, "flush"], &["wait_a_while"], 2000),
        SessionStart => (&[serve], &[&one], 500),
        SessionEnd => (&[serve, &one, &dirty], &["end"], 300),
        Drain => (&[serve, &one, &dirty, "relax", "end"], &["drained"], 500),
        NextSession => (&[serve, &one, &dirty, "end", &other, "end"], &[&one], 1500),
        Drained => (&[serve, &one, &dirty, "relax", "end", "drained"], &[], 100),
        Stop => (&[serve, &one, &dirty], &["stop"], 300),
        StopOfPristine => (&[serve, &one, &dirty, "relax", "end", "drained"], &["stop"], 200),
        BackendKilled => (&[serve, &one, &dirty, "crash"], &["serve", &other], 1500),
        Restore => (&[serve, &one, &dirty, "relax", "crash"], &["restore"], 700),
        Restored => (&[serve, &one, &dirty, "relax", "crash", "restore"], &[], 50),
        ProvisionLazy => (&[], &[&lazy], 400),
        SessionOnLazyDisk => (&[&lazy, serve], &[&one], 1500),
        ProvisionFull => (&[], &[&provision], 2500),
        Recovery => (&[], &[], 1),
    };
    let provisions = before.contains(&lazy.as_str()) || matches!(moment, ProvisionLazy | ProvisionFull);
    let all = |steps: &[&str]| steps.iter().map(|step| (*step).to_owned()).collect::<Vec<_>>();
    Steps {
        before: [vec![pressure], all(before)].concat(),
        under_way: all(under_way),
        delay_ms_max,
        provisions,
    }
}
