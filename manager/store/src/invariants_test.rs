//! Random transactions: what must hold after each of them.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use swarm_proto::task_state::is_terminal;
use swarm_proto::v1::{
    AllocateRaftId, AssignTasks, Cluster, CreateTasks, EndpointMode, EndpointSpec, NewTask,
    NodeState, StoreAction, TaskAssignment, TaskState, store_action,
};

use crate::apply::{holds_addresses, state_of};
use crate::testing::{
    cluster, create, network, node, observe, remove, report, service, task, transaction, update,
};
use crate::{Event, ObjectKind, State};

/// What a random user or component does. Numbers pick from a few IDs, so that things meet.
#[derive(Clone, Debug)]
enum Step {
    AddNetwork(u8, Option<u8>),
    AddService(u8, Vec<u8>),
    ChangeService(u8, Vec<u8>, bool),
    AddTask(u8, u8),
    /// Of a service, that many from this number on.
    AddTasks(u8, u8, u8),
    Assign(u8, u8),
    /// From this task on, each to the next node; some as they were some versions ago.
    AssignMany(u8, u8, u8),
    Desire(u8, TaskState),
    Report(u8, TaskState, i64),
    Routes(u8, u8),
    RaftId(u8),
    Remove(ObjectKind, u8),
}

const STATES: [TaskState; 6] = [
    TaskState::Accepted,
    TaskState::Starting,
    TaskState::Running,
    TaskState::Complete,
    TaskState::Failed,
    TaskState::Orphaned,
];

fn step() -> impl Strategy<Value = Step> {
    let networks = || prop::collection::vec(0..3u8, 0..3);
    let state = || prop::sample::select(&STATES[..]);
    let desired = prop::sample::select(&[TaskState::Ready, TaskState::Shutdown][..]);
    let kind = prop::sample::select(
        &[
            ObjectKind::Node,
            ObjectKind::Service,
            ObjectKind::Task,
            ObjectKind::Network,
        ][..],
    );
    prop_oneof![
        2 => (0..3u8, prop::option::of(0..3u8)).prop_map(|(n, s)| Step::AddNetwork(n, s)),
        2 => (0..3u8, networks()).prop_map(|(s, n)| Step::AddService(s, n)),
        2 => (0..3u8, networks(), any::<bool>()).prop_map(|(s, n, vip)| Step::ChangeService(s, n, vip)),
        8 => (0..24u8, 0..3u8).prop_map(|(t, s)| Step::AddTask(t, s)),
        2 => (0..24u8, 1..6u8, 0..3u8).prop_map(|(t, n, s)| Step::AddTasks(t, n, s)),
        3 => (0..24u8, 0..3u8).prop_map(|(t, n)| Step::Assign(t, n)),
        3 => (0..24u8, 1..8u8, 0..3u8).prop_map(|(t, n, w)| Step::AssignMany(t, n, w)),
        1 => (0..24u8, desired).prop_map(|(t, d)| Step::Desire(t, d)),
        6 => (0..24u8, state(), 0..9i64).prop_map(|(t, s, at)| Step::Report(t, s, at)),
        1 => (0..3u8, 0..8u8).prop_map(|(n, r)| Step::Routes(n, r)),
        1 => (0..3u8).prop_map(Step::RaftId),
        3 => (kind, 0..24u8).prop_map(|(k, n)| Step::Remove(k, n)),
    ]
}

fn ids(prefix: &str, numbers: &[u8]) -> Vec<String> {
    let unique: BTreeSet<_> = numbers.iter().collect();
    unique
        .into_iter()
        .map(|number| format!("{prefix}{number}"))
        .collect()
}

fn action(state: &State, step: &Step) -> Option<StoreAction> {
    let name = |prefix: &str, number: &u8| format!("{prefix}{number}");
    Some(match step {
        Step::AddNetwork(n, subnet) => {
            // Small, so that they are exhausted.
            let subnet =
                subnet.map_or_else(String::new, |s| format!("10.0.0.{}/29", s * 4 / 8 * 8));
            create(network(&name("n", n), &name("net", n), &subnet))
        }
        Step::AddService(s, networks) => {
            let networks = ids("n", networks);
            let networks: Vec<_> = networks.iter().map(String::as_str).collect();
            create(service(&name("s", s), &name("svc", s), &networks))
        }
        Step::ChangeService(s, networks, vip) => {
            let networks = ids("n", networks);
            let networks: Vec<_> = networks.iter().map(String::as_str).collect();
            let mut changed = service(&name("s", s), &name("svc", s), &networks);
            changed.meta = state.service(&changed.id)?.meta;
            let mode = if *vip {
                EndpointMode::Vip
            } else {
                EndpointMode::Dnsrr
            };
            changed.spec.as_mut()?.endpoint = Some(EndpointSpec {
                mode: mode.into(),
                ports: Vec::new(),
            });
            update(changed)
        }
        Step::AddTask(t, s) => {
            let service = state.service(&name("s", s))?;
            let mut made = task(&name("t", t), &service.id, &[]);
            made.spec.clone_from(&service.spec.as_ref()?.task);
            create(made)
        }
        Step::AddTasks(t, count, s) => {
            let service = state.service(&name("s", s))?;
            let mut template = task("", &service.id, &[]);
            template.spec.clone_from(&service.spec.as_ref()?.task);
            let tasks = (*t..*t + *count).map(|number| NewTask {
                id: name("t", &number),
                slot: number.into(),
            });
            StoreAction {
                action: Some(store_action::Action::CreateTasks(CreateTasks {
                    template: Some(template),
                    tasks: tasks.collect(),
                })),
            }
        }
        Step::AssignMany(t, count, w) => {
            let assignments = (*t..*t + *count).map(|number| {
                let id = name("t", &number);
                let version = state.task(&id).and_then(|task| task.meta?.version);
                TaskAssignment {
                    task_id: id,
                    // One that is not as it was seen, now and then.
                    expected_version: version.map_or(0, |version| version.index)
                        - u64::from(number % 5 == 4 && version.is_some()),
                    node_id: name("w", &((w + number) % 3)),
                }
            });
            StoreAction {
                action: Some(store_action::Action::AssignTasks(AssignTasks {
                    assignments: assignments.collect(),
                })),
            }
        }
        Step::Assign(t, n) => {
            let mut changed = (**state.task(&name("t", t))?).clone();
            changed.node_id = name("w", n);
            changed.status.as_mut()?.state = TaskState::Assigned.into();
            update(changed)
        }
        Step::Desire(t, desired) => {
            let mut changed = (**state.task(&name("t", t))?).clone();
            changed.desired_state = (*desired).into();
            update(changed)
        }
        Step::Report(t, state, at) => report(&name("t", t), *state, *at),
        Step::Routes(n, r) => {
            let id = name("w", n);
            let mut changed = node(&id, "");
            changed.description.as_mut()?.routes = vec![format!("10.0.0.{}/29", r * 8)];
            match state.node(&id) {
                Some(known) => {
                    changed.meta = known.meta;
                    changed.manager_status.clone_from(&known.manager_status);
                    update(changed)
                }
                None => create(changed),
            }
        }
        Step::RaftId(n) => StoreAction {
            action: Some(store_action::Action::AllocateRaftId(AllocateRaftId {
                node_id: name("w", n),
                addr: "a:1".into(),
            })),
        },
        Step::Remove(kind, n) => {
            let prefix = match kind {
                ObjectKind::Node => "w",
                ObjectKind::Service => "s",
                ObjectKind::Task => "t",
                _ => "n",
            };
            remove(*kind, &name(prefix, n))
        }
    })
}

/// Nothing is held twice.
fn check_holdings(state: &State) {
    let mut held = BTreeSet::new();
    for service in state.services() {
        for vip in &service.endpoint.as_ref().expect("filled in").virtual_ips {
            assert!(
                held.insert((vip.network_id.clone(), vip.addr.clone())),
                "{vip:?} twice"
            );
        }
    }
    for task in state.tasks().filter(|task| holds_addresses(task)) {
        for attachment in &task.networks {
            for address in &attachment.addresses {
                let key = (attachment.network_id.clone(), address.clone());
                assert!(held.insert(key), "{address} twice");
            }
        }
    }
    let mut vnis = BTreeSet::new();
    let mut subnets: Vec<ipnet::Ipv4Net> = Vec::new();
    for network in state.networks() {
        for subnet in &network.subnets {
            assert!(vnis.insert(subnet.vni), "VNI {} twice", subnet.vni);
            let pool = subnet.pool.as_ref().expect("filled in");
            let net: ipnet::Ipv4Net = pool.subnet.parse().expect("checked");
            for other in &subnets {
                assert!(
                    !other.contains(&net) && !net.contains(other),
                    "{other} and {net}"
                );
            }
            assert!(
                !held.contains(&(network.id.clone(), format!("{}/29", pool.gateway))),
                "the gateway's address was given out"
            );
            subnets.push(net);
        }
    }
}

/// A task has its addresses, or waits for one because there is none.
fn check_waiting(state: &State) {
    for task in state.tasks() {
        let wanted = task.spec.as_ref().map_or(0, |spec| spec.networks.len());
        match state_of(task) {
            TaskState::New => assert!(task.networks.is_empty()),
            _ => assert!(
                task.networks.len() == wanted
                    || is_terminal(state_of(task))
                    || task.networks.is_empty()
            ),
        }
        if state_of(task) == TaskState::New && task.desired_state <= TaskState::Running as i32 {
            let status = task.status.as_ref().expect("filled in");
            assert_eq!(
                status.reason.as_ref().expect("says why").code,
                "address-pool-exhausted"
            );
        }
    }
}

fn check_events(events: &[Event], index: u64) {
    for event in events {
        if let Event::Task {
            old: Some(old),
            new: Some(new),
        } = event
        {
            assert!(state_of(new) as i32 >= state_of(old) as i32);
            assert!(new.desired_state >= old.desired_state);
            assert!(old.node_id.is_empty() || old.node_id == new.node_id);
            assert!(!is_terminal(state_of(old)) || old.status == new.status);
        }
        let version = |object: &Option<swarm_proto::v1::Object>| {
            use swarm_proto::v1::object::Object;
            let meta = match object.as_ref()?.object.as_ref()? {
                Object::Cluster(o) => o.meta,
                Object::Node(o) => o.meta,
                Object::Service(o) => o.meta,
                Object::Task(o) => o.meta,
                Object::Network(o) => o.meta,
            };
            Some(meta?.version?.index)
        };
        let (old, new) = (version(&event.old_object()), version(&event.new_object()));
        assert!(new.is_none_or(|new| new == index));
        assert!(old.is_none_or(|old| old <= index));
    }
}

/// All objects, by kind and ID.
fn objects(state: &State) -> BTreeMap<(i32, String), Option<swarm_proto::v1::Object>> {
    let all = state.changes_since(&State::default());
    let key = |event: &Event| (event.kind() as i32, event.id().to_owned());
    all.iter()
        .map(|event| (key(event), event.new_object()))
        .collect()
}

/// What two states differ in leads from the one to the other.
fn check_difference(before: &State, after: &State) {
    let mut reached = objects(before);
    for event in after.changes_since(before) {
        let key = (event.kind() as i32, event.id().to_owned());
        assert_ne!(event.old_object(), event.new_object(), "no difference");
        let was = match event.new_object() {
            Some(new) => reached.insert(key, Some(new)),
            None => reached.remove(&key),
        };
        assert_eq!(was.flatten(), event.old_object());
    }
    assert_eq!(reached, objects(after));
    let count = after.nodes().count()
        + after.services().count()
        + after.tasks().count()
        + after.networks().count();
    assert_eq!(
        reached.len(),
        count + usize::from(after.cluster().is_some())
    );
    assert_eq!(after.objects(), count);
}

fn small_cluster() -> Cluster {
    Cluster {
        default_addr_pool: vec!["10.0.0.0/26".into()],
        subnet_size: 29,
        ..cluster("c")
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_proposed_the_invariants_hold(
        script in prop::collection::vec(prop::collection::vec(step(), 1..4), 1..80),
    ) {
        let first = transaction([create(small_cluster()), create(node("w0", ""))]);
        let mut state = State::default().apply(1, &first).expect("valid").state;
        let mut log = vec![first];
        let mut raft_ids: BTreeMap<u64, String> = BTreeMap::new();
        for (place, steps) in script.iter().enumerate() {
            let index = place as u64 + 2;
            let actions = steps.iter().filter_map(|step| action(&state, step));
            let transaction = transaction(actions);
            let before = state.encode();
            match state.apply(index, &transaction) {
                Ok(applied) => {
                    check_events(&applied.events, index);
                    for event in &applied.events {
                        if let Event::Node { new: Some(node), .. } = event
                            && let Some(status) = &node.manager_status
                        {
                            let owner = raft_ids.entry(status.raft_id).or_insert_with(|| node.id.clone());
                            prop_assert_eq!(&*owner, &node.id, "a raft ID was given out twice");
                        }
                    }
                    prop_assert_eq!(&before, &state.encode(), "the old state has changed");
                    state = applied.state;
                }
                Err(_) => {
                    prop_assert_eq!(&before, &state.encode());
                    state = state.after_refusal(index, &transaction);
                }
            }
            log.push(transaction);
            check_holdings(&state);
            check_waiting(&state);
            // Rebuilt from objects alone, indexes and free addresses are the same.
            let written = state.encode();
            let read = State::decode(&written[..]).expect("just written");
            prop_assert!(read == state, "{read:#?}\n{state:#?}");
        }
        let middle = script.len() / 2 + 1;
        let mut replica = State::default();
        for (place, transaction) in log.iter().enumerate() {
            let index = place as u64 + 1;
            replica = match replica.apply(index, transaction) {
                Ok(applied) => applied.state,
                Err(_) => replica.after_refusal(index, transaction),
            };
            if place == middle {
                check_difference(&replica, &state);
            }
        }
        prop_assert_eq!(replica.encode(), state.encode());
    }
}

#[test]
fn a_node_seen_alive_stays_as_described() {
    let state = State::default();
    let made = transaction([create(node("w0", "192.0.2.1"))]);
    let state = state.apply(1, &made).expect("valid").state;
    let seen = transaction([observe("w0", NodeState::Down)]);
    let state = state.apply(2, &seen).expect("valid").state;
    let node = state.node("w0").expect("kept");
    assert_eq!(node.status.as_ref().expect("set").state(), NodeState::Down);
    assert_eq!(
        node.description.as_ref().expect("kept").data_path_addr,
        "192.0.2.1"
    );
    let again = state.apply(3, &seen).expect("valid");
    assert!(again.events.is_empty(), "nothing new was seen");
}
