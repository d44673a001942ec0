//! Writes through a map.

use std::cell::Cell;

use super::*;

/// Writes parts of these lengths, one after the other from `data`.
fn write_parts(map: &ResidentMap, offset: u64, data: &[u8], lens: &[usize]) -> bool {
    let mut rest = data.to_vec();
    let mut memory: Vec<Vec<u8>> = lens.iter().map(|len| rest.drain(..*len).collect()).collect();
    let parts: Vec<IoVec> =
        memory.iter_mut().map(|part| IoVec { base: part.as_mut_ptr(), len: part.len() }).collect();
    // SAFETY: the parts are vectors that nobody else uses meanwhile.
    unsafe { map.write(offset, &parts) }
}

/// Writes what is resident; see [`resident`].
fn write_resident(map: &ResidentMap, offset: u64, data: &[u8], lens: &[usize]) {
    let begin = Instant::now();
    while !write_parts(map, offset, data, lens) {
        assert!(!map.guarded.is_broken() && begin.elapsed() < Duration::from_secs(60), "not resident");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What is written through a map is what `pread` reads then, at every border and for every alignment, and nothing
/// beside it.
#[test]
fn write_of_a_map_equals_pwrite() {
    for dir in places() {
        let bytes = 100 * PAGE + 1234;
        let file = made(dir.path(), "file", bytes);
        let map = mapped(&file);
        let all = || {
            let mut found = vec![0; bytes];
            file.read_exact_at(&mut found, 0).unwrap();
            found
        };
        let lens = prop::collection::vec(
            prop_oneof![0..200usize, 0..40 * PAGE, (0..9usize).prop_map(|n| n * PAGE)],
            0..4,
        );
        let offsets = prop_oneof![0..bytes as u64 + 10, (0..101u64).prop_map(|page| page * PAGE_SIZE)];
        // On a disk windows are written through the map that were written wholly, which the end's never is.
        let always = if is_memory(&dir) { bytes as u64 } else { 96 * PAGE_SIZE };
        let cases = ProptestConfig::with_cases(300);
        proptest!(cases, |(offset in offsets, lens in lens, salt in any::<u8>())| {
            let mut expected = all();
            let len: usize = lens.iter().sum();
            let data: Vec<u8> = content(len).iter().map(|byte| byte ^ salt).collect();
            match expected.get_mut(offset as usize..offset as usize + len) {
                Some(place) => {
                    place.copy_from_slice(&data);
                    let begin = Instant::now();
                    while !write_parts(&map, offset, &data, &lens) {
                        prop_assert!(begin.elapsed() < Duration::from_secs(60), "{offset}, {lens:?} is refused");
                        if offset + len as u64 > always {
                            file.write_all_at(&data, offset).unwrap();
                            break;
                        }
                        let whole = &all()[..always as usize];
                        write_resident(&map, 0, whole, &[whole.len()]);
                    }
                }
                None => prop_assert!(!write_parts(&map, offset, &data, &lens)),
            }
            prop_assert!(all() == expected, "offset {offset}, parts {lens:?}");
        });
        assert_eq!(file.size().unwrap(), bytes as u64);
        for (offset, len) in [(u64::MAX, 1), (u64::MAX, 0), (bytes as u64, 1), (bytes as u64 - 1, 2)] {
            assert!(!write_parts(&map, offset, &vec![7; len], &[len]));
        }
    }
}

/// A place with an ext4.
fn ext4() -> Option<TempDir> {
    let is_ext4 = |dir: &TempDir| kept(made(dir.path(), "probe of ext4", 1)).unwrap() == Some(Kept::OnExt4);
    places().into_iter().find(is_ext4)
}

/// Flush (5.2.6): what was written through a map is on the disk when the file was synced, also what was written to a page
/// after it was written back.
#[test]
fn write_of_a_map_is_on_the_disk_after_a_sync() {
    const LEN: usize = 16 * PAGE;
    let Some(dir) = ext4() else { return };
    let file = made(dir.path(), "file", 4 * LEN);
    let map = mapped(&file);
    let direct = file.reopen_direct().unwrap();
    for n in 1..9u8 {
        write_resident(&map, LEN as u64, &[n; LEN], &[LEN]);
        file.sync_data().unwrap();
        let mut found = crate::AlignedBuf::new_zeroed(LEN);
        direct.read_exact_at(&mut found, LEN as u64).unwrap();
        assert!(found.iter().all(|byte| *byte == n), "round {n}");
    }
}

/// Invariant 2 again: the first write to a page that was written back is noted.
#[test]
fn write_of_a_map_after_a_sync_is_noted_in_the_times_of_a_file_on_a_disk() {
    const LEN: usize = 8 * PAGE;
    let Some(dir) = ext4() else { return };
    let file = made(dir.path(), "file", LEN);
    let map = mapped(&file);
    for _ in 0..2 {
        write_resident(&map, 0, &[1; LEN], &[LEN]);
        file.sync_all().unwrap();
        let long_ago = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: long_ago, last_modification: long_ago };
        rustix::fs::futimens(&file, &times).unwrap();
        write_resident(&map, 0, &[2; LEN], &[LEN]);
        assert!(rustix::fs::fstat(&file).unwrap().st_mtime > 1);
    }
}

/// Invariant 2, where the state of a disk was put back: whoever compares the file's times finds that it was written.
#[test]
fn first_write_after_a_map_was_made_or_forgotten_is_refused() {
    for dir in places() {
        let is_memory = is_memory(&dir);
        let file = made(dir.path(), "file", 8 * PAGE);
        let map = mapped(&file);
        resident(&map, 0, &[8 * PAGE]);
        // So many that it is worth a look at once whether they are resident.
        let data = vec![1; 8 * PAGE];
        // The last two are a matter of memory and of disks only.
        type Forget = fn(&ResidentMap);
        let forgets: [(Forget, bool); 4] = [
            (ResidentMap::forget, true),
            (|map| map.forget_while(|| false), true),
            (ResidentMap::date_next_write, is_memory),
            (ResidentMap::forget_writes, !is_memory),
        ];
        assert!(!write_parts(&map, 0, &data, &[8 * PAGE]));
        for (forget, refused) in forgets {
            // A major fault of this thread between them, on a page of the test itself, has the write refused too, but not each time.
            let is_made = (0..20).any(|_| {
                write_resident(&map, 0, &data, &[8 * PAGE]);
                forget(&map);
                write_parts(&map, 0, &data, &[8 * PAGE])
            });
            assert_ne!(is_made, refused);
        }
    }
}

/// Whoever needs the processor does not wait for all of it, and finds what was written either way.
#[test]
fn forgetting_is_done_in_parts_and_ends_when_it_is_not_to_go_on() {
    let Some(dir) = places().pop() else { return };
    let bytes = 2 * FORGOTTEN_AT_ONCE + PAGE;
    let file = made(dir.path(), "file", bytes);
    let map = mapped(&file);
    resident(&map, 0, &[bytes]);
    for parts in [0, 1, 2, 3] {
        let asked = Cell::new(0);
        map.forget_while(|| asked.replace(asked.get() + 1) < parts);
        assert_eq!(asked.get(), (parts + 1).min(3));
        assert!(resident(&map, 0, &[bytes]) == content(bytes));
    }
}

#[test]
fn pages_around_are_those_of_the_same_64_kib() {
    for (pages, expected) in
        [(0, 0), (1 << 15, 0xffff), (1 << 16, 0xffff_0000), (3 << 15, u32::MAX), (u32::MAX, u32::MAX)]
    {
        assert_eq!(around(pages), expected, "{pages:#x}");
    }
}

/// A write to a hole takes room, which may not be had: that is for `pwrite` to say.
#[test]
fn write_to_what_is_not_resident_is_refused() {
    for dir in places() {
        let file = made(dir.path(), "file", 64 * PAGE);
        let map = mapped(&file);
        write_resident(&map, 0, &vec![1; 64 * PAGE], &[64 * PAGE]);
        file.punch_hole(0, 32 * PAGE_SIZE).unwrap();
        map.punched(0, 32 * PAGE_SIZE);
        let before = allocated(&file);
        // On a disk a window that was written wholly, which takes room, may be written through the map.
        for page in (0..3).flat_map(|_| (0..32).filter(|page| page % 8 != 7)) {
            assert!(!write_parts(&map, page * PAGE_SIZE, &[2; PAGE], &[PAGE]));
        }
        // Some of it is not there.
        assert!(!write_parts(&map, 30 * PAGE_SIZE, &[2; 4 * PAGE], &[4 * PAGE]));
        assert_eq!(allocated(&file), before);
        assert_eq!(resident(&map, 32 * PAGE_SIZE, &[PAGE]), [1; PAGE]);
        write_resident(&map, 40 * PAGE_SIZE, &[3; PAGE], &[PAGE]);
    }
}

#[test]
fn file_that_is_open_for_reads_only_is_not_written() {
    for dir in places() {
        let path = made(dir.path(), "file", 8 * PAGE).path().to_owned();
        let file = File::open(&path, OpenOptions::default()).unwrap();
        let map = mapped(&file);
        assert_eq!(resident(&map, 0, &[8 * PAGE]), content(8 * PAGE));
        assert!((0..3).all(|_| !write_parts(&map, 0, &[9; 8 * PAGE], &[8 * PAGE])));
        assert_eq!(resident(&map, 0, &[8 * PAGE]), content(8 * PAGE));
    }
}

/// Invariant 3: a write that says it was made is in the file, or the file is no longer there to have it. And no death.
#[test]
fn file_cut_under_writing_threads_ends_its_map_only() {
    const LEN: usize = 8 * PAGE;
    let places = places();
    let turns = places.iter().flat_map(|dir| [(dir, 0), (dir, 64 * PAGE_SIZE)]).cycle().take(240);
    for (turn, (dir, cut)) in turns.enumerate() {
        let (file, other) = (
            made(dir.path(), &format!("cut{turn}"), 256 * PAGE),
            made(dir.path(), &format!("whole{turn}"), 256 * PAGE),
        );
        let (map, safe) = (mapped(&file), mapped(&other));
        let begun = Barrier::new(3);
        thread::scope(|scope| {
            // One within what will be left, one beyond it.
            for first in [0, 128 * PAGE_SIZE] {
                let (file, map, safe, begun) = (&file, &map, &safe, &begun);
                scope.spawn(move || {
                    write_resident(map, first, &[1; 16 * LEN], &[16 * LEN]);
                    begun.wait();
                    for n in 2u64.. {
                        let (at, data) = (first + n % 8 * LEN as u64, [n as u8; LEN]);
                        if write_parts(map, at, &data, &[LEN]) && at + LEN as u64 <= cut {
                            let mut found = [0; LEN];
                            file.read_exact_at(&mut found, at).unwrap();
                            assert!(found == data, "a write is lost");
                        }
                        write_resident(safe, at, &data, &[LEN]);
                        assert!(resident(safe, at, &[LEN]) == data);
                        if map.guarded.is_broken() {
                            break;
                        }
                    }
                });
            }
            begun.wait();
            rustix::fs::ftruncate(&file, cut).unwrap();
        });
        assert!(!write_parts(&map, 0, &[1], &[1]));
        assert_eq!((file.size().unwrap(), other.size().unwrap()), (cut, 256 * PAGE_SIZE));
    }
}
