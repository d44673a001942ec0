//! What lies where on a disk: its partitions, as a GPT or an MBR says, and the file systems that begin in them.
//!
//! For people who look at a picture of a disk: names, not a way to find data. All of it may have been written by a
//! guest. So nothing is believed but what lies inside the disk, what is read and kept is bounded, and what does not
//! make sense is left out. (The crates for partition tables are for those who edit them: they want a disk that can be
//! written, and allocate what a header asks for.)

mod filesystem;
mod gpt;
mod mbr;

pub use self::filesystem::FileSystem;
use crate::error::BaseError;

/// As many areas are told of at most.
pub const AREAS_MAX: usize = 256;

/// Reads all of a buffer from an offset of the disk.
pub type ReadAt<'a> = dyn Fn(&mut [u8], u64) -> Result<(), BaseError> + 'a;

/// What lies where on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The kind of partition table, if there is one.
    pub table: Option<&'static str>,
    /// Parts of the disk, in ascending order; they do not overlap and lie inside it. Without a partition table: the file
    /// system that the disk is, if it is one.
    pub areas: Vec<Area>,
}

/// A partition, or a disk that is none but has a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// First byte.
    pub offset: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// Number of the partition, from 1 on; `None`: the whole disk.
    pub number: Option<u32>,
    /// Its name in the partition table.
    pub name: Option<String>,
    /// What the partition table says that it is for.
    pub purpose: Option<String>,
    /// The file system that begins there.
    pub filesystem: Option<FileSystem>,
}

impl Area {
    /// A short name for people: the best of what is known.
    pub fn title(&self) -> String {
        let label = self.filesystem.as_ref().and_then(|fs| fs.label.as_ref());
        let named = label.or(self.name.as_ref()).or(self.purpose.as_ref());
        match (self.number, named) {
            (Some(number), Some(name)) => format!("{number}: {name}"),
            (Some(number), None) => format!("partition {number}"),
            (None, Some(name)) => name.clone(),
            (None, None) => "the disk".into(),
        }
    }

    /// The kind of its file system, or what it is for.
    pub fn kind(&self) -> Option<&str> {
        self.filesystem.as_ref().map(|fs| fs.kind).or(self.purpose.as_deref())
    }
}

/// A disk, as far as it can be read.
struct Disk<'a> {
    size: u64,
    read: &'a ReadAt<'a>,
}

impl Disk<'_> {
    /// `len` bytes at `offset`; fewer where the disk ends.
    fn bytes(&self, offset: u64, len: usize) -> Result<Vec<u8>, BaseError> {
        let inside = self.size.saturating_sub(offset).min(len as u64) as usize;
        let mut bytes = vec![0; inside];
        if inside > 0 {
            (self.read)(&mut bytes, offset)?;
        }
        Ok(bytes)
    }
}

/// Looks at a disk of `size` bytes.
///
/// # Errors
/// If it can't be read.
pub fn look(size: u64, read: &ReadAt<'_>) -> Result<Layout, BaseError> {
    let disk = Disk { size, read };
    let whole = filesystem::find(&disk, 0, size)?;
    let (table, areas) = match gpt::read(&disk)? {
        Some(areas) => (Some("GPT"), areas),
        // Their boot sectors look like an MBR.
        None if whole.as_ref().is_some_and(FileSystem::begins_with_a_boot_sector) => (None, Vec::new()),
        None => match mbr::read(&disk)? {
            Some(areas) => (Some("MBR"), areas),
            None => (None, Vec::new()),
        },
    };
    if table.is_none() {
        let area = Area { offset: 0, len: size, number: None, name: None, purpose: None, filesystem: whole };
        let areas = if size > 0 && area.filesystem.is_some() { vec![area] } else { Vec::new() };
        return Ok(Layout { table, areas });
    }
    let mut areas = in_order(areas, size);
    for area in &mut areas {
        area.filesystem = filesystem::find(&disk, area.offset, area.len)?;
    }
    Ok(Layout { table, areas })
}

/// Those that lie inside the disk and do not overlap one before them.
fn in_order(mut areas: Vec<Area>, size: u64) -> Vec<Area> {
    areas.retain(|area| area.len > 0 && area.offset.checked_add(area.len).is_some_and(|end| end <= size));
    areas.sort_by_key(|area| area.offset);
    let mut end = 0;
    areas.retain(|area| {
        let fits = area.offset >= end;
        if fits {
            end = area.offset + area.len;
        }
        fits
    });
    areas.truncate(AREAS_MAX);
    areas
}

/// Text that somebody wrote into a table: up to the first NUL, without what a terminal would obey.
fn clean(text: impl Iterator<Item = char>) -> Option<String> {
    let text: String =
        text.take_while(|c| *c != '\0').filter(|c| !c.is_control() && !is_format(*c)).collect();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Characters that change how those beside them are shown: marks and overrides of direction.
fn is_format(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    array(bytes, at).map_or(0, u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    array(bytes, at).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    array(bytes, at).map_or(0, u64::from_le_bytes)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests;
