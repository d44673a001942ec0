//! A child process that is killed and reaped with its owner, and whose output can be waited for.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::wait_until;
use rustix::process::{Pid, Signal, kill_process};

/// A running child. Its standard output and error are kept, line by line, as they come.
///
/// Dropped, it is killed and reaped; if the drop happens because a test panics, its output is
/// printed. If the test process dies without dropping anything, the kernel kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
    seen: usize,
}

#[derive(Debug, Default)]
struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    open_ends: usize,
}

impl Process {
    /// Starts `command`. `name` is for messages.
    pub fn spawn(name: &str, command: &Command) -> Self {
        let mut guarded = Command::new("setpriv");
        guarded.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(key, value),
                None => guarded.env_remove(key),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            guarded.current_dir(dir);
        }
        let mut child = guarded
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error} ({command:?})"));
        let output = Arc::new(Output::default());
        output.state.lock().unwrap().open_ends = 2;
        let readers = vec![
            collect(child.stdout.take().unwrap(), Arc::clone(&output)),
            collect(child.stderr.take().unwrap(), Arc::clone(&output)),
        ];
        let stdin = child.stdin.take();
        Self { name: name.to_owned(), child, stdin, output, readers, seen: 0 }
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything printed so far.
    pub fn output(&self) -> String {
        self.output.state.lock().unwrap().lines.join("\n")
    }

    /// Writes one line to its standard input.
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        if let Err(error) = stdin.write_all(format!("{line}\n").as_bytes()).and_then(|()| stdin.flush()) {
            panic!("{} does not take \"{line}\": {error}\n{}", self.name, self.output());
        }
    }

    /// The next line that `matches`, after those that earlier calls returned or passed over. Panics
    /// if the output ends first or `limit` is over.
    pub fn wait_line(&mut self, what: &str, limit: Duration, matches: impl Fn(&str) -> bool) -> String {
        self.try_wait_line(limit, matches).unwrap_or_else(|why| {
            panic!("{}: waited for {what}, but {why}. It printed:\n{}", self.name, self.output())
        })
    }

    /// As [`wait_line`](Self::wait_line), but says why there is no such line.
    pub fn try_wait_line(
        &mut self,
        limit: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String, String> {
        let begin = Instant::now();
        let mut state = self.output.state.lock().unwrap();
        loop {
            while let Some(line) = state.lines.get(self.seen) {
                self.seen += 1;
                if matches(line) {
                    return Ok(line.clone());
                }
            }
            if state.open_ends == 0 {
                return Err("its output ended".into());
            }
            let Some(left) = limit.checked_sub(begin.elapsed()) else {
                return Err(format!("{limit:?} were over"));
            };
            state = self.output.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits until it has closed its output, but no longer than `limit`.
    pub fn wait_end_of_output(&self, limit: Duration) {
        let state = self.output.state.lock().unwrap();
        let _ = self.output.changed.wait_timeout_while(state, limit, |state| state.open_ends > 0);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it (SIGSTOP), and returns when none of its threads is in a system call any more but to wait.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.pid());
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
            // A thread that is gone is as good as a stopped one. The state follows the name.
            stat.map_or(true, |stat| {
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['T', 'Z']))
            })
        };
        wait_until("all threads have stopped", || std::fs::read_dir(&tasks).unwrap().all(stopped));
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end, and for the last of its output. Panics after `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.readers.drain(..).for_each(|reader| reader.join().unwrap());
                return status;
            }
            if begin.elapsed() > limit {
                panic!("{} has not ended after {limit:?}. It printed:\n{}", self.name, self.output());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) -> ExitStatus {
        let _ = self.child.kill();
        self.child.wait().unwrap()
    }

    /// The end of its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// A field of `/proc/PID/status` that is given in kB, in bytes; such as `VmHWM`.
    pub fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() && matches!(self.child.try_wait(), Ok(None)) {
            eprintln!("--- {}'s threads:\n{}---", self.name, threads(&self.pid().to_string()));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {} printed:\n{}\n---", self.name, self.output());
        }
    }
}

/// What the threads of all children of this process are doing.
pub(crate) fn threads_of_children() -> String {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children: Vec<String> =
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect();
    children.join(" ").split_whitespace().map(|pid| format!("process {pid}:\n{}", threads(pid))).collect()
}

/// What each thread of a process is doing: its state, where in the kernel it waits, in which system call, and how
/// much processor time it has used.
fn threads(pid: &str) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return String::new() };
    let of = |task: PathBuf| {
        let read =
            |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default().trim().to_owned();
        let stat = read("stat");
        // Fields 3, 14 and 15 of proc_pid_stat(5); the state follows the name.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
        format!(
            "{}: {} in {} (system call {}), {} + {} ticks\n",
            read("comm"),
            field(3),
            read("wchan"),
            read("syscall"),
            field(14),
            field(15)
        )
    };
    tasks.flatten().map(|task| of(task.path())).collect::<String>() + &unread_events(pid)
}

/// The eventfds of a process that were written and not read yet (proc_pid_fdinfo(5)): kicks and interrupts that nobody has
/// heard.
fn unread_events(pid: &str) -> String {
    let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let unread = |info: &Path| {
        let text = std::fs::read_to_string(info).ok()?;
        let count = text.lines().find_map(|line| line.strip_prefix("eventfd-count:"))?.trim();
        (count != "0").then(|| format!("eventfd {}: {count}\n", info.display()))
    };
    infos.filter_map(|info| unread(&info.path())).collect()
}

fn collect(from: impl Read + Send + 'static, output: Arc<Output>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            output.state.lock().unwrap().lines.push(text);
            output.changed.notify_all();
            line.clear();
        }
        output.state.lock().unwrap().open_ends -= 1;
        output.changed.notify_all();
    })
}
