//! How a failed command ends: one clear line, what to do about it, and an exit code.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use blockio::in_full;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

/// Stands in hints for how the disk was named on the command line.
const DISK: &str = "--disk DISK";

impl Failure {
    /// Something that went wrong.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: 1 }
    }

    /// Arguments that make no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: 2 }
    }

    /// With what to do about it, as a sentence.
    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The message and what to do, in one line.
    pub(crate) fn line(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{}; {hint}", self.message),
            None => self.message.clone(),
        }
    }

    /// An error with all its sources.
    pub(crate) fn of(error: &dyn StdError) -> Self {
        Self::new(in_full(error))
    }

    /// Names the disk in what can be done about it, as it was named on the command line.
    pub(crate) fn about(self, disk: Option<&str>) -> Self {
        let hint = self.hint.map(|hint| hint.replace(DISK, disk.unwrap_or(DISK)));
        Self { hint, ..self }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pristine: error: {}", self.line())
    }
}

/// Whether what failed was stopped by the operator: a base that is not waited for any more is an error too, for the log then.
pub(crate) fn was_stopped(stop: &AtomicBool, error: &dyn StdError) -> bool {
    let stopped = stop.load(Ordering::Acquire);
    if stopped {
        log::debug!("{}", in_full(error));
    }
    stopped
}

impl From<control::ClientError> for Failure {
    fn from(error: control::ClientError) -> Self {
        let late = matches!(error, control::ClientError::NoAnswer { .. });
        let hint = late.then(|| "`pristine status` says how far it is".to_owned());
        Self { hint, ..Self::of(&error) }
    }
}

impl From<session_disk::Error> for Failure {
    fn from(error: session_disk::Error) -> Self {
        Self { hint: error.hint(DISK), ..Self::of(&error) }
    }
}
