//! Applies committed entries to the [`Store`], in order; snapshots it and restores it.
//!
//! Apply touches memory only. What takes long is for other threads, without raft's priority: large
//! transactions, encoding, files. A snapshot is built from a clone of the state, which costs nothing.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
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
use crate::snapshot::{self, Snapshots};
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
    /// Starts from a snapshot, or empty. Blocks while it decodes.
    ///
    /// # Errors
    /// The snapshot's state cannot be decoded.
    pub(crate) fn restore(
        snapshots: Snapshots,
        found: Option<Snapshot>,
        mut scales: Scales,
        blocking: Blocking,
        fatal: FatalReporter,
    ) -> Result<Self, swarm_store::DecodeError> {
        let (state, meta) = match found {
            None => (State::default(), SnapshotMeta::default()),
            Some(found) => {
                scales.snapshot(found.snapshot.len() as u64);
                (State::decode(found.snapshot.as_ref())?, found.meta)
            }
        };
        Ok(Self {
            store: Store::new(state),
            applied: watch::Sender::new(meta.last_log_id),
            membership: meta.last_membership,
            snapshots,
            scales: Arc::new(Mutex::new(scales)),
            proposals: Arc::default(),
            blocking,
            fatal,
        })
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
    type SnapshotData = Bytes;
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
            snapshots: self.snapshots.clone(),
            scales: self.scales.clone(),
            blocking: self.blocking.clone(),
            fatal: self.fatal.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> io::Result<()> {
        let (snapshots, saved_meta) = (self.snapshots.clone(), meta.clone());
        let size = snapshot.len() as u64;
        let installed = self.blocking.run(async move {
            let state = State::decode(snapshot.as_ref())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let plain = snapshot::pack(&saved_meta, &snapshot)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            snapshots.save(&saved_meta, &plain).await?;
            Ok::<_, io::Error>(state)
        });
        let state = match installed.await.map_err(io::Error::other)? {
            Ok(state) => state,
            Err(error) => {
                let reason = chain(&error);
                self.fatal
                    .report("installing a snapshot", self.snapshots.dir(), reason);
                return Err(error);
            }
        };
        self.scales.lock().snapshot(size);
        self.store.replace(state);
        self.membership = meta.last_membership.clone();
        self.proposals.skipped();
        self.applied.send_replace(meta.last_log_id);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let snapshots = self.snapshots.clone();
        let newest = self
            .blocking
            .run(async move { snapshots.newest() })
            .await
            .map_err(io::Error::other)?;
        newest.map_err(|error| {
            self.fatal
                .report("reading a snapshot", self.snapshots.dir(), chain(&error));
            error.into()
        })
    }
}

/// Builds one snapshot from the state as it was.
pub struct Builder {
    state: Arc<State>,
    meta: SnapshotMeta,
    snapshots: Snapshots,
    scales: Arc<Mutex<Scales>>,
    blocking: Blocking,
    fatal: FatalReporter,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (state, meta) = (self.state.clone(), self.meta.clone());
        let (snapshots, scales) = (self.snapshots.clone(), self.scales.clone());
        let built = self.blocking.run(async move {
            // As large as the last one, and something more.
            let room = scales.lock().snapshot_bytes();
            let room = usize::try_from(room + room / 8).unwrap_or(0);
            let begun = snapshot::begin(&meta, room);
            let mut plain = begun.map_err(|e| DiskError::io("encode", snapshots.dir(), e))?;
            let begin = plain.len();
            state.encode_to(&mut plain);
            let plain = Bytes::from(plain);
            snapshots.save(&meta, &plain).await?;
            let snapshot = plain.slice(begin..);
            scales.lock().snapshot(snapshot.len() as u64);
            Ok::<_, DiskError>(Snapshot { meta, snapshot })
        });
        built.await.map_err(io::Error::other)?.map_err(|error| {
            self.fatal
                .report("writing a snapshot", self.snapshots.dir(), chain(&error));
            error.into()
        })
    }
}
