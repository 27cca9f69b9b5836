//! Whatever changes: who follows the deltas holds what the complete set says.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use prost::Message as _;
use swarm_proto::NodeId;
use swarm_proto::v1::assignment_change::Change as Kind;
use swarm_proto::v1::{
    AssignmentChange, AssignmentsType, EndpointMode, EndpointSpec, ObjectKind, StoreAction, Task,
    TaskState,
};
use swarm_store::testing::{
    create, network, node, remove, report, service, task, transaction, update,
};
use swarm_store::{Change, State, Store};

use super::assignments::{
    Advance, AssignmentSet, Delta, Journal, Missed, Shared, Tables, messages,
};

/// What an agent holds, as the protocol describes it: by kind and key.
#[derive(Clone, Debug, Default, PartialEq)]
struct Held(BTreeMap<(u8, String, String), Kind>);

impl Held {
    fn take(&mut self, change: &AssignmentChange) {
        let kind = change.change.clone().expect("not empty");
        let none = String::new;
        let (key, kept) = match &kind {
            Kind::Task(task) => ((0, none(), task.id.clone()), true),
            Kind::RemoveTask(id) => ((0, none(), id.clone()), false),
            Kind::Network(network) => ((1, network.id.clone(), none()), true),
            Kind::RemoveNetwork(id) => {
                self.0
                    .retain(|(kind, network, _), _| *kind == 0 || network != id);
                return;
            }
            Kind::Endpoint(row) => ((2, row.network_id.clone(), row.task_id.clone()), true),
            Kind::RemoveEndpoint(key) => ((2, key.network_id.clone(), key.task_id.clone()), false),
            Kind::Service(row) => ((3, row.network_id.clone(), row.service_id.clone()), true),
            Kind::RemoveService(key) => {
                ((3, key.network_id.clone(), key.service_id.clone()), false)
            }
        };
        match kept {
            true => self.0.insert(key, kind),
            false => self.0.remove(&key),
        };
    }

    /// Takes what is sent for it.
    fn follow(&mut self, advance: Advance) {
        let kind = AssignmentsType::Incremental;
        for message in messages(kind, 0, 0, &advance.shared, advance.own) {
            let changes = message
                .into_changes(&mut usize::MAX.clone())
                .expect("encoded by us");
            changes.iter().for_each(|change| self.take(change));
        }
    }

    /// Without what an agent is not told again: versions, and its own reports.
    fn essential(&self) -> Self {
        let mut held = self.clone();
        for kind in held.0.values_mut() {
            if let Kind::Task(task) = kind {
                *task = Task {
                    status: None,
                    meta: None,
                    running_since: None,
                    ..task.clone()
                };
            }
        }
        held
    }

    /// A row is of a network that is held, and a network has a task on it.
    fn check(&self) {
        for (kind, network, _) in self.0.keys() {
            if *kind > 1 {
                assert!(
                    self.0.contains_key(&(1, network.clone(), String::new())),
                    "{self:?}"
                );
            }
            if *kind == 1 {
                let used = self.0.values().any(|kind| match kind {
                    Kind::Task(task) => task.networks.iter().any(|on| on.network_id == *network),
                    _ => false,
                });
                assert!(used, "network {network} without a task on it");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Network(u8),
    Service(u8, Vec<u8>, bool),
    Task(u8, u8, Option<u8>),
    Assign(u8, u8),
    Desire(u8),
    Report(u8, TaskState),
    Vtep(u8, u8),
    Remove(ObjectKind, u8),
}

fn step() -> impl Strategy<Value = Step> {
    use TaskState::{Accepted, Failed, Running, Shutdown};
    let state = prop::sample::select(&[Accepted, Running, Running, Failed, Shutdown][..]);
    let kinds = &[
        ObjectKind::Node,
        ObjectKind::Service,
        ObjectKind::Task,
        ObjectKind::Task,
        ObjectKind::Network,
    ];
    let kind = prop::sample::select(&kinds[..]);
    let networks = prop::collection::vec(0..3u8, 0..3);
    prop_oneof![
        2 => (0..3u8).prop_map(Step::Network),
        2 => (0..3u8, networks, any::<bool>()).prop_map(|(s, n, vip)| Step::Service(s, n, vip)),
        6 => (0..12u8, 0..3u8, prop::option::of(0..3u8)).prop_map(|(t, s, n)| Step::Task(t, s, n)),
        3 => (0..12u8, 0..3u8).prop_map(|(t, n)| Step::Assign(t, n)),
        2 => (0..12u8).prop_map(Step::Desire),
        6 => (0..12u8, state).prop_map(|(t, s)| Step::Report(t, s)),
        1 => (0..3u8, 0..3u8).prop_map(|(n, v)| Step::Vtep(n, v)),
        2 => (kind, 0..12u8).prop_map(|(k, n)| Step::Remove(k, n)),
    ]
}

fn action(state: &State, step: &Step, at: i64) -> Option<StoreAction> {
    let id = |prefix: &str, number: &u8| format!("{prefix}{number}");
    Some(match step {
        Step::Network(n) => create(network(&id("n", n), &id("net", n), "")),
        Step::Service(s, on, vip) => {
            let mut on: Vec<_> = on.iter().map(|n| id("n", n)).collect();
            on.sort();
            on.dedup();
            let on: Vec<_> = on.iter().map(String::as_str).collect();
            let mut made = service(&id("s", s), &id("svc", s), &on);
            let mode = if *vip {
                EndpointMode::Vip
            } else {
                EndpointMode::Dnsrr
            };
            made.spec.as_mut()?.endpoint = Some(EndpointSpec {
                mode: mode.into(),
                ports: Vec::new(),
            });
            match state.service(&made.id) {
                Some(known) => {
                    made.meta = known.meta;
                    update(made)
                }
                None => create(made),
            }
        }
        Step::Task(t, s, n) => {
            let of = state.service(&id("s", s))?;
            let mut made = task(&id("t", t), &of.id, &[]);
            made.spec.clone_from(&of.spec.as_ref()?.task);
            if let Some(n) = n {
                made.node_id = id("w", n);
                made.status.get_or_insert_default().state = TaskState::Assigned.into();
            }
            create(made)
        }
        Step::Assign(t, n) => {
            let mut changed = (**state.task(&id("t", t))?).clone();
            changed.node_id = id("w", n);
            changed.status.as_mut()?.state = TaskState::Assigned.into();
            update(changed)
        }
        Step::Desire(t) => {
            let mut changed = (**state.task(&id("t", t))?).clone();
            changed.desired_state = TaskState::Shutdown.into();
            update(changed)
        }
        Step::Report(t, state) => report(&id("t", t), *state, at),
        Step::Vtep(n, v) => {
            let mut changed = node(&id("w", n), &format!("192.0.2.{v}"));
            match state.node(&changed.id) {
                Some(known) => {
                    changed.meta = known.meta;
                    update(changed)
                }
                None => create(changed),
            }
        }
        Step::Remove(kind, n) => {
            let prefix = match kind {
                ObjectKind::Node => "w",
                ObjectKind::Service => "s",
                ObjectKind::Task => "t",
                _ => "n",
            };
            remove(*kind, &id(prefix, n))
        }
    })
}

fn nodes() -> Vec<NodeId> {
    ["w0", "w1", "w2"].map(NodeId::from).to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn who_follows_the_deltas_holds_the_complete_set(
        script in prop::collection::vec((prop::collection::vec(step(), 1..4), 0..4u8), 1..60),
    ) {
        let store = Store::new(State::default());
        let (mut prior, mut watch) = store.watch();
        let mut agents: Vec<_> = nodes()
            .into_iter()
            .map(|id| (AssignmentSet::of(&prior, &id), id, Held::default()))
            .collect();
        let mut tables = Tables::default();
        let mut pending: Vec<Change> = Vec::new();
        let last = script.len();
        for (place, (steps, follow)) in script.into_iter().enumerate() {
            let index = place as u64 + 1;
            let state = store.state();
            let actions = steps.iter().filter_map(|step| action(&state, step, index as i64));
            // Whatever is refused changes nothing.
            let _ = store.commit(index, &transaction(actions));
            while let Some(change) = watch.try_next().expect("not lagged") {
                pending.push(change);
            }
            // Now and then several changes at once,
            if follow == 0 && place + 1 < last {
                continue;
            }
            // or they are lost, and the states are all there is.
            if follow == 1 {
                let state = store.state();
                pending = vec![Change {
                    index: state.index(),
                    events: state.changes_since(&prior).into(),
                    state,
                }];
            }
            let Some(delta) = Delta::new(&prior, &pending) else {
                continue;
            };
            tables.forget(&delta);
            for (set, id, held) in &mut agents {
                held.follow(set.advance(&delta, &mut tables));
                prop_assert_eq!(&*set, &AssignmentSet::of(delta.state(), id));
                // Tables that are kept are those that would be made now.
                let [complete, kept] = [&mut Tables::default(), &mut tables].map(|tables| {
                    let mut complete = Held::default();
                    complete.follow(set.complete(delta.state(), tables));
                    complete.check();
                    complete.essential()
                });
                prop_assert_eq!(&held.essential(), &complete);
                prop_assert_eq!(kept, complete);
            }
            prior = Arc::clone(delta.state());
            pending.clear();
        }
    }

    #[test]
    fn who_has_missed_some_deltas_is_told_of_all_at_once(
        script in prop::collection::vec((prop::collection::vec(step(), 1..4), 0..8u8), 1..60),
        room in prop::sample::select(&[0_usize, 3, 20, 1000][..]),
    ) {
        let store = Store::new(State::default());
        let (mut prior, mut watch) = store.watch();
        let mut agents: Vec<_> = nodes()
            .into_iter()
            .map(|id| {
                let set = AssignmentSet::of(&prior, &id);
                (set, Missed::since(prior.clone()), id, Held::default())
            })
            .collect();
        let mut tables = Tables::default();
        let mut journal = Journal::with_room_for(room);
        for (place, (steps, ready)) in script.into_iter().enumerate() {
            let index = place as u64 + 1;
            let state = store.state();
            let actions = steps.iter().filter_map(|step| action(&state, step, index as i64));
            // Whatever is refused changes nothing.
            let _ = store.commit(index, &transaction(actions));
            let Some(change) = watch.try_next().expect("not lagged") else {
                continue;
            };
            let Some(delta) = Delta::new(&prior, &[change]) else {
                continue;
            };
            tables.forget(&delta);
            journal.push(&prior, &delta);
            prior = Arc::clone(delta.state());
            for (number, (set, missed, id, held)) in agents.iter_mut().enumerate() {
                missed.add(&delta, id);
                // Each bit is a node that is ready.
                if ready >> number & 1 == 0 {
                    continue;
                }
                let missed = std::mem::replace(missed, Missed::since(prior.clone()));
                let delta = journal.catch_up(set, missed, &prior);
                held.follow(set.advance(&delta, &mut tables));
                prop_assert_eq!(&*set, &AssignmentSet::of(&prior, id));
                let mut complete = Held::default();
                complete.follow(set.complete(&prior, &mut Tables::default()));
                prop_assert_eq!(&held.essential(), &complete.essential());
            }
        }
    }
}

#[test]
fn a_large_set_is_cut_into_messages_of_bounded_size() {
    let made = (0..3000).map(|n| {
        let mut made = task(&format!("task-{n}"), "s", &[]);
        made.spec.as_mut().expect("set").container = Some(swarm_proto::v1::ContainerSpec {
            env: vec!["x".repeat(700)],
            ..swarm_proto::v1::ContainerSpec::default()
        });
        AssignmentChange {
            change: Some(Kind::Task(made)),
        }
    });
    let made: Vec<_> = made.collect();
    let (shared, own) = made.split_at(1000);
    let shared = [Shared::new(&shared[..300]), Shared::new(&shared[300..])];
    let cut = messages(AssignmentsType::Complete, 0, 9, &shared, own.to_vec());
    assert!(cut.len() > 2);
    assert!(cut.iter().all(|message| message.encoded_len() <= 128 << 10));
    let more: Vec<bool> = cut.iter().map(|message| message.more).collect();
    assert!(more[..more.len() - 1].iter().all(|more| *more) && !more[more.len() - 1]);
    let all = cut
        .into_iter()
        .map(|message| message.into_changes(&mut usize::MAX.clone()));
    let all: Result<Vec<_>, _> = all.collect();
    assert_eq!(all.expect("encoded by us").concat(), made);
    let empty = messages(AssignmentsType::Complete, 0, 9, &[], []);
    assert_eq!(empty.len(), 1);
    assert!(!empty[0].more);
}
