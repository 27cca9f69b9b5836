//! `swarm service rm`

use swarm_proto::v1::RemoveServiceRequest;

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::removal;

/// Remove one or more services
#[derive(clap::Args, Debug)]
pub struct Rm {
    /// The services
    #[arg(required = true)]
    services: Vec<String>,
}

/// Removes each, and goes on after one that cannot be removed.
pub async fn run(flags: Rm, daemon: &Daemon) -> Result {
    removal::each(&flags.services, async |reference: String| {
        let request = RemoveServiceRequest { r#ref: reference };
        daemon.control().remove_service(request).await.map(drop)
    })
    .await
}
