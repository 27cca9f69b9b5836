//! A raft group of one, in memory, for tests of what is built on [`Consensus`],
//! and short ways to write objects and transactions.

use std::sync::Arc;

use parking_lot::Mutex;
use prost_types::Timestamp;
use swarm_proto::NodeId;
use swarm_proto::v1::{
    Annotations, Cluster, IpamOptions, IpamPool, Network, NetworkAttachmentConfig, NetworkSpec,
    Node, NodeDescription, NodeObservation, NodeSpec, NodeState, NodeStatus, Object, RemoveObject,
    ReplicatedMode, Service, ServiceMode, ServiceSpec, StoreAction, Task, TaskSpec, TaskState,
    TaskStatus, TaskStatusUpdate, Transaction, object, service_mode, store_action,
};
use tokio::sync::watch;

use crate::{
    Consensus, Leadership, Member, MembershipError, ObjectKind, ProposeError, ReadError, State,
    Store,
};

/// The only member: applies what is proposed, at once. Leads in term 1 until told otherwise.
#[derive(Debug)]
pub struct LocalConsensus {
    store: Arc<Store>,
    /// Held while an entry gets its index and is applied.
    log: Mutex<()>,
    leadership: watch::Sender<Leadership>,
    members: Mutex<Vec<Member>>,
    held: watch::Sender<bool>,
}

impl LocalConsensus {
    /// A leader (node "local", raft ID 1) with an empty store.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_state(State::default())
    }

    /// A leader that starts from `state`.
    #[must_use]
    pub fn with_state(state: State) -> Arc<Self> {
        let member = Member {
            raft_id: 1,
            node_id: NodeId::from("local"),
            addr: "127.0.0.1:2377".into(),
            voter: true,
            reachable: true,
        };
        Arc::new(Self {
            store: Store::new(state),
            log: Mutex::new(()),
            leadership: watch::Sender::new(Leadership {
                term: 1,
                is_leader: true,
                leader: Some(member.clone()),
            }),
            members: Mutex::new(vec![member]),
            held: watch::Sender::new(false),
        })
    }

    /// Says who leads. While `leader` is `None`, writes and reads fail with `NoLeader`.
    pub fn set_leadership(&self, leadership: Leadership) {
        self.leadership.send_replace(leadership);
    }

    /// Has writes wait, as in a group that is slow, or go on.
    pub fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    /// Says who the members are.
    pub fn set_members(&self, members: Vec<Member>) {
        *self.members.lock() = members;
    }

    /// Commits and applies `actions` as one transaction. Returns the index.
    ///
    /// # Errors
    /// Apply refused it.
    pub fn write(
        &self,
        actions: impl IntoIterator<Item = StoreAction>,
    ) -> Result<u64, crate::Rejection> {
        self.commit(&transaction(actions))
    }

    fn commit(&self, transaction: &Transaction) -> Result<u64, crate::Rejection> {
        let _turn = self.log.lock();
        let index = self.store.state().index() + 1;
        self.store.commit(index, transaction)?;
        Ok(index)
    }

    fn has_leader(&self) -> bool {
        self.leadership.borrow().leader.is_some()
    }
}

#[async_trait::async_trait]
impl Consensus for LocalConsensus {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    async fn propose(&self, transaction: Transaction) -> Result<u64, ProposeError> {
        // Closed only when this is gone.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        if !self.has_leader() {
            return Err(ProposeError::NoLeader("none is set".into()));
        }
        self.commit(&transaction).map_err(ProposeError::Rejected)
    }

    async fn read(&self) -> Result<Arc<State>, ReadError> {
        if !self.has_leader() {
            return Err(ReadError::NoLeader("none is set".into()));
        }
        Ok(self.store.state())
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    fn members(&self) -> Vec<Member> {
        self.members.lock().clone()
    }

    async fn members_heard(&self) -> Result<Vec<Member>, ReadError> {
        if !self.has_leader() {
            return Err(ReadError::NoLeader("none is set".into()));
        }
        Ok(self.members())
    }

    async fn add_member(&self, member: Member) -> Result<(), MembershipError> {
        let mut members = self.members.lock();
        members.retain(|known| known.raft_id != member.raft_id);
        members.push(member);
        Ok(())
    }

    async fn remove_member(&self, raft_id: u64) -> Result<(), MembershipError> {
        let mut members = self.members.lock();
        if members.len() == 1 {
            return Err(MembershipError::QuorumLoss {
                reason: "it is the last manager".into(),
            });
        }
        members.retain(|known| known.raft_id != raft_id);
        Ok(())
    }
}

/// A transaction proposed at second 1, in no particular term.
#[must_use]
pub fn transaction(actions: impl IntoIterator<Item = StoreAction>) -> Transaction {
    Transaction {
        actions: actions.into_iter().collect(),
        proposed_at: Some(Timestamp {
            seconds: 1,
            nanos: 0,
        }),
        proposer: "test".into(),
        ..Transaction::default()
    }
}

/// Anything that is stored.
pub trait Stored {
    /// As the message that actions carry.
    fn object(self) -> Object;
}

macro_rules! stored {
    ($($kind:ident),*) => {$(
        impl Stored for $kind {
            fn object(self) -> Object {
                Object { object: Some(object::Object::$kind(self)) }
            }
        }
        impl Stored for &Arc<$kind> {
            fn object(self) -> Object {
                Object { object: Some(object::Object::$kind((**self).clone())) }
            }
        }
    )*};
}

stored!(Cluster, Node, Service, Task, Network);

fn action(action: store_action::Action) -> StoreAction {
    StoreAction {
        action: Some(action),
    }
}

/// Creates the object.
#[must_use]
pub fn create(made: impl Stored) -> StoreAction {
    action(store_action::Action::Create(made.object()))
}

/// Writes the object; its version is the expected one.
#[must_use]
pub fn update(changed: impl Stored) -> StoreAction {
    action(store_action::Action::Update(changed.object()))
}

/// Removes the object, whatever its version.
#[must_use]
pub fn remove(kind: ObjectKind, id: &str) -> StoreAction {
    action(store_action::Action::Remove(RemoveObject {
        r#ref: Some(swarm_proto::v1::ObjectRef {
            kind: kind.into(),
            id: id.into(),
        }),
        expected_version: 0,
    }))
}

/// A report that the task is in `state` since second `at`, made in that order; healthy if RUNNING.
#[must_use]
pub fn report(task_id: &str, state: TaskState, at: i64) -> StoreAction {
    action(store_action::Action::TaskStatus(TaskStatusUpdate {
        task_id: task_id.into(),
        status: Some(TaskStatus {
            timestamp: Some(Timestamp {
                seconds: at,
                nanos: 0,
            }),
            state: state.into(),
            order: u64::try_from(at).unwrap_or_default(),
            healthy: state == TaskState::Running,
            ..TaskStatus::default()
        }),
    }))
}

/// An observation of a node's state.
#[must_use]
pub fn observe(node_id: &str, state: NodeState) -> StoreAction {
    action(store_action::Action::NodeObservation(NodeObservation {
        node_id: node_id.into(),
        status: Some(NodeStatus {
            state: state.into(),
            ..NodeStatus::default()
        }),
        description: None,
    }))
}

fn named(name: &str) -> Option<Annotations> {
    Some(Annotations {
        name: name.into(),
        ..Annotations::default()
    })
}

/// A cluster with all defaults.
#[must_use]
pub fn cluster(id: &str) -> Cluster {
    Cluster {
        id: id.into(),
        ..Cluster::default()
    }
}

/// A READY worker: its hostname is its ID, its data-path address is `vtep`.
#[must_use]
pub fn node(id: &str, vtep: &str) -> Node {
    Node {
        id: id.into(),
        spec: Some(NodeSpec::default()),
        description: Some(NodeDescription {
            hostname: id.into(),
            data_path_addr: vtep.into(),
            ..NodeDescription::default()
        }),
        status: Some(NodeStatus {
            state: NodeState::Ready.into(),
            ..NodeStatus::default()
        }),
        ..Node::default()
    }
}

/// An overlay network; with an empty `subnet` one is chosen.
#[must_use]
pub fn network(id: &str, name: &str, subnet: &str) -> Network {
    let ipam = (!subnet.is_empty()).then(|| IpamOptions {
        configs: vec![IpamPool {
            subnet: subnet.into(),
            ..IpamPool::default()
        }],
        ..IpamOptions::default()
    });
    Network {
        id: id.into(),
        spec: Some(NetworkSpec {
            annotations: named(name),
            driver: "overlay".into(),
            ipam,
            ..NetworkSpec::default()
        }),
        ..Network::default()
    }
}

/// A replicated service in vip mode on `networks` (IDs).
#[must_use]
pub fn service(id: &str, name: &str, networks: &[&str]) -> Service {
    Service {
        id: id.into(),
        spec: Some(ServiceSpec {
            annotations: named(name),
            task: Some(task_spec(networks).into()),
            mode: Some(ServiceMode {
                mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                    replicas: Some(1),
                })),
            }),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// A task of slot 1 of a service on `networks` (IDs), meant to run.
#[must_use]
pub fn task(id: &str, service_id: &str, networks: &[&str]) -> Task {
    Task {
        id: id.into(),
        service_id: service_id.into(),
        slot: 1,
        spec: Some(task_spec(networks).into()),
        desired_state: TaskState::Running.into(),
        ..Task::default()
    }
}

fn task_spec(networks: &[&str]) -> TaskSpec {
    TaskSpec {
        networks: networks
            .iter()
            .map(|id| NetworkAttachmentConfig {
                target: (*id).into(),
                ..NetworkAttachmentConfig::default()
            })
            .collect(),
        ..TaskSpec::default()
    }
}
