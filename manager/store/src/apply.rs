//! A transaction turns one state into the next, or is refused as a whole.
//!
//! Pure and deterministic: the clock is the proposer's, identifiers are the
//! proposer's, addresses come from the state. Work per action grows with the
//! logarithm of what is stored, never with its size.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use prost_types::Timestamp;
use swarm_proto::names::task_short_name;
use swarm_proto::task_state::{is_terminal, may_advance};
use swarm_proto::v1::rejection::Code;
use swarm_proto::v1::{
    AllocateRaftId, Annotations, AssignTasks, Cluster, CreateTasks, Endpoint, EndpointMode,
    ManagerStatus, Meta, Network, NetworkAttachment, Node, NodeObservation, NodeState, Object,
    ObjectKind, Reason, RemoveObject, Service, ServiceSpec, StoreAction, Task, TaskAssignment,
    TaskSpec, TaskState, TaskStatus, TaskStatusUpdate, Transaction, Version, VirtualIp, object,
    service_mode, store_action,
};
use swarm_proto::{NetworkId, NodeId, ServiceId, Shared, TaskId};

use crate::allocator::{Exhausted, Names, Waiter, address_pools};
use crate::state::{Applied, Event, Rejection, State};

/// Why an action cannot be done; its place in the list is filled in by [`State::apply`].
pub(crate) fn refuse(code: Code, message: impl Into<String>) -> Rejection {
    Rejection {
        code: code.into(),
        message: message.into(),
        action: 0,
    }
}

fn not_found(kind: &str, id: &str) -> Rejection {
    refuse(Code::NotFound, format!("{kind} {id} not found"))
}

fn out_of_sequence() -> Rejection {
    refuse(Code::OutOfSequence, "update out of sequence")
}

impl State {
    /// The state after `transaction`, committed at `index`.
    ///
    /// # Errors
    /// The first action that cannot be done, and why. Nothing is changed then;
    /// the caller goes on with [`State::after_refusal`].
    pub fn apply(&self, index: u64, transaction: &Transaction) -> Result<Applied, Rejection> {
        if transaction.term != 0 && transaction.term < self.term {
            return Err(refuse(
                Code::StaleTerm,
                format!(
                    "the proposer led in term {}, but term {} has begun",
                    transaction.term, self.term
                ),
            ));
        }
        let mut draft = Draft {
            state: self.after_refusal(index, transaction),
            index,
            at: transaction.proposed_at,
            events: Vec::with_capacity(transaction.actions.len()),
            freed: BTreeSet::new(),
        };
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::AllocatedInMemory)
            && transaction.term > self.term
        {
            draft.state.ipam.begin_afresh();
        }
        for (place, action) in transaction.actions.iter().enumerate() {
            draft.act(action).map_err(|rejection| Rejection {
                action: u32::try_from(place).unwrap_or(u32::MAX),
                ..rejection
            })?;
        }
        draft.serve_waiters();
        Ok(Applied {
            state: draft.state,
            events: draft.events,
        })
    }

    /// The state after a transaction that was refused: the objects are the same.
    #[must_use]
    pub fn after_refusal(&self, index: u64, transaction: &Transaction) -> Self {
        let mut next = self.at_index(index);
        next.term = next.term.max(transaction.term);
        next
    }
}

/// The next state while it is being made. Thrown away when an action is refused.
pub(crate) struct Draft {
    pub(crate) state: State,
    index: u64,
    at: Option<Timestamp>,
    events: Vec<Event>,
    /// Networks on which an address was given back.
    freed: BTreeSet<String>,
}

impl Draft {
    fn act(&mut self, action: &StoreAction) -> Result<(), Rejection> {
        use store_action::Action;
        match &action.action {
            Some(Action::Create(object)) => self.create(object),
            Some(Action::Update(object)) => self.update(object),
            Some(Action::Remove(remove)) => self.remove(remove),
            Some(Action::TaskStatus(update)) => self.merge_status(update),
            Some(Action::NodeObservation(observation)) => self.observe(observation),
            Some(Action::AllocateRaftId(wanted)) => self.allocate_raft_id(wanted),
            Some(Action::AssignTasks(decided)) => {
                self.assign_tasks(decided);
                Ok(())
            }
            Some(Action::CreateTasks(wanted)) => self.create_tasks(wanted),
            None => Err(refuse(
                Code::Invalid,
                "the action is empty or of a kind that this version does not know",
            )),
        }
    }

    fn create(&mut self, object: &Object) -> Result<(), Rejection> {
        match &object.object {
            Some(object::Object::Cluster(new)) => self.create_cluster(new.clone()),
            Some(object::Object::Node(new)) => self.create_node(new.clone()),
            Some(object::Object::Service(new)) => self.create_service(new.clone()),
            Some(object::Object::Task(new)) => self.create_task(new.clone()),
            Some(object::Object::Network(new)) => self.create_network(new.clone()),
            None => Err(refuse(Code::Invalid, "the object to create is missing")),
        }
    }

    fn update(&mut self, object: &Object) -> Result<(), Rejection> {
        match &object.object {
            Some(object::Object::Cluster(new)) => self.update_cluster(new.clone()),
            Some(object::Object::Node(new)) => self.update_node(new.clone()),
            Some(object::Object::Service(new)) => self.update_service(new.clone()),
            Some(object::Object::Task(new)) => self.update_task(new.clone()),
            Some(object::Object::Network(new)) => self.update_network(new.clone()),
            None => Err(refuse(Code::Invalid, "the object to update is missing")),
        }
    }

    fn remove(&mut self, remove: &RemoveObject) -> Result<(), Rejection> {
        let wanted = remove.r#ref.clone().unwrap_or_default();
        let (id, expected) = (wanted.id.as_str(), remove.expected_version);
        match wanted.kind() {
            ObjectKind::Node => self.remove_node(id, expected),
            ObjectKind::Service => self.remove_service(id, expected),
            ObjectKind::Task => self.remove_task(id, expected),
            ObjectKind::Network => self.remove_network(id, expected),
            ObjectKind::Cluster => Err(refuse(Code::Invalid, "the cluster cannot be removed")),
            ObjectKind::Unspecified => Err(refuse(
                Code::Invalid,
                "the kind of the object to remove is missing",
            )),
        }
    }

    /// Whether an update that expects `expected` may be done to an object with
    /// this `meta`. An object that this transaction has already written is
    /// still known to its proposer under the version before.
    fn check_version(
        &self,
        kind: ObjectKind,
        id: &str,
        meta: &Option<Meta>,
        expected: u64,
    ) -> Result<(), Rejection> {
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::VersionUnchecked) {
            return Ok(());
        }
        let current = version_of(meta);
        if current == expected {
            return Ok(());
        }
        if current == self.index {
            let first = self
                .events
                .iter()
                .find(|event| event.kind() == kind && event.id() == id);
            if first.is_some_and(|event| old_version(event) == Some(expected)) {
                return Ok(());
            }
        }
        Err(out_of_sequence())
    }

    fn created_meta(&self) -> Option<Meta> {
        Some(Meta {
            version: self.version(),
            created_at: self.at,
            updated_at: self.at,
        })
    }

    fn updated_meta(&self, old: &Option<Meta>) -> Option<Meta> {
        Some(Meta {
            version: self.version(),
            created_at: old.as_ref().and_then(|meta| meta.created_at),
            updated_at: self.at,
        })
    }

    fn version(&self) -> Option<Version> {
        Some(Version { index: self.index })
    }

    // --- Cluster ---------------------------------------------------------

    fn create_cluster(&mut self, mut new: Cluster) -> Result<(), Rejection> {
        if let Some(cluster) = &self.state.cluster {
            let message = format!("the cluster {} already exists", cluster.id);
            return Err(refuse(Code::AlreadyExists, message));
        }
        check_id("cluster", &new.id)?;
        address_pools(Some(&new))?;
        new.meta = self.created_meta();
        self.put_cluster(new);
        Ok(())
    }

    fn update_cluster(&mut self, mut new: Cluster) -> Result<(), Rejection> {
        let old = self.state.cluster.clone();
        let old = old.filter(|cluster| cluster.id == new.id);
        let old = old.ok_or_else(|| not_found("cluster", &new.id))?;
        self.check_version(
            ObjectKind::Cluster,
            &old.id,
            &old.meta,
            version_of(&new.meta),
        )?;
        new.meta = self.updated_meta(&old.meta);
        new.next_raft_id = old.next_raft_id;
        address_pools(Some(&new))?;
        self.put_cluster(new);
        Ok(())
    }

    fn put_cluster(&mut self, new: Cluster) {
        let new = Some(Arc::new(new));
        let old = std::mem::replace(&mut self.state.cluster, new.clone());
        self.events.push(Event::Cluster { old, new });
    }

    fn allocate_raft_id(&mut self, wanted: &AllocateRaftId) -> Result<(), Rejection> {
        let cluster = self.state.cluster.clone();
        let cluster = cluster.ok_or_else(|| refuse(Code::NotFound, "there is no cluster yet"))?;
        let node = self.state.nodes.get(wanted.node_id.as_str()).cloned();
        let node = node.ok_or_else(|| not_found("node", &wanted.node_id))?;
        let raft_id = cluster.next_raft_id.max(1);
        self.put_cluster(Cluster {
            next_raft_id: raft_id + 1,
            meta: self.updated_meta(&cluster.meta),
            ..(*cluster).clone()
        });
        self.put_node(Node {
            manager_status: Some(ManagerStatus {
                raft_id,
                addr: wanted.addr.clone(),
                ..ManagerStatus::default()
            }),
            meta: self.updated_meta(&node.meta),
            ..(*node).clone()
        });
        Ok(())
    }

    // --- Nodes -----------------------------------------------------------

    fn create_node(&mut self, mut new: Node) -> Result<(), Rejection> {
        check_id("node", &new.id)?;
        if self.state.nodes.contains_key(new.id.as_str()) {
            return Err(already_exists("node", &new.id));
        }
        strip_observations(&mut new);
        new.meta = self.created_meta();
        self.put_node(new);
        Ok(())
    }

    fn update_node(&mut self, mut new: Node) -> Result<(), Rejection> {
        let old = self.state.nodes.get(new.id.as_str()).cloned();
        let old = old.ok_or_else(|| not_found("node", &new.id))?;
        self.check_version(ObjectKind::Node, &old.id, &old.meta, version_of(&new.meta))?;
        strip_observations(&mut new);
        let raft_id = |node: &Node| node.manager_status.as_ref().map(|status| status.raft_id);
        if new.manager_status.is_some() && raft_id(&new) != raft_id(&old) {
            let message = format!("the raft ID of node {} is given by the cluster", new.id);
            return Err(refuse(Code::Invalid, message));
        }
        new.meta = self.updated_meta(&old.meta);
        self.put_node(new);
        Ok(())
    }

    fn observe(&mut self, seen: &NodeObservation) -> Result<(), Rejection> {
        // A node that was removed meanwhile must not spoil the reports on others.
        let Some(old) = self.state.nodes.get(seen.node_id.as_str()).cloned() else {
            return Ok(());
        };
        let mut new = (*old).clone();
        if let Some(status) = &seen.status {
            let merged = new.status.get_or_insert_default();
            if status.state() != NodeState::Unknown {
                merged.state = status.state;
                // A message belongs to the state it came with.
                merged.message.clone_from(&status.message);
            }
            if !status.addr.is_empty() {
                merged.addr.clone_from(&status.addr);
            }
        }
        if let Some(description) = &seen.description {
            new.description = Some(description.clone());
        }
        if new != *old {
            new.meta = self.updated_meta(&old.meta);
            self.put_node(new);
        }
        Ok(())
    }

    fn remove_node(&mut self, id: &str, expected: u64) -> Result<(), Rejection> {
        let old = self.state.nodes.get(id).cloned();
        let old = old.ok_or_else(|| not_found("node", id))?;
        if expected != 0 {
            self.check_version(ObjectKind::Node, id, &old.meta, expected)?;
        }
        let node_id = NodeId::from(id);
        self.state.ipam.note_routes(&node_id, Some(&old), None);
        self.state.nodes.remove(id);
        self.events.push(Event::Node {
            old: Some(old),
            new: None,
        });
        Ok(())
    }

    fn put_node(&mut self, new: Node) {
        let new = Arc::new(new);
        let id = NodeId::from(&new.id);
        let old = self.state.nodes.insert(id.clone(), new.clone());
        self.state.ipam.note_routes(&id, old.as_deref(), Some(&new));
        self.events.push(Event::Node {
            old,
            new: Some(new),
        });
    }

    // --- Services --------------------------------------------------------

    fn create_service(&mut self, mut new: Service) -> Result<(), Rejection> {
        check_id("service", &new.id)?;
        if self.state.services.contains_key(new.id.as_str()) {
            return Err(already_exists("service", &new.id));
        }
        self.check_service(&new)?;
        new.meta = self.created_meta();
        new.spec_version = self.version();
        new.previous_spec = None;
        new.previous_spec_version = None;
        new.status = None;
        new.endpoint = Some(endpoint_of(&new));
        self.allocate_vips(&mut new, false);
        self.put_service(new);
        Ok(())
    }

    fn update_service(&mut self, mut new: Service) -> Result<(), Rejection> {
        let old = self.state.services.get(new.id.as_str()).cloned();
        let old = old.ok_or_else(|| not_found("service", &new.id))?;
        self.check_version(
            ObjectKind::Service,
            &old.id,
            &old.meta,
            version_of(&new.meta),
        )?;
        self.check_service(&new)?;
        new.meta = self.updated_meta(&old.meta);
        new.status = None;
        new.spec_version = old.spec_version;
        new.previous_spec.clone_from(&old.previous_spec);
        new.previous_spec_version = old.previous_spec_version;
        if let (Some(new), Some(old)) = (&mut new.spec, &old.spec) {
            // What only changes the service, as its number of replicas, leaves its tasks' spec in memory once.
            Shared::share(&mut new.task, old.task.as_ref());
        }
        if new.spec != old.spec {
            new.previous_spec.clone_from(&old.spec);
            new.previous_spec_version = old.spec_version;
            if makes_tasks_dirty(&old.spec, &new.spec) {
                new.spec_version = self.version();
            }
        }
        let mut endpoint = endpoint_of(&new);
        if let Some(old) = &old.endpoint {
            endpoint.virtual_ips.clone_from(&old.virtual_ips);
        }
        new.endpoint = Some(endpoint);
        new.reason.clone_from(&old.reason);
        self.allocate_vips(&mut new, false);
        self.put_service(new);
        Ok(())
    }

    fn check_service(&self, new: &Service) -> Result<(), Rejection> {
        let spec = new.spec.as_ref();
        let spec = spec.ok_or_else(|| refuse(Code::Invalid, "the service has no spec"))?;
        let name = name_of(&spec.annotations);
        if name.is_empty() {
            return Err(refuse(Code::Invalid, "the service has no name"));
        }
        if let Some(other) = self.state.service_names.get(name)
            && other.as_str() != new.id
        {
            let message =
                format!("name conflicts with an existing object: service {name} already exists");
            return Err(refuse(Code::NameTaken, message));
        }
        let mut seen = Vec::new();
        for network in networks_of_service(new) {
            self.check_network_exists(network)?;
            if seen.contains(&network) {
                let message = format!("service {name} names network {network} twice");
                return Err(refuse(Code::Invalid, message));
            }
            seen.push(network);
        }
        Ok(())
    }

    fn remove_service(&mut self, id: &str, expected: u64) -> Result<(), Rejection> {
        let old = self.state.services.get(id).cloned();
        let old = old.ok_or_else(|| not_found("service", id))?;
        if expected != 0 {
            self.check_version(ObjectKind::Service, id, &old.meta, expected)?;
        }
        let vips = old
            .endpoint
            .iter()
            .flat_map(|endpoint| &endpoint.virtual_ips);
        for vip in vips {
            self.give_back(&vip.network_id, &vip.addr);
        }
        let waiter = Waiter::Service(ServiceId::from(id));
        self.state.ipam.stop_waiting(&waiter);
        self.unindex_service(&old);
        self.state.services.remove(id);
        self.events.push(Event::Service {
            old: Some(old),
            new: None,
        });
        Ok(())
    }

    fn put_service(&mut self, new: Service) {
        let new = Arc::new(new);
        let id = ServiceId::from(&new.id);
        if let Some(old) = self.state.services.get(&id).cloned() {
            self.unindex_service(&old);
        }
        self.state.index_service(&new);
        let old = self.state.services.insert(id, new.clone());
        self.events.push(Event::Service {
            old,
            new: Some(new),
        });
    }

    fn unindex_service(&mut self, old: &Service) {
        let name = old
            .spec
            .as_ref()
            .map_or("", |spec| name_of(&spec.annotations));
        self.state.service_names.remove(name);
        for network in networks_of_service(old) {
            forget(
                &mut self.state.services_by_network,
                network,
                old.id.as_str(),
            );
        }
    }

    // --- Tasks -----------------------------------------------------------

    fn create_task(&mut self, mut new: Task) -> Result<(), Rejection> {
        check_id("task", &new.id)?;
        if self.state.tasks.contains_key(new.id.as_str()) {
            return Err(already_exists("task", &new.id));
        }
        // A task made for a service that was removed meanwhile would have no owner.
        if !new.service_id.is_empty() {
            let service = self.state.services.get(new.service_id.as_str());
            let service = service.ok_or_else(|| not_found("service", &new.service_id))?;
            share_spec(&mut new.spec, service);
            if new.endpoint.is_none() {
                new.endpoint = Some(endpoint_of(service));
            }
        }
        for network in networks_of_task(&new) {
            self.check_network_exists(network)?;
        }
        check_state(new.status.as_ref().map_or(0, |status| status.state))?;
        check_state(new.desired_state)?;
        new.meta = self.created_meta();
        new.networks.clear();
        new.running_since = None;
        let status = new.status.get_or_insert_default();
        if status.timestamp.is_none() {
            status.timestamp = self.at;
        }
        if wants_addresses(&new)
            && let Err(Exhausted(network)) = self.allocate_task(&mut new, false)
        {
            if state_of(&new) != TaskState::New {
                let message = self.exhausted_message(&network);
                return Err(refuse(Code::PoolExhausted, message));
            }
            self.keep_waiting(&mut new, network);
        }
        self.put_task(new);
        Ok(())
    }

    fn create_tasks(&mut self, wanted: &CreateTasks) -> Result<(), Rejection> {
        let template = wanted.template.as_ref();
        let mut template = template
            .ok_or_else(|| refuse(Code::Invalid, "the template of the tasks is missing"))?
            .clone();
        // Once for all of them, so that they are not compared one by one.
        if let Some(service) = self.state.services.get(template.service_id.as_str()) {
            share_spec(&mut template.spec, service);
        }
        for task in &wanted.tasks {
            self.create_task(Task {
                id: task.id.clone(),
                slot: task.slot,
                ..template.clone()
            })?;
        }
        Ok(())
    }

    /// Each on its own: one task that has changed meanwhile must not hold up the others.
    fn assign_tasks(&mut self, decided: &AssignTasks) {
        for assignment in &decided.assignments {
            self.assign_task(assignment);
        }
    }

    fn assign_task(&mut self, decided: &TaskAssignment) {
        let Some(old) = self.state.tasks.get(decided.task_id.as_str()).cloned() else {
            return;
        };
        let as_seen = self
            .check_version(
                ObjectKind::Task,
                &old.id,
                &old.meta,
                decided.expected_version,
            )
            .is_ok();
        let free = old.node_id.is_empty() || old.node_id == decided.node_id;
        let pending = state_of(&old) == TaskState::Pending;
        #[cfg(feature = "museum")]
        let (free, pending) = match swarm_proto::museum::on(swarm_proto::museum::Bug::PlacedTwice) {
            true => (true, pending || state_of(&old) == TaskState::Assigned),
            false => (free, pending),
        };
        if !as_seen || !free || !pending || decided.node_id.is_empty() {
            return;
        }
        self.put_task(Task {
            node_id: decided.node_id.clone(),
            status: Some(TaskStatus {
                state: TaskState::Assigned.into(),
                timestamp: self.at,
                message: "scheduler assigned task to node".to_owned(),
                ..TaskStatus::default()
            }),
            meta: self.updated_meta(&old.meta),
            ..(*old).clone()
        });
    }

    fn update_task(&mut self, mut new: Task) -> Result<(), Rejection> {
        let old = self.state.tasks.get(new.id.as_str()).cloned();
        let old = old.ok_or_else(|| not_found("task", &new.id))?;
        self.check_version(ObjectKind::Task, &old.id, &old.meta, version_of(&new.meta))?;
        let fixed = |what: &str| {
            let message = format!("the {what} of task {} cannot be changed", old.id);
            Err(refuse(Code::Invalid, message))
        };
        if new.spec != old.spec {
            return fixed("spec");
        }
        if new.service_id != old.service_id {
            return fixed("service");
        }
        if new.slot != old.slot {
            return fixed("slot");
        }
        if new.node_id != old.node_id && !old.node_id.is_empty() {
            return fixed("node");
        }
        check_state(new.desired_state)?;
        if new.desired_state < old.desired_state {
            let message = format!("the desired state of task {} only rises", old.id);
            return Err(refuse(Code::Invalid, message));
        }
        let old_state = state_of(&old);
        check_state(new.status.as_ref().map_or(0, |status| status.state))?;
        let new_state = state_of(&new);
        if new_state != old_state && !may_advance(old_state, new_state) {
            let message = format!(
                "task {} cannot go from {} to {}",
                old.id,
                swarm_proto::task_state::name(old_state),
                swarm_proto::task_state::name(new_state)
            );
            return Err(refuse(Code::Invalid, message));
        }
        // One in memory, as they are equal.
        new.spec.clone_from(&old.spec);
        new.networks.clone_from(&old.networks);
        new.running_since = old.running_since;
        new.meta = self.updated_meta(&old.meta);
        self.put_task(new);
        Ok(())
    }

    fn merge_status(&mut self, update: &TaskStatusUpdate) -> Result<(), Rejection> {
        let reported = update.status.as_ref();
        let reported = reported.ok_or_else(|| refuse(Code::Invalid, "the status is missing"))?;
        check_state(reported.state)?;
        // A task that was removed meanwhile must not spoil the reports on others.
        let Some(old) = self.state.tasks.get(update.task_id.as_str()).cloned() else {
            return Ok(());
        };
        let current = state_of(&old);
        let taken = may_advance(current, reported.state())
            || (current == reported.state()
                && !is_terminal(current)
                && is_news(old.status.as_ref(), reported));
        #[cfg(feature = "museum")]
        let taken = taken
            || (swarm_proto::museum::on(swarm_proto::museum::Bug::StateGoesBack)
                && current != reported.state());
        if taken {
            let runs = reported.state() == TaskState::Running;
            self.put_task(Task {
                status: Some(reported.clone()),
                running_since: old.running_since.or(if runs { self.at } else { None }),
                meta: self.updated_meta(&old.meta),
                ..(*old).clone()
            });
        }
        Ok(())
    }

    fn remove_task(&mut self, id: &str, expected: u64) -> Result<(), Rejection> {
        let old = self.state.tasks.get(id).cloned();
        let old = old.ok_or_else(|| not_found("task", id))?;
        if expected != 0 {
            self.check_version(ObjectKind::Task, id, &old.meta, expected)?;
        }
        let waiter = Waiter::Task(TaskId::from(id));
        self.state.ipam.stop_waiting(&waiter);
        self.unindex_task(&old, None);
        self.state.tasks.remove(id);
        self.events.push(Event::Task {
            old: Some(old),
            new: None,
        });
        Ok(())
    }

    fn put_task(&mut self, new: Task) {
        let new = Arc::new(new);
        let id = TaskId::from(&new.id);
        let old = self.state.tasks.insert(id.clone(), new.clone());
        if let Some(old) = &old {
            if !wants_addresses(&new) {
                self.state.ipam.stop_waiting(&Waiter::Task(id.clone()));
            }
            self.unindex_task(old, Some(&new));
        }
        self.state.index_task(&id, &new, old.as_deref());
        self.events.push(Event::Task {
            old,
            new: Some(new),
        });
    }

    /// Takes `old` out of the indexes that `new` is no longer in, and its
    /// addresses with it.
    fn unindex_task(&mut self, old: &Task, new: Option<&Task>) {
        if new.is_none() {
            forget(
                &mut self.state.tasks_by_service,
                &old.service_id,
                old.id.as_str(),
            );
            forget(&mut self.state.tasks_by_node, &old.node_id, old.id.as_str());
        }
        if holds_addresses(old) && !new.is_some_and(holds_addresses) {
            for attachment in &old.networks {
                let network = attachment.network_id.as_str();
                forget(&mut self.state.tasks_by_network, network, old.id.as_str());
                for address in &attachment.addresses {
                    self.give_back(network, address);
                }
            }
        }
    }

    // --- Networks --------------------------------------------------------

    fn create_network(&mut self, mut new: Network) -> Result<(), Rejection> {
        check_id("network", &new.id)?;
        if self.state.networks.contains_key(new.id.as_str()) {
            return Err(already_exists("network", &new.id));
        }
        self.check_network(&new)?;
        new.mtu = mtu_of(&new)?;
        let before = &self.state;
        let names = Names {
            network: &|id| {
                before
                    .network(id)
                    .map_or_else(String::new, |n| network_name(n).into())
            },
            node: &|id| {
                let node = before.node(id).and_then(|node| node.description.as_ref());
                node.map_or_else(|| id.to_string(), |known| known.hostname.clone())
            },
        };
        let mut ipam = before.ipam.clone();
        ipam.add_network(&mut new, before.cluster.as_deref(), &names)?;
        self.state.ipam = ipam;
        new.meta = self.created_meta();
        self.put_network(new);
        Ok(())
    }

    fn update_network(&mut self, mut new: Network) -> Result<(), Rejection> {
        let old = self.state.networks.get(new.id.as_str()).cloned();
        let old = old.ok_or_else(|| not_found("network", &new.id))?;
        self.check_version(
            ObjectKind::Network,
            &old.id,
            &old.meta,
            version_of(&new.meta),
        )?;
        self.check_network(&new)?;
        let fixed = |network: &Network| {
            let mut spec = network.spec.clone().unwrap_or_default();
            spec.annotations = None;
            spec
        };
        if fixed(&old) != fixed(&new) {
            let message = format!("of network {} only name and labels can be changed", old.id);
            return Err(refuse(Code::Invalid, message));
        }
        new.subnets.clone_from(&old.subnets);
        new.mtu = old.mtu;
        new.meta = self.updated_meta(&old.meta);
        self.put_network(new);
        Ok(())
    }

    fn check_network(&self, new: &Network) -> Result<(), Rejection> {
        let spec = new.spec.as_ref();
        let spec = spec.ok_or_else(|| refuse(Code::Invalid, "the network has no spec"))?;
        let name = name_of(&spec.annotations);
        if name.is_empty() {
            return Err(refuse(Code::Invalid, "the network has no name"));
        }
        if let Some(other) = self.state.network_names.get(name)
            && other.as_str() != new.id
        {
            let message = format!("network with name {name} already exists");
            return Err(refuse(Code::NameTaken, message));
        }
        Ok(())
    }

    fn check_network_exists(&self, id: &str) -> Result<(), Rejection> {
        match self.state.networks.contains_key(id) {
            true => Ok(()),
            false => Err(not_found("network", id)),
        }
    }

    fn remove_network(&mut self, id: &str, expected: u64) -> Result<(), Rejection> {
        let old = self.state.networks.get(id).cloned();
        let old = old.ok_or_else(|| not_found("network", id))?;
        if expected != 0 {
            self.check_version(ObjectKind::Network, id, &old.meta, expected)?;
        }
        if let Some(user) = self.user_of_network(id) {
            return Err(refuse(
                Code::InUse,
                format!("network {} is in use by {user}", network_name(&old)),
            ));
        }
        self.state.ipam.remove_network(&old);
        self.state.networks.remove(id);
        self.state.network_names.remove(network_name(&old));
        self.events.push(Event::Network {
            old: Some(old),
            new: None,
        });
        Ok(())
    }

    /// A service whose spec names the network, or else a task that has an address there or waits for its addresses.
    fn user_of_network(&self, id: &str) -> Option<String> {
        let service = self
            .state
            .services_by_network
            .get(id)
            .and_then(OrdSet::get_min);
        let task = self
            .state
            .tasks_by_network
            .get(id)
            .and_then(OrdSet::get_min);
        let service = service.map(|id| {
            let spec = self.state.service(id).and_then(|found| found.spec.as_ref());
            let name = spec.map_or(id.as_str(), |spec| name_of(&spec.annotations));
            format!("service {name}")
        });
        let waiting = || {
            let waiters = self.state.ipam.waiting().map(|(who, _, _)| who);
            waiters.into_iter().find_map(|who| match who {
                Waiter::Task(task) => {
                    let found = self.state.task(task)?;
                    networks_of_task(found)
                        .any(|named| named == id)
                        .then_some(task)
                }
                Waiter::Service(_) => None,
            })
        };
        let task = || {
            let id = task.or_else(waiting)?;
            let name = self.state.task(id).map(|found| task_short_name(found));
            Some(format!("task {} ({id})", name.unwrap_or_default()))
        };
        service.or_else(task)
    }

    fn put_network(&mut self, new: Network) {
        let new = Arc::new(new);
        let id = NetworkId::from(&new.id);
        if let Some(old) = self.state.networks.get(&id) {
            let name = network_name(old).to_owned();
            self.state.network_names.remove(&name);
        }
        self.state.index_network(&new);
        let old = self.state.networks.insert(id, new.clone());
        self.events.push(Event::Network {
            old,
            new: Some(new),
        });
    }
}

// --- Allocation --------------------------------------------------------------------

impl Draft {
    fn give_back(&mut self, network: &str, address: &str) {
        self.state.ipam.give_address(network, address);
        self.freed.insert(network.to_owned());
    }

    /// Gives the task an address on each of its networks and makes it PENDING,
    /// or changes nothing.
    fn allocate_task(&mut self, task: &mut Task, late: bool) -> Result<(), Exhausted> {
        let mut attachments = Vec::new();
        let wanted = task.spec.as_ref().map_or(&[][..], |spec| &spec.networks);
        let before = (!wanted.is_empty()).then(|| self.state.ipam.clone());
        for wanted in wanted {
            match self.state.ipam.take_address(&wanted.target, late) {
                Ok(address) => attachments.push(NetworkAttachment {
                    network_id: wanted.target.clone(),
                    addresses: vec![address],
                    aliases: wanted.aliases.clone(),
                }),
                Err(exhausted) => {
                    if let Some(before) = before {
                        self.state.ipam = before;
                    }
                    return Err(exhausted);
                }
            }
        }
        task.networks = attachments;
        let status = task.status.get_or_insert_default();
        if status.state() == TaskState::New {
            *status = TaskStatus {
                timestamp: self.at,
                state: TaskState::Pending.into(),
                message: "pending task scheduling".into(),
                ..TaskStatus::default()
            };
        }
        Ok(())
    }

    /// The task stays NEW and says why.
    fn keep_waiting(&mut self, task: &mut Task, network: NetworkId) {
        let since = task
            .status
            .as_ref()
            .and_then(|status| status.reason.as_ref()?.since);
        let reason = self.exhausted_reason(&network, since);
        let status = task.status.get_or_insert_default();
        status.err.clone_from(&reason.message);
        status.reason = Some(reason);
        let waiter = Waiter::Task(TaskId::from(&task.id));
        self.state.ipam.wait(waiter, network);
    }

    /// Makes the service's virtual addresses fit its networks: those it still
    /// needs stay as they are. What cannot be had now is waited for.
    fn allocate_vips(&mut self, service: &mut Service, late: bool) {
        let networks: Vec<String> = match uses_vips(service) {
            true => networks_of_service(service).map(str::to_owned).collect(),
            false => Vec::new(),
        };
        let mut endpoint = service.endpoint.take().unwrap_or_default();
        let held = std::mem::take(&mut endpoint.virtual_ips);
        let (kept, obsolete): (Vec<_>, Vec<_>) = held
            .into_iter()
            .partition(|vip| networks.contains(&vip.network_id));
        for vip in obsolete {
            self.give_back(&vip.network_id, &vip.addr);
        }
        let mut missing = None;
        for network in networks {
            if let Some(vip) = kept.iter().find(|vip| vip.network_id == network) {
                endpoint.virtual_ips.push(vip.clone());
                continue;
            }
            match self.state.ipam.take_address(&network, late) {
                Ok(addr) => endpoint.virtual_ips.push(VirtualIp {
                    network_id: network,
                    addr,
                }),
                Err(Exhausted(network)) => missing = missing.or(Some(network)),
            }
        }
        service.endpoint = Some(endpoint);
        let waiter = Waiter::Service(ServiceId::from(&service.id));
        match missing {
            Some(network) => {
                let since = service.reason.as_ref().and_then(|reason| reason.since);
                service.reason = Some(self.exhausted_reason(&network, since));
                self.state.ipam.wait(waiter, network);
            }
            None => {
                service.reason = None;
                self.state.ipam.stop_waiting(&waiter);
            }
        }
    }

    /// Gives the addresses that this transaction has freed to those who wait
    /// for them, in the order of their turns.
    fn serve_waiters(&mut self) {
        while let Some(network) = self.freed.pop_first() {
            while let Some(waiter) = self.state.ipam.first_waiting(&network).cloned() {
                let still_blocked = match &waiter {
                    Waiter::Task(id) => self.serve_task(id),
                    Waiter::Service(id) => self.serve_service(id),
                };
                if still_blocked.is_some_and(|blocked| *blocked == *network) {
                    break;
                }
            }
        }
    }

    /// Tries again. Returns the network that still has no address for it.
    fn serve_task(&mut self, id: &TaskId) -> Option<NetworkId> {
        let Some(old) = self.state.tasks.get(id).cloned() else {
            let waiter = Waiter::Task(id.clone());
            self.state.ipam.stop_waiting(&waiter);
            return None;
        };
        let mut new = (*old).clone();
        let blocked = match self.allocate_task(&mut new, true) {
            Ok(()) => {
                let waiter = Waiter::Task(id.clone());
                self.state.ipam.stop_waiting(&waiter);
                None
            }
            Err(Exhausted(network)) => {
                self.keep_waiting(&mut new, network.clone());
                Some(network)
            }
        };
        if new != *old {
            new.meta = self.updated_meta(&old.meta);
            self.put_task(new);
        }
        blocked
    }

    fn serve_service(&mut self, id: &ServiceId) -> Option<NetworkId> {
        let waiter = Waiter::Service(id.clone());
        let Some(old) = self.state.services.get(id).cloned() else {
            self.state.ipam.stop_waiting(&waiter);
            return None;
        };
        let mut new = (*old).clone();
        self.allocate_vips(&mut new, true);
        if new != *old {
            new.meta = self.updated_meta(&old.meta);
            self.put_service(new);
        }
        let blocked = self.state.ipam.waits_for(&waiter);
        blocked.cloned()
    }

    fn exhausted_message(&self, network: &NetworkId) -> String {
        let name = self
            .state
            .network(network)
            .map_or("", |network| network_name(network));
        format!("no free address on network {name}; remove tasks or use a larger subnet")
    }

    fn exhausted_reason(&self, network: &NetworkId, since: Option<Timestamp>) -> Reason {
        Reason {
            code: "address-pool-exhausted".into(),
            object: format!("network {network}"),
            message: self.exhausted_message(network),
            since: since.or(self.at),
        }
    }
}

/// Nobody has given it addresses yet, and it may still run.
fn wants_addresses(task: &Task) -> bool {
    task.networks.is_empty()
        && !is_terminal(state_of(task))
        && task.desired_state <= TaskState::Running as i32
}

fn uses_vips(service: &Service) -> bool {
    let endpoint = service
        .endpoint
        .as_ref()
        .and_then(|endpoint| endpoint.spec.as_ref());
    endpoint.is_none_or(|spec| spec.mode() == EndpointMode::Vip)
}

fn mtu_of(network: &Network) -> Result<u32, Rejection> {
    const OPTION: &str = "com.docker.network.driver.mtu";
    let options = network.spec.as_ref().map(|spec| &spec.driver_opts);
    let Some(text) = options.and_then(|options| options.get(OPTION)) else {
        return Ok(0);
    };
    let mtu = text.parse().ok().filter(|mtu| (68..=65_535).contains(mtu));
    mtu.ok_or_else(|| {
        refuse(
            Code::Invalid,
            format!("invalid {OPTION} {text}: it should be 68 to 65535"),
        )
    })
}

// --- Indexes: one way in, for apply and for a snapshot that is read -------------

impl State {
    pub(crate) fn index_service(&mut self, service: &Service) {
        let id = ServiceId::from(&service.id);
        let name = service
            .spec
            .as_ref()
            .map_or("", |spec| name_of(&spec.annotations));
        self.service_names.insert(name.to_owned(), id.clone());
        for network in networks_of_service(service) {
            note(&mut self.services_by_network, network, id.clone());
        }
    }

    pub(crate) fn index_network(&mut self, network: &Network) {
        let name = network_name(network).to_owned();
        self.network_names
            .insert(name, NetworkId::from(&network.id));
    }

    /// Puts `task` into the indexes that `old` (what it was before) is not in yet.
    pub(crate) fn index_task(&mut self, id: &TaskId, task: &Task, old: Option<&Task>) {
        if old.is_none() && !task.service_id.is_empty() {
            note(&mut self.tasks_by_service, &task.service_id, id.clone());
        }
        self.index_place(id, task, old);
    }

    /// As [`State::index_task`] does, but for the task's service.
    pub(crate) fn index_place(&mut self, id: &TaskId, task: &Task, old: Option<&Task>) {
        if !task.node_id.is_empty() && old.is_none_or(|old| old.node_id.is_empty()) {
            note(&mut self.tasks_by_node, &task.node_id, id.clone());
        }
        if holds_addresses(task) && !old.is_some_and(holds_addresses) {
            for attachment in &task.networks {
                note(
                    &mut self.tasks_by_network,
                    &attachment.network_id,
                    id.clone(),
                );
            }
        }
    }
}

fn note<K, V>(index: &mut OrdMap<K, OrdSet<V>>, key: &str, value: V)
where
    K: Ord + Clone + std::borrow::Borrow<str> + for<'a> From<&'a str>,
    V: Ord + Clone,
{
    match index.get_mut(key) {
        Some(values) => {
            values.insert(value);
        }
        None => {
            index.insert(K::from(key), OrdSet::unit(value));
        }
    }
}

fn forget<K, V>(index: &mut OrdMap<K, OrdSet<V>>, key: &str, value: &str)
where
    K: Ord + Clone + std::borrow::Borrow<str>,
    V: Ord + Clone + std::borrow::Borrow<str>,
{
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

// --- Small questions about objects --------------------------------------------

fn check_id(kind: &str, id: &str) -> Result<(), Rejection> {
    // Made by proposers; the form is theirs. A bound keeps keys small.
    match id.is_empty() || id.len() > 64 {
        true => Err(refuse(
            Code::Invalid,
            format!("the ID of the {kind} has not 1 to 64 bytes"),
        )),
        false => Ok(()),
    }
}

fn already_exists(kind: &str, id: &str) -> Rejection {
    refuse(Code::AlreadyExists, format!("{kind} {id} already exists"))
}

fn check_state(state: i32) -> Result<(), Rejection> {
    match TaskState::try_from(state) {
        Ok(_) => Ok(()),
        Err(_) => Err(refuse(
            Code::Invalid,
            format!("there is no task state {state}"),
        )),
    }
}

fn version_of(meta: &Option<Meta>) -> u64 {
    meta.as_ref()
        .and_then(|meta| meta.version)
        .map_or(0, |version| version.index)
}

/// The version of an event's object before it.
fn old_version(event: &Event) -> Option<u64> {
    match event {
        Event::Cluster { old, .. } => old.as_ref().map(|object| version_of(&object.meta)),
        Event::Node { old, .. } => old.as_ref().map(|object| version_of(&object.meta)),
        Event::Service { old, .. } => old.as_ref().map(|object| version_of(&object.meta)),
        Event::Task { old, .. } => old.as_ref().map(|object| version_of(&object.meta)),
        Event::Network { old, .. } => old.as_ref().map(|object| version_of(&object.meta)),
    }
}

/// A task's spec is its service's in memory too, if they are equal.
fn share_spec(spec: &mut Option<Shared<TaskSpec>>, service: &Service) {
    let services = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    Shared::share(spec, services);
}

fn name_of(annotations: &Option<Annotations>) -> &str {
    annotations
        .as_ref()
        .map_or("", |annotations| annotations.name.as_str())
}

pub(crate) fn network_name(network: &Network) -> &str {
    network
        .spec
        .as_ref()
        .map_or("", |spec| name_of(&spec.annotations))
}

/// What is seen of a manager when it is read is never stored.
fn strip_observations(node: &mut Node) {
    if let Some(status) = &mut node.manager_status {
        status.leader = false;
        status.reachability = 0;
    }
}

/// IDs of the networks that the service's tasks are to be on.
pub(crate) fn networks_of_service(service: &Service) -> impl Iterator<Item = &str> {
    let task = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    let networks = task.into_iter().flat_map(|task| task.networks.iter());
    networks.map(|network| network.target.as_str())
}

/// IDs of the networks that the task is to be on.
pub(crate) fn networks_of_task(task: &Task) -> impl Iterator<Item = &str> {
    let networks = task.spec.iter().flat_map(|spec| spec.networks.iter());
    networks.map(|network| network.target.as_str())
}

fn endpoint_of(service: &Service) -> Endpoint {
    let spec = service.spec.as_ref().and_then(|spec| spec.endpoint.clone());
    Endpoint {
        ports: spec
            .as_ref()
            .map_or_else(Vec::new, |spec| spec.ports.clone()),
        spec,
        virtual_ips: Vec::new(),
    }
}

/// Tasks made from the one spec are not what the other wants. The number of
/// replicas, names and labels of the service do not matter to a task.
fn makes_tasks_dirty(old: &Option<ServiceSpec>, new: &Option<ServiceSpec>) -> bool {
    let kind = |spec: &ServiceSpec| match spec.mode.as_ref().and_then(|mode| mode.mode.as_ref()) {
        Some(service_mode::Mode::Global(_)) => 1,
        Some(service_mode::Mode::Replicated(_)) | None => 0,
    };
    match (old, new) {
        (Some(old), Some(new)) => {
            old.task != new.task || old.endpoint != new.endpoint || kind(old) != kind(new)
        }
        (old, new) => old != new,
    }
}

/// The observed state of a task.
pub(crate) fn state_of(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, TaskStatus::state)
}

/// Whether its addresses are its own: given back when it has ended.
pub(crate) fn holds_addresses(task: &Task) -> bool {
    #[cfg(feature = "museum")]
    if swarm_proto::museum::on(swarm_proto::museum::Bug::ReleasedEarly)
        && task.desired_state > TaskState::Running as i32
    {
        return false;
    }
    !task.networks.is_empty() && !is_terminal(state_of(task))
}

/// A report of the same state that says something else, and was made later. A report may be sent
/// again by way of another manager and overtake itself; the clock of its node may be set back.
fn is_news(old: Option<&TaskStatus>, new: &TaskStatus) -> bool {
    old.is_none_or(|old| new.order > old.order && !same_but_time(old, new))
}

fn same_but_time(old: &TaskStatus, new: &TaskStatus) -> bool {
    old.message == new.message
        && old.err == new.err
        && old.reason == new.reason
        && old.container == new.container
        && old.ports == new.ports
        && old.healthy == new.healthy
}
