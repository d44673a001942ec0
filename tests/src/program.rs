//! Where the programs under test are, directories for a test's files, and commands run to their end.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The directory with this build's programs, such as `target/debug`.
fn profile_dir() -> PathBuf {
    let mut dir = std::env::current_exe().unwrap();
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    dir
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    profile_dir().parent().unwrap().to_owned()
}

/// The directory under which the tests' images lie: on a disk, not in memory.
pub fn scratch_root() -> PathBuf {
    let dir = target_dir().join("scratch");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A new directory in `parent` that goes with its owner.
pub fn scratch_dir(parent: &Path) -> TempDir {
    tempfile::Builder::new().prefix("t").tempdir_in(parent).unwrap()
}

/// The `pristine` program: `$PRISTINE_BIN`, or the one of this build, which is made if need be.
pub fn pristine_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("PRISTINE_BIN") {
        Some(path) => path.into(),
        None => built("pristine"),
    })
}

/// The `vhost-client` program of this package, which Cargo builds whenever it builds the tests.
pub fn client_binary() -> PathBuf {
    profile_dir().join("vhost-client")
}

/// The `guest-storm` program, which runs in guests.
pub fn storm_binary() -> PathBuf {
    profile_dir().join("guest-storm")
}

/// The `service-manager` program, which runs in machines that have none.
pub fn manager_binary() -> PathBuf {
    profile_dir().join("service-manager")
}

/// Builds `program` as this test was built.
fn built(program: &str) -> PathBuf {
    let dir = profile_dir();
    let profile = match dir.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => "dev".to_owned(),
        Some(name) => name.to_owned(),
    };
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--package", program, "--profile", &profile])
        .arg("--target-dir")
        .arg(target_dir())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "{program} could not be built");
    dir.join(program)
}

/// What a finished command has left.
#[derive(Debug)]
pub struct Finished {
    /// The command, for messages.
    pub command: String,
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Panics unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Panics unless the command failed as a command should: with exit code `code`, exactly one line
    /// on standard error that contains each of `words`, nothing on standard output.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.stderr.lines().count(), 1, "not one line: {self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "does not say \"{word}\": {self:#?}");
        }
        self
    }
}

/// Runs `command` to its end, its standard input empty.
pub fn run(command: &mut Command) -> Finished {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    Finished {
        command: format!("{command:?}"),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// `pristine` with these arguments.
pub fn pristine<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(pristine_binary());
    command.args(args);
    command
}
