use proptest::prelude::*;
use virtio_queue::{Queue, mock::MockSplitQueue};

use super::*;
use crate::chain::{INDIRECT, NEXT, WRITE};
use crate::request::tests::{HEADER_AT, REGION, SECTORS, STATUS_AT, disk, header, memory, store};

const TABLE: u64 = 0;
const INDIRECT_TABLE: u64 = 0x1000;

/// A chain as most drivers make them, by its fields, with what is to be wrong with it.
#[derive(Clone, Debug)]
struct Chain {
    indirect: bool,
    /// Descriptors in the queue's table.
    size: u16,
    descriptors: [(u64, u32, u16, u16); 3],
    kind: u32,
    sector: u64,
    /// Length of the indirect table in bytes.
    table_len: u32,
}

impl Chain {
    fn usual(writes: bool, indirect: bool) -> Self {
        let data = if writes { NEXT } else { NEXT | WRITE };
        Self {
            indirect,
            size: 16,
            descriptors: [(HEADER_AT, 16, NEXT, 1), (0x4000, 4096, data, 2), (STATUS_AT, 1, WRITE, 0)],
            kind: if writes { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN },
            sector: 8,
            table_len: 48,
        }
    }

    /// What comes of it in each of the two ways, with the host memory of its data.
    fn parsed(&self, read_only: bool) -> (Option<String>, String) {
        let memory = memory();
        let mut at = TABLE;
        if self.indirect {
            store(&memory, at, 0, INDIRECT_TABLE, self.table_len, INDIRECT, 0);
            at = INDIRECT_TABLE;
        }
        for (index, (addr, len, flags, next)) in (0..).zip(self.descriptors) {
            store(&memory, at, index, addr, len, flags, next);
        }
        header(&memory, HEADER_AT, self.kind, self.sector);
        let queue: Queue = MockSplitQueue::new(memory.as_ref(), self.size).create_queue().unwrap();
        let disk = disk();
        let mut parser = Parser::default();
        parser.begin(&memory);
        let tell =
            |parser: &Parser, parsed: Parsed| format!("{parsed:?} {:?} {}", parser.parts, parser.bytes);
        let nothing = format!("{:?} {}", parser.parts, parser.bytes);
        let usual = parser.parse_usual(Table::of(&queue), 0, &disk, read_only);
        let usual = usual.map(|parsed| tell(&parser, parsed));
        assert!(usual.is_some() || format!("{:?} {}", parser.parts, parser.bytes) == nothing);
        parser.begin(&memory);
        let any = parser.parse_any(Table::of(&queue), 0, &disk, read_only);
        (usual, tell(&parser, any))
    }
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..2 * REGION,
        REGION - 5000..REGION + 5000,
        2 * REGION - 5000..2 * REGION + 100,
        any::<u64>(),
        u64::MAX - 5000..u64::MAX
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..40, (0u32..20).prop_map(|sectors| sectors * 512), any::<u32>()]
}

/// What a guest may do to a usual chain.
#[derive(Clone, Debug)]
enum Change {
    Address(usize, u64),
    Length(usize, u32),
    Flags(usize, u16),
    Next(usize, u16),
    Size(u16),
    TableLength(u32),
    Kind(u32),
    Sector(u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0usize..3, address()).prop_map(|(index, at)| Change::Address(index, at)),
        (0usize..3, length()).prop_map(|(index, len)| Change::Length(index, len)),
        (0usize..3, prop_oneof![0u16..8, any::<u16>()])
            .prop_map(|(index, flags)| Change::Flags(index, flags)),
        (0usize..3, prop_oneof![0u16..4, any::<u16>()]).prop_map(|(index, next)| Change::Next(index, next)),
        prop::sample::select(vec![1u16, 2, 4, 8]).prop_map(Change::Size),
        prop_oneof![(0u32..6).prop_map(|count| count * 16), 0u32..70].prop_map(Change::TableLength),
        prop_oneof![0u32..15, any::<u32>()].prop_map(Change::Kind),
        prop_oneof![0..SECTORS + 8, any::<u64>()].prop_map(Change::Sector),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Invariant 8: what is understood in the short way is what the long way makes of it.
    #[test]
    fn request_that_is_usual_is_what_it_is_of_any_framing(
        (writes, indirect, read_only) in any::<(bool, bool, bool)>(),
        changes in prop::collection::vec(change(), 0..4),
    ) {
        let mut chain = Chain::usual(writes, indirect);
        for change in changes {
            match change {
                Change::Address(index, at) => chain.descriptors[index].0 = at,
                Change::Length(index, len) => chain.descriptors[index].1 = len,
                Change::Flags(index, flags) => chain.descriptors[index].2 = flags,
                Change::Next(index, next) => chain.descriptors[index].3 = next,
                Change::Size(size) => chain.size = size,
                Change::TableLength(len) => chain.table_len = len,
                Change::Kind(kind) => chain.kind = kind,
                Change::Sector(sector) => chain.sector = sector,
            }
        }
        let (usual, any) = chain.parsed(read_only);
        if let Some(usual) = usual {
            prop_assert_eq!(usual, any);
        }
    }
}

#[test]
fn request_as_drivers_make_it_is_usual() {
    for (writes, indirect) in [(false, false), (true, false), (false, true), (true, true)] {
        let (usual, any) = Chain::usual(writes, indirect).parsed(false);
        assert_eq!(usual, Some(any));
    }
    assert_eq!(Chain::usual(true, true).parsed(true).0, None);
}
