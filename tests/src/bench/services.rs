//! How long services take to start, to go, and to come back after a worker's death; what
//! the daemons and containers weigh.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use swarm_proto::v1::ResolveImageRequest;
use swarm_proto::v1::node_local_client::NodeLocalClient;

use super::api::{Api, service};
use super::machine::Conditions;
use super::report::{Goal, Report, Samples, Section};
use super::{Bench, block_on};
use crate::cluster::{Cluster, PATIENCE, busybox, nginx};
use crate::lab::{Lab, LabConfig, host_dir, wait_until};

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];

/// Replicas, the goal for their start in s, and what Docker Swarm 29.7.2 took on such a machine.
const STARTS: [(usize, f64, &str); 3] = [(1, 0.1, "0.42"), (20, 0.7, "2.8"), (60, 1.9, "7.4")];
/// The goals for their end.
const ENDS: [f64; 3] = [1.5, 1.9, 2.8];

/// The part.
///
/// # Errors
/// A step of the cluster failed.
pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut conditions = Conditions::default();
    conditions.look()?;
    let mut section = Section::of_figures("Services, in s");
    let measured = starts(bench, &mut section).and_then(|()| workers(bench, &mut section));
    section.note(
        "Three hosts, all of them managers, except where a worker dies. A start is from the start of `swarm service create \
         --detach` (which asks the registry for the digest) to the last task RUNNING in a watch of the API; every \
         host has the image, the overlay is there. An end is from the start of `swarm service rm` to the last sandbox gone. \
         Goals of a start are a quarter of what Docker Swarm 29.7.2 took on such a machine (0.42, 2.8, 7.4 s), of an end the same (5.9, 7.6, 11.3 s); \
         a killed worker's tasks took it 14.7 s, three managers 1.6 s.",
    );
    conditions.look()?;
    section.under(conditions);
    // What was measured before a step failed counts.
    report.add(section);
    measured
}

fn starts(bench: &Bench, section: &mut Section) -> Result<()> {
    let mut formed = Samples::default();
    for _ in 1..bench.rounds.min(3) {
        let lab = Lab::up(&LabConfig::new(3, 3)?)?;
        let took = lab.formed_in();
        lab.down()?;
        formed.push(took.context("a cluster")?.as_secs_f64());
    }
    let cluster = Cluster::up(3, 3)?;
    formed.push(cluster.formed_in().context("a cluster")?.as_secs_f64());
    section.figure(
        "three managers formed, from no swarmd running",
        &formed,
        Some(Goal::AtMost(0.4)),
    );
    let manager = memory(&cluster, "h1")?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "warm",
        3,
        &[
            "--mode",
            "global",
            "--network",
            "net",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    cluster.service(
        "h1",
        "image",
        3,
        &["--mode", "global", "--network", "net", &nginx()],
    )?;
    cluster.swarm("h1", &["service", "rm", "image"])?;
    wait_gone(1)?;

    let mut creates: Vec<Samples> = vec![Samples::default(); STARTS.len()];
    let mut removals = creates.clone();
    let mut api_creates = Samples::default();
    let mut shims = Samples::default();
    for _ in 0..bench.rounds {
        for (index, &(replicas, ..)) in STARTS.iter().enumerate() {
            let (count, image) = (replicas.to_string(), nginx());
            let args = [
                "service",
                "create",
                "--detach",
                "--name",
                "web",
                "--network",
                "net",
            ];
            let args = [&args[..], &["--replicas", &count, &image]].concat();
            creates[index].push(started(replicas, || cluster.swarm("h1", &args).map(drop))?);
            if replicas == 60 {
                shims.push(shim_memory(&cluster)?);
            }
            let start = Instant::now();
            cluster.swarm("h1", &["service", "rm", "web"])?;
            wait_gone(1)?;
            removals[index].push(start.elapsed().as_secs_f64());
        }
        api_creates.push(by_api()?);
        cluster.swarm("h1", &["service", "rm", "web"])?;
        wait_gone(1)?;
    }
    for (index, &(replicas, goal, _)) in STARTS.iter().enumerate() {
        section.figure(
            &format!("service create, {replicas} → RUNNING"),
            &creates[index],
            Some(Goal::AtMost(goal)),
        );
    }
    section.figure(
        "the same by the API, 1, image given by digest",
        &api_creates,
        None,
    );
    for (index, &(replicas, ..)) in STARTS.iter().enumerate() {
        section.figure(
            &format!("service rm, {replicas} → gone"),
            &removals[index],
            Some(Goal::AtMost(ENDS[index])),
        );
    }
    section.figure(
        "MiB resident, idle manager",
        &one(manager),
        Some(Goal::AtMost(35.0)),
    );
    section.figure(
        "MiB resident, manager after the load",
        &one(memory(&cluster, "h1")?),
        None,
    );
    section.figure(
        "MiB (PSS) per container, its shim",
        &shims,
        Some(Goal::AtMost(1.0)),
    );
    Ok(())
}

fn one(value: f64) -> Samples {
    let mut samples = Samples::default();
    samples.push(value);
    samples
}

/// From the call of `create` until so many tasks of web run, in s.
fn started(count: usize, create: impl FnOnce() -> Result<()>) -> Result<f64> {
    block_on(async {
        let mut tasks = Api::local("h1").tasks().await?;
        let start = Instant::now();
        create()?;
        tasks.until("web", |nodes| nodes.len() == count).await?;
        Ok(start.elapsed().as_secs_f64())
    })
}

fn by_api() -> Result<f64> {
    block_on(async {
        let mut api = Api::local("h1");
        let mut local = NodeLocalClient::new(Api::channel("h1"));
        let request = ResolveImageRequest {
            image: nginx(),
            ..ResolveImageRequest::default()
        };
        let image = local.resolve_image(request).await?.into_inner().image;
        let network = api.network("net").await?;
        let mut tasks = api.tasks().await?;
        let start = Instant::now();
        api.create(service("web", 1, &image, &[&network])).await?;
        tasks.until("web", |nodes| nodes.len() == 1).await?;
        Ok(start.elapsed().as_secs_f64())
    })
}

/// Until each host has only so many sandboxes.
fn wait_gone(left: usize) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut most = 0;
        for host in HOSTS {
            most = most.max(sandboxes(host)?);
        }
        if most <= left {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < end, "sandboxes stay: {most} on a host");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn sandboxes(host: &str) -> Result<usize> {
    let names = match fs::read_dir(host_dir(host).join("run/netns")) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    let mut count = 0;
    for name in names {
        count += usize::from(!name?.file_name().to_string_lossy().starts_with("net-"));
    }
    Ok(count)
}

fn workers(bench: &Bench, section: &mut Section) -> Result<()> {
    let mut cluster = Cluster::up(3, 1)?;
    let worker = memory(&cluster, "h2")?;
    let constraint = "node.hostname!=h1";
    let image = nginx();
    let args = ["--replicas", "2", "--constraint", constraint, &image];
    cluster.service("h1", "web", 2, &args)?;
    let mut moved = Samples::default();
    for round in 0..bench.rounds.min(5) {
        let (victim, other) = if round % 2 == 0 {
            ("h2", "h3")
        } else {
            ("h3", "h2")
        };
        // Both have a task again.
        for replicas in ["4", "2"] {
            let update = [
                "service",
                "update",
                "--detach",
                "--replicas",
                replicas,
                "web",
            ];
            cluster.swarm("h1", &update)?;
            cluster.wait_running("h1", "web", replicas.parse()?)?;
        }
        let other = cluster.swarm("h1", &["node", "inspect", "--format", "{{.ID}}", other])?;
        let other = other.trim();
        let took = block_on(async {
            let mut tasks = Api::local("h1").tasks().await?;
            let start = Instant::now();
            cluster.kill(victim)?;
            tasks
                .until("web", |nodes| {
                    nodes.len() == 2 && nodes.iter().all(|node| *node == other)
                })
                .await?;
            Ok(start.elapsed().as_secs_f64())
        })?;
        moved.push(took);
        cluster.start(victim)?;
        cluster.wait_ready(PATIENCE)?;
    }
    section.figure(
        "worker killed → its tasks RUNNING elsewhere",
        &moved,
        Some(Goal::AtMost(5.0)),
    );
    section.figure(
        "MiB resident, idle worker",
        &one(worker),
        Some(Goal::AtMost(35.0)),
    );
    Ok(())
}

/// Resident memory of a host's swarmd in MiB.
fn memory(cluster: &Cluster, host: &str) -> Result<f64> {
    let pid = cluster.swarmd(host)?;
    Ok(rollup(pid.as_raw(), "Rss:")? / 1024.0)
}

/// Proportional memory of the shims of h1, per container, in MiB.
fn shim_memory(cluster: &Cluster) -> Result<f64> {
    let pids = wait_until(PATIENCE, "there are shims", || {
        let text = cluster.host_sh("h1", "pgrep -f '[s]him-sealed' || true")?;
        let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        Ok((!pids.is_empty()).then_some(pids))
    })?;
    let kib: f64 = pids
        .iter()
        .map(|&pid| rollup(pid, "Pss:").unwrap_or(0.0))
        .sum();
    Ok(kib / 1024.0 / pids.len() as f64)
}

/// A line of a process's memory map summary, in KiB.
fn rollup(pid: i32, line: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    text.lines()
        .find_map(|l| l.strip_prefix(line))
        .and_then(|rest| rest.trim().split(' ').next())
        .context("a size")?
        .parse()
        .context("a number")
}
