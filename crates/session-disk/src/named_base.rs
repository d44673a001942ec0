//! A base as somebody names it, for a disk that is to have it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use base_image::{BaseFormat, BaseIdentity, BaseImage, BaseLocation, Seal, Trust};
use blockio::FileKind;

use crate::Error;
use crate::manifest::BaseEntry;
use crate::open::find_seal;

/// A base, and how it is to be read.
#[derive(Clone, Debug)]
pub struct NamedBase {
    /// Where it is.
    pub location: BaseLocation,
    /// Where its seal is, if not beside it.
    pub seal: Option<PathBuf>,
    /// Its format; `None`: what was sealed, else what its file name says and its contents bear out, or raw. It is decided
    /// once, when it becomes a disk's base.
    pub format: Option<BaseFormat>,
    /// Where files may lie that it is backed by, besides its own directory.
    pub backing_dirs: Vec<PathBuf>,
}

impl NamedBase {
    /// The file or device at `path`, of the format that its seal or its name says.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { location: BaseLocation::File(path.into()), seal: None, format: None, backing_dirs: Vec::new() }
    }

    /// The same, wherever the program is started later. Base and seal, if they are files, must be there.
    pub(crate) fn resolved(&self) -> Result<Self, Error> {
        let location = self
            .location
            .resolved()
            .map_err(|error| Error::state("open base image", self.location.as_path(), error))?;
        let canonical = |path: &PathBuf| {
            fs::canonicalize(path).map_err(|error| Error::state("open the base's manifest", path, error))
        };
        let seal = self.seal.as_ref().map(canonical).transpose()?;
        Ok(Self { location, seal, ..self.clone() })
    }

    /// Opens it, and takes its seal for good, if it has one: who sealed it has said its format. A read waits for `patience`
    /// for a server that is away.
    fn open(&self, patience: Duration) -> Result<BaseImage, Error> {
        let seal = find_seal(&self.location, self.seal.as_deref())?;
        let base = match &self.location {
            BaseLocation::File(path) => {
                let format = self.format.or(seal.as_ref().map(Seal::format));
                BaseImage::open(path, format, Trust::Directories(&self.backing_dirs))?
            }
            // What was sealed may have been the image that the server takes apart.
            BaseLocation::Nbd(uri) => BaseImage::connect(uri, self.format, None, patience)?,
        };
        match seal {
            Some(seal) => Ok(base.sealed(seal)?),
            None => Ok(base),
        }
    }

    /// Says, once, when a base is chosen, of which one a change will not be noticed.
    fn warn_of_changes(&self, base: &BaseImage, identity: &BaseIdentity) {
        if base.seal().is_some() {
            return;
        }
        let is_device = base.file().is_some_and(|file| file.kind() == FileKind::BlockDevice);
        match &self.location {
            BaseLocation::Nbd(uri) => log::warn!(
                "{uri}: a change of what is exported under this name is noticed only if its size changes; make a seal \
                 with `pristine base seal '{uri}' --base-manifest FILE`, or copy the one of the image, and name it \
                 with --base-manifest"
            ),
            BaseLocation::File(path) if is_device || identity.backing.iter().any(|of| of.file.is_none()) => {
                log::warn!(
                    "{path}: a change of what is on a device is not noticed without a seal; make one with `pristine base seal \
                 {path} --base-manifest FILE`, and name it with --base-manifest",
                    path = path.display()
                )
            }
            BaseLocation::File(_) => {}
        }
    }

    /// The same, with what it is known by from now on. What it has on its medium by then is what was read.
    pub(crate) fn open_settled(&self, patience: Duration) -> Result<(BaseImage, BaseIdentity), Error> {
        let (base, identity) = settled(|| self.open(patience))?;
        self.warn_of_changes(&base, &identity);
        Ok((base, identity))
    }

    /// What a disk's manifest says of it, when it was [resolved](Self::resolved), opened as `base`, and looked like `identity`.
    pub(crate) fn entry(self, base: &BaseImage, identity: BaseIdentity) -> BaseEntry {
        BaseEntry {
            path: self.location,
            format: base.format(),
            identity,
            root: base.seal().map(Seal::root),
            seal: self.seal,
        }
    }
}

/// Opens a base, and takes its identity: its times are to vouch for all that was read of it, and is from now on.
fn settled(mut open: impl FnMut() -> Result<BaseImage, Error>) -> Result<(BaseImage, BaseIdentity), Error> {
    let base = open()?;
    // Before its times are taken, for who still writes it may change it without that.
    base.sync()?;
    let identity = base.identity()?;
    if base.file().is_none() {
        // An export has the size that it had when it was connected to, and no times.
        return Ok((base, identity));
    }
    // Its size, and a qcow2 image's tables, were read when it was opened, which is longer ago than its times are.
    let again = open()?;
    again.check(&identity)?;
    Ok((again, identity))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Invariant 5: an image that somebody changes while it is opened is read as it is known by.
    #[test]
    fn image_that_changes_while_it_is_opened_is_read_as_its_identity_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let img = |args: &[&str]| {
            let done = Command::new("qemu-img").args(args).current_dir(dir.path()).status().unwrap();
            assert!(done.success());
        };
        fs::write(path("data"), vec![7; 1 << 20]).unwrap();
        img(&["create", "-q", "-f", "qcow2", "base", "1M"]);
        img(&["convert", "-f", "raw", "-O", "qcow2", "data", "full"]);
        let mut opened = 0;
        let (base, identity) = settled(|| {
            let base = BaseImage::open(&path("base"), Some(BaseFormat::Qcow2), Trust::Directories(&[]))?;
            opened += 1;
            if opened == 1 {
                // In the same file, as whoever heeds no locks does it.
                fs::write(path("base"), fs::read(path("full")).unwrap()).unwrap();
            }
            Ok(base)
        })
        .unwrap();
        base.check(&identity).unwrap();
        let mut byte = [0];
        base.read_at(&mut byte, 5000).unwrap();
        assert_eq!(byte, [7]);
    }

    /// Invariant 5, for a raw image that is still being copied: a disk of it would have a part of it only.
    #[test]
    fn raw_image_that_grows_while_it_is_opened_is_as_large_as_its_identity_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let set_len = |len| fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        let settled_with = |change: &dyn Fn(u32)| {
            fs::write(&path, vec![7; 1 << 20]).unwrap();
            let mut opened = 0;
            settled(|| {
                let base = BaseImage::open(&path, Some(BaseFormat::Raw), Trust::Directories(&[]))?;
                opened += 1;
                change(opened);
                Ok(base)
            })
        };
        let (base, identity) = settled_with(&|opened| {
            if opened == 1 {
                set_len(2 << 20);
            }
        })
        .unwrap();
        base.check(&identity).unwrap();
        assert_eq!((base.size(), identity.size), (2 << 20, 2 << 20));
        // One that does not cease to grow has no identity.
        let error = settled_with(&|opened| set_len(u64::from(opened + 1) << 20)).unwrap_err();
        assert!(matches!(error, Error::Base(base_image::BaseError::Changed { .. })), "{error}");
    }
}
