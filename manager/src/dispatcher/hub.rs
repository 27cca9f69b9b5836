//! Follows the store and hands every session its part of each change.
//!
//! One loop owns the registry of sessions. A batch of changes is worked out
//! once; only sessions that it concerns are touched. When the store has gone on
//! further than it remembers (or got a snapshot), two states are compared instead.
//!
//! A session has one update on its way at a time. What happens meanwhile is not
//! queued: when the session is ready again it gets the difference between the state
//! that its node was told of and the newest one. So the more there is to do, the more
//! goes together, and a session that is slow costs nothing but its own delay. A batch that
//! goes to many sessions is followed by a pause, so that a network on thousands of nodes
//! leaves time for everything else. Nothing here waits for a session.

use std::collections::{BTreeSet, HashMap};
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

/// The one update on its way to a session, and acknowledgements of reports.
const SESSION_QUEUE: usize = 32;
/// Sessions that wait to be registered.
const COMMANDS: usize = 256;
/// Pause after a batch for each session that it went to: four times what a message costs a manager
/// from here into the network (75 µs with TLS and TCP, measured with a thousand agents).
const PAUSE_EACH: Duration = Duration::from_micros(300);
/// The longest, so that endpoints are soon known everywhere: what 3,333 sessions need. With 100 ms, which is what
/// 333 need, three managers on two cores did not get a network up on 4,000 nodes: they sent all the time.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// No shorter one is worth a timer.
const PAUSE_MIN: Duration = Duration::from_millis(2);
/// Events after which no more are worked out together.
const EVENTS: usize = 2048;
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
        // When the hub has ended, so have its registrations.
        let _ = self.commands.send(command).await;
    }

    /// The session is over.
    pub(super) async fn close(&self, node_id: NodeId, session_id: SessionId) {
        let command = Command::Close {
            node_id,
            session_id,
        };
        // When the hub has ended, so have its registrations.
        let _ = self.commands.send(command).await;
    }
}

/// The registry and its loop.
pub(super) fn hub(
    consensus: Arc<dyn Consensus>,
    leaderless: watch::Receiver<bool>,
    cancel: CancellationToken,
) -> (Hub, impl Future<Output = ()> + Send) {
    let (commands, received) = mpsc::channel(COMMANDS);
    let (state, watch) = consensus.store().watch();
    let registry = Registry {
        managers: managers_of(&state),
        leaderless: *leaderless.borrow(),
        state,
        sessions: HashMap::new(),
        holders: HashMap::new(),
        tables: Tables::default(),
        journal: Journal::default(),
    };
    (
        Hub { commands },
        run(consensus, registry, watch, received, leaderless, cancel),
    )
}

async fn run(
    consensus: Arc<dyn Consensus>,
    mut registry: Registry,
    mut watch: Watch,
    mut commands: mpsc::Receiver<Command>,
    mut leaderless: watch::Receiver<bool>,
    cancel: CancellationToken,
) {
    // No change is looked at before.
    let mut rested = Instant::now();
    loop {
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
            Ok(()) = leaderless.changed() => {
                let leaderless = *leaderless.borrow_and_update();
                registry.stand(leaderless);
            }
            change = next_after(rested, &mut watch) => {
                let changes = change.and_then(|first| watch.drain(first, EVENTS));
                let sent = match changes {
                    Ok(changes) => registry.follow(&changes),
                    Err(WatchError::Lagged { .. }) => {
                        let (sent, next) = registry.catch_up(consensus.store());
                        watch = next;
                        sent
                    }
                    Err(WatchError::Closed) => return,
                };
                let pause = (PAUSE_EACH * sent).min(PAUSE_MAX);
                if pause >= PAUSE_MIN {
                    rested = Instant::now() + pause;
                }
            }
        }
        // Sessions and requests have the same threads, and are to have their turn.
        tokio::task::yield_now().await;
    }
}

async fn next_after(time: Instant, watch: &mut Watch) -> Result<Change, WatchError> {
    if time > Instant::now() {
        tokio::time::sleep_until(time).await;
    }
    watch.next().await
}

struct Registry {
    /// What all sets are true of.
    state: Arc<State>,
    /// All managers in that state.
    managers: Vec<ManagerPeer>,
    /// No leader hears this manager.
    leaderless: bool,
    sessions: HashMap<NodeId, Entry>,
    /// Nodes with a session that hold each network.
    holders: HashMap<NetworkId, BTreeSet<NodeId>>,
    /// As they are in that state.
    tables: Tables,
    /// What has led to that state.
    journal: Journal,
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
    /// It is to be told of its node and the managers.
    uninformed: bool,
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
        let entry = Entry {
            session_id,
            set,
            revision: self.state.index(),
            sending: true,
            behind: None,
            uninformed: false,
            queue: queue.clone(),
            end,
        };
        // The queue is empty: it fits.
        let _ = queue.try_send(Update::Assignments {
            applies_to: None,
            results_in: entry.revision,
            shared: complete.shared,
            own: complete.own,
        });
        let registered = Registered {
            info: Some(Box::new(self.info(&node_id))),
            updates,
            queue,
            ended,
        };
        if reply.send(registered).is_ok() {
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
        let entry = self.sessions.remove(node_id)?;
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

    /// Takes in what has changed. To how many sessions it was sent.
    fn follow(&mut self, changes: &[Change]) -> u32 {
        let prior = self.state.clone();
        let Some(delta) = Delta::new(&prior, changes) else {
            return 0;
        };
        let mut sent = 0;
        self.state = delta.state().clone();
        self.journal.push(&delta);
        self.tables.forget(&delta);
        let mut concerned: BTreeSet<NodeId> = delta.nodes().cloned().collect();
        for network in delta.networks() {
            concerned.extend(self.holders.get(network).into_iter().flatten().cloned());
        }
        for node_id in concerned {
            match self.sessions.get_mut(&node_id) {
                Some(entry) if entry.sending => {
                    let behind = &mut entry.behind;
                    let missed = behind.get_or_insert_with(|| Missed::since(prior.clone()));
                    missed.add(&delta, &node_id);
                }
                Some(_) => sent += u32::from(self.advance(node_id, &delta)),
                None => {}
            }
        }
        self.inform(&prior, changes);
        sent
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
        } else if let Some(missed) = entry.behind.take() {
            let delta = self.journal.catch_up(&entry.set, missed, &self.state);
            self.advance(node_id.clone(), &delta);
        }
    }

    /// Gives a session that is ready what a delta, which begins where its set is, means for it.
    /// Whether that is anything.
    fn advance(&mut self, node_id: NodeId, delta: &Delta) -> bool {
        let Some(entry) = self.sessions.get_mut(&node_id) else {
            return false;
        };
        let advance = entry.set.advance(delta, &mut self.tables);
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
            return false;
        }
        let results_in = delta.state().index();
        let update = Update::Assignments {
            applies_to: Some(std::mem::replace(&mut entry.revision, results_in)),
            results_in,
            shared: advance.shared,
            own: advance.own,
        };
        self.send(&node_id, update);
        true
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

    /// Tells all sessions whether a leader hears this manager.
    fn stand(&mut self, leaderless: bool) {
        self.leaderless = leaderless;
        for node_id in self.sessions.keys().cloned().collect::<Vec<_>>() {
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
            let info = self.info(node_id);
            self.send(node_id, Update::Info(Box::new(info)));
        }
    }

    /// What a session must know beside its assignments.
    fn info(&self, node_id: &NodeId) -> SessionInfo {
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
            leaderless: self.leaderless,
        }
    }

    /// Changes were lost: what they come to is seen from the states before and after them.
    fn catch_up(&mut self, store: &Store) -> (u32, Watch) {
        let (state, watch) = store.watch();
        let change = Change::between(&self.state, state);
        tracing::info!(
            objects = change.events.len(),
            behind = change.index.saturating_sub(self.state.index()),
            "the dispatcher was behind; going on from the newest state"
        );
        (self.follow(&[change]), watch)
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
    use swarm_proto::v1::{ObjectKind, TaskState, TaskStatus};
    use swarm_store::testing::{LocalConsensus, create, node, remove, service, task, update};

    use super::*;

    struct Running {
        consensus: Arc<LocalConsensus>,
        hub: Hub,
        leaderless: watch::Sender<bool>,
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
        let (leaderless, stands) = watch::channel(false);
        let (hub, run) = hub(consensus.clone(), stands, cancel.clone());
        Running {
            consensus,
            hub,
            leaderless,
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
            let id = SessionId::random();
            let opened = self.hub.open("w1".into(), id.clone()).await;
            Session {
                id,
                held: opened.expect("the hub runs"),
            }
        }

        /// A session that has sent its complete set.
        async fn opened(&self) -> Session {
            let mut session = self.open().await;
            assert_eq!(session.assignments().await.applies_to, None);
            self.ready(&session).await;
            session
        }

        async fn ready(&self, session: &Session) {
            self.hub.ready("w1".into(), session.id.clone()).await;
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
                    && informed == *self.leaderless.borrow()
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
        running.leaderless.send_replace(true);
        match session.update().await {
            Update::Info(info) => assert!(info.leaderless),
            other => panic!("{other:?}"),
        }
        assert!(running.open().await.held.info.expect("new").leaderless);
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
        running.leaderless.send_replace(true);
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

    #[tokio::test(start_paused = true)]
    async fn a_batch_to_many_sessions_is_followed_by_a_pause_and_one_to_few_is_not() {
        let pause = |count: u32| (PAUSE_EACH * count).min(PAUSE_MAX);
        for (count, expected) in [(2, Duration::ZERO), (100, pause(100)), (5000, PAUSE_MAX)] {
            let running = running();
            let mut sessions = Vec::new();
            for number in 0..count {
                let (node, id) = (NodeId::from(format!("n{number}")), SessionId::random());
                let held = running.hub.open(node.clone(), id.clone()).await;
                let mut session = Session {
                    held: held.expect("the hub runs"),
                    id: id.clone(),
                };
                session.assignments().await;
                running.hub.ready(node, id).await;
                sessions.push(session);
            }
            let tasks = (0..count).map(|n| create(assigned(&format!("t{n}"), &format!("n{n}"))));
            running.consensus.write(tasks).expect("valid");
            for (number, session) in sessions.iter_mut().enumerate() {
                assert_eq!(session.assignments().await.own, 1);
                let node = NodeId::from(format!("n{number}"));
                running.hub.ready(node, session.id.clone()).await;
            }
            let sent = Instant::now();
            let another = create(assigned("another", "n0"));
            running.consensus.write([another]).expect("valid");
            assert_eq!(sessions[0].assignments().await.own, 1);
            // A timer is a millisecond late at most.
            let late = sent.elapsed();
            let most = expected + Duration::from_millis(u64::from(!expected.is_zero()));
            assert!((expected..=most).contains(&late), "{count}: {late:?}");
            running.stop().await;
        }
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
