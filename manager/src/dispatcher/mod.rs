//! The manager's agent-facing side: sessions, assignments, statuses, liveness.
//!
//! Runs on every manager and works on its own replica: an agent may open its
//! session anywhere. One loop (the hub) follows the store, works out once what
//! a batch of changes means for assignments, and hands each session its part; one
//! loop (the intake) puts what agents report into transactions; one reports to
//! the leader who is alive. It never decides what runs where.

mod assignments;
#[cfg(test)]
mod assignments_test;
mod hub;
mod intake;
mod liveness;
mod session;
#[cfg(test)]
mod session_test;
mod withdrawal;

use std::sync::Arc;

use swarm_proto::NodeId;
use swarm_proto::defaults::MESSAGE_MAX;
use swarm_proto::v1::dispatcher_server::DispatcherServer;
use swarm_proto::v1::liveness_server::LivenessServer;
use swarm_store::Consensus;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::clock::Clock;
use crate::leader::LeaderLoop;

pub use assignments::{Advance, AssignmentSet, Delta, Journal, Missed, Shared, Tables, messages};
pub use liveness::{Connect, Hearing, Liveness, Tracker, Verdict, heartbeat_period};
pub use session::Sessions;

/// A loop of the leader that looks at all nodes, or all tasks of a network, rests for so many times what that cost
/// before it does again for what agents have said meanwhile.
const REST: u32 = 9;

/// Owns the dispatcher's loops and sessions.
#[derive(Debug)]
pub struct Dispatcher {
    sessions: Sessions,
    liveness: Liveness,
    loops: JoinSet<()>,
    running: TaskTracker,
    cancel: CancellationToken,
}

impl Dispatcher {
    /// Starts the loops. `node_id` is this manager's node; `connect` reaches other managers.
    #[must_use]
    pub fn start(
        consensus: Arc<dyn Consensus>,
        node_id: NodeId,
        clock: Clock,
        connect: Connect,
    ) -> Self {
        let cancel = CancellationToken::new();
        let running = TaskTracker::new();
        let liveness = Liveness::new(consensus.clone(), node_id.clone(), connect);
        let (hub, hub_loop) = hub::hub(consensus.clone(), liveness.hearing(), cancel.clone());
        let (intake, intake_loop) =
            intake::intake(consensus.clone(), node_id, clock, cancel.clone());
        let mut loops = JoinSet::new();
        loops.spawn(hub_loop.instrument(tracing::info_span!("dispatcher_hub")));
        loops.spawn(intake_loop.instrument(tracing::info_span!("dispatcher_intake")));
        let reporter = liveness.clone().run_reporter(cancel.clone());
        loops.spawn(reporter.instrument(tracing::info_span!("liveness_reporter")));
        let sessions = Sessions {
            consensus,
            hub,
            intake,
            liveness: liveness.clone(),
            running: running.clone(),
            cancel: cancel.clone(),
        };
        Self {
            sessions,
            liveness,
            loops,
            running,
            cancel,
        }
    }

    /// The service that agents speak to.
    #[must_use]
    pub fn service(&self) -> DispatcherServer<Sessions> {
        DispatcherServer::new(self.sessions.clone())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }

    /// The service that other managers report to.
    #[must_use]
    pub fn liveness_service(&self) -> LivenessServer<Liveness> {
        LivenessServer::new(self.liveness.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    /// What the managers hear, and what the nodes have acknowledged.
    #[must_use]
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// The loops that run while this manager leads: one marks nodes, one lets tasks be stopped.
    #[must_use]
    pub fn leader_loops(&self) -> Vec<LeaderLoop> {
        vec![
            self.liveness.leader_loop(),
            withdrawal::leader_loop(self.liveness.clone()),
        ]
    }

    /// Ends all sessions (their agents go elsewhere) and loops; returns once they have ended.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        self.running.close();
        self.running.wait().await;
        while let Some(ended) = self.loops.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a loop of the dispatcher failed");
            }
        }
    }
}

/// The messages of a node's complete set, for the fuzz targets.
#[cfg(feature = "fuzzing")]
pub(crate) fn complete(
    state: &swarm_store::State,
    node: &NodeId,
) -> Vec<swarm_proto::v1::Assignments> {
    let kind = swarm_proto::v1::AssignmentsType::Complete;
    let set = AssignmentSet::of(state, node);
    let complete = set.complete(state, &mut Tables::default());
    messages(kind, 0, state.index(), &complete.shared, complete.own)
}
