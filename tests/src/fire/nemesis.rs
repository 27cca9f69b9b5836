//! Breaks one thing of a running cluster after another, and repairs it.
//!
//! Each fault holds for a while and is then healed; the next one comes when every
//! manager is there again and a write has been acknowledged. Faults never take more
//! than a minority at once, except that a leader may be cut off from all others.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::workload::Shared;
use crate::cluster::PATIENCE;
use crate::lab::{Lab, host_dir, wait_until};

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, then started again.
    Kill(Victim),
    /// SIGSTOP, then SIGCONT.
    Pause(Victim),
    /// No packet between it and any other, both ways.
    Cut(Victim),
    /// It hears all others, and is heard by none.
    Mute(Victim),
    /// It is heard by all others, and hears none.
    Deafen(Victim),
    /// A tenth of its packets is lost.
    Loss(Victim),
    /// Each sync takes 300 ms longer.
    SlowDisk(Victim),
    /// No space left on its disk: it ends by itself.
    FullDisk,
    /// One clock is ahead, another behind.
    Skew,
    /// A manager becomes a worker, and once it knows, a manager again.
    Demote,
    /// A manager becomes a worker, and a manager again, whether or not it has noticed.
    DemoteBriefly,
    /// A manager loses its disk, is removed, and joins as a new one.
    Wipe,
}

/// Whom it happens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// Whoever leads.
    Leader,
    /// Somebody else.
    Follower,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, victim) = match self {
            Self::Kill(victim) => ("kill -9", victim),
            Self::Pause(victim) => ("pause", victim),
            Self::Cut(victim) => ("cut off", victim),
            Self::Mute(victim) => ("mute", victim),
            Self::Deafen(victim) => ("deafen", victim),
            Self::Loss(victim) => ("10% loss at", victim),
            Self::SlowDisk(victim) => ("slow disk of", victim),
            Self::FullDisk => return f.write_str("full disk of follower"),
            Self::Skew => return f.write_str("skewed clocks"),
            Self::Demote => return f.write_str("demote and promote"),
            Self::DemoteBriefly => return f.write_str("briefly a worker"),
            Self::Wipe => return f.write_str("wipe and rejoin"),
        };
        let victim = match victim {
            Victim::Leader => "leader",
            Victim::Follower => "follower",
        };
        write!(f, "{what} {victim}")
    }
}

/// Every fault, in the order of the first round.
pub const ALL: &[Fault] = &[
    Fault::Kill(Victim::Leader),
    Fault::Pause(Victim::Leader),
    Fault::Cut(Victim::Leader),
    Fault::SlowDisk(Victim::Leader),
    Fault::Demote,
    Fault::DemoteBriefly,
    Fault::Mute(Victim::Leader),
    Fault::Deafen(Victim::Leader),
    Fault::FullDisk,
    Fault::Skew,
    Fault::Wipe,
    Fault::Loss(Victim::Leader),
    Fault::Kill(Victim::Follower),
    Fault::Pause(Victim::Follower),
    Fault::Cut(Victim::Follower),
    Fault::Mute(Victim::Follower),
    Fault::Deafen(Victim::Follower),
    Fault::SlowDisk(Victim::Follower),
];

/// The one that breaks things.
pub struct Nemesis<'a> {
    lab: &'a mut Lab,
    shared: &'a Shared,
    /// How long each fault holds.
    hold: Duration,
}

impl<'a> Nemesis<'a> {
    /// Faults of `lab`, each for `hold`.
    pub fn new(lab: &'a mut Lab, shared: &'a Shared, hold: Duration) -> Self {
        Self { lab, shared, hold }
    }

    /// Lets it happen, repairs it, and returns when the cluster is whole again.
    ///
    /// # Errors
    /// The cluster did not get over it, or a verb of the lab failed.
    pub fn strike(&mut self, fault: Fault) -> Result<()> {
        self.shared.event(&fault.to_string());
        let struck = self.happen(fault);
        self.lab.heal()?;
        struck.with_context(|| format!("while this happened: {fault}"))?;
        self.recovered()
            .with_context(|| format!("after this was repaired: {fault}"))
    }

    fn happen(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Kill(victim) => {
                let host = self.find(victim)?;
                self.lab.kill(&host)?;
                self.hold();
                self.lab.start(&host)
            }
            Fault::Pause(victim) => {
                let host = self.find(victim)?;
                self.lab.pause(&host)?;
                self.hold();
                self.lab.resume(&host)
            }
            Fault::Cut(victim) => self.towards(victim, |lab, host, other| lab.cut(host, other)),
            Fault::Mute(victim) => {
                self.towards(victim, |lab, host, other| lab.cut_one_way(host, other))
            }
            Fault::Deafen(victim) => {
                self.towards(victim, |lab, host, other| lab.cut_one_way(other, host))
            }
            Fault::Loss(victim) => {
                let host = self.find(victim)?;
                self.lab.lose(&host, 1000)?;
                self.hold();
                Ok(())
            }
            Fault::SlowDisk(victim) => {
                let host = self.find(victim)?;
                self.lab.slow_disk(&host, Duration::from_millis(300))?;
                self.hold();
                Ok(())
            }
            Fault::FullDisk => {
                let host = self.find(Victim::Follower)?;
                self.lab.full_disk(&host)?;
                wait_until(PATIENCE, "the manager without space ends itself", || {
                    Ok(self.lab.swarmd(&host).is_err().then_some(()))
                })?;
                self.lab.heal()?;
                self.lab.start(&host)
            }
            Fault::Skew => {
                let (leader, follower) = (self.find(Victim::Leader)?, self.find(Victim::Follower)?);
                self.lab.skew(&leader, "+90s".parse()?)?;
                self.lab.skew(&follower, "-90s".parse()?)?;
                self.hold();
                Ok(())
            }
            Fault::Demote | Fault::DemoteBriefly => {
                let host = self.last()?;
                let other = self.other(&host)?;
                self.lab.swarm(&other, &["node", "demote", &host])?;
                self.wait_manager(&other, &host, false)?;
                if fault == Fault::Demote {
                    wait_until(PATIENCE, "the demoted manager knows it", || {
                        let asked = ["info", "--format", "{{.Swarm.ControlAvailable}}"];
                        Ok((self.lab.swarm(&host, &asked)?.trim() == "false").then_some(()))
                    })?;
                }
                self.hold();
                self.lab.swarm(&other, &["node", "promote", &host])?;
                Ok(())
            }
            Fault::Wipe => self.wipe(),
        }
    }

    fn wipe(&mut self) -> Result<()> {
        let host = self.last()?;
        let other = self.other(&host)?;
        self.lab.kill(&host)?;
        let state = host_dir(&host).join("lib");
        for entry in fs::read_dir(&state)? {
            let path = entry?.path();
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
            } else {
                fs::remove_file(&path)?;
            }
        }
        self.lab.swarm(&other, &["node", "demote", &host])?;
        self.wait_manager(&other, &host, false)?;
        self.lab.swarm(&other, &["node", "rm", "--force", &host])?;
        self.lab.start(&host)?;
        let token = self.lab.swarm(&other, &["join-token", "-q", "manager"])?;
        let addr = format!("{}:2377", self.lab.addr(&other)?);
        self.lab
            .swarm(&host, &["join", "--token", token.trim(), &addr])?;
        Ok(())
    }

    /// Cuts between the victim and each other host.
    fn towards(&self, victim: Victim, cut: impl Fn(&Lab, &str, &str) -> Result<()>) -> Result<()> {
        let host = self.find(victim)?;
        for other in self.lab.hosts().iter().filter(|other| **other != host) {
            cut(self.lab, &host, other)?;
        }
        self.hold();
        Ok(())
    }

    /// The pace of the faults, not a wait for their effect.
    fn hold(&self) {
        std::thread::sleep(self.hold);
    }

    /// Every manager is there and in agreement, and writes are acknowledged.
    fn recovered(&self) -> Result<()> {
        let healed = Instant::now();
        self.shared.event("recovery");
        wait_until(PATIENCE, "a write is acknowledged", || {
            Ok((self.shared.last_write() > healed).then_some(()))
        })?;
        self.lab.wait_ready(PATIENCE)?;
        self.shared.event("nothing");
        Ok(())
    }

    fn find(&self, victim: Victim) -> Result<String> {
        let leader = leader(self.lab)?;
        match victim {
            Victim::Leader => Ok(leader),
            Victim::Follower => self.other(&leader),
        }
    }

    /// The last host: the clients use no labels of it.
    fn last(&self) -> Result<String> {
        self.lab.hosts().pop().context("a lab has hosts")
    }

    /// Another manager than `host`, which does not stop being one.
    fn other(&self, host: &str) -> Result<String> {
        let other = self.lab.hosts().into_iter().find(|other| other != host);
        other.context("a cluster of more than one")
    }

    fn wait_manager(&self, asked: &str, host: &str, manager: bool) -> Result<()> {
        wait_until(PATIENCE, &format!("{host} is a manager: {manager}"), || {
            let listing = self.lab.swarm(
                asked,
                &["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"],
            )?;
            let listed = listing
                .lines()
                .any(|line| line.trim() != host && line.starts_with(&format!("{host} ")));
            Ok((listed == manager).then_some(()))
        })
    }
}

/// The host that leads, asked of all until one knows.
///
/// # Errors
/// Nobody knows one within a minute.
pub fn leader(lab: &Lab) -> Result<String> {
    wait_until(PATIENCE, "there is a leader", || {
        for host in lab.hosts() {
            let output = lab.run(
                &host,
                &[
                    "timeout",
                    "5",
                    "swarm",
                    "node",
                    "ls",
                    "--format",
                    "{{.Hostname}} {{.ManagerStatus}}",
                ],
            )?;
            let listing = String::from_utf8_lossy(&output.stdout).into_owned();
            if let Some(leader) = listing
                .lines()
                .find_map(|line| line.strip_suffix(" Leader"))
            {
                ensure!(!leader.is_empty(), "a host without a name leads");
                return Ok(Some(leader.to_owned()));
            }
        }
        Ok(None)
    })
}
