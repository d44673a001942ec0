//! A thread beside those that serve a disk, for what they had better not wait for.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use blockio::File;
use blocks::BlockRange;
use rustix::process::getpid;
use rustix::thread::{sched_getaffinity, sched_setaffinity};

/// A hint for the kernel about a range of a file. It vouches for nothing and changes nothing that is read.
pub(crate) type Hint = fn(&File, BlockRange);

/// The thread and the way to it. Dropping it waits for all that it has taken: nothing of the disk is done by us when
/// its lock may be gone.
#[derive(Debug)]
pub(crate) struct Helper<T> {
    /// Closed when it is dropped, which ends the thread.
    tasks: Option<SyncSender<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Helper<T> {
    /// A thread that does `task` for one thing after the other, wherever the process may run; up to `room` wait for it.
    /// `None`: there can't be one.
    pub(crate) fn new(name: &str, room: usize, mut task: impl FnMut(T) + Send + 'static) -> Option<Self> {
        let (sender, tasks) = sync_channel(room);
        let run = move || {
            // It may have been started by a thread that is bound to a processor, which is busy there. Where this can't be, it
            // runs where that does.
            if let Ok(processors) = sched_getaffinity(Some(getpid())) {
                let _ = sched_setaffinity(None, &processors);
            }
            while let Ok(next) = tasks.recv() {
                task(next);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(run).ok()?;
        Some(Self { tasks: Some(sender), thread: Some(thread) })
    }

    /// Hands something over. Never waits.
    ///
    /// # Errors
    /// Gives it back if there is no room, or the thread is gone.
    pub(crate) fn offer(&self, next: T) -> Result<(), TrySendError<T>> {
        match &self.tasks {
            Some(tasks) => tasks.try_send(next),
            None => Err(TrySendError::Disconnected(next)),
        }
    }
}

impl Helper<BlockRange> {
    /// A thread that gives `hint` for one range of `file` after the other.
    pub(crate) fn for_hints(name: &str, file: &Arc<File>, room: usize, hint: Hint) -> Option<Self> {
        let file = Arc::clone(file);
        Self::new(name, room, move |range| hint(&file, range))
    }
}

impl<T> Drop for Helper<T> {
    fn drop(&mut self) {
        self.tasks = None;
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
    use rustix::thread::CpuSet;

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
        let helper =
            Helper::for_hints("test", &file, 8, |_, range| GIVEN.lock().unwrap().push(range)).unwrap();
        (0..8).for_each(|number| helper.offer(block(number)).unwrap());
        drop(helper);
        assert_eq!(*GIVEN.lock().unwrap(), (0..8).map(block).collect::<Vec<_>>());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    /// Its work is not to wait for a queue's thread that has a processor of its own.
    #[test]
    fn helper_of_a_thread_that_is_bound_to_a_processor_runs_where_the_process_may() {
        let of_process = sched_getaffinity(Some(getpid())).unwrap();
        let starter = std::thread::spawn(move || {
            let first = (0..CpuSet::MAX_CPU).find(|cpu| of_process.is_set(*cpu)).unwrap();
            let mut one = CpuSet::new();
            one.set(first);
            sched_setaffinity(None, &one).unwrap();
            let (told, where_it_runs) = std::sync::mpsc::channel();
            let helper =
                Helper::new("test", 1, move |()| told.send(sched_getaffinity(None).unwrap()).unwrap());
            helper.unwrap().offer(()).unwrap();
            where_it_runs.recv_timeout(PATIENCE).unwrap()
        });
        let cpus = |set: &CpuSet| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>();
        assert_eq!(cpus(&starter.join().unwrap()), cpus(&of_process));
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
        let helper = Arc::new(Helper::for_hints("test", &file, 2, note).unwrap());
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
