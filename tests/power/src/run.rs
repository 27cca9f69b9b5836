//! Runs: groups of processes on disks whose power is cut at random, started again, and compared.
//!
//! What must hold after each cut: everything starts; no acknowledged write is missing; members
//! agree to the byte; no term has two leaders, and nobody leads a term a second time. All dice come
//! from one seed. Threads and the kernel add their own chance, so a seed gives the same cuts, not
//! the same interleaving: a failure is replayed with its seed, if need be several times.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use swarm_identity::{NewKey, PeerIdentity, RootCa};
use swarm_proto::v1::NodeRole;

use crate::member::{AGENT_PIPELINE, CLUSTER, Job, Order, Pems, RaftJob};
use crate::mount::Mounted;

/// What a wait ends with when the awaited fact never becomes true.
const PATIENCE: Duration = Duration::from_secs(60);
/// Writers of a member.
const WORKERS: [u64; 3] = [1, 4, 24];
/// Cuts until a group is given up for a new one: states and addresses grow.
const LIFE: u32 = 40;

/// What is under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One raft member.
    One,
    /// Three raft members.
    Three,
    /// The agent's local store.
    Agent,
    /// The key file.
    Keys,
    /// The database below the first three, with much between two syncs.
    Database,
}

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The disk answers syncs and does nothing.
    LyingDisk,
    /// The code does not sync.
    UnsyncedCode,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Decides everything that is decided here.
    pub seed: u64,
    /// How often the power is cut.
    pub cuts: u32,
    /// Which control it is, if any: the run has to fail.
    pub control: Option<Control>,
    /// The binary that is started with `child`.
    pub binary: PathBuf,
    /// Keep the directory of a failure.
    pub keep: bool,
}

/// What a run has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Power cuts, of one disk each.
    pub cuts: u32,
    /// Cuts while it was being started.
    pub while_starting: u32,
    /// Writes and changes of names that were at stake at cuts.
    pub unsynced: u64,
    /// Acknowledgements that were checked.
    pub acknowledged: u64,
}

impl Seen {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            cuts: self.cuts + other.cuts,
            while_starting: self.while_starting + other.while_starting,
            unsynced: self.unsynced + other.unsynced,
            acknowledged: self.acknowledged + other.acknowledged,
        }
    }
}

impl Run {
    /// Cuts the power as often as it is told to.
    ///
    /// # Errors
    /// Something that must hold did not; the message says which seed to replay.
    pub fn of(&self, kind: Kind) -> Result<Seen> {
        let mut dice = StdRng::seed_from_u64(self.seed);
        let mut seen = Seen::default();
        while seen.cuts < self.cuts {
            let life = Life {
                seed: dice.random(),
                cuts: LIFE.min(self.cuts - seen.cuts),
                run: self,
            };
            let lived = match kind {
                Kind::One => life.raft(1),
                Kind::Three => life.raft(3),
                Kind::Agent | Kind::Keys | Kind::Database => life.single(kind),
            };
            seen = seen.and(lived.with_context(|| {
                format!(
                    "{kind:?}: failed after {} cuts; replay with --seed {}",
                    seen.cuts, self.seed
                )
            })?);
        }
        Ok(seen)
    }
}

/// One group, from its beginning until it is given up.
struct Life<'a> {
    seed: u64,
    cuts: u32,
    run: &'a Run,
}

/// What processes said, by whom.
enum Said {
    Line(usize, String),
    End(usize),
}

struct Process {
    child: Child,
    commands: ChildStdin,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already dead is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A disk with whoever works on it.
struct Host {
    number: usize,
    below: PathBuf,
    at: PathBuf,
    job: Job,
    mount: Option<Mounted>,
    process: Option<Process>,
    noisy: bool,
    /// What it said and nobody has looked at yet.
    lines: VecDeque<String>,
    ended: bool,
}

impl Host {
    fn new(number: usize, dir: &Path, job: impl FnOnce(&Path) -> Job) -> Result<Self> {
        let (below, at) = (
            dir.join(format!("below{number}")),
            dir.join(format!("disk{number}")),
        );
        std::fs::create_dir(&below)?;
        std::fs::create_dir(&at)?;
        Ok(Self {
            number,
            job: job(&at),
            below,
            at,
            mount: None,
            process: None,
            noisy: std::env::var_os("RUST_LOG").is_some(),
            lines: VecDeque::new(),
            ended: false,
        })
    }

    fn mount(&mut self, seed: u64, lying: bool) -> Result<&Mounted> {
        let mounted = Mounted::new(&self.below, &self.at, seed, lying)?;
        Ok(self.mount.insert(mounted))
    }

    fn mounted(&self) -> &Mounted {
        self.mount.as_ref().expect("mounted while it is used")
    }

    fn spawn(&mut self, binary: &Path, unsynced: bool, to: &Sender<Said>) -> Result<()> {
        let mut child = Command::new(binary)
            .arg("child")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(if self.noisy {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        let mut commands = child.stdin.take().context("a pipe")?;
        let out = BufReader::new(child.stdout.take().context("a pipe")?);
        let (to, number) = (to.clone(), self.number);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if to.send(Said::Line(number, line)).is_err() {
                    return;
                }
            }
            // The run is over.
            let _ = to.send(Said::End(number));
        });
        let order = Order {
            job: self.job.clone(),
            unsynced,
        };
        writeln!(commands, "{}", serde_json::to_string(&order)?)?;
        self.lines.clear();
        self.ended = false;
        self.process = Some(Process { child, commands });
        Ok(())
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let process = self.process.as_mut().context("nobody runs")?;
        writeln!(process.commands, "{command}").context("a process has ended")
    }
}

/// All hosts of a life, and what they say.
struct Bench<'a> {
    run: &'a Run,
    dice: StdRng,
    hosts: Vec<Host>,
    to: Sender<Said>,
    from: Receiver<Said>,
    acknowledged: BTreeSet<u64>,
    /// Who led which term.
    led: BTreeMap<u64, (usize, u32)>,
    /// How often each host was started.
    starts: Vec<u32>,
    seen: Seen,
    dir: Option<tempfile::TempDir>,
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        // The processes first: nothing is unmounted under them.
        for host in &mut self.hosts {
            host.process = None;
            host.mount = None;
        }
        if self.run.keep
            && std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            eprintln!("kept {}", dir.keep().display());
        }
    }
}

impl<'a> Bench<'a> {
    fn new(run: &'a Run, seed: u64) -> Result<Self> {
        let (to, from) = channel();
        Ok(Self {
            run,
            dice: StdRng::seed_from_u64(seed),
            hosts: Vec::new(),
            to,
            from,
            acknowledged: BTreeSet::new(),
            led: BTreeMap::new(),
            starts: Vec::new(),
            seen: Seen::default(),
            dir: Some(
                tempfile::Builder::new()
                    .prefix("swarm-powercut-")
                    .tempdir()?,
            ),
        })
    }

    fn dir(&self) -> &Path {
        self.dir.as_ref().expect("taken only by drop").path()
    }

    fn add(&mut self, job: impl FnOnce(&Path) -> Job) -> Result<usize> {
        let number = self.hosts.len();
        let host = Host::new(number, self.dir(), job)?;
        self.hosts.push(host);
        self.starts.push(0);
        Ok(number)
    }

    /// Mounts the disk of a host and starts its process.
    fn start(&mut self, number: usize) -> Result<()> {
        let (seed, control) = (self.dice.random(), self.run.control);
        self.starts[number] += 1;
        let host = &mut self.hosts[number];
        host.mount(seed, control == Some(Control::LyingDisk))?;
        let unsynced = control == Some(Control::UnsyncedCode);
        host.spawn(&self.run.binary, unsynced, &self.to)
    }

    /// Takes in what was said, and waits for it until then. False: nothing was said.
    fn hear(&mut self, until: Instant) -> Result<bool> {
        let wait = until.saturating_duration_since(Instant::now());
        let said = match self.from.recv_timeout(wait) {
            Ok(said) => said,
            Err(RecvTimeoutError::Timeout) => return Ok(false),
            Err(RecvTimeoutError::Disconnected) => unreachable!("we hold a sender"),
        };
        match said {
            Said::End(number) => self.hosts[number].ended = true,
            Said::Line(number, line) => {
                if let Some(write) = line.strip_prefix("ack ") {
                    self.acknowledged.insert(write.parse()?);
                    self.seen.acknowledged += 1;
                } else if let Some(term) = line.strip_prefix("leads ") {
                    self.leads(number, term.parse()?)?;
                } else if line.starts_with("failed") {
                    bail!("host {number}: {line}");
                } else {
                    self.hosts[number].lines.push_back(line);
                }
            }
        }
        Ok(true)
    }

    fn leads(&mut self, number: usize, term: u64) -> Result<()> {
        let now = (number, self.starts[number]);
        match self.led.insert(term, now) {
            // It says so again when it learns more about itself.
            Some(before) if before != now => bail!(
                "host {} led term {term} in its start {}, now host {number} does in its start {}: a vote was given twice",
                before.0,
                before.1,
                now.1
            ),
            _ => Ok(()),
        }
    }

    /// The next line of a host that begins like this; others are skipped. `None`: the power of its
    /// disk has gone meanwhile.
    fn line(&mut self, number: usize, start: &str) -> Result<Option<String>> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            while let Some(line) = self.hosts[number].lines.pop_front() {
                if let Some(rest) = line.strip_prefix(start) {
                    return Ok(Some(rest.trim().to_owned()));
                }
                if line.starts_with("refused") && !self.gone(number) {
                    bail!("host {number} does not start: {line}");
                }
            }
            if self.gone(number) {
                return Ok(None);
            }
            ensure!(
                !self.hosts[number].ended,
                "host {number} has ended by itself"
            );
            ensure!(
                Instant::now() < give_up,
                "host {number} never says {start:?}"
            );
            // The power goes without a line being said.
            self.hear(Instant::now() + Duration::from_millis(20))?;
        }
    }

    fn gone(&self, number: usize) -> bool {
        self.hosts[number].mounted().wait_cut(Duration::ZERO)
    }

    fn ask(&mut self, number: usize, command: &str, answer: &str) -> Result<String> {
        self.hosts[number].command(command)?;
        let line = self.line(number, answer)?;
        line.ok_or_else(|| anyhow!("the power of host {number} is not meant to go now"))
    }

    /// How many steps of the disk until the power goes: from the very next to some seconds.
    fn steps(&mut self, most: f64) -> u64 {
        10f64.powf(self.dice.random_range(0.0..most)) as u64
    }

    /// Arms the power switch of a host.
    fn arm(&mut self, number: usize, most: f64) {
        let (steps, after) = (self.steps(most), self.dice.random());
        self.hosts[number].mounted().cut_at(steps, after);
    }

    /// Waits until the power of these has gone, or takes it; kills who is on it, and lays the
    /// disks down as they are then.
    fn cut(&mut self, victims: &[usize], patience: Duration) -> Result<()> {
        let give_up = Instant::now() + patience;
        let tick = Duration::from_millis(10);
        while Instant::now() < give_up && victims.iter().any(|victim| !self.gone(*victim)) {
            self.hear(Instant::now() + tick)?;
        }
        for victim in victims {
            self.hosts[*victim].mounted().cut();
        }
        for victim in victims {
            self.hosts[*victim].process = None;
        }
        let give_up = Instant::now() + PATIENCE;
        while victims.iter().any(|victim| !self.hosts[*victim].ended) {
            ensure!(self.hear(give_up)?, "a killed process keeps its pipe");
        }
        for victim in victims {
            let mount = self.hosts[*victim].mount.take().expect("mounted until now");
            self.seen.unsynced += mount.settle()? as u64;
            self.seen.cuts += 1;
        }
        Ok(())
    }
}

/// Groups have addresses of their own, with a port that no outgoing connection takes.
static GROUPS: AtomicU32 = AtomicU32::new(0);

fn address(member: usize, group: u32) -> String {
    let pid = std::process::id();
    let (high, low) = (1 + (pid >> 8) % 250, pid % 250);
    let last = 1 + (group * 3 + u32::try_from(member).unwrap_or(0)) % 250;
    format!("127.{high}.{low}.{last}:7373")
}

fn pems(root: &RootCa, node: &str) -> Result<Pems> {
    let key = NewKey::generate()?;
    let subject = PeerIdentity {
        node_id: node.into(),
        role: NodeRole::Manager,
        cluster_id: CLUSTER.into(),
    };
    let day = Duration::from_secs(24 * 3600);
    Ok(Pems {
        chain: root.sign(key.csr_pem.as_bytes(), &subject, day, SystemTime::now())?,
        key: key.key_pem,
        root: root.cert_pem().to_owned(),
    })
}

impl Life<'_> {
    /// A raft group.
    fn raft(&self, members: usize) -> Result<Seen> {
        let mut bench = Bench::new(self.run, self.seed)?;
        let lived = self.live_raft(&mut bench, members);
        self.end(bench, lived)
    }

    fn end(&self, mut bench: Bench<'_>, lived: Result<()>) -> Result<Seen> {
        if lived.is_err()
            && self.run.keep
            && let Some(dir) = bench.dir.take()
        {
            for host in &mut bench.hosts {
                host.process = None;
                host.mount = None;
            }
            eprintln!("kept {}", dir.keep().display());
        }
        lived.with_context(|| format!("life {:#x}, {} cuts old", self.seed, bench.seen.cuts))?;
        Ok(bench.seen)
    }

    fn live_raft(&self, bench: &mut Bench<'_>, members: usize) -> Result<()> {
        let root = RootCa::create(SystemTime::now())?;
        let group = GROUPS.fetch_add(1, Ordering::Relaxed);
        for number in 0..members {
            let job = RaftJob {
                dir: PathBuf::new(),
                addr: address(number, group),
                pems: pems(&root, &format!("n{}", number + 1))?,
                data_key: rand::random(),
                remote: (number > 0).then(|| address(0, group)),
                must_exist: false,
            };
            bench.add(|at| {
                Job::Raft(RaftJob {
                    dir: at.join("raft"),
                    ..job
                })
            })?;
        }
        self.form(bench)?;
        let mut next = 0;
        while bench.seen.cuts < self.cuts {
            let workers = *WORKERS.choose(&mut bench.dice).expect("there are some");
            for number in 0..members {
                bench.hosts[number].command(&format!("load {next} {workers}"))?;
                // No host writes as many in a round.
                next += 5000;
            }
            self.cut_some(bench, members)?;
            self.compare(bench)?;
        }
        Ok(())
    }

    /// Makes the group. The power goes while its first member is made, now and then.
    fn form(&self, bench: &mut Bench<'_>) -> Result<()> {
        loop {
            bench.start(0)?;
            if bench.seen.cuts < self.cuts && bench.dice.random_bool(0.5) {
                bench.arm(0, 1.7);
            }
            if bench.line(0, "up")?.is_some() {
                bench.hosts[0].mounted().cut_at(u64::MAX, false);
            }
            if !bench.gone(0) {
                break;
            }
            bench.seen.while_starting += 1;
            bench.cut(&[0], Duration::ZERO)?;
            // Terms of a group that was never there.
            bench.led.clear();
        }
        for number in 1..bench.hosts.len() {
            bench.ask(0, &format!("enroll n{}", number + 1), "enrolled")?;
            bench.start(number)?;
            bench.line(number, "up")?;
            bench.ask(number, "joined", "joined")?;
        }
        for host in &mut bench.hosts {
            if let Job::Raft(job) = &mut host.job {
                job.must_exist = true;
            }
        }
        Ok(())
    }

    /// Takes the power from all or some, and starts them until they are there again.
    fn cut_some(&self, bench: &mut Bench<'_>, members: usize) -> Result<()> {
        let mut victims: Vec<usize> = (0..members).collect();
        if members > 1 && bench.dice.random_bool(0.5) {
            let keep = bench.dice.random_range(1..members);
            for _ in 0..keep {
                let spared = bench.dice.random_range(0..victims.len());
                victims.remove(spared);
            }
        }
        // One disk decides when; a cut takes all of them at that moment.
        bench.arm(victims[0], 2.8);
        let give_up = Instant::now() + Duration::from_millis(700);
        while Instant::now() < give_up && !bench.gone(victims[0]) {
            bench.hear(Instant::now() + Duration::from_millis(5))?;
        }
        bench.cut(&victims, Duration::ZERO)?;
        let mut coming = victims;
        while !coming.is_empty() {
            for number in &coming {
                bench.start(*number)?;
                if bench.seen.cuts < self.cuts && bench.dice.random_bool(0.3) {
                    bench.arm(*number, 1.8);
                }
            }
            let mut again = Vec::new();
            for number in coming {
                if bench.line(number, "up")?.is_some() {
                    bench.hosts[number].mounted().cut_at(u64::MAX, false);
                }
                if bench.gone(number) {
                    bench.seen.while_starting += 1;
                    bench.cut(&[number], Duration::ZERO)?;
                    again.push(number);
                }
            }
            coming = again;
        }
        Ok(())
    }

    /// All members have the same state, and every acknowledged write is in it.
    fn compare(&self, bench: &mut Bench<'_>) -> Result<()> {
        for number in 0..bench.hosts.len() {
            bench.ask(number, "pause", "paused")?;
        }
        let asked = bench.dice.random_range(0..bench.hosts.len());
        let mut index = bench.ask(asked, "barrier", "barrier ")?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            let mut states = Vec::new();
            for number in 0..bench.hosts.len() {
                let state = bench.ask(number, &format!("state {index}"), "state ")?;
                let mut words = state.splitn(3, ' ').map(str::to_owned);
                let mut word = || words.next().unwrap_or_default();
                states.push((word(), word(), word()));
            }
            let newest = states
                .iter()
                .map(|state| &state.0)
                .max_by_key(|index| index.parse().unwrap_or(0u64));
            let newest = newest.context("there are members")?.clone();
            if states.iter().any(|state| state.0 != newest) {
                // A leader was elected meanwhile: all have to get there first.
                ensure!(Instant::now() < give_up, "members never come to rest");
                index = newest;
                continue;
            }
            for state in &states {
                ensure!(
                    state.1 == states[0].1,
                    "members differ at index {newest}: {states:?}"
                );
                let have: BTreeSet<u64> = state
                    .2
                    .split(',')
                    .filter_map(|number| number.parse().ok())
                    .collect();
                let lost: Vec<_> = bench.acknowledged.difference(&have).collect();
                ensure!(lost.is_empty(), "acknowledged writes are lost: {lost:?}");
            }
            return Ok(());
        }
    }

    /// A store that one process writes to, on and on.
    fn single(&self, kind: Kind) -> Result<Seen> {
        let mut bench = Bench::new(self.run, self.seed)?;
        let lived = self.live_single(&mut bench, kind);
        self.end(bench, lived)
    }

    fn live_single(&self, bench: &mut Bench<'_>, kind: Kind) -> Result<()> {
        let pems = pems(&RootCa::create(SystemTime::now())?, "n1")?;
        bench.add(|at| match kind {
            Kind::Agent => Job::Agent(at.to_owned()),
            Kind::Database => Job::Database(at.join("database")),
            _ => Job::Keys(at.to_owned(), pems),
        })?;
        let mut reached = 0;
        while bench.seen.cuts < self.cuts {
            bench.start(0)?;
            let early = bench.dice.random_bool(0.3);
            if early {
                bench.arm(0, 1.6);
            }
            match bench.line(0, "found ")? {
                None => bench.seen.while_starting += 1,
                Some(found) => {
                    let found: u64 = found.parse()?;
                    let acknowledged = bench.acknowledged.last().copied().unwrap_or(0);
                    // It goes on from what it finds, acknowledged or not.
                    let most = acknowledged.max(reached) + AGENT_PIPELINE;
                    ensure!(
                        (acknowledged..=most).contains(&found),
                        "{acknowledged} was acknowledged, at most {most} written, {found} is there"
                    );
                    reached = found;
                }
            }
            if !early {
                bench.arm(0, 2.5);
            }
            bench.cut(&[0], Duration::from_millis(700))?;
        }
        Ok(())
    }
}
