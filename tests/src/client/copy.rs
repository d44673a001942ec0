//! Copies parts of a file as fast as a loop can that does nothing else: what a drain is compared with.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{IoUring, opcode, squeue, types};

/// How the parts are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// io_uring, so many parts at once, each a read and a write that is linked to it.
    IoUring(u32),
    /// `pread` and `pwrite`, one after the other.
    Plain,
    /// `copy_file_range`, one after the other.
    CopyRange,
}

/// Copies `parts` (offset and length in bytes) of `from` to the same places of `to`, and makes them
/// durable with one `fdatasync`.
///
/// # Errors
/// What the kernel says; a transfer that is cut short is an error too.
pub fn copy(from: &File, to: &File, parts: &[(u64, u64)], way: Way) -> io::Result<()> {
    let longest = parts.iter().map(|(_, len)| *len).max().unwrap_or(0) as usize;
    match way {
        Way::IoUring(depth) => ring(from, to, parts, depth, longest)?,
        Way::CopyRange => {
            for &(offset, len) in parts {
                let (mut at, mut to_at, end) = (offset, offset, offset + len);
                while at < end {
                    let left = (end - at) as usize;
                    if rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), left)? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
        Way::Plain => {
            let mut buf = vec![0; longest];
            for &(offset, len) in parts {
                from.read_exact_at(&mut buf[..len as usize], offset)?;
                to.write_all_at(&buf[..len as usize], offset)?;
            }
        }
    }
    to.sync_data()
}

fn ring(from: &File, to: &File, parts: &[(u64, u64)], depth: u32, longest: usize) -> io::Result<()> {
    let mut ring: IoUring = IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(depth * 2)?;
    ring.submitter().register_files(&[from.as_raw_fd(), to.as_raw_fd()])?;
    let mut bufs: Vec<Vec<u8>> = (0..depth).map(|_| vec![0; longest]).collect();
    let mut free: Vec<usize> = (0..depth as usize).collect();
    let mut lens = vec![0u64; depth as usize];
    let mut rest = parts.iter();
    let mut failure = None;
    loop {
        while failure.is_none()
            && let Some(slot) = free.pop()
        {
            let Some(&(offset, len)) = rest.next() else {
                free.push(slot);
                break;
            };
            lens[slot] = len;
            let memory = bufs[slot].as_mut_ptr();
            let read = opcode::Read::new(types::Fixed(0), memory, len as u32).offset(offset).build();
            let read = read.flags(squeue::Flags::IO_LINK).user_data(slot as u64 * 2);
            let write = opcode::Write::new(types::Fixed(1), memory, len as u32).offset(offset).build();
            let write = write.user_data(slot as u64 * 2 + 1);
            // SAFETY: the slot's buffer is as long as the longest part, and is neither touched nor freed
            // before both have completed: the slot is taken, and the loop ends when all are free.
            unsafe { ring.submission().push_multiple(&[read, write]) }.map_err(io::Error::other)?;
        }
        if free.len() == bufs.len() {
            return failure.map_or(Ok(()), Err);
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            let slot = entry.user_data() as usize / 2;
            if entry.result() as i64 != lens[slot] as i64 {
                failure.get_or_insert(match entry.result() {
                    error @ ..0 => io::Error::from_raw_os_error(-error),
                    _ => io::ErrorKind::UnexpectedEof.into(),
                });
            }
            // The write is the last of the two, also when the read has failed.
            if entry.user_data() % 2 == 1 {
                free.push(slot);
            }
        }
    }
}
