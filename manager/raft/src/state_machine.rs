//! Applies committed entries to the [`Store`], in order; snapshots it and restores it.
//!
//! Apply touches memory only. What takes long is for other threads, without raft's priority: large
//! transactions, encoding, files. A snapshot is built from a clone of the state, which costs nothing.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use openraft::entry::RaftEntry as _;
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use parking_lot::Mutex;
use swarm_disk::Blocking;
use swarm_store::{State, Store};
use tokio::sync::watch;

use crate::disk::entry_size;
use crate::error::{DiskError, FatalReporter, chain};
use crate::proposals::Proposals;
use crate::snapshot::{self, Filed, Records, Restored, Snapshots};
use crate::types::{Command, LogId, Outcome, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::weight::Scales;

/// Encoded bytes of a transaction that is applied on raft's own threads: a handful of actions, in less time than
/// another thread needs to wake. A thousand tasks on those threads, which go before all others, leave agents
/// unheard.
const APPLY_HERE_MAX: usize = 8 << 10;

/// Holds what is applied, and where in the log that is.
pub struct StateMachine {
    store: Arc<Store>,
    applied: watch::Sender<Option<LogId>>,
    membership: StoredMembership,
    snapshots: Snapshots,
    scales: Arc<Mutex<Scales>>,
    proposals: Arc<Proposals>,
    blocking: Blocking,
    fatal: FatalReporter,
}

impl StateMachine {
    /// Starts from a snapshot, or empty.
    pub(crate) fn restore(
        snapshots: Snapshots,
        found: Option<Restored>,
        mut scales: Scales,
        blocking: Blocking,
        fatal: FatalReporter,
    ) -> Self {
        let (state, meta) = match found {
            None => (State::default(), SnapshotMeta::default()),
            Some(found) => {
                scales.snapshot(found.bytes);
                (found.state, found.meta)
            }
        };
        Self {
            store: Store::new(state),
            applied: watch::Sender::new(meta.last_log_id),
            membership: meta.last_membership,
            snapshots,
            scales: Arc::new(Mutex::new(scales)),
            proposals: Arc::default(),
            blocking,
            fatal,
        }
    }

    /// The store that is written to.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Where its snapshots are.
    pub(crate) fn snapshots(&self) -> Snapshots {
        self.snapshots.clone()
    }

    /// What it has applied.
    pub(crate) fn scales(&self) -> Arc<Mutex<Scales>> {
        self.scales.clone()
    }

    /// Proposals that are told when they are applied.
    pub(crate) fn proposals(&self) -> Arc<Proposals> {
        self.proposals.clone()
    }

    /// The last entry applied, now and from now on.
    pub(crate) fn applied(&self) -> watch::Receiver<Option<LogId>> {
        self.applied.subscribe()
    }

    fn filed(&self) -> Filed {
        Filed {
            snapshots: self.snapshots.clone(),
            blocking: self.blocking.clone(),
            fatal: self.fatal.clone(),
        }
    }

    async fn commit(&self, index: u64, command: &Command) -> io::Result<Outcome> {
        let (store, entry) = (Arc::clone(&self.store), command.clone());
        let work = move || {
            let transaction = entry.transaction()?;
            let outcome = Outcome(store.commit(index, &transaction));
            Ok((transaction.proposal, outcome))
        };
        let committed = if command.size() > APPLY_HERE_MAX {
            let done = self.blocking.run(async move { work() });
            done.await.map_err(io::Error::other)?
        } else {
            work()
        };
        let (proposal, outcome) = committed.map_err(|error: prost::DecodeError| {
            let reason = format!("entry {index}: {error}");
            self.fatal
                .report("decoding the raft log", self.snapshots.dir(), &reason);
            io::Error::new(io::ErrorKind::InvalidData, reason)
        })?;
        self.proposals.applied(proposal, index, &outcome);
        Ok(outcome)
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Records;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((*self.applied.borrow(), self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let id = entry.log_id();
            let before = self.store.changes();
            let outcome = match &entry.payload {
                EntryPayload::Normal(command) => self.commit(id.index, command).await?,
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(id), membership.clone());
                    self.store.advance(id.index);
                    Outcome(Ok(()))
                }
                EntryPayload::Blank => {
                    self.store.advance(id.index);
                    Outcome(Ok(()))
                }
            };
            let changes = self.store.changes() - before;
            self.scales
                .lock()
                .applied(id.index, entry_size(&entry) as u64, changes);
            self.applied.send_replace(Some(id));
            if let Some(responder) = responder {
                responder.send(outcome);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            state: self.store.state(),
            meta: SnapshotMeta {
                last_log_id: *self.applied.borrow(),
                last_membership: self.membership.clone(),
            },
            filed: self.filed(),
            scales: self.scales.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, records: Records) -> io::Result<()> {
        let snapshots = self.snapshots.clone();
        let snapshot = Snapshot {
            meta: meta.clone(),
            snapshot: records,
        };
        let installed = self.blocking.run(async move {
            let (meta, bytes) = snapshot::read(snapshot).await?;
            let state = State::decode(&bytes).map_err(io::Error::other)?;
            let pieces = swarm_store::split(&bytes).map_err(io::Error::other)?;
            snapshots.save(&meta, pieces.into_iter()).await?;
            Ok::<_, io::Error>((meta, state, bytes.len() as u64))
        });
        let (meta, state, size) = match installed.await.map_err(io::Error::other)? {
            Ok(installed) => installed,
            Err(error) => {
                let reason = chain(&error);
                self.fatal
                    .report("installing a snapshot", self.snapshots.dir(), reason);
                return Err(error);
            }
        };
        self.scales.lock().snapshot(size);
        self.store.replace(state);
        self.membership = meta.last_membership;
        self.proposals.skipped();
        self.applied.send_replace(meta.last_log_id);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let newest = self.snapshots.newest().map(|meta| Snapshot {
            meta,
            snapshot: Records::Filed(self.filed()),
        });
        Ok(newest)
    }
}

/// Builds one snapshot from the state as it was.
pub struct Builder {
    state: Arc<State>,
    meta: SnapshotMeta,
    filed: Filed,
    scales: Arc<Mutex<Scales>>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = Records;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (state, meta) = (self.state.clone(), self.meta.clone());
        let (filed, scales) = (self.filed.clone(), self.scales.clone());
        let built = self.filed.blocking.run(async move {
            let mut size = 0;
            let pieces = state.pieces().inspect(|piece| size += piece.len() as u64);
            filed.snapshots.save(&meta, pieces).await?;
            if size > 0 {
                scales.lock().snapshot(size);
            }
            let snapshot = Records::Filed(filed);
            Ok::<_, DiskError>(Snapshot { meta, snapshot })
        });
        built.await.map_err(io::Error::other)?.map_err(|error| {
            let Filed {
                snapshots, fatal, ..
            } = &self.filed;
            fatal.report("writing a snapshot", snapshots.dir(), chain(&error));
            error.into()
        })
    }
}
