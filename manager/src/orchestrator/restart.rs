//! Whether, and when, an ended task gets a successor in its slot.
//!
//! Everything is derived from the tasks of the slot: the count of restarts in a
//! row travels from task to task, so no leader needs to remember it.

use std::sync::Arc;
use std::time::Duration;

use swarm_proto::defaults::{RESTART_BACKOFF_MAX, RESTART_DELAY};
use swarm_proto::v1::{RestartCondition, RestartPolicy, Service, Task, TaskState};

use super::view::{created_at, ended_by_itself, ran_for, state_of, updated_at};
use crate::clock::span;

/// A task that ran for this long (or for the policy's window) has proved itself:
/// what ends it later is not a restart in a row.
pub(crate) const PROVEN_AFTER: Duration = Duration::from_secs(60);
/// A task that ends at once, with a delay of zero, is not restarted faster than this (and its doubles).
const DELAY_MIN: Duration = Duration::from_millis(100);

/// What comes after a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// A successor at once: the cluster ended the task, not the task itself.
    Now {
        /// Its count of restarts.
        restarts: u32,
    },
    /// A successor after a delay.
    After {
        /// The delay, from the time at which the decision is made.
        delay: Duration,
        /// Its count of restarts.
        restarts: u32,
    },
    /// None: the policy says so.
    Never,
}

/// The policy of a service.
pub(crate) fn policy(service: &Service) -> RestartPolicy {
    let task = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    task.and_then(|task| task.restart).unwrap_or_default()
}

/// Tasks of one slot that must be kept for the count of attempts.
pub(crate) fn history_needed(policy: &RestartPolicy) -> usize {
    const MOST: u64 = 1000;
    match span(policy.window.as_ref(), Duration::ZERO) {
        Duration::ZERO => 0,
        _ => usize::try_from(policy.max_attempts.min(MOST)).unwrap_or(0),
    }
}

/// What comes after `last`, the newest of the `slot`'s tasks, none of which is live.
/// `same_spec` says whether the successor would be made from the same spec.
pub(crate) fn next(
    policy: &RestartPolicy,
    last: &Task,
    slot: &[&Arc<Task>],
    same_spec: bool,
) -> Next {
    if policy.condition() == RestartCondition::None {
        return Next::Never;
    }
    if !ended_by_itself(last) {
        return Next::Now {
            restarts: if same_spec { last.restarts } else { 0 },
        };
    }
    let completed = state_of(last) == TaskState::Complete;
    if completed && policy.condition() == RestartCondition::OnFailure {
        return Next::Never;
    }
    if !same_spec {
        return Next::Now { restarts: 0 };
    }
    let window = span(policy.window.as_ref(), Duration::ZERO);
    if policy.max_attempts > 0 && attempts(last, slot, window) >= policy.max_attempts {
        return Next::Never;
    }
    let proven_after = if window.is_zero() {
        PROVEN_AFTER
    } else {
        window
    };
    let proven = ran_for(last).is_some_and(|ran| ran >= proven_after);
    let in_a_row = if proven { 0 } else { last.restarts };
    // Without a window the attempts are counted for ever, so their count is never forgotten.
    let counts_for_ever = policy.max_attempts > 0 && window.is_zero();
    let counted = if counts_for_ever {
        last.restarts
    } else {
        in_a_row
    };
    Next::After {
        delay: delay(policy, in_a_row),
        restarts: counted.saturating_add(1),
    }
}

/// The wait before the next restart after `in_a_row` of them.
fn delay(policy: &RestartPolicy, in_a_row: u32) -> Duration {
    let mut base = span(policy.delay.as_ref(), RESTART_DELAY);
    if in_a_row > 0 {
        base = base.max(DELAY_MIN);
    }
    let factor = 1_u32
        .checked_shl(in_a_row.min(31))
        .unwrap_or(RESTART_BACKOFF_MAX)
        .min(RESTART_BACKOFF_MAX);
    base.saturating_mul(factor)
}

/// Restarts within the window that ends when the newest task has ended.
fn attempts(last: &Task, slot: &[&Arc<Task>], window: Duration) -> u64 {
    if window.is_zero() {
        return u64::from(last.restarts);
    }
    let until = created_at(last).max(updated_at(last));
    let within = |task: &&&Arc<Task>| {
        let at = created_at(task);
        task.not_before.is_some()
            && task.spec_version == last.spec_version
            && at <= until
            && until - at < window
    };
    slot.iter().filter(within).count() as u64
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{Meta, TaskStatus};

    use super::*;
    use crate::clock::timestamp;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn proto_span(count: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration {
            seconds: count,
            nanos: 0,
        })
    }

    fn ended(state: TaskState, created: u64, restarts: u32) -> Arc<Task> {
        Arc::new(Task {
            meta: Some(Meta {
                created_at: Some(timestamp(seconds(created))),
                updated_at: Some(timestamp(seconds(created + 1))),
                ..Meta::default()
            }),
            status: Some(TaskStatus {
                state: state.into(),
                ..TaskStatus::default()
            }),
            desired_state: TaskState::Running.into(),
            not_before: (restarts > 0).then(|| timestamp(seconds(created))),
            restarts,
            ..Task::default()
        })
    }

    fn after(policy: &RestartPolicy, task: &Arc<Task>) -> Next {
        next(policy, task, &[task], true)
    }

    #[test]
    fn the_delay_doubles_up_to_sixteen_times() {
        let delays: Vec<u64> = (0..7)
            .map(|restarts| {
                let task = ended(TaskState::Failed, 10, restarts);
                match after(&RestartPolicy::default(), &task) {
                    Next::After { delay, .. } => delay.as_secs(),
                    other => panic!("{other:?}"),
                }
            })
            .collect();
        assert_eq!(delays, [5, 10, 20, 40, 80, 80, 80]);
    }

    #[test]
    fn a_delay_of_zero_still_backs_off_when_the_task_keeps_failing() {
        let policy = RestartPolicy {
            delay: proto_span(0),
            ..RestartPolicy::default()
        };
        assert_eq!(delay(&policy, 0), Duration::ZERO);
        assert_eq!(delay(&policy, 1), Duration::from_millis(200));
        assert_eq!(delay(&policy, u32::MAX), Duration::from_millis(1600));
    }

    #[test]
    fn a_task_that_ran_long_starts_the_count_afresh() {
        let mut task = ended(TaskState::Failed, 10, 4);
        Arc::make_mut(&mut task).running_since = Some(timestamp(seconds(10)));
        Arc::make_mut(&mut task).meta.as_mut().unwrap().updated_at =
            Some(timestamp(seconds(10) + PROVEN_AFTER));
        assert_eq!(
            after(&RestartPolicy::default(), &task),
            Next::After {
                delay: seconds(5),
                restarts: 1
            }
        );
    }

    #[test]
    fn the_condition_decides_who_is_restarted() {
        let policy = |condition: RestartCondition| RestartPolicy {
            condition: condition.into(),
            ..RestartPolicy::default()
        };
        let (complete, failed) = (
            ended(TaskState::Complete, 1, 0),
            ended(TaskState::Failed, 1, 0),
        );
        assert_eq!(after(&policy(RestartCondition::None), &failed), Next::Never);
        assert_eq!(
            after(&policy(RestartCondition::OnFailure), &complete),
            Next::Never
        );
        for (condition, task) in [
            (RestartCondition::OnFailure, &failed),
            (RestartCondition::Any, &complete),
        ] {
            assert!(matches!(
                after(&policy(condition), task),
                Next::After { .. }
            ));
        }
    }

    #[test]
    fn what_the_cluster_ended_is_replaced_at_once() {
        for state in [TaskState::Shutdown, TaskState::Orphaned, TaskState::Running] {
            let task = ended(state, 1, 3);
            assert_eq!(
                after(&RestartPolicy::default(), &task),
                Next::Now { restarts: 3 }
            );
        }
    }

    #[test]
    fn attempts_without_a_window_are_counted_for_ever() {
        let policy = RestartPolicy {
            max_attempts: 3,
            ..RestartPolicy::default()
        };
        let mut task = ended(TaskState::Failed, 1, 2);
        Arc::make_mut(&mut task).running_since = Some(timestamp(seconds(0)));
        Arc::make_mut(&mut task).meta.as_mut().unwrap().updated_at =
            Some(timestamp(seconds(100_000)));
        assert!(matches!(
            after(&policy, &task),
            Next::After { restarts: 3, .. }
        ));
        Arc::make_mut(&mut task).restarts = 3;
        assert_eq!(after(&policy, &task), Next::Never);
    }

    #[test]
    fn only_attempts_within_the_window_count() {
        let policy = RestartPolicy {
            max_attempts: 2,
            window: proto_span(100),
            ..RestartPolicy::default()
        };
        let tasks = [
            ended(TaskState::Failed, 0, 1),
            ended(TaskState::Failed, 50, 2),
            ended(TaskState::Failed, 120, 3),
        ];
        let slot: Vec<&Arc<Task>> = tasks.iter().collect();
        assert_eq!(next(&policy, &tasks[1], &slot[..2], true), Next::Never);
        assert_eq!(next(&policy, &tasks[2], &slot, true), Next::Never);
        let sparse = [&tasks[0], &tasks[2]];
        assert!(matches!(
            next(&policy, &tasks[2], &sparse, true),
            Next::After { .. }
        ));
        // One that has run for longer than the window has forgotten the attempts before it.
        let mut last = Arc::clone(&tasks[2]);
        Arc::make_mut(&mut last).meta.as_mut().unwrap().updated_at = Some(timestamp(seconds(300)));
        let slot = [&tasks[0], &tasks[1], &last];
        assert!(matches!(
            next(&policy, &last, &slot, true),
            Next::After { .. }
        ));
    }
}
