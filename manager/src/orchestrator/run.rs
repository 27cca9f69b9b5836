//! The leader's loop around the orchestrator.
//!
//! Events say which services to look at, never what to do: each look reads the
//! newest state. A new leader looks at all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::object::Object as Kind;
use swarm_proto::v1::store_action::Action;
use swarm_proto::v1::{
    Node, NodeAvailability, Service, StoreAction, Task, TaskState, UpdateState, service_mode,
};
use swarm_proto::{ServiceId, Siblings, TaskId};
use swarm_store::{Event, State};
use tokio::time::Instant;

use super::decide;
use super::view::{availability, is_good, is_lost, state_of};
use crate::leader::{Feed, Group, LoopContext, RETRY_AFTER, Turn, sleep_until, weight};

/// Once a pass has decided so many changes, it proposes them before it goes on.
const CHANGES_MAX: usize = 10_000;
/// No timer is set further ahead: the clock may be set.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Once so many tasks were looked at, it ends as well: what happens meanwhile is to be taken in, too.
const LOOKED_MAX: usize = 10_000;

/// Keeps tasks as services want them until the term ends.
pub(crate) async fn run(context: LoopContext) {
    let mut feed = Feed::new(&context);
    let mut agenda = Agenda::default();
    let mut turn = Turn::default();
    agenda.add_all(feed.state());
    loop {
        if let Some((seen, groups)) = agenda.work(&context, &mut turn).await {
            let proposed = tokio::select! {
                () = context.cancel.cancelled() => return,
                proposed = context.propose_groups(groups) => proposed,
            };
            if let Some(error) = proposed.failed {
                if !context.settle(&error).await {
                    return;
                }
                feed = Feed::new(&context);
                agenda.add_all(feed.state());
            }
            // Somebody was faster. What they have changed may be too little to wake anybody.
            for action in proposed.refused.iter().flatten() {
                agenda.look_again(&seen, action);
            }
        }
        let fed = tokio::select! {
            biased;
            () = context.cancel.cancelled() => return,
            fed = feed.next(&context) => fed,
            () = std::future::ready(()), if !agenda.dirty.is_empty() => continue,
            () = sleep_until(agenda.next_timer()) => continue,
            () = sleep_until(agenda.again_at) => {
                agenda.add_refused();
                continue;
            }
        };
        agenda.add_refused();
        let Some(changes) = fed else { return };
        let observe = |state: &State, events: &[Event]| agenda.observe(state, events);
        turn.each(&changes, observe).await;
    }
}

/// Which services to look at, now and later.
#[derive(Debug, Default)]
struct Agenda {
    dirty: BTreeSet<ServiceId>,
    /// Services with a refused decision: looked at again when anything has changed, and at
    /// `again_at` at the latest; not at once, for what is always refused must not spin.
    refused: BTreeSet<ServiceId>,
    again_at: Option<Instant>,
    /// By the time that passes, whatever becomes of the clock; who is due reads the clock again.
    timers: BTreeSet<(Instant, ServiceId)>,
    timer_of: BTreeMap<ServiceId, Instant>,
}

impl Agenda {
    /// Decides for services that are due, until there is enough to propose. Also returns the
    /// state that was looked at.
    async fn work(
        &mut self,
        context: &LoopContext,
        turn: &mut Turn,
    ) -> Option<(Arc<State>, Vec<Group>)> {
        let (now, instant) = (context.now(), Instant::now());
        while let Some((at, _)) = self.timers.first()
            && *at <= instant
        {
            if let Some((_, service)) = self.timers.pop_first() {
                self.timer_of.remove(&service);
                self.dirty.insert(service);
            }
        }
        if self.dirty.is_empty() {
            return None;
        }
        let state = context.consensus.store().state();
        let mut groups = Vec::new();
        let (mut changes, mut looked) = (0, 0);
        let mut ids = Siblings::new();
        let mut next_id = || TaskId::from(ids.next_id());
        while changes < CHANGES_MAX
            && looked < LOOKED_MAX
            && let Some(service) = self.dirty.pop_first()
        {
            let decision = decide(&state, &service, now, &mut next_id);
            let decided: usize = decision.groups.iter().flatten().map(weight).sum();
            let tasks = state.count_of_service(&service) + 1;
            turn.spent(tasks + decided).await;
            changes += decided;
            looked += tasks;
            groups.extend(decision.groups);
            let wake_at = decision.wake_at;
            let wake_at = wake_at.map(|at| instant + at.saturating_sub(now).min(WAIT_MAX));
            self.set_timer(service, wake_at);
        }
        Some((state, groups))
    }

    /// The action was refused: its service is looked at again soon. `seen` is what it was decided from.
    fn look_again(&mut self, seen: &State, action: &StoreAction) {
        if let Some(service) = service_of(seen, action) {
            self.refused.insert(service);
            self.again_at
                .get_or_insert_with(|| Instant::now() + RETRY_AFTER);
        }
    }

    fn add_refused(&mut self) {
        self.dirty.append(&mut self.refused);
        self.again_at = None;
    }

    fn set_timer(&mut self, service: ServiceId, at: Option<Instant>) {
        if let Some(old) = self.timer_of.remove(&service) {
            self.timers.remove(&(old, service.clone()));
        }
        if let Some(at) = at {
            self.timers.insert((at, service.clone()));
            self.timer_of.insert(service, at);
        }
    }

    fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn add_all(&mut self, state: &State) {
        self.dirty
            .extend(state.services().map(|service| ServiceId::from(&service.id)));
        // Tasks whose service was removed while nobody looked.
        for task in state.tasks() {
            if !self.dirty.contains(task.service_id.as_str()) {
                self.dirty.insert(ServiceId::from(&task.service_id));
            }
        }
    }

    /// Takes in what has happened; `state` is as it was after that.
    fn observe(&mut self, state: &State, events: &[Event]) {
        for event in events {
            match event {
                Event::Service { .. } => {
                    self.dirty.insert(ServiceId::from(event.id()));
                }
                Event::Task { old, new } => {
                    if let Some(task) = new.as_ref().or(old.as_ref())
                        && task_differs(old.as_deref(), new.as_deref())
                        && !goes_as_wanted(state, old.as_deref(), new.as_deref())
                    {
                        self.dirty.insert(ServiceId::from(&task.service_id));
                    }
                }
                Event::Node { old, new } => {
                    if node_differs(old.as_deref(), new.as_deref()) {
                        self.add_node(state, event.id());
                    }
                }
                Event::Cluster { old, new } => {
                    let limit = |cluster: &swarm_proto::v1::Cluster| {
                        cluster
                            .spec
                            .as_ref()
                            .and_then(|spec| spec.task_history_limit)
                    };
                    if old.as_deref().and_then(limit) != new.as_deref().and_then(limit) {
                        self.add_all(state);
                    }
                }
                Event::Network { .. } => {}
            }
        }
    }

    /// Services with a task on the node, and those that want one on every node.
    fn add_node(&mut self, state: &State, node_id: &str) {
        for task in state.tasks_on_node(node_id) {
            self.dirty.insert(ServiceId::from(&task.service_id));
        }
        for service in state.services() {
            let mode = service.spec.as_ref().and_then(|spec| spec.mode.as_ref());
            if let Some(service_mode::Mode::Global(_)) = mode.and_then(|mode| mode.mode.as_ref()) {
                self.dirty.insert(ServiceId::from(&service.id));
            }
        }
    }
}

/// The service that an action is about.
fn service_of(state: &State, action: &StoreAction) -> Option<ServiceId> {
    let task = |id: &str| Some(state.task(id)?.service_id.clone());
    let id = match action.action.as_ref()? {
        Action::Create(object) | Action::Update(object) => match object.object.as_ref()? {
            Kind::Task(task) => task.service_id.clone(),
            Kind::Service(service) => service.id.clone(),
            _ => return None,
        },
        Action::CreateTasks(wanted) => wanted.template.as_ref()?.service_id.clone(),
        Action::Remove(removed) => task(&removed.r#ref.as_ref()?.id)?,
        Action::TaskStatus(report) => task(&report.task_id)?,
        _ => return None,
    };
    Some(ServiceId::from(&id))
}

/// Whether what decides over a task has changed: most reports are of progress only.
fn task_differs(old: Option<&Task>, new: Option<&Task>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return true;
    };
    let seen = |task: &Task| {
        let state = state_of(task);
        let milestone = (
            state >= TaskState::Assigned,
            state >= TaskState::Running,
            is_terminal(state),
        );
        (task.desired_state, milestone, is_good(task))
    };
    seen(old) != seen(new)
}

/// Whether all there is to see is that a task of the newest spec comes forward, on a node where
/// it may stay, while no update waits for it: then there is nothing to decide. A large service
/// would be looked at from end to end for each of its tasks that starts.
fn goes_as_wanted(state: &State, old: Option<&Task>, new: Option<&Task>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return false;
    };
    let Some(service) = state.service(&new.service_id) else {
        return false;
    };
    let comes_forward = old.desired_state == new.desired_state
        && new.desired_state() == TaskState::Running
        && !is_terminal(state_of(new))
        && (is_good(new) || !is_good(old));
    let updating = service.update_status.as_ref().is_some_and(|status| {
        status.spec_version == service.spec_version && status.state() != UpdateState::Completed
    });
    comes_forward
        && !updating
        && new.spec_version == service.spec_version
        && !is_constrained(service)
        && state
            .node(&new.node_id)
            .is_some_and(|node| !is_lost(node) && availability(node) == NodeAvailability::Active)
}

fn is_constrained(service: &Service) -> bool {
    let task = service.spec.as_ref().and_then(|spec| spec.task.as_ref());
    let placement = task.and_then(|task| task.placement.as_ref());
    placement.is_some_and(|placement| !placement.constraints.is_empty())
}

/// Whether what decides over the tasks of a node has changed.
fn node_differs(old: Option<&Node>, new: Option<&Node>) -> bool {
    let (Some(old), Some(new)) = (old, new) else {
        return true;
    };
    let seen = |node: &Node| {
        node.status
            .as_ref()
            .map(|status| (status.state, status.addr.clone()))
    };
    let described = |node: &Node| {
        let description = node.description.as_ref();
        description.map(|d| {
            (
                d.hostname.clone(),
                d.platform.clone(),
                d.engine_labels.clone(),
            )
        })
    };
    old.spec != new.spec
        || old.role != new.role
        || seen(old) != seen(new)
        || described(old) != described(new)
}
