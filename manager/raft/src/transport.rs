//! The way to other members: openraft's network over the managers' gRPC, with mutual TLS.
//!
//! Each peer has one connection per lane, so that a heartbeat or a vote never
//! queues behind entries, and entries never behind a snapshot. Connections are
//! made when they are first used; their work is done on raft's runtime.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use swarm_identity::Identity;
use swarm_proto::v1::raft_client::RaftClient;
use swarm_proto::v1::{RaftMessage, SnapshotChunk};
use tokio::runtime::Handle;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::disk::entry_size;
use crate::snapshot::{self, Records};
use crate::types::{Peer, Snapshot, SnapshotMeta, TypeConfig, Vote, decode, encode};

/// No raft message is larger: a full append message, or one entry of the largest transaction.
pub(crate) const RAFT_MESSAGE_MAX: usize = 4 << 20;
/// A MiB of entries may take a receiver this long: sending them again to one
/// that is slow only makes it slower.
const SLOWEST: Duration = Duration::from_secs(8);
/// Pieces of a snapshot.
const SNAPSHOT_PIECE: usize = 1 << 20;
/// Connections that are kept; members are few, so more are left over from former ones.
const CONNECTIONS_MAX: usize = 128;
/// On an answer of a member that did not do what was asked, because it could
/// not or does not lead: nothing was changed.
pub(crate) const REFUSED: &str = "swarm-raft-refused";
/// Beside it: the address of the leader, if known.
pub(crate) const LEADER: &str = "swarm-raft-leader";
/// On an answer to a member that is one no longer, by what a quorum has committed.
pub(crate) const EXPELLED: &str = "swarm-raft-expelled";

/// What a connection is for. The first two are urgent at the other side too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// Heartbeats, votes, leadership transfer.
    Control,
    /// Entries.
    Entries,
    /// Snapshots.
    Snapshots,
    /// Joining, forwarded proposals and reads.
    Requests,
}

/// Connections to other managers.
#[derive(Clone)]
pub(crate) struct Pool {
    identity: Arc<Identity>,
    runtime: Handle,
    channels: Arc<Mutex<HashMap<(String, Lane), Channel>>>,
    /// Where each member is, by the newest membership.
    places: Arc<Mutex<HashMap<u64, String>>>,
}

impl Pool {
    pub(crate) fn new(identity: Arc<Identity>, runtime: Handle) -> Self {
        Self {
            identity,
            runtime,
            channels: Arc::default(),
            places: Arc::default(),
        }
    }

    /// A member is at this address from now on.
    pub(crate) fn locate(&self, raft_id: u64, addr: &str) {
        let mut places = self.places.lock();
        if places.get(&raft_id).is_none_or(|known| known != addr) {
            places.insert(raft_id, addr.to_owned());
        }
    }

    fn place_of(&self, raft_id: u64) -> Option<String> {
        self.places.lock().get(&raft_id).cloned()
    }

    pub(crate) fn client(&self, addr: &str, lane: Lane) -> Result<RaftClient<Channel>, Status> {
        let mut channels = self.channels.lock();
        let key = (addr.to_owned(), lane);
        let channel = match channels.get(&key) {
            Some(channel) => channel.clone(),
            None => {
                // The connection's own task is spawned where this guard says.
                let _guard = self.runtime.enter();
                let channel = match lane {
                    Lane::Control | Lane::Entries => self.identity.urgent_channel(addr),
                    Lane::Snapshots | Lane::Requests => self.identity.channel(addr),
                };
                let channel =
                    channel.map_err(|error| Status::invalid_argument(error.to_string()))?;
                if channels.len() >= CONNECTIONS_MAX {
                    channels.clear();
                }
                channels.insert(key, channel.clone());
                channel
            }
        };
        Ok(RaftClient::new(channel)
            .max_decoding_message_size(RAFT_MESSAGE_MAX)
            .max_encoding_message_size(RAFT_MESSAGE_MAX))
    }
}

/// Whether the request has certainly not been acted on.
pub(crate) fn not_done(status: &Status) -> bool {
    if status.metadata().contains_key(REFUSED) {
        return true;
    }
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// The address of the leader, when the one who refused knows it.
pub(crate) fn leader_hint(status: &Status) -> Option<String> {
    let value = status.metadata().get(LEADER)?.to_str().ok()?;
    Some(value.to_owned())
}

/// Asked at each message to another member: after how long the same is to be sent once more, if
/// at all. Raft must not mind, and simulations see to it.
#[derive(Clone)]
pub struct Repeats(Arc<dyn Fn() -> Option<Duration> + Send + Sync>);

impl Repeats {
    /// Asks this.
    pub fn new(ask: impl Fn() -> Option<Duration> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }
}

impl std::fmt::Debug for Repeats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Repeats")
    }
}

/// Makes clients for openraft.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) pool: Pool,
    pub(crate) from: u64,
    pub(crate) cluster_id: Arc<str>,
    /// For a message with entries, which waits for the receiver's disk.
    pub(crate) entries_timeout: Duration,
    pub(crate) repeats: Option<Repeats>,
}

/// One member, as the raft core sees it.
pub(crate) struct Remote {
    network: Network,
    to: u64,
    /// Where it was when this was made.
    addr: String,
    lane: Lane,
}

impl Network {
    fn remote(&self, to: u64, peer: &Peer, lane: Lane) -> Remote {
        Remote {
            network: self.clone(),
            to,
            addr: peer.addr.clone(),
            lane,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Remote;

    async fn new_client(&mut self, target: u64, node: &Peer) -> Remote {
        self.remote(target, node, Lane::Entries)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Peer) -> Remote {
        self.remote(target, node, Lane::Control)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Peer) -> Remote {
        self.remote(target, node, Lane::Snapshots)
    }
}

impl Remote {
    /// openraft keeps what it made for a member when only the member's address changes.
    fn client(&mut self, lane: Lane) -> Result<RaftClient<Channel>, Status> {
        let pool = &self.network.pool;
        if let Some(addr) = pool.place_of(self.to) {
            self.addr = addr;
        }
        pool.client(&self.addr, lane)
    }

    fn message(&self, body: Vec<u8>) -> RaftMessage {
        RaftMessage {
            to: self.to,
            from: self.network.from,
            cluster_id: self.network.cluster_id.to_string(),
            body: body.into(),
        }
    }

    /// One request and its answer, within a time.
    async fn call<Q, A, F>(
        &mut self,
        lane: Lane,
        within: Duration,
        request: &Q,
        send: impl Fn(RaftClient<Channel>, RaftMessage) -> F,
    ) -> Result<A, RPCError<TypeConfig>>
    where
        Q: Serialize,
        A: DeserializeOwned,
        F: Future<Output = Result<Response<RaftMessage>, Status>> + Send + 'static,
    {
        let body = encode(request).map_err(|error| NetworkError::new(&error))?;
        let client = self.client(lane).map_err(rpc_error)?;
        let message = self.message(body);
        if let Some(later) = self
            .network
            .repeats
            .as_ref()
            .and_then(|repeats| (repeats.0)())
        {
            let again = send(client.clone(), message.clone());
            // Ends with the call that it makes.
            drop(tokio::spawn(async move {
                tokio::time::sleep(later).await;
                drop(tokio::time::timeout(within, again).await);
            }));
        }
        let answer = tokio::time::timeout(within, send(client, message))
            .await
            .map_err(|_| {
                NetworkError::from_string(format!("{} did not answer within {within:?}", self.addr))
            })?
            .map_err(rpc_error)?
            .into_inner();
        Ok(decode(&answer.body).map_err(|error| NetworkError::new(&error))?)
    }

    /// A request that no entries wait behind.
    async fn control<Q, A, F>(
        &mut self,
        request: &Q,
        option: &RPCOption,
        send: impl Fn(RaftClient<Channel>, RaftMessage) -> F,
    ) -> Result<A, RPCError<TypeConfig>>
    where
        Q: Serialize,
        A: DeserializeOwned,
        F: Future<Output = Result<Response<RaftMessage>, Status>> + Send + 'static,
    {
        self.call(Lane::Control, option.hard_ttl(), request, send)
            .await
    }
}

fn rpc_error(status: Status) -> RPCError<TypeConfig> {
    match status.code() {
        // Nobody there, or not the member we mean: no use in trying again at once.
        Code::Unavailable | Code::FailedPrecondition | Code::PermissionDenied => {
            RPCError::Unreachable(Unreachable::new(&status))
        }
        _ => RPCError::Network(NetworkError::new(&status)),
    }
}

impl RaftNetworkV2<TypeConfig> for Remote {
    type SnapshotData = Records;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        // openraft offers one heartbeat interval, which a disk may well take.
        let within = match self.lane {
            Lane::Control => option.hard_ttl(),
            _ => {
                let bytes: usize = rpc.entries.iter().map(entry_size).sum();
                self.network.entries_timeout + SLOWEST.mul_f64(bytes as f64 / (1 << 20) as f64)
            }
        };
        self.call(self.lane, within, &rpc, |mut client, message| async move {
            client.append_entries(message).await
        })
        .await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.control(&rpc, &option, |mut client, message| async move {
            client.vote(message).await
        })
        .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.control(&rpc, &option, |mut client, message| async move {
            client.pre_vote(message).await
        })
        .await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.control(&rpc, &option, |mut client, message| async move {
            client.transfer_leader(message).await
        })
        .await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let read = snapshot::read(snapshot).await;
        let (meta, mut rest) = read.map_err(|error| NetworkError::new(&error))?;
        let header: (&Vote, &SnapshotMeta) = (&vote, &meta);
        let header = encode(&header).map_err(|error| NetworkError::new(&error))?;
        let first = SnapshotChunk {
            header: Some(self.message(header)),
            data: Bytes::new(),
        };
        let pieces = std::iter::once(first).chain(std::iter::from_fn(move || {
            let piece = rest.split_to(rest.len().min(SNAPSHOT_PIECE));
            (!piece.is_empty()).then_some(SnapshotChunk {
                header: None,
                data: piece,
            })
        }));
        let mut client = self.client(Lane::Snapshots).map_err(rpc_error)?;
        let sending = client.install_snapshot(futures::stream::iter(pieces));
        let answer = tokio::select! {
            answer = tokio::time::timeout(option.hard_ttl(), sending) => answer,
            closed = cancel => return Err(closed.into()),
        };
        let answer = answer
            .map_err(|_| {
                let addr = &self.addr;
                NetworkError::from_string(format!("{addr} did not take the snapshot in time"))
            })?
            .map_err(rpc_error)?
            .into_inner();
        Ok(decode(&answer.body).map_err(|error| NetworkError::new(&error))?)
    }
}
