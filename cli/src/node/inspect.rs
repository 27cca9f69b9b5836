//! `swarm node inspect`

use swarm_proto::v1::Node;
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::output;
use crate::output::human::{rfc3339, show_size};
use crate::output::{json, list};
use crate::pretty::Pretty;
use crate::tasks::capital;

/// Display detailed information on one or more nodes
#[derive(clap::Args, Debug)]
pub struct Inspect {
    /// Format output using a Go template
    #[arg(short, long)]
    format: Option<String>,
    /// Print the information in a human friendly format
    #[arg(long)]
    pretty: bool,
    /// The nodes, or "self"
    #[arg(required = true)]
    nodes: Vec<String>,
}

/// Prints what there is, then what there is not.
pub async fn run(flags: Inspect, daemon: &Daemon) -> Result {
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for reference in &flags.nodes {
        match super::get(daemon, reference).await {
            Ok(node) => found.push(node),
            Err(Failure::Daemon(status)) if status.code() == Code::NotFound => {
                missing.extend(Failure::Daemon(status).text());
            }
            Err(failure) => return Err(failure),
        }
    }
    if !flags.pretty {
        let objects: Vec<_> = found.iter().map(json::node).collect();
        return list::inspected(flags.format.as_deref(), &objects, &missing);
    }
    let texts: Vec<_> = found.iter().map(pretty).collect();
    output::print(&texts.join("\n"))?;
    list::finish(&missing)
}

fn pretty(node: &Node) -> String {
    let spec = node.spec.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let description = node.description.clone().unwrap_or_default();
    let mut out = Pretty::new();
    out.put("ID", &node.id);
    out.labels(
        "Labels",
        &spec.annotations.clone().unwrap_or_default().labels,
    );
    out.put("Hostname", &description.hostname);
    let created = node.meta.and_then(|meta| meta.created_at);
    out.put("Joined at", &rfc3339(created.as_ref()));
    out.head("Status");
    out.indented("State", &capital(json::node_state(status.state())));
    out.indented_some("Message", &status.message);
    out.indented(
        "Availability",
        &capital(json::availability(spec.availability())),
    );
    out.indented("Address", &status.addr);
    if let Some(manager) = &node.manager_status {
        out.head("Manager Status");
        out.indented("Address", &manager.addr);
        out.indented(
            "Raft Status",
            &capital(json::reachability(manager.reachability())),
        );
        out.indented("Leader", if manager.leader { "Yes" } else { "No" });
    }
    let platform = description.platform.unwrap_or_default();
    out.head("Platform");
    out.indented("Operating System", &platform.os);
    out.indented("Architecture", &platform.architecture);
    let resources = description.resources.unwrap_or_default();
    out.head("Resources");
    out.indented("CPUs", &(resources.nano_cpus / 1_000_000_000).to_string());
    out.indented("Memory", &show_size(resources.memory_bytes));
    out.put("Engine Version", &description.engine_version);
    out.labels("Engine Labels", &description.engine_labels);
    out.done()
}
