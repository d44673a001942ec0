//! Disk images: made, hashed and compared.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::program::{run, scratch_dir, scratch_root};
use crate::random;

/// Bytes in a block.
pub const BLOCK: u64 = 4096;

const CHUNK: usize = 1 << 20;

/// A file of `size` bytes whose contents come from `seed`; no holes.
pub fn dense(path: &Path, size: u64, seed: u64) {
    sparse(path, size, seed, &[(0, size)]);
}

/// As [`dense`], made by writes of `piece` bytes (at most 1 MiB).
pub fn dense_in(path: &Path, size: u64, seed: u64, piece: usize) {
    written(path, size, seed, &[(0, size)], piece);
}

/// A file of `size` bytes with data (from `seed`) in these ranges (offset, length) and holes elsewhere.
pub fn sparse(path: &Path, size: u64, seed: u64, ranges: &[(u64, u64)]) {
    written(path, size, seed, ranges, CHUNK);
}

fn written(path: &Path, size: u64, seed: u64, ranges: &[(u64, u64)], piece: usize) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut chunk = vec![0; piece];
    for &(offset, len) in ranges {
        let mut at = offset;
        while at < offset + len {
            let part = (offset + len - at).min(piece as u64) as usize;
            random::fill(seed, at, &mut chunk[..part]);
            file.write_all_at(&chunk[..part], at).unwrap();
            at += part as u64;
        }
    }
    file.sync_all().unwrap();
}

/// An image of `size` bytes with an ext4 file system that holds `files` (name, contents). No mount,
/// no root.
pub fn ext4(path: &Path, size: u64, files: &[(&str, &[u8])]) {
    let tree = scratch_dir(&scratch_root());
    for (name, contents) in files {
        fs::write(tree.path().join(name), contents).unwrap();
    }
    ext4_of(path, size, tree.path());
}

/// An image of `size` bytes with an ext4 file system that holds what the directory `tree` does.
pub fn ext4_of(path: &Path, size: u64, tree: &Path) {
    File::create(path).unwrap().set_len(size).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", path_with_sbin());
    run(mke2fs.args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"]).arg(tree).arg(path)).ok();
}

/// An image of `size` bytes, a hole, with a GPT of partitions: name, first byte and the one after the last (whole MiB), and
/// the label of the ext4 file system that it has; without one it is an EFI system partition.
pub fn gpt(path: &Path, size: u64, partitions: &[(&str, u64, u64, Option<&str>)]) {
    File::create(path).unwrap().set_len(size).unwrap();
    let table = path.with_extension("sfdisk");
    let lines = partitions.iter().map(|(name, begin, end, label)| {
        let kind = if label.is_some() { "L" } else { "U" };
        format!("start={}MiB, size={}MiB, type={kind}, name=\"{name}\"\n", begin >> 20, (end - begin) >> 20)
    });
    fs::write(&table, format!("label: gpt\n{}", lines.collect::<String>())).unwrap();
    let mut sfdisk = Command::new("sh");
    sfdisk.env("PATH", path_with_sbin()).args(["-c", "sfdisk -q \"$1\" <\"$2\"", "sh"]);
    run(sfdisk.arg(path).arg(&table)).ok();
    fs::remove_file(table).unwrap();
    for (_, begin, end, label) in partitions {
        let Some(label) = label else { continue };
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.env("PATH", path_with_sbin()).args(["-q", "-F", "-t", "ext4", "-L", label]);
        mke2fs.args(["-E", &format!("offset={begin},root_owner=0:0")]).arg(path);
        run(mke2fs.arg(format!("{}k", (end - begin) >> 10))).ok();
    }
}

/// A file in the ext4 file system that a raw image is, as `debugfs` reads it.
pub fn ext4_file(image: &Path, name: &str) -> String {
    let mut debugfs = Command::new("debugfs");
    debugfs.env("PATH", path_with_sbin()).args(["-R", &format!("cat {name}")]);
    run(debugfs.arg(image)).ok().stdout
}

/// Runs `qemu-img` in the directory `dir`.
pub fn qemu_img(dir: &Path, args: &[&str]) {
    run(Command::new("qemu-img").args(args).current_dir(dir)).ok();
}

/// `PATH` and the directories of the system's own tools, which a user's `PATH` may lack.
fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    let mut file = File::open(path).unwrap();
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk).unwrap() {
            0 => return hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            len => hasher.update(&chunk[..len]),
        }
    }
}

/// Bytes that the file system has allocated for a file.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// The numbers of the blocks in which the two files differ; they must be equally long.
pub fn differing_blocks(a: &Path, b: &Path) -> Vec<u64> {
    let size = fs::metadata(a).unwrap().len();
    assert_eq!(
        size,
        fs::metadata(b).unwrap().len(),
        "{} and {} are not equally long",
        a.display(),
        b.display()
    );
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut differing = Vec::new();
    let mut at = 0;
    while at < size {
        let part = (size - at).min(CHUNK as u64) as usize;
        a.read_exact_at(&mut left[..part], at).unwrap();
        b.read_exact_at(&mut right[..part], at).unwrap();
        if left[..part] != right[..part] {
            let blocks = left[..part].chunks(BLOCK as usize).zip(right[..part].chunks(BLOCK as usize));
            let first = at / BLOCK;
            differing.extend((first..).zip(blocks).filter(|(_, (x, y))| x != y).map(|(block, _)| block));
        }
        at += part as u64;
    }
    differing
}

/// Panics unless the two files are equal byte for byte.
#[track_caller]
pub fn assert_equal(disk: &Path, base: &Path) {
    let differing = differing_blocks(disk, base);
    let first = &differing[..differing.len().min(10)];
    assert!(
        differing.is_empty(),
        "{} blocks of the disk differ from the base, first {first:?}",
        differing.len()
    );
}
