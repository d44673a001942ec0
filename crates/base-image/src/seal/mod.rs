//! The seal of a base: a manifest beside it with a hash of every chunk, by which what is read is proven.

mod format;
mod make;
mod next;
mod verified;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use blockio::{File, OpenOptions};
use serde::{Deserialize, Serialize};

use self::format::{HASH_LEN, HEADER_LEN, Hash, Header, hash};
use crate::delta::Generation;
use crate::error::BaseError;
use crate::format::BaseFormat;

pub use self::format::CHUNK_SIZE;
pub(crate) use self::format::GROUP_CHUNKS;
pub use self::make::{seal, seal_to};
pub(crate) use self::next::NextSeal;
pub(crate) use self::verified::Verified;

/// What two hosts compare to know that they serve the same disk: the same for equal contents, however stored.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Root(Hash);

impl Root {
    /// The hash that these are the bytes of.
    pub(crate) fn from_bytes(bytes: Hash) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub(crate) fn as_bytes(&self) -> &Hash {
        &self.0
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Root> for String {
    fn from(root: Root) -> Self {
        root.to_string()
    }
}

impl TryFrom<String> for Root {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        blake3::Hash::from_hex(&text).map(|hash| Self(*hash.as_bytes())).map_err(|error| error.to_string())
    }
}

/// An open manifest. All that is said of chunks is proven by its root hash.
#[derive(Debug)]
pub struct Seal {
    file: File,
    header: Header,
    groups: Vec<Hash>,
    /// The group that was read last: its number, and its chunks' hashes.
    last: Mutex<Option<(u64, Arc<[u8]>)>>,
}

/// Where the manifest of the base at `base` is.
pub fn manifest_path(base: &Path) -> PathBuf {
    let mut name = base.as_os_str().to_owned();
    name.push(".manifest");
    name.into()
}

fn refused(path: &Path, what: impl Into<String>) -> BaseError {
    BaseError::Refused { path: path.to_owned(), what: what.into() }
}

impl Seal {
    /// Opens the manifest of the base at `base`; `None` if it has none.
    ///
    /// # Errors
    /// If it can't be read, or is damaged.
    pub fn of(base: &Path) -> Result<Option<Self>, BaseError> {
        Self::at(&manifest_path(base))
    }

    /// Opens the manifest at `path`, wherever its base is; `None` if there is none.
    ///
    /// # Errors
    /// If it can't be read, or is damaged.
    pub fn at(path: &Path) -> Result<Option<Self>, BaseError> {
        match File::open(path, OpenOptions::default()) {
            Ok(file) => Self::read(file).map(Some),
            Err(error) if error.io_error().kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What the manifest of the base at `base` says that it is, and in which format; `None` if it has none. The
    /// hashes of its chunks are not looked at.
    ///
    /// # Errors
    /// If it can't be read, or what it says is damaged.
    pub fn glance(base: &Path) -> Result<Option<(Generation, BaseFormat)>, BaseError> {
        let header = match File::open(&manifest_path(base), OpenOptions::default()) {
            Ok(file) => Self::read_header(&file)?,
            Err(error) if error.io_error().kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some((Generation { root: Root(header.root), size: header.size }, header.format)))
    }

    fn read_header(file: &File) -> Result<Header, BaseError> {
        let mut bytes = [0; HEADER_LEN];
        if file.size()? < HEADER_LEN as u64 {
            let what = "it is damaged: it is too short; make it again with `pristine base seal`";
            return Err(refused(file.path(), what));
        }
        file.read_exact_at(&mut bytes, 0)?;
        Header::parse(&bytes).map_err(|what| refused(file.path(), what))
    }

    fn read(file: File) -> Result<Self, BaseError> {
        let path = file.path().to_owned();
        let again = "make it again with `pristine base seal`";
        let damaged = |what: &str| refused(&path, format!("{what}; {again}"));
        let header = Self::read_header(&file)?;
        let chunks = Header::chunks(header.size);
        if file.size()? != HEADER_LEN as u64 + chunks * HASH_LEN as u64 {
            return Err(damaged("it is damaged: its size does not fit that of the disk"));
        }
        let mut seal = Self { file, header, groups: Vec::new(), last: Mutex::default() };
        let groups = (0..chunks.div_ceil(GROUP_CHUNKS)).map(|group| Ok(hash(&seal.read_group(group)?)));
        seal.groups = groups.collect::<Result<_, BaseError>>()?;
        if Header::root_of(header.size, &seal.groups) != header.root {
            return Err(damaged("it is damaged: its hashes do not have the hash that they should"));
        }
        Ok(seal)
    }

    fn read_group(&self, group: u64) -> Result<Vec<u8>, blockio::Error> {
        let first = group * GROUP_CHUNKS;
        let count = (Header::chunks(self.header.size) - first).min(GROUP_CHUNKS);
        let mut bytes = vec![0; count as usize * HASH_LEN];
        self.file.read_exact_at(&mut bytes, HEADER_LEN as u64 + first * HASH_LEN as u64)?;
        Ok(bytes)
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The format of the image that was sealed.
    pub fn format(&self) -> BaseFormat {
        self.header.format
    }

    /// The root hash.
    pub fn root(&self) -> Root {
        Root(self.header.root)
    }

    /// What it is the seal of.
    pub fn generation(&self) -> Generation {
        Generation { root: self.root(), size: self.size() }
    }

    /// Whether group number `group` is known to be the same in `other`, without reading its hashes.
    pub(crate) fn has_same_group(&self, other: &Self, group: u64) -> bool {
        let of = |seal: &Self| seal.groups.get(group as usize).copied();
        of(self).is_some() && of(self) == of(other)
    }

    /// Whether chunk number `chunk` may differ from that of `other`, where what lies past an end is zeroes. One that
    /// the end of only one disk cuts short counts as different.
    pub(crate) fn chunk_differs(&self, other: &Self, chunk: u64) -> Result<bool, BaseError> {
        let hash_of = |seal: &Self| {
            seal.hash_of(chunk).map_err(|source| BaseError::Read {
                path: seal.file.path().to_owned(),
                offset: chunk * CHUNK_SIZE,
                source,
            })
        };
        let is_not_zeroes = |seal: &Self, len: u64| Ok(hash_of(seal)? != hash(&vec![0; len as usize]));
        match (self.len_of(chunk), other.len_of(chunk)) {
            (0, 0) => Ok(false),
            (own, others) if own == others => Ok(hash_of(self)? != hash_of(other)?),
            (0, len) => is_not_zeroes(other, len),
            (len, 0) => is_not_zeroes(self, len),
            _ => Ok(true),
        }
    }

    /// How many bytes chunk number `chunk` has.
    fn len_of(&self, chunk: u64) -> u64 {
        self.header.size.saturating_sub(chunk * CHUNK_SIZE).min(CHUNK_SIZE)
    }

    /// The hash of a chunk, proven by what was read when the manifest was opened.
    fn hash_of(&self, chunk: u64) -> io::Result<Hash> {
        let group = chunk / GROUP_CHUNKS;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let hashes = match &*last {
            Some((number, hashes)) if *number == group => Arc::clone(hashes),
            _ => {
                let bytes = self.read_group(group).map_err(io::Error::other)?;
                if self.groups.get(group as usize) != Some(&hash(&bytes)) {
                    let path = self.file.path().display();
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{path} was changed while it was in use"),
                    ));
                }
                let hashes: Arc<[u8]> = bytes.into();
                *last = Some((group, Arc::clone(&hashes)));
                hashes
            }
        };
        let at = (chunk % GROUP_CHUNKS) as usize * HASH_LEN;
        let found = hashes.get(at..at + HASH_LEN).and_then(|hash| hash.try_into().ok());
        found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Fails unless `bytes` are those of chunk number `chunk`.
    fn check(&self, chunk: u64, bytes: &[u8]) -> io::Result<()> {
        if self.hash_of(chunk)? == hash(bytes) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the {} bytes at offset {} of the base are not what was sealed",
                bytes.len(),
                chunk * CHUNK_SIZE
            ),
        ))
    }
}
