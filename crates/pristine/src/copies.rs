//! How disks are filled and restored: the options that say so, and what is told of it.

use std::num::NonZeroU64;

use blocks::BLOCK_SIZE;
use clap::{Args, ValueEnum};
use control::CopyStatus;
use indicatif::BinaryBytes;
use session_disk::{CopyCounts, CopyReport, DrainPolicy, DrainWhen, SessionDisk};

use crate::args::parse_bytes;

/// A slower drain would hold each batch of blocks for minutes.
const RATE_MIN: u64 = 64 << 10;

/// How the base's data comes to the disk.
#[derive(Debug, Args)]
pub(crate) struct ReflinkArgs {
    /// Whether the disk shares blocks with the base where both lie on one file system that can (xfs, btrfs; Linux 6.6 or
    /// newer). Fast, and takes no room; but the first write to a shared block finds it a new one, which takes room then,
    /// and time
    #[arg(long, value_enum, default_value_t = Reflink::Auto)]
    reflink: Reflink,
}

/// Whether blocks are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Reflink {
    /// Runs of 256 KiB and more, where that works; all else is copied
    Auto,
    /// All blocks are copied
    Never,
}

impl ReflinkArgs {
    pub(crate) fn allowed(&self) -> bool {
        self.reflink == Reflink::Auto
    }
}

/// When and how fast a server restores.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// When blocks are restored in the background
    #[arg(long, value_enum, default_value_t = When::Eager)]
    drain: When,
    /// How much the drain copies at most, bytes a second, or with K, M, G (powers of 1024), such as 50M; runs that are
    /// shared or punched count 4 KiB each. What a guest reads is not limited by it [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    rate: Option<NonZeroU64>,
}

/// When the drain works.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum When {
    /// At once: slowly while a guest works, as fast as it can while none does
    Eager,
    /// While no session is open; in a session only after half a second in which its guest has asked for nothing. Blocks
    /// that are not restored are read from the base meanwhile
    Idle,
}

impl DrainArgs {
    pub(crate) fn policy(&self) -> DrainPolicy {
        let when = match self.drain {
            When::Eager => DrainWhen::Eager,
            When::Idle => DrainWhen::Idle,
        };
        DrainPolicy { when, rate: self.rate }
    }
}

fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let rate = parse_bytes(text)?;
    let too_slow = || format!("expected {RATE_MIN} bytes a second at least, such as 50M");
    NonZeroU64::new(rate).filter(|rate| rate.get() >= RATE_MIN).ok_or_else(too_slow)
}

/// How blocks came to the disk, as an operator reads it.
pub(crate) fn by_way(counts: CopyCounts) -> String {
    let amount = |blocks: u64| BinaryBytes(blocks * BLOCK_SIZE);
    format!(
        "{} reflinked, {} copied, {} punched",
        amount(counts.reflinked_blocks),
        amount(counts.copied_blocks),
        amount(counts.punched_blocks)
    )
}

/// What a server says of its drain over the control socket.
pub(crate) fn told(disk: &SessionDisk) -> CopyStatus {
    let (policy, counts) = (disk.drain_policy(), disk.copied());
    CopyStatus {
        when: policy.when.name().to_owned(),
        rate: policy.rate.map(NonZeroU64::get),
        reflink: disk.sharing().name().to_owned(),
        reflinked_blocks: counts.reflinked_blocks,
        copied_blocks: counts.copied_blocks,
        punched_blocks: counts.punched_blocks,
    }
}

/// The same, as a part of a status.
pub(crate) fn report(told: CopyStatus) -> CopyReport {
    CopyReport {
        when: told.when,
        rate: told.rate,
        reflink: told.reflink,
        counts: CopyCounts {
            reflinked_blocks: told.reflinked_blocks,
            copied_blocks: told.copied_blocks,
            punched_blocks: told.punched_blocks,
        },
    }
}

/// In a line.
pub(crate) fn line(report: &CopyReport) -> String {
    let rate =
        report.rate.map_or_else(String::new, |rate| format!(", {} a second at most", BinaryBytes(rate)));
    format!(
        "{}{rate}, reflink {}; {} since the server was started",
        report.when,
        report.reflink,
        by_way(report.counts)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_bytes_a_second_and_not_too_slow() {
        let rate = |text| parse_rate(text).map(NonZeroU64::get);
        assert_eq!(rate("50M"), Ok(50 << 20));
        assert_eq!(rate("100000"), Ok(100_000));
        assert!(rate("0").is_err() && rate("63K").is_err() && rate("M").is_err() && rate("5 M").is_err());
    }

    #[test]
    fn ways_are_told_in_the_order_of_their_cost() {
        let counts = CopyCounts { reflinked_blocks: 512, copied_blocks: 3, punched_blocks: 0 };
        assert_eq!(by_way(counts), "2.00 MiB reflinked, 12.00 KiB copied, 0 B punched");
    }
}
