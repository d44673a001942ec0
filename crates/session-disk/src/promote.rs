//! The next generation of a base, out of the base and what sessions have changed on a disk.
//!
//! The disk stays what it was: with kept changes, on the old base.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use base_image::{
    BaseError, BaseFormat, BaseIdentity, BaseImage, CopyWay, Generation, MadeGeneration, NewGeneration, Root,
    Seal, Trust, manifest_path, parent_file,
};
use blockio::FileKind;
use blocks::{BLOCK_SIZE, Extent};

use crate::changes::ChangedDisk;
use crate::{DiskOptions, Error};

/// What is to be made.
#[derive(Clone, Debug)]
pub struct PromoteOptions {
    /// The disk whose changes make the difference. Nobody may serve it.
    pub disk: DiskOptions,
    /// The new image; nothing may be there.
    pub to: PathBuf,
    /// Its format; `None`: qcow2 if it is named so, else that of the old base.
    pub format: Option<BaseFormat>,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromoteStep {
    /// The old base is sealed, which it was not.
    Sealing,
    /// What the sessions took is compared with the base.
    Comparing,
    /// The new image is written.
    Writing,
}

/// What was made.
#[derive(Debug)]
pub struct Promoted {
    /// Where the new image is.
    pub path: PathBuf,
    /// What it is.
    pub generation: Generation,
    /// Its format.
    pub format: BaseFormat,
    /// The old base.
    pub parent: PathBuf,
    /// The old base's root hash.
    pub parent_root: Root,
    /// Whether the old base was sealed on the way.
    pub parent_was_sealed: bool,
    /// Blocks in which the two differ.
    pub blocks: u64,
    /// Extents that they are in.
    pub extents: usize,
    /// Blocks that sessions took.
    pub blocks_taken: u64,
    /// How the new image came by all other blocks.
    pub way: CopyWay,
    /// What was left of an attempt that was interrupted, and was replaced.
    pub replaced: Vec<PathBuf>,
}

/// Makes the next generation: an image with its seal and its delta, all of it or nothing. `progress` is told what is being
/// done, how many bytes are done, and of how many.
///
/// # Errors
/// If the disk has no changes that are kept or held, or is in use; if nothing in it differs from its base; if there is
/// something at `to`; if something can't be read or written, or `stop` is set.
pub fn promote(
    options: &PromoteOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(PromoteStep, u64, u64),
) -> Result<Promoted, Error> {
    let changed = ChangedDisk::open(&options.disk)?;
    let format = wanted_format(options, &changed.base)?;
    if options.to.symlink_metadata().is_ok() {
        return Err(Error::Refused(format!(
            "{}: it exists; a generation never replaces a file, choose another name",
            options.to.display()
        )));
    }
    refuse_parent(options, &changed.base)?;
    let taken = changed.bytes_taken();
    let found = changed.differences(stop, &mut |done| progress(PromoteStep::Comparing, done, taken))?;
    if found.extents.is_empty() {
        return Err(Error::Refused(format!(
            "{}: there is nothing to promote, every block equals the base; give the disk back with `pristine restore \
             --discard-kept`",
            options.disk.disk.display()
        )));
    }
    let ChangedDisk { file, geometry, base, base_identity, .. } = &changed;
    let (sealed, parent_was_sealed) = sealed(base, base_identity, stop, progress)?;
    let parent = sealed.as_ref().unwrap_or(base);
    // What a disk has past the end of its base is zeroes for whoever provisions from that.
    let size = if found.past_base { geometry.size() } else { base.size() };
    let end = size.div_ceil(BLOCK_SIZE);
    let extents: Vec<Extent> =
        found.extents.iter().map(|extent| extent.intersection(Extent::new(0, end))).collect();
    let new = NewGeneration {
        parent,
        to: &options.to,
        format,
        size,
        extents: &extents,
        read: &|buf, offset| file.read_exact_at(buf, offset).map_err(std::io::Error::other),
    };
    let made = new.make(stop, &mut |done, total| progress(PromoteStep::Writing, done, total));
    let MadeGeneration { path, generation, way, replaced } = made.map_err(stopped)?;
    let parent_root = parent.seal().map_or(generation.root, Seal::root);
    Ok(Promoted {
        path,
        generation,
        format,
        parent: base.path().to_owned(),
        parent_root,
        parent_was_sealed,
        blocks: extents.iter().map(|extent| extent.count()).sum(),
        extents: extents.len(),
        blocks_taken: taken / BLOCK_SIZE,
        way,
        replaced,
    })
}

/// Refuses what no image can be made beside, before anything is compared.
fn refuse_parent(options: &PromoteOptions, base: &BaseImage) -> Result<(), Error> {
    if options.to.to_str().is_none() {
        return Err(Error::Refused(format!(
            "{}: the name is no UTF-8, choose another",
            options.to.display()
        )));
    }
    let (path, disk) = (base.path().display(), options.disk.paths().arguments());
    let file = parent_file(base).map_err(|error| {
        Error::Refused(format!(
            "{error}: keep the changes with `pristine keep {disk}`, and commit them there with `qemu-img commit`"
        ))
    })?;
    if file.kind() == FileKind::BlockDevice && base.seal().is_none() {
        return Err(Error::Refused(format!(
            "base image {path} is a device without a seal; keep the changes with `pristine keep {disk}`. Disks whose base is \
             named with a seal (`pristine base seal {path} --base-manifest FILE`, then --base-manifest FILE) can be promoted"
        )));
    }
    Ok(())
}

fn stopped(error: BaseError) -> Error {
    match error {
        BaseError::Stopped => Error::Stopped,
        error => error.into(),
    }
}

fn wanted_format(options: &PromoteOptions, base: &BaseImage) -> Result<BaseFormat, Error> {
    let named = options.to.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"));
    match options.format {
        Some(BaseFormat::Raw) if named => Err(Error::Refused(format!(
            "{}: its name says qcow2 and --format raw; choose another name, or --format qcow2",
            options.to.display()
        ))),
        Some(format) => Ok(format),
        None if named => Ok(BaseFormat::Qcow2),
        None => Ok(base.format()),
    }
}

/// The base again, compared with its seal from now on, if it was opened without one; and whether it had none. `identity` is
/// that of the base with which the disk was compared.
fn sealed(
    base: &BaseImage,
    identity: &BaseIdentity,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(PromoteStep, u64, u64),
) -> Result<(Option<BaseImage>, bool), Error> {
    if base.seal().is_some() {
        return Ok((None, false));
    }
    let (seal, made) = match Seal::of(base.path())? {
        Some(seal) => (seal, false),
        None => {
            let size = base.size();
            let told = &mut |done| progress(PromoteStep::Sealing, done, size);
            base_image::seal(base, stop, told).map_err(stopped)?;
            let missing = || Error::Refused(format!("{} is gone", manifest_path(base.path()).display()));
            (Seal::of(base.path())?.ok_or_else(missing)?, true)
        }
    };
    let again = BaseImage::open(base.path(), Some(base.format()), Trust::Recorded(&identity.backing))?;
    again.check(identity)?;
    Ok((Some(again.sealed(seal)?), made))
}
