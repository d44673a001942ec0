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

    use blockio::OpenOptions;
    use blocks::{Extent, Geometry};

    use super::*;

    static GIVEN: Mutex<Vec<u64>> = Mutex::new(Vec::new());

    fn note(_: &File, range: BlockRange) {
        GIVEN.lock().unwrap().push(range.offset());
    }

    /// Invariant 7: when it is dropped, all that it had taken is done, and the file is nobody's.
    #[test]
    fn helper_dropped_has_given_its_hints_and_let_go_of_the_file() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let file = Arc::new(File::open(temp.path(), OpenOptions::default()).unwrap());
        let geometry = Geometry::new(1 << 20).unwrap();
        let helper = Helper::new("test", &file, 8, note).unwrap();
        for block in 0..8 {
            helper.offer(geometry.bytes_of(Extent::between(block, block + 1)).unwrap()).unwrap();
        }
        drop(helper);
        assert_eq!(*GIVEN.lock().unwrap(), (0..8).map(|block| block * 4096).collect::<Vec<_>>());
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
