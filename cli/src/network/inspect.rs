//! `swarm network inspect`

use serde_json::Value;
use swarm_proto::v1::{GetNetworkRequest, LocalNetwork};
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output::{json, list};

/// Display detailed information on one or more networks
#[derive(clap::Args, Debug)]
pub struct Inspect {
    /// Format output using a Go template
    #[arg(short, long)]
    format: Option<String>,
    /// Verbose output for diagnostics: services, tasks, peers
    #[arg(short, long)]
    verbose: bool,
    /// The networks
    #[arg(required = true)]
    networks: Vec<String>,
}

/// Prints what there is, then what there is not. What the manager does not
/// know may be the node's own, and a worker knows what it holds.
pub async fn run(flags: Inspect, daemon: &Daemon) -> Result {
    let mut found: Vec<Value> = Vec::new();
    let mut missing = Vec::new();
    let held = super::local(daemon).await?;
    let worker = daemon.is_worker().await?;
    for reference in &flags.networks {
        if !worker {
            let request = GetNetworkRequest {
                r#ref: reference.clone(),
                verbose: flags.verbose,
            };
            match daemon.control().get_network(request).await {
                Ok(detail) => {
                    found.push(json::network(&detail.into_inner(), flags.verbose));
                    continue;
                }
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status.into()),
            }
        }
        match pick(&held, reference) {
            Some(local) => found.push(json::local_network(local)),
            None => missing.push(format!(
                "Error response from daemon: network {reference} not found"
            )),
        }
    }
    list::inspected(flags.format.as_deref(), &found, &missing)
}

/// By full ID, name, or a prefix of one ID alone.
fn pick<'a>(all: &'a [LocalNetwork], reference: &str) -> Option<&'a LocalNetwork> {
    let exact = all
        .iter()
        .find(|local| local.id == reference)
        .or_else(|| all.iter().find(|local| local.name == reference));
    exact.or_else(|| {
        let mut prefixed = all.iter().filter(|local| local.id.starts_with(reference));
        match (prefixed.next(), prefixed.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    })
}
