//! `swarm service ls`

use swarm_proto::v1::{ListServicesRequest, PortConfig, PublishMode, Service};

use super::spec;
use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::output::list::{self, Columns, Format, Row};
use crate::output::{json, short};
use crate::tasks::shown_image;

/// List services
#[derive(clap::Args, Debug)]
pub struct Ls {
    #[command(flatten)]
    format: Format,
    /// Filter output based on conditions provided
    #[arg(short, long)]
    filter: Vec<String>,
    /// Don't truncate IDs
    #[arg(long)]
    no_trunc: bool,
}

const COLUMNS: Columns = &[
    ("ID", "ID"),
    ("Name", "NAME"),
    ("Mode", "MODE"),
    ("Replicas", "REPLICAS"),
    ("Image", "IMAGE"),
    ("Ports", "PORTS"),
];

/// Prints the list.
pub async fn run(flags: Ls, daemon: &Daemon) -> Result {
    let given = Given::parse(&flags.filter, &["id", "name", "label", "mode", "runtime"])?;
    let modes = given.choices(
        "mode",
        &[
            ("replicated", "replicated"),
            ("global", "global"),
            ("replicated-job", "replicated-job"),
            ("global-job", "global-job"),
        ],
    )?;
    let request = ListServicesRequest {
        filters: Some(given.common()),
        modes: modes.into_iter().map(str::to_owned).collect(),
        with_status: true,
        ..ListServicesRequest::default()
    };
    let mut services = daemon.services(request).await?;
    services.sort_by_key(super::name);
    let rows: Vec<_> = services
        .iter()
        .map(|service| row(service, flags.no_trunc))
        .collect();
    list::show(&flags.format, COLUMNS, &rows)
}

fn row(service: &Service, whole: bool) -> Row {
    let spec = service.spec.clone().unwrap_or_default();
    let task = spec.task.clone().unwrap_or_default();
    let status = service.status.unwrap_or_default();
    let mut replicas = format!("{}/{}", status.running_tasks, status.desired_tasks);
    let most = task.placement.as_ref();
    let most = most.map_or(0, |placement| placement.max_replicas);
    if most > 0 {
        replicas.push_str(&format!(" (max {most} per node)"));
    }
    let mode = match spec::replicas(&spec) {
        Some(_) => "replicated",
        None => "global",
    };
    let id = if whole {
        &service.id
    } else {
        short(&service.id)
    };
    let image = task.container.as_ref();
    let image = image.map_or("", |container| &container.image);
    let annotations = spec.annotations.unwrap_or_default();
    let ports = service
        .endpoint
        .as_ref()
        .map_or(&[][..], |endpoint| &endpoint.ports);
    Row::new([
        ("ID", id.to_owned()),
        ("Image", shown_image(image, false)),
        ("Mode", mode.to_owned()),
        ("Name", annotations.name),
        ("Ports", show_ports(ports)),
        ("Replicas", replicas),
    ])
    .with_labels(annotations.labels)
}

/// `*:80-81->80-81/tcp` for the ports that every node publishes; runs are merged.
fn show_ports(ports: &[PortConfig]) -> String {
    let mut ports: Vec<_> = ports
        .iter()
        .filter(|port| port.publish_mode() == PublishMode::Ingress)
        .collect();
    ports.sort_by_key(|port| (port.protocol, port.published_port, port.target_port));
    let mut runs: Vec<(u32, u32, u32, &str)> = Vec::new();
    for port in ports {
        let protocol = json::protocol(port.protocol());
        match runs.last_mut() {
            Some((published, target, length, same))
                if *same == protocol
                    && *published + *length == port.published_port
                    && *target + *length == port.target_port =>
            {
                *length += 1;
            }
            _ => runs.push((port.published_port, port.target_port, 1, protocol)),
        }
    }
    let range = |first: u32, length: u32| {
        if length == 1 {
            first.to_string()
        } else {
            format!("{first}-{}", first + length - 1)
        }
    };
    let shown: Vec<_> = runs
        .into_iter()
        .map(|(published, target, length, protocol)| {
            format!(
                "*:{}->{}/{protocol}",
                range(published, length),
                range(target, length)
            )
        })
        .collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_ports_are_merged_and_host_ports_left_out() {
        let port = |published_port, target_port| PortConfig {
            published_port,
            target_port,
            ..PortConfig::default()
        };
        let host = PortConfig {
            publish_mode: PublishMode::Host.into(),
            ..port(99, 99)
        };
        assert_eq!(
            show_ports(&[port(81, 81), port(80, 80), host, port(9000, 90)]),
            "*:80-81->80-81/tcp, *:9000->90/tcp"
        );
    }
}
