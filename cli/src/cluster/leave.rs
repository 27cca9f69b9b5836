//! `swarm leave`

use swarm_proto::v1::LeaveClusterRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Leave the swarm
#[derive(clap::Args, Debug)]
pub struct Leave {
    /// Force this node to leave the swarm, ignoring warnings
    #[arg(short, long)]
    force: bool,
}

/// Takes this node out of its cluster.
pub async fn run(flags: Leave, daemon: &Daemon) -> Result {
    let request = LeaveClusterRequest { force: flags.force };
    daemon.local().leave(request).await?;
    output::line("Node left the swarm.")
}
