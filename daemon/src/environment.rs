//! All that a node stands on: its machine, network, disk, threads, containers and data plane.
//!
//! `main` gives the real ones. With others, the same node lives in a simulation.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use swarm_agent::description::{DescriptionConfig, DescriptionError, HostDescription};
use swarm_agent::network::Dataplane;
use swarm_agent::runtime::Runtime;
use swarm_disk::{Disk, Threads};
use swarm_identity::Net;
use swarm_raft::RaftConfig;

use crate::address::{self, LocalAddress};

/// Changes how a member of the raft group is set: heartbeats, elections, snapshots.
pub type Tune = Arc<dyn Fn(&mut RaftConfig) + Send + Sync>;

/// What a node is made with.
#[derive(Clone)]
pub struct Environment {
    /// The name that others see it under.
    pub hostname: String,
    /// What the node must not lose. Certificate and settings are plain files there,
    /// whatever `disk` is; the agent's store and the raft directory are on `disk`.
    pub data_dir: PathBuf,
    /// Labels of whoever runs it, for constraints `engine.labels.x`.
    pub engine_labels: Vec<(String, String)>,
    /// The machine's addresses and what it says of itself.
    pub host: Arc<dyn Host>,
    /// What connections to other hosts are made on.
    pub net: Arc<dyn Net>,
    /// Where log, snapshots and the agent's store are.
    pub disk: Arc<dyn Disk>,
    /// Where consensus runs and the disk is waited for.
    pub threads: Threads,
    /// What a member of the raft group has other than its defaults.
    pub tune: Tune,
    /// Containers.
    pub runtime: Arc<dyn Runtime>,
    /// Networks.
    pub dataplane: Arc<dyn Dataplane>,
}

/// The machine that a node is on.
#[async_trait::async_trait]
pub trait Host: Send + Sync + 'static {
    /// Its addresses that others may reach it at.
    ///
    /// # Errors
    /// The kernel refuses to list them.
    fn addresses(&self) -> io::Result<Vec<LocalAddress>>;

    /// What the node says of itself, now and whenever it changes.
    ///
    /// # Errors
    /// The machine cannot be asked.
    async fn describe(
        &self,
        config: DescriptionConfig,
        dataplane: Arc<dyn Dataplane>,
    ) -> Result<HostDescription, DescriptionError>;
}

/// The machine that this process runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThisHost;

#[async_trait::async_trait]
impl Host for ThisHost {
    fn addresses(&self) -> io::Result<Vec<LocalAddress>> {
        address::local_addresses()
    }

    async fn describe(
        &self,
        config: DescriptionConfig,
        dataplane: Arc<dyn Dataplane>,
    ) -> Result<HostDescription, DescriptionError> {
        HostDescription::start(config, dataplane).await
    }
}
