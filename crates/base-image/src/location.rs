//! Where a base is: a file or device of this host, or an export of an NBD server.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::device;
use crate::nbd::NbdUri;

/// Where a base is. Written as a path or as a URI; a path is never taken for a URI once it is
/// [resolved](Self::resolved), for then it begins with a slash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PathBuf", into = "PathBuf")]
pub enum BaseLocation {
    /// A regular file or a block device.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdUri),
}

impl BaseLocation {
    /// The same place, however the current directory and links to files change. A link to a block device stays as it is:
    /// such links (`/dev/disk/by-id`, `/dev/VOLUMEGROUP`) are what devices are known by, and what they lead to has another name after
    /// the next boot.
    ///
    /// # Errors
    /// If there is no such file, or its name can't be written down: it is no UTF-8. No server is asked.
    pub fn resolved(&self) -> io::Result<Self> {
        match self {
            Self::File(path) => {
                let file = std::fs::canonicalize(path)?;
                let place = if device::is_at(&file)? { std::path::absolute(path)? } else { file };
                match place.to_str() {
                    Some(_) => Ok(Self::File(place)),
                    None => {
                        Err(io::Error::new(io::ErrorKind::InvalidInput, "its name is no UTF-8, rename it"))
                    }
                }
            }
            Self::Nbd(_) => Ok(self.clone()),
        }
    }

    /// As it is written in messages.
    pub fn display(&self) -> impl fmt::Display {
        self.as_path().display()
    }

    /// The path, or the URI's text in the place of one: for messages.
    pub fn as_path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Nbd(uri) => Path::new(uri.as_str()),
        }
    }
}

impl From<&Path> for BaseLocation {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

impl From<BaseLocation> for PathBuf {
    fn from(location: BaseLocation) -> Self {
        location.as_path().to_owned()
    }
}

impl TryFrom<PathBuf> for BaseLocation {
    type Error = String;

    /// What begins as an NBD URI is one; everything else is a path.
    fn try_from(path: PathBuf) -> Result<Self, String> {
        match path.to_str().filter(|text| NbdUri::is_meant(text)) {
            Some(text) => Ok(Self::Nbd(text.parse()?)),
            None => Ok(Self::File(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn location_written_and_read_is_the_same_and_a_path_stays_a_path() {
        for text in ["/images/golden.raw", "/images/nbd://odd", "nbd://store:10810/golden"] {
            let location = BaseLocation::try_from(PathBuf::from(text)).unwrap();
            assert_eq!(matches!(location, BaseLocation::Nbd(_)), text.starts_with("nbd"), "{text}");
            let written = serde_json::to_string(&location).unwrap();
            assert_eq!(written, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<BaseLocation>(&written).unwrap(), location);
        }
        assert!(serde_json::from_str::<BaseLocation>("\"nbd+unix:///x\"").is_err());
    }
}
