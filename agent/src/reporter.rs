//! Statuses on their way to the managers.
//!
//! Keeps the newest status of each task until a manager has acknowledged it,
//! so it is bounded by the number of tasks. States only rise: a newer status
//! replaces one that was not sent yet. After a reconnect everything that is
//! unacknowledged is sent again; merging is idempotent.
//!
//! What only says how far a start is waits while a report is on its way, and is
//! mostly overtaken by what follows: it would cost a write of the raft group each.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use prost::Message as _;
use swarm_proto::TaskId;
use swarm_proto::defaults::REPORTS_AHEAD;
use swarm_proto::v1::{StatusReport, TaskState, TaskStatus, TaskStatusUpdate};
use tokio::sync::Notify;

/// Encoded bytes of updates in one report; far below the message limit.
const REPORT_MAX: usize = 256 << 10;

/// Reports that may be unacknowledged in one session.
const AHEAD: u64 = REPORTS_AHEAD as u64;

/// Statuses that one start of the agent can report, in their order: more than it ever will.
const PER_START: u64 = 1 << 40;

/// The queue, shared by the tasks that fill it and the session that empties it.
#[derive(Debug)]
pub struct Reporter {
    queue: Mutex<Queue>,
    changed: Notify,
}

impl Reporter {
    /// For the agent's life of this number; what an earlier one has reported comes before.
    #[must_use]
    pub fn new(starts: u64) -> Self {
        let queue = Queue {
            next_order: starts.saturating_mul(PER_START).max(1),
            ..Queue::default()
        };
        Self {
            queue: Mutex::new(queue),
            changed: Notify::new(),
        }
    }

    /// Queues a task's newest status.
    pub fn push(&self, task: &TaskId, status: TaskStatus) {
        self.queue.lock().push(task, status);
        self.changed.notify_one();
    }

    /// The task is gone from the managers' store: nobody waits for its status.
    pub fn forget(&self, task: &TaskId) {
        self.queue.lock().forget(task);
    }

    /// Returns when there may be something to send. For one waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Has the waiter look again.
    pub fn wake(&self) {
        self.changed.notify_one();
    }

    /// The next report of this session, if anything waits.
    pub fn next_report(&self) -> Option<StatusReport> {
        self.queue.lock().next_report()
    }

    /// Whether something waits to be sent in this session.
    pub fn has_unsent(&self) -> bool {
        !self.queue.lock().unsent.is_empty()
    }

    /// A manager has committed everything up to this sequence of this session.
    pub fn acknowledged(&self, sequence: u64) {
        self.queue.lock().acknowledged(sequence);
        // What has waited for it.
        self.changed.notify_one();
    }

    /// A new session begins: everything unacknowledged is sent again.
    pub fn restart(&self) {
        self.queue.lock().restart();
        self.changed.notify_one();
    }

    /// How many tasks have a status that no manager has acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        self.queue.lock().entries.len()
    }
}

#[derive(Debug)]
struct Entry {
    status: TaskStatus,
    /// Place in the order of changes.
    order: u64,
    /// The report it was sent in, in this session.
    sent_in: Option<u64>,
}

#[derive(Debug, Default)]
struct Queue {
    entries: BTreeMap<TaskId, Entry>,
    /// Entries not sent in this session, oldest change first.
    unsent: BTreeMap<u64, TaskId>,
    next_order: u64,
    last_sequence: u64,
    /// Of the newest report that was acknowledged in this session.
    acked_sequence: u64,
}

/// Whether somebody may act on this status. ACCEPTED, PREPARING and STARTING only tell people what goes on.
fn urgent(status: &TaskStatus) -> bool {
    !matches!(
        status.state(),
        TaskState::Accepted | TaskState::Preparing | TaskState::Starting
    ) || status.reason.is_some()
}

impl Queue {
    fn push(&mut self, task: &TaskId, mut status: TaskStatus) {
        if let Some(entry) = self.entries.get(task) {
            if entry.status.state > status.state {
                return;
            }
            self.unsent.remove(&entry.order);
        }
        let order = self.next_order;
        self.next_order += 1;
        status.order = order;
        self.unsent.insert(order, task.clone());
        let entry = Entry {
            status,
            order,
            sent_in: None,
        };
        self.entries.insert(task.clone(), entry);
    }

    fn forget(&mut self, task: &TaskId) {
        if let Some(entry) = self.entries.remove(task) {
            self.unsent.remove(&entry.order);
        }
    }

    fn next_report(&mut self) -> Option<StatusReport> {
        let on_their_way = self.last_sequence - self.acked_sequence;
        let mut unsent = self.unsent.values().filter_map(|id| self.entries.get(id));
        let may_go = match on_their_way {
            0 => unsent.next().is_some(),
            1..AHEAD => unsent.any(|entry| urgent(&entry.status)),
            _ => false,
        };
        if !may_go {
            return None;
        }
        let sequence = self.last_sequence + 1;
        let mut updates = Vec::new();
        let mut bytes = 0;
        while let Some((&order, task)) = self.unsent.first_key_value() {
            let entry = self
                .entries
                .get_mut(task)
                .expect("what is unsent has an entry");
            let update = TaskStatusUpdate {
                task_id: task.to_string(),
                status: Some(entry.status.clone()),
            };
            bytes += update.encoded_len();
            if bytes > REPORT_MAX && !updates.is_empty() {
                break;
            }
            updates.push(update);
            entry.sent_in = Some(sequence);
            self.unsent.remove(&order);
        }
        self.last_sequence = sequence;
        Some(StatusReport { sequence, updates })
    }

    fn acknowledged(&mut self, sequence: u64) {
        // A manager that acknowledges what was not sent makes no room.
        let sequence = sequence.min(self.last_sequence);
        self.acked_sequence = self.acked_sequence.max(sequence);
        self.entries
            .retain(|_, entry| entry.sent_in.is_none_or(|sent| sent > sequence));
    }

    fn restart(&mut self) {
        self.last_sequence = 0;
        self.acked_sequence = 0;
        for (task, entry) in &mut self.entries {
            entry.sent_in = None;
            self.unsent.insert(entry.order, task.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use swarm_proto::v1::TaskState;

    fn status(state: TaskState) -> TaskStatus {
        TaskStatus {
            state: state as i32,
            ..Default::default()
        }
    }

    #[test]
    fn only_the_newest_status_is_sent_and_never_an_older_one() {
        let mut queue = Queue::default();
        let a = TaskId::from("a");
        queue.push(&a, status(TaskState::Accepted));
        queue.push(&a, status(TaskState::Running));
        queue.push(&a, status(TaskState::Preparing));
        let report = queue.next_report().unwrap();
        assert_eq!(report.updates.len(), 1);
        let sent = report.updates[0].status.as_ref().unwrap();
        assert_eq!(sent.state, TaskState::Running as i32);
        assert_eq!(queue.next_report(), None);
    }

    #[test]
    fn what_is_reported_later_has_a_higher_order_over_restarts() {
        let mut last = 0;
        for starts in [1, 2, 3] {
            let reporter = Reporter::new(starts);
            for healthy in [false, true] {
                let mut running = status(TaskState::Running);
                running.healthy = healthy;
                reporter.push(&TaskId::from("a"), running);
                let report = reporter.next_report().unwrap();
                let order = report.updates[0].status.as_ref().unwrap().order;
                assert!(order > last, "{order} after {last}");
                last = order;
                // Sent again, it is what it was.
                reporter.restart();
                assert_eq!(reporter.next_report().unwrap().updates, report.updates);
            }
        }
    }

    #[test]
    fn only_so_many_reports_are_on_their_way_and_the_rest_goes_together() {
        let mut queue = Queue::default();
        let running = || status(TaskState::Running);
        let mut sent = 0;
        for number in 0..20 {
            queue.push(&TaskId::from(format!("t{number}")), running());
            sent += u64::from(queue.next_report().is_some());
        }
        assert_eq!(sent, AHEAD);
        // Never sent: it makes no room.
        queue.acknowledged(u64::MAX - 1);
        assert_eq!(queue.acked_sequence, AHEAD);
        queue.restart();
        queue.acknowledged(7);
        let all = queue.next_report().unwrap();
        assert_eq!(all.updates.len(), 20 - AHEAD as usize);
    }

    #[test]
    fn progress_waits_for_the_report_on_its_way_and_what_matters_does_not() {
        let mut queue = Queue::default();
        let (a, b) = (TaskId::from("a"), TaskId::from("b"));
        queue.push(&a, status(TaskState::Preparing));
        let first = queue.next_report().unwrap();
        queue.push(&b, status(TaskState::Preparing));
        queue.push(&a, status(TaskState::Starting));
        assert_eq!(queue.next_report(), None);
        queue.push(&a, status(TaskState::Running));
        let second = queue.next_report().unwrap();
        let said = |report: &StatusReport| -> Vec<(String, i32)> {
            let updates = report.updates.iter();
            let state = |update: &TaskStatusUpdate| update.status.as_ref().unwrap().state;
            updates.map(|u| (u.task_id.clone(), state(u))).collect()
        };
        let (preparing, running) = (TaskState::Preparing as i32, TaskState::Running as i32);
        assert_eq!(
            said(&second),
            [("b".to_owned(), preparing), ("a".to_owned(), running)]
        );
        queue.push(&b, status(TaskState::Starting));
        queue.acknowledged(first.sequence);
        assert_eq!(queue.next_report(), None);
        queue.acknowledged(second.sequence);
        assert_eq!(said(&queue.next_report().unwrap()).len(), 1);
    }

    #[test]
    fn an_acknowledgement_leaves_what_changed_after_the_report() {
        let mut queue = Queue::default();
        let a = TaskId::from("a");
        queue.push(&a, status(TaskState::Running));
        let first = queue.next_report().unwrap();
        queue.push(&a, status(TaskState::Failed));
        queue.acknowledged(first.sequence);
        let second = queue.next_report().unwrap();
        assert_eq!(
            second.updates[0].status.as_ref().unwrap().state,
            TaskState::Failed as i32
        );
    }

    #[test]
    fn a_new_session_sends_what_was_not_acknowledged_in_the_old_order() {
        let mut queue = Queue::default();
        for id in ["c", "a", "b"] {
            queue.push(&TaskId::from(id), status(TaskState::Running));
        }
        let first = queue.next_report().unwrap();
        queue.restart();
        let again = queue.next_report().unwrap();
        assert_eq!(first, again);
        let order: Vec<_> = again.updates.iter().map(|u| u.task_id.as_str()).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    proptest! {
        /// Whatever is lost on the way, after quiet and one good session the manager has every newest status.
        #[test]
        fn every_newest_status_arrives(
            steps in prop::collection::vec((0..4u8, 0..3u8, 0..10i32), 0..60)
        ) {
            let mut queue = Queue::default();
            let mut newest: BTreeMap<TaskId, i32> = BTreeMap::new();
            let mut manager: BTreeMap<TaskId, i32> = BTreeMap::new();
            let mut flying: Vec<StatusReport> = Vec::new();
            let deliver = |report: StatusReport, manager: &mut BTreeMap<TaskId, i32>| {
                for update in report.updates {
                    let state = update.status.unwrap().state;
                    let known = manager.entry(TaskId::from(&update.task_id)).or_insert(state);
                    *known = state.max(*known);
                }
            };
            for (step, task, state) in steps {
                let id = TaskId::from(["a", "b", "c"][task as usize]);
                match step {
                    0 => {
                        let top = newest.entry(id.clone()).or_insert(state);
                        *top = state.max(*top);
                        let state = *top;
                        queue.push(&id, TaskStatus { state, ..Default::default() });
                    }
                    1 => flying.extend(queue.next_report()),
                    2 if !flying.is_empty() => {
                        let report = flying.remove(0);
                        let sequence = report.sequence;
                        deliver(report, &mut manager);
                        queue.acknowledged(sequence);
                    }
                    3 => {
                        flying.clear();
                        queue.restart();
                    }
                    _ => {}
                }
                prop_assert!(queue.entries.len() <= 3 && queue.unsent.len() <= 3);
            }
            queue.restart();
            while let Some(report) = queue.next_report() {
                let sequence = report.sequence;
                deliver(report, &mut manager);
                queue.acknowledged(sequence);
            }
            prop_assert!(queue.entries.is_empty());
            prop_assert_eq!(manager, newest);
        }
    }
}
