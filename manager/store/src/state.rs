//! One value that holds everything the cluster agrees on.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use swarm_proto::v1::{Cluster, Network, Node, Object, ObjectKind, Service, Task, Transaction};
use swarm_proto::{NetworkId, NodeId, ServiceId, TaskId};

pub use swarm_proto::v1::Rejection;

/// The replicated state after one log entry. Cloning is O(1).
#[derive(Clone, Debug, Default)]
pub struct State {
    index: u64,
    cluster: Option<Arc<Cluster>>,
    nodes: OrdMap<NodeId, Arc<Node>>,
    services: OrdMap<ServiceId, Arc<Service>>,
    tasks: OrdMap<TaskId, Arc<Task>>,
    networks: OrdMap<NetworkId, Arc<Network>>,
    tasks_by_service: OrdMap<ServiceId, OrdSet<TaskId>>,
    tasks_by_node: OrdMap<NodeId, OrdSet<TaskId>>,
    tasks_by_network: OrdMap<NetworkId, OrdSet<TaskId>>,
}

/// One object's change, as watchers see it.
#[derive(Clone, Debug)]
pub struct Event {
    /// The object before; `None` when it was created.
    pub old: Option<Object>,
    /// The object after; `None` when it was removed.
    pub new: Option<Object>,
}

/// What a transaction has done.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The state after it.
    pub state: State,
    /// What it changed, in the order in which it was applied.
    pub events: Vec<Event>,
}

impl State {
    /// Index of the last log entry applied.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The cluster object; `None` before the first transaction of `swarm init`.
    #[must_use]
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.cluster.as_ref()
    }

    /// A node by its full ID.
    #[must_use]
    pub fn node(&self, id: &str) -> Option<&Arc<Node>> {
        self.nodes.get(id)
    }

    /// All nodes, by ID.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// A service by its full ID.
    #[must_use]
    pub fn service(&self, id: &str) -> Option<&Arc<Service>> {
        self.services.get(id)
    }

    /// All services, by ID.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A task by its full ID.
    #[must_use]
    pub fn task(&self, id: &str) -> Option<&Arc<Task>> {
        self.tasks.get(id)
    }

    /// All tasks, by ID.
    pub fn tasks(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.tasks.values()
    }

    /// A network by its full ID.
    #[must_use]
    pub fn network(&self, id: &str) -> Option<&Arc<Network>> {
        self.networks.get(id)
    }

    /// All networks, by ID.
    pub fn networks(&self) -> impl Iterator<Item = &Arc<Network>> {
        self.networks.values()
    }

    /// The tasks of a service, by ID, history included.
    pub fn tasks_of_service(&self, id: &str) -> impl Iterator<Item = &Arc<Task>> {
        self.indexed(self.tasks_by_service.get(id))
    }

    /// The tasks assigned to a node, by ID, history included.
    pub fn tasks_on_node(&self, id: &str) -> impl Iterator<Item = &Arc<Task>> {
        self.indexed(self.tasks_by_node.get(id))
    }

    /// The tasks that hold an address on a network, by ID.
    pub fn tasks_on_network(&self, id: &str) -> impl Iterator<Item = &Arc<Task>> {
        self.indexed(self.tasks_by_network.get(id))
    }

    fn indexed<'a>(
        &'a self,
        ids: Option<&'a OrdSet<TaskId>>,
    ) -> impl Iterator<Item = &'a Arc<Task>> {
        ids.into_iter()
            .flat_map(|ids| ids.iter())
            .filter_map(|id| self.tasks.get(id))
    }

    /// The full ID that `reference` (full ID, full name, or unique ID prefix; in
    /// that order) names, among objects of one kind.
    ///
    /// # Errors
    /// None or several objects match.
    pub fn resolve(&self, kind: ObjectKind, reference: &str) -> Result<String, ResolveError> {
        let _ = (kind, reference);
        unimplemented!("next commit")
    }

    /// The state after `transaction`, committed at `index`.
    ///
    /// # Errors
    /// The first action that cannot be done, and why. Nothing is changed then;
    /// the caller still advances the index.
    pub fn apply(&self, index: u64, transaction: &Transaction) -> Result<Applied, Rejection> {
        let _ = (index, transaction);
        unimplemented!("next commit")
    }
}

/// A reference that names not exactly one object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// No object has this ID, name or prefix.
    #[error("{kind} {reference} not found")]
    NotFound {
        /// "service", "node"…
        kind: &'static str,
        /// As given.
        reference: String,
    },
    /// A prefix of several IDs.
    #[error("{kind} {reference} is ambiguous ({matches} matches found)")]
    Ambiguous {
        /// "service", "node"…
        kind: &'static str,
        /// As given.
        reference: String,
        /// How many objects match.
        matches: usize,
    },
}
