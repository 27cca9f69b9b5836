//! What other managers may ask of this one: the `Raft` service.
//!
//! Answers only managers of this cluster, and consensus messages only when they
//! are for this very member: an address may have had another owner before.

use std::sync::Arc;

use bytes::BytesMut;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use swarm_identity::{Caller, PeerIdentity};
use swarm_proto::NodeId;
use swarm_proto::defaults::TRANSACTION_MAX;
use swarm_proto::v1::{
    JoinRequest, JoinResponse, LeaveRequest, LeaveResponse, MembersRequest, MembersResponse,
    NodeRole, ProposeRequest, ProposeResponse, RaftMessage, ReadIndexRequest, ReadIndexResponse,
    SnapshotChunk, raft_server,
};
use swarm_store::ProposeError;
use tonic::{Request, Response, Status, Streaming};

use crate::group::{Group, NotHere, refused, sent};
use crate::snapshot::Records;
use crate::types::{Command, Snapshot, SnapshotMeta, TypeConfig, Vote, decode, encode};

/// No state is larger once encoded; what claims to be is not taken into memory.
const SNAPSHOT_MAX: usize = 2 << 30;
/// No host:port is longer.
const ADDR_MAX: usize = 255 + 6;

/// The gRPC service of one member.
#[derive(Clone)]
pub struct RaftService {
    group: Arc<Group>,
}

impl RaftService {
    pub(crate) fn new(group: Arc<Group>) -> Self {
        Self { group }
    }

    fn manager<T>(&self, request: &Request<T>) -> Result<PeerIdentity, Status> {
        match Caller::of(request).peer() {
            Some(peer)
                if peer.role == NodeRole::Manager && peer.cluster_id == self.group.cluster_id =>
            {
                Ok(peer.clone())
            }
            Some(peer) => Err(Status::permission_denied(format!(
                "{peer} is not a manager of this cluster"
            ))),
            None => Err(Status::unauthenticated("a manager's certificate is needed")),
        }
    }

    fn for_me(&self, message: &RaftMessage) -> Result<(), Status> {
        let group = &self.group;
        if message.to == group.raft_id && message.cluster_id == *group.cluster_id {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "this is member {} of cluster {}, not member {} of {}",
            group.raft_id, group.cluster_id, message.to, message.cluster_id
        )))
    }

    fn body<T: DeserializeOwned>(&self, request: Request<RaftMessage>) -> Result<T, Status> {
        self.manager(&request)?;
        let message = request.into_inner();
        self.for_me(&message)?;
        decode(&message.body).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    fn answer<T: Serialize>(
        &self,
        answer: Result<T, impl ToString>,
    ) -> Result<Response<RaftMessage>, Status> {
        let answer = answer.map_err(|error| Status::unavailable(error.to_string()))?;
        let body = encode(&answer).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(RaftMessage {
            to: 0,
            from: self.group.raft_id,
            cluster_id: self.group.cluster_id.to_string(),
            body: body.into(),
        }))
    }

    async fn receive(
        &self,
        mut pieces: Streaming<SnapshotChunk>,
    ) -> Result<(Vote, Snapshot), Status> {
        let first = pieces.message().await?;
        let header = first
            .and_then(|piece| piece.header)
            .ok_or_else(|| Status::invalid_argument("the snapshot's header is missing"))?;
        self.for_me(&header)?;
        let (vote, meta): (Vote, SnapshotMeta) =
            decode(&header.body).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut data = BytesMut::new();
        while let Some(piece) = pieces.message().await? {
            if data.len() + piece.data.len() > SNAPSHOT_MAX {
                return Err(Status::resource_exhausted(format!(
                    "the snapshot has more than {SNAPSHOT_MAX} bytes"
                )));
            }
            data.extend_from_slice(&piece.data);
        }
        let snapshot = Records::Here(data.freeze());
        Ok((vote, Snapshot { meta, snapshot }))
    }
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    async fn append_entries(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let rpc: AppendEntriesRequest<TypeConfig> = self.body(request)?;
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::AnsweredUntaken)
            && !rpc.entries.is_empty()
            && rand::random_ratio(1, 8)
        {
            let taken = openraft::raft::AppendEntriesResponse::<TypeConfig>::Success;
            return self.answer(Ok::<_, Status>(taken));
        }
        let answer = self.group.raft.append_entries(rpc).await;
        if let Ok(AppendEntriesResponse::Success | AppendEntriesResponse::Conflict) = answer {
            self.group.hear();
        }
        self.answer(answer)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let rpc: VoteRequest<TypeConfig> = self.body(request)?;
        self.answer(self.group.raft.vote(rpc).await)
    }

    async fn pre_vote(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let rpc: VoteRequest<TypeConfig> = self.body(request)?;
        self.answer(self.group.raft.pre_vote(rpc).await)
    }

    async fn transfer_leader(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let rpc: TransferLeaderRequest<TypeConfig> = self.body(request)?;
        self.answer(self.group.raft.handle_transfer_leader(rpc).await)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.manager(&request)?;
        let (vote, snapshot) = self.receive(request.into_inner()).await?;
        let answer = self.group.raft.install_full_snapshot(vote, snapshot).await;
        if answer.is_ok() {
            self.group.hear();
        }
        self.answer(answer)
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let caller = self.manager(&request)?;
        let request = request.into_inner();
        let addr = &request.addr;
        let port = addr.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if addr.len() > ADDR_MAX || !matches!(port, Some(Ok(1..))) {
            return Err(Status::invalid_argument("the address must be host:port"));
        }
        if !self.group.raft.is_leader() {
            return Err(refused(
                "this manager does not lead",
                self.group.leader_addr(),
            ));
        }
        self.group
            .admit(&caller.node_id, request)
            .await
            .map(Response::new)
    }

    async fn leave(
        &self,
        request: Request<LeaveRequest>,
    ) -> Result<Response<LeaveResponse>, Status> {
        self.manager(&request)?;
        let node_id = NodeId::from(request.into_inner().node_id);
        if !self.group.raft.is_leader() {
            return Err(refused(
                "this manager does not lead",
                self.group.leader_addr(),
            ));
        }
        let of_node = |member: &swarm_store::Member| member.node_id == node_id;
        for member in self.group.members().into_iter().filter(of_node) {
            self.group
                .remove_member(member.raft_id)
                .await
                .map_err(|error| self.group.membership_status(&error))?;
        }
        Ok(Response::new(LeaveResponse {}))
    }

    async fn propose(
        &self,
        request: Request<ProposeRequest>,
    ) -> Result<Response<ProposeResponse>, Status> {
        self.manager(&request)?;
        let request = request.into_inner();
        let term = Some(request.leader_term).filter(|&term| term > 0);
        let transaction = request
            .transaction
            .ok_or_else(|| Status::invalid_argument("the transaction is missing"))?;
        let command = Command::new(&transaction);
        if command.size() > TRANSACTION_MAX {
            return Err(Status::invalid_argument(format!(
                "the transaction has {} bytes, more than {TRANSACTION_MAX}",
                command.size()
            )));
        }
        match self.group.propose_here(command, term).await {
            Ok(index) => Ok(Response::new(ProposeResponse {
                index,
                rejection: None,
            })),
            Err(NotHere::Failed(ProposeError::Rejected(rejection))) => {
                Ok(Response::new(ProposeResponse {
                    index: 0,
                    rejection: Some(rejection),
                }))
            }
            Err(NotHere::Elsewhere(leader)) => Err(refused("this manager does not lead", leader)),
            Err(NotHere::Failed(error)) => Err(Status::aborted(error.to_string())),
        }
    }

    async fn members(
        &self,
        request: Request<MembersRequest>,
    ) -> Result<Response<MembersResponse>, Status> {
        self.manager(&request)?;
        match self.group.members_here() {
            Ok(members) => Ok(Response::new(MembersResponse {
                members: members.into_iter().map(sent).collect(),
            })),
            Err(NotHere::Elsewhere(leader)) => Err(refused("this manager does not lead", leader)),
            Err(NotHere::Failed(error)) => Err(refused(&error.to_string(), None)),
        }
    }

    async fn read_index(
        &self,
        request: Request<ReadIndexRequest>,
    ) -> Result<Response<ReadIndexResponse>, Status> {
        self.manager(&request)?;
        match self.group.read_index_here().await {
            Ok(index) => Ok(Response::new(ReadIndexResponse { index })),
            Err(NotHere::Elsewhere(leader)) => Err(refused("this manager does not lead", leader)),
            Err(NotHere::Failed(error)) => Err(refused(&error.to_string(), None)),
        }
    }
}
