//! Images made by `qemu-img`, and what they should read as.
#![allow(dead_code, reason = "each test uses its part")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use base_image::{BaseError, BaseFormat, BaseImage, Content, Trust};

pub(crate) struct Lab(pub(crate) tempfile::TempDir);

impl Lab {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.0.path()).unwrap().join(name)
    }

    /// Runs `qemu-img` in the directory.
    pub(crate) fn img(&self, args: &str) {
        run(Command::new("qemu-img").args(args.split(' ')).current_dir(self.0.path()));
    }

    /// Writes to an image with `qemu-io`.
    pub(crate) fn io(&self, name: &str, commands: &[&str]) {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "qcow2"]).arg(self.path(name));
        commands.iter().for_each(|command| {
            io.args(["-c", command]);
        });
        run(&mut io);
    }

    /// What an image should read as.
    pub(crate) fn converted(&self, name: &str) -> Vec<u8> {
        self.img(&format!("convert -O raw {name} {name}.expected"));
        fs::read(self.path(&format!("{name}.expected"))).unwrap()
    }

    pub(crate) fn open(&self, name: &str) -> Result<BaseImage, BaseError> {
        BaseImage::open(&self.path(name), Some(BaseFormat::Qcow2), Trust::Directories(&[]))
    }
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A sparse raw image of `size` bytes: blocks that compress well, blocks that do not, holes, zeroes that are stored.
pub(crate) fn mixed(path: &Path, size: u64, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut at = 0;
    while at < size {
        let len = ((next() % 50 + 1) * 4096).min(size - at);
        let mut bytes = vec![0; len as usize];
        match next() % 4 {
            0 => bytes.fill_with(|| next() as u8),
            1 => bytes.iter_mut().zip(at..).for_each(|(byte, n)| *byte = (n / 512) as u8),
            2 => {}
            _ => {
                at += len;
                continue;
            }
        }
        file.write_all_at(&bytes, at).unwrap();
        at += len;
    }
}

/// The error and its sources.
pub(crate) fn text(error: &BaseError) -> String {
    let (mut text, mut source) = (error.to_string(), std::error::Error::source(error));
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// Walks through all that is said of the contents, and asserts that it is true of `expected`. Returns how many bytes
/// are data.
pub(crate) fn check_content(base: &BaseImage, expected: &[u8]) -> u64 {
    let (mut at, mut data) = (0, 0);
    let size = base.size();
    while at < size {
        let len = match base.content_at(at, size - at).unwrap() {
            Content::Data(len) => {
                data += len;
                len
            }
            Content::Hole(len) => {
                assert!(at.is_multiple_of(4096), "a hole begins inside the block of byte {at}");
                let hole = &expected[at as usize..(at + len) as usize];
                assert!(hole.iter().all(|byte| *byte == 0), "data in the hole at {at}");
                len
            }
        };
        assert!(len > 0 && len <= size - at);
        at += len;
    }
    data
}
