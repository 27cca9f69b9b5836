//! The dataplane on the Linux kernel.

use std::collections::BTreeMap;
use std::net::IpAddr;

use swarm_proto::v1::Network;
use swarm_proto::{NetworkId, TaskId};

pub use super::config::DataplaneConfig;
use super::{Dataplane, NetworkError, NetworkView, Sandbox, SandboxSpec};

/// Builds sandboxes and overlay networks over netlink.
#[derive(Debug)]
pub struct KernelDataplane {
    config: DataplaneConfig,
}

impl KernelDataplane {
    /// Call it inside a tokio runtime, as root.
    ///
    /// # Errors
    /// The run directory or a netlink socket cannot be made.
    pub fn new(config: DataplaneConfig) -> Result<Self, NetworkError> {
        Ok(Self { config })
    }

    /// Removes everything that was ever made: sandboxes, networks, the gateway bridge, the
    /// table in the host's namespace, the name server. For `leave`.
    ///
    /// # Errors
    /// The first step that failed; the others are done all the same.
    pub async fn teardown(&self) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }
}

fn unsupported(config: &DataplaneConfig) -> NetworkError {
    NetworkError::Invalid(format!("no dataplane at {}", config.run_dir.display()))
}

#[async_trait::async_trait]
impl Dataplane for KernelDataplane {
    async fn reconcile(&self, _sandboxes: Vec<SandboxSpec>) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn set_underlay(&self, _addr: IpAddr, _port: u16) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn set_network(&self, _view: NetworkView) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn forget_network(&self, _network: &NetworkId) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn ensure_sandbox(&self, _spec: &SandboxSpec) -> Result<Sandbox, NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn remove_sandbox(&self, _task: &TaskId) -> Result<(), NetworkError> {
        Err(unsupported(&self.config))
    }

    async fn held_networks(&self) -> BTreeMap<NetworkId, Network> {
        BTreeMap::new()
    }

    fn gateway_subnet(&self) -> Option<String> {
        None
    }
}
