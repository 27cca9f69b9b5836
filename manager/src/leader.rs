//! Starts the leader's loops when this manager begins to lead, and stops them when it ends.
//!
//! [`Leader`] watches leadership. For each term in which this manager leads,
//! [`start_term`] starts every loop and its twin [`Term::stop`] cancels and
//! joins them. Loops write through their [`LoopContext`] only, which puts the
//! term into every transaction: what outlives its term is refused by apply.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use prost::Message;
use swarm_proto::NodeId;
use swarm_proto::defaults::TRANSACTION_MAX;
use swarm_proto::v1::{StoreAction, Transaction, rejection};
use swarm_store::store::Change;
use swarm_store::{Consensus, ProposeError, State, Watch, WatchError};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::clock::{Clock, timestamp};

/// No transaction of a loop has more actions.
pub const ACTIONS_MAX: usize = 200;
/// Transactions of one pass that are on their way at the same time.
const IN_FLIGHT: usize = 8;
/// A loop that panicked starts again after this long.
const RESPAWN_AFTER: Duration = Duration::from_secs(1);
/// Wait before the state is read again after a write with unknown success.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Actions that are committed together or not at all.
pub type Group = Vec<StoreAction>;

/// Something that runs while this manager leads: a name for the log, and an
/// async function that returns soon after its context is cancelled.
#[derive(Clone)]
pub struct LeaderLoop {
    name: &'static str,
    run: Arc<dyn Fn(LoopContext) -> BoxFuture<'static, ()> + Send + Sync>,
}

impl LeaderLoop {
    /// A loop that is called once per term (again if it panics).
    pub fn new<F, R>(name: &'static str, run: R) -> Self
    where
        R: Fn(LoopContext) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Self {
            name,
            run: Arc::new(move |context| run(context).boxed()),
        }
    }
}

impl std::fmt::Debug for LeaderLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LeaderLoop").field(&self.name).finish()
    }
}

/// The loops of this crate's deciding parts. Others (liveness) are pushed behind them.
#[must_use]
pub fn deciding_loops() -> Vec<LeaderLoop> {
    vec![
        LeaderLoop::new("orchestrator", crate::orchestrator::run::run),
        LeaderLoop::new("scheduler", crate::scheduler::run::run),
        LeaderLoop::new("roles", crate::orchestrator::roles::run),
    ]
}

/// What a leader's loop may use.
#[derive(Clone)]
pub struct LoopContext {
    /// The raft group.
    pub consensus: Arc<dyn Consensus>,
    /// The term in which this manager leads.
    pub term: u64,
    /// This manager's node: the proposer.
    pub node_id: NodeId,
    /// Time, as the loop sees it.
    pub clock: Clock,
    /// Cancelled when the term is over or the manager stops.
    pub cancel: CancellationToken,
}

/// A proposal of several groups, as far as it went.
#[derive(Debug, Default)]
pub struct Proposed {
    /// Refused by apply (somebody was faster): decide again from a newer state.
    pub refused: Vec<Group>,
    /// Set when the outcome of some groups is not known, or there is no leader.
    pub failed: Option<ProposeError>,
}

impl std::fmt::Debug for LoopContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoopContext")
            .field("term", &self.term)
            .field("node_id", &self.node_id)
            .finish_non_exhaustive()
    }
}

impl LoopContext {
    /// The time since the Unix epoch.
    #[must_use]
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Commits actions as one transaction of this term. Returns the index.
    ///
    /// # Errors
    /// As [`Consensus::propose`].
    pub async fn propose(&self, actions: Vec<StoreAction>) -> Result<u64, ProposeError> {
        self.consensus
            .propose(Transaction {
                actions,
                proposed_at: Some(timestamp(self.now())),
                proposer: self.node_id.as_str().to_owned(),
                term: self.term,
            })
            .await
    }

    /// Commits groups in transactions that are as large as allowed. A group is never cut,
    /// and one that is refused does not hold up the others.
    pub async fn propose_groups(&self, groups: Vec<Group>) -> Proposed {
        let mut outcome = Proposed::default();
        let mut batches = futures::stream::iter(pack(groups))
            .map(|batch| self.propose_batch(batch))
            .buffer_unordered(IN_FLIGHT);
        while let Some(part) = batches.next().await {
            outcome.refused.extend(part.refused);
            outcome.failed = outcome.failed.or(part.failed);
        }
        outcome
    }

    async fn propose_batch(&self, mut batch: Vec<Group>) -> Proposed {
        let mut outcome = Proposed::default();
        while !batch.is_empty() {
            let rejection = match self.propose(batch.concat()).await {
                Ok(_) => break,
                Err(ProposeError::Rejected(rejection))
                    if rejection.code() != rejection::Code::StaleTerm =>
                {
                    rejection
                }
                Err(error) => {
                    outcome.failed = Some(error);
                    break;
                }
            };
            let mut end = 0;
            let culprit = batch
                .iter()
                .position(|group| {
                    end += group.len();
                    (rejection.action as usize) < end
                })
                .unwrap_or(0);
            tracing::debug!(reason = %rejection.message, "a decision came too late");
            outcome.refused.push(batch.remove(culprit));
        }
        outcome
    }

    /// Waits, after a write whose success is not known, until everything that can still be
    /// committed is in the local state. Returns `false` when the term is over.
    pub async fn settle(&self, error: &ProposeError) -> bool {
        tracing::warn!(%error, "a decision could not be written; deciding again");
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return false,
                () = tokio::time::sleep(RETRY_AFTER) => {}
            }
            tokio::select! {
                () = self.cancel.cancelled() => return false,
                read = self.consensus.read() => if read.is_ok() { return true },
            }
        }
    }

    /// Returns at that time (since the epoch), or never if there is none.
    pub async fn sleep_until(&self, at: Option<Duration>) {
        match at {
            Some(at) => tokio::time::sleep(at.saturating_sub(self.now())).await,
            None => std::future::pending().await,
        }
    }
}

/// Events of the store for a loop that starts with a full pass and starts again when it was too slow.
#[derive(Debug)]
pub struct Feed {
    watch: Watch,
    /// The state after the last change that was taken.
    state: Arc<State>,
}

/// What a [`Feed`] has for its loop.
#[derive(Debug)]
pub enum Fed {
    /// Changes in order; never empty.
    Changes(Vec<Change>),
    /// Changes were lost: look at everything.
    All,
    /// The store is gone.
    Closed,
}

/// Changes that a loop takes in at once before it decides.
const DRAIN_MAX: usize = 4096;

impl Feed {
    /// Starts with the state of now.
    #[must_use]
    pub fn new(context: &LoopContext) -> Self {
        let (state, watch) = context.consensus.store().watch();
        Self { watch, state }
    }

    /// The state after the last change that was taken.
    #[must_use]
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Waits for a change, then takes all that are there. Cancel-safe.
    pub async fn next(&mut self, context: &LoopContext) -> Fed {
        let first = match self.watch.next().await {
            Ok(change) => change,
            Err(error) => return self.renew(context, &error),
        };
        let mut changes = vec![first];
        while changes.len() < DRAIN_MAX {
            match self.watch.try_next() {
                Ok(None) => break,
                Ok(Some(change)) => changes.push(change),
                Err(error) => return self.renew(context, &error),
            }
        }
        if let Some(last) = changes.last() {
            self.state = last.state.clone();
        }
        Fed::Changes(changes)
    }

    fn renew(&mut self, context: &LoopContext, error: &WatchError) -> Fed {
        match error {
            WatchError::Lagged { .. } => {
                *self = Self::new(context);
                Fed::All
            }
            WatchError::Closed => Fed::Closed,
        }
    }
}

/// Cuts groups into batches under both limits.
fn pack(groups: Vec<Group>) -> Vec<Vec<Group>> {
    // Room for the transaction's own fields.
    const SIZE_MAX: usize = TRANSACTION_MAX - 1024;
    let mut batches: Vec<Vec<Group>> = Vec::new();
    let (mut count, mut size) = (0, 0);
    for group in groups {
        let group_size: usize = group.iter().map(|action| action.encoded_len() + 8).sum();
        let fits = count + group.len() <= ACTIONS_MAX && size + group_size <= SIZE_MAX;
        match batches.last_mut() {
            Some(batch) if fits => batch.push(group),
            _ => {
                (count, size) = (0, 0);
                batches.push(vec![group]);
            }
        }
        if let Some(last) = batches.last().and_then(|batch| batch.last()) {
            count += last.len();
            size += group_size;
        }
    }
    batches
}

/// Owns the leader's loops of this manager.
#[derive(Debug)]
pub struct Leader {
    cancel: CancellationToken,
    handle: JoinHandle<()>,
}

impl Leader {
    /// Begins to watch leadership. `loops` run whenever this manager leads.
    #[must_use]
    pub fn start(
        consensus: Arc<dyn Consensus>,
        node_id: NodeId,
        clock: Clock,
        loops: Vec<LeaderLoop>,
    ) -> Self {
        let cancel = CancellationToken::new();
        let watching = watch_leadership(consensus, node_id, clock, loops, cancel.clone());
        Self {
            cancel,
            handle: tokio::spawn(watching.instrument(tracing::info_span!("leader"))),
        }
    }

    /// Stops the loops, if any run, and returns once they have ended.
    pub async fn stop(self) {
        self.cancel.cancel();
        if let Err(error) = self.handle.await {
            tracing::error!(%error, "the leadership watcher failed");
        }
    }
}

async fn watch_leadership(
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    clock: Clock,
    loops: Vec<LeaderLoop>,
    cancel: CancellationToken,
) {
    let mut leadership = consensus.leadership();
    while !cancel.is_cancelled() {
        let (term, leads) = {
            let now = leadership.borrow_and_update();
            (now.term, now.is_leader)
        };
        let running = leads.then(|| {
            start_term(
                LoopContext {
                    consensus: consensus.clone(),
                    term,
                    node_id: node_id.clone(),
                    clock: clock.clone(),
                    cancel: cancel.child_token(),
                },
                &loops,
            )
        });
        let changed = leadership.wait_for(|now| (now.term, now.is_leader) != (term, leads));
        let closed = tokio::select! {
            () = cancel.cancelled() => false,
            changed = changed => changed.is_err(),
        };
        if let Some(running) = running {
            running.stop().await;
        }
        if closed {
            return;
        }
    }
}

/// The loops of one term.
#[derive(Debug)]
struct Term {
    term: u64,
    cancel: CancellationToken,
    loops: JoinSet<()>,
}

fn start_term(context: LoopContext, loops: &[LeaderLoop]) -> Term {
    tracing::info!(
        term = context.term,
        "this manager leads; starting the leader's loops"
    );
    let mut set = JoinSet::new();
    for leader_loop in loops {
        let span = tracing::info_span!("loop", name = leader_loop.name, term = context.term);
        set.spawn(supervise(leader_loop.clone(), context.clone()).instrument(span));
    }
    Term {
        term: context.term,
        cancel: context.cancel,
        loops: set,
    }
}

impl Term {
    async fn stop(mut self) {
        self.cancel.cancel();
        while let Some(ended) = self.loops.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a leader's loop failed while it stopped");
            }
        }
        tracing::info!(term = self.term, "the leader's loops have stopped");
    }
}

/// Runs a loop until the term ends; one that panics or returns early starts again.
async fn supervise(leader_loop: LeaderLoop, context: LoopContext) {
    loop {
        let run = AssertUnwindSafe((leader_loop.run)(context.clone())).catch_unwind();
        match run.await {
            _ if context.cancel.is_cancelled() => return,
            Ok(()) => tracing::warn!("a leader's loop ended early; starting it again"),
            Err(_) => tracing::error!("a leader's loop panicked; starting it again"),
        }
        tokio::select! {
            () = context.cancel.cancelled() => return,
            () = tokio::time::sleep(RESPAWN_AFTER) => {}
        }
    }
}
