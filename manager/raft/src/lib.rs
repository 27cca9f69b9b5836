//! Consensus and disk: openraft on sled, snapshots, transport, membership.
//!
//! [`RaftNode`] is the real [`swarm_store::Consensus`]. Everything of openraft
//! stays in this crate. Log, snapshots and the member's ID live in one directory
//! of the [`swarm_disk::Disk`] that is given, encrypted; what cannot be read as it was written keeps the
//! manager from starting.

mod disk;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod group;
mod log;
mod member;
mod node;
mod proposals;
mod runtime;
mod seal;
mod service;
mod snapshot;
mod state_machine;
mod transport;
mod types;
mod weight;

pub use error::{DiskError, RaftFatal, StartError};
pub use node::{Progress, RaftConfig, RaftNode, RaftTiming};
pub use service::RaftService;
pub use transport::Repeats;
