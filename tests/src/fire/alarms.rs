//! False alarms: a cluster that is busy, not broken, and nobody may be taken for dead.
//!
//! Keeps every core busy with loops of ordinary priority, stalls disks, and lets nodes
//! fall silent for real. What the managers conclude is read from a watch of the
//! nodes, and who led when from the managers' logs, so nothing between two looks is missed.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use swarm_proto::v1::{
    ListNodesRequest, NodeState, NodeStatus, ObjectKind, WatchAction, WatchRequest, object,
};

use super::history::Who;
use super::nemesis::leader;
use super::workload::{Client, Shared, connect};
use crate::cluster::{PATIENCE, busybox};
use crate::lab::{Lab, host_dir, wait_until};

/// Clients that write while disks stall.
const CLIENTS: u16 = 6;
/// A silent node is to be seen within this.
pub const SILENCE_SEEN: Duration = Duration::from_secs(5);

/// How long each part is.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// With all cores busy.
    pub busy: Duration,
    /// With a stalling disk, once a follower's and once the leader's.
    pub stalled: Duration,
    /// What each sync takes longer meanwhile.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            busy: Duration::from_secs(600),
            stalled: Duration::from_secs(30),
            stall: Duration::from_millis(500),
        }
    }
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Report {
    /// Load averages of the machine, with what was under way.
    pub loads: Vec<(String, String)>,
    /// Nodes that were marked Down while all were only busy.
    pub down: Vec<String>,
    /// Changes of leadership while all were only busy.
    pub elections: usize,
    /// How long it took until a stopped, and a cut off, node was Down.
    pub silences: Vec<(String, Duration)>,
    /// Elections while a follower's disk stalled.
    pub stalled_follower: usize,
    /// Elections while the leader's disk stalled.
    pub stalled_leader: usize,
    /// Writes acknowledged meanwhile.
    pub writes: (u64, u64),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (when, load) in &self.loads {
            writeln!(f, "load average {when}: {load}")?;
        }
        writeln!(
            f,
            "busy: {} nodes marked Down {:?}, {} elections",
            self.down.len(),
            self.down,
            self.elections
        )?;
        for (how, time) in &self.silences {
            writeln!(f, "{how}: Down after {:.2} s", time.as_secs_f64())?;
        }
        write!(
            f,
            "stalled disk of a follower: {} elections, {} operations answered; of the leader: {} elections, {} operations answered",
            self.stalled_follower, self.writes.0, self.stalled_leader, self.writes.1
        )
    }
}

impl Report {
    /// The report, if there was no false alarm and no silence was missed.
    ///
    /// # Errors
    /// The first of what went wrong, with the report.
    pub fn verdict(self) -> Result<Self> {
        ensure!(
            self.down.is_empty(),
            "a busy node was taken for dead:\n{self}"
        );
        ensure!(self.elections == 0, "a busy leader was lost:\n{self}");
        ensure!(
            self.silences.iter().all(|(_, time)| *time < SILENCE_SEEN),
            "a silence was seen too late:\n{self}"
        );
        ensure!(
            self.stalled_follower == 0,
            "a follower's slow disk cost an election:\n{self}"
        );
        ensure!(
            self.stalled_leader <= 1,
            "a leader's slow disk cost more than one election:\n{self}"
        );
        ensure!(
            self.writes.0 > 0 && self.writes.1 > 0,
            "nothing was written while a disk stalled:\n{self}"
        );
        Ok(self)
    }
}

/// Loops that keep all cores busy until this is dropped.
struct Burners(Vec<Child>);

impl Burners {
    fn start() -> Result<Self> {
        let cores = std::thread::available_parallelism()?.get();
        let mut burners = Self(Vec::new());
        for _ in 0..cores {
            let mut command = Command::new("sh");
            command
                .args(["-c", "while :; do :; done"])
                .stdin(Stdio::null());
            // SAFETY: prctl is a system call with numbers only.
            unsafe {
                command.pre_exec(|| {
                    // They end with us, whatever happens to us.
                    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
                        .map_err(Into::into)
                });
            }
            burners.0.push(command.spawn().context("starting a loop")?);
        }
        Ok(burners)
    }
}

impl Drop for Burners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Errors mean that it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a watch has said of the nodes' states, by hostname.
#[derive(Default)]
struct States {
    now: BTreeMap<String, NodeState>,
    /// Every change, in order.
    changes: Vec<(Instant, String, NodeState)>,
}

/// Follows the nodes' states at a manager until it is aborted.
async fn watch_nodes(host: u16, states: Arc<Mutex<States>>) {
    let mut resume_from = 0;
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let followed = follow(host, &states, &mut names, &mut resume_from).await;
        tracing::debug!(?followed, "the watch of the nodes has ended");
        // The pace of attempts at a manager that does not answer.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn follow(
    host: u16,
    states: &Mutex<States>,
    names: &mut BTreeMap<String, String>,
    resume_from: &mut u64,
) -> Result<()> {
    let mut api = connect(host);
    let listed = api.list_nodes(ListNodesRequest::default()).await?;
    for node in listed.into_inner().nodes {
        names.insert(node.id, node.description.unwrap_or_default().hostname);
    }
    let request = WatchRequest {
        kinds: vec![ObjectKind::Node.into()],
        resume_from: *resume_from,
        ..Default::default()
    };
    let mut stream = api.watch(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        for event in message.events {
            let action = event.action();
            let Some(object::Object::Node(node)) = event.object.and_then(|object| object.object)
            else {
                continue;
            };
            let name = names.get(&node.id).cloned().unwrap_or(node.id);
            let state = match action {
                WatchAction::Remove => continue,
                _ => node
                    .status
                    .as_ref()
                    .map_or(NodeState::Unknown, NodeStatus::state),
            };
            let mut states = states.lock();
            if states.now.insert(name.clone(), state) != Some(state) {
                states.changes.push((Instant::now(), name, state));
            }
        }
        *resume_from = message.index.max(*resume_from);
    }
    Ok(())
}

/// Lines that the managers' logs have on leadership, counted from a moment on.
struct Logs(BTreeMap<String, usize>);

impl Logs {
    fn from_now(lab: &Lab) -> Self {
        let length = |host: &String| read_log(host).len();
        Self(
            lab.hosts()
                .into_iter()
                .map(|host| {
                    let length = length(&host);
                    (host, length)
                })
                .collect(),
        )
    }

    /// Terms that somebody began to lead since then.
    fn elections(&self) -> usize {
        let mut terms: Vec<String> = Vec::new();
        for (host, &from) in &self.0 {
            let log = read_log(host);
            for line in log.get(from..).unwrap_or_default().lines() {
                if line.contains("raft leadership") && line.contains("is_leader=true") {
                    let term = line.split("term=").nth(1).unwrap_or_default();
                    terms.push(term.split(' ').next().unwrap_or_default().to_owned());
                }
            }
        }
        terms.sort();
        terms.dedup();
        terms.len()
    }
}

fn read_log(host: &str) -> String {
    fs::read_to_string(host_dir(host).join("swarmd.log")).unwrap_or_default()
}

fn load() -> String {
    fs::read_to_string("/proc/loadavg")
        .unwrap_or_default()
        .split(' ')
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs all parts against a cluster whose last host is a worker.
///
/// # Errors
/// A verb of the lab failed. What was seen is in the report, good or bad.
pub fn run(lab: &mut Lab, options: &Options) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    // Connections belong to the runtime in whose context they are made.
    let _context = runtime.enter();
    let states = Arc::new(Mutex::new(States::default()));
    runtime.spawn(watch_nodes(1, states.clone()));
    let hosts = lab.hosts();
    wait_until(PATIENCE, "the watch has said that all are Ready", || {
        let states = states.lock();
        let ready = states
            .now
            .values()
            .filter(|state| **state == NodeState::Ready);
        Ok((ready.count() == hosts.len()).then_some(()))
    })?;
    let mut report = Report::default();
    report.loads.push(("before".into(), load()));
    let burners = Burners::start()?;

    let logs = Logs::from_now(lab);
    let from = states.lock().changes.len();
    // How long it is busy is what this part is about.
    std::thread::sleep(options.busy);
    report.loads.push(("when busy".into(), load()));
    report.elections = logs.elections();
    report.down = states.lock().changes[from..]
        .iter()
        .filter(|(_, _, state)| *state != NodeState::Ready)
        .map(|(_, name, state)| format!("{name} {}", state.as_str_name()))
        .collect();

    silences(lab, &states, &mut report)?;
    stalls(lab, &runtime, options, &mut report)?;
    report.loads.push(("at the end".into(), load()));
    drop(burners);
    Ok(report)
}

/// The worker falls silent, once stopped and once cut off.
fn silences(lab: &Lab, states: &Mutex<States>, report: &mut Report) -> Result<()> {
    let victim = lab.hosts().pop().context("a lab has hosts")?;
    let others: Vec<String> = lab
        .hosts()
        .into_iter()
        .filter(|host| *host != victim)
        .collect();
    for how in ["SIGSTOP", "cut off"] {
        let from = states.lock().changes.len();
        let silent = Instant::now();
        if how == "SIGSTOP" {
            lab.pause(&victim)?;
        } else {
            for other in &others {
                lab.cut(&victim, other)?;
            }
        }
        let down = wait_until(PATIENCE, &format!("{victim} is Down after {how}"), || {
            let states = states.lock();
            let found = states.changes[from..]
                .iter()
                .find(|(_, name, state)| *name == victim && *state == NodeState::Down);
            Ok(found.map(|(at, ..)| *at))
        })?;
        report
            .silences
            .push((format!("{victim} {how}"), down - silent));
        if how == "SIGSTOP" {
            lab.resume(&victim)?;
        } else {
            lab.heal()?;
        }
        wait_until(PATIENCE, &format!("{victim} is Ready again"), || {
            let ready = states.lock().now.get(&victim) == Some(&NodeState::Ready);
            Ok(ready.then_some(()))
        })?;
    }
    Ok(())
}

/// The disk of a follower stalls, then the leader's, while clients write.
fn stalls(
    lab: &Lab,
    runtime: &tokio::runtime::Runtime,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    for of_leader in [false, true] {
        let leads = leader(lab)?;
        let host = match of_leader {
            true => leads,
            false => ["h1", "h2", "h3"]
                .into_iter()
                .find(|host| *host != leads)
                .unwrap_or("h1")
                .to_owned(),
        };
        let shared = Shared::new(&[], busybox());
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let who = Who {
                    client,
                    host: 1 + client % 3,
                };
                let random = StdRng::seed_from_u64(u64::from(client));
                runtime.spawn(Client::new(who).run(shared.clone(), random))
            })
            .collect();
        let logs = Logs::from_now(lab);
        lab.slow_disk(&host, options.stall)?;
        std::thread::sleep(options.stalled);
        let elections = logs.elections();
        lab.heal()?;
        shared.stop();
        runtime.block_on(async {
            for client in clients {
                client.await.context("a client panicked")?;
            }
            anyhow::Ok(())
        })?;
        let answered = shared
            .counts
            .answered
            .load(std::sync::atomic::Ordering::Relaxed);
        match of_leader {
            false => (report.stalled_follower, report.writes.0) = (elections, answered),
            true => (report.stalled_leader, report.writes.1) = (elections, answered),
        }
    }
    Ok(())
}
