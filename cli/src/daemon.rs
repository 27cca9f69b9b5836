//! The connection to swarmd: gRPC over its local socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::node_local_client::NodeLocalClient;
use swarm_proto::v1::{InfoRequest, InfoResponse, NodeRole};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::failure::{Failure, Result};

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
