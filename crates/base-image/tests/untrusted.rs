//! Images that are damaged, or that somebody made to do harm.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;

use base_image::{BaseFormat, BaseImage, Trust};

use common::{Lab, mixed, run, text};

fn why(result: Result<BaseImage, base_image::BaseError>) -> String {
    text(&result.map(|base| base.path().to_owned()).unwrap_err())
}

/// A header can name any file of the host; only what lies beside the base is followed.
#[test]
fn backing_file_outside_of_the_bases_directory_is_refused_unless_its_directory_is_named() {
    let (lab, elsewhere) = (Lab::new(), Lab::new());
    mixed(&elsewhere.path("secret.raw"), 1 << 20, 1);
    let secret = elsewhere.path("secret.raw");
    lab.img(&format!("create -q -f qcow2 -b {} -F raw absolute", secret.display()));
    let up = format!("../{}/secret.raw", elsewhere.path("").file_name().unwrap().to_str().unwrap());
    lab.img(&format!("create -q -f qcow2 -b {up} -F raw relative"));
    std::os::unix::fs::symlink(&secret, lab.path("link.raw")).unwrap();
    lab.img("create -q -f qcow2 -b link.raw -F raw linked");
    for name in ["absolute", "relative", "linked"] {
        let why = why(lab.open(name));
        assert!(why.contains("--backing-dir") && why.contains("secret.raw"), "{why}");
        let dirs = [elsewhere.path("")];
        BaseImage::open(&lab.path(name), Some(BaseFormat::Qcow2), Trust::Directories(&dirs)).unwrap();
    }
}

/// What a disk was provisioned from is all that is opened again.
#[test]
fn backing_file_other_than_the_recorded_one_is_refused() {
    let lab = Lab::new();
    mixed(&lab.path("a.raw"), 1 << 20, 1);
    mixed(&lab.path("b.raw"), 1 << 20, 1);
    lab.img("create -q -f qcow2 -b a.raw -F raw top");
    let recorded = lab.open("top").unwrap().identity().unwrap().backing;
    let again =
        |files: &[_]| BaseImage::open(&lab.path("top"), Some(BaseFormat::Qcow2), Trust::Recorded(files));
    again(&recorded).unwrap();
    assert!(why(again(&[])).contains("not before"));
    lab.img("rebase -u -b b.raw -F raw top");
    assert!(why(again(&recorded)).contains("b.raw"));
    lab.img("rebase -u -b a.raw -F qcow2 top");
    assert!(why(again(&recorded)).contains("not before"));
}

/// What looking through a chain may take of the host's memory is known when it is opened, before it is taken.
#[test]
fn chain_whose_tables_would_fill_the_memory_is_refused() {
    const LAYERS: u64 = 4;
    const TABLES: u64 = 128;
    let lab = Lab::new();
    for layer in 0..LAYERS {
        let backing = if layer == 0 { String::new() } else { format!("-u -b {} -F qcow2 ", layer - 1) };
        lab.img(&format!("create -q -f qcow2 -o cluster_size=2M {backing}{layer} 64T"));
        let file = fs::File::options().read(true).write(true).open(lab.path(&layer.to_string())).unwrap();
        let mut place = [0; 8];
        file.read_exact_at(&mut place, 40).unwrap();
        let begin = file.metadata().unwrap().len().next_multiple_of(2 << 20);
        for table in 0..TABLES {
            let entry = (begin + table * (2 << 20)) | 1 << 63;
            file.write_all_at(&entry.to_be_bytes(), u64::from_be_bytes(place) + table * 8).unwrap();
        }
        // All of them in a hole.
        file.set_len(begin + TABLES * (2 << 20)).unwrap();
    }
    lab.open("2").unwrap();
    let why = why(lab.open("3"));
    assert!(why.contains("tables of the 4 files") && why.contains("qemu-img convert"), "{why}");
}

#[test]
fn backing_files_that_are_not_plain_named_ones_are_refused() {
    let lab = Lab::new();
    mixed(&lab.path("a.raw"), 1 << 20, 1);
    for (name, format, word) in [
        ("json:{\"driver\":\"file\"}", "raw", "only plain files"),
        ("nbd:localhost:10809", "raw", "only plain files"),
        ("a.raw", "vmdk", "vmdk"),
        ("missing.raw", "raw", "cannot find"),
        ("./loop", "qcow2", "in a circle"),
    ] {
        run(Command::new("qemu-img")
            .args(["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format, "loop", "1M"])
            .current_dir(lab.path("")));
        let why = why(lab.open("loop"));
        assert!(why.contains(word), "{name}: {why}");
    }
    // As old images have it: the format of the file beneath is not stated.
    run(Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "-b",
            "a.raw",
            "-F",
            "raw",
            "old",
            "1M",
        ])
        .current_dir(lab.path("")));
    let file = fs::File::options().write(true).read(true).open(lab.path("old")).unwrap();
    let mut head = vec![0; 512];
    file.read_exact_at(&mut head, 0).unwrap();
    let at = head.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    file.write_all_at(&[0; 16], at as u64).unwrap();
    let why = why(lab.open("old"));
    assert!(why.contains("qemu-img rebase -u -b a.raw"), "{why}");
    // What it says helps.
    lab.img("rebase -u -b a.raw -F raw old");
    assert_eq!(lab.open("old").unwrap().identity().unwrap().backing[0].path, lab.path("a.raw"));
}

/// What can't be read rightly is refused by name, not read wrongly.
#[test]
fn images_with_features_that_are_not_offered_are_refused() {
    let lab = Lab::new();
    mixed(&lab.path("one.raw"), 1 << 20, 1);
    lab.img("convert -f raw -O qcow2 -c -o compression_type=zstd one.raw zstd");
    lab.img("create -q -f qcow2 -o data_file=data.raw external 1M");
    lab.img("create -q -f qcow2 -o extended_l2=on,cluster_size=64k subclusters 1M");
    // qemu-img can't always make a LUKS image: it measures how many rounds of hashing take how long.
    lab.img("create -q -f qcow2 luks 1M");
    let mut luks = fs::read(lab.path("luks")).unwrap();
    luks[35] = 2; // `crypt_method`, big-endian at 32
    fs::write(lab.path("luks"), luks).unwrap();
    for (name, word) in
        [("zstd", "zstd"), ("external", "data_file"), ("subclusters", "subclusters"), ("luks", "encrypted")]
    {
        let why = why(lab.open(name));
        assert!(why.contains(word), "{name}: {why}");
    }
    assert!(why(lab.open("one.raw")).contains("not a qcow2"));
}

fn corpus(lab: &Lab) -> Vec<(&'static str, Vec<u8>)> {
    mixed(&lab.path("one.raw"), 1 << 20, 5);
    lab.img("convert -f raw -O qcow2 -o cluster_size=4k one.raw plain");
    lab.img("convert -f raw -O qcow2 -c -o cluster_size=4k one.raw packed");
    lab.img("create -q -f qcow2 -o cluster_size=4k -b plain -F qcow2 over");
    lab.io("over", &["write -P 7 100k 100k"]);
    ["plain", "packed", "over"].map(|name| (name, fs::read(lab.path(name)).unwrap())).into()
}

/// Reads all of it in the ways that there are; whether all reads went well.
fn read_all(base: &BaseImage, into: &mut Vec<u8>) -> bool {
    let size = base.size().min(16 << 20);
    into.clear();
    into.resize(size as usize, 0xee);
    let mut good = true;
    for (chunk, at) in into.chunks_mut(64 << 10).zip((0..).step_by(64 << 10)) {
        good &= base.read_at(chunk, at).is_ok();
    }
    let mut at = 0;
    while at < size {
        match base.content_at(at, size - at) {
            Ok(base_image::Content::Data(len) | base_image::Content::Hole(len)) => at += len,
            Err(_) => return false,
        }
    }
    good
}

/// Invariant 4: an image that was cut off (a copy that was broken off) never reads as something else than it was.
#[test]
fn image_that_was_cut_off_reads_as_before_or_not_at_all() {
    let lab = Lab::new();
    for (name, bytes) in corpus(&lab) {
        let expected = lab.converted(name);
        let (mut read, mut refused) = (Vec::new(), 0);
        for len in (0..bytes.len()).rev().step_by(1009).chain((0..bytes.len()).step_by(4096)) {
            fs::write(lab.path(name), &bytes[..len]).unwrap();
            match lab.open(name) {
                Ok(base) if read_all(&base, &mut read) => assert!(read == expected, "{name} of {len} bytes"),
                _ => refused += 1,
            }
        }
        assert!(refused > 50, "{name}: {refused}");
        fs::write(lab.path(name), &bytes).unwrap();
    }
}

/// Invariant 8, for images: however they are damaged, there is an error or there are bytes, no panic and no hang.
#[test]
fn image_that_was_damaged_anywhere_panics_nothing() {
    let lab = Lab::new();
    let corpus = corpus(&lab);
    let mut state = 88_u64;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let path: PathBuf = lab.path("damaged");
    let (mut read, mut opened) = (Vec::new(), 0);
    for round in 0..1500 {
        let (name, bytes) = &corpus[round % corpus.len()];
        let mut bytes = bytes.clone();
        for _ in 0..1 + next(4) {
            // Mostly in the header, its extensions and the tables.
            let at = match next(4) {
                0 => next(112),
                1 => next(1024),
                _ => next(bytes.len().min(48 << 10)),
            };
            match next(3) {
                0 => bytes[at] ^= 1 << next(8),
                1 => bytes[at] = next(256) as u8,
                _ => {
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].fill(if next(2) == 0 { 0xff } else { 0 });
                }
            }
        }
        fs::write(&path, &bytes).unwrap();
        let tried = catch_unwind(AssertUnwindSafe(|| match lab.open("damaged") {
            Ok(base) => {
                read_all(&base, &mut read);
                true
            }
            Err(_) => false,
        }));
        match tried {
            Ok(good) => opened += usize::from(good),
            Err(_) => {
                let keep = std::env::temp_dir().join("panicking.qcow2");
                fs::copy(&path, &keep).unwrap();
                panic!("round {round}, a damaged {name}, kept as {}", keep.display());
            }
        }
    }
    assert!(opened > 300, "{opened}");
}
