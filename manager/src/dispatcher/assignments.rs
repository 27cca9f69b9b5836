//! What a node must hold, and how that changes with the state.
//!
//! Pure. A node holds its tasks from ASSIGNED until they have ended; each
//! network that one of them is on; and for each such network the rows of all
//! its endpoints and services, wherever they are. What a batch of changes does
//! to tasks and tables is worked out once ([`Delta`]); a node's [`AssignmentSet`]
//! then picks what concerns it. For a node that has missed some of it, the [`Journal`] makes a delta of
//! what it holds alone. Nothing is rescanned but a network that is new to a node.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use ipnet::Ipv4Net;
use prost::Message as _;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::assignment_change::Change as Kind;
use swarm_proto::v1::{
    AssignmentChange, Assignments, AssignmentsType, EndpointEntry, EndpointKey, Network, Service,
    ServiceEntry, ServiceKey, Task, TaskState, TaskStatus,
};
use swarm_proto::{NetworkId, NodeId, ServiceId, TaskId, pack};
use swarm_store::{Change, Event, State};

/// Encoded bytes of the changes in one message, if no single change is larger. A session holds a few
/// messages at a time.
const MESSAGE_BYTES: usize = 120 << 10;
/// Encoded bytes of one part of shared changes before it is compressed, if no single change is larger.
const PART_BYTES: usize = 60 << 10;
/// Whole tables that are kept.
const TABLES_MAX: usize = 1024;
/// Keys of rows that a [`Journal`] remembers, of some 100 bytes each.
const JOURNAL_ROWS: usize = 50_000;

/// Changes that several nodes get, encoded once: on a network of ten thousand tasks, each of as
/// many nodes gets every row.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    parts: Arc<[Bytes]>,
    withdraws: bool,
}

impl Shared {
    /// Encodes changes.
    #[must_use]
    pub fn new(changes: &[AssignmentChange]) -> Self {
        let mut parts = Vec::new();
        let mut part = BytesMut::new();
        for change in changes {
            // As the field `changes` of AssignmentChanges, with tag and length.
            if part.len() + change.encoded_len() + 6 > PART_BYTES && !part.is_empty() {
                parts.push(pack(part.split().freeze()));
            }
            prost::encoding::message::encode(1, change, &mut part);
        }
        if !part.is_empty() {
            parts.push(pack(part.freeze()));
        }
        Self {
            parts: parts.into(),
            withdraws: changes.iter().any(withdraws),
        }
    }

    /// Whether they take a task out of balancing that stays for a while.
    pub(super) fn withdraws(&self) -> bool {
        self.withdraws
    }
}

/// Whole tables, encoded when the first node needs one and kept until it changes.
#[derive(Debug, Default)]
pub struct Tables(HashMap<NetworkId, Shared>);

impl Tables {
    /// The table of a network, as it is in `state`: the one that everything forgotten so far led to.
    pub fn of(&mut self, state: &State, network: &NetworkId) -> Shared {
        if let Some(known) = self.0.get(network) {
            return known.clone();
        }
        if self.0.len() >= TABLES_MAX {
            self.0.clear();
        }
        let made = Shared::new(&table(state, network));
        self.0.insert(network.clone(), made.clone());
        made
    }

    /// Forgets what a delta has changed.
    pub fn forget(&mut self, delta: &Delta) {
        self.0
            .retain(|id, _| !delta.tables.contains_key(id) && delta.next.network(id).is_some());
    }
}

fn change(kind: Kind) -> AssignmentChange {
    AssignmentChange { change: Some(kind) }
}

pub(super) fn state_of(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, TaskStatus::state)
}

/// Whether the task is its node's business now.
pub(super) fn is_assigned(task: &Task) -> bool {
    let state = state_of(task);
    !task.node_id.is_empty() && state >= TaskState::Assigned && !is_terminal(state)
}

pub(super) fn networks_of(task: &Task) -> impl Iterator<Item = NetworkId> {
    let attachments = task.networks.iter();
    attachments.map(|attachment| NetworkId::from(&attachment.network_id))
}

// --- Rows ------------------------------------------------------------------------

/// The row of a task in the table of a network; `None` if it has none.
fn endpoint(state: &State, network: &Network, task: &Task) -> Option<EndpointEntry> {
    if !is_assigned(task) {
        return None;
    }
    let mut attachments = task.networks.iter();
    let attachment = attachments.find(|attachment| attachment.network_id == network.id)?;
    let addr = attachment.addresses.first()?;
    let node = state.node(&task.node_id)?.description.as_ref()?;
    if node.data_path_addr.is_empty() {
        return None;
    }
    let wanted = task.desired_state <= TaskState::Running as i32;
    let healthy = task.status.as_ref().is_some_and(|status| status.healthy);
    Some(EndpointEntry {
        network_id: network.id.clone(),
        task_id: task.id.clone(),
        service_id: task.service_id.clone(),
        slot: task.slot,
        node_id: task.node_id.clone(),
        addr: addr.clone(),
        vtep: node.data_path_addr.clone(),
        aliases: attachment.aliases.clone(),
        vni: vni_of(network, addr),
        ready: wanted && healthy && state_of(task) == TaskState::Running,
        draining: !wanted,
    })
}

/// The VNI of the subnet that the address is in.
fn vni_of(network: &Network, addr: &str) -> u32 {
    let plain = addr.split_once('/').map_or(addr, |(plain, _)| plain);
    let Ok(addr) = plain.parse::<Ipv4Addr>() else {
        return 0;
    };
    let holds = |text: &str| text.parse::<Ipv4Net>().is_ok_and(|net| net.contains(&addr));
    let mut subnets = network.subnets.iter();
    let subnet =
        subnets.find(|subnet| subnet.pool.as_ref().is_some_and(|pool| holds(&pool.subnet)));
    subnet.map_or(0, |subnet| subnet.vni)
}

/// Whether a change takes a task out of balancing that stays for a while.
pub(super) fn withdraws(change: &AssignmentChange) -> bool {
    matches!(&change.change, Some(Kind::Endpoint(row)) if row.draining)
}

/// The row of a service in the table of a network; `None` if it has none.
fn service_row(network: &str, service: &Service) -> Option<ServiceEntry> {
    let spec = service.spec.as_ref()?;
    let mut attachments = spec.task.iter().flat_map(|task| &task.networks);
    let attachment = attachments.find(|attachment| attachment.target == network)?;
    let mut vips = service
        .endpoint
        .iter()
        .flat_map(|endpoint| &endpoint.virtual_ips);
    let vip = vips
        .find(|vip| vip.network_id == network)
        .map(|vip| vip.addr.as_str());
    let plain = |addr: &str| {
        addr.split_once('/')
            .map_or(addr, |(plain, _)| plain)
            .to_owned()
    };
    Some(ServiceEntry {
        network_id: network.to_owned(),
        service_id: service.id.clone(),
        name: spec
            .annotations
            .as_ref()
            .map_or_else(String::new, |named| named.name.clone()),
        vip: vip.map_or_else(String::new, plain),
        aliases: attachment.aliases.clone(),
    })
}

fn endpoint_at(state: &State, network: &str, task: &str) -> Option<EndpointEntry> {
    endpoint(state, state.network(network)?, state.task(task)?)
}

fn service_at(state: &State, network: &str, service: &str) -> Option<ServiceEntry> {
    service_row(network, state.service(service)?)
}

/// The network with all its rows.
fn table(state: &State, network: &NetworkId) -> Vec<AssignmentChange> {
    let Some(object) = state.network(network) else {
        return Vec::new();
    };
    let services = state.services_on_network(network);
    let services = services.filter_map(|service| service_row(network, service));
    let endpoints = state.tasks_on_network(network);
    let endpoints = endpoints.filter_map(|task| endpoint(state, object, task));
    std::iter::once(Kind::Network((**object).clone()))
        .chain(services.map(Kind::Service))
        .chain(endpoints.map(Kind::Endpoint))
        .map(change)
        .collect()
}

// --- What changes do ---------------------------------------------------------------

/// A task as it was held and as it is to be held; `None` = not.
type TaskChange = (Option<Arc<Task>>, Option<Arc<Task>>);

/// As tasks were before the first of several changes and are after the last.
type TaskChanges = BTreeMap<TaskId, TaskChange>;

/// Adds a change that follows those that are there.
fn merge(changes: &mut TaskChanges, id: TaskId, old: &Option<Arc<Task>>, new: &Option<Arc<Task>>) {
    let known = changes.entry(id);
    let known = known.or_insert_with(|| (old.clone(), None));
    known.1.clone_from(new);
}

/// A row of the table of a network, or the network itself: in the order in which changes are sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    Network,
    Service(ServiceId),
    Endpoint(TaskId),
}

/// The rows that may have changed, by network.
type Rows = BTreeMap<NetworkId, BTreeSet<Row>>;

/// What a batch of changes does to assignments, worked out once for all nodes.
#[derive(Debug)]
pub struct Delta {
    next: Arc<State>,
    /// Per node: its tasks as they were held and as they are to be held.
    tasks: BTreeMap<NodeId, Vec<TaskChange>>,
    /// Per network: changes to it and its rows.
    tables: BTreeMap<NetworkId, Shared>,
    /// The rows that `tables` is made of.
    rows: Rows,
}

impl Delta {
    /// From `prior` over all of `changes`, which follow it.
    #[must_use]
    pub fn new(prior: &State, changes: &[Change]) -> Option<Self> {
        let next = changes.last()?.state.clone();
        let mut tasks = TaskChanges::new();
        let mut rows = Rows::new();
        let mut touch = |network: NetworkId, row: Row| {
            rows.entry(network).or_default().insert(row);
        };
        for event in changes.iter().flat_map(|change| change.events.iter()) {
            match event {
                Event::Task { old, new } => {
                    merge(&mut tasks, TaskId::from(event.id()), old, new);
                    for task in old.iter().chain(new) {
                        networks_of(task).for_each(|n| touch(n, Row::Endpoint((&task.id).into())));
                    }
                }
                Event::Service { old, new } => {
                    for service in old.iter().chain(new) {
                        let spec = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
                        for on in spec.into_iter().flat_map(|spec| &spec.networks) {
                            touch((&on.target).into(), Row::Service((&service.id).into()));
                        }
                    }
                }
                Event::Network { old, new } => {
                    for network in old.iter().chain(new) {
                        touch((&network.id).into(), Row::Network);
                    }
                }
                Event::Node { old, new } => {
                    let vtep = |node: &swarm_proto::v1::Node| {
                        node.description
                            .as_ref()
                            .map(|known| known.data_path_addr.clone())
                    };
                    if old.as_deref().map(vtep) == new.as_deref().map(vtep) {
                        continue;
                    }
                    for task in next.tasks_on_node(event.id()) {
                        networks_of(task).for_each(|n| touch(n, Row::Endpoint((&task.id).into())));
                    }
                }
                Event::Cluster { .. } => {}
            }
        }
        let mut by_node: BTreeMap<NodeId, Vec<_>> = BTreeMap::new();
        for (before, after) in tasks.into_values() {
            let before = before.filter(|task| is_assigned(task));
            let after = after.filter(|task| is_assigned(task));
            let node = |task: &Option<Arc<Task>>| Some(NodeId::from(&task.as_ref()?.node_id));
            match (node(&before), node(&after)) {
                (None, None) => {}
                (Some(node), None) | (None, Some(node)) => {
                    by_node.entry(node).or_default().push((before, after));
                }
                (Some(old), Some(new)) if old == new => {
                    by_node.entry(new).or_default().push((before, after));
                }
                // Tasks do not move, but an ID may have been made anew in between.
                (Some(old), Some(new)) => {
                    by_node.entry(old).or_default().push((before, None));
                    by_node.entry(new).or_default().push((None, after));
                }
            }
        }
        let mut tables = BTreeMap::new();
        rows.retain(|network, rows| {
            let changes = table_changes(prior, &next, network, rows);
            if !changes.is_empty() {
                tables.insert(network.clone(), Shared::new(&changes));
            }
            !changes.is_empty()
        });
        Some(Self {
            next,
            tasks: by_node,
            tables,
            rows,
        })
    }

    /// The state after the changes.
    #[must_use]
    pub fn state(&self) -> &Arc<State> {
        &self.next
    }

    /// Nodes whose own tasks have changed.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.tasks.keys()
    }

    /// Networks whose tables have changed.
    pub fn networks(&self) -> impl Iterator<Item = &NetworkId> {
        self.tables.keys()
    }
}

/// What is different in some rows of the table of a network.
fn table_changes(
    prior: &State,
    next: &State,
    network: &NetworkId,
    rows: &BTreeSet<Row>,
) -> Vec<AssignmentChange> {
    let changed = rows.iter().filter_map(|row| match row {
        Row::Network => {
            let (before, after) = (prior.network(network)?, next.network(network)?);
            (before != after).then(|| Kind::Network((**after).clone()))
        }
        Row::Service(id) => row_change(
            service_at(prior, network, id),
            service_at(next, network, id),
            Kind::Service,
            || {
                Kind::RemoveService(ServiceKey {
                    network_id: network.to_string(),
                    service_id: id.to_string(),
                })
            },
        ),
        Row::Endpoint(id) => row_change(
            endpoint_at(prior, network, id),
            endpoint_at(next, network, id),
            Kind::Endpoint,
            || {
                Kind::RemoveEndpoint(EndpointKey {
                    network_id: network.to_string(),
                    task_id: id.to_string(),
                })
            },
        ),
    });
    changed.map(change).collect()
}

/// What makes one row of the other, if they differ.
fn row_change<R: PartialEq>(
    before: Option<R>,
    after: Option<R>,
    is: fn(R) -> Kind,
    is_gone: impl FnOnce() -> Kind,
) -> Option<Kind> {
    (before != after).then(|| after.map_or_else(is_gone, is))
}

// --- What was missed ----------------------------------------------------------------

/// Which rows have changed of late, so that a node which was not told of some changes is told of them
/// all at once: the work is that for its own tasks and networks, however much else has happened.
#[derive(Debug)]
pub struct Journal {
    /// By the index of the state that a delta led to, rising.
    entries: VecDeque<(u64, Rows)>,
    /// Rows in them, and how many are kept.
    rows: usize,
    rows_max: usize,
    /// All that has changed since this index is here.
    since: u64,
    /// Made for a node, and what others miss too; by the index from which on.
    made: HashMap<(u64, NetworkId), Option<Shared>>,
}

impl Default for Journal {
    fn default() -> Self {
        Self::with_room_for(JOURNAL_ROWS)
    }
}

impl Journal {
    /// Remembers so many rows.
    #[must_use]
    pub fn with_room_for(rows: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            rows: 0,
            rows_max: rows,
            since: 0,
            made: HashMap::new(),
        }
    }

    /// Every delta, one after the other, with the state that it starts from.
    pub fn push(&mut self, prior: &State, delta: &Delta) {
        self.made.clear();
        for (network, table) in &delta.tables {
            let key = (prior.index(), network.clone());
            self.made.insert(key, Some(table.clone()));
        }
        if delta.rows.is_empty() {
            return;
        }
        self.rows += rows_in(&delta.rows);
        self.entries
            .push_back((delta.next.index(), delta.rows.clone()));
        while self.rows > self.rows_max
            && let Some((index, rows)) = self.entries.pop_front()
        {
            self.rows -= rows_in(&rows);
            self.since = index;
        }
    }

    /// What leads a node's set from the state that it is true of to the newest one that was pushed.
    pub fn catch_up(&mut self, set: &AssignmentSet, missed: Missed, next: &Arc<State>) -> Delta {
        let before = &missed.since;
        let mut tasks = BTreeMap::new();
        let own: Vec<TaskChange> = missed.own.into_values().filter(differs).collect();
        if !own.is_empty() {
            tasks.insert(set.node_id.clone(), own);
        }
        let mut tables = BTreeMap::new();
        for network in set.networks() {
            let key = (before.index(), network.clone());
            let rows = || self.rows_since(before, next, network);
            let make = || {
                let changes = table_changes(before, next, network, &rows());
                (!changes.is_empty()).then(|| Shared::new(&changes))
            };
            let table = match self.made.get(&key) {
                Some(made) => made.clone(),
                None => {
                    let made = make();
                    self.made.insert(key, made.clone());
                    made
                }
            };
            if let Some(table) = table {
                tables.insert(network.clone(), table);
            }
        }
        Delta {
            next: next.clone(),
            tasks,
            tables,
            // Of one node: not for a journal.
            rows: Rows::new(),
        }
    }

    /// All rows of a network that may have changed since an earlier state.
    fn rows_since(&self, before: &State, next: &State, network: &NetworkId) -> BTreeSet<Row> {
        if before.index() < self.since {
            let both = [before, next].into_iter();
            return both.flat_map(|state| all_rows(state, network)).collect();
        }
        let missed = self.entries.iter().rev();
        let missed = missed.take_while(|(index, _)| *index > before.index());
        let missed = missed.filter_map(|(_, rows)| rows.get(network));
        missed.flatten().cloned().collect()
    }
}

fn rows_in(rows: &Rows) -> usize {
    rows.values().map(BTreeSet::len).sum()
}

fn all_rows(state: &State, network: &NetworkId) -> impl Iterator<Item = Row> {
    let services = state.services_on_network(network);
    let endpoints = state.tasks_on_network(network);
    std::iter::once(Row::Network)
        .chain(services.map(|service| Row::Service((&service.id).into())))
        .chain(endpoints.map(|task| Row::Endpoint((&task.id).into())))
}

fn differs(change: &TaskChange) -> bool {
    match change {
        (Some(old), Some(new)) => !Arc::ptr_eq(old, new),
        (None, None) => false,
        _ => true,
    }
}

/// What a node has not been told of, since a state. Only what has changed is kept: a node may have
/// thousands of tasks, and miss what becomes of one.
#[derive(Debug)]
pub struct Missed {
    since: Arc<State>,
    own: TaskChanges,
}

impl Missed {
    /// Nothing yet. The node's set is true of this state.
    #[must_use]
    pub fn since(state: Arc<State>) -> Self {
        Self {
            since: state,
            own: TaskChanges::new(),
        }
    }

    /// Whether tasks of the node are among it.
    #[must_use]
    pub fn own_tasks(&self) -> bool {
        !self.own.is_empty()
    }

    /// Every delta that has to do with the node's own tasks, one after the other.
    pub fn add(&mut self, delta: &Delta, node: &NodeId) {
        for (old, new) in delta.tasks.get(node).into_iter().flatten() {
            if let Some(task) = new.as_ref().or(old.as_ref()) {
                merge(&mut self.own, TaskId::from(&task.id), old, new);
            }
        }
    }
}

/// What one node holds.
#[derive(Clone, Debug, PartialEq)]
pub struct AssignmentSet {
    node_id: NodeId,
    /// How many of its tasks are on each network.
    networks: BTreeMap<NetworkId, usize>,
}

/// How a node's set changes.
#[derive(Debug, Default)]
pub struct Advance {
    /// Of tables.
    pub shared: Vec<Shared>,
    /// Of the node alone, after the others.
    pub own: Vec<AssignmentChange>,
    /// Networks that are new to the node.
    pub gained: Vec<NetworkId>,
    /// Networks that it no longer holds.
    pub lost: Vec<NetworkId>,
}

impl Advance {
    /// Bytes of all changes, nearly.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let shared = self.shared.iter().flat_map(|shared| shared.parts.iter());
        let shared: usize = shared.map(Bytes::len).sum();
        let own = self.own.iter().map(prost::Message::encoded_len);
        shared + own.sum::<usize>()
    }
}

impl AssignmentSet {
    /// What the node must hold in this state.
    #[must_use]
    pub fn of(state: &State, node_id: &NodeId) -> Self {
        let mut networks = BTreeMap::new();
        for task in state
            .tasks_on_node(node_id)
            .filter(|task| is_assigned(task))
        {
            for network in networks_of(task) {
                *networks.entry(network).or_insert(0) += 1;
            }
        }
        Self {
            node_id: node_id.clone(),
            networks,
        }
    }

    /// All of what the node must hold in the state that this is the set of, as changes to nothing.
    pub fn complete(&self, state: &State, tables: &mut Tables) -> Advance {
        let tasks = state.tasks_on_node(&self.node_id);
        let tasks = tasks.filter(|task| is_assigned(task));
        Advance {
            shared: self.networks().map(|id| tables.of(state, id)).collect(),
            own: tasks
                .map(|task| change(Kind::Task((**task).clone())))
                .collect(),
            ..Advance::default()
        }
    }

    /// The networks that the node holds.
    pub fn networks(&self) -> impl Iterator<Item = &NetworkId> {
        self.networks.keys()
    }

    /// Takes in a delta that starts from the state that the set was last true of. `tables` has
    /// forgotten what the delta changes.
    pub fn advance(&mut self, delta: &Delta, tables: &mut Tables) -> Advance {
        let mut advance = Advance::default();
        let mut own = Vec::new();
        let before: BTreeSet<NetworkId> = match delta.tasks.contains_key(&self.node_id) {
            true => self.networks.keys().cloned().collect(),
            false => BTreeSet::new(),
        };
        for (old, new) in delta.tasks.get(&self.node_id).into_iter().flatten() {
            for network in new.iter().flat_map(|task| networks_of(task)) {
                *self.networks.entry(network).or_insert(0) += 1;
            }
            for network in old.iter().flat_map(|task| networks_of(task)) {
                if let Some(count) = self.networks.get_mut(&network) {
                    *count -= 1;
                    if *count == 0 {
                        self.networks.remove(&network);
                    }
                }
            }
            match (old, new) {
                (Some(old), Some(new)) if same_work(old, new) => {}
                (_, Some(new)) => own.push(change(Kind::Task((**new).clone()))),
                (Some(old), None) => own.push(change(Kind::RemoveTask(old.id.clone()))),
                (None, None) => {}
            }
        }
        if delta.tasks.contains_key(&self.node_id) {
            for network in self
                .networks
                .keys()
                .filter(|network| !before.contains(*network))
            {
                advance.gained.push(network.clone());
                advance.shared.push(tables.of(&delta.next, network));
            }
            for network in before
                .into_iter()
                .filter(|id| !self.networks.contains_key(id))
            {
                own.push(change(Kind::RemoveNetwork(network.to_string())));
                advance.lost.push(network);
            }
        }
        for (network, rows) in &delta.tables {
            if self.networks.contains_key(network) && !advance.gained.contains(network) {
                advance.shared.push(rows.clone());
            }
        }
        advance.own = own;
        advance
    }
}

/// Whether the agent has nothing to do about the difference: it knows its own
/// reports, and versions mean nothing to it.
fn same_work(old: &Task, new: &Task) -> bool {
    old.service_id == new.service_id
        && old.slot == new.slot
        && old.desired_state == new.desired_state
        && old.withdrawn == new.withdrawn
        && old.not_before == new.not_before
        && old.networks == new.networks
        && old.endpoint == new.endpoint
        && old.service_annotations == new.service_annotations
        && old.spec == new.spec
}

// --- Messages ------------------------------------------------------------------------

/// Cuts changes into messages of a bounded size; at least one.
pub fn messages(
    kind: AssignmentsType,
    applies_to: u64,
    results_in: u64,
    shared: &[Shared],
    own: impl IntoIterator<Item = AssignmentChange>,
) -> Vec<Assignments> {
    let empty = || Assignments {
        r#type: kind.into(),
        applies_to,
        results_in,
        more: true,
        ..Assignments::default()
    };
    let mut messages = Vec::new();
    let (mut current, mut size) = (empty(), 0_usize);
    let mut room_for = |current: &mut Assignments, length: usize| {
        // With its tag and length.
        let length = length + 6;
        if size + length > MESSAGE_BYTES && size > 0 {
            messages.push(std::mem::replace(current, empty()));
            size = 0;
        }
        size += length;
    };
    for part in shared.iter().flat_map(|shared| shared.parts.iter()) {
        room_for(&mut current, part.len());
        current.shared.push(part.clone());
    }
    for change in own {
        room_for(&mut current, change.encoded_len());
        current.changes.push(change);
    }
    current.more = false;
    messages.push(current);
    messages
}
