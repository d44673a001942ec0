//! Images that are made here are what QEMU takes them for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use base_image::{BaseFormat, CLUSTER_SIZE, Overlay};
use common::{Lab, mixed, run};

const CLUSTER: usize = CLUSTER_SIZE as usize;

fn create(lab: &Lab, size: u64, backing: &str, format: BaseFormat) -> Overlay {
    let file = File::options().read(true).write(true).create_new(true).open(lab.path("new.qcow2")).unwrap();
    Overlay::create(file, size, &lab.path(backing), format).unwrap()
}

/// Writes some clusters, makes others zeroes, and does the same to `expected`.
fn change(overlay: &Overlay, expected: &mut [u8]) {
    let clusters = expected.len().div_ceil(CLUSTER);
    for cluster in 0..clusters {
        let at = cluster * CLUSTER;
        let end = (at + CLUSTER).min(expected.len());
        match cluster % 5 {
            // The last one is short, and is written in both ways, by the size of the disk.
            0 => overlay.zero(at as u64, (end - at) as u64).map(|()| expected[at..end].fill(0)).unwrap(),
            2 | 3 => {
                expected[at..end].iter_mut().zip(cluster..).for_each(|(byte, n)| *byte = (n * 7) as u8 | 1);
                overlay.write(&expected[at..end], at as u64).unwrap();
            }
            _ => {}
        }
    }
}

#[track_caller]
fn assert_is(lab: &Lab, expected: &[u8], info: &[&str]) {
    let image = lab.path("new.qcow2");
    // Not even clusters that are leaked: it would exit with 3.
    run(Command::new("qemu-img").arg("check").arg("-q").arg(&image));
    let told = Command::new("qemu-img").arg("info").arg(&image).output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    for words in info {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert!(lab.converted("new.qcow2") == expected, "the image reads as something else");
}

/// On raw and qcow2 images that are shorter, as long, and cut off within a cluster: what is written is there, what is not is
/// the base's, past its end there are zeroes, and `qemu-img check` finds nothing.
#[test]
fn overlay_reads_as_the_base_with_what_was_written() {
    const MIB: u64 = 1 << 20;
    let cases = [
        (2 * MIB, 2 * MIB),
        (2 * MIB + 512, 2 * MIB + 512),
        (MIB - 1536, MIB - 1536 + 3 * CLUSTER_SIZE),
        (MIB + 8192, 9 * MIB + 4096),
        (512, 512),
    ];
    for (base_size, size) in cases {
        for format in [BaseFormat::Raw, BaseFormat::Qcow2] {
            let lab = Lab::new();
            mixed(&lab.path("base.raw"), base_size, base_size);
            let mut expected = fs::read(lab.path("base.raw")).unwrap();
            expected.resize(size as usize, 0);
            let backing = format!("base.{format}");
            if format == BaseFormat::Qcow2 {
                lab.img("convert -O qcow2 base.raw base.qcow2");
            }
            let overlay = create(&lab, size, &backing, format);
            change(&overlay, &mut expected);
            overlay.finish().unwrap();
            let format = format!("backing file format: {format}");
            assert_is(&lab, &expected, &["compat: 1.1", &backing, &format]);
        }
    }
}

/// More tables than one: the disk is larger than what one of each kind describes (512 MiB), far apart.
#[test]
fn overlay_of_a_large_disk_is_small_and_right() {
    let lab = Lab::new();
    File::create(lab.path("base.raw")).unwrap().set_len(1 << 40).unwrap();
    let overlay = create(&lab, 1 << 40, "base.raw", BaseFormat::Raw);
    let places: Vec<u64> = (0..40).map(|n| n * ((1 << 40) / 40) / CLUSTER_SIZE * CLUSTER_SIZE).collect();
    for place in &places {
        overlay.write(&vec![(place >> 30) as u8 | 1; CLUSTER], *place).unwrap();
    }
    overlay.finish().unwrap();
    let image = lab.path("new.qcow2");
    run(Command::new("qemu-img").arg("check").arg("-q").arg(&image));
    assert!(fs::metadata(&image).unwrap().len() < 16 << 20);
    let mut io = Command::new("qemu-io");
    io.args(["-r", "-f", "qcow2"]).arg(&image);
    for place in &places {
        let byte = (place >> 30) as u8 | 1;
        io.arg("-c").arg(format!("read -P {byte} {place} {CLUSTER}"));
        io.arg("-c").arg(format!("read -P 0 {} {CLUSTER}", place + CLUSTER_SIZE));
    }
    let output = io.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("failed"), "{said}");
}

/// A cluster that is written by halves would have the other half zeroed: that can't be asked for.
#[test]
fn write_of_part_of_a_cluster_or_past_the_end_is_refused() {
    let lab = Lab::new();
    let size = 3 * CLUSTER_SIZE + 512;
    mixed(&lab.path("base.raw"), size, 5);
    let overlay = create(&lab, size, "base.raw", BaseFormat::Raw);
    for (offset, len) in
        [(0, 512), (512, CLUSTER), (0, CLUSTER + 512), (3 * CLUSTER_SIZE, 1024), (u64::MAX, 2)]
    {
        assert!(overlay.write(&vec![1; len], offset).is_err(), "{offset} {len}");
        assert!(overlay.zero(offset, len as u64).is_err(), "{offset} {len}");
    }
    overlay.finish().unwrap();
    let expected = fs::read(lab.path("base.raw")).unwrap();
    assert_is(&lab, &expected, &[]);
}

#[test]
fn backing_file_that_qcow2_cannot_name_is_refused() {
    let lab = Lab::new();
    let file = || tempfile::tempfile_in(lab.0.path()).unwrap();
    let long = format!("/{}", "x".repeat(1023));
    for name in ["", long.as_str()] {
        let error = Overlay::create(file(), 1 << 20, Path::new(name), BaseFormat::Raw).unwrap_err();
        assert!(error.to_string().contains("backing file"), "{error}");
    }
    Overlay::create(file(), 1 << 20, Path::new(&long[..1023]), BaseFormat::Raw).unwrap().finish().unwrap();
}
