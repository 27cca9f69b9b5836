//! `swarm network ls`

use std::collections::BTreeMap;

use swarm_proto::v1::{GetNetworkRequest, ListNetworksRequest, LocalNetwork, Network};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::output::list::{self, Columns, Format, Row};
use crate::output::{human, short};

/// List networks
#[derive(clap::Args, Debug)]
pub struct Ls {
    #[command(flatten)]
    format: Format,
    /// Provide filter values (e.g. "driver=overlay")
    #[arg(short, long)]
    filter: Vec<String>,
    /// Do not truncate the output
    #[arg(long)]
    no_trunc: bool,
}

const COLUMNS: Columns = &[
    ("ID", "NETWORK ID"),
    ("Name", "NAME"),
    ("Driver", "DRIVER"),
    ("Scope", "SCOPE"),
];

/// One line, wherever it comes from.
struct Line {
    id: String,
    name: String,
    driver: String,
    scope: String,
    created: String,
    internal: bool,
    v6: bool,
    labels: BTreeMap<String, String>,
}

impl From<&Network> for Line {
    fn from(network: &Network) -> Self {
        let spec = network.spec.clone().unwrap_or_default();
        let annotations = spec.annotations.unwrap_or_default();
        let pools = network
            .subnets
            .iter()
            .filter_map(|subnet| subnet.pool.as_ref());
        Self {
            id: network.id.clone(),
            name: annotations.name,
            driver: spec.driver,
            scope: "swarm".to_owned(),
            created: human::rfc3339(network.meta.and_then(|meta| meta.created_at).as_ref()),
            internal: spec.internal,
            v6: pools.into_iter().any(|pool| pool.subnet.contains(':')),
            labels: annotations.labels,
        }
    }
}

impl From<&LocalNetwork> for Line {
    fn from(local: &LocalNetwork) -> Self {
        if let Some(network) = &local.network {
            return Self::from(network);
        }
        Self {
            id: local.id.clone(),
            name: local.name.clone(),
            driver: local.driver.clone(),
            scope: local.scope.clone(),
            created: String::new(),
            internal: local.internal,
            v6: local.subnets.iter().any(|subnet| subnet.contains(':')),
            labels: BTreeMap::new(),
        }
    }
}

/// Prints all networks of the cluster on a manager, those that the node holds
/// on a worker; and the node's own on both.
pub async fn run(flags: Ls, daemon: &Daemon) -> Result {
    let known = ["driver", "id", "label", "name", "scope", "type", "dangling"];
    let given = Given::parse(&flags.filter, &known)?;
    let dangling = given.choices(
        "dangling",
        &[("true", true), ("1", true), ("false", false), ("0", false)],
    )?;
    let kinds = given.choices("type", &[("custom", true), ("builtin", false)])?;

    let local = super::local(daemon).await?;
    let mut lines: Vec<Line> = if daemon.is_worker().await? {
        local.iter().map(Line::from).collect()
    } else {
        let cluster = daemon.networks(ListNetworksRequest::default()).await?;
        let own = local.iter().filter(|local| local.scope == "local");
        let cluster = cluster.iter().map(Line::from);
        cluster.chain(own.map(Line::from)).collect()
    };
    lines.retain(|line| {
        matches(line, &given) && (kinds.is_empty() || kinds.contains(&(line.scope == "swarm")))
    });
    if let Some(wanted) = dangling.first() {
        let mut kept = Vec::new();
        for line in lines {
            if line.scope == "swarm" && unused(daemon, &line.id).await? == *wanted {
                kept.push(line);
            }
        }
        lines = kept;
    }
    lines.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    let rows: Vec<_> = lines
        .into_iter()
        .map(|line| row(line, flags.no_trunc))
        .collect();
    list::show(&flags.format, COLUMNS, &rows)
}

fn matches(line: &Line, given: &Given) -> bool {
    let any = |key: &str, ok: &dyn Fn(&str) -> bool| {
        let values = given.values(key);
        values.is_empty() || values.iter().any(|value| ok(value))
    };
    let labels = given.values("label");
    let label = |text: &String| match text.split_once('=') {
        Some((key, value)) => line.labels.get(key).is_some_and(|have| have == value),
        None => line.labels.contains_key(text),
    };
    any("id", &|value| line.id.starts_with(value))
        && any("name", &|value| line.name.contains(value))
        && any("driver", &|value| line.driver == value)
        && any("scope", &|value| line.scope == value)
        && labels.iter().all(label)
}

async fn unused(daemon: &Daemon, id: &str) -> Result<bool> {
    let request = GetNetworkRequest {
        r#ref: id.to_owned(),
        verbose: true,
    };
    let detail = daemon.control().get_network(request).await?.into_inner();
    Ok(detail.services.is_empty() && detail.peers.is_empty())
}

fn row(line: Line, whole: bool) -> Row {
    let id = if whole { &line.id } else { short(&line.id) };
    Row::new([
        ("CreatedAt", line.created.clone()),
        ("Driver", line.driver.clone()),
        ("ID", id.to_owned()),
        ("IPv4", "true".to_owned()),
        ("IPv6", line.v6.to_string()),
        ("Internal", line.internal.to_string()),
        ("Name", line.name.clone()),
        ("Scope", line.scope.clone()),
    ])
    .with_labels(line.labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_match_by_part_of_the_name_and_all_labels() {
        let line = Line {
            id: "abc123".to_owned(),
            name: "my-net".to_owned(),
            driver: "overlay".to_owned(),
            scope: "swarm".to_owned(),
            created: String::new(),
            internal: false,
            v6: false,
            labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        };
        let ok = |filters: &[&str]| {
            let filters: Vec<_> = filters.iter().map(|&filter| filter.to_owned()).collect();
            matches(
                &line,
                &Given::parse(&filters, &["id", "name", "driver", "scope", "label"]).unwrap(),
            )
        };
        assert!(ok(&[]));
        assert!(ok(&["name=net", "label=k", "label=k=v", "id=abc"]));
        assert!(ok(&["driver=bridge", "driver=overlay"]));
        assert!(!ok(&["label=k=w"]));
        assert!(!ok(&["scope=local"]));
        assert!(!ok(&["id=bc1"]));
    }
}
