//! A vhost-user frontend that shares no code with the backend: the `blkio` crate.
//!
//! Whoever only wants to be a client uses it through the program `vhost-client` (see
//! [`remote`](crate::remote)): the end of a session is the end of the client's *process*.

mod copy;
mod endure;
mod histogram;
mod lane;
mod limit;
mod load;
mod memory;
mod model;
mod passes;
mod requests;

pub use copy::{Way, copy};
pub use endure::{Endure, Endured};
pub use limit::{Limit, Loop};
pub use load::{Load, Pattern, Score, run_load};
pub use model::{Plan, Summary, run as run_model};
pub use passes::{Beside, Touches, Turns, run_beside, run_first, run_passes, run_touches, run_warm};
pub use requests::{Client, Done, Request, Shape};
