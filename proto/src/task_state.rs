//! The order of task states, and who may enter which.
//!
//! One table: a test checks that no transition goes backwards and that every
//! state has exactly one owner.

use crate::v1::TaskState;

/// The component that may move a task into a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Creates tasks.
    Orchestrator,
    /// Allocation, inside the store's apply.
    Allocator,
    /// Chooses nodes.
    Scheduler,
    /// The agent of the task's node.
    Agent,
    /// The manager's clean-up of nodes that are gone.
    Reaper,
}

/// Every observed state with its owner, in order.
pub const OWNERS: [(TaskState, Owner); 13] = [
    (TaskState::New, Owner::Orchestrator),
    (TaskState::Pending, Owner::Allocator),
    (TaskState::Assigned, Owner::Scheduler),
    (TaskState::Accepted, Owner::Agent),
    (TaskState::Preparing, Owner::Agent),
    (TaskState::Ready, Owner::Agent),
    (TaskState::Starting, Owner::Agent),
    (TaskState::Running, Owner::Agent),
    (TaskState::Complete, Owner::Agent),
    (TaskState::Shutdown, Owner::Agent),
    (TaskState::Failed, Owner::Agent),
    (TaskState::Rejected, Owner::Agent),
    (TaskState::Orphaned, Owner::Reaper),
];

/// Whether a task may go from one observed state to the other: only upwards,
/// and out of a terminal state only to ORPHANED… never: a terminal state is final.
#[must_use]
pub fn may_advance(from: TaskState, to: TaskState) -> bool {
    (to as i32) > (from as i32) && !is_terminal(from) && to != TaskState::Remove
}

/// The task has ended: nothing of it runs, its addresses are free.
#[must_use]
pub fn is_terminal(state: TaskState) -> bool {
    (state as i32) > (TaskState::Running as i32)
}

/// The name that people see: "running".
#[must_use]
pub fn name(state: TaskState) -> &'static str {
    match state {
        TaskState::New => "new",
        TaskState::Pending => "pending",
        TaskState::Assigned => "assigned",
        TaskState::Accepted => "accepted",
        TaskState::Preparing => "preparing",
        TaskState::Ready => "ready",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Complete => "complete",
        TaskState::Shutdown => "shutdown",
        TaskState::Failed => "failed",
        TaskState::Rejected => "rejected",
        TaskState::Remove => "remove",
        TaskState::Orphaned => "orphaned",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_one_owner_and_the_order_rises() {
        for pair in OWNERS.windows(2) {
            assert!((pair[0].0 as i32) < (pair[1].0 as i32));
        }
        for (state, _) in OWNERS {
            assert_eq!(OWNERS.iter().filter(|(s, _)| *s == state).count(), 1);
        }
    }

    #[test]
    fn no_state_goes_back_and_terminal_ones_are_final() {
        for (from, _) in OWNERS {
            for (to, _) in OWNERS {
                if may_advance(from, to) {
                    assert!((to as i32) > (from as i32));
                    assert!(!is_terminal(from));
                }
            }
        }
    }
}
