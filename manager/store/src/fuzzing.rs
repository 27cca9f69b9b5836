//! Entry points for fuzzing: bytes of a snapshot, and transactions of any content.
//!
//! Each function takes what somebody else may send and panics when a rule is
//! broken; `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use prost::Message as _;
use swarm_proto::v1::{Cluster, EndpointMode, EndpointSpec, NodeState, TaskState, Transaction};

use crate::testing::{
    cluster, create, network, node, observe, remove, report, service, task, transaction, update,
};
use crate::{ObjectKind, State};

/// Transactions of one input: enough for things to meet, few enough to be fast.
const TRANSACTIONS: usize = 24;

/// A snapshot's bytes: what is read is written back to something that reads the same.
pub fn snapshot_state(data: &[u8]) {
    let Ok(state) = State::decode(data) else {
        return;
    };
    let written = state.encode();
    let again = State::decode(&written[..]).expect("just written");
    assert!(again == state, "{again:#?}\n{state:#?}");
    assert_eq!(again.encode(), written);
    // Whatever was read can be worked with.
    for id in state.tasks().map(|task| task.id.clone()) {
        let removal = transaction([remove(ObjectKind::Task, &id)]);
        let _ = state.apply(state.index().saturating_add(1), &removal);
    }
    for id in state.services().map(|service| service.id.clone()) {
        let removal = transaction([remove(ObjectKind::Service, &id)]);
        let _ = state.apply(state.index().saturating_add(1), &removal);
    }
}

/// Transactions, each with its length before it: none panics, one that is refused
/// changes nothing, and the state afterwards survives a snapshot.
pub fn transactions(mut data: &[u8]) {
    let mut state = State::default();
    for index in 1..=TRANSACTIONS as u64 {
        let Ok(transaction) = Transaction::decode_length_delimited(&mut data) else {
            break;
        };
        state = match state.apply(index, &transaction) {
            Ok(applied) => {
                let versions = applied.events.iter().filter_map(|event| event.new_object());
                assert!(versions.count() <= applied.events.len());
                applied.state
            }
            Err(rejection) => {
                let place = rejection.action as usize;
                assert!(place == 0 || place < transaction.actions.len());
                let next = state.after_refusal(index, &transaction);
                assert!(next.at_index(0).tasks().eq(state.tasks()));
                next
            }
        };
    }
    check_holdings(&state);
    let written = state.encode();
    let read = State::decode(&written[..]).expect("just written");
    assert!(read == state, "{read:#?}\n{state:#?}");
}

/// No VNI is there twice and no two subnets overlap.
fn check_holdings(state: &State) {
    let mut vnis = std::collections::BTreeSet::new();
    let mut subnets: Vec<ipnet::Ipv4Net> = Vec::new();
    for subnet in state.networks().flat_map(|network| &network.subnets) {
        assert!(vnis.insert(subnet.vni), "VNI {} twice", subnet.vni);
        let pool = subnet.pool.as_ref().expect("filled in");
        let net: ipnet::Ipv4Net = pool.subnet.parse().expect("checked");
        assert!(
            subnets
                .iter()
                .all(|o| !o.contains(&net) && !net.contains(o)),
            "{net} overlaps another"
        );
        subnets.push(net);
    }
}

fn script() -> Vec<Transaction> {
    let small = Cluster {
        default_addr_pool: vec!["10.0.0.0/26".into()],
        subnet_size: 29,
        ..cluster("c")
    };
    let mut dnsrr = service("s2", "two", &["n2"]);
    if let Some(spec) = &mut dnsrr.spec {
        spec.endpoint = Some(EndpointSpec {
            mode: EndpointMode::Dnsrr.into(),
            ports: Vec::new(),
        });
    }
    let mut assigned = task("t1", "s1", &["n1"]);
    assigned.node_id = "w1".into();
    vec![
        transaction([create(small), create(node("w1", "192.0.2.1"))]),
        transaction([
            create(network("n1", "one", "")),
            create(network("n2", "two", "10.0.0.32/29")),
        ]),
        transaction([create(service("s1", "one", &["n1", "n2"])), create(dnsrr)]),
        transaction((0..6).map(|n| create(task(&format!("t{n}"), "s1", &["n1", "n2"])))),
        transaction([update(assigned)]),
        transaction([
            report("t1", TaskState::Running, 5),
            observe("w1", NodeState::Down),
        ]),
        transaction([report("t1", TaskState::Failed, 6)]),
        transaction([
            remove(ObjectKind::Task, "t1"),
            remove(ObjectKind::Service, "s2"),
        ]),
        transaction([remove(ObjectKind::Node, "w1")]),
    ]
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    /// For [`super::snapshot_state`].
    #[must_use]
    pub fn snapshot_state() -> Vec<Vec<u8>> {
        let mut state = State::default();
        let mut all = vec![state.encode()];
        for (index, transaction) in (1..).zip(script()) {
            if let Ok(applied) = state.apply(index, &transaction) {
                state = applied.state;
                all.push(state.encode());
            }
        }
        all
    }

    /// For [`super::transactions`].
    #[must_use]
    pub fn transactions() -> Vec<Vec<u8>> {
        let script = script();
        (1..=script.len())
            .map(|length| {
                let mut all = Vec::new();
                for transaction in &script[..length] {
                    all.extend(transaction.encode_length_delimited_to_vec());
                }
                all
            })
            .collect()
    }
}
