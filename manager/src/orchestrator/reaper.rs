//! Deletes tasks that nobody needs any more, and gives up those on nodes that are gone.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::defaults::{ORPHAN_AFTER, TASK_HISTORY};
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{Node, Task, TaskState, TaskStatus};
use swarm_store::State;

use super::view::{
    created_at, has_ended, is_lost, is_wanted, remove, report, state_of, updated_at,
};
use super::{Decision, restart};
use crate::clock::{since_epoch, timestamp};

/// Cleans up after a service, leaving alone the tasks that this pass has already `touched`.
pub(crate) fn decide(
    state: &State,
    service_id: &str,
    now: Duration,
    touched: &HashSet<String>,
    decision: &mut Decision,
) {
    let limit = state.cluster().and_then(|cluster| cluster.spec.as_ref());
    let limit = limit
        .and_then(|spec| spec.task_history_limit)
        .unwrap_or(TASK_HISTORY);
    let service = state.service(service_id);
    let needed = service.map_or(0, |service| {
        restart::history_needed(&restart::policy(service))
    });
    let limit = usize::try_from(limit).unwrap_or(usize::MAX).max(needed);
    let mut slots: BTreeMap<(u64, &str), History<'_>> = BTreeMap::new();
    for task in state.tasks_of_service(service_id) {
        let place = (
            task.slot,
            if task.slot == 0 {
                task.node_id.as_str()
            } else {
                ""
            },
        );
        let slot = slots.entry(place).or_default();
        if is_wanted(task) {
            slot.live = true;
            continue;
        }
        if touched.contains(&task.id) {
            continue;
        }
        let node = state.node(&task.node_id);
        let node_removed = !task.node_id.is_empty() && node.is_none();
        let never_ran = has_ended(task) && !is_terminal(state_of(task));
        let leaves = task.desired_state() == TaskState::Remove;
        if node_removed || never_ran || (leaves && has_ended(task)) {
            decision.push(vec![remove(task)]);
        } else if !has_ended(task) {
            orphan(task, node, now, decision);
        } else {
            slot.past.push(task);
        }
    }
    for slot in slots.into_values() {
        slot.trim(limit, decision);
    }
}

/// The ended tasks of one slot.
#[derive(Default)]
struct History<'a> {
    live: bool,
    past: Vec<&'a Arc<Task>>,
}

impl History<'_> {
    fn trim(mut self, limit: usize, decision: &mut Decision) {
        // A slot that has finished is known by its last task.
        let keep = limit.max(usize::from(!self.live));
        let Some(surplus) = self.past.len().checked_sub(keep) else {
            return;
        };
        self.past.sort_by(|left, right| {
            created_at(left)
                .cmp(&created_at(right))
                .then_with(|| left.id.cmp(&right.id))
        });
        for task in &self.past[..surplus] {
            decision.push(vec![remove(task)]);
        }
    }
}

/// Gives up a task that was told to stop on a node that has been silent since.
fn orphan(task: &Task, node: Option<&Arc<Node>>, now: Duration, decision: &mut Decision) {
    let Some(node) = node.filter(|node| is_lost(node)) else {
        return;
    };
    let written = node.meta.as_ref().and_then(|meta| meta.updated_at.as_ref());
    let since = written
        .map_or(Duration::ZERO, since_epoch)
        .max(updated_at(task));
    let due = since + ORPHAN_AFTER;
    if now < due {
        return decision.wake(due);
    }
    let status = TaskStatus {
        state: TaskState::Orphaned.into(),
        timestamp: Some(timestamp(now)),
        message: "the node has been down for too long".to_owned(),
        ..TaskStatus::default()
    };
    decision.push(vec![report(task, status)]);
}
