//! What a log that was read says, and how far it may be trusted.

use blocks::{BlockSet, Extent};

use crate::{LogHeader, Mark, area::Content, bytes::u64s, frame::extent_of};

/// The place after one frame, and how many records all frames up to it hold.
#[derive(Clone, Copy, Debug)]
struct FrameEnd {
    committed: u64,
    crc: u32,
    records: usize,
}

/// The readable frames of one area: from its beginning up to the first that is not whole.
#[derive(Clone, Debug, Default)]
pub struct AreaContents {
    epoch: u32,
    frames: Vec<FrameEnd>,
    records: Vec<u64>,
    bits: Vec<u8>,
    /// Before this place there is only a part of a bitmap; 0 if there is no bitmap.
    bitmap_end: u64,
    distinct: Option<u64>,
    torn: bool,
}

impl AreaContents {
    /// The place after the last readable frame; `None` if there is no frame.
    pub fn mark(&self) -> Option<Mark> {
        let last = self.frames.last()?;
        Some(Mark { epoch: self.epoch, committed: last.committed, crc: last.crc })
    }

    /// Number of readable frames.
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Whether something follows that was begun and is not a whole frame. An append that was cut
    /// looks like this, and so does damage; only a [`Mark`] tells which.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Whether the last frame is a seal.
    pub fn is_sealed(&self) -> bool {
        self.distinct.is_some()
    }

    pub(crate) fn set_torn(&mut self, torn: bool) {
        self.torn = torn;
    }

    /// Takes the next frame of a walk; `whole` as the walk says after it.
    pub(crate) fn push(&mut self, content: Content<'_>, after: Mark, whole: bool) {
        match content {
            Content::Extents(payload) => self.records.extend(u64s(payload)),
            Content::Bitmap { bits, .. } => {
                self.bits.extend_from_slice(bits);
                self.bitmap_end = if whole { after.committed } else { u64::MAX };
            }
            Content::Seal { distinct } => self.distinct = Some(distinct),
        }
        self.epoch = after.epoch;
        let records = self.records.len();
        self.frames.push(FrameEnd { committed: after.committed, crc: after.crc, records });
    }

    /// The extents of the first `records` records and the bitmap's blocks go into `set`.
    fn insert_into(&self, set: &BlockSet, records: usize) {
        set.insert_bytes(0, &self.bits);
        self.records.iter().take(records).for_each(|record| {
            set.insert(extent_of(*record));
        });
    }

    /// How many records there are up to `mark`, if these frames lead exactly there.
    fn records_at(&self, mark: Mark) -> Option<usize> {
        let index = self.frames.binary_search_by_key(&mark.committed, |frame| frame.committed).ok()?;
        let frame = self.frames.get(index)?;
        let exact = self.epoch == mark.epoch && frame.crc == mark.crc && mark.committed >= self.bitmap_end;
        exact.then_some(frame.records)
    }
}

/// Everything readable of one log. The bytes it holds are those of the readable frames.
#[derive(Clone, Debug)]
pub struct LogContents {
    /// The header.
    pub header: LogHeader,
    /// The place after the seal, if the log's newest epoch ends with one.
    pub sealed: Option<Mark>,
    /// The areas, in the order of the file; the second one of a pending log is empty.
    pub areas: [AreaContents; 2],
    header_crc: u32,
}

impl LogContents {
    pub(crate) fn new(header: LogHeader, header_crc: u32, areas: [AreaContents; 2]) -> Self {
        let newest = areas.iter().max_by_key(|area| area.epoch);
        let sealed = newest.filter(|area| area.is_sealed()).and_then(AreaContents::mark);
        Self { header, sealed, areas, header_crc }
    }

    /// The place where every log begins: an empty set.
    pub fn start(&self) -> Mark {
        Mark::start(self.header_crc, 1)
    }

    /// The blocks that the log held when its writer returned `mark`. `None`: the log does not lead
    /// exactly there and is not to be trusted. What follows the mark is left out.
    ///
    /// The caller knows that the log is of the disk it means: compare `header.disk`, `header.id`
    /// and `header.geometry` first.
    pub fn blocks_at(&self, mark: Mark) -> Option<BlockSet> {
        let set = self.empty_set();
        if mark == self.start() {
            let overwritten = self.areas.first().is_none_or(|area| area.epoch > 1);
            return (!overwritten).then_some(set);
        }
        let area = self.areas.iter().find(|area| area.epoch == mark.epoch)?;
        area.insert_into(&set, area.records_at(mark)?);
        let at_seal = self.sealed == Some(mark);
        (!at_seal || area.distinct == Some(set.count())).then_some(set)
    }

    /// Every block that any readable frame of either area names. More than the log held at a mark
    /// if something follows it; less than it held if a part is unreadable: only together with what
    /// else is known (the intents) may this vouch for the blocks that are not in it.
    pub fn readable_blocks(&self) -> BlockSet {
        let set = self.empty_set();
        self.areas.iter().for_each(|area| area.insert_into(&set, area.records.len()));
        set
    }

    /// The log's blocks, if it is sealed, whole, and has as many as its seal says.
    pub fn sealed_blocks(&self) -> Option<BlockSet> {
        self.blocks_at(self.sealed?)
    }

    /// All runs that the readable frames of the newest epoch name, in the order in which they were
    /// logged, a bitmap's first. For people who want to see the log rather than the set.
    pub fn logged_extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let newest = self.areas.iter().max_by_key(|area| area.epoch);
        newest.into_iter().flat_map(|area| {
            let bitmap = crate::bitmap::runs_of(0, &area.bits);
            bitmap.chain(area.records.iter().map(|record| extent_of(*record)))
        })
    }

    fn empty_set(&self) -> BlockSet {
        BlockSet::new(self.header.geometry.blocks())
    }
}
