use base_image::layout::{Area, FileSystem};
use blocks::BlockSet;
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn area(number: u32, offset: u64, len: u64, name: &str) -> Area {
    let filesystem = Some(FileSystem { kind: "ext4", label: None });
    Area { offset, len, number: Some(number), name: Some(name.into()), purpose: None, filesystem }
}

fn layout(areas: Vec<Area>) -> Layout {
    Layout { table: Some("GPT"), areas }
}

#[test]
fn parts_of_a_disk_are_its_partitions_and_what_lies_between() {
    // Partitions as old tools make them: of sectors, not of blocks.
    let layout = layout(vec![area(1, 63 * 512, MIB, "a"), area(2, 63 * 512 + MIB, MIB, "b")]);
    let parts = parts(&layout, 4 * MIB);
    let found: Vec<_> =
        parts.iter().map(|part| (part.name.as_str(), part.extent.first(), part.extent.end())).collect();
    assert_eq!(
        found,
        [
            ("between partitions", 0, 8),
            ("1: a", 8, 264),
            ("2: b", 264, 520),
            ("between partitions", 520, 1024)
        ]
    );
    let alone = super::parts(&Layout::default(), 4097);
    assert_eq!((alone.len(), alone[0].extent), (1, Extent::new(0, 2)));
}

#[test]
fn text_shows_each_partition_and_how_full_each_piece_was_written() {
    let layout = layout(vec![area(1, MIB, MIB, "boot"), area(2, 2 * MIB, 6 * MIB, "root\u{1b}")]);
    let runs = vec![Extent::new(256, 128), Extent::new(1900, 1)];
    let map = Map::new("0002.wlog".into(), 8 * MIB, runs, &layout);
    assert_eq!(map.parts.iter().map(|part| part.written).collect::<Vec<_>>(), [0, 128, 1]);
    let text = text::render(&map, 78);
    // Two rows of 64 for one of eight megabytes: half of them are full.
    let full = "█".repeat(64);
    assert!(text.contains(&format!("1.00 MiB ▏{full}\n")), "{text}");
    assert!(text.contains("1: boot  ext4  1.00 MiB, written 512.00 KiB, 50.00 %"), "{text}");
    assert!(text.contains("129 blocks (516.00 KiB), 6.30 % of the disk, in 2 extents"), "{text}");
    // A single block is one of two that its character stands for.
    assert!(text.contains('▄'), "{text}");
}

#[test]
fn svg_of_names_that_are_markup_shows_them_as_text() {
    let layout = layout(vec![area(1, MIB, 7 * MIB, "<script>&\"")]);
    let map = Map::new("a<b>.wlog\u{7}".into(), 8 * MIB, vec![Extent::new(300, 7)], &layout);
    let svg = svg::render(&map);
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;&amp;&quot;"), "{svg}");
    assert!(svg.contains("a&lt;b&gt;.wlog</text>") && !svg.contains('\u{7}'), "{svg}");
    assert!(svg.contains(">28.00 KiB</text>"), "{svg}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever was written, to a disk of whatever size: nothing is lost, lines fit, and documents are bounded.
    #[test]
    fn pictures_of_any_map_are_bounded_and_whole(
        blocks in 1..5000_u64,
        tail in 0..8_u64,
        runs in prop::collection::vec((0..5000_u64, 1..900_u64), 0..60),
        areas in prop::collection::vec((0..5000_u64, 1..3000_u64, ".{0,60}"), 0..6),
        width in 0..400_usize,
    ) {
        let size = (blocks - 1) * BLOCK_SIZE + (tail + 1) * 512;
        let set = BlockSet::new(blocks);
        runs.iter().for_each(|(first, count)| { set.insert(Extent::new(*first, *count)); });
        let areas = areas.iter().zip(1..).map(|((first, count, name), number)| {
            area(number, first * 512 * 7, count * 512 * 7, name)
        });
        let mut areas: Vec<_> = areas.collect();
        areas.sort_by_key(|area| area.offset);
        let map = Map::new("x.wlog".into(), size, set.runs().collect(), &layout(areas));
        prop_assert_eq!(map.parts.iter().map(|part| part.extent.count()).sum::<u64>(), blocks);
        prop_assert_eq!(map.parts.iter().map(|part| part.written).sum::<u64>(), set.count());
        let text = text::render(&map, width);
        for line in text.lines() {
            prop_assert!(line.chars().count() <= width.clamp(40, 240), "{}", line);
        }
        prop_assert_eq!(text.contains(|c: char| ('▁'..='█').contains(&c)), set.count() > 0);
        let svg = svg::render(&map);
        prop_assert!(svg.len() < 60 << 10);
        prop_assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        prop_assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}

#[test]
fn pictures_of_the_largest_disk_are_drawn() {
    let size = blocks::BLOCKS_MAX * BLOCK_SIZE;
    let runs = vec![Extent::new(0, 1), Extent::new(1 << 20, 1 << 39)];
    let map = Map::new("x".into(), size, runs, &Layout::default());
    assert_eq!(text::render(&map, 80).lines().count(), 5 + 16);
    assert!(svg::render(&map).len() < 60 << 10);
}
