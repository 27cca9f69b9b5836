//! What the machine itself does while something is measured on it: load, stolen
//! time, and how often its disk can sync.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// On the disk of the lab's hosts.
const PROBE_DIR: &str = "/var/lib";
/// How long the disk is probed.
const PROBE_TIME: Duration = Duration::from_millis(500);
/// A disk that moved by more than this share makes no ratio.
const STEADY: f64 = 0.3;

/// A look at the machine.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// fdatasync after an append of 4 KiB, per second.
    pub syncs: f64,
    /// Load average of the last minute.
    load: f64,
    cpu: Cpu,
}

/// Jiffies since boot, over all cores.
#[derive(Clone, Copy, Debug)]
struct Cpu {
    total: u64,
    idle: u64,
    steal: u64,
}

impl Probe {
    /// Looks now; takes half a second.
    ///
    /// # Errors
    /// The disk cannot be written.
    pub fn take() -> Result<Self> {
        let load = fs::read_to_string("/proc/loadavg")?;
        let cpu = Cpu::now()?;
        let file = tempfile::tempfile_in(PROBE_DIR)?;
        let start = Instant::now();
        let mut count = 0_u32;
        while start.elapsed() < PROBE_TIME {
            (&file).write_all(&[0; 4096])?;
            file.sync_data()?;
            count += 1;
        }
        Ok(Self {
            syncs: f64::from(count) / start.elapsed().as_secs_f64(),
            load: load.split(' ').next().context("a load")?.parse()?,
            cpu,
        })
    }

    /// Whether the disk was much the same at both looks.
    #[must_use]
    pub fn steady(&self, other: &Self) -> bool {
        moved(&[*self, *other]) <= STEADY
    }
}

impl Cpu {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("a line of /proc/stat")?;
        let fields: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .map_while(|field| field.parse().ok())
            .collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or(0);
        Ok(Self {
            // Guests are counted as user time already.
            total: fields.iter().take(8).sum(),
            idle: field(3) + field(4),
            steal: field(7),
        })
    }
}

/// By which share the disk's rate moved between the probes.
fn moved(probes: &[Probe]) -> f64 {
    let rates = probes.iter().map(|probe| probe.syncs);
    let (least, most) = rates.fold((f64::MAX, 0.0_f64), |(least, most), rate| {
        (least.min(rate), most.max(rate))
    });
    if most == 0.0 {
        return 0.0;
    }
    (most - least) / most
}

/// The looks at the machine during one part.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    probes: Vec<Probe>,
}

impl Conditions {
    /// Looks again; returns what was seen.
    ///
    /// # Errors
    /// As [`Probe::take`].
    pub fn look(&mut self) -> Result<Probe> {
        let probe = Probe::take()?;
        self.probes.push(probe);
        Ok(probe)
    }

    /// For the JSON file.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "fdatasync_per_s": self.probes.iter().map(|probe| probe.syncs).collect::<Vec<_>>(),
            "load": self.probes.iter().map(|probe| probe.load).collect::<Vec<_>>(),
            "busy": self.share(|cpu| cpu.total - cpu.idle),
            "steal": self.share(|cpu| cpu.steal),
        })
    }

    /// The share of time that `part` of the CPU took, from the first look to the last.
    fn share(&self, part: impl Fn(&Cpu) -> u64) -> f64 {
        let (Some(first), Some(last)) = (self.probes.first(), self.probes.last()) else {
            return 0.0;
        };
        let total = last.cpu.total.saturating_sub(first.cpu.total);
        if total == 0 {
            return 0.0;
        }
        part(&last.cpu).saturating_sub(part(&first.cpu)) as f64 / total as f64
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(first), Some(last)) = (self.probes.first(), self.probes.last()) else {
            return Ok(());
        };
        let rates = self.probes.iter().map(|probe| probe.syncs);
        let least = rates.clone().fold(f64::MAX, f64::min);
        let most = rates.fold(0.0, f64::max);
        write!(
            f,
            "Meanwhile: load {:.1} → {:.1}, CPU busy {:.0} %, stolen {:.1} %, the disk's own fdatasync {:.0} to {:.0}/s.",
            first.load,
            last.load,
            100.0 * self.share(|cpu| cpu.total - cpu.idle),
            100.0 * self.share(|cpu| cpu.steal),
            least,
            most,
        )?;
        if moved(&self.probes) > STEADY {
            write!(
                f,
                " **The disk moved by {:.0} %.**",
                100.0 * moved(&self.probes)
            )?;
        }
        Ok(())
    }
}

/// The machine in a line: kernel, cores, memory, processor.
#[must_use]
pub fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key))
            .and_then(|rest| rest.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = read("/proc/meminfo");
    let kib: f64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().split(' ').next())
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0.0);
    format!(
        "{cpus} cores ({}), {:.0} GiB of memory, Linux {}",
        after(&read("/proc/cpuinfo"), "model name"),
        kib / f64::from(1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(syncs: f64) -> Probe {
        Probe {
            syncs,
            load: 0.0,
            cpu: Cpu {
                total: 0,
                idle: 0,
                steal: 0,
            },
        }
    }

    #[test]
    fn a_disk_that_moved_by_a_third_is_not_steady() {
        assert!(probe(1000.0).steady(&probe(750.0)));
        assert!(!probe(1000.0).steady(&probe(650.0)));
        assert!(!probe(650.0).steady(&probe(1000.0)));
    }
}
