//! A whole agent against a manager in this process; containers and kernel are the fakes.

use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use futures::StreamExt as _;
use parking_lot::Mutex;
use swarm_proto::v1::agent_message::Message as ToManager;
use swarm_proto::v1::assignment_change::Change;
use swarm_proto::v1::dispatcher_server::{Dispatcher, DispatcherServer};
use swarm_proto::v1::manager_message::Message as FromManager;
use swarm_proto::v1::{
    AgentMessage, Annotations, AssignmentChange, Assignments, AssignmentsType, ContainerSpec,
    EndpointEntry, HealthConfig, ManagerMessage, ManagerPeer, NetworkAttachment, Registered,
    SessionInfo, StatusAck, TaskSpec, TaskStatus,
};
use tonic::{Request as Call, Response, Status, Streaming};

use super::*;
use crate::network::fake::FakeDataplane;
use crate::runtime::ContainerState;
use crate::runtime::fake::{FakeRuntime, Fuse};

const NODE: &str = "node1";

/// What the manager heard.
#[derive(Clone, Debug, Default)]
struct Heard {
    registered: u32,
    heartbeats: u32,
    goodbyes: u32,
    acks: Vec<u64>,
    /// Every status received, by task.
    statuses: BTreeMap<String, Vec<TaskStatus>>,
}

impl Heard {
    fn last(&self, task: &str) -> Option<&TaskStatus> {
        self.statuses.get(task)?.last()
    }

    fn is(&self, task: &str, state: TaskState) -> bool {
        self.last(task).is_some_and(|s| s.state == state as i32)
    }
}

#[derive(Default)]
struct Manager {
    addr: Mutex<String>,
    heard: watch::Sender<Heard>,
    /// Sent to each new session.
    first: Mutex<Option<Assignments>>,
    session: Mutex<Option<mpsc::Sender<Result<ManagerMessage, Status>>>>,
    deaf: Mutex<bool>,
}

impl Manager {
    async fn send(&self, message: FromManager) {
        let session = self.session.lock().clone().expect("a session");
        let message = ManagerMessage {
            message: Some(message),
        };
        session.send(Ok(message)).await.unwrap();
    }

    async fn heard(&self, fact: impl FnMut(&Heard) -> bool) -> Heard {
        let mut heard = self.heard.subscribe();
        tokio::time::timeout(Duration::from_secs(20), heard.wait_for(fact))
            .await
            .unwrap_or_else(|_| panic!("heard only {:?}", self.heard.borrow()))
            .unwrap()
            .clone()
    }

    fn offer(&self, revision: u64, changes: Vec<Change>) {
        *self.first.lock() = Some(set(AssignmentsType::Complete, 0, revision, changes));
    }

    async fn take(&self, message: AgentMessage) {
        let mut reply = None;
        self.heard
            .send_modify(|heard| match message.message.clone() {
                Some(ToManager::Heartbeat(_)) => heard.heartbeats += 1,
                Some(ToManager::Goodbye(_)) => heard.goodbyes += 1,
                Some(ToManager::Ack(ack)) => heard.acks.push(ack.revision),
                Some(ToManager::Status(report)) if !*self.deaf.lock() => {
                    for update in report.updates {
                        let statuses = heard.statuses.entry(update.task_id).or_default();
                        statuses.extend(update.status);
                    }
                    reply = Some(StatusAck {
                        sequence: report.sequence,
                    });
                }
                _ => {}
            });
        if let (Some(reply), Some(session)) = (reply, self.session.lock().clone()) {
            let message = ManagerMessage {
                message: Some(FromManager::StatusAck(reply)),
            };
            // The session may be over.
            let _ = session.try_send(Ok(message));
        }
    }
}

struct Service(Arc<Manager>);

#[tonic::async_trait]
impl Dispatcher for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<ManagerMessage, Status>> + Send>>;

    async fn session(
        &self,
        call: Call<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let manager = self.0.clone();
        let mut inbox = call.into_inner();
        let first = inbox.message().await?.and_then(|m| m.message);
        assert!(matches!(first, Some(ToManager::Register(_))));
        let (sender, receiver) = mpsc::channel(64);
        let registered = FromManager::Registered(Registered {
            session_id: "s".to_owned(),
            heartbeat_period: Some(prost_types::Duration {
                seconds: 0,
                nanos: 100_000_000,
            }),
            info: Some(SessionInfo {
                managers: vec![ManagerPeer {
                    node_id: "m".to_owned(),
                    addr: manager.addr.lock().clone(),
                }],
                data_path_port: 4790,
                ..Default::default()
            }),
        });
        *manager.session.lock() = Some(sender);
        manager.send(registered).await;
        let first = manager.first.lock().clone();
        if let Some(first) = first {
            manager.send(FromManager::Assignments(first)).await;
        }
        manager.heard.send_modify(|heard| heard.registered += 1);
        let weak = Arc::downgrade(&manager);
        tokio::spawn(async move {
            while let Some(Ok(message)) = inbox.next().await {
                if let Some(manager) = weak.upgrade() {
                    manager.take(message).await;
                }
            }
            // The agent has closed its half: so do we.
            if let Some(manager) = weak.upgrade() {
                manager.session.lock().take();
            }
        });
        let replies = tokio_stream::wrappers::ReceiverStream::new(receiver);
        Ok(Response::new(Box::pin(replies)))
    }
}

struct Plain;

impl Connector for Plain {
    fn channel(&self, addr: &str) -> Result<tonic::transport::Channel, String> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}"))
            .map_err(|error| error.to_string())?;
        Ok(endpoint.connect_lazy())
    }
}

struct Rig {
    dir: tempfile::TempDir,
    fuse: Arc<Fuse>,
    runtime: Arc<FakeRuntime>,
    dataplane: Arc<FakeDataplane>,
    manager: Arc<Manager>,
    server: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Rig {
    async fn new() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let manager = Arc::new(Manager::default());
        *manager.addr.lock() = listener.local_addr().unwrap().to_string();
        let service = DispatcherServer::new(Service(manager.clone()));
        let server = tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        let fuse = Arc::new(Fuse::default());
        Self {
            dir: tempfile::tempdir().unwrap(),
            runtime: FakeRuntime::new(fuse.clone()),
            dataplane: FakeDataplane::new(fuse.clone()),
            fuse,
            manager,
            server,
        }
    }

    fn config(&self, remotes: Vec<String>) -> AgentConfig {
        let (_, description) = watch::channel(NodeDescription::default());
        AgentConfig {
            disk: swarm_disk::SystemDisk::shared(),
            threads: swarm_disk::Threads::Own,
            data_dir: self.dir.path().to_owned(),
            node_id: NodeId::from(NODE),
            remotes,
            data_path_addr: IpAddr::from([127, 0, 0, 1]),
            description,
            connector: Arc::new(Plain),
            runtime: self.runtime.clone(),
            dataplane: self.dataplane.clone(),
        }
    }

    async fn agent(&self) -> Agent {
        let addr = self.manager.addr.lock().clone();
        Agent::start(self.config(vec![addr])).await.unwrap()
    }
}

fn set(kind: AssignmentsType, from: u64, to: u64, changes: Vec<Change>) -> Assignments {
    Assignments {
        r#type: kind as i32,
        applies_to: from,
        results_in: to,
        more: false,
        changes: changes
            .into_iter()
            .map(|change| AssignmentChange {
                change: Some(change),
            })
            .collect(),
        shared: Vec::new(),
    }
}

fn network() -> Change {
    Change::Network(Network {
        id: "net".to_owned(),
        ..Default::default()
    })
}

fn row(task: &str) -> Change {
    Change::Endpoint(EndpointEntry {
        network_id: "net".to_owned(),
        task_id: task.to_owned(),
        ..Default::default()
    })
}

fn task(id: &str, slot: u64, desired: TaskState) -> Task {
    Task {
        id: id.to_owned(),
        node_id: NODE.to_owned(),
        slot,
        service_annotations: Some(
            Annotations {
                name: "web".to_owned(),
                ..Default::default()
            }
            .into(),
        ),
        spec: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    image: "nginx".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }
            .into(),
        ),
        networks: vec![NetworkAttachment {
            network_id: "net".to_owned(),
            addresses: vec![format!("10.0.1.{}/24", slot + 2)],
            ..Default::default()
        }],
        desired_state: desired as i32,
        ..Default::default()
    }
}

fn one(id: &str, slot: u64) -> Change {
    Change::Task(task(id, slot, TaskState::Running))
}

fn shut(id: &str, slot: u64) -> Change {
    let mut task = task(id, slot, TaskState::Shutdown);
    // As soon as its end is known: nothing here balances.
    task.withdrawn = true;
    Change::Task(task)
}

#[tokio::test]
async fn an_assigned_task_runs_and_its_revision_is_acknowledged() {
    let rig = Rig::new().await;
    rig.manager.offer(7, vec![network(), row("a"), one("a", 1)]);
    let agent = rig.agent().await;
    let heard = rig
        .manager
        .heard(|h| h.is("a", TaskState::Running) && h.acks == [7])
        .await;
    let running = heard.last("a").unwrap();
    assert!(running.healthy);
    assert_eq!(running.container.as_ref().unwrap().pid, 42);
    rig.manager.heard(|h| h.heartbeats > 2).await;
    let kernel = rig.dataplane.state();
    assert_eq!(kernel.underlay.unwrap().1, 4790);
    assert_eq!(kernel.networks["net"].endpoints.len(), 1);
    assert_eq!(agent.containers_running(), 1);
    assert_eq!(agent.find_task("web.1").unwrap().task.id, "a");
    assert!(matches!(
        agent.find_task("web.2"),
        Err(AgentError::NoSuchTask(_))
    ));
    let config = &rig.runtime.state().containers["a"].config;
    assert_eq!(config.name, "web.1.a");
    agent.stop().await;
}

#[tokio::test]
async fn a_removed_task_leaves_nothing_and_takes_its_network_along() {
    let rig = Rig::new().await;
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    assert_eq!(agent.held_networks().await.len(), 1);
    let stop = set(AssignmentsType::Incremental, 1, 2, vec![shut("a", 1)]);
    rig.manager.send(FromManager::Assignments(stop)).await;
    rig.manager.heard(|h| h.is("a", TaskState::Shutdown)).await;
    // The address is free when the managers are told.
    assert!(rig.dataplane.state().sandboxes.is_empty());
    // The log is kept until the task is gone.
    assert!(agent.logs("web.1", LogOptions::default()).await.is_ok());
    let gone = vec![
        Change::RemoveTask("a".to_owned()),
        Change::RemoveNetwork("net".to_owned()),
    ];
    let gone = set(AssignmentsType::Incremental, 2, 3, gone);
    rig.manager.send(FromManager::Assignments(gone)).await;
    rig.runtime.wait_for(|s| s.containers.is_empty()).await;
    rig.dataplane.wait_for(|s| s.networks.is_empty()).await;
    rig.runtime.wait_for(|s| s.images.is_empty()).await;
    rig.manager.heard(|h| h.acks.last() == Some(&3)).await;
    assert!(agent.held_networks().await.is_empty());
    assert!(agent.tasks().is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn a_loop_that_panics_begins_again_where_the_task_is() {
    let rig = Rig::new().await;
    // Before there is a container, when it is started, and when it is taken away.
    for call in ["pull nginx", "create a", "start a", "stop a", "remove a"] {
        rig.runtime.change(|state| {
            state.panics.insert(call.to_owned(), 1);
        });
    }
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    assert_eq!(rig.runtime.state().starts["a"], 1);
    let stop = set(AssignmentsType::Incremental, 1, 2, vec![shut("a", 1)]);
    rig.manager.send(FromManager::Assignments(stop)).await;
    rig.manager.heard(|h| h.is("a", TaskState::Shutdown)).await;
    let gone = vec![
        Change::RemoveTask("a".to_owned()),
        Change::RemoveNetwork("net".to_owned()),
    ];
    let gone = set(AssignmentsType::Incremental, 2, 3, gone);
    rig.manager.send(FromManager::Assignments(gone)).await;
    rig.runtime.wait_for(|s| s.containers.is_empty()).await;
    rig.dataplane.wait_for(|s| s.networks.is_empty()).await;
    // Not only the task: nothing waits for the image that the loop held.
    rig.runtime.wait_for(|s| s.images.is_empty()).await;
    assert!(rig.runtime.state().panics.values().all(|left| *left == 0));
    agent.stop().await;
}

#[tokio::test]
async fn a_complete_set_drains_what_is_absent() {
    let rig = Rig::new().await;
    rig.manager
        .offer(1, vec![network(), one("a", 1), one("b", 2)]);
    let agent = rig.agent().await;
    rig.manager
        .heard(|h| h.is("a", TaskState::Running) && h.is("b", TaskState::Running))
        .await;
    rig.manager.offer(5, vec![network(), one("b", 2)]);
    rig.manager.session.lock().take();
    rig.runtime
        .wait_for(|s| !s.containers.contains_key("a"))
        .await;
    let kernel = rig.dataplane.state();
    assert!(kernel.sandboxes.contains_key("b") && !kernel.sandboxes.contains_key("a"));
    assert_eq!(rig.runtime.state().starts["b"], 1);
    agent.stop().await;
}

#[tokio::test]
async fn a_change_that_does_not_fit_makes_the_agent_ask_for_the_whole() {
    let rig = Rig::new().await;
    rig.manager.offer(4, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.acks == [4]).await;
    let gap = set(AssignmentsType::Incremental, 9, 10, vec![one("b", 2)]);
    rig.manager.send(FromManager::Assignments(gap)).await;
    rig.manager
        .heard(|h| h.registered == 2 && h.acks.len() == 2)
        .await;
    assert!(!rig.runtime.state().containers.contains_key("b"));
    // A manager that lags behind stops nothing.
    rig.manager.offer(3, vec![]);
    rig.manager.session.lock().take();
    rig.manager.heard(|h| h.registered >= 4).await;
    assert!(rig.runtime.state().containers.contains_key("a"));
    assert!(!rig.runtime.state().calls.contains(&"stop a".to_owned()));
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_adopts_running_tasks_without_a_manager() {
    let rig = Rig::new().await;
    rig.manager
        .offer(1, vec![network(), row("a"), one("a", 1), one("b", 2)]);
    let agent = rig.agent().await;
    rig.manager
        .heard(|h| h.is("a", TaskState::Running) && h.is("b", TaskState::Running))
        .await;
    agent.stop().await;
    rig.server.abort();
    // Ends while nobody watches.
    rig.runtime.exit(&TaskId::from("b"), 3);
    let agent = Agent::start(rig.config(vec![])).await.unwrap();
    rig.dataplane
        .wait_for(|s| s.networks.contains_key("net"))
        .await;
    rig.dataplane
        .wait_for(|s| !s.sandboxes.contains_key("b"))
        .await;
    let state = rig.runtime.state();
    assert_eq!(state.starts["a"], 1);
    assert!(!state.calls.contains(&"stop a".to_owned()));
    assert!(matches!(
        state.containers["a"].state,
        ContainerState::Running { .. }
    ));
    // It still knows whom to ask.
    let info = agent.session().borrow().info.clone().unwrap();
    assert_eq!(info.managers.len(), 1);
    // And goes on watching.
    rig.runtime.exit(&TaskId::from("a"), 0);
    rig.dataplane.wait_for(|s| s.sandboxes.is_empty()).await;
    agent.stop().await;
}

#[tokio::test]
async fn statuses_that_nobody_acknowledged_are_sent_again() {
    let rig = Rig::new().await;
    *rig.manager.deaf.lock() = true;
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.runtime.wait_for(|s| s.starts.contains_key("a")).await;
    rig.manager.heard(|h| h.acks == [1]).await;
    assert!(rig.manager.heard.borrow().statuses.is_empty());
    *rig.manager.deaf.lock() = false;
    rig.manager.session.lock().take();
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    agent.stop().await;
}

#[tokio::test]
async fn the_ways_a_task_ends_are_told_apart() {
    let rig = Rig::new().await;
    let mut missing = task("missing", 3, TaskState::Running);
    let spec = missing.spec.as_mut().unwrap().container.as_mut().unwrap();
    spec.image = "nosuch:1".to_owned();
    rig.runtime.change(|s| {
        s.missing_images.insert("nosuch:1".to_owned());
    });
    rig.manager.offer(
        1,
        vec![
            network(),
            one("ok", 1),
            one("bad", 2),
            Change::Task(missing),
        ],
    );
    let agent = rig.agent().await;
    rig.manager
        .heard(|h| h.is("ok", TaskState::Running) && h.is("bad", TaskState::Running))
        .await;
    rig.runtime.exit(&TaskId::from("ok"), 0);
    rig.runtime.exit(&TaskId::from("bad"), 3);
    let heard = rig
        .manager
        .heard(|h| {
            h.is("ok", TaskState::Complete)
                && h.is("bad", TaskState::Failed)
                && h.is("missing", TaskState::Rejected)
        })
        .await;
    let bad = heard.last("bad").unwrap();
    assert_eq!(bad.err, "task: non-zero exit (3)");
    assert_eq!(bad.container.as_ref().unwrap().exit_code, 3);
    assert_eq!(
        heard.last("missing").unwrap().err,
        "No such image: nosuch:1"
    );
    assert!(rig.dataplane.state().sandboxes.is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn a_task_runs_only_once_it_is_healthy_and_fails_when_it_no_longer_is() {
    let rig = Rig::new().await;
    let short = |nanos| Some(prost_types::Duration { seconds: 0, nanos });
    rig.runtime.change(|s| {
        s.exec_exit = 1;
        s.health = Some(HealthConfig {
            test: vec!["CMD".to_owned(), "check".to_owned()],
            interval: short(20_000_000),
            timeout: short(900_000_000),
            start_period: Some(prost_types::Duration {
                seconds: 60,
                nanos: 0,
            }),
            retries: 2,
        });
    });
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    let probes = |s: &crate::runtime::fake::FakeRuntimeState| {
        s.calls.iter().filter(|c| c.starts_with("exec a")).count()
    };
    rig.runtime.wait_for(|s| probes(s) >= 3).await;
    assert!(!rig.manager.heard.borrow().is("a", TaskState::Running));
    rig.runtime.change(|s| s.exec_exit = 0);
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    rig.runtime.change(|s| s.exec_exit = 1);
    let heard = rig.manager.heard(|h| h.is("a", TaskState::Failed)).await;
    assert_eq!(heard.last("a").unwrap().err, "task: unhealthy container");
    assert!(rig.runtime.state().calls.contains(&"stop a".to_owned()));
    agent.stop().await;
}

#[tokio::test]
async fn a_task_waits_for_the_wish_to_run() {
    let rig = Rig::new().await;
    let ready = Change::Task(task("a", 1, TaskState::Ready));
    rig.manager.offer(1, vec![network(), ready]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Ready)).await;
    assert!(rig.runtime.state().starts.is_empty());
    let go = set(AssignmentsType::Incremental, 1, 2, vec![one("a", 1)]);
    rig.manager.send(FromManager::Assignments(go)).await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_network_that_cannot_be_programmed_holds_back_only_the_acknowledgement() {
    let rig = Rig::new().await;
    rig.dataplane.change(|s| {
        s.broken_networks.insert(NetworkId::from("bad"));
    });
    let bad = Change::Network(Network {
        id: "bad".to_owned(),
        ..Default::default()
    });
    rig.manager.offer(1, vec![bad, network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    assert!(rig.manager.heard.borrow().acks.is_empty());
    rig.dataplane.change(|s| s.broken_networks.clear());
    rig.manager.heard(|h| h.acks == [1]).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_node_that_leaves_stops_everything_and_says_goodbye() {
    let rig = Rig::new().await;
    rig.manager
        .offer(1, vec![network(), one("a", 1), one("b", 2)]);
    let mut agent = rig.agent().await;
    rig.manager
        .heard(|h| h.is("a", TaskState::Running) && h.is("b", TaskState::Running))
        .await;
    agent.leave().await.unwrap();
    rig.manager
        .heard(|h| h.goodbyes == 1 && h.is("a", TaskState::Shutdown))
        .await;
    assert!(rig.runtime.state().containers.is_empty());
    assert!(rig.dataplane.state().sandboxes.is_empty());
}

#[tokio::test]
async fn a_node_that_was_removed_stops_its_tasks_and_can_still_leave() {
    let rig = Rig::new().await;
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let mut agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    let session = rig.manager.session.lock().take().unwrap();
    let removed = swarm_identity::removed("node n has been removed from the cluster");
    session.send(Err(removed)).await.unwrap();
    rig.runtime.wait_for(|s| s.containers.is_empty()).await;
    rig.dataplane.wait_for(|s| s.networks.is_empty()).await;
    agent.leave().await.unwrap();
    assert!(rig.runtime.state().containers.is_empty());
}

#[tokio::test]
async fn containers_that_no_task_owns_are_removed_on_start() {
    let rig = Rig::new().await;
    rig.manager.offer(1, vec![network(), one("a", 1)]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
    agent.stop().await;
    std::fs::remove_dir_all(rig.dir.path().join("agent")).unwrap();
    rig.manager.offer(2, vec![]);
    let agent = rig.agent().await;
    rig.manager.heard(|h| h.acks.last() == Some(&2)).await;
    assert!(rig.runtime.state().containers.is_empty());
    assert!(rig.dataplane.state().sandboxes.is_empty());
    agent.stop().await;
}

/// Kills the agent at one point after the other of a task's whole life, starts it again, and lets it finish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_point_every_task_starts_once_and_nothing_is_left_behind() {
    let mut point = 1;
    loop {
        let rig = Rig::new().await;
        rig.manager.offer(1, vec![network(), one("a", 1)]);
        rig.fuse.arm(point);
        let life = async {
            let agent = rig.agent().await;
            rig.manager.heard(|h| h.is("a", TaskState::Running)).await;
            rig.manager.offer(2, vec![network(), shut("a", 1)]);
            rig.manager.session.lock().take();
            rig.manager.heard(|h| h.is("a", TaskState::Shutdown)).await;
            rig.manager.offer(3, vec![]);
            rig.manager.session.lock().take();
            rig.runtime.wait_for(|s| s.containers.is_empty()).await;
            rig.dataplane.wait_for(|s| s.networks.is_empty()).await;
            agent.stop().await;
        };
        let finished = tokio::select! {
            () = life => true,
            () = rig.fuse.burnt() => false,
        };
        let starts = |rig: &Rig| rig.runtime.state().starts.get("a").copied().unwrap_or(0);
        if !finished {
            rig.fuse.disarm();
            let agent = rig.agent().await;
            rig.manager.offer(2, vec![network(), shut("a", 1)]);
            rig.manager.session.lock().take();
            rig.manager
                .heard(|h| {
                    h.statuses
                        .get("a")
                        .is_some_and(|all| all.iter().any(|s| s.state > TaskState::Running as i32))
                        || h.acks.last() == Some(&3)
                })
                .await;
            rig.manager.offer(3, vec![]);
            rig.manager.session.lock().take();
            rig.manager.heard(|h| h.acks.last() == Some(&3)).await;
            rig.runtime.wait_for(|s| s.containers.is_empty()).await;
            rig.dataplane.wait_for(|s| s.networks.is_empty()).await;
            agent.stop().await;
        }
        let kernel = rig.dataplane.state();
        assert!(kernel.sandboxes.is_empty(), "point {point}");
        assert!(kernel.conflicts.is_empty(), "point {point}");
        assert!(starts(&rig) <= 1, "point {point}");
        if finished {
            assert!(point > 15, "only {point} points were passed");
            return;
        }
        point += 1;
    }
}
