//! The regions of the guest's memory as the frontend describes them, looked at before the library maps them.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};

use crate::wire::Message;

/// Words of a region in a payload; the words before the first one.
const REGION_WORDS: usize = 8;
const HEADER_WORDS: usize = 2;
/// A file's last page is there as a whole. (Where pages are larger, more of it is.)
const PAGE: u64 = 4096;

/// Beyond the end of its file a region's memory is none: to touch it would kill us. (A file that is cut later is another
/// matter.)
pub(crate) fn are_in_their_files(message: &Message) -> Result<(), String> {
    // The library refuses what has not as many regions as descriptors.
    for (index, file) in message.fds.iter().enumerate() {
        let number = |which| message.payload_long(HEADER_WORDS + index * REGION_WORDS + which);
        let (address, size, offset) = (number(0), number(2), number(6));
        let Some(has) = size_of(file).map_err(|error| format!("memory region at {address:#x}: {error}"))?
        else {
            continue;
        };
        let needed = u128::from(offset) + u128::from(size);
        if needed > u128::from(has.next_multiple_of(PAGE)) {
            return Err(format!(
                "memory region at {address:#x}: it needs a file of {needed} bytes, its file has {has}"
            ));
        }
    }
    Ok(())
}

/// The size of a file, if it is one that has any: of a device nobody knows.
fn size_of(file: &OwnedFd) -> rustix::io::Result<Option<u64>> {
    let stat = fstat(file)?;
    let has_size = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    Ok(has_size.then_some(stat.st_size as u64))
}
