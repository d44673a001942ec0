//! Write-back that is begun while copying goes on.
//!
//! The kernel has so many requests under way at once, and lets whoever begins more wait: 10 to 25 ms for 8 MiB of scattered
//! blocks. So a thread of its own asks for it, one window after the other, and copying does not wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::TrySendError;

use blockio::File;
use blocks::BlockRange;

use crate::helper::Helper;

/// A hint for the kernel: that a sync comes, and vouches, is up to the drain.
#[derive(Debug, Default)]
pub(super) struct WriteBack {
    helper: Option<Helper>,
    /// What is to be asked for when the helper is free, oldest first.
    windows: VecDeque<BlockRange>,
}

impl WriteBack {
    /// Has a window written back soon.
    pub(super) fn push(&mut self, window: BlockRange) {
        self.windows.push_back(window);
    }

    /// Hands over what the helper has time for. It is made if there is none; if it can't be, the caller waits in its stead.
    pub(super) fn turn(&mut self, disk: &Arc<File>) {
        while let Some(window) = self.windows.pop_front() {
            // It takes a window only when it has done with the one before.
            let helper = self.helper.take().or_else(|| Helper::new("write-back", disk, 0, begin));
            let Some(helper) = helper else {
                begin(disk, window);
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

fn begin(disk: &File, window: BlockRange) {
    disk.start_write_back(window.offset(), window.len());
}
