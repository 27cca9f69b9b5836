//! One agent's connection: registers, receives its reports, sends its assignments.
//!
//! A session is one task with two halves that do not wait for each other: the
//! reader takes in heartbeats and reports, the writer sends what the hub hands
//! it. It ends when either does, when nothing was heard for ten times as long as makes
//! its node Down, when a newer session of the node begins, or when the node is removed. What an
//! agent sends is bounded and checked: it speaks for its own node's tasks only.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{Stream, TryStreamExt as _};
use prost::Message as _;
use swarm_identity::Caller;
use swarm_proto::defaults::REPORTS_AHEAD;
use swarm_proto::task_state::{OWNERS, Owner};
use swarm_proto::v1::{
    AgentMessage, AssignmentsType, ManagerMessage, NodeDescription, NodeObservation, NodeStatus,
    Registered, StatusAck, StatusReport, StoreAction, TaskStatusUpdate, agent_message,
    dispatcher_server, manager_message, store_action,
};
use swarm_proto::{NodeId, SessionId};
use swarm_store::{Consensus, ReadError, State};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::assignments::{Shared, messages};
use super::hub::{Hub, Update, removed};
use super::intake::{Intake, Report};
use super::liveness::{Liveness, grace, heartbeat_period};

/// Messages that wait for the connection to take them, each of at most 128 KiB
/// or one object.
const OUTBOUND: usize = 2;
/// Encoded bytes of one task's status; what is longer loses its texts.
const STATUS_MAX: usize = 16 << 10;
/// Encoded bytes of a node's description.
const DESCRIPTION_MAX: usize = 256 << 10;
/// A timer that is late by this part of a heartbeat's period is that of a busy manager, where what agents
/// have said waits as well. That is no agent's silence, for so many periods in a row.
const BUSY: f64 = 0.1;
const UNHEARD_MAX: u32 = 3;
/// So many heartbeats in a row may be missed before the session is over. Its node is Down long before, and Ready as
/// soon as it is heard again: a new session would cost a handshake and everything that the node holds, and when
/// thousands need one because a manager was busy, it is busier still.
const SESSION_MISSED_MAX: u32 = 30;
/// Actions of one report in one transaction.
const REPORT_ACTIONS: usize = 500;

/// The service that agents speak to.
#[derive(Clone)]
pub struct Sessions {
    pub(super) consensus: Arc<dyn Consensus>,
    pub(super) hub: Hub,
    pub(super) intake: Intake,
    pub(super) liveness: Liveness,
    pub(super) running: TaskTracker,
    pub(super) cancel: CancellationToken,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

/// Boxed, as is what else waits or is seldom done: there is a session for each node, and a channel has
/// memory for 32 messages at once.
type Outbound = mpsc::Sender<Result<Box<ManagerMessage>, Status>>;

/// What is being taken in.
type Taking<'a> = BoxFuture<'a, Result<(), Status>>;

#[tonic::async_trait]
impl dispatcher_server::Dispatcher for Sessions {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<ManagerMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request);
        let node_id = match caller.peer() {
            Some(peer) => peer.node_id.clone(),
            None => {
                return Err(Status::unauthenticated(
                    "a session needs a node's certificate",
                ));
            }
        };
        if self.cancel.is_cancelled() {
            return Err(Status::unavailable("the manager is stopping"));
        }
        let (outbound, sent) = mpsc::channel(OUTBOUND);
        let session = Session {
            sessions: self.clone(),
            session_id: SessionId::random(),
            remote: swarm_identity::remote_addr(&request),
            node_id: node_id.clone(),
            outbound,
            awaited: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        };
        let span = tracing::info_span!("session", node = %node_id);
        let inbound = request.into_inner();
        self.running.spawn(session.run(inbound).instrument(span));
        let sent = ReceiverStream::new(sent).map_ok(|message| *message);
        Ok(Response::new(Box::pin(sent)))
    }
}

struct Session {
    sessions: Sessions,
    session_id: SessionId,
    remote: Option<SocketAddr>,
    node_id: NodeId,
    outbound: Outbound,
    /// The newest revision sent that takes a task out of balancing: the leader may wait for it.
    awaited: AtomicU64,
    /// The newest revision sent: the hub may wait for it.
    sent: AtomicU64,
}

impl Session {
    async fn run(self, inbound: Streaming<AgentMessage>) {
        let cancel = self.sessions.cancel.clone();
        let ended = tokio::select! {
            () = cancel.cancelled() => Status::unavailable("the manager is stopping"),
            ended = self.serve(inbound) => ended,
        };
        tracing::debug!(reason = ended.message(), "the session has ended");
        self.sessions.hub.close(self.node_id, self.session_id).await;
        // The agent learns why, if its connection still takes anything.
        let _ = self.outbound.try_send(Err(ended));
    }

    /// Returns why the session is over.
    async fn serve(&self, mut inbound: Streaming<AgentMessage>) -> Status {
        match Box::pin(self.begin(&mut inbound)).await {
            Ok(mut registered) => {
                let updates = &mut registered.updates;
                tokio::select! {
                    ended = self.read(&mut inbound, &registered.queue) => ended,
                    ended = self.write(updates) => ended,
                    ended = &mut registered.ended => {
                        ended.unwrap_or_else(|_| Status::unavailable("the manager is stopping"))
                    }
                }
            }
            Err(refused) => refused,
        }
    }

    /// The agent introduces itself; it is registered if its node is a member.
    async fn begin(
        &self,
        inbound: &mut Streaming<AgentMessage>,
    ) -> Result<super::hub::Registered, Status> {
        let patience = grace(heartbeat_period(&self.store_state()));
        let first = tokio::time::timeout(patience, inbound.message()).await;
        let first =
            first.map_err(|_| Status::deadline_exceeded("the agent did not register"))??;
        let Some(agent_message::Message::Register(register)) =
            first.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "the first message of a session must be register",
            ));
        };
        let state = self.member_state().await?;
        if let Some(described) = register.description {
            self.describe(&state, described).await?;
        }
        let hub = &self.sessions.hub;
        let mut registered = hub
            .open(self.node_id.clone(), self.session_id.clone())
            .await?;
        let period = heartbeat_period(&state);
        let welcome = manager_message::Message::Registered(Registered {
            session_id: self.session_id.to_string(),
            heartbeat_period: prost_types::Duration::try_from(period).ok(),
            info: registered.info.take().map(|info| *info),
        });
        self.send(welcome).await?;
        self.sessions.liveness.opened(&self.node_id);
        tracing::debug!(session = %self.session_id, "the agent has registered");
        Ok(registered)
    }

    fn store_state(&self) -> Arc<State> {
        self.sessions.consensus.store().state()
    }

    /// A state that has the node. One that this replica does not know may only be new.
    async fn member_state(&self) -> Result<Arc<State>, Status> {
        let state = self.store_state();
        if state.node(&self.node_id).is_some() {
            return Ok(state);
        }
        let state = self.newest_state().await?;
        match state.node(&self.node_id) {
            Some(_) => Ok(state),
            // Which this state, restored from elsewhere perhaps, does not say for certain.
            None => Err(Status::permission_denied(removed(&self.node_id))),
        }
    }

    async fn newest_state(&self) -> Result<Arc<State>, Status> {
        let read = self.sessions.consensus.read().await;
        read.map_err(|error: ReadError| Status::unavailable(error.to_string()))
    }

    /// Has the node's description and address written, if they are news.
    async fn describe(&self, state: &State, described: NodeDescription) -> Result<(), Status> {
        if described.encoded_len() > DESCRIPTION_MAX {
            return Err(Status::invalid_argument(format!(
                "the description of the node has {} bytes, more than {DESCRIPTION_MAX}",
                described.encoded_len()
            )));
        }
        let addr = self
            .remote
            .map(|remote| remote.ip().to_string())
            .unwrap_or_default();
        let known = state.node(&self.node_id);
        let known_addr = known.and_then(|node| Some(node.status.as_ref()?.addr.as_str()));
        let same_addr = addr.is_empty() || known_addr == Some(addr.as_str());
        if same_addr && known.and_then(|node| node.description.as_ref()) == Some(&described) {
            return Ok(());
        }
        let seen = NodeObservation {
            node_id: self.node_id.to_string(),
            // The state is the leader's to conclude: see liveness.
            status: Some(NodeStatus {
                addr,
                ..NodeStatus::default()
            }),
            description: Some(described),
        };
        let action = store_action::Action::NodeObservation(seen);
        let report = Report {
            actions: vec![StoreAction {
                action: Some(action),
            }],
            ack: None,
        };
        self.sessions.intake.put(report).await
    }

    // --- Reader ------------------------------------------------------------------

    /// Hears the agent also while what it has said before waits for the raft group: a busy
    /// manager is no reason to take a node for dead.
    async fn read(
        &self,
        inbound: &mut Streaming<AgentMessage>,
        queue: &mpsc::Sender<Update>,
    ) -> Status {
        let mut revision = 0;
        let mut waiting: VecDeque<agent_message::Message> = VecDeque::new();
        let mut taking: Option<Taking<'_>> = None;
        let mut silence = Silence::default();
        loop {
            if taking.is_none()
                && let Some(message) = waiting.pop_front()
            {
                taking = Some(Box::pin(self.take(message, queue)));
            }
            let period = heartbeat_period(&self.store_state());
            let due = Instant::now() + period;
            // One that sends more than it may waits.
            let room = waiting.len() < REPORTS_AHEAD;
            // What has arrived is read before time is looked at.
            let message = tokio::select! {
                biased;
                taken = done(&mut taking) => {
                    taking = None;
                    match taken {
                        Ok(()) => continue,
                        Err(refused) => return refused,
                    }
                }
                message = inbound.message(), if room => message,
                () = tokio::time::sleep_until(due), if room => match silence.missed(due.elapsed(), period) {
                    Missed::Wait => continue,
                    Missed::Unheard => {
                        self.sessions.liveness.heard(&self.node_id, revision);
                        continue;
                    }
                    Missed::Over => return silent(period * SESSION_MISSED_MAX),
                }
            };
            silence = Silence::default();
            let message = match message {
                Ok(Some(message)) => message.message,
                Ok(None) => return Status::cancelled("the agent has ended the session"),
                Err(status) => return status,
            };
            match message {
                Some(agent_message::Message::Ack(ack)) => {
                    let awaited = self.awaited.load(Ordering::Relaxed);
                    let before = std::mem::replace(&mut revision, ack.revision);
                    let sent = self.sent.load(Ordering::Relaxed);
                    if before < sent && sent <= revision {
                        let hub = &self.sessions.hub;
                        hub.settled(self.node_id.clone(), self.session_id.clone())
                            .await;
                    }
                    if before < awaited && awaited <= revision {
                        self.sessions.liveness.applied(&self.node_id, revision);
                        continue;
                    }
                }
                Some(agent_message::Message::Goodbye(_)) => {
                    // What it has said before is taken in first.
                    let rest = async {
                        if let Some(taking) = taking {
                            taking.await?;
                        }
                        for message in waiting {
                            self.take(message, queue).await?;
                        }
                        Ok(())
                    };
                    if let Err(refused) = rest.await {
                        return refused;
                    }
                    self.sessions.liveness.left(&self.node_id);
                    return Status::ok("the node leaves");
                }
                Some(agent_message::Message::Register(_)) => {
                    return Status::invalid_argument("a session registers once");
                }
                Some(
                    said @ (agent_message::Message::Status(_)
                    | agent_message::Message::Description(_)),
                ) => waiting.push_back(said),
                // Of a kind that comes later: it says at least that the agent is alive.
                Some(agent_message::Message::Heartbeat(_)) | None => {}
            }
            self.sessions.liveness.heard(&self.node_id, revision);
        }
    }

    /// Has what the agent says of its node and its tasks written.
    async fn take(
        &self,
        message: agent_message::Message,
        queue: &mpsc::Sender<Update>,
    ) -> Result<(), Status> {
        match message {
            agent_message::Message::Status(report) => self.take_in(report, queue).await,
            agent_message::Message::Description(described) => {
                self.describe(&self.store_state(), described).await
            }
            _ => Ok(()),
        }
    }

    async fn take_in(
        &self,
        report: StatusReport,
        queue: &mpsc::Sender<Update>,
    ) -> Result<(), Status> {
        let mut state = self.store_state();
        // A task that this replica does not know was assigned by a manager that is ahead, or is gone.
        if report
            .updates
            .iter()
            .any(|update| state.task(&update.task_id).is_none())
        {
            state = self.newest_state().await?;
        }
        let updates = report
            .updates
            .into_iter()
            .filter_map(|update| self.checked(&state, update));
        let mut actions: Vec<StoreAction> = updates
            .map(|update| StoreAction {
                action: Some(store_action::Action::TaskStatus(update)),
            })
            .collect();
        // The parts are committed in order: the last one carries the acknowledgement.
        while actions.len() > REPORT_ACTIONS {
            let rest = actions.split_off(REPORT_ACTIONS);
            let part = std::mem::replace(&mut actions, rest);
            self.sessions
                .intake
                .put(Report {
                    actions: part,
                    ack: None,
                })
                .await?;
        }
        let ack = Some((queue.clone(), report.sequence));
        self.sessions.intake.put(Report { actions, ack }).await
    }

    /// The update, if the agent may say it and it says anything new.
    fn checked(&self, state: &State, mut update: TaskStatusUpdate) -> Option<TaskStatusUpdate> {
        let task = state.task(&update.task_id)?;
        if task.node_id != *self.node_id {
            tracing::warn!(task = %update.task_id, "an agent reports on a task of another node; ignored");
            return None;
        }
        let status = update.status.as_mut()?;
        let agents =
            |(state, owner): &(_, Owner)| *state as i32 == status.state && *owner == Owner::Agent;
        if !OWNERS.iter().any(agents) {
            tracing::warn!(task = %update.task_id, state = status.state, "an agent reports a state that is not an agent's; ignored");
            return None;
        }
        if status.encoded_len() > STATUS_MAX {
            cut(&mut status.message, 1024);
            cut(&mut status.err, 1024);
            status.reason = None;
        }
        if status.encoded_len() > STATUS_MAX {
            status.ports.clear();
            status.container = None;
        }
        Some(update)
    }

    // --- Writer ------------------------------------------------------------------

    async fn write(&self, updates: &mut mpsc::Receiver<Update>) -> Status {
        loop {
            let Some(update) = updates.recv().await else {
                return Status::unavailable("the manager is stopping");
            };
            if let Err(ended) = self.write_one(update).await {
                return ended;
            }
        }
    }

    async fn write_one(&self, update: Update) -> Result<(), Status> {
        let answer = matches!(update, Update::StatusAck(_));
        match update {
            Update::Assignments {
                applies_to,
                results_in,
                shared,
                own,
            } => {
                if applies_to.is_none() || shared.iter().any(Shared::withdraws) {
                    self.awaited.store(results_in, Ordering::Relaxed);
                }
                self.sent.store(results_in, Ordering::Relaxed);
                let kind = match applies_to {
                    Some(_) => AssignmentsType::Incremental,
                    None => AssignmentsType::Complete,
                };
                let applies_to = applies_to.unwrap_or(0);
                for message in messages(kind, applies_to, results_in, &shared, own) {
                    self.send(manager_message::Message::Assignments(message))
                        .await?;
                }
            }
            Update::Info(info) => self.send(manager_message::Message::Info(*info)).await?,
            Update::StatusAck(sequence) => {
                let ack = StatusAck { sequence };
                self.send(manager_message::Message::StatusAck(ack)).await?;
            }
        }
        if !answer {
            let hub = &self.sessions.hub;
            hub.ready(self.node_id.clone(), self.session_id.clone())
                .await;
        }
        Ok(())
    }

    async fn send(&self, message: manager_message::Message) -> Result<(), Status> {
        let message = Box::new(ManagerMessage {
            message: Some(message),
        });
        let sent = self.outbound.send(Ok(message)).await;
        sent.map_err(|_| Status::cancelled("the agent has closed the connection"))
    }
}

/// How long nothing has been heard of an agent.
#[derive(Debug, Default)]
struct Silence {
    /// Periods without a word, one after the other,
    missed: u32,
    /// and those in which this manager did not get to listen.
    unheard: u32,
}

#[derive(Debug, PartialEq)]
enum Missed {
    Wait,
    /// It may have said something that this manager was too busy to read: it counts as heard.
    Unheard,
    /// Nobody is there any more.
    Over,
}

impl Silence {
    /// A period is over, and was seen to be so late.
    fn missed(&mut self, late: Duration, period: Duration) -> Missed {
        if late > period.mul_f64(BUSY) && self.unheard < UNHEARD_MAX {
            self.unheard += 1;
            self.missed = 0;
            return Missed::Unheard;
        }
        self.missed += 1;
        match self.missed < SESSION_MISSED_MAX {
            true => Missed::Wait,
            false => Missed::Over,
        }
    }
}

async fn done(taking: &mut Option<Taking<'_>>) -> Result<(), Status> {
    match taking {
        Some(taking) => taking.await,
        None => std::future::pending().await,
    }
}

fn silent(patience: Duration) -> Status {
    Status::deadline_exceeded(format!("nothing was heard of the agent for {patience:?}"))
}

/// Shortens a text to at most `max` bytes.
fn cut(text: &mut String, max: usize) {
    if text.len() > max {
        let end = (0..=max).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(1);
    const ON_TIME: Duration = Duration::from_millis(2);
    const LATE: Duration = Duration::from_millis(300);

    #[test]
    fn a_session_ends_long_after_its_node_is_down() {
        let mut silence = Silence::default();
        for _ in 1..SESSION_MISSED_MAX {
            assert_eq!(silence.missed(ON_TIME, PERIOD), Missed::Wait);
        }
        assert_eq!(silence.missed(ON_TIME, PERIOD), Missed::Over);
        assert!(PERIOD * SESSION_MISSED_MAX >= 10 * grace(PERIOD));
    }

    #[test]
    fn what_a_busy_manager_does_not_read_is_nobodys_silence_for_a_while() {
        let mut silence = Silence::default();
        assert_eq!(silence.missed(ON_TIME, PERIOD), Missed::Wait);
        let seen = [(); 3].map(|()| silence.missed(LATE, PERIOD));
        assert_eq!(seen, [Missed::Unheard, Missed::Unheard, Missed::Unheard]);
        // An agent that is dead is seen to be so by a manager that is always busy, too.
        let seen = [(); 3].map(|()| silence.missed(LATE, PERIOD));
        assert_eq!(seen, [Missed::Wait, Missed::Wait, Missed::Wait]);
    }
}
