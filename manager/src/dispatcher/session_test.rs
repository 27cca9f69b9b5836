//! Sessions over a real gRPC connection (without TLS: the caller's identity is inserted).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use swarm_identity::{Caller, PeerIdentity};
use swarm_proto::defaults::REPORTS_AHEAD;
use swarm_proto::v1::dispatcher_client::DispatcherClient;
use swarm_proto::v1::liveness_server::Liveness as _;
use swarm_proto::v1::{
    AgentMessage, AllocateRaftId, Assignments, AssignmentsAck, AssignmentsType, ClusterSpec,
    Goodbye, Heartbeat, LivenessReport, ManagerMessage, NodeDescription, NodeRole, NodeState,
    ObjectKind, Register, StatusReport, StoreAction, TaskState, TaskStatus, TaskStatusUpdate,
    agent_message, assignment_change, manager_message, store_action,
};
use swarm_proto::{ClusterId, NodeId};
use swarm_store::testing::{
    LocalConsensus, cluster, create, network, node, remove, service, task, update,
};
use swarm_store::{Consensus, Leadership, Member, State};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Status, Streaming};

use super::{Connect, Dispatcher};
use crate::clock::system_clock;
use crate::leader::Leader;

/// Nothing here takes nearly as long; a test that waits for a fact fails then.
const PATIENCE: Duration = Duration::from_secs(20);

/// The caller is whom the request's metadata names; managers among themselves
/// have a name in their user agent.
#[derive(Clone)]
struct AsNamed;

impl Interceptor for AsNamed {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata();
        let text = |key| metadata.get(key).and_then(|value| value.to_str().ok());
        let manager = text("user-agent").is_some_and(|agent| agent.starts_with("manager"));
        let named = text("node").or(manager.then_some("m1")).map(NodeId::from);
        if let Some(node_id) = named {
            let role = match node_id.starts_with('m') {
                true => NodeRole::Manager,
                false => NodeRole::Worker,
            };
            request.extensions_mut().insert(Caller::Peer(PeerIdentity {
                node_id,
                role,
                cluster_id: ClusterId::from("c"),
            }));
        }
        Ok(request)
    }
}

/// A manager's dispatcher, served.
struct Served {
    consensus: Arc<LocalConsensus>,
    dispatcher: Dispatcher,
    leader: Leader,
    addr: SocketAddr,
    stop: CancellationToken,
}

impl Served {
    async fn start(period: Duration, nodes: &[&str]) -> Self {
        let consensus = LocalConsensus::new();
        let mut made = cluster("c");
        made.spec = Some(ClusterSpec {
            heartbeat_period: prost_types::Duration::try_from(period).ok(),
            ..ClusterSpec::default()
        });
        let nodes = nodes.iter().map(|id| create(node(id, "192.0.2.1")));
        consensus
            .write([create(made)].into_iter().chain(nodes))
            .expect("valid");
        Self::with(consensus).await
    }

    async fn with(consensus: Arc<LocalConsensus>) -> Self {
        let connect: Connect = Arc::new(|addr| {
            let endpoint = Endpoint::from_shared(format!("http://{addr}"));
            let endpoint = endpoint.and_then(|endpoint| endpoint.user_agent("manager"));
            Ok(endpoint.map_err(|error| error.to_string())?.connect_lazy())
        });
        let dispatcher = Dispatcher::start(consensus.clone(), "m1".into(), system_clock(), connect);
        let leader = Leader::start(
            consensus.clone(),
            "m1".into(),
            system_clock(),
            dispatcher.leader_loops(),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let server = Server::builder()
            .layer(tonic::service::InterceptorLayer::new(AsNamed))
            .add_service(dispatcher.service())
            .add_service(dispatcher.liveness_service())
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        Self {
            consensus,
            dispatcher,
            leader,
            addr,
            stop,
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addr)).expect("an address");
        endpoint.connect().await.expect("it listens")
    }

    /// An agent that has registered, and what it was welcomed with.
    async fn agent(&self, node: &str) -> Agent {
        let mut agent = self.caller(node).await;
        agent.register().await;
        match agent.next().await {
            manager_message::Message::Registered(_) => agent,
            other => panic!("{other:?}"),
        }
    }

    async fn caller(&self, node: &str) -> Agent {
        let (send, sent) = mpsc::channel(16);
        let mut request = Request::new(ReceiverStream::new(sent));
        request
            .metadata_mut()
            .insert("node", node.parse().expect("ASCII"));
        let mut client = DispatcherClient::new(self.channel().await);
        let inbound = client.session(request).await.expect("taken").into_inner();
        Agent { send, inbound }
    }

    async fn until(&self, what: impl Fn(&State) -> bool) -> Arc<State> {
        let (mut state, mut watch) = self.consensus.store().watch();
        let waiting = async {
            while !what(&state) {
                state = watch.next().await.expect("watched").state;
            }
            state
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .expect("in time")
    }

    /// Has the manager be a member of the raft group.
    fn admit_itself(&self) {
        let allocation = store_action::Action::AllocateRaftId(AllocateRaftId {
            node_id: "m1".into(),
            addr: self.addr.to_string(),
        });
        self.consensus
            .write([StoreAction {
                action: Some(allocation),
            }])
            .expect("valid");
    }

    /// Another manager, which has a replica of its own and knows that this one leads.
    async fn follower(&self) -> Self {
        let state = State::clone(&self.consensus.store().state());
        let replica = LocalConsensus::with_state(state);
        replica.set_leadership(Leadership {
            term: 1,
            is_leader: false,
            leader: Some(Member {
                raft_id: 1,
                node_id: "m1".into(),
                addr: self.addr.to_string(),
                voter: true,
                reachable: true,
            }),
        });
        Self::with(replica).await
    }

    async fn stop(self) {
        self.stop.cancel();
        self.leader.stop().await;
        self.dispatcher.stop().await;
    }
}

struct Agent {
    send: mpsc::Sender<AgentMessage>,
    inbound: Streaming<ManagerMessage>,
}

impl Agent {
    async fn say(&self, message: agent_message::Message) {
        let message = AgentMessage {
            message: Some(message),
        };
        self.send.send(message).await.expect("the session is there");
    }

    async fn register(&self) {
        self.say(agent_message::Message::Register(Register {
            description: Some(NodeDescription {
                hostname: "host".into(),
                data_path_addr: "192.0.2.7".into(),
                ..NodeDescription::default()
            }),
        }))
        .await;
    }

    async fn report(&self, sequence: u64, task: &str, state: TaskState) {
        self.say(agent_message::Message::Status(StatusReport {
            sequence,
            updates: vec![TaskStatusUpdate {
                task_id: task.into(),
                status: Some(TaskStatus {
                    state: state.into(),
                    healthy: true,
                    ..TaskStatus::default()
                }),
            }],
        }))
        .await;
    }

    async fn receive(&mut self) -> Result<Option<manager_message::Message>, Status> {
        let received = tokio::time::timeout(PATIENCE, self.inbound.message());
        let received = received.await.expect("in time")?;
        Ok(received.map(|message| message.message.expect("not empty")))
    }

    async fn next(&mut self) -> manager_message::Message {
        self.receive().await.expect("no error").expect("not over")
    }

    async fn assignments(&mut self) -> Assignments {
        loop {
            if let manager_message::Message::Assignments(assignments) = self.next().await {
                return assignments;
            }
        }
    }

    async fn acknowledged(&mut self) -> u64 {
        loop {
            if let manager_message::Message::StatusAck(ack) = self.next().await {
                return ack.sequence;
            }
        }
    }

    /// How the session ends.
    async fn end(&mut self) -> Status {
        loop {
            match self.receive().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok(""),
                Err(status) => return status,
            }
        }
    }
}

/// What a set says, in short and in order of the text.
fn said(assignments: &Assignments) -> Vec<String> {
    use assignment_change::Change;
    let changes = assignments
        .clone()
        .into_changes(&mut usize::MAX.clone())
        .expect("encoded by us");
    let changes = changes.iter();
    let mut said: Vec<String> = changes
        .map(|change| match change.change.as_ref().expect("not empty") {
            Change::Task(task) => format!("task {}", task.id),
            Change::RemoveTask(id) => format!("-task {id}"),
            Change::Network(network) => format!("network {}", network.id),
            Change::RemoveNetwork(id) => format!("-network {id}"),
            Change::Endpoint(row) => {
                let ready = if row.ready { " ready" } else { "" };
                let draining = if row.draining { " draining" } else { "" };
                format!(
                    "endpoint {} {} at {}{ready}{draining}",
                    row.task_id, row.addr, row.vtep
                )
            }
            Change::RemoveEndpoint(key) => format!("-endpoint {}", key.task_id),
            Change::Service(row) => format!("service {} {}", row.name, row.vip),
            Change::RemoveService(key) => format!("-service {}", key.service_id),
        })
        .collect();
    said.sort();
    said
}

fn assigned(id: &str, service: &str, networks: &[&str], node: &str) -> swarm_proto::v1::Task {
    let mut made = task(id, service, networks);
    made.node_id = node.into();
    made.status = Some(TaskStatus {
        state: TaskState::Assigned.into(),
        ..TaskStatus::default()
    });
    made
}

#[tokio::test]
async fn an_agent_gets_its_set_and_then_every_change_to_it() {
    let served = Served::start(Duration::from_secs(5), &["w1", "w2"]).await;
    let write = |actions: Vec<_>| served.consensus.write(actions).expect("valid");
    write(vec![
        create(network("n", "net", "10.1.0.0/24")),
        create(service("s", "web", &["n"])),
        create(assigned("t1", "s", &["n"], "w1")),
    ]);
    let mut w1 = served.agent("w1").await;
    let set = w1.assignments().await;
    assert_eq!(set.r#type(), AssignmentsType::Complete);
    let mut expected = vec![
        "endpoint t1 10.1.0.3/24 at 192.0.2.7",
        "network n",
        "service web 10.1.0.2",
        "task t1",
    ];
    if said(&set)[0].ends_with("192.0.2.1") {
        // The set was made before the description was committed; its change follows.
        let moved = w1.assignments().await;
        assert_eq!(said(&moved), [expected[0]]);
        expected[0] = "endpoint t1 10.1.0.3/24 at 192.0.2.1";
    }
    assert_eq!(said(&set), expected);

    // Another node's task on the network: only its row comes.
    let mut w2 = served.agent("w2").await;
    assert_eq!(said(&w2.assignments().await), Vec::<String>::new());
    served
        .until(|state| {
            let known = |id| state.node(id).and_then(|node| node.description.as_ref());
            known("w2").is_some_and(|known| known.data_path_addr == "192.0.2.7")
        })
        .await;
    let index = write(vec![create(assigned("t2", "s", &["n"], "w2"))]);
    let change = w1.assignments().await;
    assert_eq!(change.r#type(), AssignmentsType::Incremental);
    assert_eq!(change.results_in, index);
    assert_eq!(said(&change), ["endpoint t2 10.1.0.4/24 at 192.0.2.7"]);
    let gained = w2.assignments().await;
    assert_eq!(
        said(&gained),
        [
            "endpoint t1 10.1.0.3/24 at 192.0.2.7",
            "endpoint t2 10.1.0.4/24 at 192.0.2.7",
            "network n",
            "service web 10.1.0.2",
            "task t2"
        ]
    );

    // A status: acknowledged once committed; the others see the row, the agent no task of its own again.
    w2.report(7, "t2", TaskState::Running).await;
    let ready = w1.assignments().await;
    assert_eq!(ready.applies_to, change.results_in);
    assert_eq!(said(&ready), ["endpoint t2 10.1.0.4/24 at 192.0.2.7 ready"]);
    let (mut acknowledged, mut row) = (None, None);
    while acknowledged.is_none() || row.is_none() {
        match w2.next().await {
            manager_message::Message::StatusAck(ack) => acknowledged = Some(ack.sequence),
            manager_message::Message::Assignments(change) => row = Some(said(&change)),
            _ => {}
        }
    }
    assert_eq!(acknowledged, Some(7));
    assert_eq!(row, Some(said(&ready)));

    // Wanted down: its row drains; ended: it is gone with its network.
    let mut stopped = (**served.consensus.store().state().task("t2").expect("there")).clone();
    stopped.desired_state = TaskState::Shutdown.into();
    write(vec![update(stopped)]);
    assert_eq!(
        said(&w1.assignments().await),
        ["endpoint t2 10.1.0.4/24 at 192.0.2.7 draining"]
    );
    assert_eq!(
        said(&w2.assignments().await),
        ["endpoint t2 10.1.0.4/24 at 192.0.2.7 draining", "task t2"]
    );
    w2.report(8, "t2", TaskState::Shutdown).await;
    assert_eq!(said(&w1.assignments().await), ["-endpoint t2"]);
    assert_eq!(said(&w2.assignments().await), ["-network n", "-task t2"]);
    served.stop().await;
    assert_ne!(w1.end().await.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn the_leader_hears_at_once_that_a_withdrawal_is_applied() {
    // With a heartbeat nobody would hear of it here.
    let served = Served::start(Duration::from_secs(3600), &["w1", "w2"]).await;
    let write = |actions: Vec<_>| served.consensus.write(actions).expect("valid");
    write(vec![
        create(network("n", "net", "10.1.0.0/24")),
        create(service("s", "web", &["n"])),
        create(assigned("t1", "s", &["n"], "w1")),
        create(assigned("t2", "s", &["n"], "w2")),
    ]);
    let mut w1 = served.agent("w1").await;
    let complete = w1.assignments().await.results_in;
    let ack = |revision| agent_message::Message::Ack(AssignmentsAck { revision });
    // It hears of the session itself at once in any case.
    let heard = async |revision| {
        let hearing = async {
            while served.dispatcher.liveness().acknowledged("w1") < revision {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, hearing)
            .await
            .expect("in time");
    };
    w1.say(ack(complete)).await;
    heard(complete).await;

    let mut ended = (**served.consensus.store().state().task("t2").expect("there")).clone();
    ended.desired_state = TaskState::Shutdown.into();
    write(vec![update(ended)]);
    let withdrawal = loop {
        let change = w1.assignments().await;
        if said(&change).iter().any(|row| row.ends_with("draining")) {
            break change.results_in;
        }
    };
    w1.say(ack(withdrawal)).await;
    heard(withdrawal).await;
    served.stop().await;
}

#[tokio::test]
async fn an_agent_reports_on_its_own_tasks_in_its_own_states_only() {
    let served = Served::start(Duration::from_secs(5), &["w1", "w2"]).await;
    let made = [
        create(service("s", "web", &[])),
        create(assigned("t1", "s", &[], "w1")),
        create(assigned("t2", "s", &[], "w2")),
    ];
    served.consensus.write(made).expect("valid");
    let mut w1 = served.agent("w1").await;
    w1.report(1, "t2", TaskState::Failed).await;
    w1.report(2, "t1", TaskState::Orphaned).await;
    w1.report(3, "gone", TaskState::Failed).await;
    w1.report(4, "t1", TaskState::Preparing).await;
    let mut acknowledged = 0;
    while acknowledged < 4 {
        acknowledged = w1.acknowledged().await;
    }
    let state = served.consensus.store().state();
    let of = |id| {
        state
            .task(id)
            .expect("there")
            .status
            .as_ref()
            .expect("set")
            .state()
    };
    assert_eq!(of("t1"), TaskState::Preparing);
    assert_eq!(of("t2"), TaskState::Assigned);
    served.stop().await;
}

#[tokio::test]
async fn statuses_wait_for_a_leader() {
    let served = Served::start(Duration::from_secs(5), &["w1"]).await;
    let made = [
        create(service("s", "web", &[])),
        create(assigned("t1", "s", &[], "w1")),
    ];
    served.consensus.write(made).expect("valid");
    let mut w1 = served.agent("w1").await;
    let led = served.consensus.leadership().borrow().clone();
    served.consensus.set_leadership(Leadership {
        term: 2,
        ..Leadership::default()
    });
    w1.report(1, "t1", TaskState::Running).await;
    served
        .consensus
        .set_leadership(Leadership { term: 3, ..led });
    assert_eq!(w1.acknowledged().await, 1);
    served.stop().await;
}

#[tokio::test]
async fn who_is_not_in_the_cluster_gets_no_session() {
    let served = Served::start(Duration::from_secs(5), &["w1"]).await;
    let mut stranger = served.caller("w9").await;
    stranger.register().await;
    let refused = stranger.end().await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        "node w9 has been removed from the cluster"
    );

    let mut rude = served.caller("w1").await;
    rude.say(agent_message::Message::Heartbeat(Heartbeat {}))
        .await;
    assert_eq!(rude.end().await.code(), Code::InvalidArgument);

    let mut client = DispatcherClient::new(served.channel().await);
    let nobody = client.session(tokio_stream::empty()).await;
    assert_eq!(nobody.expect_err("refused").code(), Code::Unauthenticated);

    let mut removed = served.agent("w1").await;
    served
        .consensus
        .write([remove(ObjectKind::Node, "w1")])
        .expect("valid");
    assert_eq!(removed.end().await.code(), Code::PermissionDenied);
    served.stop().await;
}

#[tokio::test]
async fn a_newer_session_of_a_node_ends_the_older() {
    let served = Served::start(Duration::from_secs(5), &["w1"]).await;
    let mut older = served.agent("w1").await;
    let mut newer = served.agent("w1").await;
    assert_eq!(older.end().await.code(), Code::Aborted);
    let set = newer.assignments().await;
    assert_eq!(set.r#type(), AssignmentsType::Complete);
    let made = [
        create(service("s", "web", &[])),
        create(assigned("t1", "s", &[], "w1")),
    ];
    served.consensus.write(made).expect("valid");
    assert_eq!(said(&newer.assignments().await), ["task t1"]);
    served.stop().await;
}

#[tokio::test]
async fn a_session_is_told_of_its_role_and_of_new_managers() {
    let served = Served::start(Duration::from_secs(5), &["w1", "m1"]).await;
    let mut w1 = served.agent("w1").await;
    served
        .until(|state| {
            let known = state.node("w1").and_then(|node| node.description.as_ref());
            known.is_some_and(|known| known.hostname == "host")
        })
        .await;
    let mut promoted = (**served.consensus.store().state().node("w1").expect("there")).clone();
    promoted.role = NodeRole::Manager.into();
    served.consensus.write([update(promoted)]).expect("valid");
    let info = loop {
        if let manager_message::Message::Info(info) = w1.next().await {
            break info;
        }
    };
    assert_eq!(info.node.expect("set").role(), NodeRole::Manager);
    let joined = swarm_proto::v1::AllocateRaftId {
        node_id: "m1".into(),
        addr: "192.0.2.9:2377".into(),
    };
    let joined = swarm_proto::v1::StoreAction {
        action: Some(swarm_proto::v1::store_action::Action::AllocateRaftId(
            joined,
        )),
    };
    served.consensus.write([joined]).expect("valid");
    let info = loop {
        if let manager_message::Message::Info(info) = w1.next().await {
            break info;
        }
    };
    assert_eq!(info.managers[0].addr, "192.0.2.9:2377");
    assert_eq!(info.data_path_port, 4789);
    served.stop().await;
}

fn is(state: &State, node: &str, wanted: NodeState, message: &str) -> bool {
    let status = state
        .node(node)
        .and_then(|node| node.status.clone())
        .unwrap_or_default();
    status.state() == wanted && status.message == message
}

#[tokio::test]
async fn a_silent_node_is_down_and_ready_when_it_is_back() {
    let served = Served::start(Duration::from_millis(200), &["w1", "w2"]).await;
    let w1 = served.agent("w1").await;
    drop(served.agent("w2").await);
    served
        .until(|state| is(state, "w1", NodeState::Down, "heartbeat failure"))
        .await;
    served
        .until(|state| is(state, "w2", NodeState::Down, "heartbeat failure"))
        .await;
    // Its session is as it was: one word is enough.
    w1.say(agent_message::Message::Heartbeat(Heartbeat {}))
        .await;
    served
        .until(|state| is(state, "w1", NodeState::Ready, ""))
        .await;
    w1.say(agent_message::Message::Ack(AssignmentsAck { revision: 41 }))
        .await;
    w1.say(agent_message::Message::Goodbye(Goodbye {})).await;
    served
        .until(|state| is(state, "w1", NodeState::Down, "left"))
        .await;
    served.stop().await;
}

#[tokio::test]
async fn a_follower_reports_its_agents_to_the_leader() {
    let leader = Served::start(Duration::from_millis(200), &["m1", "w1"]).await;
    drop(leader.agent("w1").await);
    leader
        .until(|state| is(state, "w1", NodeState::Down, "heartbeat failure"))
        .await;
    // A manager that is not in the raft group, or no longer, is told so.
    let mut request = Request::new(LivenessReport::default());
    let caller = PeerIdentity {
        node_id: "m1".into(),
        role: NodeRole::Manager,
        cluster_id: ClusterId::from("c"),
    };
    request.extensions_mut().insert(Caller::Peer(caller));
    let refused = leader.dispatcher.liveness().report(request).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    leader.admit_itself();
    let follower = leader.follower().await;
    let _w1 = follower.agent("w1").await;
    leader
        .until(|state| is(state, "w1", NodeState::Ready, ""))
        .await;
    follower.stop().await;
    leader.stop().await;
}

#[tokio::test]
async fn an_agent_is_heard_while_what_it_has_reported_waits() {
    let nodes = ["m1", "w1", "w2", "w3", "w4", "w5", "silent"];
    let leader = Served::start(Duration::from_millis(200), &nodes).await;
    leader.admit_itself();
    let tasks = nodes[1..6]
        .iter()
        .map(|node| create(assigned(&format!("t-{node}"), "s", &[], node)));
    let made = std::iter::once(create(service("s", "web", &[]))).chain(tasks);
    leader.consensus.write(made).expect("valid");
    let follower = leader.follower().await;
    let mut agents = Vec::new();
    for node in &nodes[1..6] {
        agents.push(follower.agent(node).await);
    }
    // More reports than the intake has room for.
    follower.consensus.hold(true);
    for (agent, node) in agents.iter().zip(&nodes[1..6]) {
        for sequence in 1..=REPORTS_AHEAD as u64 {
            let task = format!("t-{node}");
            agent.report(sequence, &task, TaskState::Running).await;
        }
    }
    let say = agents.iter().map(|agent| agent.send.clone());
    let beating: Vec<_> = say
        .map(|say| {
            tokio::spawn(async move {
                let mut beat = tokio::time::interval(Duration::from_millis(50));
                let heartbeat = || AgentMessage {
                    message: Some(agent_message::Message::Heartbeat(Heartbeat {})),
                };
                while say.send(heartbeat()).await.is_ok() {
                    beat.tick().await;
                }
            })
        })
        .collect();
    // Heard later than any of the reports, and never again.
    drop(leader.agent("silent").await);
    let state = leader
        .until(|state| is(state, "silent", NodeState::Down, "heartbeat failure"))
        .await;
    for node in &nodes[1..6] {
        assert!(is(&state, node, NodeState::Ready, ""), "{node}");
    }
    follower.consensus.hold(false);
    for agent in &mut agents {
        while agent.acknowledged().await < REPORTS_AHEAD as u64 {}
    }
    beating.iter().for_each(tokio::task::JoinHandle::abort);
    follower.stop().await;
    leader.stop().await;
}
