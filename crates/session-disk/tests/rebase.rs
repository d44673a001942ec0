//! Moving disks between generations of their base: which blocks that takes, what is refused, and what is left when
//! something fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use base_image::{Delta, Seal, manifest_path};
use blockio::EngineKind;
use common::generations::{self, Generation, Known};
use common::image::Expected;
use common::schedule::{Schedule, When};
use common::{copy_dir, end, fast_dir, write};
use session_disk::{
    Basis, Changes, DiskOptions, DiskState, Distrust, Error, HoldReason, Manifest, ProcessId,
    ProvisionOptions, RebaseOptions, Rebased, SessionDisk, Way, provision, rebase, status,
};

const DISK_SIZE: u64 = (1 << 20) + 512;
/// The second ends in the middle of a chunk, the third is as large as the disk.
const SIZES: [u64; 3] = [(1 << 20) - 4 * 4096 + 1024, (1 << 20) - 18 * 4096 + 512, DISK_SIZE];
const WINDOWS: [Range<u64>; 3] = [0..24, 100..124, 230..257];

/// Some generations, and a disk of the first.
struct Lab {
    dir: tempfile::TempDir,
    bases: Vec<Generation>,
    options: DiskOptions,
}

fn lab(known: Known) -> Lab {
    let dir = fast_dir();
    let bases = generations::make(&dir.path().join("bases"), &SIZES, DISK_SIZE, &WINDOWS, known);
    let options = DiskOptions {
        runtime_dir: Some(dir.path().join("run")),
        engine: Some(EngineKind::Sync),
        keep_logs: 2,
        ..DiskOptions::new(dir.path().join("disk.raw"))
    };
    provision(&ProvisionOptions {
        size: Some(DISK_SIZE),
        ..ProvisionOptions::new(&bases[0].path, options.clone())
    })
    .unwrap();
    Lab { dir, bases, options }
}

impl Lab {
    fn pristine(known: Known) -> Self {
        let lab = lab(known);
        lab.restore();
        lab
    }

    fn open(&self) -> Arc<SessionDisk> {
        SessionDisk::open(&self.options).unwrap()
    }

    fn to(&self, base: &Path) -> Result<Rebased, Error> {
        self.rebase(&RebaseOptions::new(base, self.options.clone()))
    }

    fn rebase(&self, options: &RebaseOptions) -> Result<Rebased, Error> {
        rebase(options, &AtomicBool::new(false), &mut |_| ())
    }

    /// Restores all; the disk is exactly what its base says then.
    #[track_caller]
    fn restore(&self) -> u64 {
        let disk = self.open();
        let restored = disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        disk.stop().unwrap();
        let base = generations::of_disk(&self.bases, &self.options);
        assert_eq!(base.image.differences(&self.options.disk), Vec::<u64>::new());
        assert_eq!(status(&self.options).unwrap().state, DiskState::Pristine);
        restored
    }

    /// A session that writes these blocks, from its start to its end.
    fn session(&self, blocks: Range<u64>) {
        let disk = self.open();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        let bytes = vec![0xee; (blocks.end - blocks.start) as usize * 4096];
        write(&disk, &mut queue, blocks.start * 8, &bytes);
        end(&disk, queue);
        disk.stop().unwrap();
    }

    /// Fails unless the first session reads what the disk's base holds, although nothing was restored.
    fn assert_reads_its_base(&self) {
        let disk = self.open();
        let pending = disk.pending_blocks();
        disk.begin_session(None).unwrap();
        let mut queue = disk.queue(8).unwrap();
        let expected = Expected::of_base(&generations::of_disk(&self.bases, &self.options).image);
        assert!(expected.read(&disk, &mut queue, 0..DISK_SIZE.div_ceil(4096)));
        end(&disk, queue);
        assert_eq!(disk.pending_blocks(), pending);
        disk.stop().unwrap();
    }

    /// Fails unless a refusal has left all as it was.
    #[track_caller]
    fn assert_refused(&self, options: &RebaseOptions, word: &str) -> Error {
        let before = std::fs::read(self.options.paths().manifest()).unwrap();
        let error = self.rebase(options).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(std::fs::read(self.options.paths().manifest()).unwrap(), before);
        error
    }

    fn wanted(&self, base: usize) -> RebaseOptions {
        RebaseOptions::new(&self.bases[base].path, self.options.clone())
    }
}

/// Invariant 4, there and back again, over all kinds of steps between generations of three sizes: with what is known of
/// their differences, lazily provisioned and pristine disks, and sessions in between.
#[test]
fn disk_moved_to_any_generation_reads_it_at_once_and_is_restored_exactly() {
    for known in [Known::Nothing, Known::Manifests, Known::Deltas] {
        for is_lazy in [true, false] {
            let lab = if is_lazy { lab(known) } else { Lab::pristine(known) };
            for (step, to) in [1, 2, 0, 2, 1, 0, 0, 1].into_iter().enumerate() {
                if step % 3 == 1 {
                    lab.session(98..105);
                }
                let before = status(&lab.options).unwrap().pending_blocks;
                let rebased = lab.to(&lab.bases[to].path).unwrap();
                assert_eq!(rebased.pending_before, before);
                assert_eq!(status(&lab.options).unwrap().pending_blocks, rebased.pending_blocks);
                lab.assert_reads_its_base();
                if step % 2 == 0 {
                    assert_eq!(lab.restore(), rebased.pending_blocks);
                }
            }
            lab.restore();
        }
    }
}

/// What is restored is what differs, and what the last session has left. No more; by manifests alone whole chunks.
#[test]
fn rebase_moves_what_differs_and_what_the_session_left() {
    for known in [Known::Nothing, Known::Manifests, Known::Deltas] {
        let lab = Lab::pristine(known);
        let differing = generations::differing(&lab.bases[0].image, &lab.bases[1].image);
        // Two blocks of the session are among them, or would be.
        lab.session(60..70);
        lab.session(2..4);
        assert!(differing.contains(&3) && !differing.contains(&2));
        let rebased = lab.to(&lab.bases[1].path).unwrap();
        assert_eq!((rebased.pending_before, rebased.blocks), (12, DISK_SIZE.div_ceil(4096)));
        let mut dirty: Vec<u64> = (60..70).chain(2..4).collect();
        match known {
            Known::Nothing => {
                assert_eq!(rebased.way, Way::Comparison);
                assert_eq!(rebased.differing_blocks, differing.len() as u64 - 1);
            }
            Known::Manifests => {
                assert_eq!(rebased.way, Way::Manifests);
                let mut chunks: Vec<u64> = differing.iter().map(|block| block / 16).collect();
                chunks.dedup();
                let blocks: Vec<u64> =
                    chunks.into_iter().flat_map(|chunk| chunk * 16..chunk * 16 + 16).collect();
                // The last chunk ends with the larger base.
                dirty.extend(blocks.into_iter().filter(|block| *block < SIZES[0].div_ceil(4096)));
            }
            Known::Deltas => {
                assert_eq!((rebased.way, rebased.differing_blocks), (Way::Deltas(1), differing.len() as u64));
            }
        }
        dirty.extend(&differing);
        dirty.sort_unstable();
        dirty.dedup();
        assert_eq!(rebased.pending_blocks, dirty.len() as u64, "{known:?}");
        assert_eq!(lab.restore(), dirty.len() as u64);
    }
}

/// Over several generations, in both directions; what was changed and changed back is known by the manifests.
#[test]
fn chain_of_deltas_is_walked_in_both_directions() {
    let lab = Lab::pristine(Known::Deltas);
    for (from, to) in [(0, 2), (2, 0)] {
        let rebased = lab.to(&lab.bases[to].path).unwrap();
        assert_eq!(rebased.way, Way::Deltas(2));
        let differing = generations::differing(&lab.bases[from].image, &lab.bases[to].image).len() as u64;
        let first = generations::differing(&lab.bases[0].image, &lab.bases[1].image);
        let second = generations::differing(&lab.bases[1].image, &lab.bases[2].image);
        let union = first.iter().chain(&second).collect::<std::collections::BTreeSet<_>>().len() as u64;
        assert!((differing..=union).contains(&rebased.differing_blocks), "{rebased:?}");
        assert_eq!(lab.restore(), rebased.pending_blocks);
    }
}

/// Where a manifest lies elsewhere, as that of an NBD export does, so may the delta.
#[test]
fn delta_beside_a_manifest_that_lies_elsewhere_is_found() {
    let lab = Lab::pristine(Known::Deltas);
    let elsewhere = lab.dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let manifest = elsewhere.join("next.manifest");
    std::fs::rename(manifest_path(&lab.bases[1].path), &manifest).unwrap();
    std::fs::rename(Delta::path_of(&lab.bases[1].path), elsewhere.join("next.delta")).unwrap();
    let mut to = lab.wanted(1);
    to.base.seal = Some(manifest);
    assert_eq!(lab.rebase(&to).unwrap().way, Way::Deltas(1));
    lab.restore();
    assert_eq!(lab.to(&lab.bases[0].path).unwrap().way, Way::Deltas(1));
    lab.restore();
}

/// The old base is not needed: it may be gone, with its manifest, if there is a delta; without one the disk itself is compared.
#[test]
fn old_base_that_is_gone_is_not_missed() {
    for known in [Known::Nothing, Known::Deltas] {
        let lab = Lab::pristine(known);
        lab.session(10..20);
        std::fs::remove_file(&lab.bases[0].path).unwrap();
        let _ = std::fs::remove_file(manifest_path(&lab.bases[0].path));
        assert!(matches!(SessionDisk::open(&lab.options), Err(Error::Base(_))));
        let rebased = lab.to(&lab.bases[1].path).unwrap();
        let way = if known == Known::Nothing { Way::Comparison } else { Way::Deltas(1) };
        assert_eq!((rebased.way, rebased.pending_before), (way, 10));
        lab.restore();
    }
}

/// Invariant 5: a base that was changed in place is another one, and the disk can be moved to it.
#[test]
fn base_that_was_changed_in_place_is_moved_to() {
    for known in [Known::Nothing, Known::Manifests] {
        let lab = Lab::pristine(known);
        lab.bases[1]
            .image
            .write_into(&std::fs::File::options().write(true).open(&lab.bases[0].path).unwrap());
        if known == Known::Manifests {
            generations::seal(&lab.bases[0].path);
        }
        assert!(SessionDisk::open(&lab.options).is_err());
        let rebased = lab.to(&lab.bases[0].path).unwrap();
        assert_eq!(rebased.way, Way::Comparison);
        let differing = generations::differing(&lab.bases[0].image, &lab.bases[1].image).len() as u64;
        assert_eq!(rebased.pending_blocks, differing);
        let disk = lab.open();
        disk.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
        disk.stop().unwrap();
        assert_eq!(lab.bases[1].image.differences(&lab.options.disk), Vec::<u64>::new());
    }
}

#[test]
fn same_base_at_another_place_costs_nothing() {
    let lab = Lab::pristine(Known::Manifests);
    let copy = lab.dir.path().join("copy.raw");
    std::fs::copy(&lab.bases[0].path, &copy).unwrap();
    std::fs::copy(manifest_path(&lab.bases[0].path), manifest_path(&copy)).unwrap();
    let rebased = lab.to(&copy).unwrap();
    assert_eq!((rebased.way, rebased.pending_blocks), (Way::Same, 0));
    assert_eq!(status(&lab.options).unwrap().state, DiskState::Pristine);
    assert_eq!(
        Manifest::load(&lab.options.paths()).unwrap().base.path.as_path(),
        copy.canonicalize().unwrap()
    );

    let lab = Lab::pristine(Known::Nothing);
    // After a session that has written nothing, whose log is still there.
    let disk = lab.open();
    disk.begin_session(None).unwrap();
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(status(&lab.options).unwrap().logs, 1);
    assert_eq!(lab.to(&lab.bases[0].path).unwrap().way, Way::Same);
    let now = status(&lab.options).unwrap();
    assert_eq!((now.state, now.logs, now.pending_blocks), (DiskState::Pristine, 0, 0));
    // Of a copy that is not sealed nothing is known.
    std::fs::copy(&lab.bases[0].path, lab.dir.path().join("copy.raw")).unwrap();
    let rebased = lab.to(&lab.dir.path().join("copy.raw")).unwrap();
    assert_eq!((rebased.way, rebased.pending_blocks), (Way::Comparison, 0));
}

/// Invariant 6: a delta that hides what differs is found out by the manifests, one that is damaged is not used, and one of
/// other generations leads nowhere.
#[test]
fn deltas_that_are_wrong_are_not_believed() {
    let lab = Lab::pristine(Known::Deltas);
    let generation = |base: usize| Seal::of(&lab.bases[base].path).unwrap().unwrap().generation();
    let path = Delta::path_of(&lab.bases[1].path);
    Delta::new(generation(0), generation(1), vec![blocks::Extent::new(0, 24)]).write(&path).unwrap();
    assert_eq!(lab.to(&lab.bases[1].path).unwrap().way, Way::Manifests);
    lab.restore();
    std::fs::write(&path, b"PRISTINE DELTA 1").unwrap();
    assert_eq!(lab.to(&lab.bases[0].path).unwrap().way, Way::Manifests);
    lab.restore();
    std::fs::remove_file(manifest_path(&lab.bases[0].path)).unwrap();
    // To one of which there is a manifest from one of which there is none.
    assert_eq!(lab.to(&lab.bases[1].path).unwrap().way, Way::Comparison);
    lab.restore();
}

/// Invariant 4: a delta that names a chunk that differs, but not all that differs in it, is made good by comparing.
#[test]
fn delta_that_leaves_out_a_part_of_a_chunk_is_made_good() {
    let lab = Lab::pristine(Known::Deltas);
    let generation = |base: usize| Seal::of(&lab.bases[base].path).unwrap().unwrap().generation();
    let differing = generations::differing(&lab.bases[0].image, &lab.bases[1].image);
    let mut firsts = differing.clone();
    firsts.dedup_by_key(|block| *block / 16);
    assert!(firsts.len() < differing.len());
    let extents = firsts.into_iter().map(|block| blocks::Extent::new(block, 1)).collect();
    Delta::new(generation(0), generation(1), extents).write(&Delta::path_of(&lab.bases[1].path)).unwrap();
    let rebased = lab.to(&lab.bases[1].path).unwrap();
    assert_eq!((rebased.way, rebased.differing_blocks), (Way::Deltas(1), differing.len() as u64));
    lab.restore();
}

/// Nothing has to be found out where everything is to be restored as it is.
#[test]
fn disk_all_of_which_is_pending_is_moved_without_a_look_at_it() {
    let lab = Lab::pristine(Known::Nothing);
    std::fs::remove_file(lab.options.paths().intents()).unwrap();
    lab.session(0..1);
    std::fs::remove_dir_all(lab.options.paths().sessions()).unwrap();
    let rebased = lab.to(&lab.bases[2].path).unwrap();
    assert_eq!((rebased.way, rebased.pending_before), (Way::AllPending, rebased.blocks));
    lab.restore();
}

#[test]
fn base_larger_than_the_disk_is_refused_with_what_to_do() {
    let lab = Lab::pristine(Known::Nothing);
    let large = lab.dir.path().join("large.raw");
    std::fs::File::create(&large).unwrap().set_len(DISK_SIZE + 512).unwrap();
    lab.assert_refused(&RebaseOptions::new(&large, lab.options.clone()), "pristine provision");
    lab.assert_refused(&RebaseOptions::new(&lab.options.disk, lab.options.clone()), "are the same file");
    lab.assert_refused(&RebaseOptions::new(lab.dir.path().join("gone"), lab.options.clone()), "gone");
}

#[test]
fn disk_that_is_served_is_refused() {
    let lab = Lab::pristine(Known::Nothing);
    let disk = lab.open();
    let error = lab.assert_refused(&lab.wanted(1), "it is served by process");
    assert!(matches!(error, Error::InUse { .. }));
    disk.stop().unwrap();
    drop(disk);
    lab.to(&lab.bases[1].path).unwrap();
    lab.restore();
}

/// Invariants 2 and 3: a session that a dead server left open keeps its base as long as its VM may come back. When that is
/// gone the session is over, and what it wrote is restored with the rest.
#[test]
fn disk_with_an_open_session_is_refused_until_its_vm_is_gone() {
    let lab = Lab::pristine(Known::Deltas);
    let gone = ProcessId { pid: std::process::id(), start_ticks: 1 };
    for (owner, whose) in
        [(Some(ProcessId::own()), Some("of process")), (None, Some("a session is open")), (Some(gone), None)]
    {
        let disk = lab.open();
        disk.begin_session(owner).unwrap();
        let mut queue = disk.queue(8).unwrap();
        write(&disk, &mut queue, 8 * 60, &[0xee; 3 * 4096]);
        drop(queue);
        // As a kill leaves it.
        drop(disk);
        if let Some(whose) = whose {
            let error = lab.assert_refused(&lab.wanted(1), whose);
            assert!(error.to_string().contains("session end"), "{error}");
            let resumed = SessionDisk::open(&DiskOptions { resume: true, ..lab.options.clone() }).unwrap();
            assert!(resumed.session_is_open());
            resumed.end_session().unwrap();
            resumed.drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
            resumed.stop().unwrap();
        } else {
            let rebased = lab.to(&lab.bases[1].path).unwrap();
            assert_eq!(rebased.pending_before, 3);
            // Nothing goes on with it, and there is nothing of it to be held.
            let disk = SessionDisk::open(&DiskOptions { resume: true, ..lab.options.clone() }).unwrap();
            assert!(!disk.session_is_open());
            assert!(disk.hold(HoldReason::ByOperator).is_err());
            disk.stop().unwrap();
        }
    }
    lab.restore();
}

/// Invariant 3: a copy of a disk has its ID too. Whoever moves the copy, or takes it over, leaves the original's session alone, which
/// goes on with its next server.
#[test]
fn copy_of_a_disk_whose_session_is_open_is_refused() {
    let lab = Lab::pristine(Known::Deltas);
    let disk = lab.open();
    disk.begin_session(Some(ProcessId::own())).unwrap();
    let mut queue = disk.queue(8).unwrap();
    write(&disk, &mut queue, 8 * 60, &[0xee; 3 * 4096]);
    drop((queue, disk));
    let copy = DiskOptions { disk: lab.dir.path().join("copy.raw"), ..lab.options.clone() };
    std::fs::copy(&lab.options.disk, &copy.disk).unwrap();
    copy_dir(lab.options.paths().state_dir(), copy.paths().state_dir());
    let refused = |error: Error| {
        assert!(matches!(&error, Error::InUse { by, .. } if by.contains("--adopt")), "{error}");
    };
    refused(lab.rebase(&RebaseOptions::new(&lab.bases[1].path, copy.clone())).unwrap_err());
    refused(SessionDisk::open(&copy).unwrap_err());
    let disk = SessionDisk::open(&DiskOptions { resume: true, ..lab.options.clone() }).unwrap();
    assert!(disk.session_is_open());
    disk.end_session().unwrap();
    disk.stop().unwrap();
    drop(disk);
    lab.restore();
}

#[test]
fn held_disk_is_refused_until_it_is_released() {
    let lab = Lab::pristine(Known::Deltas);
    let disk = lab.open();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    write(&disk, &mut queue, 8 * 60, &[0xee; 3 * 4096]);
    disk.hold(HoldReason::ByOperator).unwrap();
    end(&disk, queue);
    disk.stop().unwrap();
    drop(disk);
    let error = lab.assert_refused(&lab.wanted(1), "session release");
    assert!(matches!(error, Error::Held { .. }));
    let disk = lab.open();
    disk.release().unwrap();
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(lab.to(&lab.bases[1].path).unwrap().pending_before, 3);
    lab.restore();
}

/// Changes that are kept are given up by nobody's mistake.
#[test]
fn kept_changes_are_refused_until_they_are_given_up() {
    let lab = Lab::pristine(Known::Deltas);
    let disk = SessionDisk::open(&DiskOptions { changes: Changes::Keep, ..lab.options.clone() }).unwrap();
    disk.begin_session(None).unwrap();
    let mut queue = disk.queue(8).unwrap();
    write(&disk, &mut queue, 8 * 60, &[0xee; 3 * 4096]);
    end(&disk, queue);
    disk.stop().unwrap();
    drop(disk);
    let error = lab.assert_refused(&lab.wanted(1), "are kept");
    assert!(matches!(error, Error::Kept { .. }));
    let rebased = lab.rebase(&RebaseOptions { discard_kept: true, ..lab.wanted(1) }).unwrap();
    assert_eq!(rebased.pending_before, 3);
    assert!(!Manifest::load(&lab.options.paths()).unwrap().kept);
    lab.restore();
}

/// Invariants 2 and 6: a state of the old generation that is put back from a copy is found out, and speaks for nothing.
#[test]
fn state_from_before_a_rebase_that_is_put_back_is_not_believed() {
    let lab = Lab::pristine(Known::Deltas);
    lab.session(60..64);
    let paths = lab.options.paths();
    let copy = lab.dir.path().join("copy");
    copy_dir(paths.state_dir(), &copy);
    lab.to(&lab.bases[1].path).unwrap();
    lab.restore();
    std::fs::remove_dir_all(paths.state_dir()).unwrap();
    copy_dir(&copy, paths.state_dir());
    let disk = lab.open();
    assert_eq!(*disk.basis(), Basis::Everything(Distrust::OlderState));
    disk.stop().unwrap();
    drop(disk);
    assert_eq!(generations::of_disk(&lab.bases, &lab.options).path, lab.bases[0].path);
    lab.assert_reads_its_base();
    lab.restore();
}

#[test]
fn rebase_that_is_stopped_while_it_compares_changes_nothing() {
    let lab = Lab::pristine(Known::Nothing);
    let before = std::fs::read(lab.options.paths().manifest()).unwrap();
    let stopped = rebase(&lab.wanted(1), &AtomicBool::new(true), &mut |_| ());
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(std::fs::read(lab.options.paths().manifest()).unwrap(), before);
    assert_eq!(status(&lab.options).unwrap().state, DiskState::Pristine);
}

/// Invariants 4 and 6: every I/O of a rebase fails once, before it is made or after it was. The disk then belongs to one
/// generation or to the other, whole; and to the new one if the rebase has said so.
#[test]
fn rebase_any_io_of_which_fails_leaves_the_disk_on_one_generation() {
    let (mut runs, mut kept_old) = (0, 0);
    for is_pristine in [true, false] {
        for when in [When::Before, When::After] {
            for number in 0.. {
                let lab = Lab::pristine(Known::Deltas);
                if !is_pristine {
                    lab.session(60..64);
                }
                let schedule = Schedule::new(Some((number, when)));
                let options = DiskOptions { tape: Some(schedule.clone()), ..lab.options.clone() };
                let result = lab.rebase(&RebaseOptions::new(&lab.bases[1].path, options));
                let list = schedule.list();
                if list.len() as u64 <= number {
                    result.unwrap();
                    break;
                }
                let what = || format!("{when:?} I/O {number}: {}", list[number as usize]);
                runs += 1;
                let on_old = generations::of_disk(&lab.bases, &lab.options).path == lab.bases[0].path;
                kept_old += u64::from(on_old);
                assert!(result.is_err() || !on_old, "{}", what());
                let manifest = Manifest::load(&lab.options.paths()).unwrap();
                let logs = std::fs::read_dir(lab.options.paths().sessions()).unwrap().count();
                assert!(logs <= 2 + manifest.logs.len(), "{}: {logs} logs", what());
                lab.assert_reads_its_base();
                lab.restore();
                // And it can be moved, now that nothing fails any more.
                lab.to(&lab.bases[1].path).unwrap();
                lab.restore();
            }
        }
    }
    eprintln!("{runs} I/Os of a rebase failed; {kept_old} of them left the disk where it was");
    assert!(kept_old > 0 && kept_old < runs);
}

/// What the last session left can be held as long as nothing of it was restored, and a rebase that fails restores nothing.
#[test]
fn session_that_was_killed_can_be_held_after_a_rebase_that_failed() {
    let gone = ProcessId { pid: std::process::id(), start_ticks: 1 };
    let mut held = 0;
    for when in [When::Before, When::After] {
        for number in 0.. {
            let lab = Lab::pristine(Known::Deltas);
            let disk = lab.open();
            disk.begin_session(Some(gone)).unwrap();
            let mut queue = disk.queue(8).unwrap();
            write(&disk, &mut queue, 480, &[0x77; 4096]);
            // As a kill leaves it.
            drop((queue, disk));
            let content = std::fs::read(&lab.options.disk).unwrap();
            let schedule = Schedule::new(Some((number, when)));
            let options = DiskOptions { tape: Some(schedule.clone()), ..lab.options.clone() };
            let result = lab.rebase(&RebaseOptions::new(&lab.bases[1].path, options));
            if schedule.list().len() as u64 <= number {
                result.unwrap();
                break;
            }
            let on_old = generations::of_disk(&lab.bases, &lab.options).path == lab.bases[0].path;
            let disk = lab.open();
            match disk.hold(HoldReason::ByOperator) {
                Ok(_) => held += 1,
                Err(error) => assert!(!on_old, "{when:?} {}: {error}", schedule.list()[number as usize]),
            }
            assert!(on_old || disk.held().is_none(), "what the rebase is to change is held");
            assert!(std::fs::read(&lab.options.disk).unwrap() == content);
        }
    }
    assert!(held > 0);
}
