//! Reading a log's file: bytes come in windows of bounded size and are judged by [`Walk`].

use std::{io, path::Path};

use blocks::Geometry;

use crate::{
    AreaContents, DiskFile, LogContents, LogError, LogFile, LogHeader, Mark,
    area::{Content, Step, Walk},
    file::read_exact,
    header::{self, HEADER_BYTES, HeaderFault, Layout},
};

/// Bytes that are read at once, unless a frame is longer.
const WINDOW_BYTES: usize = 256 << 10;

/// Reads the log at `path`, up to where its frames are whole.
///
/// Memory is bounded by the readable frames: nothing that a damaged file claims is allocated
/// before it was read. A file whose length is not what its header says is damaged. The sets that
/// are made from the contents are as large as the disk that the header names: who does not know
/// where the file comes from compares [`read_header`] with the disk first.
pub fn read(path: &Path) -> Result<LogContents, LogError> {
    read_from(&open(path)?, path)
}

/// Reads only the header of the log at `path`.
pub fn read_header(path: &Path) -> Result<LogHeader, LogError> {
    load_header(&open(path)?, path).map(|loaded| loaded.header)
}

/// [`read`] of an open file; `path` is for messages.
pub fn read_from(file: &dyn LogFile, path: &Path) -> Result<LogContents, LogError> {
    let Loaded { header, layout, crc } = load_header(file, path)?;
    check_memory(header.geometry).map_err(LogError::io("hold the blocks of", path))?;
    let mut areas: [AreaContents; 2] = Default::default();
    for (index, area) in (0..layout.areas()).zip(&mut areas) {
        let mut walk = Walk::new(header.geometry, crc, layout, index, layout.area_size());
        let torn = walk_area(file, &mut walk, layout.area_offset(index), |content, after, whole| {
            area.push(content, after, whole);
        });
        area.set_torn(torn.map_err(LogError::io("read", path))?);
    }
    Ok(LogContents::new(header, crc, areas))
}

/// What the header block of a log says.
pub(crate) struct Loaded {
    pub(crate) header: LogHeader,
    pub(crate) layout: Layout,
    pub(crate) crc: u32,
}

pub(crate) fn load_header(file: &dyn LogFile, path: &Path) -> Result<Loaded, LogError> {
    let len = file.len().map_err(LogError::io("look at", path))?;
    let mut block = vec![0; len.min(HEADER_BYTES) as usize];
    read_exact(file, &mut block, 0).map_err(LogError::io("read", path))?;
    let (header, layout) = header::decode(&block).map_err(|fault| match fault {
        HeaderFault::NotALog(what) => LogError::NotALog { path: path.to_owned(), what },
        HeaderFault::Newer(found) => LogError::NewerVersion { path: path.to_owned(), found },
        HeaderFault::Damaged { offset, what } => LogError::damaged(path, offset, what),
    })?;
    if layout.file_len() != len {
        return Err(LogError::damaged(path, len, "expected the length that its header says"));
    }
    Ok(Loaded { header, layout, crc: header::crc_of(&block) })
}

/// Walks through an area that begins at `offset`, and hands every good frame to `visit` with the
/// place after it and whether all up to it is whole. Returns whether the area ends torn.
pub(crate) fn walk_area(
    file: &dyn LogFile,
    walk: &mut Walk,
    offset: u64,
    mut visit: impl FnMut(Content<'_>, Mark, bool),
) -> io::Result<bool> {
    let (mut window, mut start, mut loaded) = (Vec::new(), 0, 0u64);
    loop {
        match walk.step(window.get(start..).unwrap_or_default()) {
            Step::Frame { content, after, bytes } => {
                visit(content, after, walk.is_whole());
                start += bytes;
            }
            Step::Need(needed) => {
                window.drain(..start.min(window.len()));
                start = 0;
                let held = window.len();
                let more = needed.saturating_sub(held).max(WINDOW_BYTES) as u64;
                let more = more.min(walk.limit().saturating_sub(loaded));
                if more == 0 {
                    return Ok(true);
                }
                window.resize(held + more as usize, 0);
                read_exact(file, window.get_mut(held..).unwrap_or_default(), offset + loaded)?;
                loaded += more;
            }
            Step::End { torn } => return Ok(torn),
        }
    }
}

fn open(path: &Path) -> Result<DiskFile, LogError> {
    DiskFile::open(path, false).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidInput => {
            LogError::NotALog { path: path.to_owned(), what: "expected a regular file" }
        }
        _ => LogError::Io { operation: "open", path: path.to_owned(), source },
    })
}

/// Fails if a set of the disk's blocks can't be allocated: a forged header may name a disk of 4 PiB,
/// and an allocation that fails later would end the process.
fn check_memory(geometry: Geometry) -> io::Result<()> {
    let mut words: Vec<u64> = Vec::new();
    let needed = usize::try_from(geometry.blocks().div_ceil(64)).unwrap_or(usize::MAX);
    words.try_reserve_exact(needed).map_err(|_| io::ErrorKind::OutOfMemory.into())
}
