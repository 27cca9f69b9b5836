//! Times the scheduler alone, in the shapes of SwarmKit's `BenchmarkScheduler*`.
//!
//! Not a test: it asserts that every task got a node, no node more than its share (and, with
//! constraints, only nodes that meet them), but no time. Everything goes through the real
//! `apply`: tasks are made, shown to the scheduler, placed, assigned, and shown again.
//!
//! `cargo bench -p swarm-manager --bench scheduler [-- NODES/TASKS]`

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use swarm_manager::scheduler::Scheduler;
use swarm_proto::Siblings;
use swarm_proto::v1::{
    CreateTasks, NewTask, NodeSpec, NodeState, Placement, StoreAction, Task, store_action,
};
use swarm_store::{State, testing};

struct Shape {
    nodes: usize,
    tasks: usize,
    /// Tasks of one service.
    per_service: usize,
    /// Half of the nodes do not meet the services' constraint.
    constrained: bool,
}

const fn shape(nodes: usize, tasks: usize, per_service: usize, constrained: bool) -> Shape {
    Shape {
        nodes,
        tasks,
        per_service,
        constrained,
    }
}

const SHAPES: [Shape; 12] = [
    shape(1_000, 1_000, 1_000, false),
    shape(1_000, 10_000, 1_000, false),
    shape(1_000, 100_000, 1_000, false),
    shape(100_000, 1_000, 1_000, false),
    shape(100_000, 100_000, 10_000, false),
    shape(100_000, 1_000_000, 10_000, false),
    shape(10_000, 1_000_000, 1_000, false),
    shape(10_000, 1_000_000, 10_000, false),
    shape(10_000, 1_000_000, 1_000_000, false),
    shape(1_000, 10_000, 1_000, true),
    shape(1_000, 100_000, 1_000, true),
    shape(10_000, 1_000_000, 10_000, true),
];

/// Actions of one transaction, as the leader's loops pack them.
const BATCH: usize = 2_000;

fn main() {
    let wanted: Option<String> = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average before: {}", load.trim());
    println!(
        "{:>7} {:>9} {:>9} {:>11} | {:>8} {:>8} {:>8} {:>8} {:>8} | {:>13} {:>13}",
        "nodes",
        "tasks",
        "/service",
        "constraint",
        "create s",
        "show s",
        "decide s",
        "assign s",
        "echo s",
        "placements/s",
        "all of it/s"
    );
    for shape in &SHAPES {
        let name = format!("{}/{}", shape.nodes, shape.tasks);
        if wanted
            .as_ref()
            .is_none_or(|wanted| name.contains(wanted.as_str()))
        {
            run(shape);
        }
    }
}

struct World {
    state: State,
    scheduler: Scheduler,
    applying: Duration,
    showing: Duration,
}

impl World {
    fn write(&mut self, actions: impl IntoIterator<Item = StoreAction>) {
        let transaction = testing::transaction(actions);
        let index = self.state.index() + 1;
        let start = Instant::now();
        let applied = self.state.apply(index, &transaction).expect("valid");
        self.state = applied.state;
        let shown = Instant::now();
        self.scheduler.observe(&applied.events);
        self.applying += shown - start;
        self.showing += shown.elapsed();
    }

    fn take_times(&mut self) -> (Duration, Duration) {
        (
            std::mem::take(&mut self.applying),
            std::mem::take(&mut self.showing),
        )
    }
}

/// An identifier like those of nodes and services: random, 25 characters.
fn id(kind: u128, number: usize) -> String {
    let number = (kind << 64 | number as u128) + 1;
    swarm_proto::id::encode(number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn run(shape: &Shape) {
    let mut world = World {
        state: State::default(),
        scheduler: Scheduler::default(),
        applying: Duration::ZERO,
        showing: Duration::ZERO,
    };
    world.write([testing::create(testing::cluster("c"))]);
    let nodes: Vec<usize> = (0..shape.nodes).collect();
    for numbers in nodes.chunks(BATCH) {
        world.write(numbers.iter().map(|&number| {
            let mut node = testing::node(&id(1, number), "");
            node.status.get_or_insert_default().state = NodeState::Ready.into();
            let spec = node.spec.get_or_insert_with(NodeSpec::default);
            let labels = &mut spec.annotations.get_or_insert_default().labels;
            labels.insert("zone".into(), ["a", "b"][number % 2].into());
            testing::create(node)
        }));
    }
    world.take_times();
    let numbers: Vec<usize> = (0..shape.tasks).collect();
    for (at, numbers) in numbers.chunks(shape.per_service).enumerate() {
        let service_id = id(2, at);
        let mut service = testing::service(&service_id, &format!("s{at}"), &[]);
        let spec = service.spec.as_mut().expect("made with one");
        if shape.constrained {
            let task = spec.task.get_or_insert_default();
            task.placement = Some(Placement {
                constraints: vec!["node.labels.zone==a".into()],
                ..Placement::default()
            });
        }
        let template = Task {
            spec: spec.task.clone(),
            service_id,
            service_annotations: spec.annotations.clone().map(Into::into),
            desired_state: swarm_proto::v1::TaskState::Running.into(),
            ..Task::default()
        };
        world.write([testing::create(service)]);
        for numbers in numbers.chunks(BATCH) {
            // As the orchestrator makes them.
            let mut ids = Siblings::new();
            let tasks = numbers.iter().map(|&number| NewTask {
                id: ids.next_id(),
                slot: number as u64 + 1,
            });
            world.write([StoreAction {
                action: Some(store_action::Action::CreateTasks(CreateTasks {
                    template: Some(template.clone()),
                    tasks: tasks.collect(),
                })),
            }]);
        }
    }
    let (create, show) = world.take_times();
    let mut decide = Duration::ZERO;
    loop {
        let start = Instant::now();
        let groups = world.scheduler.decide(&world.state, Duration::from_secs(1));
        decide += start.elapsed();
        if groups.is_empty() {
            break;
        }
        for group in groups {
            world.write(group);
        }
    }
    let (assign, echo) = world.take_times();
    check(shape, &world.state);
    let per_second = |time: Duration| shape.tasks as f64 / time.as_secs_f64();
    let seconds = |time: Duration| format!("{:.3}", time.as_secs_f64());
    println!(
        "{:>7} {:>9} {:>9} {:>11} | {:>8} {:>8} {:>8} {:>8} {:>8} | {:>13.0} {:>13.0}",
        shape.nodes,
        shape.tasks,
        shape.per_service,
        shape.constrained,
        seconds(create),
        seconds(show),
        seconds(decide),
        seconds(assign),
        seconds(echo),
        per_second(decide),
        per_second(create + show + decide + assign + echo),
    );
}

/// Every task has a node; no node has two more tasks than another.
fn check(shape: &Shape, state: &State) {
    let mut loads: BTreeMap<&str, usize> =
        state.nodes().map(|node| (node.id.as_str(), 0)).collect();
    let mut placed = 0;
    for task in state.tasks() {
        *loads
            .get_mut(task.node_id.as_str())
            .expect("a node that exists") += 1;
        placed += 1;
    }
    assert_eq!(placed, shape.tasks);
    if shape.constrained {
        loads.retain(|node, count| {
            let node = state.node(node).expect("listed");
            let labels = node
                .spec
                .as_ref()
                .and_then(|spec| spec.annotations.as_ref());
            let fits = labels.is_some_and(|labels| labels.labels["zone"] == "a");
            assert!(
                fits || *count == 0,
                "a node that does not meet the constraint"
            );
            fits
        });
    }
    let least = loads.values().min().expect("nodes");
    let most = loads.values().max().expect("nodes");
    assert!(
        most - least <= 1,
        "one node has {least} tasks, another {most}"
    );
}
