//! An agent without a node, for measuring managers: the real session over a worker that pretends.
//!
//! The session loop, its connection, heartbeats, reports and acknowledgements are the real
//! ones. There is no local store, runtime or data plane: a task runs as soon as it is
//! assigned, has ended as soon as it shall, and every table is in a kernel at once. Tables
//! are shown to the [`Observer`], as they came, and forgotten, so that ten thousand of these fit into one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use swarm_proto::TaskId;
use swarm_proto::v1::assignment_change::Change;
use swarm_proto::v1::{NodeDescription, Task, TaskState, TaskStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::Request;
use crate::programmer::Programmed;
use crate::reporter::Reporter;
use crate::session::{Connector, SessionLoop, SessionState};
use crate::worker::{AssignmentSet, SetError};

/// Encoded bytes of the largest message with assignments that this process has received.
pub static LARGEST_MESSAGE: AtomicUsize = AtomicUsize::new(0);

/// Is shown what happens to agents. Called from their loops: must not wait.
pub trait Observer: Send + Sync + 'static {
    /// The agent was given a task.
    fn assigned(&self, task: &Task);
    /// The agent has applied a set.
    fn applied(&self, set: &AssignmentSet);
    /// The agent has a session.
    fn registered(&self);
    /// The agent has lost its session.
    fn lost(&self, why: &str);
}

/// One such agent. Ends when it is dropped.
pub struct LightAgent {
    reporter: Arc<Reporter>,
    tasks: Arc<Mutex<HashMap<TaskId, i32>>>,
    programmed: watch::Receiver<Programmed>,
    loops: [JoinHandle<()>; 2],
}

impl LightAgent {
    /// Looks for a session with one of the managers at `remotes`.
    pub fn start(
        remotes: Vec<String>,
        connector: Arc<dyn Connector>,
        description: NodeDescription,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let reporter = Arc::new(Reporter::new(0));
        let tasks = Arc::new(Mutex::new(HashMap::new()));
        let (requests, inbox) = mpsc::channel(1);
        let (programmed, programmed_watch) = watch::channel(Programmed::default());
        let (state, session) = watch::channel(SessionState::default());
        let (_, description) = watch::channel(description);
        let session_loop = SessionLoop {
            connector,
            remotes,
            description,
            reporter: reporter.clone(),
            programmed: programmed_watch.clone(),
            worker: requests,
            state,
            cancel: CancellationToken::new(),
            leave: CancellationToken::new(),
        };
        let worker = Worker {
            held: 0,
            tasks: tasks.clone(),
            reporter: reporter.clone(),
            programmed,
            observer,
        };
        Self {
            reporter,
            tasks,
            programmed: programmed_watch,
            loops: [
                tokio::spawn(session_loop.run()),
                tokio::spawn(worker.run(inbox, session)),
            ],
        }
    }

    /// How many tasks have a status that no manager has acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        self.reporter.unacknowledged()
    }

    /// The newest revision that it has applied.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.programmed.borrow().revision
    }

    /// The tasks it runs.
    #[must_use]
    pub fn tasks(&self) -> Vec<TaskId> {
        self.tasks.lock().keys().cloned().collect()
    }

    /// Reports that a task runs, and whether its health check passes.
    pub fn report_health(&self, task: &TaskId, healthy: bool) {
        let status = TaskStatus {
            healthy,
            ..status(TaskState::Running)
        };
        self.reporter.push(task, status);
    }
}

impl Drop for LightAgent {
    fn drop(&mut self) {
        self.loops.iter().for_each(JoinHandle::abort);
    }
}

struct Worker {
    /// Revision.
    held: u64,
    /// With the state that was reported last.
    tasks: Arc<Mutex<HashMap<TaskId, i32>>>,
    reporter: Arc<Reporter>,
    programmed: watch::Sender<Programmed>,
    observer: Arc<dyn Observer>,
}

impl Worker {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Request>,
        mut session: watch::Receiver<SessionState>,
    ) {
        let mut registered = false;
        loop {
            tokio::select! {
                request = inbox.recv() => match request {
                    Some(Request::Apply(set, done)) => {
                        let result = self.apply(&set);
                        // The session may have ended meanwhile.
                        let _ = done.send(result.map_err(Into::into));
                    }
                    Some(Request::Leave(_) | Request::End) | None => return,
                },
                Ok(()) = session.changed() => {
                    let state = session.borrow_and_update();
                    if state.manager.is_some() != registered {
                        registered = state.manager.is_some();
                        match registered {
                            true => self.observer.registered(),
                            false => self.observer.lost(state.last_error.as_deref().unwrap_or("")),
                        }
                    }
                }
            }
        }
    }

    fn apply(&mut self, set: &AssignmentSet) -> Result<(), SetError> {
        if set.results_in < self.held {
            return Err(SetError::Stale {
                held: self.held,
                offered: set.results_in,
            });
        }
        if !set.complete && set.applies_to != self.held {
            return Err(SetError::Gap {
                held: self.held,
                applies_to: set.applies_to,
            });
        }
        self.held = set.results_in;
        let mut tasks = self.tasks.lock();
        // Its own tasks; what many agents are told stays encoded.
        let own = set.messages.iter().flat_map(|message| &message.changes);
        for change in own.filter_map(|change| change.change.as_ref()) {
            match change {
                Change::Task(task) => {
                    let id = TaskId::from(&task.id);
                    let wanted = match task.desired_state() {
                        TaskState::Ready => TaskState::Ready,
                        wanted if wanted <= TaskState::Running => TaskState::Running,
                        _ => TaskState::Shutdown,
                    };
                    let before = tasks.insert(id.clone(), wanted as i32);
                    if before.is_none() {
                        self.observer.assigned(task);
                    }
                    if before != Some(wanted as i32) {
                        self.reporter.push(&id, status(wanted));
                    }
                }
                Change::RemoveTask(id) => {
                    let id = TaskId::from(id);
                    tasks.remove(&id);
                    self.reporter.forget(&id);
                }
                _ => {}
            }
        }
        drop(tasks);
        self.observer.applied(set);
        self.programmed
            .send_modify(|programmed| programmed.revision = set.results_in);
        Ok(())
    }
}

fn status(state: TaskState) -> TaskStatus {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    TaskStatus {
        timestamp: Some(prost_types::Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or_default(),
            nanos: i32::try_from(now.subsec_nanos()).unwrap_or_default(),
        }),
        state: state.into(),
        message: "started".to_owned(),
        healthy: state == TaskState::Running,
        ..TaskStatus::default()
    }
}
