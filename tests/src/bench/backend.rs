//! The backends that are compared, started and stopped for each measurement.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::machine::{self, Place, cpu_seconds};
use super::points::Point;
use crate::PATIENCE;
use crate::client::{Loop, Score};
use crate::images;
use crate::lab::{Lab, Server};
use crate::peer::{Image, storage_daemon};
use crate::process::Process;
use crate::program::run;
use crate::remote::Remote;

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `pristine serve`, on a session disk that is pristine.
    Pristine,
    /// `qemu-storage-daemon` on an equal raw file, with QEMU's `aio`.
    Daemon(&'static str),
    /// `qemu-storage-daemon` with io_uring on a new qcow2 overlay of the base image.
    FreshOverlay,
    /// `qemu-storage-daemon` with io_uring on a qcow2 overlay that has all blocks already.
    FullOverlay,
    /// A plain loop on a file, without backend.
    Limit(Loop),
}

impl Display for Backend {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pristine => f.write_str("pristine"),
            Self::Daemon(aio) => write!(f, "qemu-storage-daemon, {aio}"),
            Self::FreshOverlay => f.write_str("qcow2 overlay, fresh"),
            Self::FullOverlay => f.write_str("qcow2 overlay, allocated"),
            Self::Limit(way) => write!(f, "limit, {}", way.name()),
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

    /// Has the page cache give up the disks: what was written when they were made is read again, through their servers.
    pub fn forget(&self) {
        machine::forget(&self.peer_disk());
        machine::forget(&self.lab.disk());
    }

    fn peer_disk(&self) -> PathBuf {
        self.lab.path("peer.img")
    }

    /// The image that `backend` opens, which is made if it is an overlay.
    fn disk_of(&self, backend: Backend) -> PathBuf {
        let overlay = |name| {
            let path = self.lab.path(name);
            let mut qemu_img = Command::new("qemu-img");
            qemu_img.arg("create").args(["-q", "-f", "qcow2", "-F", "raw", "-b"]);
            run(qemu_img.arg(self.lab.base()).arg(&path)).ok();
            path
        };
        match backend {
            Backend::Pristine => self.lab.disk(),
            Backend::Daemon(_) => self.peer_disk(),
            Backend::FreshOverlay => overlay("fresh.qcow2"),
            Backend::FullOverlay => {
                let path = self.lab.path("full.qcow2");
                if !path.exists() {
                    // An overlay that has all its clusters: a copy whose backing file is named later.
                    let mut copy = Command::new("qemu-img");
                    copy.args(["convert", "-q", "-f", "raw", "-O", "qcow2"]);
                    run(copy.arg(self.lab.base()).arg(&path)).ok();
                    let mut rebase = Command::new("qemu-img");
                    rebase.args(["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"]);
                    run(rebase.arg(self.lab.base()).arg(&path)).ok();
                }
                path
            }
            Backend::Limit(_) => panic!("a limit is no server"),
        }
    }

    /// Starts `backend` with `queues` virtqueues. What was written before is written back; unless all is direct, a client reads
    /// the disk. So all of it is in memory, in the way in which it was made or this backend brings it there.
    pub fn start(&self, backend: Backend, queues: usize, place: Place) -> Running<'_> {
        let lab = &self.lab;
        let disk = self.disk_of(backend);
        self.ready(&disk);
        let daemon = |image: Image<'_>| {
            let socket = lab.runtime().join("peer");
            let process = storage_daemon(place.launcher(), &image, &socket, queues as u32);
            (process, socket)
        };
        let base = lab.base();
        let raw = Image { direct: self.direct, ..Image::raw(&disk) };
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
            Backend::Daemon(aio) => daemon(Image { aio, ..raw }),
            Backend::FreshOverlay | Backend::FullOverlay => {
                daemon(Image { aio: "io_uring", overlay_of: Some(&base), ..raw })
            }
            Backend::Limit(_) => panic!("a limit is no server"),
        };
        let running = Running { bench: self, backend, process, socket };
        if !self.direct {
            running.asked("warm", Place::Client);
        }
        running
    }

    /// Puts the load of `point` on `backend` for `time`.
    pub fn measure(&self, backend: Backend, point: Point, time: Duration) -> Sample {
        if let Backend::Limit(way) = backend {
            let load = format!("{} {} {}", point.pattern.name(), point.depth, time.as_secs_f64());
            return self.limit("limit", &self.peer_disk(), way, &load);
        }
        self.with_running(backend, point, |running| running.load(point, time, None))
    }

    /// Writes once to each of `count` scattered blocks of a file like the disks, `depth` at a time; none of it has been written to since
    /// it was written back. It was written 8 KiB at a time when it was made, and so lies in memory in the way in which such writes
    /// are cheapest.
    pub fn limit_first(&self, way: Loop, depth: usize, count: u64, seed: u64) -> Sample {
        let file = self.lab.path("limit.img");
        if !file.exists() {
            images::dense_in(
                &file,
                std::fs::metadata(self.lab.base()).unwrap().len(),
                1,
                images::BLOCK as usize,
            );
        }
        self.limit("limit-first", &file, way, &format!("{depth} {count} {seed}"))
    }

    /// What a loop on `file` has to say to a command, on the backends' processor.
    fn limit(&self, command: &str, file: &Path, way: Loop, words: &str) -> Sample {
        let cache = if self.direct { "direct" } else { "buffered" };
        let command = format!("{command} {} {} {cache} {words}", file.display(), way.name());
        machine::undisturbed(|| {
            self.ready(file);
            if !self.direct {
                machine::warm(file);
            }
            machine::with_stolen(|| {
                let mut client = Remote::start_with(Place::Backend.launcher(), &self.lab.socket());
                let score: Score = client.ask(&command).parse().unwrap();
                client.leave();
                Sample { score, cpu_us: score.client_us }
            })
        })
    }

    /// Starts `backend` for `point`, has it measured, and stops it; again, if the hypervisor has spoilt that.
    pub fn with_running<T>(
        &self,
        backend: Backend,
        point: Point,
        mut measure: impl FnMut(&Running<'_>) -> T,
    ) -> T {
        machine::undisturbed(|| {
            let running = self.start(backend, point.queues, place(point, Place::Backend));
            let result = machine::with_stolen(|| measure(&running));
            running.stop();
            result
        })
    }

    /// What was written to a file is written back, and the file is in memory only if it may be.
    fn ready(&self, file: &Path) {
        machine::settle(file);
        if self.direct {
            // A direct write to what is cached costs more, and pristine makes sure that nothing is: let nobody gain by that.
            machine::forget(file);
        }
    }
}

/// Two queues need more than one processor, and so do their clients: they are where the kernel puts them.
fn place(point: Point, place: Place) -> Place {
    if point.queues == 1 { place } else { Place::Anywhere }
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
    /// Puts the load of `point` on it for `time`, by a client in a session of its own; at a `rate`, if
    /// there is one (see [`Load`](crate::client::Load)).
    pub fn load(&self, point: Point, time: Duration, rate: Option<f64>) -> Sample {
        let Point { pattern, depth, queues } = point;
        let rate = rate.map_or(String::new(), |rate| rate.to_string());
        let command = format!("bench {} {depth} {} {queues} {rate}", pattern.name(), time.as_secs_f64());
        let (answer, cpu) = self.asked(&command, place(point, Place::Client));
        let score: Score = answer.parse().unwrap();
        Sample { score, cpu_us: cpu * 1e6 / score.requests as f64 }
    }

    /// The answer of a client in a session of its own, and the processor time that it took the backend,
    /// in seconds.
    pub fn asked(&self, command: &str, place: Place) -> (String, f64) {
        let mut client = Remote::start_with(place.launcher(), &self.socket);
        let before = cpu_seconds(self.process.pid());
        let answer = client.ask(command);
        let cpu = cpu_seconds(self.process.pid()) - before;
        client.leave();
        (answer, cpu)
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
