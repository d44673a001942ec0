//! Telling processes apart, also after their number was used again.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::{Pid, test_kill_process};
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

/// What is seen of a process number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// A process that was started then.
    Runs { start_ticks: u64 },
    /// None, or a zombie.
    Ended,
    /// There is a process, of which nothing is shown to us: it is another user's (`ProtectProc=`, `hidepid=`), or `/proc` can't be
    /// read.
    Hidden,
}

impl Seen {
    fn of(pid: u32) -> Self {
        Self::judge(fs::read_to_string(format!("/proc/{pid}/stat")), || {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
        })
    }

    /// By its `stat`, and, where that can't be read, by whether there is such a number.
    fn judge(stat: io::Result<String>, exists: impl FnOnce() -> bool) -> Self {
        // The second field is a name in parentheses that may hold anything.
        let state_and_start = |stat: &str| {
            let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
            Some((fields.next()?.to_owned(), fields.nth(18)?.parse().ok()?))
        };
        match stat.ok().as_deref().and_then(state_and_start) {
            Some((state, _)) if state == "Z" || state == "X" => Self::Ended,
            Some((_, start_ticks)) => Self::Runs { start_ticks },
            None if exists() => Self::Hidden,
            None => Self::Ended,
        }
    }
}

impl ProcessId {
    /// The process `pid` as it is now; `None` if there is none, or it is not shown to us. A zombie counts as gone.
    pub fn of(pid: u32) -> Option<Self> {
        match Seen::of(pid) {
            Seen::Runs { start_ticks } => Some(Self { pid, start_ticks }),
            Seen::Ended | Seen::Hidden => None,
        }
    }

    /// This process.
    pub fn own() -> Self {
        let pid = std::process::id();
        Self::of(pid).unwrap_or(Self { pid, start_ticks: 0 })
    }

    /// Whether it is seen to run still.
    pub fn is_alive(self) -> bool {
        self.is_one_of(Seen::of(self.pid)) == Some(true)
    }

    /// Whether it still runs, or that can't be told: there is a process of its number that is not shown to us.
    pub fn may_be_alive(self) -> bool {
        self.is_one_of(Seen::of(self.pid)) != Some(false)
    }

    /// Whether it is what was seen of its number; `None`: that can't be told.
    fn is_one_of(self, seen: Seen) -> Option<bool> {
        match seen {
            Seen::Runs { start_ticks } => Some(self.start_ticks == 0 || start_ticks == self.start_ticks),
            Seen::Ended => Some(false),
            Seen::Hidden => None,
        }
    }
}

/// The ID that the kernel took at boot.
pub(crate) fn boot_id() -> Result<Uuid, Error> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|error| Error::state("read", path, error))?;
    Uuid::parse_str(text.trim())
        .map_err(|error| Error::state("read", path, std::io::Error::other(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(state: char, start_ticks: u64) -> io::Result<String> {
        Ok(format!("7 (a) b (c)) {state} {} {start_ticks} 0 0", "0 ".repeat(18).trim_end()))
    }

    /// A process that is not shown has not ended: a session would end, or a hold, while its VM runs.
    #[test]
    fn process_that_is_not_shown_may_be_alive() {
        let unreadable = || Err(io::ErrorKind::NotFound.into());
        assert_eq!(Seen::judge(stat('S', 42), || false), Seen::Runs { start_ticks: 42 });
        assert_eq!(Seen::judge(stat('Z', 42), || true), Seen::Ended);
        assert_eq!(Seen::judge(unreadable(), || true), Seen::Hidden);
        assert_eq!(Seen::judge(Ok("7 (a) S".into()), || true), Seen::Hidden);
        assert_eq!(Seen::judge(unreadable(), || false), Seen::Ended);
        let process = ProcessId { pid: 7, start_ticks: 42 };
        assert_eq!(process.is_one_of(Seen::Runs { start_ticks: 42 }), Some(true));
        assert_eq!(process.is_one_of(Seen::Runs { start_ticks: 41 }), Some(false));
        assert_eq!(process.is_one_of(Seen::Hidden), None);
        assert_eq!(
            ProcessId { start_ticks: 0, ..process }.is_one_of(Seen::Runs { start_ticks: 41 }),
            Some(true)
        );
    }

    #[test]
    fn process_that_was_waited_for_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.is_alive() && process.may_be_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive() && !process.may_be_alive());
    }
}
