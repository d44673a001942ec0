//! What a read of cached data costs: from a map of the file, and by system call.
//!
//! ```sh
//! cargo bench -p blockio --bench resident                # on the build's file system and on tmpfs
//! RESIDENT_MIB=4096 cargo bench -p blockio --bench resident -- /srv/disks
//! ```
//!
//! Makes a file of 1 GiB (dense, in the page cache) in each directory, and prints a Markdown table for
//! each: 4 KiB at random offsets, and 128 KiB in sequence, into 128 (8) buffers in turn. All ways take
//! turns within each of seven rounds; medians of the rounds, and the range. Alone on one thread: pin
//! it and keep the machine quiet. Not the cost of a request: rings and signalling come on top.

use std::{
    hint::black_box,
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    time::Instant,
};

use blockio::{AlignedBuf, File, IoVec, OpenOptions, ResidentMap};
use rustix::mm::{MapFlags, ProtFlags};

const ROUNDS: usize = 7;
const SMALL: usize = 4096;
const LARGE: usize = 128 << 10;
const SMALL_READS: usize = 1 << 17;
const LARGE_READS: usize = 1 << 12;
/// Memory that is read into: as much as 128 requests of a guest.
const BUFFERS: usize = 1 << 20;

struct Disk {
    file: File,
    map: ResidentMap,
    raw: *const u8,
    bytes: u64,
    buffers: AlignedBuf,
    random: Vec<u64>,
}

impl Disk {
    fn make(dir: &Path, bytes: u64) -> io::Result<Option<Self>> {
        let path = dir.join(format!("resident-bench-{}", std::process::id()));
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = File::create_new(&path, bytes, options).map_err(io::Error::other)?;
        std::fs::remove_file(&path)?;
        let mut block = AlignedBuf::new_zeroed(1 << 20);
        for (index, byte) in block.iter_mut().enumerate() {
            *byte = (index * 7 + index / 4096) as u8;
        }
        for offset in (0..bytes).step_by(1 << 20) {
            file.write_all_at(&block, offset).map_err(io::Error::other)?;
        }
        file.sync_all().map_err(io::Error::other)?;
        let Some(map) = ResidentMap::new(&file, None)? else { return Ok(None) };
        // SAFETY: a new mapping, never unmapped.
        let raw = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                ProtFlags::READ,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let random = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % (bytes / SMALL as u64) * SMALL as u64
        });
        let random = random.take(SMALL_READS + 8).collect();
        let mut buffers = AlignedBuf::new_zeroed(BUFFERS);
        buffers.fill(1);
        Ok(Some(Self { file, map, raw: raw.cast(), bytes, buffers, random }))
    }

    fn part(&self, index: usize, len: usize) -> IoVec {
        let slot = index % (BUFFERS / len) * len;
        IoVec { base: self.buffers.as_ptr().wrapping_add(slot).cast_mut(), len }
    }

    fn mapped(&self, offset: u64, part: IoVec) -> bool {
        // SAFETY: the part lies in the buffers, which are used through such parts only.
        unsafe { self.map.read(offset, &[part]) }
    }

    fn called(&self, offset: u64, part: IoVec, flags: i32) {
        let fd = self.file.as_fd().as_raw_fd();
        let piece = (&raw const part).cast::<libc::iovec>();
        // SAFETY: laid out as an `iovec`; the part lies in the buffers.
        let read = unsafe { libc::preadv2(fd, piece, 1, offset as libc::off_t, flags) };
        // tmpfs knows no RWF_NOWAIT.
        black_box(read);
    }

    fn copied(&self, offset: u64, part: IoVec) {
        // SAFETY: within the mapping, which is as large as the file, and the buffers.
        unsafe { std::ptr::copy_nonoverlapping(self.raw.wrapping_add(offset as usize), part.base, part.len) };
    }

    fn asked(&self, offset: u64) {
        let mut answer = [0u8; 1];
        let page = self.raw.wrapping_add(offset as usize).cast_mut().cast();
        // SAFETY: the page is mapped; there is room for a byte.
        black_box(unsafe { libc::mincore(page, SMALL, answer.as_mut_ptr()) });
    }

    fn has_nowait(&self) -> bool {
        self.file.supports_nowait()
    }
}

type Way<'a> = (&'static str, Box<dyn Fn(u64, u64, IoVec) + 'a>);

fn ways(disk: &Disk) -> Vec<Way<'_>> {
    let mut ways: Vec<Way> = vec![
        ("preadv", Box::new(|offset, _, part| disk.called(offset, part, 0))),
        ("copy alone (limit)", Box::new(|offset, _, part| disk.copied(offset, part))),
        (
            "copy alone, next one prefetched",
            Box::new(|offset, next, part| {
                disk.map.prefetch(next);
                disk.copied(offset, part);
            }),
        ),
        (
            "mincore, copy",
            Box::new(|offset, _, part| {
                disk.asked(offset);
                disk.copied(offset, part);
            }),
        ),
        ("map", Box::new(|offset, _, part| assert!(disk.mapped(offset, part)))),
        (
            "map, next one prefetched",
            Box::new(|offset, next, part| {
                disk.map.prefetch(next);
                assert!(disk.mapped(offset, part));
            }),
        ),
    ];
    if disk.has_nowait() {
        ways.insert(
            1,
            ("preadv2(RWF_NOWAIT)", Box::new(|offset, _, part| disk.called(offset, part, libc::RWF_NOWAIT))),
        );
    }
    ways
}

/// Nanoseconds for each read.
fn time(disk: &Disk, large: bool, way: &Way) -> f64 {
    let begin = Instant::now();
    if large {
        for index in 0..LARGE_READS {
            let at = |index: usize| (index * LARGE) as u64 % disk.bytes;
            way.1(at(index), at(index + 1), disk.part(index, LARGE));
        }
        return begin.elapsed().as_nanos() as f64 / LARGE_READS as f64;
    }
    for (index, window) in disk.random.windows(3).take(SMALL_READS).enumerate() {
        if let [offset, _, next] = window {
            way.1(*offset, *next, disk.part(index, SMALL));
        }
    }
    begin.elapsed().as_nanos() as f64 / SMALL_READS as f64
}

fn median(figures: &mut [f64]) -> (f64, f64, f64) {
    figures.sort_by(f64::total_cmp);
    let at = |index: usize| figures.get(index).copied().unwrap_or_default();
    (at(figures.len() / 2), at(0), at(figures.len().saturating_sub(1)))
}

fn table(disk: &Disk, large: bool) {
    let ways = ways(disk);
    let mut figures = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (way, figures) in ways.iter().zip(&mut figures) {
            figures.push(time(disk, large, way));
        }
    }
    let what = if large { "128 KiB in sequence" } else { "4 KiB at random" };
    println!("\n| {what} | ns | range | thousand a second | GB/s |\n| --- | --- | --- | --- | --- |");
    for (way, figures) in ways.iter().zip(&mut figures) {
        let (middle, least, most) = median(figures);
        let bytes = if large { LARGE } else { SMALL } as f64;
        println!(
            "| {} | {middle:.0} | {least:.0} to {most:.0} | {:.0} | {:.1} |",
            way.0,
            1e6 / middle,
            bytes / middle
        );
    }
}

/// Nanoseconds for each first read of a page after the map gave its memory back.
fn after_forget(disk: &Disk) {
    let way: Way = ("map", Box::new(|offset, _, part| assert!(disk.mapped(offset, part))));
    let mut figures: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            disk.map.forget();
            time(disk, false, &way)
        })
        .collect();
    let (middle, least, most) = median(&mut figures);
    println!(
        "\n{SMALL_READS} reads after `forget`, 4 KiB at random: {middle:.0} ns ({least:.0} to {most:.0}) each."
    );
}

fn main() -> io::Result<()> {
    let given: Vec<PathBuf> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).map(PathBuf::from).collect();
    let places = if given.is_empty() {
        vec![PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from("/dev/shm")]
    } else {
        given
    };
    let mib: u64 = std::env::var("RESIDENT_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(1024);
    for dir in places {
        println!("\n## {}, {mib} MiB", dir.display());
        match Disk::make(&dir, mib << 20)? {
            Some(disk) => {
                table(&disk, false);
                after_forget(&disk);
                table(&disk, true);
            }
            None => println!("\nHas no map."),
        }
    }
    Ok(())
}
