//! Makes the fixtures: logs of format version 1, always the same bytes.

use blocks::{BlockSet, Extent};
use write_log::{LogKind, LogWriter, Mark};

use super::{MemFile, header, small_log};

/// A log, and the place after its last good append.
pub struct Fixture {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub mark: Option<Mark>,
}

/// All of them. What each must be read as is in `tests/fixtures.rs`.
pub fn all() -> Vec<Fixture> {
    let torn = session(7, false);
    let mut torn_bytes = torn.0.clone();
    // The head of an append and a part of its record reached the file.
    let end = 4096 + torn.1.committed as usize;
    torn_bytes[end..end + 20]
        .copy_from_slice(&[b'w', b'l', b'f', 1, 1, 0, 0, 0, 8, 0, 0, 0, 0x12, 0x34, 0x56, 0x78, 1, 0, 0, 0]);
    let mut newer = session(7, true).0;
    newer[8] = 2;
    let crc = crc32c::crc32c(&newer[..4092]).to_le_bytes();
    newer[4092..4096].copy_from_slice(&crc);
    let mut damaged = session(7, false);
    damaged.0[4096 + 40] ^= 0x40;
    let sparse = [Extent::new(0, 2), Extent::new(500, 100), Extent::new(999, 1)];
    let dense: Vec<Extent> = (0..500).map(|n| Extent::new(n * 2, 1)).collect();
    let fixture = |name, (bytes, mark)| Fixture { name, bytes, mark: Some(mark) };
    vec![
        fixture("v1-session.wlog", session(7, false)),
        fixture("v1-session-sealed.wlog", session(7, true)),
        fixture("v1-session-rewritten.wlog", session(250, true)),
        fixture("v1-session-torn.wlog", (torn_bytes, torn.1)),
        fixture("v1-session-damaged.wlog", damaged),
        Fixture { name: "v1-pending-extents.wlog", bytes: pending(&sparse), mark: None },
        Fixture { name: "v1-pending-bitmap.wlog", bytes: pending(&dense), mark: None },
        Fixture { name: "v2-unknown.wlog", bytes: newer, mark: None },
    ]
}

/// Appends blocks 4n to 4n+2 for n below `appends`.
fn session(appends: u64, seal: bool) -> (Vec<u8>, Mark) {
    let (file, mut log) = small_log(1000);
    let owned = BlockSet::new(1000);
    for n in 0..appends {
        let extent = Extent::new(n * 4, 3);
        log.append(&[extent], &owned).unwrap();
        owned.insert(extent);
    }
    if seal {
        log.seal(owned.count()).unwrap();
    }
    (file.bytes(), log.mark())
}

fn pending(extents: &[Extent]) -> Vec<u8> {
    let set = super::set_of(1000, extents);
    let file = MemFile::default();
    let header = header(LogKind::Pending, 1000);
    LogWriter::write_pending_on(Box::new(file.clone()), super::path(), &header, &set).unwrap();
    file.bytes()
}
