//! What the node must hold, and what follows from a change of it.
//!
//! Pure: from the held set and a new one (or a change to it) to the next held
//! set and the list of tasks to start, change and remove. Touches neither
//! disk nor kernel; `agent.rs` performs what is decided here.
//!
//! A complete set replaces everything: whatever is absent is stopped and
//! removed. A change applies to exactly the revision that is held; a set from
//! a manager that lags behind what the node already holds is refused, so that
//! an old view never stops a newer task.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use prost::Message as _;
use swarm_proto::v1::assignment_change::Change;
use swarm_proto::v1::{AssignmentChange, Assignments, AssignmentsType, Task};
use swarm_proto::{ChangesError, NetworkId, NodeId, ServiceId, TaskId};

use crate::network::NetworkView;

/// No set is larger than this many encoded bytes, whatever a manager sends.
pub const SET_MAX: usize = 512 << 20;
/// No identifier is longer: they become keys, file names and links.
const ID_MAX: usize = 64;

/// Everything the managers want this node to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Held {
    /// Store index it stands for; 0 = never assigned anything.
    pub revision: u64,
    /// The node's tasks.
    pub tasks: OrdMap<TaskId, Arc<Task>>,
    /// The networks they are on, with their tables.
    pub networks: OrdMap<NetworkId, Arc<NetworkView>>,
}

/// Why a set was not taken. The session ends and asks for a complete one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// The change starts from a revision that is not held.
    #[error("change of assignments applies to revision {applies_to}, this node holds {held}")]
    Gap {
        /// What the node holds.
        held: u64,
        /// What the change starts from.
        applies_to: u64,
    },
    /// The manager is behind what the node already holds.
    #[error("manager offers assignments of revision {offered}, this node already holds {held}")]
    Stale {
        /// What the node holds.
        held: u64,
        /// What it was offered.
        offered: u64,
    },
    /// It makes no sense.
    #[error("invalid assignments: {0}")]
    Invalid(String),
    /// Larger than any set may be.
    #[error("assignments are larger than {SET_MAX} bytes")]
    TooLarge,
}

impl From<ChangesError> for SetError {
    fn from(error: ChangesError) -> Self {
        match error {
            ChangesError::TooLarge => Self::TooLarge,
            error => Self::Invalid(error.to_string()),
        }
    }
}

/// A whole set or change, all its messages put together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AssignmentSet {
    /// Replaces everything that is held.
    pub complete: bool,
    /// Revision that a change starts from.
    pub applies_to: u64,
    /// Revision that is held afterwards.
    pub results_in: u64,
    /// In the order in which they were sent. What many nodes get is still encoded: tables of thousands of rows are
    /// decoded by whoever takes them in, and hold up no heartbeat.
    pub messages: Vec<Assignments>,
}

impl AssignmentSet {
    /// All changes, in order.
    ///
    /// # Errors
    /// When a part of them cannot be decoded.
    pub fn changes(&self) -> Result<Vec<AssignmentChange>, SetError> {
        let mut changes = Vec::new();
        let mut room = SET_MAX;
        for message in &self.messages {
            changes.extend(message.clone().into_changes(&mut room)?);
        }
        Ok(changes)
    }
}

/// Puts the messages of one set together.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: Option<AssignmentSet>,
    bytes: usize,
}

impl Assembler {
    /// Takes the next message. Returns the set once its last message is there.
    ///
    /// # Errors
    /// When the message does not belong to the set that was begun, or the set is too large.
    pub fn push(&mut self, message: Assignments) -> Result<Option<AssignmentSet>, SetError> {
        let length = message.encoded_len();
        #[cfg(feature = "testing")]
        crate::light::LARGEST_MESSAGE.fetch_max(length, std::sync::atomic::Ordering::Relaxed);
        self.bytes = self.bytes.saturating_add(length);
        if self.bytes > SET_MAX {
            return Err(SetError::TooLarge);
        }
        let complete = match AssignmentsType::try_from(message.r#type) {
            Ok(kind) => kind == AssignmentsType::Complete,
            Err(_) => {
                return Err(SetError::Invalid(format!(
                    "unknown type {} of assignments",
                    message.r#type
                )));
            }
        };
        let set = self.partial.get_or_insert_with(|| AssignmentSet {
            complete,
            applies_to: message.applies_to,
            results_in: message.results_in,
            messages: Vec::new(),
        });
        if (set.complete, set.applies_to, set.results_in)
            != (complete, message.applies_to, message.results_in)
        {
            return Err(SetError::Invalid(
                "messages of different sets are mixed".to_owned(),
            ));
        }
        let more = message.more;
        set.messages.push(message);
        if more {
            return Ok(None);
        }
        self.bytes = 0;
        Ok(self.partial.take())
    }
}

/// What a new held set means for the node's tasks. The networks need no list:
/// they are compared with what the kernel was told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// New here.
    pub start: Vec<Arc<Task>>,
    /// Held before, wanted differently now.
    pub update: Vec<Arc<Task>>,
    /// No longer wanted: stop, then remove every trace.
    pub remove: Vec<TaskId>,
}

impl Plan {
    /// The difference between two held sets. Cheap where they share memory.
    #[must_use]
    pub fn between(old: &Held, new: &Held) -> Self {
        let mut plan = Self::default();
        for item in old.tasks.diff(&new.tasks) {
            match item {
                DiffItem::Add(_, task) => plan.start.push(task.clone()),
                DiffItem::Update { new: (_, task), .. } => plan.update.push(task.clone()),
                DiffItem::Remove(id, _) => plan.remove.push(id.clone()),
            }
        }
        plan
    }
}

/// The held set after `set`. `node` is this node: tasks of others are refused.
///
/// # Errors
/// [`SetError`]; then nothing is to be changed.
pub fn apply(held: &Held, set: &AssignmentSet, node: &NodeId) -> Result<Held, SetError> {
    #[cfg(feature = "museum")]
    let checked = !swarm_proto::museum::on(swarm_proto::museum::Bug::StaleAssignments);
    #[cfg(not(feature = "museum"))]
    let checked = true;
    if checked && set.results_in < held.revision {
        return Err(SetError::Stale {
            held: held.revision,
            offered: set.results_in,
        });
    }
    if checked && !set.complete && set.applies_to != held.revision {
        return Err(SetError::Gap {
            held: held.revision,
            applies_to: set.applies_to,
        });
    }
    let mut next = if set.complete {
        Held::default()
    } else {
        held.clone()
    };
    next.revision = set.results_in;
    // A row may be sent before its network: rows of networks that are not there yet wait.
    let mut early = Vec::new();
    let changes = set.changes()?;
    for change in &changes {
        let Some(change) = &change.change else {
            return Err(SetError::Invalid(
                "a change of a kind this version does not know".to_owned(),
            ));
        };
        if !apply_change(&mut next, change, node)? {
            early.push(change);
        }
    }
    for change in early {
        if !apply_change(&mut next, change, node)? {
            return Err(SetError::Invalid(format!(
                "a row of a network that is not assigned: {change:?}"
            )));
        }
    }
    if set.complete {
        keep_equal(held, &mut next);
    }
    Ok(next)
}

/// Keeps what did not change in the memory it was in, so that later comparisons
/// (and the kernel) are spared.
fn keep_equal(held: &Held, next: &mut Held) {
    for (id, old) in &held.networks {
        if let Some(new) = next.networks.get_mut(id)
            && **new == **old
        {
            *new = old.clone();
        }
    }
    for (id, old) in &held.tasks {
        if let Some(new) = next.tasks.get_mut(id)
            && **new == **old
        {
            *new = old.clone();
        }
    }
}

/// False if the change is a row of a network that is not there (yet).
fn apply_change(next: &mut Held, change: &Change, node: &NodeId) -> Result<bool, SetError> {
    match change {
        Change::Task(task) => {
            check_id("task", &task.id)?;
            if task.node_id != **node {
                return Err(SetError::Invalid(format!(
                    "task {} belongs to node {}",
                    task.id, task.node_id
                )));
            }
            for network in &task.networks {
                check_id("network", &network.network_id)?;
            }
            next.tasks
                .insert(TaskId::from(&task.id), Arc::new(task.clone()));
        }
        Change::RemoveTask(id) => {
            next.tasks.remove(id.as_str());
        }
        Change::Network(network) => {
            check_id("network", &network.id)?;
            let id = NetworkId::from(&network.id);
            view_mut(next, &id, true).network = network.clone();
        }
        #[cfg(feature = "museum")]
        Change::RemoveNetwork(_)
            if swarm_proto::museum::on(swarm_proto::museum::Bug::NetworkKept) => {}
        Change::RemoveNetwork(id) => {
            next.networks.remove(id.as_str());
        }
        Change::Endpoint(row) => {
            check_id("task", &row.task_id)?;
            let network = NetworkId::from(&row.network_id);
            if !next.networks.contains_key(&network) {
                return Ok(false);
            }
            view_mut(next, &network, false)
                .endpoints
                .insert(TaskId::from(&row.task_id), Arc::new(row.clone()));
        }
        Change::RemoveEndpoint(key) => {
            let network = NetworkId::from(&key.network_id);
            if next.networks.contains_key(&network) {
                view_mut(next, &network, false)
                    .endpoints
                    .remove(key.task_id.as_str());
            }
        }
        Change::Service(row) => {
            check_id("service", &row.service_id)?;
            let network = NetworkId::from(&row.network_id);
            if !next.networks.contains_key(&network) {
                return Ok(false);
            }
            view_mut(next, &network, false)
                .services
                .insert(ServiceId::from(&row.service_id), Arc::new(row.clone()));
        }
        Change::RemoveService(key) => {
            let network = NetworkId::from(&key.network_id);
            if next.networks.contains_key(&network) {
                view_mut(next, &network, false)
                    .services
                    .remove(key.service_id.as_str());
            }
        }
    }
    Ok(true)
}

fn view_mut<'a>(next: &'a mut Held, id: &NetworkId, create: bool) -> &'a mut NetworkView {
    if create && !next.networks.contains_key(id) {
        next.networks.insert(id.clone(), Arc::default());
    }
    let view = next
        .networks
        .get_mut(id)
        .expect("callers check or create the network first");
    Arc::make_mut(view)
}

fn check_id(kind: &str, id: &str) -> Result<(), SetError> {
    let fits = !id.is_empty()
        && id.len() <= ID_MAX
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if fits {
        Ok(())
    } else {
        Err(SetError::Invalid(format!("{kind} with the ID {id:?}")))
    }
}

/// The networks that a task is on.
#[must_use]
pub fn networks_of(task: &Task) -> BTreeSet<NetworkId> {
    task.networks
        .iter()
        .map(|attachment| NetworkId::from(&attachment.network_id))
        .collect()
}

/// "web.1", or "web.<node>" for a global service: what people call a task.
#[must_use]
pub fn task_name(task: &Task) -> String {
    let service = match &task.service_annotations {
        Some(annotations) if !annotations.name.is_empty() => annotations.name.as_str(),
        _ => task.service_id.as_str(),
    };
    if task.slot == 0 {
        format!("{service}.{}", task.node_id)
    } else {
        format!("{service}.{}", task.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use swarm_proto::v1::{
        AssignmentChanges, EndpointEntry, EndpointKey, Network, NetworkAttachment, ServiceEntry,
    };

    const NODE: &str = "n1";

    fn node() -> NodeId {
        NodeId::from(NODE)
    }

    fn task(id: &str, desired: i32) -> Change {
        Change::Task(Task {
            id: id.into(),
            node_id: NODE.into(),
            desired_state: desired,
            networks: vec![NetworkAttachment {
                network_id: "net".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    fn network(id: &str) -> Change {
        Change::Network(Network {
            id: id.into(),
            ..Default::default()
        })
    }

    fn row(network: &str, task: &str, addr: &str) -> Change {
        Change::Endpoint(EndpointEntry {
            network_id: network.into(),
            task_id: task.into(),
            addr: addr.into(),
            ..Default::default()
        })
    }

    fn set(complete: bool, from: u64, to: u64, changes: Vec<Change>) -> AssignmentSet {
        AssignmentSet {
            complete,
            applies_to: from,
            results_in: to,
            messages: vec![Assignments {
                changes: changes
                    .into_iter()
                    .map(|change| AssignmentChange {
                        change: Some(change),
                    })
                    .collect(),
                ..Assignments::default()
            }],
        }
    }

    #[test]
    fn complete_set_removes_what_is_absent() {
        let first = set(
            true,
            0,
            5,
            vec![network("net"), task("a", 512), task("b", 512)],
        );
        let held = apply(&Held::default(), &first, &node()).unwrap();
        let next = apply(&held, &set(true, 0, 6, vec![task("b", 640)]), &node()).unwrap();
        let plan = Plan::between(&held, &next);
        assert_eq!(plan.remove, vec![TaskId::from("a")]);
        assert_eq!(plan.update.len(), 1);
        assert!(plan.start.is_empty());
        assert!(next.networks.is_empty());
    }

    #[test]
    fn change_of_another_revision_is_refused() {
        let held = apply(&Held::default(), &set(true, 0, 5, vec![]), &node()).unwrap();
        assert_eq!(
            apply(&held, &set(false, 6, 7, vec![]), &node()),
            Err(SetError::Gap {
                held: 5,
                applies_to: 6
            })
        );
    }

    #[test]
    fn set_of_a_lagging_manager_is_refused() {
        let held = apply(&Held::default(), &set(true, 0, 5, vec![]), &node()).unwrap();
        assert_eq!(
            apply(&held, &set(true, 0, 4, vec![]), &node()),
            Err(SetError::Stale {
                held: 5,
                offered: 4
            })
        );
    }

    #[test]
    fn unchanged_networks_keep_their_memory_over_a_complete_set() {
        let full = set(
            true,
            0,
            5,
            vec![network("net"), row("net", "a", "10.0.0.2/24")],
        );
        let held = apply(&Held::default(), &full, &node()).unwrap();
        let next = apply(
            &held,
            &AssignmentSet {
                results_in: 6,
                ..full
            },
            &node(),
        )
        .unwrap();
        assert!(Arc::ptr_eq(&held.networks["net"], &next.networks["net"]));
    }

    #[test]
    fn rows_may_come_before_their_network_but_not_without_it() {
        let early = set(
            true,
            0,
            1,
            vec![row("net", "a", "10.0.0.2/24"), network("net")],
        );
        let held = apply(&Held::default(), &early, &node()).unwrap();
        assert_eq!(held.networks["net"].endpoints.len(), 1);
        let alone = set(true, 0, 1, vec![row("net", "a", "10.0.0.2/24")]);
        assert!(matches!(
            apply(&Held::default(), &alone, &node()),
            Err(SetError::Invalid(_))
        ));
    }

    #[test]
    fn task_of_another_node_and_wild_ids_are_refused() {
        let foreign = Change::Task(Task {
            id: "a".into(),
            node_id: "n2".into(),
            ..Default::default()
        });
        for change in [foreign, task("../x", 512), network("")] {
            let refused = apply(&Held::default(), &set(true, 0, 1, vec![change]), &node());
            assert!(matches!(refused, Err(SetError::Invalid(_))));
        }
    }

    #[test]
    fn set_in_pieces_is_whole_only_with_its_last_piece() {
        let mut assembler = Assembler::default();
        let piece = |more, change: Change| Assignments {
            r#type: AssignmentsType::Complete as i32,
            applies_to: 0,
            results_in: 3,
            more,
            changes: vec![AssignmentChange {
                change: Some(change),
            }],
            shared: Vec::new(),
        };
        assert_eq!(assembler.push(piece(true, network("net"))).unwrap(), None);
        let whole = assembler
            .push(piece(false, task("a", 512)))
            .unwrap()
            .unwrap();
        assert_eq!(whole.changes().unwrap().len(), 2);
        assembler.push(piece(true, network("net"))).unwrap();
        let other = Assignments {
            results_in: 4,
            ..piece(true, network("net"))
        };
        assert!(matches!(assembler.push(other), Err(SetError::Invalid(_))));
    }

    #[test]
    fn what_others_get_too_comes_first() {
        let [first, last] = [network("net"), task("a", 512)].map(|change| AssignmentChange {
            change: Some(change),
        });
        let part = AssignmentChanges {
            changes: vec![first.clone()],
        };
        let message = |part: Vec<u8>| Assignments {
            changes: vec![last.clone()],
            shared: vec![part.into()],
            ..Assignments::default()
        };
        let set = Assembler::default().push(message(part.encode_to_vec()));
        let set = set.unwrap().unwrap();
        assert_eq!(set.changes().unwrap(), [first, last.clone()]);
        let nonsense = Assembler::default().push(message(vec![0xff]));
        let refused = apply(&Held::default(), &nonsense.unwrap().unwrap(), &node());
        assert!(matches!(refused, Err(SetError::Invalid(_))));
    }

    fn any_change() -> impl Strategy<Value = Change> {
        let id = prop::sample::select(vec!["a", "b", "c"]);
        let net = prop::sample::select(vec!["x", "y"]);
        prop_oneof![
            (id.clone(), 0..800i32).prop_map(|(id, desired)| task(id, desired)),
            id.clone().prop_map(|id| Change::RemoveTask(id.into())),
            net.clone().prop_map(network),
            (net.clone(), id.clone(), 2..9u8).prop_map(|(net, id, n)| row(
                net,
                id,
                &format!("10.0.0.{n}/24")
            )),
            (net.clone(), id.clone()).prop_map(|(net, id)| Change::RemoveEndpoint(EndpointKey {
                network_id: net.into(),
                task_id: id.into()
            })),
            (net, id).prop_map(|(net, id)| Change::Service(ServiceEntry {
                network_id: net.into(),
                service_id: id.into(),
                ..Default::default()
            })),
        ]
    }

    proptest! {
        /// Performing the plan on the old tasks gives the new ones.
        #[test]
        fn plan_leads_from_the_old_set_to_the_new(
            first in prop::collection::vec(any_change(), 0..20),
            second in prop::collection::vec(any_change(), 0..20),
            complete: bool,
        ) {
            let both = |mut changes: Vec<Change>| {
                changes.insert(0, network("x"));
                changes.insert(0, network("y"));
                changes
            };
            let held = apply(&Held::default(), &set(true, 0, 1, both(first)), &node()).unwrap();
            let next = apply(&held, &set(complete, 1, 2, both(second)), &node()).unwrap();
            let plan = Plan::between(&held, &next);
            let mut tasks = held.tasks.clone();
            for id in &plan.remove {
                prop_assert!(tasks.remove(id).is_some());
            }
            for task in &plan.start {
                prop_assert!(tasks.insert(TaskId::from(&task.id), task.clone()).is_none());
            }
            for task in &plan.update {
                prop_assert!(tasks.insert(TaskId::from(&task.id), task.clone()).is_some());
            }
            prop_assert_eq!(tasks, next.tasks);
        }
    }
}
