//! The session with a manager: find one, register, stay heard, carry
//! assignments in and statuses out.
//!
//! One loop. Losing the session changes nothing on the node: the loop goes to
//! another manager at once and, when all have been tried, waits longer and
//! longer with jitter. A manager that no leader hears says so: the session is kept,
//! and given up for the first other manager that is heard. Heartbeats leave on a timer of their own; nothing slow
//! happens in this loop. A connection to a host that is dead is ended by its kernel's silence, one
//! to a process that hangs by HTTP/2 keep-alive; the [`Connector`] must have switched on both.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use rand::seq::SliceRandom as _;
use swarm_proto::SessionId;
use swarm_proto::defaults::{HEARTBEAT, MESSAGE_MAX, SESSION_BACKOFF_MAX};
use swarm_proto::v1::agent_message::Message as ToManager;
use swarm_proto::v1::dispatcher_client::DispatcherClient;
use swarm_proto::v1::dispatcher_server::SERVICE_NAME as DISPATCHER;
use swarm_proto::v1::manager_message::Message as FromManager;
use swarm_proto::v1::{
    AgentMessage, AssignmentsAck, Goodbye, Heartbeat, ManagerMessage, NodeDescription, Register,
    Registered, SessionInfo,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::agent::Request;
use crate::programmer::Programmed;
use crate::reporter::Reporter;
use crate::worker::Assembler;

/// The first wait between two rounds over all managers.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest.
const BACKOFF_MAX: Duration = SESSION_BACKOFF_MAX;
/// The longest wait between two rounds of asking managers, to which connections are open, whether
/// they are heard, and for one answer.
const ASK_AGAIN_MAX: Duration = Duration::from_secs(1);
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// A manager that has not registered the node by then is given up: another one may be faster. When all have
/// been tried they are likely to have a thousand others to register, and to come back sooner and sooner would make
/// them spend their time on those who give up: twice as long each time, up to the longest.
const REGISTER_MIN: Duration = Duration::from_secs(5);
const REGISTER_MAX: Duration = Duration::from_secs(40);
/// For the last messages of a node that leaves.
const GOODBYE_MAX: Duration = Duration::from_secs(2);
/// Messages on their way to the manager; a session that cannot send so many is stuck.
const OUTBOX: usize = 16;
/// Heartbeats that may find the outbox full before the session is given up.
const STUCK_MAX: u32 = 3;
/// Part of the period after which a heartbeat is sent: three of them, late ones too, are within the three
/// periods that a manager waits. Sent more often, it costs a manager of thousands of agents as much more.
const BEAT: f64 = 0.9;
/// More managers than this are not remembered.
const MANAGERS_MAX: usize = 64;

/// Makes connections to managers. They must notice by themselves that the other end is dead or hangs.
pub trait Connector: Send + Sync + 'static {
    /// A connection to the manager at `addr` (host:port); may be made when it is first used.
    ///
    /// # Errors
    /// A sentence, when `addr` makes no sense.
    fn channel(&self, addr: &str) -> Result<Channel, String>;
}

impl Connector for Arc<swarm_identity::Identity> {
    fn channel(&self, addr: &str) -> Result<Channel, String> {
        swarm_identity::Identity::session_channel(self, addr).map_err(|error| error.to_string())
    }
}

/// What the daemon may want to know of the session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionState {
    /// Address of the manager that holds the session; `None` while there is none.
    pub manager: Option<String>,
    /// The session's ID.
    pub session_id: Option<SessionId>,
    /// What a manager said last: the node with its role, all managers, the root certificate.
    pub info: Option<SessionInfo>,
    /// Why the last attempt or session ended.
    pub last_error: Option<String>,
}

pub(crate) struct SessionLoop {
    pub connector: Arc<dyn Connector>,
    pub remotes: Vec<String>,
    pub description: watch::Receiver<NodeDescription>,
    pub reporter: Arc<Reporter>,
    pub programmed: watch::Receiver<Programmed>,
    pub worker: mpsc::Sender<Request>,
    pub state: watch::Sender<SessionState>,
    /// Ends the loop at once.
    pub cancel: CancellationToken,
    /// Ends the loop after everything that waits was sent, with a goodbye.
    pub leave: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("no manager is known: join a cluster first")]
    NoManager,
    #[error("{0}")]
    Address(String),
    #[error("manager {addr} refuses the session: {status}")]
    Refused { addr: String, status: String },
    #[error(
        "manager {addr} says that this node was removed from the cluster; its tasks are stopped, `swarm leave` makes it forget the cluster: {status}"
    )]
    Removed { addr: String, status: String },
    #[error("manager {addr} did not register this node within {waited:?}")]
    Slow { addr: String, waited: Duration },
    #[error("manager {0} ended the session")]
    Closed(String),
    #[error("manager {0} answers out of turn")]
    Protocol(String),
    #[error("manager {0} takes no messages")]
    Stuck(String),
    #[error("no leader hears manager {addr}; manager {other} is heard")]
    Leaderless { addr: String, other: String },
    #[error(transparent)]
    Set(#[from] crate::worker::SetError),
    #[error("cannot take assignments: {0}")]
    Local(#[from] crate::local::LocalError),
    #[error("the agent stops")]
    Stopping,
}

impl SessionError {
    fn of(addr: &str, status: &tonic::Status) -> Self {
        let removed = swarm_identity::is_removed(status);
        let (addr, status) = (addr.to_owned(), describe(status));
        if removed {
            Self::Removed { addr, status }
        } else {
            Self::Refused { addr, status }
        }
    }
}

/// How a session ended.
#[derive(PartialEq, Eq)]
enum End {
    Stop,
    Left,
}

impl SessionLoop {
    pub async fn run(mut self) {
        let mut choice = Choice::default();
        loop {
            let known = self.state.borrow().info.clone();
            choice.learn(&self.remotes, known.as_ref());
            let addr = choice.next(&mut rand::rng());
            let began = Instant::now();
            let cancel = self.cancel.clone();
            let result = tokio::select! {
                () = cancel.cancelled() => return,
                result = self.session(addr.as_deref(), choice.patience()) => result,
            };
            let error = match result {
                Ok(_) => return,
                Err(error) => error,
            };
            tracing::info!(%error, "no session");
            let registered = self.state.borrow().manager.is_some();
            self.state.send_modify(|state| {
                state.manager = None;
                state.session_id = None;
                state.last_error = Some(error.to_string());
            });
            if let Some(addr) = &addr {
                choice.failed(addr, registered && began.elapsed() > BACKOFF_MAX);
            }
            match error {
                SessionError::Leaderless { other, .. } => choice.prefer(other),
                // Others run in place of its tasks, and may have their addresses.
                SessionError::Removed { .. } => self.end_tasks(),
                _ => {}
            }
            let wait = choice.wait(&mut rand::rng());
            tokio::select! {
                () = self.cancel.cancelled() => return,
                // Without a session nobody is there to hear a goodbye.
                () = self.leave.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Has all tasks stopped, for good. Done again, it does nothing.
    fn end_tasks(&self) {
        // If there is no room, the next refusal does it.
        let _ = self.worker.try_send(Request::End);
    }

    async fn session(
        &mut self,
        addr: Option<&str>,
        patience: Duration,
    ) -> Result<End, SessionError> {
        let addr = addr.ok_or(SessionError::NoManager)?;
        let channel = self
            .connector
            .channel(addr)
            .map_err(SessionError::Address)?;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let description = self.description.borrow_and_update().clone();
        let register = message(ToManager::Register(Register {
            description: Some(description),
        }));
        outbox
            .try_send(register)
            .expect("a new channel has room for one message");
        let mut client = DispatcherClient::new(channel)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        let refused = |status: tonic::Status| SessionError::of(addr, &status);
        let open = async {
            let mut inbox = client
                .session(ReceiverStream::new(messages))
                .await
                .map_err(refused)?
                .into_inner();
            let first = inbox.message().await.map_err(refused)?;
            match first.and_then(|first| first.message) {
                Some(FromManager::Registered(registered)) => Ok((inbox, registered)),
                Some(_) => Err(SessionError::Protocol(addr.to_owned())),
                None => Err(SessionError::Closed(addr.to_owned())),
            }
        };
        let leave = self.leave.clone();
        let (inbox, registered) = tokio::select! {
            // Without a session nobody is there to hear a goodbye.
            () = leave.cancelled() => return Err(SessionError::Stopping),
            opened = tokio::time::timeout(patience, open) => {
                let addr = addr.to_owned();
                opened.map_err(|_| SessionError::Slow { addr, waited: patience })??
            }
        };
        let period = self.begin(addr, registered);
        let mut live = Live {
            addr: addr.to_owned(),
            outbox,
            inbox,
            assembler: Assembler::default(),
            applying: None,
            applied: false,
            acked: None,
            heard_manager: None,
        };
        live.stand(self);
        live.run(self, period).await
    }

    fn begin(&self, addr: &str, registered: Registered) -> Duration {
        tracing::info!(manager = addr, session = %registered.session_id, "registered");
        self.state.send_modify(|state| {
            state.manager = Some(addr.to_owned());
            state.session_id = Some(SessionId::from(registered.session_id));
            state.last_error = None;
        });
        if let Some(info) = registered.info {
            self.learn(info);
        }
        self.reporter.restart();
        let period = registered
            .heartbeat_period
            .and_then(|period| Duration::try_from(period).ok())
            .unwrap_or(HEARTBEAT);
        period.clamp(Duration::from_millis(20), Duration::from_secs(600))
    }

    /// The worker watches the state, and saves what is new.
    fn learn(&self, mut info: SessionInfo) {
        info.managers.truncate(MANAGERS_MAX);
        self.state.send_modify(|state| state.info = Some(info));
    }
}

/// A registered session.
struct Live {
    addr: String,
    outbox: mpsc::Sender<AgentMessage>,
    inbox: Streaming<ManagerMessage>,
    assembler: Assembler,
    /// The worker takes a set; nothing more is read before it has.
    applying: Option<oneshot::Receiver<Result<(), ApplyError>>>,
    /// A set of this session was taken.
    applied: bool,
    acked: Option<u64>,
    /// While no leader hears this manager: looks for one that is heard.
    heard_manager: Option<BoxFuture<'static, String>>,
}

/// Why the worker did not take a set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Set(#[from] crate::worker::SetError),
    #[error(transparent)]
    Local(#[from] crate::local::LocalError),
}

impl Live {
    async fn run(&mut self, at: &mut SessionLoop, period: Duration) -> Result<End, SessionError> {
        let mut beat = tokio::time::interval(period.mul_f64(BEAT));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stuck = 0;
        loop {
            // One message at a time, and only when there is room: nothing here ever waits.
            let room = self.outbox.capacity() > 0;
            tokio::select! {
                // Looks again when there is.
                () = has_room(&self.outbox), if !room => {}
                _ = beat.tick() => {
                    // Any queued message counts as a heartbeat; a full outbox is a stuck session.
                    if self.outbox.try_send(message(ToManager::Heartbeat(Heartbeat {}))).is_ok() {
                        stuck = 0;
                    } else {
                        stuck += 1;
                    }
                    if stuck > STUCK_MAX {
                        return Err(SessionError::Stuck(self.addr.clone()));
                    }
                }
                next = self.inbox.next(), if self.applying.is_none() => self.take(next, at)?,
                result = taken(&mut self.applying) => {
                    self.applying = None;
                    match result {
                        Ok(Ok(())) => self.applied = true,
                        Ok(Err(ApplyError::Set(error))) => return Err(error.into()),
                        Ok(Err(ApplyError::Local(error))) => return Err(error.into()),
                        Err(_) => return Err(SessionError::Stopping),
                    }
                    self.acknowledge(at);
                }
                other = found(&mut self.heard_manager) => {
                    return Err(SessionError::Leaderless { addr: self.addr.clone(), other });
                }
                () = at.reporter.changed(), if room => {
                    if let Some(report) = at.reporter.next_report() {
                        self.send(ToManager::Status(report));
                        // There may be more than one message can carry.
                        at.reporter.wake();
                    }
                }
                Ok(()) = at.programmed.changed(), if room => self.acknowledge(at),
                Ok(()) = at.description.changed(), if room => {
                    let description = at.description.borrow_and_update().clone();
                    self.send(ToManager::Description(description));
                }
                () = at.leave.cancelled() => {
                    self.leave(at).await;
                    return Ok(End::Left);
                }
                () = at.cancel.cancelled() => return Ok(End::Stop),
            }
        }
    }

    fn take(
        &mut self,
        next: Option<Result<ManagerMessage, tonic::Status>>,
        at: &SessionLoop,
    ) -> Result<(), SessionError> {
        let message = match next {
            None => return Err(SessionError::Closed(self.addr.clone())),
            Some(Err(status)) => return Err(SessionError::of(&self.addr, &status)),
            Some(Ok(message)) => message,
        };
        match message.message {
            // A newer manager may say more than this version understands.
            None => {}
            Some(FromManager::Registered(_)) => {
                return Err(SessionError::Protocol(self.addr.clone()));
            }
            Some(FromManager::StatusAck(ack)) => at.reporter.acknowledged(ack.sequence),
            Some(FromManager::Info(info)) => {
                at.learn(info);
                self.stand(at);
            }
            Some(FromManager::Assignments(piece)) => {
                let Some(set) = self.assembler.push(piece)? else {
                    return Ok(());
                };
                let (done, result) = oneshot::channel();
                // The only one under way: there is room unless the worker has ended.
                at.worker
                    .try_send(Request::Apply(set, done))
                    .map_err(|_| SessionError::Stopping)?;
                self.applying = Some(result);
            }
        }
        Ok(())
    }

    /// Begins or ends the search for another manager, as this one says that it is heard.
    fn stand(&mut self, at: &SessionLoop) {
        let state = at.state.borrow();
        let info = state.info.as_ref().filter(|info| info.leaderless);
        match info {
            None => self.heard_manager = None,
            Some(info) if self.heard_manager.is_none() => {
                let others = info.managers.iter().map(|manager| manager.addr.clone());
                let others = others.filter(|addr| !addr.is_empty() && *addr != self.addr);
                let search = heard_manager(at.connector.clone(), others.collect());
                self.heard_manager = Some(Box::pin(search));
            }
            Some(_) => {}
        }
    }

    /// Tells the manager what the kernel has, once a set of this session was taken.
    fn acknowledge(&mut self, at: &mut SessionLoop) {
        let revision = at.programmed.borrow_and_update().revision;
        if self.applied
            && revision > 0
            && self.acked != Some(revision)
            && self.outbox.capacity() > 0
        {
            self.acked = Some(revision);
            self.send(ToManager::Ack(AssignmentsAck { revision }));
        }
    }

    fn send(&self, body: ToManager) {
        if self.outbox.try_send(message(body)).is_err() {
            // Checked before: only the end of the session closes the outbox, and then all is sent again.
            tracing::debug!("message not sent: the session ends");
        }
    }

    async fn leave(&mut self, at: &SessionLoop) {
        let farewell = async {
            while at.reporter.has_unsent() {
                let Some(report) = at.reporter.next_report() else {
                    // Once earlier ones are acknowledged.
                    match self.inbox.next().await {
                        Some(Ok(said)) => {
                            if let Some(FromManager::StatusAck(ack)) = said.message {
                                at.reporter.acknowledged(ack.sequence);
                            }
                        }
                        _ => return,
                    }
                    continue;
                };
                let report = message(ToManager::Status(report));
                if self.outbox.send(report).await.is_err() {
                    return;
                }
            }
            let goodbye = message(ToManager::Goodbye(Goodbye {}));
            if self.outbox.send(goodbye).await.is_err() {
                return;
            }
            // Ends our half of the stream; the manager ends its own when it has read everything.
            let (closed, _) = mpsc::channel(1);
            self.outbox = closed;
            while let Some(Ok(_)) = self.inbox.next().await {}
        };
        if tokio::time::timeout(GOODBYE_MAX, farewell).await.is_err() {
            tracing::warn!("the manager did not take the goodbye in time");
        }
    }
}

async fn has_room(outbox: &mpsc::Sender<AgentMessage>) {
    if outbox.reserve().await.is_err() {
        // Closed: the other end of the stream says why.
        std::future::pending::<()>().await;
    }
}

async fn taken(
    applying: &mut Option<oneshot::Receiver<Result<(), ApplyError>>>,
) -> Result<Result<(), ApplyError>, oneshot::error::RecvError> {
    match applying {
        Some(result) => result.await,
        None => std::future::pending().await,
    }
}

async fn found(search: &mut Option<BoxFuture<'static, String>>) -> String {
    match search {
        Some(search) => search.await,
        None => std::future::pending().await,
    }
}

/// Asks managers until one says that a leader hears it.
async fn heard_manager(connector: Arc<dyn Connector>, addrs: Vec<String>) -> String {
    let mut others: Vec<(String, HealthClient<Channel>)> = addrs
        .into_iter()
        .filter_map(|addr| {
            let channel = connector.channel(&addr).ok()?;
            Some((addr, HealthClient::new(channel)))
        })
        .collect();
    let mut wait = BACKOFF_MIN;
    loop {
        others.shuffle(&mut rand::rng());
        for (addr, client) in &mut others {
            let asked = client.check(HealthCheckRequest {
                service: DISPATCHER.into(),
            });
            let answer = tokio::time::timeout(ASK_PATIENCE, asked).await;
            if let Ok(Ok(answer)) = answer
                && answer.into_inner().status() == ServingStatus::Serving
            {
                return addr.clone();
            }
        }
        tokio::time::sleep(wait.mul_f64(rand::random_range(0.5..1.0))).await;
        wait = (wait * 2).min(ASK_AGAIN_MAX);
    }
}

fn message(body: ToManager) -> AgentMessage {
    AgentMessage {
        message: Some(body),
    }
}

/// tonic puts the reason of a failed connection into the sources only.
fn describe(status: &tonic::Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

/// Which manager to try next, and how long to wait before. Pure but for the random numbers it is given.
#[derive(Debug, Default)]
struct Choice {
    /// Failures in a row of each known address, and the number of the last one (0 for none).
    failures: BTreeMap<String, (u32, u64)>,
    /// Failures of all.
    failed: u64,
    last: Option<String>,
    /// Said to be the one to take next.
    preferred: Option<String>,
}

impl Choice {
    /// The managers that count now: those a manager told us of, and those we were started with.
    fn learn(&mut self, remotes: &[String], info: Option<&SessionInfo>) {
        let told = info.into_iter().flat_map(|info| &info.managers);
        let known: BTreeSet<&str> = told
            .map(|manager| manager.addr.as_str())
            .chain(remotes.iter().map(String::as_str))
            .filter(|addr| !addr.is_empty())
            .collect();
        self.failures
            .retain(|addr, _| known.contains(addr.as_str()));
        for addr in known {
            self.failures.entry(addr.to_owned()).or_default();
        }
    }

    /// One of those that failed least, not the last one if there is another. Who failed longest ago is the first: of
    /// those that refuse at once and one that hangs, which costs seconds, that is not the one that was just lost.
    fn next(&mut self, rng: &mut impl rand::Rng) -> Option<String> {
        let preferred = self.preferred.take();
        if let Some(addr) = preferred.filter(|addr| self.failures.contains_key(addr)) {
            self.last = Some(addr.clone());
            return Some(addr);
        }
        let only = self.failures.len() == 1;
        let others = self.failures.iter();
        let others = others.filter(|(addr, _)| only || self.last.as_ref() != Some(*addr));
        let others: Vec<_> = others.collect();
        let first = others.iter().map(|(_, record)| *record).min()?;
        // Of those that have not failed, any.
        let best = others.iter().filter(|(_, record)| *record == first);
        let best: Vec<&String> = best.map(|(addr, _)| *addr).collect();
        let chosen = best[rng.random_range(0..best.len())].clone();
        self.last = Some(chosen.clone());
        Some(chosen)
    }

    /// This one is to be taken next, at once.
    fn prefer(&mut self, addr: String) {
        self.preferred = Some(addr);
    }

    /// The attempt or session ended. One that had held for long clears the record of all.
    fn failed(&mut self, addr: &str, held_long: bool) {
        if held_long {
            self.failures
                .values_mut()
                .for_each(|record| *record = (0, 0));
        }
        self.failed += 1;
        if let Some((count, last)) = self.failures.get_mut(addr) {
            *count = count.saturating_add(1);
            *last = self.failed;
        }
    }

    /// How long the next one has to register this node.
    fn patience(&self) -> Duration {
        let rounds = self.failures.values().map(|(count, _)| *count).min();
        let factor = 1 << rounds.unwrap_or(0).min(10);
        REGISTER_MIN.saturating_mul(factor).min(REGISTER_MAX)
    }

    /// Nothing while there is a manager that has not failed; then doubling, with jitter.
    fn wait(&self, rng: &mut impl rand::Rng) -> Duration {
        let fewest = self.failures.values().map(|(count, _)| *count).min();
        match fewest {
            _ if self.preferred.is_some() => Duration::ZERO,
            Some(0) => Duration::ZERO,
            // Nobody is known: look again when somebody may have told us.
            None => BACKOFF_MAX,
            Some(rounds) => {
                let full = BACKOFF_MIN
                    .saturating_mul(1 << (rounds - 1).min(10))
                    .min(BACKOFF_MAX);
                full.mul_f64(rng.random_range(0.5..1.0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    fn choice(addrs: &[&str]) -> Choice {
        let remotes: Vec<String> = addrs.iter().map(|&addr| addr.to_owned()).collect();
        let mut choice = Choice::default();
        choice.learn(&remotes, None);
        choice
    }

    #[test]
    fn another_manager_is_tried_at_once_and_waits_begin_when_all_have_failed() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut choice = choice(&["a:1", "b:1", "c:1"]);
        let mut tried = BTreeSet::new();
        for round in 0..3 {
            let addr = choice.next(&mut rng).unwrap();
            assert!(tried.insert(addr.clone()), "{addr} was tried twice");
            choice.failed(&addr, false);
            assert_eq!(choice.wait(&mut rng).is_zero(), round < 2);
        }
    }

    #[test]
    fn when_all_have_failed_each_is_given_more_time() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut choice = choice(&["a:1", "b:1"]);
        let mut waited = Vec::new();
        for _ in 0..10 {
            waited.push(choice.patience().as_secs());
            let addr = choice.next(&mut rng).unwrap();
            choice.failed(&addr, false);
        }
        assert_eq!(waited, [5, 5, 10, 10, 20, 20, 40, 40, 40, 40]);
        assert!(REGISTER_MAX < swarm_identity::SESSION_CONNECT_MAX);
        choice.failed("a:1", true);
        assert_eq!(choice.patience(), REGISTER_MIN);
    }

    #[test]
    fn the_manager_that_was_just_lost_is_tried_after_all_others() {
        for seed in 0..20 {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let mut choice = choice(&["a:1", "b:1", "c:1", "d:1"]);
            // Each had a session that did not hold for long, the last one because its manager hangs.
            for addr in ["b:1", "d:1", "a:1", "c:1"] {
                choice.failed(addr, false);
            }
            for addr in ["b:1", "d:1", "a:1", "c:1"] {
                assert_eq!(choice.next(&mut rng).as_deref(), Some(addr));
                choice.failed(addr, false);
            }
        }
    }

    #[test]
    fn waits_grow_to_their_bound_with_jitter() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut choice = choice(&["a:1"]);
        let mut longest = Duration::ZERO;
        for _ in 0..40 {
            let addr = choice.next(&mut rng).unwrap();
            choice.failed(&addr, false);
            let wait = choice.wait(&mut rng);
            assert!(wait >= BACKOFF_MIN / 2 && wait <= BACKOFF_MAX);
            longest = longest.max(wait);
        }
        assert!(longest > BACKOFF_MAX / 2);
    }

    #[test]
    fn the_manager_that_is_known_to_be_heard_is_tried_next_and_at_once() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut choice = choice(&["a:1", "b:1", "c:1"]);
        for addr in ["a:1", "b:1", "c:1"] {
            choice.failed(addr, false);
            choice.failed(addr, false);
        }
        assert!(!choice.wait(&mut rng).is_zero());
        choice.prefer("c:1".to_owned());
        assert!(choice.wait(&mut rng).is_zero());
        assert_eq!(choice.next(&mut rng).as_deref(), Some("c:1"));
        assert!(!choice.wait(&mut rng).is_zero());
        // One that is no manager any more is not.
        choice.prefer("d:1".to_owned());
        assert_ne!(choice.next(&mut rng).as_deref(), Some("d:1"));
    }

    #[test]
    fn managers_that_are_gone_are_not_tried_again() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut choice = choice(&["a:1", "b:1"]);
        choice.learn(&["b:1".to_owned()], None);
        assert_eq!(choice.next(&mut rng).as_deref(), Some("b:1"));
    }
}
