//! Follows the store and hands every session its part of each change.
//!
//! One loop owns the registry of sessions. A batch of changes is worked out
//! once; only sessions that it concerns are touched. When the store has gone on
//! further than it remembers (or got a snapshot), two states are compared instead.
//!
//! A session has one update on its way at a time, and all sessions together have so many bytes (`Window`): what a
//! change means for thousands of nodes is made and sent as fast as it is taken, so that heartbeats and requests never
//! wait behind all of it. What happens meanwhile is not queued: when it is a session's turn it gets the difference
//! between the state that its node was told of and the newest one. So the more there is to do, the more
//! goes together. Nodes whose own tasks have changed go first. A session that is slow has its
//! place for a moment only, and nothing here waits for it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::v1::{AssignmentChange, ManagerPeer, Node, SessionInfo};
use swarm_proto::{NetworkId, NodeId, SessionId, defaults};
use swarm_store::{Change, Consensus, Event, State, Store, Watch, WatchError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::assignments::{AssignmentSet, Delta, Journal, Missed, Shared, Tables};
use super::liveness::Hearing;

/// The one update on its way to a session, and acknowledgements of reports.
const SESSION_QUEUE: usize = 32;
/// Sessions that wait to be registered.
const COMMANDS: usize = 256;
/// What is on its way to sessions at once, in bytes. Ten thousand agents beside three managers on two cores take some
/// 100 MB a second, so that heartbeats and requests wait behind it for a few tenths of a second at most.
const WINDOW: usize = 8 << 20;
/// What an update takes of it beside its own bytes: it costs 150 µs of processor time from here to its acknowledgement,
/// however small it is.
const PLACE: usize = 16 << 10;
/// How long one has its place at most: an agent that takes longer to acknowledge holds nobody up. When everything is
/// slow, places must not come back much sooner than agents acknowledge (with 100 ms ten thousand sessions were flooded).
const PLACE_MAX: Duration = Duration::from_secs(1);
/// While sessions wait for their turn new changes are looked at so often only: what comes meanwhile goes together.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// However many nodes' own tasks change, each so-many-th turn is of one that waits for its networks alone.
const TABLES_EVERY: usize = 4;
/// Sessions that are given their updates before others have their turn on this thread.
const TURN: usize = 32;
/// Events after which no more are worked out together.
const EVENTS: usize = 2048;
/// Sessions that are told while it is doubtful that a leader hears this manager.
const DOUBTFUL: usize = 50;
/// Commands that are obeyed together.
const COMMANDS_TOGETHER: usize = 64;

/// Something for a session to send.
#[derive(Debug)]
pub(super) enum Update {
    /// The node's set, or a change to it.
    Assignments {
        /// The revision that the change starts from; the whole set has none.
        applies_to: Option<u64>,
        results_in: u64,
        /// First, and then
        shared: Vec<Shared>,
        own: Vec<AssignmentChange>,
    },
    /// The node itself or the managers have changed.
    Info(Box<SessionInfo>),
    /// Committed up to this sequence.
    StatusAck(u64),
}

/// A session as it is registered.
#[derive(Debug)]
pub(super) struct Registered {
    /// As of the complete set; changes follow.
    pub(super) info: Option<Box<SessionInfo>>,
    pub(super) updates: mpsc::Receiver<Update>,
    /// For what else goes to the session, in order with the rest.
    pub(super) queue: mpsc::Sender<Update>,
    /// Why the hub ends the session.
    pub(super) ended: oneshot::Receiver<Status>,
}

enum Command {
    Open {
        node_id: NodeId,
        session_id: SessionId,
        reply: oneshot::Sender<Registered>,
    },
    /// What the session was given is on its way.
    Ready {
        node_id: NodeId,
        session_id: SessionId,
    },
    /// The agent has acknowledged what the session was given last.
    Settled {
        node_id: NodeId,
        session_id: SessionId,
    },
    Close {
        node_id: NodeId,
        session_id: SessionId,
    },
}

/// Where sessions register.
#[derive(Clone, Debug)]
pub(super) struct Hub {
    commands: mpsc::Sender<Command>,
}

impl Hub {
    /// Registers a session; an older one of the same node is ended. The first
    /// update is the complete set.
    pub(super) async fn open(
        &self,
        node_id: NodeId,
        session_id: SessionId,
    ) -> Result<Registered, Status> {
        let (reply, registered) = oneshot::channel();
        let command = Command::Open {
            node_id,
            session_id,
            reply,
        };
        let stopping = || Status::unavailable("the manager is stopping");
        self.commands.send(command).await.map_err(|_| stopping())?;
        registered.await.map_err(|_| stopping())
    }

    /// The session has sent its update, which was no acknowledgement: it can have another.
    pub(super) async fn ready(&self, node_id: NodeId, session_id: SessionId) {
        let command = Command::Ready {
            node_id,
            session_id,
        };
        self.send(command).await;
    }

    /// The agent has what the session has sent.
    pub(super) async fn settled(&self, node_id: NodeId, session_id: SessionId) {
        let command = Command::Settled {
            node_id,
            session_id,
        };
        self.send(command).await;
    }

    async fn send(&self, command: Command) {
        // When the hub has ended, so have its registrations.
        let _ = self.commands.send(command).await;
    }

    /// The session is over.
    pub(super) async fn close(&self, node_id: NodeId, session_id: SessionId) {
        let command = Command::Close {
            node_id,
            session_id,
        };
        self.send(command).await;
    }
}

/// The registry and its loop.
pub(super) fn hub(
    consensus: Arc<dyn Consensus>,
    hearing: watch::Receiver<Hearing>,
    cancel: CancellationToken,
) -> (Hub, impl Future<Output = ()> + Send) {
    let (commands, received) = mpsc::channel(COMMANDS);
    let (state, watch) = consensus.store().watch();
    let registry = Registry {
        managers: managers_of(&state),
        hearing: *hearing.borrow(),
        state,
        sessions: HashMap::new(),
        holders: HashMap::new(),
        tables: Tables::default(),
        journal: Journal::default(),
        window: Window::default(),
        due: Due::default(),
    };
    (
        Hub { commands },
        run(consensus, registry, watch, received, hearing, cancel),
    )
}

async fn run(
    consensus: Arc<dyn Consensus>,
    mut registry: Registry,
    mut watch: Watch,
    mut commands: mpsc::Receiver<Command>,
    mut hearing: watch::Receiver<Hearing>,
    cancel: CancellationToken,
) {
    // No change is looked at before, while sessions wait for their turn.
    let mut rested = Instant::now();
    loop {
        let waiting = registry.serve(Instant::now());
        let pause = match waiting {
            Waiting::Nobody => None,
            _ => Some(rested),
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            command = commands.recv() => match command {
                Some(command) => {
                    registry.obey(command);
                    // Those that are ready together often miss the same.
                    for _ in 1..COMMANDS_TOGETHER {
                        match commands.try_recv() {
                            Ok(command) => registry.obey(command),
                            Err(_) => break,
                        }
                    }
                }
                None => return,
            },
            Ok(()) = hearing.changed() => {
                let hearing = *hearing.borrow_and_update();
                registry.stand(hearing);
            }
            change = next_after(pause, &mut watch) => {
                let changes = change.and_then(|first| watch.drain(first, EVENTS));
                match changes {
                    Ok(changes) => registry.follow(&changes),
                    Err(WatchError::Lagged { .. }) => watch = registry.catch_up(consensus.store()),
                    Err(WatchError::Closed) => return,
                }
                rested = Instant::now() + PAUSE_MAX;
            }
            () = turn(waiting) => {}
        }
        // Sessions and requests have the same threads, and are to have their turn.
        tokio::task::yield_now().await;
    }
}

/// Returns when sessions that wait can have their turn.
async fn turn(waiting: Waiting) {
    match waiting {
        Waiting::Nobody => std::future::pending().await,
        Waiting::Next => {}
        Waiting::Until(time) => tokio::time::sleep_until(time).await,
    }
}

async fn next_after(time: Option<Instant>, watch: &mut Watch) -> Result<Change, WatchError> {
    if let Some(time) = time.filter(|time| *time > Instant::now()) {
        tokio::time::sleep_until(time).await;
    }
    watch.next().await
}

/// What is on its way to sessions and not acknowledged: so many bytes, each update for a bounded time.
#[derive(Debug, Default)]
struct Window {
    /// Places that were given, by time. Those that were given back are among them.
    given: VecDeque<(Instant, NodeId, u64)>,
    /// In bytes.
    taken: usize,
    last: u64,
}

/// A session's place in the window.
#[derive(Debug)]
struct Place {
    number: u64,
    bytes: usize,
}

impl Window {
    fn is_full(&self) -> bool {
        self.taken >= WINDOW
    }

    /// A place for the node from now on. It gives back the one that it had.
    fn give(&mut self, node_id: &NodeId, place: &mut Option<Place>, bytes: usize, now: Instant) {
        self.take_back(place);
        let bytes = bytes + PLACE;
        self.taken += bytes;
        self.last += 1;
        *place = Some(Place {
            number: self.last,
            bytes,
        });
        self.given.push_back((now, node_id.clone(), self.last));
    }

    fn take_back(&mut self, place: &mut Option<Place>) {
        if let Some(place) = place.take() {
            self.taken -= place.bytes;
        }
    }

    /// The next place that was given too long ago, whether or not it was given back.
    fn overdue(&mut self, now: Instant) -> Option<(NodeId, u64)> {
        let (given, ..) = self.given.front()?;
        if now < *given + PLACE_MAX {
            return None;
        }
        let (_, node_id, place) = self.given.pop_front()?;
        Some((node_id, place))
    }

    /// When the next place will have been given too long ago.
    fn next(&self) -> Option<Instant> {
        self.given.front().map(|(given, ..)| *given + PLACE_MAX)
    }
}

/// Who waits for a turn.
#[derive(Debug, Default)]
struct Due {
    /// Nodes whose own tasks have changed, which go first,
    own: VecDeque<NodeId>,
    /// and those of whose networks something has. One that was given everything meanwhile may still be here.
    tables: VecDeque<NodeId>,
    turns: usize,
}

/// What a node waits for a turn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Own,
    Tables,
}

/// In which queues a node is: once in each at most.
#[derive(Clone, Copy, Debug, Default)]
struct Queued {
    own: bool,
    tables: bool,
}

impl Due {
    /// The node waits for a turn with this, if it does not already.
    fn push(&mut self, node_id: &NodeId, queued: &mut Queued, what: What) {
        match what {
            What::Own if !queued.own => {
                queued.own = true;
                self.own.push_back(node_id.clone());
            }
            What::Tables if !queued.own && !queued.tables => {
                queued.tables = true;
                self.tables.push_back(node_id.clone());
            }
            _ => {}
        }
    }

    /// Whose turn it is.
    fn pop(&mut self) -> Option<(NodeId, What)> {
        self.turns += 1;
        let own = |due: &mut Self| Some((due.own.pop_front()?, What::Own));
        let tables = |due: &mut Self| Some((due.tables.pop_front()?, What::Tables));
        match self.turns % TABLES_EVERY {
            0 => tables(self).or_else(|| own(self)),
            _ => own(self).or_else(|| tables(self)),
        }
    }

    fn is_empty(&self) -> bool {
        self.own.is_empty() && self.tables.is_empty()
    }
}

impl Queued {
    fn popped(&mut self, what: What) {
        match what {
            What::Own => self.own = false,
            What::Tables => self.tables = false,
        }
    }
}

/// Whether sessions wait for their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Nobody,
    /// They can have it.
    Next,
    /// They can have it when others have acknowledged, or at this time.
    Until(Instant),
}

struct Registry {
    /// What all sets are true of.
    state: Arc<State>,
    /// All managers in that state.
    managers: Vec<ManagerPeer>,
    /// Whether a leader hears this manager.
    hearing: Hearing,
    sessions: HashMap<NodeId, Entry>,
    /// Nodes with a session that hold each network.
    holders: HashMap<NetworkId, BTreeSet<NodeId>>,
    /// As they are in that state.
    tables: Tables,
    /// What has led to that state.
    journal: Journal,
    window: Window,
    due: Due,
}

struct Entry {
    session_id: SessionId,
    set: AssignmentSet,
    /// Revision that was sent last.
    revision: u64,
    /// It has an update that it has not sent yet.
    sending: bool,
    /// What has happened since the state that the set is true of, if that is not the newest.
    behind: Option<Missed>,
    /// Its place in the window.
    place: Option<Place>,
    queued: Queued,
    /// It is to be told of its node and the managers,
    uninformed: bool,
    /// among that, that no leader hears this one.
    leaderless: bool,
    queue: mpsc::Sender<Update>,
    end: oneshot::Sender<Status>,
}

impl Registry {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Open {
                node_id,
                session_id,
                reply,
            } => self.open(node_id, session_id, reply),
            Command::Ready {
                node_id,
                session_id,
            } => self.ready(&node_id, &session_id),
            Command::Settled {
                node_id,
                session_id,
            } => {
                let entry = self.sessions.get_mut(&node_id);
                if let Some(entry) = entry.filter(|entry| entry.session_id == session_id) {
                    self.window.take_back(&mut entry.place);
                }
            }
            Command::Close {
                node_id,
                session_id,
            } => {
                let current = self.sessions.get(&node_id);
                if current.is_some_and(|entry| entry.session_id == session_id) {
                    let _lost = self.forget(&node_id);
                    #[cfg(feature = "museum")]
                    if swarm_proto::museum::on(swarm_proto::museum::Bug::SessionLostEndpoints) {
                        self.delete_endpoints(&node_id, _lost);
                    }
                }
            }
        }
    }

    fn open(&mut self, node_id: NodeId, session_id: SessionId, reply: oneshot::Sender<Registered>) {
        self.end(
            &node_id,
            Status::aborted("a newer session of this node has begun"),
        );
        let (queue, updates) = mpsc::channel(SESSION_QUEUE);
        let (end, ended) = oneshot::channel();
        let set = AssignmentSet::of(&self.state, &node_id);
        for network in set.networks() {
            self.holders
                .entry(network.clone())
                .or_default()
                .insert(node_id.clone());
        }
        let complete = set.complete(&self.state, &mut self.tables);
        let mut entry = Entry {
            session_id,
            set,
            revision: self.state.index(),
            sending: true,
            behind: None,
            place: None,
            queued: Queued::default(),
            uninformed: false,
            leaderless: self.sessions.len() < told(self.hearing),
            queue: queue.clone(),
            end,
        };
        let bytes = complete.encoded_len();
        // The queue is empty: it fits.
        let _ = queue.try_send(Update::Assignments {
            applies_to: None,
            results_in: entry.revision,
            shared: complete.shared,
            own: complete.own,
        });
        let registered = Registered {
            info: Some(Box::new(self.info(&node_id, entry.leaderless))),
            updates,
            queue,
            ended,
        };
        if reply.send(registered).is_ok() {
            self.window
                .give(&node_id, &mut entry.place, bytes, Instant::now());
            self.sessions.insert(node_id, entry);
        } else {
            // Nobody waits for it any more.
            for network in entry.set.networks() {
                release(&mut self.holders, network, &node_id);
            }
        }
    }

    /// Has all other sessions delete the endpoints of a node.
    #[cfg(feature = "museum")]
    fn delete_endpoints(&mut self, node_id: &NodeId, lost: Option<Entry>) {
        use swarm_proto::v1::EndpointKey;
        use swarm_proto::v1::assignment_change::Change as Kind;
        let networks = lost.iter().flat_map(|entry| entry.set.networks());
        for network in networks.cloned().collect::<Vec<_>>() {
            let on_node = self
                .state
                .tasks_on_network(&network)
                .filter(|task| task.node_id == **node_id);
            let rows: Vec<AssignmentChange> = on_node
                .map(|task| AssignmentChange {
                    change: Some(Kind::RemoveEndpoint(EndpointKey {
                        network_id: network.to_string(),
                        task_id: task.id.clone(),
                    })),
                })
                .collect();
            let holders = self.holders.get(&network).cloned().unwrap_or_default();
            for holder in holders {
                let Some(revision) = self.sessions.get(&holder).map(|entry| entry.revision) else {
                    continue;
                };
                let update = Update::Assignments {
                    applies_to: Some(revision),
                    results_in: revision,
                    shared: Vec::new(),
                    own: rows.clone(),
                };
                self.send(&holder, update);
            }
        }
    }

    /// Takes a session out of the registry.
    fn forget(&mut self, node_id: &NodeId) -> Option<Entry> {
        let mut entry = self.sessions.remove(node_id)?;
        self.window.take_back(&mut entry.place);
        for network in entry.set.networks() {
            release(&mut self.holders, network, node_id);
        }
        Some(entry)
    }

    fn end(&mut self, node_id: &NodeId, why: Status) {
        if let Some(entry) = self.forget(node_id) {
            // It may have ended by itself meanwhile.
            let _ = entry.end.send(why);
        }
    }

    /// Takes in what has changed. Those that it concerns get a turn.
    fn follow(&mut self, changes: &[Change]) {
        let prior = self.state.clone();
        let Some(delta) = Delta::new(&prior, changes) else {
            return;
        };
        self.state = delta.state().clone();
        self.journal.push(&prior, &delta);
        self.tables.forget(&delta);
        for node_id in delta.nodes() {
            self.miss(node_id, &prior, &delta, What::Own);
        }
        for network in delta.networks() {
            let Some(holders) = self.holders.remove(network) else {
                continue;
            };
            for node_id in &holders {
                self.miss(node_id, &prior, &delta, What::Tables);
            }
            self.holders.insert(network.clone(), holders);
        }
        self.inform(&prior, changes);
    }

    /// Has a session told of a delta that concerns it when it is its turn.
    fn miss(&mut self, node_id: &NodeId, prior: &Arc<State>, delta: &Delta, what: What) {
        let Some(entry) = self.sessions.get_mut(node_id) else {
            return;
        };
        let behind = &mut entry.behind;
        let missed = behind.get_or_insert_with(|| Missed::since(prior.clone()));
        if what == What::Own {
            missed.add(delta, node_id);
        }
        if !entry.sending {
            self.due.push(node_id, &mut entry.queued, what);
        }
    }

    /// The session can have another update.
    fn ready(&mut self, node_id: &NodeId, session_id: &SessionId) {
        let Some(entry) = self.sessions.get_mut(node_id) else {
            return;
        };
        if entry.session_id != *session_id {
            return;
        }
        entry.sending = false;
        if std::mem::take(&mut entry.uninformed) {
            self.tell(node_id);
        } else if let Some(missed) = &entry.behind {
            let what = match missed.own_tasks() {
                true => What::Own,
                false => What::Tables,
            };
            self.due.push(node_id, &mut entry.queued, what);
        }
    }

    /// Gives sessions that wait their turn, as many as have one now.
    fn serve(&mut self, now: Instant) -> Waiting {
        while let Some((node_id, number)) = self.window.overdue(now) {
            let place = self
                .sessions
                .get_mut(&node_id)
                .map(|entry| &mut entry.place);
            let overdue =
                |place: &&mut Option<Place>| place.as_ref().is_some_and(|p| p.number == number);
            if let Some(place) = place.filter(overdue) {
                self.window.take_back(place);
            }
        }
        let mut served = 0;
        while served < TURN && !self.window.is_full() {
            let Some((node_id, what)) = self.due.pop() else {
                return Waiting::Nobody;
            };
            let Some(entry) = self.sessions.get_mut(&node_id) else {
                continue;
            };
            entry.queued.popped(what);
            // It says when it is ready.
            if entry.sending {
                continue;
            }
            if let Some(missed) = entry.behind.take() {
                let delta = self.journal.catch_up(&entry.set, missed, &self.state);
                self.advance(node_id, &delta);
                served += 1;
            }
        }
        if self.due.is_empty() {
            return Waiting::Nobody;
        }
        match self.window.next() {
            Some(next) if self.window.is_full() => Waiting::Until(next),
            _ => Waiting::Next,
        }
    }

    /// Gives a session that is ready what a delta, which begins where its set is, means for it.
    fn advance(&mut self, node_id: NodeId, delta: &Delta) {
        let Some(entry) = self.sessions.get_mut(&node_id) else {
            return;
        };
        let advance = entry.set.advance(delta, &mut self.tables);
        let bytes = advance.encoded_len();
        for network in advance.gained {
            self.holders
                .entry(network)
                .or_default()
                .insert(node_id.clone());
        }
        for network in &advance.lost {
            release(&mut self.holders, network, &node_id);
        }
        if advance.shared.is_empty() && advance.own.is_empty() {
            return;
        }
        self.window
            .give(&node_id, &mut entry.place, bytes, Instant::now());
        let results_in = delta.state().index();
        let update = Update::Assignments {
            applies_to: Some(std::mem::replace(&mut entry.revision, results_in)),
            results_in,
            shared: advance.shared,
            own: advance.own,
        };
        self.send(&node_id, update);
    }

    fn send(&mut self, node_id: &NodeId, update: Update) {
        let Some(entry) = self.sessions.get_mut(node_id) else {
            return;
        };
        match entry.queue.try_send(update) {
            Ok(()) => entry.sending = true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(node = %node_id, "the agent does not keep up; ending its session");
                self.end(
                    node_id,
                    Status::resource_exhausted("the agent does not keep up"),
                );
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.forget(node_id);
            }
        }
    }

    /// Tells sessions what they must know of nodes and managers.
    fn inform(&mut self, prior: &State, changes: &[Change]) {
        let mut nodes = BTreeSet::new();
        let mut everyone = false;
        for event in changes.iter().flat_map(|change| change.events.iter()) {
            match event {
                Event::Node { old, new } => {
                    nodes.insert(NodeId::from(event.id()));
                    let manager = |node: &Option<Arc<Node>>| {
                        let status = node.as_ref()?.manager_status.as_ref()?;
                        Some(status.addr.clone())
                    };
                    everyone |= manager(old) != manager(new);
                }
                Event::Cluster { .. } => {
                    let shared = |state: &State| {
                        let cluster = state.cluster().cloned();
                        cluster.map(|c| (root_of(&c), c.data_path_port))
                    };
                    everyone |= shared(prior) != shared(&self.state);
                }
                _ => {}
            }
        }
        for node_id in &nodes {
            #[cfg(feature = "museum")]
            if swarm_proto::museum::on(swarm_proto::museum::Bug::RemovedNodeServed) {
                continue;
            }
            if self.state.node(node_id).is_none() {
                self.end(node_id, swarm_identity::removed(removed(node_id)));
            }
        }
        if everyone {
            self.managers = managers_of(&self.state);
            nodes = self.sessions.keys().cloned().collect();
        }
        for node_id in nodes
            .iter()
            .filter(|id| self.sessions.contains_key(*id))
            .cloned()
            .collect::<Vec<_>>()
        {
            let own = |state: &State| {
                state
                    .node(&node_id)
                    .map(|node| (node.spec.clone(), node.role))
            };
            if everyone || own(prior) != own(&self.state) {
                self.tell(&node_id);
            }
        }
    }

    /// Tells sessions whether a leader hears this manager: few of them while it is doubtful that one does.
    fn stand(&mut self, hearing: Hearing) {
        self.hearing = hearing;
        let told = told(hearing);
        let mut concerned = Vec::new();
        for (place, (node_id, entry)) in self.sessions.iter_mut().enumerate() {
            let leaderless = place < told;
            if std::mem::replace(&mut entry.leaderless, leaderless) != leaderless {
                concerned.push(node_id.clone());
            }
        }
        for node_id in concerned {
            self.tell(&node_id);
        }
    }

    /// Has the session told of its node and the managers, as soon as it is ready.
    fn tell(&mut self, node_id: &NodeId) {
        let Some(entry) = self.sessions.get_mut(node_id) else {
            return;
        };
        if entry.sending {
            entry.uninformed = true;
        } else {
            let leaderless = entry.leaderless;
            let info = self.info(node_id, leaderless);
            self.send(node_id, Update::Info(Box::new(info)));
        }
    }

    /// What a session must know beside its assignments.
    fn info(&self, node_id: &NodeId, leaderless: bool) -> SessionInfo {
        let cluster = self.state.cluster();
        let port = cluster.map_or(0, |cluster| cluster.data_path_port);
        SessionInfo {
            node: self.state.node(node_id).map(|node| (**node).clone()),
            managers: self.managers.clone(),
            root_ca_pem: cluster.map_or_else(bytes::Bytes::new, |cluster| root_of(cluster)),
            data_path_port: match port {
                0 => defaults::DATA_PATH_PORT.into(),
                port => port,
            },
            leaderless,
        }
    }

    /// Changes were lost: what they come to is seen from the states before and after them.
    fn catch_up(&mut self, store: &Store) -> Watch {
        let (state, watch) = store.watch();
        let change = Change::between(&self.state, state);
        tracing::info!(
            objects = change.events.len(),
            behind = change.index.saturating_sub(self.state.index()),
            "the dispatcher was behind; going on from the newest state"
        );
        self.follow(&[change]);
        watch
    }
}

/// How many sessions are told that no leader hears this manager.
fn told(hearing: Hearing) -> usize {
    match hearing {
        Hearing::Heard => 0,
        Hearing::Doubtful => DOUBTFUL,
        Hearing::Unheard => usize::MAX,
    }
}

fn release(holders: &mut HashMap<NetworkId, BTreeSet<NodeId>>, network: &NetworkId, node: &NodeId) {
    if let Some(nodes) = holders.get_mut(network) {
        nodes.remove(node);
        if nodes.is_empty() {
            holders.remove(network);
        }
    }
}

/// What an agent is told whose node is no longer there.
pub(super) fn removed(node_id: &NodeId) -> String {
    format!("node {node_id} has been removed from the cluster")
}

fn root_of(cluster: &swarm_proto::v1::Cluster) -> bytes::Bytes {
    cluster
        .root_ca
        .as_ref()
        .map_or_else(bytes::Bytes::new, |root| root.cert_pem.clone())
}

fn managers_of(state: &State) -> Vec<ManagerPeer> {
    let managers = state.nodes().filter_map(|node| {
        let status = node.manager_status.as_ref()?;
        Some(ManagerPeer {
            node_id: node.id.clone(),
            addr: status.addr.clone(),
        })
    });
    managers.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use swarm_proto::v1::{ObjectKind, TaskState, TaskStatus};
    use swarm_store::testing::{LocalConsensus, create, node, remove, service, task, update};

    use super::*;

    struct Running {
        consensus: Arc<LocalConsensus>,
        hub: Hub,
        hearing: watch::Sender<Hearing>,
        cancel: CancellationToken,
        run: tokio::task::JoinHandle<()>,
    }

    /// A hub over a cluster of one node "w1" with a service "s".
    fn running() -> Running {
        let consensus = LocalConsensus::new();
        let made = [
            create(node("w1", "192.0.2.1")),
            create(service("s", "web", &[])),
        ];
        consensus.write(made).expect("valid");
        let cancel = CancellationToken::new();
        let (hearing, heard) = watch::channel(Hearing::Heard);
        let (hub, run) = hub(consensus.clone(), heard, cancel.clone());
        Running {
            consensus,
            hub,
            hearing,
            cancel,
            run: tokio::spawn(run),
        }
    }

    fn assigned(id: &str, node: &str) -> swarm_proto::v1::Task {
        let mut made = task(id, "s", &[]);
        made.node_id = node.into();
        made.status = Some(TaskStatus {
            state: TaskState::Assigned.into(),
            ..TaskStatus::default()
        });
        made
    }

    /// A session, as its connection has it.
    struct Session {
        node: NodeId,
        id: SessionId,
        held: Registered,
    }

    /// An update of assignments, for comparing.
    #[derive(Debug)]
    struct Sent {
        applies_to: Option<u64>,
        results_in: u64,
        /// How many changes of the node's own.
        own: usize,
    }

    impl Session {
        async fn update(&mut self) -> Update {
            let update = self.held.updates.recv().await;
            update.expect("the session goes on")
        }

        async fn assignments(&mut self) -> Sent {
            match self.update().await {
                Update::Assignments {
                    applies_to,
                    results_in,
                    own,
                    ..
                } => Sent {
                    applies_to,
                    results_in,
                    own: own.len(),
                },
                other => panic!("{other:?}"),
            }
        }
    }

    impl Running {
        async fn open(&self) -> Session {
            self.open_of("w1".into()).await
        }

        async fn open_of(&self, node: NodeId) -> Session {
            let id = SessionId::random();
            let opened = self.hub.open(node.clone(), id.clone()).await;
            let held = opened.expect("the hub runs");
            Session { node, id, held }
        }

        /// A session that has sent its complete set.
        async fn opened(&self) -> Session {
            let mut session = self.open().await;
            assert_eq!(session.assignments().await.applies_to, None);
            self.ready(&session).await;
            session
        }

        /// So many, of nodes "n0", "n1"…, each of which has its complete set.
        async fn many(&self, count: usize) -> Vec<Session> {
            let mut sessions = Vec::new();
            for number in 0..count {
                let mut session = self.open_of(format!("n{number}").into()).await;
                session.assignments().await;
                self.ready(&session).await;
                self.settle(&session).await;
                sessions.push(session);
            }
            sessions
        }

        async fn ready(&self, session: &Session) {
            let (node, id) = (session.node.clone(), session.id.clone());
            self.hub.ready(node, id).await;
        }

        async fn settle(&self, session: &Session) {
            let (node, id) = (session.node.clone(), session.id.clone());
            self.hub.settled(node, id).await;
        }

        /// Returns when the hub has taken in all that has happened.
        async fn settled(&self) {
            loop {
                let other = self.hub.open("w2".into(), SessionId::random()).await;
                let mut other = other.expect("the hub runs");
                let informed = other.info.take().expect("new").leaderless;
                let update = other.updates.recv().await;
                let newest = self.consensus.store().state().index();
                if matches!(update, Some(Update::Assignments { results_in, .. }) if results_in == newest)
                    && informed == (*self.hearing.borrow() == Hearing::Unheard)
                {
                    return;
                }
            }
        }

        fn assign(&self, id: &str) -> u64 {
            let made = create(assigned(id, "w1"));
            self.consensus.write([made]).expect("valid")
        }

        async fn stop(self) {
            self.cancel.cancel();
            self.run.await.expect("no panic");
        }
    }

    #[tokio::test]
    async fn sessions_are_told_when_no_leader_hears_their_manager() {
        let running = running();
        let mut session = running.opened().await;
        assert!(!session.held.info.as_ref().expect("new").leaderless);
        for (hearing, leaderless) in [
            (Hearing::Doubtful, true),
            (Hearing::Heard, false),
            (Hearing::Unheard, true),
        ] {
            running.hearing.send_replace(hearing);
            match session.update().await {
                Update::Info(info) => assert_eq!(info.leaderless, leaderless),
                other => panic!("{other:?}"),
            }
            running.ready(&session).await;
        }
        assert!(running.open().await.held.info.expect("new").leaderless);
        running.stop().await;
    }

    #[tokio::test]
    async fn few_sessions_are_told_while_it_is_doubtful_that_a_leader_hears_their_manager() {
        let running = running();
        let mut sessions = running.many(DOUBTFUL + 20).await;
        let told = |sessions: &mut Vec<Session>| {
            let told = sessions
                .iter_mut()
                .map(|session| session.held.updates.try_recv());
            let told = told.map(|update| matches!(update, Ok(Update::Info(_))));
            told.map(usize::from).sum::<usize>()
        };
        for (hearing, expected) in [
            (Hearing::Doubtful, DOUBTFUL),
            (Hearing::Unheard, 20),
            (Hearing::Heard, DOUBTFUL + 20),
        ] {
            running.hearing.send_replace(hearing);
            let mut seen = 0;
            while seen < expected {
                tokio::task::yield_now().await;
                seen += told(&mut sessions);
            }
            assert_eq!((seen, told(&mut sessions)), (expected, 0));
            for session in &sessions {
                running.ready(session).await;
            }
        }
        running.stop().await;
    }

    #[tokio::test]
    async fn what_happens_while_a_session_is_not_ready_comes_to_one_update() {
        let running = running();
        let mut slow = running.open().await;
        let first = slow.assignments().await;
        assert_eq!(first.applies_to, None);
        // Others are told in the meantime; this one still sends its first update.
        let mut index = 0;
        for number in 0..100 {
            index = running.assign(&format!("t{number}"));
            tokio::task::yield_now().await;
        }
        running.hearing.send_replace(Hearing::Unheard);
        running.settled().await;
        assert!(slow.held.updates.try_recv().is_err());
        running.ready(&slow).await;
        match slow.update().await {
            Update::Info(info) => assert!(info.leaderless),
            other => panic!("{other:?}"),
        }
        running.settled().await;
        assert!(slow.held.updates.try_recv().is_err());
        running.ready(&slow).await;
        let rest = slow.assignments().await;
        assert_eq!(rest.applies_to, Some(first.results_in));
        assert_eq!((rest.results_in, rest.own), (index, 100));
        // What came and went is nothing to it.
        let gone = running.assign("gone");
        running.settled().await;
        let removed = remove(ObjectKind::Task, "gone");
        running.consensus.write([removed]).expect("valid");
        running.settled().await;
        running.ready(&slow).await;
        let index = running.assign("t100");
        let next = slow.assignments().await;
        assert_eq!(next.applies_to, Some(rest.results_in));
        assert_eq!((next.results_in, next.own), (index, 1));
        assert!(index > gone);
        running.stop().await;
    }

    /// Whether the session has got an update of assignments.
    fn served(session: &mut Session) -> bool {
        let update = session.held.updates.try_recv();
        matches!(update, Ok(Update::Assignments { .. }))
    }

    #[tokio::test(start_paused = true)]
    async fn so_much_is_on_its_way_as_fits_until_it_is_acknowledged_or_overdue() {
        let running = running();
        let mut sessions = running.many(WINDOW / PLACE + 200).await;
        let began = Instant::now();
        let tasks = sessions.iter().map(|session| {
            let task = assigned(&format!("t-{}", session.node), &session.node);
            create(task)
        });
        running.consensus.write(tasks).expect("valid");
        let mut served_at = BTreeMap::new();
        let mut rounds = Vec::new();
        while served_at.len() < sessions.len() {
            // All that can be sent now is sent before time goes on.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let mut round = Vec::new();
            for (number, session) in sessions.iter_mut().enumerate() {
                if served(session) {
                    served_at.insert(number, began.elapsed());
                    round.push(number);
                }
            }
            // The first ten acknowledge. The others do not; it is their agents' business.
            if rounds.is_empty() {
                for number in &round[..10] {
                    running.settle(&sessions[*number]).await;
                }
            }
            if !round.is_empty() {
                rounds.push((round.len(), began.elapsed()));
            }
        }
        let [(first, at_once), (second, settled), (third, overdue)] = rounds[..] else {
            panic!("{rounds:?}");
        };
        // An update has some bytes itself.
        assert!((WINDOW / PLACE - 20..=WINDOW / PLACE).contains(&first));
        assert!(at_once < PLACE_MAX / 10, "{rounds:?}");
        assert_eq!(second, 10);
        assert!(settled < PLACE_MAX / 10, "{rounds:?}");
        assert_eq!(first + second + third, sessions.len());
        let late = overdue - PLACE_MAX;
        assert!(late < PLACE_MAX / 10, "{rounds:?}");
        running.stop().await;
    }

    #[test]
    fn those_whose_own_tasks_have_changed_go_first_and_others_have_their_turn() {
        let mut due = Due::default();
        let push = |due: &mut Due, id: &str, what: &[What]| {
            let mut queued = Queued::default();
            for what in what {
                due.push(&id.into(), &mut queued, *what);
            }
        };
        let order = |due: &mut Due| {
            let order = std::iter::from_fn(|| Some(due.pop()?.0.to_string()));
            order.collect::<Vec<_>>().concat()
        };
        push(&mut due, "a", &[What::Tables, What::Tables]);
        // It moves up when it has a task to be told of, too.
        push(
            &mut due,
            "b",
            &[What::Tables, What::Own, What::Own, What::Tables],
        );
        push(&mut due, "c", &[What::Own, What::Tables]);
        assert_eq!(order(&mut due), "bcab");
        assert!(due.is_empty());
        let mut due = Due::default();
        for id in ["1", "2", "3", "4", "5", "6", "7"] {
            push(&mut due, id, &[What::Own]);
        }
        for id in ["x", "y", "z"] {
            push(&mut due, id, &[What::Tables]);
        }
        assert_eq!(order(&mut due), "123x456y7z");
    }

    #[tokio::test]
    async fn after_a_snapshot_was_installed_sessions_go_on_with_what_it_changes() {
        let running = running();
        let mut session = running.opened().await;
        let mut ahead = State::clone(&running.consensus.store().state());
        let index = ahead.index() + 100;
        let made = create(assigned("t", "w1"));
        let transaction = swarm_store::testing::transaction([made]);
        ahead = ahead.apply(index, &transaction).expect("valid").state;
        running.consensus.store().replace(ahead);
        let sent = session.assignments().await;
        assert!(sent.applies_to.is_some());
        assert_eq!((sent.results_in, sent.own), (index, 1));
        running.ready(&session).await;
        let next = running.assign("t2");
        let sent = session.assignments().await;
        assert_eq!((sent.applies_to, sent.results_in), (Some(index), next));
        running.stop().await;
    }

    #[tokio::test]
    async fn a_hub_that_has_fallen_behind_goes_on_without_starting_a_session_again() {
        let running = running();
        let mut session = running.opened().await;
        let first = running.consensus.store().state().index();
        // The hub does not run meanwhile. More than the store remembers:
        let mut made = 0;
        while running.consensus.store().watch_from(first).is_ok() {
            let some = (made..made + 2000).map(|number| {
                let node = if number % 1000 == 0 { "w1" } else { "w2" };
                create(assigned(&format!("t{number}"), node))
            });
            running.consensus.write(some).expect("valid");
            made += 2000;
        }
        let index = running.consensus.store().state().index();
        let sent = session.assignments().await;
        assert_eq!((sent.applies_to, sent.results_in), (Some(first), index));
        assert_eq!(sent.own, made / 1000);
        running.stop().await;
    }

    #[tokio::test]
    async fn what_does_not_concern_a_node_is_not_sent_to_it() {
        let running = running();
        let mut session = running.opened().await;
        let store = running.consensus.store();
        let mut seen = (**store.state().node("w1").expect("there")).clone();
        seen.status.as_mut().expect("set").message = "seen".into();
        running.consensus.write([update(seen)]).expect("valid");
        running
            .consensus
            .write([create(node("w2", ""))])
            .expect("valid");
        let index = running.assign("t");
        assert_eq!(session.assignments().await.results_in, index);
        running.stop().await;
    }
}
