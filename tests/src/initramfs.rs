//! The prepared guest (`ci/setup` makes it), and a cpio archive with one test's files on top.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::program::target_dir;

const FILE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;

/// Where the kernel and the initramfs are; fails with a hint if they have not been made.
pub fn guest_dir() -> PathBuf {
    let dir = target_dir().join("guest/current");
    assert!(dir.join("vmlinuz").exists(), "{} has no guest: run ci/setup first", dir.display());
    dir
}

/// Writes the prepared initramfs with `files` (name, contents) added to `to`.
pub fn write_with(to: &Path, files: &[(&str, &str)]) -> io::Result<()> {
    let mut archive = Archive::prepared()?;
    for (name, contents) in files {
        archive.add(name, contents.as_bytes());
    }
    archive.write(to)
}

/// The prepared initramfs, to which files can be added.
#[derive(Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
}

impl Archive {
    /// What `ci/setup` made.
    pub fn prepared() -> io::Result<Self> {
        let mut bytes = fs::read(guest_dir().join("initramfs"))?;
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(Self { bytes, directories: BTreeSet::new() })
    }

    /// Adds an executable file, and the directories that its name has.
    pub fn add(&mut self, name: &str, contents: &[u8]) {
        let name = name.trim_start_matches('/');
        for (end, _) in name.match_indices('/') {
            if self.directories.insert(name[..end].to_owned()) {
                self.append(&name[..end], DIRECTORY, b"");
            }
        }
        self.append(name, FILE, contents);
    }

    /// Writes the archive.
    pub fn write(mut self, to: &Path) -> io::Result<()> {
        self.append("TRAILER!!!", 0, b"");
        fs::write(to, self.bytes)
    }

    /// One member in the "newc" format: thirteen fields of eight hexadecimal digits, the name, the
    /// data, both padded to 4 bytes.
    fn append(&mut self, name: &str, mode: u32, contents: &[u8]) {
        let archive = &mut self.bytes;
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
}
