//! `swarm node ps`

use std::collections::BTreeMap;

use swarm_proto::v1::ListTasksRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::tasks::{self, TaskList};

/// List tasks running on one or more nodes, defaults to current node
#[derive(clap::Args, Debug)]
pub struct Ps {
    #[command(flatten)]
    list: TaskList,
    /// The nodes
    nodes: Vec<String>,
}

/// Prints the list.
pub async fn run(flags: Ps, daemon: &Daemon) -> Result {
    let given = Given::parse(&flags.list.filter, tasks::FILTERS)?;
    let own = vec!["self".to_owned()];
    let mut nodes = Vec::new();
    for reference in if flags.nodes.is_empty() {
        &own
    } else {
        &flags.nodes
    } {
        nodes.push(super::get(daemon, reference).await?.id);
    }
    let request = ListTasksRequest {
        nodes,
        ..tasks::request(&given)?
    };
    tasks::show(daemon, request, &given, &flags.list, &BTreeMap::new()).await
}
