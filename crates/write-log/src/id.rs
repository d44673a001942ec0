//! The identity of a log and the file name that follows from it.

use std::fmt;

use uuid::Uuid;

/// Which log of a disk: its place in the order of the disk's logs, and a number that no other log
/// has, so that a file of another disk or an older one can't stand in for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogId {
    /// Sequence number; younger logs of a disk have higher ones.
    pub seq: u64,
    /// Unique to this log.
    pub uuid: Uuid,
}

impl LogId {
    /// The name of the log's file: the sequence number with at least eight digits, a dash, the
    /// UUID in lower case, `.wlog`.
    pub fn file_name(&self) -> String {
        self.to_string() + ".wlog"
    }

    /// The log whose file is called `file_name`; `None` unless it is exactly what
    /// [`file_name`](Self::file_name) returns.
    pub fn parse(file_name: &str) -> Option<Self> {
        let (seq, uuid) = file_name.strip_suffix(".wlog")?.split_once('-')?;
        let id = Self { seq: seq.parse().ok()?, uuid: Uuid::try_parse(uuid).ok()? };
        (id.file_name() == file_name).then_some(id)
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}-{}", self.seq, self.uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_name_of_any_sequence_parses_back() {
        for seq in [0, 1, 12_345_678, u64::MAX] {
            let id = LogId { seq, uuid: Uuid::from_u128(0x1234_5678 << 64) };
            assert_eq!(LogId::parse(&id.file_name()), Some(id));
        }
        let id = LogId { seq: 7, uuid: Uuid::nil() };
        assert_eq!(id.file_name(), "00000007-00000000-0000-0000-0000-000000000000.wlog");
    }

    #[test]
    fn file_name_that_no_log_has_is_refused() {
        for name in [
            "",
            ".wlog",
            "-.wlog",
            "00000007.wlog",
            "7-00000000-0000-0000-0000-000000000000.wlog",
            "+0000007-00000000-0000-0000-0000-000000000000.wlog",
            "00000007-00000000000000000000000000000000.wlog",
            "00000007-00000000-0000-0000-0000-00000000000A.wlog",
            "00000007-00000000-0000-0000-0000-000000000000.wlog.tmp",
            "99999999999999999999-00000000-0000-0000-0000-000000000000.wlog",
        ] {
            assert_eq!(LogId::parse(name), None, "{name}");
        }
    }
}
