//! The simulated agents: real sessions, each with its own certificate and connection, in this process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use swarm_agent::light::{LightAgent, Observer};
use swarm_agent::session::Connector;
use swarm_agent::worker::AssignmentSet;
use swarm_identity::{Identity, JoinToken, fetch_root, request_certificate};
use swarm_proto::v1::assignment_change::Change;
use swarm_proto::v1::{NodeAvailability, NodeDescription, Platform, Resources, Task};

use crate::managers::{MANAGERS, addr};

/// Agents that join at the same time.
const JOIN_TOGETHER: usize = 64;
/// An agent tries again as often.
const JOIN_TRIES: usize = 5;

/// What the agents see, put together.
#[derive(Default)]
pub struct Board {
    pub registered: AtomicUsize,
    pub lost: AtomicUsize,
    /// Why the last one was.
    pub last_loss: Mutex<String>,
    pub assigned: AtomicU64,
    /// When a task of a service with this name was assigned.
    pub at: Mutex<HashMap<String, Instant>>,
    pub watch_names: std::sync::atomic::AtomicBool,
    pub probe: Mutex<Option<Probe>>,
    pub probing: std::sync::atomic::AtomicBool,
}

/// A change of one endpoint that is waited for on all agents.
pub struct Probe {
    pub task: String,
    pub ready: bool,
    pub begun: Instant,
    pub seen: Vec<Duration>,
}

impl Observer for Board {
    fn assigned(&self, task: &Task) {
        self.assigned.fetch_add(1, Ordering::Relaxed);
        if self.watch_names.load(Ordering::Relaxed)
            && let Some(named) = &task.service_annotations
        {
            self.at.lock().insert(named.name.clone(), Instant::now());
        }
    }

    fn applied(&self, set: &AssignmentSet) {
        if !self.probing.load(Ordering::Relaxed) {
            return;
        }
        let changes = set.changes().unwrap_or_default();
        for change in &changes {
            if let Some(Change::Endpoint(row)) = &change.change
                && let Some(probe) = &mut *self.probe.lock()
                && probe.task == row.task_id
                && probe.ready == row.ready
            {
                let late = probe.begun.elapsed();
                probe.seen.push(late);
            }
        }
    }

    fn registered(&self) {
        self.registered.fetch_add(1, Ordering::Relaxed);
    }

    fn lost(&self, why: &str) {
        self.registered.fetch_sub(1, Ordering::Relaxed);
        self.lost.fetch_add(1, Ordering::Relaxed);
        why.clone_into(&mut self.last_loss.lock());
    }
}

/// Has `count` agents join: a key, a certificate and a session each.
pub async fn join(count: usize, token: &str, board: &Arc<Board>) -> Result<Vec<LightAgent>> {
    let token: JoinToken = token.parse()?;
    let net = swarm_identity::Tcp::shared();
    let root = fetch_root(&net, &addr(1), &token).await?;
    let (token, root, net) = (&token, root.as_str(), &net);
    futures::stream::iter(0..count)
        .map(|number| async move {
            let hostname = format!("agent-{number:05}");
            let mut tries = 0;
            let material = loop {
                let manager = addr((number + tries) % MANAGERS + 1);
                let availability = NodeAvailability::Active;
                match request_certificate(net, &manager, root, token, availability, &hostname).await
                {
                    Ok(material) => break material,
                    Err(error) if tries == JOIN_TRIES => return Err(error.into()),
                    Err(_) => tries += 1,
                }
            };
            let identity = Identity::new(material).context("a certificate that was just issued")?;
            let connector: Arc<dyn Connector> = Arc::new(identity);
            let description = NodeDescription {
                hostname,
                platform: Some(Platform {
                    architecture: "x86_64".into(),
                    os: "linux".into(),
                }),
                resources: Some(Resources {
                    nano_cpus: 4_000_000_000,
                    memory_bytes: 8 << 30,
                }),
                data_path_addr: format!("198.18.{}.{}", number >> 8 & 0xff, number & 0xff),
                ..NodeDescription::default()
            };
            let remotes = (1..=MANAGERS).map(addr).collect();
            anyhow::Ok(LightAgent::start(
                remotes,
                connector,
                description,
                board.clone(),
            ))
        })
        .buffer_unordered(JOIN_TOGETHER)
        .try_collect()
        .await
}
