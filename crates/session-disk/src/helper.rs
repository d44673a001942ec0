//! A thread that gives the kernel hints about a file, so that nobody else waits for that.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use blockio::File;
use blocks::BlockRange;

/// A hint about a range. It vouches for nothing and changes nothing that is read.
pub(crate) type Hint = fn(&File, BlockRange);

/// The thread and the way to it. Dropping it waits for the hint that is being given: nothing of the file is done by us when
/// its lock may be gone.
#[derive(Debug)]
pub(crate) struct Helper {
    /// Closed when it is dropped, which ends the thread.
    ranges: Option<SyncSender<BlockRange>>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// A thread that gives `hint` for one range after the other; up to `room` wait for it. `None`: there can't be one.
    pub(crate) fn new(name: &str, file: &Arc<File>, room: usize, hint: Hint) -> Option<Self> {
        let (sender, ranges) = sync_channel(room);
        let file = Arc::clone(file);
        let run = move || give(&file, &ranges, hint);
        let thread = std::thread::Builder::new().name(name.into()).spawn(run).ok()?;
        Some(Self { ranges: Some(sender), thread: Some(thread) })
    }

    /// Hands a range over. Never waits.
    ///
    /// # Errors
    /// Gives it back if there is no room, or the thread is gone.
    pub(crate) fn offer(&self, range: BlockRange) -> Result<(), TrySendError<BlockRange>> {
        match &self.ranges {
            Some(ranges) => ranges.try_send(range),
            None => Err(TrySendError::Disconnected(range)),
        }
    }
}

fn give(file: &File, ranges: &Receiver<BlockRange>, hint: Hint) {
    while let Ok(range) = ranges.recv() {
        hint(file, range);
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.ranges = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use blockio::OpenOptions;
    use blocks::{Extent, Geometry};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn block(block: u64) -> BlockRange {
        Geometry::new(1 << 20).unwrap().bytes_of(Extent::new(block, 1)).unwrap()
    }

    fn some_file() -> (tempfile::NamedTempFile, Arc<File>) {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let file = Arc::new(File::open(temp.path(), OpenOptions::default()).unwrap());
        (temp, file)
    }

    /// Invariant 7: when it is dropped, all that it had taken is done, and the file is nobody's.
    #[test]
    fn helper_dropped_has_given_its_hints_and_let_go_of_the_file() {
        static GIVEN: Mutex<Vec<BlockRange>> = Mutex::new(Vec::new());
        let (_temp, file) = some_file();
        let helper = Helper::new("test", &file, 8, |_, range| GIVEN.lock().unwrap().push(range)).unwrap();
        (0..8).for_each(|number| helper.offer(block(number)).unwrap());
        drop(helper);
        assert_eq!(*GIVEN.lock().unwrap(), (0..8).map(block).collect::<Vec<_>>());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    /// So many ranges wait for it and no more, and whoever offers one does not wait at all.
    #[test]
    fn helper_that_is_busy_takes_what_it_has_room_for_and_gives_the_rest_back() {
        static GIVEN: Mutex<Vec<BlockRange>> = Mutex::new(Vec::new());
        static GATE: Mutex<()> = Mutex::new(());
        let (_temp, file) = some_file();
        let note: Hint = |_, range| {
            GIVEN.lock().unwrap().push(range);
            drop(GATE.lock());
        };
        let helper = Arc::new(Helper::new("test", &file, 2, note).unwrap());
        // After it, so that it is open again when a test that fails waits for the helper.
        let gate = GATE.lock().unwrap();
        helper.offer(block(0)).unwrap();
        let begin = Instant::now();
        while GIVEN.lock().unwrap().is_empty() {
            assert!(begin.elapsed() < PATIENCE, "the first one is not taken");
            std::thread::yield_now();
        }
        // By another thread: if it had to wait, so would this one for ever.
        let (told, outcome) = std::sync::mpsc::channel();
        let offering = Arc::clone(&helper);
        std::thread::spawn(move || {
            let _ = told.send([1, 2, 3, 4].map(|number| offering.offer(block(number))));
        });
        let outcomes = outcome.recv_timeout(PATIENCE).expect("it waits");
        let full = |number| Err(TrySendError::Full(block(number)));
        assert_eq!(outcomes, [Ok(()), Ok(()), full(3), full(4)]);
        drop(gate);
        while Arc::strong_count(&helper) > 1 {
            std::thread::yield_now();
        }
        drop(helper);
        assert_eq!(*GIVEN.lock().unwrap(), [0, 1, 2].map(block));
    }
}
