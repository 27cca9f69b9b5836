//! Overlay networks: what their forwarding must hold, and the namespace that holds it.
//!
//! [`Forwarding::plan`] and [`Forwarding::changes`] are pure. An [`Overlay`] is one network on this node:
//! a namespace with a bridge and one VXLAN device per subnet. Where a frame goes is known from the endpoint
//! table alone: nothing is learned, nothing flooded, and the address questions of containers are
//! answered by the device itself and never leave the node.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use ipnet::Ipv4Net;
use swarm_proto::v1::EndpointEntry;
use swarm_proto::{NetworkId, TaskId};

use super::netns::{self, Netns};
use super::route::{Mac, Route, VethEnd, Vxlan};
use super::{NetworkError, NetworkView};

const BRIDGE: &str = "br0";
/// Group of the links in a sandbox.
pub const SANDBOX_LINKS: u32 = 42;
/// What VXLAN adds to a packet over IPv4.
const OVERHEAD: u32 = 50;

/// `02:42:` and the four bytes of the address.
#[must_use]
pub fn mac_of(addr: Ipv4Addr) -> Mac {
    let [a, b, c, d] = addr.octets();
    [0x02, 0x42, a, b, c, d]
}

/// An endpoint's address without the prefix length.
#[must_use]
pub fn endpoint_addr(endpoint: &EndpointEntry) -> Option<Ipv4Addr> {
    endpoint.addr.split('/').next()?.parse().ok()
}

/// Where the packets to other nodes leave from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The data-path address.
    pub addr: Ipv4Addr,
    /// UDP port.
    pub port: u16,
    /// Of the link that has the address.
    pub mtu: u32,
}

/// Where the endpoints on other nodes are: (VNI, address) → tunnel address. The Ethernet
/// address follows from the address, so this is both the neighbours and the forwarding table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding(BTreeMap<(u32, Ipv4Addr), Ipv4Addr>);

/// One step from one forwarding to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The endpoint is behind this tunnel address (now).
    Set {
        /// Network number.
        vni: u32,
        /// The endpoint.
        addr: Ipv4Addr,
        /// The node.
        vtep: Ipv4Addr,
    },
    /// The endpoint is gone, or has moved to this node.
    Remove {
        /// Network number.
        vni: u32,
        /// The endpoint.
        addr: Ipv4Addr,
    },
}

impl Forwarding {
    /// What the table says, for the node with this tunnel address. While an address passes from one task
    /// to another, two rows may name it: the one that is not being stopped counts, and removing
    /// the other changes nothing. An address that any live row places here is never sent elsewhere.
    #[must_use]
    pub fn plan<'a>(
        endpoints: impl IntoIterator<Item = &'a EndpointEntry>,
        here: Ipv4Addr,
    ) -> Self {
        let mut best: BTreeMap<(u32, Ipv4Addr), ((bool, bool), Ipv4Addr)> = BTreeMap::new();
        for endpoint in endpoints {
            let (Some(addr), Ok(vtep)) = (endpoint_addr(endpoint), endpoint.vtep.parse()) else {
                continue;
            };
            let rank = (!endpoint.draining, endpoint.ready);
            let row = best.entry((endpoint.vni, addr)).or_insert((rank, vtep));
            if rank > row.0 {
                *row = (rank, vtep);
            }
        }
        Self(
            best.into_iter()
                .filter(|(_, (_, vtep))| *vtep != here)
                .map(|(place, (_, vtep))| (place, vtep))
                .collect(),
        )
    }

    /// The steps from this to `new`: removals first.
    #[must_use]
    pub fn changes(&self, new: &Self) -> Vec<Step> {
        let removed = self
            .0
            .keys()
            .filter(|place| !new.0.contains_key(place))
            .map(|&(vni, addr)| Step::Remove { vni, addr });
        let set = new
            .0
            .iter()
            .filter(|(place, vtep)| self.0.get(place) != Some(vtep))
            .map(|(&(vni, addr), &vtep)| Step::Set { vni, addr, vtep });
        removed.chain(set).collect()
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Set { vni, addr, vtep } => {
                self.0.insert((vni, addr), vtep);
            }
            Step::Remove { vni, addr } => {
                self.0.remove(&(vni, addr));
            }
        }
    }
}

/// A VXLAN device and the subnet it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Network number.
    pub vni: u32,
    /// The subnet.
    pub subnet: Ipv4Net,
}

/// What must be built for a network, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The network.
    pub id: NetworkId,
    /// One VXLAN device each.
    pub segments: Vec<Segment>,
    /// Of bridge, VXLAN devices and endpoints.
    pub mtu: u32,
}

impl Shape {
    /// Checks what the managers sent, before the kernel is touched.
    pub fn parse(view: &NetworkView, underlay: Underlay) -> Result<Self, NetworkError> {
        let network = &view.network;
        let wrong = |what: String| NetworkError::Invalid(format!("network {}: {what}", network.id));
        let mut segments = Vec::new();
        for state in &network.subnets {
            let subnet = state.pool.as_ref().map_or("", |pool| pool.subnet.as_str());
            let subnet: Ipv4Net = subnet
                .parse()
                .map_err(|_| wrong(format!("{subnet:?} is no IPv4 subnet")))?;
            if state.vni == 0 || state.vni >= 1 << 24 {
                return Err(wrong(format!("{} is no VXLAN network number", state.vni)));
            }
            segments.push(Segment {
                vni: state.vni,
                subnet: subnet.trunc(),
            });
        }
        if segments.is_empty() {
            return Err(wrong("it has no subnet".to_owned()));
        }
        let room = underlay.mtu.saturating_sub(OVERHEAD);
        let mtu = if network.mtu == 0 { room } else { network.mtu };
        if !(68..=65535).contains(&mtu) {
            return Err(wrong(format!("{mtu} bytes is no usable packet size")));
        }
        Ok(Self {
            id: network.id.clone().into(),
            segments,
            mtu,
        })
    }
}

/// The first characters of an identifier, for names of links and files.
#[must_use]
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn vxlan_name(vni: u32) -> String {
    format!("vx{vni:06x}")
}

/// Name of the bridge's port for a task.
fn port_name(task: &TaskId) -> String {
    format!("p{}", short(task))
}

/// One network in this node's kernel.
#[derive(Debug)]
pub struct Overlay {
    netns: Netns,
    bridge: u32,
    mtu: u32,
    /// VNI → link, and what it was made with.
    devices: BTreeMap<u32, (u32, Vxlan)>,
    forwarding: Forwarding,
    /// The sandboxes attached to it.
    pub users: BTreeSet<TaskId>,
}

impl Overlay {
    /// Makes the namespace with its bridge, or adopts it with whatever is in it.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        if let Some(overlay) = Self::open(path)? {
            return Ok(overlay);
        }
        let netns = Netns::create(path, |route| {
            quiet();
            route.add_bridge(BRIDGE, 1500, None)
        })?;
        let adopted = Self::adopt(netns);
        if adopted.is_err() {
            let _ = netns::remove(path);
        }
        adopted
    }

    /// Adopts one that is there; `None` if there is none that could be used.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        match Netns::open(path)? {
            Some(netns) if netns.route.link(BRIDGE)?.is_some() => Self::adopt(netns).map(Some),
            _ => Ok(None),
        }
    }

    fn adopt(netns: Netns) -> io::Result<Self> {
        let links = netns.route.links()?;
        let bridge = links
            .iter()
            .find(|link| link.name == BRIDGE)
            .ok_or(io::ErrorKind::NotFound)?;
        let devices: BTreeMap<_, _> = links
            .iter()
            .filter_map(|link| link.vxlan.map(|vxlan| (vxlan.vni, (link.index, vxlan))))
            .collect();
        let forwarding = observe(&netns.route, &devices)?;
        Ok(Self {
            bridge: bridge.index,
            mtu: bridge.mtu,
            devices,
            forwarding,
            users: BTreeSet::new(),
            netns,
        })
    }

    /// Makes the VXLAN devices what the shape and underlay say.
    pub fn ensure_devices(
        &mut self,
        host: &Route,
        shape: &Shape,
        underlay: Underlay,
    ) -> io::Result<()> {
        let wanted: BTreeMap<u32, Vxlan> = shape
            .segments
            .iter()
            .map(|segment| {
                let vxlan = Vxlan {
                    vni: segment.vni,
                    local: underlay.addr,
                    port: underlay.port,
                };
                (segment.vni, vxlan)
            })
            .collect();
        let stale: Vec<u32> = self
            .devices
            .iter()
            .filter(|(vni, (_, vxlan))| wanted.get(vni) != Some(vxlan))
            .map(|(vni, _)| *vni)
            .collect();
        for vni in stale {
            self.netns.route.remove_link(&vxlan_name(vni))?;
            self.devices.remove(&vni);
            self.forwarding.0.retain(|(of, _), _| *of != vni);
        }
        for (vni, vxlan) in wanted {
            if self.devices.contains_key(&vni) {
                continue;
            }
            let name = vxlan_name(vni);
            host.add_vxlan(&name, vxlan, shape.mtu, self.netns.fd())?;
            // Its number may differ from what the host's namespace would have given it.
            let link = self
                .netns
                .route
                .link(&name)?
                .ok_or(io::ErrorKind::NotFound)?;
            self.netns.route.enslave(link.index, self.bridge)?;
            self.netns.route.stop_learning(link.index)?;
            self.devices.insert(vni, (link.index, vxlan));
        }
        if self.mtu != shape.mtu {
            for link in self.netns.route.links()? {
                if link.name != "lo" && link.mtu != shape.mtu {
                    self.netns.route.set_mtu(link.index, shape.mtu)?;
                }
            }
            self.mtu = shape.mtu;
        }
        Ok(())
    }

    /// Makes forwarding and neighbours what the table says.
    pub fn forward(&mut self, wanted: &Forwarding) -> io::Result<()> {
        for step in self.forwarding.changes(wanted) {
            let route = &self.netns.route;
            match step {
                Step::Set { vni, addr, vtep } => {
                    if let Some((link, _)) = self.devices.get(&vni) {
                        route.set_forwarding(*link, mac_of(addr), vtep)?;
                        route.set_station(*link, mac_of(addr))?;
                        route.set_neighbour(*link, addr, mac_of(addr))?;
                        self.forwarding.take(step);
                    }
                }
                Step::Remove { vni, addr } => {
                    if let Some((link, _)) = self.devices.get(&vni) {
                        route.remove_neighbour(*link, addr)?;
                        route.remove_station(*link, mac_of(addr))?;
                        route.remove_forwarding(*link, mac_of(addr))?;
                    }
                    self.forwarding.take(step);
                }
            }
        }
        Ok(())
    }

    /// Gives a sandbox its link `name` into this network. There already, and right: nothing is touched.
    pub fn attach(
        &mut self,
        task: &TaskId,
        sandbox: &Netns,
        name: &str,
        addr: Ipv4Net,
        subnets: &[Ipv4Net],
    ) -> io::Result<()> {
        self.users.insert(task.clone());
        let port = port_name(task);
        let mac = mac_of(addr.addr());
        let inside = sandbox.route.link(name)?;
        let right = inside.is_some_and(|link| link.mac == Some(mac))
            && self.netns.route.link(&port)?.is_some();
        if !right {
            sandbox.route.remove_link(name)?;
            self.netns.route.remove_link(&port)?;
            self.netns.route.add_veth(
                VethEnd {
                    name: &port,
                    mac: None,
                    netns: None,
                    master: Some(self.bridge),
                    group: 0,
                },
                VethEnd {
                    name,
                    mac: Some(mac),
                    netns: Some(sandbox.fd()),
                    group: SANDBOX_LINKS,
                    master: None,
                },
                self.mtu,
            )?;
        }
        let near = self
            .netns
            .route
            .link(&port)?
            .ok_or(io::ErrorKind::NotFound)?;
        self.netns.route.stop_learning(near.index)?;
        self.netns.route.set_station(near.index, mac)?;
        let link = sandbox.route.link(name)?.ok_or(io::ErrorKind::NotFound)?;
        sandbox.route.add_address(link.index, addr)?;
        sandbox.route.set_up(link.index)?;
        for subnet in subnets.iter().filter(|subnet| **subnet != addr.trunc()) {
            sandbox.route.set_route(link.index, *subnet, None)?;
        }
        Ok(())
    }

    /// Removes a sandbox's link. Already gone is success.
    pub fn detach(&mut self, task: &TaskId) -> io::Result<()> {
        self.users.remove(task);
        self.netns.route.remove_link(&port_name(task))
    }

    /// Removes links of sandboxes that are not attached.
    pub fn remove_strangers(&mut self) -> io::Result<()> {
        let known: BTreeSet<String> = self.users.iter().map(port_name).collect();
        for link in self.netns.route.links()? {
            if link.name.starts_with('p') && !known.contains(&link.name) {
                self.netns.route.remove_link(&link.name)?;
            }
        }
        Ok(())
    }

    /// Removes the network from the kernel. The devices go first: the namespace itself is freed later.
    pub fn destroy(self) -> io::Result<()> {
        let mut result = Ok(());
        for vni in self.devices.keys() {
            result = result.and(self.netns.route.remove_link(&vxlan_name(*vni)));
        }
        result.and(netns::remove(self.netns.path()))
    }
}

/// A bridge namespace speaks no IP of its own, and its frames are nobody else's business.
fn quiet() {
    for (path, value) in [
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        // Frames between containers must not be taken for routed packets where br_netfilter is loaded.
        ("bridge/bridge-nf-call-iptables", "0"),
        ("bridge/bridge-nf-call-ip6tables", "0"),
        ("bridge/bridge-nf-call-arptables", "0"),
    ] {
        // Absent where the kernel has no IPv6 or no br_netfilter: then there is nothing to turn off.
        if let Err(error) = netns::sysctl(path, value) {
            tracing::debug!(path, %error, "setting not available");
        }
    }
}

/// What forwarding the kernel holds. An entry with only one of its two halves is left out, and so written again.
fn observe(route: &Route, devices: &BTreeMap<u32, (u32, Vxlan)>) -> io::Result<Forwarding> {
    let vni_of: BTreeMap<u32, u32> = devices
        .iter()
        .map(|(vni, (link, _))| (*link, *vni))
        .collect();
    let tunnels: BTreeMap<(u32, Mac), Ipv4Addr> = route
        .forwarding()?
        .into_iter()
        .map(|(link, mac, vtep)| ((link, mac), vtep))
        .collect();
    let neighbours = route.neighbours()?;
    let known: BTreeSet<(u32, Mac)> = neighbours
        .iter()
        .map(|(link, _, mac)| (*link, *mac))
        .collect();
    for (link, mac) in tunnels.keys() {
        if vni_of.contains_key(link) && !known.contains(&(*link, *mac)) {
            route.remove_forwarding(*link, *mac)?;
        }
    }
    let mut found = Forwarding::default();
    for (link, addr, mac) in neighbours {
        let Some(vni) = vni_of.get(&link) else {
            continue;
        };
        match tunnels.get(&(link, mac)) {
            Some(vtep) if mac == mac_of(addr) => {
                found.0.insert((*vni, addr), *vtep);
            }
            _ => route.remove_neighbour(link, addr)?,
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(addr: u8, vtep: u8, ready: bool, draining: bool) -> EndpointEntry {
        EndpointEntry {
            addr: format!("10.0.1.{addr}/24"),
            vtep: format!("192.0.2.{vtep}"),
            vni: 4096,
            ready,
            draining,
            ..Default::default()
        }
    }

    fn here() -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, 1)
    }

    fn rows() -> impl Strategy<Value = Vec<EndpointEntry>> {
        proptest::collection::vec(
            (0u8..8, 1u8..4, any::<bool>(), any::<bool>())
                .prop_map(|(addr, vtep, ready, draining)| endpoint(addr, vtep, ready, draining)),
            0..12,
        )
    }

    proptest! {
        #[test]
        fn steps_lead_from_the_old_table_to_the_new(old in rows(), new in rows()) {
            let (old, new) = (Forwarding::plan(&old, here()), Forwarding::plan(&new, here()));
            let mut now = old.clone();
            for step in old.changes(&new) {
                now.take(step);
            }
            prop_assert_eq!(&now, &new);
            prop_assert!(new.changes(&new).is_empty());
        }

        #[test]
        fn nothing_is_sent_to_this_node_itself(rows in rows()) {
            let plan = Forwarding::plan(&rows, here());
            prop_assert!(plan.0.values().all(|vtep| *vtep != here()));
        }
    }

    #[test]
    fn the_old_row_of_a_moved_address_takes_nothing_with_it() {
        let (old, new) = (endpoint(5, 2, false, true), endpoint(5, 3, true, false));
        let both = Forwarding::plan([&old, &new], here());
        assert_eq!(both, Forwarding::plan([&new, &old], here()));
        assert!(both.changes(&Forwarding::plan([&new], here())).is_empty());
    }

    #[test]
    fn the_mac_is_made_of_the_address() {
        assert_eq!(
            mac_of(Ipv4Addr::new(10, 0, 1, 255)),
            [0x02, 0x42, 10, 0, 1, 255]
        );
    }

    #[test]
    fn rows_that_make_no_sense_are_passed_over() {
        let mut bad = endpoint(1, 2, true, false);
        bad.addr = "nonsense".into();
        let mut far = endpoint(2, 2, true, false);
        far.vtep = "::1".into();
        assert_eq!(
            Forwarding::plan([&bad, &far], here()),
            Forwarding::default()
        );
    }
}
