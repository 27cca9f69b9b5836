//! `swarm info`

use serde_json::{Value, json};
use swarm_proto::v1::{InfoResponse, LocalState, NodeRole};

use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::output;
use crate::output::human::rfc3339;
use crate::output::template::Template;

/// Display what this node knows of itself and its swarm
#[derive(clap::Args, Debug)]
pub struct Info {
    /// Format output using a Go template, or 'json'
    #[arg(short, long)]
    format: Option<String>,
}

/// Prints it.
pub async fn run(flags: Info, daemon: &Daemon) -> Result {
    let info = daemon.info().await?;
    match flags.format.as_deref() {
        None | Some("") => output::print(&text(&info)),
        Some("json") => output::line(&value(&info).to_string()),
        Some(template) => {
            let template = Template::parse(template, false).map_err(Failure::Plain)?;
            output::line(&template.render(&value(&info)).map_err(Failure::Plain)?)
        }
    }
}

fn state(info: &InfoResponse) -> &'static str {
    match info.state() {
        LocalState::Inactive => "inactive",
        LocalState::Pending => "pending",
        LocalState::Active => "active",
        LocalState::Error => "error",
    }
}

fn value(info: &InfoResponse) -> Value {
    json!({
        "Name": info.hostname,
        "ServerVersion": info.version,
        "ContainersRunning": info.containers_running,
        "Swarm": {
            "NodeID": info.node_id,
            "NodeAddr": info.advertise_addr,
            "DataPathAddr": info.data_path_addr,
            "LocalNodeState": state(info),
            "ControlAvailable": info.control_available,
            "Error": info.error,
            "RemoteManagers": info.managers,
            "Nodes": info.node_count,
            "Managers": info.manager_count,
            "Cluster": {"ID": info.cluster_id},
            "CertificateExpires": info.certificate_expires.as_ref().map(|at| rfc3339(Some(at))),
        },
    })
}

fn text(info: &InfoResponse) -> String {
    let mut text = format!(
        "Name: {}\nServer Version: {}\nContainers Running: {}\nSwarm: {}\n",
        info.hostname,
        info.version,
        info.containers_running,
        state(info)
    );
    let mut put = |label: &str, value: &str| text.push_str(&format!(" {label}: {value}\n"));
    if !info.error.is_empty() {
        put("Error", &info.error);
    }
    if info.node_id.is_empty() {
        return text;
    }
    put("NodeID", &info.node_id);
    let manager = info.role() == NodeRole::Manager;
    put("Is Manager", if manager { "true" } else { "false" });
    put("ClusterID", &info.cluster_id);
    if manager {
        put(
            "Control Available",
            if info.control_available {
                "true"
            } else {
                "false"
            },
        );
    }
    if info.control_available {
        put("Managers", &info.manager_count.to_string());
        put("Nodes", &info.node_count.to_string());
    }
    put("Node Address", &info.advertise_addr);
    put("Data Path Address", &info.data_path_addr);
    if let Some(at) = &info.certificate_expires {
        put("Certificate Expires", &rfc3339(Some(at)));
    }
    text.push_str(" Manager Addresses:\n");
    for manager in &info.managers {
        text.push_str(&format!("  {manager}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_outside_says_so_and_no_more() {
        let info = InfoResponse {
            hostname: "h1".to_owned(),
            version: "0.1.0".to_owned(),
            ..InfoResponse::default()
        };
        assert_eq!(
            text(&info),
            "Name: h1\nServer Version: 0.1.0\nContainers Running: 0\nSwarm: inactive\n"
        );
    }

    #[test]
    fn a_manager_counts_its_cluster() {
        let info = InfoResponse {
            state: LocalState::Active.into(),
            node_id: "n1".to_owned(),
            role: NodeRole::Manager.into(),
            control_available: true,
            node_count: 3,
            manager_count: 1,
            managers: vec!["10.0.0.1:2377".to_owned()],
            ..InfoResponse::default()
        };
        let text = text(&info);
        for line in [
            "Swarm: active",
            " Is Manager: true",
            " Nodes: 3",
            "  10.0.0.1:2377",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in {text}");
        }
    }
}
