//! What runs while this node is part of a swarm: the agent, the renewal of its
//! certificate, and the manager while its certificate says so.
//!
//! Starts four loops: what the session says is told to whoever renews; the
//! certificate is renewed; the manager follows the certificate's role; a failure
//! of the agent's store ends the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use swarm_agent::agent::{Agent, AgentConfig};
use swarm_agent::description::{DescriptionConfig, HostDescription};
use swarm_agent::local::LocalError;
use swarm_agent::network::Dataplane;
use swarm_agent::runtime::Runtime;
use swarm_agent::session::SessionState;
use swarm_disk::{Disk, Threads};
use swarm_identity::{Identity, KeyStore, keep_renewed};
use swarm_proto::v1::NodeRole;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::environment::Host;
use crate::manager::{Beginning, ManagerContext, RunningManager};
use crate::settings::Settings;
use crate::switch::{PREPARING, WORKER};

/// Between two attempts at starting the manager (the others may not be reachable yet).
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long tasks may take to end when the node leaves, longer than any ordinary grace period.
/// A container that cannot be killed must not keep the node in the swarm.
const LEAVE_LIMIT: Duration = Duration::from_secs(120);

/// What a member is started with.
pub struct MemberConfig {
    /// For the manager.
    pub context: ManagerContext,
    /// Where the node is.
    pub settings: Settings,
    /// Where its certificate is kept.
    pub key_store: KeyStore,
    /// Where the agent keeps what survives it.
    pub data_dir: std::path::PathBuf,
    /// Its name.
    pub hostname: String,
    /// Labels of whoever runs it.
    pub engine_labels: Vec<(String, String)>,
    /// The machine.
    pub host: Arc<dyn Host>,
    /// Containers.
    pub runtime: Arc<dyn Runtime>,
    /// Networks.
    pub dataplane: Arc<dyn Dataplane>,
}

/// A node in a swarm.
pub struct Member {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// Where it is.
    pub settings: Settings,
    /// Its agent.
    pub agent: Agent,
    managers: watch::Receiver<Vec<String>>,
    description: HostDescription,
    manager: Arc<Mutex<Option<RunningManager>>>,
    context: ManagerContext,
    cancel: CancellationToken,
    loops: JoinSet<()>,
}

impl Member {
    /// Starts the manager (if it has a `beginning`) and the agent.
    ///
    /// # Errors
    /// One of them cannot be started: nothing runs then.
    pub async fn start(config: MemberConfig, beginning: Option<Beginning>) -> Result<Self> {
        let context = config.context;
        let identity = Arc::clone(&context.identity);
        context.slot.close(WORKER);
        let mut manager = None;
        if let Some(beginning) = beginning {
            context.slot.close(PREPARING);
            manager = Some(RunningManager::start(&context, beginning).await?);
        }
        let mut remotes = config.settings.remotes.clone();
        if manager.is_some() {
            // Its own manager first: it needs no network.
            remotes.insert(0, config.settings.advertise_addr.to_string());
        }
        let agent = start_agent(AgentParts {
            description: DescriptionConfig {
                hostname: config.hostname,
                data_path_addr: config.settings.data_path_addr.to_string(),
                engine_version: env!("CARGO_PKG_VERSION").to_owned(),
                engine_labels: config.engine_labels,
                trust_root_digest: identity.root_digest().to_string(),
            },
            host: config.host,
            disk: Arc::clone(&context.disk),
            threads: context.threads,
            identity: Arc::clone(&identity),
            remotes: remotes.clone(),
            data_dir: config.data_dir,
            data_path_addr: config.settings.data_path_addr,
            runtime: config.runtime,
            dataplane: config.dataplane,
        })
        .await;
        let (agent, description) = match agent {
            Ok(parts) => parts,
            Err(error) => {
                if let Some(manager) = manager {
                    manager.stop(&context).await;
                }
                return Err(error);
            }
        };
        let cancel = CancellationToken::new();
        let mut loops = JoinSet::new();
        loops.spawn(watch_store(
            agent.broken(),
            context.fatal.clone(),
            cancel.clone(),
        ));
        let (role_sender, role) = watch::channel(identity.role());
        let (managers_sender, managers) = watch::channel(remotes);
        loops.spawn(tell_session(
            agent.session(),
            role_sender,
            managers_sender,
            cancel.clone(),
        ));
        loops.spawn(keep_renewed(
            Arc::clone(&identity),
            config.key_store,
            managers.clone(),
            role,
            cancel.clone(),
        ));
        let manager = Arc::new(Mutex::new(manager));
        loops.spawn(follow_role(
            context.clone(),
            Arc::clone(&manager),
            managers.clone(),
            cancel.clone(),
        ));
        Ok(Self {
            identity,
            settings: config.settings,
            agent,
            managers,
            description,
            manager,
            context,
            cancel,
            loops,
        })
    }

    /// host:port of the managers, as last heard.
    #[must_use]
    pub fn managers(&self) -> Vec<String> {
        self.managers.borrow().clone()
    }

    /// Asks the manager something, while there is one that is not just starting or stopping.
    pub fn with_manager<T>(&self, look: impl FnOnce(&RunningManager) -> T) -> Option<T> {
        self.manager.try_lock().ok()?.as_ref().map(look)
    }

    /// Ends the tasks, tells the managers, and takes this manager out of the raft group, as far as the others let it.
    pub async fn leave(&mut self) {
        match tokio::time::timeout(LEAVE_LIMIT, self.agent.leave()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "leaving"),
            Err(_) => tracing::warn!(
                "not every task has ended within {LEAVE_LIMIT:?}; what is left is removed at the next start"
            ),
        }
        if let Some(manager) = self.manager.lock().await.as_ref() {
            manager.leave().await;
        }
    }

    /// Stops everything; containers and their networks go on.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        while self.loops.join_next().await.is_some() {}
        // The manager first: it hands its leadership over.
        if let Some(manager) = self.manager.lock().await.take() {
            manager.stop(&self.context).await;
        }
        self.agent.stop().await;
        self.description.stop().await;
    }
}

struct AgentParts {
    description: DescriptionConfig,
    host: Arc<dyn Host>,
    disk: Arc<dyn Disk>,
    threads: Threads,
    identity: Arc<Identity>,
    remotes: Vec<String>,
    data_dir: std::path::PathBuf,
    data_path_addr: std::net::IpAddr,
    runtime: Arc<dyn Runtime>,
    dataplane: Arc<dyn Dataplane>,
}

async fn start_agent(parts: AgentParts) -> Result<(Agent, HostDescription)> {
    let dataplane = Arc::clone(&parts.dataplane);
    let description = parts.host.describe(parts.description, dataplane).await?;
    let started = Agent::start(AgentConfig {
        data_dir: parts.data_dir,
        node_id: parts.identity.node_id(),
        remotes: parts.remotes,
        data_path_addr: parts.data_path_addr,
        description: description.watch(),
        connector: Arc::new(parts.identity),
        runtime: parts.runtime,
        dataplane: parts.dataplane,
        disk: parts.disk,
        threads: parts.threads,
    })
    .await;
    match started {
        Ok(agent) => Ok((agent, description)),
        Err(error) => {
            description.stop().await;
            Err(error.into())
        }
    }
}

/// Tells `main` when the agent's store fails: nothing is taken in any more, while tasks go on.
async fn watch_store(
    mut broken: watch::Receiver<Option<LocalError>>,
    fatal: mpsc::Sender<String>,
    cancel: CancellationToken,
) {
    tokio::select! {
        () = cancel.cancelled() => {}
        failure = broken.wait_for(Option::is_some) => {
            if let Ok(Some(failure)) = failure.as_deref() {
                let _ = fatal.try_send(failure.to_string());
            }
        }
    }
}

/// Tells what the session says of this node's role and of the managers.
async fn tell_session(
    mut session: watch::Receiver<SessionState>,
    role: watch::Sender<NodeRole>,
    managers: watch::Sender<Vec<String>>,
    cancel: CancellationToken,
) {
    loop {
        if let Some(info) = session.borrow_and_update().info.clone() {
            if let Some(node) = &info.node {
                let granted = node.role();
                role.send_if_modified(|role| std::mem::replace(role, granted) != granted);
            }
            let addrs: Vec<String> = info.managers.into_iter().map(|peer| peer.addr).collect();
            if !addrs.is_empty() {
                managers.send_if_modified(|known| {
                    let news = *known != addrs;
                    *known = addrs;
                    news
                });
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = session.changed() => if changed.is_err() {
                // The agent has left; renewal goes on with what is known until the end.
                cancel.cancelled().await;
                return;
            }
        }
    }
}

/// Starts the manager when the certificate becomes a manager's, stops it when it becomes a worker's,
/// and has it join anew when the raft group has taken it out without the certificate changing.
async fn follow_role(
    context: ManagerContext,
    manager: Arc<Mutex<Option<RunningManager>>>,
    managers: watch::Receiver<Vec<String>>,
    cancel: CancellationToken,
) {
    let mut changed = context.identity.changed();
    let mut retry = RETRY_FIRST;
    loop {
        changed.borrow_and_update();
        let step = match_role(&context, &manager, managers.borrow().clone());
        let failed = tokio::select! {
            () = cancel.cancelled() => return,
            done = step => done.err(),
        };
        let mut expelled = manager.lock().await.as_ref().map(RunningManager::expelled);
        let expelled = async {
            // An error means that the manager is gone; then something else has happened.
            let told = match &mut expelled {
                Some(expelled) => expelled.wait_for(Option::is_some).await.is_ok(),
                None => false,
            };
            if !told {
                std::future::pending::<()>().await;
            }
        };
        let again = async {
            match &failed {
                Some(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "the manager is not started, will try again"
                    );
                    tokio::time::sleep(retry).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = again => retry = (retry * 2).min(RETRY_MAX),
            () = expelled => retry = RETRY_FIRST,
            result = changed.changed() => {
                retry = RETRY_FIRST;
                if result.is_err() {
                    return;
                }
            }
        }
    }
}

async fn match_role(
    context: &ManagerContext,
    manager: &Mutex<Option<RunningManager>>,
    remotes: Vec<String>,
) -> Result<()> {
    let mut manager = manager.lock().await;
    let expelled = |manager: &mut RunningManager| manager.expelled().borrow().is_some();
    if let Some(former) = manager.take_if(expelled) {
        former.stop(context).await;
        // Of no use under a raft ID that the group has given up.
        context.wipe_raft()?;
    }
    match (context.identity.role(), manager.is_some()) {
        (NodeRole::Manager, false) => {
            context.slot.close(PREPARING);
            let beginning = Beginning::resume(&*context.disk, &context.raft_dir, remotes);
            *manager = Some(RunningManager::start(context, beginning).await?);
            tracing::info!("this node is a manager now");
        }
        (NodeRole::Worker, running) => {
            if running && let Some(running) = manager.take() {
                running.stop(context).await;
                tracing::info!("this node is a worker now");
            }
            context.slot.close(WORKER);
            // It was taken out of the group; as a manager again it will be a new member.
            context.wipe_raft()?;
        }
        (NodeRole::Manager, true) => {}
    }
    Ok(())
}
