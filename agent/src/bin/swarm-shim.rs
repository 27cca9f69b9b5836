//! Nothing but the container shims, for tests that run the real runtime.
//! In the product `swarmd` plays this part.

use std::process::ExitCode;

fn main() -> ExitCode {
    swarm_agent::runtime::reexec().unwrap_or_else(|| {
        eprintln!("started by tests only");
        ExitCode::from(2)
    })
}
