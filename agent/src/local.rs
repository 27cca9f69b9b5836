//! What survives a restart of the agent: the assignments it accepted (tasks,
//! networks with their tables), how far each task is, and the managers it knows.
//!
//! One database under `<data>/agent`, written by one worker that commits
//! everything pending at once and syncs it. A value is cut at
//! 6 KiB over several keys: a page that outgrows 128 KiB would become a blob
//! that is never synced. After a failed write nothing more is written, because
//! what the disk holds is no longer known: the process has to end, and another
//! goes on from what it finds. Running tasks are left alone.
//!
//! A damaged database can show older versions of some of its pages, or of all: a
//! task that was started would be started again. So every commit also writes a sum
//! over all keys and values, and the number of commits, of which a small file beside
//! the database knows how far they were durable.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use prost::Message;
use sha2::{Digest as _, Sha256};
use swarm_disk::{Changes, Database, DatabaseError, Disk, File, Threads, Tree, Worker};
use swarm_proto::v1::{EndpointEntry, Network, ServiceEntry, SessionInfo, Task, TaskStatus};
use swarm_proto::{NetworkId, ServiceId, TaskId};
use tokio::sync::{mpsc, oneshot, watch};

use crate::network::NetworkView;
use crate::worker::Held;

/// First byte of every value. A larger one was written by a newer version.
const FORMAT: u8 = 1;
/// Bytes of a value under one key.
const PART: usize = 6 << 10;
/// Of the database.
const CACHE_BYTES: u64 = 16 << 20;
/// The record with the sum of all others.
const SUM: &str = "m/sum";
/// Commits waiting for the writer; a task waits when there are more.
const PENDING_MAX: usize = 256;

/// Why the local store cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LocalError {
    /// Its contents make no sense. Nothing was touched.
    #[error(
        "{}: {reason}; move this directory away to start empty (this node's containers are then stopped)",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("{} was written by a newer version (format {format}); upgrade this one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The format found.
        format: u8,
    },
    /// The disk refused.
    #[error("{step} {}: {reason}", path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// How far a task is.
#[derive(Clone, PartialEq, Message)]
pub struct TaskRecord {
    /// The newest status.
    #[prost(message, optional, tag = "1")]
    pub status: Option<TaskStatus>,
    /// Its container may have been started: it must never be made again.
    #[prost(bool, tag = "2")]
    pub started: bool,
}

/// A task found in the store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTask {
    /// As last assigned.
    pub task: Arc<Task>,
    /// How far it was.
    pub record: TaskRecord,
    /// It is no longer assigned: stop it and remove every trace.
    pub removed: bool,
}

/// What the store held when it was opened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LocalState {
    /// The assignments.
    pub held: Held,
    /// All tasks, those being removed too.
    pub tasks: BTreeMap<TaskId, StoredTask>,
    /// What a manager said last of the node and the cluster.
    pub session: Option<SessionInfo>,
    /// How often the agent was started before.
    pub starts: u64,
}

/// The open store. Clones share it.
#[derive(Clone, Debug)]
pub struct LocalStore {
    writer: Arc<Writer>,
    broken: watch::Receiver<Option<LocalError>>,
}

#[derive(Debug)]
struct Writer {
    queue: Option<mpsc::Sender<Commit>>,
    worker: Option<Worker>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Everything queued is written before the worker ends. A task cannot be waited for here.
        drop(self.queue.take());
        if let Some(Worker::Thread(thread)) = self.worker.take()
            && thread.join().is_err()
        {
            tracing::error!("the local store's writer panicked");
        }
    }
}

struct Commit {
    batch: WriteBatch,
    done: oneshot::Sender<Result<(), LocalError>>,
}

/// Changes that are written together or not at all.
#[derive(Clone, Debug, Default)]
pub struct WriteBatch {
    writes: Vec<(String, Option<Vec<u8>>)>,
}

impl WriteBatch {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// A task that is assigned once more.
    pub fn task(&mut self, task: &Task) {
        self.put(format!("t/{}", task.id), task);
    }

    /// How far a task is.
    pub fn record(&mut self, task: &TaskId, record: &TaskRecord) {
        self.put(format!("r/{task}"), record);
    }

    /// Nothing of a task is left.
    pub fn remove_task(&mut self, task: &TaskId) {
        self.delete(format!("t/{task}"));
        self.delete(format!("r/{task}"));
        self.delete(format!("x/{task}"));
    }

    /// What a manager said of the node and the cluster.
    pub fn session(&mut self, info: &SessionInfo) {
        self.put("m/session".to_owned(), info);
    }

    /// How often the agent was started.
    pub fn starts(&mut self, starts: u64) {
        self.number("m/starts", starts);
    }

    /// The difference between two held sets. Tasks that are no longer assigned are marked and stay
    /// until [`Self::remove_task`]: they still have to be stopped.
    pub fn assignments(&mut self, old: &Held, new: &Held) {
        if old.revision != new.revision {
            self.number("m/revision", new.revision);
        }
        for item in old.tasks.diff(&new.tasks) {
            match item {
                DiffItem::Add(id, task) => {
                    self.put(format!("t/{id}"), task.as_ref());
                    self.delete(format!("x/{id}"));
                }
                DiffItem::Update {
                    new: (id, task), ..
                } => self.put(format!("t/{id}"), task.as_ref()),
                DiffItem::Remove(id, _) => self.writes.push((format!("x/{id}"), Some(Vec::new()))),
            }
        }
        let empty = NetworkView::default();
        for item in old.networks.diff(&new.networks) {
            match item {
                DiffItem::Add(id, view) => self.network(id, &empty, view),
                DiffItem::Update {
                    old: (_, before),
                    new: (id, view),
                } => self.network(id, before, view),
                DiffItem::Remove(id, before) => {
                    self.delete(format!("n/{id}"));
                    self.rows(id, before, &empty);
                }
            }
        }
    }

    fn network(&mut self, id: &NetworkId, old: &NetworkView, new: &NetworkView) {
        if old.network != new.network {
            self.put(format!("n/{id}"), &new.network);
        }
        self.rows(id, old, new);
    }

    fn rows(&mut self, id: &NetworkId, old: &NetworkView, new: &NetworkView) {
        for item in old.endpoints.diff(&new.endpoints) {
            match item {
                DiffItem::Add(task, row)
                | DiffItem::Update {
                    new: (task, row), ..
                } => self.put(format!("e/{id}/{task}"), row.as_ref()),
                DiffItem::Remove(task, _) => self.delete(format!("e/{id}/{task}")),
            }
        }
        for item in old.services.diff(&new.services) {
            match item {
                DiffItem::Add(service, row)
                | DiffItem::Update {
                    new: (service, row),
                    ..
                } => self.put(format!("s/{id}/{service}"), row.as_ref()),
                DiffItem::Remove(service, _) => self.delete(format!("s/{id}/{service}")),
            }
        }
    }

    fn number(&mut self, key: &str, number: u64) {
        let bytes = number.to_be_bytes().to_vec();
        self.writes.push((key.to_owned(), Some(bytes)));
    }

    fn put(&mut self, key: String, value: &impl Message) {
        self.writes.push((key, Some(value.encode_to_vec())));
    }

    fn delete(&mut self, key: String) {
        self.writes.push((key, None));
    }
}

impl LocalStore {
    /// Opens (or makes) the store in `<data_dir>/agent` and reads all of it. Waits for the disk.
    ///
    /// # Errors
    /// [`LocalError`], with the file. A corrupt store is refused and left as it is: starting
    /// without it would stop containers that somebody relies on.
    pub async fn open(
        disk: &dyn Disk,
        threads: Threads,
        data_dir: &Path,
    ) -> Result<(Self, LocalState), LocalError> {
        let dir = data_dir.join("agent");
        let path = dir.join("db");
        // Tasks carry credentials of registries: the directory is for root only.
        let opened = disk.database(&dir, CACHE_BYTES).await;
        let db = opened.map_err(|error| failed("open", &path, error))?;
        let tree = db.tree(None);
        let tree = tree.map_err(|error| failed("open", &path, error))?;
        let records = tree.range(Bound::Unbounded, Bound::Unbounded);
        let (state, sum) = read_all(records, &path)?;
        let mark = open_mark(disk, &dir, sum.commits).await?;
        let (queue, commits) = mpsc::channel(PENDING_MAX);
        let (breaks, broken) = watch::channel(None);
        let written = Written {
            db,
            tree,
            mark,
            sum,
        };
        let worker = threads
            .start("agent-store", write_loop(written, path, commits, breaks))
            .map_err(|error| failed("start writer of", &dir, error.into()))?;
        let store = Self {
            writer: Arc::new(Writer {
                queue: Some(queue),
                worker: Some(worker),
            }),
            broken,
        };
        Ok((store, state))
    }

    /// The write that has failed, once one has: nothing is written any more.
    pub fn broken(&self) -> watch::Receiver<Option<LocalError>> {
        self.broken.clone()
    }

    /// Returns when the batch is on disk.
    ///
    /// # Errors
    /// [`LocalError::Io`]; from then on every commit fails.
    pub async fn commit(&self, batch: WriteBatch) -> Result<(), LocalError> {
        let gone = || LocalError::Io {
            step: "write to",
            path: PathBuf::from("agent/db"),
            reason: "the writer has ended".to_owned(),
        };
        if batch.is_empty() {
            return Ok(());
        }
        let (done, result) = oneshot::channel();
        let queue = self.writer.queue.as_ref().ok_or_else(gone)?;
        queue
            .send(Commit { batch, done })
            .await
            .map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

fn failed(step: &'static str, path: &Path, error: DatabaseError) -> LocalError {
    let path = path.to_owned();
    match error {
        DatabaseError::Corrupt(reason) => LocalError::Corrupt { path, reason },
        DatabaseError::Io(error) => LocalError::Io {
            step,
            path,
            reason: error.to_string(),
        },
    }
}

fn part_key(key: &str, part: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(key.len() + 3);
    bytes.extend_from_slice(key.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&part.to_be_bytes());
    bytes
}

/// The records that a batch adds to an empty store.
#[cfg(feature = "fuzzing")]
pub(crate) fn records(batch: &WriteBatch) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut changes = Changes::new();
    for (key, value) in &batch.writes {
        if let Some(value) = value {
            put_parts(&mut changes, key, value);
        }
    }
    let written = changes.into_iter();
    written
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

/// What a store holds that has these records and the sum that belongs to them.
#[cfg(feature = "fuzzing")]
pub(crate) fn read(mut records: BTreeMap<Vec<u8>, Vec<u8>>) -> Result<LocalState, String> {
    let name = |key: &[u8]| split_key(key).map(|(name, _)| name);
    records.retain(|key, _| name(key).as_deref() != Some(SUM));
    let mut sum = Sum::default();
    for (key, value) in &records {
        sum.add(key, value);
    }
    let mut changes = Changes::new();
    put_parts(&mut changes, SUM, &sum.encode());
    records.extend(
        changes
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    let read = read_all(records.into_iter().map(Ok), Path::new("db"));
    read.map(|(state, _)| state).map_err(|e| e.to_string())
}

/// What the store holds once `held` has been written to an empty one.
#[cfg(feature = "fuzzing")]
pub(crate) fn reread(held: &Held) -> Result<LocalState, String> {
    let mut batch = WriteBatch::default();
    batch.assignments(&Held::default(), held);
    read(records(&batch))
}

/// Whether these very records, sum and all, are a store.
#[cfg(feature = "fuzzing")]
pub(crate) fn is_store(records: BTreeMap<Vec<u8>, Vec<u8>>) -> bool {
    read_all(records.into_iter().map(Ok), Path::new("db")).is_ok()
}

/// First part: format, number of parts, data. Later parts: data.
fn put_parts(batch: &mut Changes, key: &str, value: &[u8]) -> u16 {
    let parts = value.len().div_ceil(PART).max(1);
    let parts = u16::try_from(parts).expect("messages are bounded far below 65,535 parts");
    let mut chunks = value.chunks(PART);
    let mut first = vec![FORMAT];
    first.extend_from_slice(&parts.to_be_bytes());
    first.extend_from_slice(chunks.next().unwrap_or_default());
    batch.push((part_key(key, 0), Some(first)));
    for (number, chunk) in (1u16..).zip(chunks) {
        batch.push((part_key(key, number), Some(chunk.to_vec())));
    }
    parts
}

/// Over all records but itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    commits: u64,
    total: u128,
}

impl Sum {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        self.total = self.total.wrapping_add(digest(key, value));
    }

    fn subtract(&mut self, key: &[u8], value: &[u8]) {
        self.total = self.total.wrapping_sub(digest(key, value));
    }

    fn encode(self) -> Vec<u8> {
        let (commits, total) = (self.commits.to_be_bytes(), self.total.to_be_bytes());
        [&commits[..], &total].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (commits, total) = bytes.split_first_chunk()?;
        Some(Self {
            commits: u64::from_be_bytes(*commits),
            total: u128::from_be_bytes(total.try_into().ok()?),
        })
    }
}

fn digest(key: &[u8], value: &[u8]) -> u128 {
    let mut hash = Sha256::new();
    hash.update((key.len() as u64).to_be_bytes());
    hash.update(key);
    hash.update(value);
    let hash = hash.finalize();
    u128::from_be_bytes(*hash.first_chunk().expect("it has 32 bytes"))
}

/// Number of commits that were durable, with its own digest.
fn mark(commits: u64) -> Vec<u8> {
    let commits = commits.to_be_bytes();
    [&commits[..], &digest(b"mark", &commits).to_be_bytes()].concat()
}

/// The file beside the database that says how many commits were durable; refused when the database
/// has fewer.
async fn open_mark(disk: &dyn Disk, dir: &Path, commits: u64) -> Result<Box<dyn File>, LocalError> {
    let path = dir.join("mark");
    let io = |step, error: std::io::Error| failed(step, &path, error.into());
    let corrupt = |reason: String| LocalError::Corrupt {
        path: path.clone(),
        reason,
    };
    if disk.exists(&path) {
        let content = disk.read(&path).map_err(|error| io("read", error))?;
        let durable = content
            .first_chunk()
            .map(|bytes| u64::from_be_bytes(*bytes));
        let durable = durable.filter(|durable| mark(*durable) == content);
        let durable = durable.ok_or_else(|| corrupt("it is damaged".to_owned()))?;
        if commits < durable {
            return Err(LocalError::Corrupt {
                path: dir.join("db"),
                reason: format!("it ends at commit {commits}, but commit {durable} was durable"),
            });
        }
    } else if commits > 0 {
        return Err(corrupt("it is missing beside a database".to_owned()));
    } else {
        // Whole before there is anything to lose; then overwritten in its place, within one sector.
        let aside = dir.join("mark.new");
        swarm_disk::replace(disk, &path, &aside, &[&mark(0)])
            .await
            .map_err(|error| io("write", error))?;
    }
    disk.open(&path).map_err(|error| io("open", error))
}

/// What the writer writes to.
struct Written {
    db: Arc<dyn Database>,
    tree: Box<dyn Tree>,
    mark: Box<dyn File>,
    sum: Sum,
}

async fn write_loop(
    mut to: Written,
    path: PathBuf,
    mut commits: mpsc::Receiver<Commit>,
    broken: watch::Sender<Option<LocalError>>,
) {
    while let Some(first) = commits.recv().await {
        let mut group = vec![first];
        while let Ok(next) = commits.try_recv() {
            group.push(next);
        }
        let before = broken.borrow().clone();
        let result = match before {
            Some(error) => Err(error),
            None => {
                let written = to.write_group(&group).await;
                written.map_err(|error| failed("write to", &path, error))
            }
        };
        if let Err(error) = &result {
            broken.send_if_modified(|known| {
                let first = known.is_none();
                known.get_or_insert_with(|| error.clone());
                first
            });
        }
        for commit in group {
            // Whoever does not wait for the disk has dropped the other end.
            let _ = commit.done.send(result.clone());
        }
    }
}

impl Written {
    async fn write_group(&mut self, group: &[Commit]) -> Result<(), DatabaseError> {
        for commit in group {
            self.write(&commit.batch)?;
        }
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::AgentNotSynced) {
            return Ok(());
        }
        self.db.sync().await?;
        // Not synced: after a power cut it may be older, never newer than the database.
        Ok(self.mark.write_at(&mark(self.sum.commits), 0)?)
    }

    fn write(&mut self, batch: &WriteBatch) -> Result<(), DatabaseError> {
        // What a batch says last of a record counts.
        let writes: BTreeMap<&String, &Option<Vec<u8>>> = batch
            .writes
            .iter()
            .map(|(key, value)| (key, value))
            .collect();
        let mut changes = Changes::new();
        for (key, value) in writes {
            let before = match self.tree.get(&part_key(key, 0))? {
                Some(first) if first.len() >= 3 => u16::from_be_bytes([first[1], first[2]]),
                _ => 0,
            };
            let now = value
                .as_ref()
                .map_or(0, |value| put_parts(&mut changes, key, value));
            for part in now..before {
                changes.push((part_key(key, part), None));
            }
        }
        let mut sum = self.sum;
        for (key, value) in &changes {
            if let Some(old) = self.tree.get(key)? {
                sum.subtract(key, &old);
            }
            if let Some(new) = value {
                sum.add(key, new);
            }
        }
        sum.commits += 1;
        put_parts(&mut changes, SUM, &sum.encode());
        self.tree.apply(changes)?;
        self.sum = sum;
        Ok(())
    }
}

fn read_all(
    records: impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), DatabaseError>>,
    path: &Path,
) -> Result<(LocalState, Sum), LocalError> {
    let corrupt = |key: &str, reason: &str| LocalError::Corrupt {
        path: path.to_owned(),
        reason: format!("record {key}: {reason}"),
    };
    let mut found = Sum::default();
    let mut values: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut missing: Option<(String, u16, u16)> = None;
    for item in records {
        let (key, data) = item.map_err(|error| failed("read", path, error))?;
        let (name, part) = split_key(&key).ok_or_else(|| corrupt("?", "strange key"))?;
        if name != SUM {
            found.add(&key, &data);
        }
        if let Some((open, next, parts)) = missing.take() {
            if open != name || part != next {
                return Err(corrupt(&open, "a part is missing"));
            }
            values
                .entry(open.clone())
                .or_default()
                .extend_from_slice(&data);
            if next + 1 < parts {
                missing = Some((open, next + 1, parts));
            }
            continue;
        }
        if part != 0 || data.len() < 3 {
            return Err(corrupt(&name, "its beginning is missing"));
        }
        if data[0] > FORMAT {
            return Err(LocalError::Newer {
                path: path.to_owned(),
                format: data[0],
            });
        }
        let parts = u16::from_be_bytes([data[1], data[2]]);
        values.insert(name.clone(), data[3..].to_vec());
        if parts > 1 {
            missing = Some((name, 1, parts));
        }
    }
    if let Some((open, ..)) = missing {
        return Err(corrupt(&open, "a part is missing"));
    }
    let written = match values.remove(SUM) {
        None => Sum::default(),
        Some(sum) => Sum::decode(&sum).ok_or_else(|| corrupt(SUM, "of another length"))?,
    };
    let state = build_state(&values).map_err(|(key, reason)| corrupt(&key, &reason))?;
    if found.total != written.total {
        return Err(corrupt(
            SUM,
            "some records are missing, or are older than others",
        ));
    }
    Ok((state, written))
}

fn split_key(key: &[u8]) -> Option<(String, u16)> {
    let (name, part) = key.split_at_checked(key.len().checked_sub(3)?)?;
    let [0, high, low] = part else { return None };
    let name = std::str::from_utf8(name).ok()?.to_owned();
    Some((name, u16::from_be_bytes([*high, *low])))
}

type Named = (String, String);

fn build_state(values: &BTreeMap<String, Vec<u8>>) -> Result<LocalState, Named> {
    fn read<M: Message + Default>(key: &str, value: &[u8]) -> Result<M, Named> {
        M::decode(value).map_err(|error| (key.to_owned(), error.to_string()))
    }
    fn number(key: &str, value: &[u8]) -> Result<u64, Named> {
        let bytes = value.try_into();
        let bytes = bytes.map_err(|_| (key.to_owned(), "not a number".to_owned()))?;
        Ok(u64::from_be_bytes(bytes))
    }
    let mut state = LocalState::default();
    let mut networks: BTreeMap<NetworkId, NetworkView> = BTreeMap::new();
    let mut tasks: BTreeMap<TaskId, Task> = BTreeMap::new();
    let mut records: BTreeMap<TaskId, TaskRecord> = BTreeMap::new();
    let mut removed: BTreeSet<TaskId> = BTreeSet::new();
    let strange = |key: &str| (key.to_owned(), "strange key".to_owned());
    // "n/" comes after "e/": rows are kept aside until their network is read.
    for (key, value) in values {
        let (kind, rest) = key.split_once('/').ok_or_else(|| strange(key))?;
        match (kind, rest.split_once('/')) {
            ("m", None) if rest == "revision" => state.held.revision = number(key, value)?,
            ("m", None) if rest == "starts" => state.starts = number(key, value)?,
            ("m", None) if rest == "session" => state.session = Some(read(key, value)?),
            ("t", None) => {
                tasks.insert(TaskId::from(rest), read(key, value)?);
            }
            ("r", None) => {
                records.insert(TaskId::from(rest), read(key, value)?);
            }
            ("x", None) => {
                removed.insert(TaskId::from(rest));
            }
            ("n", None) => {
                let network: Network = read(key, value)?;
                networks.entry(NetworkId::from(rest)).or_default().network = network;
            }
            ("e", Some((network, task))) => {
                let row: EndpointEntry = read(key, value)?;
                let view = networks.entry(NetworkId::from(network)).or_default();
                view.endpoints.insert(TaskId::from(task), Arc::new(row));
            }
            ("s", Some((network, service))) => {
                let row: ServiceEntry = read(key, value)?;
                let view = networks.entry(NetworkId::from(network)).or_default();
                view.services
                    .insert(ServiceId::from(service), Arc::new(row));
            }
            _ => return Err(strange(key)),
        }
    }
    for (id, view) in networks {
        if view.network.id != *id {
            return Err((
                format!("n/{id}"),
                "the network itself is missing".to_owned(),
            ));
        }
        state.held.networks.insert(id, Arc::new(view));
    }
    for (id, task) in tasks {
        let task = Arc::new(task);
        // A task that was assigned but not begun has no record yet.
        let record = records.remove(&id).unwrap_or_default();
        let removed = removed.remove(&id);
        if !removed {
            state.held.tasks.insert(id.clone(), task.clone());
        }
        let stored = StoredTask {
            task,
            record,
            removed,
        };
        state.tasks.insert(id, stored);
    }
    if let Some(id) = records.keys().next().or(removed.first()) {
        return Err((format!("r/{id}"), "its task is missing".to_owned()));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_disk::SystemDisk;
    use swarm_disk::memory::MemoryDisk;
    use swarm_proto::v1::{ContainerSpec, TaskSpec};

    async fn open(dir: &Path) -> Result<(LocalStore, LocalState), LocalError> {
        LocalStore::open(&SystemDisk, Threads::Own, dir).await
    }

    async fn raw(dir: &Path) -> (Arc<dyn Database>, Box<dyn Tree>) {
        let db = SystemDisk.database(&dir.join("agent"), 1 << 20).await;
        let db = db.unwrap();
        let tree = db.tree(None).unwrap();
        (db, tree)
    }

    fn task(id: &str, env_bytes: usize) -> Arc<Task> {
        Arc::new(Task {
            id: id.to_owned(),
            spec: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        env: vec!["x".repeat(env_bytes)],
                        ..Default::default()
                    }),
                    ..Default::default()
                }
                .into(),
            ),
            ..Default::default()
        })
    }

    fn held(revision: u64, tasks: &[Arc<Task>], rows: u32) -> Held {
        let mut held = Held {
            revision,
            ..Default::default()
        };
        for task in tasks {
            held.tasks.insert(TaskId::from(&task.id), task.clone());
        }
        let mut view = NetworkView::default();
        view.network.id = "net".to_owned();
        for row in 0..rows {
            let entry = EndpointEntry {
                network_id: "net".to_owned(),
                task_id: format!("t{row}"),
                ..Default::default()
            };
            view.endpoints
                .insert(TaskId::from(&entry.task_id), Arc::new(entry));
        }
        held.networks.insert(NetworkId::from("net"), Arc::new(view));
        held
    }

    async fn write(store: &LocalStore, old: &Held, new: &Held) {
        let mut batch = WriteBatch::default();
        batch.assignments(old, new);
        store.commit(batch).await.unwrap();
    }

    #[tokio::test]
    async fn what_was_committed_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let (store, state) = open(dir.path()).await.unwrap();
        assert_eq!(state, LocalState::default());
        let first = held(3, &[task("a", 40_000), task("b", 10)], 500);
        write(&store, &Held::default(), &first).await;
        // Shrinks a value of several parts, and drops rows.
        let second = held(4, &[task("a", 5), task("b", 10)], 2);
        write(&store, &first, &second).await;
        let mut batch = WriteBatch::default();
        let record = TaskRecord {
            started: true,
            ..Default::default()
        };
        batch.record(&TaskId::from("a"), &record);
        store.commit(batch).await.unwrap();
        drop(store);
        let (_store, state) = open(dir.path()).await.unwrap();
        assert_eq!(state.held, second);
        assert_eq!(state.tasks["a"].record, record);
    }

    #[tokio::test]
    async fn removed_tasks_stay_until_their_last_trace_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path()).await.unwrap();
        let first = held(3, &[task("a", 1)], 0);
        write(&store, &Held::default(), &first).await;
        write(&store, &first, &held(4, &[], 0)).await;
        drop(store);
        let (store, state) = open(dir.path()).await.unwrap();
        assert!(state.held.tasks.is_empty() && state.tasks["a"].removed);
        let mut batch = WriteBatch::default();
        batch.remove_task(&TaskId::from("a"));
        store.commit(batch).await.unwrap();
        drop(store);
        let (_store, state) = open(dir.path()).await.unwrap();
        assert!(state.tasks.is_empty());
    }

    #[tokio::test]
    async fn no_value_becomes_an_unsynced_blob() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path()).await.unwrap();
        let tasks: Vec<_> = (0..8).map(|n| task(&format!("t{n}"), 900 << 10)).collect();
        write(&store, &Held::default(), &held(1, &tasks, 0)).await;
        drop(store);
        let blobs = std::fs::read_dir(dir.path().join("agent/blobs")).unwrap();
        assert_eq!(blobs.count(), 0);
    }

    #[tokio::test]
    async fn a_corrupt_store_is_refused_by_its_name_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path()).await.unwrap();
        write(&store, &Held::default(), &held(1, &[task("a", 1)], 0)).await;
        drop(store);
        let (db, tree) = raw(dir.path()).await;
        tree.put(&part_key("t/a", 0), vec![FORMAT, 0, 1, 0xff, 0xff])
            .unwrap();
        db.sync().await.unwrap();
        drop((db, tree));
        let error = open(dir.path()).await.unwrap_err();
        assert!(matches!(error, LocalError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("agent/db"), "{error}");
        assert!(error.to_string().contains("t/a"), "{error}");
    }

    #[tokio::test]
    async fn a_write_that_fails_is_the_last_and_is_told() {
        #[derive(Default)]
        struct Full(std::sync::atomic::AtomicBool);
        #[async_trait::async_trait]
        impl swarm_disk::memory::Weather for Full {
            async fn sync(&self, _: &Path) -> std::io::Result<()> {
                Ok(())
            }
            fn write(&self, _: &Path) -> std::io::Result<()> {
                match self.0.load(std::sync::atomic::Ordering::Relaxed) {
                    true => Err(std::io::ErrorKind::StorageFull.into()),
                    false => Ok(()),
                }
            }
        }
        let full = Arc::new(Full::default());
        let disk = MemoryDisk::new(full.clone());
        let (store, _) = LocalStore::open(&disk, Threads::Callers, Path::new("d"))
            .await
            .unwrap();
        let first = held(1, &[task("a", 1)], 0);
        write(&store, &Held::default(), &first).await;
        assert!(store.broken().borrow().is_none());
        let mut batch = WriteBatch::default();
        batch.assignments(&first, &held(2, &[task("b", 1)], 0));
        full.0.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(store.commit(batch.clone()).await.is_err());
        assert!(store.broken().borrow().is_some());
        // Also when there is space again: what is on the disk is not known.
        full.0.store(false, std::sync::atomic::Ordering::Relaxed);
        assert!(store.commit(batch).await.is_err());
    }

    #[tokio::test]
    async fn a_store_of_which_some_or_all_is_older_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (db, mark) = (dir.path().join("agent/db"), dir.path().join("agent/mark"));
        let (first, second) = (
            held(1, &[task("a", 9_000)], 3),
            held(2, &[task("a", 10), task("b", 10)], 4),
        );
        let (store, _) = open(dir.path()).await.unwrap();
        write(&store, &Held::default(), &first).await;
        drop(store);
        let (sled, tree) = raw(dir.path()).await;
        let older: Changes = tree
            .range(Bound::Unbounded, Bound::Unbounded)
            .map(|pair| pair.map(|(key, value)| (key, Some(value))).unwrap())
            .collect();
        drop((tree, sled));
        let (store, _) = open(dir.path()).await.unwrap();
        write(&store, &first, &second).await;
        drop(store);

        // Each of the older values alone, and all together.
        let one_by_one = older.iter().map(|one| vec![one.clone()]);
        for stale in one_by_one.chain([older.clone()]) {
            let (sled, tree) = raw(dir.path()).await;
            let undo: Changes = stale
                .iter()
                .map(|(key, _)| (key.clone(), tree.get(key).unwrap()))
                .collect();
            let changes = stale.iter().zip(&undo).any(|(old, new)| old != new);
            tree.apply(stale).unwrap();
            sled.sync().await.unwrap();
            drop((tree, sled));
            // Closed again at once, if it opens.
            let refused = open(dir.path()).await.map(drop).err();
            assert_eq!(refused.is_some(), changes, "{undo:?}");
            if let Some(error) = refused {
                assert!(error.to_string().contains("agent/db"), "{error}");
            }
            let (sled, tree) = raw(dir.path()).await;
            tree.apply(undo).unwrap();
            sled.sync().await.unwrap();
        }
        let (store, state) = open(dir.path()).await.unwrap();
        assert_eq!(state.held, second);
        drop(store);

        // All of it at an earlier commit, as sled leaves it when its end is damaged.
        assert!(db.exists());
        let whole = std::fs::read(&mark).unwrap();
        std::fs::write(&mark, super::mark(3)).unwrap();
        let error = open(dir.path()).await.unwrap_err().to_string();
        assert!(
            error.contains("commit 2") && error.contains("commit 3"),
            "{error}"
        );
        for damage in [None, Some(&b""[..]), Some(&whole[..9])] {
            match damage {
                None => std::fs::remove_file(&mark).unwrap(),
                Some(content) => std::fs::write(&mark, content).unwrap(),
            }
            let error = open(dir.path()).await.unwrap_err().to_string();
            assert!(error.contains("agent/mark"), "{error}");
        }
        std::fs::write(&mark, whole).unwrap();
        open(dir.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_of_a_newer_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (db, tree) = raw(dir.path()).await;
        tree.put(&part_key("t/a", 0), vec![FORMAT + 1, 0, 1])
            .unwrap();
        db.sync().await.unwrap();
        drop((db, tree));
        assert!(matches!(
            open(dir.path()).await,
            Err(LocalError::Newer { .. })
        ));
    }

    #[tokio::test]
    async fn on_one_thread_a_crash_loses_nothing_that_was_committed() {
        let (disk, dir) = (MemoryDisk::default(), Path::new("/node"));
        let (store, _) = LocalStore::open(&disk, Threads::Callers, dir)
            .await
            .unwrap();
        let first = held(3, &[task("a", 40_000), task("b", 10)], 50);
        write(&store, &Held::default(), &first).await;
        drop(store);
        disk.crash(&mut |_| 0);
        let (_store, state) = LocalStore::open(&disk, Threads::Callers, dir)
            .await
            .unwrap();
        assert_eq!(state.held, first);
    }
}
