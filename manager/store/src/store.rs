//! The newest state, and whoever waits for the next.
//!
//! There is one writer, the raft state machine. Readers take an `Arc<State>`
//! and never block it. Watchers have no queues of their own: all read the one
//! bounded ring of recent changes, and one that has fallen out of it is told so.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use swarm_proto::v1::Transaction;
use tokio::sync::watch;

use crate::state::{Event, Rejection, State};

/// Changes that are remembered for watchers that are behind or resume.
const REMEMBERED_CHANGES: usize = 4096;
/// Events in them; a few huge transactions must not hold the memory of millions.
const REMEMBERED_EVENTS: usize = 1 << 16;

/// States that are remembered with their changes. Each holds on to what later
/// ones have replaced, so there are fewer of them than of changes.
const REMEMBERED_STATES: usize = 256;

/// Holds the newest [`State`] and tells watchers of every change to it.
///
/// Readers take an `Arc<State>` and never block the writer, of which there is
/// one: the raft state machine.
#[derive(Debug)]
pub struct Store {
    newest: watch::Sender<Arc<State>>,
    recent: Arc<Mutex<Recent>>,
    changes: AtomicU64,
}

/// Every change after a snapshot, in order, each once.
#[derive(Debug)]
pub struct Watch {
    newest: watch::Receiver<Arc<State>>,
    recent: Arc<Mutex<Recent>>,
    after: u64,
}

/// A watch that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The watcher was too slow, or asked for a revision that is forgotten: start again with a snapshot.
    #[error("changes after {after} are no longer remembered; start again from a snapshot")]
    Lagged {
        /// The last index that was delivered.
        after: u64,
    },
    /// The store is gone.
    #[error("the store is shut down")]
    Closed,
}

/// What one log entry has changed.
#[derive(Clone, Debug)]
pub struct Change {
    /// The entry's index.
    pub index: u64,
    /// In the order of application.
    pub events: Arc<[Event]>,
    /// The state after the entry; for a watcher that is hundreds of changes
    /// behind, a later one ([`State::index`] tells).
    pub state: Arc<State>,
}

impl Change {
    /// All that has happened between two states, as one change: an event for each object that differs, and
    /// what came and went is not told.
    #[must_use]
    pub fn between(before: &State, state: Arc<State>) -> Self {
        Self {
            index: state.index(),
            events: state.changes_since(before).into(),
            state,
        }
    }
}

#[derive(Debug)]
struct Remembered {
    index: u64,
    events: Arc<[Event]>,
    state: Option<Arc<State>>,
}

/// The last changes, oldest first, and the index up to which they are forgotten.
#[derive(Debug)]
struct Recent {
    changes: VecDeque<Remembered>,
    events: usize,
    forgotten: u64,
}

impl Recent {
    /// Remembers a change. Returns what is forgotten for it: giving that memory back can take long.
    fn push(&mut self, change: Change) -> impl Sized + use<> {
        self.events += change.events.len();
        self.changes.push_back(Remembered {
            index: change.index,
            events: change.events,
            state: Some(change.state),
        });
        let outdated = self.changes.len().checked_sub(REMEMBERED_STATES + 1);
        let state = outdated.and_then(|outdated| self.changes[outdated].state.take());
        let mut forgotten = Vec::new();
        while self.changes.len() > REMEMBERED_CHANGES
            || (self.events > REMEMBERED_EVENTS && self.changes.len() > 1)
        {
            let Some(oldest) = self.changes.pop_front() else {
                break;
            };
            self.events -= oldest.events.len();
            self.forgotten = oldest.index;
            forgotten.push(oldest);
        }
        (state, forgotten)
    }

    /// The first change after `index`.
    fn after(&self, index: u64) -> Result<Option<&Remembered>, WatchError> {
        if index < self.forgotten {
            return Err(WatchError::Lagged { after: index });
        }
        let next = self.changes.partition_point(|change| change.index <= index);
        Ok(self.changes.get(next))
    }
}

impl Store {
    /// A store that starts from `state`.
    #[must_use]
    pub fn new(state: State) -> Arc<Self> {
        let forgotten = state.index();
        Arc::new(Self {
            newest: watch::Sender::new(Arc::new(state)),
            recent: Arc::new(Mutex::new(Recent {
                changes: VecDeque::new(),
                events: 0,
                forgotten,
            })),
            changes: AtomicU64::new(0),
        })
    }

    /// How many changes to objects have been committed since the store was made.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// The newest state.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.newest.borrow().clone()
    }

    /// The newest state, and a watch of everything after it.
    #[must_use]
    pub fn watch(&self) -> (Arc<State>, Watch) {
        let newest = self.newest.subscribe();
        let state = newest.borrow().clone();
        let after = state.index();
        let recent = self.recent.clone();
        let watch = Watch {
            newest,
            recent,
            after,
        };
        (state, watch)
    }

    /// A watch of everything after `index`, which may lie in the future.
    ///
    /// # Errors
    /// `index` is older than what is remembered.
    pub fn watch_from(&self, index: u64) -> Result<Watch, WatchError> {
        self.recent.lock().after(index)?;
        #[cfg(feature = "museum")]
        let index = if swarm_proto::museum::on(swarm_proto::museum::Bug::WatchRepeats) {
            let forgotten = self.recent.lock().forgotten;
            index.saturating_sub(1).max(forgotten)
        } else {
            index
        };
        Ok(Watch {
            newest: self.newest.subscribe(),
            recent: self.recent.clone(),
            after: index,
        })
    }

    /// Returns once the state has `index` (or a later one).
    pub async fn wait_for(&self, index: u64) -> Arc<State> {
        let mut newest = self.newest.subscribe();
        match newest.wait_for(|state| state.index() >= index).await {
            Ok(state) => state.clone(),
            // The sender lives as long as `self`.
            Err(_closed) => self.state(),
        }
    }

    /// Applies a committed transaction. Only the state machine calls this, in
    /// log order. A rejected one still advances the index.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub fn commit(&self, index: u64, transaction: &Transaction) -> Result<(), Rejection> {
        let before = self.state();
        match before.apply(index, transaction) {
            Ok(applied) => {
                let state = Arc::new(applied.state);
                let changes = applied.events.len() as u64;
                self.changes.fetch_add(changes, Ordering::Relaxed);
                if applied.events.is_empty() {
                    self.newest.send_replace(state);
                    return Ok(());
                }
                let change = Change {
                    index,
                    events: applied.events.into(),
                    state: state.clone(),
                };
                let mut recent = self.recent.lock();
                let forgotten = recent.push(change);
                // Before anybody can see the change: who is told of it decides from the newest state,
                // and would not be told again.
                let before = self.newest.send_replace(state);
                drop(recent);
                drop((forgotten, before));
                Ok(())
            }
            Err(rejection) => {
                let after = before.after_refusal(index, transaction);
                self.newest.send_replace(Arc::new(after));
                Err(rejection)
            }
        }
    }

    /// Advances the index past a log entry without a transaction (membership,
    /// a new leader's blank). Only the state machine calls this, in log order.
    pub fn advance(&self, index: u64) {
        let after = self.state().at_index(index);
        self.newest.send_replace(Arc::new(after));
    }

    /// Replaces everything (a snapshot was installed): watchers see `Lagged`.
    pub fn replace(&self, state: State) {
        let mut recent = self.recent.lock();
        recent.changes.clear();
        recent.events = 0;
        recent.forgotten = state.index();
        self.newest.send_replace(Arc::new(state));
    }
}

impl Watch {
    /// The next log entry's events, with its index and the state after it.
    /// Entries without events are left out. Nothing is lost when the call is
    /// dropped before it has returned.
    ///
    /// # Errors
    /// See [`WatchError`].
    pub async fn next(&mut self) -> Result<Change, WatchError> {
        loop {
            // Seen before the ring is read, so that no change falls in between.
            self.newest.borrow_and_update();
            if let Some(change) = self.try_next()? {
                return Ok(change);
            }
            if self.newest.changed().await.is_err() {
                return Err(WatchError::Closed);
            }
        }
    }

    /// The next change if it is already there.
    ///
    /// # Errors
    /// [`WatchError::Lagged`].
    pub fn try_next(&mut self) -> Result<Option<Change>, WatchError> {
        let recent = self.recent.lock();
        let Some(found) = recent.after(self.after)? else {
            return Ok(None);
        };
        self.after = found.index;
        let state = found.state.clone();
        Ok(Some(Change {
            index: found.index,
            events: found.events.clone(),
            state: state.unwrap_or_else(|| self.newest.borrow().clone()),
        }))
    }

    /// Index of the last change that was delivered, or of the snapshot.
    #[must_use]
    pub fn after(&self) -> u64 {
        self.after
    }

    /// `first` and what has come since, until there are `enough` events. The state of the last change is that
    /// after its entry, so that nothing is between the two that nobody is told of: a watcher that is so far
    /// behind that only later states are remembered gets more.
    ///
    /// # Errors
    /// [`WatchError::Lagged`].
    pub fn drain(&mut self, first: Change, enough: usize) -> Result<Vec<Change>, WatchError> {
        let mut events = first.events.len();
        let mut is_whole = first.state.index() == first.index;
        let mut changes = vec![first];
        while (events < enough || !is_whole)
            && let Some(change) = self.try_next()?
        {
            events += change.events.len();
            is_whole = change.state.index() == change.index;
            changes.push(change);
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{create, node, transaction};

    fn store() -> Arc<Store> {
        Store::new(State::default())
    }

    fn add(store: &Store, index: u64) {
        let id = format!("node{index}");
        store
            .commit(index, &transaction([create(node(&id, ""))]))
            .expect("a new ID");
    }

    #[tokio::test]
    async fn a_watch_sees_every_change_after_its_snapshot_once_and_in_order() {
        let store = store();
        add(&store, 1);
        let (state, mut watch) = store.watch();
        assert_eq!(state.index(), 1);
        add(&store, 2);
        store.advance(3);
        add(&store, 4);
        for index in [2, 4] {
            let change = watch.next().await.expect("remembered");
            assert_eq!(change.index, index);
            assert_eq!(change.state.index(), index);
            assert_eq!(change.events.len(), 1);
        }
        assert!(watch.try_next().expect("not lagged").is_none());
        drop(store);
        assert_eq!(watch.next().await.unwrap_err(), WatchError::Closed);
    }

    #[test]
    fn who_has_seen_a_change_sees_it_in_the_state() {
        const COMMITS: u64 = 3000;
        let store = store();
        let (_, mut watch) = store.watch();
        let writer = store.clone();
        let writer =
            std::thread::spawn(move || (1..=COMMITS).for_each(|index| add(&writer, index)));
        while watch.after() < COMMITS {
            while let Some(change) = watch.try_next().expect("all are remembered") {
                let state = store.state();
                assert!(state.node(change.events[0].id()).is_some());
            }
        }
        writer.join().expect("no panic");
    }

    #[tokio::test]
    async fn a_waiting_watch_is_woken() {
        let store = store();
        let (_, mut watch) = store.watch();
        let woken = tokio::spawn(async move { watch.next().await.map(|change| change.index) });
        tokio::task::yield_now().await;
        add(&store, 1);
        assert_eq!(woken.await.expect("no panic"), Ok(1));
    }

    #[tokio::test]
    async fn a_watch_that_is_too_slow_or_overtaken_by_a_snapshot_is_told() {
        let store = store();
        let (_, mut slow) = store.watch();
        for index in 1..=REMEMBERED_CHANGES as u64 + 1 {
            add(&store, index);
        }
        assert_eq!(
            slow.next().await.unwrap_err(),
            WatchError::Lagged { after: 0 }
        );
        assert!(store.watch_from(0).is_err());
        let mut resumed = store.watch_from(1).expect("still remembered");
        let next = resumed.next().await.expect("next");
        assert_eq!((next.index, next.events[0].id()), (2, "node2"));
        assert_eq!(next.state.index(), store.state().index());
        store.replace(State::default().at_index(1 << 20));
        assert_eq!(
            resumed.next().await.unwrap_err(),
            WatchError::Lagged { after: 2 }
        );
    }

    #[tokio::test]
    async fn changes_are_taken_together_only_up_to_a_state_that_is_remembered() {
        let store = store();
        let (_, mut watch) = store.watch();
        let count = REMEMBERED_STATES as u64 + 100;
        (1..=count).for_each(|index| add(&store, index));
        let first = watch.next().await.expect("remembered");
        let some = watch.drain(first, 10).expect("not lagged");
        assert_eq!(some.len(), 101);
        let last = some.last().expect("not empty");
        assert_eq!(last.state.index(), last.index);
        let first = watch.next().await.expect("remembered");
        let rest = watch.drain(first, usize::MAX).expect("to the newest");
        assert_eq!(rest.len() as u64, count - 101);
        add(&store, count + 1);
        add(&store, count + 2);
        let first = watch.next().await.expect("remembered");
        assert_eq!(watch.drain(first, 1).expect("its state is there").len(), 1);
    }

    #[tokio::test]
    async fn waiting_for_an_index_ends_with_that_or_a_later_state() {
        let store = store();
        store.advance(5);
        assert_eq!(store.wait_for(3).await.index(), 5);
        let other = store.clone();
        let waiter = tokio::spawn(async move { other.wait_for(7).await.index() });
        tokio::task::yield_now().await;
        store.advance(7);
        assert_eq!(waiter.await.expect("no panic"), 7);
    }

    #[tokio::test]
    async fn a_refused_transaction_advances_the_index_only() {
        let store = store();
        add(&store, 1);
        let again = transaction([create(node("node1", ""))]);
        assert!(store.commit(2, &again).is_err());
        assert_eq!(store.state().index(), 2);
        assert_eq!(store.state().nodes().count(), 1);
    }
}
