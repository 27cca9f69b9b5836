//! The replicated state: immutable maps, transactions, allocation, watch.
//!
//! [`State`] is a value. [`State::apply`] is a pure function from a state and a
//! transaction to the next state and its events: no clock, no randomness, no
//! I/O, so every manager computes the same from the same log. Allocation
//! (addresses, VNIs, VIPs) is part of it. [`Store`] holds the newest state and
//! tells watchers what changed. [`Consensus`] is the seam to the raft group;
//! [`testing::LocalConsensus`] stands in for it in tests.

mod allocator;
mod apply;
#[cfg(test)]
mod apply_test;
pub mod consensus;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(test)]
mod invariants_test;
mod snapshot;
pub mod state;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use consensus::{Consensus, Leadership, Member, MembershipError, ProposeError, ReadError};
pub use snapshot::{DecodeError, PIECE_MAX, split};
pub use state::{Applied, Event, Rejection, ResolveError, State};
pub use store::{Change, Store, Watch, WatchError};
pub use swarm_proto::v1::ObjectKind;
