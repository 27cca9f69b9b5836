//! `swarm join`

use swarm_proto::v1::{JoinClusterRequest, NodeRole};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::node::availability;
use crate::output;

/// Join a swarm as a node and/or manager
#[derive(clap::Args, Debug)]
pub struct Join {
    /// Token for entry into the swarm
    #[arg(long)]
    token: String,
    /// Advertised address (format: "<ip|interface>[:port]")
    #[arg(long, default_value = "")]
    advertise_addr: String,
    /// Listen address (format: "<ip|interface>[:port]")
    #[arg(long, default_value = "")]
    listen_addr: String,
    /// Address or interface to use for data path traffic
    #[arg(long, default_value = "")]
    data_path_addr: String,
    /// Availability of the node ("active", "pause", "drain")
    #[arg(long, default_value = "active")]
    availability: String,
    /// A manager of the swarm
    #[arg(value_name = "HOST:PORT", required = true)]
    remotes: Vec<String>,
}

/// Makes this node a member of the remote's cluster.
pub async fn run(flags: Join, daemon: &Daemon) -> Result {
    let request = JoinClusterRequest {
        token: flags.token,
        remotes: flags
            .remotes
            .iter()
            .map(|remote| with_port(remote))
            .collect(),
        advertise_addr: flags.advertise_addr,
        listen_addr: flags.listen_addr,
        data_path_addr: flags.data_path_addr,
        availability: availability(&flags.availability)?.into(),
    };
    let answer = daemon.local().join(request).await?.into_inner();
    output::line(match answer.role() {
        NodeRole::Worker => "This node joined a swarm as a worker.",
        NodeRole::Manager => "This node joined a swarm as a manager.",
    })
}

/// A remote without a port has the usual one.
fn with_port(remote: &str) -> String {
    let port = swarm_proto::defaults::API_PORT;
    match remote.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V6(addr)) => format!("[{addr}]:{port}"),
        _ if remote.contains(':') => remote.to_owned(),
        _ => format!("{remote}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_has_the_usual_port_unless_it_says_another() {
        assert_eq!(with_port("10.0.0.1"), "10.0.0.1:2377");
        assert_eq!(with_port("manager:99"), "manager:99");
        assert_eq!(with_port("::1"), "[::1]:2377");
        assert_eq!(with_port("[::1]:99"), "[::1]:99");
    }
}
