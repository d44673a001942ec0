//! Write-back that is begun while copying goes on.
//!
//! The kernel has so many requests under way at once, and lets whoever begins more wait: 10 to 25 ms for 8 MiB of scattered
//! blocks. So a thread of its own asks for it, one window after the other, and copying does not wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use blockio::File;
use blocks::BlockRange;

/// A hint for the kernel: that a sync comes, and vouches, is up to the drain.
#[derive(Debug, Default)]
pub(super) struct WriteBack {
    helper: Option<Helper>,
    /// What is to be asked for when the helper is free, oldest first.
    windows: VecDeque<BlockRange>,
}

/// The thread and the way to it; it ends when that is closed.
#[derive(Debug)]
struct Helper {
    windows: SyncSender<BlockRange>,
    thread: JoinHandle<()>,
}

impl WriteBack {
    /// Has a window written back soon.
    pub(super) fn push(&mut self, window: BlockRange) {
        self.windows.push_back(window);
    }

    /// Hands over what the helper has time for. It is made if there is none; if it can't be, the caller waits in its stead.
    pub(super) fn turn(&mut self, disk: &Arc<File>) {
        while let Some(window) = self.windows.pop_front() {
            let Some(helper) = self.helper_for(disk) else {
                disk.start_write_back(window.offset(), window.len());
                continue;
            };
            match helper.windows.try_send(window) {
                Ok(()) => {}
                Err(TrySendError::Full(window)) => return self.windows.push_front(window),
                Err(TrySendError::Disconnected(_)) => self.helper = None,
            }
        }
    }

    /// Forgets what was not handed over: a sync does it all.
    pub(super) fn forget(&mut self) {
        self.windows.clear();
    }

    fn helper_for(&mut self, disk: &Arc<File>) -> Option<&Helper> {
        if self.helper.is_none() {
            // It takes a window only when it has done with the one before.
            let (sender, windows) = sync_channel(0);
            let disk = Arc::clone(disk);
            let thread = std::thread::Builder::new()
                .name("write-back".into())
                .spawn(move || run(&disk, &windows))
                .ok()?;
            self.helper = Some(Helper { windows: sender, thread });
        }
        self.helper.as_ref()
    }
}

fn run(disk: &File, windows: &Receiver<BlockRange>) {
    while let Ok(window) = windows.recv() {
        disk.start_write_back(window.offset(), window.len());
    }
}

impl Drop for WriteBack {
    fn drop(&mut self) {
        // Nothing of the disk is to be written back by us when its lock may be gone.
        if let Some(Helper { windows, thread }) = self.helper.take() {
            drop(windows);
            let _ = thread.join();
        }
    }
}
