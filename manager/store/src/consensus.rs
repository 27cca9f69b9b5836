//! The seam between those who decide and the raft group that commits.

use std::sync::Arc;

use swarm_proto::NodeId;
use swarm_proto::v1::{Rejection, Transaction};
use tokio::sync::watch;

use crate::{State, Store};

/// Who leads, as this manager knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// Raft term.
    pub term: u64,
    /// Whether this manager leads, and has applied everything committed before its term.
    pub is_leader: bool,
    /// The leader's raft ID, node and API address, if known.
    pub leader: Option<Member>,
}

/// A member of the raft group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Raft ID; never used again.
    pub raft_id: u64,
    /// Its node.
    pub node_id: NodeId,
    /// host:port of its API.
    pub addr: String,
    /// A voter, not a learner.
    pub voter: bool,
    /// The leader has heard from it lately. Only the leader knows; others say true.
    pub reachable: bool,
}

/// Why a proposal has no known success.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Committed, but apply refused it: nothing was changed.
    #[error("{}", .0.message)]
    Rejected(Rejection),
    /// There is no leader now, or none that can be reached: nothing was changed, try again.
    #[error("the cluster has no leader: {0}")]
    NoLeader(String),
    /// The connection or the leadership was lost on the way: it may or may not have been committed.
    #[error("the outcome of the write is not known: {0}")]
    Unknown(String),
    /// The cluster does not take this node for a manager any more: nothing was changed.
    #[error("this manager may not write any more: {0}")]
    Denied(String),
    /// Over the size limit.
    #[error("the transaction has {size} bytes, more than {limit}")]
    TooLarge {
        /// Encoded size in bytes.
        size: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// This manager is stopping.
    #[error("the manager is stopping")]
    Stopping,
}

/// Why a linearizable read could not be done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// No leader, or no quorum: try again.
    #[error("the cluster has no leader: {0}")]
    NoLeader(String),
    /// This manager is stopping.
    #[error("the manager is stopping")]
    Stopping,
}

/// Why the membership was not changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MembershipError {
    /// The group would no longer be able to commit.
    #[error("can't remove member from the raft: this would result in a loss of quorum ({reason})")]
    QuorumLoss {
        /// Who is unreachable, or that it is the last one.
        reason: String,
    },
    /// Only the leader changes membership.
    #[error("this manager does not lead")]
    NotLeader,
    /// Anything else; try again.
    #[error("membership change failed: {0}")]
    Failed(String),
}

/// What a manager's loops and APIs need of the raft group.
#[async_trait::async_trait]
pub trait Consensus: Send + Sync + 'static {
    /// This manager's replica.
    fn store(&self) -> &Arc<Store>;

    /// Commits and applies; forwards to the leader from a follower. Returns the index.
    async fn propose(&self, transaction: Transaction) -> Result<u64, ProposeError>;

    /// The state with at least everything that was committed before this call.
    async fn read(&self) -> Result<Arc<State>, ReadError>;

    /// Who leads, now and from now on.
    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// The members of the raft group, as this manager knows them.
    fn members(&self) -> Vec<Member>;

    /// The members of the raft group, as the leader hears them.
    async fn members_heard(&self) -> Result<Vec<Member>, ReadError>;

    /// Leader only: makes `raft_id` (allocated before, see `AllocateRaftId`) a learner, waits until
    /// it has caught up, then makes it a voter.
    async fn add_member(&self, member: Member) -> Result<(), MembershipError>;

    /// Leader only: takes a voter or learner out; refuses what would lose
    /// quorum. A leader that removes itself hands leadership over first.
    async fn remove_member(&self, raft_id: u64) -> Result<(), MembershipError>;
}
