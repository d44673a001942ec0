//! Sparse images in memory, and what a session may read of one.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockio::{File, GuestBuf, OpenOptions};
use blocks::{BLOCK_SIZE, Geometry};
use session_disk::{DiskQueue, Request, SessionDisk};

use super::{run, try_write};

/// The contents of a disk: blocks that are not in the map are zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) size: u64,
    pub(crate) blocks: BTreeMap<u64, Vec<u8>>,
}

impl Image {
    /// An image of `size` bytes with data in two of three blocks of each window, marked with their numbers.
    pub(crate) fn patterned(size: u64, windows: &[std::ops::Range<u64>]) -> Self {
        Self::of_generation(0, size, windows)
    }

    /// The same, but in every second block: other data, none, or data where none was. Which blocks these are, and what
    /// is in them, depends on the generation's number; 0 has none.
    pub(crate) fn of_generation(number: u64, size: u64, windows: &[std::ops::Range<u64>]) -> Self {
        let mut image = Self { size, ..Self::default() };
        for block in windows.iter().flat_map(Clone::clone).filter(|block| block * BLOCK_SIZE < size) {
            let salt = if (block + number).is_multiple_of(2) { number } else { 0 };
            if (block + salt) % 3 != 1 {
                // Every sector is another, and none is what a guest writes: those have their top bit set.
                let sector = |n: u64| (((block * 13 + n * 5 + salt * 7) % 120) + 1) as u8;
                let mut bytes: Vec<u8> = (0..8).flat_map(|n| [sector(n); 512]).collect();
                bytes.truncate((size - block * BLOCK_SIZE).min(BLOCK_SIZE) as usize);
                bytes.resize(BLOCK_SIZE as usize, 0);
                image.blocks.insert(block, bytes);
            }
        }
        image
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(self.size).unwrap()
    }

    fn block_len(&self, block: u64) -> usize {
        (self.size - block * BLOCK_SIZE).min(BLOCK_SIZE) as usize
    }

    pub(crate) fn sector(&self, sector: u64) -> [u8; 512] {
        let at = (sector % 8) as usize * 512;
        let bytes = self.blocks.get(&(sector / 8)).map(|block| &block[at..at + 512]);
        bytes.map_or([0; 512], |bytes| bytes.try_into().unwrap())
    }

    /// Writes the image into a file, which becomes as long as it; zero blocks become holes.
    pub(crate) fn write_into(&self, file: &std::fs::File) {
        file.set_len(0).unwrap();
        file.set_len(self.size).unwrap();
        for (block, bytes) in self.blocks.iter().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
            file.write_all_at(&bytes[..self.block_len(*block)], block * BLOCK_SIZE).unwrap();
        }
    }

    /// Blocks of the file at `path` that are not as in the image.
    pub(crate) fn differences(&self, path: &Path) -> Vec<u64> {
        let file = File::open(path, OpenOptions::default()).unwrap();
        assert_eq!(file.size().unwrap(), self.size, "{}", path.display());
        let mut of_file: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut at = 0;
        while let Some(data) = file.next_data(at).unwrap() {
            for block in data.start / BLOCK_SIZE..data.end.div_ceil(BLOCK_SIZE) {
                let mut bytes = vec![0; BLOCK_SIZE as usize];
                let len = self.block_len(block);
                file.read_exact_at(&mut bytes[..len], block * BLOCK_SIZE).unwrap();
                of_file.insert(block, bytes);
            }
            at = data.end;
        }
        let zero = vec![0; BLOCK_SIZE as usize];
        let mut blocks: Vec<u64> = self.blocks.keys().chain(of_file.keys()).copied().collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.retain(|b| self.blocks.get(b).unwrap_or(&zero) != of_file.get(b).unwrap_or(&zero));
        blocks
    }
}

/// What a session may read: the base, and over it what it wrote. A write that failed may have changed
/// each of its sectors or not.
#[derive(Clone, Debug)]
pub(crate) struct Expected<'a> {
    base: &'a Image,
    written: HashMap<u64, Vec<[u8; 512]>>,
    /// All that was noted, in order: first sector, bytes, whether it is certain.
    pub(crate) history: Vec<(u64, Vec<u8>, bool)>,
    /// Whether a write failed: then it is not certain any more which blocks the session owns.
    pub(crate) has_failures: bool,
}

impl<'a> Expected<'a> {
    pub(crate) fn of_base(base: &'a Image) -> Self {
        Self { base, written: HashMap::new(), history: Vec::new(), has_failures: false }
    }

    /// The sectors from `first` on were given these bytes, or it was tried.
    pub(crate) fn note(&mut self, first: u64, bytes: &[u8], done: bool) {
        self.has_failures |= !done;
        self.history.push((first, bytes.to_vec(), done));
        for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
            let before = self.base.sector(sector);
            let allowed = self.written.entry(sector).or_insert_with(|| vec![before]);
            if done {
                allowed.clear();
            }
            allowed.push(bytes.try_into().unwrap());
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.base.size
    }

    /// Whether a sector of the block was written, or it was tried.
    pub(crate) fn may_be_written(&self, block: u64) -> bool {
        (block * 8..block * 8 + 8).any(|sector| self.written.contains_key(&sector))
    }

    /// Checks what a block of the file at `path` holds.
    pub(crate) fn check_disk(&self, path: &Path, block: u64) {
        let offset = block * BLOCK_SIZE;
        let mut bytes = vec![0; (self.base.size - offset).min(BLOCK_SIZE) as usize];
        std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        self.check(block * 8, &bytes);
    }

    /// Checks bytes that were read from sector `first` on.
    pub(crate) fn check(&self, first: u64, bytes: &[u8]) {
        for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
            let good = match self.written.get(&sector) {
                Some(allowed) => allowed.iter().any(|allowed| allowed == bytes),
                None => self.base.sector(sector) == bytes,
            };
            assert!(good, "sector {sector} (block {}) reads {}", sector / 8, bytes[0]);
        }
    }

    pub(crate) fn write(&mut self, disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, bytes: &[u8]) {
        let result = try_write(disk, queue, sector, bytes);
        self.note(sector, bytes, result.is_ok());
    }

    pub(crate) fn zero(&mut self, disk: &SessionDisk, queue: &mut DiskQueue, sector: u64, len: usize) {
        let range = disk.geometry().sectors_at(sector, len as u64).unwrap();
        let result = run(queue, Request::WriteZeroes { range, may_unmap: true, durable: false });
        self.note(sector, &vec![0; len], result.is_ok());
    }

    /// Discards: blocks that the session owns become zero, others stay.
    pub(crate) fn discard(
        &mut self,
        disk: &SessionDisk,
        queue: &mut DiskQueue,
        sector: u64,
        len: usize,
        owned: impl Fn(u64) -> bool,
    ) {
        let range = disk.geometry().sectors_at(sector, len as u64).unwrap();
        let done = run(queue, Request::Discard { range }).is_ok() && !self.has_failures;
        let covered = disk.geometry().covered(range);
        for block in (covered.first()..covered.end()).filter(|block| owned(*block)) {
            let len = (self.base.size - block * BLOCK_SIZE).min(BLOCK_SIZE);
            self.note(block * 8, &vec![0; len as usize], done);
        }
    }

    /// Reads the window of blocks and checks it; a read may fail, but not return what was never there.
    pub(crate) fn read(
        &self,
        disk: &SessionDisk,
        queue: &mut DiskQueue,
        blocks: std::ops::Range<u64>,
    ) -> bool {
        let offset = blocks.start * BLOCK_SIZE;
        let len = (blocks.end * BLOCK_SIZE).min(self.base.size) - offset;
        let range = disk.geometry().sectors_at(offset / 512, len).unwrap();
        let buf = GuestBuf::zeroed(len as usize);
        if run(queue, Request::Read { range, buf: buf.clone() }).is_err() {
            return false;
        }
        let mut bytes = vec![0; len as usize];
        buf.copy_out(0, &mut bytes);
        self.check(offset / 512, &bytes);
        true
    }
}
