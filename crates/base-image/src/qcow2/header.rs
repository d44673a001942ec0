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

/// Bytes of a version 2 header, after which its extensions begin.
const HEADER_2_LEN: u64 = 72;
/// The extension that states the format of the file beneath.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Bytes that the name of a format has at most, as in QEMU.
const FORMAT_LEN_MAX: usize = 15;

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
    /// Where the extensions of a version 2 header lie, from where to where, if it names a file beneath. Those of version 3 the driver
    /// reads.
    pub(super) extensions: Option<(u64, u64)>,
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
        // They end where that file's name begins, which lies in the first cluster.
        let name = be64(bytes, 8);
        let end = name.min(1 << cluster_bits).min(file_size).max(HEADER_2_LEN);
        let extensions = (version == 2 && name != 0).then_some((HEADER_2_LEN, end));
        Ok(Self { cluster_bits, size, l1_offset, l1_entries, l1_stated: stated, extensions })
    }

    /// Size of a cluster in bytes.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// The format of the file beneath, if one of these extensions states it: a kind and a length of 4 bytes each, and as many bytes, filled
/// up to a multiple of 8.
///
/// # Errors
/// What is wrong with them, as a sentence about the file.
pub(super) fn backing_format(extensions: &[u8]) -> Result<Option<String>, String> {
    let (mut rest, mut format) = (extensions, None);
    while let Some((head, data)) = rest.split_at_checked(8) {
        let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
        if kind == 0 {
            break;
        }
        let Some(of_it) = data.get(..len) else {
            return Err(format!("its header is damaged: an extension of {len} bytes does not lie inside it"));
        };
        if kind == BACKING_FORMAT {
            let name = std::str::from_utf8(of_it).ok().filter(|name| name.len() <= FORMAT_LEN_MAX);
            let name =
                name.ok_or("its header is damaged: the format of its backing file has no such name")?;
            if format.replace(name).is_some_and(|before| before != name) {
                return Err("its header is damaged: it states two formats of its backing file".into());
            }
        }
        rest = data.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(format.map(str::to_owned))
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
        let good = Header {
            cluster_bits: 16,
            size: 1 << 30,
            l1_offset: 0x30000,
            l1_entries: 2,
            l1_stated: 2,
            extensions: None,
        };
        assert_eq!(header(2, |_| ()), Ok(good));
        assert_eq!(header(3, |_| ()), Ok(good));
        // With a file beneath: what is before its name, inside the first cluster and the file.
        for (name, end) in [(0x200, 0x200), (72, 72), (8, 72), (0x10000, 0x10000), (u64::MAX, 0x10000)] {
            let set_name = |header: &mut [u8]| header[8..16].copy_from_slice(&name.to_be_bytes());
            assert_eq!(header(2, set_name), Ok(Header { extensions: Some((72, end)), ..good }));
            assert_eq!(header(3, set_name), Ok(good));
        }
    }

    /// As QEMU reads them: in any order, up to the first of kind 0, and what has another kind is passed over.
    #[test]
    fn extensions_state_the_format_of_the_file_beneath_once_or_are_refused() {
        let extension = |kind: u32, data: &[u8]| {
            let mut bytes = [kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let (raw, qcow2, other) =
            (extension(BACKING_FORMAT, b"raw"), extension(BACKING_FORMAT, b"qcow2"), extension(7, &[1; 21]));
        let end = extension(0, b"");
        let format = |parts: &[&[u8]]| backing_format(&parts.concat());
        for (parts, expected) in [
            ([&[], &[], &[]], None),
            ([&*raw, &[], &[]], Some("raw")),
            ([&raw, &end, &qcow2], Some("raw")),
            ([&other, &qcow2, &end], Some("qcow2")),
            ([&raw, &other, &raw], Some("raw")),
            ([&other, &end, &raw], None),
            // Fewer bytes than say what one is.
            ([&raw, &end, &[1; 7]], Some("raw")),
            ([&[1; 7], &[], &[]], None),
        ] as [([&[u8]; 3], _); 8]
        {
            assert_eq!(format(&parts), Ok(expected.map(str::to_owned)));
        }
        let long = extension(BACKING_FORMAT, b"raw and much more");
        let (cut, huge) = (&raw[..10], [&[7; 4][..], &[0xff; 4]].concat());
        for (parts, word) in [
            ([&*raw, &*qcow2], "two formats"),
            ([&other, cut], "does not lie inside"),
            ([&raw, &huge], "does not lie inside"),
            ([&long, &[]], "no such name"),
            ([&extension(BACKING_FORMAT, &[0xff; 3]), &[]], "no such name"),
        ] as [([&[u8]; 2], _); 5]
        {
            let why = format(&parts).unwrap_err();
            assert!(why.contains(word), "{why} does not say {word}");
        }
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
