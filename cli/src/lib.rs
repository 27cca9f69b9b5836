//! The command line: speaks to swarmd over its local socket, and to nothing else.
//!
//! One file per verb. Flags parse into plain data; specs are built from them by
//! pure functions; errors are one sentence on standard error and exit status 1.

mod auth;
mod cluster;
mod daemon;
mod exec;
mod failure;
mod filter;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod logs;
mod network;
mod node;
mod output;
mod pretty;
mod removal;
mod service;
mod tasks;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use daemon::Daemon;
use failure::Result;

/// Runs containers on a cluster of machines
#[derive(clap::Parser, Debug)]
#[command(name = "swarm", version, arg_required_else_help = true)]
struct Cli {
    /// The socket of swarmd
    #[arg(
        long,
        global = true,
        env = "SWARM_SOCKET",
        default_value = "/run/swarm/swarm.sock"
    )]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    Init(cluster::init::Init),
    Join(cluster::join::Join),
    JoinToken(cluster::join_token::JoinToken),
    Leave(cluster::leave::Leave),
    Info(cluster::info::Info),
    /// Manage swarm nodes
    #[command(subcommand)]
    Node(node::Command),
    /// Manage services
    #[command(subcommand)]
    Service(service::Command),
    /// Manage networks
    #[command(subcommand)]
    Network(network::Command),
    Exec(exec::Exec),
    Logs(logs::Logs),
}

/// What is wrong with the arguments, in one sentence, and how the command is used.
fn usage(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut parts = text.trim_end().split("\n\n");
    let what = parts.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    let what = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) if flag.starts_with('-') => {
            format!("unknown flag: {flag}")
        }
        // What is missing, each on a line.
        _ => what.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    // Between them, a guess at what was meant.
    match parts.find(|part| part.starts_with("Usage:")) {
        Some(usage) => format!("{what}\n\n{usage}"),
        None => what,
    }
}

/// The whole program: reads the arguments, does what they say. Returns its exit status.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                    let _ = error.print();
                    ExitCode::SUCCESS
                }
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                    let _ = error.print();
                    ExitCode::FAILURE
                }
                _ => {
                    output::warn(&usage(&error));
                    ExitCode::FAILURE
                }
            };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            output::warn(&format!("cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                output::warn(&text);
            }
            ExitCode::from(failure.code())
        }
    }
}

async fn run(cli: Cli) -> Result {
    let daemon = Daemon::connect(&cli.socket).await?;
    dispatch(cli.command, &daemon).await
}

async fn dispatch(command: Command, daemon: &Daemon) -> Result {
    match command {
        Command::Init(flags) => cluster::init::run(flags, daemon).await,
        Command::Join(flags) => cluster::join::run(flags, daemon).await,
        Command::JoinToken(flags) => cluster::join_token::run(flags, daemon).await,
        Command::Leave(flags) => cluster::leave::run(flags, daemon).await,
        Command::Info(flags) => cluster::info::run(flags, daemon).await,
        Command::Node(command) => node::run(command, daemon).await,
        Command::Service(command) => service::run(command, daemon).await,
        Command::Network(command) => network::run(command, daemon).await,
        Command::Exec(flags) => exec::run(flags, daemon).await,
        Command::Logs(flags) => logs::run(flags, daemon).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
