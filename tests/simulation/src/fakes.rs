//! The product's recording fakes, with the time that real work takes, and an eye on what is started.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use swarm_agent::runtime::fake::FakeRuntime;
use swarm_agent::runtime::{
    Container, ContainerConfig, ExecConfig, ExecSession, Exit, LogOptions, LogStream, Runtime,
    RuntimeError,
};
use swarm_proto::TaskId;
use swarm_proto::v1::{Platform, RegistryAuth};

use crate::check;
use crate::dice::Dice;
use crate::world::{self, HostId, MILLI};

/// Containers of one host.
pub struct SimRuntime {
    host: HostId,
    inner: Arc<FakeRuntime>,
    dice: Mutex<Dice>,
}

impl SimRuntime {
    /// For the host.
    pub fn shared(seed: u64, host: HostId, inner: Arc<FakeRuntime>) -> Arc<dyn Runtime> {
        let boot = world::with(|world| world.hosts[host].boot);
        Arc::new(Self {
            host,
            inner,
            dice: Mutex::new(Dice::new(seed, &format!("runtime {host} {boot}"))),
        })
    }

    async fn takes(&self, millis: u64) {
        // Nobody reads it, and it would grow for ever.
        self.inner.change(|state| state.calls.clear());
        let nanos = self.dice.lock().around(millis * MILLI);
        world::sleep(nanos).await;
    }
}

#[async_trait::async_trait]
impl Runtime for SimRuntime {
    async fn pull(&self, image: &str, auth: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        self.takes(40).await;
        self.inner.pull(image, auth).await
    }

    async fn resolve(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        self.inner.resolve(image, auth).await
    }

    async fn create(&self, config: &ContainerConfig) -> Result<(), RuntimeError> {
        self.takes(15).await;
        self.inner.create(config).await
    }

    async fn start(&self, task: &TaskId) -> Result<i32, RuntimeError> {
        self.takes(10).await;
        check::started(self.host, task);
        let pid = self.inner.start(task).await;
        self.takes(5).await;
        pid
    }

    async fn wait(&self, task: &TaskId) -> Result<Exit, RuntimeError> {
        self.inner.wait(task).await
    }

    async fn stop(&self, task: &TaskId, grace: Duration) -> Result<Exit, RuntimeError> {
        self.takes(60).await;
        self.inner.stop(task, grace).await
    }

    async fn remove(&self, task: &TaskId) -> Result<(), RuntimeError> {
        self.takes(10).await;
        self.inner.remove(task).await
    }

    async fn list(&self) -> Result<Vec<Container>, RuntimeError> {
        self.inner.list().await
    }

    async fn exec(&self, task: &TaskId, config: ExecConfig) -> Result<ExecSession, RuntimeError> {
        self.inner.exec(task, config).await
    }

    async fn logs(&self, task: &TaskId, options: LogOptions) -> Result<LogStream, RuntimeError> {
        self.inner.logs(task, options).await
    }

    async fn collect_garbage(&self, keep: &[String]) -> Result<Option<Duration>, RuntimeError> {
        self.inner.collect_garbage(keep).await
    }
}
