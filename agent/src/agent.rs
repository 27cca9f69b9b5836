//! One node's agent: puts the parts together and owns their loops.
//!
//! Loops: the worker (takes assignments, owns one loop per task), the
//! programmer (tables into the data plane), the session (one manager at a
//! time) and the image collector. On start everything continues without a
//! manager from the local store: running containers are adopted, sandboxes
//! reconciled, tables programmed. [`Agent::stop`] leaves containers, sandboxes
//! and tables as they are; [`Agent::leave`] removes every trace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use swarm_disk::{Disk, Threads};
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{Network, NodeDescription, Task, TaskState};
use swarm_proto::{NetworkId, NodeId, TaskId};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::container::{container_spec, full_name, sandbox_spec};
pub use crate::driver::TaskView;
use crate::driver::{Board, Deps};
use crate::local::{LocalError, LocalState, LocalStore, WriteBatch};
use crate::network::{Dataplane, NetworkError};
use crate::programmer::{self, Goal, Programmed};
use crate::reporter::Reporter;
use crate::runtime::{ExecConfig, ExecSession, LogOptions, LogStream, Runtime, RuntimeError};
use crate::session::{ApplyError, Connector, SessionLoop, SessionState};
use crate::supervisor::{Adopted, Worker, adopt, data_path_port};
use crate::worker::{AssignmentSet, task_name};

/// Until images are collected for the first time, and after a failure.
const COLLECT_AGAIN: Duration = Duration::from_secs(600);
/// Requests to the worker under way: one set of the session, and a leave.
const REQUESTS: usize = 4;

/// What an agent is made of.
pub struct AgentConfig {
    /// The local store is kept in `agent` below it.
    pub data_dir: PathBuf,
    /// This node.
    pub node_id: NodeId,
    /// Managers to try before any is known from a session: host:port.
    pub remotes: Vec<String>,
    /// Address that VXLAN packets leave from.
    pub data_path_addr: IpAddr,
    /// What the node says of itself: [`crate::description::HostDescription::watch`].
    pub description: watch::Receiver<NodeDescription>,
    /// Connections to managers: the node's `Arc<Identity>`.
    pub connector: Arc<dyn Connector>,
    /// Containers.
    pub runtime: Arc<dyn Runtime>,
    /// Networks.
    pub dataplane: Arc<dyn Dataplane>,
    /// What `data_dir` is on.
    pub disk: Arc<dyn Disk>,
    /// Where the disk is waited for.
    pub threads: Threads,
}

/// Why an agent cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The local store.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The containers found on start, or a container asked for.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The networks found on start.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Nothing on this node has this name.
    #[error("no such task on this node: {0}")]
    NoSuchTask(String),
    /// More than one task begins with this.
    #[error("task {0} is ambiguous: give more of its ID")]
    Ambiguous(String),
    /// The agent has ended.
    #[error("the agent has stopped")]
    Stopped,
}

/// What the session and the agent's owner ask of the worker.
pub(crate) enum Request {
    Apply(AssignmentSet, oneshot::Sender<Result<(), ApplyError>>),
    /// Answered when no task is left.
    Leave(oneshot::Sender<()>),
    /// The cluster has removed this node: as if it left, but nobody waits for it.
    End,
}

/// A running agent. Dropping it ends its loops at once, as a crash would; use [`Agent::stop`].
pub struct Agent {
    runtime: Arc<dyn Runtime>,
    dataplane: Arc<dyn Dataplane>,
    board: Arc<Board>,
    broken: watch::Receiver<Option<LocalError>>,
    session: watch::Receiver<SessionState>,
    programmed: watch::Receiver<Programmed>,
    requests: mpsc::Sender<Request>,
    /// Ends the session first, so that nobody is told of a half-stopped node.
    session_cancel: CancellationToken,
    session_leave: CancellationToken,
    cancel: CancellationToken,
    session_loop: Option<JoinHandle<()>>,
    loops: Vec<(&'static str, JoinHandle<()>)>,
}

impl Agent {
    /// Adopts what an earlier life left on this node, and starts all loops.
    ///
    /// # Errors
    /// The local store is corrupt (with the file), or the runtime or the kernel cannot be asked
    /// what they hold. Nothing was changed then that a later start would miss.
    pub async fn start(config: AgentConfig) -> Result<Self, AgentError> {
        let (disk, threads) = (config.disk.clone(), config.threads);
        let data_dir = config.data_dir.clone();
        let opening = async move { LocalStore::open(&*disk, threads, &data_dir).await };
        let opened = threads.blocking().run(opening).await;
        let (local, stored) = opened.map_err(|_| AgentError::Stopped)??;
        // On disk before anything is reported under this number.
        let starts = stored.starts + 1;
        let mut begun = WriteBatch::default();
        begun.starts(starts);
        local.commit(begun).await?;
        let containers = config.runtime.list().await?;
        let adopted = adopt(&stored, containers.clone());
        let sandboxes = adopted
            .iter()
            .filter(|task| task.machine.has_sandbox())
            .filter_map(|task| sandbox_spec(&task.task).ok())
            .collect();
        config.dataplane.reconcile(sandboxes).await?;
        // What nobody here knows of is what is left of another life of this machine.
        for container in containers {
            if !stored.tasks.contains_key(&container.task_id) {
                tracing::warn!(task = %container.task_id, "removing a container without a task");
                config.runtime.remove(&container.task_id).await?;
            }
        }
        let port = data_path_port(stored.session.as_ref());
        config
            .dataplane
            .set_underlay(config.data_path_addr, port)
            .await?;
        Ok(Self::spawn(config, local, starts, stored, adopted, port))
    }

    fn spawn(
        config: AgentConfig,
        local: LocalStore,
        starts: u64,
        stored: LocalState,
        adopted: Vec<Adopted>,
        port: u16,
    ) -> Self {
        let cancel = CancellationToken::new();
        let session_cancel = CancellationToken::new();
        let session_leave = CancellationToken::new();
        let reporter = Arc::new(Reporter::new(starts));
        let board = Arc::new(Board::default());
        let collect = Arc::new(Notify::new());
        let (goal, goal_watch) = watch::channel(Goal::default());
        let (programmed, programmed_watch) = watch::channel(Programmed::default());
        let (requests, inbox) = mpsc::channel(REQUESTS);
        let (state, session) = watch::channel(SessionState {
            info: stored.session.clone(),
            ..Default::default()
        });
        let broken = local.broken();
        let deps = Arc::new(Deps {
            node: config.node_id.clone(),
            runtime: config.runtime.clone(),
            dataplane: config.dataplane.clone(),
            local,
            reporter: reporter.clone(),
            board: board.clone(),
            programmed: programmed_watch.clone(),
            images: Arc::default(),
        });
        let worker = Worker::new(
            deps.clone(),
            stored,
            goal,
            session.clone(),
            (config.data_path_addr, port),
            collect.clone(),
            cancel.clone(),
        );
        let programmer = programmer::run(
            config.dataplane.clone(),
            goal_watch,
            programmed,
            cancel.clone(),
        );
        let collector = collect_images(deps, collect, cancel.clone());
        let session_loop = SessionLoop {
            connector: config.connector,
            remotes: config.remotes,
            description: config.description,
            reporter,
            programmed: programmed_watch.clone(),
            worker: requests.clone(),
            state,
            cancel: session_cancel.clone(),
            leave: session_leave.clone(),
        };
        let span = tracing::info_span!("agent", node = %config.node_id);
        let worker = worker.run(inbox, adopted).instrument(span.clone());
        let programmer = programmer.instrument(span.clone());
        let collector = collector.instrument(span.clone());
        Self {
            runtime: config.runtime,
            dataplane: config.dataplane,
            board,
            broken,
            session,
            programmed: programmed_watch,
            requests,
            session_cancel,
            session_leave,
            cancel,
            session_loop: Some(tokio::spawn(session_loop.run().instrument(span))),
            loops: vec![
                ("worker", tokio::spawn(worker)),
                ("programmer", tokio::spawn(programmer)),
                ("image collector", tokio::spawn(collector)),
            ],
        }
    }

    /// The session: whether there is one, the node's role, all managers. The daemon renews the
    /// certificate when the role differs from the certificate's.
    #[must_use]
    pub fn session(&self) -> watch::Receiver<SessionState> {
        self.session.clone()
    }

    /// The failure of the local store after which the agent takes nothing in, once there is one:
    /// the process has to end. Tasks that run go on.
    #[must_use]
    pub fn broken(&self) -> watch::Receiver<Option<LocalError>> {
        self.broken.clone()
    }

    /// The newest revision of the node's assignments of which the kernel has everything; 0 before
    /// the first.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.programmed.borrow().revision
    }

    /// All tasks of this node.
    #[must_use]
    pub fn tasks(&self) -> Vec<TaskView> {
        self.board.all()
    }

    /// How many containers run.
    #[must_use]
    pub fn containers_running(&self) -> usize {
        self.tasks().iter().filter(|view| view.running).count()
    }

    /// The networks that exist in the kernel now.
    pub async fn held_networks(&self) -> BTreeMap<NetworkId, Network> {
        self.dataplane.held_networks().await
    }

    /// CIDR of the gateway bridge, once it is there.
    #[must_use]
    pub fn gateway_subnet(&self) -> Option<String> {
        self.dataplane.gateway_subnet()
    }

    /// The task that people mean by its ID, a unique prefix of it, or its name ("web.1").
    ///
    /// # Errors
    /// [`AgentError::NoSuchTask`], [`AgentError::Ambiguous`]
    pub fn find_task(&self, reference: &str) -> Result<TaskView, AgentError> {
        find(self.tasks(), reference)
    }

    /// Starts a process in a task's container.
    ///
    /// # Errors
    /// There is no such task here, or its container does not run.
    pub async fn exec(
        &self,
        reference: &str,
        config: ExecConfig,
    ) -> Result<ExecSession, AgentError> {
        let view = self.find_task(reference)?;
        let id = TaskId::from(&view.task.id);
        Ok(self.runtime.exec(&id, config).await?)
    }

    /// The output of a task's container, until the task is no longer assigned.
    ///
    /// # Errors
    /// There is no such task here, or it never had a container.
    pub async fn logs(
        &self,
        reference: &str,
        options: LogOptions,
    ) -> Result<LogStream, AgentError> {
        let view = self.find_task(reference)?;
        let id = TaskId::from(&view.task.id);
        Ok(self.runtime.logs(&id, options).await?)
    }

    /// Stops all tasks, removes every trace of them and of their networks, and says goodbye.
    /// Takes as long as the longest grace period. Whoever cannot wait drops the future and the agent:
    /// the next start goes on where it ended.
    ///
    /// # Errors
    /// [`AgentError::Stopped`]
    pub async fn leave(&mut self) -> Result<(), AgentError> {
        let (done, gone) = oneshot::channel();
        self.requests
            .send(Request::Leave(done))
            .await
            .map_err(|_| AgentError::Stopped)?;
        gone.await.map_err(|_| AgentError::Stopped)?;
        self.session_leave.cancel();
        self.end().await;
        Ok(())
    }

    /// Ends all loops. Containers, sandboxes and tables stay as they are.
    pub async fn stop(mut self) {
        self.session_cancel.cancel();
        self.end().await;
    }

    async fn end(&mut self) {
        if let Some(session) = self.session_loop.take() {
            joined("session", session.await);
        }
        self.cancel.cancel();
        for (name, task) in std::mem::take(&mut self.loops) {
            joined(name, task.await);
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let loops = self.loops.iter().map(|(_, task)| task);
        for task in loops.chain(&self.session_loop) {
            task.abort();
        }
    }
}

fn joined(name: &str, result: Result<(), tokio::task::JoinError>) {
    if let Err(error) = result
        && !error.is_cancelled()
    {
        tracing::error!(%error, "the {name} loop of the agent has panicked");
    }
}

fn find(tasks: Vec<TaskView>, reference: &str) -> Result<TaskView, AgentError> {
    let missing = || AgentError::NoSuchTask(reference.to_owned());
    if reference.is_empty() {
        return Err(missing());
    }
    let exact = |view: &&TaskView| view.task.id == reference || full_name(&view.task) == reference;
    if let Some(view) = tasks.iter().find(exact) {
        return Ok(view.clone());
    }
    // A slot's history has one name: the one that runs is meant, or else the newest.
    let rank = |view: &&TaskView| {
        let index = |task: &Task| {
            let version = task.meta.as_ref().and_then(|meta| meta.version);
            version.map_or(0, |version| version.index)
        };
        let ended = TaskState::try_from(view.status.state).is_ok_and(is_terminal);
        (view.running, !ended, index(&view.task))
    };
    let named = tasks
        .iter()
        .filter(|view| task_name(&view.task) == reference);
    if let Some(view) = named.max_by_key(rank) {
        return Ok(view.clone());
    }
    let mut prefixed = tasks.iter().filter(|v| v.task.id.starts_with(reference));
    match (prefixed.next(), prefixed.next()) {
        (None, _) => Err(missing()),
        (Some(view), None) => Ok(view.clone()),
        (Some(_), Some(_)) => Err(AgentError::Ambiguous(reference.to_owned())),
    }
}

/// Has unused images dropped when tasks have gone and when one was unused for long enough, and
/// never while one is pulled.
async fn collect_images(deps: Arc<Deps>, wanted: Arc<Notify>, cancel: CancellationToken) {
    let collect = async {
        // What an earlier life of the agent has left.
        let mut next = Some(COLLECT_AGAIN);
        loop {
            let due = async {
                match next {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = wanted.notified() => {}
                () = due => {}
            }
            let guard = loop {
                match deps.images.lock.try_write() {
                    Ok(guard) => break guard,
                    Err(_) => deps.images.released.notified().await,
                }
            };
            let keep: BTreeSet<String> = deps
                .board
                .all()
                .iter()
                .filter_map(|view| container_spec(&view.task).ok())
                .map(|spec| spec.image.clone())
                .collect();
            let keep: Vec<String> = keep.into_iter().collect();
            next = match deps.runtime.collect_garbage(&keep).await {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "unused images stay on this node");
                    Some(COLLECT_AGAIN)
                }
            };
            drop(guard);
        }
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = collect => {}
    }
}

#[cfg(test)]
mod tests;
