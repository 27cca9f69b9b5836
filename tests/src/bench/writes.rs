//! Writes of three managers against three members of etcd: on the same hosts and disk, over
//! mutual TLS, by the same client, in turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use serde::Serialize;
use serde_json::json;

use super::load::{Kind, Seen};
use super::machine::Conditions;
use super::report::{Goal, Report, Samples, Section, number};
use super::{Background, Bench, leader};
use crate::cluster::{Cluster, PATIENCE};
use crate::lab::{host_dir, wait_until};

const MEMBERS: [&str; 3] = ["h1", "h2", "h3"];
/// Where the client runs: a worker without tasks.
const CLIENT: &str = "h4";
/// How many write at the same time, and how often etcd's rate is to be reached.
const WRITERS: [(usize, f64); 4] = [(1, 1.2), (64, 2.5), (256, 2.5), (1024, 2.5)];
const KINDS: [Kind; 3] = [Kind::Api, Kind::Propose, Kind::Etcd];

/// The part.
///
/// # Errors
/// A step of a cluster failed, or etcd is not installed.
pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let cluster = Cluster::up(4, 3)?;
    let etcd = Etcd::start(&cluster)?;
    let mut section = Section::new(
        "Writes of 256 bytes, against etcd",
        &[
            "writers",
            "by",
            "writes/s",
            "p50 ms",
            "p99 ms",
            "max ms",
            "writes per sync of a member",
            "CPU µs per write",
            "times etcd",
            "goal",
        ],
    );
    let mut conditions = Conditions::default();
    let mut before = conditions.look()?;
    for (writers, goal) in WRITERS {
        let mut seen: Vec<Vec<Round>> = vec![Vec::new(); KINDS.len()];
        let mut ratios = [Samples::default(), Samples::default()];
        let rounds = bench.rounds.min(3);
        let mut unsteady = 0;
        for round in 0..rounds {
            // Each goes first in turn.
            for turn in 0..KINDS.len() {
                let index = (round + turn) % KINDS.len();
                seen[index].push(load(&cluster, &etcd, KINDS[index], writers, bench.seconds)?);
            }
            let after = conditions.look()?;
            let rate = |index: usize| {
                let seen = &seen[index][round].seen;
                seen.writes as f64 / seen.seconds
            };
            if before.steady(&after) {
                ratios[0].push(rate(0) / rate(2));
                ratios[1].push(rate(1) / rate(2));
            } else {
                unsteady += 1;
            }
            before = after;
        }
        for (index, kind) in KINDS.into_iter().enumerate() {
            let (times, verdict) = match ratios.get(index) {
                None => (String::new(), String::new()),
                Some(ratios) if ratios.is_empty() => (
                    "not called: the disk moved by more than 30 %".to_owned(),
                    String::new(),
                ),
                Some(ratios) => {
                    let goal = Goal::AtLeast(goal);
                    let met = if goal.met(ratios.p50()) {
                        "met"
                    } else {
                        "not met"
                    };
                    (number(ratios.p50()), format!("{}: {met}", goal_text(goal)))
                }
            };
            row(&mut section, writers, kind, &seen[index], times, verdict);
        }
        if unsteady > 0 {
            section.note(format!(
                "With {writers} writers, {unsteady} of {rounds} rounds count for no ratio: the disk's own rate moved by more than 30 %."
            ));
        }
    }
    section.note(
        "API: `Control.UpdateService` of a label of 256 bytes of a service without replicas, its version expected; one service for each writer. \
         Propose: the same transaction by `Raft.Propose`, as a manager forwards it. etcd: `Put` of a value of 256 bytes, one key for each writer. \
         All over mutual TLS (TLS 1.3, ECDSA P-256) to the leader, from another host, by the same client with 4 connections at most; the figures are medians over the rounds, \
         `max` the largest of all, the ratio the median of the ratios of each round. Syncs are counted by the kernel at the system calls fdatasync and fsync of the three processes (`perf stat`), \
         and divided by three. CPU is what the three processes took together, which a busy machine changes least. Each side idles while the other is measured.",
    );
    section.note(format!("etcd: {}.", etcd.version()?));
    section.under(conditions);
    report.add(section);
    Ok(())
}

fn goal_text(goal: Goal) -> String {
    match goal {
        Goal::AtLeast(limit) => format!("≥ {}", number(limit)),
        Goal::AtMost(limit) => format!("≤ {}", number(limit)),
    }
}

fn row(
    section: &mut Section,
    writers: usize,
    kind: Kind,
    rounds: &[Round],
    times: String,
    verdict: String,
) {
    let median = |value: &dyn Fn(&Seen) -> f64| {
        let mut samples = Samples::default();
        rounds
            .iter()
            .for_each(|round| samples.push(value(&round.seen)));
        samples
    };
    let rate = median(&|seen| seen.writes as f64 / seen.seconds);
    let mut per_sync = Samples::default();
    let mut cpu = Samples::default();
    for Round {
        seen,
        syncs,
        cpu: used,
    } in rounds
    {
        if let Some(syncs) = syncs.filter(|&syncs| syncs > 0.0) {
            per_sync.push(seen.writes as f64 / seen.seconds / syncs);
        }
        cpu.push(used * 1e6 / seen.total as f64);
    }
    let name = match kind {
        Kind::Api => "API",
        Kind::Propose => "Propose",
        Kind::Etcd => "etcd",
    };
    let errors: u64 = rounds.iter().map(|round| round.seen.errors).sum();
    if errors > 0 {
        let said = rounds.iter().find_map(|round| round.seen.error.clone());
        section.note(format!(
            "{name}, {writers} writers: {errors} writes failed: {}.",
            said.unwrap_or_default()
        ));
    }
    let synced = if per_sync.is_empty() {
        "not counted".to_owned()
    } else {
        number(per_sync.p50())
    };
    section.row(vec![
        writers.to_string(),
        name.to_owned(),
        number(rate.p50()),
        number(median(&|seen| seen.p50).p50()),
        number(median(&|seen| seen.p99).p50()),
        number(median(&|seen| seen.max).max()),
        synced,
        number(cpu.p50()),
        times,
        verdict,
    ]);
    section.value(&format!("{writers} {name}"), json!(rounds));
}

/// One load.
#[derive(Clone, Debug, Serialize)]
struct Round {
    seen: Seen,
    /// How often a member synced per second.
    syncs: Option<f64>,
    /// Seconds of CPU that the three members took together.
    cpu: f64,
}

/// Runs a load.
fn load(cluster: &Cluster, etcd: &Etcd, kind: Kind, writers: usize, seconds: f64) -> Result<Round> {
    let (host, port, identity, pids) = match kind {
        Kind::Etcd => {
            let identity = etcd.dir.to_string_lossy().into_owned();
            (etcd.leader(cluster)?, 2379, identity, etcd.pids())
        }
        Kind::Api | Kind::Propose => {
            let pids = MEMBERS
                .iter()
                .map(|host| Ok(cluster.swarmd(host)?.as_raw()))
                .collect::<Result<Vec<i32>>>()?;
            (leader(cluster)?, 2377, "h1".to_owned(), pids)
        }
    };
    let kind = match kind {
        Kind::Api => "api",
        Kind::Propose => "propose",
        Kind::Etcd => "etcd",
    };
    let addr = format!("{}:{port}", cluster.addr(&host)?);
    let bench = std::env::current_exe()?;
    let mut command = cluster.command(CLIENT, &bench.to_string_lossy())?;
    command
        .args([
            "load",
            "--kind",
            kind,
            "--addr",
            &addr,
            "--identity",
            &identity,
        ])
        .args([
            "--writers",
            &writers.to_string(),
            "--seconds",
            &seconds.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let counter = Counter::start(&pids);
    let before = cpu_of(&pids)?;
    let output = command.spawn()?.wait_with_output()?;
    let cpu = cpu_of(&pids)? - before;
    let syncs = counter.and_then(Counter::stop);
    ensure!(output.status.success(), "the load {kind} has failed");
    let seen: Seen = serde_json::from_slice(&output.stdout)?;
    ensure!(
        seen.writes > 0,
        "no write of {kind} was acknowledged: {:?}",
        seen.error
    );
    Ok(Round {
        seen,
        syncs: syncs.map(|rate| rate / MEMBERS.len() as f64),
        cpu,
    })
}

/// Seconds of CPU that processes have taken so far.
fn cpu_of(pids: &[i32]) -> Result<f64> {
    // What the kernel calls a clock tick here, whatever its own timer does.
    const TICKS: f64 = 100.0;
    let mut ticks = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, fields) = stat.rsplit_once(") ").context("a line of /proc/PID/stat")?;
        let fields = fields.split(' ').skip(11).take(2);
        ticks += fields
            .filter_map(|field| field.parse::<u64>().ok())
            .sum::<u64>();
    }
    Ok(ticks as f64 / TICKS)
}

/// Counts system calls that sync, through the kernel's tracepoints.
struct Counter(Child);

impl Counter {
    fn start(pids: &[i32]) -> Option<Self> {
        let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
        // Half a second of warming up, then as long as the shortest load.
        let mut perf = Command::new("perf");
        perf.args([
            "stat",
            "-x",
            ",",
            "-e",
            "syscalls:sys_enter_fdatasync,syscalls:sys_enter_fsync",
        ])
        .args(["-D", "700", "-p", &pids.join(","), "--timeout", "2000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
        perf.spawn().ok().map(Self)
    }

    /// Syncs per second, of all processes together; `None` if this machine cannot count.
    fn stop(self) -> Option<f64> {
        let output = self.0.wait_with_output().ok()?;
        let text = String::from_utf8_lossy(&output.stderr);
        let counts: Vec<f64> = text
            .lines()
            .filter(|line| line.contains("sys_enter_"))
            .filter_map(|line| line.split(',').next()?.parse().ok())
            .collect();
        (!counts.is_empty()).then(|| counts.iter().sum::<f64>() / 2.0)
    }
}

/// Three members of etcd on the hosts of the managers.
struct Etcd {
    /// Certificates.
    dir: PathBuf,
    members: Vec<Background>,
}

impl Etcd {
    fn start(cluster: &Cluster) -> Result<Self> {
        let dir = host_dir("etcd");
        fs::create_dir_all(&dir)?;
        let addrs = MEMBERS
            .iter()
            .map(|host| cluster.addr(host).map(str::to_owned))
            .collect::<Result<Vec<_>>>()?;
        certificates(&dir, &addrs)?;
        let peers: Vec<String> = MEMBERS
            .iter()
            .zip(&addrs)
            .map(|(host, addr)| format!("{host}=https://{addr}:2380"))
            .collect();
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (cert, key, root) = (file("cert.pem"), file("key.pem"), file("ca.pem"));
        let mut members = Vec::new();
        for (host, addr) in MEMBERS.iter().zip(&addrs) {
            let log = fs::File::create(dir.join(format!("{host}.log")))?;
            let mut command = cluster.command(host, "etcd")?;
            command
                .args(["--name", host, "--data-dir", "/var/lib/swarm/etcd-bench"])
                .args([
                    "--initial-advertise-peer-urls",
                    &format!("https://{addr}:2380"),
                ])
                .args(["--listen-peer-urls", &format!("https://{addr}:2380")])
                .args(["--listen-client-urls", &format!("https://{addr}:2379")])
                .args(["--advertise-client-urls", &format!("https://{addr}:2379")])
                .args([
                    "--initial-cluster",
                    &peers.join(","),
                    "--initial-cluster-state",
                    "new",
                ])
                .args([
                    "--cert-file",
                    &cert,
                    "--key-file",
                    &key,
                    "--trusted-ca-file",
                    &root,
                ])
                .args([
                    "--peer-cert-file",
                    &cert,
                    "--peer-key-file",
                    &key,
                    "--peer-trusted-ca-file",
                    &root,
                ])
                .args(["--client-cert-auth", "--peer-client-cert-auth"])
                // Its history is not what is measured.
                .args([
                    "--auto-compaction-mode",
                    "revision",
                    "--auto-compaction-retention",
                    "10000",
                ])
                .args(["--logger", "zap", "--log-outputs", "stderr"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log);
            let member = command.spawn();
            members.push(Background(
                member.context("starting etcd; is etcd-server installed?")?,
            ));
        }
        let etcd = Self { dir, members };
        etcd.leader(cluster)?;
        Ok(etcd)
    }

    fn pids(&self) -> Vec<i32> {
        let pid = |member: &Background| i32::try_from(member.0.id()).ok();
        self.members.iter().filter_map(pid).collect()
    }

    fn leader(&self, cluster: &Cluster) -> Result<String> {
        let bench = std::env::current_exe()?.to_string_lossy().into_owned();
        wait_until(PATIENCE, "etcd has a leader", || {
            for host in MEMBERS {
                let addr = format!("{}:2379", cluster.addr(host)?);
                let dir = self.dir.to_string_lossy();
                let asked = cluster.run(CLIENT, &[&bench, "etcd-leads", &addr, &dir])?;
                if asked.status.success() && asked.stdout.starts_with(b"true") {
                    return Ok(Some(host.to_owned()));
                }
            }
            Ok(None)
        })
    }

    fn version(&self) -> Result<String> {
        let output = Command::new("etcd").arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

/// One certificate for all members and the client, which also says what a manager's says, so that
/// the client is the same to the last step.
fn certificates(dir: &Path, addrs: &[String]) -> Result<()> {
    let day = Duration::from_secs(24 * 3600);
    let now = std::time::SystemTime::now();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut root = CertificateParams::default();
    root.distinguished_name.push(DnType::CommonName, "bench");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    root.not_before = (now - day).into();
    root.not_after = (now + day).into();
    let root_pem = root.self_signed(&key)?.pem();
    let issuer = Issuer::from_ca_cert_pem(&root_pem, key)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut names = vec!["swarm-manager".to_owned()];
    names.extend(addrs.iter().cloned());
    let mut leaf = CertificateParams::new(names)?;
    leaf.distinguished_name = rcgen::DistinguishedName::new();
    for (kind, value) in [
        (DnType::OrganizationName, "bench"),
        (DnType::OrganizationalUnitName, "swarm-manager"),
        (DnType::CommonName, "bench"),
    ] {
        leaf.distinguished_name.push(kind, value);
    }
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    leaf.not_before = (now - day).into();
    leaf.not_after = (now + day).into();
    let leaf = leaf.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.pem"), &root_pem)?;
    fs::write(dir.join("cert.pem"), format!("{}{root_pem}", leaf.pem()))?;
    fs::write(dir.join("key.pem"), key.serialize_pem())?;
    Ok(())
}
