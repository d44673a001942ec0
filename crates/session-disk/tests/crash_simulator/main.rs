//! The crash simulator: the real code lives a life on small files while every I/O is recorded. Then, for
//! moments of that life, the directory is built as a power cut or a kill there leaves it, taken over by
//! the real recovery, read, written, drained and compared with the base; and that is cut again.
//!
//! - *Power cut*: of what was not synced any part is there, sector by sector and name by name; the
//!   live page is gone.
//! - *Kill*: all that had ended is there, what was in flight has landed, or not, or in part; the live
//!   page is as it was. What was not synced can still be lost by a power cut later on.
//!
//! After a kill the session goes on in some cases, and must read all that was acknowledged.
//!
//! Invariants: 1 and 2 (whatever differs from the base is pending: no read returns it), 3
//! (what was acknowledged in a session that goes on), 4 (exact once drained), and that a crash alone never makes the state so untrustworthy that everything has to be restored.
//!
//! `PRISTINE_CRASH_CUTS` says how many moments to look at, with fresh seeds; `PRISTINE_SEED` sets the first seed,
//! `PRISTINE_SECONDS` ends it early.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../common/mod.rs"]
mod common;

use std::fmt::Debug;
use std::ops::Range;
use std::time::{Instant, SystemTime};

use blockio::EngineKind;
use common::crash::random::Random;
use common::crash::recorder::{Change, Event, Moment};
use common::crash::world::{Ending, Remains, World};
use common::generations::{self, Generation};
use common::life::{Ask, Held, Kind, Known, Life, Step};
use common::watchdog::Watchdog;
use common::{fast_dir, is_over, number};
use session_disk::{Basis, DiskOptions, DiskState, Error, Manifest, ProvisionOptions, provision, status};

/// Seven regions of intents, the last one short, as the last block is.
const DISK_SIZE: u64 = (400 << 20) + 1536;
/// The first base ends within a block, five before the disk's last. The others are as large as the disk, and smaller.
const BASE_SIZES: [u64; 3] = [(400 << 20) - 5 * 4096 + 1024, DISK_SIZE, (400 << 20) - 2560];
/// Windows in all regions, two of them across borders.
const WINDOWS: [Range<u64>; 6] =
    [0..8, 16380..16388, 32770..32774, 49148..49156, 65540..65544, 102393..102401];
const WINDOW_BLOCKS: u64 = 8 + 8 + 4 + 8 + 4 + 8;

/// Each moment is looked at twice.
const BOTH: [Option<Ending>; 2] = [Some(Ending::PowerCut), Some(Ending::Kill)];

/// Crashes in the recovery from a crash in the recovery from a crash.
const DEPTH_MAX: usize = 3;
const CUTS_DEFAULT: u64 = 1000;
const SEED_DEFAULT: u64 = 1;

/// What all lives start from.
struct Ground {
    _dir: tempfile::TempDir,
    /// Generations of a base, the same twice: not sealed; and sealed, with deltas. Disks are made of the first.
    bases: [Vec<Generation>; 2],
}

impl Ground {
    fn new() -> Self {
        let dir = fast_dir();
        let make =
            |name, known| generations::make(&dir.path().join(name), &BASE_SIZES, DISK_SIZE, &WINDOWS, known);
        let bases =
            [make("unsealed", generations::Known::Nothing), make("sealed", generations::Known::Deltas)];
        Self { _dir: dir, bases }
    }

    /// The generations that the disk of a world belongs to one of, and which one that is.
    fn bases_of(&self, options: &DiskOptions) -> (&[Generation], &Generation) {
        let base = Manifest::load(&options.paths()).unwrap().base.path;
        let all = self.bases.iter().find(|all| all.iter().any(|one| one.path == base.as_path())).unwrap();
        (all, generations::of_disk(all, options))
    }

    /// Takes the disk over, which belongs to one of the generations; with `known` its session goes on.
    fn go_on<'a>(&'a self, options: DiskOptions, known: Option<Known<'a>>) -> Life<'a> {
        let (all, base) = self.bases_of(&options);
        let mut life = Life::go_on(options, &base.image, &WINDOWS, known);
        life.know(all);
        life
    }

    /// Takes the disk over; nobody has a session.
    fn open(&self, options: DiskOptions) -> Life<'_> {
        self.go_on(DiskOptions { resume: false, ..options }, None)
    }

    fn provision_options(&self, world: &World, bases: usize, adopt: bool) -> ProvisionOptions {
        ProvisionOptions {
            size: Some(DISK_SIZE),
            adopt,
            ..ProvisionOptions::new(&self.bases[bases][0].path, world.options(EngineKind::Sync))
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    lives: u64,
    moments: u64,
    power_cuts: u64,
    kills: u64,
    nested: u64,
    resumed: u64,
    pristine: u64,
    exact: u64,
    intents: u64,
    not_made: u64,
    steps: u64,
    rebases: u64,
}

/// Says where we were when a check fails.
struct Context(String);

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("  in {}", self.0);
        }
    }
}

struct Simulator<'a> {
    ground: &'a Ground,
    counts: Counts,
}

impl<'a> Simulator<'a> {
    /// A life of the seed, cut at up to `most` of its moments.
    fn life(&mut self, seed: u64, most: u64) {
        let _context = Context(format!("seed {seed}"));
        let mut random = Random::new(seed);
        self.counts.lives += 1;
        let world = World::new(&Remains::default());
        let bases = random.of(0..2) as usize;
        provision(&self.ground.provision_options(&world, bases, false)).unwrap();
        let made = world.recorder.position();
        let engine = if random.chance(80) { EngineKind::Sync } else { EngineKind::IoUring };
        let mut life = self.ground.open(world.options(engine));
        life.record(world.recorder.clone());
        let threads = random.chance(40);
        if random.chance(60) {
            life.step(&Step::Drain);
        }
        for _ in 0..random.of(4..24) {
            life.step(&Step::random(&mut random, WINDOW_BLOCKS, threads));
        }
        self.counts.steps += life.counts.transitions;
        self.counts.rebases += life.counts.rebases;
        life.die(&[], None);
        self.cut(&world, &life, made, most, 0, &mut random);
    }

    /// A life of these steps on a drained disk, cut at every moment from the first step on, by power cuts and by kills.
    fn whole_life(&mut self, what: &str, steps: &[Step], random: &mut Random) {
        let steps: Vec<Step> = [Step::Drain].iter().chain(steps).cloned().collect();
        self.life_from(what, 0, 1, &steps, &BOTH, random);
    }

    /// A life of these steps, cut at every moment from step number `from` on, or from the disk's very
    /// beginning if there is none.
    fn life_from(
        &mut self,
        what: &str,
        bases: usize,
        from: usize,
        steps: &[Step],
        endings: &[Option<Ending>],
        random: &mut Random,
    ) {
        let _context = Context(what.to_owned());
        self.counts.lives += 1;
        let world = World::new(&Remains::default());
        provision(&self.ground.provision_options(&world, bases, false)).unwrap();
        let made = world.recorder.position();
        let mut life = self.ground.open(world.options(EngineKind::Sync));
        life.record(world.recorder.clone());
        let mut begin = 0;
        for (number, step) in steps.iter().enumerate() {
            if number == from {
                begin = world.recorder.position();
            }
            life.step(step);
        }
        self.counts.steps += life.counts.transitions;
        self.counts.rebases += life.counts.rebases;
        life.die(&[], None);
        let places: Vec<usize> = (begin..world.recorder.position() + 1).collect();
        for ending in endings {
            self.cut_at(&world, &life, made, &places, *ending, 0, random);
        }
    }

    /// Ends a world at some of its moments, and has the recovery go on from there.
    fn cut(
        &mut self,
        world: &World,
        life: &Life<'a>,
        made: usize,
        most: u64,
        depth: usize,
        random: &mut Random,
    ) {
        let moments = world.recorder.moments();
        let all = moments.len() as u64 + 1;
        let cuts = (0..most.min(all)).map(|_| self.place(&moments, made, random));
        let mut cuts: Vec<usize> = cuts.collect();
        cuts.sort_unstable();
        cuts.dedup();
        self.cut_at(world, life, made, &cuts, None, depth, random);
    }

    #[expect(clippy::too_many_arguments, reason = "where we are")]
    fn cut_at(
        &mut self,
        world: &World,
        life: &Life<'a>,
        made: usize,
        cuts: &[usize],
        ending: Option<Ending>,
        depth: usize,
        random: &mut Random,
    ) {
        let moments = world.recorder.moments();
        world.at_cuts(&moments, cuts, |place, look| {
            let either = if random.chance(55) { Ending::PowerCut } else { Ending::Kill };
            let ending = ending.unwrap_or(either);
            let last: Vec<_> = (place.saturating_sub(6)..place).map(|n| short(&moments[n].event)).collect();
            let all = moments.len();
            let _context =
                Context(format!("{ending:?} at {place} of {all} (depth {depth}), after {last:#?}"));
            self.counts.moments += 1;
            self.counts.nested += u64::from(depth > 0);
            match ending {
                Ending::PowerCut => self.counts.power_cuts += 1,
                Ending::Kill => self.counts.kills += 1,
            }
            let remains = look.end(ending, random);
            let known = life.known_at(place).filter(|_| ending == Ending::Kill && random.chance(60));
            self.survive(&remains, place >= made, ending, known, depth, random);
        });
    }

    /// A place to cut at: mostly once the disk is made, and often beside what the crash order hangs on.
    fn place(&self, moments: &[Moment], made: usize, random: &mut Random) -> usize {
        let turns: Vec<usize> = (made..moments.len())
            .filter(|place| match &moments[*place].event {
                Event::Begin(_, Change::Sync | Change::SyncDir | Change::Rename { .. } | Change::Remove) => {
                    true
                }
                Event::Begin(_, Change::Write { durable, .. }) => *durable,
                _ => false,
            })
            .collect();
        match random.of(0..10) {
            0 => random.of(0..moments.len() as u64 + 1) as usize,
            1..6 if !turns.is_empty() => (*random.pick(&turns) + random.of(0..4) as usize).min(moments.len()),
            _ => random.of(made as u64..moments.len() as u64 + 1) as usize,
        }
    }

    /// What is left is taken over by the real recovery, and nothing of before is read ever again; but if
    /// the session goes on, all that its guest knows is there.
    fn survive(
        &mut self,
        remains: &Remains,
        made: bool,
        ending: Ending,
        known: Option<Known<'a>>,
        depth: usize,
        random: &mut Random,
    ) {
        let world = World::new(remains);
        let options = world.options(EngineKind::Sync);
        if !self.is_made(&world, made) {
            return;
        }
        let differing = self.ground.bases_of(&options).1.image.differences(&world.disk());
        let before = status(&options).unwrap();
        let goes_on = known.is_some();
        let mut life = self.ground.go_on(options.clone(), known);
        life.record(world.recorder.clone());
        let disk = life.disk();
        match disk.basis() {
            Basis::Pristine => self.counts.pristine += 1,
            Basis::ExactLogs => self.counts.exact += 1,
            Basis::Intents => self.counts.intents += 1,
            Basis::Everything(why) => assert!(!made, "a crash made it distrust everything: {why}"),
        }
        // A kill while a power cut is being recovered from leaves that to the next.
        let exact = ending == Ending::Kill && depth == 0;
        assert!(!exact || *disk.basis() != Basis::Intents, "a kill leaves exact logs");
        if ending == Ending::PowerCut {
            assert_eq!(before.pending_blocks, disk.pending_blocks(), "status says what recovery does");
        }
        let vouched_for = disk.pending_blocks() + disk.dirty_blocks();
        assert!(vouched_for >= differing.len() as u64, "{differing:?} differ from the base");
        if goes_on {
            self.counts.resumed += 1;
        } else {
            // What the last session left may be held.
            life.step(&Step::Release);
            life.begin();
        }
        for block in differing {
            life.read_blocks(&disk, block..block + 1);
        }
        life.read_windows();
        drop(disk);
        for _ in 0..random.of(0..8) {
            life.step(&Step::random(random, WINDOW_BLOCKS, false));
        }
        life.assert_restores_exactly();
        assert_eq!(status(&options).unwrap().state, DiskState::Pristine);
        life.stop();
        let after = status(&options).unwrap();
        assert_eq!((after.state, after.logs), (DiskState::Pristine, 0));
        self.counts.steps += life.counts.transitions;
        self.counts.rebases += life.counts.rebases;
        if depth < DEPTH_MAX && random.chance(30) {
            self.cut(&world, &life, 0, 2, depth + 1, random);
        }
    }

    /// Whether there is a disk to recover. If it was never finished, it is made now.
    fn is_made(&mut self, world: &World, made: bool) -> bool {
        let options = world.options(EngineKind::Sync);
        match status(&options) {
            Ok(_) => return true,
            Err(error) if made => panic!("a disk that was made is refused: {error}"),
            Err(Error::DamagedManifest { path, what }) => panic!("{}: {what}", path.display()),
            Err(_) => self.counts.not_made += 1,
        }
        // Of a half-made disk the operator removes the file, or takes it over.
        let disk = world.disk();
        let whole = std::fs::metadata(&disk).is_ok_and(|metadata| metadata.len() == DISK_SIZE);
        if !whole {
            let _ = std::fs::remove_file(&disk);
            let _ = std::fs::remove_dir_all(options.paths().state_dir());
        }
        let wanted = ProvisionOptions {
            disk: DiskOptions { tape: None, ..options.clone() },
            ..self.ground.provision_options(world, 0, whole)
        };
        provision(&wanted).unwrap();
        let options = DiskOptions { tape: None, ..options };
        let mut life = self.ground.open(options);
        life.assert_restores_exactly();
        life.stop();
        false
    }
}

/// An event in one line.
fn short(event: &impl Debug) -> String {
    let line = format!("{event:?}");
    match line.find("bytes: [") {
        Some(at) => format!("{}...", &line[..(at + 60).min(line.len())]),
        None => line,
    }
}

/// Invariants 1, 2, 4 and 6 through power cuts and kills at any moment, also of the recovery.
#[test]
fn disk_whose_world_ends_at_any_moment_leaks_nothing_and_is_restored_exactly() {
    let wanted = number("PRISTINE_CRASH_CUTS");
    let fresh = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 >> 10;
    let first = number("PRISTINE_SEED").unwrap_or_else(|| wanted.map_or(SEED_DEFAULT, |_| fresh()));
    let wanted = wanted.unwrap_or(CUTS_DEFAULT);
    eprintln!("crash simulator: replay with PRISTINE_SEED={first} PRISTINE_CRASH_CUTS={wanted}");
    let started = Instant::now();
    let (ground, watchdog) = (Ground::new(), Watchdog::start());
    let mut simulator = Simulator { ground: &ground, counts: Counts::default() };
    let mut seed = first;
    while simulator.counts.moments < wanted && !is_over(started) {
        watchdog.beat(format!("PRISTINE_SEED={seed} PRISTINE_CRASH_CUTS={wanted}"));
        // Few cuts in each of many lives find more than many cuts in few.
        simulator.life(seed, 12.min(wanted - simulator.counts.moments));
        seed = seed.wrapping_add(1);
    }
    eprintln!("crash simulator: {:?} in {:.1} s", simulator.counts, started.elapsed().as_secs_f64());
}

fn write(queue: usize, at: u64, sectors: u64) -> Ask {
    Ask { queue, at, sectors, kind: Kind::Write }
}

fn burst(asks: Vec<Ask>) -> Step {
    Step::Burst { asks, trouble: None, checkpoint: false }
}

/// Invariants 1, 2, 3, 4 and 6: every moment of lives that go through all of the crash order.
#[test]
fn disk_whose_world_ends_at_every_moment_of_a_life_leaks_nothing_and_is_restored_exactly() {
    let (ground, watchdog, started) = (Ground::new(), Watchdog::start(), Instant::now());
    let mut simulator = Simulator { ground: &ground, counts: Counts::default() };
    let random = &mut Random::new(number("PRISTINE_SEED").unwrap_or(SEED_DEFAULT));
    // Three windows; the third is the second session's own.
    let (first, second, third) = (0, 64, 128);
    let one_session = [Step::Begin, burst(vec![write(0, first, 8), write(1, second + 3, 12)]), Step::End];
    let rests = [Step::Drain, Step::Restart { resume: false }];
    let met = |next_session, checkpoint| Step::DrainMeets {
        held: Held::Sync,
        asks: vec![write(2, first, 8), write(0, third + 2, 3)],
        trouble: None,
        next_session,
        checkpoint,
    };
    let lives: [(&str, Vec<Step>); 4] = [
        ("a session is drained", vec![burst(vec![])]),
        (
            "a pending block is taken, in whole and in part",
            vec![
                Step::Begin,
                burst(vec![write(0, first, 8), write(0, second + 8, 3), write(1, third, 9)]),
                Step::End,
            ],
        ),
        (
            "a session ends while the drain syncs",
            vec![Step::Begin, burst(vec![write(0, third, 8)]), met(true, true), Step::End],
        ),
        (
            "a session writes while the drain syncs",
            vec![Step::Begin, met(false, true), Step::Checkpoint, Step::End],
        ),
    ];
    for (what, steps) in lives {
        watchdog.beat(what.to_owned());
        let steps: Vec<Step> = one_session.iter().chain(&steps).chain(&rests).cloned().collect();
        simulator.whole_life(what, &steps, random);
    }
    eprintln!("crash simulator: {:?} in {:.1} s", simulator.counts, started.elapsed().as_secs_f64());
}

/// Invariants 2, 4 and 6 through power cuts and kills at every moment of a provision and of rebases: the disk belongs to
/// one generation or to the other, whole, with whatever is known of their differences.
#[test]
fn disk_whose_world_ends_at_every_moment_of_a_rebase_belongs_to_one_generation() {
    let (ground, watchdog, started) = (Ground::new(), Watchdog::start(), Instant::now());
    let mut simulator = Simulator { ground: &ground, counts: Counts::default() };
    let random = &mut Random::new(number("PRISTINE_SEED").unwrap_or(SEED_DEFAULT));
    let to = |to| Step::Rebase { to, after_kill: false };
    let after_kill = |to| Step::Rebase { to, after_kill: true };
    let session = [Step::Begin, burst(vec![write(0, 0, 8), write(1, 67, 12), write(2, 300, 3)]), Step::End];
    let open_session = [Step::Begin, burst(vec![write(0, 8, 16), write(1, 131, 12)])];
    let lives: [(&str, usize, Vec<Step>); 4] = [
        ("a disk is made and moved at once, twice", usize::MAX, vec![to(1), Step::Begin, to(0)]),
        ("a pristine disk is moved, filled, and moved back", 1, vec![Step::Drain, to(1), Step::Drain, to(0)]),
        (
            "what a session has left is moved along",
            4,
            [&[Step::Drain], &session[..], &[to(2)], &session[..], &[after_kill(1), Step::Drain]].concat(),
        ),
        (
            "the server is killed in a session and the disk moved",
            3,
            [&[Step::Drain], &open_session[..], &[after_kill(2)], &open_session[..], &[to(0), Step::Drain]]
                .concat(),
        ),
    ];
    // But for a hunt each moment ends in one way or the other, and what is known of the differences takes turns.
    let all_of_them = number("PRISTINE_CRASH_CUTS").is_some();
    let endings: &[Option<Ending>] = if all_of_them { &BOTH } else { &[None] };
    for (number, (what, from, steps)) in lives.into_iter().enumerate() {
        for bases in (0..ground.bases.len()).filter(|bases| all_of_them || number % 2 != *bases) {
            watchdog.beat(what.to_owned());
            simulator.life_from(what, bases, from, &steps, endings, random);
        }
    }
    eprintln!("crash simulator: {:?} in {:.1} s", simulator.counts, started.elapsed().as_secs_f64());
}

/// Invariant 4, and what a stop promises: an open session's log is durable then, so that a power cut costs
/// no more than what the session wrote.
#[test]
fn disk_stopped_in_mid_session_is_exact_after_a_power_cut() {
    let ground = Ground::new();
    let mut random = Random::new(SEED_DEFAULT);
    let world = World::new(&Remains::default());
    provision(&ground.provision_options(&world, 0, false)).unwrap();
    let mut life = ground.open(world.options(EngineKind::Sync));
    life.step(&Step::Drain);
    life.step(&Step::Begin);
    life.step(&burst(vec![write(0, 0, 8), write(1, 67, 12)]));
    life.disk_stops();
    let end = world.recorder.position();
    for _ in 0..20 {
        world.at_cuts(&world.recorder.moments(), &[end], |_, look| {
            let world = World::new(&look.end(Ending::PowerCut, &mut random));
            let mut life = ground.open(world.options(EngineKind::Sync));
            assert_eq!((life.disk().basis(), life.disk().pending_blocks()), (&Basis::ExactLogs, 3));
            life.assert_restores_exactly();
        });
    }
}

/// Invariant 2: a server is killed while an intent is written, which is in the page cache then and not on the
/// medium. The next one must not take it for durable, or a power cut brings the blocks of its region back.
#[test]
fn intent_whose_write_was_cut_by_a_kill_is_durable_before_the_next_write_into_its_region() {
    let ground = Ground::new();
    let random = &mut Random::new(SEED_DEFAULT);
    let session = [Step::Begin, burst(vec![write(0, 0, 8)])];
    let world = World::new(&Remains::default());
    provision(&ground.provision_options(&world, 0, false)).unwrap();
    let mut life = ground.open(world.options(EngineKind::Sync));
    life.step(&Step::Drain);
    let from = world.recorder.position();
    session.iter().for_each(|step| life.step(step));
    let moments = world.recorder.moments();
    let is_intent =
        |moment: &Moment| matches!(&moment.event, Event::Begin(_, Change::Write { durable, .. }) if *durable);
    let intent = from + moments[from..].iter().position(is_intent).unwrap();
    for _ in 0..60 {
        world.at_cuts(&moments, &[intent + 1], |_, look| {
            let world = World::new(&look.end(Ending::Kill, random));
            let mut life = ground.open(world.options(EngineKind::Sync));
            session.iter().for_each(|step| life.step(step));
            let moments = world.recorder.moments();
            world.at_cuts(&moments, &[moments.len()], |_, look| {
                let world = World::new(&look.end(Ending::PowerCut, random));
                let mut life = ground.open(world.options(EngineKind::Sync));
                life.begin();
                life.read_windows();
                life.assert_restores_exactly();
            });
        });
    }
}
