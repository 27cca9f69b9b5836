//! How large a cluster three managers carry: simulated agents, no containers.
//!
//! The managers are three real `swarmd` processes with real disks, in a network
//! namespace of their own; the agents are in this process. An agent's session,
//! certificate, connection and reports are the real ones; its node is not there
//! (`swarm_agent::light`), and it reports RUNNING once for each task. Everything
//! shares this machine's cores. With `--check` the time does not matter: it fails
//! when a task, acknowledgement or session is missing.

mod agents;
mod managers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _};
use swarm_agent::light::{LARGEST_MESSAGE, LightAgent};
use swarm_proto::TaskId;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::{
    Annotations, ContainerSpec, CreateNetworkRequest, CreateServiceRequest, Filters,
    GetTaskRequest, ListNodesRequest, NetworkAttachmentConfig, NetworkSpec, NodeState, Placement,
    ReplicatedMode, ServiceMode, ServiceSpec, TaskSpec, UpdateServiceRequest, service_mode,
};
use tonic::transport::Channel;

use crate::agents::{Board, Probe};
use crate::managers::{MANAGERS, Managers};

/// No message to an agent may be larger.
const MESSAGE_LIMIT: usize = 1 << 20;

/// Simulated agents, no containers: what three managers carry on this machine
#[derive(Parser)]
struct Args {
    /// Simulated agents
    #[arg(long, default_value_t = 1_000)]
    agents: usize,
    /// Tasks, in services of `--replicas`
    #[arg(long, default_value_t = 100_000)]
    tasks: u64,
    /// Replicas of a service
    #[arg(long, default_value_t = 1_000)]
    replicas: u64,
    /// Services created at 100 a second, for the time from call to assignment
    #[arg(long, default_value_t = 1_000)]
    creations: usize,
    /// Changes of an endpoint on a network that is on every agent
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// Minutes in which nothing happens and no session may be lost
    #[arg(long, default_value_t = 0)]
    minutes: u64,
    /// Kill and start a manager, then all of them
    #[arg(long)]
    restart: bool,
    /// No step may take longer, in seconds
    #[arg(long, default_value_t = 900)]
    patience: u64,
    /// Where the managers' disks are
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write the figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Keep the managers' directories
    #[arg(long)]
    keep: bool,
}

/// Tasks that are added at a time to the network that comes to be on every agent. All at once would be
/// a million rows for a thousand agents, which a machine each has time for, and this one has not.
const STEP: usize = 100;
/// And into how many steps that is cut at most: each goes to all agents.
const STEPS_MAX: usize = 10;

/// Nice value of the agents; the managers have 0, and -10 for the raft group.
const AGENTS_NICE: i32 = -5;

fn main() -> Result<()> {
    let args = Args::parse();
    managers::own_network()?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(agents_first)
        .enable_all()
        .build()?
        .block_on(run(args))
}

/// The agents of a cluster have a machine each. Here all of them are one process among three busy ones: with no
/// more than its share of the processor it would be silent for seconds, which is what no session survives.
fn agents_first() {
    if let Err(error) = rustix::process::setpriority_process(None, AGENTS_NICE) {
        eprintln!("the agents have no more of the processor than each manager: {error}");
    }
}

/// Figures, in the order of measuring.
#[derive(Default)]
struct Figures {
    values: Vec<(String, f64)>,
}

impl Figures {
    fn add(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        println!("{name:72} {value:>14.3}   (load {})", load());
        self.values.push((name, value));
    }
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

struct Scale {
    args: Args,
    managers: Managers,
    agents: Vec<LightAgent>,
    board: Arc<Board>,
    figures: Figures,
}

async fn run(args: Args) -> Result<()> {
    println!(
        "simulated agents, no containers: {} agents, {} tasks, three managers",
        args.agents, args.tasks
    );
    let dir = tempfile::Builder::new()
        .prefix("swarm-scale-")
        .tempdir_in(&args.dir)?;
    let bin = swarm_tests::lab::bin_dir()?;
    let managers = Managers::form(dir.path(), &bin).await?;
    let mut scale = Scale {
        args,
        managers,
        agents: Vec::new(),
        board: Arc::default(),
        figures: Figures::default(),
    };
    let result = scale.measure().await;
    let Scale {
        args,
        managers,
        agents,
        figures,
        board,
    } = scale;
    if let Some(path) = &args.json {
        let values: BTreeMap<_, _> = figures.values.into_iter().collect();
        std::fs::write(path, serde_json::to_vec_pretty(&values)?)?;
    }
    if args.keep || result.is_err() {
        for number in 1..=MANAGERS {
            let log = dir.path().join(format!("m{number}/log"));
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines
                .len()
                .saturating_sub(if result.is_err() { 15 } else { 0 })..]
            {
                eprintln!("m{number}: {line}");
            }
        }
        if !board.last_loss.lock().is_empty() {
            eprintln!("the last session was lost: {}", board.last_loss.lock());
        }
    }
    drop(agents);
    drop(managers);
    if args.keep {
        println!("kept {}", dir.keep().display());
    }
    result
}

impl Scale {
    async fn measure(&mut self) -> Result<()> {
        self.join().await?;
        self.run_tasks().await?;
        if self.args.creations > 0 {
            self.creations().await?;
        }
        if self.args.changes > 0 {
            self.changes().await?;
        }
        if self.args.minutes > 0 {
            self.steady().await?;
        }
        let largest = LARGEST_MESSAGE.load(Ordering::Relaxed);
        self.figures
            .add("largest message to an agent, KiB", largest as f64 / 1024.0);
        let lost = self.board.lost.load(Ordering::Relaxed);
        self.figures.add("sessions lost", lost as f64);
        if self.args.restart {
            self.restart().await?;
        }
        ensure!(largest <= MESSAGE_LIMIT, "a message of {largest} bytes");
        ensure!(lost == 0, "{lost} sessions were lost");
        Ok(())
    }

    /// Returns once the fact holds.
    async fn until(&self, what: &str, fact: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !fact() {
            ensure!(
                begin.elapsed() < Duration::from_secs(self.args.patience),
                "not within {} s: {what}; {} assigned, {} not acknowledged, {} sessions",
                self.args.patience,
                self.board.assigned.load(Ordering::Relaxed),
                self.unacknowledged(),
                self.board.registered.load(Ordering::Relaxed),
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn unacknowledged(&self) -> usize {
        self.agents.iter().map(LightAgent::unacknowledged).sum()
    }

    async fn join(&mut self) -> Result<()> {
        let count = self.args.agents;
        let before = self.pss()?;
        let begin = Instant::now();
        let token = self.managers.tokens().await?.worker;
        self.agents = agents::join(count, &token, &self.board).await?;
        let issued = begin.elapsed();
        self.until("all have a session", || {
            self.board.registered.load(Ordering::Relaxed) >= count
        })
        .await?;
        let joined = begin.elapsed();
        while self.ready().await? < count {
            ensure!(
                begin.elapsed() < Duration::from_secs(self.args.patience),
                "not all nodes are READY"
            );
        }
        self.figures
            .add("join: all certificates issued, s", issued.as_secs_f64());
        self.figures
            .add("join: all have a session, s", joined.as_secs_f64());
        self.figures
            .add("join: all READY, s", begin.elapsed().as_secs_f64());
        // Handshakes leave memory that is given back a little later.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let grown = self.pss()? - before;
        self.figures.add(
            "memory per agent in the manager that holds its session, KiB",
            grown / count as f64,
        );
        Ok(())
    }

    /// How many agents the cluster calls READY.
    async fn ready(&self) -> Result<usize> {
        let mut ready = 0;
        let mut request = ListNodesRequest {
            page_size: 5_000,
            filters: Some(Filters {
                names: vec!["agent-".to_owned()],
                ..Filters::default()
            }),
            ..ListNodesRequest::default()
        };
        loop {
            let mut control = self.managers.control(1);
            let page = control.list_nodes(request.clone()).await?.into_inner();
            ready += page
                .nodes
                .iter()
                .filter(|node| node.status.as_ref().map(|s| s.state()) == Some(NodeState::Ready))
                .count();
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        Ok(ready)
    }

    /// KiB of all managers together, shared pages divided.
    fn pss(&self) -> Result<f64> {
        let mut sum = 0.0;
        for pid in self.managers.pids() {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let line = text.lines().find(|line| line.starts_with("Pss:"));
            let kib = line.and_then(|line| line.split_whitespace().nth(1));
            sum += kib.context("smaps_rollup")?.parse::<f64>()?;
        }
        Ok(sum)
    }

    /// Seconds of processor time so far: managers, agents.
    fn cpu(&self) -> Result<(f64, f64)> {
        let of = |pid: u32| -> Result<f64> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let rest = text.rsplit_once(") ").context("stat")?.1;
            let ticks: Vec<f64> = rest
                .split(' ')
                .skip(11)
                .take(2)
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            Ok(ticks.iter().sum::<f64>() / 100.0)
        };
        let managers = self
            .managers
            .pids()
            .into_iter()
            .map(of)
            .sum::<Result<f64>>()?;
        Ok((managers, of(std::process::id())?))
    }

    async fn run_tasks(&mut self) -> Result<()> {
        let (tasks, replicas) = (self.args.tasks, self.args.replicas);
        let already = self.board.assigned.load(Ordering::Relaxed);
        let cpu = self.cpu()?;
        let begin = Instant::now();
        let sizes = (0..tasks.div_ceil(replicas)).map(|at| replicas.min(tasks - at * replicas));
        let control = self.managers.control(1);
        futures::stream::iter(sizes.enumerate())
            .map(|(at, size)| {
                let mut control = control.clone();
                async move {
                    let request = service(format!("bulk-{at}"), size, None);
                    control.create_service(request).await.map(drop)
                }
            })
            .buffer_unordered(16)
            .try_collect::<()>()
            .await?;
        let called = begin.elapsed();
        self.until("all tasks are assigned", || {
            self.board.assigned.load(Ordering::Relaxed) - already >= tasks
        })
        .await?;
        let assigned = begin.elapsed();
        self.until("all tasks are acknowledged", || self.unacknowledged() == 0)
            .await?;
        let acknowledged = begin.elapsed();
        let after = self.cpu()?;
        let each = |seconds: f64| seconds * 1e6 / tasks as f64;
        self.figures
            .add("tasks: services created, s", called.as_secs_f64());
        self.figures
            .add("tasks: all at their agents, s", assigned.as_secs_f64());
        self.figures.add(
            "tasks: all RUNNING and acknowledged, s",
            acknowledged.as_secs_f64(),
        );
        self.figures.add(
            "tasks/s, created to acknowledged",
            tasks as f64 / acknowledged.as_secs_f64(),
        );
        self.figures.add(
            "processor time of the three managers per task, us",
            each(after.0 - cpu.0),
        );
        self.figures.add(
            "processor time of the agents per task, us",
            each(after.1 - cpu.1),
        );
        Ok(())
    }

    async fn creations(&mut self) -> Result<()> {
        let count = self.args.creations;
        self.board.watch_names.store(true, Ordering::Relaxed);
        let control = self.managers.control(1);
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        let mut calls = Vec::with_capacity(count);
        for number in 0..count {
            tick.tick().await;
            let mut control = control.clone();
            calls.push(tokio::spawn(async move {
                let name = format!("one-{number}");
                let begin = Instant::now();
                let request = service(name.clone(), 1, None);
                control.create_service(request).await.map(|_| (name, begin))
            }));
        }
        let mut begun = Vec::with_capacity(count);
        for call in calls {
            begun.push(call.await??);
        }
        self.until("all of them are assigned", || {
            let at = self.board.at.lock();
            begun.iter().all(|(name, _)| at.contains_key(name))
        })
        .await?;
        self.board.watch_names.store(false, Ordering::Relaxed);
        let at = std::mem::take(&mut *self.board.at.lock());
        let mut times: Vec<f64> = begun
            .iter()
            .map(|(name, begin)| at[name].saturating_duration_since(*begin).as_secs_f64() * 1e3)
            .collect();
        self.percentiles(
            "API call -> task at its agent, 100 creations/s, ms",
            &mut times,
        );
        self.until("all tasks are acknowledged", || self.unacknowledged() == 0)
            .await
    }

    fn percentiles(&mut self, name: &str, times: &mut [f64]) {
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
        let (p50, p99, max) = (at(0.5), at(0.99), at(1.0));
        self.figures.add(format!("{name}: p50"), p50);
        self.figures.add(format!("{name}: p99"), p99);
        self.figures.add(format!("{name}: max"), max);
    }

    async fn changes(&mut self) -> Result<()> {
        let mut control = self.managers.control(1);
        let network = control
            .create_network(CreateNetworkRequest {
                spec: Some(NetworkSpec {
                    annotations: Some(named("wide")),
                    driver: "overlay".into(),
                    ..NetworkSpec::default()
                }),
            })
            .await?
            .into_inner();
        let begin = Instant::now();
        let already = self.board.assigned.load(Ordering::Relaxed);
        let before: std::collections::HashSet<_> = self.agents[0].tasks().into_iter().collect();
        let count = self.agents.len();
        let mut request = service("everywhere".into(), 0, Some(network.id));
        let spec = request.spec.get_or_insert_default();
        let placement = Placement {
            max_replicas: 1,
            ..Placement::default()
        };
        spec.task.get_or_insert_default().placement = Some(placement);
        let mut made = control.create_service(request).await?.into_inner().service;
        let step = STEP.max(count / STEPS_MAX);
        for replicas in (step..count + step).step_by(step) {
            let replicas = replicas.min(count) as u64;
            let now = made.take().context("the service that was written")?;
            let meta = now.meta.unwrap_or_default();
            let mut spec = now.spec.unwrap_or_default();
            spec.mode = Some(replicated(replicas));
            let update = UpdateServiceRequest {
                service_id: now.id,
                version: meta.version.unwrap_or_default().index,
                spec: Some(spec),
            };
            made = Some(control.update_service(update).await?.into_inner());
            self.until("a task on every agent", || {
                self.board.assigned.load(Ordering::Relaxed) - already >= replicas
            })
            .await?;
            self.until("all tasks are acknowledged", || self.unacknowledged() == 0)
                .await?;
        }
        self.figures.add(
            "network on every agent, step by step: all RUNNING, s",
            begin.elapsed().as_secs_f64(),
        );
        let task = self.agents[0]
            .tasks()
            .into_iter()
            .find(|task| !before.contains(task));
        let task = task.context("the agent's task on the network")?;
        self.arrived(&mut control, &task).await?;
        let mut times = Vec::new();
        for round in 0..self.args.changes {
            let ready = round % 2 == 0;
            *self.board.probe.lock() = Some(Probe {
                task: task.to_string(),
                ready,
                begun: Instant::now(),
                seen: Vec::with_capacity(count),
            });
            self.board.probing.store(true, Ordering::Relaxed);
            self.agents[0].report_health(&task, ready);
            self.until("the change of an endpoint is on all agents", || {
                self.board
                    .probe
                    .lock()
                    .as_ref()
                    .is_some_and(|probe| probe.seen.len() >= count)
            })
            .await?;
            let seen = self
                .board
                .probe
                .lock()
                .take()
                .map(|probe| probe.seen)
                .unwrap_or_default();
            times.extend(seen.iter().map(|late| late.as_secs_f64() * 1e3));
        }
        self.board.probing.store(false, Ordering::Relaxed);
        self.percentiles("endpoint change -> applied on an agent, ms", &mut times);
        Ok(())
    }

    /// Returns when every agent has what the start of the tasks has left on its way: a task is no longer healthy,
    /// and the state that says so is at all of them.
    async fn arrived(&self, control: &mut ControlClient<Channel>, task: &TaskId) -> Result<()> {
        self.agents[0].report_health(task, false);
        let begin = Instant::now();
        let revision = loop {
            ensure!(
                begin.elapsed() < Duration::from_secs(self.args.patience),
                "the report of an agent was not written within {} s",
                self.args.patience
            );
            let request = GetTaskRequest {
                r#ref: task.to_string(),
            };
            let now = control.get_task(request).await?.into_inner();
            if now.status.is_some_and(|status| !status.healthy) {
                break now.meta.unwrap_or_default().version.unwrap_or_default();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.until("what is on its way has arrived at all agents", || {
            let behind = |agent: &LightAgent| agent.revision() < revision.index;
            !self.agents.iter().any(behind)
        })
        .await
    }

    async fn steady(&mut self) -> Result<()> {
        let lost = self.board.lost.load(Ordering::Relaxed);
        let cpu = self.cpu()?;
        let begin = Instant::now();
        let until = Duration::from_secs(self.args.minutes * 60);
        let mut least = usize::MAX;
        while begin.elapsed() < until {
            tokio::time::sleep(Duration::from_secs(10)).await;
            least = least.min(self.ready().await?);
        }
        let after = self.cpu()?;
        let seconds = begin.elapsed().as_secs_f64();
        let lost = self.board.lost.load(Ordering::Relaxed) - lost;
        self.figures.add(
            format!("{} min steady: sessions lost", self.args.minutes),
            lost as f64,
        );
        self.figures.add("steady: least nodes READY", least as f64);
        self.figures.add(
            "steady: cores used by the managers",
            (after.0 - cpu.0) / seconds,
        );
        self.figures.add(
            "steady: cores used by the agents",
            (after.1 - cpu.1) / seconds,
        );
        ensure!(least >= self.args.agents, "only {least} nodes were READY");
        Ok(())
    }

    async fn restart(&mut self) -> Result<()> {
        self.managers.kill(MANAGERS)?;
        let begin = Instant::now();
        self.managers.start(MANAGERS)?;
        self.managers.serving(MANAGERS).await?;
        self.figures.add(
            "a manager killed: started -> serving, s",
            begin.elapsed().as_secs_f64(),
        );
        self.agents.clear();
        for number in 1..=MANAGERS {
            self.managers.kill(number)?;
        }
        let begin = Instant::now();
        for number in 1..=MANAGERS {
            self.managers.start(number)?;
        }
        for number in 1..=MANAGERS {
            self.managers.serving(number).await?;
        }
        self.figures.add(
            "all managers killed: started -> all serving, s",
            begin.elapsed().as_secs_f64(),
        );
        let mut control = self.managers.control(1);
        let created = control
            .create_service(service("after".into(), 1, None))
            .await;
        if let Err(error) = created {
            bail!("no write after the restart: {error}");
        }
        self.figures.add(
            "all managers killed: started -> a write, s",
            begin.elapsed().as_secs_f64(),
        );
        Ok(())
    }
}

fn named(name: &str) -> Annotations {
    Annotations {
        name: name.to_owned(),
        ..Annotations::default()
    }
}

fn replicated(replicas: u64) -> ServiceMode {
    ServiceMode {
        mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
            replicas: Some(replicas),
        })),
    }
}

fn service(name: String, replicas: u64, network: Option<String>) -> CreateServiceRequest {
    CreateServiceRequest {
        spec: Some(ServiceSpec {
            annotations: Some(named(&name)),
            task: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        image: "registry.example:5000/team/app:1.2.3".into(),
                        env: vec!["MODE=production".into(), "LOG=info".into()],
                        ..ContainerSpec::default()
                    }),
                    networks: network
                        .into_iter()
                        .map(|target| NetworkAttachmentConfig {
                            target,
                            ..NetworkAttachmentConfig::default()
                        })
                        .collect(),
                    ..TaskSpec::default()
                }
                .into(),
            ),
            mode: Some(replicated(replicas)),
            ..ServiceSpec::default()
        }),
    }
}
