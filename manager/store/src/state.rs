//! One value that holds everything the cluster agrees on.

use std::borrow::Borrow;
use std::ops::Bound;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};
use swarm_proto::v1::{
    Cluster, Network, Node, Object, ObjectKind, Service, Task, TaskState, object,
};
use swarm_proto::{NetworkId, NodeId, ServiceId, TaskId};

use crate::allocator::Ipam;

pub use swarm_proto::v1::Rejection;

/// The replicated state after one log entry. Cloning is O(1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) nodes: OrdMap<NodeId, Arc<Node>>,
    pub(crate) services: OrdMap<ServiceId, Arc<Service>>,
    pub(crate) tasks: OrdMap<TaskId, Arc<Task>>,
    pub(crate) networks: OrdMap<NetworkId, Arc<Network>>,
    // What follows is derived from the objects above.
    pub(crate) service_names: OrdMap<String, ServiceId>,
    pub(crate) network_names: OrdMap<String, NetworkId>,
    pub(crate) tasks_by_service: OrdMap<ServiceId, OrdSet<TaskId>>,
    pub(crate) tasks_by_node: OrdMap<NodeId, OrdSet<TaskId>>,
    pub(crate) tasks_by_network: OrdMap<NetworkId, OrdSet<TaskId>>,
    pub(crate) services_by_network: OrdMap<NetworkId, OrdSet<ServiceId>>,
    pub(crate) ipam: Ipam,
}

/// One object's change, as watchers see it: before (`None` when it was created)
/// and after (`None` when it was removed).
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // `old` and `new`, as said above
pub enum Event {
    /// The cluster object.
    Cluster {
        old: Option<Arc<Cluster>>,
        new: Option<Arc<Cluster>>,
    },
    /// A node.
    Node {
        old: Option<Arc<Node>>,
        new: Option<Arc<Node>>,
    },
    /// A service.
    Service {
        old: Option<Arc<Service>>,
        new: Option<Arc<Service>>,
    },
    /// A task.
    Task {
        old: Option<Arc<Task>>,
        new: Option<Arc<Task>>,
    },
    /// A network.
    Network {
        old: Option<Arc<Network>>,
        new: Option<Arc<Network>>,
    },
}

macro_rules! of_either {
    ($event:expr, $object:ident => $value:expr) => {
        match $event {
            Event::Cluster { old, new } => new.as_ref().or(old.as_ref()).map(|$object| $value),
            Event::Node { old, new } => new.as_ref().or(old.as_ref()).map(|$object| $value),
            Event::Service { old, new } => new.as_ref().or(old.as_ref()).map(|$object| $value),
            Event::Task { old, new } => new.as_ref().or(old.as_ref()).map(|$object| $value),
            Event::Network { old, new } => new.as_ref().or(old.as_ref()).map(|$object| $value),
        }
    };
}

impl Event {
    /// The kind of the object.
    #[must_use]
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Cluster { .. } => ObjectKind::Cluster,
            Self::Node { .. } => ObjectKind::Node,
            Self::Service { .. } => ObjectKind::Service,
            Self::Task { .. } => ObjectKind::Task,
            Self::Network { .. } => ObjectKind::Network,
        }
    }

    /// The ID of the object.
    #[must_use]
    pub fn id(&self) -> &str {
        of_either!(self, object => object.id.as_str()).unwrap_or_default()
    }

    /// A copy of the object before, as a message.
    #[must_use]
    pub fn old_object(&self) -> Option<Object> {
        self.object(true)
    }

    /// A copy of the object after, as a message.
    #[must_use]
    pub fn new_object(&self) -> Option<Object> {
        self.object(false)
    }

    fn object(&self, before: bool) -> Option<Object> {
        fn pick<T: Clone>(
            before: bool,
            old: &Option<Arc<T>>,
            new: &Option<Arc<T>>,
            wrap: fn(T) -> object::Object,
        ) -> Option<Object> {
            let chosen = if before { old } else { new };
            chosen.as_ref().map(|object| Object {
                object: Some(wrap((**object).clone())),
            })
        }
        match self {
            Self::Cluster { old, new } => pick(before, old, new, object::Object::Cluster),
            Self::Node { old, new } => pick(before, old, new, object::Object::Node),
            Self::Service { old, new } => pick(before, old, new, object::Object::Service),
            Self::Task { old, new } => pick(before, old, new, object::Object::Task),
            Self::Network { old, new } => pick(before, old, new, object::Object::Network),
        }
    }
}

/// What a transaction has done.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The state after it.
    pub state: State,
    /// What it changed, in the order in which it was applied.
    pub events: Vec<Event>,
}

fn after<'a, K: Ord + Borrow<str>, T>(
    objects: &'a OrdMap<K, Arc<T>>,
    id: &str,
) -> impl Iterator<Item = &'a Arc<T>> + use<'a, K, T> {
    let range = (Bound::Excluded(id), Bound::Unbounded);
    objects.range::<_, str>(range).map(|(_, object)| object)
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

    /// The nodes whose IDs come after `id`, by ID.
    pub fn nodes_after(&self, id: &str) -> impl Iterator<Item = &Arc<Node>> + use<'_> {
        after(&self.nodes, id)
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

    /// The services whose IDs come after `id`, by ID.
    pub fn services_after(&self, id: &str) -> impl Iterator<Item = &Arc<Service>> + use<'_> {
        after(&self.services, id)
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

    /// The tasks whose IDs come after `id`, by ID.
    pub fn tasks_after(&self, id: &str) -> impl Iterator<Item = &Arc<Task>> + use<'_> {
        after(&self.tasks, id)
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

    /// The networks whose IDs come after `id`, by ID.
    pub fn networks_after(&self, id: &str) -> impl Iterator<Item = &Arc<Network>> + use<'_> {
        after(&self.networks, id)
    }

    /// The tasks of a service, by ID, history included.
    pub fn tasks_of_service(&self, id: &str) -> impl Iterator<Item = &Arc<Task>> {
        self.indexed(self.tasks_by_service.get(id))
    }

    /// How many they are.
    #[must_use]
    pub fn count_of_service(&self, id: &str) -> usize {
        self.tasks_by_service.get(id).map_or(0, OrdSet::len)
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

    /// The service with this full name.
    #[must_use]
    pub fn service_by_name(&self, name: &str) -> Option<&Arc<Service>> {
        self.service(self.service_names.get(name)?)
    }

    /// The network with this full name.
    #[must_use]
    pub fn network_by_name(&self, name: &str) -> Option<&Arc<Network>> {
        self.network(self.network_names.get(name)?)
    }

    /// The services whose spec names a network (by ID).
    pub fn services_on_network(&self, id: &str) -> impl Iterator<Item = &Arc<Service>> {
        let ids = self.services_by_network.get(id);
        ids.into_iter()
            .flat_map(|ids| ids.iter())
            .filter_map(|id| self.services.get(id))
    }

    /// The state as it is after a log entry that changes no object.
    #[must_use]
    pub fn at_index(&self, index: u64) -> Self {
        let mut next = self.clone();
        next.index = next.index.max(index);
        next
    }

    /// What is different from an earlier state, as one event for each object, in no particular
    /// order. The work grows with the differences: what both share is not looked at.
    #[must_use]
    pub fn changes_since(&self, before: &Self) -> Vec<Event> {
        let mut events = Vec::new();
        if self.cluster != before.cluster {
            events.push(Event::Cluster {
                old: before.cluster.clone(),
                new: self.cluster.clone(),
            });
        }
        let nodes = differences(&before.nodes, &self.nodes);
        events.extend(nodes.map(|(old, new)| Event::Node { old, new }));
        let networks = differences(&before.networks, &self.networks);
        events.extend(networks.map(|(old, new)| Event::Network { old, new }));
        let services = differences(&before.services, &self.services);
        events.extend(services.map(|(old, new)| Event::Service { old, new }));
        let tasks = differences(&before.tasks, &self.tasks);
        events.extend(tasks.map(|(old, new)| Event::Task { old, new }));
        events
    }

    /// How many objects there are.
    #[must_use]
    pub fn objects(&self) -> usize {
        self.nodes.len() + self.services.len() + self.tasks.len() + self.networks.len()
    }

    /// The highest raft term in which a transaction was proposed.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.term
    }

    /// The full ID that `reference` (full ID, full name, or unique ID prefix; in
    /// that order) names, among objects of one kind. A node's name is its
    /// hostname; a task's is "service.slot" (the one that is meant to run) or
    /// "service.slot.id".
    ///
    /// # Errors
    /// None or several objects match.
    pub fn resolve(&self, kind: ObjectKind, reference: &str) -> Result<String, ResolveError> {
        let (word, mut found): (_, Vec<String>) = match kind {
            ObjectKind::Cluster => {
                let name = |c: &Cluster| {
                    c.spec
                        .as_ref()
                        .and_then(|s| Some(s.annotations.as_ref()?.name.clone()))
                };
                let is = |c: &&Arc<Cluster>| {
                    c.id.starts_with(reference) || name(c).as_deref() == Some(reference)
                };
                let found = self.cluster.iter().filter(is).map(|c| c.id.clone());
                ("cluster", found.collect())
            }
            ObjectKind::Node => (
                "node",
                self.matching(&self.nodes, reference, || {
                    let named = |n: &&Arc<Node>| {
                        n.description
                            .as_ref()
                            .is_some_and(|d| d.hostname == reference)
                    };
                    self.nodes().filter(named).map(|n| n.id.clone()).collect()
                }),
            ),
            ObjectKind::Service => (
                "service",
                self.matching(&self.services, reference, || {
                    self.service_names
                        .get(reference)
                        .map(ToString::to_string)
                        .into_iter()
                        .collect()
                }),
            ),
            ObjectKind::Network => (
                "network",
                self.matching(&self.networks, reference, || {
                    self.network_names
                        .get(reference)
                        .map(ToString::to_string)
                        .into_iter()
                        .collect()
                }),
            ),
            ObjectKind::Task => (
                "task",
                self.matching(&self.tasks, reference, || self.tasks_named(reference)),
            ),
            ObjectKind::Unspecified => ("object", Vec::new()),
        };
        match (found.len(), found.pop()) {
            (1, Some(id)) => Ok(id),
            (0, _) | (_, None) => Err(ResolveError::NotFound {
                kind: word,
                reference: reference.into(),
            }),
            (matches, _) => Err(ResolveError::Ambiguous {
                kind: word,
                reference: reference.into(),
                matches,
            }),
        }
    }

    /// IDs of the objects in `objects` that `reference` may mean; `named` looks it up as a name.
    fn matching<K, T>(
        &self,
        objects: &OrdMap<K, Arc<T>>,
        reference: &str,
        named: impl FnOnce() -> Vec<String>,
    ) -> Vec<String>
    where
        K: Ord + Clone + std::borrow::Borrow<str>,
    {
        if objects.contains_key(reference) {
            return vec![reference.into()];
        }
        let found = named();
        if !found.is_empty() || reference.is_empty() {
            return found;
        }
        let from = (Bound::Included(reference), Bound::Unbounded);
        objects
            .range::<_, str>(from)
            .map(|(id, _)| id.borrow())
            .take_while(|id| id.starts_with(reference))
            .map(str::to_owned)
            .collect()
    }

    fn tasks_named(&self, name: &str) -> Vec<String> {
        // A service's name may hold dots itself: try every split.
        let splits = name
            .match_indices('.')
            .map(|(at, _)| (&name[..at], &name[at + 1..]));
        splits
            .filter_map(|(service, rest)| Some((self.service_names.get(service)?, rest)))
            .flat_map(|(service, rest)| {
                self.tasks_of_service(service).filter(move |task| {
                    let place = match task.slot {
                        0 => task.node_id.clone(),
                        slot => slot.to_string(),
                    };
                    let meant = task.desired_state <= TaskState::Running as i32;
                    (meant && rest == place)
                        || rest.strip_prefix(&place).and_then(|r| r.strip_prefix('.'))
                            == Some(task.id.as_str())
                })
            })
            .map(|task| task.id.clone())
            .collect()
    }
}

fn differences<'a, K: Ord, T: PartialEq>(
    before: &'a OrdMap<K, Arc<T>>,
    after: &'a OrdMap<K, Arc<T>>,
) -> impl Iterator<Item = (Option<Arc<T>>, Option<Arc<T>>)> {
    before.diff(after).map(|difference| match difference {
        DiffItem::Add(_, new) => (None, Some(new.clone())),
        DiffItem::Update {
            old: (_, old),
            new: (_, new),
        } => (Some(old.clone()), Some(new.clone())),
        DiffItem::Remove(_, old) => (Some(old.clone()), None),
    })
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
