//! Services with a number of replicas.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use swarm_proto::v1::{Task, TaskState};
use swarm_store::State;

use super::slot::{Pass, Place, Slot};
use super::view::{desire, give_up, is_good, is_live};
use super::{CREATE_MAX, Decision};

/// Brings the service to `replicas` slots. New ones take the lowest free numbers.
pub(crate) fn decide<'a>(pass: &mut Pass<'a>, replicas: u64) -> Vec<Slot<'a>> {
    let mut slots: BTreeMap<u64, Vec<&Arc<Task>>> = BTreeMap::new();
    let mut leaving: HashMap<u64, Vec<&Arc<Task>>> = HashMap::new();
    for task in pass.state.tasks_of_service(&pass.service.id) {
        if task.desired_state() == TaskState::Remove {
            leaving.entry(task.slot).or_default().push(task);
        } else if task.slot == 0 {
            // From the time when the service was global.
            pass.decision.push(vec![desire(task, TaskState::Remove)]);
        } else {
            slots.entry(task.slot).or_default().push(task);
        }
    }
    let wanted = usize::try_from(replicas).unwrap_or(usize::MAX);
    for number in surplus(&slots, slots.len().saturating_sub(wanted)) {
        let gone = slots.remove(&number).unwrap_or_default();
        let group = gone.iter().map(|task| desire(task, TaskState::Remove));
        pass.decision.push(group.collect());
    }
    let missing = wanted.saturating_sub(slots.len()).min(CREATE_MAX);
    let free: Vec<u64> = (1..)
        .filter(|number| !slots.contains_key(number))
        .take(missing)
        .collect();
    let mut settled = Vec::with_capacity(slots.len() + missing);
    for (number, mut tasks) in slots {
        tasks.extend(leaving.remove(&number).unwrap_or_default());
        settled.push(pass.settle(Place::Number(number), tasks, true));
    }
    for number in free {
        let before = leaving.remove(&number).unwrap_or_default();
        settled.push(pass.fill(Place::Number(number), before));
    }
    settled
}

/// Which slots to give up: first those that do not run, then those on nodes with
/// the most tasks of the service, then the highest numbers.
fn surplus(slots: &BTreeMap<u64, Vec<&Arc<Task>>>, count: usize) -> Vec<u64> {
    if count == 0 {
        return Vec::new();
    }
    let mut idle = Vec::new();
    let mut by_node: HashMap<&str, Vec<u64>> = HashMap::new();
    for (&number, tasks) in slots {
        match tasks.iter().find(|task| is_good(task)) {
            Some(task) => by_node.entry(&task.node_id).or_default().push(number),
            None => {
                let live = tasks.iter().any(|task| is_live(task));
                idle.push((live, std::cmp::Reverse(number)));
            }
        }
    }
    idle.sort_unstable();
    let mut chosen: Vec<u64> = idle
        .into_iter()
        .map(|(_, number)| number.0)
        .take(count)
        .collect();
    // The fullest node first; each of its slots that goes makes it less full.
    let mut nodes: std::collections::BinaryHeap<_> = by_node
        .into_values()
        .map(|numbers| (numbers.len(), numbers.last().copied(), numbers))
        .collect();
    while chosen.len() < count
        && let Some((_, _, mut numbers)) = nodes.pop()
    {
        chosen.extend(numbers.pop());
        if !numbers.is_empty() {
            nodes.push((numbers.len(), numbers.last().copied(), numbers));
        }
    }
    chosen
}

/// The service is gone: so must its tasks be.
pub(crate) fn remove_all(state: &State, service_id: &str, decision: &mut Decision) {
    for task in state.tasks_of_service(service_id) {
        if task.desired_state() != TaskState::Remove {
            decision.push(vec![give_up(task)]);
        }
    }
}
