//! Finds tasks that may not stay where they are.
//!
//! A node that is drained or no longer meets the service's constraints loses
//! its tasks; so does one that is silent, has left or was removed.

use swarm_proto::v1::{Node, NodeAvailability, Service, Task};
use swarm_store::State;

use super::view::{availability, is_lost};
use crate::scheduler::constraint::Constraint;

/// The constraints of a service, as they are now (a task's own copy may be older).
pub(crate) fn constraints(service: &Service) -> Vec<Constraint> {
    let task = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    let placement = task.and_then(|task| task.placement.as_ref());
    // What the border lets in parses; anything else binds no one here, and the scheduler says so.
    placement
        .iter()
        .flat_map(|placement| &placement.constraints)
        .filter_map(|text| Constraint::parse(text).ok())
        .collect()
}

/// The node may keep tasks with these constraints.
pub(crate) fn may_stay(node: &Node, constraints: &[Constraint]) -> bool {
    !is_lost(node)
        && availability(node) != NodeAvailability::Drain
        && constraints
            .iter()
            .all(|constraint| constraint.matches(node))
}

/// The task has a node, and must leave it.
pub(crate) fn must_leave(state: &State, task: &Task, constraints: &[Constraint]) -> bool {
    !task.node_id.is_empty()
        && state
            .node(&task.node_id)
            .is_none_or(|node| !may_stay(node, constraints))
}
