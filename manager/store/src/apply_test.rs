//! What single transactions do and why others are refused.

use prost::Message as _;
use swarm_proto::v1::rejection::Code;
use swarm_proto::v1::{
    AssignTasks, ContainerSpec, CreateTasks, IpamPool, NewTask, NodeDescription, ReplicatedMode,
    Service, ServiceMode, StoreAction, Task, TaskAssignment, TaskState, Transaction, service_mode,
    store_action,
};

use crate::testing::{
    cluster, create, network, node, remove, report, service, task, transaction, update,
};
use crate::{DecodeError, ObjectKind, Rejection, State};

fn after(state: &State, actions: impl IntoIterator<Item = StoreAction>) -> State {
    try_after(state, actions).unwrap_or_else(|rejection| panic!("{}", rejection.message))
}

fn try_after(
    state: &State,
    actions: impl IntoIterator<Item = StoreAction>,
) -> Result<State, Rejection> {
    let applied = state.apply(state.index() + 1, &transaction(actions))?;
    Ok(applied.state)
}

fn refusal(state: &State, action: StoreAction) -> (Code, String) {
    let rejection = try_after(state, [action]).expect_err("must be refused");
    (rejection.code(), rejection.message)
}

/// A cluster with network "net" (ID n) of `subnet` and a service "web" (ID s) on it.
fn with_service(subnet: &str) -> State {
    let made = [
        create(cluster("c")),
        create(network("n", "net", subnet)),
        create(service("s", "web", &["n"])),
    ];
    after(&State::default(), made)
}

fn address(state: &State, task: &str) -> String {
    state.task(task).expect("exists").networks[0].addresses[0].clone()
}

fn vip(state: &State, service: &str) -> Option<String> {
    let endpoint = state.service(service).expect("exists").endpoint.clone();
    endpoint
        .expect("filled in")
        .virtual_ips
        .first()
        .map(|vip| vip.addr.clone())
}

#[test]
fn a_network_gets_a_subnet_a_gateway_and_a_vni() {
    let state = with_service("");
    let subnet = &state.network("n").expect("exists").subnets[0];
    let pool = subnet.pool.as_ref().expect("filled in");
    assert_eq!(pool.subnet, "10.0.0.0/24");
    assert_eq!(pool.gateway, "10.0.0.1");
    assert_eq!(subnet.vni, 4096);
    assert_eq!(vip(&state, "s").as_deref(), Some("10.0.0.2/24"));
}

#[test]
fn a_chosen_subnet_overlaps_no_network_no_route_and_not_the_gateway_bridge() {
    let mut described = node("w", "");
    described.description = Some(NodeDescription {
        hostname: "h1".into(),
        routes: vec![
            "0.0.0.0/0".into(),
            "10.0.1.7/32".into(),
            "10.0.2.0/23".into(),
            "fe80::/64".into(),
        ],
        ..NodeDescription::default()
    });
    let made = [
        create(described),
        create(network("a", "a", "10.0.0.128/25")),
        create(network("b", "b", "")),
    ];
    let state = after(&State::default(), made);
    let subnet = state.network("b").expect("exists").subnets[0].pool.clone();
    assert_eq!(subnet.expect("filled in").subnet, "10.0.4.0/24");

    let mut pool = cluster("c");
    pool.default_addr_pool = vec!["172.16.0.0/12".into()];
    pool.subnet_size = 15;
    let made = [
        create(pool),
        create(network("a", "a", "")),
        create(network("b", "b", "")),
    ];
    let state = after(&State::default(), made);
    let subnet = state.network("b").expect("exists").subnets[0].pool.clone();
    assert_eq!(subnet.expect("filled in").subnet, "172.20.0.0/15");
}

#[test]
fn a_size_of_subnets_that_the_pool_has_none_of_is_refused() {
    for size in [1, 7, 30, 33, 50, 1000] {
        let mut pool = cluster("c");
        pool.subnet_size = size;
        let refused = State::default().apply(1, &transaction([create(pool)]));
        let message = refused.expect_err("refused").message;
        assert!(
            message.ends_with("subnet can be cut from address pool 10.0.0.0/8"),
            "{message}"
        );
    }
}

#[test]
fn a_subnet_that_cannot_be_is_refused_with_the_reason() {
    let mut described = node("w", "");
    described.description = Some(NodeDescription {
        hostname: "h1".into(),
        routes: vec!["10.9.0.0/16".into()],
        ..NodeDescription::default()
    });
    let made = [
        create(described),
        create(network("n", "net", "10.50.0.0/16")),
    ];
    let state = after(&State::default(), made);
    let asked = |subnet: &str| refusal(&state, create(network("m", "other", subnet)));
    let cases = [
        (
            "10.50.1.5/24",
            Code::Invalid,
            "invalid subnet 10.50.1.5/24: it should be 10.50.1.0/24",
        ),
        (
            "fish",
            Code::Invalid,
            "invalid subnet fish: it should look like 10.50.1.0/24",
        ),
        (
            "fd00::/64",
            Code::Invalid,
            "invalid subnet fd00::/64: only IPv4 is supported",
        ),
        (
            "0.0.0.0/0",
            Code::Invalid,
            "invalid subnet 0.0.0.0/0: it is the whole Internet",
        ),
        (
            "10.1.0.0/31",
            Code::Invalid,
            "subnet 10.1.0.0/31 is too small: the smallest is a /29",
        ),
        (
            "10.50.1.0/24",
            Code::SubnetOverlap,
            "subnet 10.50.1.0/24 overlaps subnet 10.50.0.0/16 of network net",
        ),
        (
            "10.0.0.0/8",
            Code::SubnetOverlap,
            "subnet 10.0.0.0/8 overlaps subnet 10.50.0.0/16 of network net",
        ),
        (
            "10.9.8.0/24",
            Code::SubnetOverlap,
            "subnet 10.9.8.0/24 overlaps route 10.9.0.0/16 of node h1",
        ),
        (
            "10.8.0.0/15",
            Code::SubnetOverlap,
            "subnet 10.8.0.0/15 overlaps route 10.9.0.0/16 of node h1",
        ),
    ];
    for (subnet, code, message) in cases {
        assert_eq!(asked(subnet), (code, message.into()));
    }
}

#[test]
fn gateway_and_range_must_lie_in_the_subnet() {
    let asked = |gateway: &str, ip_range: &str| {
        let mut made = network("n", "net", "10.1.0.0/24");
        let ipam = made.spec.as_mut().and_then(|spec| spec.ipam.as_mut());
        ipam.expect("set").configs[0] = IpamPool {
            subnet: "10.1.0.0/24".into(),
            gateway: gateway.into(),
            ip_range: ip_range.into(),
        };
        try_after(
            &State::default(),
            [create(made), create(service("s", "web", &["n"]))],
        )
    };
    let state = asked("10.1.0.129", "10.1.0.128/25").expect("fine");
    assert_eq!(vip(&state, "s").as_deref(), Some("10.1.0.128/24"));
    let refused = [
        (
            "10.2.0.1",
            "",
            "gateway 10.2.0.1 is no host address of subnet 10.1.0.0/24",
        ),
        (
            "10.1.0.255",
            "",
            "gateway 10.1.0.255 is no host address of subnet 10.1.0.0/24",
        ),
        ("x", "", "invalid gateway x: it should look like 10.50.1.1"),
        (
            "",
            "10.2.0.0/25",
            "IP range 10.2.0.0/25 is not in subnet 10.1.0.0/24",
        ),
        (
            "",
            "10.1.0.1/25",
            "invalid IP range 10.1.0.1/25: it should be 10.1.0.0/25",
        ),
    ];
    for (gateway, range, message) in refused {
        assert_eq!(asked(gateway, range).expect_err("refused").message, message);
    }
}

#[test]
fn a_task_is_pending_with_its_address_once_it_is_created() {
    let state = after(&with_service(""), [create(task("t", "s", &["n"]))]);
    let made = state.task("t").expect("exists");
    assert_eq!(
        made.status.as_ref().expect("set").state(),
        TaskState::Pending
    );
    assert_eq!(address(&state, "t"), "10.0.0.3/24");
    assert_eq!(state.tasks_on_network("n").count(), 1);
    assert_eq!(state.tasks_of_service("s").count(), 1);
}

#[test]
fn who_finds_a_network_full_waits_and_is_served_in_turn() {
    // Six host addresses: gateway, virtual address, four tasks.
    let mut state = with_service("10.1.0.0/29");
    for number in 1..=7 {
        state = after(&state, [create(task(&format!("t{number}"), "s", &["n"]))]);
    }
    let waiting = state.task("t5").expect("exists");
    let status = waiting.status.as_ref().expect("set");
    assert_eq!(status.state(), TaskState::New);
    let reason = status.reason.as_ref().expect("says why");
    assert_eq!(reason.code, "address-pool-exhausted");
    assert_eq!(reason.object, "network n");
    assert!(status.err.contains("network net"), "{}", status.err);
    // A waiter that is no longer meant to run gives up its turn.
    let mut stopped = (**waiting).clone();
    stopped.desired_state = TaskState::Shutdown.into();
    let state = after(&state, [update(stopped)]);
    // A newcomer does not overtake, even in the transaction that frees the address.
    let freed = [
        report("t2", TaskState::Failed, 5),
        create(task("t8", "s", &["n"])),
    ];
    let state = after(&state, freed);
    assert_eq!(address(&state, "t6"), "10.1.0.4/29");
    assert!(
        state
            .task("t6")
            .expect("exists")
            .status
            .as_ref()
            .expect("set")
            .err
            .is_empty()
    );
    for waits in ["t5", "t7", "t8"] {
        assert!(
            state.task(waits).expect("exists").networks.is_empty(),
            "{waits}"
        );
    }
    // Across a snapshot, too.
    let bytes = state.encode();
    let state = State::decode(&bytes[..]).expect("just written");
    let state = after(&state, [remove(ObjectKind::Task, "t3")]);
    assert_eq!(address(&state, "t7"), "10.1.0.5/29");
}

#[test]
fn an_address_is_not_given_out_again_at_once() {
    let state = after(&with_service(""), [create(task("t1", "s", &["n"]))]);
    let state = after(&state, [remove(ObjectKind::Task, "t1")]);
    let state = after(&state, [create(task("t2", "s", &["n"]))]);
    assert_eq!(address(&state, "t2"), "10.0.0.4/24");
}

#[test]
fn a_service_keeps_its_virtual_address_as_long_as_its_network() {
    let state = after(&with_service(""), [create(network("m", "other", ""))]);
    let kept = vip(&state, "s");
    let with = |state: &State, networks: &[&str]| {
        let mut changed = service("s", "web", networks);
        changed.meta = state.service("s").expect("exists").meta;
        after(state, [update(changed)])
    };
    let state = with(&state, &["n", "m"]);
    assert_eq!(vip(&state, "s"), kept);
    let state = with(&state, &["m"]);
    assert_eq!(vip(&state, "s").as_deref(), Some("10.0.1.2/24"));
    let state = after(&state, [remove(ObjectKind::Network, "n")]);
    let in_use = refusal(&state, remove(ObjectKind::Network, "m"));
    assert_eq!(
        in_use,
        (Code::InUse, "network other is in use by service web".into())
    );
}

#[test]
fn a_network_with_a_live_task_is_in_use_after_its_service_is_gone() {
    let state = after(&with_service(""), [create(task("t", "s", &["n"]))]);
    let state = after(&state, [remove(ObjectKind::Service, "s")]);
    let in_use = refusal(&state, remove(ObjectKind::Network, "n"));
    assert_eq!(
        in_use,
        (Code::InUse, "network net is in use by task s.1 (t)".into())
    );
    let state = after(&state, [report("t", TaskState::Shutdown, 2)]);
    after(&state, [remove(ObjectKind::Network, "n")]);
}

#[test]
fn a_stale_version_and_a_taken_name_are_refused() {
    let state = with_service("");
    let mut changed = (**state.service("s").expect("exists")).clone();
    changed
        .meta
        .as_mut()
        .expect("set")
        .version
        .as_mut()
        .expect("set")
        .index -= 1;
    assert_eq!(
        refusal(&state, update(changed)),
        (Code::OutOfSequence, "update out of sequence".into())
    );
    assert_eq!(
        refusal(&state, create(service("s2", "web", &[]))),
        (
            Code::NameTaken,
            "name conflicts with an existing object: service web already exists".into()
        )
    );
    assert_eq!(
        refusal(&state, create(network("n2", "net", ""))),
        (
            Code::NameTaken,
            "network with name net already exists".into()
        )
    );
    assert_eq!(
        refusal(&state, create(service("s", "web2", &[]))).0,
        Code::AlreadyExists
    );
    assert_eq!(
        refusal(&state, create(service("s3", "c", &["x"]))).0,
        Code::NotFound
    );
}

#[test]
fn one_refused_action_refuses_them_all_and_is_named() {
    let state = with_service("");
    let actions = [
        create(task("t", "s", &["n"])),
        create(task("u", "gone", &[])),
    ];
    let rejection = try_after(&state, actions).expect_err("no such service");
    assert_eq!((rejection.code(), rejection.action), (Code::NotFound, 1));
    assert!(state.task("t").is_none());
}

#[test]
fn two_updates_of_one_object_may_share_a_transaction() {
    let state = with_service("");
    let changed = state.service("s").expect("exists");
    let state = after(&state, [update(changed), update(changed)]);
    assert_eq!(
        state
            .service("s")
            .expect("exists")
            .meta
            .expect("set")
            .version
            .expect("set")
            .index,
        2
    );
}

#[test]
fn scaling_leaves_the_version_that_tasks_are_compared_with() {
    let state = with_service("");
    let before = state.service("s").expect("exists").clone();
    let mut scaled = (*before).clone();
    scaled.spec.as_mut().expect("set").mode = Some(ServiceMode {
        mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
            replicas: Some(9),
        })),
    });
    let state = after(&state, [update(scaled.clone())]);
    let now = state.service("s").expect("exists").clone();
    assert_eq!(now.spec_version, before.spec_version);
    assert_eq!(now.previous_spec, before.spec);
    let mut forced = (*now).clone();
    forced
        .spec
        .as_mut()
        .and_then(|spec| spec.task.as_mut())
        .expect("set")
        .force_update = 1;
    let state = after(&state, [update(forced)]);
    let now = state.service("s").expect("exists");
    assert_eq!(now.spec_version, now.meta.expect("set").version);
}

#[test]
fn the_state_of_a_task_only_rises() {
    let state = after(&with_service(""), [create(task("t", "s", &["n"]))]);
    let state = after(&state, [report("t", TaskState::Running, 5)]);
    let late = after(&state, [report("t", TaskState::Starting, 9)]);
    assert_eq!(state.task("t"), late.task("t"));
    let ended = after(&state, [report("t", TaskState::Failed, 6)]);
    assert_eq!(ended.tasks_on_network("n").count(), 0);
    let revived = after(&ended, [report("t", TaskState::Orphaned, 9)]);
    assert_eq!(ended.task("t"), revived.task("t"));
    // Reports on what is gone do not spoil the others.
    after(&state, [report("gone", TaskState::Failed, 1)]);
}

#[test]
fn which_report_is_newer_is_not_a_matter_of_clocks() {
    let state = after(&with_service(""), [create(task("t", "s", &["n"]))]);
    let running = |at: i64, order: u64, healthy: bool| {
        let mut report = report("t", TaskState::Running, at);
        if let Some(store_action::Action::TaskStatus(update)) = &mut report.action {
            let status = update.status.as_mut().expect("set");
            (status.order, status.healthy) = (order, healthy);
        }
        [report]
    };
    let healthy = |state: &State| {
        let task = state.task("t").expect("exists");
        task.status.as_ref().expect("set").healthy
    };
    let state = after(&state, running(3600, 7, false));
    // The node's clock was an hour ahead, and has been set right.
    let state = after(&state, running(5, 8, true));
    assert!(healthy(&state), "a newer report was taken for an old one");
    // One that went astray arrives at last; its clock was ahead.
    let state = after(&state, running(9000, 6, false));
    assert!(healthy(&state), "an older report was taken for a new one");
    // Sent again, it changes nothing, not even the version.
    let again = state
        .apply(state.index() + 1, &transaction(running(5, 8, true)))
        .expect("valid");
    assert!(again.events.is_empty());
}

#[test]
fn a_leader_of_an_older_term_is_fenced() {
    let of_term = |term| Transaction {
        term,
        ..transaction([])
    };
    let state = State::default().apply(1, &of_term(5)).expect("valid").state;
    let stale = state.apply(2, &of_term(4)).expect_err("an older term");
    assert_eq!(stale.code(), Code::StaleTerm);
    assert!(state.apply(2, &of_term(0)).is_ok());
    // A term that was seen in a refused transaction counts, too.
    let refused = Transaction {
        term: 7,
        ..transaction([remove(ObjectKind::Task, "x")])
    };
    assert!(state.apply(2, &refused).is_err());
    let state = state.after_refusal(2, &refused);
    assert!(state.apply(3, &of_term(6)).is_err());
}

#[test]
fn references_are_ids_names_or_unique_prefixes_in_this_order() {
    let made = [
        create(service("abc1", "web", &[])),
        create(service("abd2", "abc1x", &[])),
        create(service("web3", "db", &[])),
        create(node("w1", "")),
        create(task("t1", "abc1", &[])),
    ];
    let state = after(&State::default(), made);
    let found = |reference: &str| {
        let found = state.resolve(ObjectKind::Service, reference);
        found.map_err(|error| error.to_string())
    };
    assert_eq!(found("abc1").as_deref(), Ok("abc1"));
    assert_eq!(found("web").as_deref(), Ok("abc1"));
    assert_eq!(found("abd").as_deref(), Ok("abd2"));
    assert_eq!(
        found("ab"),
        Err("service ab is ambiguous (2 matches found)".into())
    );
    assert_eq!(found("x"), Err("service x not found".into()));
    assert_eq!(found(""), Err("service  not found".into()));
    assert_eq!(state.resolve(ObjectKind::Node, "w1").as_deref(), Ok("w1"));
    assert_eq!(
        state.resolve(ObjectKind::Task, "web.1").as_deref(),
        Ok("t1")
    );
    assert_eq!(
        state.resolve(ObjectKind::Task, "web.1.t1").as_deref(),
        Ok("t1")
    );
    assert!(state.resolve(ObjectKind::Task, "web.2").is_err());
}

#[test]
fn a_snapshot_that_is_newer_or_damaged_is_refused_with_a_sentence() {
    let state = after(&with_service(""), [create(task("t", "s", &["n"]))]);
    let bytes = state.encode();
    for end in 0..bytes.len() {
        let cut = State::decode(&bytes[..end]).expect_err("cut off");
        assert!(matches!(cut, DecodeError::Damaged(_)), "{cut}");
    }
    let mut newer = bytes.clone();
    // Length, tag and length of the header, tag of the format; then the format.
    assert_eq!(newer[4], 2);
    newer[4] = 3;
    let error = State::decode(&newer[..]).expect_err("newer").to_string();
    assert_eq!(
        error,
        "the snapshot has format 3, this version of swarm reads up to 2: upgrade this manager"
    );
}

#[test]
fn a_large_network_is_filled_encoded_and_decoded_in_parts() {
    let mut state = with_service("10.1.0.0/16");
    for batch in 0..50 {
        let made = (0..100).map(|n| create(task(&format!("t{batch}-{n}"), "s", &["n"])));
        state = after(&state, made);
    }
    assert_eq!(address(&state, "t49-99"), "10.1.19.138/16");
    let bytes = state.encode();
    assert!(bytes.len() > 400 << 10, "two parts");
    assert!(State::decode(&bytes[..]).expect("just written") == state);
    // Whichever part is damaged.
    let refused = |bytes: &[u8]| State::decode(bytes).expect_err("damaged").to_string();
    for end in [1, bytes.len() / 2, bytes.len() - 1] {
        let error = refused(&bytes[..end]);
        assert!(error.contains("damaged"), "{error}");
    }
    let record = 1 + usize::from(bytes[0]);
    for more in [&bytes[..record], &bytes[..]] {
        let error = refused(&[&bytes[..], more].concat());
        assert!(error.ends_with("something follows its end"), "{error}");
    }
    let twice = [&bytes[..record], &bytes[..]].concat();
    assert!(refused(&twice).ends_with("two headers"));
}

fn assign(of: &State, pairs: &[(&str, &str)]) -> StoreAction {
    let assignments = pairs.iter().map(|(id, node)| {
        let version = of.task(id).and_then(|task| task.meta?.version);
        TaskAssignment {
            task_id: (*id).into(),
            expected_version: version.map_or(0, |version| version.index),
            node_id: (*node).into(),
        }
    });
    StoreAction {
        action: Some(store_action::Action::AssignTasks(AssignTasks {
            assignments: assignments.collect(),
        })),
    }
}

fn create_many(template: Task, ids: &[&str]) -> StoreAction {
    let tasks = ids.iter().zip(1..).map(|(id, slot)| NewTask {
        id: (*id).into(),
        slot,
    });
    StoreAction {
        action: Some(store_action::Action::CreateTasks(CreateTasks {
            template: Some(template),
            tasks: tasks.collect(),
        })),
    }
}

#[test]
fn tasks_created_together_are_as_if_created_one_by_one() {
    let state = with_service("");
    let template = task("", "s", &["n"]);
    let together = after(&state, [create_many(template.clone(), &["a", "b"])]);
    let each = ["a", "b"].iter().zip(1..).map(|(id, slot)| {
        create(Task {
            id: (*id).into(),
            slot,
            ..template.clone()
        })
    });
    assert_eq!(together, after(&state, each));
    // All or none.
    let (code, message) = refusal(&together, create_many(template, &["c", "b"]));
    assert_eq!(code, Code::AlreadyExists, "{message}");
}

#[test]
fn of_many_assignments_those_that_are_outdated_are_left_out() {
    let state = with_service("");
    let state = after(
        &state,
        [create_many(task("", "s", &["n"]), &["a", "b", "c", "d"])],
    );
    let decided = assign(
        &state,
        &[
            ("a", "w1"),
            ("b", "w2"),
            ("c", "w1"),
            ("d", ""),
            ("x", "w1"),
        ],
    );
    let mut changed = (**state.task("b").expect("exists")).clone();
    changed.desired_state = TaskState::Shutdown.into();
    let meanwhile = after(&state, [update(changed), remove(ObjectKind::Task, "c")]);
    let state = after(&meanwhile, [decided.clone()]);
    let a = state.task("a").expect("exists");
    let status = a.status.as_ref().expect("set");
    assert_eq!(
        (a.node_id.as_str(), status.state()),
        ("w1", TaskState::Assigned)
    );
    assert_eq!(state.task("b"), meanwhile.task("b"));
    assert_eq!(state.task("d"), meanwhile.task("d"));
    assert!(state.task("c").is_none() && state.task("x").is_none());
    // What has a node keeps it, whoever decides again.
    let again = after(&state, [assign(&state, &[("a", "w2")]), decided]);
    assert_eq!(again.task("a"), state.task("a"));
}

fn with_image(mut service: Service, image: &str) -> Service {
    let spec = service.spec.as_mut().expect("set").task.as_mut();
    spec.expect("set").container = Some(ContainerSpec {
        image: image.into(),
        ..ContainerSpec::default()
    });
    service
}

fn as_made(state: &State, id: &str, ids: &[&str]) -> StoreAction {
    let service = state.service(id).expect("exists");
    let spec = service.spec.as_ref().expect("set");
    let template = Task {
        spec: spec.task.clone(),
        service_annotations: spec.annotations.clone().map(Into::into),
        ..task("", id, &["n"])
    };
    // As it comes out of the log: one with nothing in memory.
    let template = Task::decode(&*template.encode_to_vec()).expect("ours");
    create_many(template, ids)
}

/// Whether the specs of these are one in memory with that of the service, or the one it had before.
fn share(state: &State, id: &str, previous: bool, tasks: &[&str]) -> bool {
    let service = state.service(id).expect("exists");
    let spec = match previous {
        true => &service.previous_spec,
        false => &service.spec,
    };
    let spec = spec.as_ref().and_then(|spec| spec.task.as_ref());
    let spec = spec.expect("set");
    tasks.iter().all(|id| {
        let task = state.task(id).expect("exists");
        task.spec.as_ref().is_some_and(|tasks| tasks.is(spec))
    })
}

#[test]
fn tasks_share_their_spec_with_their_service() {
    let state = with_service("");
    let state = after(&state, [as_made(&state, "s", &["a", "b"])]);
    assert!(share(&state, "s", false, &["a", "b"]));
    // What changes a task or only its service leaves it so.
    let mut ends = (**state.task("b").expect("exists")).clone();
    ends.desired_state = TaskState::Shutdown.into();
    let ends = Task::decode(&*ends.encode_to_vec()).expect("ours");
    let mut scaled = (**state.service("s").expect("exists")).clone();
    let mode = scaled.spec.as_mut().and_then(|spec| spec.mode.as_mut());
    mode.expect("set").mode = Some(service_mode::Mode::Replicated(ReplicatedMode {
        replicas: Some(9),
    }));
    let scaled = Service::decode(&*scaled.encode_to_vec()).expect("ours");
    let state = after(&state, [update(ends), update(scaled)]);
    assert!(share(&state, "s", false, &["a", "b"]));
    assert!(share(&state, "s", true, &["a", "b"]));
    let newer = with_image((**state.service("s").expect("exists")).clone(), "web:2");
    let state = after(&state, [update(newer)]);
    let state = after(&state, [as_made(&state, "s", &["c"])]);
    assert!(share(&state, "s", true, &["a", "b"]) && !share(&state, "s", false, &["a"]));
    assert!(share(&state, "s", false, &["c"]));
}

#[test]
fn a_snapshot_has_a_spec_once_and_so_has_what_is_restored() {
    let image = "registry.example:5000/some/web:of-a-long-name";
    let made = [
        create(cluster("c")),
        create(network("n", "net", "")),
        create(with_image(service("s", "web", &["n"]), image)),
        create(service("gone", "old", &["n"])),
    ];
    let state = after(&State::default(), made);
    let state = after(
        &state,
        [
            as_made(&state, "s", &["a", "b", "c"]),
            as_made(&state, "gone", &["g"]),
        ],
    );
    let changed = |state: &State, image: &str| {
        update(with_image(
            (**state.service("s").expect("exists")).clone(),
            image,
        ))
    };
    // a has a spec that its service no longer knows, b the one before, c that of now, g that of no service.
    let state = after(
        &state,
        [remove(ObjectKind::Task, "b"), remove(ObjectKind::Task, "c")],
    );
    let state = after(&state, [changed(&state, "web:2")]);
    let state = after(&state, [as_made(&state, "s", &["b"])]);
    let state = after(
        &state,
        [
            changed(&state, "web:3"),
            remove(ObjectKind::Service, "gone"),
        ],
    );
    let state = after(&state, [as_made(&state, "s", &["c", "d", "e"])]);
    let bytes = state.encode();
    let restored = State::decode(&bytes).expect("ours");
    assert_eq!(restored, state);
    assert_eq!(restored.encode(), bytes);
    assert!(share(&restored, "s", true, &["b"]));
    assert!(share(&restored, "s", false, &["c", "d", "e"]));
    let times = |text: &str| {
        bytes
            .windows(text.len())
            .filter(|part| *part == text.as_bytes())
            .count()
    };
    assert_eq!((times(image), times("web:2"), times("web:3")), (1, 1, 1));
    let annotations = |id: &str| {
        restored
            .task(id)
            .expect("exists")
            .service_annotations
            .clone()
    };
    let (d, e) = (annotations("d"), annotations("e"));
    assert!(d.is_some_and(|d| e.is_some_and(|e| d.is(&e))));
}
