//! The layout of a base's manifest, version 1, and the tree of hashes in it.
//!
//! All numbers are little endian, all hashes BLAKE3 of 32 bytes.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 to 15 | `PRISTINE BASE 1\n` |
//! | 16 to 19 | format version: 1 |
//! | 20 to 23 | bytes in a chunk: 65536 |
//! | 24 to 31 | size of the disk in bytes |
//! | 32 to 39 | the image's format, `raw` or `qcow2`, filled up with zeroes |
//! | 40 to 71 | root hash |
//! | 72 to 103 | hash of bytes 0 to 71 |
//! | 104 to 127 | zeroes |
//! | 128 on | the hash of each chunk, of the last one's bytes up to the end of the disk |
//!
//! A group is 256 chunks, 16 MiB of the disk; its hash is that of its chunks' hashes. The root is the hash of bytes 16
//! to 31 and of all groups' hashes, with the key that BLAKE3 derives from [`ROOT_CONTEXT`]. So it depends on the
//! disk's content alone, not on how the image stores it, and any one chunk is proven by 8 KiB of the file and
//! the groups' hashes, which are small enough to be kept in memory.

use crate::format::BaseFormat;

/// Bytes that have one hash.
pub const CHUNK_SIZE: u64 = 64 << 10;
/// Chunks of which hashes are hashed again.
pub(crate) const GROUP_CHUNKS: u64 = 256;
/// The version that is written, and the newest that is read.
pub(super) const VERSION: u32 = 1;
/// Where the chunks' hashes begin.
pub(super) const HEADER_LEN: usize = 128;
/// Bytes of a hash.
pub(super) const HASH_LEN: usize = 32;

/// How a manifest begins.
pub(super) const MAGIC: &[u8; 16] = b"PRISTINE BASE 1\n";
const ROOT_CONTEXT: &str = "pristine 2026-11 root hash of a base image";

/// A hash.
pub(super) type Hash = [u8; HASH_LEN];

/// The hash of some bytes.
pub(super) fn hash(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// What a manifest says before its hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// The format of the image that was sealed.
    pub(super) format: BaseFormat,
    /// The root hash.
    pub(super) root: Hash,
}

impl Header {
    /// How many chunks a disk of `size` bytes has.
    pub(super) fn chunks(size: u64) -> u64 {
        size.div_ceil(CHUNK_SIZE)
    }

    fn geometry(size: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        let fields = VERSION.to_le_bytes().into_iter().chain((CHUNK_SIZE as u32).to_le_bytes());
        bytes.iter_mut().zip(fields.chain(size.to_le_bytes())).for_each(|(to, from)| *to = from);
        bytes
    }

    /// The root hash of a disk of `size` bytes with these groups.
    pub(super) fn root_of(size: u64, groups: &[Hash]) -> Hash {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(&Self::geometry(size));
        groups.iter().for_each(|group| {
            hasher.update(group);
        });
        *hasher.finalize().as_bytes()
    }

    /// As it is in a file.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut format = [0; 8];
        format.iter_mut().zip(self.format.name().bytes()).for_each(|(to, from)| *to = from);
        let mut bytes: Vec<u8> = [MAGIC.as_slice(), &Self::geometry(self.size), &format, &self.root].concat();
        let check = hash(&bytes);
        bytes.extend(check);
        let mut header = [0; HEADER_LEN];
        header.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        header
    }

    /// Reads it again.
    ///
    /// # Errors
    /// What is wrong, as a sentence about the manifest.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, String> {
        let word =
            |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let part = |at: usize, len: usize| bytes.get(at..at + len).unwrap_or_default();
        if !bytes.starts_with(MAGIC) {
            return Err("it is not the manifest of a base".into());
        }
        if word(16) != VERSION {
            return Err(format!("it has format version {}, this program knows {VERSION}", word(16)));
        }
        if part(72, HASH_LEN) != hash(part(0, 72)) {
            return Err("it is damaged: its header does not have the hash that it should".into());
        }
        if u64::from(word(20)) != CHUNK_SIZE {
            return Err(format!("its chunks have {} bytes, expected {CHUNK_SIZE}", word(20)));
        }
        let name =
            part(32, 8).split(|byte| *byte == 0).next().and_then(|name| std::str::from_utf8(name).ok());
        let format = name.unwrap_or_default().parse()?;
        let size = part(24, 8).try_into().map_or(0, u64::from_le_bytes);
        blocks::Geometry::new(size).map_err(|error| error.to_string())?;
        let root = part(40, HASH_LEN).try_into().map_err(|_| "it is too short")?;
        Ok(Self { size, format, root })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { size: 1 << 20, format: BaseFormat::Qcow2, root: [7; 32] };

    #[test]
    fn header_with_any_bit_flipped_is_refused_or_the_same() {
        let bytes = HEADER.to_bytes();
        assert_eq!(Header::parse(&bytes), Ok(HEADER));
        for bit in 0..104 * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::parse(&flipped).is_err(), "bit {bit}");
        }
    }

    /// Manifests that were written stay readable, and roots comparable, for ever.
    #[test]
    fn hashes_of_version_1_are_these() {
        let text = |hash: Hash| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let groups = [hash(b"one"), hash(b"two")];
        assert_eq!(
            text(Header::root_of(1 << 20, &groups)),
            "fbc1e2af8bcbae8ebc25a3b91fb94d3cab465f3a05e347f07217500d708a8e78"
        );
        assert_eq!(
            text(hash(&HEADER.to_bytes())),
            "460856ee80203ebafa2d26ce4c44d156ab3c42c6524bea8d71dcfb6fbc1e8742"
        );
    }
}
