//! A manager's member of the raft group: made, started again, joined, stopped.
//!
//! The core, its timers and its connections run on a runtime of their own with
//! raised priority; files are read and written by the log's writer thread and on
//! the caller's blocking threads (but see [`Threads::Callers`]). Starts the watch, and the loop that
//! sees to it that this member is in the group; [`RaftNode::shutdown`] joins both.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use openraft::{Config, SnapshotPolicy};
use parking_lot::Mutex;
use swarm_disk::{Blocking, Disk, SystemDisk, Threads};
use swarm_identity::{DataKey, Identity};
use swarm_proto::defaults::SNAPSHOT_INTERVAL;
use swarm_proto::v1::raft_server::RaftServer;
use swarm_proto::v1::store_action::Action;
use swarm_proto::v1::{JoinRequest, Transaction};
use swarm_store::{
    Consensus, Leadership, Member, MembershipError, ProposeError, ReadError, State, Store,
};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::{DiskError, FatalReporter, RaftFatal, StartError};
use crate::group::{Core, Group, allocation, hopeless, join_at};
use crate::log::{LogStore, LogWriter};
use crate::member::{self, Membership};
use crate::runtime::RaftRuntime;
use crate::seal::Sealer;
use crate::service::RaftService;
use crate::snapshot::Snapshots;
use crate::state_machine::StateMachine;
use crate::transport::{Network, Pool, RAFT_MESSAGE_MAX, Repeats, leader_hint};
use crate::types::Peer;
use crate::weight::{Due, Scales};

/// Raft ID of the manager that makes the cluster.
const FIRST: u64 = 1;
/// How long `join` looks for a manager that gives it a raft ID.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);
/// Wait between two rounds of asking all of them.
const JOIN_WAIT: Duration = Duration::from_millis(250);
/// How long `bootstrap` waits until it leads itself.
const LEAD_PATIENCE: Duration = Duration::from_secs(30);
/// Entries kept behind a snapshot for followers that are a little behind.
const KEPT_ENTRIES: u64 = 2_000;
/// But no more bytes of them than this, or what one entry has.
const KEPT_BYTES: u64 = 64 << 20;
/// Bytes of the log after which a snapshot is due, and changes to objects, which take about a second.
const SNAPSHOT_BYTES: u64 = 64 << 20;
const SNAPSHOT_CHANGES: u64 = 100_000;

/// When heartbeats are sent and elections begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftTiming {
    /// Between two heartbeats of the leader.
    pub heartbeat: Duration,
    /// A follower that hears nothing stands for election after a random time
    /// from here…
    pub election_min: Duration,
    /// …to here, once the leader's lease of this length is over.
    pub election_max: Duration,
}

impl Default for RaftTiming {
    /// Fails over in a third of a second. A lost packet is sent again after 200 ms at least (`TCP_RTO_MIN` of Linux),
    /// and must cost no election: a follower stands after 300 ms at the earliest, the lease and the shortest
    /// timeout. On two cores that are kept busy shorter times held, too (20, 60 and 120 ms; docs/faults.md),
    /// since raft has threads, a runtime and connections of its own. A heartbeat has its period to be answered in,
    /// so that is also the longest round trip between managers.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            election_min: Duration::from_millis(100),
            election_max: Duration::from_millis(200),
        }
    }
}

/// What a member is started with.
#[derive(Clone, Debug)]
pub struct RaftConfig {
    /// Where log, snapshots and raft ID are kept; nobody else's directory.
    pub dir: PathBuf,
    /// host:port at which other managers reach this one's API.
    pub addr: String,
    /// This node's identity: a manager's.
    pub identity: Arc<Identity>,
    /// What log and snapshots are encrypted with.
    pub data_key: DataKey,
    /// Heartbeats and elections; the same on all managers.
    pub timing: RaftTiming,
    /// Log entries between two snapshots, when the cluster's spec does not say. Above 0.
    pub snapshot_interval: u64,
    /// Bytes of them after which one is due before, unless the last snapshot was larger.
    pub snapshot_bytes: u64,
    /// Changes after which one is due before, unless there are more objects.
    pub snapshot_changes: u64,
    /// Entries kept behind a snapshot…
    pub kept_entries: u64,
    /// …if they have no more bytes.
    pub kept_bytes: u64,
    /// What `dir` is on.
    pub disk: Arc<dyn Disk>,
    /// Where consensus runs and the disk is waited for.
    pub threads: Threads,
    /// Messages that are sent twice: none, but in simulations.
    pub repeats: Option<Repeats>,
}

/// How far a member is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The newest term that it has a vote of which it says is durable.
    pub voted_term: u64,
    /// The last entry of its log, durable or not.
    pub last_index: u64,
    /// The last entry that it knows to be committed.
    pub committed: u64,
    /// The entry that says who the members are now ([`Consensus::members`]).
    pub membership: u64,
}

impl RaftConfig {
    /// With default timing and limits, on the machine's disk, with threads of its own.
    #[must_use]
    pub fn new(
        dir: impl Into<PathBuf>,
        addr: impl Into<String>,
        identity: Arc<Identity>,
        data_key: DataKey,
    ) -> Self {
        Self {
            dir: dir.into(),
            addr: addr.into(),
            identity,
            data_key,
            timing: RaftTiming::default(),
            snapshot_interval: SNAPSHOT_INTERVAL,
            snapshot_bytes: SNAPSHOT_BYTES,
            snapshot_changes: SNAPSHOT_CHANGES,
            kept_entries: KEPT_ENTRIES,
            kept_bytes: KEPT_BYTES,
            disk: SystemDisk::shared(),
            threads: Threads::default(),
            repeats: None,
        }
    }

    fn core(&self) -> Result<Config, StartError> {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        if self.snapshot_interval == 0 {
            return Err(StartError::Config("the snapshot interval is 0".into()));
        }
        Config {
            cluster_name: self.identity.cluster_id().to_string(),
            heartbeat_interval: ms(self.timing.heartbeat),
            election_timeout_min: ms(self.timing.election_min),
            election_timeout_max: ms(self.timing.election_max),
            enable_pre_vote: Some(true),
            // A leader that comes back is elected like everyone else.
            enable_leader_restore: Some(false),
            // The watch asks for them: the interval is the cluster's and may change.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: self.kept_entries,
            replication_lag_threshold: self.snapshot_interval.saturating_add(self.kept_entries),
            install_snapshot_timeout: 120_000,
            max_payload_entries: 1024,
            backoff: "50ms 100ms 200ms ...400ms".into(),
            ..Config::default()
        }
        .validate()
        .map_err(|error| StartError::Config(error.to_string()))
    }
}

/// A running member of the raft group. Dropping it without
/// [`RaftNode::shutdown`] is like a crash: nothing acknowledged is lost.
pub struct RaftNode {
    group: Arc<Group>,
    runtime: Handle,
    tasks: TaskTracker,
    running: Mutex<Option<(RaftRuntime, LogWriter)>>,
    snapshots: Snapshots,
}

impl std::fmt::Debug for RaftNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RaftNode({})", self.group.raft_id)
    }
}

// The futures of this type are boxed: one is compiled by the crate that polls it, and with it all of
// openraft, which is to be compiled here only.
impl RaftNode {
    /// Makes a new group of one and commits its first transaction, which has to
    /// create the cluster and this manager's node; this member's raft ID is added to it.
    ///
    /// # Errors
    /// The directory is taken or cannot be written, or the transaction is refused.
    pub fn bootstrap(
        config: RaftConfig,
        mut first: Transaction,
    ) -> BoxFuture<'static, Result<Arc<Self>, StartError>> {
        Box::pin(async move {
            let sealer = Sealer::new(&config.data_key);
            member::prepare(&*config.disk, &config.dir)?;
            let member = membership(&config, FIRST, Vec::new());
            let node = Self::launch(config.clone(), &member).await?;
            let me = Peer {
                node_id: member.node_id.clone(),
                addr: config.addr.clone(),
            };
            node.group
                .raft
                .initialize(BTreeMap::from([(FIRST, me)]))
                .await
                .map_err(|error| StartError::Core(error.to_string()))?;
            let mut leadership = node.group.leadership.subscribe();
            let leads = leadership.wait_for(|leadership| leadership.is_leader);
            match tokio::time::timeout(LEAD_PATIENCE, leads).await {
                Ok(Ok(_)) => {}
                _ => return Err(StartError::Core("it does not lead its group of one".into())),
            }
            let has_id =
                |action: &Option<Action>| matches!(action, Some(Action::AllocateRaftId(_)));
            if !first.actions.iter().any(|action| has_id(&action.action)) {
                first
                    .actions
                    .push(allocation(&member.node_id, &config.addr));
            }
            if let Err(error) = node.group.propose(first).await {
                node.shutdown().await;
                return Err(StartError::Bootstrap(error));
            }
            // From here on this is a member: a crash before leaves nothing that counts.
            member::save(&*config.disk, &config.dir, &sealer, &member).await?;
            node.belong(Vec::new());
            Ok(node)
        })
    }

    /// Starts the member that is in the directory. If its joining was cut short, or
    /// its address has changed, it goes on from there in the background.
    ///
    /// # Errors
    /// The directory is empty, another node's, or damaged.
    pub fn start(config: RaftConfig) -> BoxFuture<'static, Result<Arc<Self>, StartError>> {
        Box::pin(async move {
            let sealer = Sealer::new(&config.data_key);
            let identity = config.identity.peer();
            let member = member::expect(
                &*config.disk,
                &config.dir,
                &sealer,
                &identity.cluster_id,
                &identity.node_id,
            )?;
            let node = Self::launch(config, &member).await?;
            node.belong(member.remotes);
            Ok(node)
        })
    }

    /// Joins the group that the managers at `remotes` belong to: gets a raft ID,
    /// starts, and is made a voter once it has caught up. Returns when it has
    /// started: from then on [`RaftNode::service`] must be reachable at the
    /// configured address; see [`RaftNode::joined`].
    ///
    /// # Errors
    /// The directory is taken or cannot be written, or no manager gives it an ID.
    pub fn join(
        config: RaftConfig,
        remotes: Vec<String>,
    ) -> BoxFuture<'static, Result<Arc<Self>, StartError>> {
        Box::pin(async move {
            member::prepare(&*config.disk, &config.dir)?;
            #[cfg(feature = "museum")]
            if swarm_proto::museum::on(swarm_proto::museum::Bug::OldRaftId) {
                let (disk, sealer) = (&*config.disk, Sealer::new(&config.data_key));
                let node_id = config.identity.peer().node_id.to_string();
                if let Some(member) = member::before(disk, &config.dir, &sealer, &node_id) {
                    member::save(disk, &config.dir, &sealer, &member).await?;
                    let node = Self::launch(config, &member).await?;
                    node.belong(remotes);
                    return Ok(node);
                }
            }
            let (raft_id, known) = ask_for_id(&config, &remotes).await?;
            let mut all: BTreeSet<String> = remotes.into_iter().chain(known).collect();
            all.remove(&config.addr);
            let member = membership(&config, raft_id, all.into_iter().collect());
            // Before anything is acknowledged under this ID.
            let sealer = Sealer::new(&config.data_key);
            member::save(&*config.disk, &config.dir, &sealer, &member).await?;
            let node = Self::launch(config, &member).await?;
            node.belong(member.remotes);
            Ok(node)
        })
    }

    async fn launch(config: RaftConfig, member: &Membership) -> Result<Arc<Self>, StartError> {
        let core_config = Arc::new(config.core()?);
        let fatal = FatalReporter::new();
        let blocking = config.threads.blocking();
        let (log, writer, machine) = open(&config, blocking, fatal.clone()).await?;
        let runtime = RaftRuntime::start(config.threads)
            .map_err(|e| DiskError::io("start raft's threads for", &config.dir, e))?;
        let pool = Pool::new(config.identity.clone(), runtime.handle().clone());
        let network = Network {
            pool: pool.clone(),
            from: member.raft_id,
            cluster_id: member.cluster_id.as_str().into(),
            repeats: config.repeats.clone(),
            entries_timeout: (config.timing.election_max * 4).max(Duration::from_secs(2)),
        };
        let (store, applied) = (machine.store().clone(), machine.applied());
        let (scales, snapshots) = (machine.scales(), machine.snapshots());
        let proposals = machine.proposals();
        let raft_id = member.raft_id;
        let starting = runtime
            .handle()
            .spawn(async move { Core::new(raft_id, core_config, network, log, machine).await });
        let raft = starting
            .await
            .map_err(|error| StartError::Core(error.to_string()))?
            .map_err(|error| StartError::Core(error.to_string()))?;
        let group = Arc::new(Group {
            raft,
            raft_id,
            node_id: config.identity.node_id(),
            cluster_id: config.identity.cluster_id(),
            addr: config.addr,
            dir: config.dir,
            timing: config.timing,
            snapshot_due: Due {
                entries: config.snapshot_interval,
                bytes: config.snapshot_bytes,
                changes: config.snapshot_changes,
            },
            scales,
            store,
            applied,
            pool,
            leadership: watch::Sender::default(),
            entered: watch::Sender::default(),
            expelled: watch::Sender::default(),
            leaving: CancellationToken::new(),
            heard: Mutex::new(Instant::now()),
            proposals,
            reads: Arc::default(),
            one_change: Semaphore::new(1),
            stop: CancellationToken::new(),
            fatal,
        });
        let tasks = TaskTracker::new();
        tasks.spawn_on(group.clone().watch(), runtime.handle());
        Ok(Arc::new(Self {
            group,
            runtime: runtime.handle().clone(),
            tasks,
            running: Mutex::new(Some((runtime, writer))),
            snapshots,
        }))
    }

    fn belong(&self, remotes: Vec<String>) {
        if let Some((runtime, _)) = &*self.running.lock() {
            let belonging = self.group.clone().belong(remotes);
            self.tasks.spawn_on(belonging, runtime.handle());
        }
    }

    /// Whether the directory holds a member, to be started with [`RaftNode::start`].
    #[must_use]
    pub fn exists(disk: &dyn Disk, dir: &Path) -> bool {
        disk.exists(&member::path(dir))
    }

    /// Has this member taken out of the group; a leader hands leadership over first.
    ///
    /// # Errors
    /// It is the last one, the group would lose its quorum, or no leader answers.
    pub fn leave(&self) -> BoxFuture<'_, Result<(), MembershipError>> {
        Box::pin(async move {
            self.group.leaving.cancel();
            if self.group.raft.is_leader() {
                self.group.remove_member(self.group.raft_id).await
            } else {
                self.group.ask_to_leave().await
            }
        })
    }

    /// Returns when this member is a voter under its configured address.
    ///
    /// # Errors
    /// The group does not take it in, or it is stopping.
    pub fn joined(&self) -> BoxFuture<'_, Result<(), StartError>> {
        Box::pin(async move {
            let mut entered = self.group.entered.subscribe();
            let result = tokio::select! {
                () = self.group.stop.cancelled() => None,
                result = entered.wait_for(Option::is_some) => {
                    result.ok().and_then(|result| result.clone())
                }
            };
            result
                .unwrap_or_else(|| Err("this manager is stopping".into()))
                .map_err(StartError::Join)
        })
    }

    /// Why this member is none any more, once the group has taken it out for good: its directory
    /// is of no use then, and its node can only join again, as another member. Being cut off, or
    /// the others being down, is no reason.
    #[must_use]
    pub fn expelled(&self) -> watch::Receiver<Option<String>> {
        self.group.expelled.subscribe()
    }

    /// The gRPC service, to be served at the configured address.
    #[must_use]
    pub fn service(&self) -> RaftServer<RaftService> {
        RaftServer::new(RaftService::new(self.group.clone()))
            .max_decoding_message_size(RAFT_MESSAGE_MAX)
            .max_encoding_message_size(RAFT_MESSAGE_MAX)
    }

    /// Raft's own runtime, where urgent connections are to be served: ends with the member.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// This member's raft ID.
    #[must_use]
    pub fn raft_id(&self) -> u64 {
        self.group.raft_id
    }

    /// How far this member is, for whoever watches it from outside.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.group.progress()
    }

    /// Leader: the last entry that this member of the group is known to have.
    #[must_use]
    pub fn matched(&self, raft_id: u64) -> Option<u64> {
        self.group.matched(raft_id)
    }

    /// The failure after which this member cannot go on, once there is one:
    /// nothing is acknowledged any more, and the process has to end.
    #[must_use]
    pub fn fatal(&self) -> watch::Receiver<Option<RaftFatal>> {
        self.group.fatal.subscribe()
    }

    /// Hands leadership over if this member has it, stops, and returns when all
    /// is on disk. Reads of the store go on working.
    pub fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if self.group.raft.is_leader()
                && let Err(error) = self.group.hand_over().await
            {
                tracing::debug!(%error, "stopping as leader");
            }
            self.group.stop.cancel();
            self.tasks.close();
            self.tasks.wait().await;
            let Some((runtime, writer)) = self.running.lock().take() else {
                return;
            };
            if let Err(error) = self.group.raft.shutdown().await {
                tracing::warn!(%error, "the raft core ended abnormally");
            }
            writer.close().await;
            self.snapshots.close().await;
            drop(runtime);
        })
    }
}

impl Drop for RaftNode {
    fn drop(&mut self) {
        self.group.stop.cancel();
    }
}

fn membership(config: &RaftConfig, raft_id: u64, remotes: Vec<String>) -> Membership {
    let identity = config.identity.peer();
    Membership {
        cluster_id: identity.cluster_id.to_string(),
        node_id: identity.node_id.to_string(),
        raft_id,
        remotes,
    }
}

/// Reads everything from disk, where waiting for it holds nothing up.
async fn open(
    config: &RaftConfig,
    blocking: Blocking,
    fatal: FatalReporter,
) -> Result<(LogStore, LogWriter, StateMachine), StartError> {
    let (dir, key) = (config.dir.clone(), config.data_key.clone());
    let (disk, threads) = (config.disk.clone(), config.threads);
    let scales = Scales::new(config.kept_bytes);
    let later = blocking.clone();
    let opening = blocking.run(async move {
        let place = dir.join("snapshots");
        let (snapshots, found) = Snapshots::open(disk.clone(), &place, Sealer::new(&key))?;
        let (log, writer) =
            LogStore::open(disk, &dir, &key, threads, later.clone(), fatal.clone()).await?;
        let snapshot_dir = snapshots.dir().to_owned();
        if log.purged() > snapshots.last() {
            return Err(DiskError::damaged(
                snapshot_dir,
                "the snapshot",
                "it is missing, and the log before it has been purged",
            ));
        }
        let machine = StateMachine::restore(snapshots, found, scales, later, fatal);
        Ok((log, writer, machine))
    });
    let opened = opening
        .await
        .map_err(|error| StartError::Core(error.to_string()))?;
    Ok(opened?)
}

/// Asks managers for a raft ID until one gives it. Also returns their addresses.
async fn ask_for_id(
    config: &RaftConfig,
    remotes: &[String],
) -> Result<(u64, Vec<String>), StartError> {
    let pool = Pool::new(config.identity.clone(), Handle::current());
    let give_up = Instant::now() + JOIN_PATIENCE;
    loop {
        let mut reason = "no address of a manager is known".to_owned();
        let mut candidates: Vec<String> = remotes.iter().rev().cloned().collect();
        let mut asked = BTreeSet::new();
        while let Some(addr) = candidates.pop() {
            if addr == config.addr || !asked.insert(addr.clone()) {
                continue;
            }
            let request = JoinRequest {
                addr: config.addr.clone(),
                raft_id: 0,
            };
            match join_at(&pool, &addr, request, JOIN_PATIENCE / 2).await {
                Ok(answer) => {
                    let members = answer.members.into_iter().map(|peer| peer.addr);
                    return Ok((answer.raft_id, members.collect()));
                }
                Err(status) if hopeless(&status) => {
                    return Err(StartError::Join(format!("{addr}: {}", status.message())));
                }
                Err(status) => {
                    reason = format!("{addr}: {}", status.message());
                    candidates.extend(leader_hint(&status));
                }
            }
        }
        if Instant::now() >= give_up {
            return Err(StartError::Join(reason));
        }
        tokio::time::sleep(JOIN_WAIT).await;
    }
}

#[async_trait::async_trait]
impl Consensus for RaftNode {
    fn store(&self) -> &Arc<Store> {
        &self.group.store
    }

    async fn propose(&self, transaction: Transaction) -> Result<u64, ProposeError> {
        self.group.propose(transaction).await
    }

    async fn read(&self) -> Result<Arc<State>, ReadError> {
        self.group.read().await
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.group.leadership.subscribe()
    }

    fn members(&self) -> Vec<Member> {
        self.group.members()
    }

    async fn members_heard(&self) -> Result<Vec<Member>, ReadError> {
        self.group.members_heard().await
    }

    async fn add_member(&self, member: Member) -> Result<(), MembershipError> {
        self.group.add_member(member).await
    }

    async fn remove_member(&self, raft_id: u64) -> Result<(), MembershipError> {
        self.group.remove_member(raft_id).await
    }
}
