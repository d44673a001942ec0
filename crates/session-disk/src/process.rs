//! Telling processes apart, also after their number was used again.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Error;

/// A process: its number, and when it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process number in our pid namespace.
    pub pid: u32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`); 0 when it is not known.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process `pid` as it is now; `None` if there is none. A zombie counts as gone.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let start_ticks = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, start_ticks })
    }

    /// This process.
    pub fn own() -> Self {
        let pid = std::process::id();
        Self::of(pid).unwrap_or(Self { pid, start_ticks: 0 })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid).is_some_and(|now| self.start_ticks == 0 || now.start_ticks == self.start_ticks)
    }
}

/// The ID that the kernel took at boot.
pub(crate) fn boot_id() -> Result<Uuid, Error> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|error| Error::state("read", path, error))?;
    Uuid::parse_str(text.trim())
        .map_err(|error| Error::state("read", path, std::io::Error::other(error.to_string())))
}
