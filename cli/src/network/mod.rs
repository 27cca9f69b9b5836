//! `swarm network …`

pub(crate) mod create;
mod inspect;
mod ls;
mod prune;
mod rm;

use swarm_proto::v1::{ListLocalNetworksRequest, LocalNetwork};

use crate::daemon::Daemon;
use crate::failure::Result;

/// Manage networks
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    Create(create::Create),
    Inspect(inspect::Inspect),
    #[command(alias = "list")]
    Ls(ls::Ls),
    Prune(prune::Prune),
    #[command(alias = "remove")]
    Rm(rm::Rm),
}

/// Runs the verb.
pub async fn run(command: Command, daemon: &Daemon) -> Result {
    match command {
        Command::Create(flags) => create::run(flags, daemon).await,
        Command::Inspect(flags) => inspect::run(flags, daemon).await,
        Command::Ls(flags) => ls::run(flags, daemon).await,
        Command::Prune(flags) => prune::run(flags, daemon).await,
        Command::Rm(flags) => rm::run(flags, daemon).await,
    }
}

/// What this node holds.
async fn local(daemon: &Daemon) -> Result<Vec<LocalNetwork>> {
    let answer = daemon
        .local()
        .list_local_networks(ListLocalNetworksRequest {})
        .await?;
    Ok(answer.into_inner().networks)
}
