//! Measures a cluster of three hosts on one machine, and the machine's own noise beside it.
//!
//! Every figure is a median over rounds with its least and largest value; the
//! overlay is measured in turns with a hand-made bridge + VXLAN between the same hosts.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox, nginx};
use swarm_tests::lab::wait_until;

/// Round trips of one measurement.
const ROUND_TRIPS: usize = 5000;
/// Bytes each way.
const ROUND_TRIP_BYTES: usize = 64;

#[derive(Parser)]
struct Args {
    /// How often each figure is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Also write the figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What the bench runs inside namespaces.
#[derive(Subcommand)]
enum Part {
    /// Answer each message with itself
    Echo { addr: String },
    /// Print the median round trip in microseconds
    RoundTrip { addr: String },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.part {
        Some(Part::Echo { addr }) => echo(&addr),
        Some(Part::RoundTrip { addr }) => {
            println!("{}", round_trip(&addr)?);
            Ok(())
        }
        None => measure(args.rounds, args.json),
    }
}

/// Name → values, in the order of measuring.
#[derive(Default)]
struct Figures {
    order: Vec<String>,
    values: BTreeMap<String, Vec<f64>>,
}

impl Figures {
    fn add(&mut self, name: &str, value: f64) {
        if !self.values.contains_key(name) {
            self.order.push(name.to_owned());
        }
        self.values.entry(name.to_owned()).or_default().push(value);
        eprintln!("{name}: {value:.3}");
    }

    fn table(&self) -> String {
        let mut text = format!(
            "{:52} {:>10} {:>10} {:>10}\n",
            "figure", "median", "least", "most"
        );
        for name in &self.order {
            let mut sorted = self.values[name].clone();
            sorted.sort_by(f64::total_cmp);
            text += &format!(
                "{name:52} {:>10.3} {:>10.3} {:>10.3}\n",
                sorted[sorted.len() / 2],
                sorted[0],
                sorted[sorted.len() - 1]
            );
        }
        text
    }
}

fn measure(rounds: usize, json: Option<PathBuf>) -> Result<()> {
    ensure!(rounds > 0, "at least one round");
    let mut figures = Figures::default();
    probe(&mut figures, "before")?;
    services(rounds, &mut figures)?;
    failures(rounds, &mut figures)?;
    overlay(rounds, &mut figures)?;
    probe(&mut figures, "after")?;
    println!("{}", figures.table());
    if let Some(path) = json {
        fs::write(&path, serde_json::to_vec_pretty(&figures.values)?)?;
    }
    Ok(())
}

/// What the machine itself does: load, stolen time, the disk's own fdatasync.
fn probe(figures: &mut Figures, when: &str) -> Result<()> {
    let load = fs::read_to_string("/proc/loadavg")?;
    figures.add(
        &format!("machine: load average, {when}"),
        load.split(' ').next().context("a load")?.parse()?,
    );
    let file = tempfile::tempfile_in("/var/lib")?;
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < Duration::from_secs(1) {
        (&file).write_all(&[0; 4096])?;
        file.sync_data()?;
        count += 1;
    }
    figures.add(
        &format!("machine: fdatasync of 4 KiB per second, {when}"),
        f64::from(count) / start.elapsed().as_secs_f64(),
    );
    Ok(())
}

fn services(rounds: usize, figures: &mut Figures) -> Result<()> {
    let start = Instant::now();
    let cluster = Cluster::up(3, 3)?;
    figures.add(
        "s, three managers: swarmd started on none → all Ready",
        start.elapsed().as_secs_f64(),
    );
    memory(&cluster, "idle, manager", "h1", figures)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    // Every host has the image, and the network is warm on all of them.
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
    for _ in 0..rounds {
        for replicas in [1, 20, 60] {
            let start = Instant::now();
            let count = replicas.to_string();
            cluster.service(
                "h1",
                "web",
                replicas,
                &["--network", "net", "--replicas", &count, &nginx()],
            )?;
            figures.add(
                &format!("s, service create → {replicas} RUNNING"),
                start.elapsed().as_secs_f64(),
            );
            if replicas == 60 {
                container_memory(&cluster, figures)?;
            }
            let start = Instant::now();
            cluster.swarm("h1", &["service", "rm", "web"])?;
            wait_until(PATIENCE, "the last container is gone", || {
                let left: usize = ["h1", "h2", "h3"]
                    .iter()
                    .map(|host| sandboxes(&cluster, host))
                    .sum::<Result<_>>()?;
                Ok((left == 3).then_some(()))
            })?;
            figures.add(
                &format!("s, service rm → {replicas} containers gone"),
                start.elapsed().as_secs_f64(),
            );
        }
    }
    memory(&cluster, "after the load, manager", "h1", figures)?;
    Ok(())
}

fn failures(rounds: usize, figures: &mut Figures) -> Result<()> {
    let mut cluster = Cluster::up(3, 1)?;
    memory(&cluster, "idle, worker", "h2", figures)?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--replicas",
            "2",
            "--constraint",
            "node.hostname!=h1",
            &nginx(),
        ],
    )?;
    for round in 0..rounds {
        let (victim, other) = if round % 2 == 0 {
            ("h2", "h3")
        } else {
            ("h3", "h2")
        };
        // Both have a task again.
        cluster.swarm(
            "h1",
            &["service", "update", "--detach", "--replicas", "4", "web"],
        )?;
        cluster.wait_running("h1", "web", 4)?;
        cluster.swarm(
            "h1",
            &["service", "update", "--detach", "--replicas", "2", "web"],
        )?;
        cluster.wait_running("h1", "web", 2)?;
        let start = Instant::now();
        cluster.kill(victim)?;
        wait_until(PATIENCE, "all tasks run elsewhere", || {
            let tasks = cluster.tasks("h1", "web")?;
            Ok((tasks.len() == 2
                && tasks
                    .iter()
                    .all(|t| t.state == "Running" && t.node == other))
            .then_some(()))
        })?;
        figures.add(
            "s, worker killed → its tasks RUNNING elsewhere",
            start.elapsed().as_secs_f64(),
        );
        cluster.start(victim)?;
        cluster.wait_ready(PATIENCE)?;
    }
    drop(cluster);

    let mut cluster = Cluster::up(3, 3)?;
    for round in 0..rounds {
        let listing = cluster.swarm(
            "h1",
            &["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"],
        )?;
        let leader = listing
            .lines()
            .find_map(|line| line.strip_suffix(" Leader"))
            .context("no leader")?
            .to_owned();
        let writer = ["h1", "h2", "h3"]
            .into_iter()
            .find(|host| *host != leader)
            .context("no other")?;
        cluster.kill(&leader)?;
        let start = Instant::now();
        let mut number = 0;
        wait_until(PATIENCE, "a write succeeds", || {
            number += 1;
            let name = format!("net-{round}-{number}");
            cluster
                .swarm(writer, &["network", "create", "--driver", "overlay", &name])
                .map(Some)
        })?;
        figures.add(
            "s, leader killed → next write acknowledged",
            start.elapsed().as_secs_f64(),
        );
        cluster.start(&leader)?;
        cluster.wait_ready(PATIENCE)?;
    }
    Ok(())
}

fn overlay(rounds: usize, figures: &mut Figures) -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.client("h1", "a", "h1", "net")?;
    cluster.client("h1", "b", "h2", "net")?;
    let sandbox = |name: &str| -> Result<String> {
        let id = cluster
            .tasks("h1", name)?
            .first()
            .context("no task")?
            .id
            .clone();
        Ok(format!("/run/swarm/netns/{id}"))
    };
    let (a, b) = (sandbox("a")?, sandbox("b")?);
    let addr = cluster.sh("h1", "a.1", "ip -4 -o addr show eth0 | awk '{print $4}'")?;
    let addr = addr
        .trim()
        .split('/')
        .next()
        .context("an address")?
        .to_owned();

    // The same by hand, between the same hosts.
    for (host, own, other, vtep) in [("h1", 1, 2, "172.30.99.2"), ("h2", 2, 1, "172.30.99.1")] {
        cluster.host_sh(
            host,
            &format!(
                "ip link add hand type vxlan id 77 dstport 4790 remote {vtep} && ip link add handbr type bridge && \
                 ip link set hand master handbr up && ip link set handbr up && ip netns add hand && \
                 ip link add hand0 type veth peer name eth0 netns hand && ip link set hand0 master handbr up && \
                 ip link set hand0 mtu 1450 && ip -n hand link set eth0 mtu 1450 up && \
                 ip -n hand addr add 192.168.77.{own}/24 dev eth0 && ping -c 1 -W 1 192.168.77.{other} >/dev/null 2>&1 || true"
            ),
        )?;
    }
    let hand = "/run/netns/hand".to_owned();
    for _ in 0..rounds {
        for (name, server, client, addr) in [
            ("overlay", &a, &b, addr.as_str()),
            ("bridge + VXLAN by hand", &hand, &hand, "192.168.77.1"),
        ] {
            let (stream, round_trip) = link(&cluster, server, client, addr)?;
            figures.add(&format!("Gbit/s, {name}, one TCP stream"), stream);
            figures.add(&format!("µs, {name}, round trip of 64 bytes"), round_trip);
        }
    }
    for host in ["h1", "h2"] {
        cluster.host_sh(
            host,
            "ip netns del hand; ip link del hand; ip link del handbr",
        )?;
    }
    Ok(())
}

/// Stream in Gbit/s and round trip in µs between a namespace of h1 and one of h2.
fn link(cluster: &Cluster, server: &str, client: &str, addr: &str) -> Result<(f64, f64)> {
    let bench = std::env::current_exe()?.to_string_lossy().into_owned();
    let within = |host: &str, netns: &str, argv: &[&str]| -> Result<std::process::Command> {
        let mut command = cluster.command(host, "nsenter")?;
        command
            .arg(format!("--net={netns}"))
            .args(argv)
            .stdin(Stdio::null());
        Ok(command)
    };
    let mut iperf = Background(
        within("h1", server, &["iperf3", "-s", "-1", "-B", addr])?
            .stdout(Stdio::null())
            .spawn()?,
    );
    let stream = wait_until(PATIENCE, "iperf3 measures", || {
        let output = within("h2", client, &["iperf3", "-J", "-t", "3", "-c", addr])?.output()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(report["end"]["sum_received"]["bits_per_second"].as_f64())
    })?;
    iperf.0.wait()?;
    let addr = format!("{addr}:7777");
    let mut echo = Background(within("h1", server, &[&bench, "echo", &addr])?.spawn()?);
    let round_trip = wait_until(PATIENCE, "the echo answers", || {
        let output = within("h2", client, &[&bench, "round-trip", &addr])?.output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Some(
            String::from_utf8(output.stdout)?.trim().parse::<f64>()?,
        ))
    })?;
    echo.0.wait()?;
    Ok((stream / 1e9, round_trip))
}

/// A process that does not outlive its measurement.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn echo(addr: &str) -> Result<()> {
    let (mut stream, _) = TcpListener::bind(addr)?.accept()?;
    stream.set_nodelay(true)?;
    let mut buffer = [0; ROUND_TRIP_BYTES];
    while stream.read_exact(&mut buffer).is_ok() {
        stream.write_all(&buffer)?;
    }
    Ok(())
}

fn round_trip(addr: &str) -> Result<f64> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let mut buffer = [7; ROUND_TRIP_BYTES];
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn sandboxes(cluster: &Cluster, host: &str) -> Result<usize> {
    let text = cluster.host_sh(
        host,
        "ls /run/swarm/netns 2>/dev/null | grep -vc '^net-' || true",
    )?;
    Ok(text.trim().parse()?)
}

fn memory(cluster: &Cluster, what: &str, host: &str, figures: &mut Figures) -> Result<()> {
    let pid = cluster.swarmd(host)?;
    figures.add(
        &format!("MiB resident, swarmd {what}"),
        rollup(pid.as_raw(), "Rss:")? / 1024.0,
    );
    Ok(())
}

/// Proportional memory of the shims of one host, per container.
fn container_memory(cluster: &Cluster, figures: &mut Figures) -> Result<()> {
    let pids = cluster.host_sh("h1", "pgrep -f '[s]him-sealed' || true")?;
    let own: Vec<i32> = pids.lines().filter_map(|line| line.parse().ok()).collect();
    let mut kib = 0.0;
    for pid in &own {
        kib += rollup(*pid, "Pss:").unwrap_or(0.0);
    }
    if !own.is_empty() {
        figures.add(
            "MiB PSS per container, its shim",
            kib / 1024.0 / own.len() as f64,
        );
    }
    Ok(())
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
