//! `swarm node ls`

use serde_json::Value;
use swarm_proto::v1::{ListNodesRequest, Node, NodeRole, Reachability};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::output::json;
use crate::output::list::{self, Columns, Format, Row};
use crate::tasks::capital;

/// List nodes in the swarm
#[derive(clap::Args, Debug)]
pub struct Ls {
    #[command(flatten)]
    format: Format,
    /// Filter output based on conditions provided
    #[arg(short, long)]
    filter: Vec<String>,
}

const COLUMNS: Columns = &[
    ("ID", "ID"),
    ("Hostname", "HOSTNAME"),
    ("Status", "STATUS"),
    ("Availability", "AVAILABILITY"),
    ("ManagerStatus", "MANAGER STATUS"),
    ("EngineVersion", "ENGINE VERSION"),
];

/// Prints the list.
pub async fn run(flags: Ls, daemon: &Daemon) -> Result {
    let known = ["id", "label", "node.label", "membership", "role", "name"];
    let given = Given::parse(&flags.filter, &known)?;
    let roles = given.choices(
        "role",
        &[("worker", NodeRole::Worker), ("manager", NodeRole::Manager)],
    )?;
    // Whoever has a certificate is accepted; nobody waits for it.
    let members = given.choices("membership", &[("accepted", true), ("pending", false)])?;
    let own = daemon.info().await?.node_id;
    let request = ListNodesRequest {
        filters: Some(given.common()),
        roles: roles.into_iter().map(i32::from).collect(),
        node_labels: given.values("node.label"),
        ..ListNodesRequest::default()
    };
    let mut nodes = daemon.nodes(request).await?;
    if !members.is_empty() && !members.contains(&true) {
        nodes.clear();
    }
    nodes.sort_by_cached_key(|node| (natural(&hostname(node)), node.id.clone()));
    let rows: Vec<_> = nodes.iter().map(|node| row(node, &own)).collect();
    list::show(&flags.format, COLUMNS, &rows)
}

fn hostname(node: &Node) -> String {
    let description = node.description.as_ref();
    description
        .map(|description| description.hostname.clone())
        .unwrap_or_default()
}

fn row(node: &Node, own: &str) -> Row {
    let spec = node.spec.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let description = node.description.clone().unwrap_or_default();
    let manager = node
        .manager_status
        .as_ref()
        .map_or(String::new(), |manager| {
            if manager.leader {
                "Leader".to_owned()
            } else {
                match manager.reachability() {
                    Reachability::Unknown => "Unknown".to_owned(),
                    other => capital(json::reachability(other)),
                }
            }
        });
    Row::new([
        (
            "Availability",
            capital(json::availability(spec.availability())),
        ),
        ("EngineVersion", description.engine_version.clone()),
        ("Hostname", description.hostname.clone()),
        ("ID", node.id.clone()),
        ("ManagerStatus", manager),
    ])
    .with("Self", Value::Bool(node.id == own))
    .with("Status", capital(json::node_state(status.state())).into())
    .with("TLSStatus", "Ready".into())
    .with_labels(spec.annotations.unwrap_or_default().labels)
}

/// Sorts "h2" before "h10": digits count as numbers.
fn natural(text: &str) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (word, after) = rest.split_at(digits);
        let end = after
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(after.len());
        let (number, after) = after.split_at(end);
        parts.push((word.to_owned(), number.parse().unwrap_or(0)));
        rest = after;
    }
    parts
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{ManagerStatus, NodeDescription};

    use super::*;

    #[test]
    fn hostnames_are_sorted_as_people_count() {
        let mut names = ["h10", "h2", "a", "h1b", "h1"];
        names.sort_by_cached_key(|name| natural(name));
        assert_eq!(names, ["a", "h1", "h1b", "h2", "h10"]);
    }

    #[test]
    fn the_leader_and_the_node_asked_are_marked() {
        let node = Node {
            id: "abc".to_owned(),
            description: Some(NodeDescription {
                hostname: "h1".to_owned(),
                engine_version: "0.1.0".to_owned(),
                ..NodeDescription::default()
            }),
            manager_status: Some(ManagerStatus {
                leader: true,
                ..ManagerStatus::default()
            }),
            ..Node::default()
        };
        let text = list::render(&Format::default(), COLUMNS, &[row(&node, "abc")]).unwrap();
        assert_eq!(
            text,
            "ID      HOSTNAME   STATUS    AVAILABILITY   MANAGER STATUS   ENGINE VERSION\n\
             abc *   h1         Unknown   Active         Leader           0.1.0\n"
        );
        let mut worker = node;
        worker.manager_status = None;
        let format = Format {
            format: Some("{{.Hostname}} {{.Status}} {{.ManagerStatus}}".to_owned()),
            quiet: false,
        };
        let text = list::render(&format, COLUMNS, &[row(&worker, "x")]).unwrap();
        assert_eq!(text, "h1 Unknown \n");
    }
}
