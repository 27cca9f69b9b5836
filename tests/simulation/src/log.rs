//! Log lines with simulated time and host.

use std::fmt;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::world::{self, MICRO, SECOND};

struct SimTime;

impl FormatTime for SimTime {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        if !world::exists() {
            return w.write_str("-");
        }
        let (now, host) = world::with(|world| (world.now(), world.running));
        write!(w, "{:4}.{:06}", now / SECOND, now % SECOND / MICRO)?;
        match host {
            Some(host) => write!(w, " h{host}"),
            None => w.write_str(" --"),
        }
    }
}

/// Starts logging to standard error if there is a filter.
pub fn start(filter: Option<&str>) {
    let Some(filter) = filter else { return };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_timer(SimTime)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
}
