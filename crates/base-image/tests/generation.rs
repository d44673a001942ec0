//! The next generation of any base with any changes: the right bytes, the right seal, an exact delta.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base_image::{
    BaseError, BaseFormat, BaseImage, Delta, NewGeneration, Root, Seal, Trust, list_generations,
    manifest_path, seal,
};
use blocks::{BLOCK_SIZE, Extent};
use proptest::prelude::*;

mod common;
use common::{Lab, mixed, text};

static NEVER: AtomicBool = AtomicBool::new(false);

fn sealed(path: &Path, format: BaseFormat) -> BaseImage {
    let open = || BaseImage::open(path, Some(format), Trust::Directories(&[])).unwrap();
    if !manifest_path(path).exists() {
        seal(&open(), &NEVER, &mut |_| ()).unwrap();
    }
    open().sealed(Seal::of(path).unwrap().unwrap()).unwrap()
}

fn root_of(lab: &Lab, bytes: &[u8]) -> Root {
    let path = lab.path("expected.raw");
    fs::write(&path, bytes).unwrap();
    seal(&BaseImage::open(&path, None, Trust::Directories(&[])).unwrap(), &NEVER, &mut |_| ()).unwrap()
}

fn read(base: &BaseImage) -> Vec<u8> {
    let mut bytes = vec![0; base.size() as usize];
    base.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What a disk of `size` bytes holds that has `base` and in the extents other bytes, or zeroes.
fn changed(base: &[u8], size: u64, extents: &[Extent], zeroes: bool) -> Vec<u8> {
    let mut bytes = base.to_vec();
    bytes.resize(size as usize, 0);
    for extent in extents {
        let range = (extent.first() * BLOCK_SIZE) as usize..((extent.end() * BLOCK_SIZE).min(size)) as usize;
        for (byte, n) in bytes[range].iter_mut().zip(extent.first()..) {
            *byte = if zeroes { 0 } else { *byte ^ (n as u8 | 1) };
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Made twice in a row, in any two formats: the bytes and the root hash are those of the disk, and what the delta leaves out is
    /// the same in both.
    #[test]
    fn generation_of_any_base_and_changes_is_the_disk(
        sectors in 1_u64..1200, grow in prop_oneof![Just(0), 1_u64..400], seed in any::<u64>(),
        runs in prop::collection::vec((0_u64..200, 1_u64..40), 1..6), zeroes in any::<bool>(),
        formats in prop::array::uniform2(prop::bool::ANY),
    ) {
        let lab = Lab::new();
        let base = lab.path("1.raw");
        mixed(&base, sectors * 512, seed);
        let mut parent = sealed(&base, BaseFormat::Raw);
        for (index, qcow2) in formats.into_iter().enumerate() {
            let size = parent.size() + grow * 512;
            let all = Extent::new(0, size.div_ceil(BLOCK_SIZE));
            let mut extents: Vec<Extent> =
                runs.iter().map(|(first, count)| Extent::new(first + index as u64, *count).intersection(all)).collect();
            Extent::normalize(&mut extents);
            let disk = changed(&read(&parent), size, &extents, zeroes);
            let format = if qcow2 { BaseFormat::Qcow2 } else { BaseFormat::Raw };
            let to = lab.path(&format!("{}.img", index + 2));
            let new = NewGeneration {
                parent: &parent, to: &to, format, size, extents: &extents,
                read: &|buf, offset| {
                    let at = offset as usize;
                    buf.copy_from_slice(&disk[at..at + buf.len()]);
                    Ok(())
                },
            };
            let made = new.make(&NEVER, &mut |_, _| ()).unwrap();
            let child = sealed(&to, format);
            prop_assert_eq!(made.generation, child.seal().unwrap().generation());
            prop_assert_eq!(made.generation.root, root_of(&lab, &disk));
            prop_assert!(read(&child) == disk);
            let delta = Delta::of(&to).unwrap().unwrap();
            prop_assert_eq!(delta.extents(), &extents[..]);
            prop_assert_eq!((delta.parent(), delta.child()), (parent.seal().unwrap().generation(), made.generation));
            prop_assert_eq!(lab.path(delta.parent_path().unwrap().to_str().unwrap()), parent.path());
            // By the seals alone: no less.
            let between = Delta::between(parent.seal().unwrap(), child.seal().unwrap()).unwrap();
            let has = |block: &u64| between.extents().iter().any(|extent| extent.overlaps(Extent::new(*block, 1)));
            prop_assert!(changed_blocks(&read(&parent), &disk).iter().all(has));
            parent = child;
        }
        prop_assert_eq!(list_generations(&lab.path("")).unwrap().tree().len(), 4);
    }
}

fn changed_blocks(old: &[u8], new: &[u8]) -> Vec<u64> {
    let mut old = old.to_vec();
    old.resize(new.len(), 0);
    let pairs = old.chunks(BLOCK_SIZE as usize).zip(new.chunks(BLOCK_SIZE as usize));
    (0..).zip(pairs).filter(|(_, (old, new))| old != new).map(|(block, _)| block).collect()
}

/// Whoever reads the changes may fail, be stopped, or be late; nothing is left of it.
#[test]
fn generation_that_fails_leaves_nothing() {
    let lab = Lab::new();
    let (base, to) = (lab.path("1.raw"), lab.path("2.raw"));
    mixed(&base, 1 << 20, 5);
    let parent = sealed(&base, BaseFormat::Raw);
    let count = || fs::read_dir(lab.path("")).unwrap().count();
    let before = count();
    let fails = |_: &mut [u8], _: u64| Err(std::io::Error::other("the disk is gone"));
    let extents = [Extent::new(3, 1)];
    let new = NewGeneration {
        parent: &parent,
        to: &to,
        format: BaseFormat::Raw,
        size: 1 << 20,
        extents: &extents,
        read: &fails,
    };
    let error = text(&new.make(&NEVER, &mut |_, _| ()).unwrap_err());
    assert!(error.contains("2.raw") && error.contains("the disk is gone"), "{error}");
    assert!(matches!(new.make(&AtomicBool::new(true), &mut |_, _| ()), Err(BaseError::Stopped)));
    let good = |buf: &mut [u8], _: u64| {
        buf.fill(7);
        // Somebody else is quicker.
        File::create_new(lab.path("2.raw")).map(|_| ())
    };
    let error = NewGeneration { read: &good, ..new }.make(&NEVER, &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("exists"), "{error}");
    assert_eq!(fs::metadata(&to).unwrap().len(), 0);
    fs::remove_file(&to).unwrap();
    assert_eq!(count(), before);
}

/// A base without a seal has no children: nothing would prove what they have of it.
#[test]
fn generation_of_an_unsealed_base_is_refused() {
    let lab = Lab::new();
    let (base, to) = (lab.path("1.raw"), lab.path("2.raw"));
    fs::write(&base, [1; 8192]).unwrap();
    let parent = BaseImage::open(&base, None, Trust::Directories(&[])).unwrap();
    let read = |_: &mut [u8], _: u64| Ok(());
    let new = NewGeneration {
        parent: &parent,
        to: &to,
        format: BaseFormat::Raw,
        size: 8192,
        extents: &[],
        read: &read,
    };
    assert!(text(&new.make(&NEVER, &mut |_, _| ()).unwrap_err()).contains("pristine base seal"));
    assert!(!to.exists());
}

/// One at a time: the second is told so, and the first is not disturbed.
#[test]
fn generation_under_way_is_not_disturbed_by_another() {
    let lab = Lab::new();
    let (base, to) = (lab.path("1.raw"), lab.path("2.raw"));
    mixed(&base, 1 << 20, 6);
    let parent = sealed(&base, BaseFormat::Raw);
    let zero = |buf: &mut [u8], _: u64| {
        buf.fill(9);
        Ok(())
    };
    let extents = [Extent::new(0, 2)];
    let other = NewGeneration {
        parent: &parent,
        to: &to,
        format: BaseFormat::Raw,
        size: 1 << 20,
        extents: &extents,
        read: &zero,
    };
    let read = |buf: &mut [u8], at: u64| {
        let error = text(&other.make(&NEVER, &mut |_, _| ()).unwrap_err());
        assert!(error.contains("another `pristine promote`"), "{error}");
        zero(buf, at)
    };
    NewGeneration { read: &read, ..other }.make(&NEVER, &mut |_, _| ()).unwrap();
    let mut bytes = [0; 8192];
    File::open(&to).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [9; 8192]);
}

/// What tells of the image is as little for everybody as the image; and what has another name is not an attempt's.
#[test]
fn generation_is_as_private_as_its_parent_and_empties_nothing_that_has_another_name() {
    let lab = Lab::new();
    let (base, to) = (lab.path("1.raw"), lab.path("2.raw"));
    mixed(&base, 1 << 20, 8);
    let parent = sealed(&base, BaseFormat::Raw);
    fs::set_permissions(&base, fs::Permissions::from_mode(0o440)).unwrap();
    let read = |buf: &mut [u8], _: u64| {
        buf.fill(3);
        Ok(())
    };
    let extents = [Extent::new(1, 1)];
    let format = BaseFormat::Raw;
    let new =
        NewGeneration { parent: &parent, to: &to, format, size: 1 << 20, extents: &extents, read: &read };
    let (published, left) = (lab.path("published"), lab.path("2.raw.promoting"));
    fs::write(&published, "a base").unwrap();
    fs::hard_link(&published, &left).unwrap();
    let error = text(&new.make(&NEVER, &mut |_, _| ()).unwrap_err());
    assert!(error.contains("hard link") && error.contains("2.raw.promoting"), "{error}");
    assert_eq!(fs::read(&published).unwrap(), b"a base");
    assert!(left.exists());
    fs::remove_file(&left).unwrap();
    new.make(&NEVER, &mut |_, _| ()).unwrap();
    for path in [to.clone(), manifest_path(&to), Delta::path_of(&to)] {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o440, "{}", path.display());
    }
}
