//! The scheduler's own view of nodes and tasks, and its decisions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    AssignTasks, Node, Object, Reason, StoreAction, Task, TaskAssignment, TaskState, TaskStatus,
    object, store_action,
};
use swarm_proto::{NodeId, ServiceId, TaskId};
use swarm_store::{Event, State};

use super::explain::{self, Tally};
use super::filter::{HostPort, Obstacle, Wish, closed, host_ports, reserved};
use super::spread::{Candidate, Tree};
use crate::clock::{since_epoch, timestamp};
use crate::leader::Group;

/// Keys are identifiers that managers have made at random, or places in a list.
type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;

/// Failures of a service's tasks on a node within [`FAILURES_WITHIN`] that make it the last choice.
const FAILURES_MAX: u32 = 5;
/// How long a failure counts.
const FAILURES_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Failures remembered per service.
const FAILURES_KEPT: usize = 4096;
/// Tasks that are decided on in one pass; the rest follow in the next.
const PASS_MAX: usize = 4096;
/// Nodes that are looked at for them, over all services: after so many a pass ends as well.
const VISITS_MAX: usize = if cfg!(test) { 50 } else { 500_000 };
/// Tasks that one action assigns.
const ASSIGN_MAX: usize = 500;
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

/// What a task is to the scheduler.
#[derive(Debug)]
enum Known {
    /// Waits in its group, as it was seen last.
    Waiting(Arc<Task>),
    Holding(Holding),
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order of arrival. One that is not (any more) known to wait just so counts for nothing.
    queue: VecDeque<Arc<Task>>,
    /// How many count.
    live: usize,
    /// Something has changed since they were tried.
    fresh: bool,
}

/// Mirrors nodes and tasks and places what is pending.
#[derive(Debug, Default)]
pub struct Scheduler {
    nodes: Vec<NodeInfo>,
    by_id: HashMap<NodeId, u32>,
    services: HashMap<ServiceId, ServiceInfo>,
    tasks: HashMap<TaskId, Known>,
    waiting: BTreeMap<GroupKey, Waiting>,
    /// A node has changed or has more room: whoever waits is tried again.
    try_all: bool,
    /// The last pass has ended before all were tried who are to be.
    was_cut: bool,
}

/// What a pass has decided so far.
#[derive(Default)]
struct Pass {
    assignments: Vec<TaskAssignment>,
    groups: Vec<Group>,
    /// Nodes that were looked at.
    visits: usize,
}

impl Pass {
    fn is_full(&self) -> bool {
        self.assignments.len() + self.groups.len() >= PASS_MAX || self.visits >= VISITS_MAX
    }

    fn finish(mut self) -> Vec<Group> {
        let mut rest = self.assignments.into_iter();
        loop {
            let assignments: Vec<_> = rest.by_ref().take(ASSIGN_MAX).collect();
            if assignments.is_empty() {
                return self.groups;
            }
            self.groups.push(vec![StoreAction {
                action: Some(store_action::Action::AssignTasks(AssignTasks {
                    assignments,
                })),
            }]);
        }
    }
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
    pub fn observe(&mut self, events: &[Event]) {
        for event in events {
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
                Event::Task { old, new } => self.task_changed(old.as_ref(), new.as_ref()),
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

    fn task_changed(&mut self, old: Option<&Arc<Task>>, new: Option<&Arc<Task>>) {
        let Some(task) = new.or(old) else { return };
        // Most changes are progress of a task that holds what it held: also the echo of our own decisions.
        let echo = new.is_some_and(|new| self.holds_the_same(new));
        #[cfg(feature = "museum")]
        let echo = echo && !new.is_some_and(|new| is_pending(new));
        if echo {
            return;
        }
        match self.tasks.remove(task.id.as_str()) {
            Some(Known::Holding(held)) => self.release(&held),
            Some(Known::Waiting(seen)) => self.waits_no_more(&seen),
            None => {}
        }
        let Some(task) = new else { return };
        if is_pending(task) {
            self.wait(task.clone());
        }
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::PlacedTwice) && is_pending(task) {
            return;
        }
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
            let node = self.index(&task.node_id);
            let (cpus, memory) = reserved(task);
            let holding = Holding {
                service: ServiceId::from(&task.service_id),
                node,
                cpus,
                memory,
                ports: host_ports(task).collect(),
                active: is_active(task),
            };
            self.hold(TaskId::from(&task.id), holding);
        }
    }

    fn holds_the_same(&self, task: &Task) -> bool {
        let Some(Known::Holding(held)) = self.tasks.get(task.id.as_str()) else {
            return false;
        };
        let node = self.nodes[held.node as usize].node.as_ref();
        held.active == is_active(task)
            && (node.is_some_and(|node| node.id == task.node_id)
                || self.by_id.get(task.node_id.as_str()) == Some(&held.node))
            && observed(task) >= TaskState::Assigned
            && !is_terminal(observed(task))
    }

    /// The task waits for a node. A group that gains a task is tried again.
    fn wait(&mut self, task: Arc<Task>) {
        let waiting = self.waiting.entry(group_key(&task)).or_default();
        waiting.fresh = true;
        waiting.live += 1;
        waiting.queue.push_back(task.clone());
        self.tasks
            .insert(TaskId::from(&task.id), Known::Waiting(task));
    }

    fn waits_no_more(&mut self, task: &Task) {
        let key = group_key(task);
        let Some(waiting) = self.waiting.get_mut(&key) else {
            return;
        };
        waiting.live -= 1;
        if waiting.live == 0 {
            self.waiting.remove(&key);
        } else if waiting.queue.len() > 2 * waiting.live + 64 {
            let tasks = &self.tasks;
            waiting.queue.retain(|queued| waits(tasks, queued));
        }
    }

    fn hold(&mut self, id: TaskId, holding: Holding) {
        let info = &mut self.nodes[holding.node as usize];
        info.cpus_free -= holding.cpus;
        info.memory_free -= holding.memory;
        for port in &holding.ports {
            *info.ports.entry(*port).or_default() += 1;
        }
        if holding.active {
            info.active += 1;
            let of_service = match self.services.get_mut(&holding.service) {
                Some(known) => known,
                None => self.services.entry(holding.service.clone()).or_default(),
            };
            *of_service.active.entry(holding.node).or_default() += 1;
        }
        self.tasks.insert(id, Known::Holding(holding));
    }

    fn release(&mut self, held: &Holding) {
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
        let mut pass = Pass::default();
        self.was_cut = false;
        for key in keys {
            if pass.is_full() {
                self.was_cut = true;
                if let Some(waiting) = self.waiting.get_mut(&key) {
                    waiting.fresh = true;
                }
                continue;
            }
            self.decide_group(&key, state, now, &mut pass);
            pass.visits += self.nodes.len();
        }
        pass.finish()
    }

    /// Whether there is more to decide, although nothing has changed.
    pub(crate) fn was_cut(&self) -> bool {
        self.was_cut
    }

    fn decide_group(&mut self, key: &GroupKey, state: &State, now: Duration, pass: &mut Pass) {
        let Some(waiting) = self.waiting.get_mut(key) else {
            return;
        };
        let mut free = Vec::new();
        let mut bound = Vec::new();
        while free.len() < PASS_MAX
            && let Some(task) = waiting.queue.pop_front()
        {
            match waits(&self.tasks, &task) {
                true if is_free(&task) => free.push(task),
                true => bound.push(task),
                false => {}
            }
        }
        let more = !waiting.queue.is_empty();
        let Some(wish) = free.first().or(bound.first()).map(|task| Wish::of(task)) else {
            return;
        };
        let mut unplaced = Vec::new();
        let mut placed_bound = 0;
        for task in bound {
            let node = self.index(&task.node_id);
            let of_service = self.services.get(&key.0);
            let of_service = of_service.and_then(|info| info.active.get(&node)).copied();
            match wish.room(&self.nodes[node as usize], of_service.unwrap_or(0)) {
                Ok(_) if wish.invalid.is_none() => {
                    self.assign(key, &wish, state, &task, node, pass);
                    placed_bound += 1;
                    continue;
                }
                Ok(_) => {
                    let sentence = explain::sentence(&wish, &Tally::new());
                    explain_to(&task, sentence, now, &mut pass.groups);
                }
                Err(obstacle) => {
                    let tally = Tally::from([(obstacle, 1)]);
                    let sentence = explain::sentence(&wish, &tally);
                    explain_to(&task, sentence, now, &mut pass.groups);
                }
            }
            unplaced.push(task);
        }
        let chosen = match free.is_empty() {
            true => Vec::new(),
            false => self.choose(&key.0, &wish, free.len(), now),
        };
        let placed = chosen.len();
        for (task, node) in free.iter().zip(chosen) {
            self.assign(key, &wish, state, task, node, pass);
        }
        if placed < free.len() {
            // Explained after placing: what is full now is an obstacle.
            let tally = self.tally(&key.0, &wish);
            let sentence = explain::sentence(&wish, &tally);
            for task in &free[placed..] {
                explain_to(task, sentence.clone(), now, &mut pass.groups);
            }
        }
        let full = placed < free.len();
        unplaced.extend(free.drain(placed..));
        let Some(waiting) = self.waiting.get_mut(key) else {
            return;
        };
        waiting.live -= placed + placed_bound;
        if waiting.live == 0 {
            self.waiting.remove(key);
            return;
        }
        waiting.fresh |= more && !full;
        for task in unplaced.into_iter().rev() {
            waiting.queue.push_front(task);
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

    /// Counts at once, so that the next task sees it. Taking it off the group's count is the caller's.
    fn assign(
        &mut self,
        key: &GroupKey,
        wish: &Wish,
        state: &State,
        task: &Arc<Task>,
        node: u32,
        pass: &mut Pass,
    ) {
        let Some(chosen) = self.nodes[node as usize].node.as_ref() else {
            return;
        };
        debug_assert!(
            state.node(&chosen.id).is_some(),
            "the mirror follows the state"
        );
        let version = task.meta.as_ref().and_then(|meta| meta.version);
        pass.assignments.push(TaskAssignment {
            task_id: task.id.clone(),
            expected_version: version.map_or(0, |version| version.index),
            node_id: chosen.id.clone(),
        });
        let holding = Holding {
            service: match task.service_id.is_empty() {
                true => ServiceId::from(""),
                false => key.0.clone(),
            },
            node,
            cpus: wish.cpus,
            memory: wish.memory,
            ports: host_ports(task).collect(),
            active: is_active(task),
        };
        self.hold(TaskId::from(&task.id), holding);
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

/// Whether the task waits just as it was queued.
fn waits(tasks: &HashMap<TaskId, Known>, queued: &Arc<Task>) -> bool {
    match tasks.get(queued.id.as_str()) {
        Some(Known::Waiting(seen)) => Arc::ptr_eq(seen, queued),
        Some(Known::Holding(_)) | None => false,
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

/// Any node will do, and not the one that a global service's task is made for.
fn is_free(task: &Task) -> bool {
    #[cfg(feature = "museum")]
    if swarm_proto::museum::on(swarm_proto::museum::Bug::PlacedTwice) && task.slot != 0 {
        return true;
    }
    task.node_id.is_empty()
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
