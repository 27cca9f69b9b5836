//! openraft's log storage: a queue to one writer, and the newest entries in memory.
//!
//! The raft core never waits for the disk but for votes: appends are handed to
//! the writer, which drains all that is pending, writes it, syncs once, and then
//! completes the callbacks in order (group commit). What is not written yet is
//! read from memory, the rest from disk, away from the core. After the first
//! failed write nothing is acknowledged any more; the owner learns it through
//! the fatal channel. Starts the writer (a thread of its own,
//! where [`Threads`] says so), which ends with the last handle.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt as _;
use openraft::entry::RaftEntry as _;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use swarm_disk::{Blocking, Threads, Worker};
use swarm_identity::DataKey;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::disk::{Disk, Mark, Recovered, entry_size};
use crate::error::{DiskError, FatalReporter, chain};
use crate::seal::Sealer;
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// Entries kept in memory for replication.
const TAIL_ENTRIES: usize = 20_000;
/// Bytes of entries kept in memory for replication.
const TAIL_BYTES: usize = 32 << 20;
/// Bytes of entries that may wait for the disk, in KiB; more makes the core wait.
const PENDING_KIB: u32 = 64 << 10;
/// Jobs that may wait for the writer. Appends come in batches, so this is plenty.
const QUEUE: usize = 1024;
/// Bytes of entries after which one append message is full.
const MESSAGE_BYTES: usize = 1 << 20;

/// The log of one member.
#[derive(Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
}

struct Shared {
    disk: Arc<Disk>,
    known: Arc<Mutex<Known>>,
    queue: mpsc::Sender<Job>,
    pending: Arc<Semaphore>,
    /// Where reads from disk run.
    blocking: Blocking,
}

/// What is known of the log without reading it.
#[derive(Default)]
struct Known {
    purged: Option<LogId>,
    last: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    /// The newest entries, without a gap up to `last`.
    tail: VecDeque<Entry>,
    tail_bytes: usize,
    /// Entries before this index are in the database; the others only in `tail`.
    written: u64,
}

impl Known {
    fn push(&mut self, entry: Entry) {
        self.last = Some(entry.log_id());
        self.tail_bytes += entry_size(&entry);
        self.tail.push_back(entry);
    }

    fn evict(&mut self) {
        while self.tail.len() > TAIL_ENTRIES || self.tail_bytes > TAIL_BYTES {
            match self.tail.front() {
                Some(entry) if entry.log_id().index < self.written => {
                    self.tail_bytes -= entry_size(entry);
                    self.tail.pop_front();
                }
                _ => break,
            }
        }
    }

    fn truncate_after(&mut self, keep: Option<LogId>) {
        let next = keep.map_or(0, |id| id.index + 1);
        while let Some(entry) = self.tail.back()
            && entry.log_id().index >= next
        {
            self.tail_bytes -= entry_size(entry);
            self.tail.pop_back();
        }
        self.written = self.written.min(next);
        // Nothing beyond the end is made up, and what is purged stays the floor.
        if self.last > keep {
            self.last = keep.max(self.purged);
        }
    }

    fn purge(&mut self, upto: LogId) {
        while let Some(entry) = self.tail.front()
            && entry.log_id().index <= upto.index
        {
            self.tail_bytes -= entry_size(entry);
            self.tail.pop_front();
        }
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(Some(upto));
    }
}

enum Job {
    Append {
        entries: Vec<Entry>,
        done: IOFlushed<TypeConfig>,
        _pending: OwnedSemaphorePermit,
    },
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    Committed(Option<LogId>),
    Truncate(Option<LogId>, oneshot::Sender<io::Result<()>>),
    /// Up to this one, where the log ends at that index.
    Purge(LogId, u64),
    Close,
}

/// The writer's end of a log: ends with the log, and can be waited for.
pub(crate) struct LogWriter {
    queue: mpsc::WeakSender<Job>,
    worker: Worker,
}

impl LogWriter {
    /// Ends the writer where it is, as a crash would.
    #[cfg(test)]
    pub(crate) fn kill(self) {
        if let Worker::Task(task) = self.worker {
            task.abort();
        }
    }

    /// Lets the writer finish what is queued, and returns when it has ended.
    pub(crate) async fn close(self) {
        if let Some(queue) = self.queue.upgrade() {
            // An error means that it has ended already.
            let _ = queue.send(Job::Close).await;
        }
        if !self.worker.ended().await {
            tracing::error!("the log writer panicked");
        }
    }
}

impl LogStore {
    /// Opens or creates the log in `dir` and starts its writer. Waits for the disk.
    ///
    /// # Errors
    /// The log cannot be read, or is damaged: the message names file and key.
    pub(crate) async fn open(
        host: Arc<dyn swarm_disk::Disk>,
        dir: &Path,
        key: &DataKey,
        threads: Threads,
        blocking: Blocking,
        fatal: FatalReporter,
    ) -> Result<(Self, LogWriter), DiskError> {
        let (disk, found) = Disk::open(host, dir, Sealer::new(key)).await?;
        Self::start(disk, found, threads, blocking, fatal)
    }

    fn start(
        disk: Disk,
        found: Recovered,
        threads: Threads,
        blocking: Blocking,
        fatal: FatalReporter,
    ) -> Result<(Self, LogWriter), DiskError> {
        let disk = Arc::new(disk);
        let known = Arc::new(Mutex::new(Known {
            purged: found.purged,
            last: found.last,
            vote: found.vote,
            committed: found.committed,
            written: found.last.map_or(0, |id| id.index + 1),
            ..Known::default()
        }));
        let (queue, jobs) = mpsc::channel(QUEUE);
        let writer = Writer {
            last: found.last,
            purged: found.purged,
            durable_term: found.vote.map_or(0, |vote| vote.leader_id().term),
            disk: disk.clone(),
            known: known.clone(),
            fatal,
            failed: None,
        };
        let worker = threads
            .start("raft-log", async move {
                if threads == Threads::Own {
                    crate::runtime::raise_priority();
                }
                writer.run(jobs).await;
            })
            .map_err(|e| DiskError::io("start the writer of", disk.path(), e))?;
        let writer = LogWriter {
            queue: queue.downgrade(),
            worker,
        };
        let shared = Shared {
            disk,
            known,
            queue,
            pending: Arc::new(Semaphore::new(PENDING_KIB as usize)),
            blocking,
        };
        Ok((
            Self {
                shared: Arc::new(shared),
            },
            writer,
        ))
    }

    /// The last entry that has been purged.
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.shared.known.lock().purged
    }

    async fn enqueue(&self, job: Job) -> io::Result<()> {
        self.shared.queue.send(job).await.map_err(|_| closed())
    }

    async fn read(&self, from: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let (on_disk, mut in_memory) = {
            let known = self.shared.known.lock();
            let from = from.max(known.purged.map_or(0, |id| id.index + 1));
            let end = end.min(known.last.map_or(0, |id| id.index + 1));
            let tail_start = known.tail.front().map_or(end, |entry| entry.log_id().index);
            let on_disk = from..end.min(tail_start);
            let skip = usize::try_from(from.saturating_sub(tail_start)).unwrap_or(usize::MAX);
            let take = usize::try_from(end.saturating_sub(from.max(tail_start))).unwrap_or(0);
            let mut bytes = 0;
            let in_memory: Vec<Entry> = known
                .tail
                .iter()
                .skip(skip)
                .take(take)
                .take_while(|entry| {
                    let fits = bytes < max_bytes;
                    bytes += entry_size(entry);
                    fits
                })
                .cloned()
                .collect();
            (on_disk, in_memory)
        };
        if on_disk.is_empty() {
            return Ok(in_memory);
        }
        let disk = self.shared.disk.clone();
        let range = on_disk.start..=on_disk.end - 1;
        let mut entries = self
            .shared
            .blocking
            .run(async move { disk.read(range, max_bytes) })
            .await
            .map_err(io::Error::other)??;
        // A limited read may return less: what is on disk is enough then, and whether
        // the limit has cut it short does not matter.
        if entries.is_empty() || max_bytes == usize::MAX {
            entries.append(&mut in_memory);
        }
        Ok(entries)
    }
}

fn closed() -> io::Error {
    io::Error::other("the log is closed")
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(&index) => index,
        Bound::Excluded(&index) => index.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&index) => index.saturating_add(1),
        Bound::Excluded(&index) => index,
        Bound::Unbounded => u64::MAX,
    };
    (from, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (from, end) = bounds(&range);
        self.read(from, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.known.lock().vote)
    }

    // Keeps an append message below the limit of the transport: one entry, or about 1 MiB.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start, end, MESSAGE_BYTES).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let known = self.shared.known.lock();
        Ok(LogState {
            last_purged_log_id: known.purged,
            last_log_id: known.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (done, saved) = oneshot::channel();
        self.enqueue(Job::Vote(*vote, done)).await?;
        saved.await.map_err(|_| closed())??;
        self.shared.known.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.shared.known.lock().committed = committed;
        self.enqueue(Job::Committed(committed)).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.shared.known.lock().committed)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let bytes: usize = entries.iter().map(entry_size).sum();
        let kib = u32::try_from(bytes / 1024 + 1)
            .unwrap_or(PENDING_KIB)
            .min(PENDING_KIB);
        let pending = self
            .shared
            .pending
            .clone()
            .acquire_many_owned(kib)
            .await
            .map_err(|_| closed())?;
        {
            let mut known = self.shared.known.lock();
            entries.iter().cloned().for_each(|entry| known.push(entry));
            known.evict();
        }
        self.enqueue(Job::Append {
            entries,
            done: callback,
            _pending: pending,
        })
        .await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let (done, truncated) = oneshot::channel();
        self.enqueue(Job::Truncate(last_log_id, done)).await?;
        // Only after the writer has passed all earlier appends: from then on what
        // it has written is what remains.
        truncated.await.map_err(|_| closed())??;
        self.shared.known.lock().truncate_after(last_log_id);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let last = {
            let mut known = self.shared.known.lock();
            let last = known.last.map_or(0, |id| id.index);
            known.purge(log_id);
            last
        };
        // Not waited for: a purge that is lost in a crash is done again.
        self.enqueue(Job::Purge(log_id, last)).await
    }
}

/// The one that writes.
struct Writer {
    disk: Arc<Disk>,
    known: Arc<Mutex<Known>>,
    fatal: FatalReporter,
    /// What is written; durable after each batch.
    last: Option<LogId>,
    purged: Option<LogId>,
    durable_term: u64,
    failed: Option<String>,
}

impl Writer {
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut batch = Vec::new();
        while let Some(job) = jobs.recv().await {
            batch.push(job);
            while let Ok(job) = jobs.try_recv() {
                batch.push(job);
            }
            let close = batch.iter().any(|job| matches!(job, Job::Close));
            self.commit(&mut batch).await;
            if close {
                break;
            }
        }
        if self.failed.is_none()
            && let Err(error) = self.disk.sync().await
        {
            self.fail(&error);
        }
    }

    async fn commit(&mut self, batch: &mut Vec<Job>) {
        if self.failed.is_none() {
            let done = AssertUnwindSafe(self.write(batch)).catch_unwind();
            match done.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.fail(&error),
                Err(_) => self.fail(&DiskError::io(
                    "write",
                    self.disk.path(),
                    io::Error::other("the database panicked"),
                )),
            }
        }
        for job in batch.drain(..) {
            let result = match &self.failed {
                None => Ok(()),
                Some(reason) => Err(io::Error::other(reason.clone())),
            };
            match job {
                Job::Append { done, .. } => done.io_completed(result),
                // Whoever waited is gone: the core has stopped.
                Job::Vote(_, done) | Job::Truncate(_, done) => drop(done.send(result)),
                Job::Committed(_) | Job::Purge(..) | Job::Close => {}
            }
        }
    }

    async fn write(&mut self, batch: &[Job]) -> Result<(), DiskError> {
        let mut sync = false;
        for job in batch {
            match job {
                Job::Append { entries, .. } => {
                    self.disk.append(self.last, entries)?;
                    if let Some(last) = entries.last() {
                        self.last = Some(last.log_id());
                        let mut known = self.known.lock();
                        known.written = known.written.max(last.log_id().index + 1);
                        known.evict();
                    }
                    sync = true;
                }
                Job::Vote(vote, _) => {
                    self.disk.save_vote(vote)?;
                    self.durable_term = self.durable_term.max(vote.leader_id().term);
                    sync = true;
                }
                Job::Committed(committed) => self.disk.save_committed(committed)?,
                Job::Truncate(keep, _) => {
                    self.disk.truncate_after(*keep).await?;
                    if self.last > *keep {
                        self.last = (*keep).max(self.purged);
                    }
                    sync = true;
                }
                Job::Purge(upto, last) => {
                    self.disk.purge(upto, *last)?;
                    self.purged = self.purged.max(Some(*upto));
                    self.last = self.last.max(self.purged);
                    sync = true;
                }
                Job::Close => {}
            }
        }
        #[cfg(feature = "museum")]
        {
            use swarm_proto::museum::{Bug, on};
            let votes = batch.iter().any(|job| matches!(job, Job::Vote(..)));
            let appends = batch.iter().any(|job| matches!(job, Job::Append { .. }));
            sync &= !(on(Bug::AckedBeforeSync) && appends && !votes);
            sync &= !(on(Bug::VoteNotSynced) && votes && !appends);
        }
        if sync {
            self.disk.sync().await?;
            self.disk
                .write_mark(Mark::new(self.last, self.durable_term))?;
        }
        Ok(())
    }

    fn fail(&mut self, error: &DiskError) {
        let reason = chain(error);
        let what = match error {
            DiskError::Damaged { .. } => "reading the raft log",
            DiskError::Io { .. } => "writing the raft log",
        };
        self.fatal.report(what, self.disk.path(), &reason);
        self.failed = Some(reason);
    }
}

#[cfg(test)]
#[path = "log_test.rs"]
mod tests;
