//! What the scheduler prefers, refuses and says.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use proptest::prelude::*;
use swarm_proto::v1::{
    EndpointSpec, NodeAvailability, NodeDescription, NodeState, PlacementPreference, Platform,
    PortConfig, PublishMode, ResourceRequirements, Resources, Service, SpreadOver, Task, TaskState,
    placement_preference,
};
use swarm_store::State;
use swarm_store::testing;

use super::Scheduler;
use super::filter::Wish;
use crate::world::{BAD_IMAGE, World, container, global, placement, state_of, task_spec};

const GIB: i64 = 1 << 30;

fn reserve(service: &mut Service, cores: i64, gib: i64) {
    task_spec(service).resources = Some(ResourceRequirements {
        reservations: Some(Resources {
            nano_cpus: cores * 1_000_000_000,
            memory_bytes: gib * GIB,
        }),
        ..ResourceRequirements::default()
    });
}

fn equip(world: &mut World, node: &str, cores: i64, gib: i64) {
    let mut change = testing::observe(node, NodeState::Ready);
    if let Some(swarm_proto::v1::store_action::Action::NodeObservation(seen)) = &mut change.action {
        seen.description = Some(NodeDescription {
            hostname: node.into(),
            resources: Some(Resources {
                nano_cpus: cores * 1_000_000_000,
                memory_bytes: gib * GIB,
            }),
            platform: Some(Platform {
                architecture: "x86_64".into(),
                os: "linux".into(),
            }),
            ..NodeDescription::default()
        });
    }
    world.write([change]);
}

fn errors(world: &World, service: &str) -> Vec<String> {
    let mut errors: Vec<String> = world
        .tasks(service)
        .iter()
        .filter(|task| state_of(task) == TaskState::Pending)
        .map(|task| task.status.clone().unwrap().err)
        .collect();
    errors.dedup();
    errors
}

fn per_node(world: &World, service: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for task in world.running(service) {
        *counts.entry(task.node_id).or_default() += 1;
    }
    counts
}

fn spread_over(descriptor: &str) -> PlacementPreference {
    PlacementPreference {
        preference: Some(placement_preference::Preference::Spread(SpreadOver {
            spread_descriptor: descriptor.into(),
        })),
    }
}

#[test]
fn tasks_spread_evenly_and_new_services_prefer_empty_nodes() {
    let mut world = World::new(3);
    world.service("a", 7, |_| {});
    world.settle();
    let counts: Vec<usize> = per_node(&world, "a").into_values().collect();
    assert_eq!(counts, [3, 2, 2]);
    world.service("b", 2, |_| {});
    world.settle();
    assert_eq!(
        per_node(&world, "b").into_keys().collect::<Vec<_>>(),
        ["n1", "n2"]
    );
}

#[test]
fn preferences_spread_over_groups_before_nodes() {
    let mut world = World::new(5);
    for node in ["n0", "n1", "n2"] {
        world.set_label(node, "zone", "a");
    }
    world.set_label("n3", "zone", "b");
    world.service("s", 9, |s| {
        placement(s).preferences = vec![spread_over("node.labels.zone")];
    });
    world.settle();
    let counts = per_node(&world, "s");
    let of = |node: &str| counts.get(node).copied().unwrap_or(0);
    assert_eq!(
        (of("n0") + of("n1") + of("n2"), of("n3"), of("n4")),
        (3, 3, 3)
    );
    assert_eq!((of("n0"), of("n1"), of("n2")), (1, 1, 1));
}

#[test]
fn what_no_node_takes_says_why_per_reason_and_count_of_nodes() {
    let mut world = World::new(3);
    for node in ["n0", "n1", "n2"] {
        equip(&mut world, node, 4, 2);
        world.set_label(node, "zone", "b");
    }
    world.set_label("n2", "zone", "a");
    equip(&mut world, "n2", 4, 16);
    world.service("s", 2, |s| {
        reserve(s, 1, 8);
        placement(s).constraints = vec!["node.labels.zone==b".into()];
    });
    world.settle();
    assert_eq!(
        errors(&world, "s"),
        [
            "no suitable node (insufficient memory on 2 nodes; constraint node.labels.zone==b not met on 1 node)"
        ]
    );
    let task = world.tasks("s").remove(0);
    let reason = task.status.clone().unwrap().reason.unwrap();
    assert_eq!(reason.code, "no-suitable-node");
    let since = reason.since;
    // A changed sentence keeps its beginning; the same one is not written again.
    world.pass_time(100);
    world.set_availability("n0", NodeAvailability::Drain);
    world.settle();
    assert_eq!(
        errors(&world, "s"),
        [
            "no suitable node (1 node is drained; insufficient memory on 1 node; constraint node.labels.zone==b not met on 1 node)"
        ]
    );
    let now = world.tasks("s").remove(0).status.unwrap().reason.unwrap();
    assert_eq!(now.since, since);
    let index = world.state.index();
    world.set_label("n0", "other", "x");
    world.settle();
    assert_eq!(world.state.index(), index + 1);
    // Room appears.
    equip(&mut world, "n1", 4, 16);
    world.settle();
    assert_eq!(world.running("s").len(), 2);
    assert!(world.running("s")[0].status.clone().unwrap().err.is_empty());
}

#[test]
fn every_obstacle_is_named() {
    let mut world = World::new(1);
    equip(&mut world, "n0", 2, 2);
    let mut number = 0;
    let mut said = |world: &mut World, change: &dyn Fn(&mut Service)| {
        number += 1;
        let id = format!("s{number}");
        world.service(&id, 1, |service| change(service));
        world.settle();
        errors(world, &id).join("")
    };
    for (change, text) in [
        (
            Box::new(|s: &mut Service| reserve(s, 3, 0)) as Box<dyn Fn(&mut Service)>,
            "insufficient CPU on 1 node",
        ),
        (
            Box::new(|s: &mut Service| {
                placement(s).platforms = vec![Platform {
                    architecture: "arm64".into(),
                    os: "linux".into(),
                }];
            }),
            "unsupported platform on 1 node",
        ),
        (
            Box::new(|s: &mut Service| placement(s).constraints = vec!["nonsense".into()]),
            "constraint \"nonsense\" has no operator: expected KEY==VALUE or KEY!=VALUE",
        ),
    ] {
        assert_eq!(
            said(&mut world, &change),
            format!("no suitable node ({text})")
        );
    }
    world.service("amd", 1, |s| {
        placement(s).platforms = vec![Platform {
            architecture: "amd64".into(),
            os: "linux".into(),
        }];
    });
    world.settle();
    assert_eq!(world.running("amd").len(), 1);
    world.set_node_state("n0", NodeState::Down);
    assert_eq!(
        said(&mut world, &|_| {}),
        "no suitable node (1 node is down)"
    );
    world.remove_node("n0");
    assert_eq!(
        said(&mut world, &|_| {}),
        "no suitable node (the cluster has no nodes)"
    );
}

#[test]
fn a_host_port_is_used_once_per_node_and_free_again_when_its_task_ends() {
    let mut world = World::new(2);
    let port = PortConfig {
        target_port: 80,
        published_port: 8080,
        publish_mode: PublishMode::Host.into(),
        ..PortConfig::default()
    };
    world.service("s", 3, |s| {
        s.spec.as_mut().unwrap().endpoint = Some(EndpointSpec {
            ports: vec![port.clone()],
            ..EndpointSpec::default()
        });
    });
    world.settle();
    assert_eq!(world.running("s").len(), 2);
    assert_eq!(
        errors(&world, "s"),
        ["no suitable node (host port 8080 in use on 2 nodes)"]
    );
    world.scale("s", 2);
    world.settle();
    world.set_image("s", "v2");
    world.settle_for(20);
    assert_eq!(
        per_node(&world, "s").into_values().collect::<Vec<_>>(),
        [1, 1]
    );
    assert!(errors(&world, "s").is_empty());
}

#[test]
fn max_replicas_per_node_is_kept() {
    let mut world = World::new(2);
    world.service("s", 5, |s| placement(s).max_replicas = 2);
    world.settle();
    assert_eq!(
        per_node(&world, "s").into_values().collect::<Vec<_>>(),
        [2, 2]
    );
    assert_eq!(
        errors(&world, "s"),
        ["no suitable node (maximum replicas per node reached on 2 nodes)"]
    );
}

#[test]
fn a_node_on_which_a_service_keeps_failing_is_the_last_choice() {
    let mut world = World::new(2);
    world.set_availability("n1", NodeAvailability::Pause);
    world.service("s", 5, |s| container(s).image = BAD_IMAGE.into());
    world.settle();
    world.set_availability("n1", NodeAvailability::Active);
    // More tasks of others do not make it worse than the failing node.
    world.service("other", 6, |s| {
        placement(s).constraints = vec!["node.id==n1".into()]
    });
    world.settle();
    world.change_service("s", |s| container(s).image = "v2".into());
    world.settle_for(60);
    assert_eq!(
        per_node(&world, "s"),
        BTreeMap::from([("n1".to_owned(), 5)])
    );
}

#[test]
fn a_global_task_waits_for_room_on_its_own_node() {
    let mut world = World::new(2);
    equip(&mut world, "n0", 4, 1);
    equip(&mut world, "n1", 4, 4);
    world.service("g", 0, |s| {
        s.spec.as_mut().unwrap().mode = global();
        reserve(s, 0, 2);
    });
    world.settle();
    assert_eq!(
        per_node(&world, "g"),
        BTreeMap::from([("n1".to_owned(), 1)])
    );
    assert_eq!(
        errors(&world, "g"),
        ["no suitable node (insufficient memory on 1 node)"]
    );
    equip(&mut world, "n0", 4, 4);
    world.settle();
    assert_eq!(per_node(&world, "g").len(), 2);
}

/// What must be the same in a mirror that followed and in one that is new.
fn digest(scheduler: &Scheduler, state: &State) -> BTreeMap<String, String> {
    let describe = |id: &str| scheduler.describe(id);
    state
        .nodes()
        .map(|node| (node.id.clone(), describe(&node.id)))
        .collect()
}

proptest! {
    #[test]
    fn the_mirror_that_followed_is_the_one_built_anew(
        steps in prop::collection::vec((0..7_u8, 0..4_usize, 1..6_u64), 1..40),
    ) {
        let mut world = World::new(4);
        for node in 0..4 {
            equip(&mut world, &format!("n{node}"), 4, 4);
        }
        for id in ["a", "b"] {
            world.service(id, 3, |s| reserve(s, 0, 1));
        }
        for (kind, at, number) in steps {
            let node = format!("n{at}");
            match kind {
                0 => world.scale("a", number * 2),
                1 => world.scale("b", number),
                2 => world.set_node_state(&node, NodeState::Down),
                3 => world.set_node_state(&node, NodeState::Ready),
                4 => equip(&mut world, &node, 4, i64::try_from(number).unwrap()),
                5 => world.set_image("a", &format!("v{number}")),
                _ => {
                    world.agents();
                    world.pass_time(number);
                }
            }
            world.managers();
            let fresh = Scheduler::new(&world.state);
            prop_assert_eq!(digest(&world.scheduler, &world.state), digest(&fresh, &world.state));
            // No reservation is broken by what was placed while the node had this size.
            for task in world.tasks("a") {
                prop_assert!(task.node_id.is_empty() || state_of(&task) >= TaskState::Assigned);
            }
        }
    }

    #[test]
    fn tasks_go_where_there_is_room_evenly_and_nowhere_else(
        rooms in prop::collection::vec(0..6_i64, 1..12),
        replicas in 0..40_u64,
    ) {
        let mut world = World::new(rooms.len());
        for (at, room) in rooms.iter().enumerate() {
            equip(&mut world, &format!("n{at}"), 64, *room);
        }
        world.service("s", replicas, |s| reserve(s, 0, 1));
        world.settle();
        let counts = per_node(&world, "s");
        let room: i64 = rooms.iter().sum();
        let placed = world.running("s").len();
        prop_assert_eq!(placed as i64, room.min(replicas as i64));
        let most = counts.values().copied().max().unwrap_or(0);
        for (at, room) in rooms.iter().enumerate() {
            let count = counts.get(&format!("n{at}")).copied().unwrap_or(0);
            prop_assert!(count as i64 <= *room);
            // A node with fewer tasks than the fullest by two has no room left.
            prop_assert!(count + 1 >= most || count as i64 == *room);
        }
        if (placed as u64) < replicas {
            prop_assert_eq!(
                errors(&world, "s"),
                [format!("no suitable node (insufficient memory on {} node{})", rooms.len(), if rooms.len() == 1 { "" } else { "s" })]
            );
        }
    }
}

#[test]
fn more_tasks_than_one_pass_takes_are_all_placed() {
    let mut world = World::new(50);
    let mut service = testing::service("s", "s", &[]);
    service.spec.as_mut().unwrap().mode = crate::world::replicated(0);
    world.write([testing::create(service)]);
    let tasks = (0..25_000).map(|at| {
        let mut task = testing::task(&format!("t{at}"), "s", &[]);
        task.slot = at + 1;
        testing::create(task)
    });
    world.write(tasks.collect::<Vec<_>>());
    let mut passes = 0;
    loop {
        let groups = world.scheduler.decide(&world.state, world.now);
        if groups.is_empty() {
            break;
        }
        passes += 1;
        world.write(groups.concat());
    }
    assert!(passes >= 3);
    let mut counts: HashMap<String, usize> = HashMap::new();
    for task in world.state.tasks() {
        *counts.entry(task.node_id.clone()).or_default() += 1;
    }
    assert_eq!(counts.len(), 50);
    assert!(counts.values().all(|&count| count == 500));
}

/// Not a benchmark, but a floor that a slow algorithm falls through even in a debug build.
#[test]
fn a_hundred_thousand_tasks_on_ten_thousand_nodes_are_chosen_in_one_go() {
    const NODES: usize = 10_000;
    const TASKS: usize = 100_000;
    let mut world = World::new(0);
    let nodes = (0..NODES).map(|at| testing::create(testing::node(&format!("n{at}"), "")));
    world.write(nodes.collect::<Vec<_>>());
    let begin = Instant::now();
    let chosen = world
        .scheduler
        .choose(&"s".into(), &Wish::of(&Task::default()), TASKS, world.now);
    eprintln!("{TASKS} placements in {:?}", begin.elapsed());
    let mut counts: HashMap<u32, usize> = HashMap::new();
    for node in chosen {
        *counts.entry(node).or_default() += 1;
    }
    assert_eq!(counts.len(), NODES);
    assert!(counts.values().all(|&count| count == TASKS / NODES));
}
