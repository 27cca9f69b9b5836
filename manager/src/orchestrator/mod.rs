//! Decides which tasks should exist.
//!
//! Pure: from a [`State`], a time and a source of identifiers to groups of
//! actions. [`decide`] is the only way in, for one service: start-up, fail-over,
//! restart, update and scaling share it, because it compares what is with what
//! should be and remembers nothing. Touches neither clock, network nor store;
//! never chooses nodes (the scheduler does), never advances what an agent reports.
//!
//! A slot is a replica's place: a number in a replicated service, a node in a
//! global one. [`slot`] decides for one slot, [`update`] over all slots of a service.

use std::collections::HashSet;
use std::time::Duration;

use swarm_proto::TaskId;
use swarm_proto::v1::{StoreAction, object, service_mode, store_action};
use swarm_store::State;

use crate::leader::Group;

mod enforcer;
mod global;
mod reaper;
mod replicated;
mod restart;
pub mod roles;
pub(crate) mod run;
mod slot;
mod update;
mod view;

/// New tasks of one service that are made in one pass; the rest follow in the next.
const CREATE_MAX: usize = 4096;

/// Makes identifiers: random ones in the leader, counted ones in tests.
pub type Ids<'a> = &'a mut dyn FnMut() -> TaskId;

/// What to do for a service.
#[derive(Debug, Default)]
pub struct Decision {
    /// Each group is committed as a whole or not at all; groups do not depend on each other.
    pub groups: Vec<Group>,
    /// Decide again at this time, even if nothing changes until then.
    pub wake_at: Option<Duration>,
}

impl Decision {
    fn wake(&mut self, at: Duration) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    fn push(&mut self, group: Group) {
        if !group.is_empty() {
            self.groups.push(group);
        }
    }
}

/// What the service needs now. A service that is gone needs its tasks to go.
pub fn decide(state: &State, service_id: &str, now: Duration, ids: Ids<'_>) -> Decision {
    let mut decision = Decision::default();
    match state.service(service_id) {
        None => replicated::remove_all(state, service_id, &mut decision),
        Some(service) => {
            let mut pass = slot::Pass::new(state, service, now, ids, &mut decision);
            let mode = service.spec.as_ref().and_then(|spec| spec.mode.as_ref());
            let slots = match mode.and_then(|mode| mode.mode.as_ref()) {
                Some(service_mode::Mode::Global(_)) => global::decide(&mut pass),
                Some(service_mode::Mode::Replicated(mode)) => {
                    replicated::decide(&mut pass, mode.replicas.unwrap_or(1))
                }
                None => replicated::decide(&mut pass, 1),
            };
            pass.create_new();
            update::decide(&mut pass, &slots);
        }
    }
    let touched = decision
        .groups
        .iter()
        .flatten()
        .filter_map(task_id)
        .map(str::to_owned);
    let touched: HashSet<String> = touched.collect();
    reaper::decide(state, service_id, now, &touched, &mut decision);
    decision
}

fn task_id(action: &StoreAction) -> Option<&str> {
    match action.action.as_ref()? {
        store_action::Action::Update(object) | store_action::Action::Create(object) => {
            match object.object.as_ref()? {
                object::Object::Task(task) => Some(&task.id),
                _ => None,
            }
        }
        store_action::Action::Remove(remove) => remove.r#ref.as_ref().map(|r| r.id.as_str()),
        store_action::Action::TaskStatus(update) => Some(&update.task_id),
        _ => None,
    }
}

#[cfg(test)]
mod rules_test;
