//! The kernel's report of failed write-back: whoever takes it takes it from all who come later.
//!
//! The kernel tells of a failure once, to each open file description that there is, and to those that are opened before anybody was
//! told. So who is told notes it in the live page; and since he may be killed between the two, he notes before that he asks.

use std::io;
use std::sync::atomic::Ordering;

use blockio::{File, FileKind};

use super::{LivePage, WORD_ASKING};
use crate::process::ProcessId;

/// In that word, while the file system is asked instead of the kernel's report, which a process has taken with it.
const ASKING_FILE_SYSTEM: u64 = 1 << 32;

/// Syncs the disk by `sync` for one who does not serve it. Of a failure the live page, if there is one, tells from then on.
pub(crate) fn heed_sync(
    disk: &File,
    live: Option<&LivePage>,
    sync: impl FnOnce(&File) -> Result<(), blockio::Error>,
) -> Result<(), blockio::Error> {
    let Some(live) = live else { return sync(disk) };
    // A living one notes it yet.
    if !live.server().is_some_and(ProcessId::is_alive) {
        live.recover_report(disk)?;
    }
    let _asking = live.asking();
    sync(disk).inspect_err(|error| {
        if error.io_error().kind() != io::ErrorKind::Interrupted {
            live.set_poisoned();
        }
    })
}

/// Who lives while this does takes the kernel's report, and notes it before.
#[derive(Debug)]
pub(crate) struct Asking<'live>(&'live LivePage);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.end_asking();
    }
}

impl LivePage {
    /// What is told by the kernel while this lives, of a failed write-back, is noted before it goes.
    pub(crate) fn asking(&self) -> Asking<'_> {
        self.begin_asking();
        Asking(self)
    }

    /// The same for an operation of an engine.
    pub(crate) fn begin_asking(&self) {
        self.word(WORD_ASKING).fetch_add(1, Ordering::SeqCst);
    }

    /// What the operation was told is noted.
    pub(crate) fn end_asking(&self) {
        // A server that has started meanwhile has set it back.
        let less = |asking: u64| asking.checked_sub(1);
        let _ = self.word(WORD_ASKING).fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// If a process was killed while it took the kernel's report of failed write-back, nobody is told of that any more: a sync
    /// says that all is well. Then the file system is asked, which has a report of its own (Linux 5.8), by writing back
    /// all that it has. If that fails this is poisoned. For nobody but who has the disk for himself.
    ///
    /// A block device has no such report, nor has a file of an overlay or of FUSE.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn recover_report(&self, disk: &File) -> Result<(), blockio::Error> {
        let word = self.word(WORD_ASKING);
        let left = word.load(Ordering::SeqCst);
        if left == 0 || self.is_poisoned() {
            return Ok(());
        }
        let can_be_asked = disk.kind() == FileKind::Regular && disk.tells_of_write_back();
        let what = match can_be_asked {
            true => "whether it lost anything is asked of its file system, which is written back for that",
            false => "if its storage failed then, nobody knows",
        };
        log::warn!("{}: a process was killed while it synced it; {what}", disk.path().display());
        if !can_be_asked {
            return Ok(());
        }
        word.store(ASKING_FILE_SYSTEM, Ordering::SeqCst);
        // Who was killed in the middle of that has taken this report, too.
        let was_told = left >= ASKING_FILE_SYSTEM;
        let asked = if was_told { Err(disk.lost_report()) } else { disk.sync_file_system() };
        if asked.is_err() {
            self.set_poisoned();
        }
        word.store(0, Ordering::SeqCst);
        asked
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use blockio::fault::{Fault, FaultPlan, OpClass};
    use uuid::Uuid;

    use super::*;
    use crate::{DiskOptions, FlushPolicy, Paths, ProvisionOptions, Request, SessionDisk, provision};

    impl LivePage {
        /// How many ask; or that the file system is asked.
        fn asked(&self) -> u64 {
            self.load(WORD_ASKING)
        }
    }

    #[test]
    fn who_was_killed_while_it_asked_leaves_it_to_the_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Path::new("disk"), None, Some(dir.path()));
        let disk = tempfile::NamedTempFile::new().unwrap();
        let file = File::open(disk.path(), Default::default()).unwrap();
        let (live, _) = LivePage::open(&paths, Uuid::from_u128(1), 7).unwrap();
        live.take_over(Uuid::from_u128(1), 7).unwrap();
        live.recover_report(&file).unwrap();
        // It says that nothing was lost.
        std::mem::forget((live.asking(), live.asking()));
        live.recover_report(&file).unwrap();
        assert_eq!((live.asked(), live.is_poisoned()), (0, false));
        // One that was begun before, and ends now.
        live.end_asking();
        assert_eq!(live.asked(), 0);
        // Who asked that was killed, too: it may have been told.
        live.word(WORD_ASKING).store(ASKING_FILE_SYSTEM, Ordering::SeqCst);
        live.recover_report(&file).unwrap_err();
        assert_eq!((live.asked(), live.is_poisoned()), (0, true));
        live.begin_asking();
        live.take_over(Uuid::from_u128(1), 7).unwrap();
        assert_eq!(live.asked(), 0);
        live.begin_asking();
        live.go_on();
        assert_eq!(live.asked(), 0);
    }

    /// From before the kernel is asked until it is noted what it says.
    #[test]
    fn flush_says_that_it_asks_until_what_it_was_told_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let (base, disk) = (dir.path().join("base.raw"), dir.path().join("disk.raw"));
        std::fs::write(&base, [1; 8192]).unwrap();
        let plan = FaultPlan::new();
        let options = DiskOptions {
            runtime_dir: Some(dir.path().join("run")),
            faults: Some(plan.clone()),
            flush: FlushPolicy::Always,
            ..DiskOptions::new(disk)
        };
        provision(&ProvisionOptions::new(base, options.clone())).unwrap();
        let disk = SessionDisk::open(&options).unwrap();
        disk.begin_session(None).unwrap();
        let (mut queue, mut done) = (disk.queue(4).unwrap(), Vec::new());
        let live = &disk.shared().live;
        for (fault, is_lost) in
            [(Fault::HoldAfter, false), (Fault::FailAfter(rustix::io::Errno::IO.raw_os_error()), true)]
        {
            plan.on_every(OpClass::SyncData, fault);
            assert_eq!(live.asked(), 0);
            queue.push(0, Request::Flush);
            queue.submit();
            assert_eq!((live.asked(), live.is_poisoned()), (1, false));
            plan.clear();
            plan.release_all();
            queue.quiesce(&mut done);
            assert_eq!(done.pop().unwrap().result.is_err(), is_lost);
            assert_eq!((live.asked(), live.is_poisoned()), (0, is_lost));
        }
    }
}
