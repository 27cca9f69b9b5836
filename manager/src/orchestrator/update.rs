//! Replaces tasks of an older spec, some slots at a time, and says how it goes.
//!
//! Level-triggered: what is dirty, what is on its way and what has failed is
//! read from the tasks, so another leader goes on where this one stopped.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::v1::{
    ContainerSpec, FailureAction, PortConfig, PublishMode, RestartCondition, Service, Task,
    TaskSpec, TaskState, UpdateConfig, UpdateState, UpdateStatus, object,
};

use super::restart;
use super::slot::{Pass, Slot};
use super::view::{created_at, ended_by_itself, is_good, ran_for, state_of, update};
use crate::clock::{CLOCKS_DIFFER, since_epoch, span, timestamp};

/// How long a new task is watched before it counts as good.
const MONITOR: Duration = Duration::from_secs(5);

/// The service's way to update, or the default one.
pub(crate) fn config(service: &Service) -> UpdateConfig {
    let spec = service.spec.as_ref();
    spec.and_then(|spec| spec.update).unwrap_or(UpdateConfig {
        parallelism: 1,
        ..UpdateConfig::default()
    })
}

/// The task must be replaced, because what runs is not what the service's spec says.
///
/// What the cluster can change without touching the container does not count:
/// restart policy, registry credentials, names, labels, balanced ports, and
/// constraints (a task that violates them is moved by the enforcer).
pub(crate) fn is_dirty(task: &Task, service: &Service) -> bool {
    if task.spec_version == service.spec_version {
        return false;
    }
    let spec = service.spec.as_ref();
    let (Some(old), Some(new)) = (task.spec.as_ref(), spec.and_then(|spec| spec.task.as_ref()))
    else {
        return true;
    };
    // The scheduler reads the task's own copy until it has a node.
    if task.node_id.is_empty() && old.placement != new.placement {
        return true;
    }
    let old_ports = task.endpoint.as_ref().and_then(|e| e.spec.as_ref());
    let new_ports = spec.and_then(|spec| spec.endpoint.as_ref());
    !same_task(old, new)
        || host_ports(old_ports.map_or(&[], |e| &e.ports))
            != host_ports(new_ports.map_or(&[], |e| &e.ports))
}

fn same_task(old: &TaskSpec, new: &TaskSpec) -> bool {
    let container = |spec: &TaskSpec| {
        spec.container.as_ref().map(|container| ContainerSpec {
            pull_auth: None,
            ..container.clone()
        })
    };
    let placement = |spec: &TaskSpec| {
        let placement = spec.placement.as_ref();
        placement
            .map(|placement| (placement.preferences.clone(), placement.max_replicas))
            .unwrap_or_default()
    };
    old.resources == new.resources
        && old.networks == new.networks
        && old.force_update == new.force_update
        && placement(old) == placement(new)
        && container(old) == container(new)
}

fn host_ports(ports: &[PortConfig]) -> Vec<(i32, u32, u32)> {
    let mut host: Vec<_> = ports
        .iter()
        .filter(|port| port.publish_mode() == PublishMode::Host)
        .map(|port| (port.protocol, port.target_port, port.published_port))
        .collect();
    host.sort_unstable();
    host
}

/// Goes on with the update of a service whose slots are settled.
pub(crate) fn decide<'a>(pass: &mut Pass<'a>, slots: &[Slot<'a>]) {
    let service = pass.service;
    let config = config(service);
    // Slots that still need a new task; those where the new one runs beside the old one are on their way.
    let needs: Vec<&Slot<'_>> = slots
        .iter()
        .filter(|slot| slot.may_start && !slot.renewed && slot.clean.is_none())
        .filter(|slot| slot.dirty.is_some() || is_finished_dirty(slot, service))
        .collect();
    let done = needs.is_empty() && !slots.iter().any(both);
    let status = service
        .update_status
        .as_ref()
        .filter(|status| status.spec_version == service.spec_version);
    match status.map(UpdateStatus::state) {
        Some(UpdateState::Paused) => {}
        Some(UpdateState::Updating) => {
            let status = status.cloned().unwrap_or_default();
            let started = status
                .started_at
                .as_ref()
                .map_or(Duration::ZERO, since_epoch);
            let monitor = span(config.monitor.as_ref(), MONITOR);
            let failed = failures(slots, service, started, monitor);
            let stop = config.failure_action() != FailureAction::Continue;
            if let (Some(first), true) = (failed.first(), stop && too_many(&failed, slots, &config))
            {
                let message = format!(
                    "update paused due to failure or early termination of task {}",
                    first.id
                );
                return say(pass, &status, UpdateState::Paused, message);
            }
            // A slot that has failed, and may, does not hold up the others.
            let failed: HashSet<&str> = failed.iter().map(|task| task.id.as_str()).collect();
            let has_failed = |slot: &Slot<'_>| {
                let mut tasks = slot.tasks.iter();
                tasks.any(|task| failed.contains(task.id.as_str()))
            };
            let on_their_way = slots
                .iter()
                .filter(|slot| is_on_its_way(slot) && !has_failed(slot))
                .count();
            let newest = newest_start(slots, started, pass.now);
            if done {
                let watched = newest.map_or(Duration::ZERO, |at| at + monitor);
                if on_their_way > 0 {
                } else if watched > pass.now {
                    pass.decision.wake(watched);
                } else {
                    say(
                        pass,
                        &status,
                        UpdateState::Completed,
                        "update completed".to_owned(),
                    );
                }
                return;
            }
            let pause = newest.map_or(Duration::ZERO, |at| {
                at + span(config.delay.as_ref(), Duration::ZERO)
            });
            if pause > pass.now {
                pass.decision.wake(pause);
                return;
            }
            // What does not run is replaced first: it costs nothing.
            let mut waiting: Vec<&Slot<'_>> =
                needs.into_iter().filter(|slot| !slot.touched).collect();
            waiting.sort_by_key(|slot| slot.dirty.is_some_and(|task| is_good(task)));
            let at_once = match usize::try_from(config.parallelism).unwrap_or(usize::MAX) {
                0 => usize::MAX,
                limit => limit.saturating_sub(on_their_way),
            };
            for slot in waiting.into_iter().take(at_once) {
                pass.renew(slot);
            }
        }
        _ if done => {}
        _ => {
            let fresh = UpdateStatus {
                started_at: Some(timestamp(pass.now)),
                spec_version: service.spec_version,
                ..UpdateStatus::default()
            };
            say(
                pass,
                &fresh,
                UpdateState::Updating,
                "update in progress".to_owned(),
            );
        }
    }
}

fn say(pass: &mut Pass<'_>, before: &UpdateStatus, state: UpdateState, message: String) {
    let mut service = Service::clone(pass.service);
    let completed_at = match state {
        UpdateState::Completed => Some(timestamp(pass.now)),
        _ => None,
    };
    service.update_status = Some(UpdateStatus {
        state: state.into(),
        message,
        completed_at,
        ..before.clone()
    });
    pass.decision
        .push(vec![update(object::Object::Service(service))]);
}

/// Nothing runs there, by the policy's will, but with an older spec.
fn is_finished_dirty(slot: &Slot<'_>, service: &Service) -> bool {
    slot.finished
        && slot
            .tasks
            .last()
            .is_some_and(|task| is_dirty(task, service))
}

/// Has a new task that is not good yet.
fn is_on_its_way(slot: &Slot<'_>) -> bool {
    slot.renewed || slot.clean.is_some_and(|task| !is_good(task)) || both(slot)
}

fn both(slot: &Slot<'_>) -> bool {
    slot.clean.is_some() && slot.dirty.is_some()
}

/// When the last of the update's tasks began to run, as far as clocks can be believed.
fn newest_start(slots: &[Slot<'_>], started: Duration, now: Duration) -> Option<Duration> {
    slots
        .iter()
        .filter_map(|slot| slot.clean?.running_since.as_ref())
        .map(since_epoch)
        .filter(|&at| at >= started && at <= now + CLOCKS_DIFFER)
        .max()
}

/// The first failed task of each slot in which a task of this update ended too early.
fn failures<'a>(
    slots: &[Slot<'a>],
    service: &Service,
    started: Duration,
    monitor: Duration,
) -> Vec<&'a Arc<Task>> {
    let condition = restart::policy(service).condition();
    let failed = |task: &&&'a Arc<Task>| {
        // Work that may end does not fail by ending well.
        let ended_well =
            state_of(task) == TaskState::Complete && condition != RestartCondition::Any;
        task.spec_version == service.spec_version
            && ended_by_itself(task)
            && !ended_well
            && created_at(task) >= started
            && ran_for(task).is_none_or(|ran| ran < monitor)
    };
    slots
        .iter()
        .filter_map(|slot| slot.tasks.iter().find(failed).copied())
        .collect()
}

fn too_many(failed: &[&Arc<Task>], slots: &[Slot<'_>], config: &UpdateConfig) -> bool {
    #[allow(clippy::cast_precision_loss)] // a ratio of counts
    let ratio = failed.len() as f32 / slots.len().max(1) as f32;
    ratio > config.max_failure_ratio
}
