//! What the node says of itself: host name, platform, resources, routes.
//!
//! Reads `/proc` once and the kernel's routes and addresses over netlink, and
//! reads them again when the kernel says that they have changed. One loop,
//! owned by [`HostDescription`]. Changes nothing.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use swarm_proto::v1::{NodeDescription, Platform, Resources};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::network::Dataplane;

/// Changes of routes come in bursts: one reading for each burst.
const SETTLE: Duration = Duration::from_millis(200);
/// The kernel's own table of local addresses.
const TABLE_LOCAL: u8 = 255;
/// A host with more routes than this is described by its first.
const ROUTES_MAX: usize = 1024;

/// Why the node cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// A netlink socket, or a dump over it.
    #[error("cannot read this node's {what} over netlink: {reason}")]
    Netlink {
        /// "routes", "addresses", "route changes".
        what: &'static str,
        /// What the kernel said.
        reason: String,
    },
    /// A file of `/proc`.
    #[error("cannot read {file}: {source}")]
    Proc {
        /// Which.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What is said of the node by whoever starts it.
#[derive(Clone, Debug, Default)]
pub struct DescriptionConfig {
    /// Empty = the system's.
    pub hostname: String,
    /// Address that other nodes send VXLAN traffic to.
    pub data_path_addr: String,
    /// Version of this program.
    pub engine_version: String,
    /// Labels set by whoever runs the node.
    pub engine_labels: Vec<(String, String)>,
    /// Digest ("sha256:…") of the root the node trusts.
    pub trust_root_digest: String,
}

/// Keeps the node's description up to date. Dropping it ends its loop.
pub struct HostDescription {
    current: watch::Receiver<NodeDescription>,
    cancel: CancellationToken,
    loops: Vec<JoinHandle<()>>,
}

impl HostDescription {
    /// Reads everything once, and watches from then on, in the network namespace of this process.
    ///
    /// # Errors
    /// [`DescriptionError`]
    pub async fn start(
        config: DescriptionConfig,
        dataplane: Arc<dyn Dataplane>,
    ) -> Result<Self, DescriptionError> {
        let netlink = |what| {
            move |error: io::Error| DescriptionError::Netlink {
                what,
                reason: error.to_string(),
            }
        };
        // Listening begins before the first reading, so that no change falls between.
        let (connection, _, mut changes) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
        ])
        .map_err(netlink("route changes"))?;
        let listener = tokio::spawn(connection);
        let (connection, handle, _) = rtnetlink::new_connection().map_err(netlink("routes"))?;
        let talker = tokio::spawn(connection);
        let mut first = fixed(&config)?;
        first.routes = routes(&handle, dataplane.gateway_subnet()).await?;
        let (sender, current) = watch::channel(first);
        let cancel = CancellationToken::new();
        let stopped = cancel.clone();
        let watcher = tokio::spawn(async move {
            let follow = async {
                while changes.next().await.is_some() {
                    tokio::time::sleep(SETTLE).await;
                    while let Ok(_burst) = changes.try_recv() {}
                    match routes(&handle, dataplane.gateway_subnet()).await {
                        Ok(routes) => {
                            sender.send_if_modified(|description| {
                                let news = description.routes != routes;
                                description.routes = routes;
                                news
                            });
                        }
                        Err(error) => tracing::warn!(%error, "the node's routes are not known"),
                    }
                }
                tracing::warn!("the kernel no longer tells of route changes");
            };
            tokio::select! {
                () = stopped.cancelled() => {}
                () = follow => stopped.cancelled().await,
            }
        });
        Ok(Self {
            current,
            cancel,
            loops: vec![listener, talker, watcher],
        })
    }

    /// One that never changes, for a node without a machine of its own.
    #[must_use]
    pub fn fixed(description: NodeDescription) -> Self {
        Self {
            current: watch::channel(description).1,
            cancel: CancellationToken::new(),
            loops: Vec::new(),
        }
    }

    /// The description now and later.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<NodeDescription> {
        self.current.clone()
    }

    /// Ends the loop.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        for task in std::mem::take(&mut self.loops) {
            // The two connections end only by force.
            if !task.is_finished() {
                task.abort();
            }
            let _ = task.await;
        }
    }
}

impl Drop for HostDescription {
    fn drop(&mut self) {
        self.cancel.cancel();
        for task in &self.loops {
            task.abort();
        }
    }
}

fn fixed(config: &DescriptionConfig) -> Result<NodeDescription, DescriptionError> {
    let hostname = if config.hostname.is_empty() {
        read("/proc/sys/kernel/hostname")?.trim().to_owned()
    } else {
        config.hostname.clone()
    };
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory_bytes = mem_total(&read("/proc/meminfo")?);
    Ok(NodeDescription {
        hostname,
        platform: Some(Platform {
            architecture: std::env::consts::ARCH.to_owned(),
            os: std::env::consts::OS.to_owned(),
        }),
        resources: Some(Resources {
            nano_cpus: i64::try_from(cpus)
                .unwrap_or(i64::MAX)
                .saturating_mul(1_000_000_000),
            memory_bytes,
        }),
        engine_labels: config.engine_labels.iter().cloned().collect(),
        engine_version: config.engine_version.clone(),
        routes: Vec::new(),
        data_path_addr: config.data_path_addr.clone(),
        trust_root_digest: config.trust_root_digest.clone(),
    })
}

fn read(file: &'static str) -> Result<String, DescriptionError> {
    std::fs::read_to_string(file).map_err(|source| DescriptionError::Proc { file, source })
}

/// Bytes, from the "MemTotal:  123 kB" line; 0 if there is none.
fn mem_total(meminfo: &str) -> i64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kib| kib.parse::<i64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

async fn routes(handle: &Handle, own: Option<String>) -> Result<Vec<String>, DescriptionError> {
    let failed = |what| {
        move |error: rtnetlink::Error| DescriptionError::Netlink {
            what,
            reason: error.to_string(),
        }
    };
    let mut found = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for request in [v4, v6] {
        let mut dump = handle.route().get(request).execute();
        while let Some(route) = dump.try_next().await.map_err(failed("routes"))? {
            found.extend(destination(&route));
        }
    }
    let mut dump = handle.address().get().execute();
    while let Some(address) = dump.try_next().await.map_err(failed("addresses"))? {
        found.extend(subnet(&address));
    }
    let own = own.and_then(|own| own.parse::<IpNet>().ok());
    Ok(select(found, own))
}

/// What matters to the allocator: not the default routes, not what never leaves the node, and not
/// the gateway bridge, which every node has for itself.
fn select(found: BTreeSet<IpNet>, own: Option<IpNet>) -> Vec<String> {
    found
        .into_iter()
        .filter(|net| net.prefix_len() > 0)
        .filter(|net| !own.is_some_and(|own| own.contains(net)))
        .filter(|net| {
            let addr = net.addr();
            !addr.is_loopback() && !addr.is_multicast() && !is_link_local(addr)
        })
        .take(ROUTES_MAX)
        .map(|net| net.to_string())
        .collect()
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    if route.header.kind != RouteType::Unicast || route.header.table == TABLE_LOCAL {
        return None;
    }
    let addr = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => Some(IpAddr::V4(*addr)),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => Some(IpAddr::V6(*addr)),
            _ => None,
        })?;
    let net = IpNet::new(addr, route.header.destination_prefix_length).ok()?;
    Some(net.trunc())
}

fn subnet(address: &AddressMessage) -> Option<IpNet> {
    let addr = address
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(addr) => Some(*addr),
            _ => None,
        })?;
    let net = IpNet::new(addr, address.header.prefix_len).ok()?;
    Some(net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::fake::FakeDataplane;

    #[test]
    fn default_routes_own_bridge_and_local_scopes_are_left_out() {
        let nets = [
            "0.0.0.0/0",
            "10.1.0.0/16",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.18.0.0/16",
            "172.18.0.1/32",
            "192.168.1.0/24",
            "fe80::/64",
            "fd00::/64",
        ];
        let found = nets.iter().map(|net| net.parse().unwrap()).collect();
        let own = "172.18.0.0/16".parse().ok();
        let left = select(found, own);
        assert_eq!(left, ["10.1.0.0/16", "192.168.1.0/24", "fd00::/64"]);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(mem_total("MemTotal:       16 kB\nMemFree: 1 kB\n"), 16384);
        assert_eq!(mem_total("nothing"), 0);
    }

    #[tokio::test]
    async fn this_host_can_be_described() {
        let dataplane = FakeDataplane::new(Arc::default());
        let config = DescriptionConfig {
            data_path_addr: "10.0.0.1".to_owned(),
            ..Default::default()
        };
        let host = HostDescription::start(config, dataplane).await.unwrap();
        let description = host.watch().borrow().clone();
        assert!(!description.hostname.is_empty());
        let resources = description.resources.unwrap();
        assert!(resources.nano_cpus >= 1_000_000_000 && resources.memory_bytes > 0);
        assert!(!description.routes.iter().any(|r| r == "0.0.0.0/0"));
        host.stop().await;
    }
}
