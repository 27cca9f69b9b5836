//! What a task asks of a node, and whether the node can give it.

use swarm_proto::v1::{
    Node, NodeAvailability, NodeState, Platform, PublishMode, Task, placement_preference,
};

use super::constraint::{Constraint, canonical_arch};
use super::mirror::NodeInfo;
use super::spread::Spread;

/// A host port: protocol and number.
pub(crate) type HostPort = (i32, u32);

/// Why a node cannot take a task: the first obstacle found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Obstacle {
    /// Silent, gone, or never heard of.
    Down,
    Paused,
    Drained,
    Cpu,
    Memory,
    /// Place in [`Wish::constraints`].
    Constraint(usize),
    Platform,
    Port(u32),
    MaxReplicas,
}

/// What the tasks of one group ask for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    pub(crate) cpus: i64,
    pub(crate) memory: i64,
    pub(crate) constraints: Vec<Constraint>,
    /// A constraint that does not parse: no node meets it.
    pub(crate) invalid: Option<String>,
    pub(crate) preferences: Vec<Spread>,
    pub(crate) platforms: Vec<Platform>,
    pub(crate) ports: Vec<HostPort>,
    /// 0 = no limit.
    pub(crate) max_replicas: u64,
}

impl Wish {
    pub(crate) fn of(task: &Task) -> Self {
        let spec = task.spec.as_ref();
        let placement = spec.and_then(|spec| spec.placement.as_ref());
        let (cpus, memory) = reserved(task);
        let mut wish = Self {
            cpus,
            memory,
            ports: host_ports(task).collect(),
            ..Self::default()
        };
        let Some(placement) = placement else {
            return wish;
        };
        wish.max_replicas = placement.max_replicas;
        wish.platforms.clone_from(&placement.platforms);
        for text in &placement.constraints {
            match Constraint::parse(text) {
                Ok(constraint) => wish.constraints.push(constraint),
                Err(error) => wish.invalid = Some(error.to_string()),
            }
        }
        for preference in &placement.preferences {
            if let Some(placement_preference::Preference::Spread(over)) = &preference.preference {
                // A preference that means nothing prefers nothing.
                wish.preferences
                    .extend(Spread::parse(&over.spread_descriptor));
            }
        }
        wish
    }

    /// How many tasks fit on the node, of whose tasks `of_service` are the service's.
    pub(crate) fn room(&self, info: &NodeInfo, of_service: u32) -> Result<u32, Obstacle> {
        let node = info.node.as_deref().ok_or(Obstacle::Down)?;
        if let Some(obstacle) = info.closed {
            return Err(obstacle);
        }
        let mut room = u32::MAX;
        for (free, need, obstacle) in [
            (info.cpus_free, self.cpus, Obstacle::Cpu),
            (info.memory_free, self.memory, Obstacle::Memory),
        ] {
            if need > 0 {
                let fits = u32::try_from(free.max(0) / need).unwrap_or(u32::MAX);
                if fits == 0 {
                    return Err(obstacle);
                }
                room = room.min(fits);
            }
        }
        if let Some(at) = self.constraints.iter().position(|c| !c.matches(node)) {
            return Err(Obstacle::Constraint(at));
        }
        if !platform_fits(node, &self.platforms) {
            return Err(Obstacle::Platform);
        }
        for port in &self.ports {
            if info.ports.contains_key(port) {
                return Err(Obstacle::Port(port.1));
            }
            room = 1;
        }
        if self.max_replicas > 0 {
            let left = self.max_replicas.saturating_sub(u64::from(of_service));
            if left == 0 {
                return Err(Obstacle::MaxReplicas);
            }
            room = room.min(u32::try_from(left).unwrap_or(u32::MAX));
        }
        Ok(room)
    }
}

/// Why the node takes no new tasks at all, if it does not.
pub(crate) fn closed(node: &Node) -> Option<Obstacle> {
    let ready = node.status.as_ref().map(|status| status.state()) == Some(NodeState::Ready);
    match node.spec.as_ref().map(|spec| spec.availability()) {
        _ if !ready => Some(Obstacle::Down),
        Some(NodeAvailability::Pause) => Some(Obstacle::Paused),
        Some(NodeAvailability::Drain) => Some(Obstacle::Drained),
        Some(NodeAvailability::Active) | None => None,
    }
}

/// Reserved (billionths of a core, bytes), never negative.
pub(crate) fn reserved(task: &Task) -> (i64, i64) {
    let resources = task.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    let reserved = resources.and_then(|resources| resources.reservations);
    reserved.map_or((0, 0), |r| (r.nano_cpus.max(0), r.memory_bytes.max(0)))
}

/// Ports that the task needs on its node, other than those the node chooses.
pub(crate) fn host_ports(task: &Task) -> impl Iterator<Item = HostPort> {
    let ports = task.endpoint.iter().flat_map(|endpoint| &endpoint.ports);
    ports
        .filter(|port| port.publish_mode() == PublishMode::Host && port.published_port != 0)
        .map(|port| (port.protocol, port.published_port))
}

/// Whether an image for these platforms (none given: any) runs on the node.
/// A node that has not said what it is gets the benefit of the doubt.
#[must_use]
pub fn platform_fits(node: &Node, platforms: &[Platform]) -> bool {
    let own = node.description.as_ref().and_then(|d| d.platform.as_ref());
    let (false, Some(own)) = (platforms.is_empty(), own) else {
        return true;
    };
    let fits = |wanted: &str, own: &str| wanted.is_empty() || wanted.eq_ignore_ascii_case(own);
    platforms.iter().any(|wanted| {
        fits(&wanted.os, &own.os)
            && fits(
                canonical_arch(&wanted.architecture),
                canonical_arch(&own.architecture),
            )
    })
}
