//! What runs while this node is part of a swarm: the agent, the renewal of its
//! certificate, and the manager while its certificate says so.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use swarm_agent::agent::{Agent, AgentConfig};
use swarm_identity::{DataKey, Identity, KeyStore, keep_renewed};
use swarm_proto::v1::NodeRole;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::manager::{Beginning, ManagerContext, RunningManager};
use crate::settings::Settings;
use crate::switch::{PREPARING, WORKER};

/// Between two attempts at starting the manager (the others may not be reachable yet).
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A node in a swarm.
pub struct Member {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// Where it is.
    pub settings: Settings,
    /// Its agent.
    pub agent: Arc<Agent>,
    manager: Arc<Mutex<Option<RunningManager>>>,
    context: ManagerContext,
    cancel: CancellationToken,
    loops: JoinSet<()>,
}

impl Member {
    /// Starts the agent, and the manager (with `beginning`) when the certificate is a manager's.
    ///
    /// # Errors
    /// The manager or the agent cannot be started: nothing runs then.
    pub async fn start(
        context: ManagerContext,
        agent_config: AgentConfig,
        settings: Settings,
        key_store: KeyStore,
        beginning: Option<Beginning>,
    ) -> anyhow::Result<Self> {
        let identity = Arc::clone(&context.identity);
        let mut running = None;
        context.slot.close(WORKER);
        if let Some(beginning) = beginning {
            context.slot.close(PREPARING);
            running = Some(RunningManager::start(&context, beginning).await?);
        }
        let agent = match Agent::start(agent_config).await {
            Ok(agent) => Arc::new(agent),
            Err(error) => {
                if let Some(running) = running {
                    running.stop(&context).await;
                }
                return Err(error.into());
            }
        };
        let cancel = CancellationToken::new();
        let mut loops = JoinSet::new();
        loops.spawn(keep_renewed(
            Arc::clone(&identity),
            key_store,
            agent.managers(),
            agent.role(),
            cancel.clone(),
        ));
        let manager = Arc::new(Mutex::new(running));
        loops.spawn(follow_role(
            context.clone(),
            Arc::clone(&manager),
            agent.managers(),
            cancel.clone(),
        ));
        Ok(Self {
            identity,
            settings,
            agent,
            manager,
            context,
            cancel,
            loops,
        })
    }

    /// The manager, while there is one.
    pub async fn with_manager<T>(&self, look: impl FnOnce(&RunningManager) -> T) -> Option<T> {
        self.manager.lock().await.as_ref().map(look)
    }

    /// Takes this manager out of the raft group, if it is in one and the others let it.
    pub async fn leave_raft(&self) {
        if let Some(manager) = self.manager.lock().await.as_ref() {
            manager.leave().await;
        }
    }

    /// Stops everything; containers and their networks go on.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        while self.loops.join_next().await.is_some() {}
        // The manager first: it hands its leadership over while its agent still reports.
        if let Some(manager) = self.manager.lock().await.take() {
            manager.stop(&self.context).await;
        }
        self.agent.stop().await;
    }
}

/// Starts the manager when the certificate becomes a manager's, stops it when it becomes a worker's.
async fn follow_role(
    context: ManagerContext,
    manager: Arc<Mutex<Option<RunningManager>>>,
    managers: tokio::sync::watch::Receiver<Vec<String>>,
    cancel: CancellationToken,
) {
    let mut changed = context.identity.changed();
    let mut retry = RETRY_FIRST;
    loop {
        changed.borrow_and_update();
        let mut failed = false;
        {
            let mut manager = manager.lock().await;
            match (context.identity.role(), manager.is_some()) {
                (NodeRole::Manager, false) => {
                    context.slot.close(PREPARING);
                    let remotes = managers.borrow().clone();
                    let beginning = Beginning::for_promotion(&context, remotes);
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        started = RunningManager::start(&context, beginning) => match started {
                            Ok(running) => {
                                tracing::info!("this node is a manager now");
                                *manager = Some(running);
                            }
                            Err(error) => {
                                tracing::warn!(error = format!("{error:#}"), "the manager is not started, will try again");
                                failed = true;
                            }
                        }
                    }
                }
                (NodeRole::Worker, true) => {
                    if let Some(running) = manager.take() {
                        running.stop(&context).await;
                    }
                    context.slot.close(WORKER);
                    // It was taken out of the group; as a manager again it will be a new member.
                    if let Err(error) = context.wipe_raft() {
                        tracing::error!(%error, "the raft log of the former manager is not removed");
                    }
                    tracing::info!("this node is a worker now");
                }
                _ => {}
            }
        }
        let wait = async {
            if failed {
                tokio::time::sleep(retry).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = wait => retry = (retry * 2).min(RETRY_MAX),
            result = changed.changed() => {
                retry = RETRY_FIRST;
                if result.is_err() {
                    return;
                }
            }
        }
    }
}
