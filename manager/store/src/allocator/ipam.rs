//! Subnets and VNIs of networks, addresses on them, and who waits for one.

use std::net::{IpAddr, Ipv4Addr};

use imbl::{OrdMap, OrdSet};
use ipnet::{IpNet, Ipv4Net};
use swarm_proto::defaults::{ADDRESS_POOL, SUBNET_PREFIX, VNI_MAX, VNI_MIN};
use swarm_proto::v1::rejection::Code;
use swarm_proto::v1::{Cluster, IpamPool, Network, Node, SubnetState};
use swarm_proto::{NetworkId, NodeId, ServiceId, TaskId};

use super::ranges::FreeRanges;
use crate::apply::refuse;
use crate::state::Rejection;

/// Where nodes put their gateway bridge unless it is taken: not chosen for an
/// overlay, whether or not a node has told of the bridge yet.
const GATEWAY_BRIDGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 18, 0, 0), 16);

/// Everything that is handed out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ipam {
    /// The subnets of each network, in the order of its `subnets`.
    pools: OrdMap<NetworkId, Vec<Pool>>,
    /// First address → last address and owner. They do not overlap.
    subnets: OrdMap<u32, (u32, NetworkId)>,
    /// Destinations of the nodes' routes: (first address, prefix length) → who has it.
    routes: OrdMap<(u32, u8), OrdSet<NodeId>>,
    vnis: FreeRanges,
    /// Who waits for an address of which network, in the order of their turns.
    waiting: OrdMap<NetworkId, OrdMap<u64, Waiter>>,
    turns: OrdMap<Waiter, (NetworkId, u64)>,
    /// The next turn to give out: rises with each new waiter.
    next_turn: u64,
}

/// One subnet of a network.
#[derive(Clone, Debug, PartialEq)]
struct Pool {
    prefix: u8,
    first: u32,
    last: u32,
    free: FreeRanges,
    /// Where the next search starts.
    next: u32,
}

/// Somebody for whom there was no address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Waiter {
    Task(TaskId),
    Service(ServiceId),
}

/// This network has no free address.
#[derive(Debug)]
pub(crate) struct Exhausted(pub(crate) NetworkId);

impl Default for Ipam {
    fn default() -> Self {
        Self {
            pools: OrdMap::new(),
            subnets: OrdMap::new(),
            routes: OrdMap::new(),
            vnis: FreeRanges::new(VNI_MIN, VNI_MAX),
            waiting: OrdMap::new(),
            turns: OrdMap::new(),
            next_turn: 0,
        }
    }
}

// --- Networks ---------------------------------------------------------------

impl Ipam {
    /// Chooses or checks the subnets of a new network and gives each a VNI.
    pub(crate) fn add_network(
        &mut self,
        network: &mut Network,
        cluster: Option<&Cluster>,
        names: &Names<'_>,
    ) -> Result<(), Rejection> {
        let ipam = network.spec.as_ref().and_then(|spec| spec.ipam.clone());
        let ipam = ipam.unwrap_or_default();
        if !matches!(ipam.driver.as_str(), "" | "default") {
            let message = format!(
                "IPAM driver {} is not supported, only default is",
                ipam.driver
            );
            return Err(refuse(Code::Invalid, message));
        }
        let mut wanted = ipam.configs;
        if wanted.is_empty() {
            wanted.push(IpamPool::default());
        }
        let id = NetworkId::from(&network.id);
        network.subnets.clear();
        let mut pools = Vec::with_capacity(wanted.len());
        for config in wanted {
            let subnet = match config.subnet.is_empty() {
                true => self.choose_subnet(&config, cluster)?,
                false => self.check_subnet(&config.subnet, &id, names)?,
            };
            let (pool, ip_pool) = Pool::new(subnet, &config)?;
            let vni = self.vnis.take_from(VNI_MIN);
            let vni = vni.ok_or_else(|| refuse(Code::PoolExhausted, "no VNI is left"))?;
            self.subnets.insert(pool.first, (pool.last, id.clone()));
            pools.push(pool);
            network.subnets.push(SubnetState {
                pool: Some(ip_pool),
                vni,
            });
        }
        self.pools.insert(id, pools);
        Ok(())
    }

    /// A network whose subnets were chosen before, as a snapshot has it.
    pub(crate) fn restore_network(&mut self, network: &Network) -> Result<(), Rejection> {
        let id = NetworkId::from(&network.id);
        let mut pools = Vec::with_capacity(network.subnets.len());
        for state in &network.subnets {
            let config = state.pool.clone().unwrap_or_default();
            let (pool, _) = Pool::new(parse_subnet(&config.subnet)?, &config)?;
            if self.first_overlap(pool.first, pool.last).is_some() || !self.vnis.take(state.vni) {
                let message = format!("network {} holds what another one holds", network.id);
                return Err(refuse(Code::Invalid, message));
            }
            self.subnets.insert(pool.first, (pool.last, id.clone()));
            pools.push(pool);
        }
        self.pools.insert(id, pools);
        Ok(())
    }

    pub(crate) fn remove_network(&mut self, network: &Network) {
        for pool in self.pools.remove(network.id.as_str()).into_iter().flatten() {
            self.subnets.remove(&pool.first);
        }
        for subnet in &network.subnets {
            self.vnis.give(subnet.vni);
        }
    }

    fn choose_subnet(
        &self,
        config: &IpamPool,
        cluster: Option<&Cluster>,
    ) -> Result<Ipv4Net, Rejection> {
        if !config.gateway.is_empty() || !config.ip_range.is_empty() {
            let message = "a gateway or an IP range needs a subnet";
            return Err(refuse(Code::Invalid, message));
        }
        let pools = address_pools(cluster)?;
        let prefix = subnet_prefix(cluster);
        for pool in &pools {
            let size = 1u64 << (32 - prefix);
            let end = u64::from(u32::from(pool.broadcast())) + 1;
            let mut at = u64::from(u32::from(pool.network()));
            while at + size <= end {
                let (first, last) = (at as u32, (at + size - 1) as u32);
                let Some(taken_to) = self.conflict(first, last) else {
                    return Ok(Ipv4Net::new_assert(Ipv4Addr::from(first), prefix));
                };
                at = (u64::from(taken_to.max(last)) + 1).next_multiple_of(size);
            }
        }
        let listed: Vec<String> = pools.iter().map(ToString::to_string).collect();
        let message = format!(
            "no /{prefix} subnet is left in the address pools {} that overlaps no network and no \
             route of a node; give one with --subnet or remove unused networks",
            listed.join(", ")
        );
        Err(refuse(Code::PoolExhausted, message))
    }

    /// The last address of something that overlaps `first..=last`.
    fn conflict(&self, first: u32, last: u32) -> Option<u32> {
        let bridge = (
            u32::from(GATEWAY_BRIDGE.network()),
            u32::from(GATEWAY_BRIDGE.broadcast()),
        );
        if first <= bridge.1 && bridge.0 <= last {
            return Some(bridge.1);
        }
        if let Some((_, end, _)) = self.first_overlap(first, last) {
            return Some(end);
        }
        self.route_overlap(first, last)
            .map(|(route, _)| route.broadcast().into())
    }

    fn check_subnet(
        &self,
        text: &str,
        id: &NetworkId,
        names: &Names<'_>,
    ) -> Result<Ipv4Net, Rejection> {
        let subnet = parse_subnet(text)?;
        let (first, last) = (subnet.network().into(), subnet.broadcast().into());
        if let Some((other_first, other_last, owner)) = self.first_overlap(first, last) {
            let prefix = (other_last - other_first).leading_zeros() as u8;
            let other = Ipv4Net::new_assert(Ipv4Addr::from(other_first), prefix);
            let message = match owner == id {
                true => format!("subnet {subnet} overlaps subnet {other} of the same network"),
                false => format!(
                    "subnet {subnet} overlaps subnet {other} of network {}",
                    (names.network)(owner)
                ),
            };
            return Err(refuse(Code::SubnetOverlap, message));
        }
        if let Some((route, nodes)) = self.route_overlap(first, last) {
            let node = nodes
                .get_min()
                .map(|node| (names.node)(node))
                .unwrap_or_default();
            let message = format!("subnet {subnet} overlaps route {route} of node {node}");
            return Err(refuse(Code::SubnetOverlap, message));
        }
        Ok(subnet)
    }

    fn first_overlap(&self, first: u32, last: u32) -> Option<(u32, u32, &NetworkId)> {
        // Subnets do not overlap each other: of those that begin before the
        // end, the last one is the only candidate that can reach furthest.
        let (&other, (end, owner)) = self.subnets.get_prev(&last)?;
        (*end >= first).then_some((other, *end, owner))
    }

    fn route_overlap(&self, first: u32, last: u32) -> Option<(Ipv4Net, &OrdSet<NodeId>)> {
        let net = |(start, prefix)| Ipv4Net::new_assert(Ipv4Addr::from(start), prefix);
        // Those that hold the first address...
        for prefix in 1..=32u8 {
            let key = (first & (u32::MAX << (32 - prefix)), prefix);
            if let Some(nodes) = self.routes.get(&key) {
                return Some((net(key), nodes));
            }
        }
        // ...and those that begin further on.
        let (&key, nodes) = self.routes.get_next(&(first, 0))?;
        (key.0 <= last).then(|| (net(key), nodes))
    }
}

/// How people call what is in the way.
pub(crate) struct Names<'a> {
    pub(crate) network: &'a dyn Fn(&NetworkId) -> String,
    pub(crate) node: &'a dyn Fn(&NodeId) -> String,
}

/// The pools that subnets are cut from.
pub(crate) fn address_pools(cluster: Option<&Cluster>) -> Result<Vec<Ipv4Net>, Rejection> {
    let listed = cluster.map_or(&[][..], |cluster| &cluster.default_addr_pool);
    let default = [ADDRESS_POOL.to_owned()];
    let listed = if listed.is_empty() { &default } else { listed };
    let prefix = subnet_prefix(cluster);
    let pools = listed.iter().map(|text| {
        let pool = parse_subnet(text)?;
        match pool.prefix_len() <= prefix && prefix <= 29 {
            true => Ok(pool),
            false => {
                let message = format!("no /{prefix} subnet can be cut from address pool {pool}");
                Err(refuse(Code::Invalid, message))
            }
        }
    });
    pools.collect()
}

fn subnet_prefix(cluster: Option<&Cluster>) -> u8 {
    match cluster.map_or(0, |cluster| cluster.subnet_size) {
        0 => SUBNET_PREFIX,
        size => u8::try_from(size).unwrap_or(u8::MAX),
    }
}

fn parse_subnet(text: &str) -> Result<Ipv4Net, Rejection> {
    let invalid = |why: &str| refuse(Code::Invalid, format!("invalid subnet {text}: {why}"));
    match text.parse::<IpNet>() {
        Ok(IpNet::V4(net)) if net.trunc() != net => {
            Err(invalid(&format!("it should be {}", net.trunc())))
        }
        Ok(IpNet::V4(net)) if net.prefix_len() == 0 => Err(invalid("it is the whole Internet")),
        Ok(IpNet::V4(net)) => Ok(net),
        Ok(IpNet::V6(_)) => Err(invalid("only IPv4 is supported")),
        Err(_) => Err(invalid("it should look like 10.50.1.0/24")),
    }
}

fn parse_address(what: &str, text: &str) -> Result<Ipv4Addr, Rejection> {
    let parsed = text.parse();
    parsed.map_err(|_| {
        refuse(
            Code::Invalid,
            format!("invalid {what} {text}: it should look like 10.50.1.1"),
        )
    })
}

impl Pool {
    /// The addresses that may be given out, and the configuration with nothing left open.
    fn new(subnet: Ipv4Net, config: &IpamPool) -> Result<(Self, IpamPool), Rejection> {
        let invalid = |message: String| Err(refuse(Code::Invalid, message));
        if subnet.prefix_len() > 29 {
            return invalid(format!(
                "subnet {subnet} is too small: the smallest is a /29"
            ));
        }
        let (first, last) = (u32::from(subnet.network()), u32::from(subnet.broadcast()));
        let gateway = match config.gateway.as_str() {
            "" => Ipv4Addr::from(first + 1),
            text => parse_address("gateway", text)?,
        };
        if !(first + 1..last).contains(&u32::from(gateway)) {
            return invalid(format!(
                "gateway {gateway} is no host address of subnet {subnet}"
            ));
        }
        let (mut from, mut to) = (first + 1, last - 1);
        if !config.ip_range.is_empty() {
            let range = parse_subnet(&config.ip_range).map_err(|rejection| Rejection {
                message: rejection
                    .message
                    .replace("invalid subnet", "invalid IP range"),
                ..rejection
            })?;
            if !subnet.contains(&range) {
                return invalid(format!("IP range {range} is not in subnet {subnet}"));
            }
            from = from.max(range.network().into());
            to = to.min(range.broadcast().into());
        }
        let mut free = FreeRanges::new(from, to);
        free.take(gateway.into());
        let pool = Self {
            prefix: subnet.prefix_len(),
            first,
            last,
            free,
            next: from,
        };
        let config = IpamPool {
            subnet: subnet.to_string(),
            ip_range: config.ip_range.clone(),
            gateway: gateway.to_string(),
        };
        Ok((pool, config))
    }
}

// --- Routes of nodes -----------------------------------------------------------

impl Ipam {
    /// A node's description has changed from `old` to `new`.
    pub(crate) fn note_routes(&mut self, id: &NodeId, old: Option<&Node>, new: Option<&Node>) {
        let listed = |node: Option<&Node>| {
            let description = node.and_then(|node| node.description.as_ref());
            description
                .map_or(&[][..], |description| &description.routes[..])
                .to_vec()
        };
        let (old, new) = (listed(old), listed(new));
        if old == new {
            return;
        }
        for key in old.iter().filter_map(|text| route_key(text)) {
            if let Some(nodes) = self.routes.get_mut(&key) {
                nodes.remove(id);
                if nodes.is_empty() {
                    self.routes.remove(&key);
                }
            }
        }
        for key in new.iter().filter_map(|text| route_key(text)) {
            match self.routes.get_mut(&key) {
                Some(nodes) => {
                    nodes.insert(id.clone());
                }
                None => {
                    self.routes.insert(key, OrdSet::unit(id.clone()));
                }
            }
        }
    }
}

/// A default route is in nobody's way; nor is what is not IPv4 or not understood.
fn route_key(text: &str) -> Option<(u32, u8)> {
    let net = match text.parse::<IpNet>() {
        Ok(IpNet::V4(net)) => net,
        Ok(IpNet::V6(_)) => return None,
        Err(_) => Ipv4Net::from(text.parse::<Ipv4Addr>().ok()?),
    };
    (net.prefix_len() > 0).then(|| (net.network().into(), net.prefix_len()))
}

// --- Addresses ------------------------------------------------------------------

impl Ipam {
    /// An address of the network, with prefix length: from its first subnet
    /// with room. One who has waited (`late`) goes before those who come now.
    pub(crate) fn take_address(&mut self, network: &str, late: bool) -> Result<String, Exhausted> {
        let queue = !late && self.waiting.contains_key(network);
        let pools = self.pools.get_mut(network).filter(|_| !queue);
        for pool in pools.into_iter().flatten() {
            if let Some(address) = pool.free.take_from(pool.next) {
                pool.next = address.saturating_add(1);
                return Ok(format!("{}/{}", Ipv4Addr::from(address), pool.prefix));
            }
        }
        Err(Exhausted(NetworkId::from(network)))
    }

    /// Takes exactly this address, as a snapshot has it; false if it is not free.
    pub(crate) fn restore_address(&mut self, network: &str, address: &str) -> bool {
        self.with_pool(network, address, |pool, number| pool.free.take(number))
    }

    pub(crate) fn give_address(&mut self, network: &str, address: &str) {
        self.with_pool(network, address, |pool, number| pool.free.give(number));
    }

    fn with_pool(
        &mut self,
        network: &str,
        address: &str,
        work: impl FnOnce(&mut Pool, u32) -> bool,
    ) -> bool {
        let plain = address.split_once('/').map_or(address, |(plain, _)| plain);
        let Ok(IpAddr::V4(parsed)) = plain.parse() else {
            return false;
        };
        let number = u32::from(parsed);
        let pools = self.pools.get_mut(network).into_iter().flatten();
        let mut pools = pools.filter(|pool| (pool.first..=pool.last).contains(&number));
        pools.next().is_some_and(|pool| work(pool, number))
    }

    /// Forgets which addresses are taken.
    #[cfg(feature = "museum")]
    pub(crate) fn begin_afresh(&mut self) {
        let ids: Vec<NetworkId> = self.pools.keys().cloned().collect();
        for id in ids {
            for pool in self.pools.get_mut(&id).into_iter().flatten() {
                // Not the network's own address, nor its gateway, nor the broadcast address.
                pool.free = FreeRanges::new(pool.first + 2, pool.last - 1);
                pool.next = pool.first + 2;
            }
        }
    }

    /// Where the search in each subnet of each network starts next.
    pub(crate) fn cursors(&self) -> impl Iterator<Item = (&NetworkId, Vec<u32>)> {
        let pools = self.pools.iter();
        pools.map(|(id, pools)| (id, pools.iter().map(|pool| pool.next).collect()))
    }

    /// As a snapshot has it.
    pub(crate) fn restore_cursors(&mut self, network: &str, cursors: &[u32]) {
        let pools = self.pools.get_mut(network).into_iter().flatten();
        for (pool, &next) in pools.zip(cursors) {
            pool.next = next;
        }
    }
}

// --- Waiting ---------------------------------------------------------------------

impl Ipam {
    /// Queues `who` for an address of `network`; one who waits already keeps its turn.
    pub(crate) fn wait(&mut self, who: Waiter, network: NetworkId) {
        let turn = match self.stop_waiting(&who) {
            Some(turn) => turn,
            None => {
                self.next_turn += 1;
                self.next_turn
            }
        };
        let alone = self.restore_waiting(who, network, turn);
        debug_assert!(
            alone,
            "its last turn was taken from it, and turns are given once"
        );
    }

    /// As a snapshot has it. False when it waits already, or the turn is another's or was never given.
    pub(crate) fn restore_waiting(&mut self, who: Waiter, network: NetworkId, turn: u64) -> bool {
        let before = self.turns.insert(who.clone(), (network.clone(), turn));
        let queue = self.waiting.entry(network).or_default();
        let other = queue.insert(turn, who);
        turn <= self.next_turn && before.is_none() && other.is_none()
    }

    /// As a snapshot has it.
    pub(crate) fn restore_next_turn(&mut self, turn: u64) {
        self.next_turn = turn;
    }

    pub(crate) fn next_turn(&self) -> u64 {
        self.next_turn
    }

    /// Takes `who` out of its queue. Returns its turn if it was in one.
    pub(crate) fn stop_waiting(&mut self, who: &Waiter) -> Option<u64> {
        let (network, turn) = self.turns.remove(who)?;
        if let Some(queue) = self.waiting.get_mut(&network) {
            queue.remove(&turn);
            if queue.is_empty() {
                self.waiting.remove(&network);
            }
        }
        Some(turn)
    }

    /// Whose turn it is when an address of the network is free.
    pub(crate) fn first_waiting(&self, network: &str) -> Option<&Waiter> {
        let queue = self.waiting.get(network)?;
        queue.get_min().map(|(_, who)| who)
    }

    /// The network that `who` waits for.
    pub(crate) fn waits_for(&self, who: &Waiter) -> Option<&NetworkId> {
        self.turns.get(who).map(|(network, _)| network)
    }

    /// All who wait, with network and turn.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (&Waiter, &NetworkId, u64)> {
        self.turns
            .iter()
            .map(|(who, (network, turn))| (who, network, *turn))
    }
}
