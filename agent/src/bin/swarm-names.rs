//! The name server alone, for tests of the data plane: `swarmd names …` is the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    match swarm_agent::network::names::names_main(std::env::args_os().skip(2)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
