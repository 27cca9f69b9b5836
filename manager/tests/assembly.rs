//! A whole manager on a raft group of one: what is asked of the API comes about.

use std::sync::Arc;

use swarm_manager::clock::system_clock;
use swarm_manager::{Manager, ManagerConfig};
use swarm_proto::NodeId;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::{
    Annotations, ClusterSpec, ContainerSpec, CreateServiceRequest, ListServicesRequest, ObjectKind,
    RemoveServiceRequest, ServiceSpec, Task, TaskSpec, TaskState, WatchAction, WatchRequest,
    object,
};
use swarm_store::testing::{LocalConsensus, cluster, create, node, report};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::{Channel, Server};

struct Bench {
    consensus: Arc<LocalConsensus>,
    manager: Manager,
    client: ControlClient<Channel>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Bench {
    async fn start() -> Self {
        let consensus = LocalConsensus::new();
        // The node is up without an agent: nobody must notice during the test.
        let mut cluster = cluster("c1");
        cluster.spec = Some(ClusterSpec {
            heartbeat_period: Some(prost_types::Duration {
                seconds: 3600,
                nanos: 0,
            }),
            ..Default::default()
        });
        consensus
            .write([create(cluster), create(node("w1", "10.9.0.1"))])
            .expect("apply accepts");
        let manager = Manager::start(ManagerConfig {
            consensus: consensus.clone(),
            node_id: NodeId::from("local"),
            clock: system_clock(),
            connect: Arc::new(|addr| Err(format!("there is no other manager at {addr}"))),
        });
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let addr = listener.local_addr().expect("it is bound");
        let stop = CancellationToken::new();
        let serving = Server::builder()
            .add_routes(manager.routes())
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        let server = tokio::spawn(async move { serving.await.expect("the server runs") });
        let client = ControlClient::connect(format!("http://{addr}"))
            .await
            .expect("the server answers");
        Self {
            consensus,
            manager,
            client,
            stop,
            server,
        }
    }

    async fn create_service(&mut self, name: &str) -> String {
        let spec = ServiceSpec {
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
        };
        let created = self
            .client
            .create_service(CreateServiceRequest { spec: Some(spec) })
            .await
            .expect("the service is accepted");
        created.into_inner().service.expect("it is returned").id
    }

    async fn watch_tasks(&mut self, service_id: &str) -> Streaming<swarm_proto::v1::WatchMessage> {
        self.client
            .watch(WatchRequest {
                kinds: vec![ObjectKind::Task.into()],
                service_ids: vec![service_id.to_owned()],
                ..Default::default()
            })
            .await
            .expect("the watch opens")
            .into_inner()
    }

    async fn stop(self) {
        self.manager.stop().await;
        self.stop.cancel();
        self.server.await.expect("the server ends");
    }
}

/// The first task event that is what the test waits for.
async fn wait_for(
    watch: &mut Streaming<swarm_proto::v1::WatchMessage>,
    is_it: impl Fn(WatchAction, &Task) -> bool,
) -> Task {
    loop {
        let message = watch
            .message()
            .await
            .expect("the watch goes on")
            .expect("the watch has not ended");
        for event in message.events {
            let action = event.action();
            if let Some(object::Object::Task(task)) = event.object.and_then(|o| o.object)
                && is_it(action, &task)
            {
                return task;
            }
        }
    }
}

#[tokio::test]
async fn a_service_that_is_created_gets_a_task_on_a_node_and_loses_it_with_its_removal() {
    let mut bench = Bench::start().await;
    let id = bench.create_service("web").await;
    let mut watch = bench.watch_tasks(&id).await;
    let assigned = wait_for(&mut watch, |_, task| {
        task.status
            .as_ref()
            .is_some_and(|s| s.state() == TaskState::Assigned)
    })
    .await;
    assert_eq!((assigned.node_id.as_str(), assigned.slot), ("w1", 1));

    bench
        .consensus
        .write([report(&assigned.id, TaskState::Running, 10)])
        .expect("apply accepts");
    wait_for(&mut watch, |_, task| {
        task.status
            .as_ref()
            .is_some_and(|s| s.state() == TaskState::Running)
    })
    .await;
    let listed = bench
        .client
        .list_services(ListServicesRequest {
            with_status: true,
            ..Default::default()
        })
        .await
        .expect("the list is answered")
        .into_inner();
    let status = listed.services[0].status.expect("it was asked for");
    assert_eq!((status.running_tasks, status.desired_tasks), (1, 1));

    bench
        .client
        .remove_service(RemoveServiceRequest {
            r#ref: "web".to_owned(),
        })
        .await
        .expect("the removal is accepted");
    wait_for(&mut watch, |action, task| {
        action == WatchAction::Remove || task.desired_state() == TaskState::Remove
    })
    .await;
    bench.stop().await;
}

#[tokio::test]
async fn a_manager_that_stops_ends_its_watches() {
    let mut bench = Bench::start().await;
    let id = bench.create_service("web").await;
    let mut watch = bench.watch_tasks(&id).await;
    let ended = tokio::spawn(async move {
        loop {
            match watch.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status.code()),
            }
        }
    });
    bench.stop().await;
    let code = ended.await.expect("the reader ends");
    assert_eq!(code, Some(tonic::Code::Unavailable));
}
