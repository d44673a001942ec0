//! Blocks of a file system that two files share (`FICLONERANGE`, a reflink): a copy without copying.
//!
//! What the kernel does, as far as it matters here: it waits for direct I/O of both files, writes back what is dirty of both
//! ranges, drops what the page cache has of the range that is replaced, also under mappings, and then replaces the
//! extents. The file that is shared from is not changed, not even its times. Which blocks are whose is metadata, which
//! a sync of the file that was changed makes durable.

//!
//! # Kernels
//! On xfs of Linux 6.1 what is written to a file can come to lie in the blocks of the one that it shares them with. The
//! power-cut test (`tests/power_cut`, xfs, seed 3) found it: blocks of a base had what a session wrote. It takes no more than
//! two threads that write 4 KiB here and there to a clone that was read before, and a third that has it written back: in 6.1.0-48
//! (Debian 12) blocks of the original had changed after 9 rounds of 3000 writes; in 6.18 none in hundreds. The likely
//! reason: xfs has pages of many blocks in its cache since 5.18, and up to 6.5 wrote back all of a page's blocks when one was
//! dirty, also those that are shared and change meanwhile; 6.6 keeps a note of each. So that is what is asked for.

use std::os::fd::{AsFd, AsRawFd};

use rustix::{
    io::Errno,
    ioctl::{Opcode, Setter, ioctl, opcode},
};

use crate::kernel;

/// What the kernel calls `struct file_clone_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    len: u64,
    offset: u64,
}

const CLONE_RANGE: Opcode = opcode::write::<CloneRange>(0x94, 13);

/// The first kernel on which files that share blocks are left alone by writes to each other, as far as is known.
const KERNEL_MIN: (u32, u32) = (6, 6);

/// Whether this kernel can be trusted with files that share blocks.
pub fn sharing_is_safe() -> bool {
    kernel::is_at_least(KERNEL_MIN)
}

/// Has `to` share the `len` bytes at `offset` with the same range of `from`; to share nothing succeeds. After an error any
/// part may be shared, and the rest is as it was.
pub(crate) fn share(from: impl AsFd, to: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    if len == 0 {
        // To the kernel that would be everything up to the end.
        return Ok(());
    }
    let range = CloneRange { from: i64::from(from.as_fd().as_raw_fd()), from_offset: offset, len, offset };
    // SAFETY: the code is that of `FICLONERANGE`, which reads one value of this layout and no more.
    let clone = unsafe { Setter::<CLONE_RANGE, CloneRange>::new(range) };
    // SAFETY: no memory of this process but that value is looked at; both descriptors are open.
    unsafe { ioctl(to, clone) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Invariant 5: the base is never written.
    /// The number is part of the kernel's interface.
    #[test]
    fn code_of_the_call_is_the_kernels() {
        assert_eq!(CLONE_RANGE, 0x4020_940d);
    }

    /// On every file system: either the range is shared, or nothing has changed.
    #[test]
    fn range_is_shared_or_left_as_it_was() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&[7; 16384], 0).unwrap();
        to.write_all_at(&[9; 16384], 0).unwrap();
        share(&from, &to, 8192, 0).unwrap();
        let shared = share(&from, &to, 4096, 8192).is_ok();
        let mut bytes = [0; 16384];
        to.read_exact_at(&mut bytes, 0).unwrap();
        let inside = if shared { 7 } else { 9 };
        let is = |range: std::ops::Range<usize>, byte| bytes[range].iter().all(|b| *b == byte);
        assert!(is(0..4096, 9) && is(4096..12288, inside) && is(12288..16384, 9));
    }
}
