//! What the frames of one area may be: bytes are judged one frame after the other, without I/O.

use blocks::Geometry;

use crate::{
    bytes::{u64_at, u64s},
    frame::{self, Frame, HEAD_BYTES, Kind, Mark, Parsed},
    header::Layout,
};

/// What a good frame holds. All of it lies inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    /// Records of 8 bytes, at least one.
    Extents(&'a [u8]),
    /// A part of a bitmap; bit 0 is block `first`.
    Bitmap { first: u64, bits: &'a [u8] },
    /// The end of the log.
    Seal { distinct: u64 },
}

/// What comes next in an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    /// A good frame of so many bytes.
    Frame { content: Content<'a>, after: Mark, bytes: usize },
    /// This many bytes are needed to tell; there are as many in the area.
    Need(usize),
    /// No good frame follows; `torn` if something was begun that is none.
    End { torn: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Start,
    /// Inside a bitmap; the next chunk begins at this block.
    Bitmap(u64),
    /// All that came before is whole; extents or a seal may follow.
    Extents,
    Sealed,
}

/// Walks through the frames of one area.
#[derive(Debug)]
pub(crate) struct Walk {
    blocks: u64,
    header_crc: u32,
    layout: Layout,
    index: u32,
    limit: u64,
    at: Option<Mark>,
    stage: Stage,
}

impl Walk {
    /// A walk through area `index` that looks at no more than its first `limit` bytes.
    pub(crate) fn new(geometry: Geometry, header_crc: u32, layout: Layout, index: u32, limit: u64) -> Self {
        let limit = limit.min(layout.area_size());
        Self { blocks: geometry.blocks(), header_crc, layout, index, limit, at: None, stage: Stage::Start }
    }

    /// How many bytes the walk may look at.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// The place after the last good frame.
    pub(crate) fn mark(&self) -> Option<Mark> {
        self.at.filter(|mark| mark.committed > 0)
    }

    /// Whether the frames so far are a set: not the beginning of a bitmap.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self.stage, Stage::Extents | Stage::Sealed)
    }

    /// Judges the bytes that follow the last frame, as many of them as there are at hand.
    pub(crate) fn step<'a>(&mut self, bytes: &'a [u8]) -> Step<'a> {
        if self.stage == Stage::Sealed {
            return Step::End { torn: false };
        }
        let place = match self.at {
            Some(mark) => mark,
            None if bytes.len() < HEAD_BYTES => return self.need(HEAD_BYTES, 0),
            None => match frame::epoch_of(bytes).filter(|epoch| self.may_hold(*epoch)) {
                Some(epoch) => Mark::start(self.header_crc, epoch),
                None => return Step::End { torn: begins_with_something(bytes) },
            },
        };
        match frame::parse(bytes, place) {
            Parsed::Frame(frame) => match self.accept(&frame, place) {
                Some((content, stage)) => {
                    (self.at, self.stage) = (Some(frame.after), stage);
                    let bytes = (frame.after.committed - place.committed) as usize;
                    Step::Frame { content, after: frame.after, bytes }
                }
                None => Step::End { torn: true },
            },
            Parsed::Short(needed) => self.need(needed, place.committed),
            Parsed::None { begun } => {
                let fresh = place.epoch <= self.layout.areas();
                Step::End { torn: begun || fresh && begins_with_something(bytes) }
            }
        }
    }

    fn may_hold(&self, epoch: u32) -> bool {
        epoch > 0 && self.layout.area_of(epoch) == self.index && (epoch == 1 || self.layout.areas() > 1)
    }

    fn need<'a>(&self, bytes: usize, committed: u64) -> Step<'a> {
        if bytes as u64 <= self.limit.saturating_sub(committed) {
            Step::Need(bytes)
        } else {
            Step::End { torn: bytes > HEAD_BYTES }
        }
    }

    /// What `frame` holds and where the walk is after it, if it may stand here.
    fn accept<'a>(&self, frame: &Frame<'a>, place: Mark) -> Option<(Content<'a>, Stage)> {
        let payload = frame.payload;
        let whole = self.stage == Stage::Extents || self.stage == Stage::Start && place.epoch == 1;
        match frame.kind {
            Kind::Extents => {
                let good = whole && !payload.is_empty() && payload.len().is_multiple_of(8);
                (good && u64s(payload).all(|record| frame::extent_of(record).end() <= self.blocks))
                    .then_some((Content::Extents(payload), Stage::Extents))
            }
            Kind::Bitmap => {
                let expected = match self.stage {
                    Stage::Start => 0,
                    Stage::Bitmap(next) => next,
                    Stage::Extents | Stage::Sealed => return None,
                };
                let (first, bits) = (u64_at(payload, 0)?, payload.get(8..)?);
                let next = first.checked_add(bits.len() as u64 * 8)?;
                let padding = next.saturating_sub(self.blocks);
                let last = bits.last()?;
                if first != expected || padding >= 8 || last.leading_zeros() < padding as u32 {
                    return None;
                }
                let stage = if next >= self.blocks { Stage::Extents } else { Stage::Bitmap(next) };
                Some((Content::Bitmap { first, bits }, stage))
            }
            Kind::Seal if whole => {
                Some((Content::Seal { distinct: frame::distinct_of(payload)? }, Stage::Sealed))
            }
            Kind::Seal => None,
        }
    }
}

fn begins_with_something(bytes: &[u8]) -> bool {
    bytes.iter().take(HEAD_BYTES).any(|byte| *byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogKind;

    const BLOCKS: u64 = 100;

    fn walk(kind: LogKind, index: u32) -> Walk {
        let disk = Geometry::new(BLOCKS * 4096).unwrap();
        Walk::new(disk, 1, Layout::new(kind, 4096).unwrap(), index, 4096)
    }

    /// How many of the frames are accepted one after the other.
    fn accepted(kind: LogKind, index: u32, epoch: u32, frames: &[(Kind, Vec<u8>)]) -> usize {
        let (mut bytes, mut mark) = (Vec::new(), Mark::start(1, epoch));
        for (kind, payload) in frames {
            mark = frame::encode(&mut bytes, *kind, mark, |buf| buf.extend_from_slice(payload));
        }
        bytes.resize(4096, 0);
        let (mut walk, mut at, mut count) = (walk(kind, index), 0, 0);
        while let Step::Frame { bytes, .. } = walk.step(&bytes[at..]) {
            (at, count) = (at + bytes, count + 1);
        }
        count
    }

    fn extents(first: u64, count: u64) -> (Kind, Vec<u8>) {
        (Kind::Extents, (first | (count - 1) << 40).to_le_bytes().to_vec())
    }

    fn bitmap(first: u64, bits: &[u8]) -> (Kind, Vec<u8>) {
        (Kind::Bitmap, [&first.to_le_bytes(), bits].concat())
    }

    fn seal() -> (Kind, Vec<u8>) {
        (Kind::Seal, vec![0; 8])
    }

    #[test]
    fn frames_in_an_order_that_no_writer_makes_are_refused() {
        let session = |epoch, frames: &[_]| accepted(LogKind::Session, (epoch - 1) % 2, epoch, frames);
        let whole = bitmap(0, &[0xff; 12].iter().chain(&[0x0f]).copied().collect::<Vec<u8>>());
        assert_eq!(session(1, &[extents(0, 1), extents(99, 1), seal()]), 3);
        assert_eq!(session(2, &[whole.clone(), extents(0, 100), seal()]), 3);
        assert_eq!(session(1, &[whole.clone(), seal()]), 2);
        assert_eq!(session(2, &[bitmap(0, &[1; 8]), bitmap(64, &[1; 5]), seal()]), 3);
        assert_eq!(session(1, &[seal(), extents(0, 1)]), 1, "nothing follows a seal");
        assert_eq!(session(2, &[extents(0, 1)]), 0, "a later epoch begins with a bitmap");
        assert_eq!(session(2, &[seal()]), 0);
        assert_eq!(session(2, &[bitmap(0, &[1; 8]), seal()]), 1, "the bitmap has a gap");
        assert_eq!(session(2, &[bitmap(0, &[1; 8]), extents(0, 1)]), 1);
        assert_eq!(session(2, &[bitmap(0, &[1; 8]), bitmap(72, &[1; 4])]), 1);
        assert_eq!(session(2, &[bitmap(8, &[1; 12])]), 0);
        assert_eq!(session(1, &[extents(0, 1), whole.clone()]), 1);
        assert_eq!(session(1, &[extents(100, 1)]), 0, "past the end of the disk");
        assert_eq!(session(1, &[extents(99, 2)]), 0);
        assert_eq!(session(1, &[(Kind::Extents, vec![])]), 0);
        assert_eq!(session(1, &[(Kind::Extents, vec![0; 9])]), 0);
        assert_eq!(session(1, &[bitmap(0, &[0x10; 13])]), 0, "a bit past the end of the disk");
        assert_eq!(session(1, &[bitmap(0, &[0; 14])]), 0);
        assert_eq!(session(1, &[bitmap(0, &[])]), 0);
        assert_eq!(session(1, &[(Kind::Bitmap, vec![0; 7])]), 0);
        assert_eq!(session(1, &[(Kind::Seal, vec![0; 7])]), 0);
        assert_eq!(accepted(LogKind::Session, 0, 2, std::slice::from_ref(&whole)), 0, "the wrong area");
        assert_eq!(accepted(LogKind::Pending, 0, 1, &[extents(0, 1), seal()]), 2);
        assert_eq!(accepted(LogKind::Pending, 0, 2, &[whole]), 0, "a pending log has one epoch");
    }

    #[test]
    fn walk_of_zeros_ends_clean_and_of_garbage_ends_torn() {
        assert_eq!(walk(LogKind::Session, 0).step(&[0; 64]), Step::End { torn: false });
        assert_eq!(walk(LogKind::Session, 0).step(&[7; 64]), Step::End { torn: true });
        assert_eq!(walk(LogKind::Session, 0).step(&[]), Step::Need(HEAD_BYTES));
    }
}
