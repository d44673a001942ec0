//! Random sessions on a real disk, against a model in memory, while the drain runs.
//!
//! Several queues work at once on ranges that share blocks but no sectors, so that first touches,
//! fills, claims and the drain meet in the same blocks. Sessions end, servers stop or vanish, live pages get lost.
//! Whatever happens, a session reads its own writes and else the base (invariants 2 and 3), and a drained
//! disk equals the base (invariant 4).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use blockio::{EngineKind, GuestBuf};
use common::Bench;
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use session_disk::{Done, DrainObserver, Drainer, Request, SessionDisk};

const SIZE: usize = (2 << 20) + 512;
const SECTORS: u64 = (SIZE / 512) as u64;

#[derive(Clone, Debug)]
enum Io {
    Read,
    Write,
    Zeroes { may_unmap: bool },
}

#[derive(Clone, Debug)]
enum Step {
    /// Requests that are in flight together: queue, first sector, sectors, what.
    Burst(Vec<(usize, u64, u64, Io)>),
    Discard {
        sector: u64,
        sectors: u64,
    },
    Flush,
    NextSession,
    /// The server stops in order, or vanishes; the session is over.
    Restart {
        in_order: bool,
        lose_live_page: bool,
    },
}

fn io() -> impl Strategy<Value = Io> {
    prop_oneof![2 => Just(Io::Read), 3 => Just(Io::Write), 1 => any::<bool>().prop_map(|may_unmap| Io::Zeroes { may_unmap })]
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![3 => 1u64..20, 1 => 1u64..400];
    let request = (0usize..3, 0..SECTORS, len, io());
    prop_oneof![
        12 => prop::collection::vec(request, 1..24).prop_map(Step::Burst),
        2 => (0..SECTORS, 1u64..600).prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        2 => Just(Step::NextSession),
        1 => any::<(bool, bool)>().prop_map(|(in_order, lose)| Step::Restart { in_order, lose_live_page: lose }),
    ]
}

struct Quiet;

impl DrainObserver for Quiet {
    fn restored(&self, _blocks: u64, _duration: Duration) {}
}

/// A server with an open session, and what its guest has to read.
struct Server {
    disk: Arc<SessionDisk>,
    queues: Vec<session_disk::DiskQueue>,
    drainer: Option<Drainer>,
    model: Vec<u8>,
    owned: Vec<bool>,
    stamp: u8,
}

impl Server {
    fn start(bench: &Bench) -> Self {
        let disk = bench.open();
        disk.begin_session(None).unwrap();
        let queues = (0..3).map(|_| disk.queue(8).unwrap()).collect();
        let drainer = Some(Drainer::start(Arc::clone(&disk), Arc::new(Quiet)).unwrap());
        let owned = vec![false; disk.geometry().blocks() as usize];
        Self { disk, queues, drainer, model: bench.base.clone(), owned, stamp: 0 }
    }

    fn own(&mut self, sector: u64, len: u64) {
        let blocks = sector * 512 / 4096..(sector * 512 + len).div_ceil(4096);
        blocks.for_each(|block| self.owned[block as usize] = true);
    }

    /// Issues requests on sectors that no other request of the burst has, then reaps them all.
    fn burst(&mut self, requests: &[(usize, u64, u64, Io)]) {
        let mut taken = vec![false; SECTORS as usize];
        let mut reads = Vec::new();
        for (token, (queue, sector, sectors, io)) in requests.iter().enumerate() {
            let sectors = (*sectors).min(SECTORS - sector);
            let range = *sector as usize..(sector + sectors) as usize;
            if taken[range.clone()].iter().any(|taken| *taken) {
                continue;
            }
            taken[range].fill(true);
            let bytes = *sector as usize * 512..(sector + sectors) as usize * 512;
            let range = self.disk.geometry().sectors_at(*sector, sectors * 512).unwrap();
            let buf = GuestBuf::zeroed(bytes.len());
            let request = match io {
                Io::Read => {
                    reads.push((bytes, buf.clone()));
                    Request::Read { range, buf }
                }
                Io::Write => {
                    self.stamp = self.stamp.wrapping_add(2) | 1;
                    self.model[bytes].fill(!self.stamp);
                    buf.copy_in(0, &vec![!self.stamp; range.len() as usize]);
                    self.own(*sector, range.len());
                    Request::Write { range, buf, durable: false }
                }
                Io::Zeroes { may_unmap } => {
                    self.model[bytes].fill(0);
                    self.own(*sector, range.len());
                    Request::WriteZeroes { range, may_unmap: *may_unmap, durable: false }
                }
            };
            self.queues[*queue].push(token as u64, request);
            // Some passes take several requests, some one.
            if token % 3 == 0 {
                self.queues[*queue].submit();
            }
        }
        self.reap();
        for (bytes, buf) in reads {
            let mut read = vec![0; bytes.len()];
            buf.copy_out(0, &mut read);
            assert!(read == self.model[bytes.clone()], "wrong bytes in {bytes:?}");
        }
    }

    fn reap(&mut self) {
        let mut done: Vec<Done> = Vec::new();
        self.queues.iter_mut().for_each(|queue| queue.submit());
        loop {
            self.queues.iter_mut().for_each(|queue| queue.reap(&mut done));
            if self.queues.iter().all(|queue| queue.in_flight() == 0) {
                break;
            }
            let mut fds: Vec<PollFd<'_>> = self
                .queues
                .iter()
                .flat_map(|queue| queue.wait_fds())
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            poll(&mut fds, None).unwrap();
        }
        done.into_iter().for_each(|done| done.result.unwrap());
    }

    fn one(&mut self, request: Request) {
        self.queues[0].push(0, request);
        self.reap();
    }

    fn discard(&mut self, sector: u64, sectors: u64) {
        let sectors = sectors.min(SECTORS - sector);
        let range = self.disk.geometry().sectors_at(sector, sectors * 512).unwrap();
        let covered = self.disk.geometry().covered(range);
        for block in covered.first()..covered.end() {
            if self.owned[block as usize] {
                let end = (block as usize * 4096 + 4096).min(SIZE);
                self.model[block as usize * 4096..end].fill(0);
            }
        }
        self.one(Request::Discard { range });
    }

    fn check_all(&mut self) {
        let buf = GuestBuf::zeroed(SIZE);
        let range = self.disk.geometry().sectors_at(0, SIZE as u64).unwrap();
        self.one(Request::Read { range, buf: buf.clone() });
        let mut read = vec![0; SIZE];
        buf.copy_out(0, &mut read);
        let wrong = read.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "first wrong byte");
        let owned = self.owned.iter().filter(|owned| **owned).count() as u64;
        assert_eq!(self.disk.dirty_blocks(), owned);
    }

    fn forget(&mut self, bench: &Bench) {
        self.model = bench.base.clone();
        self.owned.fill(false);
    }

    fn next_session(&mut self, bench: &Bench) {
        self.disk.end_session().unwrap();
        self.disk.begin_session(None).unwrap();
        if let Some(drainer) = &self.drainer {
            drainer.wake();
        }
        self.forget(bench);
    }
}

fn run(steps: &[Step], engine: EngineKind) {
    let bench = Bench::new(SIZE - 4096 - 1024, Some(SIZE as u64), true, engine);
    let mut server = Server::start(&bench);
    for step in steps {
        match step {
            Step::Burst(requests) => server.burst(requests),
            Step::Discard { sector, sectors } => server.discard(*sector, *sectors),
            Step::Flush => server.one(Request::Flush),
            Step::NextSession => {
                server.check_all();
                server.next_session(&bench);
            }
            Step::Restart { in_order, lose_live_page } => {
                server.check_all();
                server.queues.clear();
                server.drainer = None;
                if *in_order {
                    server.disk.stop().unwrap();
                }
                drop(server);
                if *lose_live_page {
                    std::fs::remove_dir_all(bench.dir.path().join("run")).unwrap();
                }
                server = Server::start(&bench);
            }
        }
    }
    server.check_all();
    server.queues.clear();
    server.disk.end_session().unwrap();
    server.drainer = None;
    bench.assert_restores_exactly(&server.disk);
    server.disk.stop().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn sessions_of_random_requests_read_their_writes_or_the_base(steps in prop::collection::vec(step(), 1..30)) {
        run(&steps, EngineKind::IoUring);
    }

    #[test]
    fn sessions_on_the_synchronous_engine_read_their_writes_or_the_base(
        steps in prop::collection::vec(step(), 1..20),
    ) {
        run(&steps, EngineKind::Sync);
    }
}
