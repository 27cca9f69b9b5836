//! The program `swarm`. Everything is in the library beside it, which the fuzz targets link too.

use std::process::ExitCode;

fn main() -> ExitCode {
    swarm_cli::main()
}
