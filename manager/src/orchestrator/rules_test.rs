//! Each rule of the orchestrator, in a cluster in memory; and that random
//! trouble always ends with what the services ask for.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    FailureAction, NodeAvailability, NodeState, RestartCondition, RestartPolicy, Task, TaskState,
    UpdateConfig, UpdateOrder, UpdateState,
};

use crate::world::{BAD_IMAGE, World, container, global, placement, state_of, task_spec};

fn image(task: &Task) -> String {
    task.spec.clone().unwrap().container.clone().unwrap().image
}

fn live(world: &World, service: &str) -> Vec<Task> {
    let mut tasks = world.tasks(service);
    tasks.retain(|task| task.desired_state() <= TaskState::Running && !is_terminal(state_of(task)));
    tasks
}

fn update_state(world: &World, service: &str) -> Option<(UpdateState, String)> {
    let status = world.state.service(service)?.update_status.clone()?;
    Some((status.state(), status.message))
}

fn slots(tasks: &[Task]) -> Vec<u64> {
    let mut slots: Vec<u64> = tasks.iter().map(|task| task.slot).collect();
    slots.sort_unstable();
    slots
}

#[test]
fn a_service_gets_its_replicas_in_slots_from_one() {
    let mut world = World::new(3);
    world.service("s", 5, |_| {});
    world.settle();
    assert_eq!(slots(&world.running("s")), [1, 2, 3, 4, 5]);
    assert!(world.state.service("s").unwrap().update_status.is_none());
}

#[test]
fn scaling_down_gives_up_idle_tasks_then_those_on_full_nodes_and_forgets_them() {
    let mut world = World::new(2);
    world.service("s", 4, |_| {});
    world.settle();
    world.set_availability("n1", NodeAvailability::Pause);
    world.scale("s", 6);
    world.settle();
    // n0 has 4 of 6 now; slot 3's task is made idle.
    let idle = world
        .running("s")
        .iter()
        .find(|t| t.slot == 3)
        .unwrap()
        .id
        .clone();
    world.report(&idle, TaskState::Failed);
    world.managers();
    world.scale("s", 4);
    world.settle();
    let left = world.running("s");
    assert!(!slots(&left).contains(&3));
    let on = |node: &str| left.iter().filter(|task| task.node_id == node).count();
    assert_eq!(
        (on("n0") + on("n1"), on("n0").abs_diff(on("n1")) <= 1),
        (4, true)
    );
    assert_eq!(world.tasks("s").len(), 4, "what was given up is deleted");
    world.scale("s", 0);
    world.settle();
    assert!(world.tasks("s").is_empty());
}

#[test]
fn removing_a_service_removes_its_tasks() {
    let mut world = World::new(2);
    world.service("s", 3, |_| {});
    world.settle();
    world.remove_service("s");
    world.managers();
    assert!(
        world
            .tasks("s")
            .iter()
            .all(|t| t.desired_state() == TaskState::Remove)
    );
    world.settle();
    assert!(world.tasks("s").is_empty());
}

#[test]
fn a_failed_task_is_replaced_after_the_delay_and_prepared_meanwhile() {
    let mut world = World::new(1);
    world.service("s", 1, |_| {});
    world.settle();
    let first = world.running("s").remove(0);
    world.report(&first.id, TaskState::Failed);
    world.settle();
    let next = live(&world, "s").remove(0);
    assert_eq!((next.slot, next.restarts), (1, 1));
    assert_eq!(next.desired_state(), TaskState::Ready);
    assert_eq!(state_of(&next), TaskState::Ready, "prepared, and held");
    world.settle_for(4);
    assert!(world.running("s").is_empty());
    world.settle_for(1);
    assert_eq!(world.running("s")[0].id, next.id);
}

#[test]
fn nothing_waits_for_a_time_that_a_wrong_clock_has_written() {
    let mut world = World::new(2);
    world.service("s", 2, |service| {
        service.spec.as_mut().unwrap().update = Some(UpdateConfig {
            parallelism: 1,
            ..UpdateConfig::default()
        });
    });
    world.settle();
    world.pass_time(3600);
    let failed = world.running("s").remove(0);
    world.report(&failed.id, TaskState::Failed);
    world.settle();
    world.set_image("s", "v2");
    world.settle();
    assert_eq!(live(&world, "s").len(), 2);
    // The clock was an hour ahead, and is set right.
    world.now -= Duration::from_secs(3600);
    world.settle_for(60);
    let images: Vec<String> = world.running("s").iter().map(image).collect();
    assert_eq!(images, ["v2", "v2"]);
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Completed);
}

#[test]
fn a_task_that_always_fails_backs_off_and_its_history_is_bounded() {
    let mut world = World::new(1);
    world.service("s", 1, |s| container(s).image = BAD_IMAGE.into());
    world.settle_for(5 + 10 + 20 + 40 + 80 + 1);
    assert_eq!(live(&world, "s")[0].restarts, 6);
    world.settle_for(800);
    assert_eq!(live(&world, "s")[0].restarts, 16);
    assert_eq!(world.tasks("s").len(), 5 + 1);
}

#[test]
fn after_the_last_attempt_the_slot_rests_until_the_spec_changes() {
    let mut world = World::new(1);
    world.service("s", 1, |s| {
        container(s).image = BAD_IMAGE.into();
        task_spec(s).restart = Some(RestartPolicy {
            max_attempts: 2,
            ..RestartPolicy::default()
        });
    });
    world.settle_for(1000);
    assert_eq!(world.tasks("s").len(), 3);
    assert!(live(&world, "s").is_empty());
    world.set_image("s", "v2");
    world.settle_for(10);
    assert_eq!(image(&world.running("s")[0]), "v2");
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Completed);
}

#[test]
fn completed_work_is_not_repeated_when_only_failures_are() {
    let mut world = World::new(1);
    world.service("s", 1, |s| {
        task_spec(s).restart = Some(RestartPolicy {
            condition: RestartCondition::OnFailure.into(),
            ..RestartPolicy::default()
        });
    });
    world.settle();
    let task = world.running("s").remove(0);
    world.report(&task.id, TaskState::Complete);
    world.settle_for(1000);
    assert!(live(&world, "s").is_empty());
    assert_eq!(world.tasks("s").len(), 1);
}

#[test]
fn tasks_of_a_down_node_are_replaced_at_once_and_stop_when_it_returns() {
    let mut world = World::new(2);
    world.service("s", 4, |_| {});
    world.settle();
    world.set_node_state("n0", NodeState::Down);
    world.settle();
    let running = world.running("s");
    assert_eq!(slots(&running), [1, 2, 3, 4]);
    assert!(running.iter().all(|task| task.node_id == "n1"));
    let left = |world: &World| {
        let mut tasks = world.tasks("s");
        tasks.retain(|task| task.node_id == "n0");
        tasks
    };
    assert_eq!(left(&world).len(), 2);
    assert!(
        left(&world)
            .iter()
            .all(|t| t.desired_state() == TaskState::Shutdown)
    );
    world.set_node_state("n0", NodeState::Ready);
    world.settle();
    assert!(
        left(&world)
            .iter()
            .all(|t| state_of(t) == TaskState::Shutdown)
    );
    assert_eq!(world.running("s"), running, "what runs is not moved back");
}

#[test]
fn tasks_of_a_node_that_stays_down_are_orphaned_after_a_day() {
    let mut world = World::new(2);
    world.service("s", 2, |_| {});
    world.settle();
    world.set_node_state("n0", NodeState::Down);
    world.settle_for(24 * 3600 - 1);
    let lost = |world: &World| {
        let tasks = world.tasks("s");
        tasks
            .into_iter()
            .find(|t| t.node_id == "n0")
            .map(|t| state_of(&t))
    };
    assert_eq!(lost(&world), Some(TaskState::Running));
    world.settle_for(1);
    assert_eq!(lost(&world), Some(TaskState::Orphaned));
}

#[test]
fn a_drained_node_loses_its_tasks_and_the_next_starts_when_the_last_has_ended() {
    let mut world = World::new(2);
    world.service("s", 2, |_| {});
    world.settle();
    world.set_availability("n0", NodeAvailability::Drain);
    world.managers();
    let next: Vec<Task> = live(&world, "s")
        .into_iter()
        .filter(|t| state_of(t) < TaskState::Running)
        .collect();
    assert_eq!((next.len(), next[0].desired_state()), (1, TaskState::Ready));
    world.settle();
    assert!(world.running("s").iter().all(|task| task.node_id == "n1"));
    assert_eq!(world.running("s").len(), 2);
}

#[test]
fn a_removed_node_s_tasks_are_replaced_and_deleted() {
    let mut world = World::new(2);
    world.service("s", 2, |_| {});
    world.settle();
    world.set_node_state("n0", NodeState::Down);
    world.remove_node("n0");
    world.settle();
    assert_eq!(world.running("s").len(), 2);
    assert_eq!(world.tasks("s").len(), 2);
}

#[test]
fn a_label_that_changes_moves_the_tasks_that_need_it() {
    let mut world = World::new(2);
    world.set_label("n0", "zone", "a");
    world.service("s", 2, |s| {
        placement(s).constraints = vec!["node.labels.zone==a".into()]
    });
    world.settle();
    assert!(world.running("s").iter().all(|task| task.node_id == "n0"));
    world.set_label("n0", "zone", "b");
    world.settle();
    assert!(world.running("s").is_empty());
    world.set_label("n1", "zone", "A");
    world.settle();
    assert_eq!(world.running("s").len(), 2);
    assert!(world.running("s").iter().all(|task| task.node_id == "n1"));
}

#[test]
fn a_constraint_that_is_added_moves_only_who_violates_it() {
    let mut world = World::new(2);
    world.service("s", 2, |_| {});
    world.settle();
    let before = world.running("s");
    world.change_service("s", |s| {
        placement(s).constraints = vec!["node.id==n1".into()]
    });
    world.settle_for(10);
    let after = world.running("s");
    assert_eq!(after.len(), 2);
    assert!(after.iter().all(|task| task.node_id == "n1"));
    let stayed = before.iter().find(|task| task.node_id == "n1").unwrap();
    assert!(after.iter().any(|task| task.id == stayed.id));
}

#[test]
fn a_global_service_runs_once_on_every_node_that_fits() {
    let mut world = World::new(3);
    world.set_availability("n2", NodeAvailability::Pause);
    world.service("g", 0, |s| s.spec.as_mut().unwrap().mode = global());
    world.settle();
    let nodes = |world: &World| {
        let mut nodes: Vec<String> = world.running("g").into_iter().map(|t| t.node_id).collect();
        nodes.sort();
        nodes
    };
    assert_eq!(nodes(&world), ["n0", "n1"]);
    world.set_availability("n2", NodeAvailability::Active);
    world.settle();
    assert_eq!(nodes(&world), ["n0", "n1", "n2"]);
    world.set_availability("n0", NodeAvailability::Drain);
    world.set_node_state("n1", NodeState::Down);
    world.settle();
    assert_eq!(nodes(&world), ["n2"]);
    world.set_availability("n0", NodeAvailability::Active);
    world.set_node_state("n1", NodeState::Ready);
    world.settle();
    assert_eq!(nodes(&world), ["n0", "n1", "n2"]);
    world.set_image("g", "v2");
    world.settle_for(20);
    assert_eq!(nodes(&world), ["n0", "n1", "n2"]);
    assert!(world.running("g").iter().all(|task| image(task) == "v2"));
    world.remove_node("n0");
    world.settle();
    assert!(world.tasks("g").iter().all(|task| task.node_id != "n0"));
}

#[test]
fn an_update_of_a_global_service_leaves_paused_nodes_for_later() {
    let mut world = World::new(2);
    world.service("g", 0, |s| s.spec.as_mut().unwrap().mode = global());
    world.settle();
    world.set_availability("n0", NodeAvailability::Pause);
    world.set_image("g", "v2");
    world.settle_for(20);
    let images = |world: &World| {
        let mut tasks = world.running("g");
        tasks.sort_by(|left, right| left.node_id.cmp(&right.node_id));
        tasks.iter().map(image).collect::<Vec<_>>()
    };
    assert_eq!(images(&world), ["v1", "v2"]);
    assert_eq!(update_state(&world, "g").unwrap().0, UpdateState::Completed);
    world.set_availability("n0", NodeAvailability::Active);
    world.settle_for(20);
    assert_eq!(images(&world), ["v2", "v2"]);
    assert_eq!(update_state(&world, "g").unwrap().0, UpdateState::Completed);
}

#[test]
fn an_update_replaces_one_slot_after_another_and_stops_first() {
    let mut world = World::new(3);
    world.service("s", 3, |_| {});
    world.settle();
    world.set_image("s", "v2");
    let mut least = 3;
    loop {
        world.managers();
        least = least.min(world.running("s").len());
        let mut by_slot: HashMap<u64, usize> = HashMap::new();
        for task in world.tasks("s") {
            let runs = (TaskState::Starting..=TaskState::Running).contains(&state_of(&task));
            *by_slot.entry(task.slot).or_default() += usize::from(runs);
        }
        assert!(by_slot.values().all(|&count| count <= 1), "stop-first");
        if !world.agents() {
            break;
        }
    }
    assert_eq!(least, 2, "one slot at a time");
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Updating);
    world.settle_for(5);
    assert!(world.running("s").iter().all(|task| image(task) == "v2"));
    let (state, message) = update_state(&world, "s").unwrap();
    assert_eq!(
        (state, message.as_str()),
        (UpdateState::Completed, "update completed")
    );
}

#[test]
fn an_update_that_fails_pauses_and_the_next_spec_goes_on() {
    let mut world = World::new(2);
    world.service("s", 3, |_| {});
    world.settle();
    world.set_image("s", BAD_IMAGE);
    world.settle_for(100);
    let (state, message) = update_state(&world, "s").unwrap();
    assert_eq!(state, UpdateState::Paused);
    let failed = world
        .tasks("s")
        .into_iter()
        .find(|task| image(task) == BAD_IMAGE)
        .unwrap();
    assert!(message.starts_with("update paused due to failure or early termination of task t"));
    let good = |world: &World, wanted: &str| {
        world
            .running("s")
            .iter()
            .filter(|task| image(task) == wanted)
            .count()
    };
    assert_eq!((good(&world, "v1"), failed.slot > 0), (2, true));
    // What does not dirty a task does not end the pause.
    world.scale("s", 3);
    world.settle_for(10);
    assert_eq!(good(&world, "v1"), 2);
    world.set_image("s", "v3");
    world.settle_for(100);
    assert_eq!(good(&world, "v3"), 3);
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Completed);
}

#[test]
fn an_update_that_may_fail_goes_on() {
    let mut world = World::new(2);
    world.service("s", 3, |s| {
        s.spec.as_mut().unwrap().update = Some(UpdateConfig {
            parallelism: 1,
            failure_action: FailureAction::Continue.into(),
            ..UpdateConfig::default()
        });
    });
    world.settle();
    world.set_image("s", BAD_IMAGE);
    world.settle_for(100);
    assert!(world.running("s").is_empty());
    assert!(
        live(&world, "s")
            .iter()
            .all(|task| image(task) == BAD_IMAGE)
    );
}

#[test]
fn a_task_that_cannot_be_placed_blocks_the_update() {
    let mut world = World::new(2);
    world.service("s", 3, |_| {});
    world.settle();
    world.change_service("s", |s| {
        container(s).image = "v2".into();
        task_spec(s).resources = Some(swarm_proto::v1::ResourceRequirements {
            reservations: Some(swarm_proto::v1::Resources {
                nano_cpus: 1,
                memory_bytes: 0,
            }),
            ..Default::default()
        });
    });
    world.settle_for(1000);
    assert_eq!(world.running("s").len(), 2);
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Updating);
    world.set_image("s", "v1");
    world.change_service("s", |s| task_spec(s).resources = None);
    world.settle_for(100);
    assert_eq!(world.running("s").len(), 3);
}

#[test]
fn start_first_keeps_the_old_task_until_the_new_one_is_good() {
    let mut world = World::new(2);
    world.service("s", 2, |s| {
        s.spec.as_mut().unwrap().update = Some(UpdateConfig {
            parallelism: 1,
            order: UpdateOrder::StartFirst.into(),
            ..UpdateConfig::default()
        });
    });
    world.settle();
    world.set_image("s", "v2");
    world.managers();
    while world.agents() {
        world.managers();
        assert!(world.running("s").len() >= 2);
    }
    world.settle_for(5);
    assert_eq!(slots(&world.running("s")), [1, 2]);
    assert!(world.running("s").iter().all(|task| image(task) == "v2"));
    world.set_image("s", BAD_IMAGE);
    world.settle_for(100);
    assert_eq!(world.running("s").len(), 2, "a failed start costs nothing");
    assert_eq!(update_state(&world, "s").unwrap().0, UpdateState::Paused);
}

#[test]
fn labels_replicas_restart_policy_and_credentials_replace_nothing() {
    let mut world = World::new(2);
    world.service("s", 2, |_| {});
    world.settle();
    let before = world.running("s");
    world.change_service("s", |s| {
        let spec = s.spec.as_mut().unwrap();
        spec.annotations
            .as_mut()
            .unwrap()
            .labels
            .insert("a".into(), "b".into());
        container(s).pull_auth = Some(Default::default());
        task_spec(s).restart = Some(RestartPolicy::default());
    });
    world.settle_for(100);
    assert_eq!(world.running("s"), before);
    assert!(update_state(&world, "s").is_none());
    world.change_service("s", |s| task_spec(s).force_update = 1);
    world.settle_for(100);
    assert!(
        world
            .running("s")
            .iter()
            .all(|task| before.iter().all(|old| old.id != task.id))
    );
}

#[test]
fn of_two_tasks_in_a_slot_the_one_that_runs_stays() {
    let mut world = World::new(2);
    world.service("s", 1, |_| {});
    world.settle();
    let kept = world.running("s").remove(0);
    // As a leader would leave it whose last write nobody knew of.
    world.write([swarm_store::testing::create(Task {
        id: "twin".into(),
        node_id: String::new(),
        status: None,
        ..kept.clone()
    })]);
    world.settle();
    assert_eq!(live(&world, "s").len(), 1);
    assert_eq!(live(&world, "s")[0].id, kept.id);
}

#[test]
fn nothing_is_written_twice_and_rest_is_rest() {
    let mut world = World::new(3);
    world.service("s", 5, |_| {});
    world.settle();
    let index = world.state.index();
    world.settle_for(100_000);
    assert_eq!(world.state.index(), index);
}

#[derive(Clone, Debug)]
enum Trouble {
    NodeState(usize, bool),
    Availability(usize, u8),
    End(usize, bool),
    Scale(u64),
    Image(u8),
    Agents(u8),
    Time(u64),
    NewLeader,
    RemoveNode,
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        2 => (0..4_usize, any::<bool>()).prop_map(|(n, up)| Trouble::NodeState(n, up)),
        2 => (0..4_usize, 0..3_u8).prop_map(|(n, a)| Trouble::Availability(n, a)),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(t, ok)| Trouble::End(t, ok)),
        2 => (0..8_u64).prop_map(Trouble::Scale),
        2 => (0..4_u8).prop_map(Trouble::Image),
        8 => (1..4_u8).prop_map(Trouble::Agents),
        4 => (1..100_u64).prop_map(Trouble::Time),
        1 => Just(Trouble::NewLeader),
        1 => Just(Trouble::RemoveNode),
    ]
}

fn make(world: &mut World, trouble: &Trouble) {
    match trouble {
        Trouble::NodeState(node, up) => {
            let state = if *up {
                NodeState::Ready
            } else {
                NodeState::Down
            };
            if world.state.node(&format!("n{node}")).is_some() {
                world.set_node_state(&format!("n{node}"), state);
            }
        }
        Trouble::Availability(node, value) => {
            let availability = NodeAvailability::try_from(i32::from(*value)).unwrap();
            if world.state.node(&format!("n{node}")).is_some() {
                world.set_availability(&format!("n{node}"), availability);
            }
        }
        Trouble::End(at, well) => {
            let mut tasks = world.tasks("s");
            tasks.retain(|t| (TaskState::Assigned..=TaskState::Running).contains(&state_of(t)));
            if !tasks.is_empty() {
                let state = if *well {
                    TaskState::Complete
                } else {
                    TaskState::Failed
                };
                world.report(&tasks[at % tasks.len()].id, state);
            }
        }
        Trouble::Scale(replicas) => world.scale("s", *replicas),
        Trouble::Image(0) => world.set_image("s", BAD_IMAGE),
        Trouble::Image(version) => world.set_image("s", &format!("v{version}")),
        Trouble::Agents(steps) => {
            for _ in 0..*steps {
                world.agents();
                world.managers();
            }
        }
        Trouble::Time(seconds) => world.pass_time(*seconds),
        Trouble::NewLeader => world.scheduler = crate::scheduler::Scheduler::new(&world.state),
        Trouble::RemoveNode => {
            if world.state.node("n4").is_some() {
                world.remove_node("n4");
            }
        }
    }
}

/// At most so many tasks of a slot may run on nodes that are heard of.
fn check_slots(world: &World, most: usize, returned: bool) {
    let mut running: HashMap<u64, usize> = HashMap::new();
    for task in world.tasks("s") {
        let node = world.state.node(&task.node_id);
        let heard = node.is_some_and(|n| n.status.as_ref().unwrap().state() == NodeState::Ready);
        let runs = state_of(&task) >= TaskState::Starting && !is_terminal(state_of(&task));
        let told_to = task.desired_state() == TaskState::Running && !is_terminal(state_of(&task));
        // A node that returns may still run what was replaced meanwhile, until its agent is told.
        let counts = heard && (told_to || (runs && !returned));
        *running.entry(task.slot).or_default() += usize::from(counts);
    }
    for (slot, count) in running {
        assert!(count <= most, "{count} tasks in slot {slot}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn after_any_trouble_every_service_has_what_it_asks_for(
        troubles in prop::collection::vec(trouble(), 1..60),
        start_first in any::<bool>(),
        parallelism in 0..3_u64,
    ) {
        let mut world = World::new(5);
        world.service("s", 3, |s| {
            let order = if start_first { UpdateOrder::StartFirst } else { UpdateOrder::StopFirst };
            s.spec.as_mut().unwrap().update = Some(UpdateConfig {
                parallelism,
                order: order.into(),
                ..UpdateConfig::default()
            });
        });
        world.service("g", 0, |s| s.spec.as_mut().unwrap().mode = global());
        let mut returned = false;
        for one in &troubles {
            make(&mut world, one);
            world.managers();
            returned |= matches!(one, Trouble::NodeState(_, true));
            check_slots(&world, if start_first { 2 } else { 1 }, returned);
        }
        // The trouble ends; a new spec ends a pause, too.
        for node in 0..4 {
            world.set_node_state(&format!("n{node}"), NodeState::Ready);
            world.set_availability(&format!("n{node}"), NodeAvailability::Active);
        }
        let replicas = 4;
        world.scale("s", replicas);
        world.set_image("s", "last");
        world.settle_for(2000);
        let running = world.running("s");
        prop_assert_eq!(running.len() as u64, replicas);
        prop_assert!(running.iter().all(|task| image(task) == "last"));
        let mut distinct = slots(&running);
        distinct.dedup();
        prop_assert_eq!(distinct.len() as u64, replicas);
        prop_assert_eq!(live(&world, "s").len() as u64, replicas);
        prop_assert_eq!(world.running("g").len(), world.state.nodes().count());
        check_slots(&world, 1, false);
        let index = world.state.index();
        world.settle_for(1000);
        prop_assert_eq!(world.state.index(), index, "rest is rest");
    }
}
