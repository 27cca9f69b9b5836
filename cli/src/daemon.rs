//! The connection to swarmd: gRPC over its local socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::node_local_client::NodeLocalClient;
use swarm_proto::v1::{
    InfoRequest, InfoResponse, ListNetworksRequest, ListNodesRequest, ListServicesRequest,
    ListTasksRequest, Network, Node, NodeRole, Service, Task,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::failure::{Failure, Result};

/// Most objects of one page of a list; a page ends earlier when a message is full.
const PAGE_SIZE: u32 = 5_000;

/// swarmd on this machine.
#[derive(Clone, Debug)]
pub struct Daemon {
    channel: Channel,
}

impl Daemon {
    /// Connects to the socket, so that a daemon that does not run is found out at once.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let shown = socket.display();
        let path: PathBuf = socket.to_owned();
        if let Err(error) = UnixStream::connect(&path).await {
            return Err(match error.kind() {
                ErrorKind::PermissionDenied => Failure::Plain(format!(
                    "permission denied while trying to connect to the swarm daemon at unix://{shown}: the socket is root's"
                )),
                _ => Failure::Plain(format!(
                    "Cannot connect to the swarm daemon at unix://{shown}. Is swarmd running?"
                )),
            });
        }
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The name is not used: the connector knows the way.
        let channel = Endpoint::from_static("http://swarmd").connect_with_connector_lazy(connector);
        Ok(Self { channel })
    }

    /// The Control API.
    pub fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
    }

    /// The node itself.
    pub fn local(&self) -> NodeLocalClient<Channel> {
        NodeLocalClient::new(self.channel.clone())
    }

    /// What the node says of itself.
    pub async fn info(&self) -> Result<InfoResponse> {
        Ok(self.local().info(InfoRequest {}).await?.into_inner())
    }

    /// Whether this node only knows of itself: a worker, or a node in no swarm.
    pub async fn is_worker(&self) -> Result<bool> {
        Ok(self.info().await?.role() == NodeRole::Worker)
    }
}

/// A list from its first page to its last.
macro_rules! lists {
    ($($(#[$doc:meta])* $name:ident: $call:ident($request:ty) -> $object:ty;)*) => {
        impl Daemon {
            $($(#[$doc])*
            pub async fn $name(&self, mut request: $request) -> Result<Vec<$object>> {
                let mut control = self.control();
                let mut all = Vec::new();
                request.page_size = PAGE_SIZE;
                loop {
                    let page = control.$call(request.clone()).await?.into_inner();
                    all.extend(page.$name);
                    if page.next_page_token.is_empty() {
                        return Ok(all);
                    }
                    request.page_token = page.next_page_token;
                }
            })*
        }
    };
}

lists! {
    /// All nodes that the request asks for.
    nodes: list_nodes(ListNodesRequest) -> Node;
    /// All services that the request asks for.
    services: list_services(ListServicesRequest) -> Service;
    /// All tasks that the request asks for.
    tasks: list_tasks(ListTasksRequest) -> Task;
    /// All networks that the request asks for.
    networks: list_networks(ListNetworksRequest) -> Network;
}
