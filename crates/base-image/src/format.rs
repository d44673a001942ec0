//! Which format a base has: named by the operator, or by a file name that its first bytes bear out.
//!
//! A raw image is never taken for anything else because of its contents: whoever wrote to the disk could
//! have put a qcow2 header there that names any file of the host as its backing file. So the contents
//! alone decide nothing. They only confirm a name that says `.qcow2`, or are a reason to refuse.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a base's bytes lie in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseFormat {
    /// As they are: a raw file or a block device.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3, perhaps on other files.
    Qcow2,
}

impl BaseFormat {
    /// As `--base-format` and qcow2 headers name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// Whether this is [`BaseFormat::Raw`].
    pub fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

impl fmt::Display for BaseFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BaseFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(format!("unknown format {other}, expected raw or qcow2")),
        }
    }
}

/// Bytes of a file that [`decide`] wants to see.
pub(crate) const HEAD_LEN: usize = 512;

/// Formats that are known by how they begin: where, with what, and the names of their files.
const SIGNATURES: [(&str, usize, &[u8], &[&str]); 8] = [
    ("qcow2", 0, b"QFI\xfb", &["qcow2", "qcow"]),
    ("vmdk", 0, b"KDMV", &["vmdk"]),
    ("vmdk", 0, b"COWD", &["vmdk"]),
    ("vmdk", 0, b"# Disk DescriptorFile", &["vmdk"]),
    ("vhdx", 0, b"vhdxfile", &["vhdx"]),
    ("vpc", 0, b"conectix", &["vhd", "vpc"]),
    ("vdi", 64, b"\x7f\x10\xda\xbe", &["vdi"]),
    ("qed", 0, b"QED\0", &["qed"]),
];

/// The format of a file for which none was named, by its name and its first bytes.
///
/// # Errors
/// Why that can't be told, and what to write, if name and contents do not agree, or on a format that
/// can't be read.
pub(crate) fn decide(path: &Path, head: &[u8]) -> Result<BaseFormat, String> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let begins = SIGNATURES
        .iter()
        .find(|(_, at, bytes, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes)))
        .map(|(name, ..)| *name);
    let named =
        SIGNATURES.iter().find(|(.., names)| names.contains(&extension.as_str())).map(|(name, ..)| *name);
    match (begins, named) {
        (None, None) => Ok(BaseFormat::Raw),
        (Some("qcow2"), Some("qcow2")) => Ok(BaseFormat::Qcow2),
        (Some("qcow2"), _) => Err(
            "it begins as a qcow2 image does, which its name does not say; if it is one, say --base-format qcow2; if \
             it is a raw image, whose own contents begin so, say --base-format raw"
                .into(),
        ),
        (None, Some("qcow2")) => Err("its name says qcow2, but it does not begin as a qcow2 image does; if it is a \
                                      raw image, say --base-format raw"
            .into()),
        (Some(format), _) | (None, Some(format)) => Err(format!(
            "it looks like a {format} image, which can't be read; make another of it with `qemu-img convert -f {format} \
             -O qcow2`, or say --base-format raw if it is a raw image all the same"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QCOW2: &[u8] = b"QFI\xfb\0\0\0\x03";

    #[test]
    fn format_that_name_and_contents_agree_on_is_decided() {
        assert_eq!(decide(Path::new("/a/golden.qcow2"), QCOW2), Ok(BaseFormat::Qcow2));
        assert_eq!(decide(Path::new("/a/GOLDEN.QCOW2"), QCOW2), Ok(BaseFormat::Qcow2));
        for name in ["golden.raw", "golden.img", "golden", "/dev/vg/golden", "golden.qcow2.raw"] {
            assert_eq!(decide(Path::new(name), b"\xeb\x63\x90"), Ok(BaseFormat::Raw), "{name}");
        }
        assert_eq!(decide(Path::new("short"), b""), Ok(BaseFormat::Raw));
    }

    /// What a guest can write into a raw disk never makes it another format.
    #[test]
    fn raw_image_that_begins_as_qcow2_is_refused_and_never_taken_for_one() {
        for name in ["golden.raw", "golden.img", "golden", "/dev/vg/golden"] {
            let why = decide(Path::new(name), QCOW2).unwrap_err();
            assert!(why.contains("--base-format qcow2") && why.contains("--base-format raw"), "{why}");
        }
        assert!(decide(Path::new("golden.qcow2"), &[0; 512]).unwrap_err().contains("--base-format raw"));
    }

    #[test]
    fn formats_that_cannot_be_read_are_refused_with_a_way_out() {
        let mut vdi = [0; 512];
        vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
        for (head, name) in [(b"KDMV\x01".as_slice(), "vmdk"), (b"vhdxfile", "vhdx"), (&vdi, "vdi")] {
            let why = decide(Path::new("golden.img"), head).unwrap_err();
            assert!(why.contains(&format!("qemu-img convert -f {name}")), "{why}");
        }
        assert!(decide(Path::new("golden.vmdk"), &[0; 512]).unwrap_err().contains("vmdk"));
    }
}
