//! What is said over the socket. `API.md` is the specification; these types are its other form.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The protocol version that this crate speaks.
pub const VERSION: u32 = 1;

/// What a server can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Tell how things are.
    #[serde(rename = "status")]
    Status,
    /// End the session that is open.
    #[serde(rename = "session end")]
    SessionEnd,
    /// Keep the disk as the session leaves it.
    #[serde(rename = "session hold")]
    SessionHold,
    /// Let a held disk be restored and used again.
    #[serde(rename = "session release")]
    SessionRelease,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Status, Self::SessionEnd, Self::SessionHold, Self::SessionRelease];

    /// As it is written in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::SessionEnd => "session end",
            Self::SessionHold => "session hold",
            Self::SessionRelease => "session release",
        }
    }
}

/// One line from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Protocol version.
    pub version: u32,
    /// What to do.
    pub command: Command,
}

/// A request before its command is known to be one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequest {
    #[serde(rename = "version")]
    _version: u32,
    command: String,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Request {
    /// A request for `command` in this crate's version.
    pub fn new(command: Command) -> Self {
        Self { version: VERSION, command }
    }

    /// Reads a request. The version is looked at first: what else another version may say is unknown.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Refusal> {
        let bad = |error: serde_json::Error| {
            Refusal::new(ErrorKind::BadRequest, format!("the request is not understood: {error}"))
        };
        let version = serde_json::from_slice::<VersionOnly>(line).map_err(bad)?.version;
        if version != VERSION {
            let message = format!("the request is of version {version}, this server knows {VERSION}");
            return Err(Refusal::new(ErrorKind::UnknownVersion, message));
        }
        let raw: RawRequest = serde_json::from_slice(line).map_err(bad)?;
        let command = Command::ALL.into_iter().find(|command| command.name() == raw.command);
        command.map(Self::new).ok_or_else(|| {
            let known = Command::ALL.map(Command::name).join("\", \"");
            // Quoted, so that nothing in it is taken for more than a name.
            let message = format!("there is no command {:?}; there are \"{known}\"", raw.command);
            Refusal::new(ErrorKind::UnknownCommand, message)
        })
    }
}

/// One line from a server: a result or an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Protocol version.
    pub version: u32,
    /// What the command's own type says, if it was carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Why it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Refusal>,
}

impl Reply {
    pub(crate) fn of(outcome: Result<Value, Refusal>) -> Self {
        let (result, error) = match outcome {
            Ok(result) => (Some(result), None),
            Err(refusal) => (None, Some(refusal)),
        };
        Self { version: VERSION, result, error }
    }
}

/// The kinds of errors, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// Not a request: no JSON, a field too many, too few, or of the wrong type.
    BadRequest,
    /// A protocol version that the server does not know.
    UnknownVersion,
    /// A command that the server does not know.
    UnknownCommand,
    /// A request longer than [`REQUEST_BYTES_MAX`](crate::REQUEST_BYTES_MAX).
    TooLong,
    /// All clients that the server takes at once are waiting for a command to be done.
    Busy,
    /// The command makes no sense in the state that the disk is in; nothing was changed.
    Refused,
    /// It was tried and did not succeed.
    Failed,
    /// It was begun and is not done yet.
    TimedOut,
    /// A kind that this crate does not know: of a newer server.
    #[serde(other)]
    Other,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub kind: ErrorKind,
    /// For people: what was expected, and what to do.
    pub message: String,
}

impl Refusal {
    /// With this message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Why a disk is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// For programs, such as `by-operator`.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The session that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Sequence number of its write log.
    pub sequence: u64,
    /// The process that owns it, if its identity is known.
    pub owner_pid: Option<u32>,
}

/// How the restoring goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// Why the last attempt failed; null: it did not.
    pub error: Option<String>,
    /// When the next attempt begins, in milliseconds since 1970, if the last one failed.
    pub next_attempt_unix_ms: Option<u64>,
    /// What was restored how, and how it is to be; null: from a server that does not tell.
    #[serde(default)]
    pub copies: Option<CopyStatus>,
}

/// How blocks are restored. Counts are since the server was started; what was restored and then written to counts too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// When: `eager` or `idle`.
    pub when: String,
    /// Bytes a second that are copied at most; null: no limit.
    pub rate: Option<u64>,
    /// Whether the disk shares blocks with its base: `untried`, `works` or `off`.
    pub reflink: String,
    /// Blocks that were shared with the base.
    pub reflinked_blocks: u64,
    /// Blocks that were written.
    pub copied_blocks: u64,
    /// Blocks that were made holes.
    pub punched_blocks: u64,
}

/// Result of `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The server's process.
    pub server_pid: u32,
    /// The session that is open.
    pub session: Option<Session>,
    /// Blocks that it owns.
    pub dirty_blocks: u64,
    /// Blocks that are not restored yet.
    pub pending_blocks: u64,
    /// Size of a block in bytes.
    pub block_size: u64,
    /// Why the disk is held, or will be when the session ends.
    pub held: Option<Hold>,
    /// How the restoring goes.
    pub drain: DrainStatus,
}

/// Result of `session end`: the session has ended, and nothing of it is in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionEnded {
    /// Sequence number of its write log.
    pub sequence: u64,
    /// Why it ended; the VM may have been faster than the operator.
    pub reason: String,
    /// How long it was open, in milliseconds.
    pub duration_ms: u64,
    /// Bytes that the guest wrote; each write counts.
    pub bytes_written: u64,
    /// Distinct blocks that it took.
    pub dirty_blocks: u64,
    /// Blocks that are to be restored, those of earlier sessions included.
    pub pending_blocks: u64,
    /// Why they are not being restored, if the disk is held.
    pub held: Option<Hold>,
}

/// Result of `session hold`: the hold is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionHeld {
    /// Whether it was held already.
    pub already: bool,
    /// The session at whose end the hold begins; null: it has begun.
    pub session: Option<u64>,
    /// Blocks that are kept as they are; of an open session, those that it has so far.
    pub blocks: u64,
}

/// Result of `session release`: the release is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReleased {
    /// The session that is open, and goes on.
    pub session: Option<u64>,
    /// Blocks that are being restored from now on.
    pub pending_blocks: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: &str) -> ErrorKind {
        Request::parse(line.as_bytes()).unwrap_err().kind
    }

    #[test]
    fn request_of_every_command_is_read_back() {
        for command in Command::ALL {
            let line = serde_json::to_vec(&Request::new(command)).unwrap();
            assert_eq!(Request::parse(&line), Ok(Request::new(command)));
            assert_eq!(serde_json::to_value(command).unwrap(), command.name());
        }
        assert_eq!(
            Request::parse(b" {\"command\": \"session end\", \"version\": 1}\r"),
            Ok(Request::new(Command::SessionEnd))
        );
    }

    #[test]
    fn request_that_is_not_exactly_one_is_refused_by_kind() {
        assert_eq!(kind(""), ErrorKind::BadRequest);
        assert_eq!(kind("status"), ErrorKind::BadRequest);
        assert_eq!(kind("[]"), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"command":"status"}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":1}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":"1","command":"status"}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":["status"]}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":"status"} {}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":"status","command":"status"}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":"Status"}"#), ErrorKind::UnknownCommand);
        assert_eq!(kind(r#"{"version":1,"command":""}"#), ErrorKind::UnknownCommand);
    }

    /// A field that the server does not know could be what makes the difference: nothing is done.
    #[test]
    fn request_with_an_unknown_field_is_refused_by_its_name() {
        let refusal =
            Request::parse(br#"{"version":1,"command":"session end","after":"reboot"}"#).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::BadRequest);
        assert!(refusal.message.contains("after"), "{refusal}");
    }

    #[test]
    fn request_of_another_version_is_refused_whatever_else_it_says() {
        assert_eq!(kind(r#"{"version":2,"command":"explode","now":true}"#), ErrorKind::UnknownVersion);
        assert_eq!(kind(r#"{"version":0}"#), ErrorKind::UnknownVersion);
    }

    #[test]
    fn error_kind_of_a_newer_server_is_read_as_other() {
        let reply: Reply =
            serde_json::from_str(r#"{"version":1,"error":{"kind":"moon","message":"m"}}"#).unwrap();
        assert_eq!(reply.error.unwrap().kind, ErrorKind::Other);
    }
}
