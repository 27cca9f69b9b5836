//! One task's namespace, from the kernel's side.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use ipnet::Ipv4Net;
use swarm_proto::{NetworkId, TaskId};

use super::gateway::HostPort;
use super::lb::{self, Balance};
use super::netns::{self, Netns};
use super::{NetworkError, NetworkView, SandboxSpec};

/// A sandbox's spec, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// As given.
    pub spec: SandboxSpec,
    /// Network and address, in the order of the links.
    pub attachments: Vec<(NetworkId, Ipv4Net)>,
    /// Ports on the host.
    pub host_ports: Vec<HostPort>,
}

impl Plan {
    /// Checks a spec before the kernel is touched.
    pub fn parse(spec: &SandboxSpec) -> Result<Self, NetworkError> {
        let id = spec.task_id.as_str();
        // It becomes a file's name.
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(NetworkError::Invalid(format!("{id:?} is no task ID")));
        }
        let mut attachments: Vec<(NetworkId, Ipv4Net)> = Vec::new();
        for attachment in &spec.attachments {
            let addr = attachment.addr.parse().map_err(|_| {
                NetworkError::Invalid(format!(
                    "task {id}: {:?} is no IPv4 address with prefix length",
                    attachment.addr
                ))
            })?;
            if attachments
                .iter()
                .any(|(network, _)| *network == attachment.network_id)
            {
                return Err(NetworkError::Invalid(format!(
                    "task {id}: network {} twice",
                    attachment.network_id
                )));
            }
            attachments.push((attachment.network_id.clone(), addr));
        }
        let host_ports = spec
            .host_ports
            .iter()
            .map(HostPort::parse)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            spec: spec.clone(),
            attachments,
            host_ports,
        })
    }
}

/// A sandbox in the kernel.
#[derive(Debug)]
pub struct Live {
    /// What it was made from.
    pub plan: Plan,
    /// Its namespace.
    pub netns: Netns,
    /// Address on the gateway bridge.
    pub gateway_addr: Option<Ipv4Addr>,
    /// Host ports as bound, in the plan's order.
    pub bound: Vec<u16>,
    /// What its balancing holds; `None` = adopted and not yet compared.
    pub balance: Option<Balance>,
}

impl Live {
    /// Makes the namespace, or opens what is there.
    pub fn open_or_create(path: &Path, plan: Plan) -> io::Result<Self> {
        let netns = match Netns::open(path)? {
            Some(netns) => netns,
            None => Netns::create(path, |_| prepare())?,
        };
        Ok(Self {
            plan,
            netns,
            gateway_addr: None,
            bound: Vec::new(),
            balance: None,
        })
    }

    /// Makes its balancing what the tables of its networks say. `gone` holds addresses whose tasks are no more:
    /// connections to them are forgotten, so that they end instead of hanging.
    pub fn set_balance(&mut self, views: &[&NetworkView], gone: &[Ipv4Addr]) -> io::Result<()> {
        let task: &TaskId = &self.plan.spec.task_id;
        let wanted = lb::plan(task, views.iter().copied());
        let withdrawn = match self.balance.take() {
            Some(old) if old == wanted => Default::default(),
            Some(old) => {
                if let Err(error) = self.netns.nft.commit(lb::update(&old, &wanted)) {
                    // Somebody else has been at our table: write it anew.
                    tracing::warn!(%task, %error, "load balancing is not as it was left");
                    self.netns.nft.commit(lb::install(&wanted))?;
                }
                lb::withdrawn(&old, &wanted)
            }
            None => {
                self.netns.nft.commit(lb::install(&wanted))?;
                Default::default()
            }
        };
        self.balance = Some(wanted);
        if withdrawn.is_empty() && gone.is_empty() {
            return Ok(());
        }
        // TCP connections go on while their task drains; what has no connection would stay for ever.
        self.netns.nft.forget_connections(|protocol, to, answers| {
            gone.contains(&answers)
                || (i32::from(protocol) != libc::IPPROTO_TCP && withdrawn.contains(&(to, answers)))
        })
    }
}

/// Settings of a container's namespace, as Docker's: no IPv6 by itself, low ports and ping for everyone.
fn prepare() -> io::Result<()> {
    for (path, value) in [
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv4/ip_unprivileged_port_start", "0"),
        ("ipv4/ping_group_range", "0 2147483647"),
    ] {
        if let Err(error) = netns::sysctl(path, value) {
            tracing::debug!(path, %error, "setting not available");
        }
    }
    Ok(())
}
