//! A base's seal: what is not as it was sealed is not read, and named.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base_image::{
    BaseError, BaseImage, CHUNK_SIZE, Content, Root, Seal, Trust, Urgency, manifest_path, seal, seal_to,
};
use blockio::{AlignedBuf, Buffer, EngineKind, FileIndex, Op, new_engine};

use common::{Lab, check_content, mixed, text};

/// More than one group of chunks, and a last chunk that is not whole.
const SIZE: u64 = (17 << 20) + 3 * 512;

fn never() -> AtomicBool {
    AtomicBool::new(false)
}

fn open(path: &Path) -> BaseImage {
    BaseImage::open(path, None, Trust::Directories(&[])).unwrap()
}

fn make(path: &Path) -> Root {
    let mut last = 0;
    let root = seal(&open(path), &never(), &mut |done| {
        assert!(done >= last);
        last = done;
    });
    root.unwrap()
}

fn sealed(path: &Path) -> BaseImage {
    open(path).sealed(Seal::of(path).unwrap().unwrap()).unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn sealed_base_reads_as_before_in_every_way() {
    let lab = Lab::new();
    mixed(&lab.path("one.raw"), SIZE, 6);
    let expected = fs::read(lab.path("one.raw")).unwrap();
    let root = make(&lab.path("one.raw"));
    let base = sealed(&lab.path("one.raw"));
    assert_eq!(base.seal().unwrap().root(), root);
    for (at, len) in
        [(0, SIZE), (1, 100), (CHUNK_SIZE - 1, 2), (SIZE - 700, 700), (3 * CHUNK_SIZE + 512, 200_000)]
    {
        let mut bytes = vec![0xee; len as usize];
        base.read_at(&mut bytes, at).unwrap();
        assert!(bytes == expected[at as usize..][..len as usize], "at {at}");
    }
    assert!(check_content(&base, &expected) < SIZE);
    assert_eq!(base.bad_chunks(&never(), &mut |_| ()).unwrap(), []);
}

/// Two hosts that serve the same have the same root, in whatever format; else they have another.
#[test]
fn root_is_that_of_the_content_and_of_nothing_else() {
    let lab = Lab::new();
    mixed(&lab.path("one.raw"), SIZE, 6);
    lab.img("convert -f raw -O qcow2 -c one.raw packed.qcow2");
    let dense = fs::read(lab.path("one.raw")).unwrap();
    fs::write(lab.path("dense.raw"), &dense).unwrap();
    fs::write(lab.path("longer.raw"), [dense.as_slice(), &[0; 512]].concat()).unwrap();
    fs::write(lab.path("other.raw"), &dense).unwrap();
    flip(&lab.path("other.raw"), SIZE - 1);
    let roots =
        ["one.raw", "packed.qcow2", "dense.raw", "longer.raw", "other.raw"].map(|name| make(&lab.path(name)));
    assert!(roots[..3].iter().all(|root| *root == roots[0]), "{roots:?}");
    assert!(roots[3] != roots[0] && roots[4] != roots[0] && roots[3] != roots[4], "{roots:?}");
    let text = roots[0].to_string();
    assert_eq!((text.len(), Root::try_from(text).unwrap()), (64, roots[0]));
}

/// What rots is named by its chunk, and no byte of that chunk is read as good; all others are.
#[test]
fn bit_that_flips_fails_every_read_of_its_chunk_and_no_other() {
    let lab = Lab::new();
    let path = lab.path("one.raw");
    for at in [0, 5 * CHUNK_SIZE + 77, 16 << 20, SIZE - 1] {
        mixed(&path, SIZE, 6);
        let expected = fs::read(&path).unwrap();
        make(&path);
        flip(&path, at);
        let base = sealed(&path);
        let begin = at / CHUNK_SIZE * CHUNK_SIZE;
        let bad = base.bad_chunks(&never(), &mut |_| ()).unwrap();
        assert_eq!(bad.iter().map(|chunk| chunk.offset).collect::<Vec<_>>(), [begin]);
        for offset in (0..SIZE).step_by(4096) {
            let len = (SIZE - offset).min(4096) as usize;
            let mut bytes = vec![0; len];
            match base.read_at(&mut bytes, offset) {
                Ok(()) => assert!(
                    offset / CHUNK_SIZE != at / CHUNK_SIZE && bytes == expected[offset as usize..][..len]
                ),
                Err(error) => {
                    assert_eq!(offset / CHUNK_SIZE * CHUNK_SIZE, begin);
                    assert!(text(&error).contains(&format!("at offset {begin}")), "{}", text(&error));
                }
            }
        }
    }
}

/// A hole that was data is not taken for zeroes, whether all of a chunk is gone or a part.
#[test]
fn hole_that_was_data_when_sealed_is_not_zeroes() {
    let lab = Lab::new();
    let path = lab.path("dense.raw");
    let bytes: Vec<u8> = (0..SIZE).map(|n| (n / 512) as u8 | 1).collect();
    for (hole, len) in [(4 * CHUNK_SIZE, CHUNK_SIZE), (4 * CHUNK_SIZE + 8192, 4096), (3 << 20, 1 << 20)] {
        fs::write(&path, &bytes).unwrap();
        make(&path);
        let file = fs::File::options().write(true).open(&path).unwrap();
        rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            hole,
            len,
        )
        .unwrap();
        let base = sealed(&path);
        let error = base.content_at(hole, len).unwrap_err();
        assert!(text(&error).contains("not what was sealed"), "{}", text(&error));
        assert_eq!(base.content_at(0, 4096).unwrap(), Content::Data(4096));
    }
}

/// Once somebody has touched a base, what was read of it before proves nothing of its holes.
#[test]
fn hole_that_was_made_after_its_chunk_was_read_is_proven_anew() {
    let lab = Lab::new();
    let path = lab.path("base.raw");
    let bytes: Vec<u8> = (0..2 * CHUNK_SIZE).map(|n| (n / 512) as u8 | 1).collect();
    fs::write(&path, bytes).unwrap();
    make(&path);
    let base = sealed(&path);
    base.read_at(&mut vec![0; CHUNK_SIZE as usize], 0).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 8192, 4096).unwrap();
    // Nobody asks before he has looked at its times.
    assert_eq!(base.content_at(8192, 4096).unwrap(), Content::Hole(4096));
    base.distrust_holes();
    assert!(base.content_at(8192, 4096).is_err());
    assert_eq!(base.content_at(0, 4096).unwrap(), Content::Data(4096));
}

/// Raw bases too are compared on the way that queues and drain read them.
#[test]
fn engine_of_a_sealed_raw_base_compares_what_it_reads() {
    let lab = Lab::new();
    let path = lab.path("one.raw");
    mixed(&path, SIZE, 6);
    make(&path);
    flip(&path, CHUNK_SIZE + 5);
    let base = sealed(&path);
    let inner =
        new_engine(EngineKind::Sync, 4, vec![base.file().unwrap().clone(), base.file().unwrap().clone()])
            .unwrap();
    let mut engine = base.engine(inner, FileIndex(1), Urgency::Guest).unwrap();
    for n in 0..32_u64 {
        let buf = Buffer::Owned(AlignedBuf::new_zeroed(4096));
        engine.push(n, Op::Read { file: FileIndex(1), offset: n * 4096, buf });
    }
    engine.submit();
    let mut done = Vec::new();
    while done.len() < 32 {
        engine.wait(None).unwrap();
        engine.reap(&mut done);
    }
    for completion in done {
        assert_eq!(completion.result.is_err(), completion.token >= 16, "block {}", completion.token);
    }
}

#[test]
fn manifest_that_was_damaged_anywhere_is_refused() {
    let lab = Lab::new();
    let path = lab.path("one.raw");
    mixed(&path, SIZE, 6);
    make(&path);
    let manifest = manifest_path(&path);
    let good = fs::read(&manifest).unwrap();
    assert_eq!(good.len() as u64, 128 + SIZE.div_ceil(CHUNK_SIZE) * 32);
    for at in (0..104).chain((128..good.len() as u64).step_by(61)) {
        flip(&manifest, at);
        assert!(matches!(Seal::of(&path), Err(BaseError::Refused { .. })), "byte {at}");
        fs::write(&manifest, &good).unwrap();
    }
    for len in [0, 10, 127, 128, good.len() - 1] {
        fs::write(&manifest, &good[..len]).unwrap();
        let why = text(&Seal::of(&path).unwrap_err());
        assert!(why.contains("pristine base seal"), "{why}");
    }
    fs::remove_file(&manifest).unwrap();
    assert!(Seal::of(&path).unwrap().is_none());
}

/// What is said of chunks after the manifest was opened is proven too.
#[test]
fn manifest_that_changes_while_it_is_used_proves_nothing_false() {
    let lab = Lab::new();
    let path = lab.path("one.raw");
    mixed(&path, SIZE, 6);
    make(&path);
    let base = sealed(&path);
    // A bad chunk, and a manifest that calls it good.
    flip(&path, 20);
    fs::copy(&path, lab.path("forged.raw")).unwrap();
    make(&lab.path("forged.raw"));
    let forged = fs::read(manifest_path(&lab.path("forged.raw"))).unwrap();
    let file = fs::File::options().write(true).open(manifest_path(&path)).unwrap();
    file.write_all_at(&forged, 0).unwrap();
    let why = text(&base.read_at(&mut [0; 512], 0).unwrap_err());
    assert!(why.contains("changed while it was in use"), "{why}");
}

/// The old manifest holds until the new one is whole, and nothing half-made is left.
#[test]
fn seal_that_is_stopped_or_fails_leaves_the_old_manifest() {
    let lab = Lab::new();
    let path = lab.path("one.raw");
    mixed(&path, SIZE, 6);
    let root = make(&path);
    flip(&path, 0);
    assert!(matches!(seal(&open(&path), &AtomicBool::new(true), &mut |_| ()), Err(BaseError::Stopped)));
    assert_eq!(Seal::of(&path).unwrap().unwrap().root(), root);
    let names = || fs::read_dir(lab.path("")).unwrap().count();
    assert_eq!(names(), 2);
    // It changes while it is sealed.
    let base = open(&path);
    let changed = seal(&base, &never(), &mut |_| {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    });
    assert!(matches!(changed, Err(BaseError::Changed { .. })));
    assert_eq!((Seal::of(&path).unwrap().unwrap().root(), names()), (root, 2));
    assert_ne!(make(&path), root);
    let smaller = fs::File::options().write(true).open(&path).unwrap();
    smaller.set_len(SIZE - 512).unwrap();
    let error = open(&path).sealed(Seal::of(&path).unwrap().unwrap()).unwrap_err();
    assert!(text(&error).contains("seal it again"), "{error}");
}

/// Invariant 5, and nobody else's file is lost: what is named as a manifest's place is replaced only if it is one. Whatever else
/// is there stays as it is, and so does what has the name that the new manifest has meanwhile.
#[test]
fn seal_replaces_a_manifest_and_nothing_else() {
    let lab = Lab::new();
    let (base, manifest) = (lab.path("one.raw"), lab.path("named"));
    mixed(&base, SIZE, 6);
    let seal_to = |path: &Path| seal_to(&open(&base), path, &never(), &mut |_| ());
    let root = seal_to(&manifest).unwrap();
    assert_eq!(seal_to(&manifest).unwrap(), root);
    let (disk, link, fifo) = (lab.path("disk.raw"), lab.path("link"), lab.path("fifo"));
    mixed(&disk, 1 << 20, 7);
    std::os::unix::fs::symlink(&manifest, &link).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::hard_link(&base, lab.path("other name")).unwrap();
    let before: Vec<_> = [&base, &disk, &manifest].map(|path| fs::read(path).unwrap()).into();
    let names = || fs::read_dir(lab.path("")).unwrap().count();
    let count = names();
    for (path, word) in [
        (&base, "file of the base"),
        (&lab.path("other name"), "file of the base"),
        (&disk, "no manifest of a base"),
        (&link, "no regular file"),
        (&lab.path(""), "no regular file"),
        (&fifo, "no regular file"),
    ] {
        let error = text(&seal_to(path).unwrap_err());
        assert!(error.contains(word) && error.contains(path.to_str().unwrap()), "{error}");
    }
    fs::rename(&disk, lab.path("named.new")).unwrap();
    let error = text(&seal_to(&manifest).unwrap_err());
    assert!(error.contains("named.new") && error.contains("no manifest of a base"), "{error}");
    fs::rename(lab.path("named.new"), &disk).unwrap();
    let after: Vec<_> = [&base, &disk, &manifest].map(|path| fs::read(path).unwrap()).into();
    assert!(before == after && link.is_symlink() && names() == count);
}

/// What a guest has had written at its disk's beginning makes no manifest of the base.
#[test]
fn base_that_begins_as_a_manifest_is_not_replaced_by_its_own() {
    let lab = Lab::new();
    let base = lab.path("one.raw");
    fs::write(&base, [b"PRISTINE BASE 1\n".as_slice(), &[0; 8192 - 16]].concat()).unwrap();
    let error = text(&seal_to(&open(&base), &base, &never(), &mut |_| ()).unwrap_err());
    assert!(error.contains("file of the base"), "{error}");
    assert_eq!(fs::metadata(&base).unwrap().len(), 8192);
}

/// A manifest that a kill has left half-made, as it is in the middle, goes when it is made again.
#[test]
fn manifest_that_was_left_half_made_is_made_again() {
    let lab = Lab::new();
    let (base, new) = (lab.path("one.raw"), lab.path("one.raw.manifest.new"));
    mixed(&base, SIZE, 6);
    let mut left = Vec::new();
    let root = seal(&open(&base), &never(), &mut |_| left = fs::read(&new).unwrap()).unwrap();
    assert!(!new.exists() && !left.is_empty());
    fs::write(&new, left).unwrap();
    assert_eq!(make(&base), root);
    assert!(!new.exists());
}

/// Who may not read a base learns nothing of it by its manifest, neither when it is whole nor before; who may read it may use it.
#[test]
fn manifest_is_readable_for_those_who_may_read_the_base() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let lab = Lab::new();
    let (base, manifest) = (lab.path("one.raw"), lab.path("one.raw.manifest"));
    mixed(&base, SIZE, 6);
    let given = chown(&base, Some(54321), Some(54322)).is_ok();
    if !given {
        println!("skipped: files can't be given away here");
    }
    for (mode, expected) in [(0o600, 0o600), (0o640, 0o640), (0o444, 0o644), (0o666, 0o644), (0o660, 0o640)] {
        fs::set_permissions(&base, fs::Permissions::from_mode(mode)).unwrap();
        let mut meanwhile = 0;
        seal(&open(&base), &never(), &mut |_| {
            meanwhile |= fs::metadata(lab.path("one.raw.manifest.new")).unwrap().mode() & 0o777;
        })
        .unwrap();
        let made = fs::metadata(&manifest).unwrap();
        assert_eq!((made.mode() & 0o777, meanwhile), (expected, 0o600), "{mode:o}");
        assert!(!given || (made.uid(), made.gid()) == (54321, 54322));
        fs::remove_file(&manifest).unwrap();
    }
}
