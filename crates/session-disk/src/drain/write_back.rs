//! Write-back that is begun while copying goes on.
//!
//! The kernel has so many requests under way at once, and lets whoever begins more wait: 10 to 25 ms for 8 MiB of scattered
//! blocks. So a thread of its own asks for it, one window after the other, and copying does not wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::TrySendError;

use blockio::File;
use blocks::BlockRange;

use crate::helper::{Helper, Hint};

/// A hint for the kernel: that a sync comes, and vouches, is up to the drain.
#[derive(Debug)]
pub(super) struct WriteBack {
    helper: Option<Helper<BlockRange>>,
    /// What is to be asked for when the helper is free, oldest first.
    windows: VecDeque<BlockRange>,
    /// How it is asked for, and who does that; tests have others.
    begin: Hint,
    make: fn(&Arc<File>, Hint) -> Option<Helper<BlockRange>>,
}

impl Default for WriteBack {
    fn default() -> Self {
        let begin = |disk: &File, window: BlockRange| disk.start_write_back(window.offset(), window.len());
        // It takes a window only when it has done with the one before.
        let make = |disk: &Arc<File>, begin| Helper::for_hints("write-back", disk, 0, begin);
        Self { helper: None, windows: VecDeque::new(), begin, make }
    }
}

impl WriteBack {
    /// Has a window written back now. Waits until that is begun.
    pub(super) fn begin(&self, disk: &File, window: BlockRange) {
        (self.begin)(disk, window);
    }

    /// Has a window written back soon.
    pub(super) fn push(&mut self, window: BlockRange) {
        self.windows.push_back(window);
    }

    /// Hands over what the helper has time for. It is made if there is none; if it can't be, the caller waits in its stead.
    pub(super) fn turn(&mut self, disk: &Arc<File>) {
        while let Some(window) = self.windows.pop_front() {
            let Some(helper) = self.helper.take().or_else(|| (self.make)(disk, self.begin)) else {
                self.begin(disk, window);
                continue;
            };
            match helper.offer(window) {
                Ok(()) => {}
                Err(TrySendError::Full(window)) => {
                    self.helper = Some(helper);
                    return self.windows.push_front(window);
                }
                // Not reached; the next one begins another thread.
                Err(TrySendError::Disconnected(_)) => continue,
            }
            self.helper = Some(helper);
        }
    }

    /// Forgets what was not handed over: a sync does it all.
    pub(super) fn forget(&mut self) {
        self.windows.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use blockio::{OpenOptions, page_cache};
    use blocks::{Extent, Geometry};

    use super::*;

    const BLOCKS: u64 = 64;
    const PATIENCE: Duration = Duration::from_secs(60);

    impl WriteBack {
        /// What is begun is begun in the way of `begin`.
        pub(crate) fn by(begin: Hint) -> Self {
            Self { begin, ..Self::default() }
        }

        /// Nobody can be had to help: what is begun is begun by the caller, in the way of `begin`.
        pub(crate) fn alone(begin: Hint) -> Self {
            Self { begin, make: |_, _| None, ..Self::default() }
        }

        /// Whether nothing waits to be handed over.
        pub(crate) fn is_idle(&self) -> bool {
            self.windows.is_empty()
        }
    }

    /// A file of dirty pages, where pages can be dirty.
    fn dirty() -> (tempfile::TempDir, Arc<File>) {
        let near = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(near.parent().unwrap()).unwrap();
        let file = File::create_new(&dir.path().join("file"), BLOCKS * 4096, OpenOptions::default()).unwrap();
        // One by one: what is written at once is written back at once.
        for block in 0..BLOCKS {
            file.write_all_at(&[1; 4096], block * 4096).unwrap();
        }
        (dir, Arc::new(file))
    }

    fn blocks(first: u64, end: u64) -> BlockRange {
        Geometry::new(BLOCKS * 4096).unwrap().bytes_of(Extent::between(first, end)).unwrap()
    }

    fn turn_until(write_back: &mut WriteBack, disk: &Arc<File>, is_so: impl Fn(&WriteBack) -> bool) {
        let begin = Instant::now();
        while !is_so(write_back) {
            assert!(begin.elapsed() < PATIENCE, "waited in vain");
            write_back.turn(disk);
            std::thread::yield_now();
        }
    }

    /// Windows in the order in which they were pushed; whoever hands them over never waits for one that is being begun.
    #[test]
    fn windows_are_begun_one_after_the_other_and_nobody_waits_for_that() {
        static BEGUN: Mutex<Vec<BlockRange>> = Mutex::new(Vec::new());
        static GATE: Mutex<()> = Mutex::new(());
        let (_dir, disk) = dirty();
        let mut write_back = WriteBack::by(|_, window| {
            BEGUN.lock().unwrap().push(window);
            drop(GATE.lock());
        });
        // After it, so that it is open again when a test that fails waits for the helper.
        let gate = GATE.lock().unwrap();
        let windows = [blocks(0, 8), blocks(8, 9), blocks(9, 40), blocks(50, 51)];
        windows.into_iter().for_each(|window| write_back.push(window));
        turn_until(&mut write_back, &disk, |_| BEGUN.lock().unwrap().len() == 1);
        (0..3).for_each(|_| write_back.turn(&disk));
        assert_eq!(write_back.windows, &windows[1..]);
        drop(gate);
        turn_until(&mut write_back, &disk, |write_back| write_back.windows.is_empty());
        drop(write_back);
        assert_eq!(*BEGUN.lock().unwrap(), windows);
        assert_eq!(Arc::strong_count(&disk), 1);
    }

    #[test]
    fn windows_that_were_forgotten_are_not_begun() {
        static BEGUN: Mutex<Vec<BlockRange>> = Mutex::new(Vec::new());
        let (_dir, disk) = dirty();
        let mut write_back = WriteBack::alone(|_, window| BEGUN.lock().unwrap().push(window));
        write_back.push(blocks(0, 8));
        write_back.forget();
        write_back.push(blocks(8, 16));
        write_back.turn(&disk);
        assert_eq!(*BEGUN.lock().unwrap(), [blocks(8, 16)], "by the caller, for there is no helper");
    }

    /// What was handed over is on its way when the helper has gone.
    #[test]
    fn pages_of_windows_are_not_dirty_any_more() {
        for alone in [false, true] {
            let (_dir, disk) = dirty();
            let dirty = |window: BlockRange| {
                let cached = page_cache::look(&disk, window.offset(), window.len()).unwrap();
                cached.map(|cached| cached.dirty_pages)
            };
            match dirty(blocks(0, BLOCKS)) {
                None => return eprintln!("not tried: the kernel has no cachestat"),
                Some(0) => return eprintln!("not tried: no page is dirty in this file system"),
                Some(_) => {}
            }
            let mut write_back = WriteBack::default();
            if alone {
                write_back.make = |_, _| None;
            }
            let windows = [blocks(0, 17), blocks(31, 32), blocks(40, BLOCKS)];
            windows.into_iter().for_each(|window| write_back.push(window));
            turn_until(&mut write_back, &disk, |write_back| write_back.windows.is_empty());
            drop(write_back);
            assert_eq!(windows.map(dirty), [Some(0); 3]);
        }
    }
}
