//! The life of this node: in no swarm, or a member of one, and the ways between.
//!
//! One owner of what runs: [`Node`]. `init`, `join`, `leave` and the shutdown take one
//! lock, so that only one of them happens at a time. What is half-made when a
//! step fails is removed again.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use swarm_agent::agent::{Agent, AgentError};
use swarm_agent::runtime::{ExecConfig, ExecSession, LogOptions, LogStream, RuntimeError};
use swarm_disk::Disk;
use swarm_identity::{
    DataKey, Identity, JoinToken, KeyStore, Stored, fetch_root, request_certificate,
};
use swarm_manager::ca::initial_transaction;
use swarm_manager::clock::system_clock;
use swarm_proto::NodeId;
use swarm_proto::v1::{
    InfoResponse, InitRequest, InitResponse, JoinClusterRequest, JoinClusterResponse,
    LeaveClusterResponse, LocalNetwork, LocalState, NodeAvailability, NodeRole, Platform,
    RegistryAuth,
};
use swarm_raft::RaftNode;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, mpsc};
use tonic::Status;

use crate::address;
use crate::environment::Environment;
use crate::found;
use crate::local::runtime_status;
use crate::manager::{Beginning, ManagerContext, RunningManager};
use crate::member::{Member, MemberConfig};
use crate::settings::Settings;
use crate::switch::{ManagerSlot, NOT_IN_A_SWARM};

/// Name of the bridge that gives containers their way out.
const GATEWAY: &str = "swarm_gwbridge";
const ALREADY: &str = "This node is already part of a swarm. Use \"swarm leave\" to leave this swarm and join another one.";
const OUTSIDE: &str = "This node is not part of a swarm";
const LEAVING_LAST: &str = "You are attempting to leave the swarm on a node that is participating as a manager. Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message.";
const LEAVING_MANAGER: &str = "You are attempting to leave the swarm on a node that is participating as a manager. Demote it first with \"swarm node demote\" on another manager. Use `--force` to leave all the same.";

/// The node's state, held by whoever changes it.
pub struct Held(OwnedRwLockWriteGuard<Option<Member>>);

/// What this process is.
pub struct Node {
    on: Environment,
    slot: ManagerSlot,
    /// Why the process must end: said to `main`.
    fatal: mpsc::Sender<String>,
    member: Arc<RwLock<Option<Member>>>,
}

impl Node {
    /// A node that is in no swarm yet, as far as it knows.
    #[must_use]
    pub fn new(
        environment: Environment,
        slot: ManagerSlot,
        fatal: mpsc::Sender<String>,
    ) -> Arc<Self> {
        slot.close(NOT_IN_A_SWARM);
        Arc::new(Self {
            on: environment,
            slot,
            fatal,
            member: Arc::default(),
        })
    }

    /// Keeps everybody from being told that the node is in no swarm, before [`Node::resume`] knows.
    pub async fn hold(&self) -> Held {
        Held(Arc::clone(&self.member).write_owned().await)
    }

    /// Goes on where an earlier process has stopped.
    ///
    /// # Errors
    /// What is on disk cannot be used; the error names the file.
    pub async fn resume(&self, held: Held) -> anyhow::Result<()> {
        let Held(mut member) = held;
        let resumed = self.resume_in(&mut member).await;
        if resumed.is_err() {
            // The process ends. Until it has, nobody may be told that this node is in no swarm,
            // nor make another one here: the lock is never given back.
            std::mem::forget(member);
        }
        resumed
    }

    async fn resume_in(&self, member: &mut Option<Member>) -> anyhow::Result<()> {
        let stored = self.key_store().load()?;
        let settings = Settings::load(&self.on.data_dir)?;
        let (Some(stored), Some(settings)) = (stored, settings) else {
            // A crash between the two steps of a join leaves one of them: it was not acknowledged.
            self.forget()?;
            return Ok(());
        };
        let identity = Identity::on(stored.material, Arc::clone(&self.on.net))?;
        // A manager that has to join first (a crash cut that short, or the group has taken it out)
        // does so while the node runs: it may be that it is to be a worker.
        let goes_on = identity.role() == NodeRole::Manager
            && RaftNode::exists(&*self.on.disk, &self.raft_dir());
        let beginning = goes_on.then_some(Beginning::Resume);
        *member = Some(
            self.start(identity, stored.data_key, settings, beginning)
                .await?,
        );
        Ok(())
    }

    /// Makes a new swarm with this node as its manager.
    ///
    /// # Errors
    /// It is in one already, or a value is no good: nothing is changed.
    pub async fn init(&self, request: InitRequest) -> Result<InitResponse, Status> {
        let mut member = self.member.write().await;
        if member.is_some() {
            return Err(Status::failed_precondition(ALREADY));
        }
        let settings = self.settings(
            &request.advertise_addr,
            &request.listen_addr,
            &request.data_path_addr,
            Vec::new(),
        )?;
        let params = found::params(
            &request,
            &self.on.hostname,
            settings.advertise_addr.to_string(),
        )
        .map_err(Status::invalid_argument)?;
        let new = initial_transaction(&params, system_clock()())
            .map_err(|error| internal(&error.into()))?;
        let data_key = DataKey::random();
        let identity = Identity::on(new.material.clone(), Arc::clone(&self.on.net))
            .map_err(|error| internal(&error.into()))?;
        let answer = InitResponse {
            node_id: identity.node_id().to_string(),
            tokens: Some(new.tokens),
            advertise_addr: settings.advertise_addr.to_string(),
        };
        let stored = Stored {
            material: new.material,
            data_key: data_key.clone(),
        };
        let begin = Beginning::Bootstrap(Box::new(new.transaction));
        *member = Some(
            self.enter(identity, stored, settings, Some(begin))
                .await
                .map_err(|error| internal(&error))?,
        );
        Ok(answer)
    }

    /// Makes this node part of a swarm.
    ///
    /// # Errors
    /// It is in one already, a value is no good, or the swarm refuses: nothing is changed.
    pub async fn join(&self, request: JoinClusterRequest) -> Result<JoinClusterResponse, Status> {
        let mut member = self.member.write().await;
        if member.is_some() {
            return Err(Status::failed_precondition(ALREADY));
        }
        let token: JoinToken = request
            .token
            .parse()
            .map_err(|error| Status::invalid_argument(format!("{error}")))?;
        if request.remotes.is_empty() {
            return Err(Status::invalid_argument(
                "at least one manager (host:port) to join is needed",
            ));
        }
        let remotes: Vec<String> = request.remotes.iter().map(|r| with_port(r)).collect();
        let mut settings = self.settings(
            &request.advertise_addr,
            &request.listen_addr,
            &request.data_path_addr,
            remotes.clone(),
        )?;
        let material = self
            .certificate(&remotes, &token, request.availability())
            .await?;
        let identity = Identity::on(material.clone(), Arc::clone(&self.on.net))
            .map_err(|error| internal(&error.into()))?;
        settings.remotes = remotes.clone();
        let role = identity.role();
        let stored = Stored {
            material,
            data_key: DataKey::random(),
        };
        let begin = (role == NodeRole::Manager).then_some(Beginning::Join(remotes));
        let node_id = identity.node_id().to_string();
        *member = Some(
            self.enter(identity, stored, settings, begin)
                .await
                .map_err(|error| internal(&error))?,
        );
        Ok(JoinClusterResponse {
            node_id,
            role: role.into(),
        })
    }

    async fn certificate(
        &self,
        remotes: &[String],
        token: &JoinToken,
        availability: NodeAvailability,
    ) -> Result<swarm_identity::KeyMaterial, Status> {
        let net = Arc::clone(&self.on.net);
        let mut last = None;
        for remote in remotes {
            let got = async {
                let root = fetch_root(&net, remote, token).await?;
                request_certificate(&net, remote, &root, token, availability, &self.on.hostname)
                    .await
            };
            match got.await {
                Ok(material) => return Ok(material),
                Err(error) if error.retryable() => last = Some(error),
                Err(error) => return Err(Status::failed_precondition(chain(&error))),
            }
        }
        Err(Status::unavailable(last.map_or_else(
            || "no manager to join".to_owned(),
            |error| chain(&error),
        )))
    }

    /// Saves who this node is, then starts what it does; undoes both when it cannot.
    async fn enter(
        &self,
        identity: Arc<Identity>,
        stored: Stored,
        settings: Settings,
        beginning: Option<Beginning>,
    ) -> anyhow::Result<Member> {
        let made = async {
            std::fs::create_dir_all(&self.on.data_dir)
                .with_context(|| format!("making {}", self.on.data_dir.display()))?;
            self.key_store().save(&stored)?;
            settings.save(&self.on.data_dir)?;
            self.start(identity, stored.data_key.clone(), settings, beginning)
                .await
        };
        match made.await {
            Ok(member) => Ok(member),
            Err(error) => {
                self.slot.close(NOT_IN_A_SWARM);
                self.forget()
                    .with_context(|| format!("undoing after: {error:#}"))?;
                Err(error)
            }
        }
    }

    async fn start(
        &self,
        identity: Arc<Identity>,
        data_key: DataKey,
        settings: Settings,
        beginning: Option<Beginning>,
    ) -> anyhow::Result<Member> {
        let context = ManagerContext {
            identity,
            data_key,
            raft_dir: self.raft_dir(),
            disk: Arc::clone(&self.on.disk),
            threads: self.on.threads,
            tune: Arc::clone(&self.on.tune),
            advertise_addr: settings.advertise_addr,
            listen_addr: settings.listen_addr,
            slot: self.slot.clone(),
            fatal: self.fatal.clone(),
        };
        let config = MemberConfig {
            context,
            settings,
            key_store: self.key_store(),
            data_dir: self.on.data_dir.clone(),
            hostname: self.on.hostname.clone(),
            engine_labels: self.on.engine_labels.clone(),
            host: Arc::clone(&self.on.host),
            runtime: Arc::clone(&self.on.runtime),
            dataplane: Arc::clone(&self.on.dataplane),
        };
        Member::start(config, beginning).await
    }

    /// Takes this node out of its swarm: its tasks end, its networks and identity are removed.
    ///
    /// # Errors
    /// It is in none, or is a manager and `force` is not given.
    pub async fn leave(&self, force: bool) -> Result<LeaveClusterResponse, Status> {
        let mut slot = self.member.write().await;
        let Some(member) = slot.as_mut() else {
            return Err(outside());
        };
        if !force && let Some(managers) = member.with_manager(RunningManager::voters) {
            return Err(Status::failed_precondition(if managers <= 1 {
                LEAVING_LAST
            } else {
                LEAVING_MANAGER
            }));
        }
        member.leave().await;
        if let Some(member) = slot.take() {
            member.stop().await;
        }
        self.slot.close(NOT_IN_A_SWARM);
        self.on
            .dataplane
            .teardown()
            .await
            .map_err(|error| internal(&error.into()))?;
        self.forget().map_err(|error| internal(&error))?;
        Ok(LeaveClusterResponse {})
    }

    /// Stops; containers, connections and names go on.
    pub async fn stop(&self) {
        if let Some(member) = self.member.write().await.take() {
            member.stop().await;
        }
    }

    /// Looks at what this node is as a member of its swarm, unless it is in none, or is just
    /// entering or leaving one.
    pub fn look<T>(&self, look: impl FnOnce(&Member) -> T) -> Option<T> {
        self.member.try_read().ok()?.as_ref().map(look)
    }

    /// What `swarm info` shows.
    pub fn info(&self) -> InfoResponse {
        let mut info = InfoResponse {
            state: LocalState::Inactive.into(),
            hostname: self.on.hostname.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        // Whoever joins or leaves holds the lock until it is done: that is what is to be said then.
        let Ok(member) = self.member.try_read() else {
            info.set_state(LocalState::Pending);
            return info;
        };
        let Some(member) = &*member else {
            return info;
        };
        info.set_state(LocalState::Active);
        info.node_id = member.identity.node_id().to_string();
        info.cluster_id = member.identity.cluster_id().to_string();
        info.set_role(member.identity.role());
        info.advertise_addr = member.settings.advertise_addr.to_string();
        info.data_path_addr = member.settings.data_path_addr.to_string();
        info.managers = member.managers();
        info.containers_running =
            u32::try_from(member.agent.containers_running()).unwrap_or(u32::MAX);
        info.certificate_expires = Some(member.identity.validity().not_after.into());
        info.control_available = self.slot.is_open();
        if let Some((nodes, managers)) = member.with_manager(RunningManager::counts) {
            info.node_count = nodes;
            info.manager_count = managers;
        }
        info
    }

    /// The gateway bridge, and the overlay networks that a task of this node is on.
    pub async fn local_networks(&self) -> Vec<LocalNetwork> {
        let Some(member) = &*self.member.read().await else {
            return Vec::new();
        };
        local_networks(&member.agent, &member.identity.node_id()).await
    }

    /// What the registry says of an image now.
    ///
    /// # Errors
    /// There is no such image, or no such registry.
    pub async fn resolve_image(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        self.on.runtime.resolve(image, auth).await
    }

    /// Starts a process in the container of a task of this node.
    ///
    /// # Errors
    /// There is no such task here, or the process cannot be started.
    pub async fn exec(&self, task: &str, config: ExecConfig) -> Result<ExecSession, Status> {
        let member = self.member.read().await;
        let agent = &member.as_ref().ok_or_else(outside)?.agent;
        agent
            .exec(task, config)
            .await
            .map_err(|error| agent_status(&error))
    }

    /// The output of a task of this node.
    ///
    /// # Errors
    /// There is no such task here.
    pub async fn logs(&self, task: &str, options: LogOptions) -> Result<LogStream, Status> {
        let member = self.member.read().await;
        let agent = &member.as_ref().ok_or_else(outside)?.agent;
        agent
            .logs(task, options)
            .await
            .map_err(|error| agent_status(&error))
    }

    fn key_store(&self) -> KeyStore {
        KeyStore::new(self.on.data_dir.join("certificates"))
    }

    /// The addresses of this node, from what the user wrote.
    fn settings(
        &self,
        advertise: &str,
        listen: &str,
        data_path: &str,
        remotes: Vec<String>,
    ) -> Result<Settings, Status> {
        let local = self.on.host.addresses().map_err(|error| {
            Status::internal(format!("listing the addresses of this machine: {error}"))
        })?;
        let invalid = |error: address::AddressError| Status::invalid_argument(error.to_string());
        let advertise = address::advertise(advertise, &local).map_err(invalid)?;
        let listen = address::listen(listen, &local).map_err(invalid)?;
        let data_path = if data_path.is_empty() {
            advertise.ip()
        } else {
            address::advertise(data_path, &local).map_err(invalid)?.ip()
        };
        if !local.iter().any(|address| address.addr == data_path) && !data_path.is_loopback() {
            return Err(Status::invalid_argument(format!(
                "the data path address must be one of this machine's, and {data_path} is not - specify one with --data-path-addr"
            )));
        }
        Ok(Settings::new(advertise, listen, data_path, remotes))
    }

    fn raft_dir(&self) -> PathBuf {
        self.on.data_dir.join("raft")
    }

    fn agent_dir(&self) -> PathBuf {
        self.on.data_dir.join("agent")
    }

    /// Removes everything that makes this node part of a swarm. Images stay.
    fn forget(&self) -> anyhow::Result<()> {
        // The settings first: without them nothing is resumed.
        Settings::remove(&self.on.data_dir)?;
        self.key_store().wipe()?;
        for dir in [self.agent_dir(), self.raft_dir()] {
            remove_dir(&*self.on.disk, &dir)?;
        }
        Ok(())
    }
}

/// Removes a directory with what is in it; one that is not there is fine.
pub fn remove_dir(disk: &dyn Disk, dir: &std::path::Path) -> anyhow::Result<()> {
    match disk.remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// "host" gets the port of the managers' API.
fn with_port(remote: &str) -> String {
    if remote.parse::<std::net::SocketAddr>().is_ok() {
        return remote.to_owned();
    }
    match remote.parse::<std::net::IpAddr>() {
        Ok(addr) => std::net::SocketAddr::new(addr, swarm_proto::defaults::API_PORT).to_string(),
        Err(_) if remote.contains(':') => remote.to_owned(),
        Err(_) => format!("{remote}:{}", swarm_proto::defaults::API_PORT),
    }
}

/// The gateway bridge with its own ID, then the overlay networks that exist here now. The bridge is the
/// node's before the first task needs it; only then it gets a subnet, one that no network has.
async fn local_networks(agent: &Agent, node: &NodeId) -> Vec<LocalNetwork> {
    let mut networks = vec![LocalNetwork {
        id: gateway_id(node),
        name: GATEWAY.to_owned(),
        driver: "bridge".to_owned(),
        scope: "local".to_owned(),
        subnets: agent.gateway_subnet().into_iter().collect(),
        ..LocalNetwork::default()
    }];
    for network in agent.held_networks().await.into_values() {
        let spec = network.spec.clone().unwrap_or_default();
        let pools = network
            .subnets
            .iter()
            .filter_map(|subnet| subnet.pool.as_ref());
        networks.push(LocalNetwork {
            id: network.id.clone(),
            name: spec.annotations.unwrap_or_default().name,
            driver: spec.driver,
            scope: "swarm".to_owned(),
            subnets: pools.map(|pool| pool.subnet.clone()).collect(),
            internal: spec.internal,
            network: Some(network),
        });
    }
    networks
}

/// The node's own bridge has an ID of the node's own: the same one for as long as the node is a member.
fn gateway_id(node: &NodeId) -> String {
    let digest = Sha256::digest(format!("{GATEWAY} {node}"));
    swarm_proto::id::encode(u128::from_be_bytes(
        digest[..16].try_into().expect("a SHA-256 has 32 bytes"),
    ))
}

fn agent_status(error: &AgentError) -> Status {
    match error {
        AgentError::Runtime(error) => runtime_status(error),
        AgentError::NoSuchTask(_) => Status::not_found(error.to_string()),
        AgentError::Ambiguous(_) => Status::invalid_argument(error.to_string()),
        AgentError::Stopped => Status::unavailable(error.to_string()),
        AgentError::Local(_) | AgentError::Network(_) => Status::internal(error.to_string()),
    }
}

fn outside() -> Status {
    Status::failed_precondition(OUTSIDE)
}

fn internal(error: &anyhow::Error) -> Status {
    Status::internal(format!("{error:#}"))
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_without_a_port_gets_the_default_one() {
        assert_eq!(with_port("10.0.0.1"), "10.0.0.1:2377");
        assert_eq!(with_port("10.0.0.1:99"), "10.0.0.1:99");
        assert_eq!(with_port("manager"), "manager:2377");
        assert_eq!(with_port("manager:99"), "manager:99");
        assert_eq!(with_port("::1"), "[::1]:2377");
    }
}
