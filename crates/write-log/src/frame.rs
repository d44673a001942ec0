//! One frame: its head, its checksum, and the records in it.

use blocks::Extent;

use crate::bytes::{u32_at, u64_at};

/// Bytes of a frame's head.
pub(crate) const HEAD_BYTES: usize = 16;
/// Frames begin at multiples of this.
pub(crate) const ALIGN: usize = 8;
/// The largest payload, in bytes: what a reader must be ready to hold.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Bytes of a seal.
pub(crate) const SEAL_BYTES: u64 = HEAD_BYTES as u64 + 8;

const MAGIC: [u8; 3] = *b"wlf";
const CRC_OFFSET: usize = 12;
const FIRST_BITS: u32 = 40;
/// The longest extent of one record, in blocks.
const RECORD_BLOCKS_MAX: u64 = 1 << (64 - FIRST_BITS);

/// A place in a log, and the checksum of all that leads up to it. Whoever remembers a mark can
/// tell later whether the log still holds exactly what it held then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// Which filling of an area; the first is 1.
    pub epoch: u32,
    /// Bytes of frames in that epoch's area.
    pub committed: u64,
    /// CRC32C that runs over the log's header, the epoch and these frames.
    pub crc: u32,
}

impl Mark {
    /// Where `epoch` begins, in the log whose header has the checksum `header_crc`.
    pub(crate) fn start(header_crc: u32, epoch: u32) -> Self {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header_crc.to_le_bytes()), &epoch.to_le_bytes());
        Self { epoch, committed: 0, crc }
    }
}

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Extents = 1,
    Bitmap = 2,
    Seal = 3,
}

/// A whole frame whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    pub(crate) payload: &'a [u8],
    /// The place after the frame.
    pub(crate) after: Mark,
}

/// What the bytes at a mark are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parsed<'a> {
    Frame(Frame<'a>),
    /// More bytes are needed: this many altogether.
    Short(usize),
    /// No frame of this epoch; `begun` if its head says it is one.
    None {
        begun: bool,
    },
}

/// The epoch that the head at the beginning of `bytes` names, if it is a head.
pub(crate) fn epoch_of(bytes: &[u8]) -> Option<u32> {
    (bytes.get(..3)? == MAGIC).then(|| u32_at(bytes, 4)).flatten()
}

/// Looks for the frame that follows `before` in `bytes`.
pub(crate) fn parse(bytes: &[u8], before: Mark) -> Parsed<'_> {
    let Some(head) = bytes.get(..HEAD_BYTES) else { return Parsed::Short(HEAD_BYTES) };
    if epoch_of(head) != Some(before.epoch) {
        return Parsed::None { begun: false };
    }
    let begun = Parsed::None { begun: true };
    let kind = match head.get(3) {
        Some(1) => Kind::Extents,
        Some(2) => Kind::Bitmap,
        Some(3) => Kind::Seal,
        _ => return begun,
    };
    let (Some(len), Some(crc)) = (u32_at(head, 8), u32_at(head, CRC_OFFSET)) else { return begun };
    let len = len as usize;
    if len > PAYLOAD_BYTES_MAX {
        return begun;
    }
    let end = HEAD_BYTES + len.next_multiple_of(ALIGN);
    let Some(frame) = bytes.get(..end) else { return Parsed::Short(end) };
    let (Some(payload), Some(padding)) =
        (frame.get(HEAD_BYTES..HEAD_BYTES + len), frame.get(HEAD_BYTES + len..))
    else {
        return begun;
    };
    if checksum(frame, before.crc) != crc || padding.iter().any(|byte| *byte != 0) {
        return begun;
    }
    let after = Mark { epoch: before.epoch, committed: before.committed + end as u64, crc };
    Parsed::Frame(Frame { kind, payload, after })
}

/// Appends a frame to `buf` whose payload is what `fill` appends, at most
/// [`PAYLOAD_BYTES_MAX`] bytes. Returns the place after it.
pub(crate) fn encode(buf: &mut Vec<u8>, kind: Kind, before: Mark, fill: impl FnOnce(&mut Vec<u8>)) -> Mark {
    let start = buf.len();
    buf.extend_from_slice(&[0; HEAD_BYTES]);
    fill(buf);
    let len = buf.len() - start - HEAD_BYTES;
    debug_assert!(len <= PAYLOAD_BYTES_MAX);
    buf.resize(start + HEAD_BYTES + len.next_multiple_of(ALIGN), 0);
    let mut crc = 0;
    if let Some(frame) = buf.get_mut(start..) {
        let [a, b, c] = MAGIC;
        let begin = u64::from(u32::from_le_bytes([a, b, c, kind as u8])) | u64::from(before.epoch) << 32;
        put(frame, 0, &begin.to_le_bytes());
        put(frame, 8, &(len as u32).to_le_bytes());
        crc = checksum(frame, before.crc);
        put(frame, CRC_OFFSET, &crc.to_le_bytes());
    }
    Mark { epoch: before.epoch, committed: before.committed + (buf.len() - start) as u64, crc }
}

fn put(frame: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(slot) = frame.get_mut(offset..offset + bytes.len()) {
        slot.copy_from_slice(bytes);
    }
}

/// The running checksum after `frame`, its own checksum field left out.
fn checksum(frame: &[u8], before: u32) -> u32 {
    let (head, rest) = frame.split_at_checked(HEAD_BYTES).unwrap_or((frame, &[]));
    crc32c::crc32c_append(crc32c::crc32c_append(before, head.get(..CRC_OFFSET).unwrap_or(head)), rest)
}

/// The records of `extents`: empty ones left out, those that follow one another joined, long ones split.
pub(crate) fn records(extents: impl Iterator<Item = Extent>) -> impl Iterator<Item = u64> {
    let mut extents = extents.filter(|extent| !extent.is_empty()).peekable();
    let mut rest = Extent::new(0, 0);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            rest = extents.next()?;
        }
        while let Some(next) = extents.next_if(|next| rest.is_followed_by(*next)) {
            rest = Extent::between(rest.first(), next.end());
        }
        let (run, left) = rest.split_at(RECORD_BLOCKS_MAX);
        rest = left;
        Some(run.first() | (run.count() - 1) << FIRST_BITS)
    })
}

/// The extent of a record.
pub(crate) fn extent_of(record: u64) -> Extent {
    Extent::new(record & ((1 << FIRST_BITS) - 1), (record >> FIRST_BITS) + 1)
}

/// The number of blocks that a seal's payload names.
pub(crate) fn distinct_of(payload: &[u8]) -> Option<u64> {
    (payload.len() == 8).then(|| u64_at(payload, 0)).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_of_long_and_adjacent_extents_are_split_and_joined() {
        let long =
            [Extent::new(5, 0), Extent::new(10, 1 << 24), Extent::new(10 + (1 << 24), 3), Extent::new(3, 1)];
        let back: Vec<Extent> = records(long.into_iter()).map(extent_of).collect();
        assert_eq!(back, [Extent::new(10, 1 << 24), Extent::new(10 + (1 << 24), 3), Extent::new(3, 1)]);
        let last = Extent::new((1 << 40) - 1, 1);
        assert_eq!(records([last].into_iter()).map(extent_of).collect::<Vec<_>>(), [last]);
    }

    proptest! {
        #[test]
        fn frame_of_any_payload_parses_back_and_no_prefix_does(
            payload in prop::collection::vec(any::<u8>(), 0..100), epoch in 1u32.., crc in any::<u32>(),
        ) {
            let before = Mark { epoch, committed: 48, crc };
            let mut buf = Vec::new();
            let after = encode(&mut buf, Kind::Bitmap, before, |buf| buf.extend_from_slice(&payload));
            prop_assert_eq!(buf.len() % ALIGN, 0);
            let frame = Frame { kind: Kind::Bitmap, payload: &payload, after };
            prop_assert_eq!(parse(&buf, before), Parsed::Frame(frame));
            for len in 0..buf.len() {
                prop_assert!(matches!(parse(&buf[..len], before), Parsed::Short(_)));
            }
            let other = Mark { crc: crc ^ 1, ..before };
            prop_assert_eq!(parse(&buf, other), Parsed::None { begun: true });
        }

        #[test]
        fn frame_of_any_bytes_is_answered(
            mut bytes in prop::collection::vec(any::<u8>(), 0..64), epoch in 0u32..3, disguise in any::<bool>(),
        ) {
            if disguise && bytes.len() >= 8 {
                bytes[..3].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&epoch.to_le_bytes());
            }
            let found = parse(&bytes, Mark { epoch, committed: 0, crc: 0 });
            prop_assert!(!matches!(found, Parsed::Frame(_)));
        }
    }
}
