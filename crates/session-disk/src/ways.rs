//! Which way the base's data takes to the disk: its blocks are shared, or its bytes copied. And whether its holes become holes. No I/O.
//!
//! Sharing (a reflink) costs no reading, no writing and no room, however long the range is. It costs some metadata, and
//! the disk its own blocks: where a guest writes next, the file system gives it new ones. So short runs, which are what
//! sessions write again and again, are copied into the blocks that the disk has.
//!
//! What would gain less is left out: `copy_file_range` copies what is in the page cache for a tenth to a third less processor
//! time than reading and writing, but one range after the other, and what is not there it waits for
//! (`cargo bench --bench restore`, part `ways`).
//!
//! Whether disk and base can share is found out by trying, once for as long as the disk is open.

use std::io;

use rustix::io::Errno;

use blocks::BLOCK_SIZE;

/// The shortest range that is shared, in bytes. Below, the next session's writes lose more than the restore gains.
const SHARE_BYTES_MIN: u64 = 256 << 10;
/// So many attempts in a row that fail for no lasting reason are enough.
const FAILURES_MAX: u32 = 8;

/// How a part of the base comes to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The disk shares the base's blocks.
    Share,
    /// The base is read and the disk written.
    Copy,
}

/// Whether a disk shares blocks with its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody has tried yet.
    Untried,
    /// It does.
    Works,
    /// It can't, or is not to.
    Off,
}

impl Sharing {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Untried => "untried",
            Self::Works => "works",
            Self::Off => "off",
        }
    }
}

/// Decides, from what has come of it so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways {
    sharing: Sharing,
    /// Offsets and lengths of what is shared are multiples of this, in bytes.
    unit: u64,
    /// Nothing behind this is shared.
    end: u64,
    failures: u32,
    /// Whether an attempt is under way whose outcome decides.
    asked: bool,
    /// Whether the disk has said that it makes no holes, though it was said to.
    refuses_holes: bool,
}

impl Ways {
    /// All is copied.
    pub(crate) fn copy_only() -> Self {
        Self {
            sharing: Sharing::Off,
            unit: BLOCK_SIZE,
            end: 0,
            failures: 0,
            asked: false,
            refuses_holes: false,
        }
    }

    /// Sharing is tried, in multiples of `unit` bytes and up to the byte `end`.
    pub(crate) fn share(unit: u64, end: u64) -> Self {
        Self { sharing: Sharing::Untried, unit: unit.max(BLOCK_SIZE), end, ..Self::copy_only() }
    }

    pub(crate) fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// Whether anything may be shared.
    pub(crate) fn may_share(&self) -> bool {
        self.sharing != Sharing::Off
    }

    /// Nothing is shared any more.
    pub(crate) fn stop_sharing(&mut self) {
        self.sharing = Sharing::Off;
    }

    /// The way of the first part of `len` bytes of data at `offset`, and how long that part is: not 0, unless `len` is.
    /// As long as nobody knows whether sharing works, one part is shared and all others are copied.
    pub(crate) fn next(&mut self, offset: u64, len: u64) -> (Way, u64) {
        let first = offset.next_multiple_of(self.unit);
        let end = offset.saturating_add(len).min(self.end) / self.unit * self.unit;
        if !self.may_share() || self.asked || end.saturating_sub(first) < SHARE_BYTES_MIN.max(self.unit) {
            (Way::Copy, len)
        } else if first > offset {
            (Way::Copy, first - offset)
        } else {
            self.asked = self.sharing == Sharing::Untried;
            (Way::Share, end - first)
        }
    }

    /// Nothing that was to be shared is under way any more, whatever has come of it.
    pub(crate) fn ask_again(&mut self) {
        self.asked = false;
    }

    /// A range is shared; whether it is the first one.
    pub(crate) fn shared(&mut self) -> bool {
        (self.failures, self.asked) = (0, false);
        self.may_share() && std::mem::replace(&mut self.sharing, Sharing::Works) == Sharing::Untried
    }

    /// A range could not be shared; whether that ends it.
    pub(crate) fn refused(&mut self, error: &io::Error) -> bool {
        self.asked = false;
        self.failures += 1;
        let over = is_lasting(error) || self.failures >= FAILURES_MAX;
        self.may_share() && over && {
            self.sharing = Sharing::Off;
            true
        }
    }

    /// Whether zeroes are to be written where the base has holes.
    pub(crate) fn refuses_holes(&self) -> bool {
        self.refuses_holes
    }

    /// A hole was [refused](is_hole_refusal); whether that is news and holds for all others.
    pub(crate) fn hole_refused(&mut self, error: &io::Error) -> bool {
        let is_lasting = Errno::from_io_error(error) == Some(Errno::OPNOTSUPP);
        is_lasting && !std::mem::replace(&mut self.refuses_holes, true)
    }
}

/// Whether the disk says that it makes no hole there. A device that was said to make some may refuse the first one, and from
/// then on all (`EOPNOTSUPP`); and what is no whole sectors, as the last block may be, it always refuses (`EINVAL`).
pub(crate) fn is_hole_refusal(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::INVAL))
}

/// Whether sharing will fail with this again: another file system, one that can't, files that may not.
fn is_lasting(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::OPNOTSUPP
                | Errno::XDEV
                | Errno::INVAL
                | Errno::TXTBSY
                | Errno::NOTTY
                | Errno::NOSYS
                | Errno::PERM
                | Errno::ACCESS
                | Errno::BADF
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    /// All parts of a range, when sharing works.
    fn parts(ways: Ways, offset: u64, len: u64) -> Vec<(Way, u64, u64)> {
        let (mut at, mut parts, mut ways) = (offset, Vec::new(), ways);
        ways.shared();
        while at < offset + len {
            let (way, part) = ways.next(at, offset + len - at);
            assert!(part > 0 && part <= offset + len - at);
            parts.push((way, at, part));
            at += part;
        }
        parts
    }

    fn error(errno: Errno) -> io::Error {
        errno.into()
    }

    #[test]
    fn aligned_inside_of_a_range_is_shared_and_its_edges_are_copied() {
        let ways = Ways::share(16 * KIB, MIB);
        assert_eq!(parts(ways, 0, 512 * KIB), [(Way::Share, 0, 512 * KIB)]);
        assert_eq!(
            parts(ways, 4 * KIB, 512 * KIB),
            [
                (Way::Copy, 4 * KIB, 12 * KIB),
                (Way::Share, 16 * KIB, 496 * KIB),
                (Way::Copy, 512 * KIB, 4 * KIB)
            ]
        );
    }

    #[test]
    fn short_ranges_and_what_lies_behind_the_end_are_copied() {
        let ways = Ways::share(4 * KIB, MIB + 512);
        assert_eq!(parts(ways, 8 * KIB, 252 * KIB), [(Way::Copy, 8 * KIB, 252 * KIB)]);
        assert_eq!(
            parts(ways, MIB - 256 * KIB, 512 * KIB),
            [(Way::Share, MIB - 256 * KIB, 256 * KIB), (Way::Copy, MIB, 256 * KIB)]
        );
        // A unit that is longer than what would be worth it.
        let ways = Ways::share(512 * KIB, MIB);
        assert_eq!(parts(ways, 0, 300 * KIB), [(Way::Copy, 0, 300 * KIB)]);
        assert_eq!(parts(ways, 4 * KIB, 600 * KIB).len(), 1);
        assert_eq!(parts(Ways::copy_only(), 0, MIB), [(Way::Copy, 0, MIB)]);
    }

    /// It is decided once: nothing is tried again after an answer that will be the same.
    #[test]
    fn lasting_refusal_ends_sharing_at_once() {
        for errno in [Errno::OPNOTSUPP, Errno::XDEV, Errno::INVAL, Errno::TXTBSY] {
            let mut ways = Ways::share(4096, MIB);
            assert!(ways.refused(&error(errno)));
            assert_eq!((ways.sharing(), ways.next(0, MIB)), (Sharing::Off, (Way::Copy, MIB)));
            assert!(!ways.refused(&error(errno)) && !ways.shared());
            assert_eq!(ways.sharing(), Sharing::Off);
        }
    }

    /// One attempt tells; all that could fail with it is not to fail with it.
    #[test]
    fn nothing_else_is_shared_before_the_first_attempt_has_ended() {
        let mut ways = Ways::share(4096, MIB);
        let len = 256 * KIB;
        assert_eq!(ways.next(0, len), (Way::Share, len));
        assert_eq!(ways.next(len, len), (Way::Copy, len));
        assert!(!ways.refused(&error(Errno::NOSPC)));
        assert_eq!(ways.next(len, len), (Way::Share, len));
        ways.ask_again();
        assert_eq!(ways.next(0, len), (Way::Share, len));
        assert!(ways.shared());
        assert_eq!(ways.next(0, len), (Way::Share, len));
        assert_eq!(ways.next(0, len), (Way::Share, len));
    }

    #[test]
    fn other_failures_end_sharing_only_if_none_succeeds_between() {
        let mut ways = Ways::share(4096, MIB);
        assert!(ways.shared() && !ways.shared());
        for _ in 0..3 {
            assert!((1..FAILURES_MAX).all(|_| !ways.refused(&error(Errno::NOSPC))));
            assert!(!ways.shared());
        }
        assert_eq!(ways.sharing(), Sharing::Works);
        let last = (0..FAILURES_MAX).map(|_| ways.refused(&error(Errno::NOSPC))).last();
        assert_eq!((last, ways.may_share()), (Some(true), false));
    }
}
