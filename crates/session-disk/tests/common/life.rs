//! The life of a disk in steps: what guests and operators do to it, and a model of what guests must read.
//!
//! Requests lie in *windows*, a few short ranges of the disk, so that they meet in the same blocks. A step that
//! makes no sense in the state the disk is in does nothing, so that any sub-list of steps is a life too.

mod rebase;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockio::GuestBuf;
use blockio::fault::FaultPlan;
use session_disk::{
    CopyCounts, DiskOptions, DiskQueue, Done, DrainObserver, Drainer, Error, HoldReason, Manifest, Request,
    SessionDisk,
};

use super::crash::recorder::Recorder;
use super::gate::Gate;
use super::generations::Generation;
use super::image::{Expected, Image};
pub(crate) use super::session::Known;
use super::session::{Session, reap_all};
pub(crate) use super::steps::{Ask, Counts, Held, Kind, Step};
use super::steps::{QUEUES, Trouble, What, Windows, place};

struct Quiet;

impl DrainObserver for Quiet {
    fn restored(&self, _blocks: u64, _how: CopyCounts, _duration: Duration) {}
}

/// What the guest of an open session knew when, in places of the tape.
struct Chapter<'a> {
    start: Known<'a>,
    /// After this place a kill leaves the session open; `None`: from the beginning on.
    opened: Option<usize>,
    /// Up to here.
    closed: Option<usize>,
    /// Requests were made at the first place and answered at the second; so much had been noted then.
    answers: Vec<(usize, usize, usize)>,
    history: Vec<(u64, Vec<u8>, bool)>,
}

/// A disk that is served, and what its guest knows.
pub(crate) struct Life<'a> {
    base: &'a Image,
    /// What the disk can be moved to; its base is one of them.
    generations: &'a [Generation],
    windows: &'a Windows,
    options: DiskOptions,
    plan: Arc<FaultPlan>,
    gate: Arc<Gate>,
    disk: Option<Arc<SessionDisk>>,
    drainer: Option<Drainer>,
    session: Option<Session<'a>>,
    /// What the last session has written, if that is held.
    kept: Option<Known<'a>>,
    /// Tells the places in a tape, if what was known when is to be told later.
    recorder: Option<Arc<Recorder>>,
    chapters: Vec<Chapter<'a>>,
    pub(crate) counts: Counts,
}

/// Every write of every life in this process has another content.
static STAMPS: AtomicU64 = AtomicU64::new(1);

fn stamp(len: usize) -> Vec<u8> {
    let stamp = STAMPS.fetch_add(1, Ordering::Relaxed) | 0x8000_0000_0000_0000;
    stamp.to_be_bytes().into_iter().cycle().take(len).collect()
}

impl<'a> Life<'a> {
    /// Opens the disk; nobody has a session.
    pub(crate) fn open(options: DiskOptions, base: &'a Image, windows: &'a Windows) -> Self {
        Self::go_on(DiskOptions { resume: false, ..options }, base, windows, None)
    }

    /// Opens the disk, and goes on with the session of which `known` is known.
    pub(crate) fn go_on(
        options: DiskOptions,
        base: &'a Image,
        windows: &'a Windows,
        known: Option<Known<'a>>,
    ) -> Self {
        let plan = FaultPlan::new();
        let gate = Gate::new(options.disk.clone(), options.tape);
        let options = DiskOptions { faults: Some(plan.clone()), tape: Some(gate.clone()), ..options };
        let mut life = Self {
            base,
            generations: &[],
            windows,
            options,
            plan,
            gate,
            disk: None,
            drainer: None,
            session: None,
            kept: None,
            recorder: None,
            chapters: Vec::new(),
            counts: Counts::default(),
        };
        let resume = known.is_some();
        life.session = known.map(|Known { expected, owned }| Session { expected, owned, queues: Vec::new() });
        life.reopen(resume, resume);
        life
    }

    /// From now on the disk can be moved to any of these.
    pub(crate) fn know(&mut self, generations: &'a [Generation]) {
        self.generations = generations;
    }

    /// From now on keeps what is known when.
    pub(crate) fn record(&mut self, recorder: Arc<Recorder>) {
        self.recorder = Some(recorder);
        if self.session.is_some() {
            self.open_chapter(None);
        }
    }

    fn place_in_tape(&self) -> usize {
        self.recorder.as_ref().map_or(0, |recorder| recorder.position())
    }

    fn open_chapter(&mut self, opened: Option<usize>) {
        if let (Some(_), Some(session)) = (&self.recorder, &self.session) {
            let start = Known { expected: session.expected.clone(), owned: session.owned.clone() };
            self.chapters.push(Chapter {
                start,
                opened,
                closed: None,
                answers: Vec::new(),
                history: Vec::new(),
            });
        }
    }

    fn close_chapter(&mut self) {
        let place = self.place_in_tape();
        if let Some(chapter) = self.chapters.last_mut().filter(|chapter| chapter.closed.is_none()) {
            chapter.closed = Some(place);
        }
    }

    /// What was known of the session that a kill at `place` leaves open: right after the I/O before it,
    /// so before what was then answered.
    pub(crate) fn known_at(&self, place: usize) -> Option<Known<'a>> {
        let chapter =
            self.chapters.iter().rev().find(|chapter| chapter.opened.is_none_or(|opened| opened < place))?;
        if chapter.closed.is_some_and(|closed| place > closed) {
            return None;
        }
        let mut known = chapter.start.clone();
        let mut noted = 0;
        for (asked, answered, until) in &chapter.answers {
            if *asked >= place {
                break;
            }
            for (first, bytes, done) in &chapter.history[noted..*until] {
                known.note(*first, bytes, *done && *answered < place);
            }
            noted = *until;
        }
        Some(known)
    }

    /// Opens the disk. If a session was left open and is to go on, it must.
    fn reopen(&mut self, resume: bool, left_open: bool) {
        self.options.resume = resume;
        let logs = Manifest::load(&self.options.paths()).unwrap().logs;
        let disk = SessionDisk::open(&self.options).unwrap();
        let goes_on = resume && left_open && self.session.is_some();
        assert_eq!(disk.session_is_open(), goes_on, "{:?}, {logs:?}", disk.basis());
        self.disk = Some(Arc::clone(&disk));
        if goes_on {
            self.counts.resumed += 1;
            if let Some(session) = &mut self.session {
                session.queues = (0..QUEUES).map(|_| disk.queue(8).unwrap()).collect();
            }
            self.read_windows();
        } else {
            let ended = self.session.take().map(Session::known);
            if disk.held().is_some() && ended.is_some() {
                self.kept = ended;
            }
        }
        self.check_kept();
    }

    /// What is held is as the session has left it.
    fn check_kept(&self) {
        if let Some(kept) = &self.kept {
            for block in &kept.owned {
                kept.expected.check_disk(&self.options.disk, *block);
            }
        }
    }

    fn release(&mut self) {
        self.check_kept();
        self.kept = None;
        // Refused if nothing is held.
        let _ = self.disk().release();
    }

    /// Whether the drain has to wait for a release.
    fn drain_rests(&self) -> bool {
        self.session.is_none() && self.disk().held().is_some()
    }

    pub(crate) fn disk(&self) -> Arc<SessionDisk> {
        Arc::clone(self.disk.as_ref().unwrap())
    }

    pub(crate) fn step(&mut self, step: &Step) {
        self.counts.transitions += 1;
        match step {
            Step::Begin => self.begin(),
            Step::End => self.end(),
            Step::Burst { asks, trouble, checkpoint } => self.burst(asks, *trouble, *checkpoint),
            Step::Kill { asks, trouble, resume } => self.kill(asks, *trouble, *resume),
            Step::PowerCut { asks, trouble } => {
                self.die(asks, *trouble);
                self.counts.power_cuts += 1;
                std::fs::remove_dir_all(self.options.runtime_dir.as_ref().unwrap()).unwrap();
                self.close_chapter();
                (self.session, self.kept) = (None, None);
                self.reopen(false, false);
            }
            Step::Drain => self.drain(),
            Step::TroubledDrain(trouble) => self.troubled_drain(*trouble),
            Step::Drainer(on) => {
                self.drainer = None;
                if *on {
                    self.drainer = Some(Drainer::start(self.disk(), Arc::new(Quiet)).unwrap());
                }
            }
            Step::Checkpoint => self.disk().checkpoint().unwrap(),
            Step::DrainMeets { held, asks, trouble, next_session, checkpoint } => {
                self.drain_meets(*held, asks, *trouble, *next_session, *checkpoint);
            }
            // Refused if there is nothing to keep.
            Step::Hold => _ = self.disk().hold(HoldReason::ByOperator),
            Step::Release => self.release(),
            Step::Restart { resume } => self.restart(*resume),
            Step::Rebase { to, after_kill } => self.rebase(*to, *after_kill),
        }
    }

    pub(crate) fn begin(&mut self) {
        let disk = self.disk();
        if self.session.is_some() || disk.turns_away().is_some() {
            return;
        }
        disk.begin_session(None).unwrap();
        self.counts.sessions += 1;
        let queues = (0..QUEUES).map(|_| disk.queue(8).unwrap()).collect();
        self.session =
            Some(Session { expected: Expected::of_base(self.base), owned: HashSet::new(), queues });
        self.open_chapter(Some(self.place_in_tape()));
    }

    /// Ends the session, after a look at all that it must read.
    pub(crate) fn end(&mut self) {
        if self.session.is_none() {
            return;
        }
        self.read_windows();
        self.close_chapter();
        let ended = self.session.take().map(Session::known);
        self.disk().end_session().unwrap();
        self.kept = ended.filter(|_| self.disk().held().is_some());
        if let Some(drainer) = &self.drainer {
            drainer.wake();
        }
    }

    pub(crate) fn read_windows(&mut self) {
        let disk = self.disk();
        for window in self.windows {
            self.read_blocks(&disk, window.clone());
        }
    }

    /// Reads blocks and compares them with what the session must read.
    pub(crate) fn read_blocks(&mut self, disk: &SessionDisk, blocks: Range<u64>) {
        let Some(session) = &mut self.session else { return };
        self.counts.transitions += 1;
        assert!(session.expected.read(disk, &mut session.queues[0], blocks), "a read failed");
    }

    fn burst(&mut self, asks: &[Ask], trouble: Option<Trouble>, checkpoint: bool) {
        let disk = self.disk();
        self.in_flight(asks, trouble, || {
            if checkpoint {
                disk.checkpoint().unwrap();
            }
        });
    }

    /// Issues requests on sectors that no other request has, calls `meanwhile`, and reaps them all.
    fn in_flight(&mut self, asks: &[Ask], trouble: Option<Trouble>, meanwhile: impl FnOnce()) {
        let asked = self.place_in_tape();
        let Some(session) = &mut self.session else { return meanwhile() };
        let disk = self.disk.as_ref().unwrap();
        if let Some(trouble) = trouble {
            self.plan.rule(trouble.rule());
        }
        let mut taken = HashSet::new();
        let mut pushed: Vec<(Kind, Range<u64>, Vec<u8>, GuestBuf)> = Vec::new();
        for ask in asks {
            self.counts.transitions += 1;
            let window = place(self.windows, self.base.size, ask.at);
            let sectors = window.start..(window.start + ask.sectors).min(window.end);
            if sectors.clone().any(|sector| taken.contains(&sector)) {
                continue;
            }
            taken.extend(sectors.clone());
            let len = (sectors.end - sectors.start) as usize * 512;
            let range = disk.geometry().sectors_at(sectors.start, len as u64).unwrap();
            let (bytes, buf) = (stamp(len), GuestBuf::zeroed(len));
            let request = match ask.kind {
                Kind::Read => Request::Read { range, buf: buf.clone() },
                Kind::Write => {
                    buf.copy_in(0, &bytes);
                    Request::Write { range, buf: buf.clone(), durable: false }
                }
                Kind::Zeroes { may_unmap } => {
                    // What the storage can't do is not offered to guests (tmpfs can only punch).
                    let may_unmap = may_unmap || !disk.supports_write_zeroes();
                    Request::WriteZeroes { range, may_unmap, durable: false }
                }
                Kind::Discard => Request::Discard { range },
                Kind::Flush => Request::Flush,
            };
            let queue = &mut session.queues[ask.queue % QUEUES];
            queue.push(pushed.len() as u64, request);
            // Some passes take several requests, some one.
            if pushed.len().is_multiple_of(3) {
                queue.submit();
            }
            pushed.push((ask.kind, sectors, bytes, buf));
        }
        let mut done: Vec<Done> = Vec::new();
        session.queues.iter_mut().for_each(DiskQueue::submit);
        for _ in 0..2 {
            session.queues.iter_mut().for_each(|queue| queue.reap(&mut done));
        }
        meanwhile();
        self.plan.clear();
        self.plan.release_all();
        reap_all(&mut session.queues, &mut done);
        let may_fail = trouble.is_some_and(|trouble| matches!(trouble.what, What::Fail | What::FailAfter));
        done.sort_by_key(|done| done.token);
        for done in done {
            let (kind, sectors, bytes, buf) = &pushed[done.token as usize];
            let good = done.result.is_ok();
            assert!(good || may_fail, "{kind:?} of {sectors:?}: {:?}", done.result);
            session.answered(*kind, sectors.clone(), bytes, buf, good);
        }
        let news = std::mem::take(&mut session.expected.history);
        let answered = self.place_in_tape();
        if let Some(chapter) = self.chapters.last_mut() {
            chapter.history.extend(news);
            chapter.answers.push((asked, answered, chapter.history.len()));
        }
    }

    /// Gives up the server as a kill does: what is in flight was not answered.
    pub(crate) fn die(&mut self, asks: &[Ask], trouble: Option<Trouble>) {
        self.drainer = None;
        self.in_flight(asks, trouble, || ());
        if let Some(session) = &mut self.session {
            session.queues.clear();
        }
        self.disk = None;
    }

    fn kill(&mut self, asks: &[Ask], trouble: Option<Trouble>, resume: bool) {
        self.die(asks, trouble);
        self.counts.kills += 1;
        if !resume {
            self.close_chapter();
        }
        self.reopen(resume, true);
    }

    fn drain(&mut self) {
        self.drainer = None;
        self.counts.drains += 1;
        if self.drain_rests() {
            assert!(matches!(
                self.disk().drain(&AtomicBool::new(false), &mut |_| ()),
                Err(Error::Held { .. })
            ));
            return;
        }
        self.disk().drain(&AtomicBool::new(false), &mut |_| ()).unwrap();
    }

    fn troubled_drain(&mut self, trouble: Option<Trouble>) {
        self.drainer = None;
        self.counts.drains += 1;
        let stop = AtomicBool::new(false);
        if let Some(trouble) = trouble {
            // Its syncs are not the engine's, so they don't fail.
            self.plan.rule(trouble.rule());
        }
        let _ = self.disk().drain(&stop, &mut |_| {
            if trouble.is_none() {
                stop.store(true, Ordering::Release);
            }
        });
        self.plan.clear();
    }

    /// A drain that is held up, and what happens meanwhile.
    fn drain_meets(
        &mut self,
        held: Held,
        asks: &[Ask],
        trouble: Option<Trouble>,
        next_session: bool,
        checkpoint: bool,
    ) {
        self.drainer = None;
        if self.drain_rests() {
            return;
        }
        self.counts.drains += 1;
        let (disk, plan, gate) = (self.disk(), Arc::clone(&self.plan), Arc::clone(&self.gate));
        match held {
            Held::Operations(trouble) => plan.rule(trouble.rule()),
            // The end of a session that is to be held syncs, and waits for this one.
            Held::Sync if next_session && disk.held().is_some() => {}
            // Its first sync is that of a batch; without one a checkpoint's would be held, and its lock with it.
            Held::Sync if disk.pending_blocks() > 0 => gate.arm(),
            Held::Sync => {}
        }
        std::thread::scope(|scope| {
            let release = Released(&plan, &gate);
            let drain = scope.spawn(|| disk.drain(&AtomicBool::new(false), &mut |_| ()));
            while plan.held() == 0 && !gate.has_stopped() && !drain.is_finished() {
                std::thread::yield_now();
            }
            plan.clear();
            if next_session {
                self.end();
            } else {
                self.in_flight(asks, trouble, || ());
            }
            if checkpoint {
                disk.checkpoint().unwrap();
            }
            if next_session {
                self.begin();
            }
            drop(release);
            let drained = drain.join().unwrap();
            let was_stopped = matches!(drained, Err(Error::Held { .. }));
            assert!(trouble.is_some() || was_stopped || drained.is_ok(), "{drained:?}");
        });
    }

    /// Stops in order and starts again. If this server would go on with a session, the next one finds
    /// it open, otherwise it is over.
    pub(crate) fn restart(&mut self, resume: bool) {
        let leaves_open = self.options.resume;
        if !(leaves_open && resume) {
            self.close_chapter();
        }
        self.quiet_stop();
        self.reopen(resume, leaves_open);
    }

    fn quiet_stop(&mut self) {
        if self.session.is_some() {
            self.read_windows();
        }
        self.drainer = None;
        if let Some(session) = &mut self.session {
            session.queues.clear();
        }
        let left_open = self.disk().stop().unwrap();
        assert_eq!(left_open.is_some(), self.session.is_some() && self.options.resume);
        self.disk = None;
    }

    /// Stops in order, in mid-session. Nothing can be done with this life any more.
    pub(crate) fn disk_stops(&mut self) {
        self.quiet_stop();
    }

    /// Ends the session and stops in order. Nothing can be done with this life any more.
    pub(crate) fn stop(&mut self) {
        self.end();
        self.quiet_stop();
    }

    /// Ends what there is, drains, and compares the disk with the base, byte for byte: invariant 4.
    pub(crate) fn assert_restores_exactly(&mut self) {
        self.end();
        self.drainer = None;
        self.release();
        self.drain();
        assert_eq!(self.disk().pending_blocks(), 0);
        assert_eq!(
            self.base.differences(&self.options.disk),
            Vec::<u64>::new(),
            "blocks that differ from the base"
        );
    }
}

/// Ends all holds when it goes, also when a check has failed.
struct Released<'a>(&'a FaultPlan, &'a Gate);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.clear();
        self.0.release_all();
        self.1.open();
    }
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        // Queues wait for their I/O when they go, also when a check has failed.
        drop(Released(&self.plan, &self.gate));
    }
}
