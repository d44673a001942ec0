//! The operator's control of a running server: requests and replies over a Unix socket.
//!
//! The protocol is a line of JSON for a line of JSON; `API.md` has all of it. This crate knows the
//! protocol, the server's side of the socket and the client's. It does not know what the commands do:
//! that is for the [`Handler`] of the program.
//!
//! A client can be silent, slow or wrong, and there can be many: none of them keeps the server or
//! another client waiting ([`ControlServer`]).
#![forbid(unsafe_code)]

mod api;
mod client;
mod line;
mod reach;
mod server;

pub use api::{
    Command, CopyStatus, DrainStatus, ErrorKind, Hold, Refusal, Reply, Request, Session, SessionEnded,
    SessionHeld, SessionReleased, Status, VERSION,
};
pub use client::{Client, ClientError};
pub use line::REQUEST_BYTES_MAX;
pub use server::{CLIENTS_MAX, ControlServer, Handler};
