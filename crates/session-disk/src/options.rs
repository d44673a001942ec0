//! How a disk is opened, and what is told of its sessions.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockio::EngineKind;
use blockio::fault::FaultPlan;
use blockio::tape::Tape;

use crate::Paths;
use crate::disk::Changes;
use crate::pace::DrainPolicy;
use crate::shared::FlushPolicy;

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The session disk.
    pub disk: PathBuf,
    /// Instead of `DISK.pristine`.
    pub state_dir: Option<PathBuf>,
    /// Instead of the default runtime directory.
    pub runtime_dir: Option<PathBuf>,
    /// Open the disk with O_DIRECT.
    pub direct: bool,
    /// Which I/O engine; `None`: io_uring, or plain system calls where the disk's file system never
    /// waits for storage (tmpfs), or where io_uring is not to be had.
    pub engine: Option<EngineKind>,
    /// What a guest's FLUSH does.
    pub flush: FlushPolicy,
    /// How long a read of the base waits for an NBD server that is away.
    pub base_patience: Duration,
    /// How many retired logs stay for audit.
    pub keep_logs: usize,
    /// What becomes of sessions' changes.
    pub changes: Changes,
    /// Take up a session that a server before has left open, if its log is exact: its VM may come
    /// back. Without this, such a session has ended.
    pub resume: bool,
    /// What the operator wants of drains, in the background or not.
    pub drain: DrainPolicy,
    /// Share blocks with the base where disk and base lie on one file system that can, instead of copying them.
    pub reflink: bool,
    /// For tests: every I/O of queues and drain meets this plan.
    pub faults: Option<Arc<FaultPlan>>,
    /// For tests: every I/O on the disk and its state passes this tape.
    pub tape: Option<Arc<dyn Tape>>,
    /// For the benchmark of what the log costs: a session owns every block from its start, so that none
    /// is ever logged, and what it wrote is never restored.
    #[cfg(feature = "bench-without-log")]
    pub without_log: bool,
}

impl DiskOptions {
    /// The defaults for the disk at `path`: buffered, any engine, 10 s for the base's server, 8 retired logs.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            disk: path.into(),
            state_dir: None,
            runtime_dir: None,
            direct: false,
            engine: None,
            flush: FlushPolicy::Auto,
            base_patience: Duration::from_secs(10),
            keep_logs: 8,
            changes: Changes::Reset,
            resume: false,
            drain: DrainPolicy::default(),
            reflink: true,
            faults: None,
            tape: None,
            #[cfg(feature = "bench-without-log")]
            without_log: false,
        }
    }

    /// Where everything of the disk lives.
    pub fn paths(&self) -> Paths {
        Paths::new(&self.disk, self.state_dir.as_deref(), self.runtime_dir.as_deref())
    }
}

/// What is known when a session starts.
#[derive(Clone, Debug)]
pub struct SessionStart {
    /// Sequence number of the session's write log.
    pub sequence: u64,
    /// Blocks that are still to be restored.
    pub pending_blocks: u64,
}

/// What a session did.
#[derive(Clone, Debug)]
pub struct SessionSummary {
    /// Sequence number of the session's write log.
    pub sequence: u64,
    /// Distinct blocks that the session took.
    pub dirty_blocks: u64,
    /// Bytes that the guest wrote; each write counts.
    pub bytes_written: u64,
    /// From its start to its end.
    pub duration: Duration,
}
