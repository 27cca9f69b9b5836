//! What must be true once faults have ended: every service as it was asked for, on nodes that are
//! there, and every node holding exactly what the state says. Written from the object model alone,
//! not with the code that is tested.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use swarm_agent::runtime::ContainerState;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::service_mode::Mode;
use swarm_proto::v1::{
    Node, NodeAvailability, NodeState, Placement, Service, ServiceSpec, Task, TaskSpec, TaskState,
};
use swarm_store::State;

use crate::machine::{self, Machine};
use crate::plan;

fn state_of(task: &Task) -> TaskState {
    task.status.as_ref().map_or(TaskState::New, |s| s.state())
}

fn live<'a>(tasks: impl Iterator<Item = &'a Arc<Task>>) -> impl Iterator<Item = &'a Arc<Task>> {
    tasks.filter(|task| !is_terminal(state_of(task)))
}

/// What is still missing, in one sentence.
pub fn missing(state: &State, machines: &[Arc<Machine>]) -> Option<String> {
    if let Some(node) = plan::stale(state).first() {
        return Some(format!(
            "node {}, whose machine is gone, is still there",
            node.id
        ));
    }
    for machine in machines {
        if let Some(reason) = node_missing(state, machine) {
            return Some(reason);
        }
    }
    let ready = state.nodes().count();
    if ready != machines.len() {
        return Some(format!("{ready} nodes on {} machines", machines.len()));
    }
    for service in state.services() {
        if let Some(reason) = service_missing(state, service, machines.len()) {
            return Some(reason);
        }
    }
    if let Some(task) = live(state.tasks()).find(|task| state.service(&task.service_id).is_none()) {
        return Some(format!("task {} of a removed service lives", task.id));
    }
    None
}

fn service_missing(state: &State, service: &Service, nodes: usize) -> Option<String> {
    let spec = service.spec.as_ref()?;
    let name = &spec.annotations.as_ref()?.name;
    let mode = spec.mode.as_ref().and_then(|mode| mode.mode);
    let wanted = match mode {
        Some(Mode::Replicated(replicated)) => replicated.replicas.unwrap_or(1) as usize,
        _ => state
            .nodes()
            .filter(|node| fits(spec, node))
            .count()
            .min(nodes),
    };
    let mut places = BTreeSet::new();
    for task in live(state.tasks_of_service(&service.id)) {
        if state_of(task) != TaskState::Running || task.desired_state != TaskState::Running as i32 {
            return Some(format!(
                "task {} of {name} is {:?}, to be {}: {:?}",
                task.id,
                state_of(task),
                task.desired_state,
                task.status
                    .as_ref()
                    .and_then(|status| status.reason.clone()),
            ));
        }
        if task.spec_version != service.spec_version && of_older_spec(task, spec) {
            return Some(format!("task {} of {name} is of an older spec", task.id));
        }
        if state
            .node(&task.node_id)
            .is_none_or(|node| !fits(spec, node))
        {
            return Some(format!(
                "task {} of {name} runs where the service must not",
                task.id
            ));
        }
        places.insert((
            task.slot,
            if task.slot == 0 {
                task.node_id.clone()
            } else {
                String::new()
            },
        ));
    }
    if places.len() != wanted {
        return Some(format!(
            "{} tasks of {name} run, not {wanted}",
            places.len()
        ));
    }
    None
}

/// The one kind of constraint that clients use: any host but this one.
fn fits(spec: &ServiceSpec, node: &Node) -> bool {
    let placement = spec.task.as_ref().and_then(|task| task.placement.as_ref());
    let hostname = node.description.as_ref().map(|known| &*known.hostname);
    let mut constraints = placement
        .iter()
        .flat_map(|placement| &placement.constraints);
    constraints.all(|constraint| constraint.strip_prefix("node.hostname != ") != hostname)
}

/// What a container that runs can follow replaces no task (ARCHITECTURE.md, "How managers decide").
fn of_older_spec(task: &Task, spec: &ServiceSpec) -> bool {
    let seen = |spec: Option<&TaskSpec>| {
        let mut spec = spec.cloned().unwrap_or_default();
        spec.restart = None;
        if let Some(placement) = &mut spec.placement {
            placement.constraints.clear();
        }
        spec.placement = spec.placement.filter(|rest| *rest != Placement::default());
        spec
    };
    seen(task.spec.as_deref()) != seen(spec.task.as_deref())
}

fn node_missing(state: &State, machine: &Machine) -> Option<String> {
    let host = machine.host;
    let id = machine::node(host)?.look(|member| member.identity.node_id().to_string())?;
    let Some(node) = state.node(&id) else {
        return Some(format!("the state knows no node of h{host}"));
    };
    let status = node.status.as_ref().map(|status| status.state());
    if status != Some(NodeState::Ready) {
        return Some(format!("h{host} is {status:?}"));
    }
    let spec = node.spec.as_ref()?;
    if spec.availability() != NodeAvailability::Active {
        return Some(format!("h{host} is not active"));
    }
    if spec.desired_role() != node.role() {
        return Some(format!("h{host} has not got the role it is to have"));
    }
    let tasks: Vec<&Arc<Task>> = live(state.tasks_on_node(&id)).collect();
    let held = machine.runtime.state();
    let running = held
        .containers
        .iter()
        .filter(|(_, container)| matches!(container.state, ContainerState::Running { .. }));
    let running: BTreeSet<&str> = running.map(|(task, _)| task.as_str()).collect();
    let meant: BTreeSet<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
    if running != meant {
        let state = tasks
            .iter()
            .map(|task| (state_of(task), task.desired_state));
        let state: Vec<_> = state.collect();
        let views = machine::node(host)?.look(|member| format!("{:?}", member.agent.tasks()));
        let session = machine::node(host)?
            .look(|member| format!("{:?}", member.agent.session().borrow().last_error));
        return Some(format!(
            "h{host} runs {running:?}, and is to run {meant:?}, which are {state:?}; its agent says {views:?}, session {session:?}"
        ));
    }
    let kernel = machine.dataplane.state();
    if let Some(conflict) = kernel.conflicts.first() {
        return Some(format!("two sandboxes of h{host} had address {conflict}"));
    }
    let networks: BTreeSet<&str> = tasks
        .iter()
        .flat_map(|task| &task.networks)
        .map(|attachment| attachment.network_id.as_str())
        .collect();
    let told: BTreeSet<&str> = kernel.networks.keys().map(|id| id.as_str()).collect();
    if told != networks {
        return Some(format!(
            "h{host} holds networks {told:?}, and has tasks on {networks:?}"
        ));
    }
    for (network, view) in &kernel.networks {
        let rows: BTreeMap<&str, (&str, &str)> = view
            .endpoints
            .iter()
            .map(|(task, row)| (task.as_str(), (row.addr.as_str(), row.vtep.as_str())))
            .collect();
        let mut wanted = BTreeMap::new();
        for task in live(state.tasks_on_network(network)) {
            let attachment = task
                .networks
                .iter()
                .find(|a| a.network_id == network.as_str());
            let vtep = state
                .node(&task.node_id)
                .and_then(|node| node.description.as_ref());
            if let (Some(attachment), Some(vtep)) = (attachment, vtep) {
                let addr = attachment
                    .addresses
                    .first()
                    .map_or("", |addr| addr.as_str());
                wanted.insert(task.id.as_str(), (addr, vtep.data_path_addr.as_str()));
            }
        }
        if rows != wanted {
            return Some(format!(
                "the table of network {network} on h{host} is {rows:?}, and must be {wanted:?}"
            ));
        }
    }
    None
}
