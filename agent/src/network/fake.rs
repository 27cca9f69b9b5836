//! A data plane that only remembers: the tables it was told and the sandboxes that would be there.
//!
//! Like the kernel's state, its sandboxes outlive the agent; like memory, its tables do not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use swarm_proto::v1::Network;
use swarm_proto::{NetworkId, TaskId};
use tokio::sync::watch;

use super::{Dataplane, NetworkError, NetworkView, Sandbox, SandboxSpec};
use crate::runtime::fake::Fuse;

/// What the fake remembers, and how it is to behave.
#[derive(Clone, Debug, Default)]
pub struct FakeDataplaneState {
    /// "ensure <task>", "remove <task>", in order.
    pub calls: Vec<String>,
    /// Tables as told since the last reconcile.
    pub networks: BTreeMap<NetworkId, NetworkView>,
    /// Sandboxes that would be there.
    pub sandboxes: BTreeMap<TaskId, SandboxSpec>,
    /// Where VXLAN packets leave from.
    pub underlay: Option<(IpAddr, u16)>,
    /// `set_network` of these fails.
    pub broken_networks: BTreeSet<NetworkId>,
    /// `ensure_sandbox` answers that this port is taken.
    pub port_taken: Option<u32>,
    /// Every address that two sandboxes held at once.
    pub conflicts: Vec<String>,
}

/// The fake.
#[derive(Debug, Default)]
pub struct FakeDataplane {
    state: watch::Sender<FakeDataplaneState>,
    fuse: Arc<Fuse>,
}

impl FakeDataplane {
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
    pub fn state(&self) -> FakeDataplaneState {
        self.state.borrow().clone()
    }

    /// Looks at it, where a copy would cost.
    pub fn look<T>(&self, look: impl FnOnce(&FakeDataplaneState) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Changes what it remembers or how it behaves.
    pub fn change(&self, change: impl FnOnce(&mut FakeDataplaneState)) {
        self.state.send_modify(change);
    }

    /// Returns once this is true of it.
    pub async fn wait_for(&self, fact: impl FnMut(&FakeDataplaneState) -> bool) {
        let mut state = self.state.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = state.wait_for(fact).await;
    }

    async fn begin(&self, call: String) {
        self.fuse.point().await;
        self.change(|state| state.calls.push(call));
    }
}

#[async_trait::async_trait]
impl Dataplane for FakeDataplane {
    async fn reconcile(&self, sandboxes: Vec<SandboxSpec>) -> Result<(), NetworkError> {
        self.begin("reconcile".to_owned()).await;
        self.change(|state| {
            state.networks.clear();
            state
                .sandboxes
                .retain(|task, _| sandboxes.iter().any(|spec| spec.task_id == *task));
        });
        Ok(())
    }

    async fn set_underlay(&self, addr: IpAddr, port: u16) -> Result<(), NetworkError> {
        self.change(|state| state.underlay = Some((addr, port)));
        Ok(())
    }

    async fn set_network(&self, view: NetworkView) -> Result<(), NetworkError> {
        let id = NetworkId::from(&view.network.id);
        self.begin(format!("set {id}")).await;
        if self.look(|state| state.broken_networks.contains(&id)) {
            return Err(NetworkError::Kernel {
                step: format!("program network {id}"),
                reason: "broken by the test".to_owned(),
            });
        }
        self.change(|state| {
            state.networks.insert(id, view);
        });
        self.fuse.point().await;
        Ok(())
    }

    async fn forget_network(&self, network: &NetworkId) -> Result<(), NetworkError> {
        self.begin(format!("forget {network}")).await;
        self.change(|state| {
            state.networks.remove(network);
        });
        self.fuse.point().await;
        Ok(())
    }

    async fn ensure_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, NetworkError> {
        self.begin(format!("ensure {}", spec.task_id)).await;
        self.look(|state| {
            if let Some(port) = state.port_taken {
                return Err(NetworkError::PortTaken { port });
            }
            for attachment in &spec.attachments {
                if !state.networks.contains_key(&attachment.network_id) {
                    return Err(NetworkError::Invalid(format!(
                        "network {} was never set",
                        attachment.network_id
                    )));
                }
            }
            Ok(())
        })?;
        self.change(|state| {
            for other in state.sandboxes.values() {
                for attachment in &spec.attachments {
                    if other.task_id != spec.task_id && other.attachments.contains(attachment) {
                        state.conflicts.push(attachment.addr.clone());
                    }
                }
            }
            state.sandboxes.insert(spec.task_id.clone(), spec.clone());
        });
        self.fuse.point().await;
        Ok(Sandbox {
            netns: PathBuf::from(format!("/run/fake/{}", spec.task_id)),
            gateway_addr: Some(IpAddr::from([172, 18, 0, 2])),
            host_ports: spec.host_ports.clone(),
        })
    }

    async fn remove_sandbox(&self, task: &TaskId) -> Result<(), NetworkError> {
        self.begin(format!("remove {task}")).await;
        self.change(|state| {
            state.sandboxes.remove(task);
        });
        self.fuse.point().await;
        Ok(())
    }

    async fn teardown(&self) -> Result<(), NetworkError> {
        self.begin("teardown".to_owned()).await;
        self.change(|state| {
            state.sandboxes.clear();
            state.networks.clear();
        });
        Ok(())
    }

    async fn held_networks(&self) -> BTreeMap<NetworkId, Network> {
        self.look(|state| {
            let mut held = BTreeMap::new();
            for attachment in state.sandboxes.values().flat_map(|spec| &spec.attachments) {
                if let Some(view) = state.networks.get(&attachment.network_id) {
                    held.insert(attachment.network_id.clone(), view.network.clone());
                }
            }
            held
        })
    }

    fn gateway_subnet(&self) -> Option<String> {
        Some("172.18.0.0/16".to_owned())
    }
}
