//! What has become of this member's proposals, when nobody says.
//!
//! The leader may hang, or its connection break. But terms never fall along the
//! log, so a proposal that could be written in one term only has been applied
//! here, or never will be anywhere, once an entry of a later term has been.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::types::{LogId, Outcome};

/// Proposals that wait for their entry, by [`swarm_proto::v1::Transaction::proposal`].
#[derive(Default)]
pub(crate) struct Proposals(Mutex<HashMap<u64, oneshot::Sender<Applied>>>);

/// At this index of the log, and what apply said.
type Applied = (u64, Outcome);

/// What has become of a proposal.
#[derive(Debug, PartialEq)]
pub(crate) enum Fate {
    /// It is in the log.
    Applied(u64, Outcome),
    /// It is not in the log, and never will be.
    Never,
}

impl Proposals {
    /// Before the proposal is sent.
    pub(crate) fn expect(self: &Arc<Self>, proposal: u64) -> Expected {
        let (sender, applied) = oneshot::channel();
        self.0.lock().insert(proposal, sender);
        Expected {
            proposal,
            applied,
            proposals: self.clone(),
        }
    }

    /// This member has applied a transaction. To be called before the entry counts as applied.
    pub(crate) fn applied(&self, proposal: u64, index: u64, outcome: &Outcome) {
        let waiting = self.0.lock().remove(&proposal);
        if let Some(waiting) = waiting {
            // Nobody waits any more: fine.
            let _ = waiting.send((index, outcome.clone()));
        }
    }

    /// This member has been given a state, and will not see the entries that led to it. To be
    /// called before those count as applied.
    pub(crate) fn skipped(&self) {
        self.0.lock().clear();
    }
}

/// A proposal that has been sent or is about to be.
pub(crate) struct Expected {
    proposal: u64,
    applied: oneshot::Receiver<Applied>,
    proposals: Arc<Proposals>,
}

impl Expected {
    /// Waits until its fate is known by what this member applies, which may be for ever. `term` is
    /// the only one in which it can be written to the log, if there is such a one.
    pub(crate) async fn fate(
        &mut self,
        term: Option<u64>,
        mut log: watch::Receiver<Option<LogId>>,
    ) -> Fate {
        let later = async {
            let later = |id: &Option<LogId>| match (id, term) {
                (Some(id), Some(term)) => id.leader_id.term > term,
                _ => false,
            };
            if log.wait_for(later).await.is_err() {
                std::future::pending().await
            }
        };
        tokio::select! {
            biased;
            Ok((index, outcome)) = &mut self.applied, if !self.applied.is_terminated() => {
                return Fate::Applied(index, outcome);
            }
            () = later => {}
        }
        match self.applied.try_recv() {
            Ok((index, outcome)) => Fate::Applied(index, outcome),
            Err(oneshot::error::TryRecvError::Empty) => Fate::Never,
            // It may be among the entries that this member has not seen.
            Err(oneshot::error::TryRecvError::Closed) => std::future::pending().await,
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.proposals.0.lock().remove(&self.proposal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    fn entry(term: u64, index: u64) -> Option<LogId> {
        Some(openraft::testing::log_id::<crate::types::TypeConfig>(
            term, 0, index,
        ))
    }

    struct Member {
        proposals: Arc<Proposals>,
        log: watch::Sender<Option<LogId>>,
    }

    impl Member {
        fn new() -> Self {
            Self {
                proposals: Arc::default(),
                log: watch::Sender::new(entry(4, 10)),
            }
        }

        /// What is known so far.
        fn fate(&self, expected: &mut Expected, term: Option<u64>) -> Option<Fate> {
            expected.fate(term, self.log.subscribe()).now_or_never()
        }
    }

    #[test]
    fn a_proposal_that_is_applied_is_known_to_be() {
        let member = Member::new();
        let mut expected = member.proposals.expect(7);
        let mut other = member.proposals.expect(8);
        assert_eq!(member.fate(&mut expected, Some(4)), None);
        member.proposals.applied(7, 11, &Outcome(Ok(())));
        member.log.send_replace(entry(5, 12));
        let fate = member.fate(&mut expected, Some(4));
        assert_eq!(fate, Some(Fate::Applied(11, Outcome(Ok(())))));
        assert_eq!(member.fate(&mut other, Some(4)), Some(Fate::Never));
    }

    #[test]
    fn until_a_later_term_is_applied_nothing_is_known() {
        let member = Member::new();
        let mut expected = member.proposals.expect(7);
        member.log.send_replace(entry(4, 11));
        assert_eq!(member.fate(&mut expected, Some(4)), None);
        member.log.send_replace(entry(5, 12));
        // One that may be written in any term may still come.
        assert_eq!(member.fate(&mut expected, None), None);
        assert_eq!(member.fate(&mut expected, Some(5)), None);
        assert_eq!(member.fate(&mut expected, Some(4)), Some(Fate::Never));
    }

    #[test]
    fn what_a_snapshot_has_skipped_stays_unknown() {
        let member = Member::new();
        let mut before = member.proposals.expect(7);
        member.proposals.skipped();
        let mut after = member.proposals.expect(8);
        member.log.send_replace(entry(6, 40));
        assert_eq!(member.fate(&mut before, Some(4)), None);
        assert_eq!(member.fate(&mut before, Some(6)), None);
        assert_eq!(member.fate(&mut after, Some(4)), Some(Fate::Never));
    }

    #[test]
    fn nothing_is_kept_of_those_that_nobody_waits_for() {
        let member = Member::new();
        let done = member.proposals.expect(7);
        let given_up = member.proposals.expect(8);
        member.proposals.applied(7, 11, &Outcome(Ok(())));
        drop((done, given_up));
        assert!(member.proposals.0.lock().is_empty());
    }
}
