//! The node's gateway bridge: the way of containers to the outside, and of published ports to them.
//!
//! Lives in the host's namespace: one bridge, one link per sandbox, one nftables table with masquerade and the
//! published ports. Keeps no file: leases and ports are read back from the kernel. Containers do not
//! reach each other over it, except through a published port.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use ipnet::Ipv4Net;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket};
use swarm_proto::TaskId;
use swarm_proto::v1::{PortConfig, PortProtocol};

use super::NetworkError;
use super::netns::{self, Netns};
use super::nft::{Batch, Hook, Nft, TYPE_IPV4_PORT, TYPE_PROTO_PORT, Value};
use super::overlay::{SANDBOX_LINKS, mac_of, short};
use super::route::{Route, VethEnd};

/// Name of the bridge in the host's namespace.
pub const BRIDGE: &str = "swarm_gwbridge";
const PORTS: &str = "ports";

/// The host's namespace.
#[derive(Debug)]
pub struct Host {
    /// `None`: where this process is.
    pub netns: Option<File>,
    /// Its links.
    pub route: Route,
    /// Its packet rules.
    pub nft: Nft,
}

impl Host {
    /// Opens its sockets.
    pub fn open(netns: Option<File>) -> io::Result<Self> {
        let (route, nft) = netns::run_in(netns.as_ref().map(AsFd::as_fd), || {
            Ok((Route::open()?, Nft::open()?))
        })?;
        Ok(Self { netns, route, nft })
    }

    /// Its descriptor.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.netns.as_ref().map(AsFd::as_fd)
    }

    /// Runs `inside` in it.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        netns::run_in(self.fd(), inside)
    }
}

/// A host port that leads to a task. The bound socket keeps others from taking the port, and is never read.
#[derive(Debug)]
struct Binding {
    protocol: u8,
    host_port: u16,
    target: (Ipv4Addr, u16),
    _holder: Option<OwnedFd>,
}

impl Binding {
    fn element(&self) -> (Vec<u8>, Value) {
        let mut key = vec![self.protocol, 0, 0, 0];
        key.extend(self.host_port.to_be_bytes());
        key.extend([0, 0]);
        let mut value = self.target.0.octets().to_vec();
        value.extend(self.target.1.to_be_bytes());
        value.extend([0, 0]);
        (key, Value::Data(value))
    }
}

/// A published port, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPort {
    protocol: u8,
    published: u16,
    target: u16,
}

impl HostPort {
    /// Checks what the managers sent.
    pub fn parse(port: &PortConfig) -> Result<Self, NetworkError> {
        let protocol = match port.protocol() {
            PortProtocol::Tcp => libc::IPPROTO_TCP,
            PortProtocol::Udp => libc::IPPROTO_UDP,
            other => {
                return Err(NetworkError::Invalid(format!(
                    "a host port of protocol {} is not supported; use tcp or udp",
                    other.as_str_name()
                )));
            }
        };
        let number = |value: u32| {
            u16::try_from(value)
                .map_err(|_| NetworkError::Invalid(format!("{value} is no port number")))
        };
        let target = number(port.target_port)?;
        if target == 0 {
            return Err(NetworkError::Invalid("a target port of 0".to_owned()));
        }
        Ok(Self {
            protocol: protocol as u8,
            published: number(port.published_port)?,
            target,
        })
    }
}

/// The bridge as it is.
#[derive(Clone, Copy, Debug)]
struct Bridge {
    index: u32,
    addr: Ipv4Net,
}

/// The gateway bridge and who is on it.
#[derive(Debug, Default)]
pub struct Gateway {
    bridge: Option<Bridge>,
    leases: BTreeMap<TaskId, Ipv4Addr>,
    bindings: BTreeMap<TaskId, Vec<Binding>>,
    last: u32,
}

fn kernel(step: &str) -> impl FnOnce(io::Error) -> NetworkError + '_ {
    move |error| NetworkError::Kernel {
        step: step.to_owned(),
        reason: error.to_string(),
    }
}

/// Name of the host's end of a sandbox's link.
fn port_name(task: &TaskId) -> String {
    format!("swg{}", short(task))
}

impl Gateway {
    /// CIDR of the bridge, once it is there.
    #[must_use]
    pub fn subnet(&self) -> Option<Ipv4Net> {
        self.bridge.map(|bridge| bridge.addr.trunc())
    }

    /// A sandbox's address and host ports.
    #[must_use]
    pub fn holding(&self, task: &TaskId) -> Option<(Ipv4Addr, Vec<u16>)> {
        let bound = self
            .bindings
            .get(task)
            .map(|bindings| bindings.iter().map(|b| b.host_port).collect())
            .unwrap_or_default();
        Some((*self.leases.get(task)?, bound))
    }

    /// Adopts what an earlier process left: the bridge, the addresses and ports of these sandboxes; removes
    /// the links and ports of all others.
    pub fn adopt<'a>(
        &mut self,
        host: &Host,
        sandboxes: impl Iterator<Item = (&'a TaskId, &'a Netns, &'a [HostPort])>,
    ) -> Result<(), NetworkError> {
        let links = host
            .route
            .links()
            .map_err(kernel("list the host's links"))?;
        let addresses = host
            .route
            .addresses()
            .map_err(kernel("list the host's addresses"))?;
        self.bridge = links.iter().find(|l| l.name == BRIDGE).and_then(|link| {
            let (_, addr) = addresses.iter().find(|(index, _)| *index == link.index)?;
            Some(Bridge {
                index: link.index,
                addr: *addr,
            })
        });
        let Some(bridge) = self.bridge else {
            return Ok(());
        };
        let known = host
            .nft
            .elements(PORTS)
            .map_err(kernel("read the published ports"))?;
        let mut mine = Vec::new();
        for (task, sandbox, ports) in sandboxes {
            mine.push(port_name(task));
            let inside = sandbox
                .route
                .addresses()
                .map_err(kernel("list a sandbox's addresses"))?;
            let Some((_, addr)) = inside
                .into_iter()
                .find(|(_, addr)| bridge.addr.contains(&addr.addr()))
            else {
                continue;
            };
            let addr = addr.addr();
            self.leases.insert(task.clone(), addr);
            let bindings = self.bindings.entry(task.clone()).or_default();
            for port in ports {
                let found = known
                    .iter()
                    .filter_map(|(key, value)| {
                        let host_port = u16::from_be_bytes(key.get(4..6)?.try_into().ok()?);
                        let target: [u8; 4] = value.get(..4)?.try_into().ok()?;
                        let target_port = u16::from_be_bytes(value.get(4..6)?.try_into().ok()?);
                        (*key.first()? == port.protocol
                            && Ipv4Addr::from(target) == addr
                            && target_port == port.target
                            && (port.published == 0 || port.published == host_port))
                            .then_some(host_port)
                    })
                    .find(|found| !bindings.iter().any(|b| b.host_port == *found));
                if let Some(host_port) = found {
                    bindings.push(Binding {
                        protocol: port.protocol,
                        host_port,
                        target: (addr, port.target),
                        // Taken meanwhile by a program of the host: the rule keeps its effect.
                        _holder: hold(host, port.protocol, host_port).ok().map(|(fd, _)| fd),
                    });
                }
            }
        }
        for link in links.iter().filter(|l| l.name.starts_with("swg")) {
            if mine.contains(&link.name) {
                set_port(host, link.index).map_err(kernel("set up a port of the bridge"))?;
            } else {
                host.route
                    .remove_link(&link.name)
                    .map_err(kernel("remove a link nobody owns"))?;
            }
        }
        self.prepare_host(host, bridge.addr)
    }

    /// Settings and rules of the host, in one step in place of what is there.
    fn prepare_host(&self, host: &Host, bridge: Ipv4Net) -> Result<(), NetworkError> {
        host.run(|| {
            netns::sysctl("ipv4/ip_forward", "1")?;
            // A published port also answers at 127.0.0.1.
            netns::sysctl(&format!("ipv4/conf/{BRIDGE}/route_localnet"), "1")?;
            let _ = netns::sysctl(&format!("ipv6/conf/{BRIDGE}/disable_ipv6"), "1");
            Ok(())
        })
        .map_err(kernel("turn on forwarding"))?;
        host.nft
            .commit(self.rules(bridge))
            .map_err(kernel("write the host's packet rules"))
    }

    fn rules(&self, bridge: Ipv4Net) -> Batch {
        let net = bridge.trunc();
        let hook = |kind, hook, priority| {
            Some(Hook {
                kind,
                hook,
                priority,
            })
        };
        let mut batch = Batch::default();
        batch.replace_table();
        batch.add_set(PORTS, (TYPE_PROTO_PORT, 8), Some((TYPE_IPV4_PORT, 8)));
        let elements: Vec<_> = self
            .bindings
            .values()
            .flatten()
            .map(Binding::element)
            .collect();
        batch.add_elements(PORTS, &elements);
        // The host's loopback is not the containers' business.
        batch.add_chain("guard", hook("filter", 0, -300));
        batch.add_rule("guard", |rule| {
            rule.arrives_by(BRIDGE, true)
                .destination_in(Ipv4Net::new_assert([127, 0, 0, 0].into(), 8))
                .drop();
        });
        for (chain, number) in [("publish", 0), ("publish-local", 3)] {
            batch.add_chain(chain, hook("nat", number, -100));
            batch.add_rule(chain, |rule| {
                rule.is_local(true)
                    .load_protocol_and_port()
                    .look_up((PORTS, None))
                    .translate(true);
            });
        }
        // Only seen where br_netfilter shows bridged packets to these hooks; elsewhere the ports are isolated.
        batch.add_chain("separate", hook("filter", 2, 0));
        batch.add_rule("separate", |rule| {
            rule.arrives_by(BRIDGE, true)
                .leaves_by(BRIDGE, true)
                .is_new_and_direct()
                .drop();
        });
        batch.add_chain("leave", hook("nat", 4, 100));
        // To the outside; from the host itself (also from 127.0.0.1); and from one container to another's port.
        batch.add_rule("leave", |rule| {
            rule.source_in(net).leaves_by(BRIDGE, false).masquerade();
        });
        batch.add_rule("leave", |rule| {
            rule.leaves_by(BRIDGE, true).is_local(false).masquerade();
        });
        batch.add_rule("leave", |rule| {
            rule.source_in(net)
                .leaves_by(BRIDGE, true)
                .is_translated()
                .masquerade();
        });
        batch
    }

    fn ensure_bridge(
        &mut self,
        host: &Host,
        pools: &[Ipv4Net],
        mtu: u32,
    ) -> Result<Bridge, NetworkError> {
        if let Some(bridge) = self.bridge {
            return Ok(bridge);
        }
        let routes = host
            .route
            .routes()
            .map_err(kernel("list the host's routes"))?;
        let pool = pools
            .iter()
            .find(|pool| {
                !routes.iter().any(|(_, route)| {
                    route.contains(&pool.network()) || pool.contains(&route.network())
                })
            })
            .ok_or_else(|| {
                NetworkError::Invalid(
                    "no subnet for the gateway bridge: routes of this host overlap all of them"
                        .to_owned(),
                )
            })?;
        let addr = Ipv4Net::new(
            Ipv4Addr::from(u32::from(pool.network()) + 1),
            pool.prefix_len(),
        )
        .map_err(|error| NetworkError::Invalid(error.to_string()))?;
        // Its own Ethernet address, or it would change with the links on it.
        host.route
            .add_bridge(BRIDGE, mtu, Some(mac_of(addr.addr())))
            .map_err(kernel("create the gateway bridge"))?;
        let made = (|| {
            let link = host
                .route
                .link(BRIDGE)?
                .ok_or(io::Error::from(io::ErrorKind::NotFound))?;
            host.route.add_address(link.index, addr)?;
            Ok(Bridge {
                index: link.index,
                addr,
            })
        })()
        .map_err(kernel("set up the gateway bridge"))
        .and_then(|bridge| self.prepare_host(host, addr).map(|()| bridge));
        match made {
            Ok(bridge) => {
                self.bridge = Some(bridge);
                Ok(bridge)
            }
            Err(error) => {
                let _ = host.nft.clear();
                let _ = host.route.remove_link(BRIDGE);
                Err(error)
            }
        }
    }

    fn lease(&mut self, task: &TaskId, bridge: Bridge) -> Result<Ipv4Addr, NetworkError> {
        if let Some(addr) = self.leases.get(task) {
            return Ok(*addr);
        }
        let first = u32::from(bridge.addr.network());
        let size = u32::from(bridge.addr.broadcast()) - first;
        let taken: std::collections::BTreeSet<u32> =
            self.leases.values().map(|addr| u32::from(*addr)).collect();
        // The next one after the last given out, so that an address rests before it is used again.
        for step in 1..size {
            let offset = 2 + (self.last + step - 1) % size.saturating_sub(2).max(1);
            if offset < size && !taken.contains(&(first + offset)) {
                self.last = offset - 1;
                let addr = Ipv4Addr::from(first + offset);
                self.leases.insert(task.clone(), addr);
                return Ok(addr);
            }
        }
        Err(NetworkError::Invalid(format!(
            "no address left on the gateway bridge ({})",
            bridge.addr.trunc()
        )))
    }

    /// Gives a sandbox its link `name` to the outside, with the default route.
    pub fn attach(
        &mut self,
        host: &Host,
        pools: &[Ipv4Net],
        mtu: u32,
        task: &TaskId,
        sandbox: &Netns,
        name: &str,
    ) -> Result<Ipv4Addr, NetworkError> {
        let bridge = self.ensure_bridge(host, pools, mtu)?;
        let addr = self.lease(task, bridge)?;
        let port = port_name(task);
        (|| {
            let there = sandbox
                .route
                .link(name)?
                .is_some_and(|link| link.mac == Some(mac_of(addr)));
            if !there || host.route.link(&port)?.is_none() {
                sandbox.route.remove_link(name)?;
                host.route.remove_link(&port)?;
                host.route.add_veth(
                    VethEnd {
                        name: &port,
                        mac: None,
                        netns: None,
                        master: Some(bridge.index),
                        group: 0,
                    },
                    VethEnd {
                        name,
                        mac: Some(mac_of(addr)),
                        netns: Some(sandbox.fd()),
                        group: SANDBOX_LINKS,
                        master: None,
                    },
                    mtu,
                )?;
            }
            let near = host.route.link(&port)?.ok_or(io::ErrorKind::NotFound)?;
            set_port(host, near.index)?;
            let far = sandbox.route.link(name)?.ok_or(io::ErrorKind::NotFound)?;
            let with_prefix = Ipv4Net::new(addr, bridge.addr.prefix_len())
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            sandbox.route.add_address(far.index, with_prefix)?;
            sandbox.route.set_up(far.index)?;
            sandbox
                .route
                .set_route(far.index, Ipv4Net::default(), Some(bridge.addr.addr()))
        })()
        .map_err(kernel("attach the sandbox to the gateway bridge"))?;
        Ok(addr)
    }

    /// Publishes ports of a sandbox on the host: all of them, or none. Returns the host's port numbers in order.
    pub fn publish(
        &mut self,
        host: &Host,
        task: &TaskId,
        ports: &[HostPort],
    ) -> Result<Vec<u16>, NetworkError> {
        if let Some(bindings) = self.bindings.get(task)
            && bindings.len() == ports.len()
        {
            return Ok(bindings.iter().map(|binding| binding.host_port).collect());
        }
        let Some(addr) = self.leases.get(task).copied() else {
            return match ports {
                [] => Ok(Vec::new()),
                _ => Err(NetworkError::Invalid(
                    "a port cannot be published from internal networks alone".to_owned(),
                )),
            };
        };
        self.unpublish(host, task)?;
        let mut bindings = Vec::new();
        for port in ports {
            let (holder, host_port) =
                hold(host, port.protocol, port.published).map_err(|error| {
                    match error.raw_os_error() {
                        Some(libc::EADDRINUSE) => NetworkError::PortTaken {
                            port: u32::from(port.published),
                        },
                        _ => kernel("bind a published port")(error),
                    }
                })?;
            bindings.push(Binding {
                protocol: port.protocol,
                host_port,
                target: (addr, port.target),
                _holder: Some(holder),
            });
        }
        let mut batch = Batch::default();
        let elements: Vec<_> = bindings.iter().map(Binding::element).collect();
        batch.add_elements(PORTS, &elements);
        host.nft.commit(batch).map_err(kernel("publish a port"))?;
        let numbers = bindings.iter().map(|binding| binding.host_port).collect();
        self.bindings.insert(task.clone(), bindings);
        Ok(numbers)
    }

    fn unpublish(&mut self, host: &Host, task: &TaskId) -> Result<(), NetworkError> {
        let Some(bindings) = self.bindings.get(task).filter(|b| !b.is_empty()) else {
            return Ok(());
        };
        let mut batch = Batch::default();
        let elements: Vec<_> = bindings.iter().map(Binding::element).collect();
        batch.remove_elements(PORTS, &elements);
        super::netlink::ignore_gone(host.nft.commit(batch))
            .map_err(kernel("withdraw a published port"))?;
        // A stream of datagrams would follow its old translation for ever, past the port's next owner.
        let udp: Vec<Ipv4Addr> = bindings
            .iter()
            .filter(|binding| i32::from(binding.protocol) == libc::IPPROTO_UDP)
            .map(|binding| binding.target.0)
            .collect();
        self.bindings.remove(task);
        if udp.is_empty() {
            return Ok(());
        }
        host.nft
            .forget_connections(|protocol, _, answers| {
                i32::from(protocol) == libc::IPPROTO_UDP && udp.contains(&answers)
            })
            .map_err(kernel("forget the flows of a published port"))
    }

    /// Takes a sandbox off the bridge. Already gone is success.
    pub fn detach(&mut self, host: &Host, task: &TaskId) -> Result<(), NetworkError> {
        let unpublished = self.unpublish(host, task);
        if self.leases.remove(task).is_some() {
            host.route
                .remove_link(&port_name(task))
                .map_err(kernel("remove a link of the gateway bridge"))?;
        }
        unpublished
    }

    /// Removes bridge and rules from the host.
    pub fn teardown(&mut self, host: &Host) -> Result<(), NetworkError> {
        *self = Self::default();
        let rules = host
            .nft
            .clear()
            .map_err(kernel("remove the host's packet rules"));
        host.route
            .remove_link(BRIDGE)
            .map_err(kernel("remove the gateway bridge"))
            .and(rules)
    }
}

/// Keeps containers apart on the bridge, but lets them use each other's published ports, and their own.
///
/// Where br_netfilter is on, a packet to a published port is translated while still in the bridge, and goes
/// from port to port (perhaps the same): that must be allowed, and the packet rules keep the rest apart. The setting is
/// the host's (other programs rely on it), so we go by it. Where it is off, such a packet takes the
/// way through the host, and ports can be isolated.
fn set_port(host: &Host, index: u32) -> io::Result<()> {
    let filtered = host.run(|| {
        let setting = std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables");
        Ok(setting.is_ok_and(|setting| setting.trim() == "1"))
    })?;
    host.route.set_port(index, !filtered, filtered)
}

/// Binds a port on all of the host's addresses, so that no other program takes it. 0 = any free one.
fn hold(host: &Host, protocol: u8, port: u16) -> io::Result<(OwnedFd, u16)> {
    let kind = if i32::from(protocol) == libc::IPPROTO_UDP {
        SockType::Datagram
    } else {
        SockType::Stream
    };
    host.run(move || {
        let holder = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
        bind(holder.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
        let bound: SockaddrIn = getsockname(holder.as_raw_fd())?;
        Ok((holder, bound.port()))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bridge(prefix: u8) -> Bridge {
        Bridge {
            index: 1,
            addr: Ipv4Net::new(Ipv4Addr::new(172, 18, 0, 1), prefix).unwrap(),
        }
    }

    proptest! {
        #[test]
        fn leases_are_unique_and_inside_the_subnet(
            prefix in 24u8..=29,
            steps in proptest::collection::vec((any::<bool>(), 0u8..40), 0..200),
        ) {
            let bridge = bridge(prefix);
            let mut gateway = Gateway::default();
            for (take, task) in steps {
                let task = TaskId::from(task.to_string());
                if !take {
                    gateway.leases.remove(&task);
                    continue;
                }
                let room = (1usize << (32 - prefix)) - 3;
                let full = gateway.leases.len() >= room && !gateway.leases.contains_key(&task);
                match gateway.lease(&task, bridge) {
                    Ok(addr) => {
                        prop_assert!(bridge.addr.contains(&addr));
                        prop_assert!(addr != bridge.addr.addr());
                        prop_assert!(addr != bridge.addr.network() && addr != bridge.addr.broadcast());
                        let holders = gateway.leases.values().filter(|held| **held == addr).count();
                        prop_assert_eq!(holders, 1);
                    }
                    Err(_) => prop_assert!(full, "{} of {room}", gateway.leases.len()),
                }
            }
        }
    }

    #[test]
    fn an_address_rests_before_it_is_given_out_again() {
        let mut gateway = Gateway::default();
        let (one, two) = (TaskId::from("one"), TaskId::from("two"));
        let first = gateway.lease(&one, bridge(24)).unwrap();
        gateway.leases.remove(&one);
        assert_ne!(gateway.lease(&two, bridge(24)).unwrap(), first);
    }

    #[test]
    fn ports_that_make_no_sense_are_refused() {
        let port = |published_port, target_port, protocol: PortProtocol| PortConfig {
            published_port,
            target_port,
            protocol: protocol.into(),
            ..Default::default()
        };
        assert!(HostPort::parse(&port(80, 80, PortProtocol::Tcp)).is_ok());
        assert!(HostPort::parse(&port(0, 80, PortProtocol::Udp)).is_ok());
        for bad in [
            port(80, 0, PortProtocol::Tcp),
            port(65536, 80, PortProtocol::Tcp),
            port(80, 65536, PortProtocol::Tcp),
            port(80, 80, PortProtocol::Sctp),
        ] {
            assert!(HostPort::parse(&bad).is_err(), "{bad:?}");
        }
    }
}
