//! The bench: parts that measure clusters of the lab and print tables.
//!
//! A part is a function that adds sections to a [`Report`]; [`PARTS`] is the registry. Not a
//! test: nothing here fails because something is slow.

pub mod api;
mod docker;
mod leaders;
pub mod load;
pub mod machine;
pub mod overlay;
pub mod report;
mod services;
mod writes;

use std::process::Child;

use anyhow::{Context as _, Result};

use crate::cluster::Cluster;
use report::Report;

/// How a part is to measure.
#[derive(Clone, Debug)]
pub struct Bench {
    /// How often each figure is measured.
    pub rounds: usize,
    /// How often the leader is killed; `None` = as often as the part thinks right.
    pub kills: Option<usize>,
    /// Seconds of one load of writes.
    pub seconds: f64,
    /// Docker Swarm is measured beside it, if it is installed.
    pub with_docker: bool,
}

/// Something that is measured.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// As it is asked for on the command line.
    pub name: &'static str,
    /// What it measures.
    pub about: &'static str,
    /// Measures it.
    pub run: fn(&Bench, &mut Report) -> Result<()>,
}

/// All parts, in the order in which they are measured.
pub const PARTS: &[Part] = &[
    Part {
        name: "services",
        about: "services start and end, workers die, memory",
        run: services::run,
    },
    Part {
        name: "leaders",
        about: "leaders die and hand over",
        run: leaders::run,
    },
    Part {
        name: "writes",
        about: "writes, against etcd",
        run: writes::run,
    },
    Part {
        name: "overlay",
        about: "the overlay, against bridge and VXLAN made by hand",
        run: overlay::run,
    },
    Part {
        name: "docker",
        about: "the same services with Docker Swarm (with --with-docker)",
        run: docker::run,
    },
];

/// A process that does not outlive its measurement.
#[derive(Debug)]
pub(crate) struct Background(pub Child);

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The host that leads.
pub(crate) fn leader(cluster: &Cluster) -> Result<String> {
    crate::lab::wait_until(crate::cluster::PATIENCE, "there is a leader", || {
        let format = "{{.Hostname}} {{.ManagerStatus}}";
        for host in cluster.hosts().iter().take(cluster.managers()) {
            if cluster.swarmd(host).is_err() {
                continue;
            }
            let listing = cluster.swarm(host, &["node", "ls", "--format", format])?;
            let leads = |line: &str| line.strip_suffix(" Leader").map(str::to_owned);
            return Ok(listing.lines().find_map(leads));
        }
        Ok(None)
    })
}

/// Runs async measuring from a part.
pub(crate) fn block_on<T>(measuring: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("starting a runtime")?
        .block_on(measuring)
}
