//! One member's view of its raft group: proposals, reads, leadership, membership.
//!
//! Whatever a follower is asked for goes to the leader, for as long as it is
//! certain that nothing has been done yet. Starts no loops of its own; its
//! owner runs [`Group::watch`] and [`Group::belong`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Shared};
use futures::{FutureExt as _, TryFutureExt as _};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, Fatal, ForwardToLeader, LinearizableReadError,
    RaftError,
};
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResponse;
use openraft::{ChangeMembers, Instant as _, Raft, RaftMetrics, ReadPolicy};
use parking_lot::Mutex;
use swarm_proto::defaults::TRANSACTION_MAX;
use swarm_proto::v1::store_action::Action;
use swarm_proto::v1::{
    AllocateRaftId, JoinRequest, JoinResponse, LeaveRequest, ManagerStatus, MembersRequest, Node,
    NodeRole, Object, ProposeRequest, RaftMember, RaftPeer, ReadIndexRequest, StoreAction,
    Transaction, object,
};
use swarm_proto::{ClusterId, NodeId};
use swarm_store::{Leadership, Member, MembershipError, ProposeError, ReadError, State, Store};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::error::{FatalReporter, failed};
use crate::node::{Progress, RaftTiming};
use crate::proposals::{Expected, Fate, Proposals};
use crate::state_machine::StateMachine;
use crate::transport::{EXPELLED, LEADER, Lane, Pool, REFUSED, leader_hint, not_done};
use crate::types::{Command, LogId, Outcome, Peer, TypeConfig};
use crate::weight::{Due, Lull, Scales, Work};

/// How long a proposal or a read looks for a leader.
const NO_LEADER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a proposal that has been submitted is waited for.
const COMMIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a proposal's own entry or one of a later term is waited for, once no answer will come.
/// Several elections.
const FATE_PATIENCE: Duration = Duration::from_secs(2);
/// A leader that was just elected may not have applied yet that this node is a manager. One that
/// still says no after so long is right.
const DENIED_PATIENCE: Duration = Duration::from_secs(1);
/// For one round of asking a quorum whether this one still leads.
const READ_PATIENCE: Duration = Duration::from_secs(2);
/// For one change of the membership, without the catching up.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a learner may take to catch up.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);
/// For handing leadership over.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(3);
/// Waits between attempts grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(400));

pub(crate) type Core = Raft<TypeConfig, StateMachine>;

/// What all parts of a running member share.
pub(crate) struct Group {
    pub(crate) raft: Core,
    pub(crate) raft_id: u64,
    pub(crate) node_id: NodeId,
    pub(crate) cluster_id: ClusterId,
    pub(crate) addr: String,
    pub(crate) dir: PathBuf,
    pub(crate) timing: RaftTiming,
    /// The number of entries is the cluster's to say, if it does.
    pub(crate) snapshot_due: Due,
    /// What was applied.
    pub(crate) scales: Arc<Mutex<Scales>>,
    pub(crate) store: Arc<Store>,
    pub(crate) applied: watch::Receiver<Option<LogId>>,
    pub(crate) pool: Pool,
    pub(crate) leadership: watch::Sender<Leadership>,
    /// Whether this member is in: `None` until that is known, then the refusal if it is refused.
    pub(crate) entered: watch::Sender<Option<Result<(), String>>>,
    /// Set when the group has taken this member out for good, with the leader's words.
    pub(crate) expelled: watch::Sender<Option<String>>,
    /// This member is on its way out of the group, and asks no more whether it is in.
    pub(crate) leaving: CancellationToken,
    /// When this member last heard a leader.
    pub(crate) heard: Mutex<Instant>,
    /// This member's proposals whose fate is not known yet.
    pub(crate) proposals: Arc<Proposals>,
    /// Reads that have asked for an index.
    pub(crate) reads: Arc<ReadRounds>,
    /// Membership changes one at a time.
    pub(crate) one_change: Semaphore,
    pub(crate) stop: CancellationToken,
    pub(crate) fatal: FatalReporter,
}

/// Why this member itself did not do what only a leader can.
#[derive(Clone)]
pub(crate) enum NotHere<E> {
    /// Another leads, at this address if known. Nothing has been done.
    Elsewhere(Option<String>),
    /// Done with, one way or another.
    Failed(E),
}

/// Why asking another did not lead to a success.
enum NotThere<E> {
    /// Nothing has been done; perhaps the leader is at this address.
    TryAgain(String, Option<String>),
    /// Nothing has been done: this node is no manager, as that one sees it.
    Denied(String),
    Failed(E),
}

impl<E> From<NotHere<E>> for NotThere<E> {
    fn from(error: NotHere<E>) -> Self {
        match error {
            NotHere::Elsewhere(leader) => Self::TryAgain("none is known".to_owned(), leader),
            NotHere::Failed(error) => Self::Failed(error),
        }
    }
}

/// Why the group does not have this member.
enum NotIn {
    /// It is to be no manager now.
    Refused(String),
    /// Its raft ID is the node's no longer, and never will be again.
    Expelled(String),
}

type ReadRound = Shared<BoxFuture<'static, Result<u64, NotHere<ReadError>>>>;

/// Rounds of asking a quorum whether this one still leads. One at a time: whoever comes while one
/// is under way may not use it, because it may have begun before what the reader knows of was
/// committed. All that come meanwhile share the next.
#[derive(Default)]
pub(crate) struct ReadRounds {
    /// The round that has not begun.
    next: Mutex<Option<ReadRound>>,
    turn: tokio::sync::Mutex<()>,
}

impl ReadRounds {
    /// The round to wait for; it runs while somebody does.
    fn join(
        self: &Arc<Self>,
        ask: impl Future<Output = Result<u64, NotHere<ReadError>>> + Send + 'static,
    ) -> ReadRound {
        let rounds = self.clone();
        let mut next = self.next.lock();
        next.get_or_insert_with(|| {
            let round = async move {
                let _turn = rounds.turn.lock().await;
                // From here on it is too late to join.
                rounds.next.lock().take();
                ask.await
            };
            round.boxed().shared()
        })
        .clone()
    }
}

/// Waits between attempts: a little longer each time, or until something changes.
struct Attempts {
    give_up: Instant,
    wait: Duration,
}

impl Attempts {
    fn new(patience: Duration) -> Self {
        Self {
            give_up: Instant::now() + patience,
            wait: BACKOFF.0,
        }
    }

    fn over(&self) -> bool {
        Instant::now() >= self.give_up
    }

    fn next_wait(&mut self) -> Duration {
        let wait = self.wait;
        self.wait = (wait * 2).min(BACKOFF.1);
        // Several who wait for the same leader need not all come at once.
        wait.mul_f64(rand::random_range(0.5..1.5))
    }
}

impl Group {
    fn metrics(&self) -> RaftMetrics<TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }

    /// Waits a little, or until leadership changes; false when this member stops.
    async fn pause(&self, wait: Duration) -> bool {
        let mut leadership = self.leadership.subscribe();
        tokio::select! {
            () = self.stop.cancelled() => false,
            _ = leadership.changed() => true,
            () = tokio::time::sleep(wait) => true,
        }
    }

    /// Returns when another manager than the one at `addr` has begun to lead.
    async fn led_elsewhere(&self, addr: &str) {
        let mut leadership = self.leadership.subscribe();
        while leadership.changed().await.is_ok() {
            let now = leadership.borrow_and_update();
            if now
                .leader
                .as_ref()
                .is_some_and(|leader| leader.addr != addr)
            {
                return;
            }
        }
        std::future::pending().await
    }

    fn elsewhere<E>(&self, forward: ForwardToLeader<TypeConfig>) -> NotHere<E> {
        let other = forward.leader_id.is_some_and(|id| id != self.raft_id);
        NotHere::Elsewhere(forward.leader_node.filter(|_| other).map(|node| node.addr))
    }

    // --- Proposals -------------------------------------------------------

    /// Commits here if this one leads, in this term if one is given.
    pub(crate) async fn propose_here(
        &self,
        command: Command,
        term: Option<u64>,
    ) -> Result<u64, NotHere<ProposeError>> {
        let unknown = |reason: String| Err(NotHere::Failed(ProposeError::Unknown(reason)));
        let mut expelled = self.expelled.subscribe();
        let writing = tokio::time::timeout(COMMIT_PATIENCE, self.append(command, term));
        let written = tokio::select! {
            biased;
            written = writing => written,
            // What it has written as a leader may be committed; it will not hear of it.
            Ok(_) = expelled.wait_for(Option::is_some) => {
                return unknown("this manager was taken out of the raft group".into());
            }
        };
        match written {
            Err(_) => unknown(format!("not committed within {COMMIT_PATIENCE:?}")),
            Ok(Ok(written)) => match written.data.0 {
                Ok(()) => Ok(written.log_id.index),
                Err(rejection) => Err(NotHere::Failed(ProposeError::Rejected(rejection))),
            },
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward)))) => {
                Err(self.elsewhere(forward))
            }
            Ok(Err(error)) => unknown(error.to_string()),
        }
    }

    async fn append(
        &self,
        command: Command,
        term: Option<u64>,
    ) -> Result<ClientWriteResponse<TypeConfig>, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>
    {
        let Some(term) = term else {
            return self.raft.client_write(command).await;
        };
        let (responder, written) = ProgressResponder::complete_only();
        let write = self.raft.write(command).with_leader(term);
        write.responder(responder).await?;
        let written = written.await;
        let written = written.map_err(|_| RaftError::Fatal(Fatal::Stopped))?;
        written.map_err(RaftError::APIError)
    }

    pub(crate) async fn propose(&self, mut transaction: Transaction) -> Result<u64, ProposeError> {
        transaction.proposal = rand::random();
        let command = Command::new(&transaction);
        if command.size() > TRANSACTION_MAX {
            return Err(ProposeError::TooLarge {
                size: command.size(),
                limit: TRANSACTION_MAX,
            });
        }
        let mut expected = self.proposals.expect(transaction.proposal);
        let mut attempts = Attempts::new(NO_LEADER_PATIENCE);
        let mut denied = None;
        loop {
            if self.stop.is_cancelled() {
                return Err(ProposeError::Stopping);
            }
            if let Some(why) = self.expelled.borrow().clone() {
                return Err(ProposeError::Denied(why));
            }
            let here = self.own_term();
            let proposed = self
                .propose_here(command.clone(), here)
                .map_err(NotThere::from);
            let (mut reason, mut leader) = match self.settled(&mut expected, here, proposed).await {
                Ok(index) => return Ok(index),
                Err(NotThere::Failed(error)) => return Err(error),
                Err(NotThere::Denied(why)) => (why, None),
                Err(NotThere::TryAgain(why, leader)) => (why, leader),
            };
            while let Some(addr) = leader.take() {
                let term = self.term_of(&addr);
                let proposed = self.propose_at(&addr, &transaction, term);
                match self.settled(&mut expected, term, proposed).await {
                    Ok(index) => return Ok(index),
                    Err(NotThere::Failed(error)) => return Err(error),
                    Err(NotThere::TryAgain(why, hint)) => {
                        reason = why;
                        leader = hint.filter(|hint| *hint != addr && !attempts.over());
                    }
                    Err(NotThere::Denied(why)) => {
                        let since = *denied.get_or_insert_with(Instant::now);
                        if since.elapsed() >= DENIED_PATIENCE {
                            return Err(ProposeError::Denied(why));
                        }
                        reason = why;
                    }
                }
            }
            if attempts.over() {
                return Err(ProposeError::NoLeader(reason));
            }
            if !self.pause(attempts.next_wait()).await {
                return Err(ProposeError::Stopping);
            }
        }
    }

    /// The term that the manager at this address leads in, as far as this one knows.
    fn term_of(&self, addr: &str) -> Option<u64> {
        let leadership = self.leadership.borrow();
        let leader = leadership.leader.as_ref()?;
        (leader.addr == addr).then_some(leadership.term)
    }

    /// The term that this one leads in, as far as it knows.
    fn own_term(&self) -> Option<u64> {
        let leadership = self.leadership.borrow();
        let leader = leadership.leader.as_ref()?;
        (leader.raft_id == self.raft_id).then_some(leadership.term)
    }

    /// How the attempt to have a proposal committed in this term has ended: by its answer, or by
    /// what this member applies, which may be known although no answer comes.
    async fn settled(
        &self,
        expected: &mut Expected,
        term: Option<u64>,
        attempt: impl Future<Output = Result<u64, NotThere<ProposeError>>>,
    ) -> Result<u64, NotThere<ProposeError>> {
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::RetriedUnknown) {
            // By who does not know his own proposals when they are applied.
            return match attempt.await {
                Err(NotThere::Failed(ProposeError::Unknown(why))) => {
                    Err(NotThere::TryAgain(why, None))
                }
                answer => answer,
            };
        }
        let mut fate = pin!(expected.fate(term, self.applied.clone()));
        let known = |fate: Fate| match fate {
            Fate::Applied(index, Outcome(Ok(()))) => Ok(index),
            Fate::Applied(_, Outcome(Err(rejection))) => {
                Err(NotThere::Failed(ProposeError::Rejected(rejection)))
            }
            Fate::Never => Err(NotThere::TryAgain("the leader has changed".into(), None)),
        };
        let why = tokio::select! {
            fate = &mut fate => return known(fate),
            answer = attempt => match answer {
                Err(NotThere::Failed(ProposeError::Unknown(why))) => why,
                answer => return answer,
            },
        };
        match tokio::time::timeout(FATE_PATIENCE, fate).await {
            Ok(fate) => known(fate),
            Err(_) => Err(NotThere::Failed(ProposeError::Unknown(why))),
        }
    }

    /// Commits at another, in this term if one is given.
    async fn propose_at(
        &self,
        addr: &str,
        transaction: &Transaction,
        term: Option<u64>,
    ) -> Result<u64, NotThere<ProposeError>> {
        let request = ProposeRequest {
            transaction: Some(transaction.clone()),
            leader_term: term.unwrap_or(0),
        };
        let call = async {
            self.pool
                .client(addr, Lane::Requests)?
                .propose(request)
                .await
        };
        let answer = tokio::time::timeout(COMMIT_PATIENCE * 2, call).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(answer) => match answer.into_inner() {
                answer if answer.rejection.is_none() => Ok(answer.index),
                answer => Err(NotThere::Failed(ProposeError::Rejected(
                    answer.rejection.unwrap_or_default(),
                ))),
            },
            Err(status) if not_done(&status) => Err(again(addr, &status)),
            Err(status) if denied(&status) => Err(NotThere::Denied(status.message().to_owned())),
            Err(status) => Err(NotThere::Failed(ProposeError::Unknown(format!(
                "manager {addr}: {}",
                status.message()
            )))),
        }
    }

    // --- Reads -----------------------------------------------------------

    /// The index that a read must have applied, if this one leads.
    pub(crate) async fn read_index_here(self: &Arc<Self>) -> Result<u64, NotHere<ReadError>> {
        let group = Arc::downgrade(self);
        let ask = async move {
            match group.upgrade() {
                Some(group) => group.ask_for_read_index().await,
                None => Err(NotHere::Failed(ReadError::Stopping)),
            }
        };
        self.reads.join(ask).await
    }

    async fn ask_for_read_index(&self) -> Result<u64, NotHere<ReadError>> {
        let asked = self.raft.get_read_log_id(ReadPolicy::ReadIndex);
        let no_leader = |reason: String| Err(NotHere::Failed(ReadError::NoLeader(reason)));
        match tokio::time::timeout(READ_PATIENCE, asked).await {
            Err(_) => no_leader(format!("no quorum has answered within {READ_PATIENCE:?}")),
            Ok(Ok((read, _))) => Ok(read.index()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                Err(self.elsewhere(forward))
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(error)))) => {
                no_leader(error.to_string())
            }
            Ok(Err(RaftError::Fatal(_))) if self.stop.is_cancelled() => {
                Err(NotHere::Failed(ReadError::Stopping))
            }
            Ok(Err(RaftError::Fatal(error))) => no_leader(error.to_string()),
        }
    }

    async fn read_index_at(&self, addr: &str) -> Result<u64, NotThere<ReadError>> {
        let call = async {
            let mut client = self.pool.client(addr, Lane::Requests)?;
            client.read_index(ReadIndexRequest {}).await
        };
        let answer = tokio::time::timeout(READ_PATIENCE * 3, call).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(answer) => Ok(answer.into_inner().index),
            // A read changes nothing: it can always be tried again.
            Err(status) => Err(again(addr, &status)),
        }
    }

    pub(crate) async fn read(self: &Arc<Self>) -> Result<Arc<State>, ReadError> {
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::OwnReplicaRead) {
            return Ok(self.store.state());
        }
        let attempts = Attempts::new(NO_LEADER_PATIENCE);
        let give_up = attempts.give_up;
        let index = self
            .of_leader(
                attempts,
                || self.read_index_here(),
                |addr| async move { self.read_index_at(&addr).await },
            )
            .await?;
        self.state_with(index, give_up).await
    }

    /// The state once it has that entry.
    async fn state_with(&self, index: u64, give_up: Instant) -> Result<Arc<State>, ReadError> {
        let mut applied = self.applied.clone();
        let reached = applied.wait_for(|applied| applied.is_some_and(|id| id.index >= index));
        tokio::select! {
            () = self.stop.cancelled() => Err(ReadError::Stopping),
            () = tokio::time::sleep_until(give_up) => Err(ReadError::NoLeader(
                format!("this manager has not applied entry {index} yet"),
            )),
            reached = reached => match reached {
                Ok(_) => Ok(self.store.state()),
                Err(_) => Err(ReadError::Stopping),
            },
        }
    }

    /// Leader: the newest state. Whoever does not lead any more, or cannot know, is refused.
    async fn newest_here(self: &Arc<Self>) -> Result<Arc<State>, Status> {
        let refuse = |error: ReadError| refused(&error.to_string(), None);
        let index = self.read_index_here().await.map_err(|error| match error {
            NotHere::Elsewhere(leader) => refused("this manager does not lead", leader),
            NotHere::Failed(error) => refuse(error),
        })?;
        let give_up = Instant::now() + READ_PATIENCE;
        self.state_with(index, give_up).await.map_err(refuse)
    }

    /// The members, if this one leads.
    pub(crate) fn members_here(&self) -> Result<Vec<Member>, NotHere<ReadError>> {
        if self.raft.is_leader() {
            Ok(self.members())
        } else {
            Err(NotHere::Elsewhere(self.leader_addr()))
        }
    }

    async fn members_at(&self, addr: &str) -> Result<Vec<Member>, NotThere<ReadError>> {
        let call = async {
            let mut client = self.pool.client(addr, Lane::Requests)?;
            client.members(MembersRequest {}).await
        };
        let answer = tokio::time::timeout(READ_PATIENCE * 2, call).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(answer) => Ok(answer
                .into_inner()
                .members
                .into_iter()
                .map(received)
                .collect()),
            Err(status) => Err(again(addr, &status)),
        }
    }

    /// The members as the leader hears them.
    pub(crate) async fn members_heard(&self) -> Result<Vec<Member>, ReadError> {
        self.of_leader(
            Attempts::new(NO_LEADER_PATIENCE),
            || std::future::ready(self.members_here()),
            |addr| async move { self.members_at(&addr).await },
        )
        .await
    }

    /// What only the leader can say, which may be this one: asks until there is one. Nothing is
    /// changed by asking, so it can always be asked again.
    async fn of_leader<T, H, A>(
        &self,
        mut attempts: Attempts,
        here: impl Fn() -> H,
        at: impl Fn(String) -> A,
    ) -> Result<T, ReadError>
    where
        H: Future<Output = Result<T, NotHere<ReadError>>>,
        A: Future<Output = Result<T, NotThere<ReadError>>>,
    {
        loop {
            if self.stop.is_cancelled() {
                return Err(ReadError::Stopping);
            }
            if let Some(why) = self.expelled.borrow().clone() {
                return Err(ReadError::NoLeader(why));
            }
            let mut reason = "none is known".to_owned();
            let mut leader = match here().await {
                Ok(said) => return Ok(said),
                Err(NotHere::Failed(ReadError::NoLeader(why))) => {
                    reason = why;
                    None
                }
                Err(NotHere::Failed(error)) => return Err(error),
                Err(NotHere::Elsewhere(leader)) => leader,
            };
            while let Some(addr) = leader.take() {
                // What is only asked for can be asked elsewhere: nobody waits for a leader that hangs.
                let said = tokio::select! {
                    said = at(addr.clone()) => said,
                    () = self.led_elsewhere(&addr) => {
                        Err(NotThere::TryAgain(format!("manager {addr} leads no more"), None))
                    }
                };
                match said {
                    Ok(said) => return Ok(said),
                    Err(NotThere::Failed(error)) => return Err(error),
                    Err(NotThere::Denied(why)) => reason = why,
                    Err(NotThere::TryAgain(why, hint)) => {
                        reason = why;
                        leader = hint.filter(|hint| *hint != addr && !attempts.over());
                    }
                }
            }
            if attempts.over() {
                return Err(ReadError::NoLeader(reason));
            }
            if !self.pause(attempts.next_wait()).await {
                return Err(ReadError::Stopping);
            }
        }
    }

    // --- Who leads -------------------------------------------------------

    /// Publishes who leads and where members are, asks for snapshots when they are due, and cuts
    /// off what the log need not keep behind them, until this member stops.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        let mut asked = Work::default();
        let mut lull = Lull::new();
        let mut cut = 0;
        loop {
            let (leadership, purged, snapshot, running, rank) = {
                let metrics = metrics.borrow_watched();
                for (&raft_id, peer) in metrics.membership_config.nodes() {
                    self.pool.locate(raft_id, &peer.addr);
                }
                (
                    self.leadership_of(&metrics),
                    metrics.purged.map_or(0, |id| id.index),
                    metrics.snapshot.map_or(0, |id| id.index),
                    metrics.running_state.clone(),
                    metrics
                        .membership_config
                        .voter_ids()
                        .filter(|id| *id < self.raft_id)
                        .count() as u64,
                )
            };
            self.publish(leadership);
            if let Err(error) = running {
                if !self.stop.is_cancelled() {
                    self.fatal.report("the raft core", &self.dir, error);
                }
                break;
            }
            // An error means that the core has stopped, which the next look shows.
            asked.index = asked.index.max(snapshot);
            let (now, dispensable) = {
                let scales = self.scales.lock();
                (scales.work(), scales.dispensable())
            };
            let due = self.snapshot_due();
            let objects = self.store.state().objects() as u64;
            let proportionate = due
                .in_proportion(self.scales.lock().snapshot_bytes(), objects)
                .after_others(rank);
            // What it costs is no matter when there is nothing else to do.
            if proportionate.is_due(asked, now)
                || (lull.is(Instant::now(), asked, now, rank) && due.is_due(asked, now))
            {
                asked = now;
                let _ = self.raft.trigger().snapshot().await;
            }
            // The core keeps entries by their number.
            let dispensable = dispensable.map_or(0, |index| index.min(snapshot));
            if snapshot > cut && dispensable > purged {
                let _ = self.raft.trigger().purge_log(dispensable).await;
            }
            cut = snapshot;
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = metrics.changed() => if changed.is_err() { break },
                // A lost quorum shows by nothing happening.
                () = tokio::time::sleep(self.timing.election_max) => {}
            }
        }
        // Out of the watch first: publishing while it is borrowed would wait for itself.
        let last = self.leadership.borrow().clone();
        self.publish(Leadership {
            leader: None,
            is_leader: false,
            ..last
        });
    }

    fn publish(&self, new: Leadership) {
        self.leadership.send_if_modified(|old| {
            let changed = *old != new;
            if changed {
                tracing::info!(
                    term = new.term,
                    is_leader = new.is_leader,
                    leader = new.leader.as_ref().map_or("none", |leader| &leader.node_id),
                    "raft leadership"
                );
                *old = new;
            }
            changed
        });
    }

    fn snapshot_due(&self) -> Due {
        let state = self.store.state();
        let spec = state.cluster().and_then(|cluster| cluster.spec.as_ref());
        let entries = spec
            .and_then(|spec| spec.snapshot_interval)
            .filter(|&interval| interval > 0);
        Due {
            entries: entries.unwrap_or(self.snapshot_due.entries),
            ..self.snapshot_due
        }
    }

    fn leadership_of(&self, metrics: &RaftMetrics<TypeConfig>) -> Leadership {
        let term = metrics.current_term;
        // The first entry of a term is its leader's own: once that is applied,
        // so is everything committed before the term.
        let applied_own = metrics
            .last_applied
            .is_some_and(|id| id.leader_id.term == term);
        let leader = metrics.current_leader.and_then(|id| {
            members_of(metrics, self.raft_id, self.reach_window())
                .into_iter()
                .find(|member| member.raft_id == id)
                // Reachability is not part of who leads.
                .map(|member| Member {
                    reachable: true,
                    ..member
                })
        });
        Leadership {
            term,
            is_leader: metrics.state.is_leader() && applied_own && self.has_quorum(metrics),
            leader,
        }
    }

    /// Leader: whether a quorum has answered lately.
    fn has_quorum(&self, metrics: &RaftMetrics<TypeConfig>) -> bool {
        let alone = metrics.membership_config.voter_ids().count() == 1;
        let patience = (self.timing.election_max * 4).max(Duration::from_secs(2));
        alone
            || metrics
                .last_quorum_acked
                .is_some_and(|acked| acked.elapsed() < patience)
    }

    /// A leader has been heard.
    pub(crate) fn hear(&self) {
        *self.heard.lock() = Instant::now();
    }

    /// Whether there has been no leader for so long that this member may have been taken out of
    /// the group meanwhile: nobody tells it.
    fn in_doubt(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.state.is_leader() {
            return !self.has_quorum(&metrics);
        }
        // Others would have been elected meanwhile. To ask for nothing costs next to nothing.
        self.heard.lock().elapsed() >= self.timing.election_max * 4
    }

    /// A member that has not answered for this long counts as unreachable.
    fn reach_window(&self) -> Duration {
        (self.timing.election_max * 3).max(Duration::from_millis(1500))
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        members_of(&metrics, self.raft_id, self.reach_window())
    }

    pub(crate) fn progress(&self) -> Progress {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.log_id();
        Progress {
            voted_term: metrics.vote.leader_id().term,
            last_index: metrics.last_log_index.unwrap_or(0),
            committed: metrics.local_committed.map_or(0, |id| id.index),
            membership: membership.as_ref().map_or(0, |id| id.index),
        }
    }

    /// Leader: the last entry that a member is known to have.
    pub(crate) fn matched(&self, raft_id: u64) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let matched = metrics.replication.as_ref()?.get(&raft_id)?.as_ref()?;
        Some(matched.index)
    }

    /// The address of the leader, unless this one leads or none is known.
    pub(crate) fn leader_addr(&self) -> Option<String> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|&id| id != self.raft_id)?;
        let peer = metrics.membership_config.get_node(&leader)?;
        Some(peer.addr.clone())
    }

    // --- Membership ------------------------------------------------------

    pub(crate) async fn add_member(&self, member: Member) -> Result<(), MembershipError> {
        let _turn = self.one_change.acquire().await.map_err(failed)?;
        let id = member.raft_id;
        let peer = Peer {
            node_id: member.node_id.to_string(),
            addr: member.addr.clone(),
        };
        let metrics = self.leader_metrics()?;
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let former: BTreeSet<u64> = membership
            .nodes()
            .filter(|(other, known)| **other != id && known.node_id == peer.node_id)
            .map(|(other, _)| *other)
            .collect();
        match membership.get_node(&id) {
            Some(known) if *known != peer => {
                let moved = BTreeMap::from([(id, peer)]);
                self.change(ChangeMembers::SetNodes(moved)).await?;
            }
            Some(_) => {}
            None => {
                let new = BTreeMap::from([(id, peer)]);
                self.change(ChangeMembers::AddNodes(new)).await?;
            }
        }
        if !voters.contains(&id) {
            if let Err(error) = self.caught_up(id).await {
                if matches!(error, MembershipError::Failed(_)) {
                    // It can come again; as a learner that never answers it would only be in the way.
                    self.change(ChangeMembers::RemoveNodes([id].into())).await?;
                }
                return Err(error);
            }
            let mut voters = &voters - &former;
            voters.insert(id);
            self.change(ChangeMembers::ReplaceAllVoters(voters)).await?;
        }
        let left: BTreeSet<u64> = former
            .into_iter()
            .filter(|id| self.metrics().membership_config.get_node(id).is_some())
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        // The node was wiped and has come back as another member.
        self.change(ChangeMembers::RemoveNodes(left)).await
    }

    fn leader_metrics(&self) -> Result<RaftMetrics<TypeConfig>, MembershipError> {
        let metrics = self.metrics();
        if metrics.state.is_leader() {
            Ok(metrics)
        } else {
            Err(MembershipError::NotLeader)
        }
    }

    /// Returns once the learner has everything that was in the log when this was called.
    async fn caught_up(&self, id: u64) -> Result<(), MembershipError> {
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::VoterBeforeCaughtUp) {
            return Ok(());
        }
        let target = self.leader_metrics()?.last_log_index;
        let mut metrics = self.raft.metrics();
        let wait = async {
            loop {
                {
                    let now = metrics.borrow_watched();
                    let Some(replication) = &now.replication else {
                        return Err(MembershipError::NotLeader);
                    };
                    let matched = replication.get(&id).copied().flatten();
                    if matched.map(|id| id.index) >= target {
                        return Ok(());
                    }
                }
                metrics.changed().await.map_err(failed)?;
            }
        };
        tokio::select! {
            () = self.stop.cancelled() => Err(failed("the manager is stopping")),
            result = tokio::time::timeout(CATCH_UP_PATIENCE, wait) => result.unwrap_or_else(|_| {
                Err(failed(format!("it has not caught up within {CATCH_UP_PATIENCE:?}")))
            }),
        }
    }

    /// Changes the membership, waiting for a change that is under way.
    async fn change(&self, change: ChangeMembers<u64, Peer>) -> Result<(), MembershipError> {
        let mut attempts = Attempts::new(CHANGE_PATIENCE);
        loop {
            let changing = self.raft.change_membership(change.clone(), false);
            let changed = tokio::time::timeout(CHANGE_PATIENCE, changing).await;
            let error = match changed {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(RaftError::APIError(error))) => error,
                Ok(Err(RaftError::Fatal(error))) => return Err(failed(error)),
                Err(_) => {
                    return Err(failed(format!("not committed within {CHANGE_PATIENCE:?}")));
                }
            };
            let wait = matches!(
                error,
                ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_)
                        | ChangeMembershipError::UncommittedLeaderLog(_)
                )
            );
            match error {
                ClientWriteError::ForwardToLeader(_) => return Err(MembershipError::NotLeader),
                error if !wait || attempts.over() => return Err(failed(error)),
                _ => {}
            }
            if !self.pause(attempts.next_wait()).await {
                return Err(failed("the manager is stopping"));
            }
        }
    }

    pub(crate) async fn remove_member(&self, raft_id: u64) -> Result<(), MembershipError> {
        {
            let _turn = self.one_change.acquire().await.map_err(failed)?;
            let members = self.members_without(raft_id).await?;
            let Some(member) = members.iter().find(|member| member.raft_id == raft_id) else {
                return Ok(());
            };
            if !member.voter {
                return self
                    .change(ChangeMembers::RemoveNodes([raft_id].into()))
                    .await;
            }
            may_remove(&members, raft_id)
                .map_err(|reason| MembershipError::QuorumLoss { reason })?;
            if raft_id != self.raft_id {
                return self
                    .change(ChangeMembers::RemoveVoters([raft_id].into()))
                    .await;
            }
        }
        self.hand_over().await?;
        self.ask_to_leave().await
    }

    /// The members, by whom it is decided whether `raft_id` may go. A leader that was elected just
    /// now has not heard from everybody yet: for those who would decide it waits as long as a
    /// member may be silent that counts as reachable.
    async fn members_without(&self, raft_id: u64) -> Result<Vec<Member>, MembershipError> {
        let mut watched = self.raft.metrics();
        let mut patience = pin!(tokio::time::sleep(self.reach_window()));
        loop {
            let metrics = watched.borrow_watched().clone();
            if !metrics.state.is_leader() {
                return Err(MembershipError::NotLeader);
            }
            let members = members_of(&metrics, self.raft_id, self.reach_window());
            let voter = |member: &Member| member.voter && member.raft_id == raft_id;
            let decided = !members.iter().any(voter)
                || may_remove(&members, raft_id).is_ok()
                || all_heard(&metrics, self.raft_id);
            if decided {
                return Ok(members);
            }
            tokio::select! {
                changed = watched.changed() => changed.map_err(failed)?,
                () = &mut patience => return Ok(members),
            }
        }
    }

    /// Hands leadership to the voter that has most, and waits until it is gone.
    pub(crate) async fn hand_over(&self) -> Result<(), MembershipError> {
        let metrics = self.leader_metrics()?;
        let matched = |id: u64| {
            let replication = metrics.replication.as_ref()?;
            replication.get(&id).copied().flatten()
        };
        let heir = members_of(&metrics, self.raft_id, self.reach_window())
            .into_iter()
            .filter(|member| member.voter && member.reachable && member.raft_id != self.raft_id)
            .map(|member| member.raft_id)
            .max_by_key(|&id| matched(id))
            .ok_or_else(|| failed("no other manager can lead"))?;
        self.raft
            .trigger()
            .transfer_leader(heir)
            .await
            .map_err(failed)?;
        let mut watched = self.raft.metrics();
        let gone = async {
            loop {
                let leader = watched.borrow_watched().current_leader;
                if leader.is_some_and(|id| id != self.raft_id) {
                    return Ok(());
                }
                watched.changed().await.map_err(failed)?;
            }
        };
        tokio::time::timeout(HAND_OVER_PATIENCE, gone)
            .await
            .unwrap_or_else(|_| Err(failed("leadership was not taken over")))
    }

    /// Asks the leader, another one, to take this node out.
    pub(crate) async fn ask_to_leave(&self) -> Result<(), MembershipError> {
        let mut attempts = Attempts::new(CHANGE_PATIENCE);
        loop {
            let mut reason = "none is known".to_owned();
            let mut leader = self.leader_addr();
            while let Some(addr) = leader.take() {
                let request = LeaveRequest {
                    node_id: self.node_id.to_string(),
                };
                let call = async {
                    self.pool
                        .client(&addr, Lane::Requests)?
                        .leave(request)
                        .await
                };
                let answer = tokio::time::timeout(CHANGE_PATIENCE * 2, call).await;
                match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
                    Ok(_) => return Ok(()),
                    Err(status) if not_done(&status) => {
                        reason = status.message().to_owned();
                        leader = leader_hint(&status).filter(|hint| *hint != addr);
                    }
                    Err(status) => return Err(failed(status.message())),
                }
            }
            if attempts.over() {
                return Err(failed(format!("there is no leader to do it: {reason}")));
            }
            if !self.pause(attempts.next_wait()).await {
                return Err(failed("the manager is stopping"));
            }
        }
    }

    // --- Joining ---------------------------------------------------------

    /// Leader: what a node that wants to be a manager, or asks whether it still is one, is answered.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        node_id: &NodeId,
        request: JoinRequest,
    ) -> Result<JoinResponse, Status> {
        // A member that is told that it is none any more throws its log away: a leader that has
        // been deposed, and does not know of this raft ID yet, must not say so.
        let node = self.newest_here().await?.node(node_id).cloned();
        let node = node.ok_or_else(|| {
            Status::permission_denied(format!("node {node_id} is not in the cluster"))
        })?;
        let current = node.manager_status.as_ref().map(|status| status.raft_id);
        if request.raft_id != 0 && current != Some(request.raft_id) {
            return Err(expelled(format!(
                "raft ID {} is no longer node {node_id}'s; empty its raft directory and join again",
                request.raft_id
            )));
        }
        let wanted = node.spec.as_ref().map(|spec| spec.desired_role());
        if wanted.is_some_and(|role| role != NodeRole::Manager) {
            return Err(Status::permission_denied(format!(
                "node {node_id} is not to be a manager; promote it first"
            )));
        }
        if request.raft_id == 0 {
            let raft_id = self.allocate(node_id, &request.addr).await?;
            return Ok(self.admitted(raft_id));
        }
        self.publish_addr(node_id, &request.addr).await?;
        let member = Member {
            raft_id: request.raft_id,
            node_id: node_id.clone(),
            addr: request.addr,
            voter: true,
            reachable: true,
        };
        match self.add_member(member).await {
            Ok(()) => Ok(self.admitted(request.raft_id)),
            Err(error) => Err(self.membership_status(&error)),
        }
    }

    async fn allocate(&self, node_id: &NodeId, addr: &str) -> Result<u64, Status> {
        self.write(allocation(node_id, addr)).await?;
        let state = self.store.state();
        let status = state.node(node_id).and_then(|n| n.manager_status.as_ref());
        status
            .map(|status| status.raft_id)
            .ok_or_else(|| Status::failed_precondition(format!("node {node_id} is gone")))
    }

    /// Leader: has the node's object say where its manager is, for agents and people. This comes
    /// before the membership, which the member looks at: if only this is done, it asks again.
    async fn publish_addr(&self, node_id: &NodeId, addr: &str) -> Result<(), Status> {
        let node = self.store.state().node(node_id).cloned();
        let Some(node) = node else { return Ok(()) };
        match &node.manager_status {
            Some(status) if status.addr != addr => {
                let moved = object::Object::Node(Node {
                    manager_status: Some(ManagerStatus {
                        addr: addr.to_owned(),
                        ..status.clone()
                    }),
                    // With the version that was seen: whatever else has changed stays.
                    ..(*node).clone()
                });
                self.write(StoreAction {
                    action: Some(Action::Update(Object {
                        object: Some(moved),
                    })),
                })
                .await
            }
            _ => Ok(()),
        }
    }

    async fn write(&self, action: StoreAction) -> Result<(), Status> {
        let transaction = Transaction {
            actions: vec![action],
            proposed_at: Some(std::time::SystemTime::now().into()),
            proposer: self.node_id.to_string(),
            ..Transaction::default()
        };
        match self.propose_here(Command::new(&transaction), None).await {
            Ok(_) => Ok(()),
            Err(NotHere::Elsewhere(leader)) => Err(refused("this manager does not lead", leader)),
            Err(NotHere::Failed(error)) => Err(Status::aborted(error.to_string())),
        }
    }

    fn admitted(&self, raft_id: u64) -> JoinResponse {
        JoinResponse {
            raft_id,
            members: self.members().into_iter().map(peer_of).collect(),
        }
    }

    pub(crate) fn membership_status(&self, error: &MembershipError) -> Status {
        match error {
            MembershipError::NotLeader => refused(&error.to_string(), self.leader_addr()),
            MembershipError::QuorumLoss { .. } => Status::failed_precondition(error.to_string()),
            MembershipError::Failed(_) => Status::aborted(error.to_string()),
        }
    }

    fn is_in(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        membership.voter_ids().any(|id| id == self.raft_id)
            && membership
                .get_node(&self.raft_id)
                .is_some_and(|peer| peer.addr == self.addr)
    }

    /// Has this member made a voter with its present address, unless it is one already. From then
    /// on, asks whether it still is one whenever it is in doubt. Ends when the group has taken it
    /// out for good, which only a leader that has heard from a quorum can know.
    pub(crate) async fn belong(self: Arc<Self>, remotes: Vec<String>) {
        let mut attempts = Attempts::new(Duration::ZERO);
        let mut refused = None;
        while !self.leaving.is_cancelled() {
            let wait = if self.is_in() && !self.in_doubt() {
                self.entered.send_if_modified(|entered| {
                    let news = !matches!(entered, Some(Ok(())));
                    *entered = Some(Ok(()));
                    news
                });
                attempts = Attempts::new(Duration::ZERO);
                self.timing.election_max
            } else {
                match self.ask_in(&remotes).await {
                    Ok(()) => {}
                    Err(NotIn::Expelled(reason)) => {
                        tracing::warn!(%reason, "this manager is no member of the raft group any more");
                        self.entered.send_replace(Some(Err(reason.clone())));
                        self.expelled.send_replace(Some(reason));
                        return;
                    }
                    Err(NotIn::Refused(reason)) => {
                        if refused.as_ref() != Some(&reason) {
                            tracing::error!(%reason, "the raft group does not take this manager in");
                        }
                        self.entered.send_replace(Some(Err(reason.clone())));
                        refused = Some(reason);
                    }
                }
                attempts.next_wait()
            };
            if !self.pause(wait).await {
                return;
            }
        }
    }

    async fn ask_in(&self, remotes: &[String]) -> Result<(), NotIn> {
        if self.raft.is_leader() && !self.in_doubt() {
            self.enter_as_leader().await;
            return Ok(());
        }
        self.enter_by(remotes).await
    }

    /// A leader whose own address has changed.
    async fn enter_as_leader(&self) {
        let me = Member {
            raft_id: self.raft_id,
            node_id: self.node_id.clone(),
            addr: self.addr.clone(),
            voter: true,
            reachable: true,
        };
        let published = self.publish_addr(&self.node_id, &self.addr).await;
        let published = match published {
            Ok(()) => self.add_member(me).await.map_err(|error| error.to_string()),
            Err(status) => Err(status.message().to_owned()),
        };
        if let Err(error) = published {
            tracing::warn!(%error, "cannot publish this manager's new address yet");
        }
    }

    /// Asks the leader, or whoever knows it.
    async fn enter_by(&self, remotes: &[String]) -> Result<(), NotIn> {
        let known = self.members().into_iter().map(|member| member.addr);
        let mut candidates: Vec<String> = self
            .leader_addr()
            .into_iter()
            .chain(known)
            .chain(remotes.iter().cloned())
            .filter(|addr| *addr != self.addr)
            .collect();
        candidates.dedup();
        candidates.reverse();
        let mut asked = BTreeSet::new();
        while let Some(addr) = candidates.pop() {
            if !asked.insert(addr.clone()) {
                continue;
            }
            let request = JoinRequest {
                addr: self.addr.clone(),
                raft_id: self.raft_id,
            };
            let asking = join_at(&self.pool, &addr, request, CATCH_UP_PATIENCE * 2);
            let answer = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                () = self.leaving.cancelled() => return Ok(()),
                answer = asking => answer,
            };
            match answer {
                Ok(_) => return Ok(()),
                Err(status) if status.metadata().contains_key(EXPELLED) => {
                    return Err(NotIn::Expelled(status.message().to_owned()));
                }
                Err(status) if hopeless(&status) => {
                    return Err(NotIn::Refused(status.message().to_owned()));
                }
                Err(status) => {
                    tracing::debug!(%addr, reason = status.message(), "not taken in yet");
                    candidates.extend(leader_hint(&status));
                }
            }
        }
        Ok(())
    }
}

fn peer_of(member: Member) -> RaftPeer {
    RaftPeer {
        raft_id: member.raft_id,
        node_id: member.node_id.to_string(),
        addr: member.addr,
    }
}

/// A member on its way to a follower that asks.
pub(crate) fn sent(member: Member) -> RaftMember {
    RaftMember {
        voter: member.voter,
        reachable: member.reachable,
        peer: Some(peer_of(member)),
    }
}

fn received(member: RaftMember) -> Member {
    let peer = member.peer.unwrap_or_default();
    Member {
        raft_id: peer.raft_id,
        node_id: peer.node_id.into(),
        addr: peer.addr,
        voter: member.voter,
        reachable: member.reachable,
    }
}

/// The action that gives a node its raft ID.
pub(crate) fn allocation(node_id: &str, addr: &str) -> StoreAction {
    StoreAction {
        action: Some(Action::AllocateRaftId(AllocateRaftId {
            node_id: node_id.to_owned(),
            addr: addr.to_owned(),
        })),
    }
}

/// Asks the manager at `addr` to be taken in.
pub(crate) async fn join_at(
    pool: &Pool,
    addr: &str,
    request: JoinRequest,
    within: Duration,
) -> Result<JoinResponse, Status> {
    let call = async { pool.client(addr, Lane::Requests)?.join(request).await };
    tokio::time::timeout(within, call)
        .await
        .map_err(|_| Status::deadline_exceeded(format!("{addr} has not answered")))?
        .map(tonic::Response::into_inner)
}

/// Whether the request was refused for who sent it, before anybody looked at what it asks for.
fn denied(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::PermissionDenied | Code::Unauthenticated
    )
}

/// Whether another attempt would be answered the same.
pub(crate) fn hopeless(status: &Status) -> bool {
    !not_done(status)
        && matches!(
            status.code(),
            Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::InvalidArgument
                | Code::Unauthenticated
        )
}

/// An answer that says that nothing was done, and where the leader is.
pub(crate) fn refused(reason: &str, leader: Option<String>) -> Status {
    let mut status = Status::unavailable(reason);
    let metadata = status.metadata_mut();
    metadata.insert(REFUSED, MetadataValue::from_static("1"));
    if let Some(leader) = leader.and_then(|leader| leader.parse().ok()) {
        metadata.insert(LEADER, leader);
    }
    status
}

/// An answer to a member that has been taken out of the group for good.
fn expelled(reason: String) -> Status {
    let mut status = Status::failed_precondition(reason);
    let metadata = status.metadata_mut();
    metadata.insert(EXPELLED, MetadataValue::from_static("1"));
    status
}

fn again<E>(addr: &str, status: &Status) -> NotThere<E> {
    let reason = format!("manager {addr}: {}", status.message());
    NotThere::TryAgain(reason, leader_hint(status))
}

fn members_of(metrics: &RaftMetrics<TypeConfig>, me: u64, reach_window: Duration) -> Vec<Member> {
    let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
    let reachable = |id: u64| match &metrics.heartbeat {
        // Only a leader has heartbeats.
        None => true,
        Some(_) if id == me => true,
        Some(heartbeats) => heartbeats
            .get(&id)
            .copied()
            .flatten()
            .is_some_and(|heard| heard.elapsed() < reach_window),
    };
    metrics
        .membership_config
        .nodes()
        .map(|(&raft_id, peer)| Member {
            raft_id,
            node_id: NodeId::from(&peer.node_id),
            addr: peer.addr.clone(),
            voter: voters.contains(&raft_id),
            reachable: reachable(raft_id),
        })
        .collect()
}

/// Leader: whether every other voter has answered it since it was elected.
fn all_heard(metrics: &RaftMetrics<TypeConfig>, me: u64) -> bool {
    let Some(heartbeats) = &metrics.heartbeat else {
        return true;
    };
    let mut voters = metrics.membership_config.voter_ids();
    voters.all(|id| id == me || heartbeats.get(&id).copied().flatten().is_some())
}

/// Whether the group can commit without `raft_id`, and can commit that it goes.
fn may_remove(members: &[Member], raft_id: u64) -> Result<(), String> {
    let voters: Vec<&Member> = members.iter().filter(|member| member.voter).collect();
    if voters.len() <= 1 {
        return Err("it is the last manager".into());
    }
    let down: Vec<&str> = voters
        .iter()
        .filter(|member| !member.reachable)
        .map(|member| &*member.node_id)
        .collect();
    let check = |count: usize, reachable: usize, when: &str| {
        let needed = count / 2 + 1;
        if reachable >= needed {
            return Ok(());
        }
        Err(format!(
            "{when}, {reachable} of {count} managers are reachable and {needed} are needed; unreachable: {}",
            down.join(", ")
        ))
    };
    let up = voters.len() - down.len();
    check(voters.len(), up, "now")?;
    let removed_is_up = voters
        .iter()
        .any(|member| member.raft_id == raft_id && member.reachable);
    check(
        voters.len() - 1,
        up - usize::from(removed_is_up),
        "without it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readers_share_the_round_that_has_not_begun_and_no_other() {
        use std::sync::atomic::{AtomicU64, Ordering};
        let rounds: Arc<ReadRounds> = Arc::default();
        let (begun, may_end) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let read = || {
            let (begun, may_end) = (begun.clone(), may_end.clone());
            let round = rounds.join(async move {
                let round = begun.fetch_add(1, Ordering::SeqCst) + 1;
                drop(may_end.acquire().await);
                Ok(round)
            });
            tokio::spawn(async move { round.await.ok() })
        };
        let settle = async || {
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        };
        let first = read();
        settle().await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // They came after it had begun, and one of them gives up.
        let (second, third, gone) = (read(), read(), read());
        settle().await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        gone.abort();
        may_end.add_permits(1);
        assert_eq!(first.await.unwrap(), Some(1));
        assert_eq!(second.await.unwrap(), Some(2));
        assert_eq!(third.await.unwrap(), Some(2));
        assert_eq!(read().await.unwrap(), Some(3));
    }

    fn members(reachable: &[bool]) -> Vec<Member> {
        (1..)
            .zip(reachable)
            .map(|(raft_id, &reachable)| Member {
                raft_id,
                node_id: format!("n{raft_id}").into(),
                addr: String::new(),
                voter: true,
                reachable,
            })
            .collect()
    }

    #[test]
    fn removal_that_would_lose_quorum_is_refused_with_the_reason() {
        assert_eq!(
            may_remove(&members(&[true]), 1).unwrap_err(),
            "it is the last manager"
        );
        let reason = may_remove(&members(&[true, true, false]), 2).unwrap_err();
        assert!(
            reason.contains("1 of 2") && reason.contains("n3"),
            "{reason}"
        );
        // One that cannot commit its own removal.
        let reason = may_remove(&members(&[true, false]), 2).unwrap_err();
        assert!(reason.contains("1 of 2"), "{reason}");
    }

    #[test]
    fn removal_that_keeps_quorum_is_allowed() {
        assert!(may_remove(&members(&[true, true]), 2).is_ok());
        assert!(may_remove(&members(&[true, true, false]), 3).is_ok());
        assert!(may_remove(&members(&[true, true, true, true, false]), 4).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn what_remains_after_an_allowed_removal_has_a_reachable_majority(
            reachable in proptest::collection::vec(proptest::bool::ANY, 1..9),
            pick in 0usize..9,
        ) {
            let members = members(&reachable);
            let removed = members[pick % members.len()].raft_id;
            if may_remove(&members, removed).is_ok() {
                let left: Vec<_> = members.iter().filter(|m| m.raft_id != removed).collect();
                let up = left.iter().filter(|m| m.reachable).count();
                proptest::prop_assert!(2 * up > left.len());
            }
        }
    }
}
