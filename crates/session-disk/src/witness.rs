//! A witness outside of the state directory that the state is not older than the disk.
//!
//! A state directory can be put back from a copy (a backup, a snapshot of `/var/lib`) without the disk.
//! A manifest that lists logs has no times to be compared with, and what it says of old logs hides the
//! blocks that were written since. So each manifest has a number, its generation, which only grows, and
//! the disk's file has the number of a manifest in an extended attribute: a manifest with a smaller one
//! is older than the disk, and nothing that it says is believed.
//!
//! The attribute is set after the manifest of that number is durable. A crash in between leaves it
//! behind, never ahead, so it never accuses a state that is not old. The next start makes up for that,
//! when it has made the manifest that it found durable: after a kill that may be left to do. It is set before a session's first
//! write is made, and only while there are logs: it changes the disk's `ctime`, and a manifest without
//! logs has that time for its witness.
//!
//! What this leaves open:
//! - The attribute is not synced (a session's start would cost a journal commit more, in the disk's file
//!   system). A power cut within seconds after it was set may take it back: who then puts an old
//!   state back as well is not found out.
//! - Between two manifests the number does not grow. A copy made while a session was open is not older
//!   than what a power cut in the same session leaves, though its log and its intents are.
//! - It tells of an older state, not of an older disk. Of that the disk's times tell, if it was pristine or its server was stopped
//!   ([`Stopped`](crate::Stopped)), and not after a kill.
//! - Block devices, and file systems without user attributes, have no such witness.

use std::ffi::CStr;

use blockio::{File, FileKind};

use crate::Error;
use crate::storage::Storage;

/// The attribute's name. Its value is a decimal number.
const NAME: &CStr = c"user.pristine.generation";

/// What stands for a value that is no number: larger than any manifest's.
const NO_NUMBER: u64 = u64::MAX;

/// The generation that the disk's file names; `None` if it names none.
pub(crate) fn generation(storage: &Storage, disk: &File) -> Result<Option<u64>, Error> {
    if disk.kind() != FileKind::Regular {
        return Ok(None);
    }
    Ok(storage.attribute(disk, NAME)?.as_deref().map(parse))
}

/// Makes the disk's file name the generation of a manifest that is durable. Who can't have attributes
/// has no witness, as after an attempt that fails: an older number accuses nobody.
pub(crate) fn set_generation(storage: &Storage, disk: &File, generation: u64) {
    if disk.kind() != FileKind::Regular {
        return;
    }
    match storage.set_attribute(disk, NAME, generation.to_string().as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::Unsupported => log::warn!(
            "{}: its state's number can't be noted ({error}); an older state directory that is put back will not \
             be found out",
            disk.path().display()
        ),
        _ => {}
    }
}

/// A number for the manifest after one of `generation`, of a disk whose file names `witness`: larger than both.
pub(crate) fn next_generation(generation: u64, witness: Option<u64>) -> u64 {
    let witness = witness.filter(|witness| *witness != NO_NUMBER);
    // One below what no number can be larger than.
    generation.max(witness.unwrap_or(0)).saturating_add(1).min(NO_NUMBER - 1)
}

fn parse(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(NO_NUMBER)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 6: a value that is no number accuses every manifest, once.
    #[test]
    fn value_that_is_no_number_is_larger_than_any_generation_and_forgotten() {
        assert_eq!((parse(b"17"), parse(b"0")), (17, 0));
        for value in [&b""[..], b"-1", b"x", b"99999999999999999999", b"\xff"] {
            assert_eq!(parse(value), NO_NUMBER);
        }
        assert_eq!(next_generation(4, Some(NO_NUMBER)), 5);
    }

    /// A manifest that follows is never accused.
    #[test]
    fn next_generation_is_larger_than_the_last_and_than_the_witness() {
        assert_eq!(next_generation(0, None), 1);
        assert_eq!(next_generation(4, Some(9)), 10);
        assert_eq!(next_generation(9, Some(4)), 10);
        assert!(next_generation(u64::MAX, None) < NO_NUMBER);
    }
}
