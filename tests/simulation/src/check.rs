//! What must always hold, looked at after every step of a host.
//!
//! Each manager's replica is followed through its own store's watch, so that what is compared is
//! exactly what was applied. The first replica to apply an entry writes the canon; all others must
//! say the same of it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use prost::Message as _;
use swarm_identity::KeyMaterial;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::object::Object as Kind;
use swarm_proto::v1::{NodeRole, NodeState, Object, Task, TaskState, UpdateOrder, WatchAction};
use swarm_proto::{NodeId, TaskId};
use swarm_raft::{Progress, RaftNode};
use swarm_store::{Change, Consensus as _, Event, Leadership, State, Store, Watch, WatchError};
use tokio::sync::watch;

use crate::engine::Sim;
use crate::machine;
use crate::world::{self, HostId, digest};

/// States of the canon that are remembered, to compare snapshots with.
const STATES: usize = 4096;

/// One manager's replica.
struct Replica {
    store: Arc<Store>,
    watch: Watch,
    leadership: watch::Receiver<Leadership>,
    seen: u64,
    progress: Progress,
    /// The voters, as it saw them in a term in which it leads.
    voters: Option<(u64, BTreeSet<u64>)>,
}

struct Entry {
    digest: u64,
    events: usize,
    /// Action, object and its version, of each event.
    told: Vec<(i32, String, u64)>,
    state: Option<Arc<State>>,
    by: HostId,
}

/// All that is known of the cluster from outside.
#[derive(Default)]
pub struct Checker {
    replicas: BTreeMap<HostId, Replica>,
    canon: BTreeMap<u64, Entry>,
    /// Where the first replica was when it began to be followed: what is up to there, the canon
    /// does not know.
    origin: Option<u64>,
    leaders: BTreeMap<u64, HostId>,
    materials: BTreeMap<HostId, (NodeId, KeyMaterial)>,
    founded: bool,
    started: BTreeMap<TaskId, HostId>,
    /// Services that had an update that starts first.
    start_first: BTreeSet<String>,
    /// By raft ID: the newest term in which it said that it has a durable vote.
    votes: BTreeMap<u64, u64>,
    /// By raft ID: what was committed when it became a learner.
    learners: BTreeMap<u64, u64>,
    /// The newest revision of its assignments that each node had.
    revisions: BTreeMap<NodeId, u64>,
    /// Nodes that were taken out of the cluster.
    removed: BTreeSet<String>,
    /// No node may be taken for dead now, but these.
    calm: Option<BTreeSet<String>>,
    ended: Vec<(u64, HostId, String)>,
    complaint: Option<String>,
    /// What was looked at.
    pub counts: Counts,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Entries with events in the canon.
    pub entries: u64,
    /// Entries compared with the canon.
    pub compared: u64,
    /// Whole states compared.
    pub states: u64,
    /// Terms with a leader.
    pub terms: u64,
}

thread_local! {
    static CHECKER: RefCell<Checker> = RefCell::default();
}

/// Looks at or changes what is known.
pub fn with<T>(look: impl FnOnce(&mut Checker) -> T) -> T {
    CHECKER.with(|checker| look(&mut checker.borrow_mut()))
}

/// Something is not as it must be.
pub fn complain(reason: String) {
    with(|checker| {
        checker.complaint.get_or_insert(reason);
    });
}

/// Somebody has made the cluster.
pub fn made() {
    with(|checker| checker.founded = true);
}

/// Whether somebody has.
pub fn founded() -> bool {
    with(|checker| checker.founded)
}

/// The token for new managers or workers, as whoever adds a machine asks for it.
pub fn token(manager: bool) -> Option<String> {
    let state = newest()?;
    let tokens = state.cluster()?.root_ca.as_ref()?.join_tokens.as_ref()?;
    let token = if manager {
        &tokens.manager
    } else {
        &tokens.worker
    };
    Some(token.clone())
}

/// A container is started.
pub fn started(host: HostId, task: &TaskId) {
    let before = with(|checker| checker.started.insert(task.clone(), host));
    if let Some(before) = before {
        complain(format!(
            "task {task} is started on h{host}, and was on h{before}"
        ));
    }
}

/// Whether this node was taken out of the cluster.
pub fn removed(node: &str) -> bool {
    with(|checker| checker.removed.contains(node))
}

/// From now on nothing is wrong but clocks: no node may be taken for dead.
pub fn calm() {
    with(|checker| checker.calm = Some(BTreeSet::new()));
}

/// This node may, whatever else is calm.
pub fn may_be_down(node: &str) {
    with(|checker| {
        if let Some(silent) = &mut checker.calm {
            silent.insert(node.to_owned());
        }
    });
}

/// A process has ended by itself.
pub fn ended(host: HostId, why: String) {
    with(|checker| checker.ended.push((world::now(), host, why)));
}

/// Managers whose replica is followed.
pub fn serving() -> Vec<HostId> {
    with(|checker| checker.replicas.keys().copied().collect())
}

/// Its process has ended.
pub fn gone(host: HostId) {
    with(|checker| {
        checker.replicas.remove(&host);
        checker.materials.remove(&host);
    });
}

/// A manager's key and certificate, for clients.
pub fn material() -> Option<KeyMaterial> {
    let managers = crate::plan::managers();
    with(|checker| {
        let known = checker.materials.iter();
        let mut known = known.filter(|(host, _)| managers.contains(host));
        known.next().map(|(_, (_, material))| material.clone())
    })
}

/// The newest state anybody has applied.
pub fn newest() -> Option<Arc<State>> {
    with(|checker| {
        let replicas = checker.replicas.values();
        replicas
            .map(|replica| replica.store.state())
            .max_by_key(|state| state.index())
    })
}

/// Who leads, as they say themselves.
pub fn leader() -> Option<HostId> {
    with(|checker| {
        let leads = |replica: &Replica| {
            let leadership = replica.leadership.borrow();
            leadership.is_leader.then_some(leadership.term)
        };
        let replicas = checker.replicas.iter();
        replicas
            .filter_map(|(host, replica)| Some((leads(replica)?, *host)))
            .max()
            .map(|(_, host)| host)
    })
}

/// All replicas that run, for the comparison at the end.
pub fn states() -> Vec<(HostId, Arc<State>)> {
    with(|checker| {
        let replicas = checker.replicas.iter();
        replicas
            .map(|(host, replica)| (*host, replica.store.state()))
            .collect()
    })
}

/// After a step of this host.
pub fn after_step(sim: &mut Sim, host: HostId) {
    let found = machine::node(host).and_then(|node| {
        node.look(|member| {
            let raft = member.with_manager(|manager| Arc::clone(manager.raft()));
            // A host that has joined anew is another node.
            let node_id = member.identity.node_id();
            let is_known = |checker: &mut Checker| {
                let known = checker.materials.get(&host);
                known.is_some_and(|(id, _)| *id == node_id)
            };
            let held = (node_id.clone(), member.agent.revision());
            let material = (!with(is_known)).then(|| (node_id, member.identity.material()));
            (raft, material, member.identity.role(), held)
        })
    });
    let raft = found.as_ref().and_then(|(raft, ..)| raft.clone());
    let (complaint, voted, committed) = with(|checker| {
        let entries = checker.counts.entries;
        if let Some((.., (node_id, revision))) = &found {
            checker.holds(host, node_id, *revision);
        }
        match found {
            // It is just changing; what is followed is followed on.
            None | Some((None, _, NodeRole::Manager, _)) => {}
            Some((None, _, NodeRole::Worker, _)) => {
                checker.replicas.remove(&host);
                checker.materials.remove(&host);
            }
            Some((Some(raft), material, ..)) => {
                if let Some(material) = material {
                    checker.materials.insert(host, material);
                }
                let followed = checker.replicas.get(&host);
                if followed.is_none_or(|replica| !Arc::ptr_eq(&replica.store, raft.store())) {
                    checker.begin(host, &raft);
                }
            }
        }
        checker.follow(host);
        let voted = raft.is_some_and(|raft| checker.follow_raft(host, &raft));
        let committed = checker.counts.entries > entries;
        (checker.complaint.take(), voted, committed)
    });
    if let Some(complaint) = complaint {
        sim.fail(complaint);
    }
    if voted {
        crate::plan::voted(sim, host);
    }
    if committed {
        crate::plan::committed(host);
    }
}

/// What a watch must say of an event.
fn told(event: &Event) -> (i32, String, u64) {
    let (old, new) = (event.old_object(), event.new_object());
    let action = match (&old, &new) {
        (None, _) => WatchAction::Create,
        (Some(_), None) => WatchAction::Remove,
        (Some(_), Some(_)) => WatchAction::Update,
    };
    let version = version(new.as_ref().or(old.as_ref())).unwrap_or(0);
    (action as i32, event.id().to_owned(), version)
}

/// Whether a watch that was at `from` and is told of these events, up to `index`, was told of the
/// one entry that comes next, and of all of it. `None` if `index` is no entry with events.
pub fn watched(from: u64, index: u64, events: &[(i32, Object)]) -> Option<Result<(), String>> {
    with(|checker| {
        let entry = checker.canon.get(&index)?;
        if let Some((skipped, _)) = checker.canon.range(from + 1..index).next() {
            return Some(Err(format!("a watch skipped entry {skipped}")));
        }
        if index <= from {
            return Some(Err(format!("a watch at {from} was told of {index}")));
        }
        let heard = events.iter().map(|(action, object)| {
            let version = version(Some(object)).unwrap_or(0);
            (*action, id(object).to_owned(), version)
        });
        let heard: Vec<_> = heard.collect();
        if heard == entry.told {
            Some(Ok(()))
        } else {
            Some(Err(format!(
                "a watch was told {heard:?} of entry {index}, which did {:?}",
                entry.told
            )))
        }
    })
}

fn id(object: &Object) -> &str {
    match &object.object {
        Some(Kind::Cluster(object)) => &object.id,
        Some(Kind::Node(object)) => &object.id,
        Some(Kind::Service(object)) => &object.id,
        Some(Kind::Task(object)) => &object.id,
        Some(Kind::Network(object)) => &object.id,
        None => "",
    }
}

fn object_digest(object: Option<&Object>) -> u64 {
    object.map_or(1, |object| digest(&object.encode_to_vec()))
}

fn events_digest(events: &[Event]) -> u64 {
    events.iter().fold(0, |hash, event| {
        let (old, new) = (event.old_object(), event.new_object());
        let both = object_digest(old.as_ref())
            .rotate_left(17)
            .wrapping_add(object_digest(new.as_ref()));
        (hash ^ both).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

impl Checker {
    fn complain(&mut self, reason: String) {
        self.complaint.get_or_insert(reason);
    }

    fn begin(&mut self, host: HostId, raft: &Arc<RaftNode>) {
        let store = Arc::clone(raft.store());
        let (state, watch) = store.watch();
        self.origin.get_or_insert(state.index());
        self.compare_whole(host, &state);
        let replica = Replica {
            seen: state.index(),
            watch,
            leadership: raft.leadership(),
            store,
            progress: Progress::default(),
            voters: None,
        };
        self.replicas.insert(host, replica);
    }

    fn follow(&mut self, host: HostId) {
        let Some(mut replica) = self.replicas.remove(&host) else {
            return;
        };
        if replica.leadership.has_changed().unwrap_or(false) {
            let leadership = replica.leadership.borrow_and_update().clone();
            if leadership.is_leader {
                let first = *self.leaders.entry(leadership.term).or_insert(host);
                if first != host {
                    self.complain(format!(
                        "term {} has two leaders: h{first} and h{host}",
                        leadership.term
                    ));
                }
                self.counts.terms = self.leaders.len() as u64;
            }
        }
        loop {
            match replica.watch.try_next() {
                Ok(None) => break,
                Ok(Some(change)) => {
                    self.change(host, replica.seen, &change);
                    replica.seen = change.index;
                }
                Err(WatchError::Lagged { .. } | WatchError::Closed) => {
                    let (state, watch) = replica.store.watch();
                    if state.index() < replica.seen {
                        self.complain(format!(
                            "h{host} went back from {} to {}",
                            replica.seen,
                            state.index()
                        ));
                    }
                    self.compare_whole(host, &state);
                    replica.seen = state.index();
                    replica.watch = watch;
                }
            }
        }
        self.replicas.insert(host, replica);
    }

    /// What an agent has taken it does not give back for something older.
    fn holds(&mut self, host: HostId, node_id: &NodeId, revision: u64) {
        // It has only just begun.
        if revision == 0 {
            return;
        }
        match self.revisions.get_mut(node_id) {
            Some(known) if *known > revision => {
                let known = *known;
                self.complain(format!(
                    "h{host} had its assignments of revision {known}, and has those of {revision}"
                ));
            }
            Some(known) => *known = revision,
            None => {
                self.revisions.insert(node_id.clone(), revision);
            }
        }
    }

    /// What its raft member says of itself. Whether it has voted in a new term.
    fn follow_raft(&mut self, host: HostId, raft: &RaftNode) -> bool {
        let now = raft.progress();
        let Some(replica) = self.replicas.get_mut(&host) else {
            return false;
        };
        let before = std::mem::replace(&mut replica.progress, now);
        if now == before {
            return false;
        }
        if now.membership != before.membership {
            self.follow_members(host, raft, now);
        }
        // One that has only just begun says 0.
        if now.voted_term == before.voted_term || now.voted_term == 0 {
            return false;
        }
        let known = self.votes.insert(raft.raft_id(), now.voted_term);
        if let Some(known) = known.filter(|known| *known > now.voted_term) {
            self.complain(format!(
                "h{host} had a durable vote in term {known}, and has only one in term {}",
                now.voted_term
            ));
        }
        before.voted_term != 0
    }

    /// A member that becomes a voter has what was committed when it became a learner.
    fn follow_members(&mut self, host: HostId, raft: &RaftNode, now: Progress) {
        let Some(replica) = self.replicas.get_mut(&host) else {
            return;
        };
        let leadership = replica.leadership.borrow().clone();
        if !leadership.is_leader {
            replica.voters = None;
            return;
        }
        let members = raft.members();
        let is_voter = |voter| {
            let chosen = members.iter().filter(move |member| member.voter == voter);
            chosen.map(|member| member.raft_id)
        };
        let voters: BTreeSet<u64> = is_voter(true).collect();
        let before = replica.voters.replace((leadership.term, voters.clone()));
        for learner in is_voter(false) {
            self.learners.entry(learner).or_insert(now.committed);
        }
        let Some((_, before)) = before.filter(|(term, _)| *term == leadership.term) else {
            return;
        };
        for voter in voters.difference(&before) {
            let has = raft.matched(*voter).unwrap_or(0);
            if let Some(must) = self.learners.get(voter).filter(|must| has < **must) {
                self.complain(format!(
                    "h{host} makes raft member {voter} a voter that has the log up to {has}, and {must} was committed when it came"
                ));
                return;
            }
        }
    }

    fn change(&mut self, host: HostId, seen: u64, change: &Change) {
        let index = change.index;
        let found = events_digest(&change.events);
        world::trace(6, index, found);
        if let Some((skipped, _)) = self.canon.range(seen + 1..index).next() {
            let skipped = *skipped;
            self.complain(format!(
                "h{host} applied nothing at {skipped}, where h{} did",
                self.canon[&skipped].by
            ));
        }
        if let Some(entry) = self.canon.get(&index) {
            self.counts.compared += 1;
            if entry.digest != found || entry.events != change.events.len() {
                let by = entry.by;
                self.complain(format!(
                    "entry {index} did one thing on h{by} and another on h{host}: {:#?}",
                    change.events
                ));
            }
            return;
        }
        if self.origin.is_some_and(|origin| index <= origin) {
            return;
        }
        if let Some((newest, _)) = self.canon.last_key_value()
            && *newest > index
        {
            let newest = *newest;
            self.complain(format!(
                "h{host} applied something at {index}, where others that are at {newest} did nothing: {:#?}",
                change.events
            ));
            return;
        }
        self.counts.entries += 1;
        for event in change.events.iter() {
            if let Err(reason) = check_event(event, index) {
                self.complain(format!("at {index}: {reason}"));
            }
        }
        for event in change.events.iter() {
            self.node_event(event, index);
            if let Event::Service { new: Some(new), .. } = event
                && let Some(spec) = &new.spec
                && spec.update.as_ref().map(|update| update.order())
                    == Some(UpdateOrder::StartFirst)
            {
                self.start_first.insert(new.id.clone());
            }
        }
        if let Err(reason) = check_state(&change.state, &self.start_first) {
            self.complain(format!("after {index}: {reason}"));
        }
        let entry = Entry {
            digest: found,
            events: change.events.len(),
            told: change.events.iter().map(told).collect(),
            state: Some(Arc::clone(&change.state)),
            by: host,
        };
        self.canon.insert(index, entry);
        if self.canon.len() > STATES
            && let Some((_, old)) = self.canon.iter_mut().rev().nth(STATES)
        {
            old.state = None;
        }
    }

    fn node_event(&mut self, event: &Event, index: u64) {
        let down = |node: &swarm_proto::v1::Node| {
            let status = node.status.as_ref();
            status.is_some_and(|status| status.state() == NodeState::Down)
        };
        match event {
            Event::Node {
                old: Some(old),
                new: None,
            } => {
                self.removed.insert(old.id.clone());
            }
            Event::Node {
                old: Some(old),
                new: Some(new),
            } if !down(old) && down(new) => {
                let silent = self.calm.as_ref();
                if silent.is_some_and(|silent| !silent.contains(&new.id)) {
                    self.complain(format!(
                        "at {index}: node {}, which is heard, is taken for dead",
                        new.id
                    ));
                }
            }
            _ => {}
        }
    }

    /// A state that came from a snapshot or from the log of an earlier life.
    fn compare_whole(&mut self, host: HostId, state: &Arc<State>) {
        let Some((index, entry)) = self.canon.range(..=state.index()).next_back() else {
            return;
        };
        let Some(known) = &entry.state else { return };
        self.counts.states += 1;
        if !same_objects(known, state) {
            let (index, by) = (*index, entry.by);
            self.complain(format!(
                "h{host} has another state at {} than h{by} had after {index}",
                state.index()
            ));
        }
    }
}

/// Whether two states hold the same.
pub fn same_objects(one: &State, other: &State) -> bool {
    one.cluster() == other.cluster()
        && one.nodes().eq(other.nodes())
        && one.services().eq(other.services())
        && one.networks().eq(other.networks())
        && one.tasks().eq(other.tasks())
}

fn state_of(task: &Task) -> TaskState {
    task.status.as_ref().map_or(TaskState::New, |s| s.state())
}

fn version(object: Option<&Object>) -> Option<u64> {
    let meta = match object?.object.as_ref()? {
        Kind::Cluster(object) => object.meta,
        Kind::Node(object) => object.meta,
        Kind::Service(object) => object.meta,
        Kind::Task(object) => object.meta,
        Kind::Network(object) => object.meta,
    };
    Some(meta?.version?.index)
}

fn check_event(event: &Event, index: u64) -> Result<(), String> {
    if let Event::Task {
        old: Some(old),
        new: Some(new),
    } = event
    {
        if (state_of(new) as i32) < state_of(old) as i32 {
            return Err(format!(
                "task {} went back from {:?} to {:?}",
                new.id,
                state_of(old),
                state_of(new)
            ));
        }
        if new.desired_state < old.desired_state {
            return Err(format!("task {} is meant to run again", new.id));
        }
        if !old.node_id.is_empty() && old.node_id != new.node_id {
            return Err(format!(
                "task {} moved from {} to {}",
                new.id, old.node_id, new.node_id
            ));
        }
        if is_terminal(state_of(old)) && old.status != new.status {
            return Err(format!("the end of task {} was changed", new.id));
        }
    }
    let (old, new) = (event.old_object(), event.new_object());
    if let Some(new) = version(new.as_ref())
        && new != index
    {
        return Err(format!("{} was given version {new}", event.id()));
    }
    if version(old.as_ref()).is_some_and(|old| old > index) {
        return Err(format!("the version of {} went back", event.id()));
    }
    Ok(())
}

fn check_state(state: &State, start_first: &BTreeSet<String>) -> Result<(), String> {
    let mut held = BTreeSet::new();
    for service in state.services() {
        let endpoint = service.endpoint.as_ref();
        for vip in endpoint.iter().flat_map(|endpoint| &endpoint.virtual_ips) {
            if !held.insert((vip.network_id.as_str(), plain(&vip.addr))) {
                return Err(format!("virtual address {} is held twice", vip.addr));
            }
        }
    }
    let mut ports = BTreeSet::new();
    let mut slots: BTreeMap<(&str, u64, &str), u32> = BTreeMap::new();
    for task in state.tasks() {
        if is_terminal(state_of(task)) {
            continue;
        }
        for attachment in &task.networks {
            for addr in &attachment.addresses {
                if !held.insert((attachment.network_id.as_str(), plain(addr))) {
                    return Err(format!("address {addr} is held twice, by task {}", task.id));
                }
            }
        }
        let endpoint = task.endpoint.as_ref();
        if !task.node_id.is_empty() && task.desired_state <= TaskState::Running as i32 {
            for port in endpoint.iter().flat_map(|endpoint| &endpoint.ports) {
                let host = port.publish_mode() == swarm_proto::v1::PublishMode::Host;
                if host
                    && port.published_port != 0
                    && !ports.insert((task.node_id.as_str(), port.protocol, port.published_port))
                {
                    return Err(format!(
                        "port {} of node {} is given out twice",
                        port.published_port, task.node_id
                    ));
                }
            }
        }
        if task.desired_state == TaskState::Running as i32 {
            let node = if task.slot == 0 { &*task.node_id } else { "" };
            let key = (task.service_id.as_str(), task.slot, node);
            *slots.entry(key).or_default() += 1;
        }
    }
    for ((service, slot, node), count) in slots {
        // Two while an update starts first, also one that a later update has overtaken.
        if count > 1 + u32::from(start_first.contains(service)) {
            let tasks = state
                .tasks_of_service(service)
                .filter(|task| task.slot == slot && (slot != 0 || task.node_id == node));
            let tasks: Vec<String> = tasks
                .map(|task| {
                    format!(
                        "{} {:?} to be {} of {:?} since {:?}",
                        task.id,
                        state_of(task),
                        task.desired_state,
                        task.spec_version.map(|version| version.index),
                        task.meta.and_then(|meta| meta.version),
                    )
                })
                .collect();
            return Err(format!(
                "{count} tasks of service {service} are meant to run in slot {slot}{node}: {tasks:#?}"
            ));
        }
    }
    let mut vnis = BTreeSet::new();
    let mut subnets: Vec<(u32, u32)> = Vec::new();
    for network in state.networks() {
        for subnet in &network.subnets {
            if !vnis.insert(subnet.vni) {
                return Err(format!("VNI {} is held twice", subnet.vni));
            }
            let Some(pool) = &subnet.pool else { continue };
            let Some((from, to)) = range(&pool.subnet) else {
                return Err(format!("subnet {} is none", pool.subnet));
            };
            if subnets
                .iter()
                .any(|(low, high)| from <= *high && *low <= to)
            {
                return Err(format!("subnet {} overlaps another", pool.subnet));
            }
            subnets.push((from, to));
            if held.contains(&(network.id.as_str(), plain(&pool.gateway))) {
                return Err(format!("the gateway {} was given out", pool.gateway));
            }
        }
    }
    Ok(())
}

fn plain(addr: &str) -> &str {
    addr.split_once('/').map_or(addr, |(plain, _)| plain)
}

fn range(cidr: &str) -> Option<(u32, u32)> {
    let (addr, length) = cidr.split_once('/')?;
    let addr: u32 = addr.parse::<std::net::Ipv4Addr>().ok()?.into();
    let length: u32 = length.parse().ok()?;
    let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
    Some((addr & mask, addr | !mask))
}
