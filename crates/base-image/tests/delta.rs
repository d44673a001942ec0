//! What two seals say of the difference between two images.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use base_image::{BaseImage, CHUNK_SIZE, Delta, Seal, Trust, seal};
use blocks::{BLOCK_SIZE, Extent};

mod common;
use common::{Lab, mixed};

/// More than two groups of chunks, and a last chunk that is cut short.
const SIZE: u64 = (33 << 20) + 12 * 512;

fn sealed(path: &Path) -> Seal {
    let base = BaseImage::open(path, None, Trust::Directories(&[])).unwrap();
    seal(&base, &AtomicBool::new(false), &mut |_| ()).unwrap();
    Seal::of(path).unwrap().unwrap()
}

fn chunks(numbers: &[u64]) -> Vec<Extent> {
    let blocks = CHUNK_SIZE / BLOCK_SIZE;
    let mut extents = numbers.iter().map(|number| Extent::new(number * blocks, blocks)).collect();
    Extent::normalize(&mut extents);
    extents
}

/// Every chunk that differs is in it, and no other; in both directions.
#[test]
fn delta_between_seals_is_the_chunks_that_differ() {
    let lab = Lab::new();
    let (old, new) = (lab.path("1.raw"), lab.path("2.raw"));
    mixed(&old, SIZE, 7);
    fs::copy(&old, &new).unwrap();
    let (a, b) = (sealed(&old), sealed(&new));
    assert_eq!(Delta::between(&a, &b).unwrap().extents(), []);

    let file = File::options().write(true).open(&new).unwrap();
    let last = SIZE / CHUNK_SIZE;
    for chunk in [0, 1, 255, 256, 300, last] {
        file.write_all_at(b"another", chunk * CHUNK_SIZE + 4000).unwrap();
    }
    let b = sealed(&new);
    let delta = Delta::between(&a, &b).unwrap();
    let mut expected = chunks(&[0, 1, 255, 256, 300]);
    expected.push(Extent::between(last * 16, SIZE.div_ceil(BLOCK_SIZE)));
    assert_eq!(delta.extents(), expected);
    assert_eq!((delta.parent(), delta.child()), (a.generation(), b.generation()));
    assert_eq!(Delta::between(&b, &a).unwrap().extents(), expected);
}

/// What an image has grown by is in the delta as far as it is not zeroes.
#[test]
fn delta_of_a_grown_image_has_what_is_stored_past_the_old_end() {
    let lab = Lab::new();
    let (old, new) = (lab.path("1.raw"), lab.path("2.raw"));
    let size = 40 * CHUNK_SIZE;
    mixed(&old, size, 9);
    fs::copy(&old, &new).unwrap();
    let file = File::options().write(true).open(&new).unwrap();
    file.set_len(600 * CHUNK_SIZE).unwrap();
    file.write_all_at(b"more", 500 * CHUNK_SIZE).unwrap();
    let (a, b) = (sealed(&old), sealed(&new));
    assert_eq!(Delta::between(&a, &b).unwrap().extents(), chunks(&[500]));
    assert_eq!(Delta::between(&b, &a).unwrap().extents(), chunks(&[500]));
}
