//! The worker's loop: takes assignments, saves them, tells the programmer, and
//! owns one loop for each task.
//!
//! Everything is on disk before anything follows from it, so a crash at any
//! point is only a restart. Decides nothing: `worker.rs` and `task.rs` do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use swarm_proto::TaskId;
use swarm_proto::defaults::DATA_PATH_PORT;
use swarm_proto::v1::{SessionInfo, Task, TaskState};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::agent::Request;
use crate::driver::{Deps, Wanted, drive, pause};
use crate::local::{LocalState, TaskRecord, WriteBatch};
use crate::programmer::Goal;
use crate::runtime::Container;
use crate::session::{ApplyError, SessionState};
use crate::task::{Machine, Wish};
use crate::worker::{AssignmentSet, Held, Plan, SetError, apply, networks_of};

/// A task of an earlier life of the agent.
pub(crate) struct Adopted {
    pub task: Arc<Task>,
    pub removed: bool,
    pub machine: Machine,
}

/// Puts what the store says of each task together with the container that is there.
pub(crate) fn adopt(stored: &LocalState, containers: Vec<Container>) -> Vec<Adopted> {
    let mut containers: BTreeMap<_, _> = containers
        .into_iter()
        .map(|container| (container.task_id, container.state))
        .collect();
    stored
        .tasks
        .iter()
        .map(|(id, stored)| Adopted {
            task: stored.task.clone(),
            removed: stored.removed,
            machine: Machine::new(
                id.clone(),
                Wish::of(&stored.task, stored.removed),
                &stored.record,
                containers.remove(id),
            ),
        })
        .collect()
}

/// The UDP port of the VXLAN traffic, as a manager said last.
pub(crate) fn data_path_port(info: Option<&SessionInfo>) -> u16 {
    info.and_then(|info| u16::try_from(info.data_path_port).ok())
        .filter(|&port| port != 0)
        .unwrap_or(DATA_PATH_PORT)
}

pub(crate) struct Worker {
    deps: Arc<Deps>,
    held: Held,
    goal: watch::Sender<Goal>,
    /// Tasks with a loop: those that are held, and those being removed.
    actors: BTreeMap<TaskId, watch::Sender<Wanted>>,
    loops: JoinSet<(TaskId, bool)>,
    session: watch::Receiver<SessionState>,
    saved: Option<SessionInfo>,
    underlay: (IpAddr, u16),
    collect: Arc<Notify>,
    leaving: Option<oneshot::Sender<()>>,
    cancel: CancellationToken,
}

impl Worker {
    pub fn new(
        deps: Arc<Deps>,
        stored: LocalState,
        goal: watch::Sender<Goal>,
        session: watch::Receiver<SessionState>,
        underlay: (IpAddr, u16),
        collect: Arc<Notify>,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            deps,
            held: stored.held,
            goal,
            actors: BTreeMap::new(),
            loops: JoinSet::new(),
            session,
            saved: stored.session,
            underlay,
            collect,
            leaving: None,
            cancel,
        }
    }

    pub async fn run(mut self, mut inbox: mpsc::Receiver<Request>, adopted: Vec<Adopted>) {
        for task in adopted {
            let id = TaskId::from(&task.task.id);
            // Whatever was not acknowledged: merging is idempotent.
            self.deps.reporter.push(&id, task.machine.status().clone());
            self.spawn(id, task.task, task.removed, task.machine);
        }
        self.set_goal();
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => break,
                Some(request) = inbox.recv() => match request {
                    Request::Apply(set, done) => {
                        let result = self.apply(&set).await;
                        // The session may have ended meanwhile.
                        let _ = done.send(result);
                    }
                    Request::Leave(done) => self.leave(done).await,
                    Request::End if self.leaving.is_none() => {
                        let (nobody, _) = oneshot::channel();
                        self.leave(nobody).await;
                    }
                    Request::End => {}
                },
                Some(ended) = self.loops.join_next() => match ended {
                    Ok((id, true)) => self.gone(&id).await,
                    Ok((id, false)) => tracing::debug!(task = %id, "task left as it is"),
                    Err(error) => tracing::error!(%error, "a task's loop has panicked"),
                },
                Ok(()) = self.session.changed() => self.save_session().await,
            }
        }
        // Each ends by the same token.
        while let Some(ended) = self.loops.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task's loop has panicked");
            }
        }
    }

    async fn apply(&mut self, set: &AssignmentSet) -> Result<(), ApplyError> {
        if self.leaving.is_some() {
            let text = "this node is leaving the cluster".to_owned();
            return Err(SetError::Invalid(text).into());
        }
        let next = apply(&self.held, set, &self.deps.node)?;
        // The port is known before the first sandbox is made.
        self.save_session().await;
        self.become_held(next).await
    }

    async fn become_held(&mut self, next: Held) -> Result<(), ApplyError> {
        let mut batch = WriteBatch::default();
        batch.assignments(&self.held, &next);
        self.deps.local.commit(batch).await?;
        let plan = Plan::between(&self.held, &next);
        self.held = next;
        for task in plan.start {
            self.start(task);
        }
        for task in plan.update {
            self.wish(&TaskId::from(&task.id), Some(task), false);
        }
        for id in plan.remove {
            self.wish(&id, None, true);
        }
        self.set_goal();
        Ok(())
    }

    fn start(&mut self, task: Arc<Task>) {
        let id = TaskId::from(&task.id);
        if self.actors.contains_key(&id) {
            // Assigned again while it is being removed: it goes down all the same, and is reported.
            self.wish(&id, Some(task), false);
            return;
        }
        let record = known_record(&task);
        let machine = Machine::new(id.clone(), Wish::of(&task, false), &record, None);
        self.spawn(id, task, false, machine);
    }

    fn spawn(&mut self, id: TaskId, task: Arc<Task>, removed: bool, machine: Machine) {
        let span = tracing::info_span!("task", id = %id);
        let (wanted, watch) = watch::channel(Wanted { task, removed });
        let deps = self.deps.clone();
        let cancel = self.cancel.clone();
        self.actors.insert(id.clone(), wanted);
        let task = async move {
            let gone = keep_driving(&deps, &id, machine, watch, cancel).await;
            (id, gone)
        };
        self.loops.spawn(task.instrument(span));
    }

    fn wish(&self, id: &TaskId, task: Option<Arc<Task>>, removed: bool) {
        if let Some(actor) = self.actors.get(id) {
            actor.send_modify(|wanted| {
                wanted.removed = removed;
                if let Some(task) = task {
                    wanted.task = task;
                }
            });
        }
    }

    /// Every trace of the task is gone.
    async fn gone(&mut self, id: &TaskId) {
        self.actors.remove(id);
        self.deps.board.remove(id);
        if self.leaving.is_none() {
            self.deps.reporter.forget(id);
        }
        if let Some(task) = self.held.tasks.get(id).cloned() {
            // Assigned again in the very moment it was forgotten: it has run, and never will again.
            let mut record = known_record(&task);
            record.started = true;
            let mut batch = WriteBatch::default();
            batch.task(&task);
            if let Err(error) = self.deps.local.commit(batch).await {
                tracing::error!(task = %id, %error, "the task is not saved");
            }
            let machine = Machine::new(id.clone(), Wish::of(&task, false), &record, None);
            self.spawn(id.clone(), task, false, machine);
        }
        self.set_goal();
        let removing = self.actors.values().any(|wanted| wanted.borrow().removed);
        if !removing {
            self.collect.notify_one();
        }
        self.answer_leave();
    }

    async fn leave(&mut self, done: oneshot::Sender<()>) {
        self.leaving = Some(done);
        let nothing = Held {
            revision: self.held.revision,
            ..Default::default()
        };
        if let Err(error) = self.become_held(nothing).await {
            tracing::error!(%error, "the node's tasks are stopped, but they stay in the local store");
            for id in self.actors.keys() {
                self.wish(id, None, true);
            }
        }
        self.answer_leave();
    }

    fn answer_leave(&mut self) {
        if self.actors.is_empty()
            && let Some(done) = self.leaving.take()
        {
            // Whoever asked may have given up waiting. No set is taken any more.
            let _ = done.send(());
            let (never, _) = oneshot::channel();
            self.leaving = Some(never);
        }
    }

    /// Tells the programmer what the kernel should have now.
    fn set_goal(&self) {
        let lingering = self
            .actors
            .values()
            .filter(|wanted| wanted.borrow().removed)
            .flat_map(|wanted| networks_of(&wanted.borrow().task))
            .collect();
        self.goal.send_replace(Goal {
            held: self.held.clone(),
            lingering,
        });
    }

    /// Managers, role and port survive a restart.
    async fn save_session(&mut self) {
        let info = self.session.borrow_and_update().info.clone();
        let Some(info) = info else { return };
        if self.saved.as_ref() == Some(&info) {
            return;
        }
        let port = data_path_port(Some(&info));
        if port != self.underlay.1 {
            let (addr, _) = self.underlay;
            match self.deps.dataplane.set_underlay(addr, port).await {
                Ok(()) => self.underlay.1 = port,
                Err(error) => {
                    tracing::warn!(%error, "cannot use data path port {port}");
                    return;
                }
            }
        }
        let mut batch = WriteBatch::default();
        batch.session(&info);
        match self.deps.local.commit(batch).await {
            Ok(()) => self.saved = Some(info),
            Err(error) => tracing::error!(%error, "the managers' addresses are not saved"),
        }
    }
}

/// Drives a task until it is gone (true) or the agent stops (false). A panic is a bug, but one
/// task's bug: its loop begins again from what is there, as after a restart of the agent.
async fn keep_driving(
    deps: &Arc<Deps>,
    id: &TaskId,
    mut machine: Machine,
    wanted: watch::Receiver<Wanted>,
    cancel: CancellationToken,
) -> bool {
    let mut panics = 0;
    loop {
        let driven = drive(deps.clone(), machine, wanted.clone(), cancel.clone());
        // Nothing of the loop's own is used after a panic; what it shares has no half-made states.
        if let Ok(gone) = AssertUnwindSafe(driven).catch_unwind().await {
            return gone;
        }
        panics += 1;
        tracing::error!(panics, "the task's loop has panicked and begins again");
        // It may have held an image for a container.
        deps.images.released.notify_one();
        machine = loop {
            if !pause(panics, &cancel).await {
                return false;
            }
            match deps.runtime.list().await {
                Ok(containers) => break found_again(deps, id, &wanted.borrow(), containers),
                Err(error) => tracing::warn!(%error, "cannot ask for the task's container"),
            }
        };
    }
}

/// A task as a loop left it that has panicked.
fn found_again(deps: &Deps, id: &TaskId, wanted: &Wanted, containers: Vec<Container>) -> Machine {
    let status = deps.board.status(id);
    let container = containers
        .into_iter()
        .find(|container| container.task_id == *id)
        .map(|container| container.state);
    // Without a container, the status says whether there was one; with it, the container does.
    let started = container.is_none()
        && status
            .as_ref()
            .is_some_and(|status| status.state >= TaskState::Starting as i32);
    let record = TaskRecord { status, started };
    let wish = Wish::of(&wanted.task, wanted.removed);
    Machine::new(id.clone(), wish, &record, container)
}

/// What the managers know of a task that this node has no record of: after the loss of the local
/// store, what ran once must not be started again.
fn known_record(task: &Task) -> TaskRecord {
    let status = task.status.clone();
    let status = status.filter(|status| status.state > TaskState::Assigned as i32);
    TaskRecord {
        started: status
            .as_ref()
            .is_some_and(|status| status.state >= TaskState::Starting as i32),
        status,
    }
}
