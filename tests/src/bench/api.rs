//! A manager's API as the bench speaks it: over the local socket of a host, or over mTLS as that
//! host's node. Watches instead of asking again and again, so that measuring costs nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hyper_util::rt::TokioIo;
use swarm_identity::{Identity, KeyStore};
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::{
    Annotations, ContainerSpec, CreateServiceRequest, ListNetworksRequest, NetworkAttachmentConfig,
    ObjectKind, RemoveServiceRequest, ReplicatedMode, Service, ServiceMode, ServiceSpec, TaskSpec,
    TaskState, UpdateServiceRequest, WatchAction, WatchMessage, WatchRequest, object, service_mode,
};
use tokio::net::UnixStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::lab::host_dir;

/// Nothing that is measured takes longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The Control API of one manager.
#[derive(Clone, Debug)]
pub struct Api {
    control: ControlClient<Channel>,
}

impl Api {
    /// Through the local socket of a lab's host.
    #[must_use]
    pub fn local(host: &str) -> Self {
        Self::over(Self::channel(host))
    }

    /// Over any connection to a manager.
    #[must_use]
    pub fn over(channel: Channel) -> Self {
        Self {
            control: ControlClient::new(channel),
        }
    }

    /// The local socket of a lab's host.
    #[must_use]
    pub fn channel(host: &str) -> Channel {
        let path = host_dir(host).join("run/swarm.sock");
        let connector = tower::service_fn(move |_: http::Uri| {
            let path: PathBuf = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://swarmd").connect_with_connector_lazy(connector)
    }

    /// The client itself.
    pub fn control(&mut self) -> &mut ControlClient<Channel> {
        &mut self.control
    }

    /// The ID of a network.
    ///
    /// # Errors
    /// There is none of this name.
    pub async fn network(&mut self, name: &str) -> Result<String> {
        let listed = self.control.list_networks(ListNetworksRequest::default());
        let networks = listed.await?.into_inner().networks;
        let named = |network: &&swarm_proto::v1::Network| {
            let spec = network.spec.as_ref();
            spec.and_then(|spec| spec.annotations.as_ref())
                .is_some_and(|annotations| annotations.name == name)
        };
        let found = networks.iter().find(named);
        Ok(found
            .with_context(|| format!("no network {name}"))?
            .id
            .clone())
    }

    /// Creates a service.
    ///
    /// # Errors
    /// It is refused.
    pub async fn create(&mut self, spec: ServiceSpec) -> Result<Service> {
        let request = CreateServiceRequest { spec: Some(spec) };
        let created = self.control.create_service(request).await?.into_inner();
        created.service.context("a service")
    }

    /// Follows all tasks from now on.
    ///
    /// # Errors
    /// The manager does not answer.
    pub async fn tasks(&mut self) -> Result<Tasks> {
        let request = WatchRequest {
            kinds: vec![ObjectKind::Task.into()],
            ..WatchRequest::default()
        };
        let mut tasks = Tasks {
            watch: self.control.watch(request).await?.into_inner(),
            running: BTreeMap::new(),
        };
        while !tasks.next().await? {}
        Ok(tasks)
    }

    /// Removes a service.
    ///
    /// # Errors
    /// It is refused.
    pub async fn remove(&mut self, service: &str) -> Result<()> {
        let request = RemoveServiceRequest {
            r#ref: service.to_owned(),
        };
        self.control.remove_service(request).await?;
        Ok(())
    }

    /// Writes a service's spec, expecting its version.
    ///
    /// # Errors
    /// It is refused, or its outcome is not known.
    pub async fn update(&mut self, service: &Service) -> Result<Service, tonic::Status> {
        let version = service.meta.as_ref().and_then(|meta| meta.version);
        let request = UpdateServiceRequest {
            service_id: service.id.clone(),
            version: version.unwrap_or_default().index,
            spec: service.spec.clone(),
        };
        Ok(self.control.update_service(request).await?.into_inner())
    }
}

/// The running tasks of the cluster, followed by a watch.
#[derive(Debug)]
pub struct Tasks {
    watch: Streaming<WatchMessage>,
    /// Task → name of its service, and its node.
    running: BTreeMap<String, (String, String)>,
}

impl Tasks {
    /// Takes one message in; true if it ends the snapshot.
    async fn next(&mut self) -> Result<bool> {
        let message = self.watch.message().await?;
        let message = message.context("the manager has ended the watch")?;
        for event in message.events {
            let removed = event.action() == WatchAction::Remove;
            let Some(object::Object::Task(task)) = event.object.and_then(|o| o.object) else {
                continue;
            };
            let observed = task.status.as_ref().map(|status| status.state());
            let runs = task.desired_state() == TaskState::Running
                && observed == Some(TaskState::Running)
                && !removed;
            if runs {
                let service = task.service_annotations.map(|a| a.name.clone());
                let service = service.unwrap_or_default();
                self.running.insert(task.id, (service, task.node_id));
            } else {
                self.running.remove(&task.id);
            }
        }
        Ok(message.snapshot_done)
    }

    /// Returns when the nodes of a service's running tasks are as wanted.
    ///
    /// # Errors
    /// Not in time.
    pub async fn until(&mut self, service: &str, wanted: impl Fn(&[&str]) -> bool) -> Result<()> {
        let wait = async {
            loop {
                let of_service = self.running.values().filter(|(name, _)| name == service);
                let nodes: Vec<&str> = of_service.map(|(_, node)| node.as_str()).collect();
                if wanted(&nodes) {
                    return Ok(());
                }
                self.next().await?;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .with_context(|| format!("the tasks of {service} do not run as they should"))?
    }
}

/// The node of a lab's host, as its own certificate says: what it may, the bench may.
///
/// # Errors
/// The host is in no cluster.
pub fn identity_of(host: &str) -> Result<Arc<Identity>> {
    let store = KeyStore::new(host_dir(host).join("lib/certificates"));
    let stored = store.load()?;
    let stored = stored.with_context(|| format!("{host} has no certificate"))?;
    Ok(Identity::new(stored.material)?)
}

/// A service of so many replicas of an image, on a network.
#[must_use]
pub fn service(name: &str, replicas: u64, image: &str, networks: &[&str]) -> ServiceSpec {
    ServiceSpec {
        annotations: Some(Annotations {
            name: name.to_owned(),
            ..Annotations::default()
        }),
        task: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    image: image.to_owned(),
                    ..ContainerSpec::default()
                }),
                networks: networks
                    .iter()
                    .map(|&target| NetworkAttachmentConfig {
                        target: target.to_owned(),
                        ..NetworkAttachmentConfig::default()
                    })
                    .collect(),
                ..TaskSpec::default()
            }
            .into(),
        ),
        mode: Some(ServiceMode {
            mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                replicas: Some(replicas),
            })),
        }),
        ..ServiceSpec::default()
    }
}

/// Gives a service's spec a label of this value.
///
/// # Errors
/// It has no spec.
pub fn relabel(service: &mut Service, value: String) -> Result<()> {
    let spec = service.spec.as_mut().context("a spec")?;
    let annotations = spec.annotations.as_mut().context("a name")?;
    ensure!(!annotations.name.is_empty(), "a name");
    annotations.labels.insert("value".to_owned(), value);
    Ok(())
}
