//! `swarm init`

use std::time::Duration;

use swarm_proto::v1::InitRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::node::availability;
use crate::output;
use crate::output::human::parse_duration;

/// Initialize a swarm
#[derive(clap::Args, Debug)]
pub struct Init {
    /// Advertised address (format: "<ip|interface>[:port]")
    #[arg(long, default_value = "")]
    advertise_addr: String,
    /// Listen address (format: "<ip|interface>[:port]")
    #[arg(long, default_value = "")]
    listen_addr: String,
    /// Address or interface to use for data path traffic
    #[arg(long, default_value = "")]
    data_path_addr: String,
    /// Port number to use for data path traffic (1024 - 49151)
    #[arg(long, default_value_t = 0)]
    data_path_port: u32,
    /// Default address pool in CIDR format
    #[arg(long)]
    default_addr_pool: Vec<String>,
    /// Default address pool subnet mask length
    #[arg(long, default_value_t = 0)]
    default_addr_pool_mask_length: u32,
    /// Availability of the node ("active", "pause", "drain")
    #[arg(long, default_value = "active")]
    availability: String,
    /// Validity period for node certificates (ns|us|ms|s|m|h)
    #[arg(long, value_parser = parse_duration)]
    cert_expiry: Option<Duration>,
    /// Dispatcher heartbeat period (ns|us|ms|s|m|h)
    #[arg(long, value_parser = parse_duration)]
    dispatcher_heartbeat: Option<Duration>,
}

/// Makes this node the first manager of a new cluster.
pub async fn run(flags: Init, daemon: &Daemon) -> Result {
    let span = |given: Option<Duration>| given.and_then(|span| span.try_into().ok());
    let request = InitRequest {
        advertise_addr: flags.advertise_addr,
        listen_addr: flags.listen_addr,
        data_path_addr: flags.data_path_addr,
        default_addr_pool: flags.default_addr_pool,
        default_addr_pool_mask_length: flags.default_addr_pool_mask_length,
        availability: availability(&flags.availability)?.into(),
        node_cert_expiry: span(flags.cert_expiry),
        heartbeat_period: span(flags.dispatcher_heartbeat),
        data_path_port: flags.data_path_port,
    };
    let answer = daemon.local().init(request).await?.into_inner();
    let token = answer.tokens.unwrap_or_default().worker;
    output::line(&format!(
        "Swarm initialized: current node ({}) is now a manager.\n\n\
         To add a worker to this swarm, run the following command:\n\n    \
         swarm join --token {token} {}\n\n\
         To add a manager to this swarm, run 'swarm join-token manager' and follow the instructions.\n",
        answer.node_id, answer.advertise_addr
    ))
}
