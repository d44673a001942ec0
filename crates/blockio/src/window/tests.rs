use std::{fs::File, os::unix::fs::FileExt};

use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use tempfile::TempDir;

use super::*;
use crate::{coherence::mappable_places, resident::major_faults};

const PAGE: usize = PAGE_SIZE as usize;

/// Where files have windows.
fn places() -> Vec<TempDir> {
    let has_windows =
        |dir: &TempDir| Window::over(reserved(dir, "probe", 4096).as_fd(), 0).unwrap().is_some();
    mappable_places().into_iter().filter(has_windows).collect()
}

/// A new file of so many bytes, all its room reserved.
fn reserved(dir: &TempDir, name: &str, bytes: u64) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(dir.path().join(name)).unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Where the window begins.
fn shown<F>(file: &WindowedFile<F>) -> Option<u64> {
    match &file.window {
        Place::At(window) => Some(window.offset),
        _ => None,
    }
}

/// Places near the ends of pages, of windows and of the file, of 3 MiB.
fn place() -> impl Strategy<Value = u64> {
    let near = prop_oneof![Just(0u64), Just(4096), Just(WINDOW_BYTES), Just(2 * WINDOW_BYTES), Just(3 << 20)];
    (near, 0..6000u64).prop_map(|(near, behind)| (near + 3000).saturating_sub(behind))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is written is in the file, whoever looks and whenever, and nothing else is.
    #[test]
    fn writes_equal_pwrites(
        tail in 0..4096u64,
        writes in proptest::collection::vec((place(), 0..2500usize, 1..5u8, any::<u8>(), any::<bool>()), 1..40),
    ) {
        for dir in places() {
            let (file, same) = (reserved(&dir, "one", (3 << 20) + tail), reserved(&dir, "two", (3 << 20) + tail));
            let mut windowed = WindowedFile::new(file);
            for &(mut offset, len, times, byte, syncs) in &writes {
                for time in 0..times {
                    let bytes = vec![byte ^ time; len];
                    prop_assert_eq!(windowed.write_at(&bytes, offset).unwrap(), len);
                    same.write_all_at(&bytes, offset).unwrap();
                    offset += len as u64;
                }
                if syncs {
                    windowed.get().sync_data().unwrap();
                }
            }
            prop_assert!(content(windowed.get()) == content(&same));
            windowed.get_mut();
            prop_assert!(content(windowed.get()) == content(&same), "after the window is gone");
        }
    }
}

/// Writes one behind the other go through few windows, and no page is touched that is not there: that would turn this
/// thread's reads from maps off.
#[test]
fn window_stays_where_it_shows_what_is_written_and_never_waits_for_a_page() {
    for dir in places() {
        // What this thread's first writes touch of the program itself.
        let mut other = WindowedFile::new(reserved(&dir, "other", 8192));
        (0..10).for_each(|n| assert_eq!(other.write_at(&[7; 24], n * 24).unwrap(), 24));
        let mut file = WindowedFile::new(reserved(&dir, "log", 3 << 20));
        let before = major_faults();
        let mut shows = Vec::new();
        for offset in (100..2 << 20).step_by(24) {
            assert_eq!(file.write_at(&[7; 24], offset).unwrap(), 24);
            shows.extend(shown(&file));
        }
        let stores = shows.len();
        shows.dedup();
        assert_eq!(shows, [0, WINDOW_BYTES]);
        assert!(stores > (2 << 20) / 24 - 10, "all but the first have a window: {stores}");
        assert_eq!(major_faults() - before, 0);
    }
}

/// A page's first write is a call, and so is the first after 1.1 s, and after one that failed: a file system that takes
/// no writes any more says so.
#[test]
fn stores_follow_a_call_to_the_same_page_that_succeeded_lately() {
    for dir in places() {
        let mut file = WindowedFile::new(reserved(&dir, "log", 64 << 10));
        file.write_at(&[1; 24], 0).unwrap();
        assert!(shown(&file).is_none(), "the first is a call");
        let call = file.last_call.unwrap();
        assert_eq!(call.page, 0);
        file.write_at(&[1; 24], 24).unwrap();
        assert!(shown(&file).is_some() || file.last_call != Some(call));
        // From here on a store would be into this.
        let readable = File::open(dir.path().join("log")).unwrap();
        let mut readable = WindowedFile { file: readable, window: file.window, last_call: None };
        for offset in [48, 4096, 5000] {
            assert!(readable.write_at(&[2; 24], offset).is_err(), "{offset}");
            assert!(readable.last_call.is_none());
        }
        let epoch = Moment::now().epoch();
        readable.last_call = Some(Call { page: 0, epoch: Epoch(epoch.0 - 1) });
        assert!(readable.write_at(&[2; 24], 48).is_err(), "a call of an earlier epoch");
        readable.last_call = Some(Call { page: 0, epoch });
        assert!(readable.write_at(&[2; 24], 4090).is_err(), "it reaches into the next page");
        assert!(content(&readable.file)[48..].iter().all(|byte| *byte == 0));
    }
}

/// Invariant 8: a file that somebody cuts does not kill who writes it.
#[test]
fn file_that_was_cut_is_written_by_calls() {
    for dir in places() {
        let mut file = WindowedFile::new(reserved(&dir, "cut", 64 << 10));
        let mut cut = false;
        // Again where 1.1 s have begun between the two: then nothing is touched.
        while !cut {
            file.write_at(&[1; 24], 40_000).unwrap();
            file.write_at(&[2; 24], 40_024).unwrap();
            file.file.set_len(PAGE as u64).unwrap();
            assert_eq!(file.write_at(&[3; 24], 40_048).unwrap(), 24);
            cut = matches!(file.window, Place::Never);
        }
        assert_eq!(file.write_at(&[4; 24], 40_072).unwrap(), 24);
        let content = content(&file.file);
        assert!(content[..40_048].iter().all(|byte| *byte == 0), "what was cut away");
        assert!(content[40_048..40_072] == [3; 24] && content[40_072..] == [4; 24]);
    }
}

#[test]
fn files_without_a_window_are_written_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("for writes only");
    let mut file = WindowedFile::new(File::create(&path).unwrap());
    for offset in (0..100).step_by(10) {
        assert_eq!(file.write_at(&[offset as u8; 10], offset).unwrap(), 10);
        assert!(shown(&file).is_none());
    }
    assert!(
        std::fs::read(&path).unwrap().iter().enumerate().all(|(at, byte)| *byte as usize == at / 10 * 10)
    );
    let mut null = WindowedFile::new(File::options().read(true).write(true).open("/dev/null").unwrap());
    assert_eq!((null.write_at(&[1; 10], 0).unwrap(), null.write_at(&[1; 10], 10).unwrap()), (10, 10));
}
