//! `swarm service create`

use swarm_proto::v1::CreateServiceRequest;

use super::flags::Common;
use super::{image, progress, spec};
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Create a new service
#[derive(clap::Args, Clone, Debug)]
pub struct Create {
    #[command(flatten)]
    pub common: Common,
    /// Service name
    #[arg(long)]
    pub name: Option<String>,
    /// Service mode ("replicated", "global")
    #[arg(long, default_value = "replicated")]
    pub mode: String,
    /// Network attachments
    #[arg(long)]
    pub network: Vec<String>,
    /// Publish a port (mode=host,published=8080,target=80)
    #[arg(short, long)]
    pub publish: Vec<String>,
    /// Placement constraints
    #[arg(long)]
    pub constraint: Vec<String>,
    /// Add a placement preference
    #[arg(long)]
    pub placement_pref: Vec<String>,
    /// Set environment variables
    #[arg(short, long)]
    pub env: Vec<String>,
    /// Read in a file of environment variables
    #[arg(long)]
    pub env_file: Vec<String>,
    /// Service labels
    #[arg(short, long)]
    pub label: Vec<String>,
    /// Container labels
    #[arg(long)]
    pub container_label: Vec<String>,
    /// Attach a filesystem mount to the service
    #[arg(long)]
    pub mount: Vec<String>,
    /// Add Linux capabilities
    #[arg(long)]
    pub cap_add: Vec<String>,
    /// Drop Linux capabilities
    #[arg(long)]
    pub cap_drop: Vec<String>,
    /// Set one or more supplementary user groups for the container
    #[arg(long)]
    pub group: Vec<String>,
    /// Set one or more custom host-to-IP mappings (host:ip)
    #[arg(long)]
    pub host: Vec<String>,
    /// Set custom DNS servers
    #[arg(long)]
    pub dns: Vec<String>,
    /// Set custom DNS search domains
    #[arg(long)]
    pub dns_search: Vec<String>,
    /// Set DNS options
    #[arg(long)]
    pub dns_option: Vec<String>,
    /// The image, then arguments of the container
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_names = ["IMAGE", "COMMAND", "ARG"]
    )]
    pub image: Vec<String>,
}

/// Creates the service and, unless detached, waits until it has converged.
pub async fn run(flags: Create, daemon: &Daemon) -> Result {
    let mut spec = spec::create(&flags)?;
    let warning = image::pin(daemon, &mut spec, &flags.common).await?;
    let answer = daemon
        .control()
        .create_service(CreateServiceRequest { spec: Some(spec) })
        .await?
        .into_inner();
    let service = answer.service.unwrap_or_default();
    for text in warning.into_iter().chain(answer.warnings) {
        output::warn(&text);
    }
    output::line(&service.id)?;
    if flags.common.detach {
        return Ok(());
    }
    progress::wait(daemon, &service, &service.id, flags.common.quiet).await
}
