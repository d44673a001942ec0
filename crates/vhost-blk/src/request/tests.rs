use blockio::GuestBuf;
use blocks::Geometry;
use proptest::prelude::*;
use virtio_queue::{
    Queue,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::chain::{INDIRECT, NEXT, WRITE};

/// Two regions that touch each other, and a gap after them.
pub(super) const REGION: u64 = 0x8000;
const MEMORY_LEN: u64 = 2 * REGION;
pub(super) const HEADER_AT: u64 = 0x2000;
pub(super) const STATUS_AT: u64 = 0x2100;
pub(super) const SECTORS: u64 = 2048;
const QUEUE_SIZE: u16 = 64;

pub(super) fn memory() -> Arc<Memory> {
    let regions = [(GuestAddress(0), REGION as usize), (GuestAddress(REGION), REGION as usize)];
    Arc::new(Memory::from_ranges(&regions).unwrap())
}

pub(super) fn disk() -> DiskTraits {
    DiskTraits {
        geometry: Geometry::new(SECTORS * 512).unwrap(),
        serial: *b"serial-0123456789abc",
        logical_block_size: 512,
        discard: true,
        write_zeroes: true,
    }
}

pub(super) fn header(memory: &Memory, at: u64, kind: u32, sector: u64) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}

/// Descriptor `index` of the ring's table, with all its fields.
pub(super) fn store(memory: &Memory, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
    let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
    memory.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
}

/// What was understood, with the buffer of a read or write.
struct Understood {
    status_at: Option<GuestAddress>,
    action: Action,
    buf: Option<GuestBuf>,
}

/// Parses the chain that begins at `head` of the table at 0.
fn parse_head(memory: &Arc<Memory>, head: u16, disk: &DiskTraits, read_only: bool) -> Understood {
    let queue: Queue = MockSplitQueue::new(memory.as_ref(), QUEUE_SIZE).create_queue().unwrap();
    let mut parser = Parser::default();
    parser.begin(memory);
    let Parsed { status_at, action } = parser.parse(Table::of(&queue), head, disk, read_only);
    let buf = match &action {
        Action::Read { data, .. } | Action::Write { data, .. } => {
            let buf = parser.view(*data).unwrap().to_buf();
            assert_eq!(buf.len() as u32, data.len);
            Some(buf)
        }
        _ => None,
    };
    Understood { status_at, action, buf }
}

/// Parses a chain of these descriptors: address, length, device writes.
fn parse(memory: &Arc<Memory>, parts: &[(u64, u32, bool)]) -> Understood {
    parse_with(memory, parts, &disk(), false)
}

fn parse_with(
    memory: &Arc<Memory>,
    parts: &[(u64, u32, bool)],
    disk: &DiskTraits,
    read_only: bool,
) -> Understood {
    for (index, (addr, len, writes)) in parts.iter().enumerate() {
        let next = if index + 1 < parts.len() { NEXT } else { 0 };
        let write = if *writes { WRITE } else { 0 };
        store(memory, 0, index as u16, *addr, *len, next | write, index as u16 + 1);
    }
    parse_head(memory, 0, disk, read_only)
}

fn status(parsed: &Understood) -> Option<Status> {
    match &parsed.action {
        Action::Answer { status, .. } => Some(*status),
        _ => None,
    }
}

fn segments(memory: &Memory, at: u64, segments: &[(u64, u32, u32)]) -> u32 {
    for (index, (sector, count, flags)) in segments.iter().enumerate() {
        let slot = at + index as u64 * 16;
        memory.write_obj(*sector, GuestAddress(slot)).unwrap();
        memory.write_obj(*count, GuestAddress(slot + 8)).unwrap();
        memory.write_obj(*flags, GuestAddress(slot + 12)).unwrap();
    }
    segments.len() as u32 * 16
}

/// A discard or write-zeroes request of these segments.
fn ranges(kind: u32, list: &[(u64, u32, u32)]) -> Understood {
    let memory = memory();
    header(&memory, HEADER_AT, kind, 0);
    let len = segments(&memory, HEADER_AT + 16, list);
    parse(&memory, &[(HEADER_AT, 16 + len, false), (STATUS_AT, 1, true)])
}

#[test]
fn read_in_the_usual_framing_is_understood() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 3);
    let parsed = parse(&memory, &[(HEADER_AT, 16, false), (0x4000, 1024, true), (STATUS_AT, 1, true)]);
    assert_eq!(parsed.status_at, Some(GuestAddress(STATUS_AT)));
    let (Action::Read { range, .. }, Some(buf)) = (parsed.action, parsed.buf) else { panic!() };
    assert_eq!((range.offset(), range.len(), buf.len()), (1536, 1024, 1024));
}

#[test]
fn write_cut_into_odd_descriptors_is_understood() {
    let memory = memory();
    // Header and data in one piece that is cut at 5, 15 and 100 bytes; empty descriptors between.
    header(&memory, HEADER_AT, VIRTIO_BLK_T_OUT, 1);
    let data: Vec<u8> = (0..512).map(|n| n as u8).collect();
    memory.write_slice(&data, GuestAddress(HEADER_AT + 16)).unwrap();
    let parts = [
        (HEADER_AT, 5, false),
        (HEADER_AT + 5, 10, false),
        (0, 0, false),
        (HEADER_AT + 15, 85, false),
        (HEADER_AT + 100, 428, false),
        (0x5000, 3, true),
        (0, 0, true),
    ];
    let parsed = parse(&memory, &parts);
    assert_eq!(parsed.status_at, Some(GuestAddress(0x5002)));
    let (Action::Write { range, .. }, Some(buf)) = (parsed.action, parsed.buf) else { panic!() };
    assert_eq!((range.offset(), range.len()), (512, 512));
    let mut got = vec![0; 512];
    assert_eq!(buf.copy_out(0, &mut got), 512);
    assert_eq!(got, data);
}

#[test]
fn buffer_across_two_regions_is_both_of_their_parts() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let parts = [(HEADER_AT, 16, false), (REGION - 100, 512, true), (STATUS_AT, 1, true)];
    let parsed = parse(&memory, &parts);
    let (Action::Read { .. }, Some(buf)) = (parsed.action, parsed.buf) else { panic!() };
    assert_eq!(buf.parts().iter().map(|part| part.len).collect::<Vec<_>>(), [100, 412]);
    buf.copy_in(0, &[0x5a; 512]);
    let mut got = [0; 512];
    memory.read_slice(&mut got, GuestAddress(REGION - 100)).unwrap();
    assert_eq!(got, [0x5a; 512]);
}

/// Invariant 8: what is kept of a request has a bound, however small the regions are that its frontend has made.
#[test]
fn request_of_more_pieces_than_any_driver_makes_is_an_error() {
    const BYTES: u64 = 1024;
    let bytes = (0..BYTES).map(|byte| (GuestAddress(REGION + byte), 1));
    let regions: Vec<_> = std::iter::once((GuestAddress(0), REGION as usize)).chain(bytes).collect();
    let memory = Arc::new(Memory::from_ranges(&regions).unwrap());
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    for (descriptors, is_understood) in [(4, true), (5, false)] {
        let mut parts = vec![(HEADER_AT, 16, false)];
        parts.extend((0..descriptors).map(|_| (REGION, BYTES as u32, true)));
        parts.push((STATUS_AT, 1, true));
        let parsed = parse(&memory, &parts);
        assert_eq!(parsed.buf.as_ref().map(|buf| buf.parts().len()), is_understood.then_some(4096));
        assert_eq!(status(&parsed), (!is_understood).then_some(Status::IoError));
    }
}

#[test]
fn status_is_the_last_byte_of_the_data_descriptor_if_it_shares_it() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let parsed = parse(&memory, &[(HEADER_AT, 16, false), (0x4000, 513, true)]);
    assert_eq!(parsed.status_at, Some(GuestAddress(0x4200)));
    assert!(matches!(parsed.action, Action::Read { data, .. } if data.len == 512));
}

/// Invariant 8: ranges outside of the disk, and lengths that are no sectors.
#[test]
fn range_that_leaves_the_disk_or_is_no_sectors_is_an_error() {
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let writes = kind == VIRTIO_BLK_T_IN;
        for (sector, len) in [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (u64::MAX, 512),
            (1 << 55, 512),
            ((1 << 55) + 1, 512),
            (0, 511),
            (0, 513),
            (0, 0),
        ] {
            let memory = memory();
            header(&memory, HEADER_AT, kind, sector);
            let parts = [(HEADER_AT, 16, false), (0x4000, len, writes), (STATUS_AT, 1, true)];
            let parsed = parse(&memory, &parts);
            assert_eq!(status(&parsed), Some(Status::IoError), "{kind} {sector} {len}");
            assert!(parsed.status_at.is_some());
        }
    }
}

/// Invariant 8: memory that the guest does not have.
#[test]
fn buffer_outside_of_memory_is_an_error() {
    for (addr, len) in [
        (MEMORY_LEN, 512),
        (MEMORY_LEN - 511, 512),
        (u64::MAX - 511, 512),
        (u64::MAX - 100, 512),
        (0x4000, !511),
    ] {
        let memory = memory();
        header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
        let parts = [(HEADER_AT, 16, false), (addr, len, true), (STATUS_AT, 1, true)];
        assert_eq!(status(&parse(&memory, &parts)), Some(Status::IoError), "{addr:#x} {len}");
    }
}

#[test]
fn chain_without_a_place_for_the_status_has_none() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_OUT, 0);
    for parts in [
        &[(HEADER_AT, 16 + 512, false)][..],
        &[(HEADER_AT, 16, false), (MEMORY_LEN, 1, true)],
        &[(HEADER_AT, 16, false), (u64::MAX, 1, true)],
        &[(HEADER_AT, 16, false), (u64::MAX - 1, 100, true)],
        &[(HEADER_AT, 16, false), (STATUS_AT, 0, true)],
    ] {
        let parsed = parse(&memory, parts);
        assert_eq!((parsed.status_at, status(&parsed)), (None, Some(Status::IoError)));
    }
}

#[test]
fn chain_whose_end_is_not_found_does_nothing() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    // A loop.
    store(&memory, 0, 0, HEADER_AT, 16, NEXT, 1);
    store(&memory, 0, 1, 0x4000, 512, NEXT | WRITE, 1);
    assert_eq!(parse_head(&memory, 0, &disk(), false).status_at, None);
    // Out of the table.
    store(&memory, 0, 1, 0x4000, 513, NEXT | WRITE, QUEUE_SIZE);
    assert_eq!(parse_head(&memory, 0, &disk(), false).status_at, None);
    assert_eq!(parse_head(&memory, QUEUE_SIZE, &disk(), false).status_at, None);
    assert_eq!(parse_head(&memory, u16::MAX, &disk(), false).status_at, None);
    // More than 4 GiB.
    store(&memory, 0, 1, 0x4000, u32::MAX, NEXT | WRITE, 2);
    store(&memory, 0, 2, 0x4000, u32::MAX, WRITE, 0);
    assert_eq!(parse_head(&memory, 0, &disk(), false).status_at, None);
}

#[test]
fn indirect_chain_is_understood_and_a_nested_one_is_not() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let table = 0x6000;
    store(&memory, table, 0, HEADER_AT, 16, NEXT, 1);
    store(&memory, table, 1, 0x4000, 512, NEXT | WRITE, 2);
    store(&memory, table, 2, STATUS_AT, 1, WRITE, 0);
    store(&memory, 0, 0, table, 48, INDIRECT, 0);
    assert!(matches!(parse_head(&memory, 0, &disk(), false).action, Action::Read { .. }));
    store(&memory, table, 2, table, 48, INDIRECT, 0);
    assert_eq!(parse_head(&memory, 0, &disk(), false).status_at, None);
    store(&memory, 0, 0, table, 47, INDIRECT, 0);
    assert_eq!(parse_head(&memory, 0, &disk(), false).status_at, None);
}

/// Invariant 8: the longest chain that is walked is bounded, whatever an indirect table says.
#[test]
fn indirect_chain_that_is_too_long_is_not_followed() {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
    let table = 0x10_0000;
    for (count, is_served) in
        [(DESCRIPTORS_MAX, true), (DESCRIPTORS_MAX + 1, false), (u16::MAX as usize, false)]
    {
        header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
        store(&memory, table, 0, HEADER_AT, 16, NEXT, 1);
        for index in 1..count {
            let last = index + 1 == count;
            let next = if last { 0 } else { NEXT };
            let len = if last { 1 } else { 512 };
            store(&memory, table, index as u16, 0x4000, len, next | WRITE, index as u16 + 1);
        }
        store(&memory, 0, 0, table, count as u32 * 16, INDIRECT, 0);
        let parsed = parse_head(&memory, 0, &disk(), false);
        assert_eq!(matches!(parsed.action, Action::Read { .. }), is_served, "{count}");
        assert_eq!(parsed.status_at.is_some(), is_served);
    }
}

#[test]
fn readable_piece_after_a_writable_one_is_an_error() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let parts = [(STATUS_AT, 1, true), (HEADER_AT, 16, false), (0x4000, 513, true)];
    let parsed = parse(&memory, &parts);
    assert_eq!(status(&parsed), Some(Status::IoError));
    assert_eq!(parsed.status_at, Some(GuestAddress(0x4200)));
}

#[test]
fn header_that_is_too_short_is_an_error() {
    let memory = memory();
    let parsed = parse(&memory, &[(HEADER_AT, 15, false), (0x4000, 512, true), (STATUS_AT, 1, true)]);
    assert_eq!(status(&parsed), Some(Status::IoError));
}

#[test]
fn unknown_types_are_unsupported() {
    // SCSI_CMD, GET_LIFETIME, SECURE_ERASE, zone report, nonsense.
    for kind in [2, 10, 14, 16, 0x8000_0000, u32::MAX] {
        let memory = memory();
        header(&memory, HEADER_AT, kind, 0);
        let parsed = parse(&memory, &[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
        assert_eq!(status(&parsed), Some(Status::Unsupported), "{kind}");
    }
}

#[test]
fn flush_is_understood_on_a_read_only_device_too() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_FLUSH, 0);
    let parts = [(HEADER_AT, 16, false), (STATUS_AT, 1, true)];
    assert!(matches!(parse_with(&memory, &parts, &disk(), true).action, Action::Flush));
}

#[test]
fn get_id_fills_what_there_is_room_for() {
    for (room, written) in [(20, 20), (25, 20), (7, 7)] {
        let memory = memory();
        header(&memory, HEADER_AT, VIRTIO_BLK_T_GET_ID, 0);
        let parsed = parse(&memory, &[(HEADER_AT, 16, false), (0x4000, room, true), (STATUS_AT, 1, true)]);
        let Action::Answer { status, written: got } = parsed.action else { panic!() };
        assert_eq!((status, got), (Status::Ok, written));
        let mut bytes = vec![0; written as usize];
        memory.read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
        assert_eq!(bytes, disk().serial[..written as usize]);
    }
}

#[test]
fn read_only_device_refuses_everything_that_writes() {
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let memory = memory();
        header(&memory, HEADER_AT, kind, 0);
        segments(&memory, HEADER_AT + 16, &[(0, 8, 0)]);
        let parts = [(HEADER_AT, 16 + 512, false), (STATUS_AT, 1, true)];
        assert_eq!(status(&parse_with(&memory, &parts, &disk(), true)), Some(Status::IoError));
    }
}

#[test]
fn disk_that_can_not_discard_answers_unsupported() {
    let memory = memory();
    let disk = DiskTraits { discard: false, write_zeroes: false, ..disk() };
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        header(&memory, HEADER_AT, kind, 0);
        segments(&memory, HEADER_AT + 16, &[(0, 8, 0)]);
        let parts = [(HEADER_AT, 32, false), (STATUS_AT, 1, true)];
        assert_eq!(status(&parse_with(&memory, &parts, &disk, false)), Some(Status::Unsupported));
    }
}

#[test]
fn discard_of_several_segments_is_several_ranges() {
    let parsed = ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (16, 0, 0), (100, 1, 0)]);
    let Action::Discard(ranges) = parsed.action else { panic!() };
    let spans: Vec<_> = ranges.iter().map(|range| (range.offset(), range.len())).collect();
    assert_eq!(spans, [(0, 4096), (51_200, 512)]);
}

#[test]
fn write_zeroes_keeps_each_segments_unmap_flag() {
    let parsed = ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 1), (8, 8, 0)]);
    let Action::WriteZeroes(ranges) = parsed.action else { panic!() };
    assert_eq!(ranges.iter().map(|(_, unmap)| *unmap).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn segments_with_unknown_flags_are_unsupported_as_a_whole() {
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 1),
        (VIRTIO_BLK_T_DISCARD, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, u32::MAX),
    ] {
        // Whatever else is wrong with them.
        let parsed = ranges(kind, &[(u64::MAX, 8, 0), (0, 8, flags)]);
        assert_eq!(status(&parsed), Some(Status::Unsupported), "{kind} {flags}");
    }
}

#[test]
fn segments_out_of_bounds_are_an_error_as_a_whole() {
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for bad in [
            (SECTORS, 1, 0),
            (SECTORS - 1, 2, 0),
            (u64::MAX, 0, 0),
            (1 << 55, 8, 0),
            (0, RANGE_SECTORS_MAX + 1, 0),
            (0, u32::MAX, 0),
        ] {
            let parsed = ranges(kind, &[(0, 8, 0), bad]);
            assert_eq!(status(&parsed), Some(Status::IoError), "{kind} {bad:?}");
        }
        let too_many = vec![(0, 8, 0); RANGE_SEGMENTS_MAX as usize + 1];
        assert_eq!(status(&ranges(kind, &too_many)), Some(Status::IoError));
        assert_eq!(status(&ranges(kind, &[])), Some(Status::IoError));
        assert_eq!(status(&ranges(kind, &[(SECTORS, 0, 0)])), Some(Status::Ok));
        assert!(status(&ranges(kind, &too_many[1..])).is_none());
    }
}

#[test]
fn segments_that_are_cut_in_the_middle_are_an_error() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_DISCARD, 0);
    segments(&memory, HEADER_AT + 16, &[(0, 8, 0), (0, 8, 0)]);
    let parsed = parse(&memory, &[(HEADER_AT, 16 + 24, false), (STATUS_AT, 1, true)]);
    assert_eq!(status(&parsed), Some(Status::IoError));
}

#[test]
fn parsed_buffer_keeps_the_memory_mapped() {
    let memory = memory();
    header(&memory, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let parsed = parse(&memory, &[(HEADER_AT, 16, false), (0x4000, 512, true), (STATUS_AT, 1, true)]);
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(parsed);
    assert_eq!(Arc::strong_count(&memory), 1);
}

/// Addresses that are mostly valid, sometimes at an edge, sometimes nonsense.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0x2000..MEMORY_LEN - 0x1000,
        2 => REGION - 600..REGION + 600,
        1 => MEMORY_LEN - 600..MEMORY_LEN + 600,
        1 => any::<u64>(),
        1 => u64::MAX - 2000..u64::MAX,
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        2 => Just(1u32),
        2 => Just(16u32),
        4 => (0u32..9).prop_map(|sectors| sectors * 512),
        2 => 0u32..2000,
        1 => any::<u32>(),
    ]
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![8 => prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), 1 => any::<u32>()]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..SECTORS, 2 => SECTORS - 8..SECTORS + 8, 1 => any::<u64>()]
}

prop_compose! {
    fn descriptor()(
        addr in address(), len in length(), flags in prop_oneof![6 => 0u16..4, 1 => 0u16..8], next in 0u16..70,
    ) -> (u64, u32, u16, u16) {
        (addr, len, flags, next)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Invariant 8: any chain at all, in any table, is either refused or becomes a request whose
    /// range lies on the disk, whose buffer lies in memory and is as long as the range.
    #[test]
    fn any_chain_is_answered_or_becomes_a_valid_request(
        table in prop::collection::vec(descriptor(), 1..16),
        indirect in prop::collection::vec(descriptor(), 0..16),
        headers in prop::collection::vec((kind(), sector()), 16),
        in_order in any::<bool>(),
        read_only in any::<bool>(),
    ) {
        let memory = memory();
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            header(&memory, HEADER_AT + 0x100 * index as u64, kind, sector);
        }
        for (at, descriptors) in [(0, &table), (0x1800, &indirect)] {
            for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
                // In order: a chain that a driver might make; else links anywhere.
                let last = index + 1 == descriptors.len();
                let (flags, next, addr) = match (in_order, *flags & INDIRECT != 0) {
                    (_, true) => (*flags, *next, 0x1800),
                    (true, _) => (
                        if last { WRITE } else { (flags & WRITE) | NEXT },
                        index as u16 + 1,
                        if index == 0 { HEADER_AT } else { *addr },
                    ),
                    (false, _) => (*flags, *next, *addr),
                };
                store(&memory, at, index as u16, addr, *len, flags, next);
            }
        }
        let traits = disk();
        let parsed = parse_head(&memory, 0, &traits, read_only);
        if let Some(at) = parsed.status_at {
            prop_assert!(memory.address_in_range(at));
        } else {
            prop_assert_eq!(status(&parsed), Some(Status::IoError));
        }
        let mut spans: Vec<BlockRange> = Vec::new();
        let inside = |buf: &GuestBuf| buf.parts().iter().all(|part| {
            memory.iter().any(|region| {
                let start = vm_memory::GuestMemoryRegion::get_host_address(
                    region, vm_memory::MemoryRegionAddress(0),
                ).unwrap() as usize;
                let base = part.base as usize;
                base >= start && base + part.len <= start + REGION as usize
            })
        });
        match &parsed.action {
            Action::Read { range, .. } => {
                let buf = parsed.buf.as_ref().unwrap();
                prop_assert!(buf.len() as u64 == range.len() && inside(buf));
                spans.push(*range);
            }
            Action::Write { range, .. } => {
                let buf = parsed.buf.as_ref().unwrap();
                prop_assert!(!read_only && buf.len() as u64 == range.len() && inside(buf));
                spans.push(*range);
            }
            Action::Discard(ranges) => {
                prop_assert!(!read_only && !ranges.is_empty());
                spans.extend(ranges);
            }
            Action::WriteZeroes(ranges) => {
                prop_assert!(!read_only && !ranges.is_empty());
                spans.extend(ranges.iter().map(|(range, _)| *range));
            }
            Action::Flush | Action::Answer { .. } => {}
        }
        prop_assert!(spans.len() <= RANGE_SEGMENTS_MAX as usize);
        prop_assert!(spans.iter().all(|range| range.end() <= traits.geometry.size()));
    }
}
