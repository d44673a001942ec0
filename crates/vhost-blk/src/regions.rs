//! The regions of the guest's memory as the frontend describes them, looked at before the library maps them.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};

use crate::wire::Message;

/// Words of a region in a payload; the words before the first one.
const REGION_WORDS: usize = 8;
const HEADER_WORDS: usize = 2;
/// Words of a region before its size.
const SIZE_WORD: usize = 2;
/// A file's last page is there as a whole. (Where pages are larger, more of it is.)
const PAGE: u64 = 4096;

/// Most regions at a time: the library says so to who asks (GET_MAX_MEM_SLOTS), and takes more.
pub(crate) const REGIONS_MAX: u32 = 509;

/// Most bytes of all regions: what is mapped takes of our address space, and a table that is in use is there beside its
/// successor.
const BYTES_MAX: u64 = 16 << 40;

/// The regions that there are.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    /// At least as many as the library has mapped: it ends the connection when it can't do what it is told.
    count: u32,
    /// Their bytes.
    bytes: u64,
}

impl Regions {
    /// SET_MEM_TABLE.
    pub(crate) fn set(&mut self, message: &Message) -> Result<(), String> {
        self.bytes = have_room(0, message)?;
        self.count = message.payload_word(0);
        Ok(())
    }

    /// ADD_MEM_REG.
    pub(crate) fn add(&mut self, message: &Message) -> Result<(), String> {
        let bytes = have_room(self.bytes, message)?;
        if self.count >= REGIONS_MAX {
            let address = message.payload_long(HEADER_WORDS);
            return Err(format!(
                "memory region at {address:#x}: there are {REGIONS_MAX} already, the most there may be"
            ));
        }
        self.count += 1;
        self.bytes = bytes;
        Ok(())
    }

    /// REM_MEM_REG.
    pub(crate) fn remove(&mut self, message: &Message) {
        self.count = self.count.saturating_sub(1);
        // The library removes none of another size.
        self.bytes = self.bytes.saturating_sub(message.payload_long(HEADER_WORDS + SIZE_WORD));
    }
}

/// The bytes of the regions of a message and of `others`, if they may be as many, and each is in its file.
fn have_room(others: u64, message: &Message) -> Result<u64, String> {
    are_in_their_files(message)?;
    let sizes = (0..message.fds.len())
        .map(|index| message.payload_long(HEADER_WORDS + index * REGION_WORDS + SIZE_WORD));
    let bytes = sizes.fold(others, u64::saturating_add);
    match bytes <= BYTES_MAX {
        true => Ok(bytes),
        false => Err(format!("memory regions of {bytes} bytes: {BYTES_MAX} are the most there may be")),
    }
}

/// Beyond the end of its file a region's memory is none: to touch it would kill us. (A file that is cut later is another
/// matter.)
fn are_in_their_files(message: &Message) -> Result<(), String> {
    // The library refuses what has not as many regions as descriptors.
    for (index, file) in message.fds.iter().enumerate() {
        let number = |which| message.payload_long(HEADER_WORDS + index * REGION_WORDS + which);
        let (address, size, offset) = (number(0), number(SIZE_WORD), number(6));
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
