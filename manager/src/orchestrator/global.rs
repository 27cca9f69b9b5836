//! Services with one task on every node that fits.

use std::collections::HashMap;
use std::sync::Arc;

use swarm_proto::v1::{Node, NodeAvailability, NodeState, Service, Task, TaskState};

use super::CREATE_MAX;
use super::enforcer::may_stay;
use super::slot::{Pass, Place, Slot};
use super::view::{availability, desire, is_wanted};
use crate::scheduler::platform_fits;

/// One task per node that fits; none on the others.
pub(crate) fn decide<'a>(pass: &mut Pass<'a>) -> Vec<Slot<'a>> {
    let mut by_node: HashMap<&str, Vec<&Arc<Task>>> = HashMap::new();
    for task in pass.state.tasks_of_service(&pass.service.id) {
        if task.slot != 0 && task.desired_state() != TaskState::Remove {
            // From the time when the service was replicated.
            pass.decision.push(vec![desire(task, TaskState::Remove)]);
        } else if task.slot == 0 {
            by_node.entry(&task.node_id).or_default().push(task);
        }
    }
    let mut slots = Vec::new();
    let mut made = 0;
    for node in pass.state.nodes() {
        let tasks = by_node.remove(node.id.as_str()).unwrap_or_default();
        if !may_stay(node, &pass.constraints) || !fits(node, pass.service) {
            stop(pass, &tasks);
            continue;
        }
        let place = Place::Node(&node.id);
        let ready = node.status.as_ref().map(|status| status.state()) == Some(NodeState::Ready);
        let may_start = ready && availability(node) == NodeAvailability::Active;
        let kept = tasks
            .iter()
            .any(|task| task.desired_state() != TaskState::Remove);
        if kept {
            slots.push(pass.settle(place, tasks, may_start));
        } else if may_start && made < CREATE_MAX {
            made += 1;
            slots.push(pass.fill(place, tasks));
        }
    }
    // What is left belongs to nodes that were removed.
    for tasks in by_node.into_values() {
        stop(pass, &tasks);
    }
    slots
}

fn stop(pass: &mut Pass<'_>, tasks: &[&Arc<Task>]) {
    for task in tasks.iter().filter(|task| is_wanted(task)) {
        pass.decision.push(vec![desire(task, TaskState::Shutdown)]);
    }
}

fn fits(node: &Node, service: &Service) -> bool {
    let task = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    let placement = task.and_then(|task| task.placement.as_ref());
    placement.is_none_or(|placement| platform_fits(node, &placement.platforms))
}
