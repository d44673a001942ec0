use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn look_at(image: &[u8]) -> Layout {
    look(image.len() as u64, &|buf: &mut [u8], at: u64| {
        buf.copy_from_slice(&image[at as usize..][..buf.len()]);
        Ok(())
    })
    .unwrap()
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

/// A GPT of these partitions (first and last sector, name), in the sector `at`.
fn gpt(image: &mut [u8], sector: usize, at: usize, entries_at: usize, partitions: &[(u64, u64, &str)]) {
    let mut entries = vec![0; 128 * 128];
    for (entry, (first, last, name)) in entries.chunks_mut(128).zip(partitions) {
        put(entry, 0, &LINUX);
        put(entry, 32, &first.to_le_bytes());
        put(entry, 40, &last.to_le_bytes());
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        put(entry, 56, &name);
    }
    let mut header = vec![0; 92];
    put(&mut header, 0, b"EFI PART");
    put(&mut header, 12, &92_u32.to_le_bytes());
    put(&mut header, 24, &(at as u64).to_le_bytes());
    put(&mut header, 72, &(entries_at as u64).to_le_bytes());
    put(&mut header, 80, &128_u32.to_le_bytes());
    put(&mut header, 84, &128_u32.to_le_bytes());
    put(&mut header, 88, &gpt::crc32(&entries).to_le_bytes());
    let crc = gpt::crc32(&header);
    put(&mut header, 16, &crc.to_le_bytes());
    put(image, at * sector, &header);
    put(image, entries_at * sector, &entries);
}

fn ext4(image: &mut [u8], at: usize, label: &str) {
    put(image, at + 1024 + 56, &0xef53_u16.to_le_bytes());
    put(image, at + 1024 + 96, &0x40_u32.to_le_bytes());
    put(image, at + 1024 + 120, label.as_bytes());
}

fn mbr_entry(image: &mut [u8], at: usize, kind: u8, first: u32, sectors: u32) {
    image[at + 4] = kind;
    put(image, at + 8, &first.to_le_bytes());
    put(image, at + 12, &sectors.to_le_bytes());
}

#[test]
fn gpt_with_an_ext4_file_system_is_told_by_name_and_label() {
    for sector in [512, 4096] {
        let mut image = vec![0; 4 << 20];
        let megabyte = MIB / sector as u64;
        let partitions = [(megabyte, 2 * megabyte - 1, "boot"), (2 * megabyte, 4 * megabyte - 65, "root é")];
        gpt(&mut image, sector, 1, 2, &partitions);
        ext4(&mut image, 2 << 20, "system");
        let layout = look_at(&image);
        assert_eq!(layout.table, Some("GPT"));
        let [boot, root] = &layout.areas[..] else { panic!("{layout:?}") };
        assert_eq!((boot.offset, boot.len, boot.title().as_str()), (MIB, MIB, "1: boot"));
        assert_eq!(
            (root.name.as_deref(), root.purpose.as_deref()),
            (Some("root é"), Some("Linux file system"))
        );
        assert_eq!((root.title().as_str(), root.kind()), ("2: system", Some("ext4")));
    }
}

#[test]
fn gpt_whose_first_copy_is_damaged_is_read_from_its_second() {
    let mut image = vec![0; 4 << 20];
    let last = image.len() / 512 - 1;
    gpt(&mut image, 512, last, last - 32, &[(2048, 4095, "kept")]);
    assert_eq!(look_at(&image).areas.len(), 1);
    gpt(&mut image, 512, 1, 2, &[(2048, 4095, "first")]);
    assert_eq!(look_at(&image).areas[0].name.as_deref(), Some("first"));
    image[2 * 512 + 56] ^= 1;
    assert_eq!(look_at(&image).areas[0].name.as_deref(), Some("kept"));
    image[last * 512 + 40] ^= 1;
    assert_eq!(look_at(&image), Layout::default());
}

#[test]
fn mbr_with_logical_partitions_is_told_and_its_chain_ends() {
    let mut image = vec![0; 8 << 20];
    for at in [0, 4096 * 512, 8192 * 512] {
        put(&mut image, at + 510, &[0x55, 0xaa]);
    }
    mbr_entry(&mut image, 446, 0x83, 2048, 2048);
    mbr_entry(&mut image, 462, 0x05, 4096, 8192);
    mbr_entry(&mut image, 4096 * 512 + 446, 0x82, 64, 1000);
    mbr_entry(&mut image, 4096 * 512 + 462, 0x05, 4096, 4096);
    mbr_entry(&mut image, 8192 * 512 + 446, 0x07, 64, 1000);
    // And back to the first.
    mbr_entry(&mut image, 8192 * 512 + 462, 0x05, 1, 4096);
    put(&mut image, (8192 + 64) * 512 + 3, b"NTFS    ");
    let layout = look_at(&image);
    let found: Vec<_> =
        layout.areas.iter().map(|a| (a.number.unwrap(), a.offset / 512, a.kind().unwrap())).collect();
    assert_eq!(layout.table, Some("MBR"));
    assert_eq!(found, [(1, 2048, "Linux"), (5, 4160, "Linux swap"), (6, 8256, "NTFS")]);
}

#[test]
fn disk_that_is_a_file_system_is_one_area() {
    let mut image = vec![0; 1 << 20];
    ext4(&mut image, 0, "data\x1b[31m");
    let layout = look_at(&image);
    assert_eq!((layout.table, layout.areas.len()), (None, 1));
    // No text of a guest's reaches a terminal as a command.
    assert_eq!(layout.areas[0].title(), "data[31m");
    // The boot sector of one has the signature of an MBR.
    let mut image = vec![0; 1 << 20];
    put(&mut image, 510, &[0x55, 0xaa]);
    put(&mut image, 82, b"FAT32   ");
    put(&mut image, 71, b"STICK      ");
    mbr_entry(&mut image, 446, 0x83, 1, 100);
    let layout = look_at(&image);
    assert_eq!((layout.table, layout.areas[0].title().as_str()), (None, "STICK"));
    assert_eq!(look_at(&[0; 5000]), Layout::default());
    assert_eq!(look_at(&[]), Layout::default());
}

#[test]
fn partitions_outside_the_disk_or_over_others_are_left_out() {
    let mut image = vec![0; 4 << 20];
    let partitions = [
        (2048, 4095, "good"),
        (3000, 5000, "over it"),
        (6000, 9000, "past the end"),
        (5000, 4000, "turned"),
        (1, u64::MAX, "wraps"),
    ];
    gpt(&mut image, 512, 1, 2, &partitions);
    let names: Vec<_> = look_at(&image).areas.into_iter().map(|area| area.name.unwrap()).collect();
    assert_eq!(names, ["good"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// A guest may have written anything: nothing panics, and what is told lies inside the disk and in order.
    #[test]
    fn look_at_any_bytes_tells_areas_inside_the_disk(
        kind in 0..4,
        changes in prop::collection::vec((0..40_000_usize, any::<u8>()), 0..12),
        fix in any::<bool>(),
        size in prop_oneof![Just(64_usize << 10), 0..(96_usize << 10)],
    ) {
        let mut image = vec![0; 96 << 10];
        match kind {
            0 => gpt(&mut image, 512, 1, 2, &[(40, 99, "a"), (100, 127, "b")]),
            1 => gpt(&mut image, 4096, 1, 2, &[(6, 10, "a")]),
            2 => {
                put(&mut image, 510, &[0x55, 0xaa]);
                mbr_entry(&mut image, 446, 0x83, 10, 20);
                mbr_entry(&mut image, 462, 0x05, 40, 80);
                put(&mut image, 40 * 512 + 510, &[0x55, 0xaa]);
                mbr_entry(&mut image, 40 * 512 + 446, 0x83, 1, 20);
                mbr_entry(&mut image, 40 * 512 + 462, 0x0f, 1, 20);
            }
            _ => ext4(&mut image, 0, "whole"),
        }
        for (at, byte) in &changes {
            image[*at] = *byte;
        }
        if fix && kind == 0 {
            // So that what is changed is also looked at.
            let entries = gpt::crc32(&image[1024..][..128 * 128]);
            put(&mut image, 512 + 88, &entries.to_le_bytes());
            put(&mut image, 512 + 16, &[0; 4]);
            let len = (le32(&image, 512 + 12) as usize).min(512);
            let crc = gpt::crc32(&image[512..][..len]);
            put(&mut image, 512 + 16, &crc.to_le_bytes());
        }
        image.truncate(size);
        let layout = look_at(&image);
        let mut end = 0;
        prop_assert!(layout.areas.len() <= AREAS_MAX);
        for area in layout.areas {
            prop_assert!(area.offset >= end && area.len > 0);
            end = area.offset + area.len;
            prop_assert!(end <= size as u64);
            prop_assert!(!area.title().chars().any(char::is_control));
        }
    }
}
