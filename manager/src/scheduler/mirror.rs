//! The scheduler's own view of nodes and tasks, and its decisions.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    Node, Object, Reason, StoreAction, Task, TaskState, TaskStatus, object, store_action,
};
use swarm_proto::{NodeId, ServiceId, TaskId};
use swarm_store::store::Change;
use swarm_store::{Event, State};

use super::explain::{self, Tally};
use super::filter::{HostPort, Obstacle, Wish, closed, host_ports, reserved};
use super::spread::{Candidate, Tree};
use crate::clock::{since_epoch, timestamp};
use crate::leader::Group;

/// Failures of a service's tasks on a node within [`FAILURES_WITHIN`] that make it the last choice.
const FAILURES_MAX: u32 = 5;
/// How long a failure counts.
const FAILURES_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Failures remembered per service.
const FAILURES_KEPT: usize = 4096;
/// Tasks that are decided on in one pass; the rest follow in the next.
const PASS_MAX: usize = 10_000;
/// Code of the reason of a task that no node takes.
pub(crate) const NO_SUITABLE_NODE: &str = "no-suitable-node";

/// A node with what is left of it.
#[derive(Debug, Default)]
pub(crate) struct NodeInfo {
    /// `None` when the node is gone (its tasks may not be, yet).
    pub(crate) node: Option<Arc<Node>>,
    pub(crate) closed: Option<Obstacle>,
    pub(crate) cpus_free: i64,
    pub(crate) memory_free: i64,
    /// Tasks that are meant to run on it.
    pub(crate) active: u32,
    /// Host ports in use; counted, because a task that ends and one that starts may overlap.
    pub(crate) ports: HashMap<HostPort, u32>,
}

impl NodeInfo {
    fn set(&mut self, node: Option<Arc<Node>>) {
        let (cpus, memory) = capacity(self.node.as_deref());
        let (new_cpus, new_memory) = capacity(node.as_deref());
        self.cpus_free += new_cpus - cpus;
        self.memory_free += new_memory - memory;
        self.closed = node.as_deref().and_then(closed);
        self.node = node;
    }
}

fn capacity(node: Option<&Node>) -> (i64, i64) {
    let description = node.and_then(|node| node.description.as_ref());
    let resources = description.and_then(|description| description.resources);
    resources.map_or((0, 0), |r| (r.nano_cpus.max(0), r.memory_bytes.max(0)))
}

/// What a task takes from its node.
#[derive(Debug)]
struct Holding {
    service: ServiceId,
    node: u32,
    cpus: i64,
    memory: i64,
    ports: Box<[HostPort]>,
    active: bool,
}

#[derive(Debug, Default)]
struct ServiceInfo {
    /// Node → tasks meant to run there.
    active: HashMap<u32, u32>,
    /// Failures, oldest first.
    failures: VecDeque<(u32, Duration)>,
}

/// Tasks that ask for the same: service and version of its spec.
type GroupKey = (ServiceId, u64);

#[derive(Debug, Default)]
struct Waiting {
    tasks: BTreeSet<TaskId>,
    /// Something has changed since they were tried.
    fresh: bool,
}

/// Mirrors nodes and tasks and places what is pending.
#[derive(Debug, Default)]
pub struct Scheduler {
    nodes: Vec<NodeInfo>,
    by_id: HashMap<NodeId, u32>,
    services: HashMap<ServiceId, ServiceInfo>,
    holdings: HashMap<TaskId, Holding>,
    waiting: BTreeMap<GroupKey, Waiting>,
    /// A node has changed or has more room: whoever waits is tried again.
    try_all: bool,
}

impl Scheduler {
    /// A mirror of `state`.
    #[must_use]
    pub fn new(state: &State) -> Self {
        let mut scheduler = Self::default();
        for node in state.nodes() {
            scheduler.node_changed(&node.id, Some(node));
        }
        for task in state.tasks() {
            scheduler.task_changed(None, Some(task));
        }
        scheduler
    }

    /// Follows the state. Every change must be shown, in order.
    pub fn observe(&mut self, change: &Change) {
        for event in change.events.iter() {
            match event {
                Event::Node { old, new } => {
                    let same = match (old, new) {
                        (Some(old), Some(new)) => {
                            old.spec == new.spec
                                && old.status == new.status
                                && old.description == new.description
                                && old.role == new.role
                        }
                        _ => false,
                    };
                    let id = event.id();
                    if same {
                        self.node_mut(id).node.clone_from(new);
                    } else {
                        self.node_changed(id, new.as_ref());
                    }
                }
                Event::Task { old, new } => self.task_changed(old.as_deref(), new.as_deref()),
                Event::Cluster { .. } | Event::Service { .. } | Event::Network { .. } => {}
            }
        }
    }

    /// Takes back a decision that was not committed: the task is as in `state`.
    pub(crate) fn take_back(&mut self, state: &State, task_id: &str) {
        if let Some(task) = state.task(task_id) {
            self.task_changed(None, Some(task));
        }
    }

    fn index(&mut self, id: &str) -> u32 {
        if let Some(&index) = self.by_id.get(id) {
            return index;
        }
        let index = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        self.nodes.push(NodeInfo::default());
        self.by_id.insert(NodeId::from(id), index);
        index
    }

    fn node_mut(&mut self, id: &str) -> &mut NodeInfo {
        let index = self.index(id);
        &mut self.nodes[index as usize]
    }

    fn node_changed(&mut self, id: &str, node: Option<&Arc<Node>>) {
        self.node_mut(id).set(node.cloned());
        self.try_all = true;
    }

    fn task_changed(&mut self, old: Option<&Task>, new: Option<&Task>) {
        let Some(task) = new.or(old) else { return };
        // Most changes are progress of a task that holds what it held: also the echo of our own decisions.
        if new.is_some_and(|new| self.holds_the_same(new)) {
            return;
        }
        let id = TaskId::from(&task.id);
        self.release(&id);
        self.set_waiting(&id, task, new.is_some_and(is_pending));
        let Some(task) = new else { return };
        if task.node_id.is_empty() {
            return;
        }
        let state = observed(task);
        if is_terminal(state) {
            let failed = matches!(state, TaskState::Failed | TaskState::Rejected);
            if failed && old.is_none_or(|old| observed(old) != state) {
                self.note_failure(task);
            }
        } else if state >= TaskState::Assigned {
            self.hold(id, task);
        }
    }

    fn holds_the_same(&self, task: &Task) -> bool {
        let held = self.holdings.get(task.id.as_str());
        held.is_some_and(|held| {
            held.active == is_active(task)
                && self.by_id.get(task.node_id.as_str()) == Some(&held.node)
                && observed(task) >= TaskState::Assigned
                && !is_terminal(observed(task))
        })
    }

    /// Whether the task waits for a node. A group that gains a task is tried again.
    fn set_waiting(&mut self, id: &TaskId, task: &Task, waits: bool) {
        let key = group_key(task);
        if waits {
            let waiting = self.waiting.entry(key).or_default();
            waiting.fresh |= waiting.tasks.insert(id.clone());
        } else if let Some(waiting) = self.waiting.get_mut(&key)
            && waiting.tasks.remove(id)
            && waiting.tasks.is_empty()
        {
            self.waiting.remove(&key);
        }
    }

    fn hold(&mut self, id: TaskId, task: &Task) {
        let node = self.index(&task.node_id);
        let (cpus, memory) = reserved(task);
        let ports: Box<[HostPort]> = host_ports(task).collect();
        let active = is_active(task);
        let service = ServiceId::from(&task.service_id);
        let info = &mut self.nodes[node as usize];
        info.cpus_free -= cpus;
        info.memory_free -= memory;
        for port in &ports {
            *info.ports.entry(*port).or_default() += 1;
        }
        if active {
            info.active += 1;
            let of_service = self.services.entry(service.clone()).or_default();
            *of_service.active.entry(node).or_default() += 1;
        }
        let holding = Holding {
            service,
            node,
            cpus,
            memory,
            ports,
            active,
        };
        self.holdings.insert(id, holding);
    }

    fn release(&mut self, id: &TaskId) {
        let Some(held) = self.holdings.remove(id) else {
            return;
        };
        let info = &mut self.nodes[held.node as usize];
        info.cpus_free += held.cpus;
        info.memory_free += held.memory;
        for port in &held.ports {
            if let Some(count) = info.ports.get_mut(port) {
                *count -= 1;
                if *count == 0 {
                    info.ports.remove(port);
                }
            }
        }
        if held.active {
            info.active -= 1;
            if let Some(of_service) = self.services.get_mut(&held.service) {
                if let Some(count) = of_service.active.get_mut(&held.node) {
                    *count -= 1;
                    if *count == 0 {
                        of_service.active.remove(&held.node);
                    }
                }
                if of_service.active.is_empty() && of_service.failures.is_empty() {
                    self.services.remove(&held.service);
                }
            }
        }
        // Only matters to those who wait, and hardly anyone ever does.
        self.try_all |= !self.waiting.is_empty();
    }

    fn note_failure(&mut self, task: &Task) {
        let node = self.index(&task.node_id);
        let at = task.meta.as_ref().and_then(|meta| meta.updated_at.as_ref());
        let info = self
            .services
            .entry(ServiceId::from(&task.service_id))
            .or_default();
        if info.failures.len() >= FAILURES_KEPT {
            info.failures.pop_front();
        }
        info.failures
            .push_back((node, at.map_or(Duration::ZERO, since_epoch)));
    }

    /// What to write now: nodes for tasks, and reasons for those that get none.
    /// `state` must be the one that the last observed change led to.
    pub fn decide(&mut self, state: &State, now: Duration) -> Vec<Group> {
        let all = std::mem::take(&mut self.try_all);
        let mut keys = Vec::new();
        for (key, waiting) in &mut self.waiting {
            if std::mem::take(&mut waiting.fresh) || all {
                keys.push(key.clone());
            }
        }
        let mut groups = Vec::new();
        for key in keys {
            if groups.len() >= PASS_MAX {
                if let Some(waiting) = self.waiting.get_mut(&key) {
                    waiting.fresh = true;
                }
                continue;
            }
            self.decide_group(&key, state, now, &mut groups);
        }
        groups
    }

    fn decide_group(&mut self, key: &GroupKey, state: &State, now: Duration, out: &mut Vec<Group>) {
        let Some(waiting) = self.waiting.get(key) else {
            return;
        };
        let mut free = Vec::new();
        let mut bound = Vec::new();
        for id in &waiting.tasks {
            if free.len() >= PASS_MAX {
                break;
            }
            match state.task(id) {
                Some(task) if task.node_id.is_empty() => free.push(task),
                Some(task) => bound.push(task),
                None => {}
            }
        }
        let more = free.len() + bound.len() < waiting.tasks.len();
        let Some(wish) = free.first().or(bound.first()).map(|task| Wish::of(task)) else {
            return;
        };
        for task in bound {
            let node = self.index(&task.node_id);
            let of_service = self.services.get(&key.0);
            let of_service = of_service.and_then(|info| info.active.get(&node)).copied();
            match wish.room(&self.nodes[node as usize], of_service.unwrap_or(0)) {
                Ok(_) if wish.invalid.is_none() => {
                    self.assign(state, task, node, now, out);
                }
                Ok(_) => explain_to(task, explain::sentence(&wish, &Tally::new()), now, out),
                Err(obstacle) => {
                    let tally = Tally::from([(obstacle, 1)]);
                    explain_to(task, explain::sentence(&wish, &tally), now, out);
                }
            }
        }
        if free.is_empty() {
            return;
        }
        let chosen = self.choose(&key.0, &wish, free.len(), now);
        let placed = chosen.len();
        for (task, node) in free.iter().zip(chosen) {
            self.assign(state, task, node, now, out);
        }
        if placed < free.len() {
            // Explained after placing: what is full now is an obstacle.
            let tally = self.tally(&key.0, &wish);
            let sentence = explain::sentence(&wish, &tally);
            for task in &free[placed..] {
                explain_to(task, sentence.clone(), now, out);
            }
        } else if more && let Some(waiting) = self.waiting.get_mut(key) {
            waiting.fresh = true;
        }
    }

    /// Nodes for up to `count` tasks that ask for `wish`, one per task.
    pub(crate) fn choose(
        &mut self,
        service: &ServiceId,
        wish: &Wish,
        count: usize,
        now: Duration,
    ) -> Vec<u32> {
        if wish.invalid.is_some() {
            return Vec::new();
        }
        let (of_service, failing) = self.counts(service, now);
        let mut candidates = Vec::with_capacity(self.nodes.len());
        let mut others = Vec::new();
        for (at, info) in self.nodes.iter().enumerate() {
            #[allow(clippy::cast_possible_truncation)] // indexes are made as u32
            let node = at as u32;
            match wish.room(info, of_service[at]) {
                Ok(room) => candidates.push(Candidate {
                    node,
                    room,
                    failing: failing[at] >= FAILURES_MAX,
                    of_service: of_service[at],
                    total: info.active,
                }),
                Err(_) if of_service[at] > 0 => others.push((node, of_service[at])),
                Err(_) => {}
            }
        }
        let nodes = &self.nodes;
        let node = |index: u32| nodes[index as usize].node.as_deref();
        let mut tree = Tree::build(candidates, &others, &wish.preferences, &node);
        std::iter::from_fn(|| tree.take()).take(count).collect()
    }

    /// Per node: the service's tasks, and its recent failures there.
    fn counts(&mut self, service: &ServiceId, now: Duration) -> (Vec<u32>, Vec<u32>) {
        let mut of_service = vec![0; self.nodes.len()];
        let mut failing = vec![0; self.nodes.len()];
        if let Some(info) = self.services.get_mut(service) {
            for (&node, &count) in &info.active {
                of_service[node as usize] = count;
            }
            while let Some((_, at)) = info.failures.front()
                && now.saturating_sub(*at) > FAILURES_WITHIN
            {
                info.failures.pop_front();
            }
            for (node, at) in &info.failures {
                if now.saturating_sub(*at) <= FAILURES_WITHIN {
                    failing[*node as usize] += 1;
                }
            }
        }
        (of_service, failing)
    }

    fn tally(&self, service: &ServiceId, wish: &Wish) -> Tally {
        let info = self.services.get(service);
        let mut tally = Tally::new();
        for (at, node) in self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, n)| n.node.is_some())
        {
            #[allow(clippy::cast_possible_truncation)] // indexes are made as u32
            let of_service = info.and_then(|info| info.active.get(&(at as u32))).copied();
            if let Err(obstacle) = wish.room(node, of_service.unwrap_or(0)) {
                *tally.entry(obstacle).or_default() += 1;
            }
        }
        tally
    }

    fn assign(
        &mut self,
        state: &State,
        task: &Task,
        node: u32,
        now: Duration,
        out: &mut Vec<Group>,
    ) {
        let Some(node) = self.nodes[node as usize].node.as_ref() else {
            return;
        };
        debug_assert!(
            state.node(&node.id).is_some(),
            "the mirror follows the state"
        );
        let assigned = Task {
            node_id: node.id.clone(),
            status: Some(TaskStatus {
                state: TaskState::Assigned.into(),
                timestamp: Some(timestamp(now)),
                message: "scheduler assigned task to node".to_owned(),
                ..TaskStatus::default()
            }),
            ..task.clone()
        };
        // Counts at once, so that the next task sees it.
        self.task_changed(Some(task), Some(&assigned));
        out.push(vec![update_task(assigned)]);
    }
}

#[cfg(test)]
impl Scheduler {
    /// What is left of a node, and who is on it.
    pub(crate) fn describe(&self, id: &str) -> String {
        let Some(&at) = self.by_id.get(id) else {
            return "unknown".to_owned();
        };
        let info = &self.nodes[at as usize];
        let services: BTreeMap<&str, u32> = self
            .services
            .iter()
            .filter_map(|(service, info)| Some((service.as_str(), *info.active.get(&at)?)))
            .collect();
        format!(
            "{:?} {} {} {} {:?} {services:?}",
            info.closed, info.cpus_free, info.memory_free, info.active, info.ports
        )
    }
}

/// Says why no node takes the task, unless it says so already.
fn explain_to(task: &Task, sentence: String, now: Duration, out: &mut Vec<Group>) {
    let status = task.status.clone().unwrap_or_default();
    if status.err == sentence {
        return;
    }
    let known = status
        .reason
        .as_ref()
        .filter(|reason| reason.code == NO_SUITABLE_NODE);
    let since = known
        .and_then(|reason| reason.since)
        .unwrap_or_else(|| timestamp(now));
    let explained = Task {
        status: Some(TaskStatus {
            err: sentence.clone(),
            reason: Some(Reason {
                code: NO_SUITABLE_NODE.to_owned(),
                object: String::new(),
                message: sentence,
                since: Some(since),
            }),
            ..status
        }),
        ..task.clone()
    };
    out.push(vec![update_task(explained)]);
}

fn update_task(task: Task) -> StoreAction {
    StoreAction {
        action: Some(store_action::Action::Update(Object {
            object: Some(object::Object::Task(task)),
        })),
    }
}

fn observed(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, TaskStatus::state)
}

fn is_active(task: &Task) -> bool {
    task.desired_state() <= TaskState::Running
}

fn is_pending(task: &Task) -> bool {
    #[cfg(feature = "museum")]
    if swarm_proto::museum::on(swarm_proto::museum::Bug::PlacedTwice)
        && observed(task) == TaskState::Assigned
        && is_active(task)
    {
        return true;
    }
    observed(task) == TaskState::Pending && is_active(task)
}

fn group_key(task: &Task) -> GroupKey {
    // A task without a service is a group of its own.
    let owner = if task.service_id.is_empty() {
        &task.id
    } else {
        &task.service_id
    };
    let version = task.spec_version.map_or(0, |version| version.index);
    (ServiceId::from(owner), version)
}
