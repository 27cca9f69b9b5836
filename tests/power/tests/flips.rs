//! Flipped bits, zeroed pages and cut-off files: refused by name, or without effect.
//!
//! A member's directory (log with the files of its database, mark, snapshot, member file), an agent's
//! store and a key file are made by the real code, then damaged one place at a time. What starts all
//! the same must be what it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use swarm_agent::local::{LocalState, LocalStore, TaskRecord, WriteBatch};
use swarm_agent::worker::Held;
use swarm_disk::{SystemDisk, Threads};
use swarm_identity::{DataKey, Identity, KeyMaterial, NewKey, PeerIdentity, RootCa};
use swarm_proto::TaskId;
use swarm_proto::v1::{NodeRole, Task};
use swarm_raft::{RaftConfig, RaftNode, RaftTiming};
use swarm_store::Consensus as _;
use swarm_store::testing::{cluster, create, network, node, transaction};

/// What a wait ends with when the awaited fact never becomes true.
const PATIENCE: Duration = Duration::from_secs(60);

/// One damage, of one file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip {
        at: usize,
        bit: u8,
    },
    /// A page of zeros.
    Zero {
        at: usize,
    },
    CutOff {
        at: usize,
    },
}

impl Damage {
    fn apply(self, content: &mut Vec<u8>) {
        match self {
            Self::Flip { at, bit } => content[at] ^= 1 << bit,
            Self::Zero { at } => {
                let end = content.len().min(at + 4096);
                content[at..end].fill(0);
            }
            Self::CutOff { at } => content.truncate(at),
        }
    }
}

/// The files below a directory, relative to it.
fn files(dir: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, &mut found);
    found.sort();
    let relative = |path: &PathBuf| path.strip_prefix(dir).unwrap().to_owned();
    found.iter().map(relative).collect()
}

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), target).unwrap();
    }
    // Which sled looks for, empty as it is.
    for blobs in ["log/blobs", "agent/blobs", "blobs"] {
        if from.join(blobs).exists() {
            fs::create_dir_all(to.join(blobs)).unwrap();
        }
    }
}

/// Damages of a file: its beginning, its end, and places in between.
fn damages(content: &[u8], flips: usize, dice: &mut StdRng) -> Vec<Damage> {
    // What has never been written to says nothing.
    let used = content
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    let mut damages = Vec::new();
    if used == 0 {
        return damages;
    }
    for number in 0..flips {
        let at = match number {
            0 => 0,
            1 => used - 1,
            _ => dice.random_range(0..used),
        };
        let bit = dice.random_range(0..8);
        damages.push(Damage::Flip { at, bit });
    }
    for _ in 0..flips.div_ceil(4) {
        let at = dice.random_range(0..used) / 4096 * 4096;
        damages.push(Damage::Zero { at });
        let at = dice.random_range(0..used);
        damages.push(Damage::CutOff { at });
    }
    damages.push(Damage::CutOff { at: 0 });
    damages
}

fn material(root: &RootCa) -> KeyMaterial {
    let key = NewKey::generate().unwrap();
    let subject = PeerIdentity {
        node_id: "n1".into(),
        role: NodeRole::Manager,
        cluster_id: "c1".into(),
    };
    let day = Duration::from_secs(24 * 3600);
    let chain = root.sign(key.csr_pem.as_bytes(), &subject, day, SystemTime::now());
    KeyMaterial {
        chain_pem: chain.unwrap(),
        key_pem: key.key_pem.into(),
        root_pem: root.cert_pem().to_owned(),
    }
}

/// A member that is alone.
struct Alone {
    material: KeyMaterial,
    key: DataKey,
}

/// What is compared: everything applied, and the term it leads.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    networks: BTreeSet<String>,
    term: u64,
}

impl Alone {
    fn config(&self, dir: &Path) -> RaftConfig {
        let identity = Identity::new(self.material.clone()).unwrap();
        // Nobody speaks to it.
        let mut config = RaftConfig::new(dir, "127.0.0.1:1", identity, self.key.clone());
        config.snapshot_interval = 40;
        config.kept_entries = 10;
        config.timing = RaftTiming {
            heartbeat: Duration::from_millis(10),
            election_min: Duration::from_millis(20),
            election_max: Duration::from_millis(40),
        };
        config
    }

    async fn made(&self, dir: &Path) -> Found {
        let mut me = node("n1", "10.0.0.1");
        me.spec.get_or_insert_default().desired_role = NodeRole::Manager.into();
        let first = transaction([create(cluster("c1")), create(me)]);
        let member = RaftNode::bootstrap(self.config(dir), first).await.unwrap();
        for number in 0..110u32 {
            let (id, name) = (format!("net{number}"), format!("network-{number}"));
            let made = create(network(&id, &name, &format!("10.1.{number}.0/24")));
            let mut write = transaction([made]);
            // Behind the last snapshot, so that it is in the log.
            if number % 30 == 29 || number == 108 {
                write.proposer = "x".repeat(200_000);
            }
            member.propose(write).await.unwrap();
        }
        let found = found(&member).await;
        member.shutdown().await;
        found
    }

    /// What is there, or the refusal.
    async fn start(&self, dir: &Path) -> Result<Found, String> {
        let starting = RaftNode::start(self.config(dir)).await;
        let member = starting.map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
        let mut fatal = member.fatal();
        let found = tokio::select! {
            found = found(&member) => Ok(found),
            // Damage that is seen only when it is read.
            fatal = fatal.wait_for(Option::is_some) => {
                Err(fatal.unwrap().clone().unwrap().to_string())
            }
        };
        drop(member);
        found
    }
}

async fn found(member: &RaftNode) -> Found {
    let mut leadership = member.leadership();
    let leads = leadership.wait_for(|now| now.is_leader);
    let leads = tokio::time::timeout(PATIENCE, leads).await;
    let term = leads.expect("it leads soon").unwrap().term;
    let state = member.read().await.unwrap();
    Found {
        networks: state.networks().map(|network| network.id.clone()).collect(),
        term,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_damaged_file_is_what_it_was_or_refuses_and_names_it() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let root = RootCa::create(SystemTime::now()).unwrap();
    let alone = Alone {
        material: material(&root),
        key: DataKey::random(),
    };
    let original = tempfile::tempdir().unwrap();
    let dir = original.path().join("raft");
    let before = alone.made(&dir).await;
    let mut seen = Vec::new();
    for file in files(&dir) {
        let content = fs::read(dir.join(&file)).unwrap();
        // The database is where anything may lie.
        let flips = if file.ends_with("db") { 60 } else { 8 };
        let (mut refused, mut harmless) = (0, 0);
        for damage in damages(&content, flips, &mut dice) {
            let place = tempfile::tempdir().unwrap();
            let damaged_dir = place.path().join("raft");
            copy(&dir, &damaged_dir);
            let mut damaged = content.clone();
            damage.apply(&mut damaged);
            if damaged == content {
                continue;
            }
            fs::write(damaged_dir.join(&file), damaged).unwrap();
            match alone.start(&damaged_dir).await {
                Ok(after) => {
                    harmless += 1;
                    assert_eq!(after.networks, before.networks, "{file:?} {damage:?}");
                    assert!(after.term > before.term, "{file:?} {damage:?}: {after:?}");
                }
                Err(error) => {
                    refused += 1;
                    let named = error.contains(damaged_dir.to_str().unwrap());
                    assert!(named, "{file:?} {damage:?}: {error}");
                    let advice = error.contains("start again") || error.contains("cannot");
                    assert!(
                        advice || error.contains("failed"),
                        "{file:?} {damage:?}: {error}"
                    );
                }
            }
        }
        seen.push((file, refused, harmless));
    }
    println!("file, refused, without effect: {seen:?}");
    let of = |name: &str| seen.iter().find(|(file, ..)| file.ends_with(name)).unwrap();
    for name in ["log.mark", "member"] {
        assert!(of(name).1 > 0 && of(name).2 == 0, "{seen:?}");
    }
    assert!(of("db").1 > 0, "{seen:?}");
}

fn held(revision: u64, tasks: u64) -> Held {
    let mut held = Held {
        revision,
        ..Held::default()
    };
    for number in 0..tasks {
        let task = Task {
            id: format!("t{number}"),
            service_id: "x".repeat(usize::try_from(number * 400).unwrap()),
            ..Task::default()
        };
        held.tasks.insert(TaskId::from(&task.id), task.into());
    }
    held
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_s_store_with_a_damaged_file_is_what_it_was_or_refuses_and_names_it() {
    async fn open(dir: &Path) -> Result<(LocalStore, LocalState), String> {
        let opened = LocalStore::open(&SystemDisk, Threads::Own, dir).await;
        opened.map_err(|error| error.to_string())
    }
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let original = tempfile::tempdir().unwrap();
    let dir = original.path();
    let (store, _) = open(dir).await.unwrap();
    for revision in 1..60 {
        let mut batch = WriteBatch::default();
        let (old, new) = (
            held(revision - 1, (revision - 1) % 20),
            held(revision, revision % 20),
        );
        batch.assignments(&old, &new);
        for removed in revision % 20..(revision - 1) % 20 {
            batch.remove_task(&TaskId::from(format!("t{removed}").as_str()));
        }
        for task in new.tasks.keys() {
            let record = TaskRecord {
                started: revision % 2 == 0,
                ..TaskRecord::default()
            };
            batch.record(task, &record);
        }
        store.commit(batch).await.unwrap();
    }
    drop(store);
    let (store, before) = open(dir).await.unwrap();
    drop(store);
    let mut seen = Vec::new();
    for file in files(dir) {
        let content = fs::read(dir.join(&file)).unwrap();
        let flips = if file.ends_with("db") { 80 } else { 8 };
        let (mut refused, mut harmless) = (0, 0);
        for damage in damages(&content, flips, &mut dice) {
            let place = tempfile::tempdir().unwrap();
            copy(dir, place.path());
            let mut damaged = content.clone();
            damage.apply(&mut damaged);
            fs::write(place.path().join(&file), damaged).unwrap();
            match open(place.path()).await {
                Ok((_store, after)) => {
                    harmless += 1;
                    assert!(after == before, "{file:?} {damage:?} is served");
                }
                Err(error) => {
                    refused += 1;
                    let named = error.contains(place.path().join("agent").to_str().unwrap());
                    assert!(named, "{file:?} {damage:?}: {error}");
                }
            }
        }
        seen.push((file, refused, harmless));
    }
    println!("file, refused, without effect: {seen:?}");
    let of = |name: &str| seen.iter().find(|(file, ..)| file.ends_with(name)).unwrap();
    assert!(of("db").1 > 0 && of("mark").1 > 0, "{seen:?}");
}
