//! The names that people see for tasks, derived from what a task says of itself.
//!
//! Tasks have no name of their own: command line, agents and logs all show the same derived one.

use crate::v1::Task;

/// `web.1` for a slot of a replicated service, `web.<node id>` for a global one.
#[must_use]
pub fn task_short_name(task: &Task) -> String {
    let service = task
        .service_annotations
        .as_ref()
        .map_or(task.service_id.as_str(), |annotations| {
            annotations.name.as_str()
        });
    if task.slot == 0 {
        format!("{service}.{}", task.node_id)
    } else {
        format!("{service}.{}", task.slot)
    }
}

/// The short name and the task's ID: `web.1.<task id>`. Never the same for two tasks.
#[must_use]
pub fn task_name(task: &Task) -> String {
    format!("{}.{}", task_short_name(task), task.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::Annotations;

    fn task(slot: u64) -> Task {
        Task {
            id: "t1".to_owned(),
            service_id: "s1".to_owned(),
            service_annotations: Some(
                Annotations {
                    name: "web".to_owned(),
                    ..Default::default()
                }
                .into(),
            ),
            slot,
            node_id: "n1".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn replicated_tasks_are_named_by_slot_and_global_ones_by_node() {
        assert_eq!(task_short_name(&task(1)), "web.1");
        assert_eq!(task_name(&task(1)), "web.1.t1");
        assert_eq!(task_short_name(&task(0)), "web.n1");
        assert_eq!(task_name(&task(0)), "web.n1.t1");
    }

    #[test]
    fn a_task_without_annotations_is_named_by_its_service_s_id() {
        let task = Task {
            service_annotations: None,
            ..task(2)
        };
        assert_eq!(task_short_name(&task), "s1.2");
    }
}
