//! Clients of the Control API, and what each of them knows for certain.
//!
//! A client owns the objects whose names begin with its own, so that it can say what each must
//! hold: the last write that was acknowledged, or one of those after it whose outcome is not
//! known. A read that begins after an acknowledged write must see it, on whichever manager.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use swarm_identity::Identity;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::service_mode::Mode;
use swarm_proto::v1::{
    Annotations, ContainerSpec, CreateNetworkRequest, CreateServiceRequest, EndpointSpec,
    FailureAction, GetNetworkRequest, GetServiceRequest, GlobalMode, IpamOptions, IpamPool,
    ListNodesRequest, NetworkAttachmentConfig, NetworkSpec, Node, NodeAvailability, NodeRole,
    NodeSpec, Placement, PortConfig, PublishMode, RemoveNetworkRequest, RemoveNodeRequest,
    RemoveServiceRequest, ReplicatedMode, RestartPolicy, RotateJoinTokenRequest, Service,
    ServiceMode, ServiceSpec, TaskSpec, UpdateConfig, UpdateNodeRequest, UpdateOrder,
    UpdateServiceRequest, WatchRequest,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::check;
use crate::dice::Dice;
use crate::machine::addr_of;
use crate::seams::SimNet;
use crate::world::{self, HostId, SECOND};

/// A caller's patience with one request.
const PATIENCE: Duration = Duration::from_secs(8);
/// Objects of a kind that one client has at most.
const OWNED_MAX: usize = 6;
/// Sizes of small networks, and how many replicas a service on one has at most: there is room for all of
/// one client's services with their virtual addresses, though not for all updates at once. So tasks wait for
/// addresses that others are about to give back.
const SMALL: [(u8, u64); 2] = [(27, 2), (28, 1)];
/// Machines at most if global services are on networks: one of the default size has 61 addresses.
const GLOBAL_MAX: u64 = 8;

/// What became of requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Acknowledged writes.
    pub acknowledged: u64,
    /// Writes that were refused.
    pub refused: u64,
    /// Writes of unknown outcome.
    pub unknown: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Messages of watches.
    pub watched: u64,
    /// Watches that went on from where another ended.
    pub resumed: u64,
}

thread_local! {
    static COUNTS: RefCell<Counts> = RefCell::default();
    static DONE: RefCell<BTreeMap<String, bool>> = RefCell::default();
}

/// What became of requests so far.
pub fn counts() -> Counts {
    COUNTS.with(|counts| *counts.borrow())
}

fn count(change: impl FnOnce(&mut Counts)) {
    COUNTS.with(|counts| change(&mut counts.borrow_mut()));
}

/// Whether every client has verified all it knows.
pub fn all_verified() -> bool {
    DONE.with(|done| done.borrow().values().all(|done| *done))
}

/// Who has not verified all yet.
pub fn unverified() -> Vec<String> {
    DONE.with(|done| {
        let done = done.borrow();
        let open = done.iter().filter(|(_, done)| !**done);
        open.map(|(name, _)| name.clone()).collect()
    })
}

/// What a client does.
#[derive(Clone, Copy, Debug)]
enum Deed {
    CreateService,
    UpdateService,
    RemoveService,
    ReadService,
    CreateNetwork,
    RemoveNetwork,
    ReadNetwork,
    RotateToken,
}

/// How often each of them comes, at first.
const DEEDS: [(Deed, u64); 8] = [
    (Deed::CreateService, 25),
    (Deed::UpdateService, 25),
    (Deed::RemoveService, 12),
    (Deed::ReadService, 12),
    (Deed::CreateNetwork, 8),
    (Deed::RemoveNetwork, 6),
    (Deed::ReadNetwork, 7),
    (Deed::RotateToken, 5),
];

/// What a client knows of one object. Marks are numbers that its writes carry.
#[derive(Debug, Default)]
struct Owned {
    /// The mark of the newest write known to have happened; 0: none is.
    known: u64,
    /// Marks of later writes of unknown outcome.
    maybe: Vec<u64>,
    /// A removal was tried.
    maybe_removed: bool,
    /// A removal was acknowledged.
    removed: bool,
    id: String,
    version: u64,
    /// Of a small network, whose addresses are soon given out again: replicas of a service on it at most.
    replicas_max: Option<u64>,
}

impl Owned {
    fn acknowledged(&mut self, mark: u64) {
        self.known = mark;
        self.maybe.clear();
    }

    /// What is there now, if that can be.
    fn saw(&mut self, mark: Option<u64>) -> Result<(), String> {
        match mark {
            None if self.maybe_removed || self.removed || self.known == 0 => {
                if self.known != 0 {
                    self.removed = true;
                }
                Ok(())
            }
            None => Err(format!("write {} was acknowledged and is gone", self.known)),
            Some(_) if self.removed => Err("it was removed and is back".to_owned()),
            Some(mark) if mark == self.known => Ok(()),
            Some(mark) => match self.maybe.iter().position(|maybe| *maybe == mark) {
                Some(at) => {
                    self.known = mark;
                    self.maybe.drain(..=at);
                    Ok(())
                }
                None => Err(format!(
                    "it holds write {mark}, where {} was acknowledged and {:?} are not known",
                    self.known, self.maybe
                )),
            },
        }
    }
}

enum Outcome<T> {
    Done(T),
    Refused(Status),
    Unknown,
}

/// One client.
pub struct Client {
    name: String,
    dice: Dice,
    /// Puts all services on one network, if it has a small one, where addresses come back soon.
    crowds: bool,
    /// How often it does what.
    deeds: Vec<(Deed, u64)>,
    identity: Option<Arc<Identity>>,
    channels: BTreeMap<HostId, Channel>,
    services: BTreeMap<String, Owned>,
    networks: BTreeMap<String, Owned>,
    made: u64,
    marks: u64,
}

impl Client {
    /// A client of this name.
    pub fn new(seed: u64, name: &str) -> Self {
        DONE.with(|done| done.borrow_mut().insert(name.to_owned(), false));
        let mut dice = Dice::new(seed, name);
        Self {
            name: name.to_owned(),
            deeds: dice.stress(&DEEDS),
            crowds: dice.once_in(2),
            dice,
            identity: None,
            channels: BTreeMap::new(),
            services: BTreeMap::new(),
            networks: BTreeMap::new(),
            made: 0,
            marks: 0,
        }
    }

    /// Does what users do until the plan says to stop, then verifies all that is known.
    pub async fn run(mut self) {
        while !crate::plan::healing() {
            self.one().await;
            let pause = self.dice.around(crate::plan::client_pause());
            world::sleep(pause).await;
        }
        let mut open: Vec<(bool, String)> = Vec::new();
        open.extend(self.services.keys().map(|name| (true, name.clone())));
        open.extend(self.networks.keys().map(|name| (false, name.clone())));
        while let Some((service, name)) = open.pop() {
            let known = if service {
                self.read_service(&name).await
            } else {
                self.read_network(&name).await
            };
            if !known {
                open.push((service, name));
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        }
        DONE.with(|done| done.borrow_mut().insert(self.name.clone(), true));
        std::future::pending::<()>().await;
    }

    /// Does what administrators do, and what they must after machines were lost.
    pub async fn administer(mut self) {
        loop {
            let healing = crate::plan::healing();
            let outcome =
                self.call(|mut client| async move {
                    client.list_nodes(ListNodesRequest::default()).await
                })
                .await;
            if let Outcome::Done(list) = outcome {
                let busy = self.tidy(&list.nodes).await;
                self.dismiss(&list.nodes).await;
                if healing {
                    let open = self.activate(&list.nodes).await;
                    let done = !open && !busy;
                    DONE.with(|known| known.borrow_mut().insert(self.name.clone(), done));
                } else if !busy {
                    self.change_node(&list.nodes).await;
                }
            }
            let pause = if healing { SECOND } else { 2 * SECOND };
            let pause = self.dice.around(pause);
            world::sleep(pause).await;
        }
    }

    /// Takes out nodes whose machine is another node by now. Whether there are any.
    async fn tidy(&mut self, nodes: &[Node]) -> bool {
        let Some(state) = check::newest() else {
            return false;
        };
        let stale = crate::plan::stale(&state);
        for node in &stale {
            let Some(listed) = nodes.iter().find(|listed| listed.id == node.id) else {
                continue;
            };
            let spec = listed.spec.clone().unwrap_or_default();
            if spec.desired_role() == NodeRole::Manager {
                let spec = NodeSpec {
                    desired_role: NodeRole::Worker.into(),
                    ..spec
                };
                self.update_node(listed, spec).await;
            } else {
                let request = RemoveNodeRequest {
                    r#ref: listed.id.clone(),
                    force: true,
                };
                self.write(|mut client| async move { client.remove_node(request).await })
                    .await;
            }
        }
        !stale.is_empty()
    }

    /// Removes a worker that lives, if one is to be.
    async fn dismiss(&mut self, nodes: &[Node]) {
        let Some(id) = crate::plan::dismissed() else {
            return;
        };
        let worker = nodes.iter().find(|node| {
            let spec = node.spec.as_ref();
            node.id == id && spec.is_some_and(|spec| spec.desired_role() == NodeRole::Worker)
        });
        if worker.is_some() {
            let request = RemoveNodeRequest {
                r#ref: id,
                force: true,
            };
            self.write(|mut client| async move { client.remove_node(request).await })
                .await;
        }
    }

    async fn update_node(&mut self, node: &Node, spec: NodeSpec) {
        let version = node.meta.as_ref().and_then(|meta| meta.version.as_ref());
        let request = UpdateNodeRequest {
            node_id: node.id.clone(),
            version: version.map_or(0, |version| version.index),
            spec: Some(spec),
        };
        self.write(|mut client| async move { client.update_node(request).await })
            .await;
    }

    /// Whether some node was not active.
    async fn activate(&mut self, nodes: &[Node]) -> bool {
        let mut open = false;
        for node in nodes {
            let spec = node.spec.clone().unwrap_or_default();
            if spec.availability() != NodeAvailability::Active {
                open = true;
                let spec = NodeSpec {
                    availability: NodeAvailability::Active.into(),
                    ..spec
                };
                self.update_node(node, spec).await;
            }
        }
        open
    }

    async fn change_node(&mut self, nodes: &[Node]) {
        let Some(node) = self.dice.pick(nodes).cloned() else {
            return;
        };
        let mut spec = node.spec.clone().unwrap_or_default();
        let managers = nodes.iter().filter(|node| {
            let spec = node.spec.as_ref();
            spec.is_some_and(|spec| spec.desired_role() == NodeRole::Manager)
        });
        let managers = managers.count();
        match self.dice.below(100) {
            0..40 => {
                let all = [
                    NodeAvailability::Active,
                    NodeAvailability::Active,
                    NodeAvailability::Pause,
                    NodeAvailability::Drain,
                ];
                let chosen = self.dice.pick(&all).copied().unwrap_or_default();
                spec.set_availability(chosen);
            }
            40..55 => {
                let value = self.dice.below(3).to_string();
                let annotations = spec.annotations.get_or_insert_default();
                annotations.labels.insert("zone".to_owned(), value);
            }
            55..75 if spec.desired_role() == NodeRole::Worker && managers < 5 => {
                spec.set_desired_role(NodeRole::Manager);
            }
            75..95 if spec.desired_role() == NodeRole::Manager && managers > 3 => {
                spec.set_desired_role(NodeRole::Worker);
            }
            _ => return,
        }
        self.update_node(&node, spec).await;
    }

    fn control(&mut self) -> Option<ControlClient<Channel>> {
        if self.identity.is_none() {
            self.identity = Identity::on(check::material()?, SimNet::shared()).ok();
        }
        let identity = self.identity.clone()?;
        let managers = crate::plan::managers();
        let host = *self.dice.pick(&managers)?;
        if self.dice.once_in(10) {
            self.channels.remove(&host);
        }
        let channel = match self.channels.get(&host) {
            Some(channel) => channel.clone(),
            None => {
                let channel = identity.channel(&addr_of(host)).ok()?;
                self.channels.insert(host, channel.clone());
                channel
            }
        };
        Some(ControlClient::new(channel))
    }

    async fn call<T, F>(&mut self, call: impl FnOnce(ControlClient<Channel>) -> F) -> Outcome<T>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let Some(client) = self.control() else {
            return Outcome::Unknown;
        };
        let answer = tokio::time::timeout(PATIENCE, call(client)).await;
        self.judge(answer)
    }

    fn judge<T>(
        &mut self,
        answer: Result<Result<tonic::Response<T>, Status>, tokio::time::error::Elapsed>,
    ) -> Outcome<T> {
        match answer {
            Ok(Ok(answer)) => Outcome::Done(answer.into_inner()),
            Ok(Err(status)) => match status.code() {
                Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::FailedPrecondition
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::OutOfRange
                | Code::ResourceExhausted
                | Code::Unimplemented => {
                    if matches!(
                        status.code(),
                        Code::PermissionDenied | Code::Unauthenticated
                    ) {
                        // The manager whose certificate this is may be none any more.
                        self.identity = None;
                        self.channels.clear();
                    }
                    Outcome::Refused(status)
                }
                _ => Outcome::Unknown,
            },
            Err(_) => Outcome::Unknown,
        }
    }

    async fn write<T, F>(&mut self, call: impl FnOnce(ControlClient<Channel>) -> F) -> Outcome<T>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let outcome = self.call(call).await;
        self.wrote(&outcome);
        outcome
    }

    fn wrote<T>(&self, outcome: &Outcome<T>) {
        count(|counts| match outcome {
            Outcome::Done(_) => counts.acknowledged += 1,
            Outcome::Refused(_) => counts.refused += 1,
            Outcome::Unknown => counts.unknown += 1,
        });
        if let Outcome::Refused(status) = outcome {
            tracing::debug!(client = self.name, %status, "refused");
        }
    }

    async fn one(&mut self) {
        match self.dice.weighted(&self.deeds) {
            Deed::CreateService => self.create_service().await,
            Deed::UpdateService => self.update_service().await,
            Deed::RemoveService => self.remove_service().await,
            Deed::ReadService => {
                let names: Vec<String> = self.services.keys().cloned().collect();
                if let Some(name) = self.dice.pick(&names).cloned() {
                    self.read_service(&name).await;
                }
            }
            Deed::CreateNetwork => self.create_network().await,
            Deed::RemoveNetwork => self.remove_network().await,
            Deed::ReadNetwork => {
                let names: Vec<String> = self.networks.keys().cloned().collect();
                if let Some(name) = self.dice.pick(&names).cloned() {
                    self.read_network(&name).await;
                }
            }
            Deed::RotateToken => {
                let role = self.dice.below(2) as i32;
                let request = RotateJoinTokenRequest { role };
                self.write(|mut client| async move { client.rotate_join_token(request).await })
                    .await;
            }
        }
    }

    fn mark(&mut self) -> u64 {
        self.marks += 1;
        self.marks
    }

    fn spec(&mut self, name: &str, mark: u64, global: bool) -> ServiceSpec {
        let live: Vec<String> = self
            .networks
            .iter()
            .filter(|(_, owned)| !owned.maybe_removed && owned.known != 0)
            .map(|(name, _)| name.clone())
            .collect();
        let small = |name: &&String| self.networks[*name].replicas_max.is_some();
        let crowded = live.iter().find(small).filter(|_| self.crowds);
        let mut networks = Vec::new();
        let mut replicas_max = 6;
        if self.dice.below(4) != 0
            && let Some(target) = crowded.or(self.dice.pick(&live))
        {
            let small = self.networks.get(target).and_then(|it| it.replicas_max);
            replicas_max = small.unwrap_or(replicas_max);
            // One on each node, of all such services: there must be an address for each.
            if !(global && (small.is_some() || crate::plan::machines() > GLOBAL_MAX)) {
                networks.push(NetworkAttachmentConfig {
                    target: target.clone(),
                    ..Default::default()
                });
            }
        }
        let mode = if global {
            Mode::Global(GlobalMode {})
        } else {
            Mode::Replicated(ReplicatedMode {
                replicas: Some(self.dice.between(0, replicas_max)),
            })
        };
        let order = if self.dice.once_in(4) {
            UpdateOrder::StartFirst
        } else {
            UpdateOrder::StopFirst
        };
        let machines = crate::plan::machines();
        let constraint = self.dice.once_in(5);
        let constraint =
            constraint.then(|| format!("node.hostname != h{}", self.dice.below(machines)));
        let port = (!global && self.dice.once_in(5)).then(|| PortConfig {
            target_port: 80,
            // One per service: how many there are must not decide whether all can be placed.
            published_port: self.port_of(name),
            publish_mode: PublishMode::Host.into(),
            ..Default::default()
        });
        let mode = match (mode, &port) {
            // Nodes enough, also while an update starts first, and with one node excluded.
            (Mode::Replicated(_), Some(_)) => Mode::Replicated(ReplicatedMode {
                replicas: Some(self.dice.between(0, 1)),
            }),
            (mode, _) => mode,
        };
        ServiceSpec {
            annotations: Some(Annotations {
                name: name.to_owned(),
                labels: [("mark".to_owned(), mark.to_string())].into(),
            }),
            task: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        image: format!("registry.example/app:{}", self.dice.below(3)),
                        ..Default::default()
                    }),
                    restart: Some(RestartPolicy {
                        delay: Some(duration(self.dice.between(50, 1500))),
                        ..Default::default()
                    }),
                    networks,
                    force_update: self.dice.below(3),
                    placement: constraint.map(|constraint| Placement {
                        constraints: vec![constraint],
                        ..Default::default()
                    }),
                    ..Default::default()
                }
                .into(),
            ),
            endpoint: port.map(|port| EndpointSpec {
                ports: vec![port],
                ..Default::default()
            }),
            mode: Some(ServiceMode { mode: Some(mode) }),
            update: Some(UpdateConfig {
                parallelism: self.dice.between(0, 2),
                order: order.into(),
                monitor: Some(duration(500)),
                failure_action: FailureAction::Continue.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn port_of(&self, name: &str) -> u32 {
        let hash = world::digest(name.as_bytes());
        1024 + (hash % 60_000) as u32
    }

    async fn create_service(&mut self) {
        if self
            .services
            .values()
            .filter(|owned| !owned.removed)
            .count()
            >= OWNED_MAX
        {
            return;
        }
        self.made += 1;
        let name = format!("{}-s{}", self.name, self.made);
        let mark = self.mark();
        let global = self.dice.once_in(5);
        let spec = Some(self.spec(&name, mark, global));
        self.services.insert(
            name.clone(),
            Owned {
                maybe: vec![mark],
                ..Owned::default()
            },
        );
        let outcome = self
            .write(|mut client| async move {
                client.create_service(CreateServiceRequest { spec }).await
            })
            .await;
        match outcome {
            Outcome::Done(answer) => self.learn(&name, mark, answer.service),
            Outcome::Refused(_) => {
                self.services.remove(&name);
            }
            Outcome::Unknown => {}
        }
    }

    fn learn(&mut self, name: &str, mark: u64, service: Option<Service>) {
        let Some(owned) = self.services.get_mut(name) else {
            return;
        };
        owned.acknowledged(mark);
        if let Some(service) = service {
            let version = version_of(&service);
            if version < owned.version {
                check::complain(format!(
                    "the version of {name} went back from {} to {version}",
                    owned.version
                ));
            }
            owned.version = version;
            owned.id = service.id;
        }
    }

    async fn update_service(&mut self) {
        let names: Vec<String> = self
            .services
            .iter()
            .filter(|(_, owned)| !owned.removed && !owned.maybe_removed)
            .map(|(name, _)| name.clone())
            .collect();
        let Some(name) = self.dice.pick(&names).cloned() else {
            return;
        };
        let reference = name.clone();
        let Outcome::Done(now) = self
            .call(|mut client| async move {
                client
                    .get_service(GetServiceRequest { r#ref: reference })
                    .await
            })
            .await
        else {
            return;
        };
        let mark = self.mark();
        let mode = now.spec.as_ref().and_then(|spec| spec.mode.as_ref());
        let global = matches!(mode.and_then(|mode| mode.mode), Some(Mode::Global(_)));
        if self.dice.once_in(5) {
            return self.update_twice(&name, now, global).await;
        }
        let stale = self.dice.once_in(12);
        let version = version_of(&now).saturating_sub(u64::from(stale));
        let request = UpdateServiceRequest {
            service_id: now.id,
            version,
            spec: Some(self.spec(&name, mark, global)),
        };
        if let Some(owned) = self.services.get_mut(&name) {
            owned.maybe.push(mark);
        }
        let outcome = self
            .write(|mut client| async move { client.update_service(request).await })
            .await;
        match outcome {
            Outcome::Done(_) if stale => {
                check::complain(format!("{name}: an update of an old version was taken"));
            }
            Outcome::Done(service) => self.learn(&name, mark, Some(service)),
            Outcome::Refused(_) => {
                if let Some(owned) = self.services.get_mut(&name) {
                    owned.maybe.retain(|maybe| *maybe != mark);
                }
            }
            Outcome::Unknown => {}
        }
    }

    /// Two updates from one version at the same time, from any two managers: one is taken at most.
    async fn update_twice(&mut self, name: &str, now: Service, global: bool) {
        let (one, other) = (self.mark(), self.mark());
        let mut request = |mark| UpdateServiceRequest {
            service_id: now.id.clone(),
            version: version_of(&now),
            spec: Some(self.spec(name, mark, global)),
        };
        let (first, second) = (request(one), request(other));
        let (Some(mut left), Some(mut right)) = (self.control(), self.control()) else {
            return;
        };
        if let Some(owned) = self.services.get_mut(name) {
            owned.maybe.extend([one, other]);
        }
        let (left, right) = futures::future::join(
            tokio::time::timeout(PATIENCE, left.update_service(first)),
            tokio::time::timeout(PATIENCE, right.update_service(second)),
        )
        .await;
        let outcomes = [(one, self.judge(left)), (other, self.judge(right))];
        let taken = |(_, outcome): &&(u64, Outcome<Service>)| matches!(outcome, Outcome::Done(_));
        if outcomes.iter().filter(taken).count() > 1 {
            check::complain(format!("{name}: two updates from one version were taken"));
        }
        for (mark, outcome) in outcomes {
            self.wrote(&outcome);
            match outcome {
                Outcome::Done(service) => self.learn(name, mark, Some(service)),
                Outcome::Refused(_) => {
                    if let Some(owned) = self.services.get_mut(name) {
                        owned.maybe.retain(|maybe| *maybe != mark);
                    }
                }
                Outcome::Unknown => {}
            }
        }
    }

    async fn remove_service(&mut self) {
        let names: Vec<String> = self
            .services
            .iter()
            .filter(|(_, owned)| !owned.removed)
            .map(|(name, _)| name.clone())
            .collect();
        let Some(name) = self.dice.pick(&names).cloned() else {
            return;
        };
        let before = match self.services.get_mut(&name) {
            Some(owned) => std::mem::replace(&mut owned.maybe_removed, true),
            None => return,
        };
        let reference = name.clone();
        let outcome = self
            .write(|mut client| async move {
                client
                    .remove_service(RemoveServiceRequest { r#ref: reference })
                    .await
            })
            .await;
        let Some(owned) = self.services.get_mut(&name) else {
            return;
        };
        match outcome {
            Outcome::Done(_) => owned.removed = true,
            Outcome::Refused(status) if status.code() == Code::NotFound => {
                let mark = None;
                owned.maybe_removed = before;
                self.saw_service(&name, mark);
            }
            Outcome::Refused(_) => owned.maybe_removed = before,
            Outcome::Unknown => {}
        }
    }

    fn saw_service(&mut self, name: &str, mark: Option<u64>) {
        if let Some(owned) = self.services.get_mut(name)
            && let Err(reason) = owned.saw(mark)
        {
            check::complain(format!("service {name}: {reason}"));
        }
    }

    /// False if there was no answer.
    async fn read_service(&mut self, name: &str) -> bool {
        let reference = name.to_owned();
        let outcome = self
            .call(|mut client| async move {
                client
                    .get_service(GetServiceRequest { r#ref: reference })
                    .await
            })
            .await;
        let mark = match outcome {
            Outcome::Done(service) => {
                let annotations = service.spec.and_then(|spec| spec.annotations);
                annotations.and_then(|found| found.labels.get("mark")?.parse().ok())
            }
            Outcome::Refused(status) if status.code() == Code::NotFound => None,
            _ => return false,
        };
        count(|counts| counts.reads += 1);
        self.saw_service(name, mark);
        true
    }

    async fn create_network(&mut self) {
        if self
            .networks
            .values()
            .filter(|owned| !owned.removed)
            .count()
            >= OWNED_MAX
        {
            return;
        }
        self.made += 1;
        let name = format!("{}-n{}", self.name, self.made);
        let mark = self.mark();
        let small = self
            .dice
            .once_in(2)
            .then(|| SMALL[self.dice.below(2) as usize]);
        // In the cluster's pool, and now and then one that somebody else has.
        let place = self.dice.below(2048);
        let length = small.map_or(0, |(length, _)| length);
        let subnet = format!("10.0.{}.{}/{length}", place / 8, place % 8 * 32);
        let pool = IpamPool {
            subnet,
            ..Default::default()
        };
        let spec = Some(NetworkSpec {
            annotations: Some(Annotations {
                name: name.clone(),
                labels: [("mark".to_owned(), mark.to_string())].into(),
            }),
            driver: "overlay".to_owned(),
            internal: self.dice.once_in(4),
            ipam: small.map(|_| IpamOptions {
                configs: vec![pool],
                ..Default::default()
            }),
            ..Default::default()
        });
        self.networks.insert(
            name.clone(),
            Owned {
                maybe: vec![mark],
                replicas_max: small.map(|(_, most)| most),
                ..Owned::default()
            },
        );
        let outcome = self
            .write(|mut client| async move {
                client.create_network(CreateNetworkRequest { spec }).await
            })
            .await;
        match outcome {
            Outcome::Done(network) => {
                if let Some(owned) = self.networks.get_mut(&name) {
                    owned.acknowledged(mark);
                    owned.id = network.id;
                }
            }
            Outcome::Refused(_) => {
                self.networks.remove(&name);
            }
            Outcome::Unknown => {}
        }
    }

    async fn remove_network(&mut self) {
        let names: Vec<String> = self
            .networks
            .iter()
            .filter(|(_, owned)| !owned.removed)
            .map(|(name, _)| name.clone())
            .collect();
        let Some(name) = self.dice.pick(&names).cloned() else {
            return;
        };
        let before = match self.networks.get_mut(&name) {
            Some(owned) => std::mem::replace(&mut owned.maybe_removed, true),
            None => return,
        };
        let reference = name.clone();
        let outcome = self
            .write(|mut client| async move {
                client
                    .remove_network(RemoveNetworkRequest { r#ref: reference })
                    .await
            })
            .await;
        let Some(owned) = self.networks.get_mut(&name) else {
            return;
        };
        match outcome {
            Outcome::Done(_) => owned.removed = true,
            Outcome::Refused(_) => owned.maybe_removed = before,
            Outcome::Unknown => {}
        }
    }

    async fn read_network(&mut self, name: &str) -> bool {
        let request = GetNetworkRequest {
            r#ref: name.to_owned(),
            verbose: false,
        };
        let outcome = self
            .call(|mut client| async move { client.get_network(request).await })
            .await;
        let mark = match outcome {
            Outcome::Done(detail) => {
                let spec = detail.network.and_then(|network| network.spec);
                let annotations = spec.and_then(|spec| spec.annotations);
                annotations.and_then(|found| found.labels.get("mark")?.parse().ok())
            }
            Outcome::Refused(status) if status.code() == Code::NotFound => None,
            _ => return false,
        };
        count(|counts| counts.reads += 1);
        if let Some(owned) = self.networks.get_mut(name)
            && let Err(reason) = owned.saw(mark)
        {
            check::complain(format!("network {name}: {reason}"));
        }
        true
    }

    /// Watches everything, from whichever manager, and goes on where another watch ended.
    pub async fn watch(mut self) {
        DONE.with(|done| done.borrow_mut().remove(&self.name));
        let mut from = 0;
        loop {
            let request = WatchRequest {
                resume_from: from,
                ..Default::default()
            };
            let Outcome::Done(mut stream) = (match self
                .call(|mut client| async move { client.watch(request).await })
                .await
            {
                Outcome::Refused(status) if status.code() == Code::OutOfRange => {
                    // Forgotten, or not reached: a snapshot.
                    from = 0;
                    continue;
                }
                outcome => outcome,
            }) else {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            };
            if from > 0 {
                count(|counts| counts.resumed += 1);
            }
            let mut complete = from > 0;
            let mut part = Vec::new();
            let ends = self.dice.between(1, 60);
            for _ in 0..ends {
                let message = tokio::time::timeout(Duration::from_secs(20), stream.message());
                let Ok(Ok(Some(message))) = message.await else {
                    break;
                };
                count(|counts| counts.watched += 1);
                if message.snapshot_done {
                    complete = true;
                    from = message.index;
                    continue;
                }
                if !complete {
                    continue;
                }
                let events = message
                    .events
                    .into_iter()
                    .filter_map(|event| Some((event.action() as i32, event.object?)));
                part.extend(events);
                if message.index == from {
                    continue;
                }
                // The index below an entry's says that more of the entry follows.
                if let Some(whole) = check::watched(from, message.index, &part) {
                    from = message.index;
                    part.clear();
                    if let Err(reason) = whole {
                        check::complain(format!("{}: {reason}", self.name));
                    }
                }
            }
            if self.dice.once_in(20) {
                from = 0;
            }
        }
    }
}

fn version_of(service: &Service) -> u64 {
    let meta = service.meta.as_ref();
    meta.and_then(|meta| meta.version.as_ref())
        .map_or(0, |version| version.index)
}

fn duration(millis: u64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: (millis / 1000) as i64,
        nanos: (millis % 1000) as i32 * 1_000_000,
    }
}
