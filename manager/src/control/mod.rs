//! The Control API: what people and programs speak to a manager.
//!
//! One file per noun. Reads wait until this replica has everything that was
//! committed before the call; writes are checked at the border ([`validate`]),
//! then become one transaction, which apply accepts or refuses as a whole.
//! Never returns keys, tokens (except where they are asked for) or registry
//! credentials. Starts no loops: a watch is driven by its connection. Who may
//! call is decided before, by the connection's certificate.

mod cluster;
mod error;
mod filter;
mod network;
mod node;
mod page;
mod redact;
mod service;
mod task;
pub mod validate;
mod watch;

#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use swarm_proto::NodeId;
use swarm_proto::v1::control_server::{Control as ControlApi, ControlServer};
use swarm_proto::v1::{
    Cluster, CreateNetworkRequest, CreateServiceRequest, CreateServiceResponse, GetClusterRequest,
    GetJoinTokensRequest, GetNetworkRequest, GetNodeRequest, GetServiceRequest, GetTaskRequest,
    JoinTokens, ListNetworksRequest, ListNetworksResponse, ListNodesRequest, ListNodesResponse,
    ListServicesRequest, ListServicesResponse, ListTasksRequest, ListTasksResponse, Meta, Network,
    NetworkDetail, Node, Object, ObjectKind, ObjectRef, RemoveNetworkRequest,
    RemoveNetworkResponse, RemoveNodeRequest, RemoveNodeResponse, RemoveObject,
    RemoveServiceRequest, RemoveServiceResponse, RotateJoinTokenRequest, Service, StoreAction,
    Task, Transaction, UpdateClusterRequest, UpdateNodeRequest, UpdateServiceRequest, Version,
    WatchRequest, object, store_action,
};
use swarm_store::{Consensus, ProposeError, State};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::clock::{Clock, timestamp};

/// Most watches that one manager serves at the same time.
const WATCHES_MAX: usize = 1024;
/// How long a write that is committed may take to arrive in this replica.
const APPLY_WAIT: Duration = Duration::from_secs(10);

/// The Control API of one manager.
#[derive(Clone)]
pub struct Control {
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    clock: Clock,
    /// Cancelled when the manager stops: ends the watches.
    stopping: CancellationToken,
    watches: Arc<Semaphore>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("node_id", &self.node_id)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// The API of the manager on `node_id`. `stopping` ends the watches.
    #[must_use]
    pub fn new(
        consensus: Arc<dyn Consensus>,
        node_id: NodeId,
        clock: Clock,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            consensus,
            node_id,
            clock,
            stopping,
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
        }
    }

    /// As a gRPC service, with the size limit of a message.
    #[must_use]
    pub fn into_server(self) -> ControlServer<Self> {
        ControlServer::new(self).max_decoding_message_size(swarm_proto::defaults::MESSAGE_MAX)
    }

    /// The state with everything that was committed before this call.
    async fn state(&self) -> Result<Arc<State>, Status> {
        self.consensus.read().await.map_err(error::read)
    }

    /// A state that has the version that an update expects. If this replica has it, nobody is
    /// asked whether there is a newer one: apply compares the version once more, and what `has`
    /// looks at is all that the update is decided from.
    async fn state_with(&self, has: impl Fn(&State) -> bool) -> Result<Arc<State>, Status> {
        let here = self.consensus.store().state();
        if has(&here) {
            return Ok(here);
        }
        self.state().await
    }

    /// Commits the actions as one transaction.
    async fn propose(&self, actions: Vec<StoreAction>) -> Result<u64, ProposeError> {
        self.consensus
            .propose(Transaction {
                actions,
                proposed_at: Some(timestamp((self.clock)())),
                proposer: self.node_id.as_str().to_owned(),
                ..Transaction::default()
            })
            .await
    }

    /// Commits, and returns this replica's state once it has the write.
    async fn write(&self, actions: Vec<StoreAction>) -> Result<Arc<State>, Status> {
        let index = self.propose(actions).await.map_err(error::propose)?;
        let applied = self.consensus.store().wait_for(index);
        tokio::time::timeout(APPLY_WAIT, applied)
            .await
            .map_err(|_| {
                Status::deadline_exceeded(format!(
                    "the write is committed, but this manager has not caught up with it in {} seconds",
                    APPLY_WAIT.as_secs()
                ))
            })
    }
}

fn create(new: object::Object) -> StoreAction {
    StoreAction {
        action: Some(store_action::Action::Create(Object { object: Some(new) })),
    }
}

fn update(changed: object::Object) -> StoreAction {
    StoreAction {
        action: Some(store_action::Action::Update(Object {
            object: Some(changed),
        })),
    }
}

fn remove(kind: ObjectKind, id: &str, expected_version: u64) -> StoreAction {
    StoreAction {
        action: Some(store_action::Action::Remove(RemoveObject {
            r#ref: Some(ObjectRef {
                kind: kind.into(),
                id: id.to_owned(),
            }),
            expected_version,
        })),
    }
}

/// The meta that makes an update expect `version`.
fn expecting(version: u64) -> Option<Meta> {
    Some(Meta {
        version: Some(Version { index: version }),
        ..Meta::default()
    })
}

fn version_of(meta: Option<&Meta>) -> u64 {
    meta.and_then(|meta| meta.version)
        .map_or(0, |version| version.index)
}

/// An object whose ID was just resolved.
fn found<T: Clone>(object: Option<&Arc<T>>, kind: &str, id: &str) -> Result<T, Status> {
    object
        .map(|object| T::clone(object))
        .ok_or_else(|| Status::not_found(format!("{kind} {id} not found")))
}

/// An object that a transaction just wrote is there unless somebody removed it at once. That
/// is no "not found": others may have seen what was written.
fn written<T: Clone>(object: Option<&Arc<T>>, kind: &str, id: &str) -> Result<T, Status> {
    object.map(|object| T::clone(object)).ok_or_else(|| {
        Status::unknown(format!(
            "{kind} {id} was written, and removed by somebody else at once"
        ))
    })
}

/// An answer that fits into one message, or a sentence that says what to do about it.
fn bounded<M: Message>(answer: M) -> Result<M, Status> {
    let size = answer.encoded_len();
    if size <= swarm_proto::defaults::MESSAGE_MAX {
        return Ok(answer);
    }
    Err(Status::resource_exhausted(format!(
        "the answer has {size} bytes, more than {}; ask for pages (page_size), narrow it with filters, or watch instead",
        swarm_proto::defaults::MESSAGE_MAX
    )))
}

#[tonic::async_trait]
impl ControlApi for Control {
    async fn get_cluster(
        &self,
        _: Request<GetClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        self.get_cluster().await.map(Response::new)
    }

    async fn update_cluster(
        &self,
        request: Request<UpdateClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        self.update_cluster(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_join_tokens(
        &self,
        _: Request<GetJoinTokensRequest>,
    ) -> Result<Response<JoinTokens>, Status> {
        self.get_join_tokens().await.map(Response::new)
    }

    async fn rotate_join_token(
        &self,
        request: Request<RotateJoinTokenRequest>,
    ) -> Result<Response<JoinTokens>, Status> {
        self.rotate_join_token(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        self.get_node(request.into_inner()).await.map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        self.list_nodes(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn update_node(
        &self,
        request: Request<UpdateNodeRequest>,
    ) -> Result<Response<Node>, Status> {
        self.update_node(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_node(
        &self,
        request: Request<RemoveNodeRequest>,
    ) -> Result<Response<RemoveNodeResponse>, Status> {
        self.remove_node(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_service(
        &self,
        request: Request<GetServiceRequest>,
    ) -> Result<Response<Service>, Status> {
        self.get_service(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        self.list_services(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn create_service(
        &self,
        request: Request<CreateServiceRequest>,
    ) -> Result<Response<CreateServiceResponse>, Status> {
        self.create_service(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn update_service(
        &self,
        request: Request<UpdateServiceRequest>,
    ) -> Result<Response<Service>, Status> {
        self.update_service(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_service(
        &self,
        request: Request<RemoveServiceRequest>,
    ) -> Result<Response<RemoveServiceResponse>, Status> {
        self.remove_service(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_task(&self, request: Request<GetTaskRequest>) -> Result<Response<Task>, Status> {
        self.get_task(request.into_inner()).await.map(Response::new)
    }

    async fn list_tasks(
        &self,
        request: Request<ListTasksRequest>,
    ) -> Result<Response<ListTasksResponse>, Status> {
        self.list_tasks(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_network(
        &self,
        request: Request<GetNetworkRequest>,
    ) -> Result<Response<NetworkDetail>, Status> {
        self.get_network(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        self.list_networks(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        self.create_network(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_network(
        &self,
        request: Request<RemoveNetworkRequest>,
    ) -> Result<Response<RemoveNetworkResponse>, Status> {
        self.remove_network(request.into_inner())
            .await
            .map(Response::new)
    }

    type WatchStream = watch::MessageStream;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.watch(request.into_inner()).await.map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn what_was_written_and_is_gone_already_is_not_said_to_be_unwritten() {
        // Somebody may have read it meanwhile: "not found" would say that this never was.
        let gone = written::<Service>(None, "service", "s1").unwrap_err();
        assert_eq!(gone.code(), Code::Unknown, "{gone}");
        let never = found::<Service>(None, "service", "s1").unwrap_err();
        assert_eq!(never.code(), Code::NotFound, "{never}");
    }
}
