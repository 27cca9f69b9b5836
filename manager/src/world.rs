//! A cluster in memory for tests of decisions: state, time, agents that do as told.

use std::time::Duration;

use swarm_proto::TaskId;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    ContainerSpec, GlobalMode, Node, NodeAvailability, NodeSpec, NodeState, ObjectKind, Placement,
    ReplicatedMode, Service, ServiceMode, StoreAction, Task, TaskState, TaskStatus, Transaction,
    service_mode,
};
use swarm_store::State;
use swarm_store::testing;

use crate::clock::timestamp;
use crate::leader::Group;
use crate::orchestrator;
use crate::scheduler::Scheduler;

/// Tasks with this image fail as soon as they start.
pub(crate) const BAD_IMAGE: &str = "bad";

pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) now: Duration,
    pub(crate) scheduler: Scheduler,
    ids: u64,
    /// The earliest time at which a service wants to be looked at again.
    pub(crate) wake_at: Option<Duration>,
}

impl World {
    /// A cluster with `nodes` READY nodes "n0", "n1" ….
    pub(crate) fn new(nodes: usize) -> Self {
        let mut world = Self {
            state: State::default(),
            now: Duration::from_secs(1_000_000),
            scheduler: Scheduler::default(),
            ids: 0,
            wake_at: None,
        };
        world.write([testing::create(testing::cluster("c"))]);
        for at in 0..nodes {
            world.write([testing::create(testing::node(&format!("n{at}"), ""))]);
        }
        world
    }

    pub(crate) fn write(&mut self, actions: impl IntoIterator<Item = StoreAction>) {
        let transaction = Transaction {
            proposed_at: Some(timestamp(self.now)),
            ..testing::transaction(actions)
        };
        let index = self.state.index() + 1;
        let applied = self
            .state
            .apply(index, &transaction)
            .expect("nobody else writes");
        self.state = applied.state;
        self.scheduler.observe(&applied.events);
    }

    /// Creates a replicated service "s" with these replicas, changed by `change`.
    pub(crate) fn service(&mut self, id: &str, replicas: u64, change: impl FnOnce(&mut Service)) {
        let mut service = testing::service(id, id, &[]);
        let spec = service.spec.as_mut().unwrap();
        spec.mode = replicated(replicas);
        spec.task.as_mut().unwrap().container = Some(ContainerSpec {
            image: "v1".into(),
            ..ContainerSpec::default()
        });
        change(&mut service);
        self.write([testing::create(service)]);
    }

    pub(crate) fn change_service(&mut self, id: &str, change: impl FnOnce(&mut Service)) {
        let mut service = Service::clone(self.state.service(id).unwrap());
        change(&mut service);
        self.write([testing::update(service)]);
    }

    pub(crate) fn scale(&mut self, id: &str, replicas: u64) {
        self.change_service(id, |service| {
            service.spec.as_mut().unwrap().mode = replicated(replicas);
        });
    }

    pub(crate) fn set_image(&mut self, id: &str, image: &str) {
        self.change_service(id, |service| {
            container(service).image = image.into();
        });
    }

    pub(crate) fn change_node(&mut self, id: &str, change: impl FnOnce(&mut Node)) {
        let mut node = Node::clone(self.state.node(id).unwrap());
        change(&mut node);
        self.write([testing::update(node)]);
    }

    pub(crate) fn set_availability(&mut self, id: &str, availability: NodeAvailability) {
        self.change_node(id, |node| {
            let spec = node.spec.get_or_insert_with(NodeSpec::default);
            spec.availability = availability.into();
        });
    }

    pub(crate) fn set_label(&mut self, id: &str, name: &str, value: &str) {
        self.change_node(id, |node| {
            let spec = node.spec.get_or_insert_with(NodeSpec::default);
            let annotations = spec.annotations.get_or_insert_default();
            annotations.labels.insert(name.into(), value.into());
        });
    }

    pub(crate) fn set_node_state(&mut self, id: &str, state: NodeState) {
        self.write([testing::observe(id, state)]);
    }

    pub(crate) fn remove_node(&mut self, id: &str) {
        self.write([testing::remove(ObjectKind::Node, id)]);
    }

    pub(crate) fn remove_service(&mut self, id: &str) {
        self.write([testing::remove(ObjectKind::Service, id)]);
    }

    /// One look of the orchestrator at every service.
    pub(crate) fn orchestrate(&mut self) -> Vec<Group> {
        let mut services: Vec<String> = self.state.services().map(|s| s.id.clone()).collect();
        services.extend(self.state.tasks().map(|task| task.service_id.clone()));
        services.sort();
        services.dedup();
        self.wake_at = None;
        let mut groups = Vec::new();
        for service in services {
            let ids = &mut self.ids;
            let mut next = || {
                *ids += 1;
                TaskId::from(format!("t{ids:05}"))
            };
            let decision = orchestrator::decide(&self.state, &service, self.now, &mut next);
            groups.extend(decision.groups);
            self.wake_at = [self.wake_at, decision.wake_at].into_iter().flatten().min();
        }
        groups
    }

    /// The managers decide until there is nothing left to decide.
    pub(crate) fn managers(&mut self) {
        for _ in 0..40 {
            let mut quiet = true;
            for group in self.orchestrate() {
                self.write(group);
                quiet = false;
            }
            let groups = self.scheduler.decide(&self.state, self.now);
            quiet &= groups.is_empty();
            for group in groups {
                self.write(group);
            }
            if quiet {
                return;
            }
        }
        panic!("the managers never come to rest");
    }

    /// Every agent that is reachable takes its tasks one step further. `true` if any did.
    pub(crate) fn agents(&mut self) -> bool {
        let tasks: Vec<Task> = self.state.tasks().map(|task| Task::clone(task)).collect();
        let mut any = false;
        for task in tasks {
            let node = self.state.node(&task.node_id);
            let ready =
                node.is_some_and(|n| n.status.as_ref().unwrap().state() == NodeState::Ready);
            if ready && let Some(next) = next_state(&task) {
                self.report(&task.id, next);
                any = true;
            }
        }
        any
    }

    pub(crate) fn report(&mut self, task_id: &str, state: TaskState) {
        let mut action = testing::report(task_id, state, 0);
        if let Some(swarm_proto::v1::store_action::Action::TaskStatus(update)) = &mut action.action
        {
            update.status = Some(TaskStatus {
                timestamp: Some(timestamp(self.now)),
                ..update.status.clone().unwrap()
            });
        }
        self.write([action]);
    }

    pub(crate) fn pass_time(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    /// Managers and agents, without time passing, until nothing moves.
    pub(crate) fn settle(&mut self) {
        self.managers();
        while self.agents() {
            self.managers();
        }
    }

    /// Settles again and again while time passes.
    pub(crate) fn settle_for(&mut self, seconds: u64) {
        let until = self.now + Duration::from_secs(seconds);
        self.settle();
        while let Some(at) = self.wake_at
            && at <= until
        {
            self.now = self.now.max(at);
            self.settle();
        }
        self.now = until;
        self.settle();
    }

    /// Tasks of a service, oldest first.
    pub(crate) fn tasks(&self, service: &str) -> Vec<Task> {
        let mut tasks: Vec<Task> = self
            .state
            .tasks_of_service(service)
            .map(|t| Task::clone(t))
            .collect();
        tasks.sort_by_key(|task| (orchestrator_created(task), task.id.clone()));
        tasks
    }

    /// Tasks that run and shall.
    pub(crate) fn running(&self, service: &str) -> Vec<Task> {
        let mut tasks = self.tasks(service);
        tasks.retain(|task| {
            state_of(task) == TaskState::Running && task.desired_state() == TaskState::Running
        });
        tasks
    }
}

fn orchestrator_created(task: &Task) -> Duration {
    let at = task.meta.as_ref().and_then(|meta| meta.created_at.as_ref());
    at.map_or(Duration::ZERO, crate::clock::since_epoch)
}

fn next_state(task: &Task) -> Option<TaskState> {
    let state = state_of(task);
    if is_terminal(state) || state < TaskState::Assigned {
        return None;
    }
    if task.desired_state() > TaskState::Running {
        return Some(TaskState::Shutdown);
    }
    let image = task.spec.as_ref().and_then(|spec| spec.container.as_ref());
    let bad = image.is_some_and(|container| container.image == BAD_IMAGE);
    match state {
        TaskState::Assigned => Some(TaskState::Preparing),
        TaskState::Preparing => Some(TaskState::Ready),
        TaskState::Ready if task.desired_state() == TaskState::Running => Some(TaskState::Starting),
        TaskState::Starting if bad => Some(TaskState::Failed),
        TaskState::Starting => Some(TaskState::Running),
        _ => None,
    }
}

pub(crate) fn state_of(task: &Task) -> TaskState {
    task.status
        .as_ref()
        .map_or(TaskState::New, TaskStatus::state)
}

pub(crate) fn container(service: &mut Service) -> &mut ContainerSpec {
    task_spec(service).container.get_or_insert_default()
}

pub(crate) fn task_spec(service: &mut Service) -> &mut swarm_proto::v1::TaskSpec {
    let spec = service.spec.get_or_insert_default();
    spec.task.get_or_insert_default()
}

pub(crate) fn placement(service: &mut Service) -> &mut Placement {
    task_spec(service).placement.get_or_insert_default()
}

pub(crate) fn replicated(replicas: u64) -> Option<ServiceMode> {
    Some(ServiceMode {
        mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
            replicas: Some(replicas),
        })),
    })
}

pub(crate) fn global() -> Option<ServiceMode> {
    Some(ServiceMode {
        mode: Some(service_mode::Mode::Global(GlobalMode {})),
    })
}
