//! A runtime that only remembers: what was asked of it, and the containers that would be there.
//!
//! It outlives the agent that uses it, as containers do. [`Fuse`] stops all calls at a chosen
//! point, as `kill -9` would.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use swarm_proto::TaskId;
use swarm_proto::v1::{HealthConfig, Platform, RegistryAuth};
use tokio::sync::{mpsc, watch};

use super::{
    Container, ContainerConfig, ContainerState, ExecConfig, ExecOutput, ExecSession, Exit, LogLine,
    LogOptions, LogStream, Runtime, RuntimeError,
};

/// Counts points passed by the fakes; once it has burnt down, every call hangs for ever.
#[derive(Debug)]
pub struct Fuse {
    left: watch::Sender<Option<u32>>,
}

impl Default for Fuse {
    fn default() -> Self {
        Self {
            left: watch::Sender::new(None),
        }
    }
}

impl Fuse {
    /// Lets this many more points pass.
    pub fn arm(&self, points: u32) {
        self.left.send_replace(Some(points));
    }

    /// Lets everything pass again (calls that hang stay hung).
    pub fn disarm(&self) {
        self.left.send_replace(None);
    }

    /// Returns when it has burnt down.
    pub async fn burnt(&self) {
        let mut left = self.left.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = left.wait_for(|left| *left == Some(0)).await;
    }

    /// A point in a call, before or after its effect.
    pub async fn point(&self) {
        let mut burnt = false;
        self.left.send_if_modified(|left| match left {
            Some(0) => {
                burnt = true;
                false
            }
            Some(points) => {
                *points -= 1;
                burnt = *points == 0;
                true
            }
            None => false,
        });
        if burnt {
            std::future::pending::<()>().await;
        }
    }
}

/// A container that would be there.
#[derive(Clone, Debug)]
pub struct FakeContainer {
    /// As it was asked for.
    pub config: ContainerConfig,
    /// How far it is.
    pub state: ContainerState,
}

/// What the fake remembers, and how it is to behave.
#[derive(Clone, Debug, Default)]
pub struct FakeRuntimeState {
    /// "pull nginx", "start <task>", in order.
    pub calls: Vec<String>,
    /// By task.
    pub containers: BTreeMap<TaskId, FakeContainer>,
    /// How often each task was started.
    pub starts: BTreeMap<TaskId, u32>,
    /// Images on the node.
    pub images: BTreeSet<String>,
    /// Pulling one of these answers that there is no such image.
    pub missing_images: BTreeSet<String>,
    /// Pulling fails with this.
    pub pull_error: Option<String>,
    /// Stopping never returns and ends nothing.
    pub stubborn: bool,
    /// Exit code of every exec.
    pub exec_exit: i32,
    /// The health check that every image has.
    pub health: Option<HealthConfig>,
    /// Exit at once with this code when started.
    pub exit_at_once: Option<i32>,
    /// So many of the next such calls panic before their effect, by call: "create a".
    pub panics: BTreeMap<String, u32>,
}

/// The fake.
#[derive(Debug, Default)]
pub struct FakeRuntime {
    state: watch::Sender<FakeRuntimeState>,
    /// Stops the world.
    pub fuse: Arc<Fuse>,
}

impl FakeRuntime {
    /// A fake that shares its fuse with others.
    #[must_use]
    pub fn new(fuse: Arc<Fuse>) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::default(),
            fuse,
        })
    }

    /// What it remembers now.
    #[must_use]
    pub fn state(&self) -> FakeRuntimeState {
        self.state.borrow().clone()
    }

    /// Looks at it, where a copy would cost.
    pub fn look<T>(&self, look: impl FnOnce(&FakeRuntimeState) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Changes what it remembers or how it behaves.
    pub fn change(&self, change: impl FnOnce(&mut FakeRuntimeState)) {
        self.state.send_modify(change);
    }

    /// Returns once this is true of it.
    pub async fn wait_for(&self, fact: impl FnMut(&FakeRuntimeState) -> bool) {
        let mut state = self.state.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = state.wait_for(fact).await;
    }

    /// The container's process ends by itself.
    pub fn exit(&self, task: &TaskId, code: i32) {
        self.change(|state| {
            if let Some(container) = state.containers.get_mut(task) {
                container.state = exited(code);
            }
        });
    }

    async fn begin(&self, call: String) {
        self.fuse.point().await;
        let mut panics = false;
        self.change(|state| {
            if let Some(left) = state.panics.get_mut(&call)
                && *left > 0
            {
                *left -= 1;
                panics = true;
            }
            state.calls.push(call);
        });
        assert!(!panics, "a bug, on purpose");
    }

    async fn end(&self) {
        self.fuse.point().await;
    }
}

fn exited(code: i32) -> ContainerState {
    ContainerState::Exited(Exit {
        code,
        oom_killed: false,
    })
}

#[async_trait::async_trait]
impl Runtime for FakeRuntime {
    async fn resolve(
        &self,
        image: &str,
        _auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        self.begin(format!("resolve {image}")).await;
        let image = image.to_owned();
        if self.state.borrow().missing_images.contains(&image) {
            return Err(RuntimeError::NoSuchImage { image });
        }
        Ok((image, Vec::new()))
    }

    async fn pull(
        &self,
        image: &str,
        _auth: Option<&RegistryAuth>,
    ) -> Result<String, RuntimeError> {
        self.begin(format!("pull {image}")).await;
        let image = image.to_owned();
        if self.look(|state| state.missing_images.contains(&image)) {
            return Err(RuntimeError::NoSuchImage { image });
        }
        if let Some(reason) = self.look(|state| state.pull_error.clone()) {
            return Err(RuntimeError::Pull { image, reason });
        }
        self.change(|state| {
            state.images.insert(image.clone());
        });
        self.end().await;
        Ok(format!("sha256:{image}"))
    }

    async fn image_health(&self, _image: &str) -> Result<Option<HealthConfig>, RuntimeError> {
        Ok(self.look(|state| state.health.clone()))
    }

    async fn create(&self, config: &ContainerConfig) -> Result<(), RuntimeError> {
        self.begin(format!("create {}", config.task_id)).await;
        if !self.look(|state| state.images.contains(&config.spec.image)) {
            return Err(RuntimeError::NoSuchImage {
                image: config.spec.image.clone(),
            });
        }
        self.change(|state| {
            let container = FakeContainer {
                config: config.clone(),
                state: ContainerState::Created,
            };
            state
                .containers
                .entry(config.task_id.clone())
                .or_insert(container);
        });
        self.end().await;
        Ok(())
    }

    async fn start(&self, task: &TaskId) -> Result<i32, RuntimeError> {
        self.begin(format!("start {task}")).await;
        let mut result = Err(RuntimeError::NotFound(task.clone()));
        self.change(|state| {
            let exit = state.exit_at_once;
            if let Some(container) = state.containers.get_mut(task) {
                container.state = exit.map_or(ContainerState::Running { pid: 42 }, exited);
                *state.starts.entry(task.clone()).or_default() += 1;
                result = Ok(42);
            }
        });
        self.end().await;
        result
    }

    async fn wait(&self, task: &TaskId) -> Result<Exit, RuntimeError> {
        let mut found = Err(RuntimeError::NotFound(task.clone()));
        self.wait_for(|state| match state.containers.get(task) {
            None => true,
            Some(container) => match &container.state {
                ContainerState::Exited(exit) => {
                    found = Ok(*exit);
                    true
                }
                _ => false,
            },
        })
        .await;
        found
    }

    async fn stop(&self, task: &TaskId, _grace: Duration) -> Result<Exit, RuntimeError> {
        self.begin(format!("stop {task}")).await;
        if self.look(|state| state.stubborn) {
            std::future::pending::<()>().await;
        }
        self.change(|state| {
            if let Some(container) = state.containers.get_mut(task)
                && !matches!(container.state, ContainerState::Exited(_))
            {
                container.state = exited(143);
            }
        });
        self.end().await;
        self.wait(task).await
    }

    async fn remove(&self, task: &TaskId) -> Result<(), RuntimeError> {
        self.begin(format!("remove {task}")).await;
        self.change(|state| {
            state.containers.remove(task);
        });
        self.end().await;
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Container>, RuntimeError> {
        self.begin("list".to_owned()).await;
        Ok(self.look(|state| {
            let containers = state.containers.iter();
            containers
                .map(|(task_id, container)| Container {
                    task_id: task_id.clone(),
                    state: container.state.clone(),
                })
                .collect()
        }))
    }

    async fn exec(&self, task: &TaskId, config: ExecConfig) -> Result<ExecSession, RuntimeError> {
        self.begin(format!("exec {task} {}", config.command.join(" ")))
            .await;
        let (input, mut commands) = mpsc::channel(4);
        let (answers, output) = mpsc::channel(4);
        let code = self.look(|state| state.exec_exit);
        let echo = Bytes::from(config.command.join(" "));
        // Ends by itself: at the latest when both ends are dropped.
        tokio::spawn(async move {
            let _ = answers.send(ExecOutput::Stdout(echo)).await;
            let _ = answers.send(ExecOutput::Exit(code)).await;
            while commands.recv().await.is_some() {}
        });
        Ok(ExecSession { input, output })
    }

    async fn logs(&self, task: &TaskId, _options: LogOptions) -> Result<LogStream, RuntimeError> {
        if !self.look(|state| state.containers.contains_key(task)) {
            return Err(RuntimeError::NotFound(task.clone()));
        }
        let line = LogLine {
            stderr: false,
            time_nanos: 1,
            data: Bytes::from(format!("log of {task}\n")),
        };
        Ok(Box::pin(futures::stream::iter([Ok(line)])))
    }

    async fn collect_garbage(&self, keep: &[String]) -> Result<Option<Duration>, RuntimeError> {
        self.begin(format!("collect garbage, keep {}", keep.join(",")))
            .await;
        self.change(|state| {
            let used: BTreeSet<String> = state
                .containers
                .values()
                .map(|container| container.config.spec.image.clone())
                .collect();
            state
                .images
                .retain(|image| keep.contains(image) || used.contains(image));
        });
        Ok(None)
    }
}
