use std::{os::unix::process::ExitStatusExt, path::PathBuf, process::Command, time::Duration};

use proptest::prelude::*;
use rustix::process::Signal;
use tempfile::TempDir;

use super::*;
use crate::{File, OpenOptions};

const OWNER: [u64; 2] = [77, 88];

fn opened(dir: &TempDir) -> Redo {
    let redo = Redo::open(&dir.path().join("redo")).unwrap();
    redo.begin(OWNER);
    redo
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 21) as u8).collect()
}

/// Copies parts of these lengths, one after the other from `data`, to `to`.
fn write(redo: &Redo, offset: u64, to: &mut [u8], data: &[u8], lens: &[usize]) {
    let mut rest = data.to_vec();
    let mut memory: Vec<Vec<u8>> = lens.iter().map(|len| rest.drain(..*len).collect()).collect();
    let parts: Vec<IoVec> =
        memory.iter_mut().map(|part| IoVec { base: part.as_mut_ptr(), len: part.len() }).collect();
    assert!(data.len() <= to.len());
    // SAFETY: the parts are vectors, and `to` is long enough.
    unsafe { redo.slot().unwrap().write(offset, to.as_mut_ptr(), &parts) };
}

/// What is left when a process is killed after so many of the steps: 1 the data, 2 armed, 3 a part of the copy.
fn killed_after(step: u32, redo: &Redo, offset: u64, data: &[u8], to: &mut [u8]) {
    let slot = redo.slot().unwrap();
    // SAFETY: a slot is a page, and nobody else uses it.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), slot.data(), data.len()) };
    if step >= 2 {
        slot.arm(offset, data.len());
    }
    if step >= 3 {
        to[..data.len() / 2 + 1].copy_from_slice(&data[..data.len() / 2 + 1]);
    }
}

proptest! {
    #[test]
    fn copy_by_way_of_a_slot_is_the_parts_one_after_the_other(
        offset in 0..3 * PAGE as u64,
        lens in prop::collection::vec(prop_oneof![0..200usize, 0..3 * PAGE, Just(PAGE)], 0..5),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let redo = opened(&dir);
        let len: usize = lens.iter().sum();
        let data = content(len);
        let mut to = vec![0xee; len + 100];
        write(&redo, offset, &mut to, &data, &lens);
        prop_assert!(to[..len] == data[..] && to[len..].iter().all(|byte| *byte == 0xee));
        prop_assert_eq!(redo.unfinished(OWNER), []);
    }
}

#[test]
fn write_that_was_cut_is_found_by_who_opens_the_file_next() {
    let dir = tempfile::tempdir().unwrap();
    for (step, offset, len) in [(1, 512, 512), (2, 7 << 40, PAGE), (3, PAGE as u64, PAGE), (3, 1024, 1)] {
        let (data, mut to) = (content(len), vec![0; PAGE]);
        killed_after(step, &opened(&dir), offset, &data, &mut to);
        let next = Redo::open(&dir.path().join("redo")).unwrap();
        let expected = if step == 1 { vec![] } else { vec![Unfinished { offset, data }] };
        assert_eq!(next.unfinished(OWNER), expected);
        assert_eq!(next.unfinished(OWNER), expected, "who is killed meanwhile finds it again");
        next.begin(OWNER);
        assert_eq!(next.unfinished(OWNER), []);
    }
}

#[test]
fn all_that_threads_had_begun_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let redo = opened(&dir);
    let slots: Vec<Slot<'_>> = std::iter::from_fn(|| redo.slot()).collect();
    assert_eq!(slots.len(), SLOTS);
    for (index, slot) in slots.iter().enumerate() {
        // SAFETY: a slot is a page.
        unsafe { slot.data().write_bytes(index as u8, PAGE) };
        slot.arm(index as u64 * 8192, 1000 + index);
    }
    let mut found = Redo::open(&dir.path().join("redo")).unwrap().unfinished(OWNER);
    found.sort_by_key(|write| write.offset);
    let expected =
        |index: usize| Unfinished { offset: index as u64 * 8192, data: vec![index as u8; 1000 + index] };
    assert_eq!(found, (0..SLOTS).map(expected).collect::<Vec<_>>());
    drop(slots);
    assert!(redo.slot().is_some());
}

/// Invariant 2: what somebody else has left may be of any session.
#[test]
fn what_another_owner_left_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let mut to = vec![0; PAGE];
    killed_after(2, &opened(&dir), 0, &content(PAGE), &mut to);
    let next = Redo::open(&dir.path().join("redo")).unwrap();
    assert_eq!(next.unfinished(OWNER).len(), 1);
    for other in [[77, 89], [78, 88], [0, 0], [88, 77]] {
        assert_eq!(next.unfinished(other), []);
    }
    next.begin([1, 2]);
    assert_eq!((next.unfinished(OWNER), next.unfinished([1, 2])), (vec![], vec![]));
}

/// Nor what makes no sense.
#[test]
fn lengths_that_no_slot_can_have_are_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let redo = opened(&dir);
    for len in [0, PAGE as u64 + 1, 1 << 40, u64::MAX] {
        let [place, count] = redo.words_of(3);
        place.store(0, Ordering::Release);
        count.store(len, Ordering::Release);
        assert_eq!(redo.unfinished(OWNER), []);
    }
    redo.words_of(3)[1].store(PAGE as u64, Ordering::Release);
    assert_eq!(redo.unfinished(OWNER).len(), 1);
    // Over the end of a page of the file.
    redo.words_of(3)[0].store(512, Ordering::Release);
    assert_eq!(redo.unfinished(OWNER), []);
    redo.words_of(3)[0].store(0, Ordering::Release);
    redo.word(0).store(MAGIC + 1, Ordering::Release);
    assert_eq!(redo.unfinished(OWNER), []);
}

/// Nothing of a session stays where nobody needs it.
#[test]
fn wiped_slots_have_no_data_and_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let redo = opened(&dir);
    let (data, mut to) = (content(PAGE), vec![0; PAGE]);
    let bytes_of = |value: &[u8]| {
        let file = std::fs::read(dir.path().join("redo")).unwrap();
        file.windows(value.len()).any(|window| window == value)
    };
    for _ in 0..3 {
        write(&redo, 0, &mut to, &data, &[PAGE]);
        assert!(bytes_of(&data[..512]));
        redo.wipe();
        assert!(!bytes_of(&data[..512]));
        assert!(to == data);
    }
    write(&redo, 0, &mut to, &data, &[PAGE]);
    let next = Redo::open(&dir.path().join("redo")).unwrap();
    next.begin(OWNER);
    assert!(!bytes_of(&data[..512]));
}

#[test]
fn file_of_another_size_or_kind_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("redo");
    std::fs::write(&path, [1; 100]).unwrap();
    assert_eq!(Redo::open(&path).unwrap_err().io_error().kind(), std::io::ErrorKind::InvalidData);
    assert_eq!(std::fs::read(&path).unwrap(), [1; 100]);
    assert!(Redo::open(dir.path()).is_err());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
    assert!(Redo::open(&link).is_err());
    let made = dir.path().join("made");
    drop(Redo::open(&made).unwrap());
    let metadata = std::fs::metadata(&made).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777, 0o600);
}

const CHILD: &str = "BLOCKIO_REDO_CHILD";
const PAGES: usize = 8;

/// Writes pages of a file, each of one byte's value, until it is killed.
#[test]
#[ignore = "a process of its own, for the test below"]
fn child_that_writes() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let file = File::open(&dir.join("file"), options).unwrap();
    let redo = std::sync::Arc::new(Redo::open(&dir.join("redo")).unwrap());
    redo.begin(OWNER);
    file.map_resident(Some(&redo));
    let (map, mut begun) = (file.resident().unwrap(), false);
    for value in 1..u64::MAX {
        let mut data = [value as u8; 2 * PAGE];
        // In one part, and in two that end in the middle of a sector.
        let cut = if value % 2 == 0 { 0 } else { 700 };
        let (first, second) = data.split_at_mut(cut);
        let parts = [first, second].map(|part| IoVec { base: part.as_mut_ptr(), len: part.len() });
        let offset = value % (PAGES as u64 - 1) * PAGE as u64;
        // SAFETY: the parts are of an array that nobody else uses.
        if unsafe { map.write(offset, &parts) } && !begun {
            std::fs::write(dir.join("begun"), []).unwrap();
            begun = true;
        }
    }
}

/// Invariant 3: no kill, at whatever instruction, leaves a part of a sector behind when what was under way is done to its end.
#[test]
fn sectors_are_whole_after_a_kill_at_any_moment() {
    let place = |dir: &str| tempfile::tempdir_in(dir).ok();
    let Some(dir) = place("/dev/shm") else { return };
    std::fs::write(dir.path().join("file"), [0; PAGES * PAGE]).unwrap();
    let mut found = 0;
    for round in 0..40u64 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "redo::tests::child_that_writes", "--ignored"]).env(CHILD, dir.path());
        let mut child = child.stdout(std::process::Stdio::null()).spawn().unwrap();
        let begin = std::time::Instant::now();
        while !dir.path().join("begun").exists() {
            assert!(begin.elapsed() < Duration::from_secs(60), "the child does not write");
            std::thread::yield_now();
        }
        // A moment anywhere in its writes; not a wait for anything.
        std::thread::sleep(Duration::from_micros(round * 37 % 1000));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
        std::fs::remove_file(dir.path().join("begun")).unwrap();
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = File::open(&dir.path().join("file"), options).unwrap();
        for write in Redo::open(&dir.path().join("redo")).unwrap().unfinished(OWNER) {
            file.write_all_at(&write.data, write.offset).unwrap();
            found += 1;
        }
        let mut all = [0; PAGES * PAGE];
        file.read_exact_at(&mut all, 0).unwrap();
        for (sector, bytes) in all.chunks(512).enumerate() {
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "sector {sector}, round {round}");
        }
    }
    assert!(found > 0, "no kill came in the middle of a write");
}
