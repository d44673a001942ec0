//! Who runs on which processor, what it costs them, and files that are ready to be measured.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::program::run;

/// Where a process may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The client's processor.
    Client,
    /// The backend's processor.
    Backend,
    /// Anywhere.
    Anywhere,
}

impl Place {
    /// What comes before the program's name to start it there. A machine with one processor has one place.
    pub fn launcher(self) -> &'static [&'static str] {
        let several = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        match self {
            Self::Client if several => &["taskset", "-c", "0"],
            Self::Backend if several => &["taskset", "-c", "1"],
            _ => &["env"],
        }
    }

    /// `command`, started there.
    pub fn launched(self, command: &Command) -> Command {
        let [program, args @ ..] = self.launcher() else { unreachable!("launchers have a program") };
        let mut launched = Command::new(program);
        launched.args(args).arg(command.get_program()).args(command.get_args());
        launched
    }
}

/// Processor time of a process in seconds, user and system, all of its threads, those of io_uring
/// included, and those that have ended.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
    // The process's own account counts in hundredths, those of its threads in nanoseconds; but only the
    // former knows of threads that have ended.
    run_seconds(pid).max(ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// Processor time in seconds of the threads that a process has now.
fn run_seconds(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let times = tasks.filter_map(|task| {
        // A thread may end meanwhile.
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    times.sum::<f64>() / 1e9
}

/// The part of the processors' time that the hypervisor takes away without being asked while a measurement may still count.
const STOLEN_MAX: f64 = 0.02;
/// How often a measurement is made that the hypervisor spoils.
const TRIES_MAX: usize = 4;

/// What `measure` returns, and which part of all processors' time the hypervisor took for others meanwhile.
pub(super) fn with_stolen<T>(measure: impl FnOnce() -> T) -> (T, f64) {
    let (before, begin) = (stolen_seconds(), Instant::now());
    let result = measure();
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    let share = (stolen_seconds() - before) / (begin.elapsed().as_secs_f64() * processors as f64);
    (result, share)
}

/// Makes a measurement again, a few times at most, if the hypervisor took away more than 2 % of the processors' time; the one
/// of which it took the least. `measure` says what it took, see [`with_stolen`].
pub(super) fn undisturbed<T>(mut measure: impl FnMut() -> (T, f64)) -> T {
    let mut best = measure();
    for _ in 1..TRIES_MAX {
        if best.1 <= STOLEN_MAX {
            break;
        }
        let again = measure();
        if again.1 < best.1 {
            best = again;
        }
    }
    best.0
}

/// Processor time that the hypervisor has taken since boot while there was something to run, in seconds.
fn stolen_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let ticks = stat.lines().next().and_then(|line| line.split_ascii_whitespace().nth(8)).unwrap_or("0");
    ticks.parse::<f64>().unwrap_or(0.0) / rustix::param::clock_ticks_per_second() as f64
}

/// Memory of a process in bytes; a page that several share counts in parts.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Its own: heap, stacks, changed pages of its file mappings.
    pub anonymous: u64,
    /// The programs and libraries that it has mapped.
    pub file: u64,
    /// Shared memory: of a backend that of its guest, and rings of io_uring.
    pub shared: u64,
}

/// What a process has in memory now.
pub fn memory_of(pid: u32) -> Memory {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    };
    Memory { anonymous: field("Pss_Anon:"), file: field("Pss_File:"), shared: field("Pss_Shmem:") }
}

/// Writes back what was written to the file system of `path`.
pub fn settle(path: &Path) {
    run(Command::new("sync").arg("-f").arg(path)).ok();
}

/// Reads all of a file into the page cache.
pub fn warm(path: &Path) {
    let mut file = std::fs::File::open(path).unwrap();
    let mut chunk = vec![0; 1 << 20];
    while std::io::Read::read(&mut file, &mut chunk).unwrap() > 0 {}
}

/// Has the page cache give up a file, as far as it is written back.
pub fn forget(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// What the directory's file system is called.
pub fn kind_of(dir: &Path) -> String {
    let finished = run(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).ok();
    match finished.stdout.trim() {
        "ext2/ext3" => "ext4".into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurement_that_was_disturbed_is_made_again_a_few_times_and_the_best_counts() {
        let measured = |shares: &[f64]| {
            let mut made = 0..;
            let best = undisturbed(|| {
                let index = made.next().unwrap_or(0);
                (index, shares[index])
            });
            (best, made.start)
        };
        assert_eq!(measured(&[0.0]), (0, 1));
        assert_eq!(measured(&[0.3, 0.02]), (1, 2));
        assert_eq!(measured(&[0.3, 0.1, 0.2, 0.1]), (1, 4));
    }
}
