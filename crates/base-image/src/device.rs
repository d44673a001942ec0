//! What the kernel knows a block device by. Names such as `/dev/sdb` and `/dev/dm-3` are given anew at each boot.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use blockio::File;
use rustix::fs::{fstat, major, minor};

/// Where sysfs says who a device is, the best first: what made a mapping (LVM: the UUID of the volume), what a disk says of itself,
/// what a loop device is made of.
const NAMES: [&str; 6] = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "loop/backing_file"];

/// Whether the file at `path`, links followed, is a block device.
pub(crate) fn is_at(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.file_type().is_block_device())
}

/// The device that is open as `file`, as such a line; `None` if the kernel knows nothing of it but numbers.
pub fn name_of(file: &File) -> Option<String> {
    let number = fstat(file).ok()?.st_rdev;
    let dir = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    let dir = fs::canonicalize(dir).ok()?;
    if let Some(name) = name_in(&dir) {
        return Some(name);
    }
    // A partition lies in its disk's directory.
    let partition = fs::read_to_string(dir.join("partition")).ok()?;
    Some(format!("{} partition {}", name_in(dir.parent()?)?, partition.trim()))
}

fn name_in(dir: &Path) -> Option<String> {
    let read = |name: &str| {
        let text = fs::read_to_string(dir.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let (name, text) = NAMES.iter().find_map(|name| Some((name, read(name)?)))?;
    // A loop device may have a part of its file.
    let offset =
        read("loop/offset").filter(|offset| offset != "0").map(|offset| format!(" from {offset} on"));
    Some(format!("{name} {text}{}", offset.unwrap_or_default()))
}
