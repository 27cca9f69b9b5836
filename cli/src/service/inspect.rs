//! `swarm service inspect`

use std::time::Duration;

use swarm_proto::v1::{
    GetNetworkRequest, Resources, Service, UpdateConfig, UpdateOrder, UpdateState,
    placement_preference,
};
use tonic::Code;

use super::spec;
use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::output;
use crate::output::human::{ago, now, show_duration, show_size};
use crate::output::{json, list};
use crate::pretty::Pretty;
use crate::tasks::capital;

/// Display detailed information on one or more services
#[derive(clap::Args, Debug)]
pub struct Inspect {
    /// Format output using a Go template
    #[arg(short, long)]
    format: Option<String>,
    /// Print the information in a human friendly format
    #[arg(long)]
    pretty: bool,
    /// The services
    #[arg(required = true)]
    services: Vec<String>,
}

/// Prints what there is, then what there is not.
pub async fn run(flags: Inspect, daemon: &Daemon) -> Result {
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for reference in &flags.services {
        match super::get(daemon, reference).await {
            Ok(service) => found.push(service),
            Err(Failure::Daemon(status)) if status.code() == Code::NotFound => {
                missing.push(format!("no such service: {reference}"));
            }
            Err(failure) => return Err(failure),
        }
    }
    if !flags.pretty {
        let objects: Vec<_> = found.iter().map(json::service).collect();
        return list::inspected(flags.format.as_deref(), &objects, &missing);
    }
    for (place, service) in found.iter().enumerate() {
        if place > 0 {
            output::line("")?;
        }
        let mut networks = Vec::new();
        for network in service
            .spec
            .iter()
            .filter_map(|spec| spec.task.as_ref())
            .flat_map(|task| &task.networks)
        {
            networks.push(network_name(daemon, &network.target).await);
        }
        output::print(&pretty(service, &networks))?;
    }
    list::finish(&missing)
}

async fn network_name(daemon: &Daemon, id: &str) -> String {
    let request = GetNetworkRequest {
        r#ref: id.to_owned(),
        verbose: false,
    };
    let answer = daemon.control().get_network(request).await.ok();
    answer
        .and_then(|detail| detail.into_inner().network?.spec?.annotations)
        .map_or_else(|| id.to_owned(), |annotations| annotations.name)
}

fn span(span: Option<&prost_types::Duration>) -> Option<String> {
    let span = Duration::try_from(*span?).ok()?;
    Some(show_duration(span))
}

fn pretty(service: &Service, networks: &[String]) -> String {
    let spec = service.spec.clone().unwrap_or_default();
    let annotations = spec.annotations.clone().unwrap_or_default();
    let task = spec.task.clone().unwrap_or_default();
    let container = task.container.clone().unwrap_or_default();
    let mut out = Pretty::new();
    out.put("ID", &service.id);
    out.put("Name", &annotations.name);
    out.labels("Labels", &annotations.labels);
    match spec::replicas(&spec) {
        Some(replicas) => {
            out.put("Service Mode", "Replicated");
            out.indented("Replicas", &replicas.to_string());
        }
        None => out.put("Service Mode", "Global"),
    }
    if let Some(update) = &service.update_status
        && update.state() != UpdateState::Unspecified
    {
        out.head("UpdateStatus");
        out.indented("State", json::update_state(update.state()));
        if update.started_at.is_some() {
            out.indented("Started", &ago(update.started_at.as_ref(), now()));
        }
        if update.completed_at.is_some() {
            out.indented("Completed", &ago(update.completed_at.as_ref(), now()));
        }
        out.indented("Message", &update.message);
    }
    out.head("Placement");
    let placement = task.placement.clone().unwrap_or_default();
    out.indented_some("Constraints", &placement.constraints.join(", "));
    let preferences: Vec<_> = placement
        .preferences
        .iter()
        .filter_map(|one| one.preference.as_ref())
        .map(|placement_preference::Preference::Spread(spread)| {
            format!("spread={}", spread.spread_descriptor)
        })
        .collect();
    out.indented_some("Preferences", &preferences.join(", "));
    if placement.max_replicas > 0 {
        out.indented("Max Replicas Per Node", &placement.max_replicas.to_string());
    }
    for (name, config) in [
        ("UpdateConfig", &spec.update),
        ("RollbackConfig", &spec.rollback),
    ] {
        if let Some(config) = config {
            update_config(&mut out, name, config);
        }
    }
    out.head("ContainerSpec");
    out.indented("Image", &container.image);
    out.indented_some("Command", &container.command.join(" "));
    out.indented_some("Args", &container.args.join(" "));
    out.indented_some("Env", &container.env.join(" "));
    out.indented_some("Dir", &container.dir);
    out.indented_some("User", &container.user);
    out.indented_some("Hostname", &container.hostname);
    out.indented("Init", if container.init { "true" } else { "false" });
    if let Some(grace) = span(container.stop_grace_period.as_ref()) {
        out.indented("StopGracePeriod", &grace);
    }
    if !container.mounts.is_empty() {
        out.head("Mounts");
        for mount in &container.mounts {
            out.indented("Target", &mount.target);
            out.indented_some("\tSource", &mount.source);
            out.indented("\tReadOnly", if mount.read_only { "true" } else { "false" });
            out.indented("\tType", json::mount_type(mount.r#type()));
        }
    }
    let wanted = task.resources.unwrap_or_default();
    if wanted.limits.is_some() || wanted.reservations.is_some() {
        out.head("Resources");
        resources(&mut out, "Reservations", wanted.reservations.as_ref());
        resources(&mut out, "Limits", wanted.limits.as_ref());
    }
    if !networks.is_empty() {
        out.put("Networks", &networks.join(" "));
    }
    let endpoint = spec.endpoint.clone().unwrap_or_default();
    out.put("Endpoint Mode", json::endpoint_mode(endpoint.mode()));
    if !endpoint.ports.is_empty() {
        out.head("Ports");
        for port in &endpoint.ports {
            out.raw(&format!(
                " PublishedPort = {}\n  Protocol = {}\n  TargetPort = {}\n  PublishMode = {}\n",
                port.published_port,
                json::protocol(port.protocol()),
                port.target_port,
                json::publish_mode(port.publish_mode())
            ));
        }
    }
    if let Some(reason) = &service.reason {
        out.put("Waiting", &capital(&reason.message));
    }
    out.done()
}

fn update_config(out: &mut Pretty, name: &str, config: &UpdateConfig) {
    out.head(name);
    out.indented("Parallelism", &config.parallelism.to_string());
    if let Some(delay) = span(config.delay.as_ref()) {
        out.indented("Delay", &delay);
    }
    let action = match config.failure_action() {
        swarm_proto::v1::FailureAction::Pause => "pause",
        swarm_proto::v1::FailureAction::Continue => "continue",
        swarm_proto::v1::FailureAction::Rollback => "rollback",
    };
    out.indented("On failure", action);
    if let Some(monitor) = span(config.monitor.as_ref()) {
        out.indented("Monitoring Period", &monitor);
    }
    out.indented("Max failure ratio", &config.max_failure_ratio.to_string());
    out.indented(
        "Update order",
        match config.order() {
            UpdateOrder::StopFirst => "stop-first",
            UpdateOrder::StartFirst => "start-first",
        },
    );
}

fn resources(out: &mut Pretty, name: &str, resources: Option<&Resources>) {
    let Some(resources) = resources else { return };
    out.raw(&format!(" {name}:\n"));
    if resources.nano_cpus > 0 {
        out.raw(&format!("  CPU:\t\t{}\n", resources.nano_cpus as f64 / 1e9));
    }
    if resources.memory_bytes > 0 {
        out.raw(&format!(
            "  Memory:\t{}\n",
            show_size(resources.memory_bytes)
        ));
    }
}
