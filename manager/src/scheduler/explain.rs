//! Says why no node takes a task: each obstacle with the count of its nodes.

use std::collections::BTreeMap;

use super::filter::{Obstacle, Wish};

/// How many nodes fail by each obstacle.
pub(crate) type Tally = BTreeMap<Obstacle, usize>;

/// `no suitable node (insufficient memory on 2 nodes; …)`
pub(crate) fn sentence(wish: &Wish, tally: &Tally) -> String {
    if let Some(invalid) = &wish.invalid {
        return format!("no suitable node ({invalid})");
    }
    if tally.is_empty() {
        return "no suitable node (the cluster has no nodes)".to_owned();
    }
    let parts: Vec<String> = tally
        .iter()
        .map(|(obstacle, &count)| phrase(wish, *obstacle, count))
        .collect();
    format!("no suitable node ({})", parts.join("; "))
}

fn phrase(wish: &Wish, obstacle: Obstacle, count: usize) -> String {
    let nodes = if count == 1 { "node" } else { "nodes" };
    let are = if count == 1 { "is" } else { "are" };
    match obstacle {
        Obstacle::Down => format!("{count} {nodes} {are} down"),
        Obstacle::Paused => format!("{count} {nodes} {are} paused"),
        Obstacle::Drained => format!("{count} {nodes} {are} drained"),
        Obstacle::Cpu => format!("insufficient CPU on {count} {nodes}"),
        Obstacle::Memory => format!("insufficient memory on {count} {nodes}"),
        Obstacle::Constraint(at) => {
            let constraint = wish.constraints.get(at).map_or("", |c| c.as_str());
            format!("constraint {constraint} not met on {count} {nodes}")
        }
        Obstacle::Platform => format!("unsupported platform on {count} {nodes}"),
        Obstacle::Port(port) => format!("host port {port} in use on {count} {nodes}"),
        Obstacle::MaxReplicas => format!("maximum replicas per node reached on {count} {nodes}"),
    }
}
