//! Appending to a session's log, and rewriting it as a bitmap when an area is full.
//!
//! What holds after every call, failed ones included:
//!
//! 1. The bytes up to the last returned [`Mark`] are in its area and stay there until a rewrite
//!    into the *other* area is durable.
//! 2. What a failed write may have left behind is gone from the file before the next mark is
//!    returned: the next frame overwrites it, zeros reach as far as it did, and a half-made
//!    rewrite loses its first head. So the newest epoch that is readable is the one of the mark.
//! 3. A seal that failed is gone from the medium too before the next mark is returned: no power
//!    cut can bring back a seal that does not know of a later append.

use std::{
    io,
    path::{Path, PathBuf},
};

use blocks::{BlockSet, Extent};

use crate::{
    DiskDir, DiskFile, LogDir, LogError, LogFile, LogHeader, LogKind, Mark,
    area::{Content, Walk},
    bitmap::{self, ChunkFiller},
    bytes::u64s,
    file::{write_all, zero},
    frame::{self, HEAD_BYTES, Kind, PAYLOAD_BYTES_MAX, SEAL_BYTES},
    header::{self, Layout, area_size, area_size_min},
    reader::{load_header, read_from, walk_area},
};

/// The writing end of a log. One per log: nothing else may write the file meanwhile.
#[derive(Debug)]
pub struct LogWriter {
    file: Box<dyn LogFile>,
    path: PathBuf,
    header: LogHeader,
    header_crc: u32,
    layout: Layout,
    mark: Mark,
    sealed: bool,
    /// Up to here the current area may hold what failed writes left; not before `mark.committed`.
    remains_end: u64,
    /// The other area may hold a rewrite that failed.
    other_has_remains: bool,
    /// A seal that does not hold may be on the medium: an append may not count before a sync.
    seal_has_remains: bool,
    /// Reused by every append.
    buf: Vec<u8>,
}

impl LogWriter {
    /// Creates a session's log in the directory `dir`, named after `header.id`, all its room
    /// reserved. When this returns, the log and its name are durable.
    ///
    /// Fails if the file exists; on any error nothing is left behind.
    pub fn create(dir: &Path, header: &LogHeader) -> Result<Self, LogError> {
        Self::create_in(&DiskDir::new(dir), header)
    }

    /// [`create`](Self::create) in any kind of directory.
    pub fn create_in(dir: &dyn LogDir, header: &LogHeader) -> Result<Self, LogError> {
        Self::create_with(dir, header, |log| log.sync_in(dir))
    }

    /// [`create_in`](Self::create_in) without waiting for the medium: the log's room is reserved, but a power cut may take
    /// back all of it until [`sync_in`](Self::sync_in) has returned. Until then nothing may rest on it.
    pub fn create_unsynced_in(dir: &dyn LogDir, header: &LogHeader) -> Result<Self, LogError> {
        Self::create_with(dir, header, |_| Ok(()))
    }

    fn create_with(
        dir: &dyn LogDir,
        header: &LogHeader,
        finish: impl FnOnce(&mut Self) -> Result<(), LogError>,
    ) -> Result<Self, LogError> {
        let path = dir.path().join(header.id.file_name());
        check_session(header, &path)?;
        let layout = new_layout(header, area_size(header.geometry), &path)?;
        create_log(dir, header, layout, finish)
    }

    /// Makes the log durable, and its name in `dir`, where it lies.
    pub fn sync_in(&mut self, dir: &dyn LogDir) -> Result<(), LogError> {
        dir.sync_with(&mut *self.file).map_err(LogError::io("sync", &self.path))
    }

    /// Creates a session's log in the empty `file`, with areas of `area_size` bytes: a multiple of
    /// 4096, at least [`area_size_min`]. `path` is for messages. The log is durable when this
    /// returns; its name is the caller's business.
    pub fn create_on(
        file: Box<dyn LogFile>,
        path: PathBuf,
        header: &LogHeader,
        area_size: u64,
    ) -> Result<Self, LogError> {
        check_session(header, &path)?;
        if area_size < area_size_min(header.geometry) {
            return Err(LogError::refused(&path, "expected areas that hold a bitmap of the disk"));
        }
        let layout = new_layout(header, area_size, &path)?;
        let mut log = Self::start(file, path, header, layout)?;
        log.sync()?;
        Ok(log)
    }

    /// Opens the session's log at `path` to go on after `mark`. The frames that follow the mark are erased; bytes of one that a
    /// kill or a power cut has torn may stay, to which no checksum leads.
    /// Returns the blocks that the log holds too.
    ///
    /// Refuses a log that does not lead exactly to `mark`, or is sealed there.
    pub fn resume(path: &Path, mark: Mark) -> Result<(Self, BlockSet), LogError> {
        let file = DiskFile::open(path, true).map_err(LogError::io("open", path))?;
        Self::resume_on(Box::new(file), path.to_owned(), mark)
    }

    /// [`resume`](Self::resume) on an open file.
    pub fn resume_on(
        file: Box<dyn LogFile>,
        path: PathBuf,
        mark: Mark,
    ) -> Result<(Self, BlockSet), LogError> {
        let loaded = load_header(&*file, &path)?;
        check_session(&loaded.header, &path)?;
        let contents = read_from(&*file, &path)?;
        let Some(set) = contents.blocks_at(mark) else {
            return Err(LogError::refused(&path, "expected frames that lead exactly to the mark"));
        };
        if contents.sealed == Some(mark) {
            return Err(LogError::refused(&path, "expected a log that is not sealed"));
        }
        let (header, header_crc, layout) = (loaded.header, loaded.crc, loaded.layout);
        let marks = contents.areas.iter().filter_map(|area| area.mark());
        let followed = marks.filter(|end| end.epoch == mark.epoch).map(|end| end.committed).max();
        let mut log = Self {
            remains_end: followed.unwrap_or(0).max(mark.committed),
            other_has_remains: contents.areas.iter().any(|a| a.mark().is_some_and(|m| m.epoch > mark.epoch)),
            ..Self::over(file, path, header, header_crc, layout, mark)
        };
        let erases = log.other_has_remains || log.remains_end > mark.committed;
        log.erase_rewrite()?;
        log.erase_tail()?;
        if erases {
            log.sync()?;
        }
        Ok((log, set))
    }

    /// Appends `extents` as one frame, with one write, and returns the place after them. Nothing is synced:
    /// after a crash of the process the log holds them, after a power cut it may not.
    ///
    /// If the area is full, all of `owned` and `extents`, and whatever else the log holds, is
    /// written to the other area as a bitmap and synced. `owned` spares the log a set of its own:
    /// it is what earlier appends recorded.
    ///
    /// On an error the mark stays where it was, and nothing counts as appended. An extent outside
    /// of the disk is refused before anything is written.
    pub fn append(&mut self, extents: &[Extent], owned: &BlockSet) -> Result<Mark, LogError> {
        self.check_open()?;
        let blocks = self.header.geometry.blocks();
        if extents.iter().any(|extent| !extent.is_empty() && extent.end() > blocks) {
            return Err(LogError::refused(&self.path, "expected extents that lie inside the disk"));
        }
        if owned.bound() != blocks {
            return Err(LogError::refused(&self.path, "expected a set of the disk's blocks"));
        }
        if extents.iter().all(|extent| extent.is_empty()) {
            return Ok(self.mark);
        }
        self.erase_rewrite()?;
        let room = self.layout.area_size() - self.mark.committed;
        let room = room.saturating_sub(SEAL_BYTES + HEAD_BYTES as u64).min(PAYLOAD_BYTES_MAX as u64) as usize;
        let (mut records, mut fits) = (frame::records(extents.iter().copied()), true);
        self.buf.clear();
        let after = frame::encode(&mut self.buf, Kind::Extents, self.mark, |buf| {
            let limit = buf.len() + room;
            for record in records.by_ref() {
                fits = buf.len() + 8 <= limit;
                if !fits {
                    return;
                }
                buf.extend_from_slice(&record.to_le_bytes());
            }
        });
        if !fits {
            return self.rewrite(extents, owned);
        }
        self.put()?;
        if self.seal_has_remains {
            self.sync()?;
            self.seal_has_remains = false;
        }
        self.commit(after);
        Ok(after)
    }

    /// The place after the last successful append.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Makes all appends survive a power cut.
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.file.sync_data().map_err(LogError::io("sync", &self.path))
    }

    /// Ends the log: from here on it is exact without a mark. `distinct` is the number of
    /// different blocks that it holds; a reader compares. Synced when this returns; later appends
    /// are refused.
    pub fn seal(&mut self, distinct: u64) -> Result<Mark, LogError> {
        let after = self.put_seal(distinct)?;
        self.sync()?;
        self.end(after);
        Ok(after)
    }

    /// [`seal`](Self::seal) without the sync: the log is exact after a crash of the process. After a power cut
    /// it may be as if it had not been sealed, nor all been appended.
    pub fn seal_unsynced(&mut self, distinct: u64) -> Result<Mark, LogError> {
        let after = self.put_seal(distinct)?;
        self.end(after);
        Ok(after)
    }

    /// Writes a seal, which does not count yet; returns the place after it.
    fn put_seal(&mut self, distinct: u64) -> Result<Mark, LogError> {
        self.check_open()?;
        self.erase_rewrite()?;
        self.buf.clear();
        let after = frame::encode(&mut self.buf, Kind::Seal, self.mark, |buf| {
            buf.extend_from_slice(&distinct.to_le_bytes());
        });
        self.seal_has_remains = true;
        self.put()?;
        Ok(after)
    }

    /// The seal before `mark` counts.
    fn end(&mut self, mark: Mark) {
        self.commit(mark);
        self.sealed = true;
    }

    /// Whether the log was sealed.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Where the log is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the log's header says.
    pub fn header(&self) -> &LogHeader {
        &self.header
    }

    /// Writes a frame of `payload` behind the mark, which moves.
    pub(crate) fn write_frame(&mut self, kind: Kind, payload: &[u8]) -> Result<(), LogError> {
        self.buf.clear();
        let after = frame::encode(&mut self.buf, kind, self.mark, |buf| buf.extend_from_slice(payload));
        if after.committed.saturating_add(SEAL_BYTES) > self.layout.area_size() {
            return Err(LogError::refused(&self.path, "expected a set that does not change meanwhile"));
        }
        self.put()?;
        self.commit(after);
        Ok(())
    }

    /// Writes the union of a set and of runs in ascending order as a bitmap from `start` on. Returns the
    /// place after it and the number of blocks.
    pub(crate) fn write_bitmap(
        &mut self,
        start: Mark,
        set: &BlockSet,
        more: impl Iterator<Item = Extent>,
    ) -> Result<(Mark, u64), LogError> {
        let area = self.layout.area_offset(self.layout.area_of(start.epoch));
        let mut more = ChunkFiller::new(more);
        let (mut place, mut distinct) = (start, 0);
        for chunk in bitmap::chunks(self.header.geometry) {
            self.buf.clear();
            let after = frame::encode(&mut self.buf, Kind::Bitmap, place, |buf| {
                buf.extend_from_slice(&chunk.first().to_le_bytes());
                let head = buf.len();
                buf.resize(head + chunk.count().div_ceil(8) as usize, 0);
                if let Some(bits) = buf.get_mut(head..) {
                    set.or_into(chunk.first(), bits);
                    more.fill(chunk, bits);
                    distinct += bitmap::count_ones(bits);
                }
            });
            write_all(&mut *self.file, &self.buf, area + place.committed)
                .map_err(LogError::io("write a bitmap to", &self.path))?;
            place = after;
        }
        Ok((place, distinct))
    }

    /// Everything up to `mark` was written.
    pub(crate) fn commit(&mut self, mark: Mark) {
        (self.mark, self.remains_end) = (mark, mark.committed);
    }

    /// A new log in the empty `file`: room and header. The caller syncs it.
    pub(crate) fn start(
        mut file: Box<dyn LogFile>,
        path: PathBuf,
        header: &LogHeader,
        layout: Layout,
    ) -> Result<Self, LogError> {
        let needed = layout.file_len();
        file.reserve(needed).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                LogError::NoSpace { path: path.clone(), needed, source }
            }
            _ => LogError::Io { operation: "reserve room for", path: path.clone(), source },
        })?;
        let block = header::encode(header, layout);
        write_all(&mut *file, &block, 0).map_err(LogError::io("write the header of", &path))?;
        let crc = header::crc_of(&block);
        Ok(Self::over(file, path, header.clone(), crc, layout, Mark::start(crc, 1)))
    }

    fn over(
        file: Box<dyn LogFile>,
        path: PathBuf,
        header: LogHeader,
        header_crc: u32,
        layout: Layout,
        mark: Mark,
    ) -> Self {
        Self {
            file,
            path,
            header,
            header_crc,
            layout,
            mark,
            sealed: false,
            remains_end: mark.committed,
            other_has_remains: false,
            seal_has_remains: false,
            buf: Vec::new(),
        }
    }

    fn check_open(&self) -> Result<(), LogError> {
        if self.sealed { Err(LogError::refused(&self.path, "it is sealed")) } else { Ok(()) }
    }

    /// Writes the frame in `buf` behind the mark, and zeros as far as failed writes reached.
    fn put(&mut self) -> Result<(), LogError> {
        let remains = self.remains_end.saturating_sub(self.mark.committed) as usize;
        if remains > self.buf.len() {
            self.buf.resize(remains, 0);
        }
        // Until the mark moves behind them, these bytes are remains.
        self.remains_end = self.mark.committed + self.buf.len() as u64;
        let area = self.layout.area_offset(self.layout.area_of(self.mark.epoch));
        write_all(&mut *self.file, &self.buf, area + self.mark.committed)
            .map_err(LogError::io("append to", &self.path))
    }

    /// Moves to the other area with everything the log holds, and `extents`.
    fn rewrite(&mut self, extents: &[Extent], owned: &BlockSet) -> Result<Mark, LogError> {
        let Some(epoch) = self.mark.epoch.checked_add(1) else {
            return Err(LogError::refused(&self.path, "expected fewer than 2^32 rewrites"));
        };
        let mut more = self.logged_outside(owned)?;
        more.extend_from_slice(extents);
        Extent::normalize(&mut more);
        self.erase_tail()?;
        let start = Mark::start(self.header_crc, epoch);
        self.other_has_remains = true;
        let (after, _) = self.write_bitmap(start, owned, more.into_iter())?;
        self.sync()?;
        (self.other_has_remains, self.seal_has_remains) = (false, false);
        self.commit(after);
        Ok(after)
    }

    /// The runs of blocks that the current area holds and `owned` does not. There are none unless
    /// `owned` lags behind; a rewrite must not forget them even then. Also proves that the area
    /// reads back as what was written.
    fn logged_outside(&self, owned: &BlockSet) -> Result<Vec<Extent>, LogError> {
        let index = self.layout.area_of(self.mark.epoch);
        let (mut missing, committed) = (Vec::new(), self.mark.committed);
        let mut walk = Walk::new(self.header.geometry, self.header_crc, self.layout, index, committed);
        let offset = self.layout.area_offset(index);
        let mut check = |extent: Extent| {
            if !owned.contains_all(extent) {
                missing.extend(owned.mixed_runs(extent).filter(|(known, _)| !known).map(|(_, run)| run));
            }
        };
        walk_area(&*self.file, &mut walk, offset, |content, _, _| match content {
            Content::Extents(payload) => u64s(payload).map(frame::extent_of).for_each(&mut check),
            Content::Bitmap { first, bits } if owned.contains_bytes(first, bits) => {}
            Content::Bitmap { first, bits } => bitmap::runs_of(first, bits).for_each(&mut check),
            Content::Seal { .. } => {}
        })
        .map_err(LogError::io("read", &self.path))?;
        if committed > 0 && walk.mark() != Some(self.mark) {
            let found = offset + walk.mark().map_or(0, |mark| mark.committed);
            return Err(LogError::damaged(&self.path, found, "expected the frames that were appended"));
        }
        Ok(missing)
    }

    /// Removes what failed writes left behind the mark.
    fn erase_tail(&mut self) -> Result<(), LogError> {
        let offset = self.layout.area_offset(self.layout.area_of(self.mark.epoch)) + self.mark.committed;
        zero(&mut *self.file, offset, self.remains_end - self.mark.committed)
            .map_err(LogError::io("erase a failed append of", &self.path))?;
        self.remains_end = self.mark.committed;
        Ok(())
    }

    /// Makes the other area unreadable if it holds a rewrite that failed.
    fn erase_rewrite(&mut self) -> Result<(), LogError> {
        if self.other_has_remains {
            let offset = self.layout.area_offset(self.layout.area_of(self.mark.epoch.wrapping_add(1)));
            zero(&mut *self.file, offset, HEAD_BYTES as u64)
                .map_err(LogError::io("erase a failed rewrite of", &self.path))?;
            self.other_has_remains = false;
        }
        Ok(())
    }
}

/// The layout of a new log.
pub(crate) fn new_layout(header: &LogHeader, area_size: u64, path: &Path) -> Result<Layout, LogError> {
    Layout::new(header.kind, area_size)
        .ok_or_else(|| LogError::refused(path, "expected areas that are a multiple of 4096 bytes"))
}

fn check_session(header: &LogHeader, path: &Path) -> Result<(), LogError> {
    match header.kind {
        LogKind::Session => Ok(()),
        LogKind::Pending => Err(LogError::refused(path, "expected the header of a session's log")),
    }
}

/// Creates a log's file in `dir` with room and header, and lets `finish` write to it and sync it. On an error
/// the file is removed, if it was made here.
pub(crate) fn create_log(
    dir: &dyn LogDir,
    header: &LogHeader,
    layout: Layout,
    finish: impl FnOnce(&mut LogWriter) -> Result<(), LogError>,
) -> Result<LogWriter, LogError> {
    let path = dir.path().join(header.id.file_name());
    let file = dir.create_new(&path).map_err(|source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            LogError::NoSpace { path: path.clone(), needed: layout.file_len(), source }
        }
        _ => LogError::Io { operation: "create", path: path.clone(), source },
    })?;
    let written = LogWriter::start(file, path.clone(), header, layout).and_then(|mut log| {
        finish(&mut log)?;
        Ok(log)
    });
    written.inspect_err(|_| {
        if let Err(error) = dir.remove(&path) {
            log::warn!("cannot remove the unfinished write log {}: {error}", path.display());
        }
    })
}
