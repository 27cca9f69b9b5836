//! The connection to swarmd: gRPC over its local socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::node_local_client::NodeLocalClient;
use swarm_proto::v1::{InfoRequest, InfoResponse, LocalState};
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

    /// Why this node does not serve the Control API, in the words that people know.
    pub async fn why_no_control(&self) -> String {
        let Ok(info) = self.info().await else {
            return "This node is not a swarm manager.".to_owned();
        };
        let rest = match info.state() {
            LocalState::Inactive => {
                "Use \"swarm init\" or \"swarm join\" to connect this node to swarm and try again."
            }
            _ if info.role() == swarm_proto::v1::NodeRole::Worker => {
                "Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager."
            }
            _ => "Manager is being prepared or has trouble connecting to the cluster.",
        };
        format!("This node is not a swarm manager. {rest}")
    }
}
