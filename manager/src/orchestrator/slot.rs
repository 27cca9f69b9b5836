//! Decides for one slot: which of its tasks stays, which go, and what comes next.

use std::sync::Arc;
use std::time::Duration;

use swarm_proto::Shared;
use swarm_proto::v1::{
    CreateTasks, NewTask, RestartPolicy, Service, StoreAction, Task, TaskState, UpdateOrder,
    store_action,
};
use swarm_store::State;

use super::restart::{self, Next};
use super::view::{
    create, created_at, desire, ended_by_itself, is_good, is_live, is_wanted, occupies, state_of,
};
use super::{Decision, Ids, enforcer, update};
use crate::clock::{CLOCKS_DIFFER, since_epoch, timestamp};
use crate::leader::Group;
use crate::scheduler::constraint::Constraint;

/// New tasks that one action creates: all or none.
const CREATE_TOGETHER: usize = 500;

/// Where a task belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    /// The replica's number, from 1.
    Number(u64),
    /// The node of a global service's task.
    Node(&'a str),
}

/// One look at one service.
pub(crate) struct Pass<'a> {
    pub(crate) state: &'a State,
    pub(crate) service: &'a Arc<Service>,
    pub(crate) now: Duration,
    pub(crate) constraints: Vec<Constraint>,
    pub(crate) order: UpdateOrder,
    policy: RestartPolicy,
    ids: Ids<'a>,
    /// First tasks of slots, which differ in nothing else; see [`Pass::create_new`].
    new: Vec<NewTask>,
    pub(crate) decision: &'a mut Decision,
}

/// A slot after its own needs were decided.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    pub(crate) place: Place<'a>,
    /// All its tasks, oldest first.
    pub(crate) tasks: Vec<&'a Arc<Task>>,
    /// The live task made from (the like of) the newest spec, if it stays.
    pub(crate) clean: Option<&'a Arc<Task>>,
    /// The live task made from an older spec, if it stays.
    pub(crate) dirty: Option<&'a Arc<Task>>,
    /// A successor was made in this pass.
    pub(crate) renewed: bool,
    /// A new task may come here (not to a paused node of a global service).
    pub(crate) may_start: bool,
    /// Something is written about its tasks in this pass: an update takes its turn in the next.
    pub(crate) touched: bool,
    /// Has no live task, and the restart policy wants none.
    pub(crate) finished: bool,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(
        state: &'a State,
        service: &'a Arc<Service>,
        now: Duration,
        ids: Ids<'a>,
        decision: &'a mut Decision,
    ) -> Self {
        Self {
            state,
            service,
            now,
            constraints: enforcer::constraints(service),
            order: update::config(service).order(),
            policy: restart::policy(service),
            ids,
            new: Vec::new(),
            decision,
        }
    }

    /// Puts the first tasks of slots into the decision.
    pub(crate) fn create_new(&mut self) {
        let mut new = std::mem::take(&mut self.new).into_iter();
        loop {
            let tasks: Vec<_> = new.by_ref().take(CREATE_TOGETHER).collect();
            if tasks.is_empty() {
                return;
            }
            let template = self.task(Place::Number(0), String::new(), 0, None, TaskState::Running);
            self.decision.push(vec![StoreAction {
                action: Some(store_action::Action::CreateTasks(CreateTasks {
                    template: Some(template),
                    tasks,
                })),
            }]);
        }
    }

    /// The first task of an empty slot.
    pub(crate) fn fill(&mut self, place: Place<'a>, tasks: Vec<&'a Arc<Task>>) -> Slot<'a> {
        let waits = tasks.iter().any(|task| occupies(self.state, task));
        match place {
            Place::Number(slot) if !waits => {
                let id = (self.ids)().into();
                self.new.push(NewTask { id, slot });
            }
            Place::Number(_) | Place::Node(_) => {
                let action = self.make(place, 0, None, waits);
                self.decision.push(vec![action]);
            }
        }
        Slot {
            place,
            tasks,
            clean: None,
            dirty: None,
            renewed: true,
            may_start: true,
            touched: true,
            finished: false,
        }
    }

    /// Decides for a slot that has tasks. `may_start` is false where no new task may come
    /// (a paused node of a global service).
    pub(crate) fn settle(
        &mut self,
        place: Place<'a>,
        mut tasks: Vec<&'a Arc<Task>>,
        may_start: bool,
    ) -> Slot<'a> {
        sort_by_age(&mut tasks);
        let mut group: Group = Vec::new();
        let (mut clean, mut dirty): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
        let mut stopped_now = Vec::new();
        for &task in tasks.iter().filter(|task| is_wanted(task)) {
            #[cfg(feature = "museum")]
            if swarm_proto::museum::on(swarm_proto::museum::Bug::SlotTwice)
                && is_live(task)
                && enforcer::must_leave(self.state, task, &self.constraints)
            {
                continue;
            }
            if !is_live(task) || enforcer::must_leave(self.state, task, &self.constraints) {
                stopped_now.push(task);
            } else if update::is_dirty(task, self.service) {
                dirty.push(task);
            } else {
                clean.push(task);
            }
        }
        // Two live tasks in a slot are one too many, unless the new one must run before the old one goes.
        let keep_clean = take_best(&mut clean);
        let mut keep_dirty = take_best(&mut dirty);
        stopped_now.append(&mut clean);
        stopped_now.append(&mut dirty);
        if let (Some(new), Some(old)) = (keep_clean, keep_dirty)
            && (self.order == UpdateOrder::StopFirst || is_good(new))
        {
            stopped_now.push(old);
            keep_dirty = None;
        }
        group.extend(
            stopped_now
                .iter()
                .map(|task| desire(task, TaskState::Shutdown)),
        );

        let mut slot = Slot {
            place,
            tasks,
            clean: keep_clean,
            dirty: keep_dirty,
            renewed: false,
            may_start,
            touched: false,
            finished: false,
        };
        if keep_clean.is_none() && keep_dirty.is_none() {
            match self.successor(&slot) {
                Some(action) if may_start => {
                    group.push(action);
                    slot.renewed = true;
                }
                Some(_) => {}
                None => slot.finished = true,
            }
        } else if let Some(task) = keep_clean.or(keep_dirty)
            && task.desired_state() == TaskState::Ready
        {
            group.extend(self.release(task, &slot));
        }
        slot.touched = !group.is_empty();
        self.decision.push(group);
        slot
    }

    /// Replaces what the slot has by a task of the newest spec.
    pub(crate) fn renew(&mut self, slot: &Slot<'a>) {
        let mut group: Group = Vec::new();
        let mut waits = slot
            .tasks
            .iter()
            .any(|task| !is_wanted(task) && occupies(self.state, task));
        if let Some(old) = slot.dirty
            && self.order == UpdateOrder::StopFirst
        {
            group.push(desire(old, TaskState::Shutdown));
            // Without a node it has nothing to stop.
            waits |= state_of(old) >= TaskState::Assigned && occupies(self.state, old);
        }
        // A new task that failed beside the old one (start-first) is tried again after the delay.
        let failed =
            slot.tasks.iter().rev().copied().find(|task| {
                ended_by_itself(task) && task.spec_version == self.service.spec_version
            });
        let next = failed.map(|task| restart::next(&self.policy, task, &slot.tasks, true));
        let (restarts, not_before) = match next {
            Some(Next::After { delay, restarts }) => (restarts, Some(self.now + delay)),
            _ => (0, None),
        };
        group.push(self.make(slot.place, restarts, not_before, waits));
        self.decision.push(group);
    }

    /// Holds no more a task that was prepared meanwhile, once its time has come and the one before has ended.
    fn release(&mut self, task: &Arc<Task>, slot: &Slot<'_>) -> Option<StoreAction> {
        let blocked = slot
            .tasks
            .iter()
            .any(|other| other.id != task.id && !is_wanted(other) && occupies(self.state, other));
        if blocked {
            return None; // Its end is an event.
        }
        // Made by a clock that was ahead: when its time comes nobody can say.
        let knows = created_at(task) <= self.now + CLOCKS_DIFFER;
        match task.not_before.as_ref().map(since_epoch) {
            Some(at) if at > self.now && knows => {
                self.decision.wake(at);
                None
            }
            _ => Some(desire(task, TaskState::Running)),
        }
    }

    /// What follows in a slot without a live task; `None` when the policy wants nothing.
    fn successor(&mut self, slot: &Slot<'a>) -> Option<StoreAction> {
        // The task that has just ended, not whatever has the latest time: leaders' clocks differ.
        let just_ended = slot.tasks.iter().rfind(|task| is_wanted(task));
        let last = *just_ended.or(slot.tasks.last())?;
        let same_spec = !update::is_dirty(last, self.service);
        if !same_spec && !is_wanted(last) && ended_by_itself(last) {
            return None; // The slot was at rest; a new spec reaches it as an update.
        }
        let (restarts, not_before) = match restart::next(&self.policy, last, &slot.tasks, same_spec)
        {
            Next::Never => return None,
            Next::Now { restarts } => (restarts, None),
            Next::After { delay, restarts } => (restarts, Some(self.now + delay)),
        };
        let waits = slot.tasks.iter().any(|task| occupies(self.state, task));
        Some(self.make(slot.place, restarts, not_before, waits))
    }

    fn make(
        &mut self,
        place: Place<'_>,
        restarts: u32,
        not_before: Option<Duration>,
        waits: bool,
    ) -> StoreAction {
        let held = waits || not_before.is_some_and(|at| at > self.now);
        if let (true, Some(at)) = (held, not_before) {
            self.decision.wake(at);
        }
        let desired = if held {
            TaskState::Ready
        } else {
            TaskState::Running
        };
        let id = (self.ids)().into();
        create(self.task(place, id, restarts, not_before, desired))
    }

    fn task(
        &self,
        place: Place<'_>,
        id: String,
        restarts: u32,
        not_before: Option<Duration>,
        desired: TaskState,
    ) -> Task {
        let (slot, node_id) = match place {
            Place::Number(number) => (number, String::new()),
            Place::Node(id) => (0, id.to_owned()),
        };
        let spec = self.service.spec.as_ref();
        Task {
            id,
            spec: spec
                .and_then(|spec| spec.task.clone())
                .or_else(|| Some(Shared::default())),
            service_id: self.service.id.clone(),
            service_annotations: spec
                .and_then(|spec| spec.annotations.clone())
                .map(Shared::from),
            slot,
            node_id,
            desired_state: desired.into(),
            spec_version: self.service.spec_version,
            not_before: not_before.map(timestamp),
            restarts,
            ..Task::default()
        }
    }
}

fn sort_by_age(tasks: &mut [&Arc<Task>]) {
    tasks.sort_by(|left, right| {
        let key = |task: &Task| (created_at(task), task.restarts);
        key(left)
            .cmp(&key(right))
            .then_with(|| left.id.cmp(&right.id))
    });
}

/// Takes the one to keep: a good one, else the furthest, else the oldest.
fn take_best<'a>(tasks: &mut Vec<&'a Arc<Task>>) -> Option<&'a Arc<Task>> {
    let best = (0..tasks.len()).max_by_key(|&at| {
        let task = tasks[at];
        (is_good(task), state_of(task), std::cmp::Reverse(at))
    })?;
    Some(tasks.remove(best))
}
