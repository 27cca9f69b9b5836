//! The one object model: generated messages, identifiers, task states, defaults.
//!
//! Everything that is stored, replicated, sent or shown is one of these types.
//! Touches neither network, disk nor clock.

mod assignments;
pub mod codec;
pub mod defaults;
pub mod id;
pub mod image;
#[cfg(feature = "museum")]
pub mod museum;
pub mod names;
pub mod task_state;

/// Messages and services generated from `proto/swarm/v1/*.proto`.
#[allow(missing_docs, clippy::all)] // generated: the comments are in the .proto files
pub mod v1 {
    tonic::include_proto!("swarm.v1");
}

/// Encoded descriptors of all files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/swarm_descriptor.bin"));

pub use id::{ClusterId, NetworkId, NodeId, ServiceId, SessionId, TaskId};
