//! Entry points for fuzzing: requests of the Control API, and what the managers make of them.
//!
//! Each function takes what somebody else may send and panics when a rule is broken;
//! `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use bytes::Buf as _;
use prost::Message;
use swarm_identity::{JoinToken, RootCa};
use swarm_proto::image::ImageRef;
use swarm_proto::v1::control_server::Control as ControlApi;
use swarm_proto::v1::{
    self, Annotations, Assignments, ClusterSpec, ContainerSpec, CreateNetworkRequest,
    CreateServiceRequest, JoinTokens, ListNodesRequest, ListServicesRequest, ListTasksRequest,
    Network, NetworkAttachmentConfig, NetworkSpec, Node, NodeSpec, Placement, RemoveServiceRequest,
    ReplicatedMode, RotateJoinTokenRequest, ServiceMode, ServiceSpec, TaskSpec,
    UpdateClusterRequest, UpdateNodeRequest, UpdateServiceRequest, WatchRequest, service_mode,
};
use swarm_proto::{NodeId, TaskId};
use swarm_store::testing::{self, LocalConsensus, create};
use swarm_store::{Consensus as _, State};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use crate::control::Control;
use crate::control::validate;
use crate::leader::Group;
use crate::orchestrator;
use crate::scheduler::constraint::Constraint;
use crate::scheduler::{Scheduler, Spread};

/// Requests of one input.
const REQUESTS: usize = 12;
/// More replicas are accepted, but not made here: an input shall take milliseconds.
const REPLICAS: u64 = 40;

static BASE: LazyLock<State> = LazyLock::new(|| {
    let root = RootCa::create(SystemTime::now()).expect("a root can be made");
    let token = || JoinToken::generate(&root.digest()).as_str().to_owned();
    let cluster = v1::Cluster {
        root_ca: Some(v1::RootCa {
            cert_pem: root.cert_pem().as_bytes().to_vec().into(),
            key_pem: root.key_pem().as_bytes().to_vec().into(),
            digest: root.digest().to_string(),
            join_tokens: Some(JoinTokens {
                worker: token(),
                manager: token(),
            }),
        }),
        ..testing::cluster("c1")
    };
    let first = testing::transaction([
        create(cluster),
        create(testing::node("w1", "192.0.2.1")),
        create(testing::node("w2", "192.0.2.2")),
        create(testing::network("n1", "net", "10.9.0.0/28")),
    ]);
    let applied = State::default()
        .apply(1, &first)
        .expect("valid")
        .state
        .apply(2, &testing::transaction([create(service("web"))]));
    applied.expect("valid").state
});

fn service(name: &str) -> v1::Service {
    v1::Service {
        id: "s1".into(),
        spec: Some(seeds::service_spec(name)),
        ..v1::Service::default()
    }
}

/// Requests, each a kind and a message with its length before it: none panics, refusals are the
/// caller's fault, and what is accepted can be decided on, written to a snapshot and read back.
/// Returns the state afterwards.
pub fn control_requests(mut data: &[u8]) -> State {
    let consensus = LocalConsensus::with_state(BASE.clone());
    let control = Control::new(
        consensus.clone(),
        NodeId::from("w1"),
        Arc::new(|| Duration::from_secs(1_000_000)),
        CancellationToken::new(),
    );
    runtime(async {
        for _ in 0..REQUESTS {
            if data.is_empty() {
                break;
            }
            let kind = data.get_u8();
            let Ok(length) = prost::decode_length_delimiter(&mut data) else {
                break;
            };
            let Some((body, rest)) = data.split_at_checked(length) else {
                break;
            };
            data = rest;
            if let Some(Err(status)) = request(&control, &consensus, kind, body).await {
                let ours = [Code::Internal, Code::Unknown, Code::DataLoss];
                assert!(!ours.contains(&status.code()), "{status}");
                assert!(!status.message().is_empty());
            }
        }
    });
    let state = decide(State::clone(&consensus.store().state()));
    let written = state.encode();
    let read = State::decode(&written[..]).expect("just written");
    assert!(read == state, "{read:#?}\n{state:#?}");
    state
}

fn runtime(work: impl Future<Output = ()>) {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime can be made");
    }
    RUNTIME.with(|runtime| runtime.block_on(work));
}

/// `None`: the bytes are no such message.
async fn request(
    control: &Control,
    consensus: &Arc<LocalConsensus>,
    kind: u8,
    body: &[u8],
) -> Option<Result<(), Status>> {
    fn read<M: Message + Default + PartialEq + std::fmt::Debug>(body: &[u8]) -> Option<Request<M>> {
        let message = M::decode(body).ok()?;
        let again = M::decode(message.encode_to_vec().as_slice()).expect("just written");
        // Numbers that are no numbers do not equal themselves.
        assert_eq!(format!("{again:?}"), format!("{message:?}"));
        Some(Request::new(message))
    }
    fn done<T>(answer: Result<Response<T>, Status>) -> Result<(), Status> {
        answer.map(drop)
    }
    let state = consensus.store().state();
    let version = |meta: Option<&v1::Meta>| meta.and_then(|m| m.version).map_or(0, |v| v.index);
    Some(match kind % 18 {
        0 => {
            let request = read::<CreateServiceRequest>(body)?;
            let asked = request.get_ref().spec.clone();
            let answer = ControlApi::create_service(control, request).await;
            if answer.is_ok() {
                accepted(&asked.expect("without a spec nothing is created"));
            }
            done(answer)
        }
        1 => {
            let mut request = read::<UpdateServiceRequest>(body)?;
            let message = request.get_mut();
            if let Some(known) = state.service(&message.service_id) {
                message.version = version(known.meta.as_ref());
            }
            done(ControlApi::update_service(control, request).await)
        }
        2 => done(ControlApi::create_network(control, read(body)?).await),
        3 => {
            let mut request = read::<UpdateNodeRequest>(body)?;
            let message = request.get_mut();
            if let Some(known) = state.node(&message.node_id) {
                message.version = version(known.meta.as_ref());
            }
            done(ControlApi::update_node(control, request).await)
        }
        4 => {
            let mut request = read::<UpdateClusterRequest>(body)?;
            request.get_mut().version =
                version(state.cluster().and_then(|cluster| cluster.meta.as_ref()));
            done(ControlApi::update_cluster(control, request).await)
        }
        5 => done(ControlApi::remove_service(control, read(body)?).await),
        6 => done(ControlApi::remove_network(control, read(body)?).await),
        7 => done(ControlApi::remove_node(control, read(body)?).await),
        8 => done(ControlApi::list_services(control, read(body)?).await),
        9 => done(ControlApi::list_tasks(control, read(body)?).await),
        10 => done(ControlApi::list_nodes(control, read(body)?).await),
        11 => done(ControlApi::list_networks(control, read(body)?).await),
        12 => done(ControlApi::get_service(control, read(body)?).await),
        13 => done(ControlApi::get_network(control, read(body)?).await),
        14 => done(ControlApi::get_node(control, read(body)?).await),
        15 => done(ControlApi::get_task(control, read(body)?).await),
        16 => done(ControlApi::rotate_join_token(control, read(body)?).await),
        _ => done(ControlApi::watch(control, read(body)?).await),
    })
}

/// Whatever the border lets through, those behind it understand.
fn accepted(spec: &ServiceSpec) {
    let task = spec.task.as_ref().expect("checked");
    let container = task.container.as_ref().expect("checked");
    ImageRef::parse(&container.image).expect("checked");
    if let Some(placement) = &task.placement {
        for text in &placement.constraints {
            let constraint = Constraint::parse(text).expect("checked");
            let again = Constraint::parse(constraint.as_str()).expect("what it prints is one");
            assert_eq!(again.as_str(), constraint.as_str());
        }
        for preference in &placement.preferences {
            if let Some(v1::placement_preference::Preference::Spread(spread)) =
                &preference.preference
            {
                Spread::parse(&spread.spread_descriptor).expect("checked");
            }
        }
    }
}

/// The managers decide until there is nothing left to decide, or for a few rounds.
fn decide(mut state: State) -> State {
    let asked = state.services().map(|service| {
        let mode = service.spec.as_ref().and_then(|spec| spec.mode.as_ref());
        match mode.and_then(|mode| mode.mode.as_ref()) {
            Some(service_mode::Mode::Replicated(mode)) => mode.replicas.unwrap_or(1),
            _ => 1,
        }
    });
    if asked.fold(0, u64::saturating_add) > REPLICAS {
        return state;
    }
    let now = Duration::from_secs(1_000_000);
    let mut scheduler = Scheduler::new(&state);
    let mut ids = 0;
    for _ in 0..8 {
        let mut groups: Vec<Group> = Vec::new();
        let services: Vec<String> = state.services().map(|s| s.id.clone()).collect();
        for service in services {
            let mut next = || {
                ids += 1;
                TaskId::from(format!("t{ids:05}"))
            };
            groups.extend(orchestrator::decide(&state, &service, now, &mut next).groups);
        }
        let mut quiet = groups.is_empty();
        write(&mut state, &mut scheduler, groups);
        let groups = scheduler.decide(&state, now);
        quiet &= groups.is_empty();
        write(&mut state, &mut scheduler, groups);
        if quiet {
            break;
        }
    }
    state
}

fn write(state: &mut State, scheduler: &mut Scheduler, groups: Vec<Group>) {
    for group in groups {
        let index = state.index() + 1;
        let applied = state
            .apply(index, &testing::transaction(group))
            .expect("nobody else writes");
        *state = applied.state;
        scheduler.observe(&applied.events);
    }
}

/// What an agent on the node would be sent first.
#[must_use]
pub fn assignments(state: &State, node: &str) -> Vec<Assignments> {
    crate::dispatcher::complete(state, &NodeId::from(node))
}

/// A placement constraint: what it prints means the same, and `!=` is the opposite of `==`.
pub fn constraint(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let node = Node {
        role: v1::NodeRole::Manager.into(),
        ..testing::node("n1", "10.1.2.3")
    };
    match Constraint::parse(text) {
        Ok(constraint) => {
            let again = Constraint::parse(constraint.as_str()).expect("what it prints is one");
            assert_eq!(again, constraint);
            assert_eq!(again.matches(&node), constraint.matches(&node));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(spread) = Spread::parse(text) {
        let _ = format!("{spread:?}");
    }
}

/// Whether the border accepts a service, and why not.
///
/// # Errors
/// The sentence that its user would read.
pub fn check_service(spec: &ServiceSpec) -> Result<(), String> {
    let checked = validate::service_spec(spec).map_err(|error| error.to_string());
    if checked.is_ok() {
        accepted(spec);
    }
    checked
}

/// A network: what the border accepts can be allocated, with addresses in it that do not collide.
///
/// # Errors
/// The sentence that its user would read.
pub fn check_network(spec: &NetworkSpec) -> Result<(), String> {
    validate::network_spec(spec).map_err(|error| error.to_string())?;
    let network = Network {
        id: "n2".into(),
        spec: Some(spec.clone()),
        ..Network::default()
    };
    let mut service = testing::service("s2", "two", &["n2"]);
    if let Some(spec) = &mut service.spec {
        spec.mode = None;
    }
    let state = BASE.clone();
    let made = state.apply(9, &testing::transaction([create(network)]));
    let made = made.map_err(|rejection| rejection.message)?.state;
    let used = made.apply(
        10,
        &testing::transaction([
            create(service),
            create(testing::task("t1", "s2", &["n2"])),
            create(testing::task("t2", "s2", &["n2"])),
        ]),
    );
    let used = used.map_err(|rejection| rejection.message)?.state;
    let subnets: Vec<(ipnet::Ipv4Net, std::net::Ipv4Addr)> = used
        .network("n2")
        .expect("just made")
        .subnets
        .iter()
        .map(|subnet| {
            let pool = subnet.pool.as_ref().expect("filled in");
            let net: ipnet::Ipv4Net = pool.subnet.parse().expect("filled in");
            let gateway = pool.gateway.parse().expect("filled in");
            assert!(net.contains(&gateway));
            (net, gateway)
        })
        .collect();
    assert!(!subnets.is_empty());
    let mut given = std::collections::BTreeSet::new();
    for task in used.tasks_of_service("s2") {
        for text in task.networks.iter().flat_map(|it| &it.addresses) {
            let addr: ipnet::Ipv4Net = text.parse().expect("an address with its prefix");
            let at = subnets.iter().find(|(net, _)| net.contains(&addr.addr()));
            let (net, gateway) = at.expect("an address of the network");
            assert_eq!(addr.prefix_len(), net.prefix_len());
            assert_ne!(addr.addr(), *gateway);
            assert_ne!(addr.addr(), net.network());
            assert_ne!(addr.addr(), net.broadcast());
            assert!(given.insert(addr.addr()), "{addr} twice");
        }
    }
    Ok(())
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    pub(super) fn service_spec(name: &str) -> ServiceSpec {
        ServiceSpec {
            annotations: Some(Annotations {
                name: name.to_owned(),
                ..Annotations::default()
            }),
            task: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        image: "nginx".to_owned(),
                        env: vec!["A=b".to_owned()],
                        stop_signal: "RTMAX-1".to_owned(),
                        ..ContainerSpec::default()
                    }),
                    placement: Some(Placement {
                        constraints: vec!["node.role!=manager".to_owned()],
                        ..Placement::default()
                    }),
                    networks: vec![NetworkAttachmentConfig {
                        target: "n1".to_owned(),
                        ..NetworkAttachmentConfig::default()
                    }],
                    ..TaskSpec::default()
                }
                .into(),
            ),
            mode: Some(ServiceMode {
                mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                    replicas: Some(2),
                })),
            }),
            ..ServiceSpec::default()
        }
    }

    /// For [`super::control_requests`].
    #[must_use]
    pub fn control_requests() -> Vec<Vec<u8>> {
        fn one(kind: u8, message: &impl Message) -> Vec<u8> {
            [vec![kind], message.encode_length_delimited_to_vec()].concat()
        }
        let made = CreateServiceRequest {
            spec: Some(service_spec("db")),
        };
        let changed = UpdateServiceRequest {
            service_id: "s1".into(),
            spec: Some(service_spec("web")),
            ..UpdateServiceRequest::default()
        };
        let network = CreateNetworkRequest {
            spec: Some(NetworkSpec {
                annotations: Some(Annotations {
                    name: "other".into(),
                    ..Annotations::default()
                }),
                ..NetworkSpec::default()
            }),
        };
        let node = UpdateNodeRequest {
            node_id: "w2".into(),
            spec: Some(NodeSpec::default()),
            ..UpdateNodeRequest::default()
        };
        let cluster = UpdateClusterRequest {
            spec: Some(ClusterSpec::default()),
            ..UpdateClusterRequest::default()
        };
        let gone = RemoveServiceRequest {
            r#ref: "web".into(),
        };
        let all = vec![
            one(0, &made),
            one(1, &changed),
            one(2, &network),
            one(3, &node),
            one(4, &cluster),
            one(5, &gone),
            one(8, &ListServicesRequest::default()),
            one(9, &ListTasksRequest::default()),
            one(10, &ListNodesRequest::default()),
            one(16, &RotateJoinTokenRequest::default()),
            one(17, &WatchRequest::default()),
        ];
        let mut seeds = all.clone();
        seeds.push(all.concat());
        seeds
    }

    /// For [`super::constraint`].
    #[must_use]
    pub fn constraint() -> Vec<Vec<u8>> {
        [
            "node.id==n1",
            "node.hostname != alpha",
            "node.ip==10.1.0.0/16",
            "node.role==manager",
            "node.platform.os==Linux",
            "node.platform.arch==x86_64",
            "Node.Labels.zone==a",
            "engine.labels.disk!=ssd",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
    }
}
