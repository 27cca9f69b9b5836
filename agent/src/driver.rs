//! Performs what `task.rs` decides: one loop for each task.
//!
//! Holds no state of its own but the steps in flight. When the agent stops,
//! waits and pulls are dropped, steps that touch the kernel are finished, and
//! the container is left running.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use swarm_proto::v1::{PortConfig, Task, TaskStatus};
use swarm_proto::{NodeId, TaskId};
use tokio::sync::{Notify, OwnedRwLockReadGuard, RwLock, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::container::{
    HealthCheck, container_config, container_spec, health_check, sandbox_spec, stop_grace,
};
use crate::local::{LocalStore, WriteBatch};
use crate::network::{Dataplane, NetworkError, Sandbox};
use crate::programmer::Programmed;
use crate::reporter::Reporter;
use crate::runtime::{ExecConfig, ExecOutput, Runtime, RuntimeError};
use crate::task::{Action, Event, Failure, Machine, Prepare, Wish};
use crate::worker::networks_of;

/// Attempts at a step that may succeed when tried again.
const ATTEMPTS: u32 = 3;
/// Wait before the second attempt; doubles.
const RETRY: Duration = Duration::from_millis(500);
/// The longest wait between two attempts of a step that is never given up.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Beyond the grace period, for the kernel to end a killed process.
const KILL_MAX: Duration = Duration::from_secs(30);
/// How long the managers may take to say that nobody sends a task anything new any more: longer than
/// their leader waits for nodes, so that this ends a wait only when there is no leader.
const WITHDRAWAL_MAX: Duration = Duration::from_secs(3);
/// Steps that touch the kernel get this long when the agent stops.
const FINISH_MAX: Duration = Duration::from_secs(5);
/// Between two checks of a container that has not been healthy yet.
const START_INTERVAL: Duration = Duration::from_secs(1);

/// A task as people ask for it.
#[derive(Clone, Debug)]
pub struct TaskView {
    /// As last assigned.
    pub task: Arc<Task>,
    /// The newest status.
    pub status: TaskStatus,
    /// Its container's first process runs.
    pub running: bool,
}

/// All tasks of the node as they are now.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<BTreeMap<TaskId, TaskView>>);

impl Board {
    pub fn set(&self, id: &TaskId, view: TaskView) {
        self.0.lock().insert(id.clone(), view);
    }

    pub fn remove(&self, id: &TaskId) {
        self.0.lock().remove(id);
    }

    pub fn status(&self, id: &TaskId) -> Option<TaskStatus> {
        self.0.lock().get(id).map(|view| view.status.clone())
    }

    pub fn all(&self) -> Vec<TaskView> {
        self.0.lock().values().cloned().collect()
    }
}

/// Lets pulls and image garbage collection exclude each other.
#[derive(Debug, Default)]
pub(crate) struct Images {
    /// Read: an image is pulled and not yet used by a container. Write: images are collected.
    pub lock: Arc<RwLock<()>>,
    /// A reader has gone.
    pub released: Notify,
}

/// What every task's loop needs.
pub(crate) struct Deps {
    pub node: NodeId,
    pub runtime: Arc<dyn Runtime>,
    pub dataplane: Arc<dyn Dataplane>,
    pub local: LocalStore,
    pub reporter: Arc<Reporter>,
    pub board: Arc<Board>,
    pub programmed: watch::Receiver<Programmed>,
    pub images: Arc<Images>,
}

/// What the managers want of a task.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub task: Arc<Task>,
    pub removed: bool,
}

/// What comes back from a step.
enum Done {
    Event(Event),
    /// The record was saved (or not); these events waited for it.
    Saved(Result<(), Failure>, Vec<AfterSave>),
    Nothing,
}

/// What follows when the record is on disk.
enum AfterSave {
    Start,
    Finish(Box<TaskStatus>),
}

struct Driver {
    id: TaskId,
    deps: Arc<Deps>,
    machine: Machine,
    wanted: watch::Receiver<Wanted>,
    steps: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Ends waits that may be ended when the agent stops.
    stop: CancellationToken,
    /// Ends a pull and the wait for networks.
    prepare: CancellationToken,
    /// Ends health checks.
    running: CancellationToken,
    sandbox: Arc<Mutex<Option<Sandbox>>>,
    /// Held from the pull until the container uses the image.
    image: Arc<Mutex<Option<OwnedRwLockReadGuard<()>>>>,
    dirty: bool,
    saving: bool,
    after_save: Vec<AfterSave>,
}

/// Runs until the task is gone (true) or the agent stops (false).
pub(crate) async fn drive(
    deps: Arc<Deps>,
    machine: Machine,
    wanted: watch::Receiver<Wanted>,
    cancel: CancellationToken,
) -> bool {
    let stop = CancellationToken::new();
    let id = TaskId::from(&wanted.borrow().task.id);
    let mut driver = Driver {
        id,
        deps,
        machine,
        wanted,
        steps: FuturesUnordered::new(),
        prepare: stop.child_token(),
        running: stop.child_token(),
        stop,
        sandbox: Arc::default(),
        image: Arc::default(),
        dirty: false,
        saving: false,
        after_save: Vec::new(),
    };
    driver.show();
    let actions = driver.machine.steps();
    driver.perform_all(actions);
    loop {
        if driver.machine.is_forgotten() {
            return true;
        }
        tokio::select! {
            Some(done) = driver.steps.next() => driver.take(done),
            changed = driver.wanted.changed() => {
                if changed.is_err() {
                    break;
                }
                driver.take_wish();
            }
            () = cancel.cancelled() => break,
        }
    }
    driver.stop.cancel();
    let finish = async { while driver.steps.next().await.is_some() {} };
    if tokio::time::timeout(FINISH_MAX, finish).await.is_err() {
        tracing::warn!("steps in flight are left to the next start of the agent");
    }
    false
}

impl Driver {
    fn take_wish(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let wish = Wish::of(&wanted.task, wanted.removed);
        let actions = self.machine.on(Event::Wanted(wish));
        self.perform_all(actions);
        self.show();
    }

    fn take(&mut self, done: Done) {
        match done {
            Done::Nothing => {}
            Done::Event(event) => {
                if matches!(event, Event::Created | Event::PrepareFailed(..)) {
                    self.release_image();
                }
                if matches!(event, Event::Exited(_)) {
                    self.running.cancel();
                }
                let actions = self.machine.on(event);
                self.perform_all(actions);
            }
            Done::Saved(result, after) => {
                self.saving = false;
                for next in after {
                    self.after_save(next, &result);
                }
                self.save();
            }
        }
        self.show();
    }

    fn after_save(&mut self, next: AfterSave, result: &Result<(), Failure>) {
        let event = match (next, result) {
            (AfterSave::Start, Ok(())) => Event::StartSaved,
            (AfterSave::Start, Err(failure)) => Event::SaveFailed(failure.clone()),
            (AfterSave::Finish(status), _) => {
                // The managers must know, even when the disk does not.
                self.report(*status);
                Event::Finished
            }
        };
        let actions = self.machine.on(event);
        self.perform_all(actions);
    }

    fn release_image(&mut self) {
        if self.image.lock().take().is_some() {
            self.deps.images.released.notify_one();
        }
    }

    fn show(&self) {
        self.deps.board.set(
            &self.id,
            TaskView {
                task: self.wanted.borrow().task.clone(),
                status: self.machine.status().clone(),
                running: self.machine.is_running(),
            },
        );
    }

    fn report(&self, mut status: TaskStatus) {
        status.timestamp = Some(SystemTime::now().into());
        tracing::debug!(state = status.state, err = %status.err, "status");
        self.deps.reporter.push(&self.id, status);
    }

    fn perform_all(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        let task = self.wanted.borrow().task.clone();
        let deps = self.deps.clone();
        let id = self.id.clone();
        match action {
            Action::Report(status) => {
                self.report(status);
                self.dirty = true;
                self.save();
            }
            Action::SaveStart => {
                self.dirty = true;
                self.after_save.push(AfterSave::Start);
                self.save();
            }
            Action::Finish(status) => {
                self.release_image();
                self.dirty = true;
                self.after_save.push(AfterSave::Finish(Box::new(status)));
                self.save();
            }
            Action::CancelPrepare => self.prepare.cancel(),
            Action::Pull => {
                let (cancel, slot) = (self.prepare.clone(), self.image.clone());
                self.step("pull", async move {
                    let guard = deps.images.lock.clone().read_owned().await;
                    *slot.lock() = Some(guard);
                    tokio::select! {
                        () = cancel.cancelled() => Done::Nothing,
                        result = pull(&deps, &task) => Done::Event(match result {
                            Ok(()) => Event::ImageReady,
                            Err(failure) => Event::PrepareFailed(Prepare::Image, failure),
                        }),
                    }
                });
            }
            Action::EnsureSandbox { patient } => {
                let (cancel, slot) = (self.prepare.clone(), self.sandbox.clone());
                self.step("sandbox", async move {
                    Done::Event(match sandbox(&deps, &task, patient, &cancel).await {
                        None => Event::SandboxAbandoned,
                        Some(Ok(sandbox)) => {
                            let ports: Vec<PortConfig> = sandbox.host_ports.clone();
                            *slot.lock() = Some(sandbox);
                            Event::SandboxReady(ports)
                        }
                        Some(Err(failure)) => Event::PrepareFailed(Prepare::Sandbox, failure),
                    })
                });
            }
            Action::Create => {
                let sandbox = self.sandbox.lock().clone();
                self.step("create", async move {
                    Done::Event(match create(&deps, &task, sandbox).await {
                        Ok(()) => Event::Created,
                        Err(failure) => Event::PrepareFailed(Prepare::Container, failure),
                    })
                });
            }
            Action::Start => self.step("start", async move {
                Done::Event(match deps.runtime.start(&id).await {
                    Ok(pid) => Event::Started(pid),
                    Err(error) => Event::StartFailed(runtime_failure("start-failed", &error)),
                })
            }),
            Action::Watch => {
                let stop = self.stop.clone();
                self.step("watch", async move {
                    tokio::select! {
                        () = stop.cancelled() => Done::Nothing,
                        exit = watch_exit(&deps, &id) => Done::Event(exit),
                    }
                });
            }
            Action::CheckHealth { passed } => {
                let running = self.running.clone();
                self.step("health", async move {
                    tokio::select! {
                        () = running.cancelled() => Done::Nothing,
                        event = health(&deps, &task, passed) => Done::Event(event),
                    }
                });
            }
            Action::AwaitWithdrawal => {
                let stop = self.stop.clone();
                self.step("withdrawal", async move {
                    tokio::select! {
                        () = stop.cancelled() => Done::Nothing,
                        () = tokio::time::sleep(WITHDRAWAL_MAX) => Done::Event(Event::WaitedEnough),
                    }
                });
            }
            Action::Stop { attempt } => {
                self.running.cancel();
                let stop = self.stop.clone();
                self.step("stop", async move {
                    if !pause(attempt, &stop).await {
                        return Done::Nothing;
                    }
                    let grace = stop_grace(&task);
                    let call = deps.runtime.stop(&id, grace);
                    Done::Event(match tokio::time::timeout(grace + KILL_MAX, call).await {
                        Ok(Ok(exit)) => Event::Stopped(exit),
                        Ok(Err(error)) => Event::StopStuck(error.to_string()),
                        Err(_) => Event::StopStuck(format!(
                            "still there {} s after SIGKILL",
                            KILL_MAX.as_secs()
                        )),
                    })
                });
            }
            Action::RemoveSandbox => {
                let stop = self.stop.clone();
                self.step("remove sandbox", async move {
                    for attempt in 0.. {
                        if !pause(attempt, &stop).await {
                            break;
                        }
                        match deps.dataplane.remove_sandbox(&id).await {
                            Ok(()) => return Done::Event(Event::SandboxRemoved),
                            Err(error) => {
                                tracing::warn!(%error, "cannot remove sandbox, trying again");
                            }
                        }
                    }
                    Done::Nothing
                });
            }
            Action::RemoveContainer => {
                let stop = self.stop.clone();
                self.step("remove container", async move {
                    for attempt in 0.. {
                        if !pause(attempt, &stop).await {
                            break;
                        }
                        match deps.runtime.remove(&id).await {
                            Ok(()) | Err(RuntimeError::NotFound(_)) => {
                                return Done::Event(Event::ContainerRemoved);
                            }
                            Err(error) => {
                                tracing::warn!(%error, "cannot remove container, trying again");
                            }
                        }
                    }
                    Done::Nothing
                });
            }
            Action::Forget => self.step("forget", async move {
                let mut batch = WriteBatch::default();
                batch.remove_task(&id);
                if let Err(error) = deps.local.commit(batch).await {
                    tracing::error!(%error, "a removed task stays in the local store");
                }
                Done::Event(Event::Forgotten)
            }),
        }
    }

    fn step(&mut self, name: &'static str, step: impl Future<Output = Done> + Send + 'static) {
        self.steps.push(Box::pin(async move {
            let begin = Instant::now();
            let done = step.await;
            tracing::debug!(
                step = name,
                took_ms = begin.elapsed().as_secs_f64() * 1e3,
                "done"
            );
            done
        }));
    }

    /// One write at a time, so that an older record never replaces a newer one.
    fn save(&mut self) {
        if self.saving || !self.dirty {
            return;
        }
        self.dirty = false;
        self.saving = true;
        let after = std::mem::take(&mut self.after_save);
        let mut record = self.machine.record();
        for next in &after {
            if let AfterSave::Finish(status) = next {
                record.status = Some(status.as_ref().clone());
            }
        }
        let mut batch = WriteBatch::default();
        batch.record(&self.id, &record);
        let local = self.deps.local.clone();
        self.step("save", async move {
            let result = local.commit(batch).await.map_err(|error| Failure {
                code: "local-store",
                text: format!("this node cannot save the task: {error}"),
            });
            Done::Saved(result, after)
        });
    }
}

/// Waits before attempt number `attempt` (from 0). False if the agent stops meanwhile.
pub(crate) async fn pause(attempt: u32, stop: &CancellationToken) -> bool {
    if attempt == 0 {
        return true;
    }
    let wait = RETRY
        .saturating_mul(1 << (attempt - 1).min(10))
        .min(RETRY_MAX);
    tokio::select! {
        () = stop.cancelled() => false,
        () = tokio::time::sleep(wait) => true,
    }
}

fn runtime_failure(code: &'static str, error: &RuntimeError) -> Failure {
    match error {
        // The words that people know from Docker.
        RuntimeError::NoSuchImage { image } => Failure {
            code: "image-not-found",
            text: format!("No such image: {image}"),
        },
        RuntimeError::Pull { .. } => Failure {
            code: "image-pull-failed",
            text: error.to_string(),
        },
        _ => Failure {
            code,
            text: error.to_string(),
        },
    }
}

fn invalid(text: String) -> Failure {
    Failure {
        code: "invalid-config",
        text,
    }
}

async fn pull(deps: &Deps, task: &Task) -> Result<(), Failure> {
    let spec = container_spec(task).map_err(invalid)?;
    let never = CancellationToken::new();
    let mut attempt = 0;
    loop {
        match deps
            .runtime
            .pull(&spec.image, spec.pull_auth.as_ref())
            .await
        {
            Ok(_) => return Ok(()),
            Err(error) if error.is_fatal() || attempt + 1 == ATTEMPTS => {
                return Err(runtime_failure("prepare-failed", &error));
            }
            Err(error) => tracing::info!(%error, "pulling again"),
        }
        attempt += 1;
        pause(attempt, &never).await;
    }
}

/// `None` if it was given up while waiting.
async fn sandbox(
    deps: &Deps,
    task: &Task,
    patient: bool,
    cancel: &CancellationToken,
) -> Option<Result<Sandbox, Failure>> {
    let spec = match sandbox_spec(task) {
        Ok(spec) => spec,
        Err(text) => return Some(Err(invalid(text))),
    };
    let needed = networks_of(task);
    let mut programmed = deps.programmed.clone();
    let ready = programmed.wait_for(|state| {
        needed
            .iter()
            .all(|network| state.networks.contains_key(network))
    });
    tokio::select! {
        () = cancel.cancelled() => return None,
        ready = ready => if ready.is_err() { return None },
    }
    for attempt in 0.. {
        if !pause(attempt, cancel).await {
            return None;
        }
        let (code, error) = match deps.dataplane.ensure_sandbox(&spec).await {
            Ok(sandbox) => return Some(Ok(sandbox)),
            Err(error @ NetworkError::PortTaken { .. }) => ("port-taken", error),
            Err(error @ NetworkError::Invalid(_)) => ("invalid-config", error),
            Err(error @ NetworkError::Kernel { .. }) => ("network-failed", error),
        };
        let hopeless = code != "network-failed" || attempt + 1 >= ATTEMPTS;
        if hopeless && !patient {
            return Some(Err(Failure {
                code,
                text: error.to_string(),
            }));
        }
        tracing::warn!(%error, "making the sandbox again");
    }
    None
}

async fn create(deps: &Deps, task: &Task, sandbox: Option<Sandbox>) -> Result<(), Failure> {
    let sandbox = sandbox.ok_or_else(|| invalid("the sandbox is missing".to_owned()))?;
    let config = container_config(task, &sandbox, &deps.node).map_err(invalid)?;
    match deps.runtime.create(&config).await {
        Ok(()) => Ok(()),
        Err(error) => Err(runtime_failure("create-failed", &error)),
    }
}

/// Returns when the container has ended, however often asking fails.
async fn watch_exit(deps: &Deps, id: &TaskId) -> Event {
    let never = CancellationToken::new();
    for attempt in 0.. {
        pause(attempt, &never).await;
        match deps.runtime.wait(id).await {
            Ok(exit) => return Event::Exited(exit),
            Err(RuntimeError::NotFound(_)) => break,
            Err(error) => tracing::warn!(%error, "cannot watch the container, trying again"),
        }
    }
    // Somebody took the container away behind our back.
    Event::Exited(crate::runtime::Exit {
        code: 137,
        oom_killed: false,
    })
}

async fn health(deps: &Deps, task: &Task, passed: bool) -> Event {
    let id = TaskId::from(&task.id);
    let spec = container_spec(task).ok();
    let image = match spec {
        Some(spec) => deps.runtime.image_health(&spec.image).await,
        None => Ok(None),
    };
    let image = image.unwrap_or_else(|error| {
        tracing::warn!(%error, "the image's own health check is unknown");
        None
    });
    let check = health_check(
        spec.and_then(|spec| spec.healthcheck.as_ref()),
        image.as_ref(),
    );
    let Some(check) = check else {
        if passed {
            std::future::pending::<()>().await;
        }
        return Event::Healthy;
    };
    if passed {
        stay_healthy(deps, &id, &check).await
    } else {
        become_healthy(deps, &id, &check).await
    }
}

/// Checks often, so that a container is in use as soon as it can be; counts a failure only once per
/// interval, so that it has as long to get there as the user said.
async fn become_healthy(deps: &Deps, id: &TaskId, check: &HealthCheck) -> Event {
    let mut counts_from = Instant::now() + check.start_period + check.interval;
    let mut failures = 0;
    loop {
        if probe(deps, id, check).await {
            return Event::Healthy;
        }
        let now = Instant::now();
        if now >= counts_from {
            failures += 1;
            counts_from = now + check.interval;
            if failures >= check.retries {
                return Event::Unhealthy;
            }
        }
        tokio::time::sleep(check.interval.min(START_INTERVAL)).await;
    }
}

async fn stay_healthy(deps: &Deps, id: &TaskId, check: &HealthCheck) -> Event {
    let mut failures = 0;
    loop {
        tokio::time::sleep(check.interval).await;
        if probe(deps, id, check).await {
            failures = 0;
            continue;
        }
        failures += 1;
        if failures >= check.retries {
            return Event::Unhealthy;
        }
    }
}

async fn probe(deps: &Deps, id: &TaskId, check: &HealthCheck) -> bool {
    let run = async {
        let config = ExecConfig {
            command: check.command.clone(),
            ..Default::default()
        };
        let mut session = match deps.runtime.exec(id, config).await {
            Ok(session) => session,
            Err(error) => {
                tracing::debug!(%error, "health check could not be started");
                return false;
            }
        };
        while let Some(output) = session.output.recv().await {
            if let ExecOutput::Exit(code) = output {
                return code == 0;
            }
        }
        false
    };
    // Dropping the session kills a check that takes too long.
    tokio::time::timeout(check.timeout, run)
        .await
        .unwrap_or(false)
}
