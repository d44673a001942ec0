//! Writing a whole set as a durable, sealed log, in whichever form is smaller.

use std::path::{Path, PathBuf};

use blocks::BlockSet;

use crate::{
    DiskDir, LogDir, LogError, LogFile, LogHeader, LogKind, LogWriter,
    frame::{self, HEAD_BYTES, Kind, PAYLOAD_BYTES_MAX, SEAL_BYTES},
    header::{HEADER_BYTES, Layout, bitmap_frames_bytes},
    writer::{create_log, new_layout},
};

/// Records in each frame; a frame of them stays small.
const FRAME_RECORDS: u64 = 8192;
const _: () = assert!(FRAME_RECORDS as usize * 8 <= PAYLOAD_BYTES_MAX);

impl LogWriter {
    /// Writes `set` as a log of its own into the directory `dir`: whole, durable and sealed when
    /// this returns, or not there. The set must not change meanwhile.
    ///
    /// The log is as large as it needs to be: 8 bytes per run of blocks or one bit per block of the
    /// disk, whichever is less.
    pub fn write_pending(dir: &Path, header: &LogHeader, set: &BlockSet) -> Result<(), LogError> {
        Self::write_pending_in(&DiskDir::new(dir), header, set)
    }

    /// [`write_pending`](Self::write_pending) in any kind of directory.
    pub fn write_pending_in(dir: &dyn LogDir, header: &LogHeader, set: &BlockSet) -> Result<(), LogError> {
        let plan = Plan::new(dir.path().join(header.id.file_name()), header, set)?;
        let written = create_log(dir, header, plan.layout, |log| {
            plan.run(log, set)?;
            log.sync_in(dir)
        });
        written.map(drop)
    }

    /// [`write_pending`](Self::write_pending) into the empty `file`; `path` is for messages. The
    /// log is durable when this returns; its name is the caller's business.
    pub fn write_pending_on(
        file: Box<dyn LogFile>,
        path: PathBuf,
        header: &LogHeader,
        set: &BlockSet,
    ) -> Result<(), LogError> {
        let plan = Plan::new(path.clone(), header, set)?;
        plan.run(&mut Self::start(file, path, header, plan.layout)?, set)
    }

    /// Writes all runs of `set`; returns the number of their blocks.
    fn write_extents(&mut self, set: &BlockSet) -> Result<u64, LogError> {
        let mut distinct = 0;
        let mut records = frame::records(set.runs()).inspect(|record| {
            distinct += frame::extent_of(*record).count();
        });
        let mut batch = Vec::new();
        loop {
            batch.clear();
            batch.extend(records.by_ref().take(FRAME_RECORDS as usize).flat_map(u64::to_le_bytes));
            if batch.is_empty() {
                drop(records);
                return Ok(distinct);
            }
            self.write_frame(Kind::Extents, &batch)?;
        }
    }

    /// Writes all of `set` as a bitmap; returns the number of its blocks.
    fn write_bitmap_of(&mut self, set: &BlockSet) -> Result<u64, LogError> {
        let (mark, distinct) = self.write_bitmap(self.mark(), set, std::iter::empty())?;
        self.commit(mark);
        Ok(distinct)
    }
}

/// How a set is written: in which form, and so in how much room.
struct Plan {
    layout: Layout,
    as_extents: bool,
}

impl Plan {
    fn new(path: PathBuf, header: &LogHeader, set: &BlockSet) -> Result<Self, LogError> {
        if header.kind != LogKind::Pending {
            return Err(LogError::refused(&path, "expected the header of a pending log"));
        }
        if set.bound() != header.geometry.blocks() {
            return Err(LogError::refused(&path, "expected a set of the disk's blocks"));
        }
        let bitmap = bitmap_frames_bytes(header.geometry);
        let extents = extents_frames_bytes(set, bitmap);
        let size = extents.unwrap_or(bitmap) + SEAL_BYTES;
        let layout = new_layout(header, size.next_multiple_of(HEADER_BYTES), &path)?;
        Ok(Self { layout, as_extents: extents.is_some() })
    }

    fn run(&self, log: &mut LogWriter, set: &BlockSet) -> Result<(), LogError> {
        let distinct = if self.as_extents { log.write_extents(set)? } else { log.write_bitmap_of(set)? };
        log.seal(distinct).map(drop)
    }
}

/// Bytes of the frames that hold the runs of `set`; `None` if they are not less than `limit`.
fn extents_frames_bytes(set: &BlockSet, limit: u64) -> Option<u64> {
    let most = limit / 8 + 1;
    let records = frame::records(set.runs()).take(usize::try_from(most).unwrap_or(usize::MAX)).count() as u64;
    let bytes = records * 8 + records.div_ceil(FRAME_RECORDS) * HEAD_BYTES as u64;
    (bytes < limit).then_some(bytes)
}
