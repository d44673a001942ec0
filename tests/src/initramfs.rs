//! The prepared guest (`ci/setup` makes it), and a cpio archive with one test's files on top.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::program::target_dir;

/// Where the kernel and the initramfs are; fails with a hint if they have not been made.
pub fn guest_dir() -> PathBuf {
    let dir = target_dir().join("guest/current");
    assert!(dir.join("vmlinuz").exists(), "{} has no guest: run ci/setup first", dir.display());
    dir
}

/// Writes the prepared initramfs with `files` (name, contents) added to `to`.
pub fn write_with(to: &Path, files: &[(&str, &str)]) -> io::Result<()> {
    let mut archive = fs::read(guest_dir().join("initramfs"))?;
    archive.resize(archive.len().next_multiple_of(512), 0);
    for (name, contents) in files {
        append(&mut archive, name, 0o100_755, contents.as_bytes());
    }
    append(&mut archive, "TRAILER!!!", 0, b"");
    fs::write(to, archive)
}

/// One member in the "newc" format: thirteen fields of eight hexadecimal digits, the name, the data,
/// both padded to 4 bytes.
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
