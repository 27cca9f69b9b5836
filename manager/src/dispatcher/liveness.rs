//! Which nodes are alive: what each manager hears, and what the leader concludes.
//!
//! Every manager collects whom its sessions heard and reports it to the leader
//! once per heartbeat period, and at once when a session opens or a node says
//! goodbye. One whose reports do not arrive says so to its agents, a few at first, which then look for
//! a manager that is heard. The leader marks a node DOWN that nobody has heard for a grace
//! period, and READY again when it is heard. Where the manager has gone silent that heard a node last,
//! the node may live, and gets as long as agents need to go elsewhere. Of many that fall silent at once few are
//! DOWN each second (`Doubt`). [`Tracker`] decides, on a monotonic
//! clock that is handed in; the loops here only carry messages and proposals.
//! Sessions, tasks and tables are never touched from here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use swarm_identity::{Caller, PeerIdentity};
use swarm_proto::NodeId;
use swarm_proto::defaults::{
    HEARTBEAT, HEARTBEATS_MISSED, SESSION_BACKOFF_MAX, SESSION_PROBE_INTERVAL,
    SESSION_PROBE_TIMEOUT,
};
use swarm_proto::v1::liveness_client::LivenessClient;
use swarm_proto::v1::liveness_server;
use swarm_proto::v1::{
    LivenessAck, LivenessReport, Node, NodeObservation, NodeRole, NodeState, NodeStatus,
    StoreAction, store_action,
};
use swarm_store::{Consensus, Leadership, State};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::REST;
use crate::clock::span;
use crate::leader::{ACTIONS_MAX, Feed, LeaderLoop, LoopContext, sleep_until};

/// Makes a connection to the manager at host:port, without waiting for it.
pub type Connect = Arc<dyn Fn(&str) -> Result<Channel, String> + Send + Sync>;

/// A leader that refuses this manager's reports for so long is right: one that was just elected
/// may not have applied the promotion of this node yet.
const DEMOTED_AFTER: Duration = Duration::from_secs(2);
/// The parts of a heartbeat period: after how many without a report that was taken it is doubtful that a leader
/// hears a manager (its agents need some of the grace period to go elsewhere), and after how many certain that none does; how
/// long one report may take, and the wait after one that failed.
const DOUBTFUL_AFTER: f64 = 1.5;
const UNHEARD_AFTER: f64 = 2.5;
const REPORT_PATIENCE: f64 = 0.5;
const REPORT_AGAIN: f64 = 0.25;
/// Nodes in one report; more than a cluster has.
const REPORT_MAX: usize = 100_000;
/// What is urgent is reported with whatever follows it within this time.
const TOGETHER: Duration = Duration::from_millis(5);
/// What an agent needs to register with another manager, and that one to report it.
const REGISTERED: Duration = Duration::from_millis(250);
/// Of nodes that fall silent, so many are Down at once,
const AT_ONCE: u32 = 50;
/// and after them so many a second, or this part of the cluster if that is more. What nobody hears is the cluster
/// itself then, rather than so many machines, and moving all their tasks would keep it from hearing them.
const DOWN_PER_SECOND: u32 = 10;
const DOWN_PART_PER_SECOND: u32 = 200;
/// What a node is told in its status when nobody hears it.
const SILENT: &str = "heartbeat failure";
/// What it is told when it has said goodbye.
const LEFT: &str = "left";

/// The period in which agents are to be heard.
#[must_use]
pub fn heartbeat_period(state: &State) -> Duration {
    let spec = state.cluster().and_then(|cluster| cluster.spec.as_ref());
    let period = span(
        spec.and_then(|spec| spec.heartbeat_period.as_ref()),
        HEARTBEAT,
    );
    // A shorter one is noise; nobody waits an hour to see a node die.
    period.clamp(Duration::from_millis(50), Duration::from_secs(3600))
}

/// Whether a leader hears a manager, and with it its agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hearing {
    /// It takes the manager's reports.
    Heard,
    /// It has not for a while. A few agents are told, which soon find another manager if there is one: thousands would
    /// all make connections to the others, and most likely one of the two is only busy.
    Doubtful,
    /// Its agents are better off elsewhere.
    Unheard,
}

/// What silence is measured with.
#[cfg(not(feature = "museum"))]
fn now() -> Instant {
    Instant::now()
}

#[cfg(feature = "museum")]
fn now() -> Instant {
    use std::time::SystemTime;
    static BEGAN: std::sync::OnceLock<(Instant, SystemTime)> = std::sync::OnceLock::new();
    let (began, wall) = *BEGAN.get_or_init(|| (Instant::now(), SystemTime::now()));
    if !swarm_proto::museum::on(swarm_proto::museum::Bug::LeaseByWallClock) {
        return Instant::now();
    }
    match SystemTime::now().duration_since(wall) {
        Ok(later) => began + later,
        Err(earlier) => began.checked_sub(earlier.duration()).unwrap_or(began),
    }
}

/// How long a silent node counts as alive.
#[must_use]
pub fn grace(period: Duration) -> Duration {
    period * HEARTBEATS_MISSED
}

/// How much longer one does whose manager has gone silent with it: until its agent has noticed and is
/// heard by another manager. What that manager heard last may be a period old when it was reported.
fn elsewhere(period: Duration) -> Duration {
    let noticed = SESSION_PROBE_INTERVAL + SESSION_PROBE_TIMEOUT;
    (noticed + REGISTERED).saturating_sub(grace(period) - period)
}

// --- The leader's decision ----------------------------------------------------------

/// When each node was last heard. Decides who is up and who is down.
#[derive(Debug, Default)]
pub struct Tracker {
    nodes: HashMap<NodeId, Known>,
    /// When each manager has reported last, or was first looked for.
    managers: BTreeMap<NodeId, Instant>,
    /// When the leader meant to look again, at the latest.
    due: Option<Instant>,
    /// What the nodes that are there when this leader begins are given beyond a grace period.
    extra: Duration,
    doubt: Doubt,
}

/// How many of those that fall silent are Down so far. Many at once have some time more each to be heard.
#[derive(Debug, Default)]
struct Doubt {
    /// When those that were Down would have been spread evenly.
    until: Option<Instant>,
}

impl Doubt {
    /// How many of `silent`, in a cluster of `nodes`, are Down now; and when the next may be, if that is not all.
    fn admit(&mut self, silent: usize, nodes: usize, now: Instant) -> (usize, Option<Instant>) {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        let silent = u32::try_from(silent).unwrap_or(u32::MAX);
        let each = Duration::from_secs(1) / DOWN_PER_SECOND.max(nodes / DOWN_PART_PER_SECOND);
        let ahead = each * AT_ONCE;
        let from = self.until.unwrap_or(now).max(now);
        let free = (now + ahead).saturating_duration_since(from);
        let free = u32::try_from(free.as_nanos() / each.as_nanos()).unwrap_or(u32::MAX);
        let admitted = silent.min(free);
        let until = from + each * admitted;
        self.until = Some(until);
        let next = until + each;
        let next = (admitted < silent).then(|| next.checked_sub(ahead).unwrap_or(now));
        (admitted as usize, next)
    }
}

#[derive(Clone, Debug)]
struct Known {
    /// Last heard, or first looked for.
    at: Instant,
    /// The manager that has heard it last.
    by: Option<NodeId>,
    seen: Seen,
    revision: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Not since this leader began: what is stored holds until the grace is over.
    NotYet,
    Heard,
    Left,
}

/// What is to be written, and when to look again.
#[derive(Debug, Default, PartialEq)]
pub struct Verdict {
    /// Nodes whose state must change.
    pub observations: Vec<NodeObservation>,
    /// When the next node would be silent for too long.
    pub next: Option<Instant>,
    /// Nodes that are, and are not Down yet because so many are.
    pub doubted: usize,
}

impl Tracker {
    /// Of a leader before which there was none for `leaderless`; `None` if that is not known, as
    /// when all managers were started again.
    #[must_use]
    pub fn after(leaderless: Option<Duration>, grace: Duration) -> Self {
        // Agents that have lost their sessions meanwhile may be waiting before they try again.
        let found_soon = leaderless.is_some_and(|gap| gap <= grace);
        Self {
            extra: match found_soon {
                true => Duration::ZERO,
                false => SESSION_BACKOFF_MAX,
            },
            ..Self::default()
        }
    }

    /// A manager has reported.
    pub fn reported(&mut self, manager: NodeId, now: Instant) {
        self.managers.insert(manager, now);
    }

    /// The manager `by` has heard the node. Returns whether that is news: it was not
    /// heard before, or had left.
    pub fn heard(&mut self, node: NodeId, revision: u64, by: &NodeId, now: Instant) -> bool {
        let known = Known {
            at: now,
            by: Some(by.clone()),
            seen: Seen::Heard,
            revision,
        };
        let before = self.nodes.insert(node, known);
        before.is_none_or(|before| before.seen != Seen::Heard)
    }

    /// The node has said goodbye.
    pub fn left(&mut self, node: NodeId, now: Instant) {
        let revision = self.revision(&node);
        let known = Known {
            at: now,
            by: None,
            seen: Seen::Left,
            revision,
        };
        self.nodes.insert(node, known);
    }

    /// The newest revision that the node is known to have applied; 0 if none.
    #[must_use]
    pub fn revision(&self, node: &str) -> u64 {
        self.nodes.get(node).map_or(0, |known| known.revision)
    }

    /// Compares what was heard with what is stored. A node that is looked for
    /// the first time has a whole grace period from now on.
    pub fn judge(&mut self, state: &State, now: Instant) -> Verdict {
        let period = heartbeat_period(state);
        let grace = grace(period);
        // When the leader itself did not run for a while, nor did whoever takes in
        // the reports: that was nobody's silence, and all get a grace period again.
        let late = self.due.and_then(|due| now.checked_duration_since(due));
        if late.is_some_and(|late| late > period) {
            self.nodes.values_mut().for_each(|known| known.at = now);
            self.managers.values_mut().for_each(|at| *at = now);
        }
        self.nodes.retain(|id, _| state.node(id).is_some());
        let silent = self.silent_managers(state, period, now);
        let mut verdict = Verdict::default();
        let extra = std::mem::take(&mut self.extra);
        let mut falling_silent = Vec::new();
        for node in state.nodes() {
            if !self.nodes.contains_key(node.id.as_str()) {
                let unheard = Known {
                    at: now + extra,
                    by: None,
                    seen: Seen::NotYet,
                    revision: 0,
                };
                self.nodes.insert(NodeId::from(&node.id), unheard);
            }
            let Some(known) = self.nodes.get_mut(node.id.as_str()) else {
                continue;
            };
            let stored = node
                .status
                .as_ref()
                .map_or(NodeState::Unknown, NodeStatus::state);
            // One that is a manager itself has gone silent as that.
            let with_it = silent.iter().any(|manager| {
                **manager != *node.id && known.by.as_ref().is_none_or(|by| by == manager)
            });
            let silent_at = match with_it {
                true => known.at + grace + elsewhere(period),
                false => known.at + grace,
            };
            let (wanted, message) = match known.seen {
                Seen::Left => (NodeState::Down, LEFT),
                _ if silent_at <= now && stored != NodeState::Down => {
                    falling_silent.push((silent_at, node));
                    continue;
                }
                _ if silent_at <= now => (NodeState::Down, SILENT),
                Seen::Heard => (NodeState::Ready, ""),
                Seen::NotYet => (stored, ""),
            };
            if wanted == NodeState::Down {
                // To be heard again will be news.
                if known.seen == Seen::Heard {
                    known.seen = Seen::NotYet;
                }
            } else {
                verdict.next = Some(verdict.next.map_or(silent_at, |next| next.min(silent_at)));
            }
            if wanted != stored {
                verdict.observations.push(observed(node, wanted, message));
            }
        }
        falling_silent.sort_by_key(|(silent_at, _)| *silent_at);
        let nodes = state.nodes().count();
        let (admitted, next) = self.doubt.admit(falling_silent.len(), nodes, now);
        verdict.doubted = falling_silent.len() - admitted;
        verdict.next = verdict.next.into_iter().chain(next).min();
        for (_, node) in falling_silent.into_iter().take(admitted) {
            if let Some(known) = self.nodes.get_mut(node.id.as_str()) {
                known.seen = Seen::NotYet;
            }
            let observation = observed(node, NodeState::Down, SILENT);
            verdict.observations.push(observation);
        }
        self.due = verdict.next;
        verdict
    }

    /// The managers whose agents are better off elsewhere: they have not reported for so long
    /// that they say so themselves, if they can.
    fn silent_managers(&mut self, state: &State, period: Duration, now: Instant) -> Vec<NodeId> {
        let is_manager = |id: &str| {
            state
                .node(id)
                .is_some_and(|node| node.manager_status.is_some())
        };
        self.managers.retain(|id, _| is_manager(id));
        for node in state.nodes().filter(|node| node.manager_status.is_some()) {
            self.managers.entry(NodeId::from(&node.id)).or_insert(now);
        }
        let patience = period.mul_f64(DOUBTFUL_AFTER);
        let silent = self
            .managers
            .iter()
            .filter(|(_, at)| now >= **at + patience);
        silent.map(|(id, _)| id.clone()).collect()
    }
}

fn observed(node: &Node, state: NodeState, message: &str) -> NodeObservation {
    NodeObservation {
        node_id: node.id.clone(),
        status: Some(NodeStatus {
            state: state.into(),
            message: message.into(),
            addr: String::new(),
        }),
        description: None,
    }
}

// --- This manager's own standing --------------------------------------------------------

/// Whether what this manager hears comes to a leader.
#[derive(Debug)]
struct Standing {
    began: Instant,
    /// When a leader took a report, and whether it was this manager.
    taken: Option<(Instant, bool)>,
}

impl Standing {
    fn new(now: Instant) -> Self {
        Self {
            began: now,
            taken: None,
        }
    }

    fn taken(&mut self, now: Instant, by_itself: bool) {
        self.taken = Some((now, by_itself));
    }

    /// How long there has been no leader, as far as is known here.
    fn gap(&self, now: Instant) -> Option<Duration> {
        let (at, _) = self.taken?;
        Some(now.saturating_duration_since(at))
    }

    /// A report was not taken: whether anybody can be said to hear this manager's nodes.
    /// `another_leads`: as far as is known here.
    fn hearing(&self, now: Instant, period: Duration, another_leads: bool) -> Hearing {
        let (since, led) = self.taken.unwrap_or((self.began, false));
        let unheard = |periods: f64| now >= since + period.mul_f64(periods);
        // A leader that no quorum answers has waited for it long enough before it gave up.
        let deposed = led && !another_leads;
        match () {
            () if unheard(UNHEARD_AFTER) => Hearing::Unheard,
            () if deposed || unheard(DOUBTFUL_AFTER) => Hearing::Doubtful,
            () => Hearing::Heard,
        }
    }
}

// --- Carrying reports and verdicts -----------------------------------------------------

/// What this manager hears and, while it leads, what all managers hear.
#[derive(Clone)]
pub struct Liveness {
    shared: Arc<Shared>,
}

struct Shared {
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    connect: Connect,
    /// Heard by this manager since the last report.
    heard: Mutex<Reportable>,
    /// Somebody is to be reported at once.
    urgent: Notify,
    /// There while this manager's leader loop runs.
    tracker: Mutex<Option<Tracker>>,
    standing: Mutex<Standing>,
    hearing: watch::Sender<Hearing>,
    /// A report changes the verdict.
    news: Notify,
    /// A node has applied a newer revision.
    newer: Notify,
}

#[derive(Debug, Default)]
struct Reportable {
    /// With the revision that each has acknowledged.
    nodes: BTreeMap<NodeId, u64>,
    left: BTreeSet<NodeId>,
}

/// Why a report did not reach the leader.
enum Unsent {
    /// It will next time, perhaps.
    Later(String),
    /// The cluster says that this node is no manager.
    Demoted(String),
}

impl Unsent {
    fn later(reason: &str) -> Self {
        Self::Later(reason.to_owned())
    }
}

impl std::fmt::Debug for Liveness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Liveness").finish_non_exhaustive()
    }
}

impl Liveness {
    /// Reports to the leader of `consensus` over connections made by `connect`. `node_id` is this
    /// manager's node.
    #[must_use]
    pub fn new(consensus: Arc<dyn Consensus>, node_id: NodeId, connect: Connect) -> Self {
        Self {
            shared: Arc::new(Shared {
                consensus,
                node_id,
                connect,
                heard: Mutex::default(),
                urgent: Notify::new(),
                tracker: Mutex::new(None),
                standing: Mutex::new(Standing::new(now())),
                hearing: watch::Sender::new(Hearing::Heard),
                news: Notify::new(),
                newer: Notify::new(),
            }),
        }
    }

    /// Whether a leader takes what this manager reports.
    #[must_use]
    pub fn hearing(&self) -> watch::Receiver<Hearing> {
        self.shared.hearing.subscribe()
    }

    /// A session has heard the node, which has acknowledged `revision`.
    pub(super) fn heard(&self, node: &NodeId, revision: u64) {
        self.shared
            .heard
            .lock()
            .nodes
            .insert(node.clone(), revision);
    }

    /// The node has acknowledged a revision that somebody may wait for: the leader is told at once.
    pub(super) fn applied(&self, node: &NodeId, revision: u64) {
        self.heard(node, revision);
        self.shared.urgent.notify_one();
    }

    /// A session of the node has begun: the leader is told at once.
    pub(super) fn opened(&self, node: &NodeId) {
        self.heard(node, 0);
        self.shared.urgent.notify_one();
    }

    /// The node says goodbye: the leader is told at once.
    pub(super) fn left(&self, node: &NodeId) {
        let mut heard = self.shared.heard.lock();
        heard.nodes.remove(node);
        heard.left.insert(node.clone());
        drop(heard);
        self.shared.urgent.notify_one();
    }

    /// The newest revision that the node is known to have applied, while this
    /// manager leads; 0 if none is known.
    #[must_use]
    pub fn acknowledged(&self, node: &str) -> u64 {
        let tracker = self.shared.tracker.lock();
        tracker.as_ref().map_or(0, |tracker| tracker.revision(node))
    }

    /// Returns when a node has applied a newer revision since the last time, while this manager leads.
    pub(super) async fn newer(&self) {
        self.shared.newer.notified().await;
    }

    /// Takes in a report of the manager `by`; false when this manager does not lead.
    fn receive(&self, report: LivenessReport, by: &NodeId) -> bool {
        let now = now();
        let mut news = !report.left.is_empty();
        let mut newer = false;
        {
            let mut tracker = self.shared.tracker.lock();
            let Some(tracker) = tracker.as_mut() else {
                return false;
            };
            tracker.reported(by.clone(), now);
            let mut revisions = report.revisions.into_iter();
            for node in report.node_ids {
                let revision = revisions.next().unwrap_or(0);
                newer |= revision > tracker.revision(&node);
                news |= tracker.heard(node.into(), revision, by, now);
            }
            for node in report.left {
                tracker.left(node.into(), now);
            }
        }
        if news {
            self.shared.news.notify_one();
        }
        if newer {
            self.shared.newer.notify_one();
        }
        true
    }

    /// Reports until it is cancelled. Runs on every manager.
    pub(super) async fn run_reporter(self, cancel: CancellationToken) {
        let mut leadership = self.shared.consensus.leadership();
        let mut client: Option<(String, LivenessClient<Channel>)> = None;
        let mut refused_since = None;
        let mut failed = false;
        loop {
            let period = heartbeat_period(&self.shared.consensus.store().state());
            let wait = if failed {
                period.mul_f64(REPORT_AGAIN)
            } else {
                period
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                // What follows in a moment goes with it.
                () = self.shared.urgent.notified() => tokio::time::sleep(TOGETHER).await,
                // A new leader should not wait for the first report.
                changed = leadership.changed() => if changed.is_err() { return },
            }
            let reported = std::mem::take(&mut *self.shared.heard.lock());
            let report = LivenessReport {
                node_ids: reported.nodes.keys().map(NodeId::to_string).collect(),
                revisions: reported.nodes.values().copied().collect(),
                left: reported.left.iter().map(NodeId::to_string).collect(),
            };
            let sending = self.send(report, &leadership, &mut client, period);
            let sent = tokio::select! {
                () = cancel.cancelled() => return,
                sent = sending => sent,
            };
            failed = sent.is_err();
            match sent.as_ref() {
                Ok(&by_itself) => self.taken(by_itself),
                Err(_) => self.untaken(&leadership, period),
            }
            match sent {
                Ok(_) => refused_since = None,
                Err(Unsent::Demoted(reason))
                    if refused_since.get_or_insert_with(Instant::now).elapsed() < DEMOTED_AFTER =>
                {
                    tracing::debug!(reason, "the leader refuses the report of live nodes");
                    self.take_back(reported);
                }
                Err(Unsent::Demoted(reason)) => {
                    // Nobody tells a member that was taken out of the group. Its agents,
                    // its own among them, would never hear of it, nor of anything else.
                    tracing::info!(
                        reason,
                        "this node is no manager any more; its agents go elsewhere"
                    );
                    cancel.cancel();
                    return;
                }
                Err(Unsent::Later(reason)) => {
                    tracing::debug!(reason, "the leader did not take the report of live nodes");
                    self.take_back(reported);
                }
            }
        }
    }

    /// A leader, this manager itself perhaps, has taken a report.
    fn taken(&self, by_itself: bool) {
        self.shared.standing.lock().taken(now(), by_itself);
        let changed =
            |before: &mut Hearing| std::mem::replace(before, Hearing::Heard) != Hearing::Heard;
        if self.shared.hearing.send_if_modified(changed) {
            tracing::info!("a leader hears this manager");
        }
    }

    /// No leader has taken a report.
    fn untaken(&self, leadership: &watch::Receiver<Leadership>, period: Duration) {
        let leader = leadership.borrow().leader.clone();
        let another = leader.is_some_and(|leader| leader.node_id != self.shared.node_id);
        let hearing = self.shared.standing.lock().hearing(now(), period, another);
        let worse = |before: &mut Hearing| {
            let worse = *before < hearing;
            *before = hearing.max(*before);
            worse
        };
        if self.shared.hearing.send_if_modified(worse) {
            match hearing {
                Hearing::Heard => {}
                Hearing::Doubtful => {
                    tracing::warn!(
                        "no leader has heard this manager of late; some agents look for another"
                    );
                }
                Hearing::Unheard => {
                    tracing::warn!("no leader hears this manager; its agents look for another");
                }
            }
        }
    }

    /// Whether this manager is the leader that has taken the report.
    async fn send(
        &self,
        report: LivenessReport,
        leadership: &watch::Receiver<Leadership>,
        client: &mut Option<(String, LivenessClient<Channel>)>,
        period: Duration,
    ) -> Result<bool, Unsent> {
        let now = leadership.borrow().clone();
        if now.is_leader {
            return match self.receive(report, &self.shared.node_id) {
                true => Ok(true),
                false => Err(Unsent::later("this manager begins to lead")),
            };
        }
        let leader = now
            .leader
            .ok_or_else(|| Unsent::later("there is no leader"))?;
        let mut connected = match client.take() {
            Some((addr, connected)) if addr == leader.addr => connected,
            _ => LivenessClient::new((self.shared.connect)(&leader.addr).map_err(Unsent::Later)?),
        };
        let patience = period.mul_f64(REPORT_PATIENCE);
        let call = tokio::time::timeout(patience, connected.report(report));
        match call.await {
            Ok(Ok(_)) => {
                *client = Some((leader.addr, connected));
                Ok(false)
            }
            Ok(Err(status)) if status.code() == tonic::Code::PermissionDenied => {
                Err(Unsent::Demoted(status.message().to_owned()))
            }
            Ok(Err(status)) => Err(Unsent::Later(status.to_string())),
            Err(_) => Err(Unsent::later("no answer in time")),
        }
    }

    /// What could not be reported is reported next time, unless it is outdated.
    fn take_back(&self, mut reported: Reportable) {
        let mut heard = self.shared.heard.lock();
        reported.left.retain(|node| !heard.nodes.contains_key(node));
        // Those that were heard must be heard again: a failed report may be old.
        heard.left.append(&mut reported.left);
    }

    /// The loop that judges while this manager leads.
    #[must_use]
    pub fn leader_loop(&self) -> LeaderLoop {
        let liveness = self.clone();
        LeaderLoop::new("liveness", move |context| {
            liveness.clone().run_leader(context)
        })
    }

    async fn run_leader(self, context: LoopContext) {
        let gap = self.shared.standing.lock().gap(now());
        let period = heartbeat_period(&context.consensus.store().state());
        *self.shared.tracker.lock() = Some(Tracker::after(gap, grace(period)));
        self.judge_until_cancelled(&context).await;
        *self.shared.tracker.lock() = None;
    }

    async fn judge_until_cancelled(&self, context: &LoopContext) {
        let mut feed = Feed::new(context);
        let mut doubting = false;
        loop {
            // The newest, with what was written last: the feed may be behind, and what it does not show yet would
            // be written again.
            let state = context.consensus.store().state();
            let begun = now();
            let verdict = match self.shared.tracker.lock().as_mut() {
                Some(tracker) => tracker.judge(&state, begun),
                None => return,
            };
            let cost = now().saturating_duration_since(begun);
            if verdict.doubted > 0 && !doubting {
                tracing::warn!(
                    nodes = verdict.doubted,
                    "many nodes are silent at once: they become Down one after the other while nobody hears them"
                );
            }
            doubting = verdict.doubted > 0;
            for observation in &verdict.observations {
                let state = observation
                    .status
                    .as_ref()
                    .map_or(NodeState::Unknown, NodeStatus::state);
                tracing::info!(node = %observation.node_id, state = state.as_str_name(), "the state of a node changes");
            }
            if !verdict.observations.is_empty() {
                let actions = verdict.observations.into_iter().map(|seen| StoreAction {
                    action: Some(store_action::Action::NodeObservation(seen)),
                });
                let actions: Vec<_> = actions.collect();
                let groups = actions.chunks(ACTIONS_MAX).map(<[_]>::to_vec).collect();
                let outcome = context.propose_groups(groups).await;
                if let Some(error) = outcome.failed
                    && !context.settle(&error).await
                {
                    return;
                }
            }
            // All nodes are looked at, so in a large cluster not for each that comes: what happens meanwhile goes
            // together.
            tokio::select! {
                () = context.cancel.cancelled() => return,
                () = tokio::time::sleep(cost * REST) => {}
            }
            let silence = verdict.next;
            // Who goes by the wall clock waits by it, too.
            #[cfg(feature = "museum")]
            let silence =
                silence.map(|next| Instant::now() + next.saturating_duration_since(now()));
            let silence = silence.map(tokio::time::Instant::from_std);
            tokio::select! {
                () = context.cancel.cancelled() => return,
                () = sleep_until(silence) => {}
                () = self.shared.news.notified() => {}
                // A node was made or removed, or its stored state is not what was judged.
                () = nodes_change(&mut feed, context) => {}
            }
        }
    }
}

/// Returns when nodes or the cluster's settings have changed.
async fn nodes_change(feed: &mut Feed, context: &LoopContext) {
    use swarm_store::Event;
    loop {
        let Some(changes) = feed.next(context).await else {
            return context.cancel.cancelled().await;
        };
        let mut events = changes.iter().flat_map(|change| change.events.iter());
        if events.any(|event| matches!(event, Event::Node { .. } | Event::Cluster { .. })) {
            return;
        }
    }
}

#[tonic::async_trait]
impl liveness_server::Liveness for Liveness {
    async fn report(
        &self,
        request: Request<LivenessReport>,
    ) -> Result<Response<LivenessAck>, Status> {
        let caller = Caller::of(&request);
        let manager = |peer: &&PeerIdentity| peer.role == NodeRole::Manager;
        let Some(peer) = caller.peer().filter(manager) else {
            return Err(Status::permission_denied(
                "only managers report who is alive",
            ));
        };
        // One that was demoted and promoted again before it noticed: it has to join the group first.
        let state = self.shared.consensus.store().state();
        let node = state.node(&peer.node_id);
        if node.is_none_or(|node| node.manager_status.is_none()) {
            return Err(Status::permission_denied(format!(
                "node {} is not in the raft group",
                peer.node_id
            )));
        }
        let report = request.into_inner();
        if report.node_ids.len().max(report.left.len()) > REPORT_MAX {
            return Err(Status::invalid_argument("the report names too many nodes"));
        }
        match self.receive(report, &peer.node_id) {
            true => Ok(Response::new(LivenessAck {})),
            false => Err(Status::unavailable("this manager does not lead")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swarm_store::testing::{create, node, observe, transaction};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn cluster_of(nodes: &[&str]) -> State {
        let made = nodes.iter().map(|id| create(node(id, "192.0.2.1")));
        State::default()
            .apply(1, &transaction(made))
            .expect("valid")
            .state
    }

    /// A manager that nobody asks for.
    fn by() -> NodeId {
        NodeId::from("m")
    }

    fn after(state: &State, verdict: &Verdict) -> State {
        let actions = verdict.observations.iter().map(|seen| StoreAction {
            action: Some(store_action::Action::NodeObservation(seen.clone())),
        });
        let applied = state.apply(state.index() + 1, &transaction(actions));
        applied.expect("valid").state
    }

    fn changes(verdict: &Verdict) -> Vec<(&str, NodeState, &str)> {
        verdict
            .observations
            .iter()
            .map(|seen| {
                let status = seen.status.as_ref().expect("set");
                (
                    seen.node_id.as_str(),
                    status.state(),
                    status.message.as_str(),
                )
            })
            .collect()
    }

    #[test]
    fn a_node_that_nobody_hears_for_a_grace_period_is_down_and_up_when_it_is_heard() {
        let state = cluster_of(&["a", "b"]);
        let start = Instant::now();
        let mut tracker = Tracker::default();
        let verdict = tracker.judge(&state, start);
        assert_eq!(verdict.observations, []);
        assert_eq!(verdict.next, Some(start + 3 * SECOND));
        assert!(tracker.heard("a".into(), 7, &by(), start + SECOND));
        let verdict = tracker.judge(&state, start + 3 * SECOND);
        assert_eq!(changes(&verdict), [("b", NodeState::Down, SILENT)]);
        assert_eq!(verdict.next, Some(start + 4 * SECOND));
        assert_eq!(tracker.revision("a"), 7);
        let state = after(&state, &verdict);
        assert_eq!(tracker.judge(&state, start + 3 * SECOND).observations, []);
        assert!(
            tracker.heard("b".into(), 0, &by(), start + 4 * SECOND),
            "news"
        );
        assert!(!tracker.heard("a".into(), 0, &by(), start + 4 * SECOND));
        let verdict = tracker.judge(&state, start + 4 * SECOND);
        assert_eq!(changes(&verdict), [("b", NodeState::Ready, "")]);
    }

    #[test]
    fn a_node_that_says_goodbye_is_down_at_once() {
        let state = cluster_of(&["a"]);
        let start = Instant::now();
        let mut tracker = Tracker::default();
        tracker.heard("a".into(), 0, &by(), start);
        assert_eq!(tracker.judge(&state, start).observations, []);
        tracker.left("a".into(), start);
        let verdict = tracker.judge(&state, start);
        assert_eq!(changes(&verdict), [("a", NodeState::Down, LEFT)]);
        assert!(
            tracker.heard("a".into(), 0, &by(), start),
            "it is back: that is news"
        );
    }

    #[test]
    fn a_new_leader_gives_everyone_a_grace_period_and_revives_nobody_unheard() {
        let seen = transaction([observe("b", NodeState::Down)]);
        let state = cluster_of(&["a", "b"])
            .apply(2, &seen)
            .expect("valid")
            .state;
        let start = Instant::now();
        let mut tracker = Tracker::default();
        assert_eq!(tracker.judge(&state, start).observations, []);
        assert_eq!(tracker.judge(&state, start + 2 * SECOND).observations, []);
        let verdict = tracker.judge(&state, start + 3 * SECOND);
        assert_eq!(changes(&verdict), [("a", NodeState::Down, SILENT)]);
    }

    #[test]
    fn after_a_time_without_a_leader_agents_may_still_be_waiting_to_come_back() {
        let state = cluster_of(&["a"]);
        let start = Instant::now();
        for gap in [None, Some(4 * SECOND)] {
            let mut tracker = Tracker::after(gap, 3 * SECOND);
            let until = start + SESSION_BACKOFF_MAX + 3 * SECOND;
            let verdict = tracker.judge(&state, start);
            assert_eq!((verdict.observations.len(), verdict.next), (0, Some(until)));
            // One that is new has no session to come back to.
            let both = cluster_of(&["a", "b"]);
            let verdict = tracker.judge(&both, start + SECOND);
            assert_eq!(verdict.next, Some(start + 4 * SECOND));
            let verdict = tracker.judge(&both, start + 4 * SECOND);
            assert_eq!(changes(&verdict), [("b", NodeState::Down, SILENT)]);
            let verdict = tracker.judge(&state, until);
            assert_eq!(changes(&verdict), [("a", NodeState::Down, SILENT)]);
        }
        let mut tracker = Tracker::after(Some(2 * SECOND), 3 * SECOND);
        assert_eq!(tracker.judge(&state, start).next, Some(start + 3 * SECOND));
    }

    #[test]
    fn agents_are_told_that_no_leader_hears_their_manager_in_time_to_be_heard_elsewhere() {
        let start = Instant::now();
        let mut standing = Standing::new(start);
        let at = |seconds: f64| start + SECOND.mul_f64(seconds);
        let seen = [1.0, 2.0, 3.0].map(|after| standing.hearing(at(after), SECOND, false));
        assert_eq!(seen, [Hearing::Heard, Hearing::Doubtful, Hearing::Unheard]);
        standing.taken(at(3.0), false);
        assert_eq!(standing.gap(at(4.0)), Some(SECOND));
        let seen = [4.4, 4.5, 5.4, 5.5].map(|after| standing.hearing(at(after), SECOND, true));
        let [doubtful, unheard] = [Hearing::Doubtful, Hearing::Unheard];
        assert_eq!(seen, [Hearing::Heard, doubtful, doubtful, unheard]);
        // Seen a little later, if a report takes so long to fail; for the many there is the time that the leader
        // gives nodes whose manager is silent.
        let late = SECOND.mul_f64(REPORT_PATIENCE + REPORT_AGAIN);
        assert!(SECOND.mul_f64(DOUBTFUL_AFTER) + late < grace(SECOND));
        assert!(SECOND.mul_f64(UNHEARD_AFTER) + late + SECOND < grace(SECOND) + elsewhere(SECOND));
        // It has led, and nobody answers it.
        standing.taken(at(5.0), true);
        assert_eq!(standing.hearing(at(5.0), SECOND, true), Hearing::Heard);
        assert_eq!(standing.hearing(at(5.0), SECOND, false), doubtful);
        assert_eq!(standing.hearing(at(7.5), SECOND, false), unheard);
    }

    #[test]
    fn time_in_which_the_leader_did_not_run_is_nobodys_silence() {
        let state = cluster_of(&["a"]);
        let start = Instant::now();
        let mut tracker = Tracker::default();
        tracker.heard("a".into(), 0, &by(), start);
        tracker.judge(&state, start);
        let verdict = tracker.judge(&state, start + 60 * SECOND);
        assert_eq!(verdict.observations, []);
        assert_eq!(verdict.next, Some(start + 63 * SECOND));
        let verdict = tracker.judge(&state, start + 63 * SECOND);
        assert_eq!(changes(&verdict), [("a", NodeState::Down, SILENT)]);
    }

    /// Three managers' nodes and two others.
    fn managers_and_workers() -> State {
        let made = ["m1", "m2", "m3"].map(|id| create(manager(id)));
        let workers = ["w1", "w2"].map(|id| create(node(id, "192.0.2.1")));
        let all = transaction(made.into_iter().chain(workers));
        State::default().apply(1, &all).expect("valid").state
    }

    fn manager(id: &str) -> swarm_proto::v1::Node {
        let mut made = node(id, "192.0.2.1");
        made.manager_status = Some(swarm_proto::v1::ManagerStatus::default());
        made
    }

    /// The manager reports having heard nodes.
    fn report(tracker: &mut Tracker, by: &str, nodes: &[&str], now: Instant) {
        tracker.reported(by.into(), now);
        for node in nodes {
            tracker.heard((*node).into(), 0, &by.into(), now);
        }
    }

    #[test]
    fn agents_of_a_manager_that_hangs_get_the_time_to_go_elsewhere() {
        let mut state = managers_and_workers();
        let hung = Instant::now();
        let mut tracker = Tracker::default();
        tracker.judge(&state, hung);
        report(&mut tracker, "m1", &["m1", "m2", "m3", "w2"], hung);
        report(&mut tracker, "m3", &["m1"], hung);
        report(&mut tracker, "m2", &["w1", "m2"], hung);
        let mut down = BTreeMap::new();
        for tenth in 0..100 {
            let now = hung + SECOND.mul_f64(0.1) * tenth;
            if tenth % 10 == 0 {
                report(&mut tracker, "m1", &["m1", "m3"], now);
                report(&mut tracker, "m3", &[], now);
            }
            let verdict = tracker.judge(&state, now);
            for seen in &verdict.observations {
                down.insert(seen.node_id.clone(), now - hung);
            }
            state = after(&state, &verdict);
        }
        // A worker of a manager that reports, and the node that hangs itself: as ever.
        assert_eq!(down.remove("w2"), Some(grace(SECOND)));
        assert_eq!(down.remove("m2"), Some(grace(SECOND)));
        // The one who may not know it yet.
        let at = down.remove("w1").expect("down at last");
        let known = SESSION_PROBE_INTERVAL + SESSION_PROBE_TIMEOUT + SECOND;
        assert!(at > known && at < known + SECOND, "{at:?}");
        assert_eq!(down, BTreeMap::new());
    }

    #[test]
    fn a_new_leader_waits_for_the_agents_of_the_one_that_hangs() {
        let mut state = managers_and_workers();
        let began = Instant::now();
        let mut tracker = Tracker::after(Some(SECOND), grace(SECOND));
        let mut down = BTreeMap::new();
        for tenth in 0..100 {
            let now = began + SECOND.mul_f64(0.1) * tenth;
            if tenth % 10 == 0 {
                report(&mut tracker, "m2", &["m2", "w2"], now);
                report(&mut tracker, "m3", &["m3"], now);
            }
            if tenth == 45 {
                report(&mut tracker, "m2", &["w1"], now);
            }
            let verdict = tracker.judge(&state, now);
            for seen in &verdict.observations {
                down.insert(seen.node_id.clone(), now - began);
            }
            state = after(&state, &verdict);
        }
        assert_eq!(down.remove("m1"), Some(grace(SECOND)));
        // Came in time, and then died with a manager that works.
        assert_eq!(down.remove("w1"), Some(SECOND.mul_f64(4.5) + grace(SECOND)));
        assert_eq!(down, BTreeMap::new());
    }

    #[test]
    fn of_many_that_fall_silent_at_once_few_are_down_each_second() {
        let ids: Vec<String> = (0..400).map(|number| format!("w{number:03}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut state = cluster_of(&ids);
        let start = Instant::now();
        let mut tracker = Tracker::default();
        for id in &ids {
            tracker.heard((*id).into(), 0, &by(), start);
        }
        let mut now = start + 3 * SECOND;
        let mut down = 0;
        for second in 0..=10 {
            // Whoever is heard again meanwhile was never Down.
            for id in &ids[200..] {
                tracker.heard((*id).into(), 0, &by(), now);
            }
            let until = now + SECOND;
            while now < until {
                let verdict = tracker.judge(&state, now);
                down += verdict.observations.len();
                assert!(
                    verdict
                        .observations
                        .iter()
                        .all(|seen| *seen.node_id < *ids[200])
                );
                assert!(down <= 50 + 10 * (second + 1), "{down} after {second} s");
                assert_eq!(verdict.doubted, 200 - down);
                state = after(&state, &verdict);
                now = verdict.next.expect("others are silent later").min(until);
            }
            assert!(down >= 50 + 10 * second, "{down} after {second} s");
        }
        // After a while it is as before: a few are Down at once.
        let state = cluster_of(&ids[..40]);
        now += 10 * SECOND;
        for id in &ids[..40] {
            tracker.heard((*id).into(), 0, &by(), now);
        }
        assert_eq!(tracker.judge(&state, now).observations, []);
        let verdict = tracker.judge(&state, now + 3 * SECOND);
        assert_eq!((verdict.observations.len(), verdict.doubted), (40, 0));
    }

    #[test]
    fn who_dies_is_down_within_five_seconds_whatever_its_manager_does() {
        assert!(grace(HEARTBEAT) + HEARTBEAT < 5 * SECOND);
        // With long periods the agents have noticed anyway.
        assert_eq!(elsewhere(3 * SECOND), Duration::ZERO);
        assert!(elsewhere(HEARTBEAT) < grace(HEARTBEAT));
    }

    proptest! {
        #[test]
        fn who_is_heard_every_period_is_never_down(
            beats in prop::collection::vec(500..1000u64, 1..100),
        ) {
            let state = cluster_of(&["a"]);
            let mut now = Instant::now();
            let mut tracker = Tracker::default();
            for beat in beats {
                tracker.heard("a".into(), 0, &by(), now);
                prop_assert_eq!(tracker.judge(&state, now).observations, vec![]);
                now += Duration::from_millis(beat);
            }
        }
    }
}
