//! `swarm node promote` and `swarm node demote`

use swarm_proto::v1::NodeRole;

use super::change;
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// The nodes whose role changes.
#[derive(clap::Args, Debug)]
pub struct Nodes {
    /// The nodes
    #[arg(required = true)]
    nodes: Vec<String>,
}

/// Makes managers of workers.
pub async fn promote(nodes: Nodes, daemon: &Daemon) -> Result {
    set(nodes, daemon, NodeRole::Manager, |node, changed| {
        if changed {
            format!("Node {node} promoted to a manager in the swarm.")
        } else {
            format!("Node {node} is already a manager.")
        }
    })
    .await
}

/// Makes workers of managers.
pub async fn demote(nodes: Nodes, daemon: &Daemon) -> Result {
    set(nodes, daemon, NodeRole::Worker, |node, changed| {
        if changed {
            format!("Manager {node} demoted in the swarm.")
        } else {
            format!("Node {node} is already a worker.")
        }
    })
    .await
}

async fn set(
    nodes: Nodes,
    daemon: &Daemon,
    role: NodeRole,
    sentence: impl Fn(&str, bool) -> String,
) -> Result {
    for node in &nodes.nodes {
        let changed = change(daemon, node, |spec| {
            Ok((spec.desired_role() != role).then(|| {
                let mut new = spec.clone();
                new.desired_role = role.into();
                new
            }))
        })
        .await?;
        output::line(&sentence(node, changed))?;
    }
    Ok(())
}
