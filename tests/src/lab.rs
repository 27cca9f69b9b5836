//! The lab: hosts as namespaces, joined by a switch that also carries an image registry.
//!
//! Each host has a network, mount and UTS namespace of its own, held by one
//! sleeping process; `/run/swarm`, `/var/lib/swarm`, `/etc/swarm` and
//! `/etc/resolv.conf` are its own. The host's mounts stay visible, cgroups among them
//! (`ip netns exec` would hide them). Nothing is put into the root network
//! namespace, and [`Lab::down`] ends the processes of the lab only: those that
//! are in one of its namespaces, or descend from one that is.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::faults::{self, Skew};

/// Everything of the lab is below this directory.
pub const LAB_DIR: &str = "/var/lib/swarm-lab";
/// The images, kept between labs because making them takes a while.
pub const IMAGE_DIR: &str = "/var/cache/swarm-lab";
/// First three bytes of the hosts' addresses.
const SUBNET: &str = "172.30.99";
/// The registry, on the switch.
pub const REGISTRY: &str = "172.30.99.254:5000";
/// Cgroup (in each hierarchy) that the lab's containers are in.
const CGROUP: &str = "swarm-lab";

/// A running lab, as remembered on disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Lab {
    bin_dir: PathBuf,
    managers: usize,
    switch: i32,
    hosts: BTreeMap<String, Host>,
    /// How long forming took, for whoever made it.
    #[serde(skip)]
    formed_in: Option<Duration>,
}

/// One host.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Host {
    /// The process that holds the namespaces.
    holder: i32,
    /// The host's swarmd, if it was started.
    swarmd: Option<i32>,
    addr: String,
}

/// What `up` makes.
#[derive(Debug, Clone)]
pub struct LabConfig {
    /// How many hosts: 1 to 50.
    pub hosts: usize,
    /// How many of them are managers: the first ones.
    pub managers: usize,
    /// Where `swarm` and `swarmd` are.
    pub bin_dir: PathBuf,
    /// Form the cluster; otherwise swarmd only runs on each host.
    pub form: bool,
}

impl LabConfig {
    /// `hosts` hosts, the first `managers` of them managers, with the binaries of [`bin_dir`].
    ///
    /// # Errors
    /// The binaries are not built.
    pub fn new(hosts: usize, managers: usize) -> Result<Self> {
        Ok(Self {
            hosts,
            managers,
            bin_dir: bin_dir()?,
            form: true,
        })
    }
}

/// The directory of the binaries: `SWARM_BIN_DIR`, or the release build of this workspace.
///
/// # Errors
/// They are not there.
pub fn bin_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("SWARM_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => PathBuf::from(target).join("release"),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"),
        },
    };
    ensure!(
        dir.join("swarmd").exists() && dir.join("swarm").exists(),
        "no swarm and swarmd in {}; run `cargo build --release` first, or set SWARM_BIN_DIR",
        dir.display()
    );
    Ok(dir.canonicalize()?)
}

impl Lab {
    /// Makes the hosts, starts swarmd on each, forms the cluster, and returns when all are Ready.
    /// What was made is removed again when a step fails.
    ///
    /// # Errors
    /// There is a lab already, or a step failed.
    pub fn up(config: &LabConfig) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes namespaces: it needs root"
        );
        ensure!(
            (1..=50).contains(&config.hosts) && (1..=config.hosts).contains(&config.managers),
            "the lab has 1 to 50 hosts and at least one manager among them"
        );
        ensure!(
            !state_file().exists(),
            "a lab is up already; remove it with `deploy/lab down`"
        );
        ensure!(
            Path::new(IMAGE_DIR).join("registry").exists(),
            "the images are not made yet: run `deploy/images`"
        );
        fs::create_dir_all(LAB_DIR)?;
        let mut lab = Self {
            bin_dir: config.bin_dir.clone(),
            managers: config.managers,
            switch: 0,
            hosts: BTreeMap::new(),
            formed_in: None,
        };
        let made = lab.build(config);
        if let Err(error) = made {
            if std::env::var_os("SWARM_LAB_KEEP").is_none() {
                lab.down().context("removing what was made of the lab")?;
            }
            return Err(error);
        }
        Ok(lab)
    }

    fn build(&mut self, config: &LabConfig) -> Result<()> {
        self.switch = hold("switch", &[])?;
        self.save()?;
        self.in_switch(
            "ip link set lo up && ip link add br0 type bridge && ip link set br0 up \
             && ip addr add 172.30.99.254/24 dev br0",
        )?;
        self.start_names()?;
        self.start_registry()?;
        for number in 1..=config.hosts {
            self.add_host(number)?;
        }
        let names: Vec<String> = self.hosts();
        let begin = Instant::now();
        for name in &names {
            self.start(name)?;
        }
        if !config.form {
            return Ok(());
        }
        let first = &names[0];
        let addr = self.addr(first)?.to_owned();
        self.swarm(first, &["init", "--advertise-addr", &addr])?;
        for (number, name) in names.iter().enumerate().skip(1) {
            let role = if number < config.managers {
                "manager"
            } else {
                "worker"
            };
            let token = self.swarm(first, &["join-token", "-q", role])?;
            self.swarm(
                name,
                &["join", "--token", token.trim(), &format!("{addr}:2377")],
            )?;
        }
        self.wait_ready(Duration::from_secs(60))?;
        self.formed_in = Some(begin.elapsed());
        Ok(())
    }

    /// From the start of the first swarmd until all nodes were Ready; `None` if this process has
    /// not formed the cluster.
    #[must_use]
    pub fn formed_in(&self) -> Option<Duration> {
        self.formed_in
    }

    /// The lab that is up.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> Result<Self> {
        let text = fs::read_to_string(state_file())
            .map_err(|_| anyhow!("no lab is up; make one with `deploy/lab up`"))?;
        serde_json::from_str(&text).context("reading the lab's state")
    }

    /// Names of the hosts: h1, h2…
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        let mut names: Vec<String> = self.hosts.keys().cloned().collect();
        names.sort_by_key(|name| name[1..].parse::<usize>().unwrap_or(0));
        names
    }

    /// How many of the first hosts are managers.
    #[must_use]
    pub fn managers(&self) -> usize {
        self.managers
    }

    /// Address of a host on the switch.
    ///
    /// # Errors
    /// There is no such host.
    pub fn addr(&self, host: &str) -> Result<&str> {
        Ok(&self.host(host)?.addr)
    }

    /// A command in a host's namespaces, not yet started. `swarm` and `swarmd` are on its PATH.
    ///
    /// # Errors
    /// There is no such host.
    pub fn command(&self, host: &str, program: &str) -> Result<Command> {
        let mut command = Command::new(program);
        enter(&mut command, self.host(host)?.holder)?;
        let path = std::env::var("PATH").unwrap_or_default();
        command.env(
            "PATH",
            format!(
                "{}:/usr/local/sbin:/usr/sbin:/sbin:{path}",
                self.bin_dir.display()
            ),
        );
        Ok(command)
    }

    /// Runs a command on a host to its end and returns what it printed.
    ///
    /// # Errors
    /// It could not be started. (A bad exit status is in the output.)
    pub fn run(&self, host: &str, argv: &[&str]) -> Result<Output> {
        let (program, args) = argv.split_first().context("an empty command")?;
        self.command(host, program)?
            .args(args)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("running {argv:?} on {host}"))
    }

    /// Runs `swarm …` on a host and returns its standard output.
    ///
    /// # Errors
    /// It fails; the error has its standard error.
    pub fn swarm(&self, host: &str, args: &[&str]) -> Result<String> {
        let mut argv = vec!["swarm"];
        argv.extend(args);
        let output = self.run(host, &argv)?;
        ensure!(
            output.status.success(),
            "swarm {} on {host}: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns when every host is Ready in the eyes of the first one that answers.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let first = &self.hosts()[0];
        wait_until(limit, "every node is Ready", || {
            let listing = self.swarm(
                first,
                &[
                    "node",
                    "ls",
                    "--format",
                    "{{.Hostname}} {{.Status}} {{.ManagerStatus}}",
                ],
            )?;
            let ready = listing
                .lines()
                .filter(|l| l.split(' ').nth(1) == Some("Ready"))
                .count();
            let managing = listing
                .lines()
                .filter(|l| l.ends_with("Leader") || l.ends_with("Reachable"))
                .count();
            Ok((ready == self.hosts.len() && managing == self.managers).then_some(()))
        })
    }

    /// SIGKILL to the host's swarmd. Its containers go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self, host: &str) -> Result<()> {
        let pid = self.swarmd(host)?;
        kill(pid, Signal::SIGKILL).with_context(|| format!("killing swarmd of {host}"))?;
        self.wait_ended(host, pid, Duration::from_secs(10))
    }

    /// Graceful stop of the host's swarmd. Its containers go on.
    ///
    /// # Errors
    /// It does not run, or does not end within 30 s.
    pub fn stop(&mut self, host: &str) -> Result<()> {
        let pid = self.swarmd(host)?;
        kill(pid, Signal::SIGTERM).with_context(|| format!("stopping swarmd of {host}"))?;
        self.wait_ended(host, pid, Duration::from_secs(30))
    }

    fn wait_ended(&mut self, host: &str, pid: Pid, limit: Duration) -> Result<()> {
        wait_until(limit, &format!("swarmd of {host} has ended"), || {
            Ok((!alive(pid.as_raw())).then_some(()))
        })?;
        if let Some(host) = self.hosts.get_mut(host) {
            host.swarmd = None;
        }
        self.save()
    }

    /// Starts swarmd on a host and returns when it answers on its socket.
    ///
    /// # Errors
    /// It runs already, or ends at once; the error has the end of its log.
    pub fn start(&mut self, host: &str) -> Result<()> {
        if let Ok(pid) = self.swarmd(host) {
            bail!("swarmd of {host} runs already, as process {pid}");
        }
        let log_path = host_dir(host).join("swarmd.log");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)?;
        let mut command = self.command(host, "swarmd")?;
        // Binaries built without the library run without it; then its faults are refused.
        if let Ok(library) = faults::library(&self.bin_dir) {
            faults::prepare(&faults_file(host))?;
            command
                .env("LD_PRELOAD", library)
                .env(faults::control::VARIABLE, faults_file(host));
        }
        command
            .env(
                "RUST_LOG",
                std::env::var("SWARM_LAB_LOG").unwrap_or_else(|_| "info".into()),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting swarmd of {host}"))?;
        let pid = i32::try_from(child.id())?;
        reap_later(child);
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.swarmd = Some(pid);
        }
        self.save()?;
        // A process that has ended will never answer: no need to go on waiting.
        let answers = wait_until(
            Duration::from_secs(20),
            &format!("swarmd of {host} answers"),
            || {
                let info = self.run(host, &["swarm", "info"])?;
                // Pending: still going on where the process before it ended.
                let pending = String::from_utf8_lossy(&info.stdout).contains("Swarm: pending");
                let answers = info.status.success() && !pending;
                Ok((answers || !alive(pid)).then_some(answers))
            },
        )?;
        ensure!(
            answers,
            "swarmd of {host} has ended; its log ends with:\n{}",
            tail(&log_path, 20)
        );
        Ok(())
    }

    /// SIGSTOP to the host's swarmd.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&self, host: &str) -> Result<()> {
        Ok(kill(self.swarmd(host)?, Signal::SIGSTOP)?)
    }

    /// SIGCONT to the host's swarmd.
    ///
    /// # Errors
    /// It does not run.
    pub fn resume(&self, host: &str) -> Result<()> {
        Ok(kill(self.swarmd(host)?, Signal::SIGCONT)?)
    }

    /// Drops every packet between two hosts, both ways.
    ///
    /// # Errors
    /// There is no such host.
    pub fn cut(&self, a: &str, b: &str) -> Result<()> {
        self.cut_one_way(a, b)?;
        self.cut_one_way(b, a)
    }

    /// Drops every packet that `from` sends to `to`; the other way stays open.
    ///
    /// # Errors
    /// There is no such host.
    pub fn cut_one_way(&self, from: &str, to: &str) -> Result<()> {
        self.host(from)?;
        self.host(to)?;
        ensure!(from != to, "a host cannot be cut off from itself");
        self.in_switch(&format!(
            "nft add table bridge lab && \
             nft add chain bridge lab forward '{{ type filter hook forward priority 0; }}' && \
             nft add rule bridge lab forward iifname {from} oifname {to} drop"
        ))
    }

    /// Loses this share (see [`faults::parse_percent`]) of the packets that a host sends,
    /// and of those it is sent, at random. Takes the place of an earlier share.
    ///
    /// # Errors
    /// There is no such host.
    pub fn lose(&self, host: &str, share: u32) -> Result<()> {
        self.host(host)?;
        ensure!(
            (1..=10_000).contains(&share),
            "a share is between 1 and 10000"
        );
        // Not netem, which many kernels are built without.
        let lost = format!("numgen random mod 10000 <= {} drop", share - 1);
        let mut script = "nft add table bridge lab".to_owned();
        for (hook, way) in [("prerouting", "iifname"), ("postrouting", "oifname")] {
            let chain = format!("{hook}-{host}");
            script += &format!(
                " && nft add chain bridge lab {chain} '{{ type filter hook {hook} priority 0; }}' \
                  && nft flush chain bridge lab {chain} \
                  && nft add rule bridge lab {chain} {way} {host} '{lost}'"
            );
        }
        self.in_switch(&script)
    }

    /// Lets each fsync and fdatasync of the host's swarmd take so much longer.
    ///
    /// # Errors
    /// There is no such host, the delay is above a minute, or the library is not built.
    pub fn slow_disk(&self, host: &str, delay: Duration) -> Result<()> {
        faults::set_sync_delay(&self.faults(host)?, delay)
    }

    /// Lets the host's state directory have no space left: every write to a file in it fails.
    ///
    /// # Errors
    /// There is no such host, or the library is not built.
    pub fn full_disk(&self, host: &str) -> Result<()> {
        faults::set_full(&self.faults(host)?, true)
    }

    /// Lets the wall clock of the host's swarmd be wrong.
    ///
    /// # Errors
    /// There is no such host, or the library is not built.
    pub fn skew(&self, host: &str, skew: Skew) -> Result<()> {
        faults::set_skew(&self.faults(host)?, skew)
    }

    /// The control file of the faults inside a host's swarmd.
    fn faults(&self, host: &str) -> Result<PathBuf> {
        self.host(host)?;
        faults::library(&self.bin_dir)?;
        let path = faults_file(host);
        ensure!(
            path.exists(),
            "swarmd of {host} was started without the library of faults: stop and start it"
        );
        Ok(path)
    }

    /// Undoes all cuts, losses, and faults of disks and clocks.
    ///
    /// # Errors
    /// `nft` failed, or a file cannot be written; the rest is undone all the same.
    pub fn heal(&self) -> Result<()> {
        let network = self.in_switch("nft add table bridge lab && nft delete table bridge lab");
        let hosts = self.hosts();
        let files = hosts.iter().map(|host| faults_file(host));
        let cleared: Vec<_> = files
            .filter(|file| file.exists())
            .map(|file| faults::clear(&file))
            .collect();
        cleared.into_iter().collect::<Result<()>>()?;
        network
    }

    /// PID of the host's swarmd.
    ///
    /// # Errors
    /// It does not run.
    pub fn swarmd(&self, host: &str) -> Result<Pid> {
        match self.host(host)?.swarmd {
            Some(pid) if alive(pid) => Ok(Pid::from_raw(pid)),
            _ => bail!("swarmd of {host} does not run"),
        }
    }

    /// PID of the process that holds the host's namespaces.
    ///
    /// # Errors
    /// There is no such host.
    pub fn holder(&self, host: &str) -> Result<i32> {
        Ok(self.host(host)?.holder)
    }

    /// Lines for people: what runs.
    ///
    /// # Errors
    /// A host is gone.
    pub fn status(&self) -> Result<String> {
        let mut text = format!("registry  {REGISTRY}\n");
        for name in self.hosts() {
            let host = self.host(&name)?;
            let state = match self.swarmd(&name) {
                Ok(pid) => format!("swarmd {pid}"),
                Err(_) => "no swarmd".into(),
            };
            text += &format!("{name:9} {:15} {state}\n", host.addr);
        }
        Ok(text)
    }

    /// Ends and removes everything the lab made, and only that.
    ///
    /// # Errors
    /// Something resists; the rest is removed all the same.
    pub fn down(&self) -> Result<()> {
        let mut holders: Vec<i32> = self.hosts.values().map(|host| host.holder).collect();
        if self.switch != 0 {
            holders.push(self.switch);
        }
        // What is killed may have forked meanwhile: look until nothing is left. By then nobody holds the
        // namespaces any more that tell whose it is.
        let mut namespaces = BTreeSet::new();
        wait_until(
            Duration::from_secs(20),
            "the lab's processes have ended",
            || {
                namespaces.append(&mut namespaces_of(&holders)?);
                let processes = processes_in(&namespaces)?;
                for &pid in &processes {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
                Ok(processes.is_empty().then_some(()))
            },
        )?;
        remove_cgroups()?;
        match fs::remove_dir_all(LAB_DIR) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {LAB_DIR}"))
            }
            _ => Ok(()),
        }
    }

    fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.get(name).ok_or_else(|| {
            anyhow!(
                "the lab has no host {name}; it has {}",
                self.hosts().join(", ")
            )
        })
    }

    fn save(&self) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(LAB_DIR)?;
        file.write_all(serde_json::to_string_pretty(self)?.as_bytes())?;
        file.persist(state_file())?;
        Ok(())
    }

    fn in_switch(&self, script: &str) -> Result<()> {
        let mut command = Command::new("sh");
        enter(&mut command, self.switch)?;
        let output = command.args(["-c", script]).output()?;
        ensure!(
            output.status.success(),
            "on the switch: {script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    fn add_host(&mut self, number: usize) -> Result<()> {
        let name = format!("h{number}");
        let addr = format!("{SUBNET}.{number}");
        let dir = host_dir(&name);
        let mut binds = Vec::new();
        for (own, place) in [
            ("run", "/run/swarm"),
            ("lib", "/var/lib/swarm"),
            ("etc", "/etc/swarm"),
            // For `ip netns` on a host: it names namespaces by files there.
            ("netns", "/run/netns"),
        ] {
            fs::create_dir_all(dir.join(own))?;
            // Mount points; empty directories of the machine itself.
            fs::create_dir_all(place)?;
            binds.push((dir.join(own), PathBuf::from(place)));
        }
        fs::write(
            dir.join("etc/swarmd.toml"),
            format!(
                "insecure-registries = [\"{REGISTRY}\"]\ncgroup-parent = \"/{CGROUP}/{name}\"\n"
            ),
        )?;
        fs::write(
            dir.join("resolv.conf"),
            format!("nameserver {SUBNET}.254\n"),
        )?;
        binds.push((dir.join("resolv.conf"), PathBuf::from("/etc/resolv.conf")));
        let holder = hold(&name, &binds)?;
        self.hosts.insert(
            name.clone(),
            Host {
                holder,
                swarmd: None,
                addr: addr.clone(),
            },
        );
        self.save()?;
        self.in_switch(&format!(
            "ip link add {name} type veth peer name eth0 netns {holder} && \
             ip link set {name} master br0 up"
        ))?;
        let script = format!(
            "ip link set lo up && ip link set eth0 up && ip addr add {addr}/24 dev eth0 && \
             ip route add default via {SUBNET}.254"
        );
        let output = self.run(&name, &["sh", "-c", &script])?;
        ensure!(
            output.status.success(),
            "setting up {name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// PIDs of the programs of this name that run on the switch: "docker-registry", "dnsmasq".
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn processes_on_switch(&self, program: &str) -> Result<Vec<i32>> {
        let named = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| {
                // The kernel keeps fifteen characters.
                comm.trim_end() == &program[..program.len().min(15)]
            })
        };
        let all = processes_in(&namespaces_of(&[self.switch])?)?;
        Ok(all.into_iter().filter(named).collect())
    }

    /// Starts the registry, and returns when it answers.
    ///
    /// # Errors
    /// It runs already, or does not answer.
    pub fn start_registry(&self) -> Result<()> {
        let config = Path::new(LAB_DIR).join("registry.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\n\
                 storage: {{filesystem: {{rootdirectory: {IMAGE_DIR}/registry}}}}\n\
                 http: {{addr: {REGISTRY}}}\n"
            ),
        )?;
        self.spawn_on_switch("docker-registry", &["serve", &config.to_string_lossy()])?;
        wait_until(Duration::from_secs(20), "the registry answers", || {
            Ok(self
                .in_switch(&format!("curl -sf -o /dev/null http://{REGISTRY}/v2/"))
                .is_ok()
                .then_some(()))
        })
    }

    fn start_names(&self) -> Result<()> {
        // Answers for the names outside the cluster.
        self.spawn_on_switch(
            "dnsmasq",
            &[
                "--keep-in-foreground",
                "--no-resolv",
                "--no-hosts",
                "--pid-file=",
                "--user=root",
                "--bind-interfaces",
                "--listen-address=172.30.99.254",
                "--address=/registry.lab/172.30.99.254",
            ],
        )
    }

    fn spawn_on_switch(&self, program: &str, args: &[&str]) -> Result<()> {
        let log = fs::File::create(Path::new(LAB_DIR).join(format!("{program}.log")))?;
        let mut command = Command::new(program);
        enter(&mut command, self.switch)?;
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(args)
            .env("PATH", format!("/usr/sbin:/sbin:{path}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {program}; is its Debian package installed?"))?;
        reap_later(child);
        Ok(())
    }
}

/// Names and references of the images that the registry serves.
///
/// # Errors
/// The images are not made yet.
pub fn images() -> Result<Vec<String>> {
    let text = fs::read_to_string(Path::new(IMAGE_DIR).join("images"))
        .map_err(|_| anyhow!("the images are not made yet: run `deploy/images`"))?;
    Ok(text
        .lines()
        .map(|name| format!("{REGISTRY}/{name}"))
        .collect())
}

/// Calls `look` until it finds what it looks for; errors end it at once only after the limit.
///
/// # Errors
/// Nothing was found within `limit`; the error says what, and the last failure.
pub fn wait_until<T>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > end {
            return match last {
                Some(error) => Err(error.context(format!("waited {limit:?} until {what}"))),
                None => Err(anyhow!("waited {limit:?} in vain until {what}")),
            };
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn state_file() -> PathBuf {
    Path::new(LAB_DIR).join("lab.json")
}

/// Where a host's files are, seen from outside: `run`, `lib`, `etc`, `swarmd.log`.
#[must_use]
pub fn host_dir(host: &str) -> PathBuf {
    Path::new(LAB_DIR).join(host)
}

/// What the host's swarmd reads its faults from.
fn faults_file(host: &str) -> PathBuf {
    host_dir(host).join("faults")
}

/// Starts a process that sleeps in namespaces of its own, with `binds` (source, target) mounted.
fn hold(hostname: &str, binds: &[(PathBuf, PathBuf)]) -> Result<i32> {
    let binds: Vec<(CString, CString)> = binds
        .iter()
        .map(|(source, target)| Ok((c_path(source)?, c_path(target)?)))
        .collect::<Result<_>>()?;
    let name = hostname.to_owned();
    let mut command = Command::new("sleep");
    command
        .arg("infinity")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only system calls are made, on strings made before.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
            nix::unistd::sethostname(&name)?;
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            for (source, target) in &binds {
                mount(
                    Some(source.as_c_str()),
                    target.as_c_str(),
                    none,
                    MsFlags::MS_BIND,
                    none,
                )?;
            }
            Ok(())
        });
    }
    // spawn returns only after the child's exec: the namespaces are there then.
    let child = command
        .spawn()
        .with_context(|| format!("making the namespaces of {hostname}"))?;
    let pid = i32::try_from(child.id())?;
    reap_later(child);
    Ok(pid)
}

/// Makes `command` start in the namespaces of process `holder`.
fn enter(command: &mut Command, holder: i32) -> Result<()> {
    let open = |kind: &str| {
        fs::File::open(format!("/proc/{holder}/ns/{kind}"))
            .with_context(|| format!("the lab's process {holder} is gone; run `deploy/lab down`"))
    };
    let (net, uts, mnt) = (open("net")?, open("uts")?, open("mnt")?);
    // SAFETY: setns is a system call; the files stay open in the closure.
    unsafe {
        command.pre_exec(move || {
            for (file, flag) in [
                (&net, CloneFlags::CLONE_NEWNET),
                (&uts, CloneFlags::CLONE_NEWUTS),
                (&mnt, CloneFlags::CLONE_NEWNS),
            ] {
                setns(file, flag)?;
            }
            Ok(())
        });
    }
    // The working directory is the host's own after entering its mounts.
    command.current_dir("/");
    Ok(())
}

/// Collects the exit status so that no zombie stays while this process lives.
fn reap_later(mut child: std::process::Child) {
    std::thread::spawn(move || child.wait());
}

/// Whether a process exists and is no zombie, none of its threads running any more.
#[must_use]
pub fn alive(pid: i32) -> bool {
    // The state of the process is that of its first thread; the others may still hold
    // its sockets. A pidfd is readable when all have ended.
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    let Ok(fd) = i32::try_from(fd) else {
        return false;
    };
    if fd < 0 {
        return false;
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    !matches!(poll(&mut polled, PollTimeout::ZERO), Ok(ready) if ready > 0)
}

/// A namespace that the process is in, while there is one.
fn namespace(pid: i32, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// The namespaces of the lab that are held.
fn namespaces_of(holders: &[i32]) -> Result<BTreeSet<PathBuf>> {
    let mut namespaces = BTreeSet::new();
    for &holder in holders {
        namespaces.extend(
            ["net", "mnt"]
                .iter()
                .filter_map(|kind| namespace(holder, kind)),
        );
        // Sandboxes: containers whose shim is gone are found by them.
        if let Ok(entries) = fs::read_dir(format!("/proc/{holder}/root/run/swarm/netns")) {
            for entry in entries.flatten() {
                if let Ok(stat) = nix::sys::stat::stat(&entry.path()) {
                    namespaces.insert(PathBuf::from(format!("net:[{}]", stat.st_ino)));
                }
            }
        }
    }
    for own in ["net", "mnt"] {
        if let Some(own) = namespace(i32::try_from(std::process::id())?, own) {
            namespaces.remove(&own);
        }
    }
    Ok(namespaces)
}

/// Every process that is in one of the namespaces, or descends from one that is.
fn processes_in(namespaces: &BTreeSet<PathBuf>) -> Result<BTreeSet<i32>> {
    let mut parents = BTreeMap::new();
    let mut found: BTreeSet<i32> = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if !alive(pid) {
            continue;
        }
        if ["net", "mnt"]
            .iter()
            .any(|kind| namespace(pid, kind).is_some_and(|ns| namespaces.contains(&ns)))
        {
            found.insert(pid);
        }
        if let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat"))
            && let Some(end) = stat.rfind(')')
            && let Some(parent) = stat[end + 2..]
                .split(' ')
                .nth(1)
                .and_then(|p| p.parse::<i32>().ok())
        {
            parents.insert(pid, parent);
        }
    }
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return Ok(found);
        }
        found.extend(more);
    }
}

fn remove_cgroups() -> Result<()> {
    fn remove(dir: &Path) -> std::io::Result<()> {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_type()?.is_dir() {
                remove(&entry.path())?;
            }
        }
        fs::remove_dir(dir)
    }
    let Ok(hierarchies) = fs::read_dir("/sys/fs/cgroup") else {
        return Ok(());
    };
    let mut dirs: Vec<PathBuf> = hierarchies
        .flatten()
        .map(|e| e.path().join(CGROUP))
        .collect();
    dirs.push(Path::new("/sys/fs/cgroup").join(CGROUP));
    for dir in dirs.iter().filter(|dir| dir.is_dir()) {
        // A cgroup stays busy until the kernel has let go of the last process.
        wait_until(
            Duration::from_secs(10),
            &format!("{} is removed", dir.display()),
            || Ok(remove(dir).map(Some)?),
        )?;
    }
    Ok(())
}

fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn c_path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}
