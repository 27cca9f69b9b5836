//! The manager part of a node: raft member, leader loops, and the API on its port.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use swarm_disk::{Disk, Threads};
use swarm_identity::{AuthorizeLayer, Check, Connection, DataKey, Identity, Listener, grpc_server};
use swarm_manager::{Hearing, Manager, ManagerConfig, ca};
use swarm_proto::v1::dispatcher_server::SERVICE_NAME as DISPATCHER;
use swarm_proto::v1::{NodeRole, Transaction};
use swarm_raft::{RaftConfig, RaftNode};
use swarm_store::Consensus as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::environment::Tune;
use crate::node::remove_dir;
use crate::switch::ManagerSlot;

/// How long a leaving manager waits to be taken out of the group: the others may be gone.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// Urgent connections that wait to be served.
const URGENT_CONNECTIONS: usize = 64;
/// How long requests that are being answered may take when the manager stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What a manager is started with.
#[derive(Clone)]
pub struct ManagerContext {
    /// This node's identity.
    pub identity: Arc<Identity>,
    /// What log and snapshots are encrypted with.
    pub data_key: DataKey,
    /// Where they are.
    pub raft_dir: PathBuf,
    /// What that is on.
    pub disk: Arc<dyn Disk>,
    /// Where consensus runs and the disk is waited for.
    pub threads: Threads,
    /// What its raft member has other than its defaults.
    pub tune: Tune,
    /// host:port at which the others reach this manager.
    pub advertise_addr: SocketAddr,
    /// What its API is bound to.
    pub listen_addr: SocketAddr,
    /// What the local socket serves of it.
    pub slot: ManagerSlot,
    /// Why the process must end.
    pub fatal: mpsc::Sender<String>,
}

impl ManagerContext {
    /// Removes what the node has of the raft group.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn wipe_raft(&self) -> Result<()> {
        remove_dir(&*self.disk, &self.raft_dir)
    }
}

/// How a manager begins.
pub enum Beginning {
    /// It makes the cluster, with this transaction.
    Bootstrap(Box<Transaction>),
    /// It enters the group that these managers (host:port) belong to.
    Join(Vec<String>),
    /// It goes on from its log.
    Resume,
}

impl Beginning {
    /// From the log if there is one; otherwise (a crash cut the first start
    /// short, or the node was just promoted) it joins.
    #[must_use]
    pub fn resume(disk: &dyn Disk, raft_dir: &Path, remotes: Vec<String>) -> Self {
        if RaftNode::exists(disk, raft_dir) {
            Self::Resume
        } else {
            Self::Join(remotes)
        }
    }
}

/// A manager that runs.
pub struct RunningManager {
    raft: Arc<RaftNode>,
    manager: Manager,
    cancel: CancellationToken,
    server: JoinHandle<()>,
    /// Of the other managers' urgent connections.
    urgent_server: JoinHandle<()>,
    watching: JoinHandle<()>,
    telling: JoinHandle<()>,
}

impl RunningManager {
    /// Starts the raft member, then the API, then the loops.
    ///
    /// # Errors
    /// The port is taken, the log is damaged, or no manager lets it join: nothing runs then.
    pub async fn start(context: &ManagerContext, beginning: Beginning) -> Result<Self> {
        // Before anything is written: a port that is taken is the commonest mistake.
        let listener = Listener::bind(
            &context.listen_addr.to_string(),
            Arc::clone(&context.identity),
        )
        .await?;
        let mut config = RaftConfig::new(
            context.raft_dir.clone(),
            context.advertise_addr.to_string(),
            Arc::clone(&context.identity),
            context.data_key.clone(),
        );
        config.disk = Arc::clone(&context.disk);
        config.threads = context.threads;
        (context.tune)(&mut config);
        let joining = matches!(beginning, Beginning::Join(_));
        let raft = match beginning {
            Beginning::Bootstrap(transaction) => RaftNode::bootstrap(config, *transaction).await,
            Beginning::Join(remotes) => RaftNode::join(config, remotes).await,
            Beginning::Resume => RaftNode::start(config).await,
        }
        .context("starting the raft member")?;
        let manager = Manager::start(ManagerConfig::new(
            raft.clone(),
            Arc::clone(&context.identity),
        ));
        let cancel = CancellationToken::new();
        let health = HealthReporter::new();
        let routes = manager.routes().add_service(raft.service());
        let routes = crate::with_reflection(routes, health.clone())?;
        let (urgent, urgent_connections) = mpsc::channel(URGENT_CONNECTIONS);
        let serve = |routes, incoming| {
            let check = ca::admission(Arc::clone(raft.store()));
            serve(routes, incoming, check, cancel.clone())
        };
        let server = tokio::spawn(serve(
            routes.clone(),
            listener.incoming_with_urgent(urgent).boxed(),
        ));
        // Heartbeats and entries are taken in where they are worked on, and wait for no session; nor do the
        // reports of live nodes, since a manager that is busy is no reason to take nodes for dead.
        let urgent_server = raft.runtime().spawn(serve(
            Routes::new(raft.service()).add_service(manager.liveness_service()),
            ReceiverStream::new(urgent_connections)
                .map(Connection::move_here)
                .boxed(),
        ));
        let watching = tokio::spawn(watch_fatal(
            raft.fatal(),
            context.fatal.clone(),
            cancel.clone(),
        ));
        let telling = tokio::spawn(tell_standing(manager.hearing(), health, cancel.clone()));
        let running = Self {
            raft,
            manager,
            cancel,
            server,
            urgent_server,
            watching,
            telling,
        };
        if joining && let Err(error) = running.raft.joined().await {
            running.stop(context).await;
            return Err(error).context("joining the raft group");
        }
        context.slot.open(routes);
        Ok(running)
    }

    /// Its member of the raft group.
    #[must_use]
    pub fn raft(&self) -> &Arc<RaftNode> {
        &self.raft
    }

    /// Why the group has taken this manager out for good, once it has: it can only join again.
    #[must_use]
    pub fn expelled(&self) -> watch::Receiver<Option<String>> {
        self.raft.expelled()
    }

    /// How many managers vote.
    #[must_use]
    pub fn voters(&self) -> usize {
        self.raft
            .members()
            .iter()
            .filter(|member| member.voter)
            .count()
    }

    /// Nodes, and managers among them.
    #[must_use]
    pub fn counts(&self) -> (u32, u32) {
        let state = self.raft.store().state();
        let count = |nodes: usize| u32::try_from(nodes).unwrap_or(u32::MAX);
        (
            count(state.nodes().count()),
            count(
                state
                    .nodes()
                    .filter(|node| node.role() == NodeRole::Manager)
                    .count(),
            ),
        )
    }

    /// Takes this manager out of the group, as far as the others can be reached.
    pub async fn leave(&self) {
        if self.voters() <= 1 {
            return;
        }
        match tokio::time::timeout(LEAVE_LIMIT, self.raft.leave()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "this manager is not taken out of the raft group; demote it there");
            }
            Err(_) => tracing::warn!(
                "this manager is not taken out of the raft group within {LEAVE_LIMIT:?}; demote it there"
            ),
        }
    }

    /// Hands leadership over and stops.
    pub async fn stop(self, context: &ManagerContext) {
        context.slot.close(crate::switch::PREPARING);
        self.manager.stop().await;
        self.raft.shutdown().await;
        self.cancel.cancel();
        let drained = Instant::now() + DRAIN_LIMIT;
        for mut server in [self.server, self.urgent_server] {
            if tokio::time::timeout_at(drained, &mut server).await.is_err() {
                // Streams that are open as long as their client likes.
                server.abort();
                let _ = server.await;
            }
        }
        let _ = self.watching.await;
        let _ = self.telling.await;
    }
}

/// Keeps the health of the dispatcher: it serves agents while a leader hears of them by it.
async fn tell_standing(
    mut hearing: watch::Receiver<Hearing>,
    health: HealthReporter,
    cancel: CancellationToken,
) {
    loop {
        let status = match *hearing.borrow_and_update() {
            Hearing::Heard => ServingStatus::Serving,
            Hearing::Doubtful | Hearing::Unheard => ServingStatus::NotServing,
        };
        health.set_service_status(DISPATCHER, status).await;
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = hearing.changed() => if changed.is_err() { return },
        }
    }
}

async fn serve(
    routes: Routes,
    incoming: BoxStream<'static, io::Result<Connection>>,
    check: Check,
    cancel: CancellationToken,
) {
    let served = grpc_server()
        .layer(AuthorizeLayer::with_check(check))
        .serve_with_incoming_shutdown(routes, incoming, cancel.cancelled())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the API has ended");
    }
}

/// Tells `main` when the log or the disk fails: nothing may be acknowledged any more.
async fn watch_fatal(
    mut failed: watch::Receiver<Option<swarm_raft::RaftFatal>>,
    fatal: mpsc::Sender<String>,
    cancel: CancellationToken,
) {
    tokio::select! {
        () = cancel.cancelled() => {}
        failure = failed.wait_for(Option::is_some) => {
            if let Ok(Some(failure)) = failure.as_deref() {
                let _ = fatal.try_send(failure.to_string());
            }
        }
    }
}
