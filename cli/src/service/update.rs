//! `swarm service update`

use swarm_proto::v1::{GetNetworkRequest, Service, ServiceSpec};

use super::flags::Common;
use super::{change, image, progress, spec};
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Update a service
#[derive(clap::Args, Clone, Debug)]
pub struct Update {
    #[command(flatten)]
    pub common: Common,
    /// Service image tag
    #[arg(long)]
    pub image: Option<String>,
    /// Service command args
    #[arg(long)]
    pub args: Option<String>,
    /// Force update even if no changes require it
    #[arg(long)]
    pub force: bool,
    /// Add or update an environment variable
    #[arg(long)]
    pub env_add: Vec<String>,
    /// Remove an environment variable
    #[arg(long)]
    pub env_rm: Vec<String>,
    /// Add or update a service label
    #[arg(long)]
    pub label_add: Vec<String>,
    /// Remove a label by its key
    #[arg(long)]
    pub label_rm: Vec<String>,
    /// Add or update a container label
    #[arg(long)]
    pub container_label_add: Vec<String>,
    /// Remove a container label by its key
    #[arg(long)]
    pub container_label_rm: Vec<String>,
    /// Add or update a placement constraint
    #[arg(long)]
    pub constraint_add: Vec<String>,
    /// Remove a constraint
    #[arg(long)]
    pub constraint_rm: Vec<String>,
    /// Add a placement preference
    #[arg(long)]
    pub placement_pref_add: Vec<String>,
    /// Remove a placement preference
    #[arg(long)]
    pub placement_pref_rm: Vec<String>,
    /// Add a network
    #[arg(long)]
    pub network_add: Vec<String>,
    /// Remove a network
    #[arg(long)]
    pub network_rm: Vec<String>,
    /// Add or update a published port
    #[arg(long)]
    pub publish_add: Vec<String>,
    /// Remove a published port by its target port
    #[arg(long)]
    pub publish_rm: Vec<String>,
    /// Add or update a mount on a service
    #[arg(long)]
    pub mount_add: Vec<String>,
    /// Remove a mount by its target path
    #[arg(long)]
    pub mount_rm: Vec<String>,
    /// Add Linux capabilities
    #[arg(long)]
    pub cap_add: Vec<String>,
    /// Drop Linux capabilities
    #[arg(long)]
    pub cap_drop: Vec<String>,
    /// Add an additional supplementary user group to the container
    #[arg(long)]
    pub group_add: Vec<String>,
    /// Remove a previously added supplementary user group from the container
    #[arg(long)]
    pub group_rm: Vec<String>,
    /// Add a custom host-to-IP mapping (host:ip)
    #[arg(long)]
    pub host_add: Vec<String>,
    /// Remove a custom host-to-IP mapping
    #[arg(long)]
    pub host_rm: Vec<String>,
    /// Add or update a custom DNS server
    #[arg(long)]
    pub dns_add: Vec<String>,
    /// Remove a custom DNS server
    #[arg(long)]
    pub dns_rm: Vec<String>,
    /// Add or update a custom DNS search domain
    #[arg(long)]
    pub dns_search_add: Vec<String>,
    /// Remove a DNS search domain
    #[arg(long)]
    pub dns_search_rm: Vec<String>,
    /// Add or update a DNS option
    #[arg(long)]
    pub dns_option_add: Vec<String>,
    /// Remove a DNS option
    #[arg(long)]
    pub dns_option_rm: Vec<String>,
    /// The service
    pub service: String,
}

/// Changes the service and, unless detached, waits until it has converged.
pub async fn run(mut flags: Update, daemon: &Daemon) -> Result {
    // The spec names networks by ID.
    for name in &mut flags.network_rm {
        let request = GetNetworkRequest {
            r#ref: name.clone(),
            verbose: false,
        };
        let found = daemon.control().get_network(request).await?.into_inner();
        *name = found.network.unwrap_or_default().id;
    }
    for text in &mut flags.network_add {
        let target = super::flags::network(text)?.target;
        let request = GetNetworkRequest {
            r#ref: target.clone(),
            verbose: false,
        };
        let found = daemon.control().get_network(request).await?.into_inner();
        let id = found.network.unwrap_or_default().id;
        *text = if text.contains('=') {
            text.replacen(&format!("name={target}"), &format!("name={id}"), 1)
        } else {
            id
        };
    }
    // Asked once, before the spec is written: the registry may take its time.
    let mut pinned: Option<ServiceSpec> = None;
    let mut warning = None;
    if let Some(image) = &flags.image {
        let mut wanted = ServiceSpec::default();
        let task = wanted.task.get_or_insert_default();
        task.container
            .get_or_insert_default()
            .image
            .clone_from(image);
        warning = image::pin(daemon, &mut wanted, &flags.common).await?;
        pinned = Some(wanted);
    }
    let service = change(daemon, &flags.service, |service: &Service| {
        let old = service.spec.clone().unwrap_or_default();
        let mut new = spec::update(&old, &flags)?;
        if let Some(pinned) = &pinned {
            image::take(&mut new, pinned);
        }
        Ok(new)
    })
    .await?;
    if let Some(text) = &warning {
        output::warn(text);
    }
    output::line(&flags.service)?;
    if flags.common.detach {
        return Ok(());
    }
    progress::wait(daemon, &service, &flags.service, flags.common.quiet).await
}
