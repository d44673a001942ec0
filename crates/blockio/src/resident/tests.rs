use std::{
    collections::HashSet,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Command,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64},
    },
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{OpenOptions, coherence::mappable_places as places};

mod writes;

const PAGE: usize = PAGE_SIZE as usize;

/// A place whose pages are those of a disk: they can be dropped, and read again.
fn disk() -> Option<TempDir> {
    places().into_iter().find(|dir| !is_memory(dir))
}

fn is_memory(dir: &TempDir) -> bool {
    kept(made(dir.path(), "probe of memory", 1)).unwrap() == Some(Kept::InMemory)
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 21) as u8).collect()
}

/// A new file of so many bytes of [`content`], all in the page cache.
fn made(dir: &Path, name: &str, bytes: usize) -> File {
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let file = File::create_new(&dir.join(name), bytes as u64, options).unwrap();
    file.write_all_at(&content(bytes), 0).unwrap();
    file
}

/// For writes too.
fn mapped(file: &File) -> ResidentMap {
    // The file goes at once, what was mapped of it stays.
    let dir = tempfile::tempdir().unwrap();
    let redo = Arc::new(Redo::open(&dir.path().join("redo")).unwrap());
    ResidentMap::new(file, Some(&redo)).unwrap().expect("a file that can be mapped")
}

/// Reads into parts of these lengths.
fn read_parts(map: &ResidentMap, offset: u64, lens: &[usize]) -> Option<Vec<u8>> {
    let mut memory: Vec<Vec<u8>> = lens.iter().map(|len| vec![0xee; *len]).collect();
    let parts: Vec<IoVec> =
        memory.iter_mut().map(|part| IoVec { base: part.as_mut_ptr(), len: part.len() }).collect();
    // SAFETY: the parts are vectors that nobody else uses meanwhile.
    unsafe { map.read(offset, &parts) }.then(|| memory.concat())
}

fn read(map: &ResidentMap, offset: u64, len: usize) -> Option<Vec<u8>> {
    read_parts(map, offset, &[len])
}

/// Reads what is resident. A major fault of this thread, such as on a page of the test itself, can
/// turn its maps off meanwhile.
fn resident(map: &ResidentMap, offset: u64, lens: &[usize]) -> Vec<u8> {
    let begin = Instant::now();
    loop {
        if let Some(found) = read_parts(map, offset, lens) {
            return found;
        }
        assert!(!map.guarded.is_broken() && begin.elapsed() < Duration::from_secs(60), "not resident");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Copies from the map without asking whether it is resident.
fn touch(map: &ResidentMap, offset: u64) -> Option<u8> {
    let mut byte = 0xee;
    let whole = map.guarded.copy(|| {
        // SAFETY: within the map, guarded; `byte` is ours.
        unsafe { copy::copy(map.address(offset), &raw mut byte, 1) }
    });
    // Looked at in any case: what nobody looks at is not read.
    let byte = std::hint::black_box(byte);
    whole.then_some(byte)
}

/// Drops the file's pages from memory; the map must have none of them mapped.
fn drop_from_memory(file: &File, map: &ResidentMap, pages: std::ops::Range<u64>) {
    let begin = Instant::now();
    file.sync_all().unwrap();
    while map.look(pages.clone()) != Some(0) {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(30), "the pages stay in memory");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The mapping shows what reads show, at every border.
#[test]
fn read_of_a_map_equals_pread() {
    for dir in places() {
        let bytes = 300 * PAGE + 1234;
        let file = made(dir.path(), "file", bytes);
        let map = mapped(&file);
        let cases = (0..bytes as u64 + 10, prop::collection::vec(0..40 * PAGE, 0..5));
        proptest!(ProptestConfig::with_cases(300), |((offset, lens) in cases)| {
            let len: usize = lens.iter().sum();
            let mut expected = vec![0; len];
            let within = file.read_exact_at(&mut expected, offset).is_ok() && offset <= bytes as u64;
            if within {
                prop_assert_eq!(resident(&map, offset, &lens), expected);
            } else {
                prop_assert_eq!(read_parts(&map, offset, &lens), None);
            }
        });
        for (offset, len) in [(u64::MAX, 1), (u64::MAX, 0), (bytes as u64, 1), (bytes as u64 - 1, 2)] {
            assert_eq!(read(&map, offset, len), None);
        }
        map.prefetch(0);
        map.prefetch(u64::MAX);
    }
}

#[test]
fn write_is_seen_by_the_next_read() {
    for dir in places() {
        let file = made(dir.path(), "file", 64 * PAGE);
        let map = mapped(&file);
        for n in 0..2000u64 {
            let (offset, data) = (n * 7919 % (63 * PAGE_SIZE), vec![n as u8; 1 + n as usize % 5000]);
            let data = &data[..data.len().min((64 * PAGE_SIZE - offset) as usize)];
            file.write_all_at(data, offset).unwrap();
            assert_eq!(resident(&map, offset, &[data.len()]), data);
        }
        let kept = resident(&map, 0, &[PAGE]);
        file.punch_hole(PAGE_SIZE, 8 * PAGE_SIZE).unwrap();
        map.punched(PAGE_SIZE, 8 * PAGE_SIZE);
        assert!(read(&map, PAGE_SIZE, 8 * PAGE).is_none_or(|zeros| zeros == vec![0; 8 * PAGE]));
        assert_eq!(resident(&map, 0, &[PAGE]), kept);
    }
}

/// Bytes that a file takes up in its file system.
fn allocated(file: &File) -> u64 {
    rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512
}

/// On tmpfs a hole that is read through a map becomes a page: the drained disk would not have the
/// base's holes (invariant 4).
#[test]
fn hole_is_not_filled_by_a_read() {
    for dir in places() {
        let file = made(dir.path(), "file", 64 * PAGE);
        let map = mapped(&file);
        resident(&map, 0, &[64 * PAGE]);
        file.punch_hole(0, 32 * PAGE_SIZE).unwrap();
        map.punched(PAGE_SIZE, PAGE_SIZE);
        let before = allocated(&file);
        for page in 0..32 {
            assert!(read(&map, page * PAGE_SIZE, PAGE).is_none_or(|zeros| zeros == [0; PAGE]));
        }
        assert_eq!(allocated(&file), before);
    }
}

#[test]
fn page_that_is_not_resident_is_refused_and_not_read() {
    let Some(dir) = disk() else { return };
    let file = made(dir.path(), "file", 64 * PAGE);
    let map = mapped(&file);
    resident(&map, 0, &[64 * PAGE]);
    map.forget();
    drop_from_memory(&file, &map, 0..32);
    for offset in [0, PAGE_SIZE, 31 * PAGE_SIZE] {
        map.prefetch(offset);
        assert_eq!(read(&map, offset, PAGE), None);
    }
    assert_eq!(map.look(0..32), Some(0));
    file.read_exact_at(&mut vec![0; PAGE], 3 * PAGE_SIZE).unwrap();
    assert_eq!(resident(&map, 3 * PAGE_SIZE, &[PAGE]), content(4 * PAGE)[3 * PAGE..]);
}

/// What is known can be out of date: then one read waits for the disk, and maps are off for a while.
#[test]
fn read_that_waited_for_the_disk_turns_the_map_off() {
    let Some(dir) = disk() else { return };
    let file = made(dir.path(), "file", 64 * PAGE);
    let map = mapped(&file);
    let missed = |map: &ResidentMap| {
        map.forget();
        drop_from_memory(&file, map, 0..32);
        map.known.all_resident(0..32, Moment::now().epoch(), false, |_, _| Some(u32::MAX));
        assert_eq!(map.look(0..32), Some(0));
        read(map, 5 * PAGE_SIZE, PAGE)
    };
    // The end of an epoch may come between.
    let (begin, began) = (Instant::now(), Moment::now());
    let found = std::iter::repeat_with(|| missed(&map)).find_map(|found| found).unwrap();
    assert_eq!(found, content(6 * PAGE)[5 * PAGE..]);
    // Noticed after a few reads. No thread is off for less than that.
    let noticed = (0..64).filter(|_| read(&map, 5 * PAGE_SIZE, PAGE).is_none()).count();
    assert!(noticed >= 32 || begin.elapsed() > Duration::from_millis(100), "not noticed");
    // Other threads have not waited, and go on.
    thread::scope(|scope| {
        scope.spawn(|| resident(&map, 5 * PAGE_SIZE, &[PAGE]));
    });
    while read(&map, 5 * PAGE_SIZE, PAGE).is_none() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(1));
    }
    // By the clock that it goes by: at the same tick as its beginning, it would seem shorter by another.
    assert!(Moment::now().0 - began.0 >= 100_000_000);
}

/// Invariant 8, for whoever can cut the disk's file: no death, no content, and other maps go on.
#[test]
fn file_cut_under_reading_threads_ends_its_map_only() {
    for dir in places() {
        for cut in [0, 32 * PAGE_SIZE + 100] {
            let name = format!("cut{cut}");
            let (file, other) =
                (made(dir.path(), &name, 256 * PAGE), made(dir.path(), &format!("{name}o"), 256 * PAGE));
            let (map, safe) = (mapped(&file), mapped(&other));
            let (expected, done, begun) = (content(256 * PAGE), AtomicBool::new(false), Barrier::new(3));
            thread::scope(|scope| {
                for seed in 0..2u64 {
                    let (map, safe, expected, done, begun) = (&map, &safe, &expected, &done, &begun);
                    scope.spawn(move || {
                        resident(map, 0, &[256 * PAGE]);
                        begun.wait();
                        for n in 0.. {
                            let at = (seed + n) * 104_729 % (192 * PAGE_SIZE);
                            let range = at as usize..at as usize + 64 * PAGE;
                            let found = read(map, at, 64 * PAGE);
                            assert!(found.is_none_or(|found| found == expected[range.clone()]));
                            assert_eq!(resident(safe, at, &[64 * PAGE]), expected[range]);
                            if done.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                    });
                }
                begun.wait();
                rustix::fs::ftruncate(&file, cut).unwrap();
                let begin = Instant::now();
                while !map.guarded.is_broken() {
                    assert!(begin.elapsed() < Duration::from_secs(30), "the cut is not noticed");
                    thread::yield_now();
                }
                done.store(true, Ordering::Relaxed);
            });
            // Not even what is there: the map is over, even if the file is whole again.
            rustix::fs::ftruncate(&file, 256 * PAGE_SIZE).unwrap();
            assert_eq!(read(&map, 0, 1), None);
            assert!(read(&mapped(&file), 255 * PAGE_SIZE, 1).is_none_or(|zero| zero == [0]));
        }
    }
}

#[test]
fn cut_in_the_middle_of_a_page_is_noticed_by_the_size() {
    for dir in places() {
        let file = made(dir.path(), "file", 8 * PAGE);
        let map = mapped(&file);
        resident(&map, 0, &[8 * PAGE]);
        rustix::fs::ftruncate(&file, 7 * PAGE_SIZE + 1).unwrap();
        let next = Epoch(map.whole.load(Ordering::Relaxed) + 1);
        assert!(!map.is_whole(next));
        assert_eq!(read(&map, 0, 1), None);
    }
}

/// Maps of several threads fault at the same time, while others come and go where they were.
#[test]
fn maps_that_come_and_go_do_not_confuse_the_guard() {
    for dir in places() {
        let steady = made(dir.path(), "steady", 16 * PAGE);
        let faults = AtomicU64::new(0);
        let (dir, steady, faults) = (&dir, &steady, &faults);
        thread::scope(|scope| {
            for number in 0..3 {
                scope.spawn(move || {
                    for turn in 0..150 {
                        let file = made(dir.path(), &format!("{number}-{turn}"), 16 * PAGE);
                        let map = mapped(&file);
                        resident(&map, 0, &[16 * PAGE]);
                        rustix::fs::ftruncate(&file, PAGE_SIZE).unwrap();
                        assert_eq!(touch(&map, 0), Some(content(1)[0]));
                        assert_eq!(touch(&map, (1 + turn % 15) * PAGE_SIZE), None);
                        assert_eq!(touch(&map, 0), None);
                        faults.fetch_add(1, Ordering::Relaxed);
                        std::fs::remove_file(file.path()).unwrap();
                    }
                });
            }
            scope.spawn(move || {
                while faults.load(Ordering::Relaxed) < 450 {
                    let map = mapped(steady);
                    assert_eq!(resident(&map, 0, &[16 * PAGE]), content(16 * PAGE));
                    assert!(!map.guarded.is_broken());
                }
            });
        });
    }
}

/// There is no table that could be full.
#[test]
fn thousand_maps_are_all_guarded() {
    for dir in places() {
        let file = made(dir.path(), "file", 2 * PAGE);
        let maps: Vec<ResidentMap> = (0..1000).map(|_| mapped(&file)).collect();
        assert_eq!(maps.iter().map(|map| map.start).collect::<HashSet<_>>().len(), 1000);
        maps.iter().for_each(|map| assert_eq!(resident(map, 0, &[2 * PAGE]).len(), 2 * PAGE));
        rustix::fs::ftruncate(&file, 0).unwrap();
        assert!(maps.iter().all(|map| touch(map, PAGE_SIZE).is_none()));
    }
}

#[test]
fn thread_that_blocks_the_signal_reads_another_way() {
    for dir in places() {
        let file = made(dir.path(), "file", PAGE);
        let map = mapped(&file);
        resident(&map, 0, &[PAGE]);
        let map = &map;
        let blocked = move || {
            // SAFETY: a set of numbers; all zeros is the empty one.
            let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: adds a signal to a set of ours.
            unsafe { libc::sigaddset(&raw mut set, libc::SIGBUS) };
            // SAFETY: changes this thread's mask only, which ends with it.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
            read(map, 0, PAGE)
        };
        thread::scope(|scope| assert_eq!(scope.spawn(blocked).join().unwrap(), None));
    }
}

#[test]
fn file_that_cannot_be_mapped_soundly_has_no_map() {
    for dir in places() {
        let empty = File::create_new(&dir.path().join("empty"), 0, OpenOptions::default()).unwrap();
        assert!(ResidentMap::new(&empty, None).unwrap().is_none());
        let path = made(dir.path(), "file", 4 * PAGE).path().to_owned();
        let direct = OpenOptions { direct: true, ..OpenOptions::default() };
        if let Ok(direct) = File::open(&path, direct) {
            assert!(ResidentMap::new(&direct, None).unwrap().is_none());
        }
        assert!(
            ResidentMap::new(&File::open(&path, OpenOptions::default()).unwrap(), None).unwrap().is_some()
        );
    }
    let elsewhere = File::open(Path::new("/proc/self/maps"), OpenOptions::default()).unwrap();
    assert!(ResidentMap::new(&elsewhere, None).unwrap().is_none());
}

/// To a caller who could not write to the file the kernel says that all of it is resident.
#[test]
fn file_of_somebody_else_has_no_map() {
    for dir in places() {
        let path = made(dir.path(), "file", 4 * PAGE).path().to_owned();
        let file = File::open(&path, OpenOptions::default()).unwrap();
        rustix::fs::chmod(&path, rustix::fs::Mode::from_raw_mode(0o444)).unwrap();
        // Not the owner any more, as far as files go, on a thread of its own.
        let stranger = || {
            // SAFETY: changes this thread's user only, which ends with it.
            unsafe { libc::setfsuid(65534) };
            // SAFETY: as above; answers who it was.
            let changed = unsafe { libc::setfsuid(65534) } == 65534;
            changed.then(|| ResidentMap::new(&file, None).unwrap().is_none())
        };
        thread::scope(|scope| assert_ne!(scope.spawn(stranger).join().unwrap(), Some(false)));
    }
}

const CHILD: &str = "BLOCKIO_RESIDENT_CHILD";

/// Runs a test of this program in a process of its own, told what to do; the signal that killed it.
fn killed_by(what: &str) -> Option<i32> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "resident::tests::child_that_faults", "--ignored"]).env(CHILD, what);
    let output = child.output().unwrap();
    assert!(output.status.signal().is_some() || output.status.success(), "{output:?}");
    output.status.signal()
}

/// A fault that is not ours kills as it did without us, whoever handled it before.
#[test]
fn fault_elsewhere_still_kills() {
    if places().is_empty() {
        return;
    }
    assert_eq!(killed_by("guarded"), None);
    for what in ["elsewhere", "elsewhere while copying", "default", "ignored", "sent"] {
        assert_eq!(killed_by(what), Some(libc::SIGBUS), "{what}");
    }
    assert_eq!(killed_by("handled"), None);
    assert_eq!(killed_by("sent and ignored"), None);
}

extern "C" fn leave(_: libc::c_int) {
    // SAFETY: ends the process at once, which a handler may.
    unsafe { libc::_exit(0) };
}

fn set_handler(handler: libc::sighandler_t) {
    // SAFETY: the handler is a constant of the system, or `leave`.
    unsafe { libc::signal(libc::SIGBUS, handler) };
}

#[test]
#[ignore = "the other half of fault_elsewhere_still_kills"]
fn child_that_faults() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let dir = places().remove(0);
    let (file, cut) = (made(dir.path(), "file", PAGE), made(dir.path(), "cut", PAGE));
    // SAFETY: a new mapping, never unmapped.
    let foreign =
        unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE, ProtFlags::READ, MapFlags::SHARED, &cut, 0) }
            .unwrap();
    rustix::fs::ftruncate(&cut, 0).unwrap();
    match &*what {
        "default" | "sent" => set_handler(libc::SIG_DFL),
        "ignored" | "sent and ignored" => set_handler(libc::SIG_IGN),
        "handled" => set_handler(leave as extern "C" fn(libc::c_int) as libc::sighandler_t),
        _ => {}
    }
    let map = mapped(&file);
    if what == "guarded" {
        rustix::fs::ftruncate(&file, 0).unwrap();
        assert_eq!(touch(&map, 0), None);
        return;
    }
    drop(dir);
    if what.starts_with("sent") {
        // SAFETY: always sound.
        unsafe { libc::raise(libc::SIGBUS) };
        return;
    }
    let fault = || {
        // SAFETY: mapped above; that it can't be had is the point.
        unsafe { foreign.cast::<u8>().read_volatile() };
    };
    if what == "elsewhere while copying" {
        map.guarded.copy(fault);
    } else {
        fault();
    }
}
