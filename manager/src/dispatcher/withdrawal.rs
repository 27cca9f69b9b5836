//! Lets a task that is to end be stopped once nobody sends it anything new any more.
//!
//! A task that is to end is taken out of names and balancing at once, on each node that has its networks, and these
//! acknowledge it. [`Waiting`] decides, from the state and what was acknowledged, whose time has come; a
//! loop of the leader writes that to the task (`withdrawn`), and its agent stops it. Scaling down,
//! updating and draining are all the same here. Nobody is waited for longer than [`PATIENCE`], nor a node that is Down.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use swarm_proto::v1::{
    NodeState, NodeStatus, Object, Reason, StoreAction, Task, TaskState, object, store_action,
};
use swarm_proto::{NetworkId, NodeId, TaskId};
use swarm_store::{Change, Event, State};
use tokio::time::Instant;

use super::REST;
use super::assignments::{is_assigned, networks_of, state_of};
use super::liveness::Liveness;
use crate::leader::{Feed, Group, LeaderLoop, LoopContext, sleep_until};

/// A task is stopped after this long, whoever has acknowledged.
const PATIENCE: Duration = Duration::from_secs(2);
/// Of the nodes that have not acknowledged, so many are named in the log.
const MISSING_SAID: usize = 5;
/// A task that waits for longer than this says so.
const EXPLAIN_AFTER: Duration = Duration::from_millis(500);
/// Acknowledgements that come within this time are looked at together.
const TOGETHER: Duration = Duration::from_millis(5);

/// The loop that writes it.
pub(super) fn leader_loop(liveness: Liveness) -> LeaderLoop {
    LeaderLoop::new("withdrawal", move |context| run(context, liveness.clone()))
}

async fn run(context: LoopContext, liveness: Liveness) {
    let mut feed = Feed::new(&context);
    let mut waiting = Waiting::default();
    waiting.observe_all(feed.state(), Instant::now());
    loop {
        let begun = Instant::now();
        let verdict = waiting.decide(feed.state(), |node| liveness.acknowledged(node), begun);
        let rest = TOGETHER.max(begun.elapsed() * REST);
        if !verdict.groups.is_empty() {
            let proposed = tokio::select! {
                () = context.cancel.cancelled() => return,
                proposed = context.propose_groups(verdict.groups) => proposed,
            };
            // What was refused has changed meanwhile: the change is on its way here.
            if let Some(error) = proposed.failed {
                if !context.settle(&error).await {
                    return;
                }
                feed = Feed::new(&context);
                waiting.propose_again();
                waiting.observe_all(feed.state(), Instant::now());
                continue;
            }
        }
        tokio::select! {
            () = context.cancel.cancelled() => return,
            fed = feed.next(&context) => {
                let Some(changes) = fed else { return };
                for change in &changes {
                    waiting.observe(change, Instant::now());
                }
            }
            () = liveness.newer(), if !waiting.is_empty() => tokio::time::sleep(rest).await,
            () = sleep_until(verdict.next) => {}
        }
    }
}

/// Tasks that are to end and still there, with the revision that takes them out of balancing.
#[derive(Debug, Default)]
struct Waiting(BTreeMap<TaskId, Entry>);

#[derive(Debug)]
struct Entry {
    since: Instant,
    revision: u64,
    explained: bool,
    /// The version of the task for which a write was proposed.
    proposed: u64,
}

/// What to write, and when to look again.
#[derive(Debug, Default)]
struct Verdict {
    groups: Vec<Group>,
    next: Option<Instant>,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What was proposed may not have been written.
    fn propose_again(&mut self) {
        self.0.values_mut().for_each(|entry| entry.proposed = 0);
    }

    fn observe(&mut self, change: &Change, now: Instant) {
        for event in change.events.iter() {
            if let Event::Task { new: Some(new), .. } = event {
                self.add(new, version_of(new), now);
            }
        }
    }

    /// What a leader finds. When each was taken out is not known: not later than it was last written.
    fn observe_all(&mut self, state: &State, now: Instant) {
        for task in state.tasks() {
            self.add(task, version_of(task), now);
        }
    }

    /// The first time counts.
    fn add(&mut self, task: &Task, revision: u64, now: Instant) {
        if is_waiting(task) {
            self.0.entry(TaskId::from(&task.id)).or_insert(Entry {
                since: now,
                revision,
                explained: false,
                proposed: 0,
            });
        }
    }

    fn decide(
        &mut self,
        state: &State,
        acknowledged: impl Fn(&str) -> u64,
        now: Instant,
    ) -> Verdict {
        let mut verdict = Verdict::default();
        let mut holders: HashMap<NetworkId, BTreeMap<NodeId, u64>> = HashMap::new();
        self.0.retain(|id, entry| {
            let Some(task) = state.task(id).filter(|task| is_waiting(task)) else {
                return false;
            };
            // Its agent waits only with what others may have reached.
            if state_of(task) != TaskState::Running || entry.proposed == version_of(task) {
                return true;
            }
            let mut missing = BTreeSet::new();
            for network in networks_of(task) {
                let nodes = holders
                    .entry(network)
                    .or_insert_with_key(|network| holders_of(state, network, &acknowledged));
                let late = nodes.iter().filter(|(_, seen)| **seen < entry.revision);
                missing.extend(late.map(|(node, _)| node.clone()));
            }
            let (explain_at, end) = (entry.since + EXPLAIN_AFTER, entry.since + PATIENCE);
            if missing.is_empty() || end <= now {
                if !missing.is_empty() {
                    let first: Vec<&NodeId> = missing.iter().take(MISSING_SAID).collect();
                    tracing::warn!(task = %id, nodes = missing.len(), ?first, "nodes have not acknowledged that a task ends; stopping it all the same");
                }
                entry.proposed = version_of(task);
                verdict.groups.push(vec![write(Task {
                    withdrawn: true,
                    ..(**task).clone()
                })]);
                return true;
            }
            let next = if entry.explained { end } else { explain_at };
            if !entry.explained && explain_at <= now {
                entry.explained = true;
                verdict.groups.push(vec![write(explained(task, missing.len()))]);
            }
            let next = next.max(now);
            verdict.next = Some(verdict.next.map_or(next, |known| known.min(next)));
            true
        });
        verdict
    }
}

/// It is to end, may be reached over a network, and nobody has said yet that it is not any more.
fn is_waiting(task: &Task) -> bool {
    task.desired_state > TaskState::Running as i32
        && !task.withdrawn
        && !task.networks.is_empty()
        && is_assigned(task)
}

/// The nodes that balance on a network and are heard, with what each has acknowledged.
fn holders_of(
    state: &State,
    network: &NetworkId,
    acknowledged: &impl Fn(&str) -> u64,
) -> BTreeMap<NodeId, u64> {
    let mut holders = BTreeMap::new();
    for task in state
        .tasks_on_network(network)
        .filter(|task| is_assigned(task))
    {
        let node = state.node(&task.node_id);
        let status = node.and_then(|node| node.status.as_ref());
        if status.map(NodeStatus::state) == Some(NodeState::Ready) {
            holders
                .entry(NodeId::from(&task.node_id))
                .or_insert_with_key(|node| acknowledged(node));
        }
    }
    holders
}

fn explained(task: &Task, count: usize) -> Task {
    let mut task = task.clone();
    let nodes = if count == 1 { "node" } else { "nodes" };
    let message = format!("waiting for {count} {nodes} to acknowledge that it ends");
    let status = task.status.get_or_insert_default();
    status.message.clone_from(&message);
    status.reason = Some(Reason {
        code: "waiting-for-acknowledgement".to_owned(),
        object: format!("task {}", task.id),
        message,
        since: status.timestamp,
    });
    task
}

fn version_of(task: &Task) -> u64 {
    let version = task.meta.as_ref().and_then(|meta| meta.version);
    version.map_or(0, |version| version.index)
}

fn write(task: Task) -> StoreAction {
    StoreAction {
        action: Some(store_action::Action::Update(Object {
            object: Some(object::Object::Task(task)),
        })),
    }
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::NodeState;
    use swarm_store::testing::{self, observe, report};

    use super::*;

    /// Tasks t1 on n1 and t2 on n2 run on a network.
    struct World {
        state: State,
        waiting: Waiting,
        acknowledged: HashMap<&'static str, u64>,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self {
                state: State::default(),
                waiting: Waiting::default(),
                acknowledged: HashMap::new(),
                now: Instant::now(),
            };
            world.write([
                testing::create(testing::node("n1", "192.0.2.1")),
                testing::create(testing::node("n2", "192.0.2.2")),
                testing::create(testing::network("net", "net", "")),
                testing::create(testing::service("s", "web", &["net"])),
            ]);
            for (id, node, slot) in [("t1", "n1", 1), ("t2", "n2", 2)] {
                let task = Task {
                    node_id: node.into(),
                    slot,
                    ..testing::task(id, "s", &["net"])
                };
                world.write([testing::create(task)]);
                for state in [TaskState::Assigned, TaskState::Running] {
                    world.write([report(id, state, 1)]);
                }
            }
            world
        }

        fn write(&mut self, actions: impl IntoIterator<Item = StoreAction>) -> u64 {
            let index = self.state.index() + 1;
            let applied = self
                .state
                .apply(index, &testing::transaction(actions))
                .expect("nobody else writes");
            self.state = applied.state;
            let change = Change {
                index,
                events: applied.events.into(),
                state: self.state.clone().into(),
            };
            self.waiting.observe(&change, self.now);
            index
        }

        /// Wants the task to end; returns the revision that says so.
        fn end(&mut self, id: &str) -> u64 {
            let task = Task {
                desired_state: TaskState::Shutdown.into(),
                ..Task::clone(self.state.task(id).unwrap())
            };
            self.write([testing::update(task)])
        }

        /// What the loop writes now, written. Returns whether the task may be stopped then.
        fn look(&mut self, id: &str) -> bool {
            let known = &self.acknowledged;
            let seen = |node: &str| known.get(node).copied().unwrap_or(0);
            let verdict = self.waiting.decide(&self.state, seen, self.now);
            for group in verdict.groups {
                self.write(group);
            }
            self.state.task(id).unwrap().withdrawn
        }
    }

    #[test]
    fn a_task_is_stopped_when_every_node_on_its_networks_has_acknowledged() {
        let mut world = World::new();
        assert!(!world.look("t1") && world.waiting.is_empty());
        let revision = world.end("t1");
        world.acknowledged = HashMap::from([("n1", revision), ("n2", revision - 1)]);
        assert!(!world.look("t1"));
        world.acknowledged.insert("n2", revision);
        assert!(world.look("t1"));
        assert!(!world.look("t2"), "it is not to end");
        assert!(world.waiting.is_empty() || !world.look("t2"));
    }

    #[test]
    fn a_node_that_is_down_is_not_waited_for() {
        let mut world = World::new();
        let revision = world.end("t1");
        world.acknowledged.insert("n1", revision);
        assert!(!world.look("t1"));
        world.write([observe("n2", NodeState::Down)]);
        assert!(world.look("t1"));
    }

    #[test]
    fn who_waits_says_for_what_and_not_for_ever() {
        let mut world = World::new();
        world.end("t1");
        assert!(!world.look("t1"));
        world.now += EXPLAIN_AFTER;
        assert!(!world.look("t1"));
        let status = world.state.task("t1").unwrap().status.clone().unwrap();
        assert_eq!(
            status.message,
            "waiting for 2 nodes to acknowledge that it ends"
        );
        assert_eq!(status.state(), TaskState::Running);
        world.now += PATIENCE - EXPLAIN_AFTER;
        assert!(world.look("t1"));
    }

    #[test]
    fn a_new_leader_waits_for_what_it_finds() {
        let mut world = World::new();
        let revision = world.end("t1");
        world.waiting = Waiting::default();
        world.waiting.observe_all(&world.state, world.now);
        assert!(!world.look("t1"));
        world.acknowledged = HashMap::from([("n1", revision), ("n2", revision)]);
        assert!(world.look("t1"));
    }

    #[test]
    fn what_does_not_run_and_what_has_ended_waits_for_nothing() {
        let mut world = World::new();
        world.end("t1");
        world.write([report("t1", TaskState::Shutdown, 2)]);
        assert!(!world.look("t1") && world.waiting.is_empty());
        // Nothing is written for one that nobody was sent to.
        let idle = Task {
            node_id: "n1".into(),
            slot: 3,
            ..testing::task("t3", "s", &["net"])
        };
        world.write([testing::create(idle)]);
        world.write([report("t3", TaskState::Assigned, 1)]);
        world.end("t3");
        world.now += PATIENCE;
        assert!(!world.look("t3"));
    }
}
