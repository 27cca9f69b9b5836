//! Tasks: read only.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use swarm_proto::names::task_name;
use swarm_proto::v1::{
    GetTaskRequest, ListTasksRequest, ListTasksResponse, ObjectKind, Task, TaskState,
};
use swarm_store::State;
use tonic::Status;

use super::filter::{NameMatch, any_of, check, passes};
use super::page::Page;
use super::{Control, bounded, error, found, redact};

impl Control {
    pub(super) async fn get_task(&self, request: GetTaskRequest) -> Result<Task, Status> {
        let state = self.state().await?;
        let id = state
            .resolve(ObjectKind::Task, &request.r#ref)
            .map_err(error::resolve)?;
        let mut task = found(state.task(&id), "task", &id)?;
        redact::task(&mut task);
        Ok(task)
    }

    pub(super) async fn list_tasks(
        &self,
        request: ListTasksRequest,
    ) -> Result<ListTasksResponse, Status> {
        check(
            request.filters.as_ref(),
            &[
                ("service", request.services.len()),
                ("node", request.nodes.len()),
                ("desired-state", request.desired_states.len()),
            ],
        )?;
        if let Some(unknown) = request
            .desired_states
            .iter()
            .find(|state| TaskState::try_from(**state).is_err())
        {
            return Err(Status::invalid_argument(format!(
                "invalid filter 'desired-state={unknown}'"
            )));
        }
        let page = Page::of(request.page_size, &request.page_token)?;
        let state = self.state().await?;
        let services = resolve_all(&state, ObjectKind::Service, &request.services)?;
        let nodes = resolve_all(&state, ObjectKind::Node, &request.nodes)?;
        let keep = |task: &&Arc<Task>| {
            task.id.as_str() > page.after()
                && (request.services.is_empty() || services.contains(&task.service_id))
                && (request.nodes.is_empty() || nodes.contains(&task.node_id))
                && any_of(&request.desired_states, |wanted| {
                    *wanted == task.desired_state
                })
                && listed(task, &request)
        };
        let shown = |task: &Arc<Task>| {
            let mut shown = Task::clone(task);
            redact::task(&mut shown);
            shown
        };
        // The narrowest index there is: a list of one service does not look at all tasks.
        let few: Option<BTreeMap<&str, &Arc<Task>>> = if !request.services.is_empty() {
            let of_services = services.iter().flat_map(|id| state.tasks_of_service(id));
            Some(of_services.filter(keep).map(by_id).collect())
        } else if !request.nodes.is_empty() {
            let on_nodes = nodes.iter().flat_map(|id| state.tasks_on_node(id));
            Some(on_nodes.filter(keep).map(by_id).collect())
        } else {
            None
        };
        let (mut tasks, next_page_token) = match &few {
            Some(few) => page.take(few.values().copied().map(shown), |task| &task.id),
            None => {
                let all = state.tasks_after(page.after()).filter(keep);
                page.take(all.map(shown), |task| &task.id)
            }
        };
        // By service and slot; in a slot the newest first.
        tasks.sort_by(|a, b| order(a).cmp(&order(b)));
        bounded(ListTasksResponse {
            tasks,
            next_page_token,
        })
    }
}

fn by_id(task: &Arc<Task>) -> (&str, &Arc<Task>) {
    (&task.id, task)
}

fn resolve_all(
    state: &State,
    kind: ObjectKind,
    references: &[String],
) -> Result<HashSet<String>, Status> {
    references
        .iter()
        .map(|reference| state.resolve(kind, reference).map_err(error::resolve))
        .collect()
}

fn listed(task: &Task, request: &ListTasksRequest) -> bool {
    if request.filters.is_none() {
        return true;
    }
    let labels = task
        .service_annotations
        .as_ref()
        .map(|annotations| &annotations.labels);
    passes(
        request.filters.as_ref(),
        NameMatch::Prefix,
        &task.id,
        &task_name(task),
        labels,
    )
}

type Order<'a> = (
    &'a str,
    u64,
    &'a str,
    std::cmp::Reverse<(i64, i32)>,
    &'a str,
);

fn order(task: &Task) -> Order<'_> {
    let service = task
        .service_annotations
        .as_ref()
        .map_or(task.service_id.as_str(), |annotations| &annotations.name);
    let node = if task.slot == 0 { &task.node_id } else { "" };
    let created = task
        .meta
        .as_ref()
        .and_then(|meta| meta.created_at)
        .unwrap_or_default();
    let newest_first = std::cmp::Reverse((created.seconds, created.nanos));
    (service, task.slot, node, newest_first, &task.id)
}

#[cfg(test)]
mod tests {
    use swarm_proto::names::task_short_name;
    use swarm_proto::v1::{Annotations, Filters};
    use swarm_store::testing::{self, create};
    use tonic::Code;

    use super::super::testing::{Bench, service_spec};
    use super::*;

    fn task(id: &str, service_id: &str, service: &str, slot: u64) -> Task {
        Task {
            slot,
            service_annotations: Some(
                Annotations {
                    name: service.to_owned(),
                    ..Default::default()
                }
                .into(),
            ),
            ..testing::task(id, service_id, &[])
        }
    }

    #[tokio::test]
    async fn lists_are_sorted_by_service_and_slot_and_filtered() {
        let bench = Bench::new();
        let web = bench.create_service(service_spec("web")).await.unwrap();
        let api = bench.create_service(service_spec("api")).await.unwrap();
        bench.write([
            create(task("t3", &web.id, "web", 2)),
            create(task("t2", &web.id, "web", 1)),
            create(task("t1", &api.id, "api", 10)),
        ]);
        let list = async |request: ListTasksRequest| -> Vec<String> {
            let tasks = bench.control.list_tasks(request).await.unwrap().tasks;
            tasks.iter().map(task_short_name).collect()
        };
        let all = list(ListTasksRequest::default()).await;
        assert_eq!(all, ["api.10", "web.1", "web.2"]);
        let of_web = ListTasksRequest {
            services: vec!["web".to_owned()],
            desired_states: vec![TaskState::Running.into()],
            ..Default::default()
        };
        assert_eq!(list(of_web).await, ["web.1", "web.2"]);
        let shut_down = ListTasksRequest {
            desired_states: vec![TaskState::Shutdown.into()],
            ..Default::default()
        };
        assert!(list(shut_down).await.is_empty());
        let named = ListTasksRequest {
            filters: Some(Filters {
                names: vec!["web.2".to_owned()],
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(list(named).await, ["web.2"]);
        let missing = bench
            .control
            .list_tasks(ListTasksRequest {
                nodes: vec!["nowhere".to_owned()],
                ..Default::default()
            })
            .await
            .unwrap_err();
        assert_eq!(
            (missing.code(), missing.message()),
            (Code::NotFound, "node nowhere not found")
        );
    }

    #[tokio::test]
    async fn pages_hold_each_task_once_with_and_without_an_index() {
        let bench = Bench::new();
        let web = bench.create_service(service_spec("web")).await.unwrap();
        let api = bench.create_service(service_spec("api")).await.unwrap();
        let ids: Vec<String> = (0..9).map(|number| format!("t{number}")).collect();
        for (id, number) in ids.iter().zip(1..) {
            // In the order of their IDs, tasks of the two alternate.
            let (service_id, name) = if number % 2 == 0 {
                (&web.id, "web")
            } else {
                (&api.id, "api")
            };
            bench.write([create(task(id, service_id, name, number))]);
        }
        let both = vec!["web".to_owned(), "api".to_owned()];
        for services in [Vec::new(), both] {
            let mut request = ListTasksRequest {
                services,
                page_size: 4,
                ..Default::default()
            };
            let mut pages = Vec::new();
            loop {
                let page = bench.control.list_tasks(request.clone()).await.unwrap();
                let mut ids: Vec<String> = page.tasks.into_iter().map(|task| task.id).collect();
                ids.sort();
                pages.push(ids);
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            let sizes: Vec<usize> = pages.iter().map(Vec::len).collect();
            assert_eq!(sizes, [4, 4, 1]);
            assert_eq!(pages.concat(), ids);
        }
    }
}
