//! Intents: which 64 MiB regions of the disk may have been written to since it was last pristine.
//!
//! They are the only thing that is made durable while a session runs, so they are what speaks for
//! the disk after a power cut. The file has a fixed size: 512-byte sectors, each 508 bytes of bits
//! (bit `n % 8` of byte `n / 8` is region `n` of that sector) and a little-endian CRC32C of them. A
//! sector with a wrong CRC counts as all ones.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};
use rustix::fs::OFlags;

use crate::Error;
use crate::storage::Storage;

/// Size of a region in bytes.
pub const REGION_SIZE: u64 = 64 << 20;
const REGION_BLOCKS: u64 = REGION_SIZE / BLOCK_SIZE;
const SECTOR: usize = 512;
const SECTOR_BITS: u64 = (SECTOR as u64 - 4) * 8;

/// Whoever builds with that feature is told so.
#[cfg(feature = "test-no-intents")]
const _: () = {
    #[deprecated(note = "this build LEAKS the data of sessions in a power cut; it is for one test only")]
    const TEST_NO_INTENTS: () = ();
    TEST_NO_INTENTS
};

/// The intents of an open disk.
#[derive(Debug)]
pub(crate) struct Intents {
    /// Regions whose bit is durable.
    durable: BlockSet,
    file: Mutex<fs::File>,
    path: PathBuf,
    storage: Storage,
}

fn region_count(geometry: Geometry) -> u64 {
    geometry.size().div_ceil(REGION_SIZE)
}

fn regions_of(blocks: Extent) -> Extent {
    Extent::between(blocks.first() / REGION_BLOCKS, blocks.end().div_ceil(REGION_BLOCKS))
}

/// The bytes of sector `index` of the file for these regions.
fn encode_sector(bits: &[u8], index: usize) -> [u8; SECTOR] {
    let mut sector = [0u8; SECTOR];
    let (body, checksum) = sector.split_at_mut(SECTOR - 4);
    let part = bits.chunks(SECTOR - 4).nth(index).unwrap_or_default();
    body.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
    checksum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    sector
}

/// The bytes of the file for these regions.
fn encode(regions: &BlockSet) -> Vec<u8> {
    let bits = regions.to_bytes();
    (0..regions.bound().div_ceil(SECTOR_BITS))
        .flat_map(|index| encode_sector(&bits, index as usize))
        .collect()
}

/// The bytes of the file, as far as they count.
fn read(storage: &Storage, path: &Path, geometry: Geometry) -> io::Result<Vec<u8>> {
    let len = region_count(geometry).div_ceil(SECTOR_BITS) * SECTOR as u64;
    storage.read(path, len)
}

/// The regions in the bytes of a file; a bad, short or missing sector has all of its regions.
fn decode(bytes: &[u8], regions: u64) -> BlockSet {
    let set = BlockSet::new(regions);
    for index in 0..regions.div_ceil(SECTOR_BITS) {
        let first = index * SECTOR_BITS;
        let sector = bytes.chunks_exact(SECTOR).nth(index as usize);
        match sector.and_then(|sector| sector.split_last_chunk::<4>()) {
            Some((body, checksum)) if crc32c::crc32c(body) == u32::from_le_bytes(*checksum) => {
                set.insert_bytes(first, body);
            }
            _ => {
                set.insert(Extent::new(first, SECTOR_BITS));
            }
        }
    }
    set
}

impl Intents {
    /// Makes the file, durably, in the place of one that may be there: with no region set, or with
    /// all of them, where an older manifest may still be about the disk.
    pub(crate) fn create(
        storage: &Storage,
        path: &Path,
        geometry: Geometry,
        all_regions: bool,
    ) -> Result<(), Error> {
        let regions = BlockSet::new(region_count(geometry));
        if all_regions {
            regions.insert(Extent::new(0, regions.bound()));
        }
        storage.replace(path, &encode(&regions)).map_err(|error| Error::state("create", path, error))?;
        path.parent().map_or(Ok(()), |dir| storage.sync_dir(dir))
    }

    /// Opens the file for serving; every write to it is durable when it returns.
    pub(crate) fn open(storage: &Storage, path: &Path, geometry: Geometry) -> Result<Self, Error> {
        let bytes = read(storage, path, geometry).map_err(|error| Error::state("read", path, error))?;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DSYNC.bits() as i32)
            .open(path)
            .map_err(|error| Error::state("open", path, error))?;
        let durable = decode(&bytes, region_count(geometry));
        if !durable.is_empty() {
            // They were read, but may be in the page cache only: a server was killed while it wrote them, or
            // its write failed. Written once more they are durable, also where a sync would find nothing to do.
            storage
                .write_durably(&file, path, &encode(&durable), 0)
                .map_err(|error| Error::state("write", path, error))?;
        }
        Ok(Self { durable, file: Mutex::new(file), path: path.to_owned(), storage: storage.clone() })
    }

    /// The blocks of all regions of the file at `path`; a missing file has all of them.
    pub(crate) fn read_blocks(storage: &Storage, path: &Path, geometry: Geometry) -> Result<BlockSet, Error> {
        let bytes = match read(storage, path, geometry) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            result => result.map_err(|error| Error::state("read", path, error))?,
        };
        let blocks = BlockSet::new(geometry.blocks());
        for run in decode(&bytes, region_count(geometry)).runs() {
            blocks.insert(Extent::between(run.first() * REGION_BLOCKS, run.end() * REGION_BLOCKS));
        }
        Ok(blocks)
    }

    /// Whether the regions of `blocks` are durable.
    pub(crate) fn covers(&self, blocks: Extent) -> bool {
        cfg!(feature = "test-no-intents") || self.durable.contains_all(regions_of(blocks))
    }

    /// Returns when the regions of `blocks` are durable: at once, but for a region's first time.
    pub(crate) fn ensure(&self, blocks: Extent) -> Result<(), Error> {
        self.ensure_all(&[blocks])
    }

    /// The same for all of `extents`, with one write for each sector of the file that changes.
    pub(crate) fn ensure_all(&self, extents: &[Extent]) -> Result<(), Error> {
        if extents.iter().all(|blocks| self.covers(*blocks)) {
            return Ok(());
        }
        let file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let missing = BlockSet::new(self.durable.bound());
        // What another one has noted meanwhile is not written again.
        for blocks in extents.iter().filter(|blocks| !self.covers(**blocks)) {
            missing.insert(regions_of(*blocks));
        }
        let wanted = BlockSet::new(self.durable.bound());
        wanted.insert_set(&self.durable);
        wanted.insert_set(&missing);
        self.write(&file, &wanted, &missing)?;
        self.durable.insert_set(&missing);
        Ok(())
    }

    /// Forgets all regions. Only when the disk is pristine and synced, and nothing writes.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.durable.is_empty() {
            return Ok(());
        }
        let all = BlockSet::new(self.durable.bound());
        all.insert(Extent::new(0, all.bound()));
        // What is forgotten here must not be taken for durable by a writer that comes meanwhile.
        self.durable.clear();
        self.write(&file, &BlockSet::new(self.durable.bound()), &all)
    }

    /// Writes the sectors that have any of the regions in `changed`.
    fn write(&self, file: &fs::File, set: &BlockSet, changed: &BlockSet) -> Result<(), Error> {
        let bytes = set.to_bytes();
        for index in 0..set.bound().div_ceil(SECTOR_BITS) {
            let first = index * SECTOR_BITS;
            if !changed.intersects(Extent::new(first, SECTOR_BITS)) {
                continue;
            }
            let sector = encode_sector(&bytes, index as usize);
            self.storage
                .write_durably(file, &self.path, &sector, index * SECTOR as u64)
                .map_err(|error| Error::state("write", &self.path, error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
impl Intents {
    /// Calls `wait` while no region can be noted.
    pub(crate) fn hold(&self, wait: impl FnOnce()) {
        let _file = self.file.lock().unwrap();
        wait();
    }

    /// Makes every write to the file fail, or work again.
    pub(crate) fn set_broken(&self, broken: bool) {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(!broken);
        *self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
            options.open(&self.path).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Geometry {
        Geometry::new(5000 * REGION_SIZE).unwrap()
    }

    /// All of them are noted, those that are far from each other too, and what was noted stays.
    #[test]
    fn regions_ensured_together_are_all_noted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("intents");
        let disk = Geometry::new(13000 * REGION_SIZE).unwrap();
        Intents::create(&Storage::default(), &path, disk, false).unwrap();
        let intents = Intents::open(&Storage::default(), &path, disk).unwrap();
        let block_of = |region: u64| Extent::new(region * REGION_BLOCKS, 1);
        intents.ensure(block_of(12999)).unwrap();
        intents.ensure_all(&[1, 4063, 3, 12999].map(block_of)).unwrap();
        let noted = |path: &Path| {
            let blocks = Intents::read_blocks(&Storage::default(), path, disk).unwrap();
            blocks.runs().map(|run| (run.first() / REGION_BLOCKS, run.count() / REGION_BLOCKS)).collect()
        };
        let all: Vec<(u64, u64)> = noted(&path);
        assert_eq!(all, [(1, 1), (3, 1), (4063, 1), (12999, 1)]);
        assert!([1, 3, 4063, 12999].map(block_of).iter().all(|blocks| intents.covers(*blocks)));
        assert!(
            !intents.covers(block_of(2)) && !intents.covers(Extent::new(REGION_BLOCKS, REGION_BLOCKS + 1))
        );
    }

    #[test]
    fn ensured_regions_are_read_again_and_cleared_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("intents");
        Intents::create(&Storage::default(), &path, disk(), false).unwrap();
        assert!(Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().is_empty());
        let intents = Intents::open(&Storage::default(), &path, disk()).unwrap();
        intents.ensure(Extent::new(5, 1)).unwrap();
        intents.ensure(Extent::new(4100 * REGION_BLOCKS - 1, 2)).unwrap();
        let blocks = Intents::read_blocks(&Storage::default(), &path, disk()).unwrap();
        assert_eq!(
            blocks.runs().collect::<Vec<_>>(),
            [Extent::new(0, REGION_BLOCKS), Extent::new(4099 * REGION_BLOCKS, 2 * REGION_BLOCKS)]
        );
        intents.clear().unwrap();
        assert!(Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().is_empty());
        intents.ensure(Extent::new(5, 1)).unwrap();
        assert_eq!(Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().count(), REGION_BLOCKS);
    }

    /// Invariant 6: a region whose bit could not be written is not taken for durable.
    #[test]
    fn region_that_could_not_be_written_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("intents");
        Intents::create(&Storage::default(), &path, disk(), false).unwrap();
        let intents = Intents::open(&Storage::default(), &path, disk()).unwrap();
        intents.set_broken(true);
        for _ in 0..2 {
            intents.ensure(Extent::new(5, 1)).unwrap_err();
        }
        assert!(Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().is_empty());
        intents.set_broken(false);
        intents.ensure(Extent::new(5, 1)).unwrap();
        assert_eq!(Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().count(), REGION_BLOCKS);
    }

    /// Invariant 6: what can't be read counts as written to.
    #[test]
    fn damaged_sector_counts_as_all_regions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("intents");
        Intents::create(&Storage::default(), &path, disk(), false).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[17] ^= 4;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(
            Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().count(),
            SECTOR_BITS * REGION_BLOCKS
        );
        fs::write(&path, &bytes[..600]).unwrap();
        assert_eq!(
            Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().count(),
            disk().blocks()
        );
        fs::remove_file(&path).unwrap();
        assert_eq!(
            Intents::read_blocks(&Storage::default(), &path, disk()).unwrap().count(),
            disk().blocks()
        );
    }
}
