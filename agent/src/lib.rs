//! Everything a node does: holds a session with a manager, runs its tasks,
//! builds their networks. Knows nothing of raft or the store.

pub mod agent;
pub mod container;
pub mod description;
mod driver;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "testing")]
pub mod light;
pub mod local;
pub mod network;
mod programmer;
pub mod reporter;
pub mod runtime;
pub mod session;
mod supervisor;
pub mod task;
pub mod worker;

pub use agent::{Agent, AgentConfig, AgentError};
