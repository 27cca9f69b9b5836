//! A lab that is removed when a test ends, and what tests ask of it.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::lab::{Lab, LabConfig, REGISTRY, wait_until};

/// How long a cluster may take for anything that should take a second: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A lab for one test: removed when dropped, also after a failure.
pub struct Cluster {
    lab: Lab,
}

/// A line of `service ps`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskLine {
    /// Full ID.
    pub id: String,
    /// "web.1"
    pub name: String,
    /// Host name.
    pub node: String,
    /// "Running"
    pub state: String,
}

impl Cluster {
    /// `hosts` hosts, the first `managers` of them managers, all Ready.
    ///
    /// # Errors
    /// A step failed; nothing is left.
    pub fn up(hosts: usize, managers: usize) -> Result<Self> {
        Ok(Self {
            lab: Lab::up(&LabConfig::new(hosts, managers)?)?,
        })
    }

    /// Hosts on which swarmd runs, in no cluster yet.
    ///
    /// # Errors
    /// A step failed; nothing is left.
    pub fn unformed(hosts: usize) -> Result<Self> {
        let mut config = LabConfig::new(hosts, 1)?;
        config.form = false;
        Ok(Self {
            lab: Lab::up(&config)?,
        })
    }

    /// The tasks of a service that should run, as `host` sees them.
    ///
    /// # Errors
    /// `swarm` failed.
    pub fn tasks(&self, host: &str, service: &str) -> Result<Vec<TaskLine>> {
        let text = self.swarm(
            host,
            &[
                "service",
                "ps",
                service,
                "--no-trunc",
                "--filter",
                "desired-state=running",
                "--format",
                "{{.ID}}|{{.Name}}|{{.Node}}|{{.CurrentState}}",
            ],
        )?;
        text.lines()
            .map(|line| {
                let mut parts = line.split('|').map(str::to_owned);
                let mut next = || {
                    parts
                        .next()
                        .with_context(|| format!("a line of service ps: {line}"))
                };
                Ok(TaskLine {
                    id: next()?,
                    name: next()?,
                    node: next()?,
                    state: next()?.split(' ').next().unwrap_or_default().to_owned(),
                })
            })
            .collect()
    }

    /// Returns the tasks once exactly `count` run and no others should.
    ///
    /// # Errors
    /// Not within [`PATIENCE`]; the error has what `service ps` says.
    pub fn wait_running(&self, host: &str, service: &str, count: usize) -> Result<Vec<TaskLine>> {
        wait_until(PATIENCE, &format!("{count} tasks of {service} run"), || {
            let mut tasks = self.tasks(host, service)?;
            tasks.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(
                (tasks.len() == count && tasks.iter().all(|task| task.state == "Running"))
                    .then_some(tasks),
            )
        })
        .with_context(|| {
            self.swarm(host, &["service", "ps", "--no-trunc", service])
                .unwrap_or_default()
        })
    }

    /// Creates a service in the background and waits until `count` of its tasks run.
    ///
    /// # Errors
    /// It was refused, or its tasks do not run.
    pub fn service(
        &self,
        host: &str,
        name: &str,
        count: usize,
        args: &[&str],
    ) -> Result<Vec<TaskLine>> {
        let mut all = vec!["service", "create", "--detach", "--name", name];
        all.extend(args);
        self.swarm(host, &all)?;
        self.wait_running(host, name, count)
    }

    /// A busybox that sleeps, on a network and pinned to a host.
    ///
    /// # Errors
    /// As [`Cluster::service`].
    pub fn client(&self, manager: &str, name: &str, host: &str, network: &str) -> Result<()> {
        let constraint = format!("node.hostname=={host}");
        self.service(
            manager,
            name,
            1,
            &[
                "--network",
                network,
                "--constraint",
                &constraint,
                &busybox(),
                "sleep",
                "1000000",
            ],
        )
        .map(drop)
    }

    /// The host whose manager leads, as `asked` sees it.
    ///
    /// # Errors
    /// `swarm` failed, or none is marked.
    pub fn leader(&self, asked: &str) -> Result<String> {
        let listing = self.swarm(
            asked,
            &["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"],
        )?;
        listing
            .lines()
            .find_map(|line| line.strip_suffix(" Leader"))
            .map(str::to_owned)
            .context("node ls marks no leader")
    }

    /// "Ready" or "Down": what the host that is asked says of another.
    ///
    /// # Errors
    /// `swarm` failed, or there is no such node.
    pub fn status_of(&self, asked: &str, host: &str) -> Result<String> {
        let listing = self.swarm(
            asked,
            &["node", "ls", "--format", "{{.Hostname}} {{.Status}}"],
        )?;
        listing
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{host} ")))
            .map(str::to_owned)
            .context("no such node")
    }

    /// Runs a command on a host and returns its exit status and what it said on standard error.
    ///
    /// # Errors
    /// It could not be started.
    pub fn attempt(&self, host: &str, argv: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.run(host, argv)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code(), said))
    }

    /// A connection to `addr`:2377 that sends `first` (as in a Python string of bytes) and then
    /// nothing. It is there when this returns; the process ends when the other side ends it.
    ///
    /// # Errors
    /// It was not accepted.
    pub fn half_open(&self, host: &str, addr: &str, first: &str) -> Result<std::process::Child> {
        let script = format!(
            "import socket, sys\n\
             s = socket.create_connection(('{addr}', 2377))\n\
             s.sendall(b'{first}')\n\
             print('connected', flush=True)\n\
             try:\n    s.recv(1)\nexcept OSError:\n    pass\n"
        );
        let mut child = self
            .command(host, "/usr/bin/python3")?
            .args(["-c", &script])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("a pipe")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
        ensure!(line == "connected\n", "no connection to {addr}: {line}");
        Ok(child)
    }

    /// The log of a host's swarmd.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self, host: &str) -> Result<String> {
        let path = crate::lab::host_dir(host).join("swarmd.log");
        Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
    }

    /// Runs a shell script in a task's container and returns what it prints.
    ///
    /// # Errors
    /// It exits with another status than 0.
    pub fn sh(&self, host: &str, task: &str, script: &str) -> Result<String> {
        self.swarm(host, &["exec", task, "sh", "-c", script])
    }

    /// Runs a shell script on a host and returns what it prints.
    ///
    /// # Errors
    /// It exits with another status than 0.
    pub fn host_sh(&self, host: &str, script: &str) -> Result<String> {
        let output = self.run(host, &["sh", "-c", script])?;
        ensure!(
            output.status.success(),
            "{script} on {host}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The image of a web server.
#[must_use]
pub fn nginx() -> String {
    format!("{REGISTRY}/nginx")
}

/// The image of a shell with tools.
#[must_use]
pub fn busybox() -> String {
    format!("{REGISTRY}/busybox")
}

impl Deref for Cluster {
    type Target = Lab;
    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl DerefMut for Cluster {
    fn deref_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in self.lab.hosts() {
                let log = crate::lab::host_dir(&host).join("swarmd.log");
                let text = std::fs::read_to_string(log).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- {host}: end of swarmd's log");
                for line in &lines[lines.len().saturating_sub(40)..] {
                    eprintln!("{line}");
                }
            }
        }
        if std::env::var_os("SWARM_LAB_KEEP").is_none()
            && let Err(error) = self.lab.down()
        {
            eprintln!("removing the lab: {error:#}");
        }
    }
}
