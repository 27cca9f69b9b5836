//! One simulated machine: what it keeps when its process ends, and what its process does.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use swarm_agent::description::{DescriptionConfig, DescriptionError, HostDescription};
use swarm_agent::network::Dataplane;
use swarm_agent::network::fake::FakeDataplane;
use swarm_agent::runtime::fake::{FakeRuntime, Fuse};
use swarm_daemon::address::LocalAddress;
use swarm_daemon::{Environment, Host, ManagerSlot, Node, Tune};
use swarm_disk::memory::MemoryDisk;
use swarm_disk::{Disk as _, Threads};
use swarm_proto::defaults::API_PORT;
use swarm_proto::v1::{InitRequest, JoinClusterRequest, NodeDescription, Platform, Resources};
use swarm_raft::{RaftTiming, Repeats};
use tokio::sync::mpsc;

use crate::check;
use crate::dice::Dice;
use crate::fakes::SimRuntime;
use crate::net::ip_of;
use crate::seams::{DiskMood, SimNet};
use crate::world::{self, HostId, SECOND};

/// Mean of the time after which a message of raft comes once more, if it does. Nanoseconds.
const REPEATED_AFTER: u64 = SECOND / 2;
/// Between two attempts to join.
const JOIN_AGAIN: Duration = Duration::from_millis(700);
/// Between two looks of whoever runs the machine at whether its node is in the cluster.
const LOOK: Duration = Duration::from_secs(1);
/// How long a node may have a session after it was removed: longer than it takes to hear of it.
pub const REMOVED_AFTER: u64 = 3 * SECOND;

/// What survives a process.
pub struct Machine {
    /// Which one.
    pub host: HostId,
    /// Its disk, for everything that the product syncs.
    pub disk: MemoryDisk,
    /// How that is.
    pub mood: Arc<DiskMood>,
    /// Its containers.
    pub runtime: Arc<FakeRuntime>,
    /// Its networks.
    pub dataplane: Arc<FakeDataplane>,
    seed: u64,
}

/// What a new process is to do if it is in no cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Make one.
    Found,
    /// Enter it as a manager.
    Manager,
    /// Enter it as a worker.
    Worker,
}

/// host:port of a machine's API.
pub fn addr_of(host: HostId) -> String {
    SocketAddr::new(ip_of(host), API_PORT).to_string()
}

thread_local! {
    static NODES: RefCell<BTreeMap<HostId, Arc<Node>>> = const { RefCell::new(BTreeMap::new()) };
}

/// The node that runs on the host.
pub fn node(host: HostId) -> Option<Arc<Node>> {
    NODES.with(|nodes| nodes.borrow().get(&host).cloned())
}

/// Drops what is left of a process that is being killed.
pub fn forget(host: HostId) {
    let node = NODES.with(|nodes| nodes.borrow_mut().remove(&host));
    drop(node);
}

struct SimHost(HostId);

#[async_trait::async_trait]
impl Host for SimHost {
    fn addresses(&self) -> io::Result<Vec<LocalAddress>> {
        Ok(vec![LocalAddress {
            interface: "eth0".to_owned(),
            addr: ip_of(self.0),
        }])
    }

    async fn describe(
        &self,
        config: DescriptionConfig,
        _: Arc<dyn Dataplane>,
    ) -> Result<HostDescription, DescriptionError> {
        Ok(HostDescription::fixed(NodeDescription {
            hostname: config.hostname,
            platform: Some(Platform {
                architecture: "x86_64".to_owned(),
                os: "linux".to_owned(),
            }),
            resources: Some(Resources {
                nano_cpus: 4_000_000_000,
                memory_bytes: 8 << 30,
            }),
            engine_labels: config.engine_labels.into_iter().collect(),
            engine_version: config.engine_version,
            routes: vec!["10.77.0.0/16".to_owned()],
            data_path_addr: config.data_path_addr,
            trust_root_digest: config.trust_root_digest,
        }))
    }
}

impl Machine {
    /// A new one.
    pub fn new(seed: u64, host: HostId) -> Arc<Self> {
        let mood = DiskMood::new(Dice::new(seed, &format!("disk {host}")));
        let fuse = Arc::new(Fuse::default());
        let machine = Arc::new(Self {
            host,
            disk: MemoryDisk::new(mood.clone()),
            mood,
            runtime: FakeRuntime::new(Arc::clone(&fuse)),
            dataplane: FakeDataplane::new(fuse),
            seed,
        });
        std::fs::create_dir_all(machine.dir()).expect("a directory in memory can be made");
        machine
    }

    /// What a power cut does to it.
    pub fn lose_power(&self, dice: &mut Dice) {
        self.disk
            .crash(&mut |most| dice.between(0, most as u64) as usize);
        self.runtime.change(|state| state.containers.clear());
        self.dataplane.change(|state| {
            state.sandboxes.clear();
            state.networks.clear();
        });
    }

    /// Makes it a new machine at the same address.
    pub fn wipe(&self) {
        self.disk.wipe();
        let _ = std::fs::remove_dir_all(self.dir());
        std::fs::create_dir_all(self.dir()).expect("a directory in memory can be made");
        self.runtime.change(|state| *state = Default::default());
        self.dataplane.change(|state| *state = Default::default());
    }

    /// Its raft log is lost, or was moved away; certificate and agent are what they were.
    pub fn lose_log(&self) -> io::Result<()> {
        self.disk.remove_dir(&self.dir().join("raft"))
    }

    /// Certificate and settings are plain files, small and replaced whole.
    fn dir(&self) -> PathBuf {
        PathBuf::from(format!("h{}", self.host))
    }

    /// The process `swarmd`, and whoever tells it to enter a cluster.
    pub async fn run(self: Arc<Self>, begin: Begin) {
        let host = self.host;
        if let Err(error) = self.serve(begin).await {
            tracing::warn!("the process ends: {error:#}");
            check::ended(host, format!("{error:#}"));
        }
        // From outside, so that all of it is gone at once.
        let boot = world::with(|world| world.hosts[host].boot);
        world::call_at(world::now(), move |sim| {
            if world::with(|world| world.hosts[host].boot) == boot {
                sim.crash(host, false);
                crate::plan::process_ended(host);
            }
        });
        std::future::pending::<()>().await;
    }

    fn environment(&self) -> Environment {
        Environment {
            hostname: format!("h{}", self.host),
            data_dir: self.dir(),
            engine_labels: Vec::new(),
            host: Arc::new(SimHost(self.host)),
            net: SimNet::shared(),
            disk: Arc::new(self.disk.clone()),
            threads: Threads::Callers,
            tune: self.tune(),
            runtime: SimRuntime::shared(self.seed, self.host, Arc::clone(&self.runtime)),
            dataplane: Arc::clone(&self.dataplane) as Arc<dyn Dataplane>,
        }
    }

    /// Time for slow processors, and snapshots often enough that they matter. The seed decides.
    fn tune(&self) -> Tune {
        let mut dice = Dice::new(self.seed, "raft");
        let snapshot_interval = dice.between(40, 400);
        let kept_entries = dice.between(0, 100);
        let repeated = [0, 0, 20, 5][dice.below(4) as usize];
        let boot = world::with(|world| world.hosts[self.host].boot);
        let dice = Dice::new(self.seed, &format!("repeats {} {boot}", self.host));
        let dice = Mutex::new(dice);
        let repeats = Repeats::new(move || {
            let mut dice = dice.lock();
            let again = dice.once_in(repeated);
            again.then(|| Duration::from_nanos(dice.around(REPEATED_AFTER)))
        });
        Arc::new(move |config| {
            config.timing = RaftTiming {
                heartbeat: Duration::from_millis(100),
                election_min: Duration::from_millis(500),
                election_max: Duration::from_millis(1000),
            };
            config.snapshot_interval = snapshot_interval;
            config.kept_entries = kept_entries;
            config.repeats = Some(repeats.clone());
        })
    }

    async fn serve(&self, begin: Begin) -> anyhow::Result<()> {
        let (fatal, mut reason) = mpsc::channel(1);
        let node = Node::new(self.environment(), ManagerSlot::default(), fatal);
        NODES.with(|nodes| nodes.borrow_mut().insert(self.host, Arc::clone(&node)));
        let held = node.hold().await;
        node.resume(held).await.context("resuming")?;
        tokio::select! {
            why = reason.recv() => anyhow::bail!(why.unwrap_or_default()),
            () = self.operate(&node, begin) => Ok(()),
        }
    }

    /// What whoever runs the machine does: sees to it that its node is in the cluster.
    async fn operate(&self, node: &Node, begin: Begin) {
        loop {
            self.be_member(node, begin).await;
            // Nobody reads it, and it would grow for ever.
            self.dataplane.change(|state| state.calls.clear());
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn be_member(&self, node: &Node, begin: Begin) {
        let addr = ip_of(self.host).to_string();
        let removed = || {
            let id = node.look(|member| member.identity.node_id().to_string());
            id.is_some_and(|id| check::removed(&id))
        };
        if removed() {
            world::sleep(2 * REMOVED_AFTER).await;
            if removed()
                && let Err(status) = node.leave(true).await
            {
                tracing::info!(%status, "not out of the cluster yet");
            }
        }
        while node.look(|_| ()).is_none() {
            let entered = if begin == Begin::Found && !check::founded() {
                let request = InitRequest {
                    advertise_addr: addr.clone(),
                    default_addr_pool: vec!["10.0.0.0/16".to_owned()],
                    default_addr_pool_mask_length: 26,
                    ..Default::default()
                };
                let made = node.init(request).await;
                made.map(|_| check::made())
            } else {
                let request = JoinClusterRequest {
                    token: check::token(begin != Begin::Worker).unwrap_or_default(),
                    remotes: crate::plan::manager_addrs(self.host),
                    advertise_addr: addr.clone(),
                    ..Default::default()
                };
                node.join(request).await.map(|_| ())
            };
            if let Err(status) = entered {
                tracing::info!(%status, "not in a cluster yet");
                tokio::time::sleep(JOIN_AGAIN).await;
            }
        }
    }
}
