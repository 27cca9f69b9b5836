//! The seam to the kernel's networking.
//!
//! A sandbox is the network namespace of one task. Overlay networks exist in
//! the kernel exactly while a sandbox is attached to them. The dataplane is
//! told what the tables say ([`Dataplane::set_network`]) and makes the kernel
//! agree; it validates before it touches anything, undoes what it began when a
//! step fails, and treats "already there" and "already gone" as success.

pub mod config;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gateway;
pub mod kernel;
mod lb;
pub mod names;
mod netlink;
mod netns;
mod nft;
mod overlay;
mod route;
mod sandbox;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use swarm_proto::v1::{EndpointEntry, Network, PortConfig, ServiceEntry};
use swarm_proto::{NetworkId, ServiceId, TaskId};

/// Everything the dataplane must know of one network: the newest assignments' view.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkView {
    /// The network itself.
    pub network: Network,
    /// The endpoint table.
    pub endpoints: imbl::OrdMap<TaskId, Arc<EndpointEntry>>,
    /// The services with an endpoint on it.
    pub services: imbl::OrdMap<ServiceId, Arc<ServiceEntry>>,
}

/// One task's sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxSpec {
    /// Whose it is.
    pub task_id: TaskId,
    /// "web.1.<task id>", for names.
    pub name: String,
    /// In order: the first becomes eth0. Each network must have been given by `set_network`.
    pub attachments: Vec<SandboxAttachment>,
    /// Ports published on this host (mode=host).
    pub host_ports: Vec<PortConfig>,
    /// Name servers that other names are forwarded to; empty = the host's.
    pub nameservers: Vec<IpAddr>,
}

/// One network of a sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxAttachment {
    /// The network.
    pub network_id: NetworkId,
    /// The task's address on it, with prefix length.
    pub addr: String,
}

/// A sandbox that is ready for its container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Namespace file.
    pub netns: PathBuf,
    /// The address on the gateway bridge; `None` if all networks are internal.
    pub gateway_addr: Option<IpAddr>,
    /// Host ports as bound (dynamic ones filled in).
    pub host_ports: Vec<PortConfig>,
}

/// What went wrong in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A published port is in use on this host.
    #[error("port {port} is already in use on this node")]
    PortTaken {
        /// Host port.
        port: u32,
    },
    /// A table or spec that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A kernel call failed.
    #[error("{step}: {reason}")]
    Kernel {
        /// What was tried, on what: "create vxlan link of network 3k2…".
        step: String,
        /// What the kernel said.
        reason: String,
    },
}

/// Makes the kernel agree with the tables.
#[async_trait::async_trait]
pub trait Dataplane: Send + Sync + 'static {
    /// Adopts what an earlier process left in the kernel for these tasks, and removes everything else of ours.
    /// Called once, before all else. Interrupts no packet of an adopted sandbox.
    async fn reconcile(&self, sandboxes: Vec<SandboxSpec>) -> Result<(), NetworkError>;

    /// The address that VXLAN packets leave from, and the port; before the first `ensure_sandbox`.
    async fn set_underlay(&self, addr: IpAddr, port: u16) -> Result<(), NetworkError>;

    /// The newest tables of a network. Returns when every namespace concerned has them.
    async fn set_network(&self, view: NetworkView) -> Result<(), NetworkError>;

    /// The network is no longer assigned; its last sandbox is gone or about to go.
    async fn forget_network(&self, network: &NetworkId) -> Result<(), NetworkError>;

    /// Makes the task's namespace with all its endpoints, names and balancing, and the networks it needs.
    async fn ensure_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, NetworkError>;

    /// Removes it, and each network that it was the last one on.
    async fn remove_sandbox(&self, task: &TaskId) -> Result<(), NetworkError>;

    /// Removes every trace of ours, the gateway bridge too: the node leaves its swarm, and no task is left.
    async fn teardown(&self) -> Result<(), NetworkError>;

    /// For `network ls` on a worker: the gateway bridge, and the networks that exist in the kernel now.
    async fn held_networks(&self) -> BTreeMap<NetworkId, Network>;

    /// CIDR of the gateway bridge, once it is there.
    fn gateway_subnet(&self) -> Option<String>;
}
