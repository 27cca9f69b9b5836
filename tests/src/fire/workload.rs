//! Clients that use the Control API at once, and write down what they were answered.
//!
//! Each client speaks to one manager over its local socket. Objects are networks and
//! services without tasks, of which a few are in use at a time, and labels of nodes.
//! Every write puts a number of its own into a label, so that a reader can tell
//! whose write it sees. An object is used for a while, then another takes its place:
//! short histories of much contention are what finds mistakes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::Rng as _;
use rand::rngs::StdRng;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::{
    Annotations, ContainerSpec, CreateNetworkRequest, CreateServiceRequest, Filters,
    GetNetworkRequest, GetNodeRequest, GetServiceRequest, ListNetworksRequest, ListServicesRequest,
    Meta, Network, NetworkSpec, Node, NodeSpec, RemoveNetworkRequest, RemoveServiceRequest,
    ReplicatedMode, Service, ServiceMode, ServiceSpec, TaskSpec, UpdateNodeRequest,
    UpdateServiceRequest, service_mode,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::history::{Answer, Ask, History, Record, Seen, Who};
use crate::lab::host_dir;

/// Objects in use at a time.
const OBJECTS: usize = 24;
/// Operations after which another object takes the place of one.
const OPS_PER_OBJECT: u64 = 250;
/// Longer than a manager looks for a leader, so that it can say that there is none.
const PATIENCE: Duration = Duration::from_secs(25);
/// Between two attempts of a client whose manager refuses: the pace of the fault.
const REFUSED_WAIT: Duration = Duration::from_millis(50);
/// The label that holds the number.
const LABEL: &str = "fire";
/// Names of objects begin so.
const PREFIX: &str = "fire-";

/// What kind of object a name is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Network,
    Service,
    Node,
}

/// One object in use.
#[derive(Clone, Debug)]
struct Object {
    kind: Kind,
    /// Name, or the ID of a node.
    name: String,
    ops: u64,
}

/// What was counted.
#[derive(Default, Debug)]
pub struct Counts {
    /// Operations that were answered as asked or refused for a reason in the objects.
    pub answered: AtomicU64,
    /// Not done, because no manager could: no leader, no quorum, not a manager.
    pub refused: AtomicU64,
    /// Outcome unknown.
    pub unknown: AtomicU64,
}

impl Counts {
    /// All operations.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
            + self.refused.load(Ordering::Relaxed)
            + self.unknown.load(Ordering::Relaxed)
    }
}

/// How long no write was acknowledged.
#[derive(Debug)]
pub struct Gaps {
    last: Instant,
    /// What is happening to the cluster.
    event: String,
    /// Per event, the longest time without an acknowledged write anywhere.
    worst: BTreeMap<String, Duration>,
}

/// What all clients share.
pub struct Shared {
    /// Everything that was asked and answered.
    pub history: History,
    /// How it ended.
    pub counts: Counts,
    gaps: Mutex<Gaps>,
    objects: Mutex<Vec<Object>>,
    /// What was last seen of each object.
    seen: Mutex<HashMap<String, Seen>>,
    specs: Mutex<HashMap<String, NodeSpec>>,
    values: AtomicU64,
    names: AtomicU64,
    stop: AtomicBool,
    image: String,
    /// Reasons of refusals and unknown outcomes, and how often each was given.
    reasons: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    /// Uses labels of the nodes with these IDs too; `image` is named in the services' specs.
    #[must_use]
    pub fn new(nodes: &[String], image: String) -> Arc<Self> {
        let shared = Self {
            history: History::default(),
            counts: Counts::default(),
            gaps: Mutex::new(Gaps {
                last: Instant::now(),
                event: "nothing".into(),
                worst: BTreeMap::new(),
            }),
            objects: Mutex::default(),
            seen: Mutex::default(),
            specs: Mutex::default(),
            values: AtomicU64::new(1),
            names: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            image,
            reasons: Mutex::default(),
        };
        let mut objects: Vec<Object> = (0..OBJECTS).map(|at| shared.fresh(at)).collect();
        objects.extend(nodes.iter().map(|id| Object {
            kind: Kind::Node,
            name: id.clone(),
            ops: 0,
        }));
        *shared.objects.lock() = objects;
        Arc::new(shared)
    }

    fn fresh(&self, at: usize) -> Object {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let (kind, letter) = match at % 3 {
            0 => (Kind::Network, 'n'),
            _ => (Kind::Service, 's'),
        };
        Object {
            kind,
            name: format!("{PREFIX}{letter}{number}"),
            ops: 0,
        }
    }

    /// From now on this happens to the cluster.
    pub fn event(&self, name: &str) {
        let mut gaps = self.gaps.lock();
        gaps.note();
        gaps.event = name.to_owned();
    }

    /// The longest time without an acknowledged write, per event.
    #[must_use]
    pub fn worst(&self) -> BTreeMap<String, Duration> {
        self.gaps.lock().worst.clone()
    }

    /// When a write was last acknowledged.
    #[must_use]
    pub fn last_write(&self) -> Instant {
        self.gaps.lock().last
    }

    /// Why operations were refused or lost, and how often.
    #[must_use]
    pub fn reasons(&self) -> BTreeMap<String, u64> {
        self.reasons.lock().clone()
    }

    /// Lets the clients end. That nothing is written from now on is nobody's fault.
    pub fn stop(&self) {
        self.gaps.lock().note();
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Puts a first value into the label of each node.
    ///
    /// # Errors
    /// The manager refuses it.
    pub async fn prepare(&self, host: u16) -> Result<()> {
        let mut client = connect(host);
        let objects = self.objects.lock().clone();
        for object in objects.iter().filter(|object| object.kind == Kind::Node) {
            // Other changes of the node may come between reading and writing.
            let mut tries = 0;
            let node = loop {
                let request = GetNodeRequest {
                    r#ref: object.name.clone(),
                };
                let node = client.get_node(request).await?.into_inner();
                let value = self.values.fetch_add(1, Ordering::Relaxed);
                let request = labelled(&node, value)?;
                match client.update_node(request).await {
                    Ok(node) => break node.into_inner(),
                    Err(status) if status.code() == Code::Aborted && tries < 20 => tries += 1,
                    Err(status) => return Err(status.into()),
                }
            };
            let seen = node_seen(&node).context("the label was just written")?;
            self.history.starts_with(&object.name, seen.clone());
            self.seen.lock().insert(object.name.clone(), seen);
            self.specs
                .lock()
                .insert(object.name.clone(), node.spec.unwrap_or_default());
        }
        Ok(())
    }

    /// Reads every object that was ever used, once, at this host. Retries until it is answered.
    ///
    /// # Errors
    /// It is refused for longer than a minute.
    pub async fn read_everything(&self, who: Who, names: &[String]) -> Result<()> {
        let mut client = Client::new(who);
        for name in names {
            let kind = match name.strip_prefix(PREFIX) {
                Some(rest) if rest.starts_with('n') => Kind::Network,
                Some(_) => Kind::Service,
                None => Kind::Node,
            };
            let until = Instant::now() + Duration::from_secs(60);
            loop {
                let start = client.begin(self);
                match client.get(kind, name).await {
                    Outcome::Answered(answer) => {
                        client.record(self, name, start, Ask::Get, answer);
                        break;
                    }
                    Outcome::Refused(why) | Outcome::Unknown(why) => {
                        ensure!(Instant::now() < until, "reading {name}: {why}");
                        tokio::time::sleep(REFUSED_WAIT).await;
                    }
                }
            }
        }
        Ok(())
    }

    fn pick(&self, random: &mut StdRng) -> Object {
        let mut objects = self.objects.lock();
        let at = random.random_range(0..objects.len());
        objects[at].ops += 1;
        if objects[at].ops > OPS_PER_OBJECT && objects[at].kind != Kind::Node {
            objects[at] = self.fresh(at);
        }
        objects[at].clone()
    }

    fn note(&self, why: &str) {
        // One sentence per kind of reason: without identifiers, numbers and addresses.
        let words = why
            .split(' ')
            .map(|word| match swarm_proto::id::is_id(word) {
                true => "…",
                false => word,
            });
        let words = words.collect::<Vec<_>>().join(" ");
        let without_numbers = words.chars().filter(|c| !c.is_ascii_digit());
        let why: String = without_numbers.take(160).collect();
        let mut reasons = self.reasons.lock();
        if reasons.len() < 200 {
            *reasons.entry(why).or_default() += 1;
        }
    }
}

impl Gaps {
    fn note(&mut self) {
        let now = Instant::now();
        let gap = now - self.last;
        let worst = self.worst.entry(self.event.clone()).or_default();
        *worst = gap.max(*worst);
    }
}

/// How a request ended.
enum Outcome {
    Answered(Answer),
    /// Certainly not done.
    Refused(String),
    Unknown(String),
}

/// One client.
pub struct Client {
    who: Who,
    api: ControlClient<Channel>,
}

/// A connection to the local socket of a host's manager, made when it is used.
#[must_use]
pub fn connect(host: u16) -> ControlClient<Channel> {
    let path: PathBuf = host_dir(&format!("h{host}")).join("run/swarm.sock");
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let path = path.clone();
        async move {
            Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?))
        }
    });
    let channel = Endpoint::from_static("http://swarmd").connect_with_connector_lazy(connector);
    ControlClient::new(channel).max_decoding_message_size(swarm_proto::defaults::MESSAGE_MAX)
}

/// When an operation began.
struct Start {
    call: u64,
    at: Duration,
}

impl Client {
    /// A client of a host's manager.
    #[must_use]
    pub fn new(who: Who) -> Self {
        Self {
            who,
            api: connect(who.host),
        }
    }

    /// Uses the cluster until it is told to stop.
    pub async fn run(mut self, shared: Arc<Shared>, mut random: StdRng) {
        while !shared.stop.load(Ordering::Relaxed) {
            let object = shared.pick(&mut random);
            let outcome = match random.random_range(0..100) {
                0..2 => self.list(&shared).await,
                choice => self.one(&shared, &object, choice, &mut random).await,
            };
            let counter = match &outcome {
                Outcome::Answered(_) => &shared.counts.answered,
                Outcome::Refused(why) => {
                    shared.note(&format!("refused: {why}"));
                    &shared.counts.refused
                }
                Outcome::Unknown(why) => {
                    shared.note(&format!("unknown: {why}"));
                    &shared.counts.unknown
                }
            };
            counter.fetch_add(1, Ordering::Relaxed);
            if !matches!(outcome, Outcome::Answered(_)) {
                tokio::time::sleep(REFUSED_WAIT).await;
            }
        }
    }

    async fn one(
        &mut self,
        shared: &Shared,
        object: &Object,
        choice: u32,
        random: &mut StdRng,
    ) -> Outcome {
        let known = shared.seen.lock().get(&object.name).cloned();
        let value = shared.values.fetch_add(1, Ordering::Relaxed);
        let ask = match (choice, known, object.kind) {
            (..55, ..) => Ask::Get,
            (55..80, Some(seen), Kind::Service | Kind::Node) => Ask::Update(seen, value),
            (_, _, Kind::Node) => Ask::Get,
            // More that makes than that removes, so that mostly something is there.
            (55..92, ..) => Ask::Create(value),
            _ => Ask::Remove,
        };
        let start = self.begin(shared);
        let outcome = match &ask {
            Ask::Get => self.get(object.kind, &object.name).await,
            Ask::Create(value) => self.create(shared, object, *value).await,
            Ask::Update(seen, value) => self.update(shared, object, seen, *value).await,
            Ask::Remove => self.remove(object).await,
        };
        let write = ask != Ask::Get;
        match &outcome {
            Outcome::Answered(Answer::Saw(seen)) if write => {
                // The write is done, and the answer shows what is there by now: two facts.
                let id = match (&ask, seen) {
                    (Ask::Update(before, _), _) => before.id.clone(),
                    (_, Some(seen)) => seen.id.clone(),
                    _ => String::new(),
                };
                let read = Start {
                    call: start.call,
                    at: start.at,
                };
                self.record(shared, &object.name, start, ask, Answer::Done(id));
                self.record(
                    shared,
                    &object.name,
                    read,
                    Ask::Get,
                    Answer::Saw(seen.clone()),
                );
                shared.acknowledged();
            }
            Outcome::Answered(answer) => {
                if write && matches!(answer, Answer::Done(_)) {
                    shared.acknowledged();
                }
                self.record(shared, &object.name, start, ask, answer.clone());
            }
            Outcome::Unknown(_) if write => {
                self.record(shared, &object.name, start, ask, Answer::Unknown);
            }
            Outcome::Unknown(_) | Outcome::Refused(_) => {}
        }
        if let Outcome::Answered(Answer::Saw(Some(seen))) = &outcome {
            // Sometimes an older one stays, so that updates are out of sequence too.
            if random.random_range(0..10) > 0 {
                shared.seen.lock().insert(object.name.clone(), seen.clone());
            }
        }
        outcome
    }

    fn begin(&self, shared: &Shared) -> Start {
        Start {
            at: shared.history.elapsed(),
            call: shared.history.tick(),
        }
    }

    fn record(&self, shared: &Shared, object: &str, start: Start, ask: Ask, answer: Answer) {
        let record = Record {
            call: start.call,
            ret: shared.history.tick(),
            ask,
            answer,
            who: self.who,
            at: start.at,
        };
        shared.history.add(object, record);
    }

    /// One list is a read of every object in use.
    async fn list(&mut self, shared: &Shared) -> Outcome {
        let objects = shared.objects.lock().clone();
        let filters = Some(Filters {
            names: vec![PREFIX.to_owned()],
            ..Filters::default()
        });
        let start = self.begin(shared);
        let services = ListServicesRequest {
            filters: filters.clone(),
            ..Default::default()
        };
        let services = match within(self.api.list_services(services)).await {
            Ok(listed) => listed.services,
            Err(status) => return failed(&status, false),
        };
        let between = self.begin(shared);
        let networks = ListNetworksRequest {
            filters,
            ..Default::default()
        };
        let networks = match within(self.api.list_networks(networks)).await {
            Ok(listed) => listed.networks,
            Err(status) => return failed(&status, false),
        };
        let found: HashMap<String, Seen> = services
            .iter()
            .filter_map(|service| Some((service_name(service)?, service_seen(service)?)))
            .chain(
                networks
                    .iter()
                    .filter_map(|network| Some((network_name(network)?, network_seen(network)?))),
            )
            .collect();
        for object in objects {
            let begun = match object.kind {
                Kind::Node => continue,
                Kind::Service => &start,
                Kind::Network => &between,
            };
            let begun = Start { ..*begun };
            let seen = found.get(&object.name).cloned();
            self.record(shared, &object.name, begun, Ask::Get, Answer::Saw(seen));
        }
        Outcome::Answered(Answer::Saw(None))
    }

    async fn get(&mut self, kind: Kind, name: &str) -> Outcome {
        let r#ref = name.to_owned();
        let seen = match kind {
            Kind::Network => {
                let request = GetNetworkRequest {
                    r#ref,
                    verbose: false,
                };
                within(self.api.get_network(request))
                    .await
                    .map(|detail| detail.network.as_ref().and_then(network_seen))
            }
            Kind::Service => within(self.api.get_service(GetServiceRequest { r#ref }))
                .await
                .map(|service| service_seen(&service)),
            Kind::Node => within(self.api.get_node(GetNodeRequest { r#ref }))
                .await
                .map(|node| node_seen(&node)),
        };
        match seen {
            Ok(Some(seen)) => Outcome::Answered(Answer::Saw(Some(seen))),
            Ok(None) => Outcome::Unknown("an object without its label".into()),
            Err(status) if status.code() == Code::NotFound => Outcome::Answered(Answer::Saw(None)),
            Err(status) => failed(&status, false),
        }
    }

    async fn create(&mut self, shared: &Shared, object: &Object, value: u64) -> Outcome {
        let annotations = Some(Annotations {
            name: object.name.clone(),
            labels: BTreeMap::from([(LABEL.to_owned(), value.to_string())]),
        });
        let seen = if object.kind == Kind::Network {
            let spec = NetworkSpec {
                annotations,
                driver: "overlay".into(),
                ..Default::default()
            };
            let request = CreateNetworkRequest { spec: Some(spec) };
            within(self.api.create_network(request))
                .await
                .map(|network| network_seen(&network))
        } else {
            let spec = service_spec(annotations, &shared.image);
            let request = CreateServiceRequest { spec: Some(spec) };
            within(self.api.create_service(request))
                .await
                .map(|created| created.service.as_ref().and_then(service_seen))
        };
        match seen {
            Ok(Some(seen)) => Outcome::Answered(Answer::Saw(Some(seen))),
            Ok(None) => Outcome::Unknown("an object without its label".into()),
            Err(status) if status.code() == Code::AlreadyExists => {
                Outcome::Answered(Answer::Exists)
            }
            Err(status) => failed(&status, true),
        }
    }

    async fn update(
        &mut self,
        shared: &Shared,
        object: &Object,
        seen: &Seen,
        value: u64,
    ) -> Outcome {
        let labels = BTreeMap::from([(LABEL.to_owned(), value.to_string())]);
        let answered = if object.kind == Kind::Node {
            let Some(spec) = shared.specs.lock().get(&object.name).cloned() else {
                return Outcome::Refused("the node is not known yet".into());
            };
            let meta = Meta {
                version: Some(swarm_proto::v1::Version {
                    index: seen.version,
                }),
                ..Meta::default()
            };
            let node = Node {
                id: object.name.clone(),
                meta: Some(meta),
                spec: Some(spec),
                ..Node::default()
            };
            match labelled(&node, value) {
                Ok(request) => within(self.api.update_node(request))
                    .await
                    .map(|node| node_seen(&node)),
                Err(error) => return Outcome::Refused(error.to_string()),
            }
        } else {
            let annotations = Some(Annotations {
                name: object.name.clone(),
                labels,
            });
            let request = UpdateServiceRequest {
                service_id: seen.id.clone(),
                version: seen.version,
                spec: Some(service_spec(annotations, &shared.image)),
            };
            within(self.api.update_service(request))
                .await
                .map(|service| service_seen(&service))
        };
        match answered {
            Ok(Some(seen)) => Outcome::Answered(Answer::Saw(Some(seen))),
            Ok(None) => Outcome::Unknown("an object without its label".into()),
            Err(status) if status.code() == Code::Aborted => Outcome::Answered(Answer::Stale),
            Err(status) if status.code() == Code::NotFound => Outcome::Answered(Answer::Gone),
            Err(status) => failed(&status, true),
        }
    }

    async fn remove(&mut self, object: &Object) -> Outcome {
        let r#ref = object.name.clone();
        let removed = if object.kind == Kind::Network {
            within(self.api.remove_network(RemoveNetworkRequest { r#ref }))
                .await
                .map(|removed| removed.id)
        } else {
            within(self.api.remove_service(RemoveServiceRequest { r#ref }))
                .await
                .map(|removed| removed.id)
        };
        match removed {
            Ok(id) => Outcome::Answered(Answer::Done(id)),
            Err(status) if status.code() == Code::NotFound => Outcome::Answered(Answer::Gone),
            Err(status) => failed(&status, true),
        }
    }
}

impl Shared {
    fn acknowledged(&self) {
        let mut gaps = self.gaps.lock();
        gaps.note();
        gaps.last = Instant::now();
    }
}

async fn within<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(
            "the client has waited for long enough",
        )),
    }
}

/// Whether something that failed is certainly not done.
fn failed(status: &Status, write: bool) -> Outcome {
    let why = format!("{:?}: {}", status.code(), status.message());
    // What has no source was said by the manager itself; a lost connection says nothing.
    let said = std::error::Error::source(status).is_none();
    let refusal = matches!(
        status.code(),
        Code::Unavailable
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unimplemented
            | Code::ResourceExhausted
            | Code::InvalidArgument
    );
    if !write || (said && refusal) || never_sent(status) {
        Outcome::Refused(why)
    } else {
        Outcome::Unknown(why)
    }
}

fn never_sent(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn service_spec(annotations: Option<Annotations>, image: &str) -> ServiceSpec {
    ServiceSpec {
        annotations,
        task: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    image: image.to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }
            .into(),
        ),
        mode: Some(ServiceMode {
            mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                replicas: Some(0),
            })),
        }),
        ..Default::default()
    }
}

/// The node with another number in its label.
fn labelled(node: &Node, value: u64) -> Result<UpdateNodeRequest> {
    let mut spec = node.spec.clone().context("a node has a spec")?;
    spec.annotations
        .get_or_insert_default()
        .labels
        .insert(LABEL.to_owned(), value.to_string());
    Ok(UpdateNodeRequest {
        node_id: node.id.clone(),
        version: version(node.meta.as_ref()),
        spec: Some(spec),
    })
}

fn version(meta: Option<&Meta>) -> u64 {
    meta.and_then(|meta| meta.version)
        .map_or(0, |version| version.index)
}

fn seen(id: &str, meta: Option<&Meta>, annotations: Option<&Annotations>) -> Option<Seen> {
    Some(Seen {
        value: annotations?.labels.get(LABEL)?.parse().ok()?,
        id: id.to_owned(),
        version: version(meta),
    })
}

fn network_seen(network: &Network) -> Option<Seen> {
    let spec = network.spec.as_ref()?;
    seen(
        &network.id,
        network.meta.as_ref(),
        spec.annotations.as_ref(),
    )
}

fn service_seen(service: &Service) -> Option<Seen> {
    let spec = service.spec.as_ref()?;
    seen(
        &service.id,
        service.meta.as_ref(),
        spec.annotations.as_ref(),
    )
}

fn node_seen(node: &Node) -> Option<Seen> {
    let spec = node.spec.as_ref()?;
    seen(&node.id, node.meta.as_ref(), spec.annotations.as_ref())
}

fn network_name(network: &Network) -> Option<String> {
    Some(network.spec.as_ref()?.annotations.as_ref()?.name.clone())
}

fn service_name(service: &Service) -> Option<String> {
    Some(service.spec.as_ref()?.annotations.as_ref()?.name.clone())
}
