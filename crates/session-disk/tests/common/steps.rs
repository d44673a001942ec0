//! The steps of a disk's life, as data: made at random, written down, shrunk.
//!
//! Requests lie in *windows*, a few short ranges of the disk, so that they meet in the same blocks.

use std::ops::Range;

use blockio::fault::{Fault, OpClass, OpInfo};
use serde::{Deserialize, Serialize};

use super::crash::random::Random;

pub(crate) const QUEUES: usize = 3;

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Read,
    Write,
    Zeroes { may_unmap: bool },
    Discard,
    Flush,
}

/// A request: on which queue, where (sectors of all windows, one after the other), how long, what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) queue: usize,
    pub(crate) at: u64,
    pub(crate) sectors: u64,
    pub(crate) kind: Kind,
}

/// What becomes of the operations of a burst: of every `every`-th from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trouble {
    pub(crate) first: u64,
    pub(crate) every: u64,
    pub(crate) what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// They are not made until the others are done.
    LateStart,
    /// They are made at once and complete when the others are done.
    LateEnd,
    /// They are not made, and fail.
    Fail,
    /// They are made, and fail.
    FailAfter,
}

/// What of a drain is held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Held {
    Operations(Trouble),
    Sync,
}

/// A step of a life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Step {
    Begin,
    End,
    /// Requests that are in flight together. With `checkpoint` one is made while they are.
    Burst {
        asks: Vec<Ask>,
        trouble: Option<Trouble>,
        checkpoint: bool,
    },
    /// The server is killed with requests in flight: writes of `trouble` have landed or not, none was
    /// answered. The next one goes on with the session, or takes it for ended.
    Kill {
        asks: Vec<Ask>,
        trouble: Option<Trouble>,
        resume: bool,
    },
    /// The same, and the live page is gone too.
    PowerCut {
        asks: Vec<Ask>,
        trouble: Option<Trouble>,
    },
    Drain,
    /// A drain of which some operations fail, or that is stopped half-way.
    TroubledDrain(Option<Trouble>),
    /// Starts a drain in the background, or stops it.
    Drainer(bool),
    Checkpoint,
    /// What the session leaves is to be kept, and may go.
    Hold,
    Release,
    /// A drain runs and is held up: some of its operations, or its sync. Meanwhile guests make requests,
    /// or one session ends and the next one begins, with a checkpoint or not.
    DrainMeets {
        held: Held,
        asks: Vec<Ask>,
        trouble: Option<Trouble>,
        next_session: bool,
        checkpoint: bool,
    },
    /// An orderly stop and the next start, with or without the session that the one before left open.
    Restart {
        resume: bool,
    },
    /// The server stops in order, or is killed, and the disk is moved to another generation of its base before the next
    /// one starts.
    Rebase {
        to: usize,
        after_kill: bool,
    },
}

/// How many of each thing were done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) transitions: u64,
    pub(crate) sessions: u64,
    pub(crate) drains: u64,
    pub(crate) kills: u64,
    pub(crate) power_cuts: u64,
    pub(crate) resumed: u64,
    pub(crate) rebases: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.transitions += other.transitions;
        self.sessions += other.sessions;
        self.drains += other.drains;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.resumed += other.resumed;
        self.rebases += other.rebases;
    }
}

/// Ranges of blocks that requests are made in.
pub(crate) type Windows = [Range<u64>];

/// The sectors of a window that `at` lies in, from there on; the last window may end with the disk.
pub(crate) fn place(windows: &Windows, size: u64, at: u64) -> Range<u64> {
    let sectors = |window: &Range<u64>| window.start * 8..(window.end * 8).min(size / 512);
    let total: u64 = windows.iter().map(|window| sectors(window).count() as u64).sum();
    let mut at = at % total;
    for window in windows.iter().map(sectors) {
        let len = window.end - window.start;
        if at < len {
            return window.start + at..window.end;
        }
        at -= len;
    }
    unreachable!()
}

impl Ask {
    pub(crate) fn random(random: &mut Random, blocks: u64) -> Self {
        let kind = match random.of(0..20) {
            0..6 => Kind::Read,
            6..15 => Kind::Write,
            15..17 => Kind::Zeroes { may_unmap: random.chance(50) },
            17..19 => Kind::Discard,
            _ => Kind::Flush,
        };
        let (mut at, mut sectors) = (random.of(0..blocks * 8), *random.pick(&[1, 2, 5, 8, 8, 8, 12, 24, 40]));
        if random.chance(50) {
            (at, sectors) = (at / 8 * 8, u64::next_multiple_of(sectors, 8));
        }
        Self { queue: random.of(0..QUEUES as u64) as usize, at, sectors, kind }
    }

    pub(crate) fn some(random: &mut Random, blocks: u64, most: u64) -> Vec<Self> {
        (0..random.of(1..most + 1)).map(|_| Self::random(random, blocks)).collect()
    }
}

impl Trouble {
    pub(crate) fn random(random: &mut Random, of: &[What]) -> Self {
        Self { first: random.of(0..4), every: random.of(1..4), what: *random.pick(of) }
    }

    pub(crate) fn rule(self) -> impl FnMut(&OpInfo) -> Option<Fault> + Send + 'static {
        let mut count = 0u64;
        move |op| {
            // One that fails condemns the disk, and there would be no more to see.
            if op.class == OpClass::SyncData {
                return None;
            }
            let chosen = count >= self.first && (count - self.first).is_multiple_of(self.every);
            count += 1;
            chosen.then_some(match self.what {
                What::LateStart => Fault::HoldBefore,
                What::LateEnd => Fault::HoldAfter,
                What::Fail => Fault::Fail(5),
                What::FailAfter => Fault::FailAfter(5),
            })
        }
    }
}

impl Step {
    /// Any step that is not the end of the world. `blocks` is the size of all windows.
    pub(crate) fn random(random: &mut Random, blocks: u64, threads: bool) -> Self {
        use What::*;
        match random.of(0..103) {
            0..46 => {
                let trouble = random.chance(50).then(|| {
                    Trouble::random(random, &[LateStart, LateStart, LateEnd, LateEnd, Fail, FailAfter])
                });
                Self::Burst { asks: Ask::some(random, blocks, 10), trouble, checkpoint: random.chance(8) }
            }
            46..60 => Self::Begin,
            60..70 => Self::End,
            70..76 => Self::Drain,
            76..80 => {
                Self::TroubledDrain(random.chance(70).then(|| Trouble::random(random, &[Fail, FailAfter])))
            }
            80..83 => Self::Drainer(threads && random.chance(60)),
            83..89 if threads => Self::DrainMeets {
                held: if random.chance(40) {
                    Held::Sync
                } else {
                    Held::Operations(Trouble {
                        first: random.of(0..12),
                        every: *random.pick(&[1, 3, 1000, 1000]),
                        what: *random.pick(&[LateStart, LateEnd]),
                    })
                },
                asks: Ask::some(random, blocks, 8),
                trouble: random.chance(70).then(|| Trouble::random(random, &[Fail, FailAfter])),
                next_session: random.chance(25),
                checkpoint: random.chance(40),
            },
            83..90 => Self::Checkpoint,
            90..92 => Self::Hold,
            92..95 => Self::Release,
            95..97 => Self::Restart { resume: random.chance(50) },
            97..100 => Self::random_kill(random, blocks),
            _ => Self::Rebase { to: random.of(0..6) as usize, after_kill: random.chance(50) },
        }
    }

    pub(crate) fn random_kill(random: &mut Random, blocks: u64) -> Self {
        let trouble = Some(Trouble::random(random, &[What::Fail, What::FailAfter]));
        Self::Kill { asks: Ask::some(random, blocks, 6), trouble, resume: random.chance(50) }
    }

    pub(crate) fn random_power_cut(random: &mut Random, blocks: u64) -> Self {
        let trouble = Some(Trouble::random(random, &[What::Fail, What::FailAfter]));
        Self::PowerCut { asks: Ask::some(random, blocks, 6), trouble }
    }
}
