//! The seam to containers.
//!
//! Small idempotent steps; "already done" is success. Containers outlive the
//! agent: [`Runtime::list`] finds them again after a restart.

mod bundle;
mod cgroup;
mod engine;
mod exec;
mod execshim;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod follow;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod layer;
mod listens;
mod logfile;
mod oci;
mod pull;
mod registry;
mod rootfs;
mod seccomp;
mod shim;
mod store;

pub use oci::{ImageLimits, LogLimits, OciEngine, OciRuntime, RuntimeConfig};
pub use shim::reexec;

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use swarm_proto::TaskId;
use swarm_proto::v1::{ContainerSpec, HealthConfig, Platform, RegistryAuth, ResourceRequirements};

/// Everything needed to make one container. Its ID is the task's.
#[derive(Clone, Debug)]
pub struct ContainerConfig {
    /// The task, and the container's ID.
    pub task_id: TaskId,
    /// "web.1.<task id>"
    pub name: String,
    /// What the user asked for.
    pub spec: ContainerSpec,
    /// Limits (reservations only matter to the scheduler).
    pub resources: ResourceRequirements,
    /// Labels of the cluster: com.docker.swarm.{node.id,service.id,service.name,task.id,task.name}.
    pub labels: Vec<(String, String)>,
    /// Host name inside, if the spec has none: the first 12 characters of the task's ID.
    pub hostname: String,
    /// Namespace file that the container joins.
    pub netns: PathBuf,
    /// Complete contents of /etc/hosts.
    pub etc_hosts: String,
    /// Complete contents of /etc/resolv.conf.
    pub resolv_conf: String,
}

/// A container as found on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The task it belongs to.
    pub task_id: TaskId,
    /// How far it is.
    pub state: ContainerState,
}

/// The life of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// Its first process runs.
    Running {
        /// In the host's PID namespace.
        pid: i32,
    },
    /// It has ended.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal when a signal ended it.
    pub code: i32,
    /// The kernel ended it for its memory limit.
    pub oom_killed: bool,
}

/// What went wrong with a container or an image.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The registry answers that there is no such image. Trying again on this node is useless.
    #[error("no such image: {image}")]
    NoSuchImage {
        /// As the user wrote it.
        image: String,
    },
    /// Pulling failed for another reason; may be tried again.
    #[error("cannot pull {image}: {reason}")]
    Pull {
        /// As the user wrote it.
        image: String,
        /// What the registry or the network said.
        reason: String,
    },
    /// The container's configuration cannot work on this node.
    #[error("{0}")]
    InvalidConfig(String),
    /// There is no such container here.
    #[error("no container for task {0}")]
    NotFound(TaskId),
    /// Anything else, with the step that failed.
    #[error("{step}: {reason}")]
    Failed {
        /// What was tried: "mount overlay".
        step: &'static str,
        /// What happened.
        reason: String,
    },
}

impl RuntimeError {
    /// Whether the task must be rejected: no attempt on this node can succeed.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::NoSuchImage { .. } | Self::InvalidConfig(_))
    }
}

/// One piece of a container's output.
#[derive(Clone, Debug)]
pub struct LogLine {
    /// Standard error instead of standard output.
    pub stderr: bool,
    /// When it was read from the container, nanoseconds since 1970.
    pub time_nanos: i128,
    /// A line with its newline, or a piece of a longer one (at most 16 KiB).
    pub data: Bytes,
}

/// Which lines of a log to read.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogOptions {
    /// Go on with new lines until the container has ended.
    pub follow: bool,
    /// The last lines only.
    pub tail: Option<u64>,
    /// Nothing before this, nanoseconds since 1970.
    pub since_nanos: Option<i128>,
}

/// A stream of log lines.
pub type LogStream = Pin<Box<dyn Stream<Item = Result<LogLine, RuntimeError>> + Send>>;

/// A process to start inside a container.
#[derive(Clone, Debug, Default)]
pub struct ExecConfig {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the container's.
    pub env: Vec<String>,
    /// Other than the container's.
    pub user: String,
    /// Other than the container's.
    pub dir: String,
    /// With a terminal of this size (rows, columns).
    pub tty: Option<(u16, u16)>,
}

/// To a process that runs in a container.
#[derive(Clone, Debug)]
pub enum ExecInput {
    /// Bytes for its standard input.
    Stdin(Bytes),
    /// No more input.
    Close,
    /// New size of its terminal (rows, columns).
    Resize(u16, u16),
}

/// From a process that runs in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecOutput {
    /// From its standard output (or its terminal).
    Stdout(Bytes),
    /// From its standard error.
    Stderr(Bytes),
    /// It has ended; nothing follows.
    Exit(i32),
}

/// A process that runs in a container. Dropping it kills the process.
pub struct ExecSession {
    /// Bounded.
    pub input: tokio::sync::mpsc::Sender<ExecInput>,
    /// Bounded.
    pub output: tokio::sync::mpsc::Receiver<ExecOutput>,
}

/// Makes and runs containers.
#[async_trait::async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// What the registry says `image` is now: the reference with its digest ("host/name:tag@sha256:…")
    /// and the platforms it is made for.
    async fn resolve(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError>;

    /// Makes the image present on this node. Returns its config digest.
    async fn pull(&self, image: &str, auth: Option<&RegistryAuth>) -> Result<String, RuntimeError>;

    /// The health check that a present image comes with; none unless the implementation reads images.
    async fn image_health(&self, image: &str) -> Result<Option<HealthConfig>, RuntimeError> {
        let _ = image;
        Ok(None)
    }

    /// Makes the container, ready to start. The image is present.
    async fn create(&self, config: &ContainerConfig) -> Result<(), RuntimeError>;

    /// Starts it. Returns the PID of its first process.
    async fn start(&self, task: &TaskId) -> Result<i32, RuntimeError>;

    /// Returns when it has ended (at once if it has).
    async fn wait(&self, task: &TaskId) -> Result<Exit, RuntimeError>;

    /// Sends the stop signal (the spec's, the image's, or SIGTERM) once the container can hear it, and SIGKILL
    /// when `grace` has passed since the call.
    /// Returns when the container has ended.
    async fn stop(&self, task: &TaskId, grace: Duration) -> Result<Exit, RuntimeError>;

    /// Removes an ended or never started container with its files and cgroup; kills it if it runs.
    async fn remove(&self, task: &TaskId) -> Result<(), RuntimeError>;

    /// All containers of this runtime on this node.
    async fn list(&self) -> Result<Vec<Container>, RuntimeError>;

    /// Starts a process inside a running container.
    async fn exec(&self, task: &TaskId, config: ExecConfig) -> Result<ExecSession, RuntimeError>;

    /// The container's output; works after its end until it is removed.
    async fn logs(&self, task: &TaskId, options: LogOptions) -> Result<LogStream, RuntimeError>;

    /// Drops images that no container uses, `keep` does not name and that were not used for a
    /// while, and unfinished downloads. Returns when the next image has been unused for so long.
    async fn collect_garbage(&self, keep: &[String]) -> Result<Option<Duration>, RuntimeError>;
}
