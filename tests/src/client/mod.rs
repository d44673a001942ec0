//! A vhost-user frontend that shares no code with the backend: the `blkio` crate.
//!
//! Whoever only wants to be a client uses it through the program `vhost-client` (see
//! [`remote`](crate::remote)): the end of a session is the end of the client's *process*.

mod bench;
mod endure;
mod memory;
mod model;
mod requests;

pub use bench::{Pattern, Score, Touches, run as run_bench, run_passes, run_touches};
pub use endure::{Endure, Endured};
pub use model::{Plan, Summary, run as run_model};
pub use requests::{Client, Done, Request, Shape};
