//! A disk that lives through power cuts, and what they have left each time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pristine_tests::guest::Guest;
use pristine_tests::images;
use pristine_tests::lab::Lab;
use pristine_tests::medium;
use pristine_tests::outer::{Machine, Plan, make_file_system};
use pristine_tests::program::client_binary;
use pristine_tests::random::Random;
use serde_json::Value;

use crate::moments::{Moment, SIZE, steps};

/// At most so many blocks are read back after a cut.
const READ_BACK: usize = 30;
const MIB: u64 = 1 << 20;
const SIZE_BLOCKS: u64 = SIZE / images::BLOCK;
/// Where the base has data: offset and length in MiB.
const DATA: [(u64, u64); 7] = [(0, 4), (40, 2), (64, 4), (128, 4), (192, 4), (230, 2), (264, 4)];

/// What the cuts found.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) cuts: u64,
    moments: BTreeMap<Moment, u64>,
    /// Cuts after which blocks of a session were on the medium, and how many blocks.
    pub(crate) with_session_data: (u64, u64),
    /// Of these, blocks that no readable log names: only an intent speaks for them.
    unlogged: (u64, u64),
    pristine: u64,
    partly_pending: u64,
    all_pending: u64,
    distrusted: Vec<String>,
    unfinished_provisions: u64,
    /// Cuts that took the disk's cache, and how many blocks of the file system went with it.
    cache_lost: (u64, u64),
    /// Blocks of sessions that were read as the base's in the next session, before they were restored.
    read_back: u64,
}

/// A disk's life under power cuts.
pub(crate) struct Life {
    lab: Lab,
    machine: Machine,
    seed: u64,
    moments: Vec<Moment>,
    pub(crate) counts: Counts,
    /// The youngest disk whose provisioning was reported.
    disk: u64,
    /// The youngest disk whose provisioning was begun.
    newest: u64,
    /// Whether it was reported that the disk is pristine, and nothing was begun since.
    pristine: bool,
    /// Whether the next cut takes the disk's cache.
    loses_cache: bool,
    /// Offsets of some blocks, by disk, that the last cut has left different from the base.
    differing: BTreeMap<u64, Vec<String>>,
}

impl Life {
    pub(crate) fn new(file_system: &str, program: &Path, seed: u64, moments: Vec<Moment>) -> Self {
        let lab = Lab::new();
        make_file_system(file_system, &lab.path("medium"), 1536 * MIB);
        let data = DATA.map(|(offset, len)| (offset * MIB, len * MIB));
        images::sparse(&lab.base(), SIZE, seed, &data);
        File::create(lab.path("outbox")).and_then(|file| file.set_len(SIZE)).unwrap();
        let machine = Machine::new(Plan {
            modules: vec!["xfs".into(), "libcrc32c".into()],
            programs: vec![
                ("bin/pristine".into(), program.to_owned()),
                ("bin/vhost-client".into(), client_binary()),
            ],
            script: include_str!("../../guest/power_cut.sh").replace("KIND", file_system),
            ..Plan::default()
        });
        let (counts, disk, newest) = (Counts::default(), 0, 0);
        Self {
            lab,
            machine,
            seed,
            moments,
            counts,
            disk,
            newest,
            pristine: false,
            loses_cache: false,
            differing: BTreeMap::new(),
        }
    }

    /// Lives through `cuts` power cuts. `Err`: a disk that was restored is not the base.
    pub(crate) fn run(&mut self, cuts: u64) -> Result<(), String> {
        let mut guest = self.boot(0);
        let data = DATA.map(|(offset, len)| format!("{offset}:{len}")).join(" ");
        guest.step(&format!("make_base {data}"));
        guest.step("provision 1");
        (self.disk, self.newest, self.pristine) = (1, 1, true);
        for cut in 0..cuts {
            let mut random = Random::new(self.seed << 32 | cut);
            let moment = self.moments[(cut % self.moments.len() as u64) as usize];
            println!("cut {cut}: {moment:?}");
            if moment == Moment::Recovery {
                self.restore_until_cut(guest, &mut random);
            } else {
                self.live_until_cut(guest, moment, &mut random);
            }
            self.counts.cuts += 1;
            *self.counts.moments.entry(moment).or_default() += 1;
            guest = self.boot(cut + 1);
            let next = self.moments[((cut + 1) % self.moments.len() as u64) as usize];
            self.look(&mut guest);
            if next != Moment::Recovery || cut + 1 == cuts {
                self.recover(&mut guest, &mut random).map_err(|why| {
                    format!("after cut {cut} (seed {}, {moment:?}): {why}\n{}", self.seed, guest.output())
                })?;
            }
        }
        let base = self.posted(&guest.step("post /mnt/base"));
        assert!(base == fs::read(self.lab.base()).unwrap(), "the base was written to");
        guest.type_line("off");
        guest.finish();
        Ok(())
    }

    /// Boots for the cut with this number.
    fn boot(&mut self, cut: u64) -> Guest {
        let paths = [self.lab.path("medium"), self.lab.base(), self.lab.path("outbox")];
        // Every other cut takes the cache of the disk as well.
        let log = self.lab.path("log");
        self.loses_cache = Random::new(self.seed << 33 | cut).below(2) == 0;
        if self.loses_cache {
            medium::copy(&paths[0], &self.lab.path("before"));
            medium::new_log(&log);
        }
        let log = self.loses_cache.then_some(log.as_path());
        let mut guest = self.machine.boot_logged(&paths.each_ref().map(PathBuf::as_path), log);
        guest.said("ready");
        guest
    }

    /// What the guest's `post` has put into the outbox.
    fn posted(&self, said: &[String]) -> Vec<u8> {
        let size = said.iter().find_map(|words| words.strip_prefix("post ")).unwrap();
        let mut bytes = fs::read(self.lab.path("outbox")).unwrap();
        bytes.truncate(size.parse().unwrap());
        bytes
    }

    /// Sees what disks the cut has left, and in what state; drops a half-made one.
    fn look(&mut self, guest: &mut Guest) {
        let said = guest.step("list");
        let ready: Vec<u64> = said
            .iter()
            .filter_map(|words| words.strip_prefix("disk ")?.strip_suffix(" ready")?.parse().ok())
            .collect();
        assert!(
            ready.contains(&self.disk),
            "disk {} was provisioned, and is not there after the cut: {said:?}",
            self.disk
        );
        if self.newest > self.disk && !ready.contains(&self.newest) {
            self.counts.unfinished_provisions += 1;
        }
        for disk in ready {
            let report = self.posted(&guest.step(&format!("inspect {disk}")));
            self.note(disk, &String::from_utf8(report).unwrap(), guest);
        }
    }

    /// Counts what one disk's report says.
    fn note(&mut self, disk: u64, report: &str, guest: &Guest) {
        let parsed = |prefix: &str| -> Vec<Value> {
            let lines = report.lines().filter_map(|line| line.strip_prefix(prefix));
            lines.map(|json| serde_json::from_str(json).unwrap_or_default()).collect()
        };
        let (status, verify) = (&parsed("status ")[0], &parsed("verify ")[0]);
        assert!(status.is_object() && verify.is_object(), "{report}\n{}", guest.output());
        let differing = blocks_of(verify);
        let logged: BTreeSet<u64> = parsed("log ").iter().flat_map(blocks_of).collect();
        let unlogged = differing.difference(&logged).count() as u64;
        let pending = status["pending_blocks"].as_u64().unwrap();
        println!(
            "  disk {disk}: {}, {pending} pending, {} differ from the base, {unlogged} of them in no log",
            status["state"],
            differing.len()
        );
        let some = differing.iter().step_by(differing.len() / READ_BACK + 1);
        self.differing.insert(disk, some.map(|block| (block * images::BLOCK).to_string()).collect());
        let counts = &mut self.counts;
        if !differing.is_empty() {
            counts.with_session_data.0 += 1;
            counts.with_session_data.1 += differing.len() as u64;
        }
        if unlogged > 0 {
            counts.unlogged.0 += 1;
            counts.unlogged.1 += unlogged;
        }
        match pending {
            0 => counts.pristine += 1,
            SIZE_BLOCKS => counts.all_pending += 1,
            _ => counts.partly_pending += 1,
        }
        if let Some(why) = status["distrust"].as_str() {
            counts.distrusted.push(why.to_owned());
        }
        if self.pristine && disk == self.disk {
            assert_eq!((pending, differing.len()), (0, 0), "it was reported that all is restored: {report}");
        }
    }

    /// `restore`, `verify`, and a comparison that `pristine` has no part in. Every other time the disk is
    /// served first as it is, and blocks that differ from the base are read.
    fn recover(&mut self, guest: &mut Guest, random: &mut Random) -> Result<(), String> {
        let said = guest.step("list");
        let mut disks: Vec<u64> =
            said.iter().filter_map(|words| words.split(' ').nth(1)?.parse().ok()).collect();
        disks.sort_unstable();
        let last = *disks.last().ok_or("there is no disk")?;
        for disk in disks {
            guest.step(&format!("choose {disk}"));
            let differing = self.differing.remove(&disk).unwrap_or_default();
            if !differing.is_empty() && random.below(2) == 0 {
                self.counts.read_back += differing.len() as u64;
                let said = guest.step(&format!("read_back {}", differing.join(" ")));
                if !said.contains(&format!("same {}", differing.len())) {
                    return Err(format!("a session on disk {disk} read what an earlier one wrote: {said:?}"));
                }
            }
            guest.step("restore");
            let said = guest.step("verify");
            if !said.contains(&"verified 0".to_owned()) {
                return Err(format!("disk {disk}: {said:?}"));
            }
            let (disk_bytes, base) = (self.posted(&said), fs::read(self.lab.base()).unwrap());
            if disk_bytes != base {
                return Err(format!("disk {disk} has other bytes than the base, and verify does not say so"));
            }
            if disk != last {
                guest.step(&format!("forget /mnt/{disk}"));
            }
        }
        (self.disk, self.newest, self.pristine) = (last, last, true);
        Ok(())
    }

    /// Cuts the power while the last cut's damage is being repaired.
    fn restore_until_cut(&mut self, mut guest: Guest, random: &mut Random) {
        guest.step(&format!("choose {}", self.disk));
        guest.type_line("restore");
        self.cut(guest, random.below(800), random);
    }

    fn live_until_cut(&mut self, mut guest: Guest, moment: Moment, random: &mut Random) {
        let steps = steps(moment, self.disk + 1, self.loses_cache, random);
        self.newest += u64::from(steps.provisions);
        for step in &steps.before {
            self.pristine &= step.starts_with("pressure");
            let said = guest.step(step);
            self.hear(&said, step);
        }
        for step in &steps.under_way {
            self.pristine = false;
            guest.type_line(step);
        }
        self.cut(guest, random.below(steps.delay_ms_max), random);
    }

    /// Takes note of what counts from now on, whatever happens.
    fn hear(&mut self, said: &[String], step: &str) {
        if said.iter().any(|words| *words == format!("provisioned {}", self.newest)) {
            (self.disk, self.pristine) = (self.newest, step == format!("provision {}", self.newest));
        }
        if said.iter().any(|words| words == "restored 0") || step == "drained" {
            self.pristine = true;
        }
    }

    /// The cut itself. The kernel in the machine loses what it has in its page cache; the disk, if it does,
    /// what it was not asked to flush.
    fn cut(&mut self, guest: Guest, after_ms: u64, random: &mut Random) {
        std::thread::sleep(Duration::from_millis(after_ms));
        if self.loses_cache {
            guest.freeze();
        }
        let said = guest.cut();
        println!("  power off {after_ms} ms later; said {said:?}");
        self.hear(&said, "");
        if self.loses_cache {
            let (before, log) = (self.lab.path("before"), self.lab.path("log"));
            let lost = medium::lose_power(&before, &log, random).unwrap();
            println!("  {lost:?}");
            self.counts.cache_lost.0 += 1;
            self.counts.cache_lost.1 += lost.lost;
            fs::rename(before, self.lab.path("medium")).unwrap();
        }
    }
}

/// The blocks of the extents in a report of `verify` or `log show`.
fn blocks_of(report: &Value) -> BTreeSet<u64> {
    let extents: Vec<(u64, u64)> = serde_json::from_value(report["extents"].clone()).unwrap_or_default();
    extents.into_iter().flat_map(|(first, count)| first..first + count).collect()
}
