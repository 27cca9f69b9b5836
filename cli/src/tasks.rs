//! Lists of tasks, as `service ps` and `node ps` show them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use swarm_proto::names::task_short_name;
use swarm_proto::task_state;
use swarm_proto::v1::{
    ListNodesRequest, ListTasksRequest, PortConfig, PublishMode, Service, Task, TaskState,
};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::filter::Given;
use crate::output::list::{self, Columns, Format, Row};
use crate::output::{human, json, short};

/// Characters of an error in the table.
const ERROR_SHOWN: usize = 30;

/// Flags of every list of tasks.
#[derive(clap::Args, Debug)]
pub struct TaskList {
    #[command(flatten)]
    pub format: Format,
    /// Filter output based on conditions provided
    #[arg(short, long)]
    pub filter: Vec<String>,
    /// Do not truncate output
    #[arg(long)]
    pub no_trunc: bool,
    /// Do not map IDs to Names
    #[arg(long)]
    pub no_resolve: bool,
}

/// The filters of every list of tasks.
pub const FILTERS: &[&str] = &[
    "id",
    "name",
    "node",
    "desired-state",
    "service",
    "label",
    "_up-to-date",
    "runtime",
];

const COLUMNS: Columns = &[
    ("ID", "ID"),
    ("Name", "NAME"),
    ("Image", "IMAGE"),
    ("Node", "NODE"),
    ("DesiredState", "DESIRED STATE"),
    ("CurrentState", "CURRENT STATE"),
    ("Error", "ERROR"),
    ("Ports", "PORTS"),
];

/// The request for what the filters say.
pub fn request(given: &Given) -> std::result::Result<ListTasksRequest, String> {
    let states = given.choices(
        "desired-state",
        &[
            ("running", TaskState::Running),
            ("shutdown", TaskState::Shutdown),
            ("accepted", TaskState::Ready),
            ("ready", TaskState::Ready),
        ],
    )?;
    Ok(ListTasksRequest {
        filters: Some(given.common()),
        services: given.values("service"),
        nodes: given.values("node"),
        desired_states: states.into_iter().map(i32::from).collect(),
        ..ListTasksRequest::default()
    })
}

/// Asks for tasks and prints them.
pub async fn show(
    daemon: &Daemon,
    mut request: ListTasksRequest,
    given: &Given,
    flags: &TaskList,
    services: &BTreeMap<String, Service>,
) -> Result {
    let own = daemon
        .info()
        .await
        .map(|info| info.node_id)
        .unwrap_or_default();
    for node in &mut request.nodes {
        if node == "self" {
            node.clone_from(&own);
        }
    }
    let mut tasks = daemon.tasks(request).await?;
    if !given.values("_up-to-date").is_empty() {
        let wanted = given
            .values("_up-to-date")
            .iter()
            .any(|value| value == "true");
        tasks.retain(|task| {
            services
                .get(&task.service_id)
                .is_none_or(|service| up_to_date(task, service) == wanted)
        });
    }
    let mut hosts = BTreeMap::new();
    if !flags.no_resolve {
        for node in daemon.nodes(ListNodesRequest::default()).await? {
            hosts.insert(node.id, node.description.unwrap_or_default().hostname);
        }
    }
    let rows = rows(tasks, &hosts, flags.no_trunc, human::now());
    list::show(&flags.format, COLUMNS, &rows)
}

/// The task is what the service's spec asks for now.
pub fn up_to_date(task: &Task, service: &Service) -> bool {
    if task.spec_version == service.spec_version {
        return true;
    }
    let wanted = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    let (Some(have), Some(want)) = (task.spec.as_ref(), wanted) else {
        return false;
    };
    let container = |spec: &swarm_proto::v1::TaskSpec| {
        let mut container = spec.container.clone().unwrap_or_default();
        container.pull_auth = None;
        container
    };
    container(have) == container(want)
        && have.resources == want.resources
        && have.networks == want.networks
        && have.force_update == want.force_update
}

/// An image without its digest, unless it has nothing else.
pub fn shown_image(image: &str, whole: bool) -> String {
    match image.split_once('@') {
        Some((name, _)) if !whole => name.to_owned(),
        _ => image.to_owned(),
    }
}

/// Why the task has ended or waits.
pub fn trouble(task: &Task) -> String {
    let Some(status) = &task.status else {
        return String::new();
    };
    if !status.err.is_empty() {
        return status.err.clone();
    }
    let waiting = status.state() < TaskState::Running || task_state::is_terminal(status.state());
    match &status.reason {
        Some(reason) if waiting => reason.message.clone(),
        _ => String::new(),
    }
}

fn rows(
    mut tasks: Vec<Task>,
    hosts: &BTreeMap<String, String>,
    whole: bool,
    now: Duration,
) -> Vec<Row> {
    let place = |task: &Task| {
        let name = task
            .service_annotations
            .as_ref()
            .map(|annotations| annotations.name.clone());
        (
            name.unwrap_or_default(),
            task.service_id.clone(),
            task.slot,
            if task.slot == 0 {
                task.node_id.clone()
            } else {
                String::new()
            },
        )
    };
    let created = |task: &Task| {
        let meta = task.meta.unwrap_or_default();
        let at = meta.created_at.unwrap_or_default();
        (at.seconds, at.nanos, meta.version.unwrap_or_default().index)
    };
    tasks.sort_by(|a, b| place(a).cmp(&place(b)).then(created(b).cmp(&created(a))));
    let mut before = None;
    tasks
        .iter()
        .map(|task| {
            let here = place(task);
            let older = before.as_ref() == Some(&here);
            before = Some(here);
            row(task, hosts, whole, older, now)
        })
        .collect()
}

fn row(
    task: &Task,
    hosts: &BTreeMap<String, String>,
    whole: bool,
    older: bool,
    now: Duration,
) -> Row {
    let status = task.status.clone().unwrap_or_default();
    let container = task.spec.as_ref().and_then(|spec| spec.container.as_ref());
    let image = container.map_or("", |container| &container.image);
    let name = task_short_name(task);
    let mut error = trouble(task);
    if !whole && error.chars().count() > ERROR_SHOWN {
        error = error.chars().take(ERROR_SHOWN - 1).chain(['…']).collect();
    }
    if !error.is_empty() {
        error = format!("\"{error}\"");
    }
    let id = if whole { &task.id } else { short(&task.id) };
    Row::new([
        (
            "CurrentState",
            format!(
                "{} {}",
                capital(task_state::name(status.state())),
                human::ago(status.timestamp.as_ref(), now)
            ),
        ),
        (
            "DesiredState",
            capital(task_state::name(task.desired_state())),
        ),
        ("Error", error),
        ("ID", id.to_owned()),
        ("Image", shown_image(image, whole)),
        ("Name", if older { format!(" \\_ {name}") } else { name }),
        (
            "Node",
            hosts.get(&task.node_id).unwrap_or(&task.node_id).clone(),
        ),
        ("Ports", host_ports(task, &status.ports)),
    ])
    .with("Slot", Value::from(task.slot))
}

fn host_ports(task: &Task, reported: &[PortConfig]) -> String {
    let spec = task
        .endpoint
        .as_ref()
        .and_then(|endpoint| endpoint.spec.as_ref());
    let ports = if reported.is_empty() {
        spec.map_or(&[][..], |spec| &spec.ports)
    } else {
        reported
    };
    let live = task
        .status
        .as_ref()
        .is_some_and(|status| status.state() == TaskState::Running);
    let shown: Vec<_> = ports
        .iter()
        .filter(|port| live && port.publish_mode() == PublishMode::Host && port.published_port != 0)
        .map(|port| {
            format!(
                "*:{}->{}/{}",
                port.published_port,
                port.target_port,
                json::protocol(port.protocol())
            )
        })
        .collect();
    shown.join(",")
}

/// "Running"
pub fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_uppercase().chain(chars).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;
    use swarm_proto::v1::{Annotations, Meta, Reason, TaskStatus};

    use super::*;

    fn task(id: &str, slot: u64, created: i64, state: TaskState, err: &str) -> Task {
        Task {
            id: id.to_owned(),
            slot,
            service_id: "s".to_owned(),
            service_annotations: Some(
                Annotations {
                    name: "web".to_owned(),
                    ..Annotations::default()
                }
                .into(),
            ),
            meta: Some(Meta {
                created_at: Some(Timestamp {
                    seconds: created,
                    nanos: 0,
                }),
                ..Meta::default()
            }),
            status: Some(TaskStatus {
                timestamp: Some(Timestamp {
                    seconds: 88,
                    nanos: 0,
                }),
                state: state.into(),
                err: err.to_owned(),
                ..TaskStatus::default()
            }),
            desired_state: TaskState::Running.into(),
            ..Task::default()
        }
    }

    #[test]
    fn older_tasks_of_a_slot_are_listed_below_the_newest() {
        let long = "e".repeat(40);
        let all = vec![
            task("b", 2, 1, TaskState::Running, ""),
            task("old", 1, 1, TaskState::Failed, &long),
            task("a", 1, 5, TaskState::Running, ""),
        ];
        let rows = rows(all, &BTreeMap::new(), false, Duration::from_secs(100));
        let format = Format {
            format: Some("{{.ID}}|{{.Name}}|{{.CurrentState}}|{{.Error}}".to_owned()),
            quiet: false,
        };
        let text = list::render(&format, COLUMNS, &rows).unwrap();
        let cut = format!("\"{}…\"", "e".repeat(29));
        assert_eq!(
            text,
            format!(
                "a|web.1|Running 12 seconds ago|\nold| \\_ web.1|Failed 12 seconds ago|{cut}\nb|web.2|Running 12 seconds ago|\n"
            )
        );
    }

    #[test]
    fn a_task_that_waits_says_why() {
        let mut waiting = task("a", 1, 1, TaskState::Pending, "");
        waiting.status.as_mut().unwrap().reason = Some(Reason {
            message: "no suitable node".to_owned(),
            ..Reason::default()
        });
        assert_eq!(trouble(&waiting), "no suitable node");
        waiting.status.as_mut().unwrap().state = TaskState::Running.into();
        assert_eq!(trouble(&waiting), "");
    }

    #[test]
    fn a_digest_is_left_out_of_the_table() {
        assert_eq!(shown_image("nginx:1@sha256:abc", false), "nginx:1");
        assert_eq!(
            shown_image("nginx:1@sha256:abc", true),
            "nginx:1@sha256:abc"
        );
    }
}
