//! What a disk's state says about its blocks after a stop, a kill or a power cut. No I/O.
//!
//! Crash order, step 10: every log that is not retired speaks for the blocks it names. A log is exact
//! if it is sealed, or if the live page says how much of it counts; then what it does not name is
//! untouched. After a power cut (no live page) the intents name every region that may have been
//! touched since. A log that should be exact and is not can hide anything: all blocks are pending.
//!
//! The one log that may belong to a session that goes on is the youngest, not sealed, of a session
//! that the live page calls open. What it owns is not pending, whatever older logs say.

use std::fmt;

use base_image::BaseIdentity;
use blocks::{BlockSet, Geometry};
use uuid::Uuid;
use write_log::{LogContents, LogKind, Mark};

use crate::live::LiveMark;
use crate::manifest::{DiskFile, LogEntry, Manifest};

/// A log as it was found: its contents, or why there are none.
pub(crate) type FoundLog = Result<LogContents, String>;

/// Which blocks may not hold the base's contents, and why that is known.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// The pending set.
    pub pending: BlockSet,
    /// How it was found.
    pub basis: Basis,
    /// Whether each log says by itself, without the live page and the intents, all that it knows.
    pub sealed: bool,
    /// The session that goes on.
    pub session: Option<GoesOn>,
}

/// A session that is open and whose log is exact.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GoesOn {
    pub entry: LogEntry,
    /// Where its log goes on.
    pub mark: Mark,
    /// When it was begun, nanoseconds since the epoch.
    pub begun_unix_ns: u64,
}

/// What a verdict rests on, from the best to the worst.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Basis {
    /// No log: the disk was left pristine and nobody wrote to it since.
    Pristine,
    /// Every log is exact.
    ExactLogs,
    /// The live page is gone: readable records and all intended regions.
    Intents,
    /// Something can't be trusted, so nothing is: all blocks.
    Everything(Distrust),
}

/// Why all blocks are pending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// The disk was changed while nobody served it.
    WrittenFromOutside,
    /// The disk is not the file that the state is about: a copy, or restored from a backup.
    AnotherFile,
    /// The state is older than what the disk's file names.
    OlderState,
    /// A log is missing or can't be read; its name, and why.
    LogUnreadable(String, String),
    /// A log is of another disk or another session than the manifest says; its name.
    WrongLog(String),
    /// A log is not what the live page or its seal says; its name.
    LogDamaged(String),
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnotherFile => write!(f, "the disk is another file than its state is about"),
            Self::WrittenFromOutside => write!(f, "the disk was changed from outside while nobody served it"),
            Self::OlderState => {
                write!(f, "the state is older than the disk: it was put back from a copy")
            }
            Self::LogUnreadable(log, why) => write!(f, "write log {log} can't be read: {why}"),
            Self::WrongLog(log) => write!(f, "write log {log} belongs to another disk or session"),
            Self::LogDamaged(log) => write!(f, "write log {log} is damaged"),
        }
    }
}

/// What is known besides the manifest.
pub(crate) struct Evidence<'a> {
    /// The disk as it is now; `None` for a block device, which has no witnesses.
    pub(crate) disk_now: Option<&'a BaseIdentity>,
    /// The host's boot.
    pub(crate) boot: Uuid,
    /// The generation that the disk's file names, if it names one.
    pub(crate) generation: Option<u64>,
    /// The logs of the manifest, in its order.
    pub(crate) logs: Vec<(LogEntry, FoundLog)>,
    /// The live page's mark, if the page is of this boot and this disk.
    pub(crate) live: Option<LiveMark>,
    /// Whether there is a live page of this boot and this disk at all.
    pub(crate) same_boot: bool,
    /// Whether the live page calls a session open that may go on.
    pub(crate) session_open: bool,
    /// The blocks of all intended regions.
    pub(crate) intents: BlockSet,
}

/// Concludes which blocks are pending.
pub(crate) fn conclude(manifest: &Manifest, geometry: Geometry, evidence: Evidence<'_>) -> Verdict {
    let everything = |why| {
        let pending = BlockSet::new(geometry.blocks());
        pending.insert(geometry.all());
        Verdict { pending, basis: Basis::Everything(why), sealed: false, session: None }
    };
    let is_another = manifest.file != evidence.disk_now.and_then(DiskFile::of);
    let is_older = evidence.generation.is_some_and(|named| manifest.generation < named);
    // Of what is kept the latter says more: that it is not to be believed, wherever the file was moved to.
    if is_older && (manifest.kept || !is_another) {
        return everything(Distrust::OlderState);
    }
    if is_another {
        return everything(Distrust::AnotherFile);
    }
    let times = evidence.disk_now.and_then(|now| now.file.as_ref());
    if let (Some(stopped), Some(now)) = (manifest.stopped, times)
        && !stopped.may_be(now.mtime_ns, evidence.boot)
    {
        return everything(Distrust::WrittenFromOutside);
    }
    let pending = BlockSet::new(geometry.blocks());
    if evidence.logs.is_empty() {
        return match (&manifest.pristine_since, evidence.disk_now) {
            (Some(then), Some(now)) if then.change_to(now).is_none() => {
                Verdict { pending, basis: Basis::Pristine, sealed: true, session: None }
            }
            (None, None) => Verdict { pending, basis: Basis::Pristine, sealed: true, session: None },
            _ => everything(Distrust::WrittenFromOutside),
        };
    }
    let (mut exact, mut sealed, mut session) = (true, true, None);
    // Of sessions: what is pending may have been made a log of its own since.
    let sessions = evidence.logs.iter().filter(|(entry, _)| entry.kind() == LogKind::Session);
    let youngest = sessions.map(|(entry, _)| entry.sequence).max();
    for (entry, found) in evidence.logs {
        let name = entry.id().file_name();
        let contents = match found {
            Ok(contents) => contents,
            Err(why) => return everything(Distrust::LogUnreadable(name, why)),
        };
        if !is_the_log(&contents, &entry, manifest.disk, geometry) {
            return everything(Distrust::WrongLog(name));
        }
        sealed &= contents.sealed_blocks().is_some();
        let blocks = match (entry.kind(), contents.sealed_blocks(), evidence.live) {
            (_, Some(blocks), _) => blocks,
            (LogKind::Session, None, Some(live)) if live.sequence == entry.sequence => {
                match contents.blocks_at(live.mark) {
                    Some(blocks) if evidence.session_open && youngest == Some(entry.sequence) => {
                        let begun_unix_ns = contents.header.created_unix_ns;
                        session = Some((GoesOn { entry, mark: live.mark, begun_unix_ns }, blocks));
                        continue;
                    }
                    Some(blocks) => blocks,
                    None => return everything(Distrust::LogDamaged(name)),
                }
            }
            // An earlier session's log is sealed when the session ends, and a kill can't undo that.
            (LogKind::Session, None, _) if !evidence.same_boot => {
                exact = false;
                contents.readable_blocks()
            }
            _ => return everything(Distrust::LogDamaged(name)),
        };
        pending.insert_set(&blocks);
    }
    if !exact {
        pending.insert_set(&evidence.intents);
    }
    let session = session.map(|(session, owned)| {
        owned.runs().for_each(|run| {
            pending.remove(run);
        });
        session
    });
    let basis = if exact { Basis::ExactLogs } else { Basis::Intents };
    Verdict { pending, basis, sealed, session }
}

fn is_the_log(contents: &LogContents, entry: &LogEntry, disk: Uuid, geometry: Geometry) -> bool {
    let header = &contents.header;
    header.id == entry.id()
        && header.kind == entry.kind()
        && header.disk == disk
        && header.geometry == geometry
}

#[cfg(test)]
mod tests;
