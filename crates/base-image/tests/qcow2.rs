//! qcow2 images read as `qemu-img convert` reads them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::fs;
use std::sync::OnceLock;

use base_image::BaseImage;
use proptest::prelude::*;

use common::{Lab, check_content, mixed};

const SIZE: u64 = 6 << 20;

/// An open image, and what it should read as.
struct Image {
    name: &'static str,
    base: BaseImage,
    expected: Vec<u8>,
}

/// Images of every kind, made once.
fn images() -> &'static [Image] {
    static IMAGES: OnceLock<(Lab, Vec<Image>)> = OnceLock::new();
    let (_, images) = IMAGES.get_or_init(|| {
        let lab = Lab::new();
        mixed(&lab.path("one.raw"), SIZE, 1);
        mixed(&lab.path("odd.raw"), SIZE - 512 * 7, 2);
        let from = |name: &str, raw: &str, options: &str| {
            lab.img(&format!("convert -f raw -O qcow2 {options} {raw} {name}"));
        };
        from("plain", "one.raw", "-o cluster_size=64k");
        from("old", "odd.raw", "-o compat=0.10");
        from("tiny", "odd.raw", "-o cluster_size=512");
        from("huge", "odd.raw", "-o cluster_size=2M");
        from("packed", "odd.raw", "-c");
        from("packed4k", "one.raw", "-c -o cluster_size=4k");
        from("packed512", "odd.raw", "-c -o cluster_size=512");
        from("packed2m", "one.raw", "-c -o cluster_size=2M");
        from("metadata", "one.raw", "-o preallocation=metadata");
        // Chains: over a raw file, over qcow2, larger and smaller than what they lie on.
        lab.img(&format!("create -q -f qcow2 -b one.raw -F raw over_raw {}", SIZE + (1 << 20)));
        lab.io("over_raw", &["write -P 7 1000k 100k", "write -z 3M 200k", &format!("write -P 8 {SIZE} 64k")]);
        lab.img(&format!(
            "create -q -f qcow2 -o cluster_size=4k -b over_raw -F qcow2 top {}",
            SIZE + (2 << 20)
        ));
        lab.io("top", &["write -P 9 1050k 20k", "write -z 0 4k", "write -P 1 7M 1k"]);
        lab.img("create -q -f qcow2 -b packed -F qcow2 smaller 3M");
        lab.io("smaller", &["write -P 5 2M 3k", "discard 1M 64k"]);
        // Old ones on old ones, as they are stated in version 2.
        lab.img("create -q -f qcow2 -o compat=0.10 -b old -F qcow2 old_on_old");
        lab.io("old_on_old", &["write -P 6 2M 70k", "write -P 4 5000k 1k"]);
        lab.img(&format!(
            "create -q -f qcow2 -o compat=0.10,cluster_size=512 -b one.raw -F raw old_on_raw {}",
            SIZE + 512
        ));
        lab.io("old_on_raw", &["write -P 2 300k 3k"]);
        // Written to after it was compressed, and with a snapshot that is not to be seen.
        from("rewritten", "one.raw", "-c");
        lab.img("snapshot -c before rewritten");
        lab.io("rewritten", &["write -P 3 100k 300k", "write -z 1M 128k", "discard 2M 128k"]);
        lab.img("create -q -f qcow2 empty 5M");
        let names = [
            "plain",
            "old",
            "tiny",
            "huge",
            "packed",
            "packed4k",
            "packed512",
            "packed2m",
            "metadata",
            "over_raw",
            "top",
            "smaller",
            "rewritten",
            "old_on_old",
            "old_on_raw",
            "empty",
        ];
        let open = |name| Image { name, base: lab.open(name).unwrap(), expected: lab.converted(name) };
        let images = names.map(open).into_iter().collect();
        (lab, images)
    });
    images
}

#[test]
fn image_of_every_kind_reads_as_qemu_img_converts_it() {
    for Image { name, base, expected } in images() {
        assert_eq!(base.size(), expected.len() as u64, "{name}");
        let mut bytes = vec![0xee; expected.len() + 1000];
        base.read_at(&mut bytes, 0).unwrap();
        let differs = bytes.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{name} differs from there on");
        assert!(bytes[expected.len()..].iter().all(|byte| *byte == 0), "{name} does not end in zeroes");
    }
}

/// Invariant 4: where the base has holes the disk can have holes.
#[test]
fn holes_of_every_image_are_zeroes_and_what_is_not_stored_is_a_hole() {
    for Image { name, base, expected } in images() {
        let data = check_content(base, expected);
        match *name {
            "empty" => assert_eq!(data, 0),
            // All clusters have a place, or are so large that each has some data.
            "metadata" | "huge" | "packed2m" => assert_eq!(data, base.size(), "{name}"),
            // As many bytes as clusters are stored.
            _ => assert!(data > 1 << 20 && data < base.size(), "{name}: {data} of {}", base.size()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_range_of_any_image_reads_as_converted(which in 0..16_usize, at in 0..SIZE, len in 1..300_000_usize) {
        let Image { name, base, expected } = &images()[which];
        let mut bytes = vec![0xee; len];
        base.read_at(&mut bytes, at).unwrap();
        let begin = (at as usize).min(expected.len());
        let end = (begin + len).min(expected.len());
        prop_assert!(bytes[..end - begin] == expected[begin..end], "{} at {}", name, at);
        prop_assert!(bytes[end - begin..].iter().all(|byte| *byte == 0));
    }
}

/// Invariant 5: all files of a chain are witnesses, and none is ever written.
#[test]
fn identity_changes_with_any_file_of_the_chain() {
    let lab = Lab::new();
    mixed(&lab.path("bottom.raw"), 1 << 20, 3);
    lab.img("create -q -f qcow2 -b bottom.raw -F raw middle");
    lab.img("create -q -f qcow2 -b middle -F qcow2 top");
    for file in ["bottom.raw", "middle", "top"] {
        let base = lab.open("top").unwrap();
        let identity = base.identity().unwrap();
        assert_eq!(identity.backing.len(), 2);
        base.check(&identity).unwrap();
        let json = serde_json::to_string(&identity).unwrap();
        assert_eq!(serde_json::from_str::<base_image::BaseIdentity>(&json).unwrap(), identity);
        // File systems keep times at the granularity of a clock tick: touch until it shows.
        while base.identity().unwrap() == identity {
            let bytes = fs::read(lab.path(file)).unwrap();
            std::os::unix::fs::FileExt::write_all_at(
                &fs::File::options().write(true).open(lab.path(file)).unwrap(),
                &bytes[..512],
                0,
            )
            .unwrap();
        }
        let error = base.check(&identity).unwrap_err().to_string();
        assert!(error.contains("was written to"), "{error}");
        assert!(file == "top" || error.contains(file), "{error}");
    }
}
