//! `swarm network prune`

use std::io::BufRead as _;

use swarm_proto::v1::{ListNetworksRequest, RemoveNetworkRequest};
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::output;

/// Remove all unused networks
#[derive(clap::Args, Debug)]
pub struct Prune {
    /// Do not prompt for confirmation
    #[arg(short, long)]
    force: bool,
    /// Provide filter values (e.g. "label=<key>=<value>")
    #[arg(long)]
    filter: Vec<String>,
}

/// Asks, then removes every network that nothing uses.
pub async fn run(flags: Prune, daemon: &Daemon) -> Result {
    let given = Given::parse(&flags.filter, &["label"])?;
    if !flags.force {
        output::print(
            "WARNING! This will remove all custom networks not used by at least one service.\nAre you sure you want to continue? [y/N] ",
        )?;
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        if read.is_err() || !answer.trim().eq_ignore_ascii_case("y") {
            return Ok(());
        }
    }
    let request = ListNetworksRequest {
        filters: Some(given.common()),
        ..ListNetworksRequest::default()
    };
    let all = daemon.networks(request).await?;
    let mut removed = Vec::new();
    for network in all {
        let request = RemoveNetworkRequest {
            r#ref: network.id.clone(),
        };
        match daemon.control().remove_network(request).await {
            Ok(_) => {
                let annotations = network.spec.unwrap_or_default().annotations;
                removed.push(annotations.unwrap_or_default().name);
            }
            // In use, or gone meanwhile.
            Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::NotFound) => {}
            Err(status) => return Err(status.into()),
        }
    }
    if !removed.is_empty() {
        output::line(&format!("Deleted Networks:\n{}\n", removed.join("\n")))?;
    }
    Ok(())
}
