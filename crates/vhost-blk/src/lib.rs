//! The vhost-user-blk device: what a guest's disk looks like, and when a session begins and ends.
//!
//! This is the only crate that names vhost and virtio crates. It knows virtio-blk requests, the
//! configuration space, queues and their workers, the control plane and the boundaries of
//! sessions. It does not know what a read or write becomes: that is the session disk's.
//!
//! - [`Server`] accepts frontends on a [`Socket`] and serves one at a time;
//! - between a frontend and the vhost-user library is a relay for control messages, which knows
//!   when a ring starts;
//! - the library runs one worker thread per queue, which turns descriptor chains into requests.

mod backend;
mod boundary;
mod chain;
mod config;
mod connection;
mod cpus;
mod disk;
mod guest;
mod handover;
mod hugepages;
mod inflight;
mod interrupts;
mod limit;
mod open_file;
mod peer;
mod poll;
mod regions;
mod relay;
mod request;
mod server;
mod setup;
mod slots;
mod socket;
#[cfg(test)]
mod testing;
mod used;
mod vring;
mod wake;
mod wire;
mod worker;

pub use boundary::EndReason;
pub use config::{DeviceConfig, QUEUE_SIZE_MAX, QUEUES_MAX};
pub use cpus::Cpus;
pub use handover::{HandOver, inherited_fds};
pub use poll::Polling;
pub use server::{Exit, Observer, Server, ServerConfig, ServerError, StopHandle};
pub use socket::{Socket, SocketError};
pub use unix_socket::SocketPermissions;
