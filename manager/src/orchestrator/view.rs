//! Small questions about tasks and nodes, and short ways to write actions.

use std::time::Duration;

use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    Node, NodeAvailability, NodeState, Object, ObjectKind, ObjectRef, RemoveObject, StoreAction,
    Task, TaskState, TaskStatus, TaskStatusUpdate, object, store_action,
};
use swarm_store::State;

use crate::clock::since_epoch;

/// What was observed last.
pub(crate) fn state_of(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, TaskStatus::state)
}

/// Wanted and not ended.
pub(crate) fn is_live(task: &Task) -> bool {
    is_wanted(task) && !is_terminal(state_of(task))
}

/// The cluster wants it prepared or running.
pub(crate) fn is_wanted(task: &Task) -> bool {
    task.desired_state() <= TaskState::Running
}

/// Nothing of it runs and nothing will: ended, or given up before it had a node.
pub(crate) fn has_ended(task: &Task) -> bool {
    is_terminal(state_of(task)) || (!is_wanted(task) && state_of(task) < TaskState::Assigned)
}

/// Ended without being asked to.
pub(crate) fn ended_by_itself(task: &Task) -> bool {
    matches!(
        state_of(task),
        TaskState::Complete | TaskState::Failed | TaskState::Rejected
    )
}

/// Runs, and its health check (if any) has passed.
pub(crate) fn is_good(task: &Task) -> bool {
    is_live(task)
        && state_of(task) == TaskState::Running
        && task.status.as_ref().is_some_and(|status| status.healthy)
}

/// When the task was made; zero if it does not say.
pub(crate) fn created_at(task: &Task) -> Duration {
    let at = task.meta.as_ref().and_then(|meta| meta.created_at.as_ref());
    at.map_or(Duration::ZERO, since_epoch)
}

/// When the task was last written; zero if it does not say.
pub(crate) fn updated_at(task: &Task) -> Duration {
    let at = task.meta.as_ref().and_then(|meta| meta.updated_at.as_ref());
    at.map_or(Duration::ZERO, since_epoch)
}

/// For how long it ran before it ended; `None` if it never did.
pub(crate) fn ran_for(task: &Task) -> Option<Duration> {
    let since = task.running_since.as_ref().map(since_epoch)?;
    Some(updated_at(task).saturating_sub(since))
}

/// The node is silent or has left: what ran there counts as lost.
pub(crate) fn is_lost(node: &Node) -> bool {
    let state = node.status.as_ref().map(|status| status.state());
    matches!(state, Some(NodeState::Down | NodeState::Disconnected))
}

/// The task's node is gone, silent or has left.
pub(crate) fn on_lost_node(state: &State, task: &Task) -> bool {
    !task.node_id.is_empty() && state.node(&task.node_id).is_none_or(|node| is_lost(node))
}

/// What people want of the node.
pub(crate) fn availability(node: &Node) -> NodeAvailability {
    node.spec
        .as_ref()
        .map_or(NodeAvailability::Active, |spec| spec.availability())
}

/// Stands in the way of the next task of its slot: may still run.
pub(crate) fn occupies(state: &State, task: &Task) -> bool {
    !has_ended(task) && !on_lost_node(state, task)
}

fn wrap(action: store_action::Action) -> StoreAction {
    StoreAction {
        action: Some(action),
    }
}

/// Creates the task.
pub(crate) fn create(task: Task) -> StoreAction {
    wrap(store_action::Action::Create(Object {
        object: Some(object::Object::Task(task)),
    }))
}

/// Writes the object; the version in it is the expected one.
pub(crate) fn update(object: object::Object) -> StoreAction {
    wrap(store_action::Action::Update(Object {
        object: Some(object),
    }))
}

/// Wants the task to be in another state.
pub(crate) fn desire(task: &Task, wanted: TaskState) -> StoreAction {
    update(object::Object::Task(Task {
        desired_state: wanted.into(),
        ..task.clone()
    }))
}

/// Ends a task of a service that is gone: nobody can ask for it, and it waits for nobody.
pub(crate) fn give_up(task: &Task) -> StoreAction {
    update(object::Object::Task(Task {
        desired_state: TaskState::Remove.into(),
        withdrawn: true,
        ..task.clone()
    }))
}

/// Deletes the task, if it is still as seen.
pub(crate) fn remove(task: &Task) -> StoreAction {
    let version = task.meta.as_ref().and_then(|meta| meta.version);
    wrap(store_action::Action::Remove(RemoveObject {
        r#ref: Some(ObjectRef {
            kind: ObjectKind::Task.into(),
            id: task.id.clone(),
        }),
        expected_version: version.map_or(0, |version| version.index),
    }))
}

/// Reports a task's state for a node that cannot.
pub(crate) fn report(task: &Task, status: TaskStatus) -> StoreAction {
    wrap(store_action::Action::TaskStatus(TaskStatusUpdate {
        task_id: task.id.clone(),
        status: Some(status),
    }))
}
