//! Everything a node does: holds a session with a manager, runs its tasks,
//! builds their networks. Knows nothing of raft or the store.

pub mod local;
pub mod network;
pub mod reporter;
pub mod runtime;
pub mod worker;
