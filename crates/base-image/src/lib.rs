//! Read-only golden images.
//!
//! This crate knows where a base's bytes come from, which of them are data and which are holes, and
//! how to tell that somebody changed it. It never opens a base for writing, and it knows nothing
//! of sessions. What lies where on the disk that a base makes, as its partition table says, is read by [`layout`].
//!
//! A raw file or block device is read by whoever has an I/O engine. The bytes of a qcow2 image, and of the files
//! that it is backed by, are looked up and unpacked by threads of this crate; [`BaseImage::engine`] makes that look
//! like any other I/O.
//!
//! An export of an NBD server is read by the same threads, which also wait for a server that is away.
//!
//! [`seal`] writes the hash of every chunk of a base beside it; of a base that is [`sealed`](BaseImage::sealed)
//! nothing is read that does not have its hash. An [`Overlay`] is a new qcow2 image on a base: what differs from it. A
//! [`NewGeneration`] is made of a sealed base and the blocks in which it is to differ; its [`Delta`] names both.
#![forbid(unsafe_code)]

mod chain;
mod delta;
mod device;
mod engine;
mod error;
mod format;
mod generation;
mod identity;
mod image;
pub mod layout;
mod location;
mod nbd;
mod pool;
mod protect;
mod qcow2;
mod replace;
mod seal;
mod store;

pub use chain::Trust;
pub use delta::{DELTA_EXTENTS_MAX, Delta, Generation};
pub use device::name_of as device_name;
pub use error::BaseError;
pub use format::BaseFormat;
pub use generation::{
    CopyWay, Listed, Listing, MadeGeneration, NewGeneration, Node, Parent, list as list_generations,
    parent_file,
};
pub use identity::{BackingIdentity, BaseIdentity, Change, FileIdentity};
pub use image::{BadChunk, BaseImage, Content};
pub use location::BaseLocation;
pub use nbd::{NbdUri, is_ending, stop_waiting_for_servers};
pub use pool::Urgency;
pub use qcow2::{CLUSTER_SIZE, Overlay};
pub use seal::{CHUNK_SIZE, Root, Seal, manifest_path, seal, seal_to};
