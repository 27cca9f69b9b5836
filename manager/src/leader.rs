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
use swarm_proto::v1::{StoreAction, Transaction, rejection, store_action};
use swarm_store::store::Change;
use swarm_store::{Consensus, Event, ProposeError, State, Watch, WatchError};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::clock::{Clock, timestamp};

/// No transaction of a loop changes more objects: while it is applied, nothing else is.
pub const ACTIONS_MAX: usize = 2000;
/// Transactions of one pass that are on their way at the same time.
const IN_FLIGHT: usize = 8;
/// A loop that panicked starts again after this long.
const RESPAWN_AFTER: Duration = Duration::from_secs(1);
/// Wait before the state is read again after a write with unknown success, and before what was
/// refused is decided again if nothing changes.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(100);

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
                #[cfg(not(feature = "museum"))]
                term: self.term,
                #[cfg(feature = "museum")]
                term: if swarm_proto::museum::on(swarm_proto::museum::Bug::LoopsGoOn) {
                    0
                } else {
                    self.term
                },
                ..Transaction::default()
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
                // Large specs: decisions hold in parts too, the rest is decided again.
                Err(ProposeError::TooLarge { .. }) if batch.concat().len() > 1 => {
                    let actions = batch.concat().into_iter().map(|action| vec![action]);
                    for single in actions.collect::<Vec<_>>() {
                        let part = Box::pin(self.propose_batch(vec![single])).await;
                        outcome.refused.extend(part.refused);
                        outcome.failed = outcome.failed.or(part.failed);
                    }
                    break;
                }
                Err(error @ ProposeError::TooLarge { .. }) => {
                    tracing::error!(%error, "a decision cannot be written");
                    outcome.refused.append(&mut batch);
                    break;
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
        if matches!(error, ProposeError::Rejected(_) | ProposeError::Stopping) {
            // The term is over, although this manager may not know it yet.
            self.cancel.cancelled().await;
            return false;
        }
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
}

/// Returns at that time, or never if there is none.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What happens in the store, for a loop that starts with a look at everything. One that was too slow for
/// the store's memory is told the difference between what it knew and what there is: the more there is, the less
/// could it afford to look at everything again.
#[derive(Debug)]
pub struct Feed {
    watch: Watch,
    /// Exactly as after all changes that were taken.
    state: Arc<State>,
}

/// Events after which a loop takes in no more before it decides.
const DRAIN: usize = 4096;

/// What a loop looks at (events, tasks, actions, each of some microseconds) before others of its thread get a
/// turn. Sessions and requests share their threads with the loops.
const TURN: usize = 1024;

/// Has a loop that computes give way in time.
#[derive(Debug, Default)]
pub(crate) struct Turn(usize);

impl Turn {
    /// So much was looked at: others get a turn if that is enough for one.
    pub(crate) async fn spent(&mut self, work: usize) {
        self.0 += work;
        if self.0 >= TURN {
            self.0 = 0;
            tokio::task::yield_now().await;
        }
    }

    /// Hands out events in parts, each with the state after its change, as small as a turn.
    pub(crate) async fn each(
        &mut self,
        changes: &[Change],
        mut take: impl FnMut(&State, &[Event]),
    ) {
        for change in changes {
            for part in change.events.chunks(TURN) {
                take(&change.state, part);
                self.spent(part.len()).await;
            }
        }
    }
}

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

    /// Waits for a change, then takes all that are there: in order, never empty. `None` when the
    /// store is gone. Cancel-safe.
    pub async fn next(&mut self, context: &LoopContext) -> Option<Vec<Change>> {
        let changes = match self.watch.next().await {
            Ok(first) => self.watch.drain(first, DRAIN),
            Err(error) => Err(error),
        };
        let changes = match changes {
            Ok(changes) => changes,
            Err(WatchError::Lagged { .. }) => {
                let (state, watch) = context.consensus.store().watch();
                self.watch = watch;
                vec![Change::between(&self.state, state)]
            }
            Err(WatchError::Closed) => return None,
        };
        if let Some(last) = changes.last() {
            self.state = last.state.clone();
        }
        Some(changes)
    }
}

/// How many objects an action changes.
pub(crate) fn weight(action: &StoreAction) -> usize {
    match &action.action {
        Some(store_action::Action::AssignTasks(decided)) => decided.assignments.len().max(1),
        Some(store_action::Action::CreateTasks(wanted)) => wanted.tasks.len().max(1),
        _ => 1,
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
        let group_weight: usize = group.iter().map(weight).sum();
        let fits = count + group_weight <= ACTIONS_MAX && size + group_size <= SIZE_MAX;
        match batches.last_mut() {
            Some(batch) if fits => batch.push(group),
            _ => {
                (count, size) = (0, 0);
                batches.push(vec![group]);
            }
        }
        count += group_weight;
        size += group_size;
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
    #[cfg(feature = "museum")]
    let mut going_on = Vec::new();
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
            #[cfg(feature = "museum")]
            if swarm_proto::museum::on(swarm_proto::museum::Bug::LoopsGoOn)
                && !closed
                && !cancel.is_cancelled()
            {
                going_on.push(running);
                continue;
            }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;
    use swarm_proto::task_state::is_terminal;
    use swarm_proto::v1::{Rejection, Task, TaskState};
    use swarm_store::testing::{self, LocalConsensus};
    use swarm_store::{Leadership, Member, MembershipError, ReadError};
    use tokio::sync::watch;

    use super::*;
    use crate::world::state_of;

    /// Time that tokio can pause and skip.
    fn test_clock() -> Clock {
        let begin = Instant::now();
        Arc::new(move || Duration::from_secs(1_000_000) + begin.elapsed())
    }

    fn context(consensus: Arc<dyn Consensus>) -> LoopContext {
        LoopContext {
            consensus,
            term: 1,
            node_id: "local".into(),
            clock: test_clock(),
            cancel: CancellationToken::new(),
        }
    }

    fn lead(consensus: &LocalConsensus, term: u64, is_leader: bool) {
        let now = consensus.leadership().borrow().clone();
        consensus.set_leadership(Leadership {
            term,
            is_leader,
            ..now
        });
    }

    /// Waits until the state satisfies `fact`.
    async fn until(consensus: &LocalConsensus, fact: impl Fn(&State) -> bool) -> Arc<State> {
        let (state, mut watch) = consensus.store().watch();
        if fact(&state) {
            return state;
        }
        loop {
            let change = watch.next().await.unwrap();
            if fact(&change.state) {
                return change.state;
            }
        }
    }

    fn running(state: &State, service: &str) -> usize {
        let runs = |task: &&Arc<Task>| {
            state_of(task) == TaskState::Running && task.desired_state() == TaskState::Running
        };
        state.tasks_of_service(service).filter(runs).count()
    }

    /// Does for every node what its agent would, as a loop that never ends.
    async fn agents(consensus: Arc<LocalConsensus>) {
        let (mut state, mut watch) = consensus.store().watch();
        loop {
            for task in state.tasks() {
                let now = state_of(task);
                let next = match now {
                    _ if task.node_id.is_empty() || is_terminal(now) => continue,
                    _ if task.desired_state() > TaskState::Running => TaskState::Shutdown,
                    TaskState::Assigned => TaskState::Ready,
                    TaskState::Ready if task.desired_state() == TaskState::Running => {
                        TaskState::Running
                    }
                    _ => continue,
                };
                consensus
                    .write([testing::report(&task.id, next, 1)])
                    .unwrap();
            }
            state = watch.next().await.unwrap().state;
        }
    }

    fn cluster_of(nodes: usize) -> Arc<LocalConsensus> {
        let consensus = LocalConsensus::new();
        consensus
            .write([testing::create(testing::cluster("c"))])
            .unwrap();
        for at in 0..nodes {
            let node = testing::node(&format!("n{at}"), "");
            consensus.write([testing::create(node)]).unwrap();
        }
        consensus
    }

    #[tokio::test(start_paused = true)]
    async fn loops_run_in_each_term_that_is_led_and_are_joined_after_it() {
        let consensus = LocalConsensus::new();
        let (terms, mut seen) = watch::channel(0);
        let alive = Arc::new(AtomicUsize::new(0));
        let counted = alive.clone();
        let count = LeaderLoop::new("count", move |context: LoopContext| {
            let (alive, terms) = (counted.clone(), terms.clone());
            async move {
                alive.fetch_add(1, Ordering::SeqCst);
                terms.send_replace(context.term);
                context.cancel.cancelled().await;
                alive.fetch_sub(1, Ordering::SeqCst);
            }
        });
        let leader = Leader::start(
            consensus.clone(),
            "local".into(),
            test_clock(),
            vec![count.clone(), count],
        );
        seen.wait_for(|&term| term == 1).await.unwrap();
        lead(&consensus, 2, false);
        lead(&consensus, 3, true);
        seen.wait_for(|&term| term == 3).await.unwrap();
        leader.stop().await;
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_loop_that_was_too_slow_is_told_the_difference() {
        let consensus = LocalConsensus::new();
        let context = context(consensus.clone());
        let service = testing::create(testing::service("s", "web", &[]));
        consensus.write([service]).unwrap();
        // Few states are remembered, and more changes; then not even those.
        for (changes, each) in [(300, 1), (50, 2000)] {
            let mut feed = Feed::new(&context);
            let before = feed.state().index();
            let name = |change, number| format!("{each}-{change}-{number}");
            for change in 0..changes {
                let made = (0..each)
                    .map(|number| testing::create(testing::task(&name(change, number), "s", &[])));
                consensus.write(made).unwrap();
            }
            assert_eq!(consensus.store().watch_from(before).is_ok(), each == 1);
            let told = feed.next(&context).await.unwrap();
            let events = told.iter().flat_map(|change| change.events.iter());
            let told: std::collections::BTreeSet<&str> =
                events.map(swarm_store::Event::id).collect();
            assert_eq!(told.len(), changes * each);
            assert_eq!(feed.state().index(), consensus.store().state().index());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_panics_starts_again() {
        let consensus = LocalConsensus::new();
        let (runs, mut seen) = watch::channel(0);
        let fragile = LeaderLoop::new("fragile", move |context: LoopContext| {
            let runs = runs.clone();
            async move {
                runs.send_modify(|runs| *runs += 1);
                assert!(*runs.borrow() > 2, "on purpose");
                context.cancel.cancelled().await;
            }
        });
        let leader = Leader::start(consensus, "local".into(), test_clock(), vec![fragile]);
        seen.wait_for(|&runs| runs == 3).await.unwrap();
        leader.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_runs_survives_a_node_and_a_change_of_leader_and_is_removed() {
        let consensus = cluster_of(3);
        let busy = tokio::spawn(agents(consensus.clone()));
        let start = || {
            Leader::start(
                consensus.clone(),
                "local".into(),
                test_clock(),
                deciding_loops(),
            )
        };
        let leader = start();
        let mut service = testing::service("s", "web", &[]);
        service.spec.as_mut().unwrap().mode = crate::world::replicated(6);
        consensus.write([testing::create(service)]).unwrap();
        until(&consensus, |state| running(state, "s") == 6).await;

        let down = swarm_proto::v1::NodeState::Down;
        consensus.write([testing::observe("n0", down)]).unwrap();
        until(&consensus, |state| {
            let on_n0 = |task: &&Arc<Task>| {
                task.node_id == "n0" && task.desired_state() <= TaskState::Running
            };
            running(state, "s") == 6 && state.tasks().filter(on_n0).count() == 0
        })
        .await;

        lead(&consensus, 1, false);
        let state = consensus.store().state();
        let mut service = (**state.service("s").unwrap()).clone();
        service.spec.as_mut().unwrap().mode = crate::world::replicated(9);
        consensus.write([testing::update(service)]).unwrap();
        lead(&consensus, 2, true);
        until(&consensus, |state| running(state, "s") == 9).await;

        // A task fails: its successor waits for the delay, in time that tokio skips.
        let failed = consensus
            .store()
            .state()
            .tasks_of_service("s")
            .find(|t| t.node_id == "n1" && state_of(t) == TaskState::Running)
            .unwrap()
            .id
            .clone();
        consensus
            .write([testing::report(&failed, TaskState::Failed, 2)])
            .unwrap();
        until(&consensus, |state| running(state, "s") == 8).await;
        let begin = Instant::now();
        until(&consensus, |state| running(state, "s") == 9).await;
        assert!(begin.elapsed() >= Duration::from_secs(5));

        consensus
            .write([testing::remove(swarm_proto::v1::ObjectKind::Service, "s")])
            .unwrap();
        // What a node that is down holds stays until it is heard of or given up.
        until(&consensus, |state| {
            state.tasks().all(|task| task.node_id == "n0")
        })
        .await;
        leader.stop().await;
        busy.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_behind_many_that_no_node_takes_is_placed() {
        let consensus = cluster_of(10);
        let wants = |id: &str, label: &str| {
            let mut service = testing::service(id, id, &[]);
            let spec = service.spec.as_mut().unwrap();
            spec.mode = crate::world::replicated(1);
            let placement = spec
                .task
                .as_mut()
                .unwrap()
                .placement
                .get_or_insert_default();
            placement.constraints = vec![format!("node.labels.has=={label}")];
            testing::create(service)
        };
        let never = (0..30).map(|number| wants(&format!("a{number}"), "nobody"));
        consensus.write(never.chain([wants("z", "one")])).unwrap();
        let leader = Leader::start(
            consensus.clone(),
            "local".into(),
            test_clock(),
            deciding_loops(),
        );
        let explained = |task: &Arc<Task>| task.status.as_ref().is_some_and(|s| !s.err.is_empty());
        let all_wait = |state: &State| state.tasks().filter(|task| explained(task)).count() == 31;
        let waiting = tokio::time::timeout(Duration::from_secs(60), until(&consensus, all_wait));
        let state = waiting.await.expect("each is told why");
        let mut node = (**state.node("n5").unwrap()).clone();
        let annotations = node
            .spec
            .as_mut()
            .unwrap()
            .annotations
            .get_or_insert_default();
        annotations.labels.insert("has".into(), "one".into());
        consensus.write([testing::update(node)]).unwrap();
        let placed = until(&consensus, |state| {
            state.tasks_of_service("z").any(|task| task.node_id == "n5")
        });
        tokio::time::timeout(Duration::from_secs(60), placed)
            .await
            .expect("it is tried");
        leader.stop().await;
    }

    #[tokio::test]
    async fn a_group_that_is_refused_does_not_hold_up_the_others() {
        let consensus = cluster_of(1);
        consensus
            .write([testing::create(testing::service("s", "web", &[]))])
            .unwrap();
        let context = context(consensus.clone());
        let group = |id: &str, service: &str| {
            vec![
                testing::create(testing::task(id, service, &[])),
                testing::create(testing::task(&format!("{id}b"), service, &[])),
            ]
        };
        let proposed = context
            .propose_groups(vec![group("a", "s"), group("b", "gone"), group("c", "s")])
            .await;
        assert_eq!(proposed.refused.len(), 1);
        assert!(proposed.failed.is_none());
        let ids: Vec<String> = consensus
            .store()
            .state()
            .tasks()
            .map(|t| t.id.clone())
            .collect();
        assert_eq!(ids, ["a", "ab", "c", "cb"]);
    }

    /// A raft group in which something happens before each proposal, or instead of it.
    struct Meddled<F>(Arc<LocalConsensus>, F);

    #[async_trait::async_trait]
    impl<F> Consensus for Meddled<F>
    where
        F: Fn(&LocalConsensus) -> Result<(), Rejection> + Send + Sync + 'static,
    {
        fn store(&self) -> &Arc<swarm_store::Store> {
            self.0.store()
        }
        async fn propose(&self, transaction: Transaction) -> Result<u64, ProposeError> {
            self.1(&self.0).map_err(ProposeError::Rejected)?;
            self.0.propose(transaction).await
        }
        async fn read(&self) -> Result<Arc<State>, ReadError> {
            self.0.read().await
        }
        fn leadership(&self) -> watch::Receiver<Leadership> {
            self.0.leadership()
        }
        fn members(&self) -> Vec<Member> {
            self.0.members()
        }
        async fn members_heard(&self) -> Result<Vec<Member>, ReadError> {
            self.0.members_heard().await
        }
        async fn add_member(&self, member: Member) -> Result<(), MembershipError> {
            self.0.add_member(member).await
        }
        async fn remove_member(&self, raft_id: u64) -> Result<(), MembershipError> {
            self.0.remove_member(raft_id).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_whose_term_is_over_waits_for_its_end_and_writes_nothing() {
        let consensus = cluster_of(1);
        consensus
            .write([testing::create(testing::service("s", "web", &[]))])
            .unwrap();
        let deposed = |_: &LocalConsensus| {
            Err(Rejection {
                code: rejection::Code::StaleTerm.into(),
                ..Rejection::default()
            })
        };
        let context = context(Arc::new(Meddled(consensus.clone(), deposed)));
        let index = consensus.store().state().index();
        let cancel = context.cancel.clone();
        let running = tokio::spawn(crate::orchestrator::run::run(context));
        tokio::time::advance(Duration::from_secs(10)).await;
        cancel.cancel();
        running.await.unwrap();
        assert_eq!(consensus.store().state().index(), index);
    }

    #[tokio::test(start_paused = true)]
    async fn a_decision_that_mere_progress_has_overtaken_is_made_again() {
        let consensus = cluster_of(1);
        let mut service = testing::service("s", "web", &[]);
        service.spec.as_mut().unwrap().mode = crate::world::replicated(1);
        consensus.write([testing::create(service)]).unwrap();
        let state = consensus.store().state();
        let service = state.service("s").unwrap();
        // A successor that is to run, because the one before has ended.
        let mut task = testing::task("t", "s", &[]);
        task.slot = 1;
        task.node_id = "n0".into();
        task.spec = service.spec.as_ref().unwrap().task.clone();
        task.spec_version = service.spec_version;
        task.desired_state = TaskState::Ready.into();
        consensus.write([testing::create(task)]).unwrap();
        consensus
            .write([testing::report("t", TaskState::Assigned, 1)])
            .unwrap();

        let progress = AtomicUsize::new(0);
        let overtaken = move |consensus: &LocalConsensus| {
            if progress.fetch_add(1, Ordering::SeqCst) == 0 {
                let report = testing::report("t", TaskState::Preparing, 2);
                consensus.write([report]).unwrap();
            }
            Ok(())
        };
        let context = context(Arc::new(Meddled(consensus.clone(), overtaken)));
        let cancel = context.cancel.clone();
        let running = tokio::spawn(crate::orchestrator::run::run(context));
        let released = until(&consensus, |state| {
            let task = state.task("t").unwrap();
            task.desired_state() == TaskState::Running
        });
        tokio::time::timeout(Duration::from_secs(60), released)
            .await
            .expect("the successor is released");
        cancel.cancel();
        running.await.unwrap();
    }

    proptest! {
        #[test]
        fn packed_groups_are_whole_in_order_and_under_the_limits(
            sizes in prop::collection::vec((1..6_usize, 0..200_000_usize), 0..60),
        ) {
            let groups: Vec<Group> = sizes
                .iter()
                .enumerate()
                .map(|(at, &(count, bytes))| {
                    let make = |part| {
                        let mut task = testing::task(&format!("{at}-{part}"), "s", &[]);
                        task.service_id = "x".repeat(bytes / count);
                        testing::create(task)
                    };
                    (0..count).map(make).collect()
                })
                .collect();
            let batches = pack(groups.clone());
            prop_assert_eq!(batches.concat(), groups);
            for batch in batches {
                let actions = batch.concat();
                prop_assert!(actions.len() <= ACTIONS_MAX);
                let transaction = Transaction {
                    actions,
                    proposer: "x".repeat(64),
                    ..Transaction::default()
                };
                prop_assert!(transaction.encoded_len() <= TRANSACTION_MAX);
            }
        }
    }
}
