//! `swarm network rm`

use swarm_proto::v1::RemoveNetworkRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::removal;

/// Remove one or more networks
#[derive(clap::Args, Debug)]
pub struct Rm {
    /// Do not error if the network does not exist
    #[arg(short, long)]
    force: bool,
    /// The networks
    #[arg(required = true)]
    networks: Vec<String>,
}

/// Removes each, and goes on after one that cannot be removed.
pub async fn run(flags: Rm, daemon: &Daemon) -> Result {
    removal::each(&flags.networks, async |reference: String| {
        let request = RemoveNetworkRequest { r#ref: reference };
        match daemon.control().remove_network(request).await {
            Err(status) if flags.force && status.code() == tonic::Code::NotFound => Ok(()),
            other => other.map(drop),
        }
    })
    .await
}
