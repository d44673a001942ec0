//! The backends that are compared, started and stopped for each measurement.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::machine::{self, Place, cpu_seconds};
use super::points::Point;
use crate::PATIENCE;
use crate::client::Score;
use crate::images;
use crate::lab::{Lab, Server};
use crate::peer::{Image, storage_daemon};
use crate::process::Process;
use crate::remote::Remote;

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `pristine serve`, on a session disk that is pristine.
    Pristine,
    /// `qemu-storage-daemon` on an equal raw file, with QEMU's `aio`.
    Daemon(&'static str),
}

impl Display for Backend {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pristine => f.write_str("pristine"),
            Self::Daemon(aio) => write!(f, "qemu-storage-daemon, {aio}"),
        }
    }
}

/// What one measurement gave.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// What the client saw.
    pub score: Score,
    /// Microseconds of processor time that the backend took for a request.
    pub cpu_us: f64,
}

/// Equal disks for all backends in one directory. Not the very same file: `pristine` would notice that
/// another program wrote to it, and rightly take the whole disk for pending.
#[derive(Debug)]
pub struct Bench {
    /// The base image and the session disk.
    pub lab: Lab,
    /// Whether all goes past the host's page cache.
    pub direct: bool,
}

impl Bench {
    /// Makes dense disks of `size` bytes in the lab.
    pub fn new(lab: Lab, size: u64, direct: bool) -> Self {
        images::dense(&lab.base(), size, 1);
        lab.provision(&[]);
        let bench = Self { lab, direct };
        images::dense(&bench.peer_disk(), size, 1);
        bench
    }

    fn peer_disk(&self) -> PathBuf {
        self.lab.path("peer.img")
    }

    /// Starts `backend` with `queues` virtqueues.
    pub fn start(&self, backend: Backend, queues: usize, place: Place) -> Running<'_> {
        let lab = &self.lab;
        let (process, socket) = match backend {
            Backend::Pristine => {
                let mut serve = lab.pristine("serve", &["--queue-size", "512"]);
                serve.arg("--num-queues").arg(queues.to_string());
                serve.arg("--socket-path").arg(lab.socket());
                if self.direct {
                    serve.arg("--direct");
                }
                (Server::start(&place.launched(&serve)).0, lab.socket())
            }
            Backend::Daemon(aio) => {
                let socket = lab.runtime().join("peer");
                let disk = self.peer_disk();
                let image = Image { aio, direct: self.direct, ..Image::raw(&disk) };
                (storage_daemon(place.launcher(), &image, &socket, queues as u32), socket)
            }
        };
        Running { bench: self, backend, process, socket }
    }

    /// Puts the load of `point` on `backend` for `time`; what was written before is written back, what
    /// is read is in memory.
    pub fn measure(&self, backend: Backend, point: Point, time: Duration) -> Sample {
        let disk = match backend {
            Backend::Pristine => self.lab.disk(),
            Backend::Daemon(_) => self.peer_disk(),
        };
        machine::settle(&disk);
        if !self.direct {
            machine::warm(&disk);
        }
        let running = self.start(backend, point.queues, Self::place(point, Place::Backend));
        let sample = running.load(point, time);
        running.stop();
        sample
    }

    /// Two queues need more than one processor, and so do their clients: they are where the kernel
    /// puts them.
    fn place(point: Point, place: Place) -> Place {
        if point.queues == 1 { place } else { Place::Anywhere }
    }
}

/// A backend at work.
#[derive(Debug)]
pub struct Running<'a> {
    bench: &'a Bench,
    backend: Backend,
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Running<'_> {
    /// Puts the load of `point` on it for `time`, by a client in a session of its own.
    pub fn load(&self, point: Point, time: Duration) -> Sample {
        let place = Bench::place(point, Place::Client);
        let mut client = Remote::start_with(place.launcher(), &self.socket);
        let Point { pattern, depth, queues } = point;
        let before = cpu_seconds(self.process.pid());
        let answer = client.ask(&format!("bench {} {depth} {} {queues}", pattern.name(), time.as_secs_f64()));
        let cpu = cpu_seconds(self.process.pid()) - before;
        client.leave();
        let score: Score = answer.parse().unwrap();
        Sample { score, cpu_us: cpu * 1e6 / score.requests as f64 }
    }

    /// Stops it; `pristine` first restores what was written, so that the next backend is not measured
    /// beside a drain.
    pub fn stop(mut self) {
        if self.backend == Backend::Pristine {
            self.bench.lab.wait_pristine();
            return Server(self.process).stop();
        }
        self.process.signal(Signal::TERM);
        self.process.wait(PATIENCE);
        let _ = std::fs::remove_file(&self.socket);
    }
}
