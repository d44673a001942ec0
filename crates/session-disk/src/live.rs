//! The live page: what survives the process but not the host.
//!
//! One page of shared memory per disk in the runtime directory (a tmpfs). It says how much of the
//! current log counts, who serves the disk, and who owns the session. A page of an earlier boot or of
//! another disk is as good as none.
//!
//! | word | holds |
//! | --- | --- |
//! | 0 | magic and version |
//! | 1, 2 | boot ID, high and low half |
//! | 3, 4 | disk ID, high and low half |
//! | 5, 6 | the server's pid and start time; 0: stopped |
//! | 7 | which mark counts: 0 none, 1 the first, 2 the second |
//! | 8, 9 | the session owner's pid and start time |
//! | 10, 11 | blocks that are dirty, pending |
//! | 12 | 1 while a session is open; 2 while one begins, which has written nothing and whose log is not named yet |
//! | 13 | 1 while the drain is failing |
//! | 14 | 1 while the disk is pristine: nothing pending, and no log is left |
//! | 15 | the disk's inode number, or its device number |
//! | 16..20, 24..28 | the two marks: log sequence, epoch, committed bytes, CRC |
//! | 20, 21 | the token of the in-flight table of the open session's frontend; 0: none |
//! | 22 | 1 when write-back has failed: what the open session has written may be lost |
//! | 23 | 1 while the guest of the open session counts writes as durable when they are answered |
//! | 28 | 1 while blocks that were pending read as zeroes, and that may not be durable |
//! | 29 | how many are taking the kernel's report of failed write-back, and have not noted yet what it says |

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockio::SharedPage;
use uuid::Uuid;
use write_log::Mark;

use crate::process::{ProcessId, boot_id};
use crate::{Error, paths::Paths};

mod report;

pub(crate) use report::{Report, heed_sync};

/// "prstnlv" and the layout's version.
const MAGIC: u64 = 0x7072_7374_6e6c_7601;

const WORD_BOOT: usize = 1;
const WORD_DISK: usize = 3;
const WORD_SERVER: usize = 5;
const WORD_MARK: usize = 7;
const WORD_OWNER: usize = 8;
const WORD_DIRTY: usize = 10;
const WORD_PENDING: usize = 11;
const WORD_SESSION: usize = 12;
const SESSION_OPEN: u64 = 1;
const SESSION_BEGINS: u64 = 2;
const WORD_DRAIN_FAILING: usize = 13;
const WORD_PRISTINE: usize = 14;
const WORD_FILE: usize = 15;
const WORD_MARKS: [usize; 2] = [16, 24];
const WORD_TOKEN: usize = 20;
const WORD_POISONED: usize = 22;
const WORD_WRITE_THROUGH: usize = 23;
const WORD_ZEROED: usize = 28;
const WORD_ASKING: usize = 29;

/// A log and how much of it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LiveMark {
    pub(crate) sequence: u64,
    pub(crate) mark: Mark,
}

/// What a server before left in the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// Whether the page is of this boot and this disk, and write-back has not failed.
    pub(crate) same_boot: bool,
    /// The mark that counts; only if it is.
    pub(crate) mark: Option<LiveMark>,
    /// Whether a session was open that may go on; only if it is.
    pub(crate) session_open: bool,
    /// Whether one was beginning that may go on with another log; only if it is.
    pub(crate) session_begins: bool,
}

impl Before {
    /// What the page at hand says, if it is of this boot and this disk. Where write-back has failed, what was written may
    /// be lost as in a power cut, so that is what it counts as.
    pub(crate) fn of(live: Option<&LivePage>) -> Self {
        let live = live.filter(|live| !live.is_poisoned());
        Self {
            same_boot: live.is_some(),
            mark: live.and_then(LivePage::mark),
            session_open: live.is_some_and(LivePage::session_is_named),
            session_begins: live.is_some_and(LivePage::session_begins),
        }
    }

    /// The same for whoever takes up no session.
    pub(crate) fn session_over(self) -> Self {
        Self { session_open: false, session_begins: false, ..self }
    }
}

/// A disk's live page.
#[derive(Debug)]
pub(crate) struct LivePage {
    page: SharedPage,
    /// Whether this server has made it its own.
    ours: AtomicBool,
    /// Stands in for words that the page does not have: never read, never missed.
    nowhere: AtomicU64,
    /// Where it lies.
    dir: PathBuf,
}

impl LivePage {
    /// Opens the page of `disk`, whose inode or device number is `file`, for its owner. Says what a server before left;
    /// nothing is changed before [`take_over`](Self::take_over).
    ///
    /// # Errors
    /// If the page is in use for another disk with the same ID, that is a copy: a server has it, also one that can't be seen from
    /// here, or a session is open whose VM lives, and what that owns would be forgotten.
    pub(crate) fn open(paths: &Paths, disk: Uuid, file: u64) -> Result<(Self, Before), Error> {
        paths.create_runtime_dir()?;
        let path = paths.live_page(disk);
        let in_use = |server: Option<ProcessId>| {
            let who = server.map_or("a process".into(), |server| format!("process {}", server.pid));
            let by = format!(
                ": {who} serves another disk with the same ID; a copied disk has to be provisioned anew with --adopt"
            );
            Error::InUse { path: path.clone(), by }
        };
        let Some(page) = SharedPage::open_exclusive(&path)? else {
            return Err(in_use(
                SharedPage::open(&path, false).ok().and_then(|page| Self::of(page, &path).server()),
            ));
        };
        let live = Self::of(page, &path);
        let of_this_disk = live.is_of(boot_id()?, disk);
        // One of a version that takes no lock.
        if let Some(server) = live.server().filter(|server| of_this_disk && server.is_alive())
            && server != ProcessId::own()
        {
            return Err(in_use(Some(server)));
        }
        let same_boot = of_this_disk && live.load(WORD_FILE) == file;
        let goes_on = live.owner().filter(|owner| live.session_is_open() && owner.may_be_alive());
        if let Some(owner) = goes_on.filter(|_| of_this_disk && !same_boot) {
            return Err(Error::InUse {
                path,
                by: format!(
                    ": the session of process {} is open on another disk with the same ID; a copied disk has to be provisioned \
                     anew with --adopt",
                    owner.pid
                ),
            });
        }
        let before = Before::of(same_boot.then_some(&live));
        Ok((live, before))
    }

    /// Makes this server the page's, and leaves the rest as it is: the open session goes on.
    pub(crate) fn go_on(&self) {
        self.set_drain_failing(false);
        self.set_server(Some(ProcessId::own()));
        self.ours.store(true, Ordering::Release);
    }

    /// Makes this server the page's, without a mark, and leaves the session that was beginning: it begins again.
    pub(crate) fn begin_again(&self) {
        self.word(WORD_MARK).store(0, Ordering::Release);
        self.set_dirty(0);
        self.go_on();
    }

    /// Makes the page one of this boot, this disk and this server, without a mark.
    pub(crate) fn take_over(&self, disk: Uuid, file: u64) -> Result<(), Error> {
        let boot = boot_id()?;
        self.word(0).store(0, Ordering::Release);
        self.word(WORD_MARK).store(0, Ordering::Release);
        for (word, value) in [(WORD_BOOT, boot), (WORD_DISK, disk)] {
            let (high, low) = value.as_u64_pair();
            self.word(word).store(high, Ordering::Release);
            self.word(word + 1).store(low, Ordering::Release);
        }
        self.word(WORD_FILE).store(file, Ordering::Release);
        self.set_session_open(false);
        self.set_owner(None);
        self.set_token(None);
        self.set_write_through(false);
        self.set_zeroed(false);
        self.word(WORD_POISONED).store(0, Ordering::Release);
        self.set_dirty(0);
        self.set_drain_failing(false);
        self.set_server(Some(ProcessId::own()));
        self.word(0).store(MAGIC, Ordering::Release);
        self.ours.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens the page for looking only. `None`: there is none of this boot and disk.
    pub(crate) fn inspect(path: &Path, disk: Uuid, file: u64) -> Option<Self> {
        let live = Self::of(SharedPage::open(path, false).ok()?, path);
        (live.is_of(boot_id().ok()?, disk) && live.load(WORD_FILE) == file).then_some(live)
    }

    fn of(page: SharedPage, path: &Path) -> Self {
        let dir = path.parent().unwrap_or(Path::new(".")).to_owned();
        Self { page, ours: AtomicBool::new(false), nowhere: AtomicU64::new(0), dir }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.page.word(index).unwrap_or(&self.nowhere)
    }

    fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn is_of(&self, boot: Uuid, disk: Uuid) -> bool {
        let id = |word| Uuid::from_u64_pair(self.load(word), self.load(word + 1));
        self.load(0) == MAGIC && id(WORD_BOOT) == boot && id(WORD_DISK) == disk
    }

    /// The mark that counts.
    pub(crate) fn mark(&self) -> Option<LiveMark> {
        let slot = *WORD_MARKS.get((self.load(WORD_MARK) as usize).checked_sub(1)?)?;
        Some(LiveMark {
            sequence: self.load(slot),
            mark: Mark {
                epoch: u32::try_from(self.load(slot + 1)).ok()?,
                committed: self.load(slot + 2),
                crc: u32::try_from(self.load(slot + 3)).ok()?,
            },
        })
    }

    /// Makes `mark` the one that counts. A process that is killed at any instruction of it leaves the
    /// old mark or the new one: it is written where none counts, then made to count. One writer at a
    /// time.
    pub(crate) fn set_mark(&self, mark: LiveMark) {
        let next = if self.load(WORD_MARK) == 1 { 2 } else { 1 };
        if let Some(slot) = WORD_MARKS.get(next - 1) {
            self.word(*slot).store(mark.sequence, Ordering::Release);
            self.word(slot + 1).store(mark.mark.epoch.into(), Ordering::Release);
            self.word(slot + 2).store(mark.mark.committed, Ordering::Release);
            self.word(slot + 3).store(mark.mark.crc.into(), Ordering::Release);
        }
        self.word(WORD_MARK).store(next as u64, Ordering::Release);
    }

    fn process(&self, word: usize) -> Option<ProcessId> {
        let pid = u32::try_from(self.load(word)).ok().filter(|pid| *pid != 0)?;
        Some(ProcessId { pid, start_ticks: self.load(word + 1) })
    }

    fn set_process(&self, word: usize, process: Option<ProcessId>) {
        self.word(word + 1).store(process.map_or(0, |p| p.start_ticks), Ordering::Release);
        self.word(word).store(process.map_or(0, |p| p.pid.into()), Ordering::Release);
    }

    /// Who serves the disk, whether that process still lives or not.
    pub(crate) fn server(&self) -> Option<ProcessId> {
        self.process(WORD_SERVER)
    }

    /// Notes who serves the disk.
    pub(crate) fn set_server(&self, process: Option<ProcessId>) {
        self.set_process(WORD_SERVER, process);
    }

    /// Who owns the open session.
    pub(crate) fn owner(&self) -> Option<ProcessId> {
        self.process(WORD_OWNER)
    }

    /// Notes who owns the open session.
    pub(crate) fn set_owner(&self, process: Option<ProcessId>) {
        self.set_process(WORD_OWNER, process);
    }

    /// The token of the in-flight table of the open session's frontend.
    pub(crate) fn token(&self) -> Option<Uuid> {
        let token = Uuid::from_u64_pair(self.load(WORD_TOKEN), self.load(WORD_TOKEN + 1));
        (!token.is_nil()).then_some(token)
    }

    /// Notes the token of the frontend's in-flight table.
    pub(crate) fn set_token(&self, token: Option<Uuid>) {
        let (high, low) = token.unwrap_or_default().as_u64_pair();
        self.word(WORD_TOKEN).store(high, Ordering::Release);
        self.word(WORD_TOKEN + 1).store(low, Ordering::Release);
    }

    /// Whether the guest has chosen the write-through mode.
    pub(crate) fn is_write_through(&self) -> bool {
        self.load(WORD_WRITE_THROUGH) == 1
    }

    /// Notes whether the guest has chosen the write-through mode.
    pub(crate) fn set_write_through(&self, chosen: bool) {
        self.word(WORD_WRITE_THROUGH).store(chosen.into(), Ordering::Release);
    }

    /// Whether blocks of which some were pending read as zeroes that may not be durable.
    pub(crate) fn is_zeroed(&self) -> bool {
        self.load(WORD_ZEROED) == 1
    }

    /// Notes whether there are such blocks.
    pub(crate) fn set_zeroed(&self, zeroed: bool) {
        self.word(WORD_ZEROED).store(zeroed.into(), Ordering::SeqCst);
    }

    /// Notes that write-back has failed.
    pub(crate) fn set_poisoned(&self) {
        self.word(WORD_POISONED).store(1, Ordering::Release);
    }

    /// Whether write-back has failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.load(WORD_POISONED) == 1
    }

    /// Whether write-back has failed since this server has taken the page over. What failed before was judged when it
    /// started: what it may have cost is pending.
    pub(crate) fn was_poisoned_since(&self) -> bool {
        self.ours.load(Ordering::Acquire) && self.is_poisoned()
    }

    /// Whether a session is open that may go on: its VM lives, or nobody can tell.
    pub(crate) fn session_may_go_on(&self) -> bool {
        self.session_is_open() && self.owner().is_none_or(ProcessId::may_be_alive)
    }

    /// Whether a session is open, or begins.
    pub(crate) fn session_is_open(&self) -> bool {
        self.session_is_named() || self.session_begins()
    }

    /// Whether a session is open whose log the manifest names.
    pub(crate) fn session_is_named(&self) -> bool {
        self.load(WORD_SESSION) == SESSION_OPEN
    }

    /// Whether a session begins: reads are served, and nothing is written before it is [named](Self::session_is_named).
    pub(crate) fn session_begins(&self) -> bool {
        self.load(WORD_SESSION) == SESSION_BEGINS
    }

    /// Notes whether a session is open whose log the manifest names.
    pub(crate) fn set_session_open(&self, open: bool) {
        self.word(WORD_SESSION).store(if open { SESSION_OPEN } else { 0 }, Ordering::Release);
    }

    /// Notes that a session begins.
    pub(crate) fn set_session_begins(&self) {
        self.word(WORD_SESSION).store(SESSION_BEGINS, Ordering::Release);
    }

    /// Numbers of dirty and of pending blocks.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.load(WORD_DIRTY), self.load(WORD_PENDING))
    }

    /// Notes the number of dirty blocks.
    pub(crate) fn set_dirty(&self, blocks: u64) {
        self.word(WORD_DIRTY).store(blocks, Ordering::Relaxed);
    }

    /// Notes the number of pending blocks.
    pub(crate) fn set_pending(&self, blocks: u64) {
        self.word(WORD_PENDING).store(blocks, Ordering::Relaxed);
    }

    /// Whether the drain's last attempt failed.
    pub(crate) fn drain_is_failing(&self) -> bool {
        self.load(WORD_DRAIN_FAILING) == 1
    }

    /// Whether the disk is pristine, durably.
    pub(crate) fn is_pristine(&self) -> bool {
        self.load(WORD_PRISTINE) == 1
    }

    /// Notes whether the disk is pristine, durably.
    pub(crate) fn set_pristine(&self, pristine: bool) {
        self.word(WORD_PRISTINE).store(pristine.into(), Ordering::Release);
    }

    /// Notes whether the drain's last attempt failed.
    pub(crate) fn set_drain_failing(&self, failing: bool) {
        self.word(WORD_DRAIN_FAILING).store(failing.into(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(sequence: u64) -> LiveMark {
        LiveMark { sequence, mark: Mark { epoch: 7, committed: sequence * 8, crc: 0xfeed_f00d } }
    }

    const FILE: u64 = 77;

    fn dir() -> (tempfile::TempDir, Paths) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(Path::new("disk"), None, Some(dir.path()));
        (dir, paths)
    }

    fn taken_over(paths: &Paths, disk: Uuid) -> LivePage {
        let (page, _) = LivePage::open(paths, disk, FILE).unwrap();
        page.take_over(disk, FILE).unwrap();
        page
    }

    #[test]
    fn opened_page_has_the_last_mark_of_the_same_disk_and_file_only() {
        let ((_dir, paths), disk) = (dir(), Uuid::from_u128(1));
        let none = Before::default();
        assert_eq!(LivePage::open(&paths, disk, FILE).unwrap().1, none);
        let page = taken_over(&paths, disk);
        page.set_mark(mark(1));
        page.set_mark(mark(2));
        page.set_session_open(true);
        drop(page);
        let (page, before) = LivePage::open(&paths, disk, FILE).unwrap();
        let open = Before { same_boot: true, mark: Some(mark(2)), session_open: true, session_begins: false };
        assert_eq!(before, open);
        page.set_session_begins();
        let begins = Before { session_open: false, session_begins: true, ..open };
        assert_eq!((Before::of(Some(&page)), page.session_is_open()), (begins, true));
        drop(page);
        assert_eq!(LivePage::open(&paths, disk, FILE + 1).unwrap().1, none);
        std::fs::rename(paths.live_page(disk), paths.live_page(Uuid::from_u128(2))).unwrap();
        assert_eq!(LivePage::open(&paths, Uuid::from_u128(2), FILE).unwrap().1, none);
    }

    #[test]
    fn page_of_another_boot_is_none() {
        let ((_dir, paths), disk) = (dir(), Uuid::from_u128(1));
        let page = taken_over(&paths, disk);
        page.set_mark(mark(1));
        page.word(WORD_BOOT).fetch_xor(1, Ordering::AcqRel);
        assert!(LivePage::inspect(&paths.live_page(disk), disk, FILE).is_none());
        drop(page);
        assert!(!LivePage::open(&paths, disk, FILE).unwrap().1.same_boot);
    }

    /// Invariant 7: a copy of a disk, with its state, does not share the live page of the served one.
    #[test]
    fn page_of_a_living_server_is_refused() {
        let ((_dir, paths), disk) = (dir(), Uuid::from_u128(1));
        let page = taken_over(&paths, disk);
        let refused = || {
            let error = LivePage::open(&paths, disk, FILE + 1).unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error}");
            error.to_string()
        };
        assert!(refused().contains(&std::process::id().to_string()));
        // Also one that is not seen to live, or has no name there yet.
        page.set_server(None);
        refused();
        // Not a child: between its fork and its exec it would have the locks of all pages of this process.
        let other = ProcessId::of(std::os::unix::process::parent_id()).unwrap();
        page.set_server(Some(other));
        drop(page);
        assert!(refused().contains(&other.pid.to_string()));
        let path = paths.live_page(disk);
        let page = LivePage::of(SharedPage::open(&path, true).unwrap(), &path);
        page.set_server(Some(ProcessId { start_ticks: other.start_ticks + 1, ..other }));
        drop(page);
        assert!(LivePage::open(&paths, disk, FILE + 1).is_ok());
    }
}
