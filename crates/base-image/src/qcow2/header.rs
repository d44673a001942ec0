//! What a qcow2 header must say before anything else looks at the file.
//!
//! The header is the word of whoever made the image. What it asks for is bounded here, and what would
//! be read wrongly (encrypted, incomplete, kept elsewhere) is refused by name.

/// Bytes at the start of a file that say all that is looked at here.
pub(super) const HEADER_LEN: usize = 112;

/// Cluster sizes that there are: 512 bytes to 2 MiB, as in QEMU.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The largest table of tables, as in QEMU: 32 MiB.
const L1_ENTRIES_MAX: u64 = 4 << 20;

/// What the rest of a file is understood by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The binary logarithm of a cluster's size in bytes.
    pub(super) cluster_bits: u32,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// Where the table of tables begins.
    pub(super) l1_offset: u64,
    /// How many of its entries the disk needs.
    pub(super) l1_entries: u64,
    /// How many it has.
    pub(super) l1_stated: u64,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads the header of a file of `file_size` bytes that begins with `bytes`.
    ///
    /// # Errors
    /// What is wrong with it, and what helps, as a sentence about the file.
    pub(super) fn parse(bytes: &[u8], file_size: u64) -> Result<Self, String> {
        if !bytes.starts_with(b"QFI\xfb") {
            return Err("it is not a qcow2 image: it does not begin as one does".into());
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(format!("it is qcow2 of version {version}; versions 2 and 3 can be read"));
        }
        if be32(bytes, 32) != 0 {
            return Err("it is encrypted; decrypt it with `qemu-img convert` first".into());
        }
        if version == 3 {
            check_features(be64(bytes, 72))?;
        }
        let cluster_bits = be32(bytes, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(format!("its header is damaged: clusters of 2^{cluster_bits} bytes"));
        }
        let size = be64(bytes, 24);
        // A table has a cluster of 8-byte entries; each is for a cluster of the disk.
        let bytes_per_table = 1_u64 << (2 * cluster_bits - 3);
        let l1_entries = size.div_ceil(bytes_per_table);
        let (l1_offset, stated) = (be64(bytes, 40), u64::from(be32(bytes, 36)));
        if l1_entries > stated || l1_entries > L1_ENTRIES_MAX || stated > L1_ENTRIES_MAX {
            return Err(format!(
                "its header is damaged: a disk of {size} bytes needs {l1_entries} tables, and it has {stated}"
            ));
        }
        let l1_end = l1_offset.checked_add(stated * 8);
        if l1_end.is_none_or(|end| end > file_size) {
            return Err("it is damaged or cut off: its table of tables does not lie inside the file".into());
        }
        Ok(Self { cluster_bits, size, l1_offset, l1_entries, l1_stated: stated })
    }

    /// Size of a cluster in bytes.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

fn check_features(incompatible: u64) -> Result<(), String> {
    let converted = "make an image without it: `qemu-img convert -O qcow2`";
    let what = match incompatible {
        0 => return Ok(()),
        bits if bits & 1 != 0 => {
            return Err("it was not closed in order; `qemu-img check -r all` repairs it".into());
        }
        bits if bits & 2 != 0 => {
            return Err("it is marked as corrupt; `qemu-img check -r all` may repair it".into());
        }
        bits if bits & 4 != 0 => "its data lies in another file (data_file), which is not followed",
        bits if bits & 8 != 0 => "its clusters are compressed with another method than zlib (zstd)",
        bits if bits & 16 != 0 => "it has extended L2 entries (subclusters)",
        bits => {
            return Err(format!("it needs features that are not known here (bits {bits:#x}); {converted}"));
        }
    };
    Err(format!("{what}; {converted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32, change: impl FnOnce(&mut [u8])) -> Result<Header, String> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[20..24].copy_from_slice(&16_u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        bytes[36..40].copy_from_slice(&2_u32.to_be_bytes());
        bytes[40..48].copy_from_slice(&0x30000_u64.to_be_bytes());
        change(&mut bytes);
        Header::parse(&bytes, 0x40000)
    }

    #[test]
    fn header_that_is_good_says_where_the_tables_are() {
        let good =
            Header { cluster_bits: 16, size: 1 << 30, l1_offset: 0x30000, l1_entries: 2, l1_stated: 2 };
        assert_eq!(header(2, |_| ()), Ok(good));
        assert_eq!(header(3, |_| ()), Ok(good));
    }

    type Change = Box<dyn FnOnce(&mut [u8])>;

    fn set(at: usize, bytes: &'static [u8]) -> Change {
        Box::new(move |header| header[at..at + bytes.len()].copy_from_slice(bytes))
    }

    /// What would be read wrongly, or ask for memory without bound, is refused by name.
    #[test]
    fn header_that_asks_for_what_is_not_offered_is_refused() {
        let cases: [(Change, &str); 14] = [
            (set(0, b"QFI\0"), "not a qcow2"),
            (set(4, &[0, 0, 0, 1]), "version 1"),
            (set(32, &[0, 0, 0, 2]), "encrypted"),
            (set(79, &[1]), "check -r all"),
            (set(79, &[2]), "corrupt"),
            (set(79, &[4]), "data_file"),
            (set(79, &[8]), "zstd"),
            (set(79, &[16]), "subclusters"),
            (set(72, &[1]), "not known"),
            (set(20, &[0, 0, 0, 8]), "2^8"),
            (set(20, &[0xff; 4]), "2^4294967295"),
            (set(24, &[0xff; 8]), "needs"),
            (set(36, &[0xff; 4]), "needs"),
            (set(40, &[0xff; 8]), "cut off"),
        ];
        for (change, word) in cases {
            let why = header(3, change).unwrap_err();
            assert!(why.contains(word), "{why} does not say {word}");
        }
    }

    #[test]
    fn header_of_too_few_tables_is_refused() {
        // The rest of the disk would read as zeroes.
        assert!(header(3, set(36, &[0, 0, 0, 1])).unwrap_err().contains("needs 2 tables, and it has 1"));
    }
}
