//! A Control API on a raft group of one, and short ways to ask it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use swarm_identity::{JoinToken, RootCa};
use swarm_proto::NodeId;
use swarm_proto::v1::{
    self, Annotations, Cluster, ContainerSpec, CreateServiceRequest, JoinTokens, Object, Service,
    ServiceSpec, StoreAction, TaskSpec, object,
};
use swarm_store::Consensus as _;
use swarm_store::testing::{LocalConsensus, create};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Control;

pub(super) struct Bench {
    pub(super) consensus: Arc<LocalConsensus>,
    pub(super) control: Control,
}

impl Bench {
    /// With a cluster that has a root and tokens.
    pub(super) fn new() -> Self {
        let consensus = LocalConsensus::new();
        let control = Control::new(
            consensus.clone(),
            NodeId::from("local"),
            Arc::new(|| Duration::from_secs(1_000_000)),
            CancellationToken::new(),
        );
        let bench = Self { consensus, control };
        bench.write([create(cluster("c1"))]);
        bench
    }

    pub(super) fn write(&self, actions: impl IntoIterator<Item = StoreAction>) {
        self.consensus.write(actions).expect("apply accepts");
    }

    pub(super) async fn create_service(&self, spec: ServiceSpec) -> Result<Service, Status> {
        let request = CreateServiceRequest { spec: Some(spec) };
        let response = self.control.create_service(request).await?;
        Ok(response.service.expect("a created service is returned"))
    }

    /// Every object with its version: what must not change when something is refused.
    pub(super) fn objects(&self) -> Vec<Object> {
        let state = self.consensus.store().state();
        let wrap = |object| Object {
            object: Some(object),
        };
        let mut all = Vec::new();
        all.extend(
            state
                .cluster()
                .map(|o| wrap(object::Object::Cluster((**o).clone()))),
        );
        all.extend(
            state
                .nodes()
                .map(|o| wrap(object::Object::Node((**o).clone()))),
        );
        all.extend(
            state
                .services()
                .map(|o| wrap(object::Object::Service((**o).clone()))),
        );
        all.extend(
            state
                .tasks()
                .map(|o| wrap(object::Object::Task((**o).clone()))),
        );
        all.extend(
            state
                .networks()
                .map(|o| wrap(object::Object::Network((**o).clone()))),
        );
        all
    }
}

pub(super) fn cluster(id: &str) -> Cluster {
    let root = RootCa::create(SystemTime::now()).expect("a root can be made");
    let token = || JoinToken::generate(&root.digest()).as_str().to_owned();
    Cluster {
        root_ca: Some(v1::RootCa {
            cert_pem: root.cert_pem().as_bytes().to_vec().into(),
            key_pem: root.key_pem().as_bytes().to_vec().into(),
            digest: root.digest().to_string(),
            join_tokens: Some(JoinTokens {
                worker: token(),
                manager: token(),
            }),
        }),
        ..swarm_store::testing::cluster(id)
    }
}

pub(super) fn service_spec(name: &str) -> ServiceSpec {
    ServiceSpec {
        annotations: Some(Annotations {
            name: name.to_owned(),
            ..Default::default()
        }),
        task: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    image: "nginx".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }
            .into(),
        ),
        ..Default::default()
    }
}
