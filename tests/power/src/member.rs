//! The process that the power is taken from: a raft member, an agent's store, or a key store.
//!
//! It gets its job as one line of JSON, then commands, a line each; says what it does in lines on
//! stdout, an acknowledgement only after the real code has given it. It is killed, never stopped.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use swarm_agent::local::{LocalState, LocalStore, StoredTask, TaskRecord, WriteBatch};
use swarm_agent::network::NetworkView;
use swarm_agent::worker::Held;
use swarm_disk::{Disk as _, SystemDisk, Threads};
use swarm_identity::{DataKey, Identity, KeyMaterial, KeyStore, Listener, Stored};
use swarm_proto::v1::{
    ContainerSpec, EndpointEntry, NodeRole, SessionInfo, Task, TaskSpec, Transaction,
};
use swarm_proto::{NetworkId, TaskId};
use swarm_raft::{RaftConfig, RaftNode, RaftTiming};
use swarm_store::testing::{cluster, create, network, node, transaction};
use swarm_store::{Consensus as _, ProposeError};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The name of every group.
pub const CLUSTER: &str = "c1";
/// Commits of the agent's store that are under way at once.
pub const AGENT_PIPELINE: u64 = 3;

/// What a child process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// What it does.
    pub job: Job,
    /// Its code leaves out all syncs, for the control: the run has to fail.
    pub unsynced: bool,
}

/// What a child process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// A member of a raft group.
    Raft(RaftJob),
    /// An agent's store in this data directory.
    Agent(PathBuf),
    /// A key store in this data directory.
    Keys(PathBuf, Pems),
    /// A database in this directory, with more between two syncs than it keeps apart by itself.
    Database(PathBuf),
}

/// A certificate with its key and root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pems {
    /// Leaf and root.
    pub chain: String,
    /// The leaf's key.
    pub key: String,
    /// The root.
    pub root: String,
}

impl Pems {
    fn material(&self) -> KeyMaterial {
        KeyMaterial {
            chain_pem: self.chain.clone(),
            key_pem: self.key.clone().into(),
            root_pem: self.root.clone(),
        }
    }
}

/// One member of a raft group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RaftJob {
    /// Its directory; nobody else's.
    pub dir: PathBuf,
    /// Where it listens.
    pub addr: String,
    /// Who it is.
    pub pems: Pems,
    /// Its data key.
    pub data_key: [u8; 32],
    /// Whom it joins; none: it makes the group.
    pub remote: Option<String>,
    /// It was a member before the power went: an empty directory is a loss.
    pub must_exist: bool,
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The parent is gone: so is the run.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Does the job that stdin names until it is killed.
///
/// # Errors
/// The job cannot be read. What goes wrong with it is said on stdout.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        let order = lines.next_line().await?.context("no order")?;
        let order: Order = serde_json::from_str(&order)?;
        if order.unsynced {
            swarm_disk::leave_out_syncs();
        }
        match order.job {
            Job::Raft(job) => raft(job, lines).await,
            Job::Agent(dir) => agent(dir).await,
            Job::Keys(dir, pems) => keys(dir, &pems),
            Job::Database(dir) => database(&dir).await,
        }
    });
    runtime.shutdown_background();
    done
}

fn manager(id: &str) -> swarm_proto::v1::Node {
    let mut made = node(id, "10.0.0.1");
    made.spec.get_or_insert_default().desired_role = NodeRole::Manager.into();
    made
}

/// Write `number` of a run: a network of that number, in entries of all sizes.
fn write(number: u64) -> Transaction {
    let (id, name) = (format!("net{number}"), format!("network-{number}"));
    // Room for a million.
    let (high, middle, low) = (number >> 12 & 255, number >> 4 & 255, (number & 15) << 4);
    let subnet = format!("10.{high}.{middle}.{low}/28");
    let padding = match number % 23 {
        // Many keys of the log, and several segments of its database.
        7 => 900 << 10,
        3 | 12 => 20_000,
        1 | 9 | 17 => 3_000,
        _ => 0,
    };
    Transaction {
        proposer: "x".repeat(padding),
        ..transaction([create(network(&id, &name, &subnet))])
    }
}

async fn raft(job: RaftJob, mut commands: Lines<BufReader<Stdin>>) -> Result<()> {
    let identity = Identity::new(job.pems.material())?;
    let mut config = RaftConfig::new(
        &job.dir,
        job.addr.clone(),
        identity.clone(),
        DataKey::from_bytes(job.data_key),
    );
    config.snapshot_interval = 40;
    config.kept_entries = 10;
    config.timing = RaftTiming {
        heartbeat: Duration::from_millis(30),
        election_min: Duration::from_millis(90),
        election_max: Duration::from_millis(180),
    };
    let exists = RaftNode::exists(&SystemDisk, &job.dir);
    if job.must_exist && !exists {
        say("refused: it was a member, and its directory is empty");
        return Ok(());
    }
    let starting = async {
        if exists {
            RaftNode::start(config).await
        } else if let Some(remote) = job.remote {
            RaftNode::join(config, vec![remote]).await
        } else {
            let me = identity.node_id().to_string();
            let first = transaction([create(cluster(CLUSTER)), create(manager(&me))]);
            RaftNode::bootstrap(config, first).await
        }
    };
    let member = match starting.await {
        Ok(member) => member,
        Err(error) => {
            say(&format!("refused: {:#}", anyhow::Error::new(error)));
            return Ok(());
        }
    };
    let listener = Listener::bind(&job.addr, identity).await?;
    let server = swarm_identity::grpc_server().add_service(member.service());
    tokio::spawn(server.serve_with_incoming(listener.incoming()));
    let mut leadership = member.leadership();
    tokio::spawn(async move {
        loop {
            let now = leadership.borrow_and_update().clone();
            if now.is_leader {
                say(&format!("leads {}", now.term));
            }
            if leadership.changed().await.is_err() {
                return;
            }
        }
    });
    say("up");
    let (running, _) = watch::channel(false);
    let mut load = JoinSet::new();
    while let Some(command) = commands.next_line().await? {
        let (command, argument) = command.split_once(' ').unwrap_or((&command, ""));
        match command {
            "joined" => {
                member.joined().await?;
                say("joined");
            }
            "enroll" => {
                propose(&member, transaction([create(manager(argument))])).await?;
                say("enrolled");
            }
            "load" => {
                let (from, workers) = argument.split_once(' ').context("load FROM WORKERS")?;
                let next = Arc::new(AtomicU64::new(from.parse()?));
                running.send_replace(true);
                for _ in 0..workers.parse()? {
                    let going = running.subscribe();
                    load.spawn(write_on(member.clone(), next.clone(), going));
                }
            }
            "pause" => {
                running.send_replace(false);
                while load.join_next().await.is_some() {}
                say("paused");
            }
            "barrier" => {
                let index = propose(&member, transaction([])).await?;
                say(&format!("barrier {index}"));
            }
            "state" => {
                let state = member.store().wait_for(argument.parse()?).await;
                let have: Vec<String> = state
                    .networks()
                    .filter_map(|network| network.id.strip_prefix("net").map(str::to_owned))
                    .collect();
                say(&format!(
                    "state {} {} {}",
                    state.index(),
                    hex::encode(Sha256::digest(state.encode())),
                    have.join(",")
                ));
            }
            other => bail!("unknown command {other}"),
        }
    }
    Ok(())
}

/// Proposes until it is done; doing it twice does no harm.
async fn propose(member: &RaftNode, what: Transaction) -> Result<u64> {
    let mut leadership = member.leadership();
    loop {
        match member.propose(what.clone()).await {
            Ok(index) => return Ok(index),
            Err(ProposeError::NoLeader(_) | ProposeError::Unknown(_)) => {
                // Whoever leads may not be known yet, or known and dead.
                let news = leadership.changed();
                let _ = tokio::time::timeout(Duration::from_millis(20), news).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn write_on(member: Arc<RaftNode>, next: Arc<AtomicU64>, going: watch::Receiver<bool>) {
    let mut leadership = member.leadership();
    while *going.borrow() {
        let number = next.fetch_add(1, Ordering::Relaxed);
        match member.propose(write(number)).await {
            Ok(_) => say(&format!("ack {number}")),
            Err(ProposeError::Stopping) => return,
            Err(ProposeError::NoLeader(_) | ProposeError::Unknown(_)) => {
                let news = leadership.changed();
                let _ = tokio::time::timeout(Duration::from_millis(20), news).await;
            }
            Err(error) => {
                say(&format!("failed: write {number}: {error}"));
                return;
            }
        }
    }
}

fn task(number: u64) -> Arc<Task> {
    let size = match number % 11 {
        5 => 300_000,
        2 | 8 => 20_000,
        _ => 100,
    };
    Arc::new(Task {
        id: format!("t{number:08}"),
        spec: Some(
            TaskSpec {
                container: Some(ContainerSpec {
                    env: vec![number.to_string().repeat(size / 8)],
                    ..Default::default()
                }),
                ..Default::default()
            }
            .into(),
        ),
        ..Default::default()
    })
}

/// Tasks assigned at once.
const ASSIGNED: u64 = 3;

fn held(number: u64) -> Held {
    let mut held = Held {
        revision: number,
        ..Held::default()
    };
    if number == 0 {
        return held;
    }
    for assigned in number.saturating_sub(ASSIGNED - 1).max(1)..=number {
        let task = task(assigned);
        held.tasks.insert(TaskId::from(&task.id), task);
    }
    let mut view = NetworkView::default();
    view.network.id = "net".to_owned();
    for row in 0..number * 7 % 40 {
        let entry = EndpointEntry {
            network_id: "net".to_owned(),
            task_id: format!("row{row}-{}", number / 10),
            ..Default::default()
        };
        let id = TaskId::from(&entry.task_id);
        view.endpoints.insert(id, Arc::new(entry));
    }
    held.networks.insert(NetworkId::from("net"), Arc::new(view));
    held
}

fn session(number: u64) -> SessionInfo {
    let mut info = SessionInfo::default();
    info.node
        .get_or_insert_default()
        .id
        .push_str(&number.to_string());
    info
}

fn started() -> TaskRecord {
    TaskRecord {
        started: true,
        ..Default::default()
    }
}

/// Commit `number` of the agent's store.
fn batch(number: u64) -> WriteBatch {
    let mut batch = WriteBatch::default();
    batch.assignments(&held(number - 1), &held(number));
    batch.record(&TaskId::from(&task(number).id), &started());
    if number > ASSIGNED + 1 {
        batch.remove_task(&TaskId::from(&task(number - ASSIGNED - 1).id));
    }
    batch.session(&session(number));
    batch
}

/// What is there after commit `number`.
fn expected(number: u64) -> LocalState {
    let mut state = LocalState::default();
    if number == 0 {
        return state;
    }
    state.held = held(number);
    state.session = Some(session(number));
    for known in number.saturating_sub(ASSIGNED).max(1)..=number {
        let task = task(known);
        let stored = StoredTask {
            task: task.clone(),
            record: started(),
            removed: known + ASSIGNED == number,
        };
        state.tasks.insert(TaskId::from(&task.id), stored);
    }
    state
}

async fn agent(dir: PathBuf) -> Result<()> {
    let (store, state) = match LocalStore::open(&SystemDisk, Threads::Own, &dir).await {
        Ok(opened) => opened,
        Err(error) => {
            say(&format!("refused: {error}"));
            return Ok(());
        }
    };
    let mut number = state.held.revision;
    if state == expected(number) {
        say(&format!("found {number}"));
    } else {
        let tasks: Vec<_> = state.tasks.keys().collect();
        say(&format!("refused: half of commit {number}: {tasks:?}"));
        return Ok(());
    }
    loop {
        let commits = (number + 1..=number + AGENT_PIPELINE).map(|n| store.commit(batch(n)));
        for result in futures::future::join_all(commits).await {
            result?;
            number += 1;
            say(&format!("ack {number}"));
        }
    }
}

fn keys(dir: PathBuf, pems: &Pems) -> Result<()> {
    let store = KeyStore::new(dir.join("certificates"));
    let mut number = match store.load() {
        Ok(None) => 0,
        Ok(Some(stored)) => {
            let (number, rest) = stored.data_key.as_bytes().split_at(8);
            let whole = rest.iter().all(|byte| *byte == number[0]);
            let same =
                stored.material.chain_pem.replace("\r\n", "\n") == pems.chain.replace("\r\n", "\n");
            if !whole || !same {
                say("refused: half of a key file");
                return Ok(());
            }
            u64::from_le_bytes(number.try_into()?)
        }
        Err(error) => {
            say(&format!("refused: {error}"));
            return Ok(());
        }
    };
    say(&format!("found {number}"));
    loop {
        number += 1;
        let mut key = [number.to_le_bytes()[0]; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        store.save(&Stored {
            material: pems.material(),
            data_key: DataKey::from_bytes(key),
        })?;
        say(&format!("ack {number}"));
    }
}

/// Keys of the database; all of them are rewritten between two syncs.
const KEYS: u32 = 250;
/// Length of a value in bytes, as in the raft log.
const VALUE: usize = 6000;

async fn database(dir: &Path) -> Result<()> {
    let opened = SystemDisk.database(dir, 4 << 20).await;
    let tree = opened.and_then(|db| Ok((db.tree(None)?, db)));
    let (tree, db) = match tree {
        Ok(opened) => opened,
        Err(error) => {
            say(&format!("refused: {error}"));
            return Ok(());
        }
    };
    let mut rounds = BTreeSet::new();
    for key in 0..KEYS {
        let value = match tree.get(&key.to_be_bytes()) {
            Ok(value) => value,
            Err(error) => {
                say(&format!("refused: key {key}: {error}"));
                return Ok(());
            }
        };
        let round = value.and_then(|value| Some(u64::from_be_bytes(*value.first_chunk()?)));
        rounds.insert(round.unwrap_or(0));
    }
    let oldest = rounds.first().copied().unwrap_or(0);
    if rounds.last().is_some_and(|newest| *newest > oldest + 1) {
        say(&format!("refused: keys of rounds {rounds:?} side by side"));
        return Ok(());
    }
    say(&format!("found {oldest}"));
    for round in oldest + 1.. {
        for key in 0..KEYS {
            let mut value = vec![0; VALUE];
            value[..8].copy_from_slice(&round.to_be_bytes());
            tree.put(&key.to_be_bytes(), value)?;
        }
        db.sync().await?;
        say(&format!("ack {round}"));
    }
    Ok(())
}
