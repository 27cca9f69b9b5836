//! The dataplane on the Linux kernel.
//!
//! The thin shell around the pure parts: it remembers what it has made, and turns each call into a
//! comparison of what is wanted with what is there. Kernel calls run on threads that may block. Locks are taken in the
//! order sandbox, network, gateway, and none is held across an await.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::try_join_all;
use ipnet::Ipv4Net;
use parking_lot::Mutex;
use swarm_proto::v1::{Network, PortConfig};
use swarm_proto::{NetworkId, TaskId};

pub use super::config::DataplaneConfig;
use super::gateway::{Gateway, Host};
use super::names::client::Names;
use super::overlay::{Forwarding, Overlay, SANDBOX_LINKS, Shape, Underlay, endpoint_addr, short};
use super::sandbox::{Live, Plan};
use super::{Dataplane, NetworkError, NetworkView, Sandbox, SandboxSpec, netns};

const NETWORK_FILE: &str = "net-";
/// Of the gateway bridge while the underlay is not known.
const ETHERNET_MTU: u32 = 1500;

/// Builds sandboxes and overlay networks over netlink.
#[derive(Debug)]
pub struct KernelDataplane {
    inner: Arc<Inner>,
}

type Slot<T> = Arc<Mutex<Option<T>>>;

#[derive(Debug)]
struct Inner {
    config: DataplaneConfig,
    host: Mutex<Host>,
    underlay: Mutex<Option<Underlay>>,
    views: Mutex<HashMap<NetworkId, Arc<NetworkView>>>,
    networks: Mutex<HashMap<NetworkId, Slot<Overlay>>>,
    sandboxes: Mutex<HashMap<TaskId, Slot<Live>>>,
    gateway: Mutex<Gateway>,
    names: Names,
}

fn kernel<E: std::fmt::Display>(step: String) -> impl FnOnce(E) -> NetworkError {
    move |error| NetworkError::Kernel {
        step,
        reason: error.to_string(),
    }
}

impl KernelDataplane {
    /// Call it inside a tokio runtime, as root.
    ///
    /// # Errors
    /// The run directory or a netlink socket cannot be made.
    pub fn new(config: DataplaneConfig) -> Result<Self, NetworkError> {
        let directory = config.run_dir.join("netns");
        fs::create_dir_all(&directory)
            .map_err(kernel(format!("create {}", directory.display())))?;
        let netns = match &config.host_netns {
            Some(path) => {
                Some(fs::File::open(path).map_err(kernel(format!("open {}", path.display())))?)
            }
            None => None,
        };
        let host =
            Host::open(netns).map_err(kernel("open netlink sockets (is this root?)".to_owned()))?;
        let names = Names::new(&config);
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                host: Mutex::new(host),
                underlay: Mutex::default(),
                views: Mutex::default(),
                networks: Mutex::default(),
                sandboxes: Mutex::default(),
                gateway: Mutex::default(),
                names,
            }),
        })
    }

    /// Lets go of the name server and ends what runs in this process; everything in the kernel stays
    /// and works on. For a restart or an upgrade of this process.
    pub async fn close(&self) {
        self.inner.names.close().await;
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(kernel("run a kernel call".to_owned()))?
    }

    /// Brings balancing of all sandboxes on a network up to date, side by side.
    async fn balance(&self, network: &NetworkId, gone: Vec<Ipv4Addr>) -> Result<(), NetworkError> {
        let slots: Vec<Slot<Live>> = self.inner.sandboxes.lock().values().cloned().collect();
        let gone = Arc::new(gone);
        let mut work = Vec::new();
        for slot in slots {
            let network = network.clone();
            let gone = Arc::clone(&gone);
            work.push(self.blocking(move |inner| {
                let mut slot = slot.lock();
                match slot.as_mut() {
                    Some(live) if live.plan.attachments.iter().any(|(id, _)| *id == network) => {
                        inner.balance_one(live, &gone)
                    }
                    _ => Ok(()),
                }
            }));
        }
        try_join_all(work).await?;
        Ok(())
    }
}

impl Inner {
    fn netns_dir(&self) -> PathBuf {
        self.config.run_dir.join("netns")
    }

    fn network_path(&self, network: &NetworkId) -> PathBuf {
        self.netns_dir()
            .join(format!("{NETWORK_FILE}{}", short(network)))
    }

    fn sandbox_path(&self, task: &TaskId) -> PathBuf {
        self.netns_dir().join(task.as_str())
    }

    fn view(&self, network: &NetworkId) -> Option<Arc<NetworkView>> {
        self.views.lock().get(network).cloned()
    }

    fn network_slot(&self, network: &NetworkId) -> Slot<Overlay> {
        Arc::clone(self.networks.lock().entry(network.clone()).or_default())
    }

    fn sandbox_slot(&self, task: &TaskId) -> Slot<Live> {
        Arc::clone(self.sandboxes.lock().entry(task.clone()).or_default())
    }

    /// With an adopted sandbox, the tables of all its networks may not have come yet: then its rules stay as they are.
    fn balance_one(&self, live: &mut Live, gone: &[Ipv4Addr]) -> Result<(), NetworkError> {
        let views: Vec<_> = live
            .plan
            .attachments
            .iter()
            .map_while(|(network, _)| self.view(network))
            .collect();
        if views.len() < live.plan.attachments.len() {
            return Ok(());
        }
        let views: Vec<&NetworkView> = views.iter().map(AsRef::as_ref).collect();
        live.set_balance(&views, gone).map_err(kernel(format!(
            "program load balancing of task {}",
            live.plan.spec.task_id
        )))
    }

    /// Brings a network that exists here up to date with its table.
    fn sync_network(&self, overlay: &mut Overlay, view: &NetworkView) -> Result<(), NetworkError> {
        let Some(underlay) = *self.underlay.lock() else {
            return Ok(());
        };
        let shape = Shape::parse(view, underlay)?;
        overlay
            .ensure_devices(&self.host.lock().route, &shape, underlay)
            .map_err(kernel(format!(
                "create vxlan links of network {}",
                shape.id
            )))?;
        let wanted = Forwarding::plan(view.endpoints.values().map(AsRef::as_ref), underlay.addr);
        overlay.forward(&wanted).map_err(kernel(format!(
            "program forwarding of network {}",
            shape.id
        )))
    }

    fn attach_network(
        &self,
        live: &Live,
        name: &str,
        network: &NetworkId,
        addr: Ipv4Net,
    ) -> Result<(), NetworkError> {
        let task = &live.plan.spec.task_id;
        let underlay = (*self.underlay.lock()).ok_or_else(|| {
            NetworkError::Invalid("the data-path address is not known yet".to_owned())
        })?;
        let slot = self.network_slot(network);
        let mut slot = slot.lock();
        // Read under the lock: a newer table then waits for us, and finds the network.
        let view = self.view(network).ok_or_else(|| {
            NetworkError::Invalid(format!("network {network} is not known on this node"))
        })?;
        let shape = Shape::parse(&view, underlay)?;
        let mut overlay = match slot.take() {
            Some(overlay) => overlay,
            None => Overlay::open_or_create(&self.network_path(network))
                .map_err(kernel(format!("create the namespace of network {network}")))?,
        };
        let subnets: Vec<Ipv4Net> = shape.segments.iter().map(|s| s.subnet).collect();
        let done = self.sync_network(&mut overlay, &view).and_then(|()| {
            overlay
                .attach(task, &live.netns, name, addr, &subnets)
                .map_err(kernel(format!("attach task {task} to network {network}")))
        });
        *slot = Some(overlay);
        done
    }

    fn detach_network(&self, task: &TaskId, network: &NetworkId) -> Result<(), NetworkError> {
        let slot = self.network_slot(network);
        let mut slot = slot.lock();
        let Some(mut overlay) = slot.take() else {
            return Ok(());
        };
        let detached = overlay
            .detach(task)
            .map_err(kernel(format!("detach task {task} from network {network}")));
        if overlay.users.is_empty() {
            detached.and(
                overlay
                    .destroy()
                    .map_err(kernel(format!("remove network {network}"))),
            )
        } else {
            *slot = Some(overlay);
            detached
        }
    }

    fn needs_gateway(&self, plan: &Plan) -> bool {
        plan.attachments.is_empty()
            || plan.attachments.iter().any(|(network, _)| {
                self.view(network)
                    .is_none_or(|view| !view.network.spec.as_ref().is_some_and(|s| s.internal))
            })
    }

    /// Every step finds out by itself what is there already, so this is also the way to repair.
    fn build(&self, live: &mut Live) -> Result<(), NetworkError> {
        let plan = live.plan.clone();
        for (number, (network, addr)) in plan.attachments.iter().enumerate() {
            self.attach_network(live, &format!("eth{number}"), network, *addr)?;
        }
        if self.needs_gateway(&plan) {
            let mtu = (*self.underlay.lock()).map_or(ETHERNET_MTU, |underlay| underlay.mtu);
            let host = self.host.lock();
            let mut gateway = self.gateway.lock();
            let addr = gateway.attach(
                &host,
                &self.config.gateway_pools,
                mtu,
                &plan.spec.task_id,
                &live.netns,
                &format!("eth{}", plan.attachments.len()),
            )?;
            live.gateway_addr = Some(addr);
            live.bound = gateway.publish(&host, &plan.spec.task_id, &plan.host_ports)?;
        } else if !plan.host_ports.is_empty() {
            return Err(NetworkError::Invalid(
                "a port cannot be published from internal networks alone".to_owned(),
            ));
        }
        self.balance_one(live, &[])
    }

    /// Removes all of a sandbox, going on after failures; the first is the result.
    fn dismantle(&self, live: Live) -> Result<(), NetworkError> {
        let task = live.plan.spec.task_id.clone();
        // From the inside, with no lock held that others need: the kernel takes some ten milliseconds for it.
        let mut result = live
            .netns
            .route
            .remove_group(SANDBOX_LINKS)
            .map_err(kernel(format!("remove the links of task {task}")));
        {
            let host = self.host.lock();
            result = result.and(self.gateway.lock().detach(&host, &task));
        }
        for (network, _) in &live.plan.attachments {
            result = result.and(self.detach_network(&task, network));
        }
        drop(live);
        result.and(
            netns::remove(&self.sandbox_path(&task))
                .map_err(kernel(format!("remove the namespace of task {task}"))),
        )
    }

    fn describe(&self, live: &Live) -> Sandbox {
        let host_ports = live
            .plan
            .spec
            .host_ports
            .iter()
            .zip(&live.bound)
            .map(|(port, bound)| PortConfig {
                published_port: u32::from(*bound),
                ..port.clone()
            })
            .collect();
        Sandbox {
            netns: live.netns.path().to_owned(),
            gateway_addr: live.gateway_addr.map(IpAddr::V4),
            host_ports,
        }
    }

    /// Adopts the sandboxes that are listed, and removes everything of ours that belongs to no listed one.
    fn reconcile(&self, plans: Vec<Plan>) -> Result<(), NetworkError> {
        let mut result = Ok(());
        let listed: BTreeSet<TaskId> = plans.iter().map(|p| p.spec.task_id.clone()).collect();
        // Those of this process first: they know what they are attached to.
        let strangers: Vec<Slot<Live>> = self
            .sandboxes
            .lock()
            .iter()
            .filter(|(task, _)| !listed.contains(*task))
            .map(|(_, slot)| Arc::clone(slot))
            .collect();
        for slot in strangers {
            if let Some(live) = slot.lock().take() {
                result = result.and(self.dismantle(live));
            }
        }
        self.sandboxes
            .lock()
            .retain(|task, _| listed.contains(task));
        let mut adopted = Vec::new();
        for plan in plans {
            let task = plan.spec.task_id.clone();
            let slot = self.sandbox_slot(&task);
            let mut slot = slot.lock();
            if slot.is_some() {
                continue;
            }
            let path = self.sandbox_path(&task);
            match netns::Netns::open(&path) {
                Ok(Some(netns)) => adopted.push(Live {
                    plan,
                    netns,
                    gateway_addr: None,
                    bound: Vec::new(),
                    balance: None,
                }),
                // Nothing to adopt: `ensure_sandbox` makes it, or nobody needs it.
                Ok(None) => *slot = None,
                Err(error) => {
                    result = result.and(Err(kernel(format!("open the namespace of task {task}"))(
                        error,
                    )));
                }
            }
        }
        // Networks that an adopted sandbox is on, with what is in them.
        let mut wanted: BTreeMap<NetworkId, BTreeSet<TaskId>> = BTreeMap::new();
        for live in &adopted {
            for (network, _) in &live.plan.attachments {
                wanted
                    .entry(network.clone())
                    .or_default()
                    .insert(live.plan.spec.task_id.clone());
            }
        }
        for (network, users) in wanted {
            let slot = self.network_slot(&network);
            let mut slot = slot.lock();
            if slot.is_none() {
                match Overlay::open(&self.network_path(&network)) {
                    Ok(found) => *slot = found,
                    Err(error) => {
                        result = result.and(Err(kernel(format!("open network {network}"))(error)));
                    }
                }
            }
            if let Some(overlay) = slot.as_mut() {
                overlay.users.extend(users);
                result = result.and(
                    overlay
                        .remove_strangers()
                        .map_err(kernel(format!("remove leftovers in network {network}"))),
                );
            }
        }
        result = result.and(self.adopt_gateway(&mut adopted));
        for live in adopted {
            let slot = self.sandbox_slot(&live.plan.spec.task_id);
            *slot.lock() = Some(live);
        }
        result.and(self.remove_leftover_files())
    }

    fn adopt_gateway(&self, adopted: &mut [Live]) -> Result<(), NetworkError> {
        let host = self.host.lock();
        let mut gateway = self.gateway.lock();
        let listed = adopted.iter().map(|live| {
            (
                &live.plan.spec.task_id,
                &live.netns,
                live.plan.host_ports.as_slice(),
            )
        });
        gateway.adopt(&host, listed)?;
        for live in adopted {
            if let Some((addr, bound)) = gateway.holding(&live.plan.spec.task_id) {
                live.gateway_addr = Some(addr);
                live.bound = bound;
            }
        }
        Ok(())
    }

    /// Namespace files that nothing in memory stands for.
    fn remove_leftover_files(&self) -> Result<(), NetworkError> {
        let directory = self.netns_dir();
        let mut known: BTreeSet<PathBuf> = BTreeSet::new();
        for (task, slot) in self.sandboxes.lock().iter() {
            if slot.lock().is_some() {
                known.insert(self.sandbox_path(task));
            }
        }
        for (network, slot) in self.networks.lock().iter() {
            if slot.lock().is_some() {
                known.insert(self.network_path(network));
            }
        }
        let list = || -> io::Result<Vec<PathBuf>> {
            fs::read_dir(&directory)?
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        };
        let mut result = Ok(());
        for path in list().map_err(kernel(format!("list {}", directory.display())))? {
            if !known.contains(&path) {
                result = result.and(remove_leftover(&path));
            }
        }
        result
    }
}

/// The links go first: someone may hold the namespace open.
fn remove_leftover(path: &Path) -> Result<(), NetworkError> {
    let step = || format!("remove leftover {}", path.display());
    if let Some(found) = netns::Netns::open(path).map_err(kernel(step()))? {
        for link in found.route.links().map_err(kernel(step()))? {
            if link.name != "lo" {
                found
                    .route
                    .remove_link(&link.name)
                    .map_err(kernel(step()))?;
            }
        }
        let _ = found.nft.clear();
    }
    netns::remove(path).map_err(kernel(step()))
}

#[async_trait::async_trait]
impl Dataplane for KernelDataplane {
    // The first step that failed is the error; the others are done all the same.
    async fn teardown(&self) -> Result<(), NetworkError> {
        let reconciled = self.reconcile(Vec::new()).await;
        self.inner.names.end().await;
        let gone = self
            .blocking(|inner| {
                let host = inner.host.lock();
                inner.gateway.lock().teardown(&host)
            })
            .await;
        reconciled.and(gone)
    }

    async fn reconcile(&self, sandboxes: Vec<SandboxSpec>) -> Result<(), NetworkError> {
        let plans = sandboxes
            .iter()
            .map(Plan::parse)
            .collect::<Result<Vec<_>, _>>()?;
        // Before the namespaces go, or the name server would keep them.
        self.inner.names.retain(&plans).await?;
        let adopted = self
            .blocking(move |inner| {
                let result = inner.reconcile(plans);
                let slots: Vec<_> = inner.sandboxes.lock().values().cloned().collect();
                let adopted: Vec<_> = slots
                    .iter()
                    .filter_map(|slot| {
                        let slot = slot.lock();
                        let live = slot.as_ref()?;
                        let path = live.netns.path().to_owned();
                        Some((live.plan.clone(), path, live.gateway_addr.is_some()))
                    })
                    .collect();
                Ok((adopted, result))
            })
            .await;
        let (adopted, mut result) = adopted?;
        // Whether or not the name server outlived us, it serves them from now on.
        for (plan, path, external) in adopted {
            result = result.and(self.inner.names.set_sandbox(&plan, &path, external).await);
        }
        result
    }

    async fn set_underlay(&self, addr: IpAddr, port: u16) -> Result<(), NetworkError> {
        let IpAddr::V4(addr) = addr else {
            return Err(NetworkError::Invalid(format!(
                "{addr}: the data path speaks IPv4 only"
            )));
        };
        self.blocking(move |inner| {
            let mtu = {
                let host = inner.host.lock();
                let step = || format!("find the link with address {addr}");
                let addresses = host.route.addresses().map_err(kernel(step()))?;
                let links = host.route.links().map_err(kernel(step()))?;
                addresses
                    .iter()
                    .find(|(_, found)| found.addr() == addr)
                    .and_then(|(index, _)| links.iter().find(|link| link.index == *index))
                    .map(|link| link.mtu.min(u32::from(u16::MAX)))
                    .ok_or_else(|| {
                        NetworkError::Invalid(format!(
                            "no link of this node has the data-path address {addr}"
                        ))
                    })?
            };
            *inner.underlay.lock() = Some(Underlay { addr, port, mtu });
            let slots: Vec<_> = inner
                .networks
                .lock()
                .iter()
                .map(|(id, slot)| (id.clone(), Arc::clone(slot)))
                .collect();
            for (network, slot) in slots {
                if let (Some(overlay), Some(view)) = (slot.lock().as_mut(), inner.view(&network)) {
                    inner.sync_network(overlay, &view)?;
                }
            }
            Ok(())
        })
        .await
    }

    async fn set_network(&self, view: NetworkView) -> Result<(), NetworkError> {
        let view = Arc::new(view);
        let network = NetworkId::from(&view.network.id);
        let old = self
            .inner
            .views
            .lock()
            .insert(network.clone(), Arc::clone(&view));
        let gone = old.map_or_else(Vec::new, |old| gone_addresses(&old, &view));
        {
            let (network, view) = (network.clone(), Arc::clone(&view));
            self.blocking(move |inner| {
                let slot = inner.network_slot(&network);
                let mut slot = slot.lock();
                match (slot.as_mut(), inner.view(&network)) {
                    (Some(overlay), Some(newest)) => inner.sync_network(overlay, &newest),
                    (None, _) => {
                        // Refused now rather than when the first task needs it.
                        match *inner.underlay.lock() {
                            Some(underlay) => Shape::parse(&view, underlay).map(drop),
                            None => Ok(()),
                        }
                    }
                    (Some(_), None) => Ok(()),
                }
            })
            .await?;
        }
        let (balanced, named) = tokio::join!(
            self.balance(&network, gone),
            self.inner.names.set_network(&view)
        );
        balanced.and(named)
    }

    async fn forget_network(&self, network: &NetworkId) -> Result<(), NetworkError> {
        self.inner.views.lock().remove(network);
        {
            let mut networks = self.inner.networks.lock();
            if networks.get(network).is_some_and(unused) {
                networks.remove(network);
            }
        }
        self.inner.names.remove_network(network).await
    }

    async fn ensure_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, NetworkError> {
        let plan = Plan::parse(spec)?;
        let task = plan.spec.task_id.clone();
        let names = plan.clone();
        let made = self
            .blocking(move |inner| {
                let task = plan.spec.task_id.clone();
                let slot = inner.sandbox_slot(&task);
                let mut slot = slot.lock();
                let (mut live, existed) = match slot.take() {
                    Some(live) if live.plan.attachments == plan.attachments => (live, true),
                    Some(other) => {
                        inner.dismantle(other)?;
                        (new_sandbox(inner, plan)?, false)
                    }
                    None => (new_sandbox(inner, plan)?, false),
                };
                match inner.build(&mut live) {
                    Ok(()) => {
                        let sandbox = inner.describe(&live);
                        let external = live.gateway_addr.is_some();
                        *slot = Some(live);
                        Ok((sandbox, external, existed))
                    }
                    // A container may be running in it: better a part of its network than none.
                    Err(error) if existed => {
                        *slot = Some(live);
                        Err(error)
                    }
                    Err(error) => {
                        if let Err(undo) = inner.dismantle(live) {
                            tracing::warn!(%task, error = %undo, "undoing a sandbox");
                        }
                        Err(error)
                    }
                }
            })
            .await;
        let (sandbox, external, existed) = match made {
            Ok(made) => made,
            Err(error) => {
                self.forget_sandbox(&task);
                return Err(error);
            }
        };
        if let Err(error) = self
            .inner
            .names
            .set_sandbox(&names, &sandbox.netns, external)
            .await
        {
            if !existed && let Err(undo) = self.remove_sandbox(&task).await {
                tracing::warn!(%task, error = %undo, "undoing a sandbox");
            }
            return Err(error);
        }
        Ok(sandbox)
    }

    async fn remove_sandbox(&self, task: &TaskId) -> Result<(), NetworkError> {
        // Its sockets would keep the namespace.
        let named = self.inner.names.remove_sandbox(task).await;
        let of = task.clone();
        let removed = self
            .blocking(move |inner| {
                let slot = inner.sandboxes.lock().get(&of).cloned();
                match slot.and_then(|slot| slot.lock().take()) {
                    Some(live) => inner.dismantle(live),
                    None => Ok(()),
                }
            })
            .await;
        self.forget_sandbox(task);
        removed.and(named)
    }

    async fn held_networks(&self) -> BTreeMap<NetworkId, Network> {
        self.blocking(|inner| {
            let slots: Vec<_> = inner
                .networks
                .lock()
                .iter()
                .map(|(id, slot)| (id.clone(), Arc::clone(slot)))
                .collect();
            Ok(slots
                .into_iter()
                .filter(|(_, slot)| slot.lock().is_some())
                .filter_map(|(network, _)| {
                    let view = inner.view(&network)?;
                    Some((network, view.network.clone()))
                })
                .collect())
        })
        .await
        .unwrap_or_default()
    }

    fn gateway_subnet(&self) -> Option<String> {
        self.inner
            .gateway
            .lock()
            .subnet()
            .map(|subnet| subnet.to_string())
    }
}

impl KernelDataplane {
    /// Forgets a sandbox's slot, unless someone has begun to make it again.
    fn forget_sandbox(&self, task: &TaskId) {
        let mut sandboxes = self.inner.sandboxes.lock();
        if sandboxes.get(task).is_some_and(unused) {
            sandboxes.remove(task);
        }
    }
}

/// Nothing is in it, and nobody but the map holds it: it is only ever cloned under the map's lock.
fn unused<T>(slot: &Slot<T>) -> bool {
    Arc::strong_count(slot) == 1 && slot.lock().is_none()
}

fn new_sandbox(inner: &Inner, plan: Plan) -> Result<Live, NetworkError> {
    let task = plan.spec.task_id.clone();
    Live::open_or_create(&inner.sandbox_path(&task), plan)
        .map_err(kernel(format!("create the namespace of task {task}")))
}

/// Addresses that were in the old table and are in no row of the new one.
fn gone_addresses(old: &NetworkView, new: &NetworkView) -> Vec<Ipv4Addr> {
    let addrs = |view: &NetworkView| -> BTreeSet<Ipv4Addr> {
        view.endpoints
            .values()
            .filter_map(|endpoint| endpoint_addr(endpoint))
            .collect()
    };
    addrs(old).difference(&addrs(new)).copied().collect()
}
