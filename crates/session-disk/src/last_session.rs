//! Which blocks the last session wrote, for who wants to keep just these. No I/O.
//!
//! Before its restoring begins a disk holds what its last session wrote, and beside it what earlier sessions have left
//! in blocks that are still pending: the last one never saw that, it read the base there. So only the last session's own
//! log says what of the disk is its content. Opening a disk may have made one set of all logs since; then its log is
//! no longer named by the manifest, but it lies there for audit, and its number says that it is the one.
//!
//! A log is exact if it is sealed, or if the live page says how much of it counts. One that is neither may belong to a
//! session that a power cut has ended: of what it names, not all need have reached the medium, and a block may still hold
//! what an earlier session wrote. It is believed only where it is sure that the host did not go down: then the set that was
//! made of all logs does not have whole regions, as it has after a power cut.

use blocks::{BLOCK_SIZE, BlockSet, Extent, Geometry};
use write_log::{LogContents, LogId, LogKind};

use crate::intents::REGION_SIZE;
use crate::live::Before;
use crate::manifest::{EntryKind, Manifest};
use crate::recover::FoundLog;

/// What is known of a disk of which nothing was restored since its last session ended.
pub(crate) struct Traces<'a> {
    pub(crate) manifest: &'a Manifest,
    pub(crate) geometry: Geometry,
    /// The live page, if it is of this boot and this disk.
    pub(crate) live: Before,
    /// The logs that are there, named by the manifest or not.
    pub(crate) there: &'a [LogId],
    /// Reads one of them.
    pub(crate) read: &'a dyn Fn(LogId) -> FoundLog,
}

/// A session, and the blocks that it owns.
#[derive(Debug)]
pub(crate) struct LastSession {
    pub(crate) sequence: u64,
    pub(crate) blocks: BlockSet,
}

/// Why nobody can say what the last session wrote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unsure {
    #[error("no session has written to it since all of it was last restored")]
    NoSession,
    #[error("write log {0} is not there any more")]
    Gone(u64),
    #[error("write log {log} can't be read: {why}")]
    Unreadable { log: String, why: String },
    #[error("write log {0} is not complete: the host went down, or it is damaged")]
    NotExact(u64),
}

/// Finds the last session.
pub(crate) fn find(traces: &Traces<'_>) -> Result<LastSession, Unsure> {
    let logs = &traces.manifest.logs;
    let named =
        logs.iter().filter(|entry| entry.kind == EntryKind::Session).max_by_key(|entry| entry.sequence);
    if let Some(entry) = named {
        let contents = traces.contents(entry.id())?;
        let marked = || traces.live.mark.filter(|live| live.sequence == entry.sequence);
        let blocks =
            contents.sealed_blocks().or_else(|| marked().and_then(|live| contents.blocks_at(live.mark)));
        return match blocks {
            Some(blocks) => Ok(LastSession { sequence: entry.sequence, blocks }),
            None => Err(Unsure::NotExact(entry.sequence)),
        };
    }
    let Some(all) = logs.iter().max_by_key(|entry| entry.sequence) else { return Err(Unsure::NoSession) };
    let pending = traces.contents(all.id())?.sealed_blocks().ok_or(Unsure::NotExact(all.sequence))?;
    // Each number was given to one log. Those between the session's and this one's are sets like this.
    let mut sequence = all.sequence;
    let contents = loop {
        sequence = sequence.checked_sub(1).filter(|sequence| *sequence > 0).ok_or(Unsure::NoSession)?;
        let mut of_number = traces.there.iter().filter(|id| id.seq == sequence);
        let (Some(id), None) = (of_number.next(), of_number.next()) else {
            return Err(Unsure::Gone(sequence));
        };
        let contents = traces.contents(*id)?;
        if contents.header.kind == LogKind::Session {
            break contents;
        }
    };
    let sealed = contents.sealed_blocks();
    let exact = sealed.is_some();
    let blocks = sealed.unwrap_or_else(|| contents.readable_blocks());
    let is_part = blocks.runs().all(|run| pending.contains_all(run));
    if is_part && (exact || no_power_cut(&blocks, &pending, traces.geometry)) {
        Ok(LastSession { sequence, blocks })
    } else {
        Err(Unsure::NotExact(sequence))
    }
}

/// Whether `pending` can't come of a power cut in a session that owned `blocks`: it would have all of each of their regions.
fn no_power_cut(blocks: &BlockSet, pending: &BlockSet, geometry: Geometry) -> bool {
    let region_blocks = REGION_SIZE / BLOCK_SIZE;
    blocks.runs().any(|run| {
        let regions = run.first() / region_blocks..run.end().div_ceil(region_blocks);
        regions.into_iter().any(|region| {
            let region = Extent::new(region * region_blocks, region_blocks).intersection(geometry.all());
            !pending.contains_all(region)
        })
    })
}

impl Traces<'_> {
    /// A log of this disk.
    fn contents(&self, id: LogId) -> Result<LogContents, Unsure> {
        let unreadable = |why: String| Unsure::Unreadable { log: id.file_name(), why };
        let contents = (self.read)(id).map_err(unreadable)?;
        let header = &contents.header;
        if header.id == id && header.disk == self.manifest.disk && header.geometry == self.geometry {
            Ok(contents)
        } else {
            Err(unreadable("it belongs to another disk or session".into()))
        }
    }
}
