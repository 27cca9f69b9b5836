//! The newest state, and whoever waits for the next.

use std::sync::Arc;

use crate::state::{Event, Rejection, State};
use swarm_proto::v1::Transaction;

/// Holds the newest [`State`] and tells watchers of every change to it.
///
/// Readers take an `Arc<State>` and never block the writer, of which there is
/// one: the raft state machine.
#[derive(Debug)]
pub struct Store {}

/// Every change after a snapshot, in order, each once.
#[derive(Debug)]
pub struct Watch {}

/// A watch that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The watcher was too slow, or asked for a revision that is forgotten: start again with a snapshot.
    #[error("changes after {after} are no longer remembered; start again from a snapshot")]
    Lagged {
        /// The last index that was delivered.
        after: u64,
    },
    /// The store is gone.
    #[error("the store is shut down")]
    Closed,
}

impl Store {
    /// A store that starts from `state`.
    #[must_use]
    pub fn new(state: State) -> Arc<Self> {
        let _ = state;
        unimplemented!("next commit")
    }

    /// The newest state.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        unimplemented!("next commit")
    }

    /// The newest state, and a watch of everything after it.
    #[must_use]
    pub fn watch(&self) -> (Arc<State>, Watch) {
        unimplemented!("next commit")
    }

    /// A watch of everything after `index`.
    ///
    /// # Errors
    /// `index` is older than what is remembered.
    pub fn watch_from(&self, index: u64) -> Result<Watch, WatchError> {
        let _ = index;
        unimplemented!("next commit")
    }

    /// Returns once the state has `index` (or a later one).
    pub async fn wait_for(&self, index: u64) -> Arc<State> {
        let _ = index;
        unimplemented!("next commit")
    }

    /// Applies a committed transaction. Only the state machine calls this, in
    /// log order. A rejected one still advances the index.
    pub fn commit(&self, index: u64, transaction: &Transaction) -> Result<(), Rejection> {
        let _ = (index, transaction);
        unimplemented!("next commit")
    }

    /// Replaces everything (a snapshot was installed): watchers see `Lagged`.
    pub fn replace(&self, state: State) {
        let _ = state;
        unimplemented!("next commit")
    }
}

impl Watch {
    /// The next log entry's events, with its index and the state after it.
    /// Entries without events are left out.
    ///
    /// # Errors
    /// See [`WatchError`].
    pub async fn next(&mut self) -> Result<Change, WatchError> {
        unimplemented!("next commit")
    }
}

/// What one log entry has changed.
#[derive(Clone, Debug)]
pub struct Change {
    /// The entry's index.
    pub index: u64,
    /// In the order of application.
    pub events: Arc<[Event]>,
    /// The state after the entry.
    pub state: Arc<State>,
}
