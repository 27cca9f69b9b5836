//! Puts what agents report into transactions.
//!
//! Reports of all sessions are gathered while the previous transaction is
//! being committed, so batches grow with the load and an idle cluster waits for
//! nothing. A report is acknowledged once it is committed; until then it is
//! tried again, and merging makes that harmless.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use swarm_proto::NodeId;
use swarm_proto::defaults::TRANSACTION_MAX;
use swarm_proto::v1::{StoreAction, Transaction};
use swarm_store::{Consensus, ProposeError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::hub::Update;
use crate::clock::{Clock, timestamp};

/// Reports that wait for the next transaction; then sessions are read more slowly.
const QUEUE: usize = if cfg!(test) { 8 } else { 1024 };
/// Actions in one transaction.
const ACTIONS: usize = 2000;
/// Wait before a transaction that failed is tried again, unless there is a new leader.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// What one message of an agent asks for.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) actions: Vec<StoreAction>,
    /// Who is told, and what, once it is committed.
    pub(super) ack: Option<(mpsc::Sender<Update>, u64)>,
}

/// Where sessions hand in reports.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    reports: mpsc::Sender<Report>,
}

impl Intake {
    /// Waits for room in the queue.
    pub(super) async fn put(&self, report: Report) -> Result<(), Status> {
        let sent = self.reports.send(report).await;
        sent.map_err(|_| Status::unavailable("the manager is stopping"))
    }
}

/// The queue and its loop.
pub(super) fn intake(
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    clock: Clock,
    cancel: CancellationToken,
) -> (Intake, impl Future<Output = ()> + Send) {
    let (reports, received) = mpsc::channel(QUEUE);
    let worker = Worker {
        consensus,
        node_id,
        clock,
        cancel,
    };
    (Intake { reports }, worker.run(received))
}

struct Worker {
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    clock: Clock,
    cancel: CancellationToken,
}

impl Worker {
    async fn run(self, mut reports: mpsc::Receiver<Report>) {
        let mut held_over = None;
        loop {
            let first = match held_over.take() {
                Some(report) => report,
                None => tokio::select! {
                    () = self.cancel.cancelled() => return,
                    report = reports.recv() => match report {
                        Some(report) => report,
                        None => return,
                    },
                },
            };
            let mut actions = Vec::new();
            let mut acks = Vec::new();
            let mut size = 0;
            let mut next = Some(first);
            while let Some(report) = next.take() {
                let length: usize = report
                    .actions
                    .iter()
                    .map(|action| action.encoded_len() + 8)
                    .sum();
                let full = actions.len() + report.actions.len() > ACTIONS
                    || size + length > TRANSACTION_MAX - 1024;
                if full && !actions.is_empty() {
                    held_over = Some(report);
                    break;
                }
                size += length;
                actions.extend(report.actions);
                acks.extend(report.ack);
                next = reports.try_recv().ok();
            }
            #[cfg(feature = "museum")]
            if swarm_proto::museum::on(swarm_proto::museum::Bug::StatusAckedEarly) {
                for (queue, sequence) in acks.drain(..) {
                    let _ = queue.try_send(Update::StatusAck(sequence));
                }
                let transaction = Transaction {
                    actions,
                    proposed_at: Some(timestamp((self.clock)())),
                    proposer: self.node_id.to_string(),
                    ..Transaction::default()
                };
                let _ = self.consensus.propose(transaction).await;
                continue;
            }
            if !self.commit(actions).await {
                return;
            }
            for (queue, sequence) in acks {
                // One that is full has had more reports than are allowed: the next
                // acknowledgement says it too. A closed one is over.
                let _ = queue.try_send(Update::StatusAck(sequence));
            }
        }
    }

    /// Tries until it is committed. Returns false when the manager stops.
    async fn commit(&self, mut actions: Vec<StoreAction>) -> bool {
        let mut leadership = self.consensus.leadership();
        while !actions.is_empty() {
            leadership.mark_unchanged();
            let transaction = Transaction {
                actions: actions.clone(),
                proposed_at: Some(timestamp((self.clock)())),
                proposer: self.node_id.to_string(),
                ..Transaction::default()
            };
            let proposed = tokio::select! {
                () = self.cancel.cancelled() => return false,
                proposed = self.consensus.propose(transaction) => proposed,
            };
            match proposed {
                Ok(_) => return true,
                Err(ProposeError::Rejected(rejection)) => {
                    // What sessions let through is never refused, unless a member runs
                    // another version: leave out what apply does not take.
                    let place = (rejection.action as usize).min(actions.len() - 1);
                    let action = actions.remove(place);
                    tracing::error!(reason = %rejection.message, ?action, "a report was refused");
                }
                Err(ProposeError::Stopping) => return false,
                Err(error @ ProposeError::TooLarge { .. }) => {
                    tracing::error!(%error, "reports were dropped");
                    return true;
                }
                Err(
                    error @ (ProposeError::NoLeader(_)
                    | ProposeError::Unknown(_)
                    | ProposeError::Denied(_)),
                ) => {
                    tracing::debug!(%error, "reports are kept until there is a leader");
                    tokio::select! {
                        () = self.cancel.cancelled() => return false,
                        _ = leadership.changed() => {}
                        () = tokio::time::sleep(RETRY_AFTER) => {}
                    }
                }
            }
        }
        true
    }
}
