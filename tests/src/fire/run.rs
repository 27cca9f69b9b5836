//! One run: clients, faults, and the verdict over what the clients were answered.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::history::{ObjectHistory, Who};
use super::model;
use super::nemesis::{ALL, Fault, Nemesis};
use super::workload::{Client, Shared};
use crate::cluster::busybox;
use crate::lab::Lab;
use crate::linearize::Verdict;

/// Histories in which a stale read is put, to see that it is found.
const CONTROLS: usize = 50;

/// What a run is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// At least so many operations.
    pub ops: u64,
    /// Clients, spread over the managers.
    pub clients: u16,
    /// How long each fault holds.
    pub hold: Duration,
    /// What happens: all of it once in this order, then at random.
    pub faults: Vec<Fault>,
    /// Decides what the clients do, and the order of faults after the first round.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ops: 100_000,
            clients: 36,
            hold: Duration::from_secs(2),
            faults: ALL.to_vec(),
            seed: 1,
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Summary {
    /// Operations: answered, refused, of unknown outcome.
    pub answered: u64,
    /// Not done because no manager could.
    pub refused: u64,
    /// Perhaps done.
    pub unknown: u64,
    /// Time of the faults and the clients.
    pub took: Duration,
    /// How often each fault happened.
    pub faults: BTreeMap<String, u32>,
    /// Longest time without an acknowledged write at any manager, per fault.
    pub worst: BTreeMap<String, Duration>,
    /// Objects with a history.
    pub objects: usize,
    /// Time of the check.
    pub checked: Duration,
    /// Histories with a stale read put in, and how many of them were found.
    pub controls: (usize, usize),
    /// Why operations were refused or lost.
    pub reasons: BTreeMap<String, u64>,
    /// What is not linearizable, for people to read.
    pub violations: Vec<String>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.answered + self.refused + self.unknown;
        let seconds = self.took.as_secs_f64();
        writeln!(
            f,
            "{total} operations in {seconds:.0} s ({:.0}/s): {} answered, {} refused, {} of unknown outcome",
            total as f64 / seconds,
            self.answered,
            self.refused,
            self.unknown
        )?;
        writeln!(
            f,
            "faults, and the longest time without an acknowledged write:"
        )?;
        for (event, gap) in &self.worst {
            let count = self.faults.get(event).copied().unwrap_or(0);
            let times = if count > 0 {
                format!("{count} x ")
            } else {
                String::new()
            };
            writeln!(f, "  {times}{event}: {:.2} s", gap.as_secs_f64())?;
        }
        writeln!(f, "why not:")?;
        for (reason, count) in &self.reasons {
            writeln!(f, "  {count:>7} {reason}")?;
        }
        writeln!(
            f,
            "stale reads put in on purpose: {} of {} found",
            self.controls.1, self.controls.0
        )?;
        write!(
            f,
            "{} objects checked in {:.1} s: {}",
            self.objects,
            self.checked.as_secs_f64(),
            if self.violations.is_empty() {
                "linearizable".to_owned()
            } else {
                format!("{} NOT LINEARIZABLE", self.violations.len())
            }
        )
    }
}

impl Summary {
    /// The summary, if it is a good one.
    ///
    /// # Errors
    /// Something is not linearizable, or the check does not find what it has to.
    pub fn verdict(self) -> Result<Self> {
        if let Some(first) = self.violations.first() {
            bail!("{self}\n\n{first}");
        }
        ensure!(
            self.controls.0 > 0 && self.controls.0 == self.controls.1,
            "the check does not find all stale reads that were put in:\n{self}"
        );
        Ok(self)
    }

    /// The summary, if a bug was in the managers and it was found.
    ///
    /// # Errors
    /// Everything is linearizable.
    pub fn caught(self) -> Result<Self> {
        ensure!(!self.violations.is_empty(), "{self}");
        Ok(self)
    }
}

/// Runs clients and faults against a cluster of which every host is a manager.
///
/// # Errors
/// The cluster does not get over a fault. What is not linearizable is in the summary.
pub fn run(lab: &mut Lab, options: &Options) -> Result<Summary> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    // Connections belong to the runtime in whose context they are made.
    let _context = runtime.enter();
    let hosts = u16::try_from(lab.hosts().len())?;
    ensure!(hosts >= 3, "at least three managers, so that one may fail");
    let ids = lab.swarm("h1", &["node", "ls", "--format", "{{.Hostname}} {{.ID}}"])?;
    // Not the last host, which is wiped and comes back as another node.
    let last = format!("h{hosts}");
    let nodes: Vec<String> = ids
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(host, _)| *host != last)
        .map(|(_, id)| id.trim().trim_end_matches(" *").to_owned())
        .collect();
    let shared = Shared::new(&nodes, busybox());
    runtime.block_on(shared.prepare(1))?;
    let began = Instant::now();
    let clients: Vec<_> = (0..options.clients)
        .map(|client| {
            let who = Who {
                client,
                host: 1 + client % hosts,
            };
            let random = StdRng::seed_from_u64(options.seed.wrapping_add(u64::from(client)));
            runtime.spawn(Client::new(who).run(shared.clone(), random))
        })
        .collect();
    let struck = strike(lab, &shared, options);
    shared.stop();
    let worst = shared.worst();
    runtime.block_on(async {
        for client in clients {
            client.await.context("a client panicked")?;
        }
        anyhow::Ok(())
    })?;
    let took = began.elapsed();
    let faults = struck?;
    lab.wait_ready(crate::cluster::PATIENCE)?;
    // At every manager, after everything: what is lost now would never be noticed otherwise.
    let names: Vec<String> = shared.history.names();
    runtime.block_on(async {
        let reading = (1..=hosts).map(|host| {
            let who = Who {
                client: options.clients + host,
                host,
            };
            shared.read_everything(who, &names)
        });
        futures::future::try_join_all(reading).await
    })?;
    let objects = shared.history.take();
    let began = Instant::now();
    let mut summary = Summary {
        answered: shared.counts.answered.load(Ordering::Relaxed),
        refused: shared.counts.refused.load(Ordering::Relaxed),
        unknown: shared.counts.unknown.load(Ordering::Relaxed),
        took,
        faults,
        worst,
        objects: objects.len(),
        checked: Duration::ZERO,
        controls: (0, 0),
        reasons: shared.reasons(),
        violations: Vec::new(),
    };
    judge(&objects, &mut summary);
    summary.checked = began.elapsed();
    Ok(summary)
}

fn strike(lab: &mut Lab, shared: &Shared, options: &Options) -> Result<BTreeMap<String, u32>> {
    let mut random = StdRng::seed_from_u64(options.seed);
    let mut nemesis = Nemesis::new(lab, shared, options.hold);
    let mut faults = BTreeMap::new();
    let mut first = options.faults.iter();
    let mut stuck = Instant::now();
    let mut before = 0;
    loop {
        let total = shared.counts.total();
        let next = match first.next() {
            Some(fault) => Some(fault),
            None if total >= options.ops => return Ok(faults),
            None => options.faults.choose(&mut random),
        };
        match next {
            Some(fault) => {
                nemesis.strike(*fault)?;
                *faults.entry(fault.to_string()).or_default() += 1;
                eprintln!("{total:>8} operations  {fault}");
            }
            // Without faults the clients alone decide how long it takes.
            None => std::thread::sleep(Duration::from_millis(100)),
        }
        // Some time without faults too.
        std::thread::sleep(Duration::from_millis(random.random_range(100..500)));
        if total > before {
            (before, stuck) = (total, Instant::now());
        }
        ensure!(
            stuck.elapsed() < Duration::from_secs(120),
            "the clients stand still"
        );
    }
}

fn judge(objects: &BTreeMap<String, ObjectHistory>, summary: &mut Summary) {
    for (name, history) in objects {
        match model::verdict(history) {
            Verdict::Linearizable => {}
            Verdict::GaveUp => summary.violations.push(format!(
                "{name}: the search was given up; {} operations",
                history.records.len()
            )),
            Verdict::Violation => {
                let shown: Vec<String> = model::smallest(history)
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                summary.violations.push(format!(
                    "{name} is not linearizable; of {} operations these cannot be put in an order:\n{}",
                    history.records.len(),
                    shown.join("\n")
                ));
            }
        }
        if summary.controls.0 < CONTROLS
            && let Some(changed) = model::with_a_stale_read(history)
        {
            summary.controls.0 += 1;
            summary.controls.1 += usize::from(model::verdict(&changed) == Verdict::Violation);
        }
    }
}
