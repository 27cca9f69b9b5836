//! Entry points for fuzzing: assignments of a manager, and the local store's records.
//!
//! Each function takes what somebody else may send and panics when a rule is broken;
//! `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use std::net::Ipv4Addr;

use prost::Message as _;
use swarm_proto::NodeId;
use swarm_proto::v1::{
    Assignments, AssignmentsType, ContainerSpec, EndpointEntry, IpamPool, Network,
    NetworkAttachment, ServiceEntry, SubnetState, Task, TaskSpec, TaskState, assignment_change,
};

use crate::container;
use crate::local::{self, WriteBatch};
use crate::network::{self, Sandbox};
use crate::runtime;
use crate::worker::{Assembler, Held, Plan, apply};

/// The node that everything here is for.
pub const NODE: &str = "w1";

/// Messages of assignments, each with its length before it: what is held afterwards can be kept
/// on disk and is the same when read again, and every task and network in it is either
/// understood or refused with a sentence.
pub fn assignments(mut data: &[u8]) {
    let mut assembler = Assembler::default();
    let mut held = Held::default();
    while let Ok(message) = Assignments::decode_length_delimited(&mut data) {
        let Ok(set) = assembler.push(message) else {
            break;
        };
        let Some(set) = set else { continue };
        let Ok(next) = apply(&held, &set, &NodeId::from(NODE)) else {
            break;
        };
        assert_eq!(next.revision, set.results_in);
        let plan = Plan::between(&held, &next);
        assert!(plan.start.len() + plan.update.len() <= next.tasks.len());
        held = next;
    }
    check(&held);
    assert_eq!(local::reread(&held).map(|state| state.held), Ok(held));
}

/// What a manager's messages leave on the node, and that all of its tasks can be made.
///
/// # Errors
/// The sentence with which the agent would refuse one.
pub fn accept(messages: Vec<Assignments>) -> Result<(), String> {
    let mut assembler = Assembler::default();
    let mut held = Held::default();
    for message in messages {
        let set = assembler.push(message).map_err(|error| error.to_string())?;
        if let Some(set) = set {
            held = apply(&held, &set, &NodeId::from(NODE)).map_err(|error| error.to_string())?;
        }
    }
    for task in held.tasks.values() {
        make(task)?;
    }
    network::fuzzing::views(held.networks.values().map(|view| &**view))
}

fn check(held: &Held) {
    for task in held.tasks.values() {
        if let Err(sentence) = make(task) {
            assert!(!sentence.is_empty());
        }
        let _ = container::stop_grace(task);
    }
    for view in held.networks.values() {
        let _ = network::fuzzing::views([&**view]);
    }
}

fn make(task: &Task) -> Result<(), String> {
    let spec = container::sandbox_spec(task)?;
    network::fuzzing::sandbox(&spec)?;
    let sandbox = Sandbox {
        netns: "/run/netns/x".into(),
        gateway_addr: Some(Ipv4Addr::new(172, 18, 0, 2).into()),
        host_ports: spec.host_ports,
    };
    let config = container::container_config(task, &sandbox, &NodeId::from(NODE))?;
    runtime::fuzzing::build(&config)
}

/// Records of the agent's store, each a key and a value with their lengths (two bytes) before
/// them. What is read can be written and is the same when read again.
pub fn local_store(mut data: &[u8]) {
    let mut records = std::collections::BTreeMap::new();
    let mut take = || -> Option<Vec<u8>> {
        let (length, rest) = data.split_first_chunk::<2>()?;
        let (bytes, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        data = rest;
        Some(bytes.to_vec())
    };
    while let (Some(key), Some(value)) = (take(), take()) {
        records.insert(key, value);
    }
    let _ = local::is_store(records.clone());
    if let Ok(state) = local::read(records) {
        let again = local::reread(&state.held).expect("what was read can be written");
        assert_eq!(again.held, state.held);
    }
}

fn held_messages() -> Vec<Assignments> {
    use assignment_change::Change;
    let task = Task {
        id: "t1".into(),
        node_id: NODE.into(),
        service_id: "s1".into(),
        slot: 1,
        desired_state: TaskState::Running.into(),
        spec: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    image: "nginx".into(),
                    env: vec!["A=b".into()],
                    ..ContainerSpec::default()
                }),
                ..TaskSpec::default()
            }
            .into(),
        ),
        networks: vec![NetworkAttachment {
            network_id: "n1".into(),
            addresses: vec!["10.9.0.3/24".into()],
            ..NetworkAttachment::default()
        }],
        ..Task::default()
    };
    let net = Network {
        id: "n1".into(),
        subnets: vec![SubnetState {
            pool: Some(IpamPool {
                subnet: "10.9.0.0/24".into(),
                gateway: "10.9.0.1".into(),
                ..IpamPool::default()
            }),
            vni: 4096,
        }],
        ..Network::default()
    };
    let row = EndpointEntry {
        network_id: "n1".into(),
        task_id: "t2".into(),
        service_id: "s1".into(),
        addr: "10.9.0.4/24".into(),
        vtep: "192.0.2.2".into(),
        vni: 4096,
        ready: true,
        ..EndpointEntry::default()
    };
    let service = ServiceEntry {
        network_id: "n1".into(),
        service_id: "s1".into(),
        name: "web".into(),
        vip: "10.9.0.2".into(),
        ..ServiceEntry::default()
    };
    let changes = [
        Change::Network(net),
        Change::Endpoint(row),
        Change::Service(service),
        Change::Task(task),
    ];
    let change = |change| swarm_proto::v1::AssignmentChange {
        change: Some(change),
    };
    vec![
        Assignments {
            r#type: AssignmentsType::Complete.into(),
            results_in: 5,
            changes: changes.into_iter().map(change).collect(),
            ..Assignments::default()
        },
        Assignments {
            r#type: AssignmentsType::Incremental.into(),
            applies_to: 5,
            results_in: 6,
            changes: vec![change(Change::RemoveTask("t1".into()))],
            ..Assignments::default()
        },
    ]
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    /// For [`super::assignments`].
    #[must_use]
    pub fn assignments() -> Vec<Vec<u8>> {
        let one = |message: &Assignments| message.encode_length_delimited_to_vec();
        let messages = held_messages();
        vec![one(&messages[0]), messages.iter().flat_map(one).collect()]
    }

    /// For [`super::local_store`].
    #[must_use]
    pub fn local_store() -> Vec<Vec<u8>> {
        let mut assembler = Assembler::default();
        let set = assembler.push(held_messages().swap_remove(0));
        let set = set.expect("our own").expect("it is whole");
        let held = apply(&Held::default(), &set, &NodeId::from(NODE)).expect("our own");
        let mut batch = WriteBatch::default();
        batch.assignments(&Held::default(), &held);
        let mut bytes = Vec::new();
        for (key, value) in local::records(&batch) {
            for part in [key, value] {
                bytes.extend_from_slice(&(part.len() as u16).to_be_bytes());
                bytes.extend_from_slice(&part);
            }
        }
        vec![bytes]
    }
}
