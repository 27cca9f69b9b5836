//! `swarm node rm`

use swarm_proto::v1::RemoveNodeRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::removal;

/// Remove one or more nodes from the swarm
#[derive(clap::Args, Debug)]
pub struct Rm {
    /// Force remove a node from the swarm
    #[arg(short, long)]
    force: bool,
    /// The nodes
    #[arg(required = true)]
    nodes: Vec<String>,
}

/// Removes each, and goes on after one that cannot be removed.
pub async fn run(flags: Rm, daemon: &Daemon) -> Result {
    removal::each(&flags.nodes, async |reference: String| {
        let request = RemoveNodeRequest {
            r#ref: reference,
            force: flags.force,
        };
        daemon.control().remove_node(request).await.map(drop)
    })
    .await
}
