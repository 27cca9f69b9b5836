//! `swarm node …`

mod inspect;
mod ls;
mod promote;
mod ps;
mod rm;
mod update;

pub use update::availability;

use swarm_proto::v1::{GetNodeRequest, Node, NodeSpec, UpdateNodeRequest};
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::Result;

/// Manage swarm nodes
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Demote one or more nodes from manager in the swarm
    Demote(promote::Nodes),
    Inspect(inspect::Inspect),
    #[command(alias = "list")]
    Ls(ls::Ls),
    /// Promote one or more nodes to manager in the swarm
    Promote(promote::Nodes),
    Ps(ps::Ps),
    #[command(alias = "remove")]
    Rm(rm::Rm),
    Update(update::Update),
}

/// Runs the verb.
pub async fn run(command: Command, daemon: &Daemon) -> Result {
    match command {
        Command::Demote(nodes) => promote::demote(nodes, daemon).await,
        Command::Inspect(flags) => inspect::run(flags, daemon).await,
        Command::Ls(flags) => ls::run(flags, daemon).await,
        Command::Promote(nodes) => promote::promote(nodes, daemon).await,
        Command::Ps(flags) => ps::run(flags, daemon).await,
        Command::Rm(flags) => rm::run(flags, daemon).await,
        Command::Update(flags) => update::run(flags, daemon).await,
    }
}

/// Others may change the node between our read and our write.
const ATTEMPTS: u32 = 5;

/// A node by reference; "self" is the node that is spoken to.
async fn get(daemon: &Daemon, reference: &str) -> Result<Node> {
    let reference = match reference {
        "self" => daemon.info().await?.node_id,
        other => other.to_owned(),
    };
    let request = GetNodeRequest { r#ref: reference };
    Ok(daemon.control().get_node(request).await?.into_inner())
}

/// Reads a node, makes its new spec, writes it; again when somebody else was
/// faster. No new spec: nothing is written.
async fn change(
    daemon: &Daemon,
    reference: &str,
    new: impl Fn(&NodeSpec) -> std::result::Result<Option<NodeSpec>, String>,
) -> Result<bool> {
    let mut attempt = 1;
    loop {
        let node = get(daemon, reference).await?;
        let Some(spec) = new(&node.spec.clone().unwrap_or_default())? else {
            return Ok(false);
        };
        let meta = node.meta.unwrap_or_default();
        let request = UpdateNodeRequest {
            node_id: node.id,
            version: meta.version.map_or(0, |version| version.index),
            spec: Some(spec),
        };
        match daemon.control().update_node(request).await {
            Ok(_) => return Ok(true),
            Err(status) if status.code() == Code::Aborted && attempt < ATTEMPTS => attempt += 1,
            Err(status) => return Err(status.into()),
        }
    }
}
