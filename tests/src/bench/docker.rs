//! The same services with Docker Swarm, where `dockerd` is installed: three engines on the lab's hosts.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::machine::Conditions;
use super::report::{Report, Samples, Section};
use super::{Background, Bench};
use crate::cluster::{Cluster, PATIENCE, nginx};
use crate::lab::{REGISTRY, wait_until};

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];

/// The part.
///
/// # Errors
/// An engine does not start, or a service does not run.
pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut section = Section::of_figures("Docker Swarm, in s");
    if !bench.with_docker {
        section.note("Not measured: `--with-docker` was not given.");
        report.add(section);
        return Ok(());
    }
    let version = std::process::Command::new("dockerd")
        .arg("--version")
        .output();
    let Ok(version) = version else {
        section.note("Not measured: `dockerd` is not installed.");
        report.add(section);
        return Ok(());
    };
    let mut conditions = Conditions::default();
    conditions.look()?;
    let mut cluster = Cluster::unformed(3)?;
    for host in HOSTS {
        cluster.stop(host)?;
    }
    let engines = HOSTS
        .iter()
        .map(|host| engine(&cluster, host))
        .collect::<Result<Vec<_>>>()?;
    let docker = |host: &str, args: &[&str]| -> Result<String> {
        let output = cluster.run(host, &[&["docker"], args].concat())?;
        ensure!(
            output.status.success(),
            "docker {} on {host}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for host in HOSTS {
        wait_until(PATIENCE, "the engine answers", || {
            docker(host, &["version"]).map(Some)
        })?;
    }
    let mut formed = Samples::default();
    let start = Instant::now();
    docker(
        "h1",
        &["swarm", "init", "--advertise-addr", cluster.addr("h1")?],
    )?;
    let token = docker("h1", &["swarm", "join-token", "-q", "manager"])?;
    for host in ["h2", "h3"] {
        let addr = format!("{}:2377", cluster.addr("h1")?);
        docker(host, &["swarm", "join", "--token", token.trim(), &addr])?;
    }
    formed.push(start.elapsed().as_secs_f64());
    section.figure("three managers formed, from running engines", &formed, None);
    docker("h1", &["network", "create", "--driver", "overlay", "net"])?;
    for host in HOSTS {
        docker(host, &["pull", "-q", &nginx()])?;
    }
    let warm = [
        "service",
        "create",
        "-q",
        "--name",
        "warm",
        "--mode",
        "global",
        "--network",
        "net",
    ];
    let image = nginx();
    docker("h1", &[&warm[..], &[&image]].concat())?;
    for replicas in [1_usize, 20, 60] {
        let (mut creates, mut removals) = (Samples::default(), Samples::default());
        for _ in 0..bench.rounds.min(3) {
            let count = replicas.to_string();
            let start = Instant::now();
            let create = [
                "service",
                "create",
                "-q",
                "-d",
                "--name",
                "web",
                "--network",
                "net",
            ];
            docker(
                "h1",
                &[&create[..], &["--replicas", &count, &image]].concat(),
            )?;
            wait_until(Duration::from_secs(120), "the tasks run", || {
                let format = "{{.CurrentState}}";
                let text = docker("h1", &["service", "ps", "web", "--format", format])?;
                let running = text.lines().filter(|line| line.starts_with("Running"));
                Ok((running.count() == replicas).then_some(()))
            })?;
            creates.push(start.elapsed().as_secs_f64());
            let start = Instant::now();
            docker("h1", &["service", "rm", "web"])?;
            wait_until(Duration::from_secs(120), "the containers are gone", || {
                for host in HOSTS {
                    let left = docker(host, &["ps", "-aq", "--filter", "name=web"])?;
                    if !left.trim().is_empty() {
                        return Ok(None);
                    }
                }
                Ok(Some(()))
            })?;
            removals.push(start.elapsed().as_secs_f64());
        }
        section.figure(
            &format!("service create, {replicas} → Running"),
            &creates,
            None,
        );
        section.figure(&format!("service rm, {replicas} → gone"), &removals, None);
    }
    section.note(String::from_utf8_lossy(&version.stdout).trim().to_owned());
    // The engines end before their hosts do.
    for host in HOSTS {
        let _ = docker(host, &["swarm", "leave", "--force"]);
    }
    drop(engines);
    conditions.look()?;
    section.under(conditions);
    report.add(section);
    Ok(())
}

/// An engine with everything of its own below the host's own directories.
fn engine(cluster: &Cluster, host: &str) -> Result<Background> {
    let log = std::fs::File::create(crate::lab::host_dir(host).join("dockerd.log"))?;
    let mut command = cluster.command(host, "dockerd")?;
    command
        .args([
            "--data-root",
            "/var/lib/swarm/docker",
            "--exec-root",
            "/run/swarm/docker",
        ])
        .args([
            "--pidfile",
            "/run/swarm/docker.pid",
            "--insecure-registry",
            REGISTRY,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Ok(Background(command.spawn().context("starting dockerd")?))
}
